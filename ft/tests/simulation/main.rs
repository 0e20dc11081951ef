//! The pair in a simulated world: the production state machines, codec, frames and gate, over a network,
//! clocks, a disk, an arbiter and processes that fail.
//!
//! A history is a function of its seed. Thousands run; each is watched by the checkers. One that fails
//! prints its seed, and
//!
//! ```text
//! DYAD_SIM_SEED=<seed> cargo test --release -p ft --test simulation one_seed -- --nocapture
//! ```
//!
//! runs it again with its whole story. `DYAD_SIM_SEEDS` sets how many seeds run, `DYAD_SIM_FIRST` the
//! first.

mod actions;
mod arbiter;
mod checkers;
mod copying;
mod disks;
mod faults;
mod guest;
mod mischief;
mod network;
mod node;
mod outputs;
mod plant;
mod process;
mod rng;
mod search;
mod stories;
mod vcpu;
mod world;

use disks::Disks;
use plant::Plant;
use world::{Outcome, World};

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name}={text}")))
}

/// Shows the end of a failed history and panics.
fn fail(seed: u64, plant: Option<Plant>) -> ! {
    let outcome = World::run(seed, plant, true);
    let tail = outcome.trace.len().saturating_sub(60);
    for line in &outcome.trace[tail..] {
        println!("{line}");
    }
    panic!(
        "seed {seed}: {:?}\nrepeat with: DYAD_SIM_SEED={seed} cargo test --release -p ft --test simulation one_seed -- --nocapture",
        outcome.violation
    );
}

/// Runs seeds on all processors; gives the first one that fails, if any, and sums.
fn run_seeds(first: u64, count: u64) -> (Option<u64>, [u64; 5]) {
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get() as u64);
    let results: Vec<_> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads)
            .map(|worker| {
                scope.spawn(move || {
                    let mut sums = [0u64; 5];
                    for seed in (first + worker..first + count).step_by(threads as usize) {
                        let outcome = World::run(seed, None, false);
                        if outcome.violation.is_some() {
                            return (Some(seed), sums);
                        }
                        let Outcome {
                            answered_at, protections, failovers, lost, generation, ..
                        } = outcome;
                        let answered = answered_at.len() as u64;
                        let parts = [answered, protections, failovers, u64::from(lost), generation];
                        for (sum, value) in sums.iter_mut().zip(parts) {
                            *sum += value;
                        }
                    }
                    (None, sums)
                })
            })
            .collect();
        workers.into_iter().map(|worker| worker.join().expect("no seed panics")).collect()
    });
    let failed = results.iter().filter_map(|(seed, _)| *seed).min();
    let mut sums = [0; 5];
    for (_, part) in &results {
        for (sum, value) in sums.iter_mut().zip(part) {
            *sum += value;
        }
    }
    (failed, sums)
}

#[test]
fn thousands_of_seeds() {
    let count = number("DYAD_SIM_SEEDS").unwrap_or(2_500);
    let first = number("DYAD_SIM_FIRST").unwrap_or(0);
    let (failed, [answered, protections, failovers, lost, generations]) = run_seeds(first, count);
    if let Some(seed) = failed {
        fail(seed, None);
    }
    println!(
        "{count} histories: {answered} requests answered, {protections} times protected, {failovers} failovers, {generations} generations, {lost} VMs lost with all their hosts"
    );
    assert!(protections >= 2 * count && failovers > count / 4, "the faults do not bite");
    assert!(generations > 2 * count, "nobody comes far");
    assert!(lost < count / 4, "most histories should end well");
}

#[test]
fn one_seed() {
    let Some(seed) = number("DYAD_SIM_SEED") else { return };
    let outcome = World::run(seed, None, true);
    for line in &outcome.trace {
        println!("{line}");
    }
    assert!(outcome.violation.is_none(), "seed {seed}: {:?}", outcome.violation);
}

/// Looks for a seed at which the checkers find the bug.
fn finds(plant: Plant, checkers: &[&str]) {
    finds_among(0..2_000, plant, checkers);
}

