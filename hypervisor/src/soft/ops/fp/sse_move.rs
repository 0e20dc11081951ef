//! Moves between XMM registers, memory and general registers; inserts and extracts.
//!
//! Non-temporal stores are plain stores: no cache of this processor could tell the difference.

use iced_x86::{Code, Instruction};

use super::vector::{M128, M128Unaligned, Register, Source, in_memory, vector};
use crate::soft::cpu::{Cpu, RDI, Trap};
use crate::soft::op::{Int, Op, Selected, Word};

const LOW: u128 = u64::MAX as u128;
const LOW_32: u128 = u32::MAX as u128;

/// xmm <- xmm or 128 bits of memory.
fn load_whole<S: Source>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.require_sse()?;
    *cpu.xmm_mut(op.dst) = S::read(cpu, op)?;
    Ok(())
}

/// memory <- xmm, aligned.
fn store_aligned(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.require_sse()?;
    let linear = cpu.aligned_ea(op)?;
    cpu.store::<u128>(linear, cpu.xmm(op.src))
}

/// memory <- the low bits of xmm, as many as `T` has, at any address.
fn store_low<T: FromVector>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.require_sse()?;
    cpu.store::<T>(cpu.ea(op), T::low(cpu.xmm(op.src)))
}

/// memory <- the upper half of xmm.
fn store_high(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.require_sse()?;
    cpu.store::<u64>(cpu.ea(op), (cpu.xmm(op.src) >> 64) as u64)
}

/// Operand sizes that can be cut from a vector.
trait FromVector: Word + Into<u128> {
    fn low(vector: u128) -> Self;
}

macro_rules! from_vector {
    ($($type:ty)+) => {$(
        impl FromVector for $type {
            #[inline(always)]
            fn low(vector: u128) -> Self {
                vector as $type
            }
        }
    )+};
}
from_vector! { u8 u16 u32 u64 u128 }

/// xmm <- memory, zero-extended.
fn load_low<T: FromVector>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.require_sse()?;
    *cpu.xmm_mut(op.dst) = cpu.load::<T>(cpu.ea(op))?.into();
    Ok(())
}

/// Half of xmm <- 64 bits of memory; the other half stays.
fn load_half<const HIGH: bool>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.require_sse()?;
    let half = u128::from(cpu.load::<u64>(cpu.ea(op))?);
    let register = cpu.xmm_mut(op.dst);
    *register = if HIGH { *register & LOW | half << 64 } else { *register & !LOW | half };
    Ok(())
}

/// Replaces the bits of `MASK` by the source's (MOVSS, MOVSD between registers).
fn merge<const MASK: u128>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.require_sse()?;
    let source = cpu.xmm(op.src);
    let register = cpu.xmm_mut(op.dst);
    *register = *register & !MASK | source & MASK;
    Ok(())
}

/// MOVQ between registers.
fn move_low(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.require_sse()?;
    *cpu.xmm_mut(op.dst) = cpu.xmm(op.src) & LOW;
    Ok(())
}

fn movhlps(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.require_sse()?;
    let source = cpu.xmm(op.src);
    let register = cpu.xmm_mut(op.dst);
    *register = *register & !LOW | source >> 64;
    Ok(())
}

fn movlhps(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.require_sse()?;
    let source = cpu.xmm(op.src);
    let register = cpu.xmm_mut(op.dst);
    *register = *register & LOW | source << 64;
    Ok(())
}

/// xmm <- general register, zero-extended.
fn from_general<T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.require_sse()?;
    *cpu.xmm_mut(op.dst) = T::get(cpu, op.src).into();
    Ok(())
}

/// general register <- low bits of xmm.
fn to_general<T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.require_sse()?;
    T::set(cpu, op.dst, cpu.xmm(op.src) as u64);
    Ok(())
}

/// MOVMSKPS, MOVMSKPD, PMOVMSKB: the top bits of `128 / WIDTH` lanes.
fn sign_mask<const WIDTH: u32>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.require_sse()?;
    let source = cpu.xmm(op.src);
    let mask = if WIDTH == 8 {
        // SAFETY: SSE2 is part of x86-64.
        let mask = unsafe { std::arch::x86_64::_mm_movemask_epi8(vector(source)) };
        u64::from(mask as u16)
    } else {
        (0..128 / WIDTH)
            .fold(0, |mask, n| mask | ((source >> (n * WIDTH + WIDTH - 1) & 1) as u64) << n)
    };
    u64::set(cpu, op.dst, mask);
    Ok(())
}

