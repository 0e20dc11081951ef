//! BT, BTS, BTR, BTC, BSF, BSR, POPCNT, CRC32. The processor has neither BMI1 nor LZCNT, so TZCNT and LZCNT are BSF
//! and BSR with a prefix that means nothing.

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::integer::{Form, form, inner, size, size0, sized};
use crate::soft::cpu::{Cpu, Trap};
use crate::soft::op::{Int, Op, Selected};

pub(super) fn handler(instruction: &Instruction) -> Option<Selected> {
    use Mnemonic as M;
    match instruction.mnemonic() {
        M::Bt => test::<Bt>(instruction),
        M::Bts => test::<Bts>(instruction),
        M::Btr => test::<Btr>(instruction),
        M::Btc => test::<Btc>(instruction),
        M::Bsf | M::Tzcnt => source::<Bsf>(instruction),
        M::Bsr | M::Lzcnt => source::<Bsr>(instruction),
        M::Popcnt => source::<Popcnt>(instruction),
        M::Crc32 => {
            let size = size(instruction, 1);
            inner(match instruction.op1_kind() {
                OpKind::Register => sized!(size, crc32_r),
                _ => sized!(size, crc32_m),
            })
        }
        _ => None,
    }
}

/// What happens to a word of which one bit is tested.
trait Test {
    const WRITES: bool;
    fn compute(word: u64, bit: u64) -> u64;
}

macro_rules! test {
    ($name:ident, $writes:expr, |$word:ident, $bit:ident| $body:expr) => {
        struct $name;
        impl Test for $name {
            const WRITES: bool = $writes;
            #[inline(always)]
            fn compute($word: u64, $bit: u64) -> u64 {
                $body
            }
        }
    };
}

test!(Bt, false, |word, _bit| word);
test!(Bts, true, |word, bit| word | bit);
test!(Btr, true, |word, bit| word & !bit);
test!(Btc, true, |word, bit| word ^ bit);

fn test<O: Test>(instruction: &Instruction) -> Option<Selected> {
    let size = size0(instruction);
    inner(match form(instruction) {
        Form::RR => sized!(size, test_rr, O),
        Form::RI => sized!(size, test_ri, O),
        Form::MR => sized!(size, test_mr, O),
        Form::MI => sized!(size, test_mi, O),
        _ => return None,
    })
}

#[inline(always)]
fn test_register<O: Test, T: Int>(cpu: &mut Cpu, op: &Op, offset: u64) {
    let bit = 1 << (offset & u64::from(T::BITS - 1));
    let word = T::get(cpu, op.dst);
    cpu.flags.set_cf(word & bit != 0);
    if O::WRITES {
        T::set(cpu, op.dst, O::compute(word, bit));
    }
}

#[inline(always)]
fn test_memory<O: Test, T: Int>(cpu: &mut Cpu, address: u64, offset: u64) -> Result<(), Trap> {
    let bit = 1 << (offset & u64::from(T::BITS - 1));
    if O::WRITES {
        cpu.modify::<T>(address, |cpu, word| {
            let word = word.extend();
            cpu.flags.set_cf(word & bit != 0);
            T::truncate(O::compute(word, bit))
        })
    } else {
        let word = cpu.load::<T>(address)?.extend();
        cpu.flags.set_cf(word & bit != 0);
        Ok(())
    }
}

fn test_rr<O: Test, T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let offset = T::get(cpu, op.src);
    test_register::<O, T>(cpu, op, offset);
    Ok(())
}

fn test_ri<O: Test, T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    test_register::<O, T>(cpu, op, op.imm);
    Ok(())
}

/// The bit offset in a register reaches beyond the operand: the address moves by whole operands.
fn test_mr<O: Test, T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let offset = T::sign_extend(T::get(cpu, op.src));
    let words = (offset as i64) >> T::BITS.trailing_zeros();
    let step = (words as u64).wrapping_mul(T::BYTES as u64);
    let offset_from_segment = cpu.effective_offset(op).wrapping_add(step);
    let offset_from_segment = if op.segment & crate::soft::op::ADDRESS_32 == 0 {
        offset_from_segment
    } else {
        offset_from_segment & 0xffff_ffff
    };
    let address = cpu.linear(op, offset_from_segment);
    test_memory::<O, T>(cpu, address, offset)
}

fn test_mi<O: Test, T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    test_memory::<O, T>(cpu, cpu.ea(op), op.imm)
}

/// Computes a register from one source operand.
trait Source {
    fn compute<T: Int>(cpu: &mut Cpu, register: u8, source: u64);
}

struct Bsf;
impl Source for Bsf {
    #[inline(always)]
    fn compute<T: Int>(cpu: &mut Cpu, register: u8, source: u64) {
        cpu.flags.set_logic::<T>(source);
        if source != 0 {
            T::set(cpu, register, u64::from(source.trailing_zeros()));
        }
    }
}

struct Bsr;
impl Source for Bsr {
    #[inline(always)]
    fn compute<T: Int>(cpu: &mut Cpu, register: u8, source: u64) {
        cpu.flags.set_logic::<T>(source);
        if source != 0 {
            T::set(cpu, register, u64::from(63 - source.leading_zeros()));
        }
    }
}

struct Popcnt;
impl Source for Popcnt {
    #[inline(always)]
    fn compute<T: Int>(cpu: &mut Cpu, register: u8, source: u64) {
        cpu.flags.set_explicit(false, false, false, source == 0, false, false);
        T::set(cpu, register, u64::from(source.count_ones()));
    }
}

fn source<O: Source>(instruction: &Instruction) -> Option<Selected> {
    let size = size0(instruction);
    inner(match form(instruction) {
        Form::RR => sized!(size, source_r, O),
        Form::RM => sized!(size, source_m, O),
        _ => return None,
    })
}

fn source_r<O: Source, T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let source = T::get(cpu, op.src);
    O::compute::<T>(cpu, op.dst, source);
    Ok(())
}

fn source_m<O: Source, T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let source = cpu.load::<T>(cpu.ea(op))?.extend();
    O::compute::<T>(cpu, op.dst, source);
    Ok(())
}

/// CRC-32C of single bytes, bit-reflected polynomial 0x82f63b78.
const CRC: [u32; 256] = {
    let mut table = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        let mut crc = byte as u32;
        let mut bit = 0;
        while bit < 8 {
            crc = if crc & 1 != 0 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 };
            bit += 1;
        }
        table[byte] = crc;
        byte += 1;
    }
    table
};

fn crc32<T: Int>(cpu: &mut Cpu, op: &Op, source: u64) {
    let mut crc = cpu.gpr[usize::from(op.dst & 31)] as u32;
    for byte in source.to_le_bytes().into_iter().take(T::BYTES) {
        crc = crc >> 8 ^ CRC[usize::from(crc as u8 ^ byte)];
    }
    u64::set(cpu, op.dst, u64::from(crc));
}

fn crc32_r<T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let source = T::get(cpu, op.src);
    crc32::<T>(cpu, op, source);
    Ok(())
}

fn crc32_m<T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let source = cpu.load::<T>(cpu.ea(op))?.extend();
    crc32::<T>(cpu, op, source);
    Ok(())
}
