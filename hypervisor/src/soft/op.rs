//! Decoded instructions: what a block is made of.

use super::cpu::{Cpu, Trap};

/// Executes one instruction. An `Err` means that it had no effect and did not retire: [`Cpu::trap`] says why.
///
/// A handler that ends a block finds `cpu.rip` at the next instruction and `cpu.retired` at the number of
/// instructions before its own; for all others both are those of some earlier instruction of the block.
pub type Handler = fn(&mut Cpu, &Op) -> Result<(), Trap>;

/// One decoded instruction.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct Op {
    /// What executes it.
    pub run: Handler,
    /// The immediate, sign-extended to 64 bits. Of a near branch: target minus the address of the block's first
    /// byte. Two immediates (ENTER, INSERTQ): the second in bits 32 and up. Far pointers: offset | selector << 32.
    pub imm: u64,
    /// Displacement of the memory operand, or for a RIP-relative one target minus the address of the block's first byte.
    pub disp: i32,
    /// Register number of the base ([`REG_NONE`]: none).
    pub base: u8,
    /// Register number of the index ([`REG_NONE`]: none).
    pub index: u8,
    /// Log2 of the index's scale factor.
    pub scale: u8,
    /// The segment whose base is added to the memory operand's address, or [`NO_SEGMENT`]; with [`ADDRESS_32`] and
    /// [`LINEAR_32`].
    pub segment: u8,
    /// Number of operand 0 if it is a register.
    pub dst: u8,
    /// Number of operand 1 if it is a register.
    pub src: u8,
    /// Number of operand 2 if it is a register.
    pub src2: u8,
    /// Bytes of the instruction.
    pub len: u8,
    /// Bytes from the block's start to the instruction.
    pub offset: u16,
    /// Instructions of the block before this one.
    pub number: u16,
}

/// In [`Cpu::gpr`]: always zero.
pub const REG_NONE: u8 = 16;
/// In [`Cpu::gpr`]: the address of the running block's first byte.
pub const REG_BLOCK: u8 = 17;
/// In [`Cpu::gpr`]: always [`REG_STEP_VALUE`]. For RIP-relative displacements that do not fit 32 bits once they are
/// relative to the block.
pub const REG_STEP: u8 = 18;
/// Value of [`REG_STEP`].
pub const REG_STEP_VALUE: u64 = 1 << 16;
/// Added to a register number: AH, CH, DH, BH as numbers 0 to 3.
pub const HIGH_BYTE: u8 = 0x10;
/// In [`Op::segment`]: the address is computed in 32 bits (67h prefix).
pub const ADDRESS_32: u8 = 0x80;
/// In [`Op::segment`]: linear addresses wrap at 4 GiB (compatibility mode).
pub const LINEAR_32: u8 = 0x40;
/// In [`Op::segment`]: a segment that has no base.
pub const NO_SEGMENT: u8 = 7;
/// In [`Op::segment`]: the segment's number.
pub const SEGMENT_NUMBER: u8 = 7;

/// What an instruction group chose for an instruction.
#[derive(Clone, Copy)]
pub struct Selected {
    /// What executes it.
    pub run: Handler,
    /// Nothing of the block may follow: it branches, or changes mode, mapping or interrupt state, or counts
    /// more than one (REP), or needs `cpu.rip` and `cpu.retired` exact (RDTSC, port I/O).
    pub ends_block: bool,
}

impl Selected {
    /// An instruction in the middle of a block.
    pub fn inner(run: Handler) -> Option<Selected> {
        Some(Selected { run, ends_block: false })
    }

    /// An instruction that ends its block.
    pub fn last(run: Handler) -> Option<Selected> {
        Some(Selected { run, ends_block: true })
    }
}

/// A value in memory: 1, 2, 4, 8 or 16 bytes.
pub trait Word: Copy + 'static {
    /// Bytes.
    const BYTES: usize;
    /// From little-endian bytes, of which there are `BYTES`, the rest ignored.
    fn from_bytes(bytes: [u8; 16]) -> Self;
    /// As little-endian bytes, padded with zeros.
    fn to_bytes(self) -> [u8; 16];
}

