//! What passes between the halves of a device: [`Effect`]s outwards, [`DeviceEvent`]s inwards.
//!
//! Both own their data. An effect carries everything the back half needs; an event carries everything
//! the front half needs, so that a log of events replays a device without the world.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::net::Offloads;

/// Bytes in a sector, the unit of all block addresses (virtio 1.2, 5.2).
pub const SECTOR_SIZE: u64 = 512;

/// Something a front half wants done. The caller routes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// Deliver a message-signalled interrupt.
    Interrupt {
        /// Message address.
        address: u64,
        /// Message data.
        data: u32,
    },
    /// A disk request; answered by [`DeviceEvent::BlockCompletion`] with the same id.
    Block(BlockRequest),
    /// Frames to send: all the guest had queued at one notify. Each is a virtio_net_hdr of
    /// [`crate::net::HEADER_SIZE`] bytes, checked, with an Ethernet frame behind it.
    Frames(Vec<Vec<u8>>),
    /// From now on the guest's network driver takes frames with these things left undone. No answer.
    Offloads(Offloads),
    /// Bytes the guest wrote to its console.
    ConsoleOutput(Vec<u8>),
    /// The guest wants random bytes; answered by [`DeviceEvent::Entropy`], in the order asked.
    EntropyWanted {
        /// How many bytes at most; at least 1.
        len: u32,
    },
}

/// Effects in the order they came about.
pub type Effects = Vec<Effect>;

/// Something that happened in the world, for a front half.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DeviceEvent {
    /// A disk request is done.
    BlockCompletion(BlockCompletion),
    /// Frames arrived, each a virtio_net_hdr with an Ethernet frame behind it.
    Frames(Vec<Vec<u8>>),
    /// Bytes for the guest's console.
    ConsoleInput(Vec<u8>),
    /// Random bytes for the oldest unanswered [`Effect::EntropyWanted`].
    Entropy(Vec<u8>),
}

impl DeviceEvent {
    /// What to call this kind of event in a message.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::BlockCompletion(_) => "disk completion",
            Self::Frames(_) => "network frames",
            Self::ConsoleInput(_) => "console input",
            Self::Entropy(_) => "entropy",
        }
    }
}

/// A request to a disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockRequest {
    /// Counts up per device from 0, over resets too: never used twice in a machine's life.
    pub id: u64,
    /// What to do.
    pub op: BlockOp,
}

/// What a disk request asks for. Ranges lie within the disk and are not empty.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum BlockOp {
    /// Read `len` bytes, a multiple of [`SECTOR_SIZE`].
    Read {
        /// First sector.
        sector: u64,
        /// Bytes.
        len: u32,
    },
    /// Write `data`, whose length is a multiple of [`SECTOR_SIZE`].
    Write {
        /// First sector.
        sector: u64,
        /// What to write; shared with the front half, which keeps it until the completion.
        data: Arc<[u8]>,
    },
    /// Make completed writes durable.
    Flush,
    /// The sectors' content is no longer needed.
    Discard {
        /// First sector.
        sector: u64,
        /// Number of sectors.
        sectors: u64,
    },
    /// The sectors must read as zeroes.
    WriteZeroes {
        /// First sector.
        sector: u64,
        /// Number of sectors.
        sectors: u64,
        /// Whether the space may be given back.
        unmap: bool,
    },
}

/// Outcome of a disk request, as the guest sees it (virtio 1.2, 5.2.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[repr(u8)]
pub enum BlockStatus {
    /// VIRTIO_BLK_S_OK.
    Ok = 0,
    /// VIRTIO_BLK_S_IOERR.
    IoError = 1,
    /// VIRTIO_BLK_S_UNSUPP.
    Unsupported = 2,
}

impl BlockStatus {
    /// The status byte of virtio.
    #[must_use]
    pub fn byte(self) -> u8 {
        self as u8
    }

    /// The status a byte stands for; anything unknown is an I/O error.
    #[must_use]
    pub fn from_byte(byte: u8) -> Self {
        match byte {
            0 => Self::Ok,
            2 => Self::Unsupported,
            _ => Self::IoError,
        }
    }
}

/// The answer to a [`BlockRequest`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockCompletion {
    /// The request's id.
    pub id: u64,
    /// How it went.
    pub status: BlockStatus,
    /// What was read; empty for everything but a successful read.
    pub data: Vec<u8>,
}
