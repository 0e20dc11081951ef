//! The host processor behind the traits, through `/dev/kvm`.
//!
//! KVM runs the guest at the processor's speed and cannot say how many instructions it has retired, so its
//! guests cannot be recorded or replayed. LAPIC, IOAPIC and their timers are the kernel's, and so is guest
//! time: it passes with the host's. There is no PIT; Linux takes its time from kvm-clock and the LAPIC.
//!
//! What must hold:
//! - Between two calls of [`Vcpu::run`](crate::Vcpu::run) no instruction is half done. After a port or memory
//!   access KVM finishes the instruction only when it is entered again; [`vcpu`] does that before it returns.
//!   Registers read or set in between would be of no definite point.
//! - Guest memory stays mapped as long as a descriptor of the VM is open: [`vm::Shared`] owns both.
//! - After guest memory was filled from outside, memory slots are made anew: page tables that changed
//!   behind KVM's back would else live on in its shadow copies, on hosts without nested paging.
//!
//! The parts: [`vm`] has memory and interrupt routing, [`vcpu`] runs, [`exit`] says what every exit means,
//! [`kick`] interrupts, [`state`] saves and restores, [`cpuid`] makes the processor model.

mod cpuid;
mod exit;
mod kick;
mod run_page;
mod state;
mod vcpu;
mod vm;

pub use state::KvmState;
pub use vm::KvmVm;

use kvm_ioctls::Kvm;

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

    /// As [`Hypervisor::create_vm`], for who wants what only KVM has.
    pub fn create_kvm_vm(&self, memory: GuestMemory) -> Result<KvmVm, Error> {
        KvmVm::new(&self.kvm, memory)
    }
}

impl Hypervisor for KvmHypervisor {
    fn name(&self) -> &'static str {
        "kvm"
    }

    fn counts_exactly(&self) -> bool {
        false
    }

    fn create_vm(&self, memory: GuestMemory) -> Result<Box<dyn Vm>, Error> {
        Ok(Box::new(self.create_kvm_vm(memory)?))
    }
}

/// Names the call that failed.
fn failed(call: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Error {
    move |error| Error::Kvm { call, source: error.into() }
}