/// Position of a lane chosen by the immediate byte.
fn lane_shift<T: Word>(imm: u64) -> u32 {
    let lanes = 16 / T::BYTES as u32;
    (imm as u32 & (lanes - 1)) * T::BYTES as u32 * 8
}

fn insert<T: FromVector>(cpu: &mut Cpu, op: &Op, value: T) {
    let shift = lane_shift::<T>(op.imm);
    let mask = u128::MAX >> (128 - 8 * T::BYTES) << shift;
    let register = cpu.xmm_mut(op.dst);
    *register = *register & !mask | value.into() << shift;
}

/// PINSRB, PINSRW, PINSRD, PINSRQ from a general register.
fn insert_general<T: FromVector>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.require_sse()?;
    let value = T::low(u64::get(cpu, op.src).into());
    insert(cpu, op, value);
    Ok(())
}

/// The same from memory.
fn insert_memory<T: FromVector>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.require_sse()?;
    let value = cpu.load::<T>(cpu.ea(op))?;
    insert(cpu, op, value);
    Ok(())
}

/// PEXTRB, PEXTRW, PEXTRD, PEXTRQ, EXTRACTPS to a general register, zero-extended.
fn extract_general<T: FromVector>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.require_sse()?;
    let value: u128 = T::low(cpu.xmm(op.src) >> lane_shift::<T>(op.imm)).into();
    u64::set(cpu, op.dst, value as u64);
    Ok(())
}

/// The same to memory.
fn extract_memory<T: FromVector>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.require_sse()?;
    let value = T::low(cpu.xmm(op.src) >> lane_shift::<T>(op.imm));
    cpu.store::<T>(cpu.ea(op), value)
}

fn insert_single(cpu: &mut Cpu, op: &Op, value: u128) {
    let shift = u32::from(op.imm as u8 >> 4 & 3) * 32;
    let cleared = super::sse_integer::lanes(op.imm as u8 & 0xf, 32);
    let register = cpu.xmm_mut(op.dst);
    *register = (*register & !(LOW_32 << shift) | (value & LOW_32) << shift) & !cleared;
}

/// INSERTPS: the immediate chooses the source's lane, the destination's, and what to clear.
fn insertps_register(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.require_sse()?;
    let value = cpu.xmm(op.src) >> (u32::from(op.imm as u8 >> 6) * 32);
    insert_single(cpu, op, value);
    Ok(())
}

fn insertps_memory(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.require_sse()?;
    let value = cpu.load::<u32>(cpu.ea(op))?;
    insert_single(cpu, op, value.into());
    Ok(())
}

/// MASKMOVDQU: stores the bytes whose mask byte has its top bit set. Bytes not stored are not accessed.
fn maskmovdqu(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.require_sse()?;
    let (data, mask) = (cpu.xmm(op.src), cpu.xmm(op.src2));
    let linear = implicit_address(cpu, op);
    store_masked(cpu, linear, data, mask)
}

/// The address in DS:RDI (or the segment of an override) of MASKMOVQ and MASKMOVDQU.
pub(super) fn implicit_address(cpu: &Cpu, op: &Op) -> u64 {
    let rdi = cpu.gpr[RDI];
    let offset =
        if op.segment & crate::soft::op::ADDRESS_32 == 0 { rdi } else { rdi & 0xffff_ffff };
    cpu.linear(op, offset)
}

/// Stores the bytes of `data` whose byte of `mask` has its top bit set; all or none.
pub(super) fn store_masked(cpu: &mut Cpu, linear: u64, data: u128, mask: u128) -> Result<(), Trap> {
    let chosen = |n: &u64| mask >> (8 * n + 7) & 1 != 0;
    for n in (0..16).filter(chosen) {
        cpu.probe_write(linear.wrapping_add(n), 1)?;
    }
    for n in (0..16).filter(chosen) {
        cpu.store::<u8>(linear.wrapping_add(n), (data >> (8 * n)) as u8)?;
    }
    Ok(())
}

fn movnti<T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let value = T::truncate(T::get(cpu, op.src));
    cpu.store::<T>(cpu.ea(op), value)
}

