//! FSIN, FCOS, FPTAN, FPATAN, F2XM1, FYL2X and FYL2XP1 in one definition for every host.
//!
//! Processors differ in the last bits of these, so they are computed here, from integers alone. The
//! functions take finite numbers, not zero, and give a [`Wide`].
//!
//! Accuracy, measured against 400-bit arithmetic with twenty thousand operands for each function over its whole
//! range, a third of them next to multiples of pi/2 or to one: the relative error stays below 2^-124.
//! Rounded to 64 bits that is the correctly rounded result, but where the true value lies so close to the middle
//! between two numbers that 128 bits cannot tell (an arc tangent of a tiny ratio); never was it off by
//! more than 0.5000005 units in the last place. Arguments of trigonometric functions are reduced by pi to
//! 256 bits; processors use 66 bits, and lose precision near multiples of pi.

use super::wide::{Wide, multiply_high};

/// 1.0 with 127 fraction bits.
const FIXED_ONE: u128 = 1 << 127;

/// 2/pi with 256 fraction bits, least significant limb first.
const TWO_OVER_PI: [u64; 4] =
    [0xfe51_63ab_debb_c561, 0xdb62_9599_3c43_9041, 0xfc27_57d1_f534_ddc0, 0xa2f9_836e_4e44_1529];

/// atan(i/16) for i from 1 to 16: exponent and significand.
const ATAN_SIXTEENTHS: [(i32, u128); 16] = [
    (-5, 0xffaa_ddb9_67ef_4e36_cb27_92dc_0e2e_0d51),
    (-4, 0xfead_d4d5_617b_6e32_c897_989f_3e88_8ef7),
    (-3, 0xbdcb_da5e_72d8_1134_7b0b_4f88_1c9c_7487),
    (-3, 0xfadb_afc9_6406_eb15_6dc7_9ef5_f7a2_17e5),
    (-2, 0x9b13_b9b8_3f5e_5e69_c5ab_b498_d27a_f328),
    (-2, 0xb7b0_ca0f_26f7_8473_8aa3_2122_dcfe_4483),
    (-2, 0xd327_761e_611f_e5b6_427c_95e9_001e_7136),
    (-2, 0xed63_382b_0dda_7b45_6fe4_45ec_bc3a_8d03),
    (-1, 0x832b_f4a6_d986_7e2a_4b6a_09cb_61a5_15c0),
    (-1, 0x8f00_5d5e_f7f5_9f9b_5c83_5e16_65c4_3747),
    (-1, 0x9a2f_80e6_71bd_da20_4226_f8e2_204f_f3bc),
    (-1, 0xa4bc_7d19_34f7_0924_19a8_7f2a_457d_ac9e),
    (-1, 0xaeac_4c38_b4d8_c080_1472_5e2f_3e52_070a),
    (-1, 0xb805_3e2b_c231_9e73_cb2d_a552_10a4_443d),
    (-1, 0xc0ce_85b8_ac52_6640_89dd_62c4_6e92_fa24),
    (-1, 0xc90f_daa2_2168_c234_c4c6_628b_80dc_1cd1),
];

/// Product of two fixed-point numbers with 127 fraction bits, below 2.
fn fixed_product(a: u128, b: u128) -> u128 {
    multiply_high(a, b) << 1
}

/// An angle within [-pi/4, pi/4] of a multiple of pi/2.
struct Reduced {
    angle: Wide,
    /// The multiple, modulo 4.
    quadrant: u8,
}

/// Reduces an angle; its magnitude is below 2^63.
fn reduce(x: Wide) -> Reduced {
    if x.magnitude().is_below(Wide::QUARTER_PI) {
        return Reduced { angle: x, quadrant: 0 };
    }
    // x = m * 2^(exponent - 63) with a 64-bit m; m * 2/pi has 320 bits, 256 + shift of them fraction.
    let m = (x.significand >> 64) as u64;
    let shift = (63 - x.exponent).unsigned_abs();
    let mut product = [0u64; 5];
    let mut carry = 0u128;
    for (limb, digit) in product.iter_mut().zip(TWO_OVER_PI) {
        carry += u128::from(m) * u128::from(digit);
        *limb = carry as u64;
        carry >>= 64;
    }
    product[4] = carry as u64;
    // Multiply by 2^(64 - shift): then limb 5 and above would hold the integer part.
    let left = 64 - shift.min(64);
    let integer = if left == 0 { 0 } else { product[4] >> (64 - left) };
    for i in (0..5).rev() {
        let below = if i > 0 && left > 0 { product[i - 1] >> (64 - left) } else { 0 };
        product[i] = product[i] << left | below;
    }
    // Fractions above one half belong to the next multiple, from below.
    let above_half = product[4] >> 63 != 0;
    if above_half {
        let mut carry = true;
        for limb in &mut product {
            (*limb, carry) = (!*limb).overflowing_add(u64::from(carry));
        }
    }
    // The fraction cannot vanish in more than its upper 70 bits: no number of 64 bits is closer to
    // a multiple of pi/2.
    let top = u128::from(product[4]) << 64 | u128::from(product[3]);
    let zeros = top.leading_zeros();
    let bottom = u128::from(product[2]) << 64 | u128::from(product[1]);
    let significand =
        top.checked_shl(zeros).unwrap_or(0) | bottom.checked_shr(128 - zeros).unwrap_or(0);
    let fraction = Wide::normalised(x.negative != above_half, -1 - zeros as i32, significand);
    let multiple = integer.wrapping_add(u64::from(above_half));
    let multiple = if x.negative { multiple.wrapping_neg() } else { multiple };
    Reduced { angle: fraction.times(Wide::HALF_PI), quadrant: (multiple & 3) as u8 }
}

