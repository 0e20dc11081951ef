//! MMX, and the SSE instructions that touch MMX registers.
//!
//! An MMX instruction is computed by its sister on XMM registers, the upper halves being zero. Every one
//! but EMMS leaves the x87 with TOP zero and no register empty (vol. 1, 9.5).

use std::arch::asm;

use iced_x86::{Code, Instruction};

use super::sse_convert::{Conversion, convert};
use super::sse_integer::shuffle;
use super::sse_move::{implicit_address, store_masked};
use super::vector::{Binary, M64, M128, Register, Source, bits, host_binary, in_memory, vector};
use crate::soft::cpu::{Cpu, Trap};
use crate::soft::op::{Int, Op, Selected};

const LOW: u128 = u64::MAX as u128;

/// How an instruction on 64 bits is made of one on 128.
trait Shape {
    fn apply<O: Binary>(a: u64, b: u64) -> u64;
}

/// Lane by lane: the low half of the result.
struct Lanes;
/// The upper half of the result: unpacking the high lanes of the low half.
struct High;
/// The operands are the two halves of one vector: packing and horizontal arithmetic.
struct Paired;
/// PSHUFB, whose indices count eight bytes instead of sixteen.
struct Bytes;

impl Shape for Lanes {
    #[inline(always)]
    fn apply<O: Binary>(a: u64, b: u64) -> u64 {
        O::apply(a.into(), b.into()) as u64
    }
}

impl Shape for High {
    #[inline(always)]
    fn apply<O: Binary>(a: u64, b: u64) -> u64 {
        (O::apply(a.into(), b.into()) >> 64) as u64
    }
}

impl Shape for Paired {
    #[inline(always)]
    fn apply<O: Binary>(a: u64, b: u64) -> u64 {
        let both = u128::from(a) | u128::from(b) << 64;
        O::apply(both, both) as u64
    }
}

impl Shape for Bytes {
    #[inline(always)]
    fn apply<O: Binary>(a: u64, b: u64) -> u64 {
        O::apply(a.into(), (b & 0x8787_8787_8787_8787).into()) as u64
    }
}

/// Where a 64-bit second operand comes from.
trait Operand {
    fn read(cpu: &mut Cpu, op: &Op) -> Result<u64, Trap>;
}

/// MMX register `op.src`.
struct Mm;
/// 8 bytes of memory.
struct Mem64;
/// 4 bytes of memory, zero-extended.
struct Mem32;

impl Operand for Mm {
    #[inline(always)]
    fn read(cpu: &mut Cpu, op: &Op) -> Result<u64, Trap> {
        Ok(cpu.fpu.mm(op.src))
    }
}

impl Operand for Mem64 {
    #[inline(always)]
    fn read(cpu: &mut Cpu, op: &Op) -> Result<u64, Trap> {
        cpu.load::<u64>(cpu.ea(op))
    }
}

impl Operand for Mem32 {
    #[inline(always)]
    fn read(cpu: &mut Cpu, op: &Op) -> Result<u64, Trap> {
        Ok(cpu.load::<u32>(cpu.ea(op))?.into())
    }
}

/// Writes MM`register`, with what that does to the x87.
fn write_mm(cpu: &mut Cpu, register: u8, value: u64) {
    cpu.fpu.enter_mmx();
    cpu.fpu.set_mm(register, value);
}

fn binary<O: Binary, H: Shape, S: Operand>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.require_mmx()?;
    let b = S::read(cpu, op)?;
    let value = H::apply::<O>(cpu.fpu.mm(op.dst), b);
    write_mm(cpu, op.dst, value);
    Ok(())
}

fn shift_immediate<O: Binary>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.require_mmx()?;
    let value = Lanes::apply::<O>(cpu.fpu.mm(op.dst), (op.imm as u8).into());
    write_mm(cpu, op.dst, value);
    Ok(())
}

macro_rules! table {
    ($instruction:ident: $($shape:ident $memory:ident { $($code:ident $text:literal)+ })+) => {
        match $instruction.code() {
            $($(Code::$code => {
                host_binary!(Host $text);
                Selected::inner(if in_memory($instruction, 1) {
                    binary::<Host, $shape, $memory>
                } else {
                    binary::<Host, $shape, Mm>
                })
            })+)+
            _ => None,
        }
    };
}

