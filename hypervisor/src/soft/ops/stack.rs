//! PUSH, POP, ENTER, LEAVE, in 64-bit and compatibility mode (with a flat stack segment).

use iced_x86::{Code, Instruction, Mnemonic, OpKind};

use super::integer::{inner, sized};
use crate::soft::cpu::{Cpu, RBP, RSP, Trap};
use crate::soft::op::{Handler, Int, Op, Selected};

pub(super) fn handler(instruction: &Instruction) -> Option<Selected> {
    use Mnemonic as M;
    // The stack moves by 8 (in compatibility mode by 4), with an operand-size prefix by 2.
    let size = instruction.stack_pointer_increment().unsigned_abs();
    let kind = if instruction.op_count() > 0 { instruction.op0_kind() } else { OpKind::Register };
    let handler: Handler = match (instruction.mnemonic(), kind) {
        (M::Push, OpKind::Register) if size == 8 => push_r64,
        (M::Push, OpKind::Register) => sized!(size, push_r),
        (M::Push, OpKind::Memory) => sized!(size, push_m),
        (M::Push, _) => sized!(size, push_i),
        (M::Pop, OpKind::Register) if size == 8 => pop_r64,
        (M::Pop, OpKind::Register) => sized!(size, pop_r),
        (M::Pop, OpKind::Memory) => sized!(size, pop_m),
        (M::Leave, _) => match instruction.code() {
            Code::Leavew => leave::<u16>,
            Code::Leaved => leave::<u32>,
            _ => leave::<u64>,
        },
        (M::Enter, _) => match instruction.code() {
            Code::Enterw_imm16_imm8 => enter::<u16>,
            Code::Enterd_imm16_imm8 => enter::<u32>,
            _ => enter::<u64>,
        },
        _ => return None,
    };
    inner(handler)
}

/// RSP, or with a 32-bit stack operand, which only compatibility mode has, ESP.
#[inline(always)]
pub(super) fn stack_pointer<T: Int>(rsp: u64) -> u64 {
    if T::BITS == 32 { rsp & 0xffff_ffff } else { rsp }
}

#[inline(always)]
pub(super) fn push<T: Int>(cpu: &mut Cpu, value: u64) -> Result<(), Trap> {
    let rsp = stack_pointer::<T>(cpu.gpr[RSP].wrapping_sub(T::BYTES as u64));
    cpu.store::<T>(rsp, T::truncate(value))?;
    cpu.gpr[RSP] = rsp;
    Ok(())
}

fn push_r64(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let value = u64::get(cpu, op.dst);
    cpu.push_then(op, value, |_, _| ())
}

fn push_r<T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let value = T::get(cpu, op.dst);
    push::<T>(cpu, value)
}

fn push_m<T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let value = cpu.load::<T>(cpu.ea(op))?;
    push::<T>(cpu, value.extend())
}

fn push_i<T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    push::<T>(cpu, op.imm)
}

fn pop_r64(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.load_then::<u64>(op, cpu.gpr[RSP], |cpu, op, value| {
        cpu.gpr[RSP] = cpu.gpr[RSP].wrapping_add(8);
        u64::set(cpu, op.dst, value);
        Ok(())
    })
}

fn pop_r<T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let value = cpu.load::<T>(cpu.gpr[RSP])?;
    cpu.gpr[RSP] = stack_pointer::<T>(cpu.gpr[RSP].wrapping_add(T::BYTES as u64));
    T::set(cpu, op.dst, value.extend());
    Ok(())
}

/// The destination's address is computed with RSP already moved.
fn pop_m<T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let rsp = cpu.gpr[RSP];
    let value = cpu.load::<T>(rsp)?;
    cpu.gpr[RSP] = stack_pointer::<T>(rsp.wrapping_add(T::BYTES as u64));
    let stored = cpu.store::<T>(cpu.ea(op), value);
    if stored.is_err() {
        cpu.gpr[RSP] = rsp;
    }
    stored
}

fn leave<T: Int>(cpu: &mut Cpu, _: &Op) -> Result<(), Trap> {
    let frame = cpu.gpr[RBP];
    let value = cpu.load::<T>(frame)?;
    cpu.gpr[RSP] = frame.wrapping_add(T::BYTES as u64);
    T::set(cpu, RBP as u8, value.extend());
    Ok(())
}

/// Intel SDM vol. 2, ENTER. The frame's new end is probed too, as the manual demands.
fn enter<T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let size = op.imm & 0xffff;
    let level = (op.imm >> 32) & 31;
    let step = T::BYTES as u64;
    let old = cpu.gpr[RSP];
    let frame = old.wrapping_sub(step);
    let bottom = frame.wrapping_sub(level * step).wrapping_sub(size);
    cpu.probe_write(bottom, T::BYTES)?;
    let rbp = T::get(cpu, RBP as u8);
    cpu.store::<T>(frame, T::truncate(rbp))?;
    let mut rsp = frame;
    for depth in 1..level {
        let link = cpu.load::<T>(cpu.gpr[RBP].wrapping_sub(depth * step))?;
        rsp = rsp.wrapping_sub(step);
        cpu.store::<T>(rsp, link)?;
    }
    if level > 0 {
        rsp = rsp.wrapping_sub(step);
        cpu.store::<T>(rsp, T::truncate(frame))?;
    }
    T::set(cpu, RBP as u8, frame);
    cpu.gpr[RSP] = rsp.wrapping_sub(size);
    Ok(())
}
