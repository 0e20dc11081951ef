//! x87 instructions that handle state rather than numbers: control and status words, environment,
//! tags, WAIT, EMMS.

use iced_x86::{Code, Instruction};

use crate::soft::cpu::{CR0_MP, CR0_TS, Cpu, RAX, Trap};
use crate::soft::fpu::ImageWidth::{Dword, Word};
use crate::soft::fpu::{ImageWidth, status};
use crate::soft::op::{Int, Op, Selected};

/// Bytes of the register part of an FNSAVE image.
const STACK_BYTES: usize = 80;

fn fnstcw(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.require_x87_unwaiting()?;
    cpu.store::<u16>(cpu.ea(op), cpu.fpu.control)
}

fn fldcw(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.require_x87()?;
    let word = cpu.load::<u16>(cpu.ea(op))?;
    cpu.fpu.set_control(word);
    Ok(())
}

fn fnstsw_memory(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.require_x87_unwaiting()?;
    cpu.store::<u16>(cpu.ea(op), cpu.fpu.status_word())
}

fn fnstsw_ax(cpu: &mut Cpu, _: &Op) -> Result<(), Trap> {
    cpu.require_x87_unwaiting()?;
    let word = cpu.fpu.status_word();
    u16::set(cpu, RAX as u8, word.into());
    Ok(())
}

fn fnclex(cpu: &mut Cpu, _: &Op) -> Result<(), Trap> {
    cpu.require_x87_unwaiting()?;
    cpu.fpu.status &= status::CONDITIONS;
    Ok(())
}

fn fninit(cpu: &mut Cpu, _: &Op) -> Result<(), Trap> {
    cpu.require_x87_unwaiting()?;
    cpu.fpu.init();
    Ok(())
}

/// FNENI, FNDISI, FNSETPM: without effect since the 80387.
fn nothing_unwaiting(cpu: &mut Cpu, _: &Op) -> Result<(), Trap> {
    cpu.require_x87_unwaiting()
}

fn fnop(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.require_x87()?;
    cpu.note_instruction(op);
    Ok(())
}

/// WAIT heeds CR0.TS only together with CR0.MP.
fn wait(cpu: &mut Cpu, _: &Op) -> Result<(), Trap> {
    if cpu.cr0 & (CR0_MP | CR0_TS) == CR0_MP | CR0_TS {
        return Err(cpu.nm());
    }
    if cpu.fpu.pending() {
        return Err(cpu.mf());
    }
    Ok(())
}

fn emms(cpu: &mut Cpu, _: &Op) -> Result<(), Trap> {
    cpu.require_mmx()?;
    cpu.fpu.enter_mmx();
    cpu.fpu.valid = 0;
    Ok(())
}

fn turn_stack<const BY: u8>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.require_x87()?;
    cpu.note_instruction(op);
    cpu.fpu.top = cpu.fpu.top.wrapping_add(BY) & 7;
    cpu.fpu.status &= !status::C1;
    Ok(())
}

fn ffree<const POP: bool>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.require_x87()?;
    cpu.note_instruction(op);
    cpu.fpu.free(op.dst);
    cpu.fpu.status &= !status::C1;
    if POP {
        cpu.fpu.pop();
    }
    Ok(())
}

/// Stores `bytes`, all or nothing.
fn store_bytes(cpu: &mut Cpu, linear: u64, bytes: &[u8]) -> Result<(), Trap> {
    cpu.probe_write(linear, bytes.len())?;
    for (at, pair) in (0..).step_by(2).zip(bytes.chunks_exact(2)) {
        cpu.store::<u16>(linear.wrapping_add(at), u16::from_le_bytes([pair[0], pair[1]]))?;
    }
    Ok(())
}

fn load_bytes(cpu: &mut Cpu, linear: u64, bytes: &mut [u8]) -> Result<(), Trap> {
    for (at, pair) in (0..).step_by(2).zip(bytes.chunks_exact_mut(2)) {
        pair.copy_from_slice(&cpu.load::<u16>(linear.wrapping_add(at))?.to_le_bytes());
    }
    Ok(())
}

