//! The part of the document that says what was wanted, and whether it was reached.

use super::report::Figure;
use super::results::{Failover, Protection, Results, Workload, median};
use anyhow::Result;
use std::fmt::Write as _;

/// Wanted of work that the processor bounds.
const RATIO_PROCESSOR: f64 = 0.95;
/// Wanted of work that waits for disk and network.
const RATIO_IO: f64 = 0.90;
/// Wanted of an idle guest's log.
const IDLE_MBIT: f64 = 0.05;
/// Wanted of half of all outputs.
const OUTPUT_DELAY_US: f64 = 1_000.0;
/// Wanted of the lag, 99 times in 100.
const LAG_US: f64 = 50_000.0;
/// Wanted of the middle failover: with the default times, and with a failure timeout of 50 ms.
const FAILOVER_MS: [f64; 2] = [500.0, 150.0];

/// The ratio that is wanted of a kind of work.
pub(super) fn wanted_ratio(work: &Workload) -> f64 {
    if work.io { RATIO_IO } else { RATIO_PROCESSOR }
}

/// One thing that was wanted.
struct Target {
    what: String,
    wanted: String,
    measured: String,
    verdict: String,
}

fn verdict(met: bool) -> String {
    if met { "met" } else { "**missed**" }.to_owned()
}

/// Says it too where the machine's ceiling is below what is wanted, unless the ratio has disproved the ceiling.
fn ratio_verdict(ratio: f64, wanted: f64, ceiling: Option<f64>) -> String {
    let verdict = verdict(ratio >= wanted);
    match ceiling.filter(|ceiling| ratio <= *ceiling && *ceiling < wanted) {
        Some(ceiling) => format!("{verdict} (at most {ceiling:.2} here)"),
        None => verdict,
    }
}

/// Writes the section.
pub(super) fn write(text: &mut String, results: &Results) -> Result<()> {
    let mut targets: Vec<Target> = Vec::new();
    for work in &results.workloads {
        if let Some(ratio) = work.ratio() {
            let wanted = wanted_ratio(work);
            targets.push(Target {
                what: format!("{}: speed protected / unprotected", work.name),
                wanted: format!("at least {wanted:.2}"),
                measured: format!("{ratio:.3}"),
                verdict: ratio_verdict(ratio, wanted, work.ceiling(results.machine.processors)),
            });
        }
    }
    let worst = |figure: fn(&Protection) -> f64| {
        let figures = results
            .workloads
            .iter()
            .filter_map(|work| Some((work.under_protection(figure)?, work.name.as_str())));
        figures.max_by(|one, other| one.0.total_cmp(&other.0))
    };
    let delays = worst(|protection| protection.output_delay.p50_us as f64);
    if let Some((delay, name)) = delays {
        targets.push(Target {
            what: "output delay, median, worst kind of work".to_owned(),
            wanted: "below 1 ms".to_owned(),
            measured: format!("{:.2} ms ({name})", delay / 1e3),
            verdict: verdict(delay < OUTPUT_DELAY_US),
        });
    }
    if let Some((lag, name)) = worst(|protection| protection.lag.p99_us as f64) {
        targets.push(Target {
            what: "lag, 99 times in 100, worst kind of work".to_owned(),
            wanted: "below 50 ms".to_owned(),
            measured: format!("{:.0} ms ({name})", lag / 1e3),
            verdict: verdict(lag < LAG_US),
        });
    }
    if let Some(idle) = &results.idle {
        let log = idle.log_mbit_per_second();
        targets.push(Target {
            what: "log of an idle guest".to_owned(),
            wanted: format!("below {IDLE_MBIT} Mbit/s"),
            measured: format!("{log:.3} Mbit/s"),
            verdict: verdict(log < IDLE_MBIT),
        });
    }
    for failovers in &results.failovers {
        let wanted =
            if failovers.failure_timeout_ms <= 50 { FAILOVER_MS[1] } else { FAILOVER_MS[0] };
        let figures: [(&str, Figure); 2] = [
            ("last heard to guest running", Failover::live_ms),
            ("kill to first answer", |kill| kill.first_answer_ms),
        ];
        for (what, figure) in figures {
            let Some(median) = median(failovers.kills.iter().map(figure)) else { continue };
            targets.push(Target {
                what: format!("{}: {what}, median", failovers.name),
                wanted: format!("below {wanted:.0} ms"),
                measured: format!("{median:.0} ms"),
                verdict: verdict(median < wanted),
            });
        }
    }
    writeln!(text, "## Targets\n\n| | wanted | measured | |\n| --- | --- | --- | --- |")?;
    for Target { what, wanted, measured, verdict } in targets {
        writeln!(text, "| {what} | {wanted} | {measured} | {verdict} |")?;
    }
    writeln!(text)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ceiling_is_told_and_weakens_no_target() {
        assert_eq!(ratio_verdict(0.96, 0.95, Some(0.8)), "met");
        assert_eq!(ratio_verdict(0.70, 0.95, Some(0.8)), "**missed** (at most 0.80 here)");
        assert_eq!(ratio_verdict(0.70, 0.95, Some(1.0)), "**missed**");
        assert_eq!(ratio_verdict(0.90, 0.95, Some(0.8)), "**missed**");
        assert_eq!(ratio_verdict(0.70, 0.95, None), "**missed**");
    }
}
