//! From bytes to [`Op`]s.

use iced_x86::{
    Code, CodeSize, Decoder, DecoderError, DecoderOptions, Instruction, OpKind, Register,
};

use super::cpu::{FS, GS, RSP};
use super::op::{
    self, ADDRESS_32, HIGH_BYTE, LINEAR_32, NO_SEGMENT, Op, REG_BLOCK, REG_NONE, REG_STEP,
    REG_STEP_VALUE, Selected,
};
use super::ops;

/// Longest instruction.
pub(super) const MAX_INSTRUCTION: usize = 15;
/// Most instructions of a block.
const MAX_OPS: usize = 64;

/// What was decoded at an address.
pub(super) struct Decoded {
    /// The instructions; none if the first does not end before the bytes do. Behind them, if the last two
    /// can run as one, the operation that does so.
    pub(super) ops: Vec<Op>,
    /// How many instructions there are.
    pub(super) count: usize,
    /// Whether there is one more operation than instructions.
    pub(super) fused: bool,
    /// The last one ends the block by its nature (and not because the page or the limit did).
    pub(super) ends: bool,
    /// Bytes of all instructions.
    pub(super) size: usize,
}

/// Decodes one block from `bytes`, which start at linear address `rip` and end with the page.
pub(super) fn block(bytes: &[u8], rip: u64, bitness: u32, max_ops: usize) -> Decoded {
    let mut decoder = Decoder::with_ip(bitness, bytes, rip, DecoderOptions::NONE);
    let mut decoded =
        Decoded { ops: Vec::with_capacity(8), count: 0, fused: false, ends: false, size: 0 };
    let mut instruction = Instruction::default();
    let mut previous = Instruction::default();
    while decoded.ops.len() < max_ops.min(MAX_OPS) && decoder.can_decode() {
        decoder.decode_out(&mut instruction);
        if decoder.last_error() == DecoderError::NoMoreBytes
            && bytes.len() - decoded.size < MAX_INSTRUCTION
        {
            break;
        }
        let selected = if instruction.code() == Code::INVALID {
            Selected { run: op::undefined, ends_block: true }
        } else {
            select(&instruction)
        };
        decoded.ops.push(op(&instruction, &selected, rip, decoded.size, decoded.ops.len()));
        decoded.size += instruction.len();
        if selected.ends_block {
            decoded.ends = true;
            break;
        }
        previous = instruction;
    }
    decoded.count = decoded.ops.len();
    if decoded.ends
        && let [.., first, branch] = decoded.ops[..]
        && let Some(fused) = ops::fused::fuse(&previous, &first, &instruction, &branch)
    {
        decoded.ops.push(fused);
        decoded.fused = true;
    }
    decoded
}

fn select(instruction: &Instruction) -> Selected {
    if instruction.code_size() == CodeSize::Code16 {
        // Real mode and 16-bit segments: nothing the 64-bit boot protocol leads to.
        return Selected { run: op::undefined, ends_block: true };
    }
    ops::integer::handler(instruction)
        .or_else(|| ops::system::handler(instruction))
        .or_else(|| ops::legacy::handler(instruction))
        .or_else(|| ops::fp::handler(instruction))
        .unwrap_or(Selected { run: op::undefined, ends_block: true })
}

