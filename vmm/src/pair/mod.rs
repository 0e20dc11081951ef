//! The threads of a protected pair: they give [`ft`]'s state machines sockets, time and a guest.
//!
//! ```text
//!      primary's process                                     backup's process
//!   vCPU thread (record)                                  vCPU thread (replay)
//!      │ log bytes, outputs                                  ▲ log bytes   │ progress, digests
//!      ▼                                                     │             ▼
//!   ft thread: ft::Primary, gate ── log ──> socket ──> ft thread: ft::Backup
//!      │                         <── acks ─                  │
//!      ▼ released outputs                                    ▼ go live
//!   back halves                                           back halves
//! ```
//!
//! What must hold: an output reaches a back half only through [`ft::OutputGate`], as far as
//! [`ft::Primary`] says. The decisions are all in `ft`; these files only carry them out, in order.

pub mod arbiter;
pub mod backup;
pub mod channel;
pub mod clone;
pub mod images;
pub mod marker;
pub mod primary;
pub mod receive;
mod side;
pub mod status;
pub mod tls;
pub mod wire;

use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

use ft::{Arbiter, Capabilities, Claim, DiskMode, Generation, PairId};
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_gettime};
use vmm_sys_util::eventfd::EventFd;

use channel::Channel;

/// The processor and machine that this version gives to a guest. Two hosts with different values cannot
/// be a pair: a change to what a guest can observe of the machine changes this name.
pub const MACHINE_MODEL: &str = "dyad-soft-1";

/// What this program offers a pair.
#[must_use]
pub fn capabilities() -> Capabilities {
    Capabilities {
        host: host_identity(),
        cpu_model: MACHINE_MODEL.into(),
        memory_bytes: host_memory_bytes(),
        devices: ["virtio-blk", "virtio-net", "virtio-console", "virtio-rng", "serial"]
            .map(String::from)
            .to_vec(),
        disk_modes: vec![DiskMode::Shared, DiskMode::Mirrored],
    }
}

/// Names this host for as long as it runs: containers and network namespaces on it have the same. Empty
/// where the kernel does not tell.
#[must_use]
pub fn host_identity() -> String {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id");
    boot.map_or_else(|_| String::new(), |boot| boot.trim().to_owned())
}

/// Physical memory of this host.
fn host_memory_bytes() -> u64 {
    nix::sys::sysinfo::sysinfo().map_or(u64::MAX, |info| info.ram_total())
}

/// Time as the state machines want it: it goes on while the host sleeps.
#[must_use]
pub fn boot_time() -> Duration {
    clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(Duration::ZERO, Duration::from)
}

/// A delay of an ft thread that is worth telling: it eats into the failure timeout.
const NOTABLE_DELAY: Duration = Duration::from_millis(50);

/// Watches how promptly an ft thread runs, for the operator who wonders why a side was given up.
struct Promptness {
    side: &'static str,
    woke: Duration,
}

impl Promptness {
    fn new(side: &'static str) -> Self {
        Self { side, woke: boot_time() }
    }

    /// Before sleeping: tells of work that took long.
    fn sleeps(&self) {
        let worked = boot_time().saturating_sub(self.woke);
        if worked > NOTABLE_DELAY {
            log::warn!("{}: one round of the ft thread took {} ms", self.side, worked.as_millis());
        }
    }

    /// After a sleep that should have ended at `deadline` at the latest.
    fn wakes(&mut self, deadline: Duration) {
        self.woke = boot_time();
        let late = self.woke.saturating_sub(deadline);
        if late > NOTABLE_DELAY {
            log::warn!("{}: the host woke the ft thread {} ms late", self.side, late.as_millis());
        }
    }
}

/// Lets the calling ft thread run before others. It does little, but what it does must not wait: heartbeats
/// and acknowledgements are what the other side judges this one by.
fn run_first() {
    let parameter = libc::sched_param { sched_priority: 1 };
    // SAFETY: changes the scheduling of the calling thread alone; the parameter outlives the call.
    let result = unsafe {
        libc::sched_setscheduler(
            0,
            libc::SCHED_RR | libc::SCHED_RESET_ON_FORK,
            &raw const parameter,
        )
    };
    if result != 0 {
        let error = std::io::Error::last_os_error();
        log::info!("the ft thread has no real-time priority: {error}");
    }
}

/// What an ft thread woke for.
struct Ready {
    readable: bool,
}

/// Sleeps until the channel or the waker has something, or `deadline`.
fn wait(channel: Option<&Channel>, waker: &EventFd, deadline: Duration) -> Ready {
    // SAFETY: both descriptors are open as long as the references given live.
    let waker_fd = unsafe { BorrowedFd::borrow_raw(waker.as_raw_fd()) };
    let mut fds = vec![PollFd::new(waker_fd, PollFlags::POLLIN)];
    if let Some(channel) = channel {
        // SAFETY: as above.
        let fd = unsafe { BorrowedFd::borrow_raw(channel.as_raw_fd()) };
        let writing =
            if channel.wants_to_write() { PollFlags::POLLOUT } else { PollFlags::empty() };
        fds.push(PollFd::new(fd, PollFlags::POLLIN | writing));
    }
    let timeout = TimeSpec::from(deadline.saturating_sub(boot_time()));
    // An interrupted sleep is a short one.
    let _ = ppoll(&mut fds, Some(timeout), None);
    let _ = waker.read();
    let interesting = PollFlags::POLLIN | PollFlags::POLLHUP | PollFlags::POLLERR;
    let readable =
        fds.get(1).and_then(PollFd::revents).is_some_and(|events| events.intersects(interesting));
    Ready { readable }
}

/// Asks the arbiter on a thread of its own, since it may hang as long as its storage does.
fn claim(
    arbiter: Arc<dyn Arbiter>,
    pair: PairId,
    generation: Generation,
    who: String,
    answer: impl Fn(Result<Claim, String>) + Send + Sync + 'static,
) {
    let answer = Arc::new(answer);
    let answer_later = Arc::clone(&answer);
    let spawned = std::thread::Builder::new().name("arbiter".into()).spawn(move || {
        let result = arbiter.claim(&pair, generation, &who);
        answer_later(result.map_err(|error| arbiter::describe(&error)));
    });
    if let Err(error) = spawned {
        answer(Err(format!("cannot start a thread: {error}")));
    }
}
