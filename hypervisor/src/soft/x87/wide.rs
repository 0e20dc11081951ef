//! Floating point with a 128-bit significand: what the transcendental functions compute in.
//!
//! Every operation truncates; the relative error of each is below 2^-125, which leaves sixty bits to
//! lose before the rounding to 64 bits could notice. Nothing here is approximate in the sense of
//! depending on the host: plain integer arithmetic.

use super::super::fpu::{F80, status};

/// Exponent bias of double extended format.
pub const BIAS: i32 = 0x3fff;
/// What an unmasked overflow or underflow response adds to the exponent (vol. 1, 8.5.4 and 8.5.5).
const UNMASKED_SCALE: i32 = 24576;

/// `significand * 2^(exponent - 127)` with the sign given; the significand's top bit is set unless
/// the number is zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wide {
    /// Sign.
    pub negative: bool,
    /// Exponent of the top bit.
    pub exponent: i32,
    /// All 128 bits, the top one set; zero for zero.
    pub significand: u128,
}

/// The upper half of a 256-bit product.
#[must_use]
pub fn multiply_high(a: u128, b: u128) -> u128 {
    let (a1, a0) = (a >> 64, a & u128::from(u64::MAX));
    let (b1, b0) = (b >> 64, b & u128::from(u64::MAX));
    let low = a0 * b0;
    let (middle, other) = (a1 * b0, a0 * b1);
    let carry =
        ((low >> 64) + (middle & u128::from(u64::MAX)) + (other & u128::from(u64::MAX))) >> 64;
    a1 * b1 + (middle >> 64) + (other >> 64) + carry
}

impl Wide {
    /// Zero.
    pub const ZERO: Self = Self::new(0, 0);
    /// One.
    pub const ONE: Self = Self::new(0, 1 << 127);
    /// Pi.
    pub const PI: Self = Self::new(1, 0xc90f_daa2_2168_c234_c4c6_628b_80dc_1cd1);
    /// Half of pi.
    pub const HALF_PI: Self = Self { exponent: 0, ..Self::PI };
    /// A quarter of pi.
    pub const QUARTER_PI: Self = Self { exponent: -1, ..Self::PI };
    /// The natural logarithm of two.
    pub const LN_2: Self = Self::new(-1, 0xb172_17f7_d1cf_79ab_c9e3_b398_03f2_f6af);
    /// Two divided by it.
    pub const TWO_OVER_LN_2: Self = Self::new(1, 0xb8aa_3b29_5c17_f0bb_be87_fed0_691d_3e88);

    /// A positive number.
    #[must_use]
    pub const fn new(exponent: i32, significand: u128) -> Self {
        Self { negative: false, exponent, significand }
    }

    /// `significand * 2^(exponent - 127)` for any significand.
    #[must_use]
    pub const fn normalised(negative: bool, exponent: i32, significand: u128) -> Self {
        if significand == 0 {
            return Self { negative, ..Self::ZERO };
        }
        let shift = significand.leading_zeros();
        Self { negative, exponent: exponent - shift as i32, significand: significand << shift }
    }

    /// An integer.
    #[must_use]
    pub const fn from_integer(value: i64) -> Self {
        Self::normalised(value < 0, 127, value.unsigned_abs() as u128)
    }

    /// A finite number.
    #[must_use]
    pub const fn from_f80(value: F80) -> Self {
        // Denormals have the exponent of the smallest normal numbers.
        let biased = if value.exponent() == 0 { 1 } else { value.exponent() as i32 };
        Self::normalised(value.is_negative(), biased - BIAS, (value.significand as u128) << 64)
    }

    /// The number without its sign.
    #[must_use]
    pub const fn magnitude(self) -> Self {
        Self { negative: false, ..self }
    }

    /// The number with its sign changed if `flip`.
    #[must_use]
    pub const fn negated_if(self, flip: bool) -> Self {
        Self { negative: self.negative != flip, ..self }
    }

    /// Whether it is zero.
    #[must_use]
    pub const fn is_zero(self) -> bool {
        self.significand == 0
    }

