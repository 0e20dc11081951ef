//! The x87 state.

use serde::{Deserialize, Serialize};

/// The x87 registers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[repr(C)]
pub struct Fpu {}
