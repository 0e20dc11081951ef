//! ADD, OR, ADC, SBB, AND, SUB, XOR, CMP, TEST; INC, DEC, NEG, NOT; XADD, CMPXCHG and their kin.

use iced_x86::{Instruction, Mnemonic};

use super::integer::{Form, form, inner, size0, sized};
use crate::soft::cpu::{Cpu, RAX, RBX, RCX, RDX, Trap};
use crate::soft::flags::Flags;
use crate::soft::op::{Int, Op, Selected};

pub(super) fn handler(instruction: &Instruction) -> Option<Selected> {
    use Mnemonic as M;
    let size = size0(instruction);
    match instruction.mnemonic() {
        M::Add => binary::<Add>(instruction),
        M::Or => binary::<Or>(instruction),
        M::Adc => binary::<Adc>(instruction),
        M::Sbb => binary::<Sbb>(instruction),
        M::And => binary::<And>(instruction),
        M::Sub => binary::<Sub>(instruction),
        M::Xor => binary::<Xor>(instruction),
        M::Cmp => binary::<Cmp>(instruction),
        M::Test => binary::<Test>(instruction),
        M::Inc => unary::<Inc>(instruction),
        M::Dec => unary::<Dec>(instruction),
        M::Neg => unary::<Neg>(instruction),
        M::Not => unary::<Not>(instruction),
        M::Xadd => match form(instruction) {
            Form::RR => inner(sized!(size, xadd_r)),
            _ => inner(sized!(size, xadd_m)),
        },
        M::Cmpxchg => match form(instruction) {
            Form::RR => inner(sized!(size, cmpxchg_r)),
            _ => inner(sized!(size, cmpxchg_m)),
        },
        M::Cmpxchg8b => inner(cmpxchg8b),
        M::Cmpxchg16b => inner(cmpxchg16b),
        _ => None,
    }
}

/// An instruction with two operands, the first of which may receive the result. Values are zero-extended; of
/// results only the operand size's bits count.
pub(super) trait Binary {
    const WRITES: bool;
    fn compute<T: Int>(flags: &Flags, a: u64, b: u64) -> u64;
    fn flags<T: Int>(flags: &mut Flags, a: u64, b: u64, result: u64);
}

macro_rules! binary {
    ($name:ident, $writes:expr, |$flags:ident, $a:ident, $b:ident| $compute:expr, add) => {
        binary!($name, $writes, |$flags, $a, $b| $compute, |f, a, b, r| f.set_add::<T>(a, b, r));
    };
    ($name:ident, $writes:expr, |$flags:ident, $a:ident, $b:ident| $compute:expr, sub) => {
        binary!($name, $writes, |$flags, $a, $b| $compute, |f, a, b, r| f.set_sub::<T>(a, b, r));
    };
    ($name:ident, $writes:expr, |$flags:ident, $a:ident, $b:ident| $compute:expr, logic) => {
        binary!($name, $writes, |$flags, $a, $b| $compute, |f, _a, _b, r| f.set_logic::<T>(r));
    };
    ($name:ident, $writes:expr, |$flags:ident, $a:ident, $b:ident| $compute:expr,
     |$f:ident, $x:ident, $y:ident, $r:ident| $set:expr) => {
        pub(super) struct $name;
        impl Binary for $name {
            const WRITES: bool = $writes;
            #[inline(always)]
            fn compute<T: Int>($flags: &Flags, $a: u64, $b: u64) -> u64 {
                $compute
            }
            #[inline(always)]
            fn flags<T: Int>($f: &mut Flags, $x: u64, $y: u64, $r: u64) {
                $set
            }
        }
    };
}

binary!(Add, true, |_flags, a, b| a.wrapping_add(b), add);
binary!(Adc, true, |flags, a, b| a.wrapping_add(b).wrapping_add(u64::from(flags.cf())), add);
binary!(Sub, true, |_flags, a, b| a.wrapping_sub(b), sub);
binary!(Sbb, true, |flags, a, b| a.wrapping_sub(b).wrapping_sub(u64::from(flags.cf())), sub);
binary!(Cmp, false, |_flags, a, b| a.wrapping_sub(b), sub);
binary!(Or, true, |_flags, a, b| a | b, logic);
binary!(And, true, |_flags, a, b| a & b, logic);
binary!(Xor, true, |_flags, a, b| a ^ b, logic);
binary!(Test, false, |_flags, a, b| a & b, logic);

fn binary<O: Binary>(instruction: &Instruction) -> Option<Selected> {
    let size = size0(instruction);
    inner(match form(instruction) {
        Form::RR => sized!(size, binary_rr, O),
        Form::RI => sized!(size, binary_ri, O),
        Form::RM => sized!(size, binary_rm, O),
        Form::MR => sized!(size, binary_mr, O),
        Form::MI => sized!(size, binary_mi, O),
        _ => return None,
    })
}

#[inline(always)]
fn to_register<O: Binary, T: Int>(cpu: &mut Cpu, op: &Op, b: u64) {
    let a = T::get(cpu, op.dst);
    let result = O::compute::<T>(&cpu.flags, a, b);
    O::flags::<T>(&mut cpu.flags, a, b, result);
    if O::WRITES {
        T::set(cpu, op.dst, result);
    }
}

/// Where the second operand comes from, when the first is in memory.
trait Second {
    fn value<T: Int>(cpu: &Cpu, op: &Op) -> u64;
}

struct Register;
impl Second for Register {
    #[inline(always)]
    fn value<T: Int>(cpu: &Cpu, op: &Op) -> u64 {
        T::get(cpu, op.src)
    }
}

struct Immediate;
impl Second for Immediate {
    #[inline(always)]
    fn value<T: Int>(_: &Cpu, op: &Op) -> u64 {
        op.imm
    }
}

