//! Copying a running guest to its backup.
//!
//! What changes while the guest runs goes over in rounds: first all there is, then what was changed during
//! the round before, until little is left. Then the guest stops for as long as it takes to copy that and the
//! device state aside, and goes on as the recording side. From that point the copy follows by the log.
//!
//! ```text
//!  payload ─▶ look, send everything ─▶ RoundEnd … RoundTaken ─▶ look ─▶ little left ─▶ Freeze, look last ─▶ Record
//!                                            ▲                    │ more                                   ─▶ the rest,
//!                                            └──── send changes ◀─┘ (the guest may be slowed down)             State
//! ```
//!
//! What takes part in the rounds is a [`Source`]: memory, and each mirrored disk, which is compared with the backup's before
//! the rounds begin. [`rounds`] decides after each round. Runs
//! on a thread of its own, before the guest is deterministic, and only reads.
//!
//! What must hold: however the copy ends before `Record`, by an error, by the operator or with its backup, the
//! guest runs on as if nothing had been: not slowed down and not frozen.

pub mod disks;
pub mod memory;
pub mod rounds;
pub mod source;
pub mod way;

use std::sync::Arc;
use std::time::Instant;

use ft::Message;
use ft::message::PAGE_BYTES;
use ft::status::ClonePhase;
use hypervisor::GuestMemory;
use serde::{Deserialize, Serialize};

use crate::backends::DiskImage;
use crate::boot::Payload;
use crate::guest::{GuestState, encode};
use crate::machine::HostFacts;
use crate::machine::facts::DeviceFacts;
use crate::run_loop::inbox::InboxSender;
use crate::run_loop::recorder::Recorder;
use crate::run_loop::{self, Command, CommandError, Frozen};
use disks::DiskSource;
use memory::MemorySource;
use rounds::{Next, Round, Rounds};
use source::Source;
use way::{CloneProgress, Way};

/// Bytes of the payload in one message.
const PAYLOAD_CHUNK_BYTES: usize = 1 << 20;

/// What the backup needs besides memory; see [`ft::message::CloneStart`].
#[derive(Debug, Serialize, Deserialize)]
pub struct CloneHeader {
    /// The VM's configuration, as JSON.
    pub config: String,
    /// What the machine took from the host it was first started on.
    pub host: HostFacts,
    /// The devices that the guest sees.
    pub devices: Vec<DeviceFacts>,
}

/// The guest where primary and backup part; see [`ft::Message::State`].
#[derive(Debug, Serialize, Deserialize)]
pub struct CloneState {
    /// Processor and devices.
    pub guest: GuestState,
    /// Whether its user had paused it.
    pub paused: bool,
}

/// What the clone thread hands to the ft thread.
#[derive(Debug)]
pub enum CloneStep {
    /// To be sent.
    Message(Message),
    /// Everything has been handed over; the guest records.
    Sent,
    /// The clone cannot be made; the guest runs on as before.
    Failed(String),
}

/// Why a copy came to nothing.
#[derive(Debug)]
pub enum CloneError {
    /// The ft thread wants no more.
    Cancelled,
    /// It cannot be made.
    Failed(String),
}

impl From<CommandError> for CloneError {
    fn from(error: CommandError) -> Self {
        Self::Failed(error.to_string())
    }
}

/// Makes one clone.
pub struct CloneSender {
    /// The guest's thread.
    pub inbox: InboxSender<run_loop::Message>,
    /// The guest's memory.
    pub memory: GuestMemory,
    /// What it boots from.
    pub payload: Arc<Payload>,
    /// The images of mirrored disks.
    pub disks: Vec<DiskImage>,
    /// Where everything goes.
    pub way: Way,
    /// Kept up to date.
    pub progress: Arc<CloneProgress>,
}

impl CloneSender {
    /// Does all of it; `recorder` makes the log's writing end for the point it is given.
    pub fn run(mut self, recorder: impl FnOnce(ft::ExecutionPoint) -> Recorder) {
        let result = self.clone_guest(recorder);
        // However it ended, the guest has all its time again.
        self.progress.update(|status| status.throttle = 0.0);
        match result {
            Ok(()) | Err(CloneError::Cancelled) => {}
            Err(CloneError::Failed(reason)) => {
                let _ = self.way.step(CloneStep::Failed(reason));
            }
        }
    }

    /// Tells that it cannot even begin.
    pub fn fail(self, reason: String) {
        let _ = self.way.step(CloneStep::Failed(reason));
    }

    fn clone_guest(
        &mut self,
        recorder: impl FnOnce(ft::ExecutionPoint) -> Recorder,
    ) -> Result<(), CloneError> {
        for chunk in encode(&*self.payload).chunks(PAYLOAD_CHUNK_BYTES) {
            self.way.message(Message::Payload { bytes: chunk.to_vec() })?;
        }
        let memory = MemorySource::new(self.memory.clone(), self.inbox.clone());
        let mut sources: Vec<Box<dyn Source>> = vec![Box::new(memory)];
        let disks = std::mem::take(&mut self.disks);
        if !disks.is_empty() {
            self.progress.update(|status| status.phase = ClonePhase::Disks);
        }
        for (number, disk) in (0..).zip(disks) {
            let mut disk = DiskSource::new(number, disk, Arc::clone(&self.progress));
            disk.compare(&self.way)?;
            sources.push(Box::new(disk));
        }
        let slowed = self.rounds(&mut sources)?;
        self.last_round(&mut sources, slowed, recorder)
    }