    /// Whether its magnitude is below `other`'s; both positive or either zero.
    #[must_use]
    pub fn is_below(self, other: Self) -> bool {
        match (self.is_zero(), other.is_zero()) {
            (_, true) => false,
            (true, false) => true,
            (false, false) => {
                (self.exponent, self.significand) < (other.exponent, other.significand)
            }
        }
    }

    /// Sum.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        if self.is_zero() {
            return other;
        }
        if other.is_zero() {
            return self;
        }
        let (large, small) = if self.magnitude().is_below(other.magnitude()) {
            (other, self)
        } else {
            (self, other)
        };
        let distance = large.exponent.abs_diff(small.exponent);
        let aligned = small.significand.checked_shr(distance).unwrap_or(0);
        if large.negative != small.negative {
            let difference = large.significand - aligned;
            return Self::normalised(large.negative, large.exponent, difference);
        }
        let (sum, carry) = large.significand.overflowing_add(aligned);
        if carry {
            Self { exponent: large.exponent + 1, significand: sum >> 1 | 1 << 127, ..large }
        } else {
            Self { significand: sum, ..large }
        }
    }

    /// Difference.
    #[must_use]
    pub fn minus(self, other: Self) -> Self {
        self.plus(other.negated_if(true))
    }

    /// Product.
    #[must_use]
    pub fn times(self, other: Self) -> Self {
        // The product of two significands lies in [1/4, 1) of 2^256.
        Self::normalised(
            self.negative != other.negative,
            self.exponent + other.exponent + 1,
            multiply_high(self.significand, other.significand),
        )
    }

    /// Quotient; `divisor` is not zero.
    #[must_use]
    pub fn divided_by(self, divisor: Self) -> Self {
        if self.is_zero() {
            return self;
        }
        // Long division, one bit a step. The rest stays below the divisor, so that twice the rest has at
        // most 129 bits, and subtracting the divisor once brings it below again.
        let divisor_bits = divisor.significand;
        let mut quotient = u128::from(self.significand >= divisor_bits);
        let mut rest = self.significand - quotient * divisor_bits;
        for _ in 0..127 {
            let carried = rest >> 127 != 0;
            rest <<= 1;
            let bit = carried || rest >= divisor_bits;
            if bit {
                rest = rest.wrapping_sub(divisor_bits);
            }
            quotient = quotient << 1 | u128::from(bit);
        }
        Self::normalised(
            self.negative != divisor.negative,
            self.exponent - divisor.exponent,
            quotient,
        )
    }

    /// As a fixed-point number with 127 fraction bits; the number is in [0, 2).
    #[must_use]
    pub fn to_fixed(self) -> u128 {
        self.significand.checked_shr((-self.exponent).unsigned_abs()).unwrap_or(0)
    }

    /// From a fixed-point number with 127 fraction bits.
    #[must_use]
    pub const fn from_fixed(value: u128) -> Self {
        Self::normalised(false, 0, value)
    }

    /// Rounds to double extended format under a control word (whose precision field does not concern
    /// transcendental functions), with the responses to overflow and underflow it asks for. `inexact`
    /// says that the true value is not exactly this one. Returns the number and the flags raised,
    /// C1 included.
    #[must_use]
    pub fn round(self, inexact: bool, control: u16) -> (F80, u16) {
        if self.is_zero() {
            return (F80::ZERO.with_sign(self.negative), if inexact { status::PE } else { 0 });
        }
        let mut biased = self.exponent + BIAS;
        let (mut rounded, mut flags) =
            round_bits(self.significand, inexact, self.negative, control);
        // Tininess is judged after rounding as if the exponent had no limit.
        let carried = rounded == 0;
        if biased + i32::from(carried) < 1 {
            if control & status::UE != 0 {
                let shift = (1 - biased).unsigned_abs();
                let kept = self.significand.checked_shr(shift).unwrap_or(0);
                let lost = self.significand.checked_shl(128 - shift.min(128)).unwrap_or(0) != 0
                    || shift > 128;
                let (significand, flags) =
                    round_bits(kept, inexact || lost, self.negative, control);
                let underflow = if flags & status::PE != 0 { status::UE } else { 0 };
                // Rounding up may give the smallest normal number.
                let exponent = (significand >> 63) as u16;
                return (F80::new(self.negative, exponent, significand), flags | underflow);
            }
            flags |= status::UE;
            biased += UNMASKED_SCALE;
        }
        if carried {
            rounded = 1 << 63;
            biased += 1;
        }
        if biased >= 0x7fff {
            if control & status::OE != 0 {
                return overflow(self.negative, control);
            }
            flags |= status::OE;
            biased -= UNMASKED_SCALE;
        }
        // Scaled results of functions far out of range saturate; no operand pair gets there.
        let exponent = biased.clamp(0, 0x7ffe) as u16;
        (F80::new(self.negative, exponent, rounded), flags)
    }
}