#[inline(always)]
fn to_memory<O: Binary, S: Second, T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    if O::WRITES {
        cpu.modify_operand::<T>(op, |cpu, op, a| {
            let (a, b) = (a.extend(), S::value::<T>(cpu, op));
            let result = O::compute::<T>(&cpu.flags, a, b);
            O::flags::<T>(&mut cpu.flags, a, b, result);
            T::truncate(result)
        })
    } else {
        cpu.load_operand::<T>(op, |cpu, op, a| {
            let (a, b) = (a.extend(), S::value::<T>(cpu, op));
            let result = O::compute::<T>(&cpu.flags, a, b);
            O::flags::<T>(&mut cpu.flags, a, b, result);
        })
    }
}

fn binary_rr<O: Binary, T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let b = T::get(cpu, op.src);
    to_register::<O, T>(cpu, op, b);
    Ok(())
}

fn binary_ri<O: Binary, T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    to_register::<O, T>(cpu, op, op.imm);
    Ok(())
}

fn binary_rm<O: Binary, T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.load_operand::<T>(op, |cpu, op, b| to_register::<O, T>(cpu, op, b.extend()))
}

fn binary_mr<O: Binary, T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    to_memory::<O, Register, T>(cpu, op)
}

fn binary_mi<O: Binary, T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    to_memory::<O, Immediate, T>(cpu, op)
}

/// An instruction with one operand.
trait Unary {
    fn compute<T: Int>(flags: &mut Flags, a: u64) -> u64;
}

macro_rules! unary {
    ($name:ident, |$flags:ident, $a:ident| $body:expr) => {
        struct $name;
        impl Unary for $name {
            #[inline(always)]
            fn compute<T: Int>($flags: &mut Flags, $a: u64) -> u64 {
                $body
            }
        }
    };
}

unary!(Inc, |flags, a| {
    let result = a.wrapping_add(1);
    flags.set_inc::<T>(a, result);
    result
});
unary!(Dec, |flags, a| {
    let result = a.wrapping_sub(1);
    flags.set_dec::<T>(a, result);
    result
});
unary!(Neg, |flags, a| {
    let result = a.wrapping_neg();
    flags.set_sub::<T>(0, a, result);
    result
});
unary!(Not, |_flags, a| !a);

fn unary<O: Unary>(instruction: &Instruction) -> Option<Selected> {
    let size = size0(instruction);
    inner(match form(instruction) {
        Form::R => sized!(size, unary_r, O),
        Form::M => sized!(size, unary_m, O),
        _ => return None,
    })
}

fn unary_r<O: Unary, T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let a = T::get(cpu, op.dst);
    let result = O::compute::<T>(&mut cpu.flags, a);
    T::set(cpu, op.dst, result);
    Ok(())
}

fn unary_m<O: Unary, T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.modify_operand::<T>(op, |cpu, _, a| {
        T::truncate(O::compute::<T>(&mut cpu.flags, a.extend()))
    })
}

fn xadd_r<T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let (a, b) = (T::get(cpu, op.dst), T::get(cpu, op.src));
    let result = a.wrapping_add(b);
    cpu.flags.set_add::<T>(a, b, result);
    T::set(cpu, op.src, a);
    T::set(cpu, op.dst, result);
    Ok(())
}

fn xadd_m<T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.modify_operand::<T>(op, |cpu, op, a| {
        let (a, b) = (a.extend(), T::get(cpu, op.src));
        let result = a.wrapping_add(b);
        cpu.flags.set_add::<T>(a, b, result);
        T::set(cpu, op.src, a);
        T::truncate(result)
    })
}

fn cmpxchg_r<T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let old = T::get(cpu, op.dst);
    let accumulator = T::get(cpu, RAX as u8);
    cpu.flags.set_sub::<T>(accumulator, old, accumulator.wrapping_sub(old));
    if accumulator == old {
        let new = T::get(cpu, op.src);
        T::set(cpu, op.dst, new);
    } else {
        // The destination is not written: a 32-bit one keeps its upper half, as on Intel's processors.
        T::set(cpu, RAX as u8, old);
    }
    Ok(())
}

fn cmpxchg_m<T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.modify_operand::<T>(op, |cpu, op, memory| {
        let old = memory.extend();
        let accumulator = T::get(cpu, RAX as u8);
        cpu.flags.set_sub::<T>(accumulator, old, accumulator.wrapping_sub(old));
        if accumulator == old {
            T::truncate(T::get(cpu, op.src))
        } else {
            T::set(cpu, RAX as u8, old);
            memory
        }
    })
}

fn cmpxchg8b(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.modify::<u64>(cpu.ea(op), |cpu, old| {
        let low = |cpu: &Cpu, register: usize| cpu.gpr[register] & 0xffff_ffff;
        let equal = old == low(cpu, RDX) << 32 | low(cpu, RAX);
        cpu.flags.set_zf(equal);
        if equal {
            low(cpu, RCX) << 32 | low(cpu, RBX)
        } else {
            cpu.gpr[RDX] = old >> 32;
            cpu.gpr[RAX] = old & 0xffff_ffff;
            old
        }
    })
}

fn cmpxchg16b(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let address = cpu.aligned_ea(op)?;
    cpu.modify::<u128>(address, |cpu, old| {
        let pair = |cpu: &Cpu, high: usize, low: usize| {
            u128::from(cpu.gpr[high]) << 64 | u128::from(cpu.gpr[low])
        };
        let equal = old == pair(cpu, RDX, RAX);
        cpu.flags.set_zf(equal);
        if equal {
            pair(cpu, RCX, RBX)
        } else {
            cpu.gpr[RDX] = (old >> 64) as u64;
            cpu.gpr[RAX] = old as u64;
            old
        }
    })
}
