//! Instructions that 64-bit mode has dropped, for 32-bit programs in compatibility mode.

use iced_x86::{Code, Instruction};

use super::system::slot;
use crate::soft::cpu::{Cpu, RAX, RSP, Trap};
use crate::soft::exception::BOUND_RANGE;
use crate::soft::flags::Flags;
use crate::soft::op::{Int, Op, Selected};

/// The handler of an instruction of this group. The decoder knows which of them a mode has.
pub fn handler(instruction: &Instruction) -> Option<Selected> {
    Selected::inner(match instruction.code() {
        Code::Pushaw => push_all::<u16>,
        Code::Pushad => push_all::<u32>,
        Code::Popaw => pop_all::<u16>,
        Code::Popad => pop_all::<u32>,
        Code::Daa => daa,
        Code::Das => das,
        Code::Aaa => aaa,
        Code::Aas => aas,
        Code::Aam_imm8 => aam,
        Code::Aad_imm8 => aad,
        Code::Salc => salc,
        Code::Bound_r16_m1616 => bound::<u16>,
        Code::Bound_r32_m3232 => bound::<u32>,
        _ => return None,
    })
}

fn push_all<T: Int>(cpu: &mut Cpu, _: &Op) -> Result<(), Trap> {
    for register in 0..8u8 {
        let value = T::get(cpu, register);
        cpu.poke::<T>(u64::from(register) + 1, value)?;
    }
    cpu.move_stack(-8 * slot::<T>());
    Ok(())
}

fn pop_all<T: Int>(cpu: &mut Cpu, _: &Op) -> Result<(), Trap> {
    let mut values = [0; 8];
    for (number, value) in values.iter_mut().enumerate() {
        *value = cpu.peek::<T>(number as u64 * T::BYTES as u64)?;
    }
    for (register, value) in (0..8u8).rev().zip(values) {
        if usize::from(register) != RSP {
            T::set(cpu, register, value);
        }
    }
    cpu.move_stack(8 * slot::<T>());
    Ok(())
}

fn al(cpu: &Cpu) -> u8 {
    cpu.gpr[RAX] as u8
}

fn ax(cpu: &Cpu) -> u16 {
    cpu.gpr[RAX] as u16
}

/// SF, ZF and PF from AL; CF and AF as given; OF, which the manual leaves undefined, clear.
fn set_decimal_flags(flags: &mut Flags, al: u8, carry: bool, adjust: bool) {
    let even = al.count_ones() & 1 == 0;
    flags.set_explicit(carry, even, adjust, al == 0, al & 0x80 != 0, false);
}

/// DAA and DAS share the question whether each digit needs adjustment (Intel SDM vol. 2).
fn decimal(cpu: &mut Cpu, adjust: fn(u8, u8) -> u8, borrows: fn(u8) -> bool) -> Result<(), Trap> {
    let old = al(cpu);
    let old_carry = cpu.flags.cf();
    let mut value = old;
    let mut carry = false;
    let low = old & 0xf > 9 || cpu.flags.af();
    if low {
        carry = old_carry || borrows(old);
        value = adjust(value, 6);
    }
    let high = old > 0x99 || old_carry;
    if high {
        value = adjust(value, 0x60);
        carry = true;
    }
    u8::set(cpu, RAX as u8, u64::from(value));
    set_decimal_flags(&mut cpu.flags, value, carry, low);
    Ok(())
}

fn daa(cpu: &mut Cpu, _: &Op) -> Result<(), Trap> {
    // A carry out of the low digit alone shows in CF only if the high one is adjusted as well.
    decimal(cpu, u8::wrapping_add, |_| false)
}

fn das(cpu: &mut Cpu, _: &Op) -> Result<(), Trap> {
    decimal(cpu, u8::wrapping_sub, |al| al < 6)
}

/// AAA and AAS.
fn ascii(cpu: &mut Cpu, adjust: fn(u16, u16) -> u16) -> Result<(), Trap> {
    let needed = al(cpu) & 0xf > 9 || cpu.flags.af();
    let value = if needed { adjust(ax(cpu), 0x106) } else { ax(cpu) };
    u16::set(cpu, RAX as u8, u64::from(value & 0xff0f));
    set_decimal_flags(&mut cpu.flags, value as u8 & 0xf, needed, needed);
    Ok(())
}

fn aaa(cpu: &mut Cpu, _: &Op) -> Result<(), Trap> {
    ascii(cpu, u16::wrapping_add)
}

fn aas(cpu: &mut Cpu, _: &Op) -> Result<(), Trap> {
    ascii(cpu, u16::wrapping_sub)
}

fn aam(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let base = op.imm as u8;
    if base == 0 {
        return Err(cpu.de());
    }
    let value = al(cpu);
    let digits = u16::from(value / base) << 8 | u16::from(value % base);
    u16::set(cpu, RAX as u8, u64::from(digits));
    set_decimal_flags(&mut cpu.flags, digits as u8, false, false);
    Ok(())
}

fn aad(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let [low, high] = ax(cpu).to_le_bytes();
    let value = low.wrapping_add(high.wrapping_mul(op.imm as u8));
    u16::set(cpu, RAX as u8, u64::from(value));
    set_decimal_flags(&mut cpu.flags, value, false, false);
    Ok(())
}

/// SALC: AL becomes all ones or zero, by CF.
fn salc(cpu: &mut Cpu, _: &Op) -> Result<(), Trap> {
    let value = if cpu.flags.cf() { 0xff } else { 0 };
    u8::set(cpu, RAX as u8, value);
    Ok(())
}

fn bound<T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let address = cpu.ea(op);
    let lower = cpu.load::<T>(address)?.extend();
    let upper = cpu.load::<T>(address.wrapping_add(T::BYTES as u64))?.extend();
    let signed = |value| T::sign_extend(value) as i64;
    let index = signed(T::get(cpu, op.dst));
    if index < signed(lower) || index > signed(upper) {
        return Err(cpu.raise(BOUND_RANGE, None));
    }
    Ok(())
}
