//! MOV, MOVZX, MOVSX, LEA, XCHG, CMOVcc, SETcc, BSWAP, XLAT, the sign extensions of the accumulator, and instructions that
//! set single flags.

use iced_x86::{Code, Instruction, Mnemonic, OpKind};

use super::control::condition;
use super::integer::{Form, conditional, form, inner, size, size0, sized};
use crate::soft::cpu::{Cpu, RAX, RBX, RDX, Trap};
use crate::soft::flags::{self, DF};
use crate::soft::op::{HIGH_BYTE, Handler, Int, Op, Selected};

pub(super) fn handler(instruction: &Instruction) -> Option<Selected> {
    use Mnemonic as M;
    let size0 = size0(instruction);
    let form = form(instruction);
    let handler: Handler = match instruction.mnemonic() {
        M::Mov => match instruction.code() {
            Code::Mov_AL_moffs8
            | Code::Mov_AX_moffs16
            | Code::Mov_EAX_moffs32
            | Code::Mov_RAX_moffs64 => sized!(size0, mov_from_absolute),
            Code::Mov_moffs8_AL
            | Code::Mov_moffs16_AX
            | Code::Mov_moffs32_EAX
            | Code::Mov_moffs64_RAX => sized!(size0, mov_to_absolute),
            _ => match form {
                Form::RR => sized!(size0, mov_rr),
                Form::RI => sized!(size0, mov_ri),
                Form::RM => sized!(size0, mov_rm),
                Form::MR => sized!(size0, mov_mr),
                Form::MI => sized!(size0, mov_mi),
                _ => return None,
            },
        },
        M::Movzx => match (form, size(instruction, 1)) {
            (Form::RR, 1) => sized!(size0, movzx_r, u8),
            (Form::RR, _) => sized!(size0, movzx_r, u16),
            (_, 1) => sized!(size0, movzx_m, u8),
            _ => sized!(size0, movzx_m, u16),
        },
        M::Movsx | M::Movsxd => match (form, size(instruction, 1)) {
            (Form::RR, 1) => sized!(size0, movsx_r, u8),
            (Form::RR, 2) => sized!(size0, movsx_r, u16),
            (Form::RR, _) => sized!(size0, movsx_r, u32),
            (_, 1) => sized!(size0, movsx_m, u8),
            (_, 2) => sized!(size0, movsx_m, u16),
            _ => sized!(size0, movsx_m, u32),
        },
        M::Lea => sized!(size0, lea),
        M::Xchg => match form {
            Form::RR => sized!(size0, xchg_rr),
            Form::MR => sized!(size0, xchg_mr),
            Form::RM => sized!(size0, xchg_rm),
            _ => return None,
        },
        M::Bswap => match size0 {
            8 => bswap64,
            4 => bswap32,
            _ => bswap16,
        },
        M::Xlatb => xlat,
        M::Cbw => cbw,
        M::Cwde => cwde,
        M::Cdqe => cdqe,
        M::Cwd => cwd,
        M::Cdq => cdq,
        M::Cqo => cqo,
        M::Clc => clc,
        M::Stc => stc,
        M::Cmc => cmc,
        M::Cld => cld,
        M::Std => std,
        M::Lahf => lahf,
        M::Sahf => sahf,
        M::Cmovo
        | M::Cmovno
        | M::Cmovb
        | M::Cmovae
        | M::Cmove
        | M::Cmovne
        | M::Cmovbe
        | M::Cmova
        | M::Cmovs
        | M::Cmovns
        | M::Cmovp
        | M::Cmovnp
        | M::Cmovl
        | M::Cmovge
        | M::Cmovle
        | M::Cmovg => {
            let code = instruction.condition_code() as u8 - 1;
            match (instruction.op1_kind() == OpKind::Memory, size0) {
                (false, 2) => conditional!(code, cmov_r, u16),
                (false, 4) => conditional!(code, cmov_r, u32),
                (false, _) => conditional!(code, cmov_r, u64),
                (true, 2) => conditional!(code, cmov_m, u16),
                (true, 4) => conditional!(code, cmov_m, u32),
                (true, _) => conditional!(code, cmov_m, u64),
            }
        }
        M::Seto
        | M::Setno
        | M::Setb
        | M::Setae
        | M::Sete
        | M::Setne
        | M::Setbe
        | M::Seta
        | M::Sets
        | M::Setns
        | M::Setp
        | M::Setnp
        | M::Setl
        | M::Setge
        | M::Setle
        | M::Setg => {
            let code = instruction.condition_code() as u8 - 1;
            if instruction.op0_kind() == OpKind::Memory {
                conditional!(code, set_m)
            } else {
                conditional!(code, set_r)
            }
        }
        _ => return None,
    };
    inner(handler)
}

