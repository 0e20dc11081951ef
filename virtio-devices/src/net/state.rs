//! What is saved of a network device.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use super::front::{BACKLOG_BYTES_MAX, BACKLOG_MAX};
use super::offload::Offloads;

/// A saved network front half.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetState {
    pub(super) mac: [u8; 6],
    pub(super) mtu: Option<u16>,
    /// What the driver is offered, by configuration.
    pub(super) offered: Offloads,
    /// What the driver accepted; 0 before DRIVER_OK.
    pub(super) features: u64,
    /// Frames with their headers that the guest has given no buffers for yet.
    pub(super) backlog: VecDeque<Vec<u8>>,
    pub(super) counters: NetCounters,
}

impl NetState {
    pub(super) fn backlog_bytes(&self) -> usize {
        self.backlog.iter().map(Vec::len).sum()
    }

    /// Whether a frame of `bytes` may wait too.
    pub(super) fn has_room(&self, bytes: usize) -> bool {
        self.backlog.len() < BACKLOG_MAX && self.backlog_bytes() + bytes <= BACKLOG_BYTES_MAX
    }
}

/// What the device has done.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct NetCounters {
    pub rx_frames: u64,
    pub rx_bytes: u64,
    pub rx_dropped: u64,
    pub tx_frames: u64,
    pub tx_bytes: u64,
    pub tx_dropped: u64,
}
