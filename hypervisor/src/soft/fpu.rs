//! The x87 register file, and the memory images that save and load it (Intel SDM vol. 1, chapter 8).
//!
//! What must hold: TOP lives in [`Fpu::top`] alone, and the summary bits ES and B are computed from
//! flags and masks when somebody reads the status word; neither is ever set in [`Fpu::status`].
//!
//! Two fields are one fixed value where processors differ among themselves: the last opcode (FOP)
//! reads as zero, and the instruction and data pointers carry no selectors (FCS and FDS read as
//! zero), which CPUID announces.

use serde::{Deserialize, Serialize};

/// A number in double extended format: ten bytes of memory, in their order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[repr(C)]
pub struct F80 {
    /// The significand with its explicit integer bit.
    pub significand: u64,
    /// Sign in bit 15, biased exponent below.
    pub sign_exponent: u16,
}

/// What [`F80::class`] tells apart; unsupported formats are invalid operands to every operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// Plus or minus zero.
    Zero,
    /// Biased exponent zero and not zero; includes pseudo-denormals.
    Denormal,
    /// A normal finite number.
    Normal,
    /// Plus or minus infinity.
    Infinity,
    /// Quiet NaN.
    QuietNan,
    /// Signalling NaN.
    SignallingNan,
    /// Pseudo-NaN, pseudo-infinity or unnormal (vol. 1, table 8-3).
    Unsupported,
}

impl F80 {
    /// Plus zero.
    pub const ZERO: Self = Self::new(false, 0, 0);
    /// One.
    pub const ONE: Self = Self::new(false, 0x3fff, 1 << 63);
    /// The default NaN, "real indefinite": the masked response to an invalid operation.
    pub const INDEFINITE: Self = Self::new(true, 0x7fff, 0xc000_0000_0000_0000);

    /// Puts a number together; `exponent` is the biased one, below 0x8000.
    #[must_use]
    pub const fn new(negative: bool, exponent: u16, significand: u64) -> Self {
        Self { significand, sign_exponent: exponent | (negative as u16) << 15 }
    }

    /// An infinity.
    #[must_use]
    pub const fn infinity(negative: bool) -> Self {
        Self::new(negative, 0x7fff, 1 << 63)
    }

    /// The biased exponent.
    #[must_use]
    pub const fn exponent(self) -> u16 {
        self.sign_exponent & 0x7fff
    }

    /// Whether the sign bit is set.
    #[must_use]
    pub const fn is_negative(self) -> bool {
        self.sign_exponent >> 15 != 0
    }

    /// The number with the sign given.
    #[must_use]
    pub const fn with_sign(self, negative: bool) -> Self {
        Self::new(negative, self.exponent(), self.significand)
    }

    /// What kind of number this is.
    #[must_use]
    pub const fn class(self) -> Class {
        let integer_bit = self.significand >> 63 != 0;
        match (self.exponent(), integer_bit) {
            (0, _) if self.significand == 0 => Class::Zero,
            (0, _) => Class::Denormal,
            (_, false) => Class::Unsupported,
            (0x7fff, true) if self.significand << 1 == 0 => Class::Infinity,
            (0x7fff, true) if self.significand >> 62 & 1 != 0 => Class::QuietNan,
            (0x7fff, true) => Class::SignallingNan,
            _ => Class::Normal,
        }
    }

    /// The ten bytes, as the low 80 bits of an integer.
    #[must_use]
    pub const fn to_bits(self) -> u128 {
        self.significand as u128 | (self.sign_exponent as u128) << 64
    }

    /// From the low 80 bits.
    #[must_use]
    pub const fn from_bits(bits: u128) -> Self {
        Self { significand: bits as u64, sign_exponent: (bits >> 64) as u16 }
    }
}