fn op(
    instruction: &Instruction,
    selected: &Selected,
    block: u64,
    offset: usize,
    number: usize,
) -> Op {
    let mut op = Op {
        run: selected.run,
        imm: 0,
        disp: 0,
        base: REG_NONE,
        index: REG_NONE,
        scale: 0,
        segment: NO_SEGMENT,
        dst: 0,
        src: 0,
        src2: 0,
        len: instruction.len() as u8,
        offset: offset as u16,
        number: number as u16,
    };
    if instruction.is_stack_instruction() {
        // Addresses that are not canonical then raise #SS.
        op.base = RSP as u8;
    }
    let mut immediates = 0;
    for operand in 0..instruction.op_count() {
        match instruction.op_kind(operand) {
            OpKind::Register => {
                let number = register_number(instruction.op_register(operand));
                match operand {
                    0 => op.dst = number,
                    1 => op.src = number,
                    2 => op.src2 = number,
                    _ => {}
                }
            }
            OpKind::Memory => memory(instruction, &mut op, block),
            OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64 => {
                op.imm = instruction.near_branch_target().wrapping_sub(block);
            }
            OpKind::FarBranch16 => {
                op.imm = u64::from(instruction.far_branch16())
                    | u64::from(instruction.far_branch_selector()) << 32;
            }
            OpKind::FarBranch32 => {
                op.imm = u64::from(instruction.far_branch32())
                    | u64::from(instruction.far_branch_selector()) << 32;
            }
            OpKind::MemorySegSI
            | OpKind::MemorySegESI
            | OpKind::MemorySegRSI
            | OpKind::MemorySegDI
            | OpKind::MemorySegEDI
            | OpKind::MemorySegRDI => op.segment = segment(instruction),
            OpKind::MemoryESDI | OpKind::MemoryESEDI | OpKind::MemoryESRDI => {}
            OpKind::Immediate8
            | OpKind::Immediate8_2nd
            | OpKind::Immediate16
            | OpKind::Immediate32
            | OpKind::Immediate64
            | OpKind::Immediate8to16
            | OpKind::Immediate8to32
            | OpKind::Immediate8to64
            | OpKind::Immediate32to64 => {
                op.imm |= instruction.immediate(operand) << (32 * immediates);
                immediates += 1;
            }
        }
        if matches!(
            instruction.op_kind(operand),
            OpKind::MemorySegESI | OpKind::MemorySegEDI | OpKind::MemoryESEDI
        ) {
            op.segment |= ADDRESS_32;
        }
    }
    op
}

/// The number of a register, in encoding order; [`HIGH_BYTE`] marks AH, CH, DH and BH.
fn register_number(register: Register) -> u8 {
    if register.is_gpr() {
        let high = matches!(register, Register::AH | Register::CH | Register::DH | Register::BH);
        register.full_register().number() as u8 | if high { HIGH_BYTE } else { 0 }
    } else {
        register.number() as u8
    }
}

/// The segment's part of [`Op::segment`]: in 64-bit mode only FS and GS have a base.
fn segment(instruction: &Instruction) -> u8 {
    let register = instruction.memory_segment();
    if instruction.code_size() != CodeSize::Code64 {
        return register.number() as u8 | LINEAR_32;
    }
    match register {
        Register::FS => FS as u8,
        Register::GS => GS as u8,
        _ => NO_SEGMENT,
    }
}

fn memory(instruction: &Instruction, op: &mut Op, block: u64) {
    op.segment = segment(instruction);
    let base = instruction.memory_base();
    let index = instruction.memory_index();
    if instruction.is_ip_rel_memory_operand() {
        let mut relative = instruction.ip_rel_memory_address().wrapping_sub(block) as i64;
        op.base = REG_BLOCK;
        if base == Register::EIP {
            op.segment |= ADDRESS_32;
            relative = i64::from(relative as i32);
        } else if relative > i64::from(i32::MAX) {
            op.index = REG_STEP;
            relative -= REG_STEP_VALUE as i64;
        }
        op.disp = relative as i32;
        return;
    }
    let displacement = instruction.memory_displacement64();
    op.disp = displacement as i32;
    op.base = REG_NONE;
    if base == Register::None && index == Register::None && instruction.memory_displ_size() == 4 {
        op.segment |= ADDRESS_32;
    }
    if is_absolute_mov(instruction.code()) {
        op.imm = displacement;
    }
    for (register, number) in [(base, &mut op.base), (index, &mut op.index)] {
        if register != Register::None {
            *number = register.number() as u8;
            if register.is_gpr32() {
                op.segment |= ADDRESS_32;
            }
        }
    }
    op.scale = instruction.memory_index_scale().trailing_zeros() as u8;
}

/// MOV between the accumulator and an address that the instruction holds whole: its handlers take it from
/// [`Op::imm`].
fn is_absolute_mov(code: Code) -> bool {
    matches!(
        code,
        Code::Mov_AL_moffs8
            | Code::Mov_AX_moffs16
            | Code::Mov_EAX_moffs32
            | Code::Mov_RAX_moffs64
            | Code::Mov_moffs8_AL
            | Code::Mov_moffs16_AX
            | Code::Mov_moffs32_EAX
            | Code::Mov_moffs64_RAX
    )
}
