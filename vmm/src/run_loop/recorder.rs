//! The writing end of the log: turns what happens to the guest into records, on the vCPU thread.
//!
//! Records and outputs are collected and handed to the ft thread in one piece at each flush, so that the
//! run loop takes a lock, and the ft thread is woken, once for many. The ft thread answers through a few atomics
//! ([`Feedback`]).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use ft::lag::LONGEST_RUN;
use ft::{Digest, Encoder, Entry, Event, ExecutionPoint, LogPosition, OutputNumber, PageHashes};
use rt_channel::Sender;
use vmm_sys_util::eventfd::EventFd;

use super::disks::{DiskPlan, RecordedDisks, Unread};
use super::outgoing::Outgoing;
use crate::guest::Guest;
use crate::pair::boot_time;

/// A flush comes by itself at this size, so that with the largest record it still fits a message.
const FLUSH_BYTES: usize = 1 << 20;

/// Guest time after which the log of a guest that makes no output is sent on. Each piece wakes the ft threads of both
/// sides several times, and they run on the processors that the guests need.
const FLUSH_INTERVAL: Duration = Duration::from_millis(8);
const _: () =
    assert!(FLUSH_INTERVAL.as_nanos() < LONGEST_RUN.as_nanos(), "else running looks like idling");

/// What the vCPU thread hands to the ft thread, in order.
pub enum FromVcpu {
    /// Log bytes and the outputs made since the last flush.
    Flush(Flush),
    /// The vCPU stands still behind the hand-over record, with which the log ends here.
    HandedOver {
        /// End of the log.
        end: LogPosition,
    },
}

/// One flush.
pub struct Flush {
    /// Encoded records, whole.
    pub bytes: Vec<u8>,
    /// Position behind the last of `bytes`.
    pub end: LogPosition,
    /// Execution point of the last record.
    pub point: ExecutionPoint,
    /// Digests among the records: where, and of which pages.
    pub digests: Vec<(ExecutionPoint, PageHashes)>,
    /// Outputs with the position that must be acknowledged before each may leave.
    pub outputs: Vec<HeldOutput>,
}

impl Flush {
    /// How much it holds.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        let outputs: usize = self.outputs.iter().map(|held| held.outgoing.size()).sum();
        (self.bytes.len() + outputs) as u64
    }
}

/// An output on its way to the gate.
pub struct HeldOutput {
    /// Its number, the same on both sides.
    pub number: OutputNumber,
    /// The position to be acknowledged.
    pub position: LogPosition,
    /// When the guest made it, by [`boot_time`].
    pub made: Duration,
    /// The position to be executed: the backup reads until there what this overwrites.
    pub behind: LogPosition,
    /// What is to leave.
    pub outgoing: Outgoing,
}

/// What the ft thread tells the vCPU thread, and how much it was given.
#[derive(Debug, Default)]
pub struct Feedback {
    flushed_bytes: AtomicU64,
    released: AtomicU64,
    executed: AtomicU64,
    throttle_permille: AtomicU32,
    stalled: AtomicBool,
}

impl Feedback {
    /// Outputs through `number` have left.
    pub fn release(&self, number: OutputNumber) {
        self.released.store(number.0, Ordering::Release);
    }

    /// The backup has executed the log up to `position`.
    pub fn executed(&self, position: LogPosition) {
        self.executed.store(position.0, Ordering::Release);
    }

    /// The part of its time that the guest must give away, 0 to 1. True if it was more until now: the vCPU thread,
    /// which may rest for longer than it must any more, is to be woken.
    #[must_use]
    pub fn set_throttle(&self, fraction: f64) -> bool {
        let permille = (fraction.clamp(0.0, 1.0) * 1000.0).round() as u32;
        let before = self.throttle_permille.swap(permille, Ordering::AcqRel);
        permille < before
    }

    /// The sizes of all flushes so far.
    #[must_use]
    pub fn flushed_bytes(&self) -> u64 {
        self.flushed_bytes.load(Ordering::Acquire)
    }

    /// Stops the guest because the log buffers are full, or lets it go on; after the latter the vCPU
    /// thread must be woken.
    pub fn set_stalled(&self, stalled: bool) {
        self.stalled.store(stalled, Ordering::Release);
    }
}

/// See the module's documentation.
pub struct Recorder {
    encoder: Encoder,
    bytes: Vec<u8>,
    outputs: Vec<HeldOutput>,
    digests: Vec<(ExecutionPoint, PageHashes)>,
    next_output: OutputNumber,
    last_released: OutputNumber,
    flush_interval: Duration,
    disks: RecordedDisks,
    /// The read that the next record completes without its data.
    reading: Option<(u8, u64, u64)>,
    unread: Unread,
    sink: Sender<FromVcpu>,
    waker: Arc<EventFd>,
    feedback: Arc<Feedback>,
}

impl Recorder {
    /// Starts a log at position zero and the point `start`. Everything goes to `sink`, and `waker` is
    /// written each time.
    #[must_use]
    pub fn new(
        start: ExecutionPoint,
        sink: Sender<FromVcpu>,
        waker: Arc<EventFd>,
        feedback: Arc<Feedback>,
    ) -> Self {
        Self {
            encoder: Encoder::new(start),
            bytes: Vec::new(),
            outputs: Vec::new(),
            digests: Vec::new(),
            next_output: OutputNumber(1),
            last_released: OutputNumber(0),
            flush_interval: FLUSH_INTERVAL,
            disks: RecordedDisks::default(),
            reading: None,
            unread: Unread::default(),
            sink,
            waker,
            feedback,
        }
    }

