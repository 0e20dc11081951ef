//! MOVS, STOS, LODS, CMPS, SCAS, with REP.
//!
//! Each iteration of a REP counts one and leaves RCX, RSI and RDI such that the instruction can go on from there; one whose
//! RCX is zero counts one. MOVS and STOS go in runs that end with a page or with the stop count, and
//! touch the TLB as the single iterations would.

use iced_x86::{Instruction, Mnemonic};

use super::integer::{inner, sized};
use crate::memory::PAGE_SIZE;
use crate::soft::cpu::{Cpu, RAX, RCX, RDI, RSI, Trap};
use crate::soft::op::{ADDRESS_32, Int, Op, Selected};

/// Iterations after which a REP returns to the run loop at the latest, so that a kick is noticed.
const MAX_RUN: u64 = 1 << 16;

pub(super) fn handler(instruction: &Instruction) -> Option<Selected> {
    use Mnemonic as M;
    let size = instruction.memory_size().size();
    let repeated = instruction.has_rep_prefix() || instruction.has_repne_prefix();
    let while_equal = !instruction.has_repne_prefix();
    if !repeated {
        return inner(match instruction.mnemonic() {
            M::Movsb | M::Movsw | M::Movsd | M::Movsq if is_string(instruction) => {
                sized!(size, once, Movs)
            }
            M::Stosb | M::Stosw | M::Stosd | M::Stosq => sized!(size, once, Stos),
            M::Lodsb | M::Lodsw | M::Lodsd | M::Lodsq => sized!(size, once, Lods),
            M::Cmpsb | M::Cmpsw | M::Cmpsd | M::Cmpsq if is_string(instruction) => {
                sized!(size, once, Cmps)
            }
            M::Scasb | M::Scasw | M::Scasd | M::Scasq => sized!(size, once, Scas),
            _ => return None,
        });
    }
    Selected::last(match instruction.mnemonic() {
        M::Movsb | M::Movsw | M::Movsd | M::Movsq if is_string(instruction) => {
            sized!(size, rep_movs)
        }
        M::Stosb | M::Stosw | M::Stosd | M::Stosq => sized!(size, rep_stos),
        M::Lodsb | M::Lodsw | M::Lodsd | M::Lodsq => sized!(size, rep, Lods),
        M::Cmpsb | M::Cmpsw | M::Cmpsd | M::Cmpsq if is_string(instruction) => {
            if while_equal {
                sized!(size, repe, Cmps)
            } else {
                sized!(size, repne, Cmps)
            }
        }
        M::Scasb | M::Scasw | M::Scasd | M::Scasq => {
            if while_equal {
                sized!(size, repe, Scas)
            } else {
                sized!(size, repne, Scas)
            }
        }
        _ => return None,
    })
}

/// MOVSD and CMPSD are names of SSE2 instructions as well.
fn is_string(instruction: &Instruction) -> bool {
    use iced_x86::Code as C;
    !matches!(
        instruction.code(),
        C::Movsd_xmm_xmmm64 | C::Movsd_xmmm64_xmm | C::Cmpsd_xmm_xmmm64_imm8
    )
}

/// One iteration, without the counter.
trait Step {
    fn step<T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap>;
}

/// RSI, RDI or RCX in the instruction's address size.
#[inline(always)]
fn register(cpu: &Cpu, op: &Op, number: usize) -> u64 {
    let value = cpu.gpr[number];
    if op.segment & ADDRESS_32 == 0 { value } else { value & 0xffff_ffff }
}

#[inline(always)]
fn set_register(cpu: &mut Cpu, op: &Op, number: usize, value: u64) {
    cpu.gpr[number] = if op.segment & ADDRESS_32 == 0 { value } else { value & 0xffff_ffff };
}

/// Linear address of the source.
#[inline(always)]
fn source(cpu: &Cpu, op: &Op) -> u64 {
    let offset = register(cpu, op, RSI);
    cpu.linear(op, offset)
}

