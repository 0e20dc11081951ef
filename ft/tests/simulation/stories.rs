//! One fault at a time, by name: what an operator would see. Node 0 runs the VM and is protected by node
//! 1 well before the first fault.

use ft::Timing;

use crate::disks::Disks;
use crate::faults::Fault;
use crate::world::{Outcome, World};

const AT: u64 = 1_000_000;

/// Tells the story on several worlds: the seeds vary delays, clocks and the third host.
fn tell(faults: &[(u64, Fault)], check: impl Fn(&Outcome)) {
    for seed in 1..=8 {
        let outcome = World::story(seed, faults);
        let told = || println!("seed {seed}:\n{}", outcome.trace.join("\n"));
        if let Some(violation) = &outcome.violation {
            told();
            panic!("seed {seed}: {violation:?}");
        }
        if std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| check(&outcome))).is_err() {
            told();
            panic!("seed {seed}: the story ended otherwise");
        }
    }
}

fn said(outcome: &Outcome, text: &str) -> bool {
    outcome.trace.iter().any(|line| line.contains(text))
}

#[test]
fn nothing_happens() {
    tell(&[], |outcome| {
        assert!(
            outcome.failovers == 0 && outcome.protections == 1 && outcome.answered_at.len() > 100
        );
    });
}

#[test]
fn primary_is_killed() {
    tell(&[(AT, Fault::CrashProcess { node: 0 })], |outcome| {
        assert!(outcome.failovers == 1 && !outcome.lost);
        // The lease and its margin, and time for the claim.
        let timing = Timing::default();
        let bound_us = (timing.lease_ms + timing.lease_margin_ms + 80) * 1000;
        assert!(outcome.failover_us[0] < bound_us, "took {} us", outcome.failover_us[0]);
        assert!(outcome.protections >= 2, "a new backup was made");
    });
}

#[test]
fn primary_host_loses_power() {
    tell(&[(AT, Fault::CrashHost { node: 0 })], |outcome| {
        assert!(outcome.failovers == 1 && !outcome.lost);
        assert!(said(outcome, "the primary was silent for"));
    });
}

#[test]
fn backup_is_killed() {
    tell(&[(AT, Fault::CrashProcess { node: 1 })], |outcome| {
        assert!(outcome.failovers == 0 && !outcome.lost && outcome.protections >= 2);
        assert!(said(outcome, "host0 goes alone"));
    });
}

#[test]
fn survivors_are_killed_one_after_the_other() {
    // Each has the next backup well before its turn comes.
    let kills: Vec<_> = (0..3).map(|turn| (AT + turn * 2_000_000, Fault::CrashLive)).collect();
    tell(&kills, |outcome| {
        assert!(outcome.failovers == 3 && !outcome.lost && outcome.protections == 4);
        assert_eq!(outcome.generation, 4);
    });
}

#[test]
fn the_next_backup_is_made_where_somebody_answers() {
    // Host 2 is asked first, for as long as a connection may take.
    let faults = [
        (AT - 100_000, Fault::PartitionOneWay { from: 2, for_us: 6_000_000 }),
        (AT, Fault::CrashProcess { node: 0 }),
    ];
    tell(&faults, |outcome| {
        assert!(outcome.failovers == 1 && !outcome.lost && outcome.protections == 2);
        let asked = said(outcome, "host1 has no backup at tcp:host2:7700: nobody answers");
        assert!(asked || !said(outcome, "host2"), "there is no such host");
        assert!(said(outcome, "host1 wants to be protected by host0"));
    });
}

#[test]
fn a_side_thaws_when_the_generation_after_next_lives() {
    let faults =
        [(AT, Fault::Freeze { node: 0, for_us: 3_000_000 }), (AT + 1_500_000, Fault::CrashLive)];
    for seed in 1..=24 {
        let outcome = World::story(seed, &faults);
        let told = outcome.trace.join("\n");
        assert!(outcome.violation.is_none(), "seed {seed}: {:?}\n{told}", outcome.violation);
        assert!(said(&outcome, "host0 halts"), "seed {seed}:\n{told}");
        if outcome.failovers == 2 {
            // A third host held the backup of the second generation.
            return;
        }
    }
    panic!("in no world there was a third host");
}

