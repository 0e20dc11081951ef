//! SSE conversions between numbers and general registers, ordered comparisons, and the two approximations.

use std::arch::asm;

use iced_x86::{Code, Instruction};

use super::sse_float::under_mxcsr;
use super::vector::{M32, M64, M128, Register, Source, bits, in_memory, vector};
use crate::soft::cpu::{Cpu, Trap};
use crate::soft::op::{Int, Op, Selected};

/// A conversion of lanes that depends on MXCSR.
pub(super) trait Conversion {
    /// The result, and MXCSR with the flags raised.
    fn apply(value: u128, mxcsr: u32) -> (u128, u32);
}

/// Converts under the guest's MXCSR.
pub(super) fn convert<C: Conversion>(cpu: &mut Cpu, value: u128) -> Result<u128, Trap> {
    under_mxcsr(cpu, |mxcsr| C::apply(value, mxcsr))
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
                // SAFETY: an SSE instruction on registers between two accesses to `mxcsr`; all
                // exceptions are masked in it.
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
                // SAFETY: an SSE instruction on registers between two accesses to `mxcsr`; all
                // exceptions are masked in it.
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
                // SAFETY: as for conversions; STMXCSR leaves the flags as the comparison set them.
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
    conversions(instruction).or_else(|| approximations(instruction))
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
