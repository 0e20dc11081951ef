//! What hosts and networks do to a protected guest: one named story for each fault.
//!
//! Every story ends with the same account: one side goes on, the client's one connection has stayed open, each
//! answer it got is on the disk, in order, and the file system is sound.

use anyhow::{Context, Result, ensure};
use ft::{DiskMode, FtStatus};
use ledger_client::load::{Load, Options};
use ledger_client::verdict::Verdict;
use nix::libc::O_NONBLOCK;
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use pair_tests::faults::{Fault, Storm, proxy, through};
use pair_tests::kills::progress;
use pair_tests::lab::Lab;
use pair_tests::pair::{CHANGE, Pair, listen_url, wait_for_status};
use pair_tests::patience::eventually;
use pair_tests::proxy::{Proxy, Weather};
use pair_tests::requirements::{Need, met};
use serde_json::json;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::time::Instant;

const NEEDS: [Need; 2] = [Need::Root, Need::Tap];

/// Boots a guest, puts a client on it, lets `plot` happen and balances the account.
fn story(name: &str, plot: impl FnOnce(&mut Pair, &Load) -> Result<()>) -> Result<()> {
    if !met(name, &NEEDS) {
        return Ok(());
    }
    let mut pair = Pair::boot(Lab::new()?)?;
    let load = pair.lab.load(Options::new(pair.lab.service()?, "fault"))?;
    progress(&load, 5)?;
    plot(&mut pair, &load).with_context(|| pair.describe())?;
    progress(&load, 20)?;
    pair.balance(load)
}

/// A story of one fault, after which the VM is protected again.
fn strikes(fault: Fault) -> Result<()> {
    story(&format!("{fault:?}"), |pair, load| {
        let proxy = proxy(pair, 1)?;
        pair.protect_with(&json!({}), &through(&proxy, fault.terms()))?;
        progress(load, 20)?;
        fault.strike(pair, &proxy, load)?;
        pair.protect().map(drop)
    })
}

#[test]
fn a_backup_that_was_only_asleep_gives_up() -> Result<()> {
    strikes(Fault::BackupAsleep)
}

#[test]
fn a_link_that_is_dead_both_ways_leaves_one_side() -> Result<()> {
    strikes(Fault::LinkDead)
}

#[test]
fn a_link_that_is_dead_towards_the_backup_leaves_one_side() -> Result<()> {
    strikes(Fault::LinkDeadToBackup)
}

#[test]
fn a_link_that_is_dead_towards_the_primary_leaves_one_side() -> Result<()> {
    strikes(Fault::LinkDeadToPrimary)
}

#[test]
fn a_cut_connection_between_healthy_hosts_leaves_one_side() -> Result<()> {
    strikes(Fault::ConnectionCut)
}

#[test]
fn a_slow_and_lossy_link_costs_time_and_nothing_else() -> Result<()> {
    strikes(Fault::SlowLinkThenKilled)
}

#[test]
fn ten_faults_at_random() -> Result<()> {
    if !met("ten faults at random", &NEEDS) {
        return Ok(());
    }
    let storm = Storm { count: 10, seed: 1, disk_mode: DiskMode::Shared };
    let verdict = storm.run(Lab::new()?, |number, fault, took| {
        println!("{number}: {fault:?}, answered again and settled after {took:?}");
    })?;
    ensure!(verdict.acknowledged > 100, "{verdict:?}");
    Ok(())
}

/// Where the making of a backup can be held up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// The primary has connected and is not answered.
    Greeting,
    /// Memory goes over, slowly.
    Copying,
    /// Memory is over, and the backup's word that it is does not arrive.
    Unanswered,
    /// It counts.
    Protected,
}

const PHASES: [Phase; 4] = [Phase::Greeting, Phase::Copying, Phase::Unanswered, Phase::Protected];

/// Begins to protect through `proxy`, and returns once the primary is in `phase`; the call of `ft.enable`
/// goes on in a thread, since it may never be answered.
fn enter(phase: Phase, pair: &mut Pair, proxy: &Proxy) -> Result<()> {
    let clear = Weather::default();
    let mute = Weather { mute: true, ..clear };
    proxy.set(match phase {
        Phase::Greeting => mute,
        Phase::Copying | Phase::Unanswered => Weather { rate: Some(8 << 20), ..clear },
        Phase::Protected => clear,
    });
    let other = pair.side.other();
    let backup = pair.lab.start(other, &[])?;
    let listen = listen_url(other);
    backup.api().put_json("ft.receive", &json!({ "listen_url": listen }))?;
    pair.backup = Some(backup);
    let enable = through(proxy, pair.lab.enable(&listen));
    let api = pair.primary.api().clone();
    // Its answer is a refusal when the story kills the backup, and an error when it kills the primary.
    std::thread::spawn(move || api.put_json("ft.enable", &enable));
    let state = |state: &'static str| {
        wait_for_status(&pair.primary, state, |status| status.state == state).map(drop)
    };
    match phase {
        // The API serves one call at a time, and this one waits for an answer that does not come.
        Phase::Greeting => eventually(CHANGE, "the primary connects", || {
            Ok((proxy.connections() > 0).then_some(()))
        }),
        Phase::Copying => state("copying"),
        Phase::Unanswered => {
            state("copying")?;
            proxy.set(mute);
            wait_for_status(&pair.primary, "everything sent", |status| {
                status.clone.as_ref().is_some_and(|clone| clone.sent_bytes > 0)
            })
            .map(drop)
        }
        Phase::Protected => state("protected"),
    }
}

