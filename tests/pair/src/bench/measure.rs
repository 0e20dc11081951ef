//! The measurements: the same guest protected, unprotected, and unprotected beside another busy guest in turn; an idle
//! one; kills.

use super::bare::bare;
use super::results::{Failover, Failovers, Idle, Machine, Protection, Results, Run, Workload};
use super::workloads::{ALL, START, Work};
use crate::cpu_time::MachineTime;
use crate::disk::Disk;
use crate::kills::{Kill, Plan};
use crate::lab::Lab;
use crate::mirrors::{image_of, mirrored, receive};
use crate::network::Side;
use crate::pair::{BOOT, Death, Pair, Protected, Timing};
use crate::vmm::Vmm;
use anyhow::{Context, Error, Result, ensure};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

/// How much of everything.
#[derive(Clone, Debug)]
pub struct Extent {
    /// Whether amounts are those of a smoke run.
    pub quick: bool,
    /// Runs of each kind of work, protected and as many unprotected.
    pub repetitions: usize,
    /// Names of the kinds of work; all if empty.
    pub only: Vec<String>,
    /// How long the idle guest is watched.
    pub idle: Duration,
    /// Kills with Dyad's own times.
    pub kills: u32,
    /// Kills with a failure timeout of 50 ms.
    pub fast_kills: u32,
    /// Kills with Dyad's own times, the host's cables dead first, so that nobody hears its connections close.
    pub host_kills: u32,
}

/// Takes results as they come: keeps them on disk and says what is going on.
pub struct Keeper<'a> {
    /// Everything so far.
    pub results: Results,
    /// Where it is kept.
    pub path: &'a Path,
    /// Hears of progress.
    pub tell: &'a mut dyn FnMut(&str),
}

impl Keeper<'_> {
    fn keep(&self) -> Result<()> {
        self.results.save(self.path)
    }
}

/// Measures work and idleness in one guest.
///
/// # Errors
///
/// The first thing that goes wrong; what was measured before is kept.
pub fn work(extent: &Extent, keeper: &mut Keeper) -> Result<()> {
    let chosen: Vec<&Work> = ALL
        .iter()
        .filter(|work| extent.only.is_empty() || extent.only.iter().any(|name| name == work.name))
        .collect();
    ensure!(!chosen.is_empty(), "no kind of work is named {:?}", extent.only);
    let lab = Lab::with_programs()?;
    lab.disk.allocate()?;
    let mut pair = Pair::boot_with(lab, START)?;
    let mut neighbour = Neighbour::boot(&pair.lab)?;
    keeper.results.machine.guest_kernel = pair.primary.console.run("uname -r", PATIENCE)?;
    for work in chosen {
        one_kind(&mut pair, &mut neighbour, work, extent, keeper)
            .with_context(|| format!("measuring {}\n{}", work.name, pair.describe()))?;
    }
    drop(neighbour);
    (keeper.tell)("idle");
    keeper.results.bare = Some(bare(&pair.lab.network, pair.lab.directory())?);
    keeper.results.idle = Some(idle(&mut pair, extent.idle)?);
    keeper.keep()?;
    pair.power_off()?;
    Ok(())
}

const PATIENCE: Duration = Duration::from_secs(60);
/// Nothing is written there.
const NEIGHBOUR_DISK_BYTES: u64 = 16 << 20;

fn one_kind(
    pair: &mut Pair,
    neighbour: &mut Neighbour,
    work: &Work,
    extent: &Extent,
    keeper: &mut Keeper,
) -> Result<()> {
    let steps = if extent.quick { work.quick } else { work.steps };
    let at = keeper.results.workloads.len();
    keeper.results.workloads.push(Workload {
        name: work.name.to_owned(),
        what: work.what.to_owned(),
        io: work.io,
        unit: work.unit.to_owned(),
        amount: steps as f64 * work.step,
        runs: Vec::new(),
    });
    if work.network.is_some() {
        pair.lab.network.limit_guests(pair.side, work.network)?;
    }
    // The first time reads programs from the disk; nobody measures that.
    (work.run)(pair, work.quick)?;
    for repetition in 0..extent.repetitions {
        // Which comes first changes, so that a guest growing slower or faster favours neither.
        let kinds: [Kind; 3] =
            [|pair, _, work, steps| plain_run(pair, work, steps), protected_run, beside_run];
        for kind in 0..kinds.len() {
            let run = kinds[(kind + repetition) % kinds.len()](pair, neighbour, work, steps)?;
            (keeper.tell)(&line(work, steps, &run));
            keeper.results.workloads[at].runs.push(run);
            keeper.keep()?;
        }
    }
    if work.network.is_some() {
        pair.lab.network.limit_guests(pair.side, None)?;
    }
    Ok(())
}

