//! The host processor behind the traits, through `/dev/kvm`.

use kvm_ioctls::Kvm;
use serde::{Deserialize, Serialize};

use crate::memory::GuestMemory;
use crate::{Error, Hypervisor, Vm};

/// KVM as a way to execute guests.
#[derive(Debug)]
pub struct KvmHypervisor {
    kvm: Kvm,
}

impl KvmHypervisor {
    /// Opens `/dev/kvm`.
    pub fn open() -> Result<Self, Error> {
        let kvm = Kvm::new().map_err(|error| Error::OpenKvm { source: error.into() })?;
        Ok(Self { kvm })
    }
}

impl Hypervisor for KvmHypervisor {
    fn name(&self) -> &'static str {
        "kvm"
    }

    fn counts_exactly(&self) -> bool {
        false
    }

    fn create_vm(&self, _memory: GuestMemory) -> Result<Box<dyn Vm>, Error> {
        let what = format!("KVM API version {}", self.kvm.get_api_version());
        Err(Error::Unsupported { backend: "kvm", what })
    }
}

/// A processor saved through the KVM get calls.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KvmState {}
