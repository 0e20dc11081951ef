//! The benchmark works: it measures, keeps what it measured, and makes its document of it.

use anyhow::{Result, ensure};
use pair_tests::bench::results::{Results, Run};
use pair_tests::guest::program;
use pair_tests::requirements::{Need, met};
use std::process::Command;

#[test]
fn a_smoke_run_gives_results_and_a_document() -> Result<()> {
    if !met("benchmark", &[Need::Root, Need::Tap]) {
        return Ok(());
    }
    let directory = tempfile::tempdir()?;
    let mut bench = Command::new(program("bench")?);
    bench.args(["--quick", "--kills", "1", "--fast-kills", "1"]);
    for kind in ["processor", "redis mirrored", "receive 1 Gbit/s"] {
        bench.args(["--only", kind]);
    }
    bench.arg("--directory").arg(directory.path()).arg("--docs").arg(directory.path());
    let output = bench.output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));

    let results = Results::load(&directory.path().join("results.json"))?;
    ensure!(results.workloads.len() == 3 && results.idle.is_some(), "{results:?}");
    for work in &results.workloads {
        ensure!(work.ratio().is_some_and(|ratio| ratio > 0.0), "no ratio of {work:?}");
        ensure!(work.log_mbit_per_second().is_some_and(|rate| rate > 0.0), "no log of {work:?}");
        ensure!(
            work.under_protection(|part| part.lag.count as f64).is_some_and(|count| count > 0.0),
            "no lag of {work:?}"
        );
        // Short runs give rough times, but work keeps the machine busy, and each guest is executed by a thread.
        let busy = |run: &Run| run.machine_busy_seconds > 0.0 && run.vcpu_seconds > 0.0;
        ensure!(work.runs.iter().all(busy), "no processor was busy: {work:?}");
        ensure!(work.runs.iter().any(|run| run.neighbour_cpu_seconds > Some(0.0)), "{work:?}");
        let ceiling = work.ceiling(results.machine.processors);
        ensure!(ceiling.is_some_and(|ceiling| ceiling > 0.0), "no ceiling of {work:?}");
    }
    // The stream that the guest receives is in the log; its end may be newer than the last status.
    let receive = &results.workloads[2];
    let logged = receive.under_protection(|part| part.log_bytes as f64 * 8e-6);
    ensure!(logged.is_some_and(|mbit| mbit > receive.amount / 2.0), "{receive:?}");
    ensure!(results.failovers.len() == 2, "{results:?}");
    for series in &results.failovers {
        ensure!(series.kills.len() == 1 && series.acknowledged.is_some(), "{series:?}");
        ensure!(series.kills[0].first_answer_ms > 0.0 && series.kills[0].live_ms() > 0.0);
    }
    ensure!(results.bare.is_some_and(|bare| bare.exchange_us > 0.0), "{results:?}");
    let document = std::fs::read_to_string(directory.path().join("performance.md"))?;
    for section in ["## Targets", "## Work", "## Beside VMware FT", "## Idle", "## Failover"] {
        ensure!(document.contains(section), "{section} is missing");
    }
    Ok(())
}
