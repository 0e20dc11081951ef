//! A software x86-64 processor that counts instructions exactly.

use serde::{Deserialize, Serialize};

/// Everything the guest can observe of the processor and its interrupt controllers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SoftState {}
