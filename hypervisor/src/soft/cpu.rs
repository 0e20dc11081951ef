//! The processor's state, as one structure that handlers change and that a translator to host code could address by
//! offset.
//!
//! What must hold: `gpr[REG_NONE]` is zero; `flags.system`, `cpl`, control registers, EFER and CS
//! are changed only together with a call of [`Cpu::recompute_mode`], which derives what decoding and the TLBs depend on.

use std::ptr::NonNull;

use super::flags::{self, Flags};
use super::fpu::Fpu;
use super::irqchip::IrqChip;
use super::msr::Msrs;
use super::op::{REG_STEP, REG_STEP_VALUE};
use super::ram::Ram;
use super::tlb::{Context, Tlb};
use crate::LongModeEntry;
use crate::bus::{AccessContext, Bus};
use crate::clock::Anchor;

/// Indices into [`Cpu::segments`], the encoding order.
pub const ES: usize = 0;
/// Code segment.
pub const CS: usize = 1;
/// Stack segment.
pub const SS: usize = 2;
/// Data segment.
pub const DS: usize = 3;
/// FS, whose base is used in 64-bit mode.
pub const FS: usize = 4;
/// GS, whose base is used in 64-bit mode.
pub const GS: usize = 5;

/// Number of RAX in [`Cpu::gpr`].
pub const RAX: usize = 0;
/// Number of RCX.
pub const RCX: usize = 1;
/// Number of RDX.
pub const RDX: usize = 2;
/// Number of RBX.
pub const RBX: usize = 3;
/// Number of RSP.
pub const RSP: usize = 4;
/// Number of RBP.
pub const RBP: usize = 5;
/// Number of RSI.
pub const RSI: usize = 6;
/// Number of RDI.
pub const RDI: usize = 7;

/// CR0.PE.
pub const CR0_PE: u64 = 1 << 0;
/// CR0.MP.
pub const CR0_MP: u64 = 1 << 1;
/// CR0.EM.
pub const CR0_EM: u64 = 1 << 2;
/// CR0.TS.
pub const CR0_TS: u64 = 1 << 3;
/// CR0.ET.
pub const CR0_ET: u64 = 1 << 4;
/// CR0.NE.
pub const CR0_NE: u64 = 1 << 5;
/// CR0.WP.
pub const CR0_WP: u64 = 1 << 16;
/// CR0.AM.
pub const CR0_AM: u64 = 1 << 18;
/// CR0.NW.
pub const CR0_NW: u64 = 1 << 29;
/// CR0.CD.
pub const CR0_CD: u64 = 1 << 30;
/// CR0.PG.
pub const CR0_PG: u64 = 1 << 31;
/// CR4.TSD.
pub const CR4_TSD: u64 = 1 << 2;
/// CR4.DE.
pub const CR4_DE: u64 = 1 << 3;
/// CR4.PSE.
pub const CR4_PSE: u64 = 1 << 4;
/// CR4.PAE.
pub const CR4_PAE: u64 = 1 << 5;
/// CR4.MCE.
pub const CR4_MCE: u64 = 1 << 6;
/// CR4.PGE.
pub const CR4_PGE: u64 = 1 << 7;
/// CR4.PCE.
pub const CR4_PCE: u64 = 1 << 8;
/// CR4.OSFXSR.
pub const CR4_OSFXSR: u64 = 1 << 9;
/// CR4.OSXMMEXCPT.
pub const CR4_OSXMMEXCPT: u64 = 1 << 10;
/// CR4.FSGSBASE.
pub const CR4_FSGSBASE: u64 = 1 << 16;
/// CR4.SMEP.
pub const CR4_SMEP: u64 = 1 << 20;
/// CR4.SMAP.
pub const CR4_SMAP: u64 = 1 << 21;
/// EFER.SCE.
pub const EFER_SCE: u64 = 1 << 0;
/// EFER.LME.
pub const EFER_LME: u64 = 1 << 8;
/// EFER.LMA.
pub const EFER_LMA: u64 = 1 << 10;
/// EFER.NXE.
pub const EFER_NXE: u64 = 1 << 11;

