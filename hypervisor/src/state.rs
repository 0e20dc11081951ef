//! Saved processors.

use serde::{Deserialize, Serialize};

/// A saved processor with its interrupt controllers, of the backend it came from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum VcpuState {
    /// Of [`crate::soft`].
    Soft(Box<crate::soft::SoftState>),
    /// Of [`crate::kvm`].
    Kvm(Box<crate::kvm::KvmState>),
}
