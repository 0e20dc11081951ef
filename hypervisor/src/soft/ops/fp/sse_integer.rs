//! Integer arithmetic, comparison, packing and shuffling on XMM registers: SSE2, SSSE3, SSE4.1, SSE4.2.

use iced_x86::{Code, Instruction};

use super::vector::{
    Binary, M16, M32, M64, M128, Register, Source, host_binary, in_memory, select,
};
use crate::soft::cpu::{Cpu, Trap};
use crate::soft::op::{Op, Selected};

/// Instructions `text xmm, xmm/memory`, by the kind of their memory operand.
macro_rules! table {
    ($instruction:ident: $($memory:ident { $($code:ident $text:literal)+ })+) => {
        match $instruction.code() {
            $($(Code::$code => {
                host_binary!(Host $text);
                select::<Host, $memory>($instruction)
            })+)+
            _ => None,
        }
    };
}

/// The handler of an instruction of this group.
pub fn handler(instruction: &Instruction) -> Option<Selected> {
    arithmetic(instruction).or_else(|| rearranging(instruction)).or_else(|| immediate(instruction))
}

fn arithmetic(instruction: &Instruction) -> Option<Selected> {
    table! { instruction:
        M128 {
            Paddb_xmm_xmmm128 "paddb"
            Paddw_xmm_xmmm128 "paddw"
            Paddd_xmm_xmmm128 "paddd"
            Paddq_xmm_xmmm128 "paddq"
            Paddsb_xmm_xmmm128 "paddsb"
            Paddsw_xmm_xmmm128 "paddsw"
            Paddusb_xmm_xmmm128 "paddusb"
            Paddusw_xmm_xmmm128 "paddusw"
            Psubb_xmm_xmmm128 "psubb"
            Psubw_xmm_xmmm128 "psubw"
            Psubd_xmm_xmmm128 "psubd"
            Psubq_xmm_xmmm128 "psubq"
            Psubsb_xmm_xmmm128 "psubsb"
            Psubsw_xmm_xmmm128 "psubsw"
            Psubusb_xmm_xmmm128 "psubusb"
            Psubusw_xmm_xmmm128 "psubusw"
            Pmullw_xmm_xmmm128 "pmullw"
            Pmulhw_xmm_xmmm128 "pmulhw"
            Pmulhuw_xmm_xmmm128 "pmulhuw"
            Pmulhrsw_xmm_xmmm128 "pmulhrsw"
            Pmulld_xmm_xmmm128 "pmulld"
            Pmuludq_xmm_xmmm128 "pmuludq"
            Pmuldq_xmm_xmmm128 "pmuldq"
            Pmaddwd_xmm_xmmm128 "pmaddwd"
            Pmaddubsw_xmm_xmmm128 "pmaddubsw"
            Psadbw_xmm_xmmm128 "psadbw"
            Pavgb_xmm_xmmm128 "pavgb"
            Pavgw_xmm_xmmm128 "pavgw"
            Pminub_xmm_xmmm128 "pminub"
            Pminuw_xmm_xmmm128 "pminuw"
            Pminud_xmm_xmmm128 "pminud"
            Pminsb_xmm_xmmm128 "pminsb"
            Pminsw_xmm_xmmm128 "pminsw"
            Pminsd_xmm_xmmm128 "pminsd"
            Pmaxub_xmm_xmmm128 "pmaxub"
            Pmaxuw_xmm_xmmm128 "pmaxuw"
            Pmaxud_xmm_xmmm128 "pmaxud"
            Pmaxsb_xmm_xmmm128 "pmaxsb"
            Pmaxsw_xmm_xmmm128 "pmaxsw"
            Pmaxsd_xmm_xmmm128 "pmaxsd"
            Pabsb_xmm_xmmm128 "pabsb"
            Pabsw_xmm_xmmm128 "pabsw"
            Pabsd_xmm_xmmm128 "pabsd"
            Psignb_xmm_xmmm128 "psignb"
            Psignw_xmm_xmmm128 "psignw"
            Psignd_xmm_xmmm128 "psignd"
            Phaddw_xmm_xmmm128 "phaddw"
            Phaddd_xmm_xmmm128 "phaddd"
            Phaddsw_xmm_xmmm128 "phaddsw"
            Phsubw_xmm_xmmm128 "phsubw"
            Phsubd_xmm_xmmm128 "phsubd"
            Phsubsw_xmm_xmmm128 "phsubsw"
            Phminposuw_xmm_xmmm128 "phminposuw"
            Pcmpeqb_xmm_xmmm128 "pcmpeqb"
            Pcmpeqw_xmm_xmmm128 "pcmpeqw"
            Pcmpeqd_xmm_xmmm128 "pcmpeqd"
            Pcmpeqq_xmm_xmmm128 "pcmpeqq"
            Pcmpgtb_xmm_xmmm128 "pcmpgtb"
            Pcmpgtw_xmm_xmmm128 "pcmpgtw"
            Pcmpgtd_xmm_xmmm128 "pcmpgtd"
            Pcmpgtq_xmm_xmmm128 "pcmpgtq"
            Psrlw_xmm_xmmm128 "psrlw"
            Psrld_xmm_xmmm128 "psrld"
            Psrlq_xmm_xmmm128 "psrlq"
            Psraw_xmm_xmmm128 "psraw"
            Psrad_xmm_xmmm128 "psrad"
            Psllw_xmm_xmmm128 "psllw"
            Pslld_xmm_xmmm128 "pslld"
            Psllq_xmm_xmmm128 "psllq"
        }
    }
}

