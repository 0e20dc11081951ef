//! `kill-loop COUNT SEED`: kills the primary again and again under client load.

use anyhow::{Result, bail, ensure};
use clap::Parser;
use pair_tests::kills::Plan;
use pair_tests::lab::Lab;
use pair_tests::pair::Death;
use pair_tests::requirements::{Need, met};

/// Boots a guest, puts load on its service, and then: protects it, kills the primary at a random moment,
/// waits for the new primary's first answer, protects that one, and so on. Ends with status 0 only if the
/// client lost no connection and no answer, the disk holds every acknowledged line once and in order, its
/// file system has no errors and the digests of both sides never differed.
#[derive(Parser)]
#[command(name = "kill-loop")]
struct Arguments {
    /// How many times to kill the primary
    #[arg(default_value_t = 100)]
    count: u32,
    /// Seed of the random moments
    #[arg(default_value_t = 1)]
    seed: u64,
    /// Pull the host's cables before the kill, so that nobody hears its connections close
    #[arg(long)]
    host: bool,
    /// Name both hosts as standbys once; each survivor then finds its next backup by itself
    #[arg(long)]
    by_itself: bool,
    /// Connections under load
    #[arg(long, default_value_t = 1)]
    connections: usize,
    /// One JSON object at the end instead of text
    #[arg(long)]
    json: bool,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    if !met("kill-loop", &[Need::Root, Need::Tap]) {
        bail!("kill-loop cannot run here");
    }
    let death = if arguments.host { Death::Host } else { Death::Process };
    let Arguments { count, seed, connections, json, by_itself, .. } = arguments;
    let plan = Plan { kills: count, seed, death, connections, by_itself, ..Plan::default() };
    if !json {
        println!("{count} kills, seed {seed}: scripts/kill-loop {count} {seed} repeats this run");
    }
    let account = plan.run(Lab::new()?, |kill| {
        if !json {
            println!(
                "kill {:3} on {}: first answer after {:6.1} ms; protecting took {:.2} s, pause {:.1} ms; {} digests equal",
                kill.number,
                kill.side,
                kill.failover.as_secs_f64() * 1e3,
                kill.protected.took.as_secs_f64(),
                kill.protected.pause.as_secs_f64() * 1e3,
                kill.digests,
            );
        }
    })?;
    if json {
        println!("{}", account.to_json());
    } else {
        let verdict = &account.verdict;
        println!(
            "\n{} requests acknowledged on {connections} unbroken connection(s)",
            verdict.acknowledged
        );
        println!(
            "lost {}, repeated {}, out of order {}; e2fsck -f clean; digests never unequal",
            verdict.lost, verdict.repeated, verdict.out_of_order
        );
        for (what, times) in [
            ("kill to first answer", account.failover_times()),
            ("pause to protect", account.pauses()),
        ] {
            if let Some(times) = times {
                println!("{what}: {times}");
            }
        }
    }
    if let Some(times) = account.failover_times() {
        ensure!(
            times.median_ms < 1000.0,
            "the median of the failover times is not below one second"
        );
    }
    Ok(())
}
