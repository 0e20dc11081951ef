//! SHL, SHR, SAR, ROL, ROR, RCL, RCR, SHLD, SHRD. For what the manual leaves undefined see [`flags`](crate::soft::flags).

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::integer::{by_cl, inner, size0, sized};
use crate::soft::cpu::{Cpu, RCX, Trap};
use crate::soft::flags::Flags;
use crate::soft::op::{Int, Op, Selected};

pub(super) fn handler(instruction: &Instruction) -> Option<Selected> {
    use Mnemonic as M;
    match instruction.mnemonic() {
        M::Shl | M::Sal => single::<Shl>(instruction),
        M::Shr => single::<Shr>(instruction),
        M::Sar => single::<Sar>(instruction),
        M::Rol => single::<Rol>(instruction),
        M::Ror => single::<Ror>(instruction),
        M::Rcl => single::<Rcl>(instruction),
        M::Rcr => single::<Rcr>(instruction),
        M::Shld => double::<Left>(instruction),
        M::Shrd => double::<Right>(instruction),
        _ => None,
    }
}

/// `count` is masked already, and not zero; `a` is zero-extended.
trait Shift {
    fn compute<T: Int>(flags: &mut Flags, a: u64, count: u32) -> u64;
}

/// The top bit of the operand size.
#[inline(always)]
fn top<T: Int>(value: u64) -> bool {
    value >> (T::BITS - 1) & 1 != 0
}

/// The bit below it.
#[inline(always)]
fn second<T: Int>(value: u64) -> bool {
    value >> (T::BITS - 2) & 1 != 0
}

struct Shl;
impl Shift for Shl {
    #[inline(always)]
    fn compute<T: Int>(flags: &mut Flags, a: u64, count: u32) -> u64 {
        // Up to 31 for 8 and 16 bits, so that nothing is lost beyond bit 63 that matters.
        let before = a << (count - 1);
        let result = before << 1;
        let cf = top::<T>(before);
        flags.set_shift::<T>(result, cf, top::<T>(result) != cf);
        result
    }
}

struct Shr;
impl Shift for Shr {
    #[inline(always)]
    fn compute<T: Int>(flags: &mut Flags, a: u64, count: u32) -> u64 {
        let before = a >> (count - 1);
        let result = before >> 1;
        flags.set_shift::<T>(result, before & 1 != 0, top::<T>(before));
        result
    }
}

struct Sar;
impl Shift for Sar {
    #[inline(always)]
    fn compute<T: Int>(flags: &mut Flags, a: u64, count: u32) -> u64 {
        let before = (T::sign_extend(a) as i64) >> (count - 1);
        let result = (before >> 1) as u64;
        flags.set_shift::<T>(result, before & 1 != 0, false);
        result
    }
}

struct Rol;
impl Shift for Rol {
    #[inline(always)]
    fn compute<T: Int>(flags: &mut Flags, a: u64, count: u32) -> u64 {
        let count = count % T::BITS;
        let result = if count == 0 { a } else { a << count | a >> (T::BITS - count) };
        let cf = result & 1 != 0;
        flags.set_cf_of(cf, top::<T>(result) != cf);
        result
    }
}

struct Ror;
impl Shift for Ror {
    #[inline(always)]
    fn compute<T: Int>(flags: &mut Flags, a: u64, count: u32) -> u64 {
        let count = count % T::BITS;
        let result = if count == 0 { a } else { a >> count | a << (T::BITS - count) };
        flags.set_cf_of(top::<T>(result), top::<T>(result) != second::<T>(result));
        result
    }
}

/// Rotates CF and the operand, together `BITS + 1` bits, left by `count` below `BITS + 1`.
#[inline(always)]
fn rotate_through_carry<T: Int>(cf: bool, a: u64, count: u32) -> (bool, u64) {
    let whole = u128::from(cf) << T::BITS | u128::from(a);
    let width = T::BITS + 1;
    let rotated = if count == 0 { whole } else { whole << count | whole >> (width - count) };
    (rotated >> T::BITS & 1 != 0, T::zero_extend(rotated as u64))
}

struct Rcl;
impl Shift for Rcl {
    fn compute<T: Int>(flags: &mut Flags, a: u64, count: u32) -> u64 {
        let (cf, result) = rotate_through_carry::<T>(flags.cf(), a, count % (T::BITS + 1));
        flags.set_cf_of(cf, top::<T>(result) != cf);
        result
    }
}

struct Rcr;
impl Shift for Rcr {
    fn compute<T: Int>(flags: &mut Flags, a: u64, count: u32) -> u64 {
        let count = count % (T::BITS + 1);
        let left = if count == 0 { 0 } else { T::BITS + 1 - count };
        let (cf, result) = rotate_through_carry::<T>(flags.cf(), a, left);
        flags.set_cf_of(cf, top::<T>(result) != second::<T>(result));
        result
    }
}

