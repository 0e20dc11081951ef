//! A software x86-64 processor that counts instructions exactly.
//!
//! What must hold: everything the guest can observe is a function of its memory, its devices' answers and
//! the events applied at instruction counts. Nothing here reads a host clock, host randomness or the
//! host's CPUID, and what is cached (blocks, translations) is either invisible to the guest or itself
//! such a function.
//!
//! The parts: [`cpu`] is the state, [`op`] a decoded instruction, [`decode`] makes blocks of them, [`block`] keeps these,
//! [`run`] executes them; [`access`], [`tlb`] and [`paging`] reach memory; [`ops`] says what each
//! instruction does.

mod access;
mod block;
mod cpu;
mod cpuid;
mod decode;
mod descriptor;
mod exception;
mod flags;
mod fpu;
mod irqchip;
mod msr;
mod op;
mod ops;
mod paging;
mod ram;
mod run;
mod state;
mod tlb;
mod x87;

pub use state::SoftState;

use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use self::cpu::{BusPointer, Cpu};
use self::ram::Ram;
use self::run::Core;
use crate::bus::{Bus, InterruptSink};
use crate::clock::Anchor;
use crate::memory::GuestMemory;
use crate::{Error, Exit, Hypervisor, Kick, LongModeEntry, Vcpu, VcpuState, Vm};

/// The software processor as a way to execute guests.
#[derive(Debug, Clone, Copy, Default)]
pub struct SoftHypervisor;

impl Hypervisor for SoftHypervisor {
    fn name(&self) -> &'static str {
        "soft"
    }

    fn counts_exactly(&self) -> bool {
        true
    }

    fn create_vm(&self, memory: GuestMemory) -> Result<Box<dyn Vm>, Error> {
        // The guest's vector instructions are executed by the host's.
        if !is_x86_feature_detected!("sse4.2") {
            return Err(Error::Unsupported {
                backend: "soft",
                what: "a host processor without SSE4.2".to_owned(),
            });
        }
        Ok(Box::new(SoftVm { memory, dirty_round: Arc::default(), has_vcpu: false }))
    }
}

/// A machine with one software processor.
struct SoftVm {
    memory: GuestMemory,
    /// Counts the calls that cleaned the dirty set: cached translations of before know pages as dirty that are not.
    dirty_round: Arc<AtomicU64>,
    has_vcpu: bool,
}

impl Vm for SoftVm {
    fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    fn create_vcpu(&mut self, id: u8) -> Result<Box<dyn Vcpu>, Error> {
        if self.has_vcpu {
            return Err(Error::Unsupported {
                backend: "soft",
                what: "more than one virtual processor; use --cpus boot=1".to_owned(),
            });
        }
        self.has_vcpu = true;
        let kicked = Arc::new(AtomicBool::new(false));
        let cpu = Cpu::new(id, Ram::new(self.memory.clone()));
        Ok(Box::new(SoftVcpu {
            core: Core::new(cpu, Arc::clone(&kicked)),
            kicked,
            id,
            dirty_round: Arc::clone(&self.dirty_round),
            dirty_round_seen: 0,
        }))
    }

    fn take_dirty_pages(&mut self, pages: &mut Vec<u64>) -> Result<(), Error> {
        Ram::new(self.memory.clone()).take_dirty(pages);
        self.dirty_round.fetch_add(1, Ordering::AcqRel);
        Ok(())
    }
}

/// The processor of a [`SoftVm`].
struct SoftVcpu {
    core: Core,
    kicked: Arc<AtomicBool>,
    id: u8,
    dirty_round: Arc<AtomicU64>,
    dirty_round_seen: u64,
}

/// Kicks by raising a flag that the run loop looks at after each block.
struct SoftKick(Arc<AtomicBool>);

impl Kick for SoftKick {
    fn kick(&self) {
        self.0.store(true, Ordering::Release);
    }
}

impl Vcpu for SoftVcpu {
    fn run(&mut self, until: Option<u64>, bus: &mut dyn Bus) -> Result<Exit, Error> {
        let round = self.dirty_round.load(Ordering::Acquire);
        if round != self.dirty_round_seen {
            self.dirty_round_seen = round;
            self.core.forget_dirty();
        }
        let bus: NonNull<dyn Bus + '_> = NonNull::from(bus);
        // SAFETY: only the lifetime changes. The pointer is used by `Cpu::with_bus` alone, during `execute`, and removed
        // before `bus` is usable again.
        let bus: NonNull<dyn Bus + 'static> = unsafe { std::mem::transmute(bus) };
        self.core.cpu.bus = BusPointer(Some(bus));
        let exit = self.core.execute(until.unwrap_or(u64::MAX));
        self.core.cpu.bus = BusPointer(None);
        Ok(exit)
    }

    fn retired(&self) -> u64 {
        self.core.cpu.retired
    }

    fn kicker(&self) -> Arc<dyn Kick> {
        Arc::new(SoftKick(Arc::clone(&self.kicked)))
    }

    fn interrupts(&mut self) -> &mut dyn InterruptSink {
        &mut self.core.cpu.irqchip
    }

    fn set_anchor(&mut self, anchor: Anchor) {
        debug_assert_eq!(anchor.point, self.core.cpu.retired, "an anchor starts where it is set");
        self.core.cpu.anchor = anchor;
    }

    fn anchor(&self) -> Anchor {
        self.core.cpu.anchor
    }

    fn tsc(&self) -> u64 {
        let cpu = &self.core.cpu;
        cpu.anchor.tsc_at(cpu.retired)
    }

    fn next_timer_tsc(&self) -> Option<u64> {
        self.core.cpu.irqchip.next_timer_tsc()
    }

    fn reset(&mut self, entry: &LongModeEntry) -> Result<(), Error> {
        self.core.cpu.reset(self.id, entry);
        self.core.forget_code();
        Ok(())
    }

    fn save(&mut self) -> Result<VcpuState, Error> {
        self.core.cpu.flush_tlb(false);
        Ok(VcpuState::Soft(Box::new(SoftState::of(&self.core.cpu))))
    }

    fn restore(&mut self, state: &VcpuState) -> Result<(), Error> {
        let VcpuState::Soft(state) = state else {
            return Err(Error::Restore {
                reason: "it was saved by another hypervisor; start with the one it was saved by"
                    .to_owned(),
            });
        };
        state.check().map_err(|reason| Error::Restore { reason })?;
        state.restore(&mut self.core.cpu);
        self.core.forget_code();
        Ok(())
    }
}
