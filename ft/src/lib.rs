//! Fault tolerance, pure: what makes two virtual machines one.
//!
//! A protected VM runs twice. The *primary* records every input of its guest, with the execution point
//! at which it was applied, into a log; the *backup* replays the log and so computes the same states.
//! This crate holds everything of that which is not execution: log records and their bytes, the
//! messages between the two sides, the state machine of each side, the output gate, lag control, failure
//! detection, arbiters and digests.
//!
//! The state machines open no socket, start no thread and read no clock: they take messages, inputs and
//! the time, and answer with actions. What does block, asking an arbiter, is a trait ([`Arbiter`]) whose
//! answer comes back as an input; its implementations, in [`arbiter`], are all that reaches outside. So the code that runs in production also runs in a simulation, where a
//! thousand networks fail in a minute.
//!
//! The life of a log record: the vCPU thread encodes it ([`codec::Encoder`]) and hands the bytes to
//! [`Primary`], which sends them; [`Backup`] takes them, acknowledges them and hands them to the
//! replaying vCPU thread, which decodes them ([`codec::Decoder`]) and applies them. The acknowledgement
//! lets [`Primary`] say which outputs the [`OutputGate`] may release.

pub mod arbiter;
pub mod backup;
mod bytes;
pub mod codec;
pub mod detector;
pub mod digest;
pub mod event;
pub mod gate;
pub mod histogram;
pub mod ids;
pub mod kept;
pub mod lag;
pub mod message;
pub mod primary;
pub mod record;
pub mod search;
pub mod status;
pub mod terms;

pub use arbiter::{Arbiter, ArbiterUrl, BadArbiter, Claim, EtcdArbiter, FileArbiter, Unreachable};
pub use backup::{Backup, BackupConfig};
pub use codec::{CodecError, Decoder, Encoder};
pub use digest::{Component, Digest, PageHasher, PageHashes, PageNumber, Unequal};
pub use event::{Control, Event};
pub use gate::OutputGate;
pub use histogram::{Histogram, Percentiles};
pub use ids::{BadPairId, ExecutionPoint, Generation, LogPosition, OutputNumber, PairId};
pub use kept::KeptOutputs;
pub use message::{FrameReader, Message, MessageError};
pub use primary::{Primary, PrimaryConfig};
pub use record::{Entry, Record};
pub use search::Search;
pub use status::{Failover, FtStatus};
pub use terms::{BadTiming, Capabilities, DiskMode, DiskReads, PROTOCOL_VERSION, Terms, Timing};

use std::time::Duration;

/// The longest text of a peer that is repeated to an operator.
const MAX_TEXT_CHARS: usize = 400;

/// A peer's text, fit for a log line.
fn clip(text: &str) -> String {
    text.chars().take(MAX_TEXT_CHARS).map(|c| if c.is_control() { ' ' } else { c }).collect()
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
