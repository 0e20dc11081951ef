//! What goes into a backup's state machine and what comes out.

use crate::arbiter::Claim;
use crate::message::{CloneStart, Message};
use crate::status::Failover;
use crate::{Capabilities, ExecutionPoint, Generation, LogPosition, PageHashes, PairId, Unequal};

/// What a backup is started with.
#[derive(Clone, Debug)]
pub struct BackupConfig {
    /// This process, as no other is named, ever: what it claims with.
    pub who: String,
    /// What this host offers.
    pub capabilities: Capabilities,
}

/// What happens to a backup.
#[derive(Clone, Debug)]
pub enum Input {
    /// The peer said something.
    Message(Message),
    /// The connection is gone: reset, closed, or it carried garbage.
    ConnectionLost {
        /// What was seen.
        reason: String,
    },
    /// Time has passed: at [`Backup::next_deadline`] or later.
    Tick,
    /// The VM of [`Action::Prepare`] can be taken: memory is there, disks are open but not started.
    Accept,
    /// The VM of [`Action::Prepare`] cannot be taken.
    Refuse {
        /// Why.
        reason: String,
    },
    /// Memory, state and mirrored disks are loaded, the latter for good; the vCPU replays from log position 0.
    Loaded,
    /// [`Action::CompareDisk`] has been done.
    DiskCompared {
        /// Which disk.
        disk: u32,
        /// The first of the blocks.
        first: u64,
        /// A bit for each, set where it differs.
        differing: Vec<u8>,
    },
    /// The vCPU has come this far.
    Executed {
        /// The point.
        point: ExecutionPoint,
        /// The end of the last record applied: of all those handed out, once the vCPU has reached
        /// the point of the last one.
        position: LogPosition,
        /// Digests compared so far, all equal.
        digests_compared: u64,
    },
    /// The answer to [`Action::MakeStable`]: on this side's disks all is stable that the guest flushed before this position
    /// of the log, which has been executed.
    Stable {
        /// The position.
        position: LogPosition,
    },
    /// The vCPU stands where the last [`Input::Executed`] said, until a disk of this side has done what the primary's
    /// has. May be repeated, and is over with the next that goes further.
    AwaitsDisk {
        /// The disk's slot.
        device: u8,
        /// A request failed there, and is tried again.
        failed: bool,
    },
    /// What [`Action::MakeStable`] wants is under way. May be repeated, and is over with [`Input::Stable`].
    AwaitsStable {
        /// The slot of a disk that it waits for.
        device: u8,
        /// A flush failed there, and is tried again.
        failed: bool,
    },
    /// The vCPU found a digest that differs; it has stopped.
    Unequal {
        /// Where.
        point: ExecutionPoint,
        /// The first difference.
        unequal: Unequal,
        /// The pages of that digest.
        pages: PageHashes,
    },
    /// The copy cannot go on: a damaged log, a failed device, no memory.
    Failed {
        /// What happened.
        reason: String,
    },
    /// The arbiter's answer to [`Action::Claim`]. One that is not awaited is ignored: it may come
    /// late, even from a claim for an earlier generation.
    ArbiterAnswered {
        /// The generation that was claimed.
        generation: Generation,
        /// Who has won; an error if the arbiter could not be reached.
        answer: Result<Claim, String>,
    },
    /// The operator wants this side to take over.
    TakeOver,
    /// The operator wants this copy gone.
    Discard {
        /// Why, for the primary's operator.
        reason: String,
    },
}

/// What a backup wants done, in this order.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Send this to the peer.
    Send(Message),
    /// Close the connection once everything is sent.
    HangUp,
    /// Look whether this VM can be taken; give [`Input::Accept`] or [`Input::Refuse`].
    Prepare(Box<CloneStart>),
    /// Append this to what the VM boots from.
    LoadPayload {
        /// The next bytes.
        bytes: Vec<u8>,
    },
    /// Put pages into guest memory.
    LoadPages {
        /// Page number of the first.
        first: u64,
        /// Their contents, whole pages.
        bytes: Vec<u8>,
    },
    /// Make pages of guest memory zero.
    LoadZeroPages {
        /// Page number of the first.
        first: u64,
        /// How many. Not checked against the size of memory.
        count: u64,
    },
    /// Compare blocks of a mirrored disk with these hashes, and give [`Input::DiskCompared`].
    CompareDisk {
        /// Which disk. Not checked, nor what follows.
        disk: u32,
        /// The first of the blocks.
        first: u64,
        /// A hash for each.
        hashes: Vec<u8>,
    },
    /// Write to the image of a mirrored disk.
    LoadDisk {
        /// Which disk. Not checked, nor what follows.
        disk: u32,
        /// Where, in bytes.
        offset: u64,
        /// What.
        bytes: Vec<u8>,
    },
    /// Have a range of the image of a mirrored disk read as zeroes.
    ZeroDisk {
        /// Which disk. Not checked, nor what follows.
        disk: u32,
        /// Where, in bytes.
        offset: u64,
        /// How many bytes.
        len: u64,
    },
    /// Load CPU and devices, make a [`crate::Decoder`] at this point, and give [`Input::Loaded`].
    LoadState {
        /// The point.
        point: ExecutionPoint,
        /// The state.
        bytes: Vec<u8>,
    },
    /// Hand these whole records to the vCPU. They may come before [`Input::Loaded`] was given.
    Replay {
        /// Where they end.
        end: LogPosition,
        /// The records.
        bytes: Vec<u8>,
    },
    /// The VM is protected by this side from here on.
    Protected,
    /// Once the log is executed up to here: have all that the guest has flushed by then made stable on the disks that this
    /// side writes itself, and give [`Input::Stable`]. Takes the place of one that is not answered yet.
    MakeStable {
        /// The position.
        through: LogPosition,
    },
    /// Ask the arbiter, on another thread, and give [`Input::ArbiterAnswered`].
    Claim {
        /// The pair.
        pair: PairId,
        /// The generation that the claim ends.
        generation: Generation,
        /// The claimant.
        who: String,
    },
    /// Go live: every record is executed, and all is stable that the guest has flushed. Re-issue disk requests, release
    /// kept outputs, announce the MAC, anchor time, run.
    GoLive {
        /// The generation that this side now lives in.
        generation: Generation,
        /// Why and when.
        failover: Failover,
    },
    /// Stop the vCPU and throw the copy away. It must never run again.
    Discard {
        /// Why.
        reason: String,
    },
    /// For the log and the event monitor.
    Changed {
        /// The new state.
        state: &'static str,
        /// Why, if there is more to say.
        reason: Option<String>,
    },
}

/// An input that the run loop must not give in this state.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{input} is not possible while the backup is {state}")]
pub struct IllegalInput {
    /// The input.
    pub input: &'static str,
    /// The state.
    pub state: &'static str,
}
