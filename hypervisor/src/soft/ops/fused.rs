//! Comparisons and the conditional branch behind them, as one operation: most blocks end that way.
//!
//! It counts as two instructions. The plain ones stay in the block too, for when the count has to
//! stop between them or the first one fails; the second cannot.

use iced_x86::{Instruction, Mnemonic};

use super::alu::{Add, And, Binary, Cmp, Sub, Test};
use super::control::condition;
use super::integer::{Form, conditional, form, size0};
use crate::soft::cpu::{Cpu, Trap};
use crate::soft::op::{Handler, Int, Op, REG_BLOCK};

/// The operation that does what `first` and then `branch` do, if there is one.
pub fn fuse(
    first: &Instruction,
    first_op: &Op,
    branch: &Instruction,
    branch_op: &Op,
) -> Option<Op> {
    if !branch.is_jcc_short_or_near() {
        return None;
    }
    let condition = branch.condition_code() as u8 - 1;
    let run = match first.mnemonic() {
        Mnemonic::Cmp => compared::<Cmp>(first, condition),
        Mnemonic::Test => compared::<Test>(first, condition),
        Mnemonic::Sub => computed::<Sub>(first, condition),
        Mnemonic::Add => computed::<Add>(first, condition),
        Mnemonic::And => computed::<And>(first, condition),
        _ => None,
    }?;
    // The immediate and the branch's target share a field.
    let immediate = if size0(first) == 8 {
        i32::try_from(first_op.imm as i64).ok()?
    } else {
        first_op.imm as i32
    };
    let target = i32::try_from(branch_op.imm as i64).ok()?;
    let imm = u64::from(target as u32) << 32 | u64::from(immediate as u32);
    Some(Op { run, imm, ..*first_op })
}

/// For comparisons, with each form of operands.
fn compared<O: Binary>(first: &Instruction, condition: u8) -> Option<Handler> {
    Some(match (form(first), size0(first)) {
        (Form::RR, 1) => conditional!(condition, rr, O, u8),
        (Form::RR, 4) => conditional!(condition, rr, O, u32),
        (Form::RR, 8) => conditional!(condition, rr, O, u64),
        (Form::RI, 1) => conditional!(condition, ri, O, u8),
        (Form::RI, 4) => conditional!(condition, ri, O, u32),
        (Form::RI, 8) => conditional!(condition, ri, O, u64),
        (Form::MI, 1) => conditional!(condition, mi, O, u8),
        (Form::MI, 4) => conditional!(condition, mi, O, u32),
        (Form::MI, 8) => conditional!(condition, mi, O, u64),
        (Form::MR, 1) => conditional!(condition, mr, O, u8),
        (Form::MR, 4) => conditional!(condition, mr, O, u32),
        (Form::MR, 8) => conditional!(condition, mr, O, u64),
        (Form::RM, 1) => conditional!(condition, rm, O, u8),
        (Form::RM, 4) => conditional!(condition, rm, O, u32),
        (Form::RM, 8) => conditional!(condition, rm, O, u64),
        _ => return None,
    })
}

/// For arithmetic, in registers alone.
fn computed<O: Binary>(first: &Instruction, condition: u8) -> Option<Handler> {
    Some(match (form(first), size0(first)) {
        (Form::RR, 4) => conditional!(condition, rr, O, u32),
        (Form::RR, 8) => conditional!(condition, rr, O, u64),
        (Form::RI, 4) => conditional!(condition, ri, O, u32),
        (Form::RI, 8) => conditional!(condition, ri, O, u64),
        _ => return None,
    })
}

#[inline(always)]
fn immediate(op: &Op) -> u64 {
    op.imm as i32 as i64 as u64
}

#[inline(always)]
fn combined<O: Binary, T: Int, const C: u8>(cpu: &mut Cpu, op: &Op, a: u64, b: u64) {
    let result = O::compute::<T>(&cpu.flags, a, b);
    O::flags::<T>(&mut cpu.flags, a, b, result);
    if O::WRITES {
        T::set(cpu, op.dst, result);
    }
    if condition::<C>(&cpu.flags) {
        let target = (op.imm as i64 >> 32) as u64;
        cpu.rip = cpu.gpr[usize::from(REG_BLOCK)].wrapping_add(target);
    }
}

fn rr<O: Binary, T: Int, const C: u8>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let (a, b) = (T::get(cpu, op.dst), T::get(cpu, op.src));
    combined::<O, T, C>(cpu, op, a, b);
    Ok(())
}

fn ri<O: Binary, T: Int, const C: u8>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let a = T::get(cpu, op.dst);
    combined::<O, T, C>(cpu, op, a, immediate(op));
    Ok(())
}

fn mi<O: Binary, T: Int, const C: u8>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.load_operand::<T>(op, |cpu, op, a| {
        combined::<O, T, C>(cpu, op, a.extend(), immediate(op));
    })
}

fn rm<O: Binary, T: Int, const C: u8>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.load_operand::<T>(op, |cpu, op, b| {
        let a = T::get(cpu, op.dst);
        combined::<O, T, C>(cpu, op, a, b.extend());
    })
}

fn mr<O: Binary, T: Int, const C: u8>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.load_operand::<T>(op, |cpu, op, a| {
        let b = T::get(cpu, op.src);
        combined::<O, T, C>(cpu, op, a.extend(), b);
    })
}