/// A way to do the work.
type Kind = fn(&mut Pair, &mut Neighbour, &Work, u64) -> Result<Run>;

fn line(work: &Work, steps: u64, run: &Run) -> String {
    let rate = steps as f64 * work.step / run.seconds;
    let busy = run.machine_busy_seconds / run.seconds;
    let start = format!(
        "{:10} {:6.2} s, {rate:8.1} {}/s, {busy:.2} processors busy",
        work.name, run.seconds, work.unit
    );
    let Some(protection) = &run.protection else {
        let beside = run.neighbour_cpu_seconds.map(|_| ", one of them by another guest");
        return format!("{start}, unprotected{}", beside.unwrap_or_default());
    };
    format!(
        "{start}, protected: log {:.2} Mbit/s, output delay {} / {} us, lag {} / {} us, throttle {:.2}",
        protection.log_bytes as f64 * 8e-6 / run.seconds,
        protection.output_delay.p50_us,
        protection.output_delay.p99_us,
        protection.lag.p50_us,
        protection.lag.p99_us,
        protection.throttle,
    )
}

fn plain_run(pair: &mut Pair, work: &Work, steps: u64) -> Result<Run> {
    let times =
        |vmm: &Vmm| Ok::<_, Error>((vmm.cpu_time()?, vmm.vcpu_time()?, MachineTime::now()?));
    let (cpu, vcpu, machine) = times(&pair.primary)?;
    let start = Instant::now();
    (work.run)(pair, steps)?;
    let seconds = start.elapsed().as_secs_f64();
    let (cpu_after, vcpu_after, machine_after) = times(&pair.primary)?;
    let vcpu = vcpu_after.since(vcpu);
    Ok(Run {
        seconds,
        primary_cpu_seconds: (cpu_after - cpu).as_secs_f64(),
        machine_busy_seconds: machine_after.busy_since(machine).as_secs_f64(),
        vcpu_seconds: vcpu.total().as_secs_f64(),
        vcpu_user_seconds: vcpu.user.as_secs_f64(),
        neighbour_cpu_seconds: None,
        protection: None,
    })
}

/// Another guest, which computes without end and stands still but for the runs beside it: as busy as the guest of a
/// backup, and in need of the same caches, but nobody's backup.
struct Neighbour(Vmm);

impl Neighbour {
    fn boot(lab: &Lab) -> Result<Self> {
        let disk = Disk::create(lab.directory().join("neighbour.raw"), NEIGHBOUR_DISK_BYTES)?;
        let options = lab.options_without_network("dyad.run=shell", &disk);
        let mut vmm = lab.start(Side::B, &options)?;
        vmm.console.wait_for("# ", BOOT).with_context(|| vmm.log())?;
        vmm.console.run("(stress-ng --cpu 1 >/dev/null 2>&1 &)", PATIENCE)?;
        vmm.api().put("vm.pause")?;
        Ok(Self(vmm))
    }
}

/// Beside another guest.
fn beside_run(pair: &mut Pair, neighbour: &mut Neighbour, work: &Work, steps: u64) -> Result<Run> {
    let neighbour = &neighbour.0;
    neighbour.api().put("vm.resume")?;
    let cpu = neighbour.cpu_time()?;
    let run = plain_run(pair, work, steps);
    let neighbour_cpu_seconds = Some((neighbour.cpu_time()? - cpu).as_secs_f64());
    neighbour.api().put("vm.pause")?;
    Ok(Run { neighbour_cpu_seconds, ..run? })
}

