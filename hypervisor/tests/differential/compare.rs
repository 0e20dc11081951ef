//! Holds two register images against each other, leaving out what the manuals leave undefined, and what Intel's and
//! AMD's processors do differently: the guest's does one of the two on every host.

use std::fmt::Write as _;

use iced_x86::{Code, Instruction, Mnemonic, OpKind, RflagsBits};

use crate::layout::*;

const CF: u64 = 1 << 0;
const PF: u64 = 1 << 2;
const AF: u64 = 1 << 4;
const ZF: u64 = 1 << 6;
const SF: u64 = 1 << 7;
const OF: u64 = 1 << 11;
const RF: u64 = 1 << 16;

/// A register image.
pub type Image = [u8; image::BYTES];

/// The eight bytes at an offset.
pub fn word(image: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(image[at..at + 8].try_into().unwrap())
}

fn half(image: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([image[at], image[at + 1]])
}

/// What is not compared of one instruction.
#[derive(Debug, Clone, Copy, Default)]
pub struct Leeway {
    /// RFLAGS bits.
    flags: u64,
    /// x87 status word bits.
    status: u16,
    /// ST(0) and ST(1) are transcendental functions, a rounding error apart.
    transcendental: bool,
    /// Exponent of the angle, for those whose argument the host reduces by its own idea of pi.
    angle: Option<i32>,
    /// Lanes of the destination are single-precision approximations.
    approximate: bool,
    /// An MMX instruction: when it faults, the host may have set TOP and tags for it already.
    mmx: bool,
    /// A repeated string instruction with 32-bit addresses: processors differ in whether the upper
    /// halves are cleared when there is no iteration, or a fault in it.
    short_string: bool,
    /// REP CMPS or SCAS: a fault in the middle shows the flags of before it began, or not.
    comparing_string: bool,
    /// A hint to Intel's processors, undefined to AMD's.
    hint: bool,
    /// An x87 store: where its value raises an exception and its operand too, Intel's processors find the former
    /// first, AMD's the latter.
    x87_store: bool,
    /// A sum of products, in lanes of so many bits: which of several NaNs comes out is not the same.
    nan_lanes: Option<u32>,
    /// Only the page of a fault's address is compared: the operand is made of several accesses.
    wide_operand: bool,
}

impl Leeway {
    /// Whether the host may have stored a part of the operand before it faulted.
    pub fn partial_store(self, host: &Image) -> bool {
        self.wide_operand && word(host, image::VECTOR) == 14
    }

    /// Whether the host has found its fault `vector` before the exception that the guest has found, and left it at.
    fn other_order(self, vector: u64, guest: &Image) -> bool {
        const EXCEPTION: u16 = 1 << 7;
        self.x87_store
            && matches!(vector, 12..=14 | 17)
            && word(guest, image::VECTOR) == FELL_THROUGH
            && half(&guest[image::FX..], 2) & EXCEPTION != 0
    }
}

const NAMES: [&str; 16] = [
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13",
    "r14", "r15",
];

/// RFLAGS bits the manual leaves undefined after this instruction.
fn undefined_flags(instruction: &Instruction, input: &[u8]) -> u64 {
    let undefined = instruction.rflags_undefined();
    let pairs = [
        (RflagsBits::CF, CF),
        (RflagsBits::PF, PF),
        (RflagsBits::AF, AF),
        (RflagsBits::ZF, ZF),
        (RflagsBits::SF, SF),
        (RflagsBits::OF, OF),
    ];
    let mut flags =
        pairs.iter().filter(|(bit, _)| undefined & bit != 0).fold(0, |flags, (_, bit)| flags | bit);
    use Mnemonic as M;
    let shifts =
        matches!(instruction.mnemonic(), M::Shl | M::Sal | M::Shr | M::Sar | M::Shld | M::Shrd);
    let rotates = matches!(instruction.mnemonic(), M::Rol | M::Ror | M::Rcl | M::Rcr);
    if shifts || rotates {
        let count_operand = instruction.op_count() - 1;
        let count = match instruction.op_kind(count_operand) {
            OpKind::Register => input[8],
            _ => instruction.immediate(count_operand) as u8,
        };
        let bits = match instruction.op0_kind() {
            OpKind::Register => instruction.op0_register().size() * 8,
            _ => instruction.memory_size().size() * 8,
        };
        let count = count & if bits == 64 { 63 } else { 31 };
        match count {
            // A count of zero leaves all flags alone.
            0 => flags = 0,
            1 => flags &= !OF,
            _ if rotates => flags |= OF,
            _ if usize::from(count) >= bits => flags |= CF,
            _ => {}
        }
    }
    flags
}