macro_rules! word {
    ($($type:ty),*) => {$(
        impl Word for $type {
            const BYTES: usize = size_of::<$type>();
            #[inline]
            fn from_bytes(bytes: [u8; 16]) -> Self {
                u128::from_le_bytes(bytes) as $type
            }
            #[inline]
            fn to_bytes(self) -> [u8; 16] {
                u128::from(self).to_le_bytes()
            }
        }
    )*};
}
word!(u8, u16, u32, u64, u128);

/// An operand size of integer instructions.
pub trait Int: Word {
    /// Bits.
    const BITS: u32;
    /// The low bits of `value`.
    fn truncate(value: u64) -> Self;
    /// Zero-extended.
    fn extend(self) -> u64;
    /// The low `BITS` of `value`, sign-extended.
    fn sign_extend(value: u64) -> u64;
    /// The low `BITS` of `value`, zero-extended.
    #[inline(always)]
    fn zero_extend(value: u64) -> u64 {
        Self::truncate(value).extend()
    }
    /// Reads a general register.
    fn get(cpu: &Cpu, register: u8) -> u64;
    /// Writes a general register: 32 bits clear the upper half, 8 and 16 bits leave the rest.
    fn set(cpu: &mut Cpu, register: u8, value: u64);
}

macro_rules! int {
    ($type:ty, $signed:ty, $get:expr, $set:expr) => {
        impl Int for $type {
            const BITS: u32 = <$type>::BITS;
            #[inline(always)]
            fn truncate(value: u64) -> Self {
                value as $type
            }
            #[inline(always)]
            fn extend(self) -> u64 {
                u64::from(self)
            }
            #[inline(always)]
            fn sign_extend(value: u64) -> u64 {
                value as $signed as i64 as u64
            }
            #[inline(always)]
            fn get(cpu: &Cpu, register: u8) -> u64 {
                $get(cpu, register)
            }
            #[inline(always)]
            fn set(cpu: &mut Cpu, register: u8, value: u64) {
                $set(cpu, register, value)
            }
        }
    };
}

/// Where a register is in [`Cpu::gpr`]. The array's length is a power of two, which makes the mask the bounds check.
#[inline(always)]
fn slot(register: u8) -> usize {
    usize::from(register & 31)
}

int!(
    u8,
    i8,
    |cpu: &Cpu, register: u8| {
        let shift = (register & HIGH_BYTE) >> 1;
        (cpu.gpr[usize::from(register & 15)] >> shift) & 0xff
    },
    |cpu: &mut Cpu, register: u8, value: u64| {
        let shift = (register & HIGH_BYTE) >> 1;
        let whole = &mut cpu.gpr[usize::from(register & 15)];
        *whole = *whole & !(0xff << shift) | (value & 0xff) << shift;
    }
);
int!(
    u16,
    i16,
    |cpu: &Cpu, register: u8| cpu.gpr[slot(register)] & 0xffff,
    |cpu: &mut Cpu, register: u8, value: u64| {
        let whole = &mut cpu.gpr[slot(register)];
        *whole = *whole & !0xffff | value & 0xffff;
    }
);
int!(
    u32,
    i32,
    |cpu: &Cpu, register: u8| cpu.gpr[slot(register)] & 0xffff_ffff,
    |cpu: &mut Cpu, register: u8, value: u64| {
        cpu.gpr[slot(register)] = value & 0xffff_ffff;
    }
);
int!(
    u64,
    i64,
    |cpu: &Cpu, register: u8| cpu.gpr[slot(register)],
    |cpu: &mut Cpu, register: u8, value: u64| {
        cpu.gpr[slot(register)] = value;
    }
);

/// Raises #UD: stands for every instruction no group knows.
pub fn undefined(cpu: &mut Cpu, _: &Op) -> Result<(), Trap> {
    Err(cpu.ud())
}
