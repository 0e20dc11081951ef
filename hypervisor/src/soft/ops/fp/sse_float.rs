//! SSE floating point, by the host's own instructions under the guest's MXCSR.
//!
//! An operation is three host instructions: load MXCSR, compute, store MXCSR. While the guest masks
//! all exceptions its own MXCSR is loaded as it is, and what comes out, with the flags raised, is its new
//! one. With an exception unmasked, the operation still runs with all masked, flags clear, and [`unmasked`] finds
//! out from the flags what the guest must see; the host never traps.
//!
//! One thing differs from hardware then: an unmasked overflow or underflow always comes with the precision
//! flag, where hardware sets it only if the result is inexact apart from its exponent.
//!
//! What must hold: rounding mode, flush-to-zero and denormals-are-zero of the host are the default ones
//! when a handler returns, since code outside computes with them. The host's exception flags are
//! nobody's.

use std::arch::asm;

use iced_x86::{Code, Instruction};

use super::sse_integer::{lanes, shuffle};
use super::vector::{M32, M64, M128, Register, Source, bits, in_memory, vector};
use crate::soft::cpu::{CR4_OSXMMEXCPT, Cpu, Trap};
use crate::soft::fpu::MXCSR_DEFAULT;
use crate::soft::op::{Op, Selected};

/// Exception flags in MXCSR; their masks are seven bits further up.
const FLAGS: u32 = 0x3f;
const MASKS: u32 = FLAGS << 7;
/// Invalid, denormal and divide-by-zero: found before the operation is carried out.
const EARLY: u32 = 0b111;
const UNDERFLOW: u32 = 1 << 4;
const PRECISION: u32 = 1 << 5;
const ROUNDING: u32 = 3 << 13;
const FLUSH_TO_ZERO: u32 = 1 << 15;
const LOW: u128 = u64::MAX as u128;

/// Puts the host's default MXCSR back, unless the rounding and flushing bits of what is loaded
/// are the default ones anyway.
#[inline(always)]
fn restore_host(loaded: u32) {
    if loaded & !FLAGS != MXCSR_DEFAULT {
        // SAFETY: loads the default value of a register that the ABI wants at its default.
        unsafe {
            asm!("ldmxcsr [{}]", in(reg) &raw const MXCSR_DEFAULT_VALUE, options(nostack, readonly));
        }
    }
}

static MXCSR_DEFAULT_VALUE: u32 = MXCSR_DEFAULT;

/// Runs `compute`, which loads the MXCSR given, computes, and returns MXCSR after that; `Err` if the guest gets
/// an exception. The caller writes the result.
#[inline(always)]
pub(super) fn under_mxcsr<R>(cpu: &mut Cpu, compute: impl Fn(u32) -> (R, u32)) -> Result<R, Trap> {
    let guest = cpu.mxcsr;
    if guest & MASKS != MASKS {
        return unmasked(cpu, compute);
    }
    let (result, after) = compute(guest);
    restore_host(guest);
    cpu.mxcsr = guest | after & FLAGS;
    Ok(result)
}

#[cold]
#[inline(never)]
fn unmasked<R>(cpu: &mut Cpu, compute: impl Fn(u32) -> (R, u32)) -> Result<R, Trap> {
    let guest = cpu.mxcsr;
    let enabled = !(guest >> 7) & FLAGS;
    // Flush-to-zero works only with underflow masked.
    let flush = if enabled & UNDERFLOW == 0 { guest & FLUSH_TO_ZERO } else { 0 };
    let base = guest & !(FLAGS | FLUSH_TO_ZERO) | MASKS;
    let (result, after) = compute(base | flush);
    let mut raised = after & FLAGS;
    if raised & enabled & EARLY != 0 {
        // Nothing is computed then, so nothing can overflow, underflow or be inexact.
        raised &= EARLY;
    } else if enabled & UNDERFLOW != 0 {
        // Unmasked underflow is raised for every tiny result, masked only for inexact ones. Flushing
        // to zero is what tells a tiny result from others.
        let (_, flushed) = compute(base | FLUSH_TO_ZERO);
        raised |= flushed & UNDERFLOW;
    }
    restore_host(base | flush | FLUSH_TO_ZERO);
    cpu.mxcsr |= raised;
    if raised & enabled == 0 {
        return Ok(result);
    }
    // Without the operating system's consent to #XM it is #UD.
    Err(if cpu.cr4 & CR4_OSXMMEXCPT != 0 { cpu.xm() } else { cpu.ud() })
}

