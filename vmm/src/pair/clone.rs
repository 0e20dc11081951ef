//! Copying a running guest to its backup.
//!
//! Memory goes over in rounds while the guest runs: first every page that holds anything, then the pages
//! written during the round before, until few are left or rounds no longer help. Then the guest stops for as long
//! as it takes to copy the rest and the device state aside, and goes on as the recording side. From that
//! point the copy follows by the log.
//!
//! Runs on a thread of its own, before the guest is deterministic; it only reads guest memory. Pages it
//! reads while the guest writes them may be torn: they are dirty again and go over again.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use crossbeam_channel::Sender;
use ft::Message;
use ft::message::PAGE_BYTES;
use hypervisor::GuestMemory;
use serde::{Deserialize, Serialize};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use crate::boot::Payload;
use crate::guest::{GuestState, encode};
use crate::machine::HostFacts;
use crate::machine::facts::DeviceFacts;
use crate::run_loop::inbox::InboxSender;
use crate::run_loop::recorder::Recorder;
use crate::run_loop::{self, Command, CommandError, Frozen};

/// Pages in one message.
const RUN_PAGES: usize = 256;
/// So few dirty pages may be copied while the guest stands still (4 MiB).
const FEW_PAGES: usize = 1024;
/// Rounds after which the guest is stopped whatever is left.
const MAX_ROUNDS: u64 = 10;

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
pub enum CloneStep {
    /// To be sent.
    Message(Message),
    /// Everything has been handed over; the guest records.
    Sent,
    /// The clone cannot be made; the guest runs on as before.
    Failed(String),
}

/// How far a clone is.
#[derive(Debug, Default)]
pub struct CloneProgress {
    /// Bytes of memory handed over.
    pub sent_bytes: AtomicU64,
    /// Rounds begun.
    pub rounds: AtomicU64,
    /// How long the guest stood still, in microseconds; zero before it did.
    pub pause_us: AtomicU64,
}

/// Makes one clone.
pub struct CloneSender {
    /// The guest's thread.
    pub inbox: InboxSender<run_loop::Message>,
    /// The guest's memory.
    pub memory: GuestMemory,
    /// What it boots from.
    pub payload: Arc<Payload>,
    /// Where steps go; a bounded channel, so that memory is read no faster than the network takes it.
    pub steps: Sender<CloneStep>,
    /// Written after each step.
    pub waker: Arc<EventFd>,
    /// Kept up to date.
    pub progress: Arc<CloneProgress>,
    /// Set to give up.
    pub cancelled: Arc<AtomicBool>,
}

enum CloneError {
    /// The ft thread wants no more.
    Cancelled,
    Failed(String),
}

impl From<CommandError> for CloneError {
    fn from(error: CommandError) -> Self {
        Self::Failed(error.to_string())
    }
}

impl CloneSender {
    /// Does all of it; `recorder` makes the log's writing end for the point it is given.
    pub fn run(self, recorder: impl FnOnce(ft::ExecutionPoint) -> Recorder) {
        match self.clone_guest(recorder) {
            Ok(()) | Err(CloneError::Cancelled) => {}
            Err(CloneError::Failed(reason)) => {
                let _ = self.step(CloneStep::Failed(reason));
            }
        }
    }

    /// Tells that it cannot even begin.
    pub fn fail(self, reason: String) {
        let _ = self.step(CloneStep::Failed(reason));
    }

    fn clone_guest(
        &self,
        recorder: impl FnOnce(ft::ExecutionPoint) -> Recorder,
    ) -> Result<(), CloneError> {
        for chunk in encode(&*self.payload).chunks(RUN_PAGES * PAGE_BYTES) {
            self.message(Message::Payload { bytes: chunk.to_vec() })?;
        }
        // What was dirty up to here went into an earlier copy or into none: the first round takes all there
        // is, looked at only after the dirty set was emptied, so that nothing falls between the two.
        self.progress.rounds.fetch_add(1, Ordering::Relaxed);
        run_loop::ask(&self.inbox, Command::TakeDirtyPages)?;
        self.pages(&self.pages_in_use()?, |message| self.message(message))?;
        for _ in 1..MAX_ROUNDS {
            self.progress.rounds.fetch_add(1, Ordering::Relaxed);
            let pages = run_loop::ask(&self.inbox, Command::TakeDirtyPages)?;
            let few = pages.len() <= FEW_PAGES;
            self.pages(&pages, |message| self.message(message))?;
            if few {
                break;
            }
        }
        if self.cancelled.load(Ordering::Acquire) {
            return Err(CloneError::Cancelled);
        }
        self.last_round(recorder)
    }

