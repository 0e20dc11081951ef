//! `soak MINUTES`: a protected guest, half a minute idle, then under load.

use anyhow::{Result, bail};
use clap::Parser;
use pair_tests::lab::Lab;
use pair_tests::requirements::{Need, met};
use pair_tests::soak::{Stretch, run};
use std::time::Duration;

/// Boots and protects a guest, watches it idle for half a minute and then under load, and prints lag, log
/// rate and digests. Ends with status 0 only if the digests never differed, the idle guest logged less
/// than 0.1 Mbit/s and the disk holds every acknowledged line once and in order.
#[derive(Parser)]
#[command(name = "soak")]
struct Arguments {
    /// Minutes under load
    #[arg(default_value_t = 10)]
    minutes: u64,
    /// Seconds between two lines
    #[arg(long, default_value_t = 10)]
    every: u64,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    if !met("soak", &[Need::Root, Need::Tap]) {
        bail!("soak cannot run here");
    }
    let every = Duration::from_secs(arguments.every.max(1));
    let mut next = Duration::ZERO;
    let loaded = Duration::from_secs(arguments.minutes * 60);
    let (idle, busy, verdict) = run(
        Lab::new()?,
        Duration::from_secs(30),
        loaded,
        |phase, at, status, answered| {
            if at < next && next - at <= every {
                return;
            }
            next = at + every;
            println!(
                "{phase} {:4.0} s: lag {} us, log {:.3} Mbit/s, held outputs {}, throttle {:.3}, digests {} equal, answers {answered}",
                at.as_secs_f64(),
                status.lag_us,
                status.log.mbit_per_s,
                status.held_outputs,
                status.throttle,
                status.digests_compared,
            );
        },
    )?;
    for (phase, stretch) in [("idle", &idle), ("load", &busy)] {
        tell(phase, stretch);
    }
    println!(
        "{} requests acknowledged, lost {}, repeated {}, out of order {}",
        verdict.acknowledged, verdict.lost, verdict.repeated, verdict.out_of_order
    );
    Ok(())
}

fn tell(phase: &str, stretch: &Stretch) {
    let Stretch { lag, log_mbit_per_second, answers_per_second, status } = stretch;
    println!("{phase}: log {log_mbit_per_second:.3} Mbit/s, {answers_per_second:.0} answers/s");
    if let Some(lag) = lag {
        println!("{phase}: lag sampled: {lag}");
    }
    for (what, of) in [("lag", status.lag), ("outputs held", status.output_delay)] {
        println!(
            "{phase}: {what} by ft.status: p50 {} us, p99 {} us, max {} us ({} values)",
            of.p50_us, of.p99_us, of.max_us, of.count
        );
    }
    println!(
        "{phase}: digests compared {}, unequal {}",
        status.digests_compared, status.digests_unequal
    );
}
