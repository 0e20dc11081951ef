//! x87 loads, stores, exchanges and conditional moves.
//!
//! As in [`super::x87`], memory is stored to before the x87 changes: a page fault leaves no trace.

use iced_x86::{Code, Instruction};

use crate::soft::cpu::{Cpu, Trap};
use crate::soft::fpu::{F80, status};
use crate::soft::op::{Op, Selected, Word};
use crate::soft::x87::host::{self, Operation};
use crate::soft::x87::wide::Wide;

/// FLD m32, m64; FILD.
fn push_memory<O: Operation, T: Word + Into<u128>>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.require_x87()?;
    let linear = cpu.ea(op);
    let memory = cpu.load::<T>(linear)?.into();
    cpu.note_operand(op, linear);
    push_computed::<O>(cpu, memory);
    Ok(())
}

fn push_computed<O: Operation>(cpu: &mut Cpu, memory: u128) {
    if cpu.fpu.st(7).is_some() {
        if cpu.x87_overflow() {
            cpu.fpu.push(F80::INDEFINITE);
        }
        return;
    }
    let frame = cpu.x87_run::<O>(F80::ZERO, F80::ZERO, memory);
    cpu.x87_commit(frame.status);
    // A denormal is loaded even if its exception is not masked: the number is exact.
    if frame.status & !frame.control & status::IE == 0 {
        cpu.fpu.push(frame.st0);
    }
}

/// FLD1, FLDPI and so on.
fn push_constant<O: Operation>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.require_x87()?;
    cpu.note_instruction(op);
    push_computed::<O>(cpu, 0);
    Ok(())
}

/// The ten bytes at `linear`.
fn load_ten(cpu: &mut Cpu, linear: u64) -> Result<u128, Trap> {
    let low = cpu.load::<u64>(linear)?;
    let high = cpu.load::<u16>(linear.wrapping_add(8))?;
    Ok(u128::from(low) | u128::from(high) << 64)
}

fn store_ten(cpu: &mut Cpu, linear: u64, value: u128) -> Result<(), Trap> {
    cpu.probe_write(linear, 10)?;
    cpu.store::<u64>(linear, value as u64)?;
    cpu.store::<u16>(linear.wrapping_add(8), (value >> 64) as u16)
}

fn fld_m80(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.require_x87()?;
    let linear = cpu.ea(op);
    let value = load_ten(cpu, linear)?;
    cpu.note_operand(op, linear);
    cpu.x87_push(F80::from_bits(value), 0);
    Ok(())
}

/// FBLD: eighteen decimal digits and a sign. What a digit above nine means is left to the processor; here it is its
/// value.
fn fbld(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.require_x87()?;
    let linear = cpu.ea(op);
    let packed = load_ten(cpu, linear)?;
    cpu.note_operand(op, linear);
    let magnitude = (0..18).rev().fold(0, |sum, n| sum * 10 + (packed >> (4 * n) & 0xf) as i64);
    // At most 61 bits: exact.
    let (value, _) = Wide::from_integer(magnitude).round(false, cpu.fpu.control);
    cpu.x87_push(value.with_sign(packed >> 79 & 1 != 0), 0);
    Ok(())
}

fn fld_register(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.require_x87()?;
    cpu.note_instruction(op);
    match cpu.fpu.st(op.dst) {
        Some(value) => cpu.x87_push(value, 0),
        None => {
            if cpu.x87_underflow() {
                cpu.fpu.push(F80::INDEFINITE);
            }
        }
    }
    Ok(())
}

/// What to store, with the exceptions of converting it; `None` if an unmasked exception forbids the store.
fn to_store<O: Operation>(cpu: &Cpu) -> (Option<u128>, u16) {
    match cpu.fpu.st(0) {
        Some(value) => {
            let frame = cpu.x87_run::<O>(value, F80::ZERO, 0);
            ((!frame.store_suppressed()).then_some(frame.memory), frame.status)
        }
        None => {
            let masked = cpu.fpu.control & status::IE != 0;
            // The indefinite value in the format of the destination.
            let value = masked.then(|| cpu.x87_run::<O>(F80::INDEFINITE, F80::ZERO, 0).memory);
            (value, status::IE | status::SF)
        }
    }
}

/// FST, FIST, FISTTP.
fn store<O: Operation, T: Word, const POP: bool>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.require_x87()?;
    let linear = cpu.ea(op);
    let (value, raised) = to_store::<O>(cpu);
    if let Some(value) = value {
        cpu.store::<T>(linear, T::from_bytes(value.to_le_bytes()))?;
    }
    cpu.note_operand(op, linear);
    cpu.x87_commit(raised);
    if POP && value.is_some() {
        cpu.fpu.pop();
    }
    Ok(())
}

fn fbstp(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.require_x87()?;
    let linear = cpu.ea(op);
    let (value, raised) = to_store::<host::StoreBcd>(cpu);
    if let Some(value) = value {
        store_ten(cpu, linear, value)?;
    }
    cpu.note_operand(op, linear);
    cpu.x87_commit(raised);
    if value.is_some() {
        cpu.fpu.pop();
    }
    Ok(())
}

fn fstp_m80(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.require_x87()?;
    let linear = cpu.ea(op);
    let value = cpu.fpu.st(0);
    if value.is_some() || cpu.fpu.control & status::IE != 0 {
        store_ten(cpu, linear, value.unwrap_or(F80::INDEFINITE).to_bits())?;
    }
    cpu.note_operand(op, linear);
    match value {
        Some(_) => cpu.x87_commit(0),
        None if !cpu.x87_underflow() => return Ok(()),
        None => {}
    }
    cpu.fpu.pop();
    Ok(())
}

