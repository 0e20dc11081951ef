//! x87 arithmetic and comparisons, and what all x87 handlers share.
//!
//! Every handler reads its operands, computes on copies ([`host::run`]), stores to memory if it has to, and only then
//! changes the x87: a page fault leaves no trace. An unmasked exception found before the operation
//! leaves operands and stack as they are and is raised by the next waiting instruction (vol. 1, 8.7).

use iced_x86::{Code, Instruction};

use super::vector::in_memory;
use crate::soft::cpu::{Cpu, Trap};
use crate::soft::fpu::{Class, F80, status};
use crate::soft::op::{Op, Selected, Word};
use crate::soft::x87::host::{self, Frame, Operation};

impl Cpu {
    /// Notes the memory operand's address.
    pub(super) fn note_operand(&mut self, op: &Op, linear: u64) {
        self.note_instruction(op);
        self.fpu.last_operand = linear;
    }

    /// Adds the exceptions and C1 of an operation.
    pub(super) fn x87_commit(&mut self, raised: u16) {
        let fpu = &mut self.fpu;
        fpu.status =
            fpu.status & !status::C1 | raised & (status::EXCEPTIONS | status::SF | status::C1);
    }

    /// Adds the exceptions and all condition codes of an operation.
    pub(super) fn x87_commit_conditions(&mut self, raised: u16) {
        self.fpu.status &= !status::CONDITIONS;
        self.fpu.status |= raised & (status::EXCEPTIONS | status::SF | status::CONDITIONS);
    }

    /// A register that had to hold something is empty. Returns whether that is masked.
    pub(super) fn x87_underflow(&mut self) -> bool {
        self.x87_commit(status::IE | status::SF);
        self.fpu.control & status::IE != 0
    }

    /// A register that had to be empty is not. Returns whether that is masked.
    pub(super) fn x87_overflow(&mut self) -> bool {
        self.x87_commit(status::IE | status::SF | status::C1);
        self.fpu.control & status::IE != 0
    }

    /// Runs a host operation for this guest's control word and flags.
    pub(super) fn x87_run<O: Operation>(&self, st0: F80, st1: F80, memory: u128) -> Frame {
        host::run::<O>(self.fpu.control, self.fpu.status, st0, st1, memory)
    }

    /// Pushes, or answers an overflow of the stack.
    pub(super) fn x87_push(&mut self, value: F80, raised: u16) {
        if self.fpu.st(7).is_none() {
            self.fpu.push(value);
            self.x87_commit(raised);
        } else if self.x87_overflow() {
            self.fpu.push(F80::INDEFINITE);
        }
    }
}

/// ST(0) <- ST(0) op ST(i).
fn arithmetic<O: Operation>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.require_x87()?;
    cpu.note_instruction(op);
    let (Some(a), Some(b)) = (cpu.fpu.st(0), cpu.fpu.st(op.src)) else {
        if cpu.x87_underflow() {
            cpu.fpu.set_st(0, F80::INDEFINITE);
        }
        return Ok(());
    };
    let frame = cpu.x87_run::<O>(a, b, 0);
    cpu.x87_commit(frame.status);
    if !frame.suppressed() {
        cpu.fpu.set_st(0, frame.st0);
    }
    Ok(())
}

/// ST(i) <- ST(i) op ST(0), perhaps with a pop.
fn arithmetic_to<O: Operation, const POP: bool>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.require_x87()?;
    cpu.note_instruction(op);
    let result = match (cpu.fpu.st(0), cpu.fpu.st(op.dst)) {
        (Some(a), Some(b)) => {
            let frame = cpu.x87_run::<O>(a, b, 0);
            cpu.x87_commit(frame.status);
            (!frame.suppressed()).then_some(frame.st1)
        }
        _ => cpu.x87_underflow().then_some(F80::INDEFINITE),
    };
    if let Some(result) = result {
        cpu.fpu.set_st(op.dst, result);
        if POP {
            cpu.fpu.pop();
        }
    }
    Ok(())
}

