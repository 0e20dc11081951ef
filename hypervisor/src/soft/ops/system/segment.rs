//! Segment registers and the FS and GS bases.

use super::{read_u16, slot, write_u16};
use crate::soft::cpu::{CR4_FSGSBASE, CS, Cpu, GS, SS, Segment, Trap};
use crate::soft::descriptor::{Descriptor, SELECTOR_RPL};
use crate::soft::op::{Int, Op};
use crate::soft::paging::is_canonical;

/// MOV from a segment register.
pub(super) fn mov_from_segment<T: Int, const MEMORY: bool>(
    cpu: &mut Cpu,
    op: &Op,
) -> Result<(), Trap> {
    match cpu.segments[..=GS].get(usize::from(op.src)) {
        Some(segment) => write_u16::<T, MEMORY>(cpu, op, segment.selector),
        None => Err(cpu.ud()),
    }
}

/// MOV to a segment register.
pub(super) fn mov_to_segment<const MEMORY: bool>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let index = usize::from(op.dst);
    if index == CS || index > GS {
        return Err(cpu.ud());
    }
    let selector = read_u16::<MEMORY>(cpu, op, op.src)?;
    load(cpu, index, selector)
}

/// PUSH of a segment register, zero-extended.
pub(super) fn push_segment<T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let selector = cpu.segments[usize::from(op.dst).min(GS)].selector;
    cpu.poke::<T>(1, u64::from(selector))?;
    cpu.move_stack(-slot::<T>());
    Ok(())
}

/// POP of a segment register.
pub(super) fn pop_segment<T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let selector = cpu.peek::<T>(0)? as u16;
    // The width of the stack is that before SS changed.
    let mask = cpu.stack_mask();
    load(cpu, usize::from(op.dst).min(GS), selector)?;
    let rsp = &mut cpu.gpr[crate::soft::cpu::RSP];
    *rsp = *rsp & !mask & 0xffff_ffff | rsp.wrapping_add_signed(slot::<T>()) & mask;
    Ok(())
}

/// LDS, LES, LFS, LGS, LSS: the offset is first in memory, the selector behind it.
pub(super) fn load_far<T: Int, const SEGMENT: usize>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let address = cpu.ea(op);
    let offset = cpu.load::<T>(address)?.extend();
    let selector = cpu.load::<u16>(address.wrapping_add(T::BYTES as u64))?;
    load(cpu, SEGMENT, selector)?;
    T::set(cpu, op.dst, offset);
    Ok(())
}

/// Loads a segment register other than CS, with the checks of SDM vol. 2, MOV.
fn load(cpu: &mut Cpu, index: usize, selector: u16) -> Result<(), Trap> {
    let rpl = (selector & SELECTOR_RPL) as u8;
    if selector & !SELECTOR_RPL == 0 {
        // A null SS is for 64-bit code outside CPL 3 only.
        if index == SS && (!cpu.long_mode() || cpu.cpl == 3 || rpl != cpu.cpl) {
            return Err(cpu.gp(0));
        }
        cpu.segments[index] = Segment { selector, ..Segment::default() };
    } else {
        let code = u32::from(selector & !SELECTOR_RPL);
        let descriptor = match cpu.find_descriptor(selector)? {
            Some(descriptor) if may_load(cpu, index, rpl, descriptor) => descriptor,
            _ => return Err(cpu.gp(code)),
        };
        if !descriptor.is_present() {
            return Err(if index == SS { cpu.ss(code) } else { cpu.np(code) });
        }
        let descriptor = cpu.mark_accessed(selector, descriptor)?;
        cpu.segments[index] = descriptor.segment(selector);
    }
    if index == SS {
        // No interrupt before the stack pointer is loaded as well.
        cpu.interrupt_shadow = true;
        cpu.attention = true;
        cpu.recompute_mode();
    }
    Ok(())
}

fn may_load(cpu: &Cpu, index: usize, rpl: u8, descriptor: Descriptor) -> bool {
    if index == SS {
        return descriptor.is_writable() && rpl == cpu.cpl && descriptor.dpl() == cpu.cpl;
    }
    descriptor.is_readable() && (descriptor.is_conforming() || rpl.max(cpu.cpl) <= descriptor.dpl())
}

/// SWAPGS.
pub(super) fn swapgs(cpu: &mut Cpu, _: &Op) -> Result<(), Trap> {
    if !cpu.long_mode() {
        return Err(cpu.ud());
    }
    cpu.require_supervisor()?;
    std::mem::swap(&mut cpu.segments[GS].base, &mut cpu.msrs.kernel_gs_base);
    Ok(())
}

/// RDFSBASE and RDGSBASE.
pub(super) fn read_base<T: Int, const SEGMENT: usize>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    require_base_access(cpu)?;
    T::set(cpu, op.dst, cpu.segments[SEGMENT].base);
    Ok(())
}

/// WRFSBASE and WRGSBASE.
pub(super) fn write_base<T: Int, const SEGMENT: usize>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    require_base_access(cpu)?;
    let base = T::get(cpu, op.dst);
    if !is_canonical(base) {
        return Err(cpu.gp(0));
    }
    cpu.segments[SEGMENT].base = base;
    Ok(())
}

fn require_base_access(cpu: &mut Cpu) -> Result<(), Trap> {
    if cpu.long_mode() && cpu.cr4 & CR4_FSGSBASE != 0 { Ok(()) } else { Err(cpu.ud()) }
}
