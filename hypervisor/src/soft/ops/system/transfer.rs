//! Far JMP, CALL and RET, and the return to another privilege level that IRET shares.

use crate::soft::cpu::{
    CS, Cpu, DS, ES, FS, GS, RSP, SEGMENT_BIG, SEGMENT_PRESENT, SS, Segment, Trap,
};
use crate::soft::descriptor::{Descriptor, SELECTOR_RPL};
use crate::soft::op::{Int, Op};
use crate::soft::paging::is_canonical;

/// JMP ptr16:16 and ptr16:32.
pub(super) fn jmp_immediate(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    jmp(cpu, (op.imm >> 32) as u16, op.imm & 0xffff_ffff)
}

/// JMP m16:16, m16:32 and m16:64.
pub(super) fn jmp_memory<T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let (selector, offset) = pointer::<T>(cpu, op)?;
    jmp(cpu, selector, offset)
}

/// CALL ptr16:16 and ptr16:32.
pub(super) fn call_immediate<T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    call::<T>(cpu, (op.imm >> 32) as u16, op.imm & 0xffff_ffff)
}

/// CALL m16:16, m16:32 and m16:64.
pub(super) fn call_memory<T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let (selector, offset) = pointer::<T>(cpu, op)?;
    call::<T>(cpu, selector, offset)
}

/// RETF, with or without bytes to release.
pub(super) fn ret<T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let size = T::BYTES as u64;
    let released = op.imm & 0xffff;
    let rip = cpu.peek::<T>(0)?;
    let selector = cpu.peek::<T>(size)? as u16;
    let mut back = Return::to(cpu, selector, rip)?;
    if back.outward(cpu) {
        let rsp = cpu.peek::<T>(2 * size + released)?;
        let stack_selector = cpu.peek::<T>(3 * size + released)? as u16;
        back.with_stack(cpu, stack_selector, rsp.wrapping_add(released))?;
    }
    back.commit(cpu, (2 * size + released) as i64);
    Ok(())
}

fn pointer<T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(u16, u64), Trap> {
    let address = cpu.ea(op);
    let offset = cpu.load::<T>(address)?.extend();
    let selector = cpu.load::<u16>(address.wrapping_add(T::BYTES as u64))?;
    Ok((selector, offset))
}

fn jmp(cpu: &mut Cpu, selector: u16, offset: u64) -> Result<(), Trap> {
    let code = target(cpu, selector, offset)?;
    enter(cpu, code, offset);
    Ok(())
}

fn call<T: Int>(cpu: &mut Cpu, selector: u16, offset: u64) -> Result<(), Trap> {
    let code = target(cpu, selector, offset)?;
    cpu.poke::<T>(1, u64::from(cpu.segments[CS].selector))?;
    cpu.poke::<T>(2, cpu.rip)?;
    cpu.move_stack(-2 * T::BYTES as i64);
    enter(cpu, code, offset);
    Ok(())
}

fn enter(cpu: &mut Cpu, code: Segment, offset: u64) {
    cpu.segments[CS] = code;
    cpu.rip = offset;
    cpu.recompute_mode();
}

/// The code segment a far jump or call leads to: of the same privilege, or conforming.
fn target(cpu: &mut Cpu, selector: u16, offset: u64) -> Result<Segment, Trap> {
    if selector & !SELECTOR_RPL == 0 {
        return Err(cpu.gp(0));
    }
    let code = u32::from(selector & !SELECTOR_RPL);
    let rpl = (selector & SELECTOR_RPL) as u8;
    let descriptor = match cpu.find_descriptor(selector)? {
        Some(descriptor) if is_executable(descriptor) => descriptor,
        _ => return Err(cpu.gp(code)),
    };
    let privileged = if descriptor.is_conforming() {
        descriptor.dpl() <= cpu.cpl
    } else {
        rpl <= cpu.cpl && descriptor.dpl() == cpu.cpl
    };
    if !privileged {
        return Err(cpu.gp(code));
    }
    if !descriptor.is_present() {
        return Err(cpu.np(code));
    }
    check_offset(cpu, descriptor, offset)?;
    let descriptor = cpu.mark_accessed(selector, descriptor)?;
    Ok(descriptor.segment(selector & !SELECTOR_RPL | u16::from(cpu.cpl)))
}

/// 64-bit code, or code for compatibility mode.
fn is_executable(descriptor: Descriptor) -> bool {
    descriptor.is_long_code() || descriptor.is_compatibility_code()
}