fn rearranging(instruction: &Instruction) -> Option<Selected> {
    table! { instruction:
        M128 {
            Pand_xmm_xmmm128 "pand"
            Pandn_xmm_xmmm128 "pandn"
            Por_xmm_xmmm128 "por"
            Pxor_xmm_xmmm128 "pxor"
            Andps_xmm_xmmm128 "andps"
            Andpd_xmm_xmmm128 "andpd"
            Andnps_xmm_xmmm128 "andnps"
            Andnpd_xmm_xmmm128 "andnpd"
            Orps_xmm_xmmm128 "orps"
            Orpd_xmm_xmmm128 "orpd"
            Xorps_xmm_xmmm128 "xorps"
            Xorpd_xmm_xmmm128 "xorpd"
            Packsswb_xmm_xmmm128 "packsswb"
            Packssdw_xmm_xmmm128 "packssdw"
            Packuswb_xmm_xmmm128 "packuswb"
            Packusdw_xmm_xmmm128 "packusdw"
            Punpcklbw_xmm_xmmm128 "punpcklbw"
            Punpcklwd_xmm_xmmm128 "punpcklwd"
            Punpckldq_xmm_xmmm128 "punpckldq"
            Punpcklqdq_xmm_xmmm128 "punpcklqdq"
            Punpckhbw_xmm_xmmm128 "punpckhbw"
            Punpckhwd_xmm_xmmm128 "punpckhwd"
            Punpckhdq_xmm_xmmm128 "punpckhdq"
            Punpckhqdq_xmm_xmmm128 "punpckhqdq"
            Unpcklps_xmm_xmmm128 "unpcklps"
            Unpcklpd_xmm_xmmm128 "unpcklpd"
            Unpckhps_xmm_xmmm128 "unpckhps"
            Unpckhpd_xmm_xmmm128 "unpckhpd"
            Pshufb_xmm_xmmm128 "pshufb"
            Movsldup_xmm_xmmm128 "movsldup"
            Movshdup_xmm_xmmm128 "movshdup"
        }
        M64 {
            Movddup_xmm_xmmm64 "movddup"
            Pmovsxbw_xmm_xmmm64 "pmovsxbw"
            Pmovsxwd_xmm_xmmm64 "pmovsxwd"
            Pmovsxdq_xmm_xmmm64 "pmovsxdq"
            Pmovzxbw_xmm_xmmm64 "pmovzxbw"
            Pmovzxwd_xmm_xmmm64 "pmovzxwd"
            Pmovzxdq_xmm_xmmm64 "pmovzxdq"
        }
        M32 {
            Pmovsxbd_xmm_xmmm32 "pmovsxbd"
            Pmovsxwq_xmm_xmmm32 "pmovsxwq"
            Pmovzxbd_xmm_xmmm32 "pmovzxbd"
            Pmovzxwq_xmm_xmmm32 "pmovzxwq"
        }
        M16 {
            Pmovsxbq_xmm_xmmm16 "pmovsxbq"
            Pmovzxbq_xmm_xmmm16 "pmovzxbq"
        }
    }
}

