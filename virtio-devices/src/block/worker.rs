//! A disk's thread: takes requests, keeps several under way at the host, and hands on what is done.
//!
//! The front half gives out together only what may be done in any order, so nothing here waits for anything
//! but leave to begin. One thing is done once for many: a sync covers all that was written before it began, so those
//! that ask for one while another runs share the next, and a flush with nothing completed since the last needs none. Once a
//! sync has failed, all that wait for one fail ([`super::image`]).

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::TryRecvError;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use rt_channel::Receiver;

use super::back::{BlockBackError, CompletionSink, Submitted};
use super::engine::{Engine, Outcome};
use super::faults::Verdict;
use super::image::Image;
use super::job::{Job, Progress, Reply};
use super::latency::{Latencies, Timing};
use crate::effect::{BlockCompletion, BlockStatus};
use crate::poll::Bell;

/// Time between two attempts to lock the image that a predecessor still holds.
const LOCK_PAUSE: Duration = Duration::from_secs(1);

pub(super) struct Worker {
    pub image: Arc<Image>,
    pub requests: Receiver<Submitted>,
    pub bell: Arc<Bell>,
    pub engine: Box<dyn Engine>,
    pub complete: CompletionSink,
    pub latencies: Arc<Latencies>,
    pub queues: Queues,
}

/// Jobs that are not at the host.
#[derive(Default)]
pub(super) struct Queues {
    ready: VecDeque<Job>,
    /// Those that wait for the next sync.
    to_sync: Vec<Job>,
    /// Whether one is under way.
    syncing: bool,
    unstable: Unstable,
    /// Those to be tried again some time later.
    later: Vec<Job>,
    /// When to try for the lock again.
    lock_at: Option<Instant>,
    lock_refused: bool,
}

/// How much was completed that a crash of the host could undo.
#[derive(Debug)]
struct Unstable {
    /// Requests that were completed and not stable then. What is in the host's cache from before counts as one.
    completed: u64,
    /// How many of them the sync under way covers.
    covered: u64,
    /// How many are stable by now.
    stable: u64,
}

impl Default for Unstable {
    fn default() -> Self {
        Self { completed: 1, covered: 0, stable: 0 }
    }
}

impl Unstable {
    fn completed(&mut self) {
        self.completed += 1;
    }

    fn sync_begins(&mut self) {
        self.covered = self.completed;
    }

    fn synced(&mut self) {
        self.stable = self.covered;
    }

    fn is_empty(&self) -> bool {
        self.stable == self.completed
    }
}

impl Queues {
    fn is_empty(&self) -> bool {
        self.ready.is_empty() && self.to_sync.is_empty() && self.later.is_empty()
    }

    fn clear(&mut self) {
        self.ready.clear();
        self.to_sync.clear();
        self.later.clear();
    }
}

impl Worker {
    pub fn run(mut self) {
        if !self.image.following.load(Ordering::Acquire) {
            self.lives();
        }
        loop {
            self.try_lock();
            let open = self.take_requests();
            self.take_late();
            let began = self.begin();
            let finished = self.finish();
            if began || finished {
                continue;
            }
            if !open && self.queues.is_empty() && self.engine.under_way() == 0 {
                return;
            }
            self.wait();
        }
    }

    /// From now on this VM is the one that works with the image.
    fn lives(&mut self) {
        if !self.image.locked() {
            // A side that goes live: until now another host wrote to the image.
            self.image.forget_cached();
            self.queues.lock_at = Some(Instant::now());
        }
    }

    /// False if no more can come.
    fn take_requests(&mut self) -> bool {
        loop {
            let submitted = match self.requests.try_recv() {
                Ok(submitted) => submitted,
                Err(TryRecvError::Empty) => return true,
                Err(TryRecvError::Disconnected) => return false,
            };
            match submitted {
                Submitted::Request { request, at, patient } => {
                    let id = request.id;
                    let timing = Timing::begin(&request.op, at);
                    match Job::new(request, timing, self.image.direct, patient) {
                        Ok(job) => self.queues.ready.push_back(job),
                        Err(_) => self.answer(id, BlockStatus::IoError, Vec::new()),
                    }
                }
                Submitted::Live => self.lives(),
                Submitted::Stable(told) => self.queues.ready.push_back(Job::stable(told)),
            }
        }
    }

    fn take_late(&mut self) {
        if self.queues.later.is_empty() {
            return;
        }
        let now = Instant::now();
        let due = |job: &mut Job| job.not_before.is_none_or(|at| at <= now);
        for mut job in self.queues.later.extract_if(.., due) {
            job.not_before = None;
            self.queues.ready.push_back(job);
        }
    }

