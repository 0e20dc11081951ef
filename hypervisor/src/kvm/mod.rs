//! The host processor behind the traits, through `/dev/kvm`.

use serde::{Deserialize, Serialize};

/// A processor saved through the KVM get calls.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KvmState {}
