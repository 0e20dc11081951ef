//! Exceptions and interrupts: raising them, and delivering them through the IDT in long mode (Intel SDM vol. 3,
//! chapter 6).
//!
//! A handler that cannot complete calls one of the raising functions and returns the [`Trap`]. The run loop, having
//! set `rip` to the faulting instruction, then calls [`Cpu::deliver`], which changes registers only once nothing can
//! fail any more.

use super::cpu::{CS, Cpu, RSP, SEGMENT_PRESENT, SS, Segment, Trap, TrapKind};
use super::descriptor::SELECTOR_RPL;
use super::flags;
use super::paging::is_canonical;

/// Divide error.
pub const DIVIDE_ERROR: u8 = 0;
/// Debug exception.
pub const DEBUG: u8 = 1;
/// Breakpoint (INT3).
pub const BREAKPOINT: u8 = 3;
/// Overflow (INTO).
pub const OVERFLOW: u8 = 4;
/// BOUND range exceeded.
pub const BOUND_RANGE: u8 = 5;
/// Invalid opcode.
pub const INVALID_OPCODE: u8 = 6;
/// Device (FPU) not available.
pub const DEVICE_NOT_AVAILABLE: u8 = 7;
/// Double fault.
pub const DOUBLE_FAULT: u8 = 8;
/// Invalid TSS.
pub const INVALID_TSS: u8 = 10;
/// Segment not present.
pub const SEGMENT_NOT_PRESENT: u8 = 11;
/// Stack-segment fault.
pub const STACK_FAULT: u8 = 12;
/// General protection.
pub const GENERAL_PROTECTION: u8 = 13;
/// Page fault.
pub const PAGE_FAULT: u8 = 14;
/// x87 floating-point error.
pub const X87_ERROR: u8 = 16;
/// Machine check.
pub const MACHINE_CHECK: u8 = 18;
/// SIMD floating-point error.
pub const SIMD_ERROR: u8 = 19;

/// Error code: the event was not caused by the program (EXT).
const CODE_EXTERNAL: u32 = 1;
/// Error code: the index is into the IDT.
const CODE_IDT: u32 = 2;

const GATE_INTERRUPT: u64 = 0xe;
const GATE_TRAP: u64 = 0xf;

/// Offset of RSP0 in the 64-bit TSS.
const TSS_RSP0: u64 = 4;
/// Offset of IST1 in the 64-bit TSS.
const TSS_IST1: u64 = 0x24;

/// Where an event to deliver comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// An exception of the processor.
    Exception,
    /// An interrupt controller; NMIs too.
    External,
    /// INT n, INT3, INTO: subject to the gate's privilege level.
    Software,
}

/// What is to be delivered through the IDT.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Event {
    vector: u8,
    /// For the vectors that push one.
    error_code: Option<u32>,
    source: Source,
}

impl Event {
    /// The EXT bit of error codes that faults during delivery push.
    fn external(self) -> u32 {
        if self.source == Source::Software { 0 } else { CODE_EXTERNAL }
    }
}

impl Cpu {
    /// Raises an exception.
    #[cold]
    pub fn raise(&mut self, vector: u8, error_code: Option<u32>) -> Trap {
        self.trap = TrapKind::Exception { vector, error_code };
        Trap
    }

    /// Raises #UD.
    #[cold]
    pub fn ud(&mut self) -> Trap {
        self.raise(INVALID_OPCODE, None)
    }

    /// Raises #GP.
    #[cold]
    pub fn gp(&mut self, error_code: u32) -> Trap {
        self.raise(GENERAL_PROTECTION, Some(error_code))
    }

    /// Raises #SS.
    #[cold]
    pub fn ss(&mut self, error_code: u32) -> Trap {
        self.raise(STACK_FAULT, Some(error_code))
    }

    /// Raises #NP.
    #[cold]
    pub fn np(&mut self, error_code: u32) -> Trap {
        self.raise(SEGMENT_NOT_PRESENT, Some(error_code))
    }

    /// Raises #TS.
    #[cold]
    pub fn ts(&mut self, error_code: u32) -> Trap {
        self.raise(INVALID_TSS, Some(error_code))
    }

    /// Raises #NM.
    #[cold]
    pub fn nm(&mut self) -> Trap {
        self.raise(DEVICE_NOT_AVAILABLE, None)
    }

    /// Raises #MF.
    #[cold]
    pub fn mf(&mut self) -> Trap {
        self.raise(X87_ERROR, None)
    }

    /// Raises #XM.
    #[cold]
    pub fn xm(&mut self) -> Trap {
        self.raise(SIMD_ERROR, None)
    }

