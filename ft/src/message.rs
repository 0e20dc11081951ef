//! The messages between primary and backup, and their frames.
//!
//! A frame is its length (four bytes, little endian) and a postcard-encoded [`Message`]. The life of a
//! connection:
//!
//! ```text
//! primary                                        backup
//!    | Hello ------------------------------------> |
//!    | <------------------------------------ Hello |
//!    | CloneStart {terms, config} ---------------> |  opens disks, makes memory
//!    | <--------------------- Accepted or Refused  |
//!    | Payload ... -------------------------------> |
//!    | DiskHashes ... (guest runs) --------------> |  mirrored disks only
//!    | <------------------------------ DiskDiffers |  one for each
//!    | DiskData, DiskZeroes ... -----------------> |  what differed
//!    | Pages, ZeroPages ... (guest runs) --------> |
//!    | RoundEnd ---------------------------------> |
//!    | <-------------------------------- RoundTaken |  and so on, in rounds
//!    | Pages, DiskData, State (guest paused) ----> |  log position 0
//!    | Log ... (guest runs, outputs held) -------> |
//!    | <------------------------------------ Ready |  starts to replay
//!    | Armed ------------------------------------> |  from here on a claim decides
//!    | <------------------------------- Protecting |
//!    | Log -------------------------------------> |
//!    | <------------------------------------- Ack  |  received, not executed
//!    | <--------------------------------- Executed |
//!    | Heartbeat <--------------------> Heartbeat  |  both ways, all the time
//! ```
//!
//! and it ends with `HandOver` (answered by `Live`), `Disable` (answered by `Discarded`), `TakenOver`
//! (answered by `Yielded`), or by being lost.

use serde::{Deserialize, Serialize};

use crate::codec::Append;
use crate::{
    Capabilities, ExecutionPoint, Generation, LogPosition, PageHashes, Terms, Unequal, bytes,
};

/// The longest frame, without its length. Log chunks and page runs are cut to fit.
pub const MAX_FRAME_BYTES: usize = 16 << 20;

/// The longest frame that a peer may send before it has said a valid [`Message::Hello`].
pub const MAX_GREETING_BYTES: usize = 64 << 10;

/// The largest piece of log or memory that fits a frame with its header.
pub const MAX_CHUNK_BYTES: usize = MAX_FRAME_BYTES - 64;

/// Bytes of a page in [`Message::Pages`].
pub const PAGE_BYTES: usize = 4096;

/// Bytes of a block in [`Message::DiskHashes`].
pub const DISK_BLOCK_BYTES: usize = 64 << 10;

/// Bytes of a hash in [`Message::DiskHashes`].
pub const DISK_HASH_BYTES: usize = 32;

/// Most blocks in one [`Message::DiskHashes`].
pub const MAX_DISK_HASHES: usize = 64;

/// Most bytes in one [`Message::DiskData`] or [`Message::DiskZeroes`]: what a backup does at a time.
pub const MAX_DISK_PIECE_BYTES: usize = 256 << 10;