/// Protects with mirrored disks; the second image is made when it is needed first.
fn mirror(pair: &mut Pair) -> Result<Protected> {
    let image = image_of(&pair.lab, pair.side.other());
    if !image.exists() {
        Disk::create(image.clone(), pair.lab.disk.path().metadata()?.len())?.allocate()?;
    }
    pair.protect_with(&receive(&image), &mirrored())
}

fn protected_run(pair: &mut Pair, _: &mut Neighbour, work: &Work, steps: u64) -> Result<Run> {
    // Each run has a protection of its own: what the status counts from its start is this run's.
    let protected = if work.mirrored { mirror(pair) } else { pair.protect() };
    let pause = protected?.pause;
    let backup_times = |pair: &Pair| {
        let backup = pair.backup.as_ref().context("no backup")?;
        Ok::<_, Error>((backup.cpu_time()?, backup.vcpu_time()?))
    };
    let (before, (cpu, vcpu)) = (pair.status()?, backup_times(pair)?);
    let mut run = plain_run(pair, work, steps)?;
    let (after, (cpu_after, vcpu_after)) = (pair.status()?, backup_times(pair)?);
    pair.digests_are_equal()?;
    ensure!(after.state == "protected", "protection was lost: {after:?}");
    pair.unprotect()?;
    let vcpu = vcpu_after.since(vcpu);
    run.protection = Some(Protection {
        pause_ms: pause.as_secs_f64() * 1e3,
        log_bytes: after.log.recorded_bytes - before.log.recorded_bytes,
        output_delay: after.output_delay,
        lag: after.lag,
        backup_cpu_seconds: (cpu_after - cpu).as_secs_f64(),
        backup_vcpu_seconds: vcpu.total().as_secs_f64(),
        backup_vcpu_user_seconds: vcpu.user.as_secs_f64(),
        throttle: (after.throttled_us - before.throttled_us) as f64 * 1e-6 / run.seconds,
        stalls: after.stalls,
    });
    Ok(run)
}

fn idle(pair: &mut Pair, length: Duration) -> Result<Idle> {
    let cpu = pair.primary.cpu_time()?;
    std::thread::sleep(length);
    let unprotected = pair.primary.cpu_time()? - cpu;
    pair.protect()?;
    let backup = pair.backup.as_ref().context("no backup")?;
    let (before, cpu, backup_cpu) = (pair.status()?, pair.primary.cpu_time()?, backup.cpu_time()?);
    let start = Instant::now();
    std::thread::sleep(length);
    let seconds = start.elapsed().as_secs_f64();
    let log_bytes = pair.status()?.log.recorded_bytes - before.log.recorded_bytes;
    let idle = Idle {
        seconds,
        log_bytes,
        primary_cpu_seconds: (pair.primary.cpu_time()? - cpu).as_secs_f64(),
        backup_cpu_seconds: (backup.cpu_time()? - backup_cpu).as_secs_f64(),
        unprotected_cpu_seconds: unprotected.as_secs_f64(),
    };
    pair.unprotect()?;
    Ok(idle)
}

/// Kills with Dyad's own times, the same with a failure timeout of 50 ms, and hosts that die without a word.
///
/// # Errors
///
/// As [`Plan::run`]; the kills before are kept.
pub fn kills(extent: &Extent, keeper: &mut Keeper) -> Result<()> {
    let own = ft::Timing::default();
    let own = Timing { heartbeat_ms: own.heartbeat_ms, failure_timeout_ms: own.failure_timeout_ms };
    let fast = Timing { heartbeat_ms: 10, failure_timeout_ms: 50 };
    let series = [
        ("defaults", own, extent.kills, Death::Process),
        ("50 ms", fast, extent.fast_kills, Death::Process),
        ("defaults, cables pulled", own, extent.host_kills, Death::Host),
    ];
    for (name, timing, kills, death) in series {
        let plan = Plan {
            kills,
            death,
            longest_wait: Duration::from_millis(600),
            timing: Some(timing),
            ..Plan::default()
        };
        if kills > 0 {
            kills_with(name, timing, &plan, keeper).with_context(|| format!("kills, {name}"))?;
        }
    }
    Ok(())
}