fn mov_rr<T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let value = T::get(cpu, op.src);
    T::set(cpu, op.dst, value);
    Ok(())
}

fn mov_ri<T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    T::set(cpu, op.dst, op.imm);
    Ok(())
}

fn mov_rm<T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.load_operand::<T>(op, |cpu, op, value| T::set(cpu, op.dst, value.extend()))
}

fn mov_mr<T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let value = T::truncate(T::get(cpu, op.src));
    cpu.store_operand::<T>(op, value)
}

fn mov_mi<T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.store_operand::<T>(op, T::truncate(op.imm))
}

fn mov_from_absolute<T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let value = cpu.load::<T>(absolute(cpu, op))?;
    T::set(cpu, RAX as u8, value.extend());
    Ok(())
}

fn mov_to_absolute<T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let value = T::truncate(T::get(cpu, RAX as u8));
    cpu.store::<T>(absolute(cpu, op), value)
}

/// The address of an instruction that holds all 64 bits of it (32 with a 67h prefix).
fn absolute(cpu: &Cpu, op: &Op) -> u64 {
    let offset = if op.segment & crate::soft::op::ADDRESS_32 == 0 {
        op.imm
    } else {
        u64::from(op.disp as u32)
    };
    cpu.linear(op, offset)
}

fn movzx_r<S: Int, D: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let value = S::get(cpu, op.src);
    D::set(cpu, op.dst, value);
    Ok(())
}

fn movzx_m<S: Int, D: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.load_operand::<S>(op, |cpu, op, value| D::set(cpu, op.dst, value.extend()))
}

fn movsx_r<S: Int, D: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let value = S::sign_extend(S::get(cpu, op.src));
    D::set(cpu, op.dst, value);
    Ok(())
}

fn movsx_m<S: Int, D: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.load_operand::<S>(op, |cpu, op, value| {
        D::set(cpu, op.dst, S::sign_extend(value.extend()));
    })
}

fn lea<T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let value = cpu.effective_offset(op);
    T::set(cpu, op.dst, value);
    Ok(())
}

fn xchg_rr<T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let (a, b) = (T::get(cpu, op.dst), T::get(cpu, op.src));
    T::set(cpu, op.dst, b);
    T::set(cpu, op.src, a);
    Ok(())
}

fn xchg_memory<T: Int>(cpu: &mut Cpu, op: &Op, register: u8) -> Result<(), Trap> {
    cpu.modify::<T>(cpu.ea(op), |cpu, memory| {
        let value = T::get(cpu, register);
        T::set(cpu, register, memory.extend());
        T::truncate(value)
    })
}

fn xchg_mr<T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    xchg_memory::<T>(cpu, op, op.src)
}

fn xchg_rm<T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    xchg_memory::<T>(cpu, op, op.dst)
}

fn bswap64(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let value = u64::get(cpu, op.dst).swap_bytes();
    u64::set(cpu, op.dst, value);
    Ok(())
}

fn bswap32(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let value = (u32::get(cpu, op.dst) as u32).swap_bytes();
    u32::set(cpu, op.dst, u64::from(value));
    Ok(())
}

/// Undefined by the manual; processors clear the 16 bits.
fn bswap16(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    u16::set(cpu, op.dst, 0);
    Ok(())
}