fn finds_among(seeds: impl Iterator<Item = u64>, plant: Plant, checkers: &[&str]) {
    let mut tries = 0;
    for seed in seeds {
        tries += 1;
        if let Some(violation) = World::run(seed, Some(plant), false).violation {
            println!("{plant:?}: seed {seed}: {}: {}", violation.checker, violation.text);
            assert!(
                checkers.contains(&violation.checker),
                "found by another checker than expected"
            );
            return;
        }
    }
    panic!("{plant:?} was not found in {tries} histories: the simulation is blind to it");
}

#[test]
fn finds_a_gate_that_releases_early() {
    finds(Plant::GateReleasesEarly, &["output_rule"]);
}

#[test]
fn finds_a_claim_that_is_not_exclusive() {
    finds(Plant::ClaimNotExclusive, &["one_live"]);
}

#[test]
fn finds_an_arbiter_that_was_not_agreed_upon() {
    finds(Plant::EmptyPlaceDecides, &["one_live", "fencing", "drained"]);
}

#[test]
fn finds_going_live_without_draining() {
    // Where the backup reads by itself, a write that leaves too early is seen before.
    let seeds = (0..2_000).filter(|seed| Disks::of_seed(*seed) == Disks::Shared);
    finds_among(seeds, Plant::LiveWithoutDraining, &["drained"]);
}

#[test]
fn finds_a_lease_that_counts_from_receipt() {
    finds(Plant::LeaseByReceipt, &["fencing"]);
}

#[test]
fn finds_back_halves_that_ignore_the_lease() {
    finds(Plant::LeaseIgnoredByBackHalves, &["fencing", "doubt"]);
}

#[test]
fn finds_a_backup_that_does_not_wait_for_the_lease() {
    finds(Plant::LeaseIgnoredByBackup, &["fencing"]);
}

#[test]
fn finds_a_clock_that_stops_while_the_host_sleeps() {
    finds(Plant::ClockStopsWhileFrozen, &["fencing"]);
}

#[test]
fn finds_a_loser_that_goes_on() {
    finds(Plant::LoserGoesOn, &["fencing", "doubt"]);
}

#[test]
fn finds_an_acknowledgement_before_receipt() {
    finds(Plant::AcknowledgedBeforeReceipt, &["output_rule"]);
}

#[test]
fn finds_a_hand_over_with_writes_under_way() {
    finds(Plant::NotQuiesced, &["fencing"]);
}

#[test]
fn finds_outputs_reported_before_they_are_sent() {
    finds(Plant::ReleasedBeforeSent, &["outputs_kept"]);
}

#[test]
fn finds_disk_requests_not_issued_again() {
    finds(Plant::NothingReissued, &["progress", "outputs_kept"]);
}

#[test]
fn finds_a_claim_that_is_not_retried() {
    finds(Plant::NoRetry, &["progress"]);
}

#[test]
fn finds_a_generation_begun_without_a_claim() {
    finds(Plant::NextWithoutClaim, &["one_live"]);
}

#[test]
fn finds_a_survivor_that_begins_the_old_generation_again() {
    finds(Plant::OldGenerationAgain, &["generations"]);
}

#[test]
fn finds_a_search_that_gives_up() {
    finds(Plant::SearchGivesUp, &["generations"]);
}

#[test]
fn finds_a_write_that_does_not_wait_for_the_backups_read() {
    finds(Plant::ReadNotAwaited, &["same_reads"]);
}

#[test]
fn finds_a_backup_that_does_not_wait_for_its_own_disk() {
    finds(Plant::OwnDiskNotAwaited, &["mirrors", "same_reads"]);
}

#[test]
fn finds_a_backup_that_takes_what_failed_for_done() {
    finds(Plant::OwnFailureTaken, &["mirrors", "same_reads"]);
}

#[test]
fn finds_doubtful_blocks_that_each_side_reads_for_itself() {
    let seeds = (0..9_000).filter(|seed| Disks::of_seed(*seed) == Disks::Mirrored);
    finds_among(seeds, Plant::DoubtIgnored, &["same_reads"]);
}

#[test]
fn finds_a_stale_disk_that_is_trusted() {
    finds(Plant::StaleDiskTrusted, &["mirrors", "same_reads"]);
}