/// An instruction pointer must be canonical in 64-bit code, and within the limit in other code.
fn check_offset(cpu: &mut Cpu, descriptor: Descriptor, offset: u64) -> Result<(), Trap> {
    let reachable = if descriptor.is_long_code() {
        is_canonical(offset)
    } else {
        offset <= u64::from(descriptor.limit())
    };
    if reachable { Ok(()) } else { Err(cpu.gp(0)) }
}

/// A far return or IRET, checked and ready to be made.
pub(super) struct Return {
    rip: u64,
    code: Descriptor,
    segment: Segment,
    cpl: u8,
    /// SS and RSP, if they change.
    stack: Option<(Segment, u64)>,
}

impl Return {
    /// Checks the code segment returned to (SDM vol. 2, IRET and RET).
    pub(super) fn to(cpu: &mut Cpu, selector: u16, rip: u64) -> Result<Self, Trap> {
        if selector & !SELECTOR_RPL == 0 {
            return Err(cpu.gp(0));
        }
        let code = u32::from(selector & !SELECTOR_RPL);
        let rpl = (selector & SELECTOR_RPL) as u8;
        let descriptor = match cpu.find_descriptor(selector)? {
            Some(descriptor) if is_executable(descriptor) && rpl >= cpu.cpl => descriptor,
            _ => return Err(cpu.gp(code)),
        };
        let privileged = if descriptor.is_conforming() {
            descriptor.dpl() <= rpl
        } else {
            descriptor.dpl() == rpl
        };
        if !privileged {
            return Err(cpu.gp(code));
        }
        if !descriptor.is_present() {
            return Err(cpu.np(code));
        }
        check_offset(cpu, descriptor, rip)?;
        let descriptor = cpu.mark_accessed(selector, descriptor)?;
        let segment = descriptor.segment(selector);
        Ok(Self { rip, code: descriptor, segment, cpl: rpl, stack: None })
    }

    /// Whether this goes to a less privileged level.
    pub(super) fn outward(&self, cpu: &Cpu) -> bool {
        self.cpl > cpu.cpl
    }

    /// Checks the stack returned to.
    pub(super) fn with_stack(
        &mut self,
        cpu: &mut Cpu,
        selector: u16,
        rsp: u64,
    ) -> Result<(), Trap> {
        if selector & !SELECTOR_RPL == 0 {
            if !self.code.is_long_code() || self.cpl == 3 {
                return Err(cpu.gp(0));
            }
            self.stack = Some((Segment { selector, ..Segment::default() }, rsp));
            return Ok(());
        }
        let code = u32::from(selector & !SELECTOR_RPL);
        let rpl = (selector & SELECTOR_RPL) as u8;
        let descriptor = match cpu.find_descriptor(selector)? {
            Some(descriptor)
                if rpl == self.cpl && descriptor.is_writable() && descriptor.dpl() == self.cpl =>
            {
                descriptor
            }
            _ => return Err(cpu.gp(code)),
        };
        if !descriptor.is_present() {
            return Err(cpu.ss(code));
        }
        let descriptor = cpu.mark_accessed(selector, descriptor)?;
        self.stack = Some((descriptor.segment(selector), rsp));
        Ok(())
    }

    /// Makes the return; `released` bytes leave the stack if it stays the same.
    pub(super) fn commit(self, cpu: &mut Cpu, released: i64) {
        let outward = self.outward(cpu);
        match self.stack {
            Some((segment, rsp)) => {
                // To a 16-bit stack only SP is returned.
                let only_sp = !self.code.is_long_code() && segment.attributes & SEGMENT_BIG == 0;
                let mask = if only_sp { 0xffff } else { u64::MAX };
                cpu.gpr[RSP] = cpu.gpr[RSP] & !mask | rsp & mask;
                cpu.segments[SS] = segment;
            }
            None => cpu.move_stack(released),
        }
        cpu.segments[CS] = self.segment;
        cpu.cpl = self.cpl;
        cpu.rip = self.rip;
        if outward {
            for index in [ES, DS, FS, GS] {
                drop_privileged(&mut cpu.segments[index], self.cpl);
            }
        }
        cpu.recompute_mode();
    }
}

/// A data segment the new privilege level may not use becomes null. The base stays: 64-bit code uses that of FS and
/// GS whatever the selector.
fn drop_privileged(segment: &mut Segment, cpl: u8) {
    let descriptor = Descriptor(u64::from(segment.attributes) << 40);
    let loaded = segment.attributes & SEGMENT_PRESENT != 0;
    if loaded && !descriptor.is_conforming() && descriptor.dpl() < cpl {
        *segment = Segment { base: segment.base, ..Segment::default() };
    }
}