/// The handler of an instruction of this group.
pub fn handler(instruction: &Instruction) -> Option<Selected> {
    let memory = in_memory(instruction, 0) || in_memory(instruction, 1);
    let by_place = |in_memory, register| Selected::inner(if memory { in_memory } else { register });
    use Code::*;
    match instruction.code() {
        Movaps_xmm_xmmm128 | Movapd_xmm_xmmm128 | Movdqa_xmm_xmmm128 | Movntdqa_xmm_m128 => {
            by_place(load_whole::<M128>, load_whole::<Register>)
        }
        Movups_xmm_xmmm128 | Movupd_xmm_xmmm128 | Movdqu_xmm_xmmm128 | Lddqu_xmm_m128 => {
            by_place(load_whole::<M128Unaligned>, load_whole::<Register>)
        }
        Movaps_xmmm128_xmm | Movapd_xmmm128_xmm | Movdqa_xmmm128_xmm | Movntps_m128_xmm
        | Movntpd_m128_xmm | Movntdq_m128_xmm => by_place(store_aligned, load_whole::<Register>),
        Movups_xmmm128_xmm | Movupd_xmmm128_xmm | Movdqu_xmmm128_xmm => {
            by_place(store_low::<u128>, load_whole::<Register>)
        }
        Movss_xmm_xmmm32 => by_place(load_low::<u32>, merge::<LOW_32>),
        Movss_xmmm32_xmm => by_place(store_low::<u32>, merge::<LOW_32>),
        Movsd_xmm_xmmm64 => by_place(load_low::<u64>, merge::<LOW>),
        Movsd_xmmm64_xmm => by_place(store_low::<u64>, merge::<LOW>),
        Movq_xmm_xmmm64 => by_place(load_low::<u64>, move_low),
        Movq_xmmm64_xmm => by_place(store_low::<u64>, move_low),
        Movlps_xmm_m64 | Movlpd_xmm_m64 => Selected::inner(load_half::<false>),
        Movhps_xmm_m64 | Movhpd_xmm_m64 => Selected::inner(load_half::<true>),
        Movlps_m64_xmm | Movlpd_m64_xmm => Selected::inner(store_low::<u64>),
        Movhps_m64_xmm | Movhpd_m64_xmm => Selected::inner(store_high),
        Movhlps_xmm_xmm => Selected::inner(movhlps),
        Movlhps_xmm_xmm => Selected::inner(movlhps),
        Movd_xmm_rm32 => by_place(load_low::<u32>, from_general::<u32>),
        Movq_xmm_rm64 => by_place(load_low::<u64>, from_general::<u64>),
        Movd_rm32_xmm => by_place(store_low::<u32>, to_general::<u32>),
        Movq_rm64_xmm => by_place(store_low::<u64>, to_general::<u64>),
        Movmskps_r32_xmm | Movmskps_r64_xmm => Selected::inner(sign_mask::<32>),
        Movmskpd_r32_xmm | Movmskpd_r64_xmm => Selected::inner(sign_mask::<64>),
        Pmovmskb_r32_xmm | Pmovmskb_r64_xmm => Selected::inner(sign_mask::<8>),
        Pinsrb_xmm_r32m8_imm8 | Pinsrb_xmm_r64m8_imm8 => {
            by_place(insert_memory::<u8>, insert_general::<u8>)
        }
        Pinsrw_xmm_r32m16_imm8 | Pinsrw_xmm_r64m16_imm8 => {
            by_place(insert_memory::<u16>, insert_general::<u16>)
        }
        Pinsrd_xmm_rm32_imm8 => by_place(insert_memory::<u32>, insert_general::<u32>),
        Pinsrq_xmm_rm64_imm8 => by_place(insert_memory::<u64>, insert_general::<u64>),
        Pextrb_r32m8_xmm_imm8 | Pextrb_r64m8_xmm_imm8 => {
            by_place(extract_memory::<u8>, extract_general::<u8>)
        }
        Pextrw_r32m16_xmm_imm8
        | Pextrw_r64m16_xmm_imm8
        | Pextrw_r32_xmm_imm8
        | Pextrw_r64_xmm_imm8 => by_place(extract_memory::<u16>, extract_general::<u16>),
        Pextrd_rm32_xmm_imm8 | Extractps_rm32_xmm_imm8 | Extractps_r64m32_xmm_imm8 => {
            by_place(extract_memory::<u32>, extract_general::<u32>)
        }
        Pextrq_rm64_xmm_imm8 => by_place(extract_memory::<u64>, extract_general::<u64>),
        Insertps_xmm_xmmm32_imm8 => by_place(insertps_memory, insertps_register),
        Maskmovdqu_rDI_xmm_xmm => Selected::inner(maskmovdqu),
        Movnti_m32_r32 => Selected::inner(movnti::<u32>),
        Movnti_m64_r64 => Selected::inner(movnti::<u64>),
        _ => None,
    }
}
