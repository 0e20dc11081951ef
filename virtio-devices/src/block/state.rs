//! What is saved of a block device.

use serde::{Deserialize, Serialize};

use super::overlap::Footprint;
use crate::effect::{BlockOp, BlockRequest};
use crate::queue::Buffer;

/// A saved block front half.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockState {
    pub(super) sectors: u64,
    pub(super) read_only: bool,
    pub(super) serial: Vec<u8>,
    /// What the driver accepted; 0 before DRIVER_OK.
    pub(super) features: u64,
    pub(super) next_id: u64,
    /// Requests taken and not completed, in submission order.
    pub(super) requests: Vec<Pending>,
    pub(super) counters: BlockCounters,
}

/// A request taken from the queue.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Pending {
    pub request: BlockRequest,
    /// What it touches.
    pub footprint: Footprint,
    /// Handed out; else it waits for an earlier one that it overlaps.
    pub issued: bool,
    /// Where the answer goes. `None` after a reset: nobody waits for it, but the disk still works on it.
    pub reply: Option<Reply>,
}

/// Where the answer to a request goes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Reply {
    /// Chain to give back.
    pub head: u16,
    /// Address of the status byte.
    pub status: u64,
    /// Where read data goes.
    pub data: Vec<Buffer>,
}

/// What the device has done.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct BlockCounters {
    pub read_ops: u64,
    pub read_bytes: u64,
    pub write_ops: u64,
    pub write_bytes: u64,
    pub flush_ops: u64,
    pub errors: u64,
}

impl BlockCounters {
    /// Counts an operation that succeeded.
    pub fn count(&mut self, op: &BlockOp) {
        match op {
            BlockOp::Read { len, .. } => {
                self.read_ops += 1;
                self.read_bytes += u64::from(*len);
            }
            BlockOp::Write { data, .. } => {
                self.write_ops += 1;
                self.write_bytes += data.len() as u64;
            }
            BlockOp::Flush => self.flush_ops += 1,
            BlockOp::Discard { .. } | BlockOp::WriteZeroes { .. } => {}
        }
    }
}
