//! Floating point and vector instructions: x87, MMX, SSE to SSE4.2, FXSAVE.

mod fxsave;
mod mmx;
mod sse_convert;
mod sse_float;
mod sse_integer;
mod sse_move;
mod sse_string;
mod vector;
mod x87;
mod x87_control;
mod x87_functions;
mod x87_transfer;

use iced_x86::Instruction;

use crate::soft::op::Selected;

/// The handler of an instruction of this group.
pub fn handler(instruction: &Instruction) -> Option<Selected> {
    sse_move::handler(instruction)
        .or_else(|| sse_integer::handler(instruction))
        .or_else(|| sse_float::handler(instruction))
        .or_else(|| sse_convert::handler(instruction))
        .or_else(|| sse_string::handler(instruction))
        .or_else(|| mmx::handler(instruction))
        .or_else(|| fxsave::handler(instruction))
        .or_else(|| x87::handler(instruction))
        .or_else(|| x87_transfer::handler(instruction))
        .or_else(|| x87_functions::handler(instruction))
        .or_else(|| x87_control::handler(instruction))
}
