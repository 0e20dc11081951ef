//! Software interrupts, IRET, SYSCALL and SYSRET.

use super::control::privileged_flags;
use super::transfer::Return;
use crate::soft::cpu::{CS, Cpu, EFER_SCE, RCX, SS, Segment, Trap};
use crate::soft::exception::{BREAKPOINT, DEBUG, OVERFLOW};
use crate::soft::flags::{self, ARITHMETIC, DF, FIXED, ID, IF, IOPL, NT, RF, TF, VM};
use crate::soft::op::{Int, Op};
use crate::soft::paging::is_canonical;

/// Number of R11 in [`Cpu::gpr`].
const R11: usize = 11;

/// Attributes of the flat segments SYSCALL and SYSRET load without looking at a descriptor: present, accessed.
const CODE_64: u16 = 0xa09b;
const CODE_32: u16 = 0xc09b;
const DATA: u16 = 0xc093;
/// Attribute bits of DPL 3.
const DPL_3: u16 = 3 << 5;

/// INT n.
pub(super) fn int(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.software_interrupt(op.imm as u8)
}

/// INT3.
pub(super) fn int3(cpu: &mut Cpu, _: &Op) -> Result<(), Trap> {
    cpu.software_interrupt(BREAKPOINT)
}

/// INTO.
pub(super) fn into(cpu: &mut Cpu, _: &Op) -> Result<(), Trap> {
    if cpu.flags.of() { cpu.software_interrupt(OVERFLOW) } else { Ok(()) }
}

/// INT1.
pub(super) fn int1(cpu: &mut Cpu, _: &Op) -> Result<(), Trap> {
    cpu.privileged_software_interrupt(DEBUG)
}

/// IRET with operand size `T`.
///
/// RF is not restored: it suppresses an instruction breakpoint, and there are none.
pub(super) fn iret<T: Int>(cpu: &mut Cpu, _: &Op) -> Result<(), Trap> {
    if cpu.flags.system & NT != 0 {
        // Task switches do not exist in long mode.
        return Err(cpu.gp(0));
    }
    let size = T::BYTES as u64;
    let rip = cpu.peek::<T>(0)?;
    let selector = cpu.peek::<T>(size)? as u16;
    let image = cpu.peek::<T>(2 * size)?;
    let mask = ARITHMETIC | TF | DF | NT | flags::AC | ID | privileged_flags(cpu);
    let mut back = Return::to(cpu, selector, rip)?;
    if cpu.long_mode() || back.outward(cpu) {
        let rsp = cpu.peek::<T>(3 * size)?;
        let stack_selector = cpu.peek::<T>(4 * size)? as u16;
        back.with_stack(cpu, stack_selector, rsp)?;
    }
    back.commit(cpu, 3 * size as i64);
    cpu.change_flags(image, T::zero_extend(mask));
    cpu.irqchip.unblock_nmi();
    cpu.attention = true;
    Ok(())
}

/// SYSCALL. On Intel processors it exists in 64-bit mode only.
pub(super) fn syscall(cpu: &mut Cpu, _: &Op) -> Result<(), Trap> {
    if !cpu.long_mode() || cpu.efer & EFER_SCE == 0 {
        return Err(cpu.ud());
    }
    let rflags = cpu.flags.read();
    cpu.gpr[RCX] = cpu.rip;
    cpu.gpr[R11] = rflags;
    cpu.rip = cpu.msrs.lstar;
    let selector = (cpu.msrs.star >> 32) as u16 & !3;
    cpu.segments[CS] = flat(selector, CODE_64);
    cpu.segments[SS] = flat(selector.wrapping_add(8), DATA);
    cpu.cpl = 0;
    cpu.flags.write(rflags & !(cpu.msrs.fmask | RF) | FIXED);
    cpu.recompute_mode();
    Ok(())
}

/// SYSRET to 64-bit (`T` = u64) or compatibility mode.
pub(super) fn sysret<T: Int>(cpu: &mut Cpu, _: &Op) -> Result<(), Trap> {
    if !cpu.long_mode() || cpu.efer & EFER_SCE == 0 {
        return Err(cpu.ud());
    }
    cpu.require_supervisor()?;
    let rip = T::get(cpu, RCX as u8);
    if !is_canonical(rip) {
        return Err(cpu.gp(0));
    }
    let base = (cpu.msrs.star >> 48) as u16;
    let (selector, code) =
        if T::BITS == 64 { (base.wrapping_add(16), CODE_64) } else { (base, CODE_32) };
    cpu.rip = rip;
    cpu.segments[CS] = flat(selector | 3, code | DPL_3);
    cpu.segments[SS] = flat(base.wrapping_add(8) | 3, DATA | DPL_3);
    cpu.cpl = 3;
    let kept = ARITHMETIC | TF | IF | DF | IOPL | NT | flags::AC | ID;
    cpu.flags.write(cpu.gpr[R11] & kept & !(RF | VM) | FIXED);
    cpu.recompute_mode();
    cpu.attention = true;
    Ok(())
}

fn flat(selector: u16, attributes: u16) -> Segment {
    Segment { base: 0, limit: u32::MAX, selector, attributes }
}
