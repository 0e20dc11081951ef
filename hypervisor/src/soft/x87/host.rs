//! x87 arithmetic by the host's own x87, exact in 80 bits on every processor.
//!
//! [`run`] executes one instruction of the host on operands given, under the guest's control word.
//! While the guest masks every exception (nearly always) the host's registers are loaded directly.
//! As soon as one is unmasked, a whole register image goes in by FRSTOR and comes out by FNSAVE: neither
//! checks for pending exceptions, so the host reports exactly what the guest must see and never traps.
//!
//! What must hold: outside [`run`] the host's x87 is as the ABI wants it, empty and with control word
//! 0x37f. Its exception flags may stay set: nothing in Rust looks at them, and clearing them costs a
//! hundred times an addition, so that is done only when a flag is set which the guest does not have
//! set already.

use super::super::fpu::{CONTROL_DEFAULT, F80, SAVE_BYTES, status};
use std::arch::asm;

/// Operands and results of one instruction. The assembly addresses its fields by offset.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub struct Frame {
    /// ST(0), before and after (after a push, the value pushed).
    pub st0: F80,
    /// ST(1).
    pub st1: F80,
    /// The memory operand, read or written.
    pub memory: u128,
    /// In: the guest's control word.
    pub control: u16,
    /// In: the guest's exception flags. Out: condition codes and exceptions of this instruction,
    /// plus possibly flags that were set before.
    pub status: u16,
}

impl Frame {
    /// Whether an unmasked exception kept the instruction from having any result.
    #[must_use]
    pub fn suppressed(&self) -> bool {
        self.status & !self.control & (status::IE | status::DE | status::ZE) != 0
    }

    /// Whether an unmasked exception keeps a store to memory from happening: there, overflow and
    /// underflow suppress the result too (vol. 1, 8.5.4 and 8.5.5).
    #[must_use]
    pub fn store_suppressed(&self) -> bool {
        self.status & !self.control & (status::EXCEPTIONS & !status::PE) != 0
    }
}

/// One host instruction in two settings; see the module's text.
pub trait Operation {
    /// Executes with all exceptions masked. `frame.control` masks all.
    fn masked(frame: &mut Frame);
    /// Executes on the register image, which FRSTOR loads and FNSAVE stores.
    fn imaged(frame: &mut Frame, image: &mut [u8; SAVE_BYTES]);
}

/// Executes `O` on `st0`, `st1` and `memory` for a guest with this control word and these flags.
#[inline]
pub fn run<O: Operation>(control: u16, flags: u16, st0: F80, st1: F80, memory: u128) -> Frame {
    let mut frame = Frame { st0, st1, memory, control, status: flags & status::EXCEPTIONS };
    if control & status::EXCEPTIONS == status::EXCEPTIONS {
        O::masked(&mut frame);
    } else {
        run_imaged::<O>(&mut frame);
    }
    frame
}

#[cold]
fn run_imaged<O: Operation>(frame: &mut Frame) {
    let mut image = [0u8; SAVE_BYTES];
    image[0..2].copy_from_slice(&frame.control.to_le_bytes());
    // TOP 0, registers 0 and 1 in use.
    image[8..10].copy_from_slice(&0xfff0u16.to_le_bytes());
    image[28..38].copy_from_slice(&frame.st0.to_bits().to_le_bytes()[..10]);
    image[38..48].copy_from_slice(&frame.st1.to_bits().to_le_bytes()[..10]);
    O::imaged(frame, &mut image);
    let register = |at: usize| {
        let mut bits = [0; 16];
        bits[..10].copy_from_slice(&image[at..at + 10]);
        F80::from_bits(u128::from_le_bytes(bits))
    };
    frame.status = u16::from_le_bytes([image[4], image[5]]);
    frame.st0 = register(28);
    frame.st1 = register(38);
}

static HOST_CONTROL: u16 = CONTROL_DEFAULT;