/// FST ST(i), FSTP ST(i).
fn store_register<const POP: bool>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.require_x87()?;
    cpu.note_instruction(op);
    let value = match cpu.fpu.st(0) {
        Some(value) => {
            cpu.x87_commit(0);
            value
        }
        None if cpu.x87_underflow() => F80::INDEFINITE,
        None => return Ok(()),
    };
    cpu.fpu.set_st(op.dst, value);
    if POP {
        cpu.fpu.pop();
    }
    Ok(())
}

/// FSTPNCE: FSTP that does not complain about an empty register.
fn fstpnce(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.require_x87()?;
    cpu.note_instruction(op);
    if let Some(value) = cpu.fpu.st(0) {
        cpu.fpu.set_st(op.dst, value);
    }
    cpu.fpu.pop();
    cpu.x87_commit(0);
    Ok(())
}

fn fxch(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.require_x87()?;
    cpu.note_instruction(op);
    let (a, b) = (cpu.fpu.st(0), cpu.fpu.st(op.src));
    if a.is_some() && b.is_some() {
        cpu.x87_commit(0);
    } else if !cpu.x87_underflow() {
        return Ok(());
    }
    cpu.fpu.set_st(op.src, a.unwrap_or(F80::INDEFINITE));
    cpu.fpu.set_st(0, b.unwrap_or(F80::INDEFINITE));
    Ok(())
}

/// FCMOVcc: `CONDITION` 0 to 3 is B, E, BE, U; 4 is added for the negations.
fn fcmov<const CONDITION: u8>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.require_x87()?;
    cpu.note_instruction(op);
    let (Some(_), Some(value)) = (cpu.fpu.st(0), cpu.fpu.st(op.src)) else {
        if cpu.x87_underflow() {
            cpu.fpu.set_st(0, F80::INDEFINITE);
        }
        return Ok(());
    };
    let condition = match CONDITION & 3 {
        0 => cpu.flags.cf(),
        1 => cpu.flags.zf(),
        2 => cpu.flags.cf() || cpu.flags.zf(),
        _ => cpu.flags.pf(),
    };
    if condition != (CONDITION & 4 != 0) {
        cpu.fpu.set_st(0, value);
    }
    Ok(())
}

/// The handler of an instruction of this group.
pub fn handler(instruction: &Instruction) -> Option<Selected> {
    memory(instruction).or_else(|| registers(instruction)).or_else(|| constants(instruction))
}

fn memory(instruction: &Instruction) -> Option<Selected> {
    use Code::*;
    Selected::inner(match instruction.code() {
        Fld_m32fp => push_memory::<host::LoadF32, u32>,
        Fld_m64fp => push_memory::<host::LoadF64, u64>,
        Fild_m16int => push_memory::<host::LoadI16, u16>,
        Fild_m32int => push_memory::<host::LoadI32, u32>,
        Fild_m64int => push_memory::<host::LoadI64, u64>,
        Fld_m80fp => fld_m80,
        Fbld_m80bcd => fbld,
        Fst_m32fp => store::<host::StoreF32, u32, false>,
        Fstp_m32fp => store::<host::StoreF32, u32, true>,
        Fst_m64fp => store::<host::StoreF64, u64, false>,
        Fstp_m64fp => store::<host::StoreF64, u64, true>,
        Fist_m16int => store::<host::StoreI16, u16, false>,
        Fistp_m16int => store::<host::StoreI16, u16, true>,
        Fist_m32int => store::<host::StoreI32, u32, false>,
        Fistp_m32int => store::<host::StoreI32, u32, true>,
        Fistp_m64int => store::<host::StoreI64, u64, true>,
        Fisttp_m16int => store::<host::TruncateI16, u16, true>,
        Fisttp_m32int => store::<host::TruncateI32, u32, true>,
        Fisttp_m64int => store::<host::TruncateI64, u64, true>,
        Fstp_m80fp => fstp_m80,
        Fbstp_m80bcd => fbstp,
        _ => return None,
    })
}

fn registers(instruction: &Instruction) -> Option<Selected> {
    use Code::*;
    Selected::inner(match instruction.code() {
        Fld_sti => fld_register,
        Fst_sti => store_register::<false>,
        Fstp_sti | Fstp_sti_DFD0 | Fstp_sti_DFD8 => store_register::<true>,
        Fstpnce_sti => fstpnce,
        Fxch_st0_sti | Fxch_st0_sti_DDC8 | Fxch_st0_sti_DFC8 => fxch,
        Fcmovb_st0_sti => fcmov::<0>,
        Fcmove_st0_sti => fcmov::<1>,
        Fcmovbe_st0_sti => fcmov::<2>,
        Fcmovu_st0_sti => fcmov::<3>,
        Fcmovnb_st0_sti => fcmov::<4>,
        Fcmovne_st0_sti => fcmov::<5>,
        Fcmovnbe_st0_sti => fcmov::<6>,
        Fcmovnu_st0_sti => fcmov::<7>,
        _ => return None,
    })
}

fn constants(instruction: &Instruction) -> Option<Selected> {
    use Code::*;
    Selected::inner(match instruction.code() {
        Fld1 => push_constant::<host::LoadOne>,
        Fldz => push_constant::<host::LoadZero>,
        Fldl2t => push_constant::<host::LoadL2t>,
        Fldl2e => push_constant::<host::LoadL2e>,
        Fldpi => push_constant::<host::LoadPi>,
        Fldlg2 => push_constant::<host::LoadLg2>,
        Fldln2 => push_constant::<host::LoadLn2>,
        _ => return None,
    })
}
