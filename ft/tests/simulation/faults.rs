//! What goes wrong, and when.

use crate::rng::Rng;

/// A moment's mischief. Durations are in microseconds.
#[derive(Clone, Copy, Debug)]
pub enum Fault {
    /// SIGKILL: the kernel closes the connection.
    CrashProcess { node: usize },
    /// The power goes: nothing is heard of it again.
    CrashHost { node: usize },
    /// SIGKILL of whichever process lives in the newest generation.
    CrashLive,
    /// SIGSTOP and SIGCONT, or a suspended host.
    Freeze { node: usize, for_us: u64 },
    /// Nothing arrives either way; connections stand.
    Partition { for_us: u64 },
    /// Nothing arrives from one host.
    PartitionOneWay { from: usize, for_us: u64 },
    /// The connection breaks; each side learns of it in its own time.
    Reset,
    /// A long way for every packet.
    SlowLink { for_us: u64 },
    /// Bytes that are no message.
    Garbage { to: usize },
    /// No answer of the arbiter to one host, or to all.
    ArbiterDown { node: Option<usize>, for_us: u64 },
    /// The claim is made but the answer lost.
    ArbiterForgetful { for_us: u64 },
    /// Answers take long.
    ArbiterSlow { for_us: u64 },
    /// What is asked fails, and takes effect later.
    ArbiterLate { for_us: u64 },
    /// One host reaches an empty place instead.
    ArbiterElsewhere { node: usize, for_us: u64 },
    /// The disk tells late that writes are done.
    SlowDisk { for_us: u64 },
    /// One host's way to its disks hangs while it holds a backup: what that asks of them is done afterwards.
    DiskHangs { node: usize, for_us: u64 },
    /// Of what one host asks of its disks, but for writes to a shared one, so much fails, and may be done in spite of it.
    DiskFails { node: usize, for_us: u64, percent: u64 },
    /// The backup's vCPU gets little time.
    SlowReplay { for_us: u64 },
    /// A clock jumps ahead.
    ClockJump { node: usize, by_us: u64 },
    /// A bit of the backup's guest changes.
    FlipBit,
    /// A bit of a page of the backup's guest changes, which the guest does not notice.
    FlipInPage { page: usize },
    /// The operator asks the primary to hand over.
    HandOver,
    /// The operator asks the backup to take over.
    TakeOver,
    /// The operator ends protection.
    Disable,
}

/// When the first fault may come: the pair is protected by then.
const FIRST_US: u64 = 400_000;

/// The faults of a seed by time. They come in clusters: what breaks a protocol is the second fault while
/// it deals with the first.
pub fn plan(rng: &mut Rng, nodes: usize, end_us: u64) -> Vec<(u64, Fault)> {
    let mut plan = Vec::new();
    for _ in 0..rng.range(1, 7) {
        let cluster = rng.range(FIRST_US, end_us);
        for _ in 0..rng.range(1, 4) {
            let spread = rng.pick(&[2_000, 50_000, 300_000]);
            let at = (cluster + rng.range(0, spread)).min(end_us);
            plan.push((at, one(rng, nodes)));
        }
    }
    plan.sort_by_key(|(at, _)| *at);
    plan
}

fn one(rng: &mut Rng, nodes: usize) -> Fault {
    let node = rng.range(0, nodes as u64) as usize;
    // Around the timeouts, or far beyond.
    let for_us = match rng.range(0, 3) {
        0 => rng.range(1_000, 150_000),
        1 => rng.range(150_000, 500_000),
        _ => rng.range(500_000, 3_000_000),
    };
    match rng.range(0, 36) {
        0..3 => Fault::CrashProcess { node },
        3 => Fault::CrashHost { node },
        4..9 => Fault::Freeze { node, for_us },
        9..11 => Fault::Partition { for_us },
        11..13 => Fault::PartitionOneWay { from: node, for_us },
        13..15 => Fault::Reset,
        15 => Fault::SlowLink { for_us },
        16 => Fault::Garbage { to: node },
        17 => Fault::ArbiterDown { node: rng.percent(50).then_some(node), for_us },
        18 => Fault::ArbiterForgetful { for_us },
        19 => Fault::ArbiterSlow { for_us },
        20 => Fault::SlowReplay { for_us },
        21 => Fault::ClockJump { node, by_us: for_us },
        22 => Fault::FlipBit,
        23 => Fault::HandOver,
        24 => Fault::TakeOver,
        25 => Fault::ArbiterLate { for_us },
        26 => Fault::ArbiterElsewhere { node, for_us },
        27 => Fault::SlowDisk { for_us },
        28..31 => Fault::CrashLive,
        // The backup is behind when the primary is gone.
        31 => Fault::SlowReplay { for_us },
        32 => Fault::HandOver,
        33 => Fault::DiskHangs { node, for_us },
        34 => Fault::DiskFails { node, for_us, percent: rng.pick(&[70, 100]) },
        _ => Fault::Disable,
    }
}
