//! Near branches: Jcc, JMP, CALL, RET, LOOP, JRCXZ, with 64-bit targets and, in compatibility mode, 32-bit ones.

use iced_x86::{Code, Instruction, Mnemonic, OpKind};

use super::integer::{conditional, size0, sized};
use super::stack::{push, stack_pointer};
use crate::soft::cpu::{Cpu, RCX, RSP, Trap};
use crate::soft::flags::Flags;
use crate::soft::op::{Handler, Int, Op, REG_BLOCK, Selected};
use crate::soft::paging::is_canonical;

pub(super) fn handler(instruction: &Instruction) -> Option<Selected> {
    use Mnemonic as M;
    let size = size0(instruction);
    let handler: Handler = match instruction.mnemonic() {
        M::Jo
        | M::Jno
        | M::Jb
        | M::Jae
        | M::Je
        | M::Jne
        | M::Jbe
        | M::Ja
        | M::Js
        | M::Jns
        | M::Jp
        | M::Jnp
        | M::Jl
        | M::Jge
        | M::Jle
        | M::Jg => {
            conditional!(instruction.condition_code() as u8 - 1, jcc)
        }
        M::Jmp => match instruction.op0_kind() {
            OpKind::NearBranch32 | OpKind::NearBranch64 => jmp,
            OpKind::Register => sized!(size, jmp_r),
            OpKind::Memory if matches!(instruction.code(), Code::Jmp_rm32 | Code::Jmp_rm64) => {
                sized!(size, jmp_m)
            }
            _ => return None,
        },
        M::Call => match instruction.op0_kind() {
            OpKind::NearBranch32 => call_32,
            OpKind::NearBranch64 => call,
            OpKind::Register if size == 8 => call_r64,
            OpKind::Register => sized!(size, call_r),
            OpKind::Memory if matches!(instruction.code(), Code::Call_rm32 | Code::Call_rm64) => {
                sized!(size, call_m)
            }
            _ => return None,
        },
        M::Ret => match instruction.code() {
            Code::Retnq => ret::<u64>,
            Code::Retnd => ret::<u32>,
            Code::Retnq_imm16 => ret_imm::<u64>,
            Code::Retnd_imm16 => ret_imm::<u32>,
            _ => return None,
        },
        M::Loop => counted(instruction, loop_::<u64>, loop_::<u32>),
        M::Loope => counted(instruction, loope::<u64>, loope::<u32>),
        M::Loopne => counted(instruction, loopne::<u64>, loopne::<u32>),
        M::Jrcxz => jrcxz,
        M::Jecxz => jecxz,
        _ => return None,
    };
    Selected::last(handler)
}

/// Evaluates a condition code, numbered as in opcodes.
#[inline(always)]
pub(super) fn condition<const C: u8>(flags: &Flags) -> bool {
    let base = match C >> 1 {
        0 => flags.of(),
        1 => flags.cf(),
        2 => flags.zf(),
        3 => flags.cf() | flags.zf(),
        4 => flags.sf(),
        5 => flags.pf(),
        6 => flags.less(),
        _ => flags.less() | flags.zf(),
    };
    base != (C & 1 != 0)
}

#[inline(always)]
fn branch(cpu: &mut Cpu, op: &Op) {
    cpu.rip = cpu.gpr[usize::from(REG_BLOCK)].wrapping_add(op.imm);
}

/// Goes to an address that came from a register or memory. The fault of an address that is not canonical is this
/// instruction's.
#[inline(always)]
fn branch_to(cpu: &mut Cpu, target: u64) -> Result<(), Trap> {
    if !is_canonical(target) {
        return Err(cpu.gp(0));
    }
    cpu.rip = target;
    Ok(())
}

fn jcc<const C: u8>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    if condition::<C>(&cpu.flags) {
        branch(cpu, op);
    }
    Ok(())
}

fn jmp(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    branch(cpu, op);
    Ok(())
}

fn jmp_r<T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let target = T::get(cpu, op.dst);
    branch_to(cpu, target)
}

fn jmp_m<T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let target = cpu.load::<T>(cpu.ea(op))?.extend();
    branch_to(cpu, target)
}

fn call(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.push_then(op, cpu.rip, branch)
}

fn call_32(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    push::<u32>(cpu, cpu.rip)?;
    branch(cpu, op);
    Ok(())
}

fn call_to<T: Int>(cpu: &mut Cpu, target: u64) -> Result<(), Trap> {
    if !is_canonical(target) {
        return Err(cpu.gp(0));
    }
    push::<T>(cpu, cpu.rip)?;
    cpu.rip = target;
    Ok(())
}

fn call_r64(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let target = u64::get(cpu, op.dst);
    if !is_canonical(target) {
        return Err(cpu.gp(0));
    }
    cpu.push_then(op, cpu.rip, move |cpu, _| cpu.rip = target)
}

fn call_r<T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let target = T::get(cpu, op.dst);
    call_to::<T>(cpu, target)
}

fn call_m<T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let target = cpu.load::<T>(cpu.ea(op))?.extend();
    call_to::<T>(cpu, target)
}

#[inline(always)]
fn return_by<T: Int>(cpu: &mut Cpu, target: T, bytes: u64) -> Result<(), Trap> {
    branch_to(cpu, target.extend())?;
    let rsp = cpu.gpr[RSP].wrapping_add(T::BYTES as u64 + bytes);
    cpu.gpr[RSP] = stack_pointer::<T>(rsp);
    Ok(())
}

fn ret<T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.load_then::<T>(op, cpu.gpr[RSP], |cpu, _, target| return_by(cpu, target, 0))
}

fn ret_imm<T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let rsp = cpu.gpr[RSP];
    cpu.load_then::<T>(op, rsp, |cpu, op, target| return_by(cpu, target, op.imm & 0xffff))
}

/// The instance for the size of the counter.
fn counted(instruction: &Instruction, rcx: Handler, ecx: Handler) -> Handler {
    match instruction.code() {
        Code::Loop_rel8_64_ECX
        | Code::Loope_rel8_64_ECX
        | Code::Loopne_rel8_64_ECX
        | Code::Loop_rel8_32_ECX
        | Code::Loope_rel8_32_ECX
        | Code::Loopne_rel8_32_ECX => ecx,
        _ => rcx,
    }
}

/// Counts RCX (or ECX) down; whether it is not zero then.
#[inline(always)]
fn count_down<T: Int>(cpu: &mut Cpu) -> bool {
    let left = T::zero_extend(T::get(cpu, RCX as u8).wrapping_sub(1));
    T::set(cpu, RCX as u8, left);
    left != 0
}

fn loop_<T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    if count_down::<T>(cpu) {
        branch(cpu, op);
    }
    Ok(())
}

fn loope<T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    if count_down::<T>(cpu) && cpu.flags.zf() {
        branch(cpu, op);
    }
    Ok(())
}

fn loopne<T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    if count_down::<T>(cpu) && !cpu.flags.zf() {
        branch(cpu, op);
    }
    Ok(())
}

fn jrcxz(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    if cpu.gpr[RCX] == 0 {
        branch(cpu, op);
    }
    Ok(())
}

fn jecxz(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    if cpu.gpr[RCX] as u32 == 0 {
        branch(cpu, op);
    }
    Ok(())
}