/// What one side says to the other.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Message {
    /// Both, first.
    Hello(Hello),
    /// Primary: the VM to be cloned.
    CloneStart(CloneStart),
    /// Backup: ready for pages.
    Accepted,
    /// Backup: cannot take this VM.
    Refused {
        /// Why, for the operator.
        reason: String,
    },
    /// The next piece of what the VM boots from, opaque to the protocol.
    Payload {
        /// Its bytes.
        #[serde(with = "bytes::one")]
        bytes: Vec<u8>,
    },
    /// Primary: a run of guest pages, each [`PAGE_BYTES`].
    Pages {
        /// Page number of the first (guest-physical address / [`PAGE_BYTES`]).
        first: u64,
        /// Their contents.
        #[serde(with = "bytes::one")]
        bytes: Vec<u8>,
    },
    /// Primary: a run of guest pages full of zeroes.
    ZeroPages {
        /// Page number of the first.
        first: u64,
        /// How many.
        count: u64,
    },
    /// Primary: what a run of blocks of a mirrored disk held a moment ago. Answered by
    /// [`Message::DiskDiffers`].
    DiskHashes {
        /// Which disk, in the order of the configuration.
        disk: u32,
        /// Number of the first block; all have [`DISK_BLOCK_BYTES`] but the last of the disk.
        first: u64,
        /// A hash of [`DISK_HASH_BYTES`] for each, SHA-256; at most [`MAX_DISK_HASHES`].
        #[serde(with = "bytes::one")]
        hashes: Vec<u8>,
    },
    /// Backup: which of the blocks of a [`Message::DiskHashes`] are different in its image.
    DiskDiffers {
        /// As there.
        disk: u32,
        /// As there.
        first: u64,
        /// A bit for each block, the first in bit 0 of the first byte.
        #[serde(with = "bytes::one")]
        differing: Vec<u8>,
    },
    /// Primary: what a range of a mirrored disk holds.
    DiskData {
        /// Which disk.
        disk: u32,
        /// Where, in bytes.
        offset: u64,
        /// What is there, at most [`MAX_DISK_PIECE_BYTES`].
        #[serde(with = "bytes::one")]
        bytes: Vec<u8>,
    },
    /// Primary: a range of a mirrored disk that reads as zeroes.
    DiskZeroes {
        /// Which disk.
        disk: u32,
        /// Where, in bytes.
        offset: u64,
        /// How many bytes, at most [`MAX_DISK_PIECE_BYTES`].
        len: u64,
    },
    /// Primary: all that one round of the copy has found is on its way.
    RoundEnd {
        /// Counts from one.
        round: u64,
    },
    /// Backup: everything before [`Message::RoundEnd`] is loaded. By the time that it took the primary
    /// knows how fast the way between them is, the backup's own work included.
    RoundTaken {
        /// As in [`Message::RoundEnd`].
        round: u64,
    },
    /// Primary: CPU and devices at the point where the log starts. Ends the copy.
    State {
        /// The point.
        point: ExecutionPoint,
        /// The state, in the VMM's own encoding.
        #[serde(with = "bytes::one")]
        bytes: Vec<u8>,
    },
    /// Backup: state loaded, replaying.
    Ready,
    /// Primary: from here on neither side may run alone without winning the claim.
    Armed,
    /// Backup: armed. Only now is the VM protected.
    Protecting,
    /// Primary: whole records.
    Log {
        /// Where they start.
        position: LogPosition,
        /// The records.
        #[serde(with = "bytes::one")]
        bytes: Vec<u8>,
    },
    /// Backup: every byte before this position was received.
    Ack {
        /// The position.
        received: LogPosition,
    },
    /// Backup: how far it has come.
    Executed {
        /// Point reached.
        point: ExecutionPoint,
        /// End of the last record applied.
        position: LogPosition,
        /// Digests compared so far, all equal.
        digests_compared: u64,
    },
    /// Both.
    Heartbeat {
        /// Sender's clock when sent.
        stamp_us: u64,
        /// The newest `stamp_us` received from the other side. By it the primary knows that its
        /// lease holds; an acknowledgement would not do, since it may have waited in a buffer while
        /// this host was frozen.
        echo_us: Option<u64>,
    },
    /// Backup: its guest differs; it will never go live.
    DigestUnequal {
        /// Where.
        point: ExecutionPoint,
        /// The first difference.
        unequal: Unequal,
        /// The backup's pages of that digest, if they differ: the primary has its own to compare them with.
        pages: PageHashes,
    },
    /// Primary: I have stopped for good, unless I win the claim; go live at the end of the log.
    HandOver {
        /// The end of the log.
        end: LogPosition,
    },
    /// Backup: I have won the claim and take over.
    TakenOver {
        /// The generation claimed.
        generation: Generation,
    },
    /// Primary, after [`Message::TakenOver`]: I release nothing more.
    Yielded,
    /// Backup: I have gone live.
    Live {
        /// The generation I run in.
        generation: Generation,
    },
    /// Primary: protection ends, discard your copy.
    Disable {
        /// Why.
        reason: String,
    },
    /// Backup: my copy is gone; I never go live.
    Discarded {
        /// Why.
        reason: String,
    },
}

/// The first message of each side.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// [`HELLO_MAGIC`].
    pub magic: [u8; 8],
    /// [`crate::PROTOCOL_VERSION`].
    pub version: u32,
    /// Who this is, unique per process: what it claims with.
    pub who: String,
    /// What it needs or offers.
    pub capabilities: Capabilities,
}

/// Tells a Dyad from anything else that connects.
pub const HELLO_MAGIC: [u8; 8] = *b"dyad ft\n";

impl Hello {
    /// A greeting of this version.
    pub fn new(who: impl Into<String>, capabilities: Capabilities) -> Self {
        Self { magic: HELLO_MAGIC, version: crate::PROTOCOL_VERSION, who: who.into(), capabilities }
    }
}

/// What the primary wants cloned.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CloneStart {
    /// How the pair works.
    pub terms: Terms,
    /// The VM's configuration, in the VMM's own encoding.
    #[serde(with = "bytes::one")]
    pub config: Vec<u8>,
}