/// Bits of the status word.
pub mod status {
    /// Invalid operation.
    pub const IE: u16 = 1;
    /// Denormal operand.
    pub const DE: u16 = 1 << 1;
    /// Division by zero.
    pub const ZE: u16 = 1 << 2;
    /// Overflow.
    pub const OE: u16 = 1 << 3;
    /// Underflow.
    pub const UE: u16 = 1 << 4;
    /// Inexact result.
    pub const PE: u16 = 1 << 5;
    /// Stack fault: IE was an overflow (C1 set) or underflow of the register stack.
    pub const SF: u16 = 1 << 6;
    /// Exception summary.
    pub const ES: u16 = 1 << 7;
    /// Condition code 0.
    pub const C0: u16 = 1 << 8;
    /// Condition code 1: rounded up, or direction of a stack fault.
    pub const C1: u16 = 1 << 9;
    /// Condition code 2.
    pub const C2: u16 = 1 << 10;
    /// Condition code 3.
    pub const C3: u16 = 1 << 14;
    /// Busy: a copy of ES.
    pub const B: u16 = 1 << 15;
    /// The six exception flags, which are also the six mask bits of the control word.
    pub const EXCEPTIONS: u16 = 0x3f;
    /// The four condition codes.
    pub const CONDITIONS: u16 = C0 | C1 | C2 | C3;
    /// What [`super::Fpu::status`] may hold.
    pub(super) const STORED: u16 = EXCEPTIONS | SF | CONDITIONS;
}

/// The control word after FNINIT: round to nearest, 64-bit precision, everything masked.
pub const CONTROL_DEFAULT: u16 = 0x37f;
/// The MXCSR bits this processor implements (also what FXSAVE reports as MXCSR_MASK).
pub const MXCSR_MASK: u32 = 0xffff;
/// MXCSR after reset.
pub const MXCSR_DEFAULT: u32 = 0x1f80;

/// The x87 state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[repr(C)]
pub struct Fpu {
    /// R0 to R7: physical registers, not stack positions. MM0 to MM7 are their significands.
    pub registers: [F80; 8],
    /// Control word.
    pub control: u16,
    /// Status word without TOP, ES and B.
    pub status: u16,
    /// Which physical register is ST(0): 0 to 7.
    pub top: u8,
    /// Bit n set: Rn is not empty.
    pub valid: u8,
    /// Address of the last x87 instruction that is not a control instruction.
    pub last_instruction: u64,
    /// Linear address of its memory operand, if it had one.
    pub last_operand: u64,
}

impl Default for Fpu {
    fn default() -> Self {
        Self {
            registers: [F80::ZERO; 8],
            control: CONTROL_DEFAULT,
            status: 0,
            top: 0,
            valid: 0,
            last_instruction: 0,
            last_operand: 0,
        }
    }
}

impl Fpu {
    /// FNINIT: everything but the registers' contents.
    pub fn init(&mut self) {
        *self = Self { registers: self.registers, ..Self::default() };
    }

    /// Whether an unmasked exception waits to be raised by the next waiting instruction.
    #[inline]
    #[must_use]
    pub fn pending(&self) -> bool {
        self.status & !self.control & status::EXCEPTIONS != 0
    }

    /// The status word as a program reads it.
    #[must_use]
    pub fn status_word(&self) -> u16 {
        let summary = if self.pending() { status::ES | status::B } else { 0 };
        self.status | u16::from(self.top) << 11 | summary
    }

    /// Loads the status word, TOP included.
    pub fn set_status_word(&mut self, word: u16) {
        self.status = word & status::STORED;
        self.top = (word >> 11 & 7) as u8;
    }

    /// Loads the control word. Reserved bits read back as processors give them: bit 6 is one, and
    /// of the upper ones only bit 12 (the 287's infinity control) can be set.
    pub fn set_control(&mut self, word: u16) {
        self.control = word & 0x1f3f | 0x40;
    }

    /// The physical number of ST(`i`), `i` below 8.
    #[inline]
    #[must_use]
    pub fn physical(&self, i: u8) -> usize {
        usize::from(self.top.wrapping_add(i) & 7)
    }

    /// ST(`i`), or `None` if that register is empty.
    #[inline]
    #[must_use]
    pub fn st(&self, i: u8) -> Option<F80> {
        let register = self.physical(i);
        (self.valid >> register & 1 != 0).then(|| self.registers[register])
    }

    /// Writes ST(`i`) and marks it not empty.
    #[inline]
    pub fn set_st(&mut self, i: u8, value: F80) {
        let register = self.physical(i);
        self.registers[register] = value;
        self.valid |= 1 << register;
    }

    /// Marks ST(`i`) empty.
    #[inline]
    pub fn free(&mut self, i: u8) {
        self.valid &= !(1 << self.physical(i));
    }

    /// Pops: ST(0) becomes empty and TOP goes up.
    #[inline]
    pub fn pop(&mut self) {
        self.free(0);
        self.top = (self.top + 1) & 7;
    }