    /// Records for a backup that works with disks as `plan` says.
    #[must_use]
    pub fn with_plan(self, plan: DiskPlan) -> Self {
        Self { disks: RecordedDisks::new(plan), ..self }
    }

    /// Sends the log of a guest without outputs on so often that lag control, which keeps to `max_lag`, never takes what
    /// is being collected for lag.
    #[must_use]
    pub fn with_max_lag(self, max_lag: Duration) -> Self {
        Self { flush_interval: FLUSH_INTERVAL.min(max_lag / 12), ..self }
    }

    /// Guest time after which the log of a guest without outputs is sent on.
    #[must_use]
    pub fn flush_interval(&self) -> Duration {
        self.flush_interval
    }

    /// What the backup does with disks.
    #[must_use]
    pub fn plan(&self) -> DiskPlan {
        self.disks.plan()
    }

    /// `guest` is recorded from here on.
    pub fn begin(&mut self, guest: &Guest) {
        self.disks.begin(guest);
    }

    /// A completion without what the backup has by itself, if there is such. To be asked before `guest` gets the event.
    pub fn logged(&mut self, guest: &Guest, event: &Event) -> Option<Event> {
        let find = |device, id| {
            let mut all = guest.machine().outstanding().into_iter();
            let found = all.find(|(slot, request)| *slot == device && request.id == id);
            found.map(|(_, request)| request.op)
        };
        let (logged, reading) = self.disks.logged(event, find);
        self.reading = reading;
        logged
    }

    /// Appends a record.
    pub fn record(&mut self, point: ExecutionPoint, entry: &Entry) {
        if matches!(entry, Entry::Mark) && self.encoder.point() == point {
            return; // the backup can come here already
        }
        self.append(point, entry);
        self.flush_if_large();
    }

    fn append(&mut self, point: ExecutionPoint, entry: &Entry) {
        self.encoder
            .append(point, entry, &mut self.bytes)
            .expect("points never decrease and devices bound their events");
        if let Some((device, first, end)) = self.reading.take() {
            self.unread.add(device, first, end, self.encoder.position());
        }
    }

    fn flush_if_large(&mut self) {
        if self.bytes.len() > FLUSH_BYTES {
            self.flush();
        }
    }

    /// Appends a digest. Its `pages` are for the ft thread alone.
    pub fn digest(&mut self, point: ExecutionPoint, digest: Digest, pages: PageHashes) {
        self.digests.push((point, pages));
        self.record(point, &Entry::Digest(digest));
    }

    /// Appends a record for an output and holds the output until the next flush.
    pub fn output(&mut self, point: ExecutionPoint, outgoing: Outgoing) {
        let number = self.next_output;
        self.next_output = OutputNumber(number.0 + 1);
        self.append(point, &Entry::Output { number });
        let executed = LogPosition(self.feedback.executed.load(Ordering::Acquire));
        let behind = match &outgoing {
            Outgoing::Block { device, request } => {
                self.unread.before(*device, &request.op, executed)
            }
            Outgoing::Frames { .. } | Outgoing::Console { .. } | Outgoing::Serial(_) => {
                LogPosition(0)
            }
        };
        let (position, made) = (self.encoder.position(), boot_time());
        self.outputs.push(HeldOutput { number, position, behind, made, outgoing });
        // Only now: an output left behind by its record would wait for another one.
        self.flush_if_large();
    }

    /// Tells the backup which outputs it no longer needs to keep.
    pub fn record_released(&mut self, point: ExecutionPoint) {
        let through = OutputNumber(self.feedback.released.load(Ordering::Acquire));
        if through > self.last_released {
            self.last_released = through;
            self.record(point, &Entry::Released { through });
        }
    }

    /// Hands everything collected to the ft thread.
    pub fn flush(&mut self) {
        let bytes = std::mem::take(&mut self.bytes);
        if bytes.is_empty() {
            return;
        }
        let outputs = std::mem::take(&mut self.outputs);
        let digests = std::mem::take(&mut self.digests);
        let (end, point) = (self.encoder.position(), self.encoder.point());
        let flush = Flush { bytes, end, point, digests, outputs };
        self.feedback.flushed_bytes.fetch_add(flush.size_bytes(), Ordering::AcqRel);
        self.send(FromVcpu::Flush(flush));
    }

    /// The last record has been written: the guest goes on elsewhere.
    pub fn hand_over(&mut self) {
        self.flush();
        self.send(FromVcpu::HandedOver { end: self.encoder.position() });
    }

    /// Whether the guest must wait for room in the log.
    #[must_use]
    pub fn stalled(&self) -> bool {
        self.feedback.stalled.load(Ordering::Acquire)
    }

    /// The part of its time that the guest must rest, 0 to 1, so that the backup can keep up.
    #[must_use]
    pub fn throttle(&self) -> f64 {
        f64::from(self.feedback.throttle_permille.load(Ordering::Acquire)) / 1000.0
    }

    fn send(&self, message: FromVcpu) {
        // If the ft thread has gone the pair has ended; the command that says so is in the inbox.
        if self.sink.send(message).is_ok() {
            let _ = self.waker.write(1);
        }
    }
}
