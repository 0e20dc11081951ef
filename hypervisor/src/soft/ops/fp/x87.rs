//! x87 arithmetic, comparisons, loads and stores.
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
    fn note_operand(&mut self, op: &Op, linear: u64) {
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

/// FLD m32, m64; FILD; FBLD's arithmetic is the same with ten bytes.
fn push_memory<O: Operation, T: Word + Into<u128>>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.require_x87()?;
    let linear = cpu.ea(op);
    let memory = cpu.load::<T>(linear)?.into();
    cpu.note_operand(op, linear);
    push_computed::<O>(cpu, memory);
    Ok(())
}

fn push_computed<O: Operation>(cpu: &mut Cpu, memory: u128) {
    if cpu.fpu.st(7).is_some() {
        if cpu.x87_overflow() {
            cpu.fpu.push(F80::INDEFINITE);
        }
        return;
    }
    let frame = cpu.x87_run::<O>(F80::ZERO, F80::ZERO, memory);
    cpu.x87_commit(frame.status);
    // A denormal is loaded even if its exception is not masked: the number is exact.
    if frame.status & !frame.control & status::IE == 0 {
        cpu.fpu.push(frame.st0);
    }
}

/// FLD1, FLDPI and so on.
fn push_constant<O: Operation>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.require_x87()?;
    cpu.note_instruction(op);
    push_computed::<O>(cpu, 0);
    Ok(())
}

/// The ten bytes at `linear`.
fn load_ten(cpu: &mut Cpu, linear: u64) -> Result<u128, Trap> {
    let low = cpu.load::<u64>(linear)?;
    let high = cpu.load::<u16>(linear.wrapping_add(8))?;
    Ok(u128::from(low) | u128::from(high) << 64)
}

fn store_ten(cpu: &mut Cpu, linear: u64, value: u128) -> Result<(), Trap> {
    cpu.probe_write(linear, 10)?;
    cpu.store::<u64>(linear, value as u64)?;
    cpu.store::<u16>(linear.wrapping_add(8), (value >> 64) as u16)
}

fn fld_m80(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.require_x87()?;
    let linear = cpu.ea(op);
    let value = load_ten(cpu, linear)?;
    cpu.note_operand(op, linear);
    cpu.x87_push(F80::from_bits(value), 0);
    Ok(())
}

fn fbld(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.require_x87()?;
    let linear = cpu.ea(op);
    let value = load_ten(cpu, linear)?;
    cpu.note_operand(op, linear);
    push_computed::<host::LoadBcd>(cpu, value);
    Ok(())
}

fn fld_register(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.require_x87()?;
    cpu.note_instruction(op);
    match cpu.fpu.st(op.dst) {
        Some(value) => cpu.x87_push(value, 0),
        None => {
            if cpu.x87_underflow() {
                cpu.fpu.push(F80::INDEFINITE);
            }
        }
    }
    Ok(())
}

/// What to store, with the exceptions of converting it; `None` if an unmasked exception forbids the store.
fn to_store<O: Operation>(cpu: &Cpu) -> (Option<u128>, u16) {
    match cpu.fpu.st(0) {
        Some(value) => {
            let frame = cpu.x87_run::<O>(value, F80::ZERO, 0);
            ((!frame.store_suppressed()).then_some(frame.memory), frame.status)
        }
        None => {
            let masked = cpu.fpu.control & status::IE != 0;
            // The indefinite value in the format of the destination.
            let value = masked.then(|| cpu.x87_run::<O>(F80::INDEFINITE, F80::ZERO, 0).memory);
            (value, status::IE | status::SF)
        }
    }
}

/// FST, FIST, FISTTP.
fn store<O: Operation, T: Word, const POP: bool>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.require_x87()?;
    let linear = cpu.ea(op);
    let (value, raised) = to_store::<O>(cpu);
    if let Some(value) = value {
        cpu.store::<T>(linear, T::from_bytes(value.to_le_bytes()))?;
    }
    cpu.note_operand(op, linear);
    cpu.x87_commit(raised);
    if POP && value.is_some() {
        cpu.fpu.pop();
    }
    Ok(())
}

fn fbstp(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.require_x87()?;
    let linear = cpu.ea(op);
    let (value, raised) = to_store::<host::StoreBcd>(cpu);
    if let Some(value) = value {
        store_ten(cpu, linear, value)?;
    }
    cpu.note_operand(op, linear);
    cpu.x87_commit(raised);
    if value.is_some() {
        cpu.fpu.pop();
    }
    Ok(())
}

fn fstp_m80(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.require_x87()?;
    let linear = cpu.ea(op);
    let value = cpu.fpu.st(0);
    if value.is_some() || cpu.fpu.control & status::IE != 0 {
        store_ten(cpu, linear, value.unwrap_or(F80::INDEFINITE).to_bits())?;
    }
    cpu.note_operand(op, linear);
    match value {
        Some(_) => cpu.x87_commit(0),
        None if !cpu.x87_underflow() => return Ok(()),
        None => {}
    }
    cpu.fpu.pop();
    Ok(())
}

