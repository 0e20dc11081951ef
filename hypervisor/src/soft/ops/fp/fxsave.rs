//! FXSAVE and FXRSTOR, LDMXCSR and STMXCSR.

use iced_x86::{Code, Instruction};

use crate::soft::cpu::{Cpu, Trap, TrapKind};
use crate::soft::fpu::MXCSR_MASK;
use crate::soft::op::{Op, Selected};
use crate::soft::paging::is_canonical;

/// Where the XMM registers are in the image.
const XMM_AT: u64 = 160;
const MXCSR_AT: u64 = 24;
/// Bytes of the image; those behind the XMM registers belong to software and are not written.
const IMAGE_BYTES: usize = 512;

/// XMM registers the image holds: outside 64-bit mode only eight are reachable.
fn xmm_registers(cpu: &Cpu) -> usize {
    if cpu.long_mode() { 16 } else { 8 }
}

/// The address of the image, which must be aligned. One that is not canonical raises what it would raise anyway.
fn image_address(cpu: &mut Cpu, op: &Op) -> Result<u64, Trap> {
    let linear = cpu.ea(op);
    if !is_canonical(linear) {
        cpu.trap = TrapKind::NonCanonical;
        return Err(Trap);
    }
    cpu.aligned_ea(op)
}

fn fxsave<const WIDE: bool>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.require_x87_unwaiting()?;
    let linear = image_address(cpu, op)?;
    // All or nothing: a fault in the middle would leave half an image.
    cpu.probe_write(linear, IMAGE_BYTES)?;
    let image = cpu.fpu.fxsave(cpu.mxcsr, WIDE);
    for (at, bytes) in (linear..).step_by(16).zip(image.chunks_exact(16)) {
        let mut value = [0; 16];
        value.copy_from_slice(bytes);
        cpu.store::<u128>(at, u128::from_le_bytes(value))?;
    }
    for (register, at) in (0..xmm_registers(cpu)).zip((linear + XMM_AT..).step_by(16)) {
        cpu.store::<u128>(at, cpu.xmm[register])?;
    }
    Ok(())
}

fn fxrstor<const WIDE: bool>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.require_x87_unwaiting()?;
    let linear = image_address(cpu, op)?;
    let mut image = [0; 160];
    for (at, bytes) in (linear..).step_by(16).zip(image.chunks_exact_mut(16)) {
        bytes.copy_from_slice(&cpu.load::<u128>(at)?.to_le_bytes());
    }
    let mut xmm = [0; 16];
    let registers = xmm_registers(cpu);
    for (register, at) in xmm[..registers].iter_mut().zip((linear + XMM_AT..).step_by(16)) {
        *register = cpu.load::<u128>(at)?;
    }
    // The rest is not used, but has to be readable.
    cpu.load::<u128>(linear + IMAGE_BYTES as u64 - 16)?;
    let mxcsr = cpu.load::<u32>(linear + MXCSR_AT)?;
    if mxcsr & !MXCSR_MASK != 0 {
        return Err(cpu.gp(0));
    }
    cpu.mxcsr = mxcsr;
    cpu.fpu.fxrstor(&image, WIDE);
    cpu.xmm[..registers].copy_from_slice(&xmm[..registers]);
    Ok(())
}

fn ldmxcsr(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.require_sse()?;
    let mxcsr = cpu.load::<u32>(cpu.ea(op))?;
    if mxcsr & !MXCSR_MASK != 0 {
        return Err(cpu.gp(0));
    }
    cpu.mxcsr = mxcsr;
    Ok(())
}

fn stmxcsr(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.require_sse()?;
    cpu.store::<u32>(cpu.ea(op), cpu.mxcsr)
}

/// The handler of an instruction of this group.
pub fn handler(instruction: &Instruction) -> Option<Selected> {
    match instruction.code() {
        Code::Fxsave_m512byte => Selected::inner(fxsave::<false>),
        Code::Fxsave64_m512byte => Selected::inner(fxsave::<true>),
        Code::Fxrstor_m512byte => Selected::inner(fxrstor::<false>),
        Code::Fxrstor64_m512byte => Selected::inner(fxrstor::<true>),
        Code::Ldmxcsr_m32 => Selected::inner(ldmxcsr),
        Code::Stmxcsr_m32 => Selected::inner(stmxcsr),
        _ => None,
    }
}