/// [`Segment::attributes`]: the segment is present.
pub const SEGMENT_PRESENT: u16 = 1 << 7;
/// [`Segment::attributes`]: 64-bit code.
pub const SEGMENT_LONG: u16 = 1 << 13;
/// [`Segment::attributes`]: 32-bit default operand size.
pub const SEGMENT_BIG: u16 = 1 << 14;

/// A segment register with its hidden part.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[repr(C)]
pub struct Segment {
    /// Base address.
    pub base: u64,
    /// Limit in bytes.
    pub limit: u32,
    /// Selector.
    pub selector: u16,
    /// Bits 8 to 23 of the descriptor's second word, without the limit: type 0-3, S 4, DPL 5-6, P 7, AVL 12,
    /// L 13, D/B 14, G 15.
    pub attributes: u16,
}

/// GDTR or IDTR.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[repr(C)]
pub struct TableRegister {
    /// Base address.
    pub base: u64,
    /// Bytes minus one.
    pub limit: u16,
}

/// An instruction could not complete: [`Cpu::trap`] says why.
#[derive(Debug)]
pub struct Trap;

/// Why an instruction did not complete.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TrapKind {
    /// It raised an exception.
    Exception {
        /// Vector.
        vector: u8,
        /// Error code, for the vectors that push one.
        error_code: Option<u32>,
    },
    /// It used an address that is not canonical: #SS(0) if its memory operand is on the stack, otherwise #GP(0). The
    /// run loop knows which.
    NonCanonical,
    /// It reached a device, or a page that holds decoded code: to be executed again, as a single step, where
    /// both are allowed.
    SingleStep,
}

/// The processor.
#[repr(C)]
pub struct Cpu {
    /// RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8-R15, then [`REG_NONE`](super::op::REG_NONE),
    /// [`REG_BLOCK`](super::op::REG_BLOCK), [`REG_STEP`]; the rest is unused.
    pub gpr: [u64; 32],
    /// Instruction pointer. Exact between blocks and in handlers that end a block.
    pub rip: u64,
    /// Instructions retired; exact where `rip` is.
    pub retired: u64,
    /// `retired` never passes this inside the inner loop: REP handlers obey it too.
    pub stop_at: u64,
    /// RFLAGS.
    pub flags: Flags,
    /// The tables of the data TLBs for the current privilege. See [`Cpu::recompute_mode`].
    pub(super) data_context: Context,
    /// The table of the fetch TLB for the current privilege.
    pub(super) fetch_context: Context,
    /// Segment registers, in encoding order, and two that do not exist and have no base:
    /// [`NO_SEGMENT`](super::op::NO_SEGMENT) is one.
    pub segments: [Segment; 8],
    /// Current privilege level.
    pub cpl: u8,
    /// Devices and pages with decoded code may be accessed: the instruction runs as a single step.
    pub(super) single_step: bool,
    /// A table walk for a fetch wrote to a page with decoded code.
    pub(super) fetched_over_code: bool,
    /// Leave the inner loop after this instruction: look at interrupts and at what changed.
    pub attention: bool,
    /// No interrupt is taken before the next instruction has retired (STI, MOV SS).
    pub interrupt_shadow: bool,
    /// HLT was executed and no interrupt has arrived since.
    pub halted: bool,
    /// A triple fault happened: `run` returns `Exit::Shutdown`.
    pub shutdown: bool,
    /// A single-step trap is due before the next instruction.
    pub pending_debug: bool,
    /// A device asked to stop.
    pub(super) stop_requested: bool,
    /// Why the last handler returned `Err`.
    pub trap: TrapKind,
    /// LDTR.
    pub ldtr: Segment,
    /// Task register.
    pub tr: Segment,
    /// GDTR.
    pub gdtr: TableRegister,
    /// IDTR.
    pub idtr: TableRegister,
    /// CR0.
    pub cr0: u64,
    /// CR2.
    pub cr2: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// EFER.
    pub efer: u64,
    /// DR0 to DR7 (4 and 5 unused).
    pub dr: [u64; 8],
    /// SSE registers.
    pub xmm: [u128; 16],
    /// MXCSR.
    pub mxcsr: u32,
    /// x87 state.
    pub fpu: Fpu,
    /// Model-specific registers that have no field of their own here.
    pub msrs: Msrs,
    /// How guest time is computed.
    pub anchor: Anchor,
    /// LAPIC and IOAPIC.
    pub irqchip: IrqChip,
    /// Bits decoding depends on; part of a block's key.
    pub(super) mode: u64,
    /// Linear address of the page instructions come from; [`NO_PAGE`] after a flush.
    pub(super) fetch_page: u64,
    /// Guest-physical address of that page.
    pub(super) fetch_physical: u64,
    /// The devices, while `run` executes.
    pub(super) bus: BusPointer,
    /// Pages whose decoded code was overwritten in a single step, to be dropped (guest-physical addresses).
    pub(super) overwritten: Vec<u64>,
    /// Guest-physical memory.
    pub(super) ram: Ram,
    /// Cached translations.
    pub(super) tlb: Tlb,
}

