//! `bench`: what protection costs and how long a failover takes; writes `docs/performance.md`.

use anyhow::{Result, bail};
use clap::Parser;
use pair_tests::bench::measure::{Extent, Keeper, kills, machine, work};
use pair_tests::bench::report;
use pair_tests::bench::results::Results;
use pair_tests::guest::root;
use pair_tests::requirements::{Need, met};
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// Runs fixed work in one guest, protected and unprotected in turn, watches it idle, and kills primaries under load.
/// Every figure is written to DIRECTORY/results.json as it comes, so an interrupted run loses nothing; the document and
/// its plots are made from that file at the end, or by --report.
#[derive(Parser)]
#[command(name = "bench")]
struct Arguments {
    /// A smoke run: everything once and little of it. The figures mean nothing
    #[arg(long)]
    quick: bool,
    /// Only make the document, from what was measured before
    #[arg(long)]
    report: bool,
    /// Where the document is written [default: docs]
    #[arg(long)]
    docs: Option<PathBuf>,
    /// Where results are kept [default: build/bench]
    #[arg(long)]
    directory: Option<PathBuf>,
    /// Runs of each kind of work, protected and as many unprotected [default: 5, quick: 1]
    #[arg(long)]
    repetitions: Option<usize>,
    /// Kills with the default times [default: 200, quick: 2]
    #[arg(long)]
    kills: Option<u32>,
    /// Kills with a failure timeout of 50 ms [default: half of --kills, quick: 1]
    #[arg(long)]
    fast_kills: Option<u32>,
    /// Kills with the default times and the host's cables pulled [default: a quarter of --kills, quick: 0]
    #[arg(long)]
    host_kills: Option<u32>,
    /// Only these kinds of work
    #[arg(long, value_name = "NAME")]
    only: Vec<String>,
    /// Leave out the work: only kills
    #[arg(long)]
    no_work: bool,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let directory = arguments.directory.clone().unwrap_or_else(|| root().join("build/bench"));
    let docs = arguments.docs.clone().unwrap_or_else(|| root().join("docs"));
    let path = directory.join("results.json");
    if !arguments.report {
        measure(&arguments, &path)?;
    }
    let document = report::write(&Results::load(&path)?, &docs)?;
    println!("wrote {} from {}", document.display(), path.display());
    Ok(())
}

fn measure(arguments: &Arguments, path: &std::path::Path) -> Result<()> {
    if !met("bench", &[Need::Root, Need::Tap]) {
        bail!("bench cannot run here");
    }
    if let Some(directory) = path.parent() {
        std::fs::create_dir_all(directory)?;
    }
    let quick = arguments.quick;
    let count = arguments.kills.unwrap_or(if quick { 2 } else { 200 });
    let extent = Extent {
        quick,
        repetitions: arguments.repetitions.unwrap_or(if quick { 1 } else { 5 }).max(1),
        only: arguments.only.clone(),
        idle: Duration::from_secs(if quick { 2 } else { 30 }),
        kills: count,
        fast_kills: arguments.fast_kills.unwrap_or(count / 2),
        host_kills: arguments.host_kills.unwrap_or(count / 4),
    };
    let start = Instant::now();
    let mut tell = |text: &str| println!("[{:5.0} s] {text}", start.elapsed().as_secs_f64());
    let results = Results { machine: machine(quick)?, ..Results::default() };
    let mut keeper = Keeper { results, path, tell: &mut tell };
    if !arguments.no_work {
        work(&extent, &mut keeper)?;
    }
    kills(&extent, &mut keeper)
}
