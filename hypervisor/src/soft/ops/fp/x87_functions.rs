//! x87 transcendental functions, remainders and FXTRACT: special operands here, numbers in
//! [`transcendental`].

use iced_x86::{Code, Instruction};

use crate::soft::cpu::{Cpu, Trap};
use crate::soft::fpu::{Class, F80, status};
use crate::soft::op::{Op, Selected};
use crate::soft::x87::host::{self, Operation};
use crate::soft::x87::transcendental as functions;
use crate::soft::x87::wide::Wide;

/// What a function computed: the value, and the exceptions with C1.
#[derive(Clone, Copy)]
struct Outcome {
    value: F80,
    raised: u16,
}

impl Outcome {
    fn exact(value: F80) -> Self {
        Self { value, raised: 0 }
    }

    fn invalid() -> Self {
        Self { value: F80::INDEFINITE, raised: status::IE }
    }

    fn rounded(value: Wide, control: u16) -> Self {
        let (value, raised) = value.round(true, control);
        Self { value, raised }
    }

    fn and(self, raised: u16) -> Self {
        Self { raised: self.raised | raised, ..self }
    }

    /// Whether an unmasked exception forbids a result; then only that kind of exception counts.
    fn settle(self, control: u16) -> (Option<F80>, u16) {
        let early = self.raised & (status::IE | status::DE | status::ZE);
        if early & !control != 0 { (None, early) } else { (Some(self.value), self.raised) }
    }
}

/// DE if a denormal is among the operands.
fn denormal(operands: &[F80]) -> u16 {
    if operands.iter().any(|operand| operand.class() == Class::Denormal) { status::DE } else { 0 }
}

fn is_nan_or_unsupported(value: F80) -> bool {
    matches!(value.class(), Class::QuietNan | Class::SignallingNan | Class::Unsupported)
}

/// Runs the host's operation for its NaN rules.
fn host_outcome<O: Operation>(cpu: &Cpu, st0: F80, st1: F80) -> (F80, F80, u16) {
    let control = cpu.fpu.control | status::EXCEPTIONS;
    let frame = host::run::<O>(control, 0, st0, st1, 0);
    (frame.st0, frame.st1, frame.status & status::EXCEPTIONS)
}

/// The result for a NaN or unsupported operand: quieted, or the default NaN.
fn nan(cpu: &Cpu, value: F80) -> Outcome {
    let (value, _, raised) = host_outcome::<host::Sqrt>(cpu, value, F80::ZERO);
    Outcome { value, raised }
}

/// The result for two operands of which one at least is a NaN or unsupported.
fn nan_of_two(cpu: &Cpu, st0: F80, st1: F80) -> Outcome {
    let (_, value, raised) = host_outcome::<host::AddTo>(cpu, st0, st1);
    Outcome { value, raised }
}

/// F2XM1. Beyond [-1, 1] the manual leaves the result undefined; here the operand stays.
fn f2xm1(cpu: &Cpu, x: F80) -> Outcome {
    match x.class() {
        Class::Zero => Outcome::exact(x),
        Class::Infinity if x.is_negative() => Outcome::exact(F80::ONE.with_sign(true)),
        Class::Infinity => Outcome::exact(x),
        Class::Normal | Class::Denormal => {
            let wide = Wide::from_f80(x);
            if wide.exponent > 0 || wide.exponent == 0 && wide.significand << 1 != 0 {
                return Outcome::exact(x);
            }
            if wide.exponent == 0 {
                // 2^1 - 1 and 2^-1 - 1.
                let half = F80::new(true, 0x3ffe, 1 << 63);
                return Outcome::exact(if x.is_negative() { half } else { x });
            }
            Outcome::rounded(functions::exp2_minus_1(wide), cpu.fpu.control).and(denormal(&[x]))
        }
        _ => nan(cpu, x),
    }
}

/// FPATAN (vol. 2A, table 3-30).
fn fpatan(cpu: &Cpu, x: F80, y: F80) -> Outcome {
    if is_nan_or_unsupported(x) || is_nan_or_unsupported(y) {
        return nan_of_two(cpu, x, y);
    }
    let round = |value: Wide| Outcome::rounded(value.negated_if(y.is_negative()), cpu.fpu.control);
    let quarters = |n: i64| round(Wide::from_integer(n).times(Wide::QUARTER_PI));
    let outcome = match (y.class(), x.class()) {
        (Class::Infinity, Class::Infinity) => quarters(if x.is_negative() { 3 } else { 1 }),
        (Class::Infinity, _) => quarters(2),
        (_, Class::Infinity) | (Class::Zero, _) if x.is_negative() => quarters(4),
        (_, Class::Infinity) | (Class::Zero, _) => {
            Outcome::exact(F80::ZERO.with_sign(y.is_negative()))
        }
        (_, Class::Zero) => quarters(2),
        _ => round(functions::atan2(Wide::from_f80(y).magnitude(), Wide::from_f80(x))),
    };
    outcome.and(denormal(&[x, y]))
}

