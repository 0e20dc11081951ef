//! The document: says in plain tables what was measured, what was wanted, and where that was missed.

use super::misses;
use super::plots::{Bar, bars, distributions};
use super::results::{Failover, Failovers, Protection, Results, Workload};
use super::targets::{self, wanted_ratio};
use anyhow::{Context, Result};
use ledger_client::stats::Distribution;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// What VMware FT's authors published (Scales, Nelson, Venkitachalam 2010, section 5): the kind of work of ours that is
/// nearest, theirs, speed protected over unprotected, log in Mbit/s.
const PAPER: [(&str, &str, f64, f64); 9] = [
    ("processor", "SPECjbb2005", 0.98, 1.5),
    ("memory", "SPECjbb2005", 0.98, 1.5),
    ("compile", "kernel compile", 0.95, 3.0),
    ("redis", "MS-SQL DVD Store", 0.94, 18.0),
    ("redis mirrored", "MS-SQL DVD Store", 0.94, 18.0),
    ("sqlite", "Oracle Swingbench", 0.99, 12.0),
    ("sqlite mirrored", "Oracle Swingbench", 0.99, 12.0),
    ("receive 1 Gbit/s", "netperf receive, 10 Gbit/s for the log", 860.0 / 940.0, 990.0),
    ("transmit 1 Gbit/s", "netperf transmit, 10 Gbit/s for the log", 935.0 / 940.0, 60.0),
];

/// Writes the document and its plots into `docs`; where the document is.
///
/// # Errors
///
/// If the folder cannot be written.
pub fn write(results: &Results, docs: &Path) -> Result<PathBuf> {
    let folder = docs.join("performance");
    std::fs::create_dir_all(&folder)
        .with_context(|| format!("cannot make {}", folder.display()))?;
    plot(results, &folder)?;
    let path = docs.join("performance.md");
    std::fs::write(&path, document(results)?)
        .with_context(|| format!("cannot write {}", path.display()))?;
    Ok(path)
}

fn plot(results: &Results, folder: &Path) -> Result<()> {
    let processors = results.machine.processors;
    let bar = |work: &Workload, value: Option<f64>| {
        Some(Bar { name: work.name.clone(), value: value?, target: None, ceiling: None })
    };
    let ratio = |work: &Workload| {
        let (target, ceiling) = (Some(wanted_ratio(work)), work.ceiling(processors));
        Some(Bar { target, ceiling, ..bar(work, work.ratio())? })
    };
    let ratios: Vec<Bar> = results.workloads.iter().filter_map(ratio).collect();
    let title = "Speed protected / unprotected (red: wanted, green: ceiling of this machine)";
    bars(&folder.join("ratio.svg"), title, "ratio", &ratios)?;
    let logs: Vec<Bar> = results
        .workloads
        .iter()
        // A stream that the guest receives is all in the log; beside it nothing else could be seen.
        .filter(|work| !work.name.starts_with("receive"))
        .filter_map(|work| bar(work, work.log_mbit_per_second()))
        .collect();
    bars(&folder.join("log.svg"), "Log, without received streams", "Mbit/s", &logs)?;
    let series: Vec<(String, Vec<f64>)> = results
        .failovers
        .iter()
        .filter(|failovers| !failovers.kills.is_empty())
        .map(|failovers| {
            let times = failovers.kills.iter().map(|kill| kill.first_answer_ms).collect();
            (failovers.name.clone(), times)
        })
        .collect();
    distributions(&folder.join("failover.svg"), "From the kill to the first answer", &series)
}

fn document(results: &Results) -> Result<String> {
    let mut text = String::from(
        "# Performance\n\n\
         What protection costs and how long a failover takes. `scripts/bench` measures all of it in one run and writes \
         this page;\n`scripts/bench --report` writes it again from the same figures.\n\n",
    );
    if results.machine.quick {
        text.push_str("**This was a smoke run (`--quick`): the figures mean nothing.**\n\n");
    }
    machine(&mut text, results)?;
    targets::write(&mut text, results)?;
    work(&mut text, results)?;
    misses::write(&mut text, results)?;
    paper(&mut text, results)?;
    idle(&mut text, results)?;
    failovers(&mut text, results)?;
    method(&mut text)?;
    Ok(text)
}

