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

use super::sse_integer::lanes;
use super::vector::{M32, M64, M128, Register, Source, bits, in_memory, vector};
use crate::soft::cpu::{CR4_OSXMMEXCPT, Cpu, Trap};
use crate::soft::fpu::MXCSR_DEFAULT;
use crate::soft::op::{Int, Op, Selected};

/// Exception flags in MXCSR; their masks are seven bits further up.
const FLAGS: u32 = 0x3f;
const MASKS: u32 = FLAGS << 7;
/// Invalid, denormal and divide-by-zero: found before the operation is carried out.
const EARLY: u32 = 0b111;
const UNDERFLOW: u32 = 1 << 4;
const PRECISION: u32 = 1 << 5;
const ROUNDING: u32 = 3 << 13;
const FLUSH_TO_ZERO: u32 = 1 << 15;

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
fn under_mxcsr<R>(cpu: &mut Cpu, compute: impl Fn(u32) -> (R, u32)) -> Result<R, Trap> {
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

/// A conversion of lanes that depends on MXCSR.
pub(super) trait Conversion {
    /// The result, and MXCSR with the flags raised.
    fn apply(value: u128, mxcsr: u32) -> (u128, u32);
}

/// Converts under the guest's MXCSR.
pub(super) fn convert<C: Conversion>(cpu: &mut Cpu, value: u128) -> Result<u128, Trap> {
    under_mxcsr(cpu, |mxcsr| C::apply(value, mxcsr))
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
            Haddps_xmm_xmmm128 "haddps"
            Haddpd_xmm_xmmm128 "haddpd"
            Hsubps_xmm_xmmm128 "hsubps"
            Hsubpd_xmm_xmmm128 "hsubpd"
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

/// DPPS, DPPD: the upper half of the immediate chooses the factors, the lower one the lanes that get the sum. A
/// factor not chosen counts as a product of +0, which is what multiplying zeros gives, without exceptions.
macro_rules! dot_product {
    ($name:ident $text:literal $width:literal) => {
        struct $name;
        impl Float for $name {
            #[inline(always)]
            fn apply(a: u128, b: u128, imm: u8, mxcsr: u32) -> (u128, u32) {
                host_float!(Host $text 0xff);
                let factors = lanes(imm >> 4, $width);
                let (sum, after) = Host::apply(a & factors, b & factors, 0, mxcsr);
                (sum & lanes(imm & 0xf, $width), after)
            }
        }
    };
}
dot_product!(Dpps "dpps" 32);
dot_product!(Dppd "dppd" 64);

/// A dot product. While an exception is unmasked, its multiplications and additions raise theirs one step after
/// the other, and are executed so before the whole.
fn dot_product<O: Float, S: Source, const SINGLE: bool>(
    cpu: &mut Cpu,
    op: &Op,
) -> Result<(), Trap> {
    cpu.require_sse()?;
    if cpu.mxcsr & MASKS != MASKS {
        host_float!(MultiplySingles "mulps");
        host_float!(MultiplyDoubles "mulpd");
        host_float!(AddSingles "haddps");
        host_float!(AddDoubles "haddpd");
        let factors = lanes(op.imm as u8 >> 4, if SINGLE { 32 } else { 64 });
        let (a, b) = (cpu.xmm(op.dst) & factors, S::read(cpu, op)? & factors);
        if SINGLE {
            let products = under_mxcsr(cpu, |mxcsr| MultiplySingles::apply(a, b, 0, mxcsr))?;
            let sums = under_mxcsr(cpu, |m| AddSingles::apply(products, products, 0, m))?;
            under_mxcsr(cpu, |mxcsr| AddSingles::apply(sums, sums, 0, mxcsr))?;
        } else {
            let products = under_mxcsr(cpu, |mxcsr| MultiplyDoubles::apply(a, b, 0, mxcsr))?;
            under_mxcsr(cpu, |mxcsr| AddDoubles::apply(products, products, 0, mxcsr))?;
        }
    }
    float::<O, S>(cpu, op)
}

fn immediate(instruction: &Instruction) -> Option<Selected> {
    match instruction.code() {
        Code::Cmpps_xmm_xmmm128_imm8 => select::<Cmpps, M128>(instruction),
        Code::Cmppd_xmm_xmmm128_imm8 => select::<Cmppd, M128>(instruction),
        Code::Cmpss_xmm_xmmm32_imm8 => select::<Cmpss, M32>(instruction),
        Code::Cmpsd_xmm_xmmm64_imm8 => select::<Cmpsd, M64>(instruction),
        Code::Roundps_xmm_xmmm128_imm8 => select::<Roundps, M128>(instruction),
        Code::Roundpd_xmm_xmmm128_imm8 => select::<Roundpd, M128>(instruction),
        Code::Roundss_xmm_xmmm32_imm8 => select::<Roundss, M32>(instruction),
        Code::Roundsd_xmm_xmmm64_imm8 => select::<Roundsd, M64>(instruction),
        Code::Dpps_xmm_xmmm128_imm8 if in_memory(instruction, 1) => {
            Selected::inner(dot_product::<Dpps, M128, true>)
        }
        Code::Dpps_xmm_xmmm128_imm8 => Selected::inner(dot_product::<Dpps, Register, true>),
        Code::Dppd_xmm_xmmm128_imm8 if in_memory(instruction, 1) => {
            Selected::inner(dot_product::<Dppd, M128, false>)
        }
        Code::Dppd_xmm_xmmm128_imm8 => Selected::inner(dot_product::<Dppd, Register, false>),
        _ => None,
    }
}

/// A conversion from a vector to a general register of 64 bits, the upper 32 zero for the shorter form.
trait ToInteger {
    fn apply(b: u128, mxcsr: u32) -> (u64, u32);
}

macro_rules! to_integer {
    ($($name:ident $text:literal)+) => {$(
        struct $name;
        impl ToInteger for $name {
            #[inline(always)]
            fn apply(b: u128, mut mxcsr: u32) -> (u64, u32) {
                let result: u64;
                // SAFETY: as for `host_float`.
                unsafe {
                    asm!(
                        "ldmxcsr [{m}]",
                        concat!($text, ", {b}"),
                        "stmxcsr [{m}]",
                        m = in(reg) &raw mut mxcsr,
                        r = out(reg) result,
                        b = in(xmm_reg) vector(b),
                        options(nostack),
                    );
                }
                (result, mxcsr)
            }
        }
    )+};
}
to_integer! {
    Cvtss2si32 "cvtss2si {r:e}"
    Cvtss2si64 "cvtss2si {r:r}"
    Cvttss2si32 "cvttss2si {r:e}"
    Cvttss2si64 "cvttss2si {r:r}"
    Cvtsd2si32 "cvtsd2si {r:e}"
    Cvtsd2si64 "cvtsd2si {r:r}"
    Cvttsd2si32 "cvttsd2si {r:e}"
    Cvttsd2si64 "cvttsd2si {r:r}"
}

fn to_integer<O: ToInteger, S: Source>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.require_sse()?;
    let b = S::read(cpu, op)?;
    let result = under_mxcsr(cpu, |mxcsr| O::apply(b, mxcsr))?;
    u64::set(cpu, op.dst, result);
    Ok(())
}

/// A conversion from a general register or memory to the low lane of a vector.
trait FromInteger {
    type Operand: Int;
    fn apply(a: u128, value: u64, mxcsr: u32) -> (u128, u32);
}

macro_rules! from_integer {
    ($($name:ident $type:ty, $text:literal)+) => {$(
        struct $name;
        impl FromInteger for $name {
            type Operand = $type;
            #[inline(always)]
            fn apply(a: u128, value: u64, mut mxcsr: u32) -> (u128, u32) {
                let mut result = vector(a);
                // SAFETY: as for `host_float`.
                unsafe {
                    asm!(
                        "ldmxcsr [{m}]",
                        $text,
                        "stmxcsr [{m}]",
                        m = in(reg) &raw mut mxcsr,
                        a = inout(xmm_reg) result,
                        r = in(reg) value,
                        options(nostack),
                    );
                }
                (bits(result), mxcsr)
            }
        }
    )+};
}
from_integer! {
    Cvtsi2ss32 u32, "cvtsi2ss {a}, {r:e}"
    Cvtsi2ss64 u64, "cvtsi2ss {a}, {r:r}"
    Cvtsi2sd32 u32, "cvtsi2sd {a}, {r:e}"
    Cvtsi2sd64 u64, "cvtsi2sd {a}, {r:r}"
}

fn from_integer<O: FromInteger, const MEMORY: bool>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.require_sse()?;
    let value = if MEMORY {
        cpu.load::<O::Operand>(cpu.ea(op))?.extend()
    } else {
        O::Operand::get(cpu, op.src)
    };
    let a = cpu.xmm(op.dst);
    let result = under_mxcsr(cpu, |mxcsr| O::apply(a, value, mxcsr))?;
    *cpu.xmm_mut(op.dst) = result;
    Ok(())
}