/// y times a logarithm. Inexact by definition, as on Intel's processors, even where the logarithm is `exact`.
fn scaled(y: F80, logarithm: Wide, exact: bool, control: u16) -> Outcome {
    let (value, raised) = Wide::from_f80(y).times(logarithm).round(!exact, control);
    let tiny = if value.class() == Class::Denormal { status::UE } else { 0 };
    Outcome { value, raised: raised | tiny | status::PE }
}

/// FYL2X (vol. 2A, table 3-44).
fn fyl2x(cpu: &Cpu, x: F80, y: F80) -> Outcome {
    if is_nan_or_unsupported(x) || is_nan_or_unsupported(y) {
        return nan_of_two(cpu, x, y);
    }
    let is_zero = x.class() == Class::Zero;
    if x.is_negative() && !is_zero {
        return Outcome::invalid();
    }
    let denormals = denormal(&[x, y]);
    let wide = Wide::from_f80(x);
    let is_one = !is_zero && wide == Wide::ONE;
    let below_one = is_zero || wide.exponent < 0;
    let negative = y.is_negative() != below_one;
    let outcome = match (x.class(), y.class()) {
        (Class::Zero | Class::Infinity, Class::Zero) => return Outcome::invalid(),
        (_, Class::Infinity) if is_one => return Outcome::invalid(),
        (Class::Zero, Class::Infinity) | (Class::Infinity, _) | (_, Class::Infinity) => {
            Outcome::exact(F80::infinity(negative))
        }
        (Class::Zero, _) => {
            return Outcome { value: F80::infinity(negative), raised: status::ZE };
        }
        (_, Class::Zero) => Outcome::exact(F80::ZERO.with_sign(negative)),
        _ if is_one => Outcome::exact(F80::ZERO.with_sign(y.is_negative())),
        _ => {
            let power_of_two = wide.significand << 1 == 0;
            scaled(y, functions::log2(wide), power_of_two, cpu.fpu.control)
        }
    };
    outcome.and(denormals)
}

/// FYL2XP1 (vol. 2A, table 3-45). The manual defines it up to |x| = 1 - sqrt(1/2); here it is the logarithm for
/// every x above -1, and invalid from there down.
fn fyl2xp1(cpu: &Cpu, x: F80, y: F80) -> Outcome {
    if is_nan_or_unsupported(x) || is_nan_or_unsupported(y) {
        return nan_of_two(cpu, x, y);
    }
    let negative = x.is_negative() != y.is_negative();
    let wide = Wide::from_f80(x);
    let outcome = match (x.class(), y.class()) {
        (Class::Infinity, _) if x.is_negative() => return Outcome::invalid(),
        (Class::Infinity, Class::Zero) | (Class::Zero, Class::Infinity) => {
            return Outcome::invalid();
        }
        (Class::Infinity, _) => Outcome::exact(F80::infinity(y.is_negative())),
        (Class::Zero, _) => Outcome::exact(F80::ZERO.with_sign(negative)),
        _ if x.is_negative() && !wide.magnitude().is_below(Wide::ONE) => {
            return Outcome::invalid();
        }
        (_, Class::Infinity) => Outcome::exact(F80::infinity(negative)),
        (_, Class::Zero) => Outcome::exact(F80::ZERO.with_sign(negative)),
        _ => scaled(y, functions::log2_1p(wide), false, cpu.fpu.control),
    };
    outcome.and(denormal(&[x, y]))
}

/// A trigonometric function; `None` if the angle is out of range (2^63 and beyond).
fn trigonometric(cpu: &Cpu, x: F80, of_zero: F80, function: fn(Wide) -> Wide) -> Option<Outcome> {
    Some(match x.class() {
        // Sine and tangent keep the zero's sign, cosine is one.
        Class::Zero if of_zero == F80::ZERO => Outcome::exact(x),
        Class::Zero => Outcome::exact(of_zero),
        Class::Infinity => Outcome::invalid(),
        Class::Normal | Class::Denormal => {
            let wide = Wide::from_f80(x);
            if wide.exponent >= 63 {
                return None;
            }
            Outcome::rounded(function(wide), cpu.fpu.control).and(denormal(&[x]))
        }
        _ => nan(cpu, x),
    })
}