fn machine(text: &mut String, results: &Results) -> Result<()> {
    let machine = &results.machine;
    writeln!(
        text,
        "Measured on {} with Dyad {}: {} processors ({}), {} MiB of memory, {}; guest: Debian 12, Linux {}, on the \
         software CPU.\nBoth hosts are network namespaces of this one machine. The primary, the backup and the client \
         share its processors,\nwhich two real hosts would not.\n",
        machine.date,
        machine.version,
        machine.processors,
        machine.processor,
        machine.memory_mib,
        machine.kernel,
        machine.guest_kernel,
    )?;
    Ok(())
}

fn work(text: &mut String, results: &Results) -> Result<()> {
    writeln!(
        text,
        "## Work\n\nMedians. Ratio: speed protected over speed unprotected. Ceiling: the highest ratio that any pair in \
         lockstep could reach\non this machine's processors, if nothing but the guest's instructions, executed twice, cost anything. Beside: speed unprotected while \
         another, unprotected\nguest computes on the same machine, over speed unprotected. Delay: from the output to the backup's acknowledgement. Lag: how far the backup was behind. Pause: how long the guest stood still to be \
         protected.\nTaken: time that lag control took from the primary. Processors: of the primary's process without and with protection, and of the backup's, in seconds \
         per second\nof the unprotected run.\n\n\
         | work | unprotected | protected | ratio | ceiling | beside | log Mbit/s | delay p50 / p99 ms | lag p50 / p99 ms | pause ms | taken % | processors |\n\
         | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    )?;
    for work in &results.workloads {
        let speed = |protected| work.median(protected, |run| work.amount / run.seconds);
        let seconds = work.median(false, |run| run.seconds);
        let of = |figure: fn(&Protection) -> f64| work.under_protection(figure);
        let (Some(plain), Some(protected), Some(seconds)) = (speed(false), speed(true), seconds)
        else {
            writeln!(text, "| {} | not finished | | | | | | | | | | |", work.name)?;
            continue;
        };
        let number = |value: Option<f64>, scale: f64, digits: usize| {
            value.map_or_else(String::new, |value| format!("{:.digits$}", value / scale))
        };
        writeln!(
            text,
            "| {} | {} {}/s | {} | {} | {} | {} | {} | {} / {} | {} / {} | {} | {} | {} → {} + {} |",
            work.name,
            significant(plain),
            work.unit,
            significant(protected),
            number(work.ratio(), 1.0, 2),
            number(work.ceiling(results.machine.processors), 1.0, 2),
            number(work.beside(), 1.0, 2),
            number(work.log_mbit_per_second(), 1.0, 2),
            number(of(|protection| protection.output_delay.p50_us as f64), 1e3, 2),
            number(of(|protection| protection.output_delay.p99_us as f64), 1e3, 2),
            number(of(|protection| protection.lag.p50_us as f64), 1e3, 1),
            number(of(|protection| protection.lag.p99_us as f64), 1e3, 1),
            number(of(|protection| protection.pause_ms), 1.0, 1),
            number(of(|protection| protection.throttle), 1e-2, 1),
            number(work.median(false, |run| run.primary_cpu_seconds), seconds, 2),
            number(work.median(true, |run| run.primary_cpu_seconds), seconds, 2),
            number(of(|protection| protection.backup_cpu_seconds), seconds, 2),
        )?;
    }
    writeln!(text, "\n![ratios](performance/ratio.svg)\n\n![log](performance/log.svg)\n")?;
    for work in &results.workloads {
        writeln!(text, "- **{}**: {}", work.name, work.what)?;
    }
    writeln!(text)?;
    Ok(())
}

fn significant(value: f64) -> String {
    let digits = (2 - value.abs().max(1e-9).log10().floor() as i32).clamp(0, 4);
    format!("{value:.*}", usize::try_from(digits).unwrap_or(0))
}

fn paper(text: &mut String, results: &Results) -> Result<()> {
    writeln!(
        text,
        "## Beside VMware FT\n\nThe figures published for VMware FT (Scales, Nelson, Venkitachalam, 2010) were measured on \
         hardware-virtualised guests with\na host each; ours run on a software CPU, so that absolute log rates are \
         smaller for the same reason for which the guests\nare slower. What carries over is the ratio, and for streams \
         over the network of 1 Gbit/s that their guests had too, the log.\nTheir log had a network of 1 or of 10 Gbit/s; \
         ours is as fast as this machine. They had a shared disk.\n\n\
         | work | ratio | log Mbit/s | nearest in the paper | its ratio | its log Mbit/s | |\n\
         | --- | --- | --- | --- | --- | --- | --- |"
    )?;
    for (name, theirs, their_ratio, their_log) in PAPER {
        let Some(work) = results.workloads.iter().find(|work| work.name == name) else { continue };
        let (Some(ratio), Some(log)) = (work.ratio(), work.log_mbit_per_second()) else { continue };
        let ratio_verdict = if ratio >= their_ratio { "ratio not below" } else { "ratio below" };
        let log_verdict = if log < their_log { "log below" } else { "**log above**" };
        writeln!(
            text,
            "| {name} | {ratio:.2} | {log:.2} | {theirs} | {their_ratio:.2} | {their_log} | {ratio_verdict}, {log_verdict} |"
        )?;
    }
    if let Some(idle) = &results.idle {
        let log = idle.log_mbit_per_second();
        let verdict = if log < 0.5 { "log below" } else { "**log above**" };
        writeln!(text, "| idle | | {log:.3} | idle guest | | 0.5 to 1.5 | {verdict} |")?;
    }
    writeln!(
        text,
        "\nThe paper gives no distribution of failover times; it speaks of a take-over within seconds.\n"
    )?;
    Ok(())
}

fn idle(text: &mut String, results: &Results) -> Result<()> {
    let Some(idle) = &results.idle else { return Ok(()) };
    let share = |seconds: f64| seconds / idle.seconds * 100.0;
    writeln!(
        text,
        "## Idle\n\nA guest that does nothing, over {:.0} s: {:.3} Mbit/s of log; {:.1} % of a processor unprotected, {:.1} % as \
         primary\nand {:.1} % as backup.\n",
        idle.seconds,
        idle.log_mbit_per_second(),
        share(idle.unprotected_cpu_seconds),
        share(idle.primary_cpu_seconds),
        share(idle.backup_cpu_seconds),
    )?;
    Ok(())
}

fn failovers(text: &mut String, results: &Results) -> Result<()> {
    writeln!(
        text,
        "## Failover\n\nThe primary is killed at a random moment while a client appends lines over one connection, each answered \
         when it is\non the disk. The phases are the backup's own account, from when it heard the primary last: until \
         it suspects it, until\nevery record received is executed, until the primary's lease has certainly run out, until the \
         arbiter has granted the\nclaim, until the guest runs. The client's time starts at the kill and ends at the first \
         answer of the new primary. A request that was lost on its way to the dead host is sent again when the client's TCP times \
         out,\nwhich on Linux is 200 ms at the least: where the guest runs again sooner, that is what the client \
         waits for.\n\n![failover](performance/failover.svg)\n"
    )?;
    for series in &results.failovers {
        one_series(text, series)?;
    }
    Ok(())
}

pub(super) type Figure = fn(&Failover) -> f64;

fn one_series(text: &mut String, series: &Failovers) -> Result<()> {
    writeln!(
        text,
        "### {}: {} kills, heartbeat {} ms, failure timeout {} ms\n",
        series.name,
        series.kills.len(),
        series.heartbeat_ms,
        series.failure_timeout_ms
    )?;
    if series.kills.len() < series.planned as usize {
        writeln!(text, "**Interrupted: {} kills were planned.**\n", series.planned)?;
    }
    writeln!(text, "| milliseconds | min | median | p99 | max |\n| --- | --- | --- | --- | --- |")?;
    let rows: [(&str, Figure); 9] = [
        ("detection", |kill| kill.detection_ms),
        ("replay of the rest", |kill| kill.replay_ms),
        ("lease", |kill| kill.lease_ms),
        ("claim", |kill| kill.claim_ms),
        ("go live", |kill| kill.go_live_ms),
        ("**last heard to guest running**", Failover::live_ms),
        ("**kill to first answer**", |kill| kill.first_answer_ms),
        ("pause when protecting", |kill| kill.pause_ms),
        ("protecting, in all", |kill| kill.protect_ms),
    ];
    for (name, figure) in rows {
        let times =
            series.kills.iter().map(|kill| Duration::from_secs_f64(figure(kill).max(0.0) / 1e3));
        let Some(times) = Distribution::of(times) else { continue };
        let Distribution { min_ms, median_ms, p99_ms, max_ms, .. } = times;
        writeln!(text, "| {name} | {min_ms:.1} | {median_ms:.1} | {p99_ms:.1} | {max_ms:.1} |")?;
    }
    match series.acknowledged {
        Some(count) => writeln!(
            text,
            "\n{count} requests were acknowledged on one unbroken connection; none was lost, repeated or put out of order.\n"
        )?,
        None => writeln!(text, "\nThe account of this series was not made up.\n")?,
    }
    Ok(())
}

fn method(text: &mut String) -> Result<()> {
    writeln!(
        text,
        "## Method\n\n\
         - One guest (256 MiB) does all the work, unprotected, protected, and unprotected beside a second guest that \
         computes (stress-ng's\n  processor methods) and otherwise stands still, in turn, the order changing each time; medians of the runs.\n\
         - Every run is a fixed amount of work. Its time is the host's, taken at the client or at the console, not the \
         guest's.\n\
         - Each protected run has a protection of its own, so that delays and lags are of that run alone, catching up \
         after the copy included.\n\
         - The ceiling is P / (U + G), at most 1, for P processors. U: time that the processors of the whole machine were not \
         idle,\n  from the idle times in `/proc/stat`, in the runs unprotected or in those beside the other guest (without that), \
         whichever\n  is less; anything else that runs on the machine is in it. G: time of the thread that executes the guest, outside of the \
         kernel,\n  for its input and output is the primary's alone; unprotected or in the backup, whichever is less. Both per \
         second\n  unprotected. Waiting costs nothing in it, so it is rather too high than too low; but it takes the processor \
         time of the\n  unprotected work as given. Clients wait in blocking calls; none polls.\n\
         - A ratio above 1 means that protected work takes less of the host: outputs of a guest that never rests leave \
         together,\n  up to a millisecond's at a time, while unprotected each leaves by itself, and the guest, the host's network and the \
         client\n  have more to do for each.\n\
         - Failovers are measured on a guest with nothing but the ledger service, whose answers are checked against \
         the disk afterwards.\n\
         - Disk images are files on the machine's own disk, allocated in full before; `sync` in the guest is `fdatasync` on \
         the host.\n  Mirrored disks are two such files on that one disk.\n\
         - A network of 1 Gbit/s is a limit (`tc tbf`) on the cable between the primary's host and the client, each way, \
         protected or not.\n\
         - An exchange is 200 bytes and 50 back over plain TCP on the cable of the logging channel, between two threads \
         that wait in blocking calls,\n  while the guest is idle; the median of 10,000. A synced write is 4 KiB and `fdatasync`, in a file allocated in full; the \
         median of 3,000.\n\
         - VMware FT's figures are those of its authors' paper, not measured by us."
    )?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::results::{Bare, Idle, Machine, Run};
    use super::*;
    use ft::Percentiles;

    fn results(protected_seconds: f64) -> Results {
        let protection = Protection {
            pause_ms: 0.5,
            log_bytes: 250_000,
            output_delay: Percentiles { count: 1, p50_us: 100, p99_us: 200, max_us: 300 },
            lag: Percentiles { count: 1, p50_us: 1_000, p99_us: 60_000, max_us: 70_000 },
            backup_cpu_seconds: 1.0,
            backup_vcpu_seconds: 1.0,
            backup_vcpu_user_seconds: 1.0,
            throttle: 0.0,
            stalls: 0,
        };
        let run = |seconds, protection: Option<Protection>| Run {
            seconds,
            primary_cpu_seconds: if protection.is_some() { 1.25 } else { 1.0 },
            machine_busy_seconds: if protection.is_some() { 3.0 } else { 1.5 },
            vcpu_seconds: 1.0,
            vcpu_user_seconds: 1.0,
            neighbour_cpu_seconds: None,
            protection,
        };
        let beside =
            Run { machine_busy_seconds: 3.0, neighbour_cpu_seconds: Some(1.25), ..run(1.25, None) };
        let kill = |first_answer_ms| Failover {
            first_answer_ms,
            detection_ms: 1.0,
            replay_ms: 2.0,
            lease_ms: 3.0,
            claim_ms: 4.0,
            go_live_ms: 5.0,
            pause_ms: 6.0,
            protect_ms: 7.0,
        };
        Results {
            machine: Machine { processors: 2, ..Machine::default() },
            workloads: vec![Workload {
                name: "compile".to_owned(),
                what: "everything".to_owned(),
                io: false,
                unit: "builds".to_owned(),
                amount: 1.0,
                runs: vec![run(1.0, None), beside, run(protected_seconds, Some(protection))],
            }],
            idle: Some(Idle {
                seconds: 10.0,
                log_bytes: 10_000,
                primary_cpu_seconds: 0.2,
                backup_cpu_seconds: 0.1,
                unprotected_cpu_seconds: 0.1,
            }),
            bare: Some(Bare { exchange_us: 50.0, sync_us: 100.0, sync_beside_us: 150.0 }),
            failovers: vec![Failovers {
                name: "defaults".to_owned(),
                heartbeat_ms: 20,
                failure_timeout_ms: 300,
                planned: 3,
                kills: vec![kill(100.0), kill(600.0)],
                acknowledged: None,
            }],
        }
    }

    #[test]
    fn targets_are_said_to_be_met_or_missed_and_why() -> Result<()> {
        let fast = document(&results(1.01))?;
        assert!(
            fast.contains(
                "| compile: speed protected / unprotected | at least 0.95 | 0.990 | met |"
            )
        );
        assert!(fast.contains("60 ms (compile) | **missed**"), "{fast}");
        assert!(fast.contains("median | below 500 ms | 350 ms | met"), "{fast}");
        assert!(fast.contains("**Interrupted: 3 kills were planned.**"));
        assert!(!fast.contains("Why ratios were missed"));
        let slow = document(&results(2.0))?;
        assert!(
            slow.contains("at least 0.95 | 0.500 | **missed** (at most 0.80 here) |"),
            "{slow}"
        );
        assert!(slow.contains("Why ratios were missed"));
        // 0.8 beside another guest; 3 seconds of 4 busy under protection.
        assert!(slow.contains("| compile | 0.50 | 0.80 | 0.62 | 0.80 | +25 % | 25 % |"), "{slow}");
        Ok(())
    }

    #[test]
    fn what_an_exchange_costs_is_said_where_echo_is_missed() -> Result<()> {
        let echo = |protected_seconds| {
            let mut results = results(protected_seconds);
            let work = &mut results.workloads[0];
            (work.name, work.amount, work.io) = ("echo".to_owned(), 5_000.0, true);
            document(&results)
        };
        let slow = echo(2.0)?;
        assert!(slow.contains("takes 200 µs unprotected"), "{slow}");
        assert!(slow.contains("is a ratio of 0.80."), "{slow}");
        assert!(!echo(1.0)?.contains("µs unprotected"));
        assert!(!document(&results(2.0))?.contains("µs unprotected"));
        Ok(())
    }

    #[test]
    fn a_ceiling_stands_beside_its_ratio() -> Result<()> {
        let text = document(&results(2.0))?;
        assert!(
            text.contains("| compile | 1.00 builds/s | 0.500 | 0.50 | 0.80 | 0.80 |"),
            "{text}"
        );
        let line =
            |start: &str| text.lines().filter(|line| line.starts_with(start)).collect::<Vec<_>>();
        let columns = |line: &str| line.matches('|').count();
        let head = columns(line("| work | unprotected |")[0]);
        assert!(line("| compile | 1.00 builds/s").iter().all(|row| columns(row) == head), "{text}");
        Ok(())
    }

    #[test]
    fn a_ratio_above_its_ceiling_is_said_to_be_that() -> Result<()> {
        let text = document(&results(1.1))?;
        assert!(text.contains("at least 0.95 | 0.909 | **missed** |"), "{text}");
        assert!(text.contains("| compile | 0.91 | 0.80 | 1.14 | 0.80 |"), "{text}");
        Ok(())
    }

    #[test]
    fn an_interrupted_run_has_a_document_too() -> Result<()> {
        let directory = tempfile::tempdir()?;
        write(&Results::default(), directory.path())?;
        let path = write(&results(1.0), directory.path())?;
        assert!(std::fs::read_to_string(path)?.contains("## Failover"));
        for plot in ["ratio", "log", "failover"] {
            let plot = directory.path().join(format!("performance/{plot}.svg"));
            assert!(std::fs::read_to_string(plot)?.trim_end().ends_with("</svg>"));
        }
        Ok(())
    }
}