/// The masked response to overflow.
fn overflow(negative: bool, control: u16) -> (F80, u16) {
    let to_infinity = match control >> 10 & 3 {
        0 => true,
        1 => negative,
        2 => !negative,
        _ => false,
    };
    let flags = status::OE | status::PE;
    if to_infinity {
        (F80::infinity(negative), flags | status::C1)
    } else {
        (F80::new(negative, 0x7ffe, u64::MAX), flags)
    }
}

/// Rounds the upper half of `bits` by the control word's rounding field. Zero as the result of a
/// significand with its top bit set means that rounding carried out of it.
fn round_bits(bits: u128, inexact: bool, negative: bool, control: u16) -> (u64, u16) {
    let (kept, tail) = ((bits >> 64) as u64, bits as u64);
    if tail == 0 && !inexact {
        return (kept, 0);
    }
    let up = match control >> 10 & 3 {
        0 => tail > 1 << 63 || tail == 1 << 63 && (inexact || kept & 1 != 0),
        1 => negative,
        2 => !negative,
        _ => false,
    };
    if up { (kept.wrapping_add(1), status::PE | status::C1) } else { (kept, status::PE) }
}

#[cfg(test)]
mod tests {
    use super::super::super::fpu::CONTROL_DEFAULT;
    use super::*;
    use proptest::prelude::*;

    fn wide() -> impl Strategy<Value = Wide> {
        (any::<bool>(), -200i32..200, any::<u128>()).prop_map(|(negative, exponent, bits)| Wide {
            negative,
            exponent,
            significand: bits | 1 << 127,
        })
    }

    /// Whether two numbers agree to 2^-120.
    fn close(a: Wide, b: Wide) -> bool {
        let difference = a.minus(b);
        difference.is_zero() || difference.exponent < a.exponent - 120
    }

    proptest! {
        #[test]
        fn quotient_times_divisor_is_the_dividend(a in wide(), b in wide()) {
            prop_assert!(close(a.divided_by(b).times(b), a));
        }

        #[test]
        fn difference_plus_subtrahend_is_the_minuend(a in wide(), b in wide()) {
            // Cancellation loses what the alignment shifted out; that is relative to the larger one.
            let sum = a.minus(b).plus(b).minus(a);
            prop_assert!(sum.is_zero() || sum.exponent < a.exponent.max(b.exponent) - 120);
        }

        #[test]
        fn numbers_of_80_bits_survive(negative: bool, exponent in 0u16..0x7fff, bits: u64) {
            let significand = if exponent == 0 { bits >> 1 } else { bits | 1 << 63 };
            let value = F80::new(negative, exponent, significand);
            prop_assert_eq!(Wide::from_f80(value).round(false, CONTROL_DEFAULT), (value, 0));
        }
    }

    #[test]
    fn small_integers() {
        let (six, two) = (Wide::from_integer(6), Wide::from_integer(2));
        assert_eq!(six.divided_by(two), Wide::from_integer(3));
        assert_eq!(six.times(two), Wide::from_integer(12));
        assert_eq!(two.minus(six), Wide::from_integer(-4));
        assert_eq!(
            two.divided_by(six).times(six).round(true, CONTROL_DEFAULT).0,
            two.round(false, CONTROL_DEFAULT).0
        );
    }
}