#[test]
fn a_backup_killed_in_any_phase_of_the_copy_costs_nothing() -> Result<()> {
    story("backup killed during ft.enable", |pair, load| {
        for phase in PHASES {
            let proxy = proxy(pair, 3)?;
            enter(phase, pair, &proxy).with_context(|| format!("{phase:?}"))?;
            pair.kill_backup()?;
            proxy.set(Weather::default());
            pair.wait_until_alone().with_context(|| format!("after a kill: {phase:?}"))?;
            // It would look for this backup again.
            pair.primary.api().put("ft.disable").or_else(|_| pair.wait_until_alone().map(drop))?;
            progress(load, 10)?;
        }
        pair.protect().map(drop)
    })
}

#[test]
fn a_primary_killed_before_protection_takes_its_vm_along() -> Result<()> {
    for phase in PHASES.into_iter().filter(|phase| *phase != Phase::Protected) {
        if !met("primary killed during ft.enable", &NEEDS) {
            return Ok(());
        }
        let mut pair = Pair::boot(Lab::new()?)?;
        let proxy = proxy(&pair, 4)?;
        enter(phase, &mut pair, &proxy).with_context(|| pair.describe())?;
        pair.primary.kill()?;
        proxy.set(Weather::default());
        let backup = pair.backup.take().context("no backup")?;
        let status =
            wait_for_status(&backup, "waits for the next", |status| status.state == "listening")
                .with_context(|| format!("killed: {phase:?}"))?;
        ensure!(status.last_failover.is_none(), "a copy that never counted went live: {status:?}");
        ensure!(backup.state().is_err(), "it still has a VM");
        pair.lab.disk.check()?;
    }
    Ok(())
}

#[test]
fn nothing_acknowledged_is_lost_when_both_sides_die() -> Result<()> {
    if !met("both sides killed", &NEEDS) {
        return Ok(());
    }
    let (at_once, going_live, live): ([&str; 0], _, _) =
        ([], ["draining", "claiming", "claimed", "live"], ["live"]);
    for moment in [&at_once[..], &going_live, &live] {
        let mut pair = Pair::boot(Lab::new()?)?;
        let load = pair.lab.load(Options::new(pair.lab.service()?, "both"))?;
        pair.protect()?;
        progress(&load, 20)?;
        let mut backup = pair.backup.take().context("no backup")?;
        let dead = pair.primary.kill()?;
        let state = match moment {
            [] => "replaying".to_owned(),
            moment => {
                let taking_over = |status: &FtStatus| moment.contains(&status.state.as_str());
                wait_for_status(&backup, "takes over", taking_over)?.state
            }
        };
        backup.kill()?;
        println!("the backup died {:?} after the primary, while {state}", dead.elapsed());
        let answers = load.abandon();
        ensure!(answers.len() >= 20);
        // The next mount replays the journal; what was acknowledged was synced before.
        pair.lab.disk.check()?;
        let verdict = Verdict::of(&answers, &pair.lab.disk.ledger()?);
        ensure!(verdict.lost == 0, "{verdict:?}");
    }
    Ok(())
}

#[test]
fn a_link_that_hangs_for_less_than_the_timeout_is_no_failure() -> Result<()> {
    story("link that hangs for a moment", |pair, load| {
        let proxy = proxy(pair, 5)?;
        let patient = json!({ "failure_timeout_ms": 30_000 });
        pair.protect_with(&json!({}), &through(&proxy, patient))?;
        progress(load, 20)?;
        proxy.set(Weather { mute: true, ..Weather::default() });
        let held =
            wait_for_status(&pair.primary, "outputs wait", |status| status.held_outputs > 0)?;
        ensure!(held.state == "protected", "{held:?}");
        let asked = Instant::now();
        proxy.set(Weather::default());
        load.first_answer_after(asked)?;
        let status = pair.status()?;
        ensure!(status.state == "protected" && status.last_failover.is_none(), "{status:?}");
        Ok(())
    })
}

/// A pipe that takes no more, and its name in the file system.
fn full_pipe(lab: &Lab) -> Result<(File, String)> {
    let path = lab.directory().join("log");
    mkfifo(&path, Mode::S_IRWXU)?;
    let open = OpenOptions::new().read(true).write(true).custom_flags(O_NONBLOCK).open(&path);
    let mut pipe = open?;
    while pipe.write(&[b'\n'; 4096]).is_ok() {}
    Ok((pipe, path.to_string_lossy().into_owned()))
}

#[test]
fn a_log_that_nobody_reads_keeps_nobody_waiting() -> Result<()> {
    if !met("log that nobody reads", &NEEDS) {
        return Ok(());
    }
    let lab = Lab::new()?;
    let (mut pipe, path) = full_pipe(&lab)?;
    let options = [lab.boot_options(""), vec!["--log-file".to_owned(), path]].concat();
    let mut pair = Pair::boot_from(lab, &options)?;
    let load = pair.lab.load(Options::new(pair.lab.service()?, "log"))?;
    // Each change of state is told in the log, by the threads that keep the pair together.
    for _ in 0..2 {
        pair.protect()?;
        progress(&load, 20)?;
        let killed = pair.kill_backup()?;
        load.first_answer_after(killed)?;
        pair.wait_until_alone()?;
    }
    ensure!(pipe.write(b"\n").is_err(), "somebody reads the log");
    pair.balance(load)
}