/// Defines operations. The text works on `st`, `st(1)` and the memory operand at `[{f}+32]`. `keep` ones
/// leave the stack as deep as it was, `push` ones push (and then `st0` is loaded in the image only).
macro_rules! operations {
    ($($(#[$doc:meta])* $name:ident $kind:ident $($text:literal)+;)+) => {
        $(
            $(#[$doc])*
            pub struct $name;

            impl Operation for $name {
                #[inline]
                fn masked(frame: &mut Frame) {
                    let clear_if = !frame.status & status::EXCEPTIONS;
                    let status: u16;
                    // SAFETY: `f` points to a whole Frame and every access stays inside it; the
                    // control word is put back; all x87 registers are declared clobbered and the
                    // stack is left empty as it was found.
                    unsafe {
                        asm!(
                            "fnstsw ax",
                            "test eax, ecx",
                            "jz 2f",
                            "fnclex",
                            "2:",
                            "fldcw word ptr [{f}+48]",
                            "fld tbyte ptr [{f}+16]",
                            operations!(@load $kind),
                            $($text,)+
                            "fnstsw ax",
                            "fstp tbyte ptr [{f}]",
                            "fstp tbyte ptr [{f}+16]",
                            "fldcw word ptr [{c}]",
                            f = in(reg) std::ptr::from_mut(frame),
                            c = in(reg) &raw const HOST_CONTROL,
                            in("ecx") u32::from(clear_if),
                            out("ax") status,
                            out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _,
                            out("st(4)") _, out("st(5)") _, out("st(6)") _, out("st(7)") _,
                            options(nostack),
                        );
                    }
                    frame.status = status;
                }

                fn imaged(frame: &mut Frame, image: &mut [u8; SAVE_BYTES]) {
                    // SAFETY: FRSTOR and FNSAVE access the 108 bytes of `image`, the text the Frame;
                    // FNSAVE leaves the x87 initialised, which is what the ABI wants.
                    unsafe {
                        asm!(
                            "frstor [{i}]",
                            $($text,)+
                            "fnsave [{i}] /* {f} */",
                            i = in(reg) std::ptr::from_mut(image),
                            f = in(reg) std::ptr::from_mut(frame),
                            out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _,
                            out("st(4)") _, out("st(5)") _, out("st(6)") _, out("st(7)") _,
                            options(nostack),
                        );
                    }
                }
            }
        )+
    };
    (@load keep) => { "fld tbyte ptr [{f}]" };
    (@load push) => { "" };
}

operations! {
    /// ST(0) + ST(1) to ST(0).
    Add keep "fadd st, st(1)";
    /// ST(0) - ST(1) to ST(0).
    Sub keep "fsub st, st(1)";
    /// ST(1) - ST(0) to ST(0).
    Subr keep "fsubr st, st(1)";
    /// ST(0) * ST(1) to ST(0).
    Mul keep "fmul st, st(1)";
    /// ST(0) / ST(1) to ST(0).
    Div keep "fdiv st, st(1)";
    /// ST(1) / ST(0) to ST(0).
    Divr keep "fdivr st, st(1)";
    /// ST(1) + ST(0) to ST(1).
    AddTo keep "fadd st(1), st";
    /// ST(1) - ST(0) to ST(1).
    SubTo keep "fsub st(1), st";
    /// ST(0) - ST(1) to ST(1).
    SubrTo keep "fsubr st(1), st";
    /// ST(1) * ST(0) to ST(1).
    MulTo keep "fmul st(1), st";
    /// ST(1) / ST(0) to ST(1).
    DivTo keep "fdiv st(1), st";
    /// ST(0) / ST(1) to ST(1).
    DivrTo keep "fdivr st(1), st";

    /// ST(0) + m32.
    AddF32 keep "fadd dword ptr [{f}+32]";
    /// ST(0) - m32.
    SubF32 keep "fsub dword ptr [{f}+32]";
    /// m32 - ST(0).
    SubrF32 keep "fsubr dword ptr [{f}+32]";
    /// ST(0) * m32.
    MulF32 keep "fmul dword ptr [{f}+32]";
    /// ST(0) / m32.
    DivF32 keep "fdiv dword ptr [{f}+32]";
    /// m32 / ST(0).
    DivrF32 keep "fdivr dword ptr [{f}+32]";
    /// ST(0) + m64.
    AddF64 keep "fadd qword ptr [{f}+32]";
    /// ST(0) - m64.
    SubF64 keep "fsub qword ptr [{f}+32]";
    /// m64 - ST(0).
    SubrF64 keep "fsubr qword ptr [{f}+32]";
    /// ST(0) * m64.
    MulF64 keep "fmul qword ptr [{f}+32]";
    /// ST(0) / m64.
    DivF64 keep "fdiv qword ptr [{f}+32]";
    /// m64 / ST(0).
    DivrF64 keep "fdivr qword ptr [{f}+32]";
    /// ST(0) + 16-bit integer.
    AddI16 keep "fiadd word ptr [{f}+32]";
    /// ST(0) - 16-bit integer.
    SubI16 keep "fisub word ptr [{f}+32]";
    /// 16-bit integer - ST(0).
    SubrI16 keep "fisubr word ptr [{f}+32]";
    /// ST(0) * 16-bit integer.
    MulI16 keep "fimul word ptr [{f}+32]";
    /// ST(0) / 16-bit integer.
    DivI16 keep "fidiv word ptr [{f}+32]";
    /// 16-bit integer / ST(0).
    DivrI16 keep "fidivr word ptr [{f}+32]";
    /// ST(0) + 32-bit integer.
    AddI32 keep "fiadd dword ptr [{f}+32]";
    /// ST(0) - 32-bit integer.
    SubI32 keep "fisub dword ptr [{f}+32]";
    /// 32-bit integer - ST(0).
    SubrI32 keep "fisubr dword ptr [{f}+32]";
    /// ST(0) * 32-bit integer.
    MulI32 keep "fimul dword ptr [{f}+32]";
    /// ST(0) / 32-bit integer.
    DivI32 keep "fidiv dword ptr [{f}+32]";
    /// 32-bit integer / ST(0).
    DivrI32 keep "fidivr dword ptr [{f}+32]";

    /// Compares ST(0) with ST(1); any NaN is invalid.
    Com keep "fcom st(1)";
    /// Compares ST(0) with ST(1); only signalling NaNs are invalid.
    Ucom keep "fucom st(1)";
    /// Compares with m32.
    ComF32 keep "fcom dword ptr [{f}+32]";
    /// Compares with m64.
    ComF64 keep "fcom qword ptr [{f}+32]";
    /// Compares with a 16-bit integer.
    ComI16 keep "ficom word ptr [{f}+32]";
    /// Compares with a 32-bit integer.
    ComI32 keep "ficom dword ptr [{f}+32]";
    /// Compares with zero.
    Tst keep "ftst";

    /// Square root.
    Sqrt keep "fsqrt";
    /// Rounds to an integer.
    Rndint keep "frndint";
    /// ST(0) times two to the power of ST(1) truncated.
    Scale keep "fscale";
    /// Remainder of ST(0) by ST(1), quotient truncated.
    Prem keep "fprem";
    /// Remainder, quotient rounded to nearest.
    Prem1 keep "fprem1";

    /// Loads m32.
    LoadF32 push "fld dword ptr [{f}+32]";
    /// Loads m64.
    LoadF64 push "fld qword ptr [{f}+32]";
    /// Loads a 16-bit integer.
    LoadI16 push "fild word ptr [{f}+32]";
    /// Loads a 32-bit integer.
    LoadI32 push "fild dword ptr [{f}+32]";
    /// Loads a 64-bit integer.
    LoadI64 push "fild qword ptr [{f}+32]";
    /// Loads 1.
    LoadOne push "fld1";
    /// Loads +0.
    LoadZero push "fldz";
    /// Loads log2(10).
    LoadL2t push "fldl2t";
    /// Loads log2(e).
    LoadL2e push "fldl2e";
    /// Loads pi.
    LoadPi push "fldpi";
    /// Loads log10(2).
    LoadLg2 push "fldlg2";
    /// Loads ln(2).
    LoadLn2 push "fldln2";

    /// Stores to m32.
    StoreF32 keep "fst dword ptr [{f}+32]";
    /// Stores to m64.
    StoreF64 keep "fst qword ptr [{f}+32]";
    /// Stores a 16-bit integer.
    StoreI16 keep "fist word ptr [{f}+32]";
    /// Stores a 32-bit integer.
    StoreI32 keep "fist dword ptr [{f}+32]";
    /// Stores a 64-bit integer.
    StoreI64 keep "fld st(0)" "fistp qword ptr [{f}+32]";
    /// Stores a 16-bit integer, truncated.
    TruncateI16 keep "fld st(0)" "fisttp word ptr [{f}+32]";
    /// Stores a 32-bit integer, truncated.
    TruncateI32 keep "fld st(0)" "fisttp dword ptr [{f}+32]";
    /// Stores a 64-bit integer, truncated.
    TruncateI64 keep "fld st(0)" "fisttp qword ptr [{f}+32]";
    /// Stores a packed decimal integer.
    StoreBcd keep "fld st(0)" "fbstp [{f}+32]";
}

#[cfg(test)]
mod tests {
    use super::*;

    const TWO: F80 = F80::new(false, 0x4000, 1 << 63);

    #[test]
    fn arithmetic_and_flags() {
        let sum = run::<Add>(CONTROL_DEFAULT, 0, F80::ONE, F80::ONE, 0);
        assert_eq!((sum.st0, sum.status & status::EXCEPTIONS), (TWO, 0));
        let third = run::<LoadF32>(CONTROL_DEFAULT, 0, F80::ZERO, F80::ONE, 0x4040_0000);
        assert_eq!(third.st1, F80::ONE);
        let third = run::<Div>(CONTROL_DEFAULT, 0, F80::ONE, third.st0, 0);
        assert_eq!(third.status & status::EXCEPTIONS, status::PE);
        // The flag left in the host must not show up in an exact operation.
        let sum = run::<Add>(CONTROL_DEFAULT, 0, F80::ONE, F80::ONE, 0);
        assert_eq!(sum.status & status::EXCEPTIONS, 0);
    }

    #[test]
    fn unmasked_exceptions_are_reported_and_do_not_trap() {
        let control = CONTROL_DEFAULT & !status::ZE;
        let quotient = run::<Div>(control, 0, F80::ONE, F80::ZERO, 0);
        assert!(quotient.suppressed());
        assert_eq!(quotient.status & status::EXCEPTIONS, status::ZE);
        let quotient = run::<Div>(CONTROL_DEFAULT, 0, F80::ONE, F80::ZERO, 0);
        assert!(!quotient.suppressed());
        assert_eq!(quotient.st0, F80::infinity(false));
    }

    #[test]
    fn rounding_follows_the_control_word() {
        let one_and_a_half = F80::new(false, 0x3fff, 3 << 62);
        let up = run::<StoreI32>(0xb7f, 0, one_and_a_half, F80::ZERO, 0);
        let down = run::<StoreI32>(0x77f, 0, one_and_a_half, F80::ZERO, 0);
        assert_eq!((up.memory as i32, down.memory as i32), (2, 1));
        assert_eq!((up.status & status::C1, down.status & status::C1), (status::C1, 0));
    }
}
