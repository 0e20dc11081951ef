//! RFLAGS, with the arithmetic flags computed when somebody asks.
//!
//! An arithmetic instruction leaves three words from which each flag is a few operations away, so
//! that the many flags nobody reads cost three stores:
//!
//! * `result`: the result, sign-extended from the operand size. ZF = it is zero.
//! * `carries`: the carry (or borrow) out of each bit position, shifted so that the operand's top bit is
//!   bit 63. CF = bit 63, OF = bit 63 xor bit 62.
//! * `aux`: bit 4 is AF. Bit 63 and bits 8-15 correct SF and PF where these do not follow from `result` (POPF,
//!   SAHF): SF = bit 63 of `result ^ aux`, PF = even parity of `result ^ aux >> 8`, low byte.
//!
//! What the manual leaves undefined has one definition here, so that every host computes the same:
//!
//! * AND, OR, XOR, TEST clear AF.
//! * Shifts (SHL, SHR, SAR, SHLD, SHRD) clear AF; OF is for every count what it would be had the last single-bit
//!   step been the whole instruction; CF of a count beyond the operand size is the last bit the
//!   step-by-step shift moves out.
//! * ROL, ROR, RCL, RCR set OF for every count by the rule for one step.
//! * MUL, IMUL: SF, ZF, PF from the low half of the result, AF clear.
//! * DIV, IDIV leave all flags as they were.
//! * BSF, BSR: ZF as defined, the others from the source operand as TEST would set them; the destination of a zero
//!   source is unchanged.
//! * BT, BTS, BTR, BTC change CF alone.

use super::op::Int;

/// Carry.
pub const CF: u64 = 1 << 0;
/// Bit 1 always reads as one.
pub const FIXED: u64 = 1 << 1;
/// Parity.
pub const PF: u64 = 1 << 2;
/// Auxiliary carry.
pub const AF: u64 = 1 << 4;
/// Zero.
pub const ZF: u64 = 1 << 6;
/// Sign.
pub const SF: u64 = 1 << 7;
/// Trap (single step).
pub const TF: u64 = 1 << 8;
/// Interrupt enable.
pub const IF: u64 = 1 << 9;
/// Direction.
pub const DF: u64 = 1 << 10;
/// Overflow.
pub const OF: u64 = 1 << 11;
/// I/O privilege level, two bits.
pub const IOPL: u64 = 3 << 12;
/// Nested task.
pub const NT: u64 = 1 << 14;
/// Resume.
pub const RF: u64 = 1 << 16;
/// Virtual 8086 mode.
pub const VM: u64 = 1 << 17;
/// Alignment check, and access control for SMAP.
pub const AC: u64 = 1 << 18;
/// Virtual interrupt.
pub const VIF: u64 = 1 << 19;
/// Virtual interrupt pending.
pub const VIP: u64 = 1 << 20;
/// CPUID can be used.
pub const ID: u64 = 1 << 21;

/// CF, PF, AF, ZF, SF and OF.
pub const ARITHMETIC: u64 = CF | PF | AF | ZF | SF | OF;
/// The flags kept in [`Flags::system`].
pub const SYSTEM: u64 = TF | IF | DF | IOPL | NT | RF | VM | AC | VIF | VIP | ID;

const TOP: u64 = 1 << 63;

/// RFLAGS. See the module's text.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub struct Flags {
    result: u64,
    carries: u64,
    aux: u64,
    /// The flags of [`SYSTEM`], at their architectural positions. Who changes AC calls
    /// `Cpu::recompute_mode` after it.
    pub system: u64,
}

impl Flags {
    /// Carry.
    #[inline(always)]
    pub fn cf(&self) -> bool {
        self.carries & TOP != 0
    }

    /// Parity of the low byte: true if even.
    #[inline(always)]
    pub fn pf(&self) -> bool {
        ((self.result ^ (self.aux >> 8)) as u8).count_ones() & 1 == 0
    }

    /// Carry out of bit 3.
    #[inline(always)]
    pub fn af(&self) -> bool {
        self.aux & AF != 0
    }

    /// Zero.
    #[inline(always)]
    pub fn zf(&self) -> bool {
        self.result == 0
    }

    /// Sign.
    #[inline(always)]
    pub fn sf(&self) -> bool {
        (self.result ^ self.aux) & TOP != 0
    }

    /// Signed overflow.
    #[inline(always)]
    pub fn of(&self) -> bool {
        (self.carries ^ (self.carries << 1)) & TOP != 0
    }