fn arithmetic(instruction: &Instruction) -> Option<Selected> {
    table! { instruction:
        Lanes Mem64 {
            Paddb_mm_mmm64 "paddb"
            Paddw_mm_mmm64 "paddw"
            Paddd_mm_mmm64 "paddd"
            Paddq_mm_mmm64 "paddq"
            Paddsb_mm_mmm64 "paddsb"
            Paddsw_mm_mmm64 "paddsw"
            Paddusb_mm_mmm64 "paddusb"
            Paddusw_mm_mmm64 "paddusw"
            Psubb_mm_mmm64 "psubb"
            Psubw_mm_mmm64 "psubw"
            Psubd_mm_mmm64 "psubd"
            Psubq_mm_mmm64 "psubq"
            Psubsb_mm_mmm64 "psubsb"
            Psubsw_mm_mmm64 "psubsw"
            Psubusb_mm_mmm64 "psubusb"
            Psubusw_mm_mmm64 "psubusw"
            Pmullw_mm_mmm64 "pmullw"
            Pmulhw_mm_mmm64 "pmulhw"
            Pmulhuw_mm_mmm64 "pmulhuw"
            Pmulhrsw_mm_mmm64 "pmulhrsw"
            Pmuludq_mm_mmm64 "pmuludq"
            Pmaddwd_mm_mmm64 "pmaddwd"
            Pmaddubsw_mm_mmm64 "pmaddubsw"
            Psadbw_mm_mmm64 "psadbw"
            Pavgb_mm_mmm64 "pavgb"
            Pavgw_mm_mmm64 "pavgw"
            Pminub_mm_mmm64 "pminub"
            Pminsw_mm_mmm64 "pminsw"
            Pmaxub_mm_mmm64 "pmaxub"
            Pmaxsw_mm_mmm64 "pmaxsw"
            Pabsb_mm_mmm64 "pabsb"
            Pabsw_mm_mmm64 "pabsw"
            Pabsd_mm_mmm64 "pabsd"
            Psignb_mm_mmm64 "psignb"
            Psignw_mm_mmm64 "psignw"
            Psignd_mm_mmm64 "psignd"
            Pcmpeqb_mm_mmm64 "pcmpeqb"
            Pcmpeqw_mm_mmm64 "pcmpeqw"
            Pcmpeqd_mm_mmm64 "pcmpeqd"
            Pcmpgtb_mm_mmm64 "pcmpgtb"
            Pcmpgtw_mm_mmm64 "pcmpgtw"
            Pcmpgtd_mm_mmm64 "pcmpgtd"
            Psrlw_mm_mmm64 "psrlw"
            Psrld_mm_mmm64 "psrld"
            Psrlq_mm_mmm64 "psrlq"
            Psraw_mm_mmm64 "psraw"
            Psrad_mm_mmm64 "psrad"
            Psllw_mm_mmm64 "psllw"
            Pslld_mm_mmm64 "pslld"
            Psllq_mm_mmm64 "psllq"
            Pand_mm_mmm64 "pand"
            Pandn_mm_mmm64 "pandn"
            Por_mm_mmm64 "por"
            Pxor_mm_mmm64 "pxor"
        }
        Lanes Mem32 {
            Punpcklbw_mm_mmm32 "punpcklbw"
            Punpcklwd_mm_mmm32 "punpcklwd"
            Punpckldq_mm_mmm32 "punpckldq"
        }
        High Mem64 {
            Punpckhbw_mm_mmm64 "punpcklbw"
            Punpckhwd_mm_mmm64 "punpcklwd"
            Punpckhdq_mm_mmm64 "punpckldq"
        }
        Paired Mem64 {
            Packsswb_mm_mmm64 "packsswb"
            Packssdw_mm_mmm64 "packssdw"
            Packuswb_mm_mmm64 "packuswb"
            Phaddw_mm_mmm64 "phaddw"
            Phaddd_mm_mmm64 "phaddd"
            Phaddsw_mm_mmm64 "phaddsw"
            Phsubw_mm_mmm64 "phsubw"
            Phsubd_mm_mmm64 "phsubd"
            Phsubsw_mm_mmm64 "phsubsw"
        }
        Bytes Mem64 {
            Pshufb_mm_mmm64 "pshufb"
        }
    }
}

fn shifts(instruction: &Instruction) -> Option<Selected> {
    macro_rules! shift {
        ($text:literal) => {{
            host_binary!(Host $text);
            Selected::inner(shift_immediate::<Host>)
        }};
    }
    match instruction.code() {
        Code::Psrlw_mm_imm8 => shift!("psrlw"),
        Code::Psrld_mm_imm8 => shift!("psrld"),
        Code::Psrlq_mm_imm8 => shift!("psrlq"),
        Code::Psraw_mm_imm8 => shift!("psraw"),
        Code::Psrad_mm_imm8 => shift!("psrad"),
        Code::Psllw_mm_imm8 => shift!("psllw"),
        Code::Pslld_mm_imm8 => shift!("pslld"),
        Code::Psllq_mm_imm8 => shift!("psllq"),
        _ => None,
    }
}