fn xlat(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let mut offset = cpu.gpr[RBX].wrapping_add(cpu.gpr[RAX] & 0xff);
    if op.segment & crate::soft::op::ADDRESS_32 != 0 {
        offset &= 0xffff_ffff;
    }
    let value = cpu.load::<u8>(cpu.linear(op, offset))?;
    u8::set(cpu, RAX as u8, u64::from(value));
    Ok(())
}

fn cbw(cpu: &mut Cpu, _: &Op) -> Result<(), Trap> {
    let value = u8::sign_extend(cpu.gpr[RAX]);
    u16::set(cpu, RAX as u8, value);
    Ok(())
}

fn cwde(cpu: &mut Cpu, _: &Op) -> Result<(), Trap> {
    let value = u16::sign_extend(cpu.gpr[RAX]);
    u32::set(cpu, RAX as u8, value);
    Ok(())
}

fn cdqe(cpu: &mut Cpu, _: &Op) -> Result<(), Trap> {
    cpu.gpr[RAX] = u32::sign_extend(cpu.gpr[RAX]);
    Ok(())
}

fn cwd(cpu: &mut Cpu, _: &Op) -> Result<(), Trap> {
    let sign = u16::sign_extend(cpu.gpr[RAX]) >> 32;
    u16::set(cpu, RDX as u8, sign);
    Ok(())
}

fn cdq(cpu: &mut Cpu, _: &Op) -> Result<(), Trap> {
    let sign = u32::sign_extend(cpu.gpr[RAX]) >> 32;
    u32::set(cpu, RDX as u8, sign);
    Ok(())
}

fn cqo(cpu: &mut Cpu, _: &Op) -> Result<(), Trap> {
    cpu.gpr[RDX] = ((cpu.gpr[RAX] as i64) >> 63) as u64;
    Ok(())
}

fn clc(cpu: &mut Cpu, _: &Op) -> Result<(), Trap> {
    cpu.flags.set_cf(false);
    Ok(())
}

fn stc(cpu: &mut Cpu, _: &Op) -> Result<(), Trap> {
    cpu.flags.set_cf(true);
    Ok(())
}

fn cmc(cpu: &mut Cpu, _: &Op) -> Result<(), Trap> {
    let cf = cpu.flags.cf();
    cpu.flags.set_cf(!cf);
    Ok(())
}

fn cld(cpu: &mut Cpu, _: &Op) -> Result<(), Trap> {
    cpu.flags.system &= !DF;
    Ok(())
}

fn std(cpu: &mut Cpu, _: &Op) -> Result<(), Trap> {
    cpu.flags.system |= DF;
    Ok(())
}

const AH: u8 = RAX as u8 | HIGH_BYTE;

fn lahf(cpu: &mut Cpu, _: &Op) -> Result<(), Trap> {
    let value = cpu.flags.read();
    u8::set(cpu, AH, value);
    Ok(())
}

fn sahf(cpu: &mut Cpu, _: &Op) -> Result<(), Trap> {
    let overflow = if cpu.flags.of() { flags::OF } else { 0 };
    let value = u8::get(cpu, AH);
    cpu.flags.set_arithmetic(value | overflow);
    Ok(())
}

fn cmov_r<T: Int, const C: u8>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let register = if condition::<C>(&cpu.flags) { op.src } else { op.dst };
    let value = T::get(cpu, register);
    T::set(cpu, op.dst, value);
    Ok(())
}

fn cmov_m<T: Int, const C: u8>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.load_operand::<T>(op, |cpu, op, loaded| {
        let value = if condition::<C>(&cpu.flags) { loaded.extend() } else { T::get(cpu, op.dst) };
        T::set(cpu, op.dst, value);
    })
}

fn set_r<const C: u8>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let value = u64::from(condition::<C>(&cpu.flags));
    u8::set(cpu, op.dst, value);
    Ok(())
}

fn set_m<const C: u8>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let value = u8::from(condition::<C>(&cpu.flags));
    cpu.store_operand::<u8>(op, value)
}
