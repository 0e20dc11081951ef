//! Floating point and vector instructions: x87, MMX, SSE to SSE4.2, FXSAVE.

use iced_x86::Instruction;

use crate::soft::op::Selected;

/// The handler of an instruction of this group.
pub fn handler(_instruction: &Instruction) -> Option<Selected> {
    None
}