/// A function of two vectors that depends on MXCSR.
trait Float {
    /// The result, and MXCSR with the flags raised.
    fn apply(a: u128, b: u128, imm: u8, mxcsr: u32) -> (u128, u32);
}

fn float<O: Float, S: Source>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.require_sse()?;
    let b = S::read(cpu, op)?;
    let a = cpu.xmm(op.dst);
    let imm = op.imm as u8;
    let result = under_mxcsr(cpu, |mxcsr| O::apply(a, b, imm, mxcsr))?;
    *cpu.xmm_mut(op.dst) = result;
    Ok(())
}

/// A [`Float`] that is one host instruction.
macro_rules! host_float {
    ($name:ident $text:literal $($imm:literal)?) => {
        struct $name;
        impl Float for $name {
            #[inline(always)]
            fn apply(a: u128, b: u128, _: u8, mut mxcsr: u32) -> (u128, u32) {
                let mut result = vector(a);
                // SAFETY: an SSE instruction on registers between two accesses to `mxcsr`; all
                // exceptions are masked in it.
                unsafe {
                    asm!(
                        "ldmxcsr [{m}]",
                        concat!($text, " {a}, {b}" $(, ", ", $imm)?),
                        "stmxcsr [{m}]",
                        m = in(reg) &raw mut mxcsr,
                        a = inout(xmm_reg) result,
                        b = in(xmm_reg) vector(b),
                        options(nostack),
                    );
                }
                (bits(result), mxcsr)
            }
        }
    };
}

fn select<O: Float, M: Source>(instruction: &Instruction) -> Option<Selected> {
    Selected::inner(if in_memory(instruction, 1) { float::<O, M> } else { float::<O, Register> })
}

macro_rules! table {
    ($instruction:ident: $($memory:ident { $($code:ident $text:literal)+ })+) => {
        match $instruction.code() {
            $($(Code::$code => {
                host_float!(Host $text);
                select::<Host, $memory>($instruction)
            })+)+
            _ => None,
        }
    };
}

fn arithmetic(instruction: &Instruction) -> Option<Selected> {
    table! { instruction:
        M128 {
            Addps_xmm_xmmm128 "addps"
            Addpd_xmm_xmmm128 "addpd"
            Subps_xmm_xmmm128 "subps"
            Subpd_xmm_xmmm128 "subpd"
            Mulps_xmm_xmmm128 "mulps"
            Mulpd_xmm_xmmm128 "mulpd"
            Divps_xmm_xmmm128 "divps"
            Divpd_xmm_xmmm128 "divpd"
            Sqrtps_xmm_xmmm128 "sqrtps"
            Sqrtpd_xmm_xmmm128 "sqrtpd"
            Minps_xmm_xmmm128 "minps"
            Minpd_xmm_xmmm128 "minpd"
            Maxps_xmm_xmmm128 "maxps"
            Maxpd_xmm_xmmm128 "maxpd"
            Addsubps_xmm_xmmm128 "addsubps"
            Addsubpd_xmm_xmmm128 "addsubpd"
            Cvtpd2ps_xmm_xmmm128 "cvtpd2ps"
            Cvtdq2ps_xmm_xmmm128 "cvtdq2ps"
            Cvtps2dq_xmm_xmmm128 "cvtps2dq"
            Cvttps2dq_xmm_xmmm128 "cvttps2dq"
            Cvtpd2dq_xmm_xmmm128 "cvtpd2dq"
            Cvttpd2dq_xmm_xmmm128 "cvttpd2dq"
        }
        M64 {
            Addsd_xmm_xmmm64 "addsd"
            Subsd_xmm_xmmm64 "subsd"
            Mulsd_xmm_xmmm64 "mulsd"
            Divsd_xmm_xmmm64 "divsd"
            Sqrtsd_xmm_xmmm64 "sqrtsd"
            Minsd_xmm_xmmm64 "minsd"
            Maxsd_xmm_xmmm64 "maxsd"
            Cvtsd2ss_xmm_xmmm64 "cvtsd2ss"
            Cvtps2pd_xmm_xmmm64 "cvtps2pd"
            Cvtdq2pd_xmm_xmmm64 "cvtdq2pd"
        }
        M32 {
            Addss_xmm_xmmm32 "addss"
            Subss_xmm_xmmm32 "subss"
            Mulss_xmm_xmmm32 "mulss"
            Divss_xmm_xmmm32 "divss"
            Sqrtss_xmm_xmmm32 "sqrtss"
            Minss_xmm_xmmm32 "minss"
            Maxss_xmm_xmmm32 "maxss"
            Cvtss2sd_xmm_xmmm32 "cvtss2sd"
        }
    }
}