/// A function of two vectors and the immediate byte.
trait Immediate {
    fn apply(a: u128, b: u128, imm: u8) -> u128;
}

fn binary_immediate<O: Immediate, S: Source>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.require_sse()?;
    let b = S::read(cpu, op)?;
    let a = cpu.xmm_mut(op.dst);
    *a = O::apply(*a, b, op.imm as u8);
    Ok(())
}

fn select_immediate<O: Immediate>(instruction: &Instruction) -> Option<Selected> {
    Selected::inner(if in_memory(instruction, 1) {
        binary_immediate::<O, M128>
    } else {
        binary_immediate::<O, Register>
    })
}

/// Shifts by an immediate, which are the shifts by a register with the count put into one.
fn shift_immediate<O: Binary>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.require_sse()?;
    let a = cpu.xmm_mut(op.dst);
    *a = O::apply(*a, u128::from(op.imm as u8));
    Ok(())
}

macro_rules! immediate_functions {
    ($($name:ident = $function:expr;)+) => {$(
        struct $name;
        impl Immediate for $name {
            #[inline(always)]
            fn apply(a: u128, b: u128, imm: u8) -> u128 {
                let function: fn(u128, u128, u8) -> u128 = $function;
                function(a, b, imm)
            }
        }
    )+};
}

/// Lane `n` of `value`, `width` bits wide.
#[inline(always)]
fn lane(value: u128, n: u32, width: u32) -> u128 {
    value >> (n * width) & ((1 << width) - 1)
}

/// Four lanes of `width` bits chosen by the four 2-bit fields of `order`, the first two from `low`.
#[inline(always)]
pub(super) fn shuffle(low: u128, high: u128, order: u8, width: u32) -> u128 {
    let field = |n: u32| u32::from(order >> (2 * n) & 3);
    lane(low, field(0), width)
        | lane(low, field(1), width) << width
        | lane(high, field(2), width) << (2 * width)
        | lane(high, field(3), width) << (3 * width)
}

const LOW: u128 = u64::MAX as u128;

/// Ones in each lane of `width` bits whose bit in `mask` is set.
#[inline(always)]
pub(super) fn lanes(mask: u8, width: u32) -> u128 {
    (0..128 / width)
        .filter(|n| mask >> n & 1 != 0)
        .fold(0, |lanes, n| lanes | ((1 << width) - 1) << (n * width))
}

fn align_right(a: u128, b: u128, bytes: u8) -> u128 {
    let bits = u32::from(bytes) * 8;
    match bytes {
        0 => b,
        1..=15 => b >> bits | a << (128 - bits),
        16..=31 => a >> (bits - 128),
        _ => 0,
    }
}

immediate_functions! {
    Pshufd = |_, b, imm| shuffle(b, b, imm, 32);
    Pshuflw = |_, b, imm| b & !LOW | shuffle(b, b, imm, 16);
    Pshufhw = |_, b, imm| b & LOW | shuffle(b >> 64, b >> 64, imm, 16) << 64;
    Shufps = |a, b, imm| shuffle(a, b, imm, 32);
    Shufpd = |a, b, imm| lane(a, u32::from(imm & 1), 64) | lane(b, u32::from(imm >> 1 & 1), 64) << 64;
    Palignr = align_right;
    Blendps = |a, b, imm| {
        let mask = lanes(imm & 0xf, 32);
        a & !mask | b & mask
    };
    Blendpd = |a, b, imm| {
        let mask = lanes(imm & 3, 64);
        a & !mask | b & mask
    };
    Pblendw = |a, b, imm| {
        let mask = lanes(imm, 16);
        a & !mask | b & mask
    };
    Mpsadbw = |a, b, imm| {
        // Eight sums of four absolute differences, a block of `b` against a sliding one of `a`.
        let (from, block) = (u32::from(imm >> 2 & 1) * 4, u32::from(imm & 3) * 4);
        let byte = |value, n| lane(value, n, 8) as i32;
        (0..8).fold(0, |sums, i| {
            let sum: u32 =
                (0..4).map(|j| byte(a, from + i + j).abs_diff(byte(b, block + j))).sum();
            sums | u128::from(sum) << (16 * i)
        })
    };
    Pslldq = |a, _, imm| if imm < 16 { a << (8 * imm) } else { 0 };
    Psrldq = |a, _, imm| if imm < 16 { a >> (8 * imm) } else { 0 };
}