/// A comparison that sets ZF, PF and CF.
trait Ordering {
    /// CF, PF, ZF; and MXCSR.
    fn apply(a: u128, b: u128, mxcsr: u32) -> ((bool, bool, bool), u32);
}

macro_rules! ordering {
    ($($name:ident $text:literal)+) => {$(
        struct $name;
        impl Ordering for $name {
            #[inline(always)]
            fn apply(a: u128, b: u128, mut mxcsr: u32) -> ((bool, bool, bool), u32) {
                let (carry, parity, zero): (u8, u8, u8);
                // SAFETY: as for `host_float`; STMXCSR leaves the flags as the comparison set them.
                unsafe {
                    asm!(
                        "ldmxcsr [{m}]",
                        concat!($text, " {a}, {b}"),
                        "stmxcsr [{m}]",
                        "setc {c}",
                        "setp {p}",
                        "setz {z}",
                        m = in(reg) &raw mut mxcsr,
                        a = in(xmm_reg) vector(a),
                        b = in(xmm_reg) vector(b),
                        c = out(reg_byte) carry,
                        p = out(reg_byte) parity,
                        z = out(reg_byte) zero,
                        options(nostack),
                    );
                }
                ((carry != 0, parity != 0, zero != 0), mxcsr)
            }
        }
    )+};
}
ordering! {
    Comiss "comiss"
    Comisd "comisd"
    Ucomiss "ucomiss"
    Ucomisd "ucomisd"
}