#[test]
fn a_partition_comes_while_the_next_backup_is_made() {
    let faults = [
        (AT, Fault::CrashProcess { node: 0 }),
        (AT + 340_000, Fault::Partition { for_us: 1_500_000 }),
    ];
    tell(&faults, |outcome| {
        assert!(outcome.failovers == 1 && !outcome.lost && outcome.protections >= 2);
    });
}

#[test]
fn the_arbiter_is_away_when_the_next_backup_is_looked_for() {
    let faults = [
        (AT, Fault::CrashProcess { node: 0 }),
        (AT + 340_000, Fault::ArbiterDown { node: None, for_us: 2_000_000 }),
    ];
    tell(&faults, |outcome| {
        assert!(outcome.failovers == 1 && !outcome.lost && outcome.protections >= 2);
    });
}

#[test]
fn both_are_killed() {
    let faults = [(AT, Fault::CrashProcess { node: 0 }), (AT, Fault::CrashProcess { node: 1 })];
    tell(&faults, |outcome| assert!(outcome.lost));
}

#[test]
fn primary_is_frozen_and_thaws_after_its_successor_went_live() {
    tell(&[(AT, Fault::Freeze { node: 0, for_us: 2_000_000 })], |outcome| {
        assert!(outcome.failovers == 1 && !outcome.lost);
        assert!(said(outcome, "host0 halts"));
    });
}

#[test]
fn backup_is_frozen_and_thaws_after_the_primary_went_alone() {
    tell(&[(AT, Fault::Freeze { node: 1, for_us: 2_000_000 })], |outcome| {
        assert!(outcome.failovers == 0 && !outcome.lost);
        assert!(said(outcome, "host0 goes alone") && said(outcome, "host1 discards"));
    });
}

#[test]
fn a_short_freeze_costs_nothing() {
    for node in 0..2 {
        tell(&[(AT, Fault::Freeze { node, for_us: 120_000 })], |outcome| {
            assert!(outcome.failovers == 0 && outcome.protections == 1);
        });
    }
}

#[test]
fn network_is_cut_between_them() {
    tell(&[(AT, Fault::Partition { for_us: 2_000_000 })], |outcome| {
        assert!(!outcome.lost);
        assert!(said(outcome, "goes alone") || outcome.failovers == 1);
    });
}

#[test]
fn connection_breaks_and_both_hosts_live() {
    tell(&[(AT, Fault::Reset)], |outcome| assert!(!outcome.lost && outcome.protections >= 2));
}

#[test]
fn arbiter_is_away_when_the_primary_dies() {
    let faults = [
        (AT - 100_000, Fault::ArbiterDown { node: None, for_us: 2_000_000 }),
        (AT, Fault::CrashProcess { node: 0 }),
    ];
    tell(&faults, |outcome| {
        assert!(outcome.failovers == 1 && !outcome.lost);
        assert!(said(outcome, "waiting for arbiter"));
        assert!(outcome.failover_us[0] > 1_500_000, "went live without an answer");
    });
}

#[test]
fn arbiter_crashes_between_claim_and_answer() {
    let faults = [
        (AT - 100_000, Fault::ArbiterForgetful { for_us: 1_000_000 }),
        (AT, Fault::CrashProcess { node: 0 }),
    ];
    tell(&faults, |outcome| assert!(outcome.failovers == 1 && !outcome.lost));
}

#[test]
fn arbiter_acts_when_it_was_given_up() {
    let faults = [
        (AT - 100_000, Fault::ArbiterLate { for_us: 1_000_000 }),
        (AT, Fault::Partition { for_us: 3_000_000 }),
    ];
    tell(&faults, |outcome| {
        assert!(!outcome.lost && said(outcome, "acts at last"));
        // Whoever it acted for, the other has lost.
        assert!(said(outcome, "host0 halts") || said(outcome, "host0 goes alone"));
    });
}

#[test]
fn arbiters_file_system_is_not_mounted_when_the_primary_dies() {
    let faults = [
        (AT - 100_000, Fault::ArbiterElsewhere { node: 1, for_us: 2_000_000 }),
        (AT, Fault::CrashProcess { node: 0 }),
    ];
    tell(&faults, |outcome| {
        assert!(outcome.failovers == 1 && !outcome.lost);
        assert!(said(outcome, "waiting for arbiter"));
        assert!(outcome.failover_us[0] > 1_500_000, "went live by another arbiter");
    });
}

