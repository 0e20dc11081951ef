//! Interrupting `KVM_RUN` from another thread.
//!
//! A kick raises a flag and sends the vCPU's thread a signal. The signal's handler sets the vCPU's
//! `immediate_exit`, so that a signal which comes just before the thread enters the kernel is not lost:
//! KVM then returns EINTR at once. The flag tells the run loop that the EINTR was meant for it, and other kicks that
//! theirs is on its way: the run loop lowers it only when it answers, and looks at it before it enters the guest.

use std::cell::Cell;
use std::ffi::{c_int, c_void};
use std::ptr::null;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

use libc::{pthread_t, siginfo_t};
use vmm_sys_util::signal::register_signal_handler;

use crate::{Error, Kick};

/// Not a real-time signal: the kernel queues those, and refuses more when a user has as many pending as he may. This one
/// it never refuses, and pending twice it comes once, which does. From anywhere else it means nothing by default.
const SIGNAL: c_int = libc::SIGURG;

thread_local! {
    /// The `immediate_exit` of the vCPU that this thread runs, or null.
    static IMMEDIATE_EXIT: Cell<*const AtomicU8> = const { Cell::new(null()) };
}

/// Runs in the middle of anything this thread does: touches one thread-local without destructor and one byte.
extern "C" fn on_signal(_: c_int, _: *mut siginfo_t, _: *mut c_void) {
    let immediate_exit = IMMEDIATE_EXIT.get();
    if !immediate_exit.is_null() {
        // SAFETY: `Entered` keeps the pointer here only while the vCPU, which owns the mapping, runs.
        unsafe { (*immediate_exit).store(1, Ordering::Relaxed) };
    }
}

/// Installs the handler, once in a process.
fn install_handler() -> Result<(), Error> {
    static RESULT: OnceLock<Result<(), i32>> = OnceLock::new();
    let result = RESULT
        .get_or_init(|| register_signal_handler(SIGNAL, on_signal).map_err(|error| error.errno()));
    result.map_err(|errno| Error::Kvm {
        call: "sigaction",
        source: std::io::Error::from_raw_os_error(errno),
    })
}

/// See the module's documentation.
pub(super) struct KvmKick {
    requested: AtomicBool,
    /// The thread that runs the vCPU now. A signal is sent with this locked: the thread cannot have ended.
    thread: Mutex<Option<pthread_t>>,
}

impl KvmKick {
    pub(super) fn new() -> Result<Self, Error> {
        install_handler()?;
        Ok(Self { requested: AtomicBool::new(false), thread: Mutex::new(None) })
    }

    /// Whether a kick waits to be answered.
    pub(super) fn requested(&self) -> bool {
        self.requested.load(Ordering::SeqCst)
    }

    /// Answers the kick.
    pub(super) fn take(&self) -> bool {
        self.requested.swap(false, Ordering::SeqCst)
    }

    /// From now on signals reach this thread, until the result is dropped.
    ///
    /// `immediate_exit` is the vCPU's and must outlive the result.
    pub(super) fn enter(&self, immediate_exit: *const AtomicU8) -> Entered<'_> {
        IMMEDIATE_EXIT.set(immediate_exit);
        // SAFETY: has no preconditions.
        let this_thread = unsafe { libc::pthread_self() };
        self.set_thread(Some(this_thread));
        Entered(self)
    }

    fn set_thread(&self, thread: Option<pthread_t>) {
        *self.thread.lock().unwrap_or_else(PoisonError::into_inner) = thread;
    }
}

impl Kick for KvmKick {
    fn kick(&self) {
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        // Raised with the lock held: whoever finds it up knows that the signal has been sent, or that the thread was
        // not there and has yet to look.
        if self.requested.swap(true, Ordering::SeqCst) {
            return;
        }
        if let Some(thread) = *thread {
            // SAFETY: the thread is inside `run`: it cannot leave without taking the lock held here.
            let result = unsafe { libc::pthread_kill(thread, SIGNAL) };
            assert_eq!(result, 0, "a living thread takes a signal that does not queue");
        }
    }
}

/// A thread that runs a vCPU.
pub(super) struct Entered<'a>(&'a KvmKick);

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        self.0.set_thread(None);
        IMMEDIATE_EXIT.set(null());
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Barrier};
    use std::thread;

    use super::*;

    /// Lets the user have so many signals queued; returns how many it was before.
    fn limit_pending(most: libc::rlim_t) -> libc::rlim_t {
        let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        // SAFETY: `limit` is valid for both calls.
        unsafe {
            assert_eq!(libc::getrlimit(libc::RLIMIT_SIGPENDING, &raw mut limit), 0);
            let before = limit.rlim_cur;
            limit.rlim_cur = most;
            assert_eq!(libc::setrlimit(libc::RLIMIT_SIGPENDING, &raw const limit), 0);
            before
        }
    }

    #[test]
    fn a_kick_arrives_with_no_signal_left_to_queue_and_once_until_it_is_taken() {
        let kick = Arc::new(KvmKick::new().unwrap());
        let turn = Arc::new(Barrier::new(2));
        let vcpu = {
            let (kick, turn) = (Arc::clone(&kick), Arc::clone(&turn));
            thread::spawn(move || {
                let immediate_exit = AtomicU8::new(0);
                let interrupted = || {
                    // A signal that is pending is handled on the way back from a system call.
                    thread::yield_now();
                    immediate_exit.swap(0, Ordering::Relaxed) == 1
                };
                let entered = kick.enter(&raw const immediate_exit);
                let mut found = Vec::new();
                for take in [false, true, false] {
                    turn.wait();
                    // The other side kicks.
                    turn.wait();
                    found.push((interrupted(), kick.requested()));
                    if take {
                        assert!(kick.take() && !kick.requested());
                    }
                }
                drop(entered);
                found
            })
        };
        let before = limit_pending(0);
        for _ in 0..3 {
            turn.wait();
            kick.kick();
            turn.wait();
        }
        limit_pending(before);
        assert_eq!(vcpu.join().unwrap(), [(true, true), (false, true), (true, true)]);
    }
}
