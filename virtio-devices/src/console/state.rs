//! What is saved of a console.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

/// A saved console front half.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConsoleState {
    pub(super) columns: u16,
    pub(super) rows: u16,
    /// Input the guest has given no buffer for yet.
    pub(super) backlog: VecDeque<u8>,
    pub(super) input_bytes: u64,
    pub(super) output_bytes: u64,
    /// Input lost because the backlog was full.
    pub(super) dropped_bytes: u64,
}
