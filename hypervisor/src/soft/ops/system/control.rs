//! RFLAGS, control registers, debug registers, HLT, INVLPG.

use super::{read_u16, slot, write_u16};
use crate::soft::cpu::{
    CR0_AM, CR0_CD, CR0_EM, CR0_ET, CR0_MP, CR0_NE, CR0_NW, CR0_PE, CR0_PG, CR0_TS, CR0_WP, CR4_DE,
    CR4_FSGSBASE, CR4_MCE, CR4_OSFXSR, CR4_OSXMMEXCPT, CR4_PAE, CR4_PCE, CR4_PGE, CR4_PSE,
    CR4_SMAP, CR4_SMEP, CR4_TSD, Cpu, Trap,
};
use crate::soft::exception::DEBUG;
use crate::soft::flags::{self, ARITHMETIC, DF, ID, IF, IOPL, NT, RF, TF, VM};
use crate::soft::op::{Int, Op};
use crate::soft::paging::PHYSICAL_ADDRESS_BITS;

const CR0_KNOWN: u64 = CR0_PE
    | CR0_MP
    | CR0_EM
    | CR0_TS
    | CR0_ET
    | CR0_NE
    | CR0_WP
    | CR0_AM
    | CR0_NW
    | CR0_CD
    | CR0_PG;
const CR4_KNOWN: u64 = CR4_TSD
    | CR4_DE
    | CR4_PSE
    | CR4_PAE
    | CR4_MCE
    | CR4_PGE
    | CR4_PCE
    | CR4_OSFXSR
    | CR4_OSXMMEXCPT
    | CR4_FSGSBASE
    | CR4_SMEP
    | CR4_SMAP;
/// Bits of CR4 that translations depend on.
const CR4_TRANSLATION: u64 = CR4_PSE | CR4_PAE | CR4_PGE | CR4_SMEP | CR4_SMAP;

const DR6_FIXED: u64 = 0xffff_0ff0;
const DR6_WRITABLE: u64 = 0xe00f;
/// DR6.BD: a debug register was accessed while DR7.GD was set.
const DR6_BD: u64 = 1 << 13;
const DR7_FIXED: u64 = 1 << 10;
const DR7_WRITABLE: u64 = 0xffff_23ff;
/// DR7.GD.
const DR7_GD: u64 = 1 << 13;

/// What POPF may change at every privilege level.
const POPF_USER: u64 = ARITHMETIC | TF | DF | NT | flags::AC | ID;

/// PUSHF.
pub(super) fn pushf<T: Int>(cpu: &mut Cpu, _: &Op) -> Result<(), Trap> {
    let image = cpu.flags.read() & !(VM | RF);
    cpu.poke::<T>(1, image)?;
    cpu.move_stack(-slot::<T>());
    Ok(())
}

/// POPF.
pub(super) fn popf<T: Int>(cpu: &mut Cpu, _: &Op) -> Result<(), Trap> {
    let image = cpu.peek::<T>(0)?;
    cpu.move_stack(slot::<T>());
    let mask = POPF_USER | privileged_flags(cpu);
    cpu.change_flags(image, T::zero_extend(mask));
    cpu.attention = true;
    Ok(())
}

/// The flags POPF and IRET may change only at some privilege levels (SDM vol. 2, POPF).
pub(super) fn privileged_flags(cpu: &Cpu) -> u64 {
    let iopl = if cpu.cpl == 0 { IOPL } else { 0 };
    let interrupt = if may_change_interrupts(cpu) { IF } else { 0 };
    iopl | interrupt
}

fn may_change_interrupts(cpu: &Cpu) -> bool {
    u64::from(cpu.cpl) <= (cpu.flags.system & IOPL) >> 12
}

/// CLI.
pub(super) fn cli(cpu: &mut Cpu, _: &Op) -> Result<(), Trap> {
    if !may_change_interrupts(cpu) {
        return Err(cpu.gp(0));
    }
    cpu.flags.system &= !IF;
    Ok(())
}

/// STI. Interrupts are possible only after the next instruction, if they were not before.
pub(super) fn sti(cpu: &mut Cpu, _: &Op) -> Result<(), Trap> {
    if !may_change_interrupts(cpu) {
        return Err(cpu.gp(0));
    }
    if cpu.flags.system & IF == 0 {
        cpu.flags.system |= IF;
        cpu.interrupt_shadow = true;
    }
    cpu.attention = true;
    Ok(())
}

/// STAC.
pub(super) fn stac(cpu: &mut Cpu, _: &Op) -> Result<(), Trap> {
    set_access_control(cpu, flags::AC)
}

/// CLAC.
pub(super) fn clac(cpu: &mut Cpu, _: &Op) -> Result<(), Trap> {
    set_access_control(cpu, 0)
}

fn set_access_control(cpu: &mut Cpu, value: u64) -> Result<(), Trap> {
    if cpu.cpl != 0 {
        return Err(cpu.ud());
    }
    cpu.flags.system = cpu.flags.system & !flags::AC | value;
    cpu.recompute_mode();
    Ok(())
}

/// CLTS.
pub(super) fn clts(cpu: &mut Cpu, _: &Op) -> Result<(), Trap> {
    cpu.require_supervisor()?;
    cpu.cr0 &= !CR0_TS;
    Ok(())
}

/// HLT.
pub(super) fn hlt(cpu: &mut Cpu, _: &Op) -> Result<(), Trap> {
    cpu.require_supervisor()?;
    cpu.halted = true;
    cpu.attention = true;
    Ok(())
}

/// INVLPG.
pub(super) fn invlpg(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.require_supervisor()?;
    let address = cpu.ea(op);
    cpu.invalidate_page(address);
    Ok(())
}

