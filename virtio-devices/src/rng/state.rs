//! What is saved of an entropy device.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use crate::queue::Buffer;

/// A saved entropy front half.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RngState {
    /// Handed out and not answered, oldest first.
    pub(super) wants: VecDeque<Want>,
    pub(super) bytes: u64,
}

/// A request for random bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Want {
    pub len: u32,
    /// Where they go. `None` after a reset: the answer still comes, and is dropped.
    pub reply: Option<Reply>,
}

/// Where random bytes go.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Reply {
    pub head: u16,
    pub data: Vec<Buffer>,
}