/// ST(0) <- f(ST(0)).
fn unary(cpu: &mut Cpu, op: &Op, function: fn(&Cpu, F80) -> Option<Outcome>) -> Result<(), Trap> {
    cpu.require_x87()?;
    cpu.note_instruction(op);
    let Some(x) = cpu.fpu.st(0) else {
        if cpu.x87_underflow() {
            cpu.fpu.set_st(0, F80::INDEFINITE);
        }
        return Ok(());
    };
    let Some(outcome) = function(cpu, x) else {
        cpu.x87_commit(0);
        cpu.fpu.status |= status::C2;
        return Ok(());
    };
    let (value, raised) = outcome.settle(cpu.fpu.control);
    cpu.x87_commit(raised);
    if let Some(value) = value {
        cpu.fpu.set_st(0, value);
    }
    Ok(())
}

/// As [`unary`], for the functions that say by C2 whether the operand was in range.
fn in_range(
    cpu: &mut Cpu,
    op: &Op,
    function: fn(&Cpu, F80) -> Option<Outcome>,
) -> Result<(), Trap> {
    cpu.require_x87()?;
    cpu.fpu.status &= !status::C2;
    unary(cpu, op, function)
}

fn sine(cpu: &Cpu, x: F80) -> Option<Outcome> {
    trigonometric(cpu, x, F80::ZERO, functions::sin)
}

fn cosine(cpu: &Cpu, x: F80) -> Option<Outcome> {
    trigonometric(cpu, x, F80::ONE, functions::cos)
}

fn tangent(cpu: &Cpu, x: F80) -> Option<Outcome> {
    trigonometric(cpu, x, F80::ZERO, functions::tan)
}

/// ST(1) <- f(ST(0), ST(1)), pop.
fn binary(cpu: &mut Cpu, op: &Op, function: fn(&Cpu, F80, F80) -> Outcome) -> Result<(), Trap> {
    cpu.require_x87()?;
    cpu.note_instruction(op);
    let value = match (cpu.fpu.st(0), cpu.fpu.st(1)) {
        (Some(x), Some(y)) => {
            let (value, raised) = function(cpu, x, y).settle(cpu.fpu.control);
            cpu.x87_commit(raised);
            value
        }
        _ => cpu.x87_underflow().then_some(F80::INDEFINITE),
    };
    if let Some(value) = value {
        cpu.fpu.set_st(1, value);
        cpu.fpu.pop();
    }
    Ok(())
}

/// Two results of one operand: the second one is pushed. `None`: out of range.
type Twofold = fn(&Cpu, F80) -> Option<(Outcome, Outcome)>;

/// ST(0) <- first result, push the second.
fn twofold(cpu: &mut Cpu, op: &Op, function: Twofold) -> Result<(), Trap> {
    cpu.note_instruction(op);
    let x = match (cpu.fpu.st(0), cpu.fpu.st(7)) {
        (Some(x), None) => x,
        (operand, _) => {
            let masked = if operand.is_none() { cpu.x87_underflow() } else { cpu.x87_overflow() };
            if masked {
                cpu.fpu.set_st(0, F80::INDEFINITE);
                cpu.fpu.push(F80::INDEFINITE);
            }
            return Ok(());
        }
    };
    let Some((first, second)) = function(cpu, x) else {
        cpu.x87_commit(0);
        cpu.fpu.status |= status::C2;
        return Ok(());
    };
    let (settled, raised) = first.and(second.raised).settle(cpu.fpu.control);
    cpu.x87_commit(raised);
    if let Some(value) = settled {
        cpu.fpu.set_st(0, value);
        cpu.fpu.push(second.value);
    }
    Ok(())
}

fn fptan(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.require_x87()?;
    cpu.fpu.status &= !status::C2;
    twofold(cpu, op, |cpu, x| {
        let tangent = tangent(cpu, x)?;
        let one = if tangent.value.class() == Class::QuietNan { tangent.value } else { F80::ONE };
        Some((tangent, Outcome::exact(one)))
    })
}

fn fsincos(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.require_x87()?;
    cpu.fpu.status &= !status::C2;
    twofold(cpu, op, |cpu, x| Some((sine(cpu, x)?, cosine(cpu, x)?)))
}