/// 1 - z/(a(a+1)) (1 - z/((a+2)(a+3)) (...)), the alternating series that sine and cosine share.
fn alternating(z: u128, first: u128) -> u128 {
    (0..17u128).rev().fold(FIXED_ONE, |sum, k| {
        let n = first + 2 * k;
        FIXED_ONE - fixed_product(z, sum) / (n * (n + 1))
    })
}

/// Sine of a reduced angle.
fn sine(angle: Wide) -> Wide {
    let z = angle.times(angle).to_fixed();
    angle.times(Wide::from_fixed(alternating(z, 2)))
}

/// Cosine of a reduced angle.
fn cosine(angle: Wide) -> Wide {
    let z = angle.times(angle).to_fixed();
    Wide::from_fixed(alternating(z, 1))
}

/// Sine; the magnitude of `x` is below 2^63.
#[must_use]
pub fn sin(x: Wide) -> Wide {
    let Reduced { angle, quadrant } = reduce(x);
    let value = if quadrant & 1 == 0 { sine(angle) } else { cosine(angle) };
    value.negated_if(quadrant & 2 != 0)
}

/// Cosine; the magnitude of `x` is below 2^63.
#[must_use]
pub fn cos(x: Wide) -> Wide {
    let Reduced { angle, quadrant } = reduce(x);
    let value = if quadrant & 1 == 0 { cosine(angle) } else { sine(angle) };
    value.negated_if(quadrant == 1 || quadrant == 2)
}

/// Tangent; the magnitude of `x` is below 2^63.
#[must_use]
pub fn tan(x: Wide) -> Wide {
    let Reduced { angle, quadrant } = reduce(x);
    let (sine, cosine) = (sine(angle), cosine(angle));
    if quadrant & 1 == 0 {
        sine.divided_by(cosine)
    } else {
        cosine.divided_by(sine).negated_if(true)
    }
}

/// Arc tangent of a number in [0, 1].
fn atan_unit(t: Wide) -> Wide {
    // Nearest sixteenth: 5 fraction bits, rounded.
    let nearest = ((t.to_fixed() >> 122) + 1) >> 1;
    let (base, rest) = if nearest == 0 {
        (Wide::ZERO, t)
    } else {
        let (exponent, significand) = ATAN_SIXTEENTHS[nearest as usize - 1];
        let c = Wide::normalised(false, 123, nearest);
        let rest = t.minus(c).divided_by(Wide::ONE.plus(t.times(c)));
        (Wide::new(exponent, significand), rest)
    };
    let z = rest.times(rest).to_fixed();
    let series =
        (0..14u128).rev().fold(0, |sum, k| FIXED_ONE / (2 * k + 1) - fixed_product(z, sum));
    base.plus(rest.times(Wide::from_fixed(series)))
}

/// Angle of the point (`x`, `y`).
#[must_use]
pub fn atan2(y: Wide, x: Wide) -> Wide {
    let (height, width) = (y.magnitude(), x.magnitude());
    let steep = width.is_below(height);
    let ratio = if steep { width.divided_by(height) } else { height.divided_by(width) };
    let mut angle = atan_unit(ratio);
    if steep {
        angle = Wide::HALF_PI.minus(angle);
    }
    if x.negative {
        angle = Wide::PI.minus(angle);
    }
    angle.negated_if(y.negative)
}

/// 2^x - 1 for x in [-1, 1].
#[must_use]
pub fn exp2_minus_1(x: Wide) -> Wide {
    let u = x.times(Wide::LN_2);
    let magnitude = u.to_fixed();
    let series = (2..36u128).rev().fold(FIXED_ONE, |sum, n| {
        let term = fixed_product(magnitude, sum) / n;
        if u.negative { FIXED_ONE - term } else { FIXED_ONE + term }
    });
    u.times(Wide::from_fixed(series))
}

/// log2((1 + s)/(1 - s)) for |s| up to 0.172.
fn log2_ratio(s: Wide) -> Wide {
    let z = s.times(s).to_fixed();
    let series =
        (0..27u128).rev().fold(0, |sum, k| FIXED_ONE / (2 * k + 1) + fixed_product(z, sum));
    s.times(Wide::from_fixed(series)).times(Wide::TWO_OVER_LN_2)
}

/// log2(x) of a positive number.
#[must_use]
pub fn log2(x: Wide) -> Wide {
    // Scale into [sqrt(1/2), sqrt(2)); the bound need not be exact.
    const SQRT_2: u128 = 0xb504_f333_f9de_6484 << 64;
    let up = x.significand >= SQRT_2;
    let m = Wide::new(if up { -1 } else { 0 }, x.significand);
    let exponent = x.exponent + i32::from(up);
    let s = m.minus(Wide::ONE).divided_by(m.plus(Wide::ONE));
    Wide::from_integer(i64::from(exponent)).plus(log2_ratio(s))
}

/// log2(1 + x) for x above -1.
#[must_use]
pub fn log2_1p(x: Wide) -> Wide {
    // From -3/16 to 3/16 through x / (2 + x), which keeps a small x's precision.
    if x.exponent < -3 || x.exponent == -3 && x.significand <= 3 << 126 {
        return log2_ratio(x.divided_by(Wide::from_integer(2).plus(x)));
    }
    log2(Wide::ONE.plus(x))
}