fn kills_with(name: &str, timing: Timing, plan: &Plan, keeper: &mut Keeper) -> Result<()> {
    let planned = plan.kills;
    let at = keeper.results.failovers.len();
    keeper.results.failovers.push(Failovers {
        name: name.to_owned(),
        heartbeat_ms: timing.heartbeat_ms,
        failure_timeout_ms: timing.failure_timeout_ms,
        planned,
        kills: Vec::new(),
        acknowledged: None,
    });
    let mut unkept = Ok(());
    let account = plan.run(Lab::new()?, |kill| {
        let told = failover(kill).and_then(|failover| {
            (keeper.tell)(&format!(
                "{name}: kill {} of {planned}: first answer after {:.0} ms (detection {:.0}, replay {:.1}, \
                 lease {:.0}, claim {:.1}, go-live {:.1}), pause {:.1} ms",
                kill.number,
                failover.first_answer_ms,
                failover.detection_ms,
                failover.replay_ms,
                failover.lease_ms,
                failover.claim_ms,
                failover.go_live_ms,
                failover.pause_ms,
            ));
            keeper.results.failovers[at].kills.push(failover);
            keeper.keep()
        });
        if unkept.is_ok() {
            unkept = told;
        }
    })?;
    unkept?;
    keeper.results.failovers[at].acknowledged = Some(account.verdict.acknowledged as u64);
    keeper.keep()
}

fn failover(kill: &Kill) -> Result<Failover> {
    let timeline = kill.status.last_failover.as_ref().context("no timeline in ft.status")?;
    let ms = |from: Option<u64>, to: Option<u64>| -> Result<f64> {
        let (from, to) = from.zip(to).with_context(|| format!("unfinished: {timeline:?}"))?;
        Ok(to.saturating_sub(from) as f64 * 1e-3)
    };
    let suspected = Some(timeline.suspected_us);
    // The claim is asked for when both the records and the lease are done with, whichever is later.
    let drained = timeline.drained_us.max(suspected);
    let lease = timeline.lease_over_us.max(drained);
    Ok(Failover {
        first_answer_ms: kill.failover.as_secs_f64() * 1e3,
        detection_ms: ms(Some(0), suspected)?,
        replay_ms: ms(suspected, drained)?,
        lease_ms: ms(drained, lease)?,
        claim_ms: ms(lease, timeline.claimed_us)?,
        go_live_ms: ms(timeline.claimed_us, timeline.live_us)?,
        pause_ms: kill.protected.pause.as_secs_f64() * 1e3,
        protect_ms: kill.protected.took.as_secs_f64() * 1e3,
    })
}

/// The machine this runs on.
///
/// # Errors
///
/// If `/proc` has another form.
pub fn machine(quick: bool) -> Result<Machine> {
    let said = |program: &str, arguments: &[&str]| {
        let output = Command::new(program).args(arguments).output();
        let output = output.ok().filter(|output| output.status.success());
        output.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let field = |file: &str, name: &str| -> Result<String> {
        let text = std::fs::read_to_string(file)?;
        let line = text.lines().find(|line| line.starts_with(name));
        let line = line.with_context(|| format!("{file} has no {name}"))?;
        Ok(line.split_once(':').map_or(line, |(_, value)| value).trim().to_owned())
    };
    let memory = field("/proc/meminfo", "MemTotal")?;
    let root = crate::guest::root();
    let commit = said("git", &["-C", &root.to_string_lossy(), "rev-parse", "--short", "HEAD"]);
    let commit = commit.map_or_else(String::new, |commit| format!(" ({commit})"));
    Ok(Machine {
        processor: field("/proc/cpuinfo", "model name")?,
        processors: std::thread::available_parallelism()?.get(),
        memory_mib: memory.trim_end_matches(" kB").parse::<u64>()? >> 10,
        kernel: said("uname", &["-sr"]).context("cannot run uname")?,
        guest_kernel: String::new(),
        date: said("date", &["-u", "+%Y-%m-%d"]).context("cannot run date")?,
        version: format!("{}{commit}", env!("CARGO_PKG_VERSION")),
        quick,
    })
}