/// Exponent, and significand with the exponent of one.
fn fxtract(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.require_x87()?;
    twofold(cpu, op, |cpu, x| {
        Some(match x.class() {
            Class::Zero => {
                let infinity = Outcome { value: F80::infinity(true), raised: status::ZE };
                (infinity, Outcome::exact(x))
            }
            Class::Infinity => (Outcome::exact(F80::infinity(false)), Outcome::exact(x)),
            Class::Normal | Class::Denormal => {
                let wide = Wide::from_f80(x);
                let (exponent, _) =
                    Wide::from_integer(wide.exponent.into()).round(false, cpu.fpu.control);
                let significand =
                    F80::new(x.is_negative(), 0x3fff, (wide.significand >> 64) as u64);
                (Outcome::exact(exponent).and(denormal(&[x])), Outcome::exact(significand))
            }
            _ => {
                let nan = nan(cpu, x);
                (nan, nan)
            }
        })
    })
}

/// FPREM and FPREM1. When the exponents differ by 64 or more, one execution reduces the difference by a
/// number of bits that the manual lets the processor choose between 32 and 63; here it is [`partial_bits`].
fn remainder<O: Operation>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.require_x87()?;
    cpu.note_instruction(op);
    let (Some(a), Some(b)) = (cpu.fpu.st(0), cpu.fpu.st(1)) else {
        if cpu.x87_underflow() {
            cpu.fpu.set_st(0, F80::INDEFINITE);
        }
        cpu.fpu.status &= !status::C2;
        return Ok(());
    };
    let finite = |x: F80| matches!(x.class(), Class::Normal | Class::Denormal);
    if finite(a) && finite(b) {
        let (dividend, divisor) = (Wide::from_f80(a), Wide::from_f80(b));
        let difference = dividend.exponent - divisor.exponent;
        if difference >= 64 {
            let exponent = dividend.exponent - partial_bits(difference);
            let divisor = Wide { exponent, ..divisor };
            partial_remainder(cpu, a, divisor, denormal(&[a, b]));
            return Ok(());
        }
    }
    let frame = cpu.x87_run::<O>(a, b, 0);
    if frame.st0.class() == Class::QuietNan || frame.suppressed() {
        // Nothing was divided: no quotient for C0, C1 and C3, and no further step for C2 to ask for.
        cpu.x87_commit(frame.status & !status::C1);
        cpu.fpu.status &= !status::C2;
    } else {
        cpu.x87_commit_conditions(frame.status);
    }
    if !frame.suppressed() {
        cpu.fpu.set_st(0, frame.st0);
    }
    Ok(())
}

/// By how many bits an incomplete remainder reduces an exponent difference.
fn partial_bits(difference: i32) -> i32 {
    difference % 32 + 32
}

fn partial_remainder(cpu: &mut Cpu, a: F80, divisor: Wide, raised: u16) {
    if raised & !cpu.fpu.control != 0 {
        cpu.x87_commit(raised);
        cpu.fpu.status &= !status::C2;
        return;
    }
    // With the divisor moved that far up, the host's one execution is complete, and exact: all it can raise is an
    // unmasked underflow.
    let control = cpu.fpu.control | status::DE;
    let (divisor, _) = divisor.round(false, control | status::EXCEPTIONS);
    let frame = host::run::<host::Prem>(control, cpu.fpu.status, a, divisor, 0);
    cpu.x87_commit_conditions(frame.status & status::EXCEPTIONS | raised | status::C2);
    cpu.fpu.set_st(0, frame.st0);
}

/// The handler of an instruction of this group.
pub fn handler(instruction: &Instruction) -> Option<Selected> {
    use Code::*;
    Selected::inner(match instruction.code() {
        F2xm1 => |cpu, op| unary(cpu, op, |cpu, x| Some(f2xm1(cpu, x))),
        Fsin => |cpu, op| in_range(cpu, op, sine),
        Fcos => |cpu, op| in_range(cpu, op, cosine),
        Fptan => fptan,
        Fsincos => fsincos,
        Fpatan => |cpu, op| binary(cpu, op, fpatan),
        Fyl2x => |cpu, op| binary(cpu, op, fyl2x),
        Fyl2xp1 => |cpu, op| binary(cpu, op, fyl2xp1),
        Fxtract => fxtract,
        Fprem => remainder::<host::Prem>,
        Fprem1 => remainder::<host::Prem1>,
        _ => return None,
    })
}
