//! The string comparisons of SSE4.2 (Intel SDM vol. 2B, 4.1): PCMPESTRI, PCMPESTRM, PCMPISTRI, PCMPISTRM.
//!
//! Two strings of up to sixteen bytes or eight words, their lengths explicit in RAX and RDX or
//! implied by a zero element. The immediate byte chooses element type, comparison, polarity and
//! the form of the result. Memory operands need not be aligned.

use iced_x86::{Code, Instruction};

use super::vector::{M128Unaligned, Register, Source, in_memory, vector};
use crate::soft::cpu::{Cpu, RAX, RCX, RDX, Trap};
use crate::soft::op::{Int, Op, Selected};

/// One operand: elements and how many of them count.
#[derive(Clone, Copy)]
struct Text {
    elements: u128,
    length: u32,
}

impl Text {
    /// A bit for every element that counts.
    fn valid(self) -> u32 {
        (1 << self.length) - 1
    }
}

/// What the immediate byte says.
#[derive(Clone, Copy)]
struct Control(u8);

impl Control {
    fn words(self) -> bool {
        self.0 & 1 != 0
    }

    fn signed(self) -> bool {
        self.0 & 2 != 0
    }

    /// Elements in a vector.
    fn count(self) -> u32 {
        if self.words() { 8 } else { 16 }
    }

    /// A bit for every element.
    fn all(self) -> u32 {
        (1 << self.count()) - 1
    }

    fn element(self, vector: u128, n: u32) -> i32 {
        match (self.words(), self.signed()) {
            (false, false) => (vector >> (8 * n)) as u8 as i32,
            (false, true) => (vector >> (8 * n)) as i8 as i32,
            (true, false) => (vector >> (16 * n)) as u16 as i32,
            (true, true) => (vector >> (16 * n)) as i16 as i32,
        }
    }

    /// A bit for every pair of equal elements.
    fn equal(self, a: u128, b: u128) -> u32 {
        use std::arch::x86_64::{
            _mm_cmpeq_epi8, _mm_cmpeq_epi16, _mm_movemask_epi8, _mm_packs_epi16, _mm_setzero_si128,
        };
        // SAFETY: SSE2 is part of x86-64.
        let mask = unsafe {
            if self.words() {
                let equal = _mm_cmpeq_epi16(vector(a), vector(b));
                _mm_movemask_epi8(_mm_packs_epi16(equal, _mm_setzero_si128()))
            } else {
                _mm_movemask_epi8(_mm_cmpeq_epi8(vector(a), vector(b)))
            }
        };
        mask as u32
    }

    /// Element `n` in every lane.
    fn repeated(self, vector: u128, n: u32) -> u128 {
        if self.words() {
            u128::from((vector >> (16 * n)) as u16) * (u128::MAX / 0xffff)
        } else {
            u128::from((vector >> (8 * n)) as u8) * (u128::MAX / 0xff)
        }
    }

    /// An operand whose length is where its first zero element is.
    fn implicit(self, elements: u128) -> Text {
        let zeros = self.equal(elements, 0);
        Text { elements, length: zeros.trailing_zeros().min(self.count()) }
    }

    /// An operand with its length in a register: the magnitude counts, at most a whole vector.
    fn explicit(self, elements: u128, length: i64) -> Text {
        let length = length.unsigned_abs().min(self.count().into());
        Text { elements, length: length as u32 }
    }

    /// The comparison and the polarity: a bit for every element of `b`.
    fn compare(self, a: Text, b: Text) -> u32 {
        let row = |n: u32| self.equal(self.repeated(a.elements, n), b.elements) & b.valid();
        let result = match self.0 >> 2 & 3 {
            // Equal any: elements of b that occur in a.
            0 => (0..a.length).fold(0, |found, n| found | row(n)),
            // Ranges: a holds pairs of bounds.
            1 => (0..b.length)
                .filter(|&n| {
                    let value = self.element(b.elements, n);
                    (0..a.length / 2).any(|pair| {
                        self.element(a.elements, 2 * pair) <= value
                            && value <= self.element(a.elements, 2 * pair + 1)
                    })
                })
                .fold(0, |found, n| found | 1 << n),
            // Equal each: the two strings side by side; behind both ends counts as equal.
            2 => {
                let both = a.valid() & b.valid();
                self.equal(a.elements, b.elements) & both | !a.valid() & !b.valid()
            }
            // Equal ordered: places of b where a begins, perhaps cut off by the end of the vector.
            _ => (0..a.length)
                .fold(self.all(), |found, n| found & (row(n) >> n | !(self.all() >> n))),
        };
        let result = match self.0 >> 4 & 3 {
            1 => !result,
            3 => result ^ b.valid(),
            _ => result,
        };
        result & self.all()
    }

    /// The bits as the index form of the instruction returns them.
    fn index(self, result: u32) -> u32 {
        if result == 0 {
            self.count()
        } else if self.0 & 0x40 != 0 {
            31 - result.leading_zeros()
        } else {
            result.trailing_zeros()
        }
    }

    /// The bits as the mask form returns them: as they are, or a lane of ones for each.
    fn mask(self, result: u32) -> u128 {
        if self.0 & 0x40 == 0 {
            return result.into();
        }
        let width = 128 / self.count();
        (0..self.count())
            .filter(|n| result >> n & 1 != 0)
            .fold(0, |mask, n| mask | ((1 << width) - 1) << (n * width))
    }
}

/// `EXPLICIT`: 0 for implied lengths, else the bits of the length registers. `MASK`: result in XMM0, not ECX.
fn compare<S: Source, const EXPLICIT: u32, const MASK: bool>(
    cpu: &mut Cpu,
    op: &Op,
) -> Result<(), Trap> {
    cpu.require_sse()?;
    let second = S::read(cpu, op)?;
    let first = cpu.xmm(op.dst);
    let control = Control(op.imm as u8);
    let length = |register: usize| match EXPLICIT {
        32 => i64::from(cpu.gpr[register] as i32),
        _ => cpu.gpr[register] as i64,
    };
    let (a, b) = if EXPLICIT == 0 {
        (control.implicit(first), control.implicit(second))
    } else {
        (control.explicit(first, length(RAX)), control.explicit(second, length(RDX)))
    };
    let result = control.compare(a, b);
    if MASK {
        cpu.xmm[0] = control.mask(result);
    } else {
        u64::set(cpu, RCX as u8, control.index(result).into());
    }
    let full = control.count();
    cpu.flags.set_explicit(
        result != 0,
        false,
        false,
        b.length < full,
        a.length < full,
        result & 1 != 0,
    );
    Ok(())
}

/// The handler of an instruction of this group.
pub fn handler(instruction: &Instruction) -> Option<Selected> {
    let memory = in_memory(instruction, 1);
    macro_rules! by_place {
        ($explicit:literal, $mask:literal) => {
            Selected::inner(if memory {
                compare::<M128Unaligned, $explicit, $mask>
            } else {
                compare::<Register, $explicit, $mask>
            })
        };
    }
    match instruction.code() {
        Code::Pcmpistri_xmm_xmmm128_imm8 => by_place!(0, false),
        Code::Pcmpistrm_xmm_xmmm128_imm8 => by_place!(0, true),
        Code::Pcmpestri_xmm_xmmm128_imm8 => by_place!(32, false),
        Code::Pcmpestrm_xmm_xmmm128_imm8 => by_place!(32, true),
        Code::Pcmpestri64_xmm_xmmm128_imm8 => by_place!(64, false),
        Code::Pcmpestrm64_xmm_xmmm128_imm8 => by_place!(64, true),
        _ => None,
    }
}
