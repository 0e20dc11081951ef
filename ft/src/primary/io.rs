//! What goes into a primary's state machine and what comes out.

use crate::arbiter::Claim;
use crate::message::Message;
use crate::status::Failover;
use crate::{
    Capabilities, ExecutionPoint, Generation, LogPosition, PageHashes, PairId, Terms, Unequal,
};

/// What a primary is started with.
#[derive(Clone, Debug)]
pub struct PrimaryConfig {
    /// How the pair works. Checked before: see [`crate::Timing::check`].
    pub terms: Terms,
    /// This process, as no other is named, ever: what it claims with.
    pub who: String,
    /// What the VM needs of a backup.
    pub capabilities: Capabilities,
    /// The VM's configuration, for the backup's VMM.
    pub vm_config: Vec<u8>,
}

/// What happens to a primary.
#[derive(Clone, Debug)]
pub enum Input {
    /// The peer said something.
    Message(Message),
    /// The connection is gone: refused, reset, closed, or it carried garbage.
    ConnectionLost {
        /// What was seen.
        reason: String,
    },
    /// Time has passed: at [`Primary::next_deadline`] or later.
    Tick,
    /// The whole clone, [`Message::State`] included, is on its way; the vCPU records from there at
    /// log position 0.
    CloneSent,
    /// The clone cannot be made, or the operator wants it no more.
    CloneFailed {
        /// Why.
        reason: String,
    },
    /// The vCPU has recorded this.
    Log {
        /// Where the bytes end; they start where the last ones ended.
        end: LogPosition,
        /// The point of the last record in them.
        point: ExecutionPoint,
        /// Whole records, at most [`crate::message::MAX_CHUNK_BYTES`].
        bytes: Vec<u8>,
    },
    /// The vCPU has taken a digest, which is about to be logged: remembered in case the backup's differs.
    Digested {
        /// Where.
        point: ExecutionPoint,
        /// The pages of that digest.
        pages: PageHashes,
    },
    /// The arbiter's answer to [`Action::Claim`]. One that is not awaited is ignored: it may come
    /// late, even from a claim for an earlier generation.
    ArbiterAnswered {
        /// The generation that was claimed.
        generation: Generation,
        /// Who has won; an error if the arbiter could not be reached.
        answer: Result<Claim, String>,
    },
    /// The operator wants the backup to take over.
    HandOver,
    /// The vCPU has logged [`crate::Control::HandOver`] as its last record and stands still. The
    /// bytes went in by [`Input::Log`].
    HandOverLogged {
        /// The end of the log.
        end: LogPosition,
    },
    /// After [`Action::Quiesce`]: every system call that performs an output has returned.
    Quiesced,
    /// The operator wants no more protection, or the VM is at its end.
    Disable {
        /// Why, for the backup's operator.
        reason: String,
    },
}

/// What a primary wants done, in this order.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Send this to the peer.
    Send(Message),
    /// Close the connection once everything is sent.
    HangUp,
    /// Send memory while the guest runs, then pause it, send the rest and the state, start recording,
    /// resume it with outputs going to the gate, and give [`Input::CloneSent`]. Rounds end with
    /// [`Message::RoundEnd`], which [`Action::RoundTaken`] answers; [`Message::DiskHashes`] are answered
    /// by [`Action::DiskDiffers`].
    StartClone,
    /// The backup has loaded everything up to the end of this round of the clone.
    RoundTaken {
        /// The round, or whatever the backup says it is.
        round: u64,
    },
    /// The backup has compared blocks of a mirrored disk.
    DiskDiffers {
        /// Which disk.
        disk: u32,
        /// The first of the blocks, or whatever the backup says it is.
        first: u64,
        /// A bit for each, set where it differs.
        differing: Vec<u8>,
    },
    /// The VM is protected.
    Protected,
    /// The backup has executed the log up to this position. Only given where it reads disks by itself, when outputs may wait
    /// for it.
    BackupExecuted {
        /// The position.
        position: LogPosition,
    },
    /// Release the outputs up to this position. Each must be started before
    /// [`Primary::lease_until`] as it is at that moment, else wait for the lease to be renewed.
    Release {
        /// The position acknowledged.
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
    /// The clone failed before it counted. Release all outputs, record no more, run as before.
    Abandoned {
        /// Why.
        reason: String,
    },
    /// Run on without a backup: release all outputs, record no more, and resume the vCPU if it stands
    /// still, or is about to, for a hand-over.
    GoAlone {
        /// The generation that this side now lives in.
        generation: Generation,
        /// Why and when.
        failover: Failover,
    },
    /// Stop the guest for good; drop all outputs, also those on their way to back halves.
    Halt {
        /// Why.
        reason: String,
    },
    /// Log [`crate::Control::HandOver`], stop the vCPU there and give [`Input::HandOverLogged`].
    LogHandOver,
    /// No output may start any more ([`Primary::lease_until`] says so too). Give [`Input::Quiesced`]
    /// when those under way have ended: the peer is about to be told that it need not wait for the
    /// lease, and a write still under way could land on top of its successor's.
    Quiesce,
    /// Let the vCPU rest for this fraction of time, 0 to 1.
    Throttle(f64),
    /// Stop the vCPU until [`Action::Unstall`]: the log buffers are full.
    Stall,
    /// Let the vCPU run again.
    Unstall,
    /// The peer's guest differs. [`Action::GoAlone`] follows; a fresh copy should be made.
    Diverged {
        /// Where.
        point: ExecutionPoint,
        /// In what.
        unequal: Unequal,
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
#[error("{input} is not possible while the primary is {state}")]
pub struct IllegalInput {
    /// The input.
    pub input: &'static str,
    /// The state.
    pub state: &'static str,
}