/// CMPPS and its kin: the low three bits of the immediate choose the predicate.
macro_rules! compare {
    ($($name:ident $text:literal: $($predicate:literal)+;)+) => {$(
        struct $name;
        impl Float for $name {
            #[inline(always)]
            fn apply(a: u128, b: u128, imm: u8, mxcsr: u32) -> (u128, u32) {
                match imm & 7 {
                    $($predicate => {
                        host_float!(Host $text $predicate);
                        Host::apply(a, b, imm, mxcsr)
                    })+
                    _ => unreachable!("three bits"),
                }
            }
        }
    )+};
}
compare! {
    Cmpps "cmpps": 0 1 2 3 4 5 6 7;
    Cmppd "cmppd": 0 1 2 3 4 5 6 7;
    Cmpss "cmpss": 0 1 2 3 4 5 6 7;
    Cmpsd "cmpsd": 0 1 2 3 4 5 6 7;
}

/// ROUNDPS and its kin: the immediate may name the rounding mode and may suppress the precision exception.
macro_rules! round {
    ($name:ident $text:literal) => {
        struct $name;
        impl Float for $name {
            #[inline(always)]
            fn apply(a: u128, b: u128, imm: u8, mxcsr: u32) -> (u128, u32) {
                // Immediate 4 takes the rounding mode from MXCSR, where it is put if it is not the guest's.
                host_float!(Host $text 4);
                let rounding = if imm & 4 != 0 { mxcsr } else { u32::from(imm) << 13 };
                let loaded = mxcsr & !(ROUNDING | FLAGS) | rounding & ROUNDING;
                let (result, after) = Host::apply(a, b, 0, loaded);
                restore_host(loaded);
                let ignored = if imm & 8 != 0 { PRECISION } else { 0 };
                (result, after & !ignored)
            }
        }
    };
}
round!(Roundps "roundps");
round!(Roundpd "roundpd");
round!(Roundss "roundss");
round!(Roundsd "roundsd");

/// The even lanes of two vectors, and the odd ones.
fn even_and_odd<const SINGLE: bool>(a: u128, b: u128) -> (u128, u128) {
    if SINGLE {
        (shuffle(a, b, 0b10_00_10_00, 32), shuffle(a, b, 0b11_01_11_01, 32))
    } else {
        (a & LOW | b << 64, a >> 64 | b & !LOW)
    }
}

/// HADDPS and its kin, made of the vertical instruction: which of two NaNs survives is thereby a matter of operand
/// order, on which the manuals of all vendors agree.
macro_rules! horizontal {
    ($($name:ident $text:literal $single:literal;)+) => {$(
        struct $name;
        impl Float for $name {
            #[inline(always)]
            fn apply(a: u128, b: u128, imm: u8, mxcsr: u32) -> (u128, u32) {
                host_float!(Host $text);
                let (even, odd) = even_and_odd::<$single>(a, b);
                Host::apply(even, odd, imm, mxcsr)
            }
        }
    )+};
}
horizontal! {
    Haddps "addps" true;
    Haddpd "addpd" false;
    Hsubps "subps" true;
    Hsubpd "subpd" false;
}