/// ST(0) <- ST(0) op memory.
fn arithmetic_memory<O: Operation, T: Word + Into<u128>>(
    cpu: &mut Cpu,
    op: &Op,
) -> Result<(), Trap> {
    cpu.require_x87()?;
    let linear = cpu.ea(op);
    let memory = cpu.load::<T>(linear)?.into();
    cpu.note_operand(op, linear);
    let Some(a) = cpu.fpu.st(0) else {
        if cpu.x87_underflow() {
            cpu.fpu.set_st(0, F80::INDEFINITE);
        }
        return Ok(());
    };
    let frame = cpu.x87_run::<O>(a, F80::ZERO, memory);
    cpu.x87_commit(frame.status);
    if !frame.suppressed() {
        cpu.fpu.set_st(0, frame.st0);
    }
    Ok(())
}

/// ST(0) <- op ST(0) (and ST(1), for FSCALE).
fn unary<O: Operation, const TWO: bool>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.require_x87()?;
    cpu.note_instruction(op);
    let b = if TWO { cpu.fpu.st(1) } else { Some(F80::ZERO) };
    let (Some(a), Some(b)) = (cpu.fpu.st(0), b) else {
        if cpu.x87_underflow() {
            cpu.fpu.set_st(0, F80::INDEFINITE);
        }
        return Ok(());
    };
    let frame = cpu.x87_run::<O>(a, b, 0);
    cpu.x87_commit(frame.status);
    if !frame.suppressed() {
        cpu.fpu.set_st(0, frame.st0);
    }
    Ok(())
}

/// FCHS and FABS, which know no exception but an empty register.
fn sign<const ABSOLUTE: bool>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.require_x87()?;
    cpu.note_instruction(op);
    match cpu.fpu.st(0) {
        Some(value) => {
            cpu.fpu.set_st(0, value.with_sign(!ABSOLUTE && !value.is_negative()));
            cpu.x87_commit(0);
        }
        None => {
            if cpu.x87_underflow() {
                cpu.fpu.set_st(0, F80::INDEFINITE);
            }
        }
    }
    Ok(())
}

/// What a comparison with an empty register answers: unordered.
const UNORDERED: u16 = status::C0 | status::C2 | status::C3;

/// Compares `a` with `b` or memory, sets C0, C2, C3, pops `POPS` times.
fn compare<O: Operation, const POPS: u8>(
    cpu: &mut Cpu,
    a: Option<F80>,
    b: Option<F80>,
    memory: u128,
) {
    let suppressed = match (a, b) {
        (Some(a), Some(b)) => {
            let frame = cpu.x87_run::<O>(a, b, memory);
            cpu.x87_commit_conditions(frame.status);
            frame.suppressed()
        }
        _ => {
            cpu.x87_commit_conditions(status::IE | status::SF | UNORDERED);
            cpu.fpu.control & status::IE == 0
        }
    };
    if !suppressed {
        for _ in 0..POPS {
            cpu.fpu.pop();
        }
    }
}

/// FCOM, FUCOM and their popping forms.
fn compare_register<O: Operation, const POPS: u8>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.require_x87()?;
    cpu.note_instruction(op);
    compare::<O, POPS>(cpu, cpu.fpu.st(0), cpu.fpu.st(op.src), 0);
    Ok(())
}

/// FCOMPP, FUCOMPP.
fn compare_pop_both<O: Operation>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.require_x87()?;
    cpu.note_instruction(op);
    compare::<O, 2>(cpu, cpu.fpu.st(0), cpu.fpu.st(1), 0);
    Ok(())
}

/// FCOM, FICOM with memory.
fn compare_memory<O: Operation, T: Word + Into<u128>, const POPS: u8>(
    cpu: &mut Cpu,
    op: &Op,
) -> Result<(), Trap> {
    cpu.require_x87()?;
    let linear = cpu.ea(op);
    let memory = cpu.load::<T>(linear)?.into();
    cpu.note_operand(op, linear);
    compare::<O, POPS>(cpu, cpu.fpu.st(0), Some(F80::ZERO), memory);
    Ok(())
}