    /// Pushes `value`; the caller has seen to it that the register is empty.
    #[inline]
    pub fn push(&mut self, value: F80) {
        self.top = self.top.wrapping_sub(1) & 7;
        self.set_st(0, value);
    }

    /// The tag word in its full form: two bits a register, computed from the contents.
    #[must_use]
    pub fn tag_word(&self) -> u16 {
        let tag = |register: usize| -> u16 {
            if self.valid >> register & 1 == 0 {
                return 3;
            }
            match self.registers[register].class() {
                Class::Normal => 0,
                Class::Zero => 1,
                _ => 2,
            }
        };
        (0..8).fold(0, |word, register| word | tag(register) << (2 * register))
    }

    /// Loads the full tag word: only "empty" or "not empty" is taken from it.
    pub fn set_tag_word(&mut self, word: u16) {
        self.valid = (0..8).fold(0, |valid, register| {
            valid | u8::from(word >> (2 * register) & 3 != 3) << register
        });
    }

    /// What an MMX instruction does to the x87 state: TOP is zero and no register is empty.
    #[inline]
    pub fn enter_mmx(&mut self) {
        self.top = 0;
        self.valid = 0xff;
    }

    /// MM`i`.
    #[inline]
    #[must_use]
    pub fn mm(&self, i: u8) -> u64 {
        self.registers[usize::from(i & 7)].significand
    }

    /// Writes MM`i`; the exponent field becomes all ones.
    #[inline]
    pub fn set_mm(&mut self, i: u8, value: u64) {
        self.registers[usize::from(i & 7)] = F80 { significand: value, sign_exponent: 0xffff };
    }
}

/// Width of the environment image, which the operand-size prefix chooses (vol. 1, figures 8-9 to 8-12).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ImageWidth {
    /// 14 bytes.
    Word,
    /// 28 bytes.
    Dword,
}

impl ImageWidth {
    /// Bytes of the environment; FNSAVE puts the eight registers behind it.
    #[must_use]
    pub const fn environment_bytes(self) -> usize {
        match self {
            Self::Word => 14,
            Self::Dword => 28,
        }
    }
}

/// Bytes of the largest FNSAVE image.
pub const SAVE_BYTES: usize = 108;

impl Fpu {
    /// The FNSTENV image in protected-mode format; `width.environment_bytes()` of it count.
    #[must_use]
    pub fn environment(&self, width: ImageWidth) -> [u8; 28] {
        let mut image = [0; 28];
        let ip = self.last_instruction;
        let dp = self.last_operand;
        match width {
            ImageWidth::Word => {
                let words =
                    [self.control, self.status_word(), self.tag_word(), ip as u16, 0, dp as u16, 0];
                for (bytes, word) in image.chunks_exact_mut(2).zip(words) {
                    bytes.copy_from_slice(&word.to_le_bytes());
                }
            }
            ImageWidth::Dword => {
                // The unused upper halves read as ones.
                let high = |word: u16| u32::from(word) | 0xffff_0000;
                let dwords = [
                    high(self.control),
                    high(self.status_word()),
                    high(self.tag_word()),
                    ip as u32,
                    0,
                    dp as u32,
                    0xffff_0000,
                ];
                for (bytes, dword) in image.chunks_exact_mut(4).zip(dwords) {
                    bytes.copy_from_slice(&dword.to_le_bytes());
                }
            }
        }
        image
    }

    /// FLDENV from the bytes that [`Fpu::environment`] makes.
    pub fn load_environment(&mut self, width: ImageWidth, image: &[u8; 28]) {
        let step = width.environment_bytes() / 7;
        let field = |n: usize| u16::from_le_bytes([image[n * step], image[n * step + 1]]);
        let pointer = |n: usize| match width {
            ImageWidth::Word => u64::from(field(n)),
            ImageWidth::Dword => {
                u64::from(field(n))
                    | u64::from(u16::from_le_bytes([image[n * 4 + 2], image[n * 4 + 3]])) << 16
            }
        };
        self.set_control(field(0));
        self.set_status_word(field(1));
        self.set_tag_word(field(2));
        self.last_instruction = pointer(3);
        self.last_operand = pointer(5);
    }

