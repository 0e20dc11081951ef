//! IN, OUT, INS, OUTS: ports of devices.

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::integer::sized;
use crate::soft::cpu::{Cpu, RAX, RCX, RDI, RDX, RSI, Trap};
use crate::soft::flags::IOPL;
use crate::soft::op::{ADDRESS_32, Int, Op, Selected};

pub(super) fn handler(instruction: &Instruction) -> Option<Selected> {
    use Mnemonic as M;
    let immediate = |operand: u32| instruction.op_kind(operand) == OpKind::Immediate8;
    let rep = instruction.has_rep_prefix() || instruction.has_repne_prefix();
    Selected::last(match instruction.mnemonic() {
        M::In => {
            let size = instruction.op0_register().size();
            if immediate(1) { sized!(size, in_i) } else { sized!(size, in_dx) }
        }
        M::Out => {
            let size = instruction.op1_register().size();
            if immediate(0) { sized!(size, out_i) } else { sized!(size, out_dx) }
        }
        M::Insb | M::Insw | M::Insd => {
            let size = instruction.memory_size().size();
            if rep { sized!(size, rep_ins) } else { sized!(size, ins) }
        }
        M::Outsb | M::Outsw | M::Outsd => {
            let size = instruction.memory_size().size();
            if rep { sized!(size, rep_outs) } else { sized!(size, outs) }
        }
        _ => return None,
    })
}

/// Checks the privilege to use `len` ports from `port` (Intel SDM vol. 1, 19.5).
fn check(cpu: &mut Cpu, port: u16, len: usize) -> Result<(), Trap> {
    if u64::from(cpu.cpl) <= (cpu.flags.system & IOPL) >> 12 {
        return Ok(());
    }
    /// Offset of the I/O map's base in a TSS.
    const MAP_BASE: u64 = 102;
    let limit = u64::from(cpu.tr.limit);
    if limit < MAP_BASE + 1 {
        return Err(cpu.gp(0));
    }
    let map = u64::from(cpu.load_system::<u16>(cpu.tr.base.wrapping_add(MAP_BASE))?);
    let byte = map + u64::from(port / 8);
    if byte + 1 > limit {
        return Err(cpu.gp(0));
    }
    let bits = cpu.load_system::<u16>(cpu.tr.base.wrapping_add(byte))? >> (port % 8);
    if bits & ((1 << len) - 1) != 0 {
        return Err(cpu.gp(0));
    }
    Ok(())
}

fn read<T: Int>(cpu: &mut Cpu, port: u16) -> T {
    let mut bytes = [0; 16];
    let data = &mut bytes[..T::BYTES];
    data.fill(0xff);
    cpu.with_bus(|bus, cx| bus.pio_read(port, data, cx));
    T::from_bytes(bytes)
}

fn write<T: Int>(cpu: &mut Cpu, port: u16, value: T) {
    let bytes = value.to_bytes();
    cpu.with_bus(|bus, cx| bus.pio_write(port, &bytes[..T::BYTES], cx));
}

fn input<T: Int>(cpu: &mut Cpu, port: u16) -> Result<(), Trap> {
    check(cpu, port, T::BYTES)?;
    let value = read::<T>(cpu, port);
    T::set(cpu, RAX as u8, value.extend());
    Ok(())
}

fn output<T: Int>(cpu: &mut Cpu, port: u16) -> Result<(), Trap> {
    check(cpu, port, T::BYTES)?;
    let value = T::truncate(cpu.gpr[RAX]);
    write::<T>(cpu, port, value);
    Ok(())
}

fn in_i<T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    input::<T>(cpu, op.imm as u16 & 0xff)
}

fn in_dx<T: Int>(cpu: &mut Cpu, _: &Op) -> Result<(), Trap> {
    input::<T>(cpu, cpu.gpr[RDX] as u16)
}

fn out_i<T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    output::<T>(cpu, op.imm as u16 & 0xff)
}

fn out_dx<T: Int>(cpu: &mut Cpu, _: &Op) -> Result<(), Trap> {
    output::<T>(cpu, cpu.gpr[RDX] as u16)
}

fn masked(op: &Op, value: u64) -> u64 {
    if op.segment & ADDRESS_32 == 0 { value } else { value & 0xffff_ffff }
}

fn advance<T: Int>(cpu: &mut Cpu, op: &Op, register: usize) {
    let step = T::BYTES as u64;
    let value = cpu.gpr[register];
    let value = if cpu.flags.df() { value.wrapping_sub(step) } else { value.wrapping_add(step) };
    cpu.gpr[register] = masked(op, value);
}

fn ins<T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let port = cpu.gpr[RDX] as u16;
    check(cpu, port, T::BYTES)?;
    let to = masked(op, cpu.gpr[RDI]);
    // The port must not be read if the store fails afterwards.
    cpu.probe_write(to, T::BYTES)?;
    let value = read::<T>(cpu, port);
    cpu.store::<T>(to, value)?;
    advance::<T>(cpu, op, RDI);
    Ok(())
}

fn outs<T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let port = cpu.gpr[RDX] as u16;
    check(cpu, port, T::BYTES)?;
    let from = cpu.linear(op, masked(op, cpu.gpr[RSI]));
    let value = cpu.load::<T>(from)?;
    write::<T>(cpu, port, value);
    advance::<T>(cpu, op, RSI);
    Ok(())
}

/// One iteration; RIP stays at the instruction until RCX is zero.
fn repeat(cpu: &mut Cpu, op: &Op, step: fn(&mut Cpu, &Op) -> Result<(), Trap>) -> Result<(), Trap> {
    let count = masked(op, cpu.gpr[RCX]);
    if count == 0 {
        return Ok(());
    }
    step(cpu, op)?;
    cpu.gpr[RCX] = count - 1;
    if count > 1 {
        cpu.rip = cpu.rip.wrapping_sub(u64::from(op.len));
    }
    Ok(())
}

fn rep_ins<T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    repeat(cpu, op, ins::<T>)
}

fn rep_outs<T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    repeat(cpu, op, outs::<T>)
}
