//! What executes guest code: the traits [`Hypervisor`], [`Vm`] and [`Vcpu`], and their backends.
//!
//! Two backends stand behind the traits. [`soft`] interprets x86-64 and stops exactly at an
//! instruction count, which is what deterministic replay needs; [`kvm`] runs the guest on the host
//! processor. Nothing above this crate may care which one it got, beyond asking
//! [`Hypervisor::counts_exactly`].
//!
//! The interrupt controllers (LAPIC, IOAPIC) and the timers in them belong to the backend. All other
//! devices are reached through [`Bus`], synchronously, on the thread that called [`Vcpu::run`].

pub mod bus;
pub mod choose;
pub mod clock;
pub mod error;
pub mod kvm;
pub mod memory;
pub mod soft;
pub mod state;

pub use bus::{AccessContext, Bus, InterruptSink, Msi};
pub use choose::{Choice, choose};
pub use clock::Anchor;
pub use error::Error;
pub use memory::GuestMemory;
pub use state::VcpuState;

use std::sync::Arc;

/// A way to execute guests: what `--hypervisor` chooses.
pub trait Hypervisor: Send + Sync {
    /// The name users know it by: `soft` or `kvm`.
    fn name(&self) -> &'static str;

    /// Whether [`Vcpu::run`] can stop exactly at an instruction count. Without that a VM cannot be
    /// recorded or replayed.
    fn counts_exactly(&self) -> bool;

    /// Makes an empty VM on `memory`.
    fn create_vm(&self, memory: GuestMemory) -> Result<Box<dyn Vm>, Error>;
}

/// One virtual machine: its memory and what its vCPUs share.
pub trait Vm: Send {
    /// The guest-physical memory.
    fn memory(&self) -> &GuestMemory;

    /// Makes the vCPU `id` (0-based; also its APIC id).
    fn create_vcpu(&mut self, id: u8) -> Result<Box<dyn Vcpu>, Error>;

    /// Appends to `pages` the page frame numbers (guest-physical address / 4096) written since the
    /// last call, by guest or device, ascending and without repeats, and starts a new round. The
    /// first call returns every page ever written. Must be called while no vCPU runs.
    fn take_dirty_pages(&mut self, pages: &mut Vec<u64>) -> Result<(), Error>;
}

/// One virtual processor with its LAPIC (and, on `soft`, the VM's IOAPIC).
pub trait Vcpu: Send {
    /// Executes guest instructions until [`Vcpu::retired`] equals `until` (`None`: without limit) or
    /// something else named by [`Exit`] happens. Device accesses call `bus` on this thread.
    ///
    /// On a backend that does not count exactly, `until` must be `None`.
    fn run(&mut self, until: Option<u64>, bus: &mut dyn Bus) -> Result<Exit, Error>;

    /// Guest instructions retired since the VM was created (a REP iteration counts one).
    fn retired(&self) -> u64;

    /// Makes `run` return [`Exit::Kicked`] soon, or at once when it is next called.
    fn kicker(&self) -> Arc<dyn Kick>;

    /// The way devices raise interrupts while this vCPU is not inside `run`. Inside, the same sink
    /// comes with [`AccessContext`].
    fn interrupts(&mut self) -> &mut dyn InterruptSink;

    /// Sets how guest time is computed from now on. See [`Anchor`]. The anchor's point must be
    /// `retired()`. Only on backends that count exactly.
    fn set_anchor(&mut self, anchor: Anchor);

    /// The anchor in force.
    fn anchor(&self) -> Anchor;

    /// The guest's time stamp counter now, in ticks of [`clock::TSC_HZ`].
    fn tsc(&self) -> u64;

    /// The TSC value at which the LAPIC timer fires next, if it is armed. A halted vCPU needs no
    /// host CPU until then.
    fn next_timer_tsc(&self) -> Option<u64>;

    /// Becomes a processor fresh from reset, except that it stands in 64-bit mode at `entry`. Interrupt
    /// controllers are reset too; [`Vcpu::retired`] and the anchor go on.
    fn reset(&mut self, entry: &LongModeEntry) -> Result<(), Error>;

    /// Everything the guest can observe of this processor and its interrupt controllers. Also drops
    /// cached translations, so that this vCPU and one restored from the state behave alike
    /// (translations are not part of the state, and a stale one is observable).
    fn save(&mut self) -> Result<VcpuState, Error>;

    /// Becomes the processor that `state` was saved from.
    fn restore(&mut self, state: &VcpuState) -> Result<(), Error>;
}

/// Where a processor starts: 64-bit mode with paging on, interrupts off (Linux 64-bit boot protocol).
///
/// The loader has put a GDT and page tables into guest memory; all segments are flat.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LongModeEntry {
    /// First instruction.
    pub rip: u64,
    /// Stack pointer.
    pub rsp: u64,
    /// RSI: for Linux, the address of `boot_params`.
    pub rsi: u64,
    /// Address of the top-level page table.
    pub cr3: u64,
    /// Address of the GDT.
    pub gdt_base: u64,
    /// Its limit (bytes minus one).
    pub gdt_limit: u16,
    /// Code segment selector (64-bit code, DPL 0).
    pub code_selector: u16,
    /// Data segment selector, for DS, ES, SS.
    pub data_selector: u16,
}

/// Interrupts [`Vcpu::run`] from another thread.
pub trait Kick: Send + Sync {
    /// See [`Vcpu::kicker`].
    fn kick(&self);
}

/// Why [`Vcpu::run`] returned. The vCPU is always between two instructions then.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// `retired()` equals `until`.
    Until,
    /// [`Kick::kick`] was called.
    Kicked,
    /// The guest executed HLT and no interrupt is deliverable. `run` may be called again at any time; it
    /// returns `Halted` again, without executing anything, until an interrupt arrives.
    Halted,
    /// A device set [`AccessContext::stop`]; the instruction that reached it has retired.
    Stopped,
    /// A triple fault: the machine resets.
    Shutdown,
}