fn ftst(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.require_x87()?;
    cpu.note_instruction(op);
    compare::<host::Tst, 0>(cpu, cpu.fpu.st(0), Some(F80::ZERO), 0);
    Ok(())
}

/// FCOMI, FUCOMI: the answer in ZF, PF, CF.
fn compare_flags<O: Operation, const POP: bool>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.require_x87()?;
    cpu.note_instruction(op);
    let (conditions, pop) = match (cpu.fpu.st(0), cpu.fpu.st(op.src)) {
        (Some(a), Some(b)) => {
            let frame = cpu.x87_run::<O>(a, b, 0);
            // C1 stays as it was, unlike with FCOM.
            cpu.fpu.status |= frame.status & status::EXCEPTIONS;
            let invalid = frame.status & !cpu.fpu.control & status::IE != 0;
            (if invalid { UNORDERED } else { frame.status }, POP && !frame.suppressed())
        }
        // The flags are set even if an exception is not masked; the pop is not done then.
        _ => (UNORDERED, cpu.x87_underflow() && POP),
    };
    let on = |bit: u16| conditions & bit != 0;
    cpu.flags.set_explicit(on(status::C0), on(status::C2), false, on(status::C3), false, false);
    if pop {
        cpu.fpu.pop();
    }
    Ok(())
}

fn fxam(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.require_x87()?;
    cpu.note_instruction(op);
    let value = cpu.fpu.registers[cpu.fpu.physical(0)];
    let class = match cpu.fpu.st(0).map(F80::class) {
        None => status::C3 | status::C0,
        Some(Class::Unsupported) => 0,
        Some(Class::QuietNan | Class::SignallingNan) => status::C0,
        Some(Class::Normal) => status::C2,
        Some(Class::Infinity) => status::C2 | status::C0,
        Some(Class::Zero) => status::C3,
        Some(Class::Denormal) => status::C3 | status::C2,
    };
    let sign = if value.is_negative() { status::C1 } else { 0 };
    cpu.x87_commit_conditions(class | sign);
    Ok(())
}

/// The handler of an instruction of this group.
pub fn handler(instruction: &Instruction) -> Option<Selected> {
    registers(instruction).or_else(|| memory(instruction))
}

fn registers(instruction: &Instruction) -> Option<Selected> {
    use Code::*;
    Selected::inner(match instruction.code() {
        Fadd_st0_sti => arithmetic::<host::Add>,
        Fmul_st0_sti => arithmetic::<host::Mul>,
        Fsub_st0_sti => arithmetic::<host::Sub>,
        Fsubr_st0_sti => arithmetic::<host::Subr>,
        Fdiv_st0_sti => arithmetic::<host::Div>,
        Fdivr_st0_sti => arithmetic::<host::Divr>,
        Fadd_sti_st0 => arithmetic_to::<host::AddTo, false>,
        Fmul_sti_st0 => arithmetic_to::<host::MulTo, false>,
        Fsub_sti_st0 => arithmetic_to::<host::SubTo, false>,
        Fsubr_sti_st0 => arithmetic_to::<host::SubrTo, false>,
        Fdiv_sti_st0 => arithmetic_to::<host::DivTo, false>,
        Fdivr_sti_st0 => arithmetic_to::<host::DivrTo, false>,
        Faddp_sti_st0 => arithmetic_to::<host::AddTo, true>,
        Fmulp_sti_st0 => arithmetic_to::<host::MulTo, true>,
        Fsubp_sti_st0 => arithmetic_to::<host::SubTo, true>,
        Fsubrp_sti_st0 => arithmetic_to::<host::SubrTo, true>,
        Fdivp_sti_st0 => arithmetic_to::<host::DivTo, true>,
        Fdivrp_sti_st0 => arithmetic_to::<host::DivrTo, true>,
        Fsqrt => unary::<host::Sqrt, false>,
        Frndint => unary::<host::Rndint, false>,
        Fscale => unary::<host::Scale, true>,
        Fchs => sign::<false>,
        Fabs => sign::<true>,
        Fcom_st0_sti | Fcom_st0_sti_DCD0 => compare_register::<host::Com, 0>,
        Fcomp_st0_sti | Fcomp_st0_sti_DCD8 | Fcomp_st0_sti_DED0 => compare_register::<host::Com, 1>,
        Fucom_st0_sti => compare_register::<host::Ucom, 0>,
        Fucomp_st0_sti => compare_register::<host::Ucom, 1>,
        Fcompp => compare_pop_both::<host::Com>,
        Fucompp => compare_pop_both::<host::Ucom>,
        Fcomi_st0_sti => compare_flags::<host::Com, false>,
        Fcomip_st0_sti => compare_flags::<host::Com, true>,
        Fucomi_st0_sti => compare_flags::<host::Ucom, false>,
        Fucomip_st0_sti => compare_flags::<host::Ucom, true>,
        Ftst => ftst,
        Fxam => fxam,
        _ => return None,
    })
}

