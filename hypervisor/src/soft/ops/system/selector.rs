//! Descriptor tables, task register, and the instructions that look at a descriptor without loading it.

use super::{read_u16, write_u16};
use crate::soft::cpu::{Cpu, Segment, TableRegister, Trap};
use crate::soft::descriptor::{Descriptor, SELECTOR_LDT, SELECTOR_RPL};
use crate::soft::op::{Int, Op};
use crate::soft::paging::is_canonical;

/// System descriptor type: LDT.
const KIND_LDT: u8 = 2;
/// System descriptor type: 64-bit TSS, available.
const KIND_TSS: u8 = 9;
/// System descriptor type: 64-bit TSS, busy.
const KIND_BUSY_TSS: u8 = 11;
/// System descriptor type: 64-bit call gate.
const KIND_CALL_GATE: u8 = 12;
/// The type bit that makes a TSS busy.
const BUSY: u16 = 2;

/// What LAR leaves in the destination: bits 8 to 23 of the descriptor's second word.
const ACCESS_RIGHTS: u64 = 0x00ff_ff00;

/// SGDT.
pub(super) fn sgdt<T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    store_table::<T>(cpu, op, cpu.gdtr)
}

/// SIDT.
pub(super) fn sidt<T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    store_table::<T>(cpu, op, cpu.idtr)
}

fn store_table<T: Int>(cpu: &mut Cpu, op: &Op, table: TableRegister) -> Result<(), Trap> {
    let address = cpu.ea(op);
    cpu.probe_write(address, 2 + T::BYTES)?;
    cpu.store::<u16>(address, table.limit)?;
    cpu.store::<T>(address.wrapping_add(2), T::truncate(table.base))
}

/// LGDT.
pub(super) fn lgdt<T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.gdtr = load_table::<T>(cpu, op)?;
    Ok(())
}

/// LIDT.
pub(super) fn lidt<T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.idtr = load_table::<T>(cpu, op)?;
    Ok(())
}

fn load_table<T: Int>(cpu: &mut Cpu, op: &Op) -> Result<TableRegister, Trap> {
    cpu.require_supervisor()?;
    let address = cpu.ea(op);
    let limit = cpu.load::<u16>(address)?;
    let base = cpu.load::<T>(address.wrapping_add(2))?.extend();
    if !is_canonical(base) {
        return Err(cpu.gp(0));
    }
    Ok(TableRegister { base, limit })
}

/// SLDT.
pub(super) fn sldt<T: Int, const MEMORY: bool>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    write_u16::<T, MEMORY>(cpu, op, cpu.ldtr.selector)
}

/// STR.
pub(super) fn str<T: Int, const MEMORY: bool>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    write_u16::<T, MEMORY>(cpu, op, cpu.tr.selector)
}

/// LLDT.
pub(super) fn lldt<const MEMORY: bool>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.require_supervisor()?;
    let selector = read_u16::<MEMORY>(cpu, op, op.dst)?;
    cpu.ldtr = if selector & !SELECTOR_RPL == 0 {
        Segment { selector, ..Segment::default() }
    } else {
        load_system_segment(cpu, selector, KIND_LDT)?.1
    };
    Ok(())
}

/// LTR: marks the TSS busy.
pub(super) fn ltr<const MEMORY: bool>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.require_supervisor()?;
    let selector = read_u16::<MEMORY>(cpu, op, op.dst)?;
    if selector & !SELECTOR_RPL == 0 {
        return Err(cpu.gp(0));
    }
    let (descriptor, segment) = load_system_segment(cpu, selector, KIND_TSS)?;
    let busy = cpu.set_type_bits(selector, descriptor, BUSY)?;
    cpu.tr = Segment { attributes: busy.attributes(), ..segment };
    Ok(())
}

fn load_system_segment(
    cpu: &mut Cpu,
    selector: u16,
    kind: u8,
) -> Result<(Descriptor, Segment), Trap> {
    let code = u32::from(selector & !SELECTOR_RPL);
    if selector & SELECTOR_LDT != 0 {
        return Err(cpu.gp(code));
    }
    let (descriptor, base) = match cpu.find_system_descriptor(selector)? {
        Some((descriptor, base)) if descriptor.system_kind() == Some(kind) => (descriptor, base),
        _ => return Err(cpu.gp(code)),
    };
    if !descriptor.is_present() {
        return Err(cpu.np(code));
    }
    if !is_canonical(base) {
        return Err(cpu.gp(code));
    }
    Ok((descriptor, Segment { base, ..descriptor.segment(selector) }))
}

/// LAR.
pub(super) fn lar<T: Int, const MEMORY: bool>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let selector = read_u16::<MEMORY>(cpu, op, op.src)?;
    let kinds = [KIND_LDT, KIND_TSS, KIND_BUSY_TSS, KIND_CALL_GATE];
    let found = visible(cpu, selector, &kinds)?;
    cpu.flags.set_zf(found.is_some());
    if let Some(descriptor) = found {
        T::set(cpu, op.dst, (descriptor.0 >> 32) & ACCESS_RIGHTS);
    }
    Ok(())
}

/// LSL.
pub(super) fn lsl<T: Int, const MEMORY: bool>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let selector = read_u16::<MEMORY>(cpu, op, op.src)?;
    let found = visible(cpu, selector, &[KIND_LDT, KIND_TSS, KIND_BUSY_TSS])?;
    cpu.flags.set_zf(found.is_some());
    if let Some(descriptor) = found {
        T::set(cpu, op.dst, u64::from(descriptor.limit()));
    }
    Ok(())
}

/// VERR.
pub(super) fn verr<const MEMORY: bool>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    verify::<MEMORY>(cpu, op, Descriptor::is_readable)
}

/// VERW.
pub(super) fn verw<const MEMORY: bool>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    verify::<MEMORY>(cpu, op, Descriptor::is_writable)
}

fn verify<const MEMORY: bool>(
    cpu: &mut Cpu,
    op: &Op,
    usable: fn(Descriptor) -> bool,
) -> Result<(), Trap> {
    let selector = read_u16::<MEMORY>(cpu, op, op.dst)?;
    let found = visible(cpu, selector, &[])?;
    cpu.flags.set_zf(found.is_some_and(usable));
    Ok(())
}

/// The descriptor, if `selector` may see it: code, data, or a system descriptor of one of `kinds`, with enough
/// privilege.
fn visible(cpu: &mut Cpu, selector: u16, kinds: &[u8]) -> Result<Option<Descriptor>, Trap> {
    if selector & !SELECTOR_RPL == 0 {
        return Ok(None);
    }
    let Some(descriptor) = cpu.find_descriptor(selector)? else {
        return Ok(None);
    };
    let right_kind = descriptor.system_kind().is_none_or(|kind| kinds.contains(&kind));
    let rpl = (selector & SELECTOR_RPL) as u8;
    let privileged = descriptor.is_conforming() || rpl.max(cpu.cpl) <= descriptor.dpl();
    Ok((right_kind && privileged).then_some(descriptor))
}