    /// Signed "less": SF differs from OF.
    #[inline(always)]
    pub fn less(&self) -> bool {
        (self.result ^ self.aux ^ self.carries ^ (self.carries << 1)) & TOP != 0
    }

    /// Direction flag.
    #[inline(always)]
    pub fn df(&self) -> bool {
        self.system & DF != 0
    }

    /// All of RFLAGS.
    pub fn read(&self) -> u64 {
        let bit = |on: bool, flag: u64| if on { flag } else { 0 };
        self.system
            | FIXED
            | bit(self.cf(), CF)
            | bit(self.pf(), PF)
            | bit(self.af(), AF)
            | bit(self.zf(), ZF)
            | bit(self.sf(), SF)
            | bit(self.of(), OF)
    }

    /// Sets all of RFLAGS; reserved bits of `value` are ignored. The caller has masked what the privilege level
    /// may not change.
    pub fn write(&mut self, value: u64) {
        self.system = value & SYSTEM;
        self.set_arithmetic(value);
    }

    /// Sets CF, PF, AF, ZF, SF and OF from an RFLAGS image, leaving the rest.
    pub fn set_arithmetic(&mut self, value: u64) {
        let on = |flag: u64| value & flag != 0;
        self.set_explicit(on(CF), on(PF), on(AF), on(ZF), on(SF), on(OF));
    }

    /// Sets all six arithmetic flags.
    #[inline]
    pub fn set_explicit(&mut self, cf: bool, pf: bool, af: bool, zf: bool, sf: bool, of: bool) {
        // A result of 1 has odd parity and a clear sign, 0 has even parity.
        self.result = u64::from(!zf);
        self.carries = (u64::from(cf) << 63) | (u64::from(cf ^ of) << 62);
        self.aux = (u64::from(sf) << 63) | (u64::from(pf != zf) << 8) | (u64::from(af) << 4);
    }

    /// Sets CF alone.
    #[inline]
    pub fn set_cf(&mut self, cf: bool) {
        let of = self.of();
        self.set_cf_of(cf, of);
    }

    /// Sets CF and OF alone.
    #[inline]
    pub fn set_cf_of(&mut self, cf: bool, of: bool) {
        self.carries = (u64::from(cf) << 63) | (u64::from(cf ^ of) << 62);
    }

    /// Sets ZF alone.
    pub fn set_zf(&mut self, zf: bool) {
        self.set_explicit(self.cf(), self.pf(), self.af(), zf, self.sf(), self.of());
    }

    /// After a bitwise operation: SF, ZF, PF from `result`; CF, OF, AF clear. Bits of `result` beyond the operand's
    /// size are ignored.
    #[inline(always)]
    pub fn set_logic<T: Int>(&mut self, result: u64) {
        self.result = T::sign_extend(result);
        self.carries = 0;
        self.aux = 0;
    }

    /// SF, ZF, PF from `result`, CF and OF as given, AF clear.
    #[inline(always)]
    pub fn set_shift<T: Int>(&mut self, result: u64, cf: bool, of: bool) {
        self.set_logic::<T>(result);
        self.set_cf_of(cf, of);
    }

    /// After `result = a + b` or `a + b + carry`. Bits beyond the operand's size are ignored.
    #[inline(always)]
    pub fn set_add<T: Int>(&mut self, a: u64, b: u64, result: u64) {
        self.result = T::sign_extend(result);
        self.carries = ((a & b) | ((a | b) & !result)) << (64 - T::BITS);
        self.aux = (a ^ b ^ result) & AF;
    }

    /// After `result = a - b` or `a - b - borrow`. Bits beyond the operand's size are ignored.
    #[inline(always)]
    pub fn set_sub<T: Int>(&mut self, a: u64, b: u64, result: u64) {
        self.result = T::sign_extend(result);
        self.carries = ((!a & b) | ((!a | b) & result)) << (64 - T::BITS);
        self.aux = (a ^ b ^ result) & AF;
    }

    /// After `result = a + 1`, which leaves CF.
    #[inline(always)]
    pub fn set_inc<T: Int>(&mut self, a: u64, result: u64) {
        let cf = self.cf();
        self.set_add::<T>(a, 1, result);
        let of = self.of();
        self.set_cf_of(cf, of);
    }

    /// After `result = a - 1`, which leaves CF.
    #[inline(always)]
    pub fn set_dec<T: Int>(&mut self, a: u64, result: u64) {
        let cf = self.cf();
        self.set_sub::<T>(a, 1, result);
        let of = self.of();
        self.set_cf_of(cf, of);
    }
}