fn memory(instruction: &Instruction) -> Option<Selected> {
    if instruction.op_count() == 0 || !in_memory(instruction, 0) {
        return None;
    }
    use Code::*;
    Selected::inner(match instruction.code() {
        Fadd_m32fp => arithmetic_memory::<host::AddF32, u32>,
        Fmul_m32fp => arithmetic_memory::<host::MulF32, u32>,
        Fsub_m32fp => arithmetic_memory::<host::SubF32, u32>,
        Fsubr_m32fp => arithmetic_memory::<host::SubrF32, u32>,
        Fdiv_m32fp => arithmetic_memory::<host::DivF32, u32>,
        Fdivr_m32fp => arithmetic_memory::<host::DivrF32, u32>,
        Fadd_m64fp => arithmetic_memory::<host::AddF64, u64>,
        Fmul_m64fp => arithmetic_memory::<host::MulF64, u64>,
        Fsub_m64fp => arithmetic_memory::<host::SubF64, u64>,
        Fsubr_m64fp => arithmetic_memory::<host::SubrF64, u64>,
        Fdiv_m64fp => arithmetic_memory::<host::DivF64, u64>,
        Fdivr_m64fp => arithmetic_memory::<host::DivrF64, u64>,
        Fiadd_m16int => arithmetic_memory::<host::AddI16, u16>,
        Fimul_m16int => arithmetic_memory::<host::MulI16, u16>,
        Fisub_m16int => arithmetic_memory::<host::SubI16, u16>,
        Fisubr_m16int => arithmetic_memory::<host::SubrI16, u16>,
        Fidiv_m16int => arithmetic_memory::<host::DivI16, u16>,
        Fidivr_m16int => arithmetic_memory::<host::DivrI16, u16>,
        Fiadd_m32int => arithmetic_memory::<host::AddI32, u32>,
        Fimul_m32int => arithmetic_memory::<host::MulI32, u32>,
        Fisub_m32int => arithmetic_memory::<host::SubI32, u32>,
        Fisubr_m32int => arithmetic_memory::<host::SubrI32, u32>,
        Fidiv_m32int => arithmetic_memory::<host::DivI32, u32>,
        Fidivr_m32int => arithmetic_memory::<host::DivrI32, u32>,
        Fcom_m32fp => compare_memory::<host::ComF32, u32, 0>,
        Fcomp_m32fp => compare_memory::<host::ComF32, u32, 1>,
        Fcom_m64fp => compare_memory::<host::ComF64, u64, 0>,
        Fcomp_m64fp => compare_memory::<host::ComF64, u64, 1>,
        Ficom_m16int => compare_memory::<host::ComI16, u16, 0>,
        Ficomp_m16int => compare_memory::<host::ComI16, u16, 1>,
        Ficom_m32int => compare_memory::<host::ComI32, u32, 0>,
        Ficomp_m32int => compare_memory::<host::ComI32, u32, 1>,
        _ => return None,
    })
}
