//! Lets a disk's I/O through, and only while this side may write.
//!
//! A primary may write as long as it holds a lease, which its backup renews. A process that was frozen
//! and wakes after its successor went live finds the lease run out and writes nothing. What holds exactly:
//!
//! - The lease is looked at right before the system call that hands I/O to the kernel: by the thread that makes the
//!   call, after everything else has been prepared, for every step of a request anew.
//! - I/O that has been handed over is the kernel's. It goes on while the process is frozen and has reached the file
//!   long before the lease is over: the backup waits for `lease_margin_ms` beyond the lease.
//! - Between the look and the system call lie some instructions, well below a microsecond. A process that is
//!   stopped exactly there, or a host that stops as a whole with a write inside its kernel, writes when it goes
//!   on. No check on this side can see that; storage with reservations can refuse it.
//!
//! Those who submit and those who steer take no lock here. Only [`Valve::close`] waits.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

use crate::poll::Bell;

const NO_LEASE: u64 = u64::MAX;

const OPEN: u8 = 0;
/// Requests wait.
const CLOSED: u8 = 1;
/// Requests are forgotten, for good.
const HALTED: u8 = 2;

/// See the module's documentation.
#[derive(Debug)]
pub struct Valve {
    flow: AtomicU8,
    /// Until when I/O may begin, in nanoseconds of `CLOCK_BOOTTIME`.
    lease_ns: AtomicU64,
    /// Steps of I/O that the host works on.
    under_way: AtomicUsize,
    /// The disk's thread waits for leave to go on, and wants to be told of any change.
    parked: AtomicBool,
    quiet: Mutex<()>,
    quietened: Condvar,
    bell: Arc<Bell>,
}

impl Valve {
    pub(super) fn new(bell: Arc<Bell>) -> Self {
        Self {
            flow: AtomicU8::new(OPEN),
            lease_ns: AtomicU64::new(NO_LEASE),
            under_way: AtomicUsize::new(0),
            parked: AtomicBool::new(false),
            quiet: Mutex::new(()),
            quietened: Condvar::new(),
            bell,
        }
    }

    /// Begins no I/O from now on, and returns when all that was under way has ended.
    pub fn close(&self) {
        self.set(CLOSED);
        let mut quiet = self.quiet.lock().unwrap_or_else(PoisonError::into_inner);
        while self.under_way.load(SeqCst) > 0 {
            quiet = self.quietened.wait(quiet).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Lets requests through again, those that waited first.
    pub fn open(&self) {
        self.set(OPEN);
    }

    /// From now on begins no I/O: what is queued is forgotten.
    pub fn halt(&self) {
        self.set(HALTED);
    }

    /// Lets no I/O begin after `until` (`CLOCK_BOOTTIME`, which counts while the host sleeps); `None`
    /// for a side that needs no lease.
    pub fn set_lease(&self, until: Option<Duration>) {
        let ns = |until: Duration| u64::try_from(until.as_nanos()).unwrap_or(NO_LEASE);
        // A lease that never ends is still a lease.
        let ns = until.map_or(NO_LEASE, |until| ns(until).min(NO_LEASE - 1));
        self.lease_ns.store(ns, SeqCst);
        if self.parked.load(SeqCst) {
            self.bell.ring();
        }
    }

    fn set(&self, flow: u8) {
        // Halted is for good.
        let _ = self.flow.try_update(SeqCst, SeqCst, |old| (old != HALTED).then_some(flow));
        self.bell.ring();
    }

    pub(super) fn halted(&self) -> bool {
        self.flow.load(SeqCst) == HALTED
    }

    /// Whether nobody is left to let queued requests through once this side's owner is gone.
    pub(super) fn held_by_others(&self) -> bool {
        self.flow.load(SeqCst) == CLOSED || self.lease_ns.load(SeqCst) != NO_LEASE
    }

    /// Whether I/O may begin now.
    #[must_use]
    pub fn admits(&self) -> bool {
        self.flow.load(SeqCst) == OPEN && !self.lease_is_over()
    }

    fn lease_is_over(&self) -> bool {
        let lease_ns = self.lease_ns.load(SeqCst);
        let now = || clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(Duration::MAX, Duration::from);
        lease_ns != NO_LEASE && now() >= Duration::from_nanos(lease_ns)
    }

    /// Asks to be told of changes. Look at [`Valve::admits`] after it, before waiting.
    pub(super) fn park(&self, parked: bool) {
        self.parked.store(parked, SeqCst);
    }

    /// Asks for leave to begin `count` steps, right before they are handed to the host. If it is given, each
    /// ends with [`Valve::leave`].
    pub(super) fn enter(&self, count: usize) -> bool {
        // Counted before the look: whoever closes either is seen here or sees these.
        self.under_way.fetch_add(count, SeqCst);
        if self.admits() {
            return true;
        }
        self.leave(count);
        false
    }

    /// So many steps have ended.
    pub(super) fn leave(&self, count: usize) {
        let before = self.under_way.fetch_sub(count, SeqCst);
        if before == count && self.flow.load(SeqCst) != OPEN {
            drop(self.quiet.lock().unwrap_or_else(PoisonError::into_inner));
            self.quietened.notify_all();
        }
    }

    pub(super) fn quiet(&self) -> bool {
        self.under_way.load(SeqCst) == 0
    }
}