fn shift_bytes<O: Immediate>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.require_sse()?;
    let a = cpu.xmm_mut(op.dst);
    *a = O::apply(*a, 0, op.imm as u8);
    Ok(())
}

/// The high bit of every lane as a mask over the lane.
trait Selector {
    fn mask(xmm0: u128) -> u128;
}

macro_rules! selector {
    ($name:ident $width:literal) => {
        struct $name;
        impl Selector for $name {
            #[inline(always)]
            fn mask(xmm0: u128) -> u128 {
                let ones = u128::MAX / ((1 << $width) - 1);
                let tops = xmm0 >> ($width - 1) & ones;
                tops * ((1 << $width) - 1)
            }
        }
    };
}
selector!(ByBytes 8);
selector!(ByDwords 32);
selector!(ByQwords 64);

fn blend_variable<M: Selector, S: Source>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.require_sse()?;
    let b = S::read(cpu, op)?;
    let mask = M::mask(cpu.xmm[0]);
    let a = cpu.xmm_mut(op.dst);
    *a = *a & !mask | b & mask;
    Ok(())
}

fn select_blend<M: Selector>(instruction: &Instruction) -> Option<Selected> {
    Selected::inner(if in_memory(instruction, 1) {
        blend_variable::<M, M128>
    } else {
        blend_variable::<M, Register>
    })
}

/// PTEST: ZF from AND, CF from AND NOT.
fn test<S: Source>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.require_sse()?;
    let b = S::read(cpu, op)?;
    let a = cpu.xmm(op.dst);
    cpu.flags.set_explicit(!a & b == 0, false, false, a & b == 0, false, false);
    Ok(())
}

fn immediate(instruction: &Instruction) -> Option<Selected> {
    macro_rules! shift {
        ($text:literal) => {{
            host_binary!(Host $text);
            Selected::inner(shift_immediate::<Host>)
        }};
    }
    match instruction.code() {
        Code::Psrlw_xmm_imm8 => shift!("psrlw"),
        Code::Psrld_xmm_imm8 => shift!("psrld"),
        Code::Psrlq_xmm_imm8 => shift!("psrlq"),
        Code::Psraw_xmm_imm8 => shift!("psraw"),
        Code::Psrad_xmm_imm8 => shift!("psrad"),
        Code::Psllw_xmm_imm8 => shift!("psllw"),
        Code::Pslld_xmm_imm8 => shift!("pslld"),
        Code::Psllq_xmm_imm8 => shift!("psllq"),
        Code::Pslldq_xmm_imm8 => Selected::inner(shift_bytes::<Pslldq>),
        Code::Psrldq_xmm_imm8 => Selected::inner(shift_bytes::<Psrldq>),
        Code::Pshufd_xmm_xmmm128_imm8 => select_immediate::<Pshufd>(instruction),
        Code::Pshuflw_xmm_xmmm128_imm8 => select_immediate::<Pshuflw>(instruction),
        Code::Pshufhw_xmm_xmmm128_imm8 => select_immediate::<Pshufhw>(instruction),
        Code::Shufps_xmm_xmmm128_imm8 => select_immediate::<Shufps>(instruction),
        Code::Shufpd_xmm_xmmm128_imm8 => select_immediate::<Shufpd>(instruction),
        Code::Palignr_xmm_xmmm128_imm8 => select_immediate::<Palignr>(instruction),
        Code::Blendps_xmm_xmmm128_imm8 => select_immediate::<Blendps>(instruction),
        Code::Blendpd_xmm_xmmm128_imm8 => select_immediate::<Blendpd>(instruction),
        Code::Pblendw_xmm_xmmm128_imm8 => select_immediate::<Pblendw>(instruction),
        Code::Mpsadbw_xmm_xmmm128_imm8 => select_immediate::<Mpsadbw>(instruction),
        Code::Pblendvb_xmm_xmmm128 => select_blend::<ByBytes>(instruction),
        Code::Blendvps_xmm_xmmm128 => select_blend::<ByDwords>(instruction),
        Code::Blendvpd_xmm_xmmm128 => select_blend::<ByQwords>(instruction),
        Code::Ptest_xmm_xmmm128 => {
            Selected::inner(if in_memory(instruction, 1) { test::<M128> } else { test::<Register> })
        }
        _ => None,
    }
}