    /// The eight registers in stack order, as FNSAVE stores them behind the environment.
    #[must_use]
    pub fn stack_image(&self) -> [u8; 80] {
        let mut image = [0; 80];
        for (i, bytes) in image.chunks_exact_mut(10).enumerate() {
            let value = self.registers[self.physical(i as u8)].to_bits();
            bytes.copy_from_slice(&value.to_le_bytes()[..10]);
        }
        image
    }

    /// The counterpart of [`Fpu::stack_image`]; the environment is loaded already.
    pub fn load_stack_image(&mut self, image: &[u8; 80]) {
        for (i, bytes) in image.chunks_exact(10).enumerate() {
            let register = self.physical(i as u8);
            let mut value = [0; 16];
            value[..10].copy_from_slice(bytes);
            self.registers[register] = F80::from_bits(u128::from_le_bytes(value));
        }
    }

    /// The FXSAVE image (vol. 1, table 10-2) up to the XMM registers, with the pointers in 64-bit form
    /// if `wide` (REX.W).
    #[must_use]
    pub fn fxsave(&self, mxcsr: u32, wide: bool) -> [u8; 160] {
        let mut image = [0; 160];
        let pointer = |p: u64| if wide { p } else { p & 0xffff_ffff };
        image[0..2].copy_from_slice(&self.control.to_le_bytes());
        image[2..4].copy_from_slice(&self.status_word().to_le_bytes());
        image[4] = self.valid;
        image[8..16].copy_from_slice(&pointer(self.last_instruction).to_le_bytes());
        image[16..24].copy_from_slice(&pointer(self.last_operand).to_le_bytes());
        image[24..28].copy_from_slice(&mxcsr.to_le_bytes());
        image[28..32].copy_from_slice(&MXCSR_MASK.to_le_bytes());
        for (i, bytes) in image[32..].chunks_exact_mut(16).enumerate() {
            let value = self.registers[self.physical(i as u8)].to_bits();
            bytes.copy_from_slice(&value.to_le_bytes());
        }
        image
    }

    /// The counterpart of [`Fpu::fxsave`] for the x87 part; MXCSR is the caller's business.
    pub fn fxrstor(&mut self, image: &[u8; 160], wide: bool) {
        let field = |at: usize| u16::from_le_bytes([image[at], image[at + 1]]);
        let pointer = |at: usize| {
            let value = (0..8).fold(0, |value, i| value | u64::from(image[at + i]) << (8 * i));
            if wide { value } else { value & 0xffff_ffff }
        };
        self.set_control(field(0));
        self.set_status_word(field(2));
        self.valid = image[4];
        self.last_instruction = pointer(8);
        self.last_operand = pointer(16);
        for (i, bytes) in image[32..].chunks_exact(16).enumerate() {
            let register = self.physical(i as u8);
            let mut value = [0; 16];
            value[..10].copy_from_slice(&bytes[..10]);
            self.registers[register] = F80::from_bits(u128::from_le_bytes(value));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Fpu {
        let mut fpu = Fpu::default();
        fpu.set_control(0x27f);
        fpu.push(F80::ONE);
        fpu.push(F80::ZERO);
        fpu.push(F80::INDEFINITE);
        fpu.status |= status::PE | status::C3;
        fpu.last_instruction = 0x1234_5678;
        fpu.last_operand = 0x8765_4321;
        fpu
    }

    #[test]
    fn images_load_what_they_saved() {
        let saved = sample();
        let mut loaded = Fpu::default();
        loaded.load_environment(ImageWidth::Dword, &saved.environment(ImageWidth::Dword));
        loaded.load_stack_image(&saved.stack_image());
        assert_eq!(loaded, saved);

        let mut loaded = Fpu::default();
        loaded.fxrstor(&saved.fxsave(MXCSR_DEFAULT, true), true);
        assert_eq!(loaded, saved);
    }

    #[test]
    fn tags_follow_contents() {
        let fpu = sample();
        assert_eq!(fpu.top, 5);
        // R7 = 1.0 valid, R6 = 0 zero, R5 = NaN special, others empty.
        assert_eq!(fpu.tag_word(), 0b00_01_10_11_11_11_11_11);
    }

    #[test]
    fn summary_bits_follow_the_masks() {
        let mut fpu = sample();
        assert_eq!(fpu.status_word() & (status::ES | status::B), 0);
        fpu.set_control(CONTROL_DEFAULT & !status::PE);
        assert_eq!(fpu.status_word() & (status::ES | status::B), status::ES | status::B);
    }
}