    /// Copies while the guest runs, until little is left. The guest is as slow as it had to be made.
    fn rounds(&self, sources: &mut [Box<dyn Source>]) -> Result<Slowed<'_>, CloneError> {
        let mut slowed = Slowed { inbox: &self.inbox, fraction: 0.0 };
        let mut rounds = Rounds::default();
        let total_bytes = look(sources)?;
        self.progress.update(|status| {
            (status.phase, status.total_bytes) = (ClonePhase::Everything, total_bytes);
        });
        for number in 1.. {
            let began = Instant::now();
            let mut done_bytes = 0;
            self.progress.update(|status| status.rounds = number);
            for source in &mut *sources {
                source.send(&mut |message| {
                    let sent_bytes = sent_bytes(&message);
                    done_bytes += covered_bytes(&message);
                    self.progress.update(|status| status.sent_bytes += sent_bytes);
                    self.way.message(message)
                })?;
            }
            self.way.end_round(number)?;
            let took = began.elapsed();
            let changed_bytes = look(sources)?;
            let next = rounds.after(Round { sent_bytes: done_bytes, took, changed_bytes });
            if let Next::Round { throttle } = next {
                slowed.to(throttle);
            }
            self.progress.update(|status| {
                status.phase = ClonePhase::Changes;
                status.dirty_bytes = changed_bytes;
                status.link_bytes_per_s = rounds.bytes_per_s();
                status.throttle = slowed.fraction;
            });
            log::debug!(
                "round {number}: {done_bytes} bytes in {took:?}, {changed_bytes} changed: {next:?}"
            );
            match next {
                Next::Round { .. } => {}
                Next::Last => break,
                Next::GiveUp => return Err(CloneError::Failed(self.hopeless(&rounds))),
            }
        }
        Ok(slowed)
    }

    fn hopeless(&self, rounds: &Rounds) -> String {
        format!(
            "the guest changes its memory and mirrored disks faster than the backup takes it, {} KiB/s, even while the \
             guest hardly runs; use a faster network or, for mirrored disks, faster storage there, or try again when the \
             guest is less busy",
            rounds.bytes_per_s() >> 10
        )
    }

    /// The guest stands still from the first line to `Record`.
    fn last_round(
        &self,
        sources: &mut [Box<dyn Source>],
        mut slowed: Slowed<'_>,
        recorder: impl FnOnce(ft::ExecutionPoint) -> Recorder,
    ) -> Result<(), CloneError> {
        self.way.check()?;
        self.progress.update(|status| status.phase = ClonePhase::Pause);
        let stopped = Instant::now();
        let frozen: Frozen = run_loop::ask(&self.inbox, Command::Freeze)?;
        let standstill = Standstill { inbox: &self.inbox, over: false };
        let mut rest = Vec::new();
        for source in &mut *sources {
            source.send_last(&frozen, &mut |message| {
                rest.push(message);
                Ok(())
            })?;
        }
        let recorder = Box::new(recorder(frozen.point));
        slowed.to(0.0);
        standstill.record(recorder)?;
        let pause_us = u64::try_from(stopped.elapsed().as_micros()).unwrap_or(u64::MAX);
        self.progress.update(|status| {
            status.phase = ClonePhase::Sent;
            status.sent_bytes += rest.iter().map(sent_bytes).sum::<u64>();
            (status.dirty_bytes, status.throttle) = (0, 0.0);
            status.pause_us = Some(pause_us);
        });
        for message in rest {
            self.way.message(message)?;
        }
        let state = encode(&CloneState { guest: frozen.state, paused: frozen.paused });
        self.way.message(Message::State { point: frozen.point, bytes: state })?;
        self.way.step(CloneStep::Sent)
    }
}

fn look(sources: &mut [Box<dyn Source>]) -> Result<u64, CloneError> {
    sources.iter_mut().map(|source| source.look()).sum()
}

/// What a message adds to the bytes sent.
fn sent_bytes(message: &Message) -> u64 {
    match message {
        Message::Pages { bytes, .. } | Message::DiskData { bytes, .. } => bytes.len() as u64,
        _ => 0,
    }
}

/// How much of what is to be copied is done with a message. Zeros are copied like anything else, only faster.
fn covered_bytes(message: &Message) -> u64 {
    match message {
        Message::ZeroPages { count, .. } => count.saturating_mul(PAGE_BYTES as u64),
        Message::DiskZeroes { len, .. } => *len,
        message => sent_bytes(message),
    }
}

/// A guest that gives time away so that its copy can catch up. Gets it back with the end of this.
struct Slowed<'a> {
    inbox: &'a InboxSender<run_loop::Message>,
    fraction: f64,
}

impl Slowed<'_> {
    fn to(&mut self, fraction: f64) {
        if fraction != self.fraction {
            self.fraction = fraction;
            self.inbox.send(run_loop::Message::Command(Command::Throttle(fraction)));
        }
    }
}

impl Drop for Slowed<'_> {
    fn drop(&mut self) {
        self.to(0.0);
    }
}

/// A guest that stands still for its copy. It goes on with the end of this, as it was or recording.
struct Standstill<'a> {
    inbox: &'a InboxSender<run_loop::Message>,
    over: bool,
}

impl Standstill<'_> {
    fn record(mut self, recorder: Box<Recorder>) -> Result<(), CommandError> {
        self.over = true;
        run_loop::ask(self.inbox, |done| Command::Record(recorder, done))
    }
}

impl Drop for Standstill<'_> {
    fn drop(&mut self) {
        if !self.over {
            self.inbox.send(run_loop::Message::Command(Command::Thaw));
        }
    }
}