fn single<O: Shift>(instruction: &Instruction) -> Option<Selected> {
    let size = size0(instruction);
    let memory = instruction.op0_kind() == OpKind::Memory;
    inner(match (memory, by_cl(instruction, 1)) {
        (false, false) => sized!(size, single_ri, O),
        (false, true) => sized!(size, single_rc, O),
        (true, false) => sized!(size, single_mi, O),
        (true, true) => sized!(size, single_mc, O),
    })
}

/// The count as the processor masks it.
#[inline(always)]
fn masked<T: Int>(count: u64) -> u32 {
    count as u32 & if T::BITS == 64 { 63 } else { 31 }
}

#[inline(always)]
fn single_r<O: Shift, T: Int>(cpu: &mut Cpu, op: &Op, count: u64) {
    let count = masked::<T>(count);
    let a = T::get(cpu, op.dst);
    let result = if count == 0 { a } else { O::compute::<T>(&mut cpu.flags, a, count) };
    T::set(cpu, op.dst, result);
}

#[inline(always)]
fn single_m<O: Shift, T: Int>(cpu: &mut Cpu, a: T, count: u64) -> T {
    let count = masked::<T>(count);
    if count == 0 {
        return a;
    }
    T::truncate(O::compute::<T>(&mut cpu.flags, a.extend(), count))
}

fn single_ri<O: Shift, T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    single_r::<O, T>(cpu, op, op.imm);
    Ok(())
}

fn single_rc<O: Shift, T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    single_r::<O, T>(cpu, op, cpu.gpr[RCX]);
    Ok(())
}

fn single_mi<O: Shift, T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.modify_operand::<T>(op, |cpu, op, a| single_m::<O, T>(cpu, a, op.imm))
}

fn single_mc<O: Shift, T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.modify_operand::<T>(op, |cpu, _, a| single_m::<O, T>(cpu, a, cpu.gpr[RCX]))
}

/// SHLD or SHRD; `count` is masked and not zero.
trait Double {
    fn compute<T: Int>(flags: &mut Flags, a: u64, b: u64, count: u32) -> u64;
}

struct Left;
impl Double for Left {
    fn compute<T: Int>(flags: &mut Flags, a: u64, b: u64, count: u32) -> u64 {
        // 16 bits with a count above 16: what is shifted in goes on with the destination, as processors do.
        let whole = u128::from(a) << T::BITS | u128::from(b);
        let shifted = if count > T::BITS {
            (whole << T::BITS | u128::from(a)) << count >> T::BITS
        } else {
            whole << count
        };
        let result = T::zero_extend((shifted >> T::BITS) as u64);
        let cf = if count > T::BITS {
            b >> (2 * T::BITS - count) & 1 != 0
        } else {
            a >> (T::BITS - count) & 1 != 0
        };
        flags.set_shift::<T>(result, cf, top::<T>(result) != cf);
        result
    }
}

struct Right;
impl Double for Right {
    fn compute<T: Int>(flags: &mut Flags, a: u64, b: u64, count: u32) -> u64 {
        let whole = u128::from(b) << T::BITS | u128::from(a);
        let whole = if T::BITS < 64 { u128::from(a) << (2 * T::BITS) | whole } else { whole };
        let result = T::zero_extend((whole >> count) as u64);
        let cf = whole >> (count - 1) & 1 != 0;
        flags.set_shift::<T>(result, cf, top::<T>(result) != second::<T>(result));
        result
    }
}

fn double<O: Double>(instruction: &Instruction) -> Option<Selected> {
    let size = size0(instruction);
    let memory = instruction.op0_kind() == OpKind::Memory;
    inner(match (memory, by_cl(instruction, 2)) {
        (false, false) => sized!(size, double_ri, O),
        (false, true) => sized!(size, double_rc, O),
        (true, false) => sized!(size, double_mi, O),
        (true, true) => sized!(size, double_mc, O),
    })
}

fn double_r<O: Double, T: Int>(cpu: &mut Cpu, op: &Op, count: u64) {
    let count = masked::<T>(count);
    let (a, b) = (T::get(cpu, op.dst), T::get(cpu, op.src));
    let result = if count == 0 { a } else { O::compute::<T>(&mut cpu.flags, a, b, count) };
    T::set(cpu, op.dst, result);
}

fn double_m<O: Double, T: Int>(cpu: &mut Cpu, op: &Op, count: u64) -> Result<(), Trap> {
    let count = masked::<T>(count);
    let b = T::get(cpu, op.src);
    cpu.modify::<T>(cpu.ea(op), |cpu, a| {
        if count == 0 {
            return a;
        }
        T::truncate(O::compute::<T>(&mut cpu.flags, a.extend(), b, count))
    })
}

fn double_ri<O: Double, T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    double_r::<O, T>(cpu, op, op.imm);
    Ok(())
}

fn double_rc<O: Double, T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    double_r::<O, T>(cpu, op, cpu.gpr[RCX]);
    Ok(())
}

fn double_mi<O: Double, T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    double_m::<O, T>(cpu, op, op.imm)
}

fn double_mc<O: Double, T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    double_m::<O, T>(cpu, op, cpu.gpr[RCX])
}