/// Moves RSI or RDI on by `count` elements, in the direction of DF.
#[inline(always)]
fn advance<T: Int>(cpu: &mut Cpu, op: &Op, number: usize, count: u64) {
    let bytes = count.wrapping_mul(T::BYTES as u64);
    let value = cpu.gpr[number];
    let value = if cpu.flags.df() { value.wrapping_sub(bytes) } else { value.wrapping_add(bytes) };
    set_register(cpu, op, number, value);
}

struct Movs;
impl Step for Movs {
    #[inline(always)]
    fn step<T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
        let to = register(cpu, op, RDI);
        let value = cpu.load::<T>(source(cpu, op))?;
        cpu.store::<T>(to, value)?;
        advance::<T>(cpu, op, RSI, 1);
        advance::<T>(cpu, op, RDI, 1);
        Ok(())
    }
}

struct Stos;
impl Step for Stos {
    #[inline(always)]
    fn step<T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
        let value = T::truncate(cpu.gpr[RAX]);
        cpu.store::<T>(register(cpu, op, RDI), value)?;
        advance::<T>(cpu, op, RDI, 1);
        Ok(())
    }
}

struct Lods;
impl Step for Lods {
    #[inline(always)]
    fn step<T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
        let value = cpu.load::<T>(source(cpu, op))?;
        T::set(cpu, RAX as u8, value.extend());
        advance::<T>(cpu, op, RSI, 1);
        Ok(())
    }
}

struct Cmps;
impl Step for Cmps {
    #[inline(always)]
    fn step<T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
        let a = cpu.load::<T>(source(cpu, op))?.extend();
        let b = cpu.load::<T>(register(cpu, op, RDI))?.extend();
        cpu.flags.set_sub::<T>(a, b, a.wrapping_sub(b));
        advance::<T>(cpu, op, RSI, 1);
        advance::<T>(cpu, op, RDI, 1);
        Ok(())
    }
}

struct Scas;
impl Step for Scas {
    #[inline(always)]
    fn step<T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
        let a = T::get(cpu, RAX as u8);
        let b = cpu.load::<T>(register(cpu, op, RDI))?.extend();
        cpu.flags.set_sub::<T>(a, b, a.wrapping_sub(b));
        advance::<T>(cpu, op, RDI, 1);
        Ok(())
    }
}

fn once<O: Step, T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    O::step::<T>(cpu, op)
}

/// How many iterations may run now.
fn budget(cpu: &Cpu, count: u64) -> u64 {
    if cpu.single_step {
        return 1;
    }
    count.min(cpu.stop_at.saturating_sub(cpu.retired)).clamp(1, MAX_RUN)
}

/// Leaves a REP after `done` of `count` iterations, of which the run loop counts the last if it was not stopped by a
/// fault. `again`: the instruction is not finished.
fn leave(
    cpu: &mut Cpu,
    op: &Op,
    count: u64,
    done: u64,
    again: bool,
    result: Result<(), Trap>,
) -> Result<(), Trap> {
    set_register(cpu, op, RCX, count - done);
    if result.is_err() {
        cpu.retired += done;
        return result;
    }
    cpu.retired += done.saturating_sub(1);
    if again && done < count {
        cpu.rip = cpu.rip.wrapping_sub(u64::from(op.len));
    }
    Ok(())
}

/// Repeats until the counter is zero, or `go_on` says no.
#[inline(always)]
fn repeat<O: Step, T: Int>(
    cpu: &mut Cpu,
    op: &Op,
    go_on: impl Fn(&Cpu) -> bool,
) -> Result<(), Trap> {
    let count = register(cpu, op, RCX);
    if count == 0 {
        return Ok(());
    }
    let budget = budget(cpu, count);
    let mut done = 0;
    let mut again = true;
    while done < budget && again {
        if let Err(trap) = O::step::<T>(cpu, op) {
            return leave(cpu, op, count, done, true, Err(trap));
        }
        done += 1;
        again = go_on(cpu);
    }
    leave(cpu, op, count, done, again, Ok(()))
}

fn rep<O: Step, T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    repeat::<O, T>(cpu, op, |_| true)
}

fn repe<O: Step, T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    repeat::<O, T>(cpu, op, |cpu| cpu.flags.zf())
}