#[test]
fn disk_is_slow_when_the_primary_dies() {
    let faults = [
        (AT - 300_000, Fault::SlowDisk { for_us: 1_000_000 }),
        (AT, Fault::CrashProcess { node: 0 }),
    ];
    tell(&faults, |outcome| assert!(outcome.failovers == 1 && !outcome.lost));
}

#[test]
fn operator_hands_over() {
    tell(&[(AT, Fault::HandOver)], |outcome| {
        assert!(outcome.failovers == 1 && !outcome.lost);
        assert!(outcome.failover_us[0] < 100_000, "waited for the lease");
    });
}

#[test]
fn operator_forces_a_take_over() {
    tell(&[(AT, Fault::TakeOver)], |outcome| {
        assert!(outcome.failovers == 1 && !outcome.lost && said(outcome, "host0 halts"));
    });
}

#[test]
fn operator_forces_a_take_over_while_the_arbiter_is_away() {
    let away_us = 3_000_000;
    let away = (AT - 100_000, Fault::ArbiterDown { node: None, for_us: away_us });
    tell(&[away, (AT, Fault::TakeOver)], |outcome| {
        assert!(outcome.failovers == 1 && !outcome.lost && said(outcome, "host0 halts"));
        assert!(said(outcome, "waiting for arbiter"));
        // Nothing has failed: the primary has answered all the time.
        let asked = AT..AT - 100_000 + away_us;
        let within = outcome.answered_at.iter().copied().filter(|at| asked.contains(at));
        let times: Vec<_> = [asked.start].into_iter().chain(within).chain([asked.end]).collect();
        let longest = times.windows(2).map(|pair| pair[1] - pair[0]).max();
        assert!(longest < Some(150_000), "nothing for {longest:?} us");
    });
}

#[test]
fn operator_forces_a_take_over_of_a_backup_that_is_never_idle() {
    let faults = [(AT, Fault::SlowReplay { for_us: 3_000_000 }), (AT + 1_000_000, Fault::TakeOver)];
    tell(&faults, |outcome| {
        assert!(outcome.failovers == 1 && !outcome.lost && said(outcome, "host0 halts"));
        // What it had when it was asked took it no longer than the lag there may be.
        assert!(outcome.failover_us[0] < 1_000_000, "took {} us", outcome.failover_us[0]);
    });
}

#[test]
fn operator_ends_protection() {
    tell(&[(AT, Fault::Disable)], |outcome| {
        assert!(outcome.failovers == 0 && said(outcome, "host1 discards"));
    });
}

#[test]
fn backup_differs() {
    tell(&[(AT, Fault::FlipBit)], |outcome| {
        assert!(outcome.failovers == 0 && outcome.protections >= 2, "a fresh copy was made");
        // Whichever comes first: a digest, or an output that does not come where it should.
        let by_digest = said(outcome, "hears that the backup differs");
        assert!(by_digest || said(outcome, "does not come"));
        assert!(!by_digest || said(outcome, "differs: cpu"), "a register is named");
    });
}

#[test]
fn a_page_of_the_backup_differs() {
    for page in [0, 3, 7] {
        tell(&[(AT, Fault::FlipInPage { page })], |outcome| {
            assert!(outcome.failovers == 0 && outcome.protections >= 2, "a fresh copy was made");
            assert!(said(outcome, &format!("differs: memory (page {page:#x})")));
        });
    }
}

#[test]
fn garbage_on_the_channel() {
    for to in 0..2 {
        tell(&[(AT, Fault::Garbage { to })], |outcome| assert!(!outcome.lost));
    }
}

#[test]
fn backup_is_slow() {
    tell(&[(AT, Fault::SlowReplay { for_us: 2_000_000 })], |outcome| {
        assert!(outcome.failovers == 0 && outcome.protections == 1);
        // From one moment to the next it has a quarter of its speed: for that moment lag may pass.
        assert!(outcome.max_lag_us < 300_000, "lag reached {} us", outcome.max_lag_us);
        assert!(outcome.lagging_us < 500_000, "lagged for {} us", outcome.lagging_us);
        assert!(outcome.throttle < 0.01, "the primary has its full speed back");
    });
}

#[test]
fn mirrored_disks_are_made_alike_after_every_loss() {
    let kills: Vec<_> = (0..3).map(|turn| (AT + turn * 2_000_000, Fault::CrashLive)).collect();
    for seed in 1..=8 {
        let outcome = World::story_on(seed, Disks::Mirrored, &kills);
        assert!(outcome.violation.is_none(), "seed {seed}: {:?}", outcome.violation);
        assert!(outcome.failovers == 3 && !outcome.lost && outcome.protections == 4);
        let tally = outcome.tally;
        assert!(tally.copied > 4 && tally.compared > 100 && tally.awaited > 0, "{tally:?}");
    }
}