/// What not to compare of this instruction with this input.
pub fn leeway(instruction: &Instruction, input: &[u8]) -> Leeway {
    use Mnemonic as M;
    let mut leeway = Leeway { flags: undefined_flags(instruction, input), ..Leeway::default() };
    let rep = instruction.has_rep_prefix() || instruction.has_repne_prefix();
    leeway.short_string = rep
        && (0..instruction.op_count()).any(|operand| {
            matches!(instruction.op_kind(operand), OpKind::MemorySegESI | OpKind::MemoryESEDI)
        });
    leeway.comparing_string = rep && instruction.rflags_written() & RflagsBits::ZF != 0;
    leeway.mmx = (0..instruction.op_count()).any(|operand| {
        instruction.op_kind(operand) == OpKind::Register && instruction.op_register(operand).is_mm()
    });
    match instruction.mnemonic() {
        M::Fsin
        | M::Fcos
        | M::Fsincos
        | M::Fptan
        | M::Fpatan
        | M::F2xm1
        | M::Fyl2x
        | M::Fyl2xp1 => {
            // One definition here, another in each processor: rounding, and so C1; and whether a result next to the
            // smallest normal number counts as underflow.
            leeway.transcendental = true;
            leeway.status = 0x210;
            if matches!(instruction.mnemonic(), M::Fsin | M::Fcos | M::Fsincos | M::Fptan) {
                let exponent = half(&input[image::FX..], 32 + 8) & 0x7fff;
                leeway.angle = Some(i32::from(exponent) - 0x3fff);
            }
        }
        M::Fnsave
        | M::Frstor
        | M::Fnstenv
        | M::Fldenv
        | M::Fxsave
        | M::Fxrstor
        | M::Fxsave64
        | M::Fxrstor64
        | M::Fstp
        | M::Fld
        | M::Fbstp
        | M::Fbld => leeway.wide_operand = true,
        M::Dpps => leeway.nan_lanes = Some(32),
        M::Dppd => leeway.nan_lanes = Some(64),
        M::Rcpps | M::Rcpss | M::Rsqrtps | M::Rsqrtss => leeway.approximate = true,
        _ => {}
    }
    leeway.hint = is_hint(instruction.code());
    leeway.x87_store = matches!(
        instruction.mnemonic(),
        M::Fst | M::Fstp | M::Fist | M::Fistp | M::Fisttp | M::Fbstp
    );
    leeway
}

/// A hint to Intel's processors, undefined to AMD's.
pub fn is_hint(code: Code) -> bool {
    use Code as C;
    matches!(
        code,
        C::Reservednop_rm16_r16_0F0D | C::Reservednop_rm32_r32_0F0D | C::Reservednop_rm64_r64_0F0D
    )
}

/// Whether the manuals leave everything open: a double shift of 16 bits by more than 16.
pub fn undefined(instruction: &Instruction, input: &[u8]) -> bool {
    let bits = match instruction.op0_kind() {
        OpKind::Register => instruction.op0_register().size(),
        _ => instruction.memory_size().size(),
    } * 8;
    matches!(instruction.code(), Code::Shld_rm16_r16_CL | Code::Shrd_rm16_r16_CL)
        && usize::from(input[8] & 31) > bits
}