    /// The guest stands still from the first line to `Record`, or to `Thaw` if something fails.
    fn last_round(
        &self,
        recorder: impl FnOnce(ft::ExecutionPoint) -> Recorder,
    ) -> Result<(), CloneError> {
        let stopped = Instant::now();
        let frozen: Frozen = run_loop::ask(&self.inbox, Command::Freeze)?;
        let mut rest = Vec::new();
        let copied = self.pages(&frozen.pages, |message| {
            rest.push(message);
            Ok(())
        });
        if let Err(error) = copied {
            self.inbox.send(run_loop::Message::Command(Command::Thaw));
            return Err(error);
        }
        let state = encode(&CloneState { guest: frozen.state, paused: frozen.paused });
        let recorder = Box::new(recorder(frozen.point));
        self.inbox.send(run_loop::Message::Command(Command::Record(recorder)));
        let pause_us = u64::try_from(stopped.elapsed().as_micros()).unwrap_or(u64::MAX);
        self.progress.pause_us.store(pause_us, Ordering::Relaxed);
        for message in rest {
            self.message(message)?;
        }
        self.message(Message::State { point: frozen.point, bytes: state })?;
        self.step(CloneStep::Sent)
    }

    /// Pages that hold anything but zeros, which is what a new backup's memory holds.
    fn pages_in_use(&self) -> Result<Vec<u64>, CloneError> {
        let mut page = [0; PAGE_BYTES];
        let mut in_use = Vec::new();
        for region in self.memory.iter() {
            let first = region.start_addr().raw_value() / PAGE_BYTES as u64;
            for number in first..first + region.len() / PAGE_BYTES as u64 {
                if self.cancelled.load(Ordering::Relaxed) {
                    return Err(CloneError::Cancelled);
                }
                self.read(number, &mut page)?;
                if page != [0; PAGE_BYTES] {
                    in_use.push(number);
                }
            }
        }
        Ok(in_use)
    }

    /// Reads memory from the start of page `number` on.
    fn read(&self, number: u64, bytes: &mut [u8]) -> Result<(), CloneError> {
        let address = GuestAddress(number * PAGE_BYTES as u64);
        self.memory
            .read_slice(bytes, address)
            .map_err(|error| CloneError::Failed(format!("cannot read guest memory: {error}")))
    }

    /// Reads `pages` (ascending) in runs and passes each on.
    fn pages(
        &self,
        pages: &[u64],
        mut pass: impl FnMut(Message) -> Result<(), CloneError>,
    ) -> Result<(), CloneError> {
        for run in pages.chunk_by(|a, b| a + 1 == *b).flat_map(|run| run.chunks(RUN_PAGES)) {
            let mut bytes = vec![0; run.len() * PAGE_BYTES];
            self.read(run[0], &mut bytes)?;
            self.progress.sent_bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
            let zero = bytes.iter().all(|&byte| byte == 0);
            pass(if zero {
                Message::ZeroPages { first: run[0], count: run.len() as u64 }
            } else {
                Message::Pages { first: run[0], bytes }
            })?;
        }
        Ok(())
    }

    fn message(&self, message: Message) -> Result<(), CloneError> {
        self.step(CloneStep::Message(message))
    }

    fn step(&self, step: CloneStep) -> Result<(), CloneError> {
        self.steps.send(step).map_err(|_| CloneError::Cancelled)?;
        let _ = self.waker.write(1);
        Ok(())
    }
}