#[test]
fn a_backup_whose_disk_hangs_is_given_up_and_made_again() {
    for disks in [Disks::Mirrored, Disks::BackupReads] {
        for seed in 1..=8 {
            // Much longer than the backup is waited for. The one that is made then has to prove itself.
            let faults = [
                (AT, Fault::DiskHangs { node: 1, for_us: 5_000_000 }),
                (AT + 5_900_000, Fault::CrashLive),
            ];
            let outcome = World::story_on(seed, disks, &faults);
            let told = outcome.trace.join("\n");
            assert!(outcome.violation.is_none(), "seed {seed}: {:?}\n{told}", outcome.violation);
            assert!(said(&outcome, "its disk in slot 0 has not answered"), "seed {seed}:\n{told}");
            assert!(said(&outcome, "host0 goes alone"), "seed {seed}:\n{told}");
            assert!(outcome.protections >= 2 && !outcome.lost, "seed {seed}:\n{told}");
        }
    }
}

#[test]
fn a_backup_whose_disk_fails_is_given_up_and_made_again() {
    for disks in [Disks::Mirrored, Disks::BackupReads] {
        for seed in 1..=8 {
            let faults = [
                (AT, Fault::DiskFails { node: 1, for_us: 5_000_000, percent: 100 }),
                (AT + 5_900_000, Fault::CrashLive),
            ];
            let outcome = World::story_on(seed, disks, &faults);
            let told = outcome.trace.join("\n");
            assert!(outcome.violation.is_none(), "seed {seed}: {:?}\n{told}", outcome.violation);
            assert!(outcome.tally.tried_again > 0 && !outcome.lost, "seed {seed}:\n{told}");
            assert!(said(&outcome, "has failed a request again and again"), "seed {seed}:\n{told}");
            assert!(said(&outcome, "host0 goes alone"), "seed {seed}:\n{told}");
        }
    }
}

#[test]
fn what_fails_on_the_primary_fails_on_both_sides_and_is_shipped_while_in_doubt() {
    let (mut told, mut shipped) = (0, 0);
    for seed in 1..=8 {
        let faults = [
            (AT, Fault::DiskFails { node: 0, for_us: 2_000_000, percent: 70 }),
            (AT + 1_000_000, Fault::CrashLive),
        ];
        let outcome = World::story_on(seed, Disks::Mirrored, &faults);
        let story = outcome.trace.join("\n");
        assert!(outcome.violation.is_none(), "seed {seed}: {:?}\n{story}", outcome.violation);
        assert!(outcome.failovers == 1 && !outcome.lost, "seed {seed}:\n{story}");
        told += outcome.tally.told;
        shipped += outcome.tally.shipped;
    }
    assert!(told > 0 && shipped > 0, "{told} told, {shipped} shipped");
}

#[test]
fn a_side_that_takes_over_waits_for_its_disk_however_long_that_takes() {
    for seed in 1..=8 {
        let faults = [
            (AT - 50_000, Fault::DiskHangs { node: 1, for_us: 5_000_000 }),
            (AT, Fault::CrashProcess { node: 0 }),
        ];
        let outcome = World::story_on(seed, Disks::Mirrored, &faults);
        let told = outcome.trace.join("\n");
        assert!(outcome.violation.is_none(), "seed {seed}: {:?}\n{told}", outcome.violation);
        assert!(outcome.failovers == 1 && !outcome.lost, "seed {seed}:\n{told}");
        assert!(outcome.failover_us[0] > 4_000_000, "it did not wait:\n{told}");
    }
}

#[test]
fn writes_wait_for_what_the_backup_has_yet_to_read() {
    for seed in 1..=8 {
        let faults = [(AT, Fault::CrashProcess { node: 0 })];
        let outcome = World::story_on(seed, Disks::BackupReads, &faults);
        assert!(outcome.violation.is_none(), "seed {seed}: {:?}", outcome.violation);
        assert!(outcome.failovers == 1 && !outcome.lost);
        assert!(outcome.tally.behind > 0 && outcome.tally.awaited > 0, "{:?}", outcome.tally);
    }
}