    /// Raises #DE.
    #[cold]
    pub fn de(&mut self) -> Trap {
        self.raise(DIVIDE_ERROR, None)
    }

    /// Takes the interrupt that is due before the next instruction, if there is one: its vector, to be given to
    /// [`Cpu::deliver`]. Ends HLT.
    pub fn poll_interrupt(&mut self) -> Option<u8> {
        if self.interrupt_shadow {
            return None;
        }
        let vector = self.irqchip.acknowledge(self.interrupts_enabled())?;
        self.halted = false;
        Some(vector)
    }

    /// RFLAGS.IF.
    #[must_use]
    pub fn interrupts_enabled(&self) -> bool {
        self.flags.system & flags::IF != 0
    }

    /// Delivers an exception or interrupt between two instructions, with `rip` where the handler shall return to. A
    /// fault on the way is delivered instead, or becomes a double fault (SDM vol. 3, table 6-5); a third one sets
    /// `shutdown`.
    pub fn deliver(&mut self, vector: u8, error_code: Option<u32>, source: Source) {
        self.interrupt_shadow = false;
        self.halted = false;
        // The frame may go to a page that holds decoded code, or to a device.
        let single_step = std::mem::replace(&mut self.single_step, true);
        if !self.deliver_or_escalate(Event { vector, error_code, source }) {
            self.shutdown = true;
            self.attention = true;
        }
        self.single_step = single_step;
    }

    /// Delivers `event` or what it turns into; false if that is a triple fault.
    fn deliver_or_escalate(&mut self, event: Event) -> bool {
        let mut current = event;
        // This ends: delivery raises nothing benign, and each round goes from benign to contributory to page fault to
        // double fault without ever going back.
        loop {
            if self.deliver_once(current).is_ok() {
                return true;
            }
            let (vector, error_code) = match self.trap {
                TrapKind::Exception { vector, error_code } => (vector, error_code),
                TrapKind::NonCanonical => (STACK_FAULT, Some(current.external())),
                TrapKind::SingleStep => return false,
            };
            current = match (Class::of(current), Class::of_vector(vector)) {
                (Class::DoubleFault, _) => return false,
                (Class::Contributory, Class::Contributory)
                | (Class::PageFault, Class::Contributory | Class::PageFault) => {
                    Event { vector: DOUBLE_FAULT, error_code: Some(0), source: Source::Exception }
                }
                _ => Event { vector, error_code, source: Source::Exception },
            };
        }
    }

    /// INT n, INT3 or INTO, with `rip` behind the instruction: an attempt to enter the handler, whose failure is a
    /// fault of the instruction.
    pub(super) fn software_interrupt(&mut self, vector: u8) -> Result<(), Trap> {
        self.deliver_once(Event { vector, error_code: None, source: Source::Software })
    }

    /// INT1, with `rip` behind the instruction: like INT3, but the gate's privilege level does not count.
    pub(super) fn privileged_software_interrupt(&mut self, vector: u8) -> Result<(), Trap> {
        self.deliver_once(Event { vector, error_code: None, source: Source::Exception })
    }

    /// One attempt at delivery: on failure no register has changed.
    fn deliver_once(&mut self, event: Event) -> Result<(), Trap> {
        let external = event.external();
        let gate = self.load_gate(event)?;
        let (code, cpl) = self.load_gate_code(&gate, external)?;

        let stack = self.delivery_stack(&gate, cpl, external)?;
        let new_ss = if cpl == self.cpl {
            self.segments[SS]
        } else {
            // A null selector with the new privilege level (SDM vol. 3, 6.14.2).
            Segment { selector: u16::from(cpl), ..Segment::default() }
        };
        let old_flags = self.flags.read();
        let frame = [
            u64::from(self.segments[SS].selector),
            self.gpr[RSP],
            saved_flags(old_flags, event),
            u64::from(self.segments[CS].selector),
            self.rip,
        ];
        let mut rsp = stack & !0xf;
        for value in frame.into_iter().chain(event.error_code.map(u64::from)) {
            rsp = rsp.wrapping_sub(8);
            if !is_canonical(rsp) {
                return Err(self.ss(external));
            }
            self.store_system::<u64>(rsp, value)?;
        }

        let mut cleared = flags::TF | flags::NT | flags::RF | flags::VM;
        if gate.kind == GATE_INTERRUPT {
            cleared |= flags::IF;
        }
        self.flags.system &= !cleared;
        self.segments[SS] = new_ss;
        self.segments[CS] = code;
        self.cpl = cpl;
        self.gpr[RSP] = rsp;
        self.rip = gate.offset;
        self.recompute_mode();
        Ok(())
    }