fn repne<O: Step, T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    repeat::<O, T>(cpu, op, |cpu| !cpu.flags.zf())
}

/// Elements from `linear` to the end of its page.
fn elements_left<T: Int>(linear: u64) -> u64 {
    ((PAGE_SIZE - (linear as usize & (PAGE_SIZE - 1))) / T::BYTES) as u64
}

fn rep_movs<T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    // Downward, or with addresses that wrap at 4 GiB: one by one.
    if cpu.flags.df() || op.segment & ADDRESS_32 != 0 || cpu.single_step {
        return repeat::<Movs, T>(cpu, op, |_| true);
    }
    let count = cpu.gpr[RCX];
    if count == 0 {
        return Ok(());
    }
    let budget = budget(cpu, count);
    let mut done = 0;
    while done < budget {
        match movs_run::<T>(cpu, op, budget - done) {
            Ok(run) => done += run,
            Err(trap) => return leave(cpu, op, count, done, true, Err(trap)),
        }
    }
    leave(cpu, op, count, done, true, Ok(()))
}

/// Copies at least one element and at most `limit`, within one page at either end.
fn movs_run<T: Int>(cpu: &mut Cpu, op: &Op, limit: u64) -> Result<u64, Trap> {
    let (from, to) = (source(cpu, op), cpu.gpr[RDI]);
    let run = limit.min(elements_left::<T>(from)).min(elements_left::<T>(to));
    if run == 0 {
        // This element crosses a page's end.
        Movs::step::<T>(cpu, op)?;
        return Ok(1);
    }
    let (Some(from), Some(to)) = (cpu.readable_ram(from)?, cpu.writable_ram(to)?) else {
        Movs::step::<T>(cpu, op)?;
        return Ok(1);
    };
    let bytes = run as usize * T::BYTES;
    let source = std::ptr::with_exposed_provenance::<u8>(from);
    let target = std::ptr::with_exposed_provenance_mut::<u8>(to);
    if to.wrapping_sub(from) >= bytes {
        // SAFETY: both runs lie within one page of guest RAM each, by `elements_left`; `copy` allows overlap, and with the
        // target not inside the source an upward copy leaves what `copy` leaves.
        unsafe { std::ptr::copy(source, target, bytes) };
    } else {
        // The target begins inside the source: what is written is read again.
        for offset in (0..bytes).step_by(T::BYTES) {
            // SAFETY: as above.
            unsafe {
                let value = source.add(offset).cast::<T>().read_unaligned();
                target.add(offset).cast::<T>().write_unaligned(value);
            }
        }
    }
    advance::<T>(cpu, op, RSI, run);
    advance::<T>(cpu, op, RDI, run);
    Ok(run)
}

fn rep_stos<T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    if cpu.flags.df() || op.segment & ADDRESS_32 != 0 || cpu.single_step {
        return repeat::<Stos, T>(cpu, op, |_| true);
    }
    let count = cpu.gpr[RCX];
    if count == 0 {
        return Ok(());
    }
    let budget = budget(cpu, count);
    let mut done = 0;
    while done < budget {
        match stos_run::<T>(cpu, op, budget - done) {
            Ok(run) => done += run,
            Err(trap) => return leave(cpu, op, count, done, true, Err(trap)),
        }
    }
    leave(cpu, op, count, done, true, Ok(()))
}

/// Fills at least one element and at most `limit`, within one page.
fn stos_run<T: Int>(cpu: &mut Cpu, op: &Op, limit: u64) -> Result<u64, Trap> {
    let to = cpu.gpr[RDI];
    let run = limit.min(elements_left::<T>(to));
    let host = if run == 0 { None } else { cpu.writable_ram(to)? };
    let Some(host) = host else {
        Stos::step::<T>(cpu, op)?;
        return Ok(1);
    };
    let value = T::truncate(cpu.gpr[RAX]);
    let target = std::ptr::with_exposed_provenance_mut::<T>(host);
    for element in 0..run as usize {
        // SAFETY: the run lies within one page of guest RAM, by `elements_left`.
        unsafe { target.add(element).write_unaligned(value) };
    }
    advance::<T>(cpu, op, RDI, run);
    Ok(run)
}