fn ordering<O: Ordering, S: Source>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.require_sse()?;
    let b = S::read(cpu, op)?;
    let a = cpu.xmm(op.dst);
    let (carry, parity, zero) = under_mxcsr(cpu, |mxcsr| O::apply(a, b, mxcsr))?;
    cpu.flags.set_explicit(carry, parity, false, zero, false, false);
    Ok(())
}

fn conversions(instruction: &Instruction) -> Option<Selected> {
    let memory = in_memory(instruction, 1);
    macro_rules! by_place {
        ($function:ident, $operation:ident, $source:ident) => {
            Selected::inner(if memory {
                $function::<$operation, $source>
            } else {
                $function::<$operation, Register>
            })
        };
        ($operation:ident) => {
            Selected::inner(if memory {
                from_integer::<$operation, true>
            } else {
                from_integer::<$operation, false>
            })
        };
    }
    match instruction.code() {
        Code::Cvtss2si_r32_xmmm32 => by_place!(to_integer, Cvtss2si32, M32),
        Code::Cvtss2si_r64_xmmm32 => by_place!(to_integer, Cvtss2si64, M32),
        Code::Cvttss2si_r32_xmmm32 => by_place!(to_integer, Cvttss2si32, M32),
        Code::Cvttss2si_r64_xmmm32 => by_place!(to_integer, Cvttss2si64, M32),
        Code::Cvtsd2si_r32_xmmm64 => by_place!(to_integer, Cvtsd2si32, M64),
        Code::Cvtsd2si_r64_xmmm64 => by_place!(to_integer, Cvtsd2si64, M64),
        Code::Cvttsd2si_r32_xmmm64 => by_place!(to_integer, Cvttsd2si32, M64),
        Code::Cvttsd2si_r64_xmmm64 => by_place!(to_integer, Cvttsd2si64, M64),
        Code::Cvtsi2ss_xmm_rm32 => by_place!(Cvtsi2ss32),
        Code::Cvtsi2ss_xmm_rm64 => by_place!(Cvtsi2ss64),
        Code::Cvtsi2sd_xmm_rm32 => by_place!(Cvtsi2sd32),
        Code::Cvtsi2sd_xmm_rm64 => by_place!(Cvtsi2sd64),
        Code::Comiss_xmm_xmmm32 => by_place!(ordering, Comiss, M32),
        Code::Comisd_xmm_xmmm64 => by_place!(ordering, Comisd, M64),
        Code::Ucomiss_xmm_xmmm32 => by_place!(ordering, Ucomiss, M32),
        Code::Ucomisd_xmm_xmmm64 => by_place!(ordering, Ucomisd, M64),
        _ => None,
    }
}

/// Keeps sign, exponent and the upper twelve bits of the fraction.
fn to_twelve_bits(value: f32) -> u32 {
    value.to_bits() & !0x7ff
}

fn quieted(bits: u32) -> u32 {
    bits | 1 << 22
}

