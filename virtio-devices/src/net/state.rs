//! What is saved of a network device.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

/// A saved network front half.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetState {
    pub(super) mac: [u8; 6],
    pub(super) mtu: Option<u16>,
    /// What the driver accepted; 0 before DRIVER_OK.
    pub(super) features: u64,
    /// Frames the guest has given no buffers for yet.
    pub(super) backlog: VecDeque<Vec<u8>>,
    pub(super) counters: NetCounters,
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
