//! A guest: memory, processor and devices, and the few ways in which they change.
//!
//! What must hold: the state of a [`Guest`] is a function of where it started and of the calls made here
//! ([`Guest::run`], [`Guest::apply`], [`Guest::set_anchor`], [`Guest::reboot`]) with their execution
//! points. Two guests given the same calls at the same points are equal, bit for bit. Everything above
//! (solo, record, replay) relies on this and on nothing else. A guest belongs to one thread, its vCPU thread.

use std::sync::Arc;

use ft::digest::MEMORY;
use ft::{Digest, Event, ExecutionPoint, PageHasher, PageHashes};
use hypervisor::{AccessContext, Anchor, Exit, GuestMemory, Hypervisor, Vcpu, VcpuState, Vm};
use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress};

use crate::boot::{LoadError, Payload};
use crate::config::VmConfig;
use crate::machine::{HostFacts, Machine, MachineEffect, MachineError, MachineState, RestoreError};
use crate::parts;

/// Size of a guest page in bytes.
pub const PAGE_SIZE: u64 = 4096;

/// Why a guest could not be made, changed or restored.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    /// The processor failed.
    #[error("the processor failed")]
    Hypervisor(#[from] hypervisor::Error),
    /// A device failed.
    #[error("a device failed")]
    Machine(#[from] MachineError),
    /// The devices do not fit their saved state.
    #[error("the saved state does not fit this machine")]
    Restore(#[from] RestoreError),
    /// The kernel could not be loaded.
    #[error("cannot load the kernel")]
    Load(#[from] LoadError),
    /// It has nothing to boot from.
    #[error("the guest has no kernel to boot")]
    NoPayload,
    /// A page to be written or read lies outside the guest's memory.
    #[error("page {page:#x} is not in the guest's memory")]
    NoSuchPage {
        /// Guest-physical address / 4096.
        page: u64,
    },
}

/// A guest, less its memory, at one execution point.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct GuestState {
    /// Processor and interrupt controllers.
    pub vcpu: VcpuState,
    /// All other devices.
    pub machine: MachineState,
}

/// One guest. See the module's documentation.
pub struct Guest {
    vm: Box<dyn Vm>,
    vcpu: Box<dyn Vcpu>,
    machine: Machine,
    payload: Option<Arc<Payload>>,
    counts_exactly: bool,
    /// Of the last digest.
    digest_pages: PageHashes,
}

impl Guest {
    /// A guest with empty memory and devices in their power-on state.
    pub fn new(
        hypervisor: &dyn Hypervisor,
        config: &VmConfig,
        memory: GuestMemory,
        host: &HostFacts,
    ) -> Result<Self, GuestError> {
        let mut machine = Machine::new(config, memory.clone(), host)?;
        let counts_exactly = hypervisor.counts_exactly();
        if !counts_exactly {
            // It has no anchors to stop at.
            machine.stop_at_once();
        }
        let mut vm = hypervisor.create_vm(memory)?;
        let vcpu = vm.create_vcpu(0)?;
        let digest_pages = PageHashes::default();
        Ok(Self { vm, vcpu, machine, payload: None, counts_exactly, digest_pages })
    }

    /// Loads the payload and points the processor at its entry.
    pub fn boot(&mut self) -> Result<(), GuestError> {
        let payload = self.payload.as_ref().ok_or(GuestError::NoPayload)?;
        let entry = self.machine.load(payload)?;
        self.vcpu.reset(&entry)?;
        Ok(())
    }

    /// Starts over from the payload, as after a reset button. Memory keeps what the kernel does not cover.
    pub fn reboot(&mut self) -> Result<(), GuestError> {
        self.machine.reset();
        self.boot()
    }

    /// Executes up to the execution point `until`, or without limit. See [`Vcpu::run`].
    pub fn run(&mut self, until: Option<ExecutionPoint>) -> Result<Exit, GuestError> {
        Ok(self.vcpu.run(until.map(|point| point.0), &mut self.machine)?)
    }

    /// Applies an input at the present point. Anchors go to [`Guest::set_anchor`].
    pub fn apply(&mut self, event: &Event) -> Result<(), GuestError> {
        let mut cx = AccessContext {
            retired: self.vcpu.retired(),
            tsc: self.vcpu.tsc(),
            interrupts: self.vcpu.interrupts(),
            stop: false,
        };
        Ok(self.machine.apply(event, &mut cx)?)
    }

    /// Draws a new line for guest time.
    pub fn set_anchor(&mut self, anchor: Anchor) {
        self.vcpu.set_anchor(anchor);
    }

    /// What the devices handed out since the last call, in order.
    pub fn effects(&mut self) -> &mut Vec<MachineEffect> {
        self.machine.effects()
    }

    /// The present execution point.
    #[must_use]
    pub fn point(&self) -> ExecutionPoint {
        ExecutionPoint(self.vcpu.retired())
    }

    /// Guest time in nanoseconds since power-on.
    #[must_use]
    pub fn tsc(&self) -> u64 {
        self.vcpu.tsc()
    }

    /// When the processor's timer fires next, in guest time.
    #[must_use]
    pub fn next_timer_tsc(&self) -> Option<u64> {
        self.vcpu.next_timer_tsc()
    }

    /// Whether this guest can be recorded and replayed.
    #[must_use]
    pub fn counts_exactly(&self) -> bool {
        self.counts_exactly
    }

    /// The way to interrupt [`Guest::run`] from another thread.
    #[must_use]
    pub fn kicker(&self) -> Arc<dyn hypervisor::Kick> {
        self.vcpu.kicker()
    }

    /// The guest's memory.
    #[must_use]
    pub fn memory(&self) -> &GuestMemory {
        self.vm.memory()
    }

    /// Sets what it boots from. A backup learns that after it was made.
    pub fn set_payload(&mut self, payload: Arc<Payload>) {
        self.payload = Some(payload);
    }

    /// The devices, to be looked at.
    #[must_use]
    pub fn machine(&self) -> &Machine {
        &self.machine
    }

    /// Pages written since the last call, ascending, and starts a new round. See [`Vm::take_dirty_pages`].
    pub fn take_dirty_pages(&mut self) -> Result<Vec<u64>, GuestError> {
        let mut pages = Vec::new();
        self.vm.take_dirty_pages(&mut pages)?;
        Ok(pages)
    }

    /// Saves all but memory.
    pub fn save(&mut self) -> Result<GuestState, GuestError> {
        Ok(GuestState { vcpu: self.vcpu.save()?, machine: self.machine.save() })
    }

    /// Becomes the guest that `state` was saved from; memory must have been filled already.
    pub fn restore(&mut self, state: &GuestState) -> Result<(), GuestError> {
        self.machine.restore(&state.machine)?;
        self.vcpu.restore(&state.vcpu)?;
        Ok(())
    }

    /// Hashes processor, devices and the pages written since the last digest. Both sides of a pair must
    /// call it at the same points, for it starts a new round of dirty pages and drops the processor's
    /// cached translations.
    pub fn digest(&mut self) -> Result<Digest, GuestError> {
        let mut digest = Digest::default();
        for (name, bytes) in parts::of_processor(&self.vcpu.save()?) {
            digest.add(name, &bytes);
        }
        for (name, bytes) in self.machine.components() {
            digest.add(name, &bytes);
        }
        let mut hasher = PageHasher::new();
        let mut buffer = [0; PAGE_SIZE as usize];
        for page in self.take_dirty_pages()? {
            self.read_page(page, &mut buffer)?;
            hasher.add(page, &buffer);
        }
        digest.add_hash(MEMORY, hasher.finish());
        self.digest_pages = hasher.into_list();
        Ok(digest)
    }

    /// The pages of the last digest, to find the one that differs. Can be had once.
    pub fn take_digest_pages(&mut self) -> PageHashes {
        std::mem::take(&mut self.digest_pages)
    }

    /// Copies one page out of memory.
    pub fn read_page(
        &self,
        page: u64,
        buffer: &mut [u8; PAGE_SIZE as usize],
    ) -> Result<(), GuestError> {
        self.memory()
            .read_slice(buffer, GuestAddress(page * PAGE_SIZE))
            .map_err(|_| GuestError::NoSuchPage { page })
    }
}

/// The one encoding of saved state: digests compare it, clones and snapshots carry it.
pub fn encode<T: Serialize>(state: &T) -> Vec<u8> {
    postcard::to_stdvec(state).expect("state structs hold nothing that postcard cannot encode")
}