    fn load_gate(&mut self, event: Event) -> Result<Gate, Trap> {
        let code = u32::from(event.vector) << 3 | CODE_IDT | event.external();
        let offset = u64::from(event.vector) * 16;
        if offset + 15 > u64::from(self.idtr.limit) {
            return Err(self.gp(code));
        }
        let address = self.idtr.base.wrapping_add(offset);
        let low = self.load_system::<u64>(address)?;
        let high = self.load_system::<u64>(address.wrapping_add(8))?;
        let gate = Gate {
            offset: low & 0xffff | (low >> 32) & 0xffff_0000 | high << 32,
            selector: (low >> 16) as u16,
            stack: (low >> 32 & 7) as u8,
            kind: low >> 40 & 0x1f,
        };
        if !matches!(gate.kind, GATE_INTERRUPT | GATE_TRAP) {
            return Err(self.gp(code));
        }
        let privilege = (low >> 45 & 3) as u8;
        if event.source == Source::Software && privilege < self.cpl {
            return Err(self.gp(code));
        }
        if low & 1 << 47 == 0 {
            return Err(self.np(code));
        }
        Ok(gate)
    }

    /// The code segment a gate leads to, and the privilege level there.
    fn load_gate_code(&mut self, gate: &Gate, external: u32) -> Result<(Segment, u8), Trap> {
        if gate.selector & !SELECTOR_RPL == 0 {
            return Err(self.gp(external));
        }
        let code = u32::from(gate.selector & !SELECTOR_RPL) | external;
        let descriptor = match self.find_descriptor(gate.selector)? {
            Some(descriptor) if descriptor.is_code() && descriptor.dpl() <= self.cpl => descriptor,
            _ => return Err(self.gp(code)),
        };
        if !descriptor.is_present() {
            return Err(self.np(code));
        }
        if !descriptor.is_long_code() {
            return Err(self.gp(code));
        }
        let cpl = if descriptor.is_conforming() { self.cpl } else { descriptor.dpl() };
        if !is_canonical(gate.offset) {
            return Err(self.gp(external));
        }
        let descriptor = self.mark_accessed(gate.selector, descriptor)?;
        Ok((descriptor.segment(gate.selector & !SELECTOR_RPL | u16::from(cpl)), cpl))
    }

    /// Where the frame goes: an interrupt stack, the stack of the new privilege level, or the current one.
    fn delivery_stack(&mut self, gate: &Gate, cpl: u8, external: u32) -> Result<u64, Trap> {
        let offset = if gate.stack != 0 {
            TSS_IST1 + (u64::from(gate.stack) - 1) * 8
        } else if cpl != self.cpl {
            TSS_RSP0 + u64::from(cpl) * 8
        } else {
            return Ok(self.gpr[RSP]);
        };
        let tr = self.tr;
        if offset + 7 > u64::from(tr.limit) || tr.attributes & SEGMENT_PRESENT == 0 {
            return Err(self.ts(u32::from(tr.selector & !SELECTOR_RPL) | external));
        }
        let stack = self.load_system::<u64>(tr.base.wrapping_add(offset))?;
        if !is_canonical(stack) {
            return Err(self.ss(external));
        }
        Ok(stack)
    }
}

/// A 64-bit interrupt or trap gate.
struct Gate {
    offset: u64,
    selector: u16,
    /// Interrupt stack, 1 to 7; 0 for none.
    stack: u8,
    kind: u64,
}

/// How events combine into double faults.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Class {
    Benign,
    Contributory,
    PageFault,
    DoubleFault,
}

impl Class {
    fn of(event: Event) -> Self {
        match event.source {
            Source::Exception => Self::of_vector(event.vector),
            Source::External | Source::Software => Self::Benign,
        }
    }

    fn of_vector(vector: u8) -> Self {
        match vector {
            DIVIDE_ERROR | INVALID_TSS | SEGMENT_NOT_PRESENT | STACK_FAULT | GENERAL_PROTECTION => {
                Self::Contributory
            }
            PAGE_FAULT => Self::PageFault,
            DOUBLE_FAULT => Self::DoubleFault,
            _ => Self::Benign,
        }
    }
}

/// The RFLAGS image in the frame: faults save RF set, so that an instruction breakpoint does not hit again (SDM
/// vol. 3, 17.3.1.1).
fn saved_flags(rflags: u64, event: Event) -> u64 {
    let fault = event.source == Source::Exception
        && !matches!(event.vector, DEBUG | BREAKPOINT | OVERFLOW | DOUBLE_FAULT | MACHINE_CHECK);
    if fault { rflags | flags::RF } else { rflags }
}
