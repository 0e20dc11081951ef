//! Instructions of the operating system, and those that depend on the processor's configuration.

use iced_x86::Instruction;

use crate::soft::op::Selected;

/// The handler of an instruction of this group.
pub fn handler(_instruction: &Instruction) -> Option<Selected> {
    None
}