fn fnstenv(cpu: &mut Cpu, op: &Op, width: ImageWidth) -> Result<(), Trap> {
    cpu.require_x87_unwaiting()?;
    let image = cpu.fpu.environment(width);
    store_bytes(cpu, cpu.ea(op), &image[..width.environment_bytes()])?;
    cpu.fpu.control |= status::EXCEPTIONS;
    Ok(())
}

fn fldenv(cpu: &mut Cpu, op: &Op, width: ImageWidth) -> Result<(), Trap> {
    cpu.require_x87()?;
    let mut image = [0; 28];
    load_bytes(cpu, cpu.ea(op), &mut image[..width.environment_bytes()])?;
    cpu.fpu.load_environment(width, &image);
    Ok(())
}

fn fnsave(cpu: &mut Cpu, op: &Op, width: ImageWidth) -> Result<(), Trap> {
    cpu.require_x87_unwaiting()?;
    let linear = cpu.ea(op);
    let environment = width.environment_bytes();
    let mut image = [0; 28 + STACK_BYTES];
    image[..environment].copy_from_slice(&cpu.fpu.environment(width)[..environment]);
    image[environment..environment + STACK_BYTES].copy_from_slice(&cpu.fpu.stack_image());
    store_bytes(cpu, linear, &image[..environment + STACK_BYTES])?;
    cpu.fpu.init();
    Ok(())
}

fn frstor(cpu: &mut Cpu, op: &Op, width: ImageWidth) -> Result<(), Trap> {
    cpu.require_x87()?;
    let linear = cpu.ea(op);
    let mut environment = [0; 28];
    load_bytes(cpu, linear, &mut environment[..width.environment_bytes()])?;
    let mut stack = [0; STACK_BYTES];
    load_bytes(cpu, linear.wrapping_add(width.environment_bytes() as u64), &mut stack)?;
    cpu.fpu.load_environment(width, &environment);
    cpu.fpu.load_stack_image(&stack);
    Ok(())
}

/// The handler of an instruction of this group.
pub fn handler(instruction: &Instruction) -> Option<Selected> {
    use Code::*;
    Selected::inner(match instruction.code() {
        Wait => wait,
        Fnstcw_m2byte => fnstcw,
        Fldcw_m2byte => fldcw,
        Fnstsw_m2byte => fnstsw_memory,
        Fnstsw_AX => fnstsw_ax,
        Fnclex => fnclex,
        Fninit => fninit,
        Fneni | Fndisi | Fnsetpm => nothing_unwaiting,
        Fnop => fnop,
        Emms => emms,
        Fincstp => turn_stack::<1>,
        Fdecstp => turn_stack::<7>,
        Ffree_sti => ffree::<false>,
        Ffreep_sti => ffree::<true>,
        Fnstenv_m14byte => |cpu, op| fnstenv(cpu, op, Word),
        Fnstenv_m28byte => |cpu, op| fnstenv(cpu, op, Dword),
        Fldenv_m14byte => |cpu, op| fldenv(cpu, op, Word),
        Fldenv_m28byte => |cpu, op| fldenv(cpu, op, Dword),
        Fnsave_m94byte => |cpu, op| fnsave(cpu, op, Word),
        Fnsave_m108byte => |cpu, op| fnsave(cpu, op, Dword),
        Frstor_m94byte => |cpu, op| frstor(cpu, op, Word),
        Frstor_m108byte => |cpu, op| frstor(cpu, op, Dword),
        _ => return None,
    })
}

impl Cpu {
    /// Remembers the address of an x87 instruction, and of its memory operand if it has one.
    #[inline(always)]
    pub fn note_instruction(&mut self, op: &Op) {
        let block = self.gpr[usize::from(crate::soft::op::REG_BLOCK)];
        self.fpu.last_instruction = block.wrapping_add(op.offset.into());
    }
}
