//! Model-specific registers.

use serde::{Deserialize, Serialize};

/// Model-specific registers that have no field of their own in [`Cpu`](super::cpu::Cpu).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Msrs {
    /// IA32_TSC_ADJUST.
    pub tsc_adjust: u64,
}