fn pshufw<S: Operand>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.require_mmx()?;
    let b = u128::from(S::read(cpu, op)?);
    write_mm(cpu, op.dst, shuffle(b, b, op.imm as u8, 16) as u64);
    Ok(())
}

fn palignr<S: Operand>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.require_mmx()?;
    let b = S::read(cpu, op)?;
    let both = u128::from(cpu.fpu.mm(op.dst)) << 64 | u128::from(b);
    let value = both.checked_shr(u32::from(op.imm as u8) * 8).unwrap_or(0);
    write_mm(cpu, op.dst, value as u64);
    Ok(())
}

fn pmovmskb(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.require_mmx()?;
    cpu.fpu.enter_mmx();
    let source = cpu.fpu.mm(op.src);
    let mask = (0..8).fold(0, |mask, n| mask | (source >> (8 * n + 7) & 1) << n);
    u64::set(cpu, op.dst, mask);
    Ok(())
}

fn insert(cpu: &mut Cpu, op: &Op, word: u64) {
    let shift = (op.imm & 3) * 16;
    let value = cpu.fpu.mm(op.dst) & !(0xffff << shift) | (word & 0xffff) << shift;
    write_mm(cpu, op.dst, value);
}

fn pinsrw_general(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.require_mmx()?;
    let word = u64::get(cpu, op.src);
    insert(cpu, op, word);
    Ok(())
}

fn pinsrw_memory(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.require_mmx()?;
    let word = cpu.load::<u16>(cpu.ea(op))?;
    insert(cpu, op, word.into());
    Ok(())
}

fn pextrw(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.require_mmx()?;
    cpu.fpu.enter_mmx();
    let word = cpu.fpu.mm(op.src) >> ((op.imm & 3) * 16) & 0xffff;
    u64::set(cpu, op.dst, word);
    Ok(())
}

/// mm <- mm, memory of 64 bits or of 32.
fn load<S: Operand>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.require_mmx()?;
    let value = S::read(cpu, op)?;
    write_mm(cpu, op.dst, value);
    Ok(())
}

/// memory <- mm.
fn store<T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.require_mmx()?;
    cpu.store::<T>(cpu.ea(op), T::truncate(cpu.fpu.mm(op.src)))?;
    cpu.fpu.enter_mmx();
    Ok(())
}

/// mm <- general register.
fn from_general<T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.require_mmx()?;
    let value = T::get(cpu, op.src);
    write_mm(cpu, op.dst, value);
    Ok(())
}

/// general register <- mm.
fn to_general<T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.require_mmx()?;
    cpu.fpu.enter_mmx();
    let value = cpu.fpu.mm(op.src);
    T::set(cpu, op.dst, value);
    Ok(())
}

fn movq2dq(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.require_sse()?;
    cpu.require_mmx()?;
    cpu.fpu.enter_mmx();
    *cpu.xmm_mut(op.dst) = cpu.fpu.mm(op.src).into();
    Ok(())
}

fn movdq2q(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.require_sse()?;
    cpu.require_mmx()?;
    let value = cpu.xmm(op.src) as u64;
    write_mm(cpu, op.dst, value);
    Ok(())
}

fn maskmovq(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.require_mmx()?;
    let (data, mask) = (cpu.fpu.mm(op.src), cpu.fpu.mm(op.src2));
    let linear = implicit_address(cpu, op);
    store_masked(cpu, linear, data.into(), mask.into())?;
    cpu.fpu.enter_mmx();
    Ok(())
}

/// CVTPI2PS, CVTPI2PD: two integers to the vector. `WHOLE`: the upper half of the register changes too.
fn from_integers<C: Conversion, S: Operand, const WHOLE: bool, const ENTER: bool>(
    cpu: &mut Cpu,
    op: &Op,
) -> Result<(), Trap> {
    cpu.require_sse()?;
    if ENTER {
        cpu.require_mmx()?;
    }
    let value = S::read(cpu, op)?;
    let result = convert::<C>(cpu, value.into())?;
    if ENTER {
        cpu.fpu.enter_mmx();
    }
    let register = cpu.xmm_mut(op.dst);
    *register = if WHOLE { result } else { *register & !LOW | result & LOW };
    Ok(())
}

/// CVTPS2PI, CVTPD2PI and their truncating forms.
fn to_integers<C: Conversion, S: Source>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.require_sse()?;
    cpu.require_mmx()?;
    let value = S::read(cpu, op)?;
    let result = convert::<C>(cpu, value)?;
    write_mm(cpu, op.dst, result as u64);
    Ok(())
}

