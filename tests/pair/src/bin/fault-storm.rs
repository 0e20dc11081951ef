//! `fault-storm COUNT SEED`: one fault after the other, at random, on one pair.

use anyhow::{Result, bail};
use clap::{Parser, ValueEnum};
use ft::DiskMode;
use pair_tests::faults::{FAULTS, Storm};
use pair_tests::lab::Lab;
use pair_tests::requirements::{Need, met};

/// Boots a guest, puts load on its service, and then: protects it, lets a fault chosen at random happen at a
/// random moment (a kill, a frozen process, a dead, half-dead or slow link, an arbiter that is away), waits
/// until one side lives and answers, protects that one, and so on. Ends with status 0 only if never two
/// sides lived, the client lost no connection and no answer, and the disk holds every acknowledged line once
/// and in order; of mirrored disks both images, which are alike.
#[derive(Parser)]
#[command(name = "fault-storm")]
struct Arguments {
    /// How many faults
    #[arg(default_value_t = 50)]
    count: u32,
    /// Seed of faults and moments
    #[arg(default_value_t = 1)]
    seed: u64,
    /// How the pair has its disks: one image for both hosts, or one each
    #[arg(long, value_enum, default_value_t = Disks::Shared)]
    disk_mode: Disks,
    /// Show the faults there are
    #[arg(long)]
    list: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Disks {
    Shared,
    Mirrored,
}

fn main() -> Result<()> {
    let Arguments { count, seed, disk_mode, list } = Arguments::parse();
    if list {
        FAULTS.iter().for_each(|fault| println!("{fault:?}"));
        return Ok(());
    }
    if !met("fault-storm", &[Need::Root, Need::Tap]) {
        bail!("fault-storm cannot run here");
    }
    let (disk_mode, name) = match disk_mode {
        Disks::Shared => (DiskMode::Shared, "shared"),
        Disks::Mirrored => (DiskMode::Mirrored, "mirrored"),
    };
    println!(
        "{count} faults, seed {seed}: scripts/fault-storm {count} {seed} --disk-mode {name} repeats this run"
    );
    let storm = Storm { count, seed, disk_mode };
    let verdict = storm.run(Lab::new()?, |number, fault, took| {
        println!("fault {number:3}: {fault:?}, settled after {:.2} s", took.as_secs_f64());
    })?;
    println!(
        "\n{} requests acknowledged on one unbroken connection\nlost {}, repeated {}, out of order {}; e2fsck -f clean",
        verdict.acknowledged, verdict.lost, verdict.repeated, verdict.out_of_order
    );
    Ok(())
}