/// No page starts here: [`Cpu::fetch_page`] when unknown.
pub(super) const NO_PAGE: u64 = 1;

/// The bus given to `run`.
#[derive(Clone, Copy, Default)]
pub(super) struct BusPointer(pub(super) Option<NonNull<dyn Bus>>);

// SAFETY: the pointer is set only while `run` executes, on the thread that called it; a processor that
// moves to another thread holds `None`.
unsafe impl Send for BusPointer {}

impl Cpu {
    /// A processor in no particular state, with empty TLBs: to be reset or restored.
    pub(super) fn new(id: u8, ram: Ram) -> Box<Cpu> {
        let mut cpu = Box::new(Cpu {
            gpr: [0; 32],
            rip: 0,
            retired: 0,
            stop_at: 0,
            flags: Flags::default(),
            data_context: Context::SUPERVISOR,
            fetch_context: Context::SUPERVISOR,
            segments: [Segment::default(); 8],
            cpl: 0,
            single_step: false,
            fetched_over_code: false,
            attention: false,
            interrupt_shadow: false,
            halted: false,
            shutdown: false,
            pending_debug: false,
            stop_requested: false,
            trap: TrapKind::SingleStep,
            ldtr: Segment::default(),
            tr: Segment::default(),
            gdtr: TableRegister::default(),
            idtr: TableRegister::default(),
            cr0: 0,
            cr2: 0,
            cr3: 0,
            cr4: 0,
            efer: 0,
            dr: [0; 8],
            xmm: [0; 16],
            mxcsr: 0x1f80,
            fpu: Fpu::default(),
            msrs: Msrs::default(),
            anchor: Anchor::default(),
            irqchip: IrqChip::new(id),
            mode: 0,
            fetch_page: NO_PAGE,
            fetch_physical: 0,
            bus: BusPointer(None),
            overwritten: Vec::new(),
            ram,
            tlb: Tlb::new(),
        });
        cpu.gpr[usize::from(REG_STEP)] = REG_STEP_VALUE;
        cpu
    }