/// FST ST(i), FSTP ST(i).
fn store_register<const POP: bool>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.require_x87()?;
    cpu.note_instruction(op);
    let value = match cpu.fpu.st(0) {
        Some(value) => {
            cpu.x87_commit(0);
            value
        }
        None if cpu.x87_underflow() => F80::INDEFINITE,
        None => return Ok(()),
    };
    cpu.fpu.set_st(op.dst, value);
    if POP {
        cpu.fpu.pop();
    }
    Ok(())
}

/// FSTPNCE: FSTP that does not complain about an empty register.
fn fstpnce(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.require_x87()?;
    cpu.note_instruction(op);
    if let Some(value) = cpu.fpu.st(0) {
        cpu.fpu.set_st(op.dst, value);
    }
    cpu.fpu.pop();
    cpu.x87_commit(0);
    Ok(())
}

fn fxch(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.require_x87()?;
    cpu.note_instruction(op);
    let (a, b) = (cpu.fpu.st(0), cpu.fpu.st(op.src));
    if a.is_some() && b.is_some() {
        cpu.x87_commit(0);
    } else if !cpu.x87_underflow() {
        return Ok(());
    }
    cpu.fpu.set_st(op.src, a.unwrap_or(F80::INDEFINITE));
    cpu.fpu.set_st(0, b.unwrap_or(F80::INDEFINITE));
    Ok(())
}

/// FCMOVcc: `CONDITION` 0 to 3 is B, E, BE, U; 4 is added for the negations.
fn fcmov<const CONDITION: u8>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    cpu.require_x87()?;
    cpu.note_instruction(op);
    let (Some(_), Some(value)) = (cpu.fpu.st(0), cpu.fpu.st(op.src)) else {
        if cpu.x87_underflow() {
            cpu.fpu.set_st(0, F80::INDEFINITE);
        }
        return Ok(());
    };
    let condition = match CONDITION & 3 {
        0 => cpu.flags.cf(),
        1 => cpu.flags.zf(),
        2 => cpu.flags.cf() || cpu.flags.zf(),
        _ => cpu.flags.pf(),
    };
    if condition != (CONDITION & 4 != 0) {
        cpu.fpu.set_st(0, value);
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
    registers(instruction).or_else(|| memory(instruction)).or_else(|| constants(instruction))
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
        Fld_sti => fld_register,
        Fst_sti => store_register::<false>,
        Fstp_sti | Fstp_sti_DFD0 | Fstp_sti_DFD8 => store_register::<true>,
        Fstpnce_sti => fstpnce,
        Fxch_st0_sti | Fxch_st0_sti_DDC8 | Fxch_st0_sti_DFC8 => fxch,
        Fcmovb_st0_sti => fcmov::<0>,
        Fcmove_st0_sti => fcmov::<1>,
        Fcmovbe_st0_sti => fcmov::<2>,
        Fcmovu_st0_sti => fcmov::<3>,
        Fcmovnb_st0_sti => fcmov::<4>,
        Fcmovne_st0_sti => fcmov::<5>,
        Fcmovnbe_st0_sti => fcmov::<6>,
        Fcmovnu_st0_sti => fcmov::<7>,
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
        Fld_m32fp => push_memory::<host::LoadF32, u32>,
        Fld_m64fp => push_memory::<host::LoadF64, u64>,
        Fild_m16int => push_memory::<host::LoadI16, u16>,
        Fild_m32int => push_memory::<host::LoadI32, u32>,
        Fild_m64int => push_memory::<host::LoadI64, u64>,
        Fld_m80fp => fld_m80,
        Fbld_m80bcd => fbld,
        Fst_m32fp => store::<host::StoreF32, u32, false>,
        Fstp_m32fp => store::<host::StoreF32, u32, true>,
        Fst_m64fp => store::<host::StoreF64, u64, false>,
        Fstp_m64fp => store::<host::StoreF64, u64, true>,
        Fist_m16int => store::<host::StoreI16, u16, false>,
        Fistp_m16int => store::<host::StoreI16, u16, true>,
        Fist_m32int => store::<host::StoreI32, u32, false>,
        Fistp_m32int => store::<host::StoreI32, u32, true>,
        Fistp_m64int => store::<host::StoreI64, u64, true>,
        Fisttp_m16int => store::<host::TruncateI16, u16, true>,
        Fisttp_m32int => store::<host::TruncateI32, u32, true>,
        Fisttp_m64int => store::<host::TruncateI64, u64, true>,
        Fstp_m80fp => fstp_m80,
        Fbstp_m80bcd => fbstp,
        _ => return None,
    })
}

fn constants(instruction: &Instruction) -> Option<Selected> {
    use Code::*;
    Selected::inner(match instruction.code() {
        Fld1 => push_constant::<host::LoadOne>,
        Fldz => push_constant::<host::LoadZero>,
        Fldl2t => push_constant::<host::LoadL2t>,
        Fldl2e => push_constant::<host::LoadL2e>,
        Fldpi => push_constant::<host::LoadPi>,
        Fldlg2 => push_constant::<host::LoadLg2>,
        Fldln2 => push_constant::<host::LoadLn2>,
        _ => return None,
    })
}