/// RCPSS of one lane. The manual bounds the relative error at 1.5 * 2^-12 and leaves the rest to the
/// processor; here it is 1/x correctly rounded, then truncated to twelve fraction bits. Denormals count as
/// zeros, results that would be denormal are zero. MXCSR plays no part.
fn reciprocal(x: u32) -> u32 {
    let value = f32::from_bits(x);
    if value.is_nan() {
        return quieted(x);
    }
    let sign = x & 1 << 31;
    if value.is_subnormal() {
        return sign | f32::INFINITY.to_bits();
    }
    let result = 1.0 / value;
    if result.is_subnormal() { sign } else { to_twelve_bits(result) }
}

/// RSQRTSS of one lane: as [`reciprocal`], from the square root in double precision.
fn reciprocal_root(x: u32) -> u32 {
    let value = f32::from_bits(x);
    if value.is_nan() {
        return quieted(x);
    }
    let sign = x & 1 << 31;
    if value.is_subnormal() || value == 0.0 {
        return sign | f32::INFINITY.to_bits();
    }
    if sign != 0 {
        // The default NaN.
        return 0xffc0_0000;
    }
    to_twelve_bits((1.0 / f64::from(value).sqrt()) as f32)
}

/// One of the two approximations on the low lane, or on all of them.
fn approximation<S: Source, const ROOT: bool, const ALL: bool>(
    cpu: &mut Cpu,
    op: &Op,
) -> Result<(), Trap> {
    cpu.require_sse()?;
    let b = S::read(cpu, op)?;
    let count = if ALL { 4 } else { 1 };
    let a = cpu.xmm_mut(op.dst);
    for shift in (0..count).map(|n| 32 * n) {
        let x = (b >> shift) as u32;
        let result = if ROOT { reciprocal_root(x) } else { reciprocal(x) };
        *a = *a & !(u128::from(u32::MAX) << shift) | u128::from(result) << shift;
    }
    Ok(())
}

fn approximations(instruction: &Instruction) -> Option<Selected> {
    let memory = in_memory(instruction, 1);
    macro_rules! by_place {
        ($source:ident, $root:literal, $all:literal) => {
            Selected::inner(if memory {
                approximation::<$source, $root, $all>
            } else {
                approximation::<Register, $root, $all>
            })
        };
    }
    match instruction.code() {
        Code::Rcpps_xmm_xmmm128 => by_place!(M128, false, true),
        Code::Rcpss_xmm_xmmm32 => by_place!(M32, false, false),
        Code::Rsqrtps_xmm_xmmm128 => by_place!(M128, true, true),
        Code::Rsqrtss_xmm_xmmm32 => by_place!(M32, true, false),
        _ => None,
    }
}

/// The handler of an instruction of this group.
pub fn handler(instruction: &Instruction) -> Option<Selected> {
    arithmetic(instruction)
        .or_else(|| conversions(instruction))
        .or_else(|| immediate(instruction))
        .or_else(|| approximations(instruction))
}

#[cfg(test)]
mod tests {
    use super::{reciprocal, reciprocal_root};

    #[test]
    fn approximations_stay_within_the_manuals_bound() {
        let bound = 1.5 / 4096.0;
        for x in (0x0080_0000..0x7f80_0000).step_by(997) {
            let value = f64::from(f32::from_bits(x));
            let root = f64::from(f32::from_bits(reciprocal_root(x))) * value.sqrt();
            assert!((root - 1.0).abs() < bound, "1/sqrt({value:e})");
            // Beyond, the result is denormal and counts as zero.
            if value < 8.0e37 {
                let product = f64::from(f32::from_bits(reciprocal(x))) * value;
                assert!((product - 1.0).abs() < bound, "1/{value:e}");
            }
        }
    }

    #[test]
    fn approximations_of_what_has_none() {
        let (infinity, zero, negative) = (0x7f80_0000, 0, 1 << 31);
        assert_eq!(reciprocal(zero), infinity);
        assert_eq!(reciprocal(negative), negative | infinity);
        assert_eq!(reciprocal(1), infinity);
        assert_eq!(reciprocal(negative | infinity), negative);
        assert_eq!(reciprocal(0x7f7f_ffff), 0);
        assert_eq!(reciprocal(0x7f80_0001), 0x7fc0_0001);
        assert_eq!(reciprocal_root(negative), negative | infinity);
        assert_eq!(reciprocal_root(infinity), 0);
        assert_eq!(reciprocal_root(0xbf80_0000), 0xffc0_0000);
    }
}
