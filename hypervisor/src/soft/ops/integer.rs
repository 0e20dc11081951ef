//! Integer instructions of user mode: chooses the handler for an instruction.
//!
//! Handlers are generic over operand size and form, so that nothing is left to decide when they run.

use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use super::{alu, bits, control, io, mov, muldiv, shift, stack, string};
use crate::soft::cpu::{Cpu, Trap};
use crate::soft::op::{Handler, Op, Selected};

/// The instance of a handler for an operand size in bytes.
macro_rules! sized {
    ($size:expr, $handler:ident $(, $type:ty)*) => {
        match $size {
            1 => $handler::<$($type,)* u8> as $crate::soft::op::Handler,
            2 => $handler::<$($type,)* u16>,
            4 => $handler::<$($type,)* u32>,
            _ => $handler::<$($type,)* u64>,
        }
    };
}

/// The instance of a handler for a condition code.
macro_rules! conditional {
    ($condition:expr, $handler:ident $(, $type:ty)*) => {
        match $condition {
            0 => $handler::<$($type,)* 0> as $crate::soft::op::Handler,
            1 => $handler::<$($type,)* 1>,
            2 => $handler::<$($type,)* 2>,
            3 => $handler::<$($type,)* 3>,
            4 => $handler::<$($type,)* 4>,
            5 => $handler::<$($type,)* 5>,
            6 => $handler::<$($type,)* 6>,
            7 => $handler::<$($type,)* 7>,
            8 => $handler::<$($type,)* 8>,
            9 => $handler::<$($type,)* 9>,
            10 => $handler::<$($type,)* 10>,
            11 => $handler::<$($type,)* 11>,
            12 => $handler::<$($type,)* 12>,
            13 => $handler::<$($type,)* 13>,
            14 => $handler::<$($type,)* 14>,
            _ => $handler::<$($type,)* 15>,
        }
    };
}

pub(super) use {conditional, sized};

/// The handler of an instruction of this group.
pub fn handler(instruction: &Instruction) -> Option<Selected> {
    use Mnemonic as M;
    // Segment, control and debug registers belong to the system group.
    for operand in 0..instruction.op_count() {
        if instruction.op_kind(operand) == OpKind::Register {
            let register = instruction.op_register(operand);
            if register.is_segment_register() || register.is_cr() || register.is_dr() {
                return None;
            }
        }
    }
    match instruction.mnemonic() {
        M::Nop
        | M::Reservednop
        | M::Endbr64
        | M::Endbr32
        | M::Pause
        | M::Prefetchnta
        | M::Prefetcht0
        | M::Prefetcht1
        | M::Prefetcht2
        | M::Prefetchw
        | M::Prefetchwt1
        | M::Prefetch
        | M::Prefetchit0
        | M::Prefetchit1
        | M::Rdsspd
        | M::Rdsspq
        | M::Cldemote
        | M::Lfence
        | M::Mfence
        | M::Sfence => Selected::inner(nop),
        M::Clflush => Selected::inner(touch),
        _ => None,
    }
    .or_else(|| alu::handler(instruction))
    .or_else(|| mov::handler(instruction))
    .or_else(|| control::handler(instruction))
    .or_else(|| stack::handler(instruction))
    .or_else(|| shift::handler(instruction))
    .or_else(|| bits::handler(instruction))
    .or_else(|| muldiv::handler(instruction))
    .or_else(|| string::handler(instruction))
    .or_else(|| io::handler(instruction))
}

/// Bytes of operand 0.
pub(super) fn size0(instruction: &Instruction) -> usize {
    size(instruction, 0)
}

/// Bytes of an operand that is a register or in memory.
pub(super) fn size(instruction: &Instruction, operand: u32) -> usize {
    match instruction.op_kind(operand) {
        OpKind::Register => instruction.op_register(operand).size(),
        _ => instruction.memory_size().size(),
    }
}

/// Where the first two operands are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    /// Register.
    R,
    /// Memory.
    M,
    /// Register, register.
    RR,
    /// Register, immediate.
    RI,
    /// Register, memory.
    RM,
    /// Memory, register.
    MR,
    /// Memory, immediate.
    MI,
    /// None of these.
    Other,
}

/// The form of an instruction. SIMD and other registers that are not general make it [`Form::Other`].
pub(super) fn form(instruction: &Instruction) -> Form {
    #[derive(PartialEq)]
    enum Kind {
        Register,
        Memory,
        Immediate,
        Other,
    }
    let kind = |operand: u32| match instruction.op_kind(operand) {
        OpKind::Register if instruction.op_register(operand).is_gpr() => Kind::Register,
        OpKind::Memory => Kind::Memory,
        OpKind::Immediate8
        | OpKind::Immediate16
        | OpKind::Immediate32
        | OpKind::Immediate64
        | OpKind::Immediate8to16
        | OpKind::Immediate8to32
        | OpKind::Immediate8to64
        | OpKind::Immediate32to64 => Kind::Immediate,
        _ => Kind::Other,
    };
    match instruction.op_count() {
        0 => Form::Other,
        1 => match kind(0) {
            Kind::Register => Form::R,
            Kind::Memory => Form::M,
            _ => Form::Other,
        },
        _ => match (kind(0), kind(1)) {
            (Kind::Register, Kind::Register) => Form::RR,
            (Kind::Register, Kind::Immediate) => Form::RI,
            (Kind::Register, Kind::Memory) => Form::RM,
            (Kind::Memory, Kind::Register) => Form::MR,
            (Kind::Memory, Kind::Immediate) => Form::MI,
            _ => Form::Other,
        },
    }
}

/// Whether operand 1 is CL.
pub(super) fn by_cl(instruction: &Instruction, operand: u32) -> bool {
    instruction.op_kind(operand) == OpKind::Register
        && instruction.op_register(operand) == Register::CL
}

fn nop(_: &mut Cpu, _: &Op) -> Result<(), Trap> {
    Ok(())
}

/// CLFLUSH: raises what a load of a byte would raise.
fn touch(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.load::<u8>(cpu.ea(op)).map(drop)
}

/// A handler in the middle of a block.
pub(super) fn inner(handler: Handler) -> Option<Selected> {
    Selected::inner(handler)
}
