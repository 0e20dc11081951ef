//! MUL, IMUL, DIV, IDIV. For what the manual leaves undefined see [`flags`](crate::soft::flags).

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::integer::{inner, size0, sized};
use crate::soft::cpu::{Cpu, RAX, RDX, Trap};
use crate::soft::op::{HIGH_BYTE, Int, Op, Selected};

pub(super) fn handler(instruction: &Instruction) -> Option<Selected> {
    use Mnemonic as M;
    match (instruction.mnemonic(), instruction.op_count()) {
        (M::Mul, _) => one::<Mul>(instruction),
        (M::Imul, 1) => one::<Imul>(instruction),
        (M::Div, _) => one::<Div>(instruction),
        (M::Idiv, _) => one::<Idiv>(instruction),
        (M::Imul, operands) => {
            let size = size0(instruction);
            let memory = instruction.op1_kind() == OpKind::Memory;
            inner(match (operands, memory) {
                (2, false) => sized!(size, imul_rr),
                (2, true) => sized!(size, imul_rm),
                (_, false) => sized!(size, imul_rri),
                (_, true) => sized!(size, imul_rmi),
            })
        }
        _ => None,
    }
}

/// An instruction on RDX:RAX (AX for 8 bits) and one operand.
trait One {
    fn compute<T: Int>(cpu: &mut Cpu, operand: u64) -> Result<(), Trap>;
}

fn one<O: One>(instruction: &Instruction) -> Option<Selected> {
    let size = size0(instruction);
    inner(match instruction.op0_kind() {
        OpKind::Register => sized!(size, one_r, O),
        _ => sized!(size, one_m, O),
    })
}

fn one_r<O: One, T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let operand = T::get(cpu, op.dst);
    O::compute::<T>(cpu, operand)
}

fn one_m<O: One, T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let operand = cpu.load::<T>(cpu.ea(op))?.extend();
    O::compute::<T>(cpu, operand)
}

/// Where the upper half is.
fn upper<T: Int>() -> u8 {
    if T::BITS == 8 { RAX as u8 | HIGH_BYTE } else { RDX as u8 }
}

fn set_pair<T: Int>(cpu: &mut Cpu, low: u64, high: u64) {
    T::set(cpu, RAX as u8, low);
    T::set(cpu, upper::<T>(), high);
}

struct Mul;
impl One for Mul {
    #[inline(always)]
    fn compute<T: Int>(cpu: &mut Cpu, operand: u64) -> Result<(), Trap> {
        let product = u128::from(T::get(cpu, RAX as u8)) * u128::from(operand);
        let (low, high) = (product as u64, (product >> T::BITS) as u64);
        cpu.flags.set_shift::<T>(low, high != 0, high != 0);
        set_pair::<T>(cpu, low, high);
        Ok(())
    }
}

struct Imul;
impl One for Imul {
    #[inline(always)]
    fn compute<T: Int>(cpu: &mut Cpu, operand: u64) -> Result<(), Trap> {
        let product = signed::<T>(T::get(cpu, RAX as u8)) * signed::<T>(operand);
        let (low, high) = (product as u64, (product >> T::BITS) as u64);
        let overflow = signed::<T>(low) != product;
        cpu.flags.set_shift::<T>(low, overflow, overflow);
        set_pair::<T>(cpu, low, high);
        Ok(())
    }
}

fn signed<T: Int>(value: u64) -> i128 {
    i128::from(T::sign_extend(value) as i64)
}

struct Div;
impl One for Div {
    #[inline(always)]
    fn compute<T: Int>(cpu: &mut Cpu, operand: u64) -> Result<(), Trap> {
        let (low, high) = (T::get(cpu, RAX as u8), T::get(cpu, upper::<T>()));
        // Catches a zero divisor too.
        if high >= operand {
            return Err(cpu.de());
        }
        let (quotient, remainder) = if T::BITS < 64 {
            let dividend = high << (T::BITS & 63) | low;
            (dividend / operand, dividend % operand)
        } else if high == 0 {
            (low / operand, low % operand)
        } else {
            let dividend = u128::from(high) << 64 | u128::from(low);
            let divisor = u128::from(operand);
            ((dividend / divisor) as u64, (dividend % divisor) as u64)
        };
        set_pair::<T>(cpu, quotient, remainder);
        Ok(())
    }
}

struct Idiv;
impl One for Idiv {
    fn compute<T: Int>(cpu: &mut Cpu, operand: u64) -> Result<(), Trap> {
        let low = u128::from(T::get(cpu, RAX as u8));
        let high = signed::<T>(T::get(cpu, upper::<T>()));
        let dividend = high << T::BITS | low as i128;
        let divisor = signed::<T>(operand);
        // The quotient of the most negative 128-bit number and -1 does not exist.
        let Some(quotient) = dividend.checked_div(divisor) else {
            return Err(cpu.de());
        };
        if signed::<T>(quotient as u64) != quotient {
            return Err(cpu.de());
        }
        set_pair::<T>(cpu, quotient as u64, (dividend % divisor) as u64);
        Ok(())
    }
}

#[inline(always)]
fn imul<T: Int>(cpu: &mut Cpu, register: u8, a: u64, b: u64) {
    let (low, overflow) = if T::BITS == 64 {
        let (low, overflow) = (a as i64).overflowing_mul(b as i64);
        (low as u64, overflow)
    } else {
        let product = (T::sign_extend(a) as i64).wrapping_mul(T::sign_extend(b) as i64) as u64;
        (product, T::sign_extend(product) != product)
    };
    cpu.flags.set_shift::<T>(low, overflow, overflow);
    T::set(cpu, register, low);
}

fn imul_rr<T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let (a, b) = (T::get(cpu, op.dst), T::get(cpu, op.src));
    imul::<T>(cpu, op.dst, a, b);
    Ok(())
}

fn imul_rm<T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.load_operand::<T>(op, |cpu, op, b| {
        let a = T::get(cpu, op.dst);
        imul::<T>(cpu, op.dst, a, b.extend());
    })
}

fn imul_rri<T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let a = T::get(cpu, op.src);
    imul::<T>(cpu, op.dst, a, op.imm);
    Ok(())
}

fn imul_rmi<T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.load_operand::<T>(op, |cpu, op, a| imul::<T>(cpu, op.dst, a.extend(), op.imm))
}
