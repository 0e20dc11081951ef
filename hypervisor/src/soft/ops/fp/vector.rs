//! What vector handlers share: operands, availability, and the form of a handler with two vector operands.
//!
//! Arithmetic is done by the very instruction the guest executes, in inline assembly on two vectors. So
//! every lane, saturation and NaN is right by construction, on processors of every vendor.

use std::arch::x86_64::__m128i;

use iced_x86::{Instruction, OpKind};

use crate::soft::cpu::{CR0_EM, CR0_TS, CR4_OSFXSR, Cpu, Trap};
use crate::soft::op::{Op, Selected};

impl Cpu {
    /// Raises what an SSE instruction raises when the operating system has not switched SSE on.
    #[inline(always)]
    pub fn require_sse(&mut self) -> Result<(), Trap> {
        if (self.cr0 & (CR0_EM | CR0_TS)) | (!self.cr4 & CR4_OSFXSR) != 0 {
            return Err(self.sse_unavailable());
        }
        Ok(())
    }

    #[cold]
    fn sse_unavailable(&mut self) -> Trap {
        if self.cr0 & CR0_EM != 0 || self.cr4 & CR4_OSFXSR == 0 { self.ud() } else { self.nm() }
    }

    /// Raises what an MMX instruction raises: #UD, #NM, or #MF for an x87 exception that waits.
    #[inline(always)]
    pub fn require_mmx(&mut self) -> Result<(), Trap> {
        if self.cr0 & CR0_EM != 0 {
            return Err(self.ud());
        }
        self.require_x87()
    }

    /// Raises what a waiting x87 instruction raises before it does anything: #NM or #MF.
    #[inline(always)]
    pub fn require_x87(&mut self) -> Result<(), Trap> {
        self.require_x87_unwaiting()?;
        if self.fpu.pending() {
            return Err(self.mf());
        }
        Ok(())
    }

    /// As [`Cpu::require_x87`] for the instructions that do not look at waiting exceptions.
    #[inline(always)]
    pub fn require_x87_unwaiting(&mut self) -> Result<(), Trap> {
        if self.cr0 & (CR0_EM | CR0_TS) != 0 {
            return Err(self.nm());
        }
        Ok(())
    }

    /// An XMM register.
    #[inline(always)]
    pub fn xmm(&self, register: u8) -> u128 {
        self.xmm[usize::from(register & 15)]
    }

    /// The same, to be written.
    #[inline(always)]
    pub fn xmm_mut(&mut self, register: u8) -> &mut u128 {
        &mut self.xmm[usize::from(register & 15)]
    }

    /// The address of a 16-byte operand that must be aligned: #GP(0) if it is not.
    #[inline(always)]
    pub fn aligned_ea(&mut self, op: &Op) -> Result<u64, Trap> {
        let linear = self.ea(op);
        if linear & 15 != 0 {
            return Err(self.gp(0));
        }
        Ok(linear)
    }
}

/// A vector as the host's instructions take it.
#[inline(always)]
pub fn vector(bits: u128) -> __m128i {
    // SAFETY: both types are sixteen bytes of which every pattern is valid.
    unsafe { std::mem::transmute(bits) }
}

/// The bits of a host vector.
#[inline(always)]
pub fn bits(vector: __m128i) -> u128 {
    // SAFETY: both types are sixteen bytes of which every pattern is valid.
    unsafe { std::mem::transmute(vector) }
}

/// A function of two vectors.
pub trait Binary {
    /// The new value of the first operand.
    fn apply(a: u128, b: u128) -> u128;
}

/// Where a second operand comes from; shorter ones are zero-extended.
pub trait Source {
    /// Reads it.
    fn read(cpu: &mut Cpu, op: &Op) -> Result<u128, Trap>;
}

/// XMM register `op.src`.
pub struct Register;
/// 16 bytes of memory, aligned.
pub struct M128;
/// 16 bytes of memory at any address.
pub struct M128Unaligned;
/// 8 bytes of memory.
pub struct M64;
/// 4 bytes of memory.
pub struct M32;
/// 2 bytes of memory.
pub struct M16;

impl Source for Register {
    #[inline(always)]
    fn read(cpu: &mut Cpu, op: &Op) -> Result<u128, Trap> {
        Ok(cpu.xmm(op.src))
    }
}

impl Source for M128 {
    #[inline(always)]
    fn read(cpu: &mut Cpu, op: &Op) -> Result<u128, Trap> {
        let linear = cpu.aligned_ea(op)?;
        cpu.load::<u128>(linear)
    }
}

macro_rules! memory_source {
    ($($name:ident $type:ty)+) => {$(
        impl Source for $name {
            #[inline(always)]
            fn read(cpu: &mut Cpu, op: &Op) -> Result<u128, Trap> {
                Ok(cpu.load::<$type>(cpu.ea(op))?.into())
            }
        }
    )+};
}
memory_source! { M128Unaligned u128 M64 u64 M32 u32 M16 u16 }

fn binary<O: Binary, S: Source>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.require_sse()?;
    let b = S::read(cpu, op)?;
    let a = cpu.xmm_mut(op.dst);
    *a = O::apply(*a, b);
    Ok(())
}

/// Whether operand `n` is in memory.
pub fn in_memory(instruction: &Instruction, n: u32) -> bool {
    instruction.op_kind(n) == OpKind::Memory
}

/// The handler of `O` on an XMM register and a register or `M`.
pub fn select<O: Binary, M: Source>(instruction: &Instruction) -> Option<Selected> {
    Selected::inner(if in_memory(instruction, 1) { binary::<O, M> } else { binary::<O, Register> })
}

/// A [`Binary`] that is one host instruction without flags or exceptions.
macro_rules! host_binary {
    ($name:ident $text:literal) => {
        struct $name;
        impl $crate::soft::ops::fp::vector::Binary for $name {
            #[inline(always)]
            fn apply(a: u128, b: u128) -> u128 {
                use $crate::soft::ops::fp::vector::{bits, vector};
                let mut result = vector(a);
                // SAFETY: an integer instruction on two registers; it is of SSE4.2 or below, which
                // the back end demands of its host.
                unsafe {
                    std::arch::asm!(
                        concat!($text, " {a}, {b}"),
                        a = inout(xmm_reg) result,
                        b = in(xmm_reg) vector(b),
                        options(pure, nomem, nostack, preserves_flags),
                    );
                }
                bits(result)
            }
        }
    };
}
pub(super) use host_binary;
