//! Integer instructions of user mode.

use iced_x86::Instruction;

use crate::soft::op::Selected;

/// The handler of an instruction of this group.
pub fn handler(_instruction: &Instruction) -> Option<Selected> {
    None
}