/// DPPS, DPPD: the upper half of the immediate chooses the factors, the lower one the lanes that get the sum. A factor
/// not chosen counts as a product of +0, which is what multiplying zeros gives, without exceptions.
/// Multiplications and additions raise their exceptions one step after the other. The order of the operands of
/// an addition, which decides between two NaNs, is that of Intel's processors.
fn dot_product<S: Source, const SINGLE: bool>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    host_float!(MultiplySingles "mulps");
    host_float!(MultiplyDoubles "mulpd");
    host_float!(AddSingles "addps");
    host_float!(AddDoubles "addpd");
    cpu.require_sse()?;
    let imm = op.imm as u8;
    let width = if SINGLE { 32 } else { 64 };
    let factors = lanes(imm >> 4, width);
    let (a, b) = (cpu.xmm(op.dst) & factors, S::read(cpu, op)? & factors);
    let sum = if SINGLE {
        let products = under_mxcsr(cpu, |mxcsr| MultiplySingles::apply(a, b, 0, mxcsr))?;
        let neighbours = shuffle(products, products, 0b10_11_00_01, 32);
        let pairs = under_mxcsr(cpu, |m| AddSingles::apply(neighbours, products, 0, m))?;
        under_mxcsr(cpu, |m| AddSingles::apply(pairs, pairs.rotate_left(64), 0, m))?
    } else {
        let products = under_mxcsr(cpu, |mxcsr| MultiplyDoubles::apply(a, b, 0, mxcsr))?;
        under_mxcsr(cpu, |m| AddDoubles::apply(products, products.rotate_left(64), 0, m))?
    };
    *cpu.xmm_mut(op.dst) = sum & lanes(imm & 0xf, width);
    Ok(())
}

fn composed(instruction: &Instruction) -> Option<Selected> {
    match instruction.code() {
        Code::Cmpps_xmm_xmmm128_imm8 => select::<Cmpps, M128>(instruction),
        Code::Cmppd_xmm_xmmm128_imm8 => select::<Cmppd, M128>(instruction),
        Code::Cmpss_xmm_xmmm32_imm8 => select::<Cmpss, M32>(instruction),
        Code::Cmpsd_xmm_xmmm64_imm8 => select::<Cmpsd, M64>(instruction),
        Code::Roundps_xmm_xmmm128_imm8 => select::<Roundps, M128>(instruction),
        Code::Roundpd_xmm_xmmm128_imm8 => select::<Roundpd, M128>(instruction),
        Code::Roundss_xmm_xmmm32_imm8 => select::<Roundss, M32>(instruction),
        Code::Roundsd_xmm_xmmm64_imm8 => select::<Roundsd, M64>(instruction),
        Code::Haddps_xmm_xmmm128 => select::<Haddps, M128>(instruction),
        Code::Haddpd_xmm_xmmm128 => select::<Haddpd, M128>(instruction),
        Code::Hsubps_xmm_xmmm128 => select::<Hsubps, M128>(instruction),
        Code::Hsubpd_xmm_xmmm128 => select::<Hsubpd, M128>(instruction),
        Code::Dpps_xmm_xmmm128_imm8 if in_memory(instruction, 1) => {
            Selected::inner(dot_product::<M128, true>)
        }
        Code::Dpps_xmm_xmmm128_imm8 => Selected::inner(dot_product::<Register, true>),
        Code::Dppd_xmm_xmmm128_imm8 if in_memory(instruction, 1) => {
            Selected::inner(dot_product::<M128, false>)
        }
        Code::Dppd_xmm_xmmm128_imm8 => Selected::inner(dot_product::<Register, false>),
        _ => None,
    }
}

/// The handler of an instruction of this group.
pub fn handler(instruction: &Instruction) -> Option<Selected> {
    arithmetic(instruction).or_else(|| composed(instruction))
}
