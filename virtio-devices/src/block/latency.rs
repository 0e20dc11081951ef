//! How long a disk's requests take. Counted without a lock, as those who submit must never wait for
//! those who complete.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use crate::effect::BlockOp;

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Direction {
    Read,
    Write,
}

/// A request whose time runs; `None` for one that is not measured.
#[derive(Debug, Clone, Copy)]
pub(super) struct Timing(Option<(Direction, Instant)>);

impl Timing {
    /// Of a request submitted at `at`.
    pub fn begin(op: &BlockOp, at: Instant) -> Self {
        let direction = match op {
            BlockOp::Read { .. } => Direction::Read,
            BlockOp::Write { .. } => Direction::Write,
            BlockOp::Flush | BlockOp::Discard { .. } | BlockOp::WriteZeroes { .. } => {
                return Self(None);
            }
        };
        Self(Some((direction, at)))
    }
}

/// Latencies of reads and of writes.
#[derive(Debug, Default)]
pub struct Latencies {
    read: Counters,
    write: Counters,
}

impl Latencies {
    /// Of reads, from submission to completion.
    #[must_use]
    pub fn read(&self) -> Latency {
        self.read.get()
    }

    /// Of writes, from submission to completion.
    #[must_use]
    pub fn write(&self) -> Latency {
        self.write.get()
    }

    pub(super) fn finished(&self, timing: Timing) {
        let Some((direction, begun)) = timing.0 else { return };
        let us = u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX);
        match direction {
            Direction::Read => self.read.add(us),
            Direction::Write => self.write.add(us),
        }
    }
}

/// Latencies of one direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Latency {
    /// Requests completed.
    pub count: u64,
    /// Their times added up.
    pub sum_us: u64,
    /// The shortest; the largest number before the first.
    pub min_us: u64,
    /// The longest; 0 before the first.
    pub max_us: u64,
}

#[derive(Debug)]
struct Counters {
    count: AtomicU64,
    sum_us: AtomicU64,
    min_us: AtomicU64,
    max_us: AtomicU64,
}

impl Default for Counters {
    fn default() -> Self {
        Self {
            count: AtomicU64::new(0),
            sum_us: AtomicU64::new(0),
            min_us: AtomicU64::new(u64::MAX),
            max_us: AtomicU64::new(0),
        }
    }
}

impl Counters {
    // Each counter for itself: whoever reads between two of them is off by one request.
    fn add(&self, us: u64) {
        self.count.fetch_add(1, Ordering::Relaxed);
        self.sum_us.fetch_add(us, Ordering::Relaxed);
        self.min_us.fetch_min(us, Ordering::Relaxed);
        self.max_us.fetch_max(us, Ordering::Relaxed);
    }

    fn get(&self) -> Latency {
        Latency {
            count: self.count.load(Ordering::Relaxed),
            sum_us: self.sum_us.load(Ordering::Relaxed),
            min_us: self.min_us.load(Ordering::Relaxed),
            max_us: self.max_us.load(Ordering::Relaxed),
        }
    }
}