    /// Becomes a processor fresh from reset (Intel SDM vol. 3, 11.1.1), except that it stands in 64-bit mode at `entry`.
    /// `retired` and the anchor go on.
    pub(super) fn reset(&mut self, id: u8, entry: &LongModeEntry) {
        self.gpr[..16].fill(0);
        self.gpr[RSP] = entry.rsp;
        self.gpr[RSI] = entry.rsi;
        self.rip = entry.rip;
        self.flags.write(0);
        let data = Segment {
            base: 0,
            limit: u32::MAX,
            selector: entry.data_selector,
            // Data, writable, accessed; 4 KiB granularity.
            attributes: 0xc093,
        };
        self.segments[..6].fill(data);
        for unused in [FS, GS] {
            self.segments[unused] = Segment { selector: 0, ..data };
        }
        // Code, readable, accessed, 64-bit.
        self.segments[CS] = Segment { selector: entry.code_selector, attributes: 0xa09b, ..data };
        self.cpl = 0;
        self.ldtr = Segment { base: 0, limit: 0xffff, selector: 0, attributes: 0x82 };
        self.tr = Segment { base: 0, limit: 0xffff, selector: 0, attributes: 0x8b };
        self.gdtr = TableRegister { base: entry.gdt_base, limit: entry.gdt_limit };
        self.idtr = TableRegister { base: 0, limit: 0xffff };
        self.cr0 = CR0_PE | CR0_ET | CR0_NE | CR0_WP | CR0_PG;
        self.cr2 = 0;
        self.cr3 = entry.cr3;
        self.cr4 = CR4_PAE;
        self.efer = EFER_LME | EFER_LMA | EFER_NXE;
        self.dr = [0, 0, 0, 0, 0, 0, 0xffff_0ff0, 0x400];
        self.xmm = [0; 16];
        self.mxcsr = 0x1f80;
        self.fpu = Fpu::default();
        self.msrs = Msrs::default();
        self.irqchip = IrqChip::new(id);
        self.interrupt_shadow = false;
        self.halted = false;
        self.shutdown = false;
        self.pending_debug = false;
        self.stop_requested = false;
        self.recompute_mode();
        self.flush_tlb(false);
    }

    /// The time stamp counter. Exact in handlers that end a block.
    #[must_use]
    pub fn tsc(&self) -> u64 {
        self.anchor.tsc_at(self.retired).wrapping_add(self.msrs.tsc_adjust)
    }

    /// Whether the processor is in 64-bit mode (as opposed to compatibility mode).
    #[must_use]
    pub fn long_mode(&self) -> bool {
        self.mode == 0
    }

    /// Derives what depends on CR0, CR4, EFER, CS, CPL and RFLAGS.AC. To be called after any of them changed. Does
    /// not flush the TLBs: who changes CR0.PG, CR0.WP, CR4.PAE, PGE, SMEP, SMAP or EFER.NXE calls
    /// [`Cpu::flush_tlb`] as well.
    pub fn recompute_mode(&mut self) {
        let attributes = self.segments[CS].attributes;
        self.mode = if self.efer & EFER_LMA != 0 && attributes & SEGMENT_LONG != 0 {
            0
        } else if attributes & SEGMENT_BIG != 0 {
            1
        } else {
            2
        };
        let user = self.cpl == 3;
        self.data_context = if user {
            Context::USER
        } else if self.flags.system & flags::AC != 0 {
            Context::SUPERVISOR_AC
        } else {
            Context::SUPERVISOR
        };
        let fetch_context = if user { Context::USER } else { Context::SUPERVISOR };
        if fetch_context != self.fetch_context {
            self.fetch_context = fetch_context;
            self.fetch_page = NO_PAGE;
        }
    }

    /// Calls the devices. Only in handlers that end a block and in single steps; outside `run` there is no bus, and
    /// `f` is not called.
    pub(super) fn with_bus(&mut self, f: impl FnOnce(&mut dyn Bus, &mut AccessContext<'_>)) {
        let Some(mut bus) = self.bus.0 else {
            return;
        };
        let tsc = self.anchor.tsc_at(self.retired);
        let mut cx = AccessContext {
            retired: self.retired,
            tsc,
            interrupts: &mut self.irqchip,
            stop: false,
        };
        // SAFETY: `run` sets the pointer from its `&mut dyn Bus` and clears it before it returns; nothing else
        // uses that reference meanwhile, and the devices cannot reach this processor but through `cx`.
        let bus = unsafe { bus.as_mut() };
        f(bus, &mut cx);
        self.stop_requested |= cx.stop;
        self.attention = true;
    }
}
