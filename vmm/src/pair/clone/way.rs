//! The clone thread's way to the ft thread, which owns the socket, and what others see of the copy.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::TrySendError;
use std::sync::{Arc, Mutex, PoisonError, TryLockError};

use ft::Message;
use ft::status::{CloneDisk, CloneStatus};
use rt_channel::{Receiver, Sender};
use vmm_sys_util::eventfd::EventFd;

use super::disks::{WINDOWS_UNDER_WAY, shown};
use super::{CloneError, CloneStep};

/// Messages between the clone thread and the socket.
const WAITING_STEPS: usize = 4;

/// How far a copy is. Written by the clone thread.
#[derive(Debug, Default)]
pub struct CloneProgress(Mutex<CloneStatus>, Mutex<Vec<CloneDisk>>);

impl CloneProgress {
    /// For the ft thread, which waits for nobody: leaves `status` as it is while the clone thread writes.
    pub fn read(&self, status: &mut CloneStatus) {
        match self.0.try_lock() {
            Ok(guard) => *status = *guard,
            Err(TryLockError::Poisoned(guard)) => *status = *guard.into_inner(),
            Err(TryLockError::WouldBlock) => {}
        }
    }

    /// As [`Self::read`], of each disk.
    pub fn read_disks(&self, disks: &mut Vec<CloneDisk>) {
        match self.1.try_lock() {
            Ok(guard) => disks.clone_from(&guard),
            Err(TryLockError::Poisoned(guard)) => disks.clone_from(&guard.into_inner()),
            Err(TryLockError::WouldBlock) => {}
        }
    }

    /// For the clone thread.
    pub fn disk(&self, id: &str, change: impl FnOnce(&mut CloneDisk)) {
        change(shown(&mut self.1.lock().unwrap_or_else(PoisonError::into_inner), id));
    }

    /// For the clone thread.
    pub fn update(&self, change: impl FnOnce(&mut CloneStatus)) {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

/// What the backup says about blocks of a disk; see [`Message::DiskDiffers`].
#[derive(Debug)]
pub struct Compared {
    /// Which disk.
    pub disk: u32,
    /// The first of the blocks.
    pub first: u64,
    /// A bit for each, set where it differs.
    pub differing: Vec<u8>,
}

/// What both ends share.
#[derive(Debug, Default)]
struct Shared {
    cancelled: AtomicBool,
    /// The last round that the backup says it has taken.
    taken: AtomicU64,
}

/// The clone thread's end.
pub struct Way {
    /// Bounded, so that memory is read no faster than the network takes it.
    steps: Sender<CloneStep>,
    /// Written after each step.
    waker: Arc<EventFd>,
    shared: Arc<Shared>,
    /// Says that `taken` has changed; closes when the copy is given up.
    answers: Receiver<()>,
    /// Answers about disks. Closes when the copy is given up.
    compared: Receiver<Compared>,
}

/// The ft thread's end. Dropped, it ends the copy.
pub struct WayOut {
    steps: Receiver<CloneStep>,
    shared: Arc<Shared>,
    answered: Sender<()>,
    compared: Sender<Compared>,
}

/// Makes the two ends. `waker` wakes the ft thread.
#[must_use]
pub fn way(waker: Arc<EventFd>) -> (Way, WayOut) {
    let (steps, steps_out) = rt_channel::bounded(WAITING_STEPS);
    let (answered, answers) = rt_channel::bounded(1);
    let (compared_in, compared) = rt_channel::bounded(WINDOWS_UNDER_WAY);
    let shared = Arc::new(Shared::default());
    let out =
        WayOut { steps: steps_out, shared: Arc::clone(&shared), answered, compared: compared_in };
    (Way { steps, waker, shared, answers, compared }, out)
}

impl Way {
    /// Has `message` sent, behind all before.
    pub fn message(&self, message: Message) -> Result<(), CloneError> {
        self.step(CloneStep::Message(message))
    }

    /// Hands over a step.
    pub fn step(&self, step: CloneStep) -> Result<(), CloneError> {
        self.check()?;
        self.steps.send(step).map_err(|_| CloneError::Cancelled)?;
        let _ = self.waker.write(1);
        Ok(())
    }

    /// Waits until the backup has taken everything sent in `round`, which counts from one.
    pub fn end_round(&self, round: u64) -> Result<(), CloneError> {
        self.message(Message::RoundEnd { round })?;
        while self.shared.taken.load(Ordering::Acquire) < round {
            self.answers.recv().map_err(|_| CloneError::Cancelled)?;
            self.check()?;
        }
        Ok(())
    }

    /// Waits for the next answer about disk blocks.
    pub fn compared(&self) -> Result<Compared, CloneError> {
        let compared = self.compared.recv().map_err(|_| CloneError::Cancelled)?;
        self.check()?;
        Ok(compared)
    }

    /// Whether to go on.
    pub fn check(&self) -> Result<(), CloneError> {
        match self.shared.cancelled.load(Ordering::Acquire) {
            true => Err(CloneError::Cancelled),
            false => Ok(()),
        }
    }
}

impl WayOut {
    /// The next step, if there is one.
    #[must_use]
    pub fn next_step(&self) -> Option<CloneStep> {
        self.steps.try_recv().ok()
    }

    /// The backup says that it has taken `round`.
    pub fn round_taken(&self, round: u64) {
        self.shared.taken.fetch_max(round, Ordering::AcqRel);
        // One that waits already says as much.
        if let Err(TrySendError::Disconnected(())) = self.answered.try_send(()) {
            log::debug!("round {round} was taken after the copy had ended");
        }
    }
}

impl WayOut {
    /// The backup has compared blocks. False if nobody can have asked: there is no room for more answers than
    /// questions.
    #[must_use]
    pub fn compared(&self, compared: Compared) -> bool {
        !matches!(self.compared.try_send(compared), Err(TrySendError::Full(_)))
    }
}

impl Drop for WayOut {
    fn drop(&mut self) {
        // The channels close after this, so that a thread which waits on one finds it set.
        self.shared.cancelled.store(true, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_round_ends_when_it_is_taken_and_when_nobody_wants_it() {
        let (way, out) = way(Arc::new(EventFd::new(0).unwrap()));
        out.round_taken(7);
        out.round_taken(3);
        assert!(way.end_round(7).is_ok());
        assert!(matches!(
            out.next_step(),
            Some(CloneStep::Message(Message::RoundEnd { round: 7 }))
        ));
        let waiting = std::thread::spawn(move || way.end_round(8));
        while out.next_step().is_none() {
            std::thread::yield_now();
        }
        drop(out);
        assert!(matches!(waiting.join().unwrap(), Err(CloneError::Cancelled)));
    }
}