    /// Begins what there is and may be. False if nothing changed.
    fn begin(&mut self) -> bool {
        if self.image.valve.halted() {
            self.queues.clear();
            if self.image.valve.quiet() {
                self.image.unlock();
                self.queues.lock_at = None;
            }
            return false;
        }
        if !self.may_begin() {
            return false;
        }
        let (mut batch, mut ended) = (Vec::new(), false);
        while batch.len() < self.engine.room()
            && let Some(mut job) = self.queues.ready.pop_front()
        {
            if job.is_flush() && self.is_stable() {
                self.advance(job, Ok(0));
                ended = true;
                continue;
            }
            if job.wants_sync() {
                self.queues.to_sync.push(job);
                continue;
            }
            self.image.before(&job);
            match self.image.verdict(&mut job) {
                Verdict::Go => batch.push(job),
                Verdict::AtMost(bytes) => {
                    job.at_most = Some(bytes);
                    batch.push(job);
                }
                Verdict::Fail(error) => {
                    self.advance(job, Err(error));
                    ended = true;
                }
            }
        }
        if !self.queues.syncing
            && batch.len() < self.engine.room()
            && let Some(mut leader) = self.queues.to_sync.pop()
        {
            leader.with = std::mem::take(&mut self.queues.to_sync);
            let lost = self.image.sync_failure().map(Verdict::Fail);
            let verdict = lost.unwrap_or_else(|| self.image.verdict(&mut leader));
            if let Verdict::Fail(error) = verdict {
                self.image.synced(Err(error));
                self.advance_all(leader, Err(error));
                ended = true;
            } else {
                self.queues.syncing = true;
                self.queues.unstable.sync_begins();
                batch.push(leader);
            }
        }
        if batch.is_empty() {
            return ended;
        }
        self.engine.begin(batch);
        true
    }

    /// Whether a sync would change nothing.
    fn is_stable(&self) -> bool {
        self.queues.unstable.is_empty() && self.image.sync_failure().is_none()
    }

    /// Whether there is something to begin and leave to do so; asks to be woken if there is none.
    fn may_begin(&mut self) -> bool {
        let valve = &self.image.valve;
        let waiting = !self.queues.ready.is_empty()
            || (!self.queues.syncing && !self.queues.to_sync.is_empty());
        if !waiting || valve.admits() {
            valve.park(false);
            return waiting;
        }
        valve.park(true);
        // Whoever gave leave before the line above rang no bell.
        valve.admits()
    }

    fn finish(&mut self) -> bool {
        let mut finished = Vec::new();
        self.engine.finished(&mut finished);
        let any = !finished.is_empty();
        for (mut job, outcome) in finished {
            if job.wants_sync() {
                self.queues.syncing = false;
                if let Outcome::Done(result) = outcome {
                    self.image.synced(result.map(|_| ()));
                    if result.is_ok() {
                        self.queues.unstable.synced();
                    }
                }
            }
            match outcome {
                Outcome::Refused => {
                    self.queues.to_sync.append(&mut job.with);
                    self.queues.ready.push_front(job);
                }
                Outcome::Done(result) => self.advance_all(job, result),
            }
        }
        any
    }

    fn advance_all(&mut self, mut job: Job, result: Result<usize, Errno>) {
        for other in std::mem::take(&mut job.with) {
            self.advance(other, result);
        }
        self.advance(job, result);
    }

    fn advance(&mut self, mut job: Job, result: Result<usize, Errno>) {
        let write_through = self.image.write_through.load(Ordering::Acquire);
        match job.advance(result, write_through) {
            Progress::Again if job.not_before.is_some() => self.queues.later.push(job),
            Progress::Again => self.queues.ready.push_back(job),
            Progress::Done(result) => self.end(job, result),
        }
    }

    fn end(&mut self, job: Job, result: Result<(), Errno>) {
        // Not if it ends with a sync of its own that went well. What failed may be written in part.
        if job.writes().is_some() && (result.is_err() || !job.wants_sync()) {
            self.queues.unstable.completed();
        }
        if let Err(error) = result {
            self.image.report(&job, error);
        }
        self.image.after(&job);
        match &job.reply {
            Reply::Stable(told) => {
                // Whoever asked may have given up.
                let _ = told.send(result);
            }
            Reply::Completion { id } => {
                let id = *id;
                self.latencies.finished(job.timing);
                match result {
                    Ok(()) => self.answer(id, BlockStatus::Ok, job.into_data()),
                    Err(_) => self.answer(id, BlockStatus::IoError, Vec::new()),
                }
            }
        }
    }

    fn answer(&self, id: u64, status: BlockStatus, data: Vec<u8>) {
        (self.complete)(BlockCompletion { id, status, data });
    }

    fn try_lock(&mut self) {
        let due = self.queues.lock_at.is_some_and(|at| at <= Instant::now());
        if !due || self.image.valve.halted() {
            return;
        }
        self.queues.lock_at = None;
        match self.image.lock() {
            Ok(()) if self.queues.lock_refused => {
                log::info!("disk image {} is locked for this VM now", self.image.path.display());
            }
            Ok(()) => {}
            Err(error @ BlockBackError::InUse { .. }) => {
                if !std::mem::replace(&mut self.queues.lock_refused, true) {
                    log::warn!("{error}; this VM has gone live and takes the lock when it is free");
                }
                self.queues.lock_at = Some(Instant::now() + LOCK_PAUSE);
            }
            Err(error) => log::warn!("{error}; this VM uses the image without a lock"),
        }
    }

    fn wait(&self) {
        let late = self.queues.later.iter().filter_map(|job| job.not_before);
        let until = late.chain(self.queues.lock_at).min();
        let timeout = until.map(|at| at.saturating_duration_since(Instant::now()));
        if let Err(error) = self.bell.wait_at_most(timeout) {
            log::error!("disk {}: waiting failed: {error}", self.image.path.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sync_covers_what_was_completed_before_it_began() {
        let mut unstable = Unstable::default();
        assert!(!unstable.is_empty());
        unstable.sync_begins();
        unstable.completed();
        unstable.synced();
        assert!(!unstable.is_empty(), "completed while it ran");
        unstable.sync_begins();
        assert!(!unstable.is_empty(), "it may fail");
        unstable.synced();
        assert!(unstable.is_empty());
    }
}