/// MOV from a control register.
pub(super) fn mov_from_cr(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    if !matches!(op.src, 0 | 2 | 3 | 4 | 8) {
        return Err(cpu.ud());
    }
    cpu.require_supervisor()?;
    let value = match op.src {
        0 => cpu.cr0,
        2 => cpu.cr2,
        3 => cpu.cr3,
        4 => cpu.cr4,
        _ => cpu.irqchip.lapic.cr8(),
    };
    cpu.gpr[usize::from(op.dst & 15)] = value;
    Ok(())
}

/// MOV to a control register.
pub(super) fn mov_to_cr(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    if !matches!(op.dst, 0 | 2 | 3 | 4 | 8) {
        return Err(cpu.ud());
    }
    cpu.require_supervisor()?;
    let value = operand(cpu, op.src);
    cpu.attention = true;
    match op.dst {
        0 => write_cr0(cpu, value),
        2 => {
            cpu.cr2 = value;
            Ok(())
        }
        3 => write_cr3(cpu, value),
        4 => write_cr4(cpu, value),
        _ if value > 0xf => Err(cpu.gp(0)),
        _ => {
            cpu.irqchip.lapic.set_cr8(value);
            Ok(())
        }
    }
}

/// The register operand of a MOV to a control or debug register: 64 bits, of which compatibility mode has 32.
fn operand(cpu: &Cpu, register: u8) -> u64 {
    let value = cpu.gpr[usize::from(register & 15)];
    if cpu.long_mode() { value } else { value & 0xffff_ffff }
}

fn write_cr0(cpu: &mut Cpu, value: u64) -> Result<(), Trap> {
    let bad_combination = value & (CR0_NW | CR0_CD) == CR0_NW || value >> 32 != 0;
    // The CPU model has no modes but long mode, so paging and protection stay on.
    let leaves_long_mode = value & (CR0_PG | CR0_PE) != CR0_PG | CR0_PE;
    if bad_combination || leaves_long_mode {
        return Err(cpu.gp(0));
    }
    let changed = cpu.cr0 ^ value;
    cpu.cr0 = value & CR0_KNOWN | CR0_ET;
    if changed & CR0_WP != 0 {
        cpu.flush_tlb(false);
    }
    cpu.recompute_mode();
    Ok(())
}

fn write_cr3(cpu: &mut Cpu, value: u64) -> Result<(), Trap> {
    if value >> PHYSICAL_ADDRESS_BITS != 0 {
        return Err(cpu.gp(0));
    }
    cpu.cr3 = value;
    cpu.flush_tlb(cpu.cr4 & CR4_PGE != 0);
    Ok(())
}

fn write_cr4(cpu: &mut Cpu, value: u64) -> Result<(), Trap> {
    // Long mode needs PAE.
    if value & !CR4_KNOWN != 0 || value & CR4_PAE == 0 {
        return Err(cpu.gp(0));
    }
    let changed = cpu.cr4 ^ value;
    cpu.cr4 = value;
    if changed & CR4_TRANSLATION != 0 {
        cpu.flush_tlb(false);
    }
    cpu.recompute_mode();
    Ok(())
}

/// SMSW.
pub(super) fn smsw<T: Int, const MEMORY: bool>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    if MEMORY {
        return write_u16::<T, MEMORY>(cpu, op, cpu.cr0 as u16);
    }
    // Into a register goes as much of CR0 as fits.
    T::set(cpu, op.dst, cpu.cr0);
    Ok(())
}

/// LMSW: sets the low four bits of CR0, of which PE cannot be cleared.
pub(super) fn lmsw<const MEMORY: bool>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.require_supervisor()?;
    let value = u64::from(read_u16::<MEMORY>(cpu, op, op.dst)?);
    let changeable = CR0_MP | CR0_EM | CR0_TS;
    cpu.cr0 = cpu.cr0 & !changeable | value & changeable;
    cpu.recompute_mode();
    Ok(())
}

/// MOV from a debug register.
pub(super) fn mov_from_dr(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let register = debug_register(cpu, op.src)?;
    cpu.gpr[usize::from(op.dst & 15)] = match register {
        6 => cpu.dr[6] & DR6_WRITABLE | DR6_FIXED,
        7 => cpu.dr[7] | DR7_FIXED,
        other => cpu.dr[other],
    };
    Ok(())
}

/// MOV to a debug register. The registers hold what is written; breakpoints in them never match, which is as if the
/// condition never came true.
pub(super) fn mov_to_dr(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let register = debug_register(cpu, op.dst)?;
    let value = operand(cpu, op.src);
    if register >= 6 && value >> 32 != 0 {
        return Err(cpu.gp(0));
    }
    cpu.dr[register] = match register {
        6 => value & DR6_WRITABLE,
        7 => value & DR7_WRITABLE,
        _ => value,
    };
    Ok(())
}

/// Which debug register an access is for; the checks of SDM vol. 2, MOV (debug registers).
fn debug_register(cpu: &mut Cpu, number: u8) -> Result<usize, Trap> {
    let register = match number {
        4 | 5 if cpu.cr4 & CR4_DE != 0 => return Err(cpu.ud()),
        4 | 5 => number + 2,
        0..=7 => number,
        _ => return Err(cpu.ud()),
    };
    cpu.require_supervisor()?;
    if cpu.dr[7] & DR7_GD != 0 {
        cpu.dr[7] &= !DR7_GD;
        cpu.dr[6] |= DR6_BD;
        return Err(cpu.raise(DEBUG, None));
    }
    Ok(usize::from(register))
}