/// Reads the low half of an XMM register: the conversions of two lanes must not look at the others.
struct LowHalf;

impl Source for LowHalf {
    fn read(cpu: &mut Cpu, op: &Op) -> Result<u128, Trap> {
        Ok(cpu.xmm(op.src) & LOW)
    }
}

macro_rules! conversion {
    ($($name:ident $text:literal)+) => {$(
        struct $name;
        impl Conversion for $name {
            #[inline(always)]
            fn apply(value: u128, mut mxcsr: u32) -> (u128, u32) {
                let mut result = vector(value);
                // SAFETY: an SSE2 instruction on a register between two accesses to `mxcsr`; all
                // exceptions are masked in it.
                unsafe {
                    asm!(
                        "ldmxcsr [{m}]",
                        concat!($text, " {a}, {a}"),
                        "stmxcsr [{m}]",
                        m = in(reg) &raw mut mxcsr,
                        a = inout(xmm_reg) result,
                        options(nostack),
                    );
                }
                (bits(result), mxcsr)
            }
        }
    )+};
}
conversion! {
    IntegersToSingles "cvtdq2ps"
    IntegersToDoubles "cvtdq2pd"
    SinglesToIntegers "cvtps2dq"
    SinglesTruncated "cvttps2dq"
    DoublesToIntegers "cvtpd2dq"
    DoublesTruncated "cvttpd2dq"
}

fn moves(instruction: &Instruction) -> Option<Selected> {
    let memory = in_memory(instruction, 0) || in_memory(instruction, 1);
    let by_place = |in_memory, register| Selected::inner(if memory { in_memory } else { register });
    use Code::*;
    match instruction.code() {
        Movq_mm_mmm64 => by_place(load::<Mem64>, load::<Mm>),
        Movq_mmm64_mm => by_place(store::<u64>, load::<Mm>),
        Movntq_m64_mm => Selected::inner(store::<u64>),
        Movd_mm_rm32 => by_place(load::<Mem32>, from_general::<u32>),
        Movq_mm_rm64 => by_place(load::<Mem64>, from_general::<u64>),
        Movd_rm32_mm => by_place(store::<u32>, to_general::<u32>),
        Movq_rm64_mm => by_place(store::<u64>, to_general::<u64>),
        Movq2dq_xmm_mm => Selected::inner(movq2dq),
        Movdq2q_mm_xmm => Selected::inner(movdq2q),
        Maskmovq_rDI_mm_mm => Selected::inner(maskmovq),
        Pshufw_mm_mmm64_imm8 => by_place(pshufw::<Mem64>, pshufw::<Mm>),
        Palignr_mm_mmm64_imm8 => by_place(palignr::<Mem64>, palignr::<Mm>),
        Pmovmskb_r32_mm | Pmovmskb_r64_mm => Selected::inner(pmovmskb),
        Pinsrw_mm_r32m16_imm8 | Pinsrw_mm_r64m16_imm8 => by_place(pinsrw_memory, pinsrw_general),
        Pextrw_r32_mm_imm8 | Pextrw_r64_mm_imm8 => Selected::inner(pextrw),
        // Only the forms with an MMX register touch the x87.
        Cvtpi2ps_xmm_mmm64 => by_place(
            from_integers::<IntegersToSingles, Mem64, false, false>,
            from_integers::<IntegersToSingles, Mm, false, true>,
        ),
        Cvtpi2pd_xmm_mmm64 => by_place(
            from_integers::<IntegersToDoubles, Mem64, true, false>,
            from_integers::<IntegersToDoubles, Mm, true, true>,
        ),
        Cvtps2pi_mm_xmmm64 => by_place(
            to_integers::<SinglesToIntegers, M64>,
            to_integers::<SinglesToIntegers, LowHalf>,
        ),
        Cvttps2pi_mm_xmmm64 => {
            by_place(to_integers::<SinglesTruncated, M64>, to_integers::<SinglesTruncated, LowHalf>)
        }
        Cvtpd2pi_mm_xmmm128 => by_place(
            to_integers::<DoublesToIntegers, M128>,
            to_integers::<DoublesToIntegers, Register>,
        ),
        Cvttpd2pi_mm_xmmm128 => by_place(
            to_integers::<DoublesTruncated, M128>,
            to_integers::<DoublesTruncated, Register>,
        ),
        _ => None,
    }
}

/// The handler of an instruction of this group.
pub fn handler(instruction: &Instruction) -> Option<Selected> {
    arithmetic(instruction).or_else(|| shifts(instruction)).or_else(|| moves(instruction))
}