/// Compares; the first difference, if there is one.
pub fn difference(host: &Image, guest: &Image, leeway: Leeway) -> Option<String> {
    let vector = word(host, image::VECTOR);
    if leeway.hint && vector == 6 || leeway.other_order(vector, guest) {
        return None;
    }
    if vector != word(guest, image::VECTOR) {
        return Some(format!(
            "ended with {} on the host, {} in the guest",
            ending(vector),
            ending(word(guest, image::VECTOR))
        ));
    }
    let faulted = vector < FELL_THROUGH;
    for (n, name) in NAMES.into_iter().enumerate() {
        let (a, b) = (word(host, 8 * n), word(guest, 8 * n));
        // RCX, RSI, RDI.
        let ignored = if leeway.short_string && [1, 6, 7].contains(&n) { !0xffff_ffff } else { 0 };
        if (a ^ b) & !ignored != 0 {
            return Some(format!("{name}: {a:#x} on the host, {b:#x} in the guest"));
        }
    }
    // RF is set by a fault's delivery, and of no interest.
    let ignored = RF
        | match faulted {
            true if leeway.comparing_string => CF | PF | AF | ZF | SF | OF,
            true => 0,
            false => leeway.flags,
        };
    let (a, b) = (word(host, image::FLAGS) & !ignored, word(guest, image::FLAGS) & !ignored);
    if a != b {
        return Some(format!("rflags: {a:#x} on the host, {b:#x} in the guest"));
    }
    if faulted {
        let fields: &[(usize, &str)] = match vector {
            14 => &[(image::RIP, "rip"), (image::ERROR, "error code"), (image::CR2, "cr2")],
            8 | 10..=13 | 17 => &[(image::RIP, "rip"), (image::ERROR, "error code")],
            _ => &[(image::RIP, "rip")],
        };
        for (at, name) in fields {
            let (a, b) = (word(host, *at), word(guest, *at));
            let ignored = if *name == "cr2" && leeway.wide_operand { 0xfff } else { 0 };
            if (a ^ b) & !ignored != 0 {
                return Some(format!("{name}: {a:#x} on the host, {b:#x} in the guest"));
            }
        }
    }
    if faulted && leeway.mmx {
        return vector_difference(&host[image::FX..], &guest[image::FX..], leeway);
    }
    let leeway = if faulted { Leeway::default() } else { leeway };
    fx_difference(&host[image::FX..], &guest[image::FX..], leeway)
}

fn fx_difference(host: &[u8], guest: &[u8], leeway: Leeway) -> Option<String> {
    const UNDERFLOW: u16 = 1 << 4;
    let underflow = (half(host, 2) ^ half(guest, 2)) & !half(host, 0) & UNDERFLOW != 0;
    if leeway.transcendental && underflow {
        // Unmasked, it scales the result and is announced.
        return vector_difference(host, guest, leeway);
    }
    let words = [("control word", 0, 0), ("status word", 2, leeway.status), ("tags", 4, 0)];
    for (name, at, ignored) in words {
        let (a, b) = (half(host, at) & !ignored, half(guest, at) & !ignored);
        if a != b {
            return Some(format!("x87 {name}: {a:#x} on the host, {b:#x} in the guest"));
        }
    }
    for n in 0..8 {
        let at = 32 + 16 * n;
        let (a, b) = (extended(host, at), extended(guest, at));
        let tolerated = n < 2 && leeway.transcendental && ulps(a, b) <= tolerance(a, leeway.angle);
        if a != b && !tolerated {
            return Some(format!("st{n}: {a:#022x} on the host, {b:#022x} in the guest"));
        }
    }
    vector_difference(host, guest, leeway)
}

fn vector_difference(host: &[u8], guest: &[u8], leeway: Leeway) -> Option<String> {
    const OVERFLOW: u16 = 1 << 3;
    const UNDERFLOW: u16 = 1 << 4;
    const PRECISION: u16 = 1 << 5;
    let (a, b) = (half(host, 24), half(guest, 24));
    // An unmasked overflow or underflow comes with the precision flag, or not: see the software processor's text.
    let unmasked = a & !(a >> 7) & (OVERFLOW | UNDERFLOW) != 0;
    let ignored = if unmasked { PRECISION } else { 0 };
    if (a ^ b) & !ignored != 0 {
        return Some(format!("mxcsr: {a:#x} on the host, {b:#x} in the guest"));
    }
    for n in 0..16 {
        let at = 160 + 16 * n;
        let register = |image: &[u8]| u128::from_le_bytes(image[at..at + 16].try_into().unwrap());
        let (a, b) = (register(host), register(guest));
        let tolerated = leeway.approximate && lanes_agree(a, b)
            || leeway.nan_lanes.is_some_and(|bits| alike_but_for_nans(a, b, bits));
        if a != b && !tolerated {
            return Some(format!("xmm{n}: {a:#034x} on the host, {b:#034x} in the guest"));
        }
    }
    None
}

fn extended(image: &[u8], at: usize) -> u128 {
    u128::from(word(image, at)) | u128::from(half(image, at + 8)) << 64
}