impl Message {
    /// The message's name, for reports.
    pub fn name(&self) -> &'static str {
        match self {
            Message::Hello(_) => "Hello",
            Message::CloneStart(_) => "CloneStart",
            Message::Accepted => "Accepted",
            Message::Refused { .. } => "Refused",
            Message::Payload { .. } => "Payload",
            Message::Pages { .. } => "Pages",
            Message::ZeroPages { .. } => "ZeroPages",
            Message::DiskHashes { .. } => "DiskHashes",
            Message::DiskDiffers { .. } => "DiskDiffers",
            Message::DiskData { .. } => "DiskData",
            Message::DiskZeroes { .. } => "DiskZeroes",
            Message::RoundEnd { .. } => "RoundEnd",
            Message::RoundTaken { .. } => "RoundTaken",
            Message::State { .. } => "State",
            Message::Ready => "Ready",
            Message::Armed => "Armed",
            Message::Protecting => "Protecting",
            Message::Log { .. } => "Log",
            Message::Ack { .. } => "Ack",
            Message::Executed { .. } => "Executed",
            Message::Heartbeat { .. } => "Heartbeat",
            Message::DigestUnequal { .. } => "DigestUnequal",
            Message::HandOver { .. } => "HandOver",
            Message::TakenOver { .. } => "TakenOver",
            Message::Yielded => "Yielded",
            Message::Live { .. } => "Live",
            Message::Disable { .. } => "Disable",
            Message::Discarded { .. } => "Discarded",
        }
    }

    /// Appends the message's frame to `out`. On an error `out` is as before.
    pub fn append_frame(&self, out: &mut Vec<u8>) -> Result<(), MessageError> {
        let start = out.len();
        out.extend_from_slice(&[0; 4]);
        let encoded = postcard::serialize_with_flavor(self, Append(out));
        let length = out.len() - start - 4;
        if let Err(error) = encoded {
            out.truncate(start);
            return Err(MessageError::Encode(error));
        }
        if length > MAX_FRAME_BYTES {
            out.truncate(start);
            return Err(MessageError::TooLong { bytes: length, limit: MAX_FRAME_BYTES });
        }
        out[start..start + 4].copy_from_slice(&(length as u32).to_le_bytes());
        Ok(())
    }
}

/// Why a frame could not be written or read.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum MessageError {
    /// Longer than allowed.
    #[error("a frame of {bytes} bytes exceeds the limit of {limit}; is the peer a Dyad?")]
    TooLong {
        /// Its length.
        bytes: usize,
        /// The limit.
        limit: usize,
    },
    /// Not a message.
    #[error(
        "a frame holds no message that this version knows; is the peer a Dyad of the same version?"
    )]
    Decode(#[source] postcard::Error),
    /// A message, and something behind it.
    #[error("a frame holds {bytes} bytes behind its {name} message")]
    Trailing {
        /// The message's name.
        name: &'static str,
        /// How much.
        bytes: usize,
    },
    /// The serializer failed.
    #[error("a message cannot be encoded")]
    Encode(#[source] postcard::Error),
}

/// Makes messages of the bytes of a connection.
#[derive(Clone, Debug)]
pub struct FrameReader {
    buffer: Vec<u8>,
    read: usize,
    limit: usize,
}

impl Default for FrameReader {
    fn default() -> Self {
        Self::new()
    }
}

impl FrameReader {
    /// For a new connection: takes short frames only, until a valid greeting came.
    pub fn new() -> Self {
        Self { buffer: Vec::new(), read: 0, limit: MAX_GREETING_BYTES }
    }

    /// Adds bytes. Call [`FrameReader::next_message`] until it returns `None` before adding more:
    /// that bounds what is held to one frame and one piece.
    pub fn push(&mut self, bytes: &[u8]) {
        if self.read == self.buffer.len() {
            self.buffer.clear();
            self.read = 0;
        } else if self.read >= 1 << 16 {
            self.buffer.drain(..self.read);
            self.read = 0;
        }
        self.buffer.extend_from_slice(bytes);
    }

    /// Bytes held that no message was made of yet.
    pub fn pending_bytes(&self) -> usize {
        self.buffer.len() - self.read
    }

    /// The next whole message. After an error the connection is of no use.
    pub fn next_message(&mut self) -> Result<Option<Message>, MessageError> {
        let rest = &self.buffer[self.read..];
        let Some(length) = rest.first_chunk::<4>() else { return Ok(None) };
        let length = u32::from_le_bytes(*length) as usize;
        if length > self.limit {
            return Err(MessageError::TooLong { bytes: length, limit: self.limit });
        }
        let Some(body) = rest.get(4..4 + length) else { return Ok(None) };
        let (message, left) =
            postcard::take_from_bytes::<Message>(body).map_err(MessageError::Decode)?;
        if !left.is_empty() {
            return Err(MessageError::Trailing { name: message.name(), bytes: left.len() });
        }
        self.read += 4 + length;
        if matches!(&message, Message::Hello(hello) if hello.magic == HELLO_MAGIC) {
            self.limit = MAX_FRAME_BYTES;
        }
        Ok(Some(message))
    }
}
