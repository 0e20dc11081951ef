//! CPUID, MSRs, time stamp counter, caches.

use crate::soft::cpu::{CR4_TSD, Cpu, RAX, RBX, RCX, RDX, Trap};
use crate::soft::cpuid;
use crate::soft::exception::INVALID_OPCODE;
use crate::soft::irqchip::lapic::BASE_ENABLE;
use crate::soft::op::Op;

/// CPUID.
pub(super) fn cpuid(cpu: &mut Cpu, _: &Op) -> Result<(), Trap> {
    let lapic = &cpu.irqchip.lapic;
    let answer = cpuid::cpuid(
        cpu.gpr[RAX] as u32,
        cpu.gpr[RCX] as u32,
        lapic.id(),
        lapic.base() & BASE_ENABLE != 0,
    );
    cpu.gpr[RAX] = u64::from(answer.eax);
    cpu.gpr[RBX] = u64::from(answer.ebx);
    cpu.gpr[RCX] = u64::from(answer.ecx);
    cpu.gpr[RDX] = u64::from(answer.edx);
    Ok(())
}

/// RDMSR.
pub(super) fn rdmsr(cpu: &mut Cpu, _: &Op) -> Result<(), Trap> {
    cpu.require_supervisor()?;
    let value = cpu.read_msr(cpu.gpr[RCX] as u32)?;
    set_edx_eax(cpu, value);
    Ok(())
}

/// WRMSR.
pub(super) fn wrmsr(cpu: &mut Cpu, _: &Op) -> Result<(), Trap> {
    cpu.require_supervisor()?;
    let value = cpu.gpr[RDX] << 32 | cpu.gpr[RAX] & 0xffff_ffff;
    cpu.attention = true;
    cpu.write_msr(cpu.gpr[RCX] as u32, value)
}

/// RDTSC.
pub(super) fn rdtsc(cpu: &mut Cpu, _: &Op) -> Result<(), Trap> {
    require_tsc(cpu)?;
    let tsc = cpu.tsc();
    set_edx_eax(cpu, tsc);
    Ok(())
}

/// RDTSCP.
pub(super) fn rdtscp(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    rdtsc(cpu, op)?;
    cpu.gpr[RCX] = u64::from(cpu.msrs.tsc_aux);
    Ok(())
}

fn require_tsc(cpu: &mut Cpu) -> Result<(), Trap> {
    if cpu.cr4 & CR4_TSD != 0 { cpu.require_supervisor() } else { Ok(()) }
}

fn set_edx_eax(cpu: &mut Cpu, value: u64) {
    cpu.gpr[RAX] = value & 0xffff_ffff;
    cpu.gpr[RDX] = value >> 32;
}

/// RDPMC: the CPU model has no performance counters, so every index is out of range.
pub(super) fn rdpmc(cpu: &mut Cpu, _: &Op) -> Result<(), Trap> {
    Err(cpu.gp(0))
}

/// WBINVD and INVD: no cache to write back.
pub(super) fn wbinvd(cpu: &mut Cpu, _: &Op) -> Result<(), Trap> {
    cpu.require_supervisor()
}

/// UD0, UD1 and UD2: raise #UD by purpose, so unlike unknown instructions they are not worth a log line.
pub(super) fn ud(cpu: &mut Cpu, _: &Op) -> Result<(), Trap> {
    Err(cpu.raise(INVALID_OPCODE, None))
}