/// Units in the last place that a transcendental function's results may differ by.
fn tolerance(result: u128, angle: Option<i32>) -> u64 {
    let Some(angle) = angle else {
        return 2;
    };
    // The host reduces angles by a pi of 66 bits: an error of 2^(angle - 67) in the reduced one, which a tangent
    // multiplies by 1 + tan^2. Two bits to spare.
    let exponent = (result >> 64 & 0x7fff) as i32 - 0x3fff;
    let error = if exponent > 0 { angle + exponent } else { angle - exponent } - 2;
    2 + if error < 0 { 0 } else { 1u64.checked_shl(error as u32).unwrap_or(u64::MAX - 2) }
}

/// How many numbers apart two numbers of the same sign are.
fn ulps(a: u128, b: u128) -> u64 {
    if (a ^ b) >> 79 & 1 != 0 {
        return u64::MAX;
    }
    // Without the integer bit, the encodings of positive numbers are in order.
    let order = |bits: u128| (bits >> 64 & 0x7fff) << 63 | bits & (u128::from(u64::MAX) >> 1);
    u64::try_from(order(a).abs_diff(order(b))).unwrap_or(u64::MAX)
}

/// Whether all four lanes agree within what the manual allows both sides: a relative error of 1.5 * 2^-12 each, and
/// zero for what would be denormal.
fn lanes_agree(a: u128, b: u128) -> bool {
    let bound = 3.0 / 4096.0;
    (0..4).all(|n| {
        let lane = |bits: u128| f32::from_bits((bits >> (32 * n)) as u32);
        let (a, b) = (lane(a), lane(b));
        let tiny = |x: f32| x.abs() <= f32::MIN_POSITIVE * (1.0 + bound);
        a.to_bits() == b.to_bits()
            || tiny(a) && tiny(b) && a.is_sign_negative() == b.is_sign_negative()
            || a.is_finite() && (a - b).abs() <= a.abs() * bound
    })
}

/// Whether lanes of so many bits are equal, or both NaN.
fn alike_but_for_nans(a: u128, b: u128, bits: u32) -> bool {
    (0..128 / bits).all(|n| {
        let lane = |word: u128| (word >> (n * bits)) as u64 & (u64::MAX >> (64 - bits));
        let nan = |lane: u64| match bits {
            32 => f32::from_bits(lane as u32).is_nan(),
            _ => f64::from_bits(lane).is_nan(),
        };
        let (a, b) = (lane(a), lane(b));
        a == b || nan(a) && nan(b)
    })
}

fn ending(vector: u64) -> String {
    match vector {
        FELL_THROUGH => "the next instruction".to_owned(),
        BRANCHED => "a branch".to_owned(),
        vector => format!("exception {vector}"),
    }
}

/// An image for people.
pub fn describe(image: &Image) -> String {
    let mut text = String::new();
    for (n, name) in NAMES.into_iter().enumerate() {
        let end = if n % 4 == 3 { "\n" } else { "  " };
        let _ = write!(text, "{name:>4} {:016x}{end}", word(image, 8 * n));
    }
    let fx = &image[image::FX..];
    let _ = writeln!(
        text,
        "  rflags {:x}  vector/gs {:x}  error {:x}  x87 control {:04x} status {:04x} tags {:02x}  mxcsr {:04x}",
        word(image, image::FLAGS),
        word(image, image::VECTOR),
        word(image, image::ERROR),
        half(fx, 0),
        half(fx, 2),
        fx[4],
        half(fx, 24),
    );
    for n in 0..8 {
        let end = if n % 4 == 3 { "\n" } else { "  " };
        let _ = write!(text, " st{n} {:020x}{end}", extended(fx, 32 + 16 * n));
    }
    for n in 0..16 {
        let end = if n % 2 == 1 { "\n" } else { "  " };
        let high = word(fx, 168 + 16 * n);
        let low = word(fx, 160 + 16 * n);
        let _ = write!(text, "xmm{n:<2} {high:016x}_{low:016x}{end}");
    }
    text
}

/// Parts of a memory operand, from byte to byte, that hold what the two sides do not share: the x87's instruction and data
/// pointers, and of an FXSAVE image the mask of MXCSR and what processors are free to write or not.
pub fn unshared_memory(code: Code) -> &'static [(u64, u64)] {
    match code {
        Code::Fnstenv_m14byte | Code::Fnsave_m94byte => &[(6, 14)],
        Code::Fnstenv_m28byte | Code::Fnsave_m108byte => &[(12, 28)],
        Code::Fxsave_m512byte | Code::Fxsave64_m512byte => &[(6, 24), (28, 32), (416, 512)],
        _ => &[],
    }
}
