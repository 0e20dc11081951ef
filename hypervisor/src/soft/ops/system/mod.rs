//! Instructions of the operating system, and those that depend on the processor's configuration.
//!
//! Not part of the CPU model, so #UD: SYSENTER and SYSEXIT (SYSCALL serves 64-bit programs, INT 80h 32-bit ones),
//! XGETBV and XSETBV (no XSAVE), MONITOR and MWAIT, INVPCID, RDPID, RSM, the virtualization extensions.
//! Call gates and task gates raise #GP.

mod control;
mod interrupt;
mod machine;
mod segment;
mod selector;
mod transfer;

use iced_x86::{Code, Instruction, OpKind};

use crate::soft::cpu::{Cpu, DS, ES, FS, GS, RSP, SEGMENT_BIG, SS, Trap};
use crate::soft::op::{Handler, Int, Op, Selected, Word};

/// The handler of an instruction of this group.
pub fn handler(instruction: &Instruction) -> Option<Selected> {
    inner(instruction).map_or_else(|| last(instruction).and_then(Selected::last), Selected::inner)
}

/// Picks between the forms of a handler with a memory operand and with registers only.
macro_rules! form {
    ($memory:expr, $module:ident :: $name:ident) => {
        if $memory { $module::$name::<true> as Handler } else { $module::$name::<false> as Handler }
    };
    ($memory:expr, $size:ty, $module:ident :: $name:ident) => {
        if $memory {
            $module::$name::<$size, true> as Handler
        } else {
            $module::$name::<$size, false> as Handler
        }
    };
}

/// Instructions that may stand in the middle of a block: what they change is looked up again by each instruction that
/// depends on it.
fn inner(instruction: &Instruction) -> Option<Handler> {
    let memory = has_memory_operand(instruction);
    Some(match instruction.code() {
        Code::Pushfw => control::pushf::<u16>,
        Code::Pushfd => control::pushf::<u32>,
        Code::Pushfq => control::pushf::<u64>,
        Code::Cli => control::cli,
        Code::Stac => control::stac,
        Code::Clac => control::clac,
        Code::Clts => control::clts,
        Code::Mov_r32_cr | Code::Mov_r64_cr => control::mov_from_cr,
        Code::Mov_r32_dr | Code::Mov_r64_dr => control::mov_from_dr,
        Code::Smsw_rm16 => form!(memory, u16, control::smsw),
        Code::Smsw_r32m16 => form!(memory, u32, control::smsw),
        Code::Smsw_r64m16 => form!(memory, u64, control::smsw),
        Code::Swapgs => segment::swapgs,
        Code::Rdfsbase_r32 => segment::read_base::<u32, FS>,
        Code::Rdfsbase_r64 => segment::read_base::<u64, FS>,
        Code::Rdgsbase_r32 => segment::read_base::<u32, GS>,
        Code::Rdgsbase_r64 => segment::read_base::<u64, GS>,
        Code::Wrfsbase_r32 => segment::write_base::<u32, FS>,
        Code::Wrfsbase_r64 => segment::write_base::<u64, FS>,
        Code::Wrgsbase_r32 => segment::write_base::<u32, GS>,
        Code::Wrgsbase_r64 => segment::write_base::<u64, GS>,
        Code::Mov_rm16_Sreg => form!(memory, u16, segment::mov_from_segment),
        Code::Mov_r32m16_Sreg => form!(memory, u32, segment::mov_from_segment),
        Code::Mov_r64m16_Sreg => form!(memory, u64, segment::mov_from_segment),
        Code::Pushw_ES
        | Code::Pushw_CS
        | Code::Pushw_SS
        | Code::Pushw_DS
        | Code::Pushw_FS
        | Code::Pushw_GS => segment::push_segment::<u16>,
        Code::Pushd_ES
        | Code::Pushd_CS
        | Code::Pushd_SS
        | Code::Pushd_DS
        | Code::Pushd_FS
        | Code::Pushd_GS => segment::push_segment::<u32>,
        Code::Pushq_FS | Code::Pushq_GS => segment::push_segment::<u64>,
        Code::Sgdt_m1632_16 | Code::Sgdt_m1632 => selector::sgdt::<u32>,
        Code::Sgdt_m1664 => selector::sgdt::<u64>,
        Code::Sidt_m1632_16 | Code::Sidt_m1632 => selector::sidt::<u32>,
        Code::Sidt_m1664 => selector::sidt::<u64>,
        Code::Sldt_rm16 => form!(memory, u16, selector::sldt),
        Code::Sldt_r32m16 => form!(memory, u32, selector::sldt),
        Code::Sldt_r64m16 => form!(memory, u64, selector::sldt),
        Code::Str_rm16 => form!(memory, u16, selector::str),
        Code::Str_r32m16 => form!(memory, u32, selector::str),
        Code::Str_r64m16 => form!(memory, u64, selector::str),
        Code::Lar_r16_rm16 => form!(memory, u16, selector::lar),
        Code::Lar_r32_r32m16 => form!(memory, u32, selector::lar),
        Code::Lar_r64_r64m16 => form!(memory, u64, selector::lar),
        Code::Lsl_r16_rm16 => form!(memory, u16, selector::lsl),
        Code::Lsl_r32_r32m16 => form!(memory, u32, selector::lsl),
        Code::Lsl_r64_r64m16 => form!(memory, u64, selector::lsl),
        Code::Verr_rm16 | Code::Verr_r32m16 | Code::Verr_r64m16 => form!(memory, selector::verr),
        Code::Verw_rm16 | Code::Verw_r32m16 | Code::Verw_r64m16 => form!(memory, selector::verw),
        Code::Cpuid => machine::cpuid,
        Code::Invd | Code::Wbinvd => machine::wbinvd,
        Code::Rdpmc => machine::rdpmc,
        Code::Ud2
        | Code::Ud0
        | Code::Ud0_r16_rm16
        | Code::Ud0_r32_rm32
        | Code::Ud0_r64_rm64
        | Code::Ud1_r16_rm16
        | Code::Ud1_r32_rm32
        | Code::Ud1_r64_rm64 => machine::ud,
        _ => return None,
    })
}

/// Instructions that branch, change mode, mapping or interrupt state, or depend on the exact count.
fn last(instruction: &Instruction) -> Option<Handler> {
    let memory = has_memory_operand(instruction);
    Some(match instruction.code() {
        Code::Popfw => control::popf::<u16>,
        Code::Popfd => control::popf::<u32>,
        Code::Popfq => control::popf::<u64>,
        Code::Sti => control::sti,
        Code::Hlt => control::hlt,
        Code::Mov_cr_r32 | Code::Mov_cr_r64 => control::mov_to_cr,
        Code::Mov_dr_r32 | Code::Mov_dr_r64 => control::mov_to_dr,
        Code::Lmsw_rm16 | Code::Lmsw_r32m16 | Code::Lmsw_r64m16 => form!(memory, control::lmsw),
        Code::Invlpg_m => control::invlpg,
        Code::Mov_Sreg_rm16 | Code::Mov_Sreg_r32m16 | Code::Mov_Sreg_r64m16 => {
            form!(memory, segment::mov_to_segment)
        }
        Code::Popw_ES | Code::Popw_SS | Code::Popw_DS | Code::Popw_FS | Code::Popw_GS => {
            segment::pop_segment::<u16>
        }
        Code::Popd_ES | Code::Popd_SS | Code::Popd_DS | Code::Popd_FS | Code::Popd_GS => {
            segment::pop_segment::<u32>
        }
        Code::Popq_FS | Code::Popq_GS => segment::pop_segment::<u64>,
        Code::Les_r16_m1616 => segment::load_far::<u16, ES>,
        Code::Les_r32_m1632 => segment::load_far::<u32, ES>,
        Code::Lds_r16_m1616 => segment::load_far::<u16, DS>,
        Code::Lds_r32_m1632 => segment::load_far::<u32, DS>,
        Code::Lss_r16_m1616 => segment::load_far::<u16, SS>,
        Code::Lss_r32_m1632 => segment::load_far::<u32, SS>,
        Code::Lss_r64_m1664 => segment::load_far::<u64, SS>,
        Code::Lfs_r16_m1616 => segment::load_far::<u16, FS>,
        Code::Lfs_r32_m1632 => segment::load_far::<u32, FS>,
        Code::Lfs_r64_m1664 => segment::load_far::<u64, FS>,
        Code::Lgs_r16_m1616 => segment::load_far::<u16, GS>,
        Code::Lgs_r32_m1632 => segment::load_far::<u32, GS>,
        Code::Lgs_r64_m1664 => segment::load_far::<u64, GS>,
        Code::Lgdt_m1632_16 | Code::Lgdt_m1632 => selector::lgdt::<u32>,
        Code::Lgdt_m1664 => selector::lgdt::<u64>,
        Code::Lidt_m1632_16 | Code::Lidt_m1632 => selector::lidt::<u32>,
        Code::Lidt_m1664 => selector::lidt::<u64>,
        Code::Lldt_rm16 | Code::Lldt_r32m16 | Code::Lldt_r64m16 => form!(memory, selector::lldt),
        Code::Ltr_rm16 | Code::Ltr_r32m16 | Code::Ltr_r64m16 => form!(memory, selector::ltr),
        Code::Rdmsr => machine::rdmsr,
        Code::Wrmsr => machine::wrmsr,
        Code::Rdtsc => machine::rdtsc,
        Code::Rdtscp => machine::rdtscp,
        Code::Int1 => interrupt::int1,
        Code::Int3 => interrupt::int3,
        Code::Int_imm8 => interrupt::int,
        Code::Into => interrupt::into,
        Code::Iretw => interrupt::iret::<u16>,
        Code::Iretd => interrupt::iret::<u32>,
        Code::Iretq => interrupt::iret::<u64>,
        Code::Syscall => interrupt::syscall,
        Code::Sysretd => interrupt::sysret::<u32>,
        Code::Sysretq => interrupt::sysret::<u64>,
        Code::Jmp_ptr1616 | Code::Jmp_ptr1632 => transfer::jmp_immediate,
        Code::Jmp_m1616 => transfer::jmp_memory::<u16>,
        Code::Jmp_m1632 => transfer::jmp_memory::<u32>,
        Code::Jmp_m1664 => transfer::jmp_memory::<u64>,
        Code::Call_ptr1616 => transfer::call_immediate::<u16>,
        Code::Call_ptr1632 => transfer::call_immediate::<u32>,
        Code::Call_m1616 => transfer::call_memory::<u16>,
        Code::Call_m1632 => transfer::call_memory::<u32>,
        Code::Call_m1664 => transfer::call_memory::<u64>,
        Code::Retfw | Code::Retfw_imm16 => transfer::ret::<u16>,
        Code::Retfd | Code::Retfd_imm16 => transfer::ret::<u32>,
        Code::Retfq | Code::Retfq_imm16 => transfer::ret::<u64>,
        _ => return None,
    })
}

fn has_memory_operand(instruction: &Instruction) -> bool {
    (0..instruction.op_count()).any(|operand| instruction.op_kind(operand) == OpKind::Memory)
}

/// A 16-bit operand from memory or from register `register`.
fn read_u16<const MEMORY: bool>(cpu: &mut Cpu, op: &Op, register: u8) -> Result<u16, Trap> {
    if MEMORY {
        let address = cpu.ea(op);
        cpu.load::<u16>(address)
    } else {
        Ok(u16::get(cpu, register) as u16)
    }
}

/// Stores a 16-bit system value: zero-extended into a register of size `T`, as 16 bits into memory.
fn write_u16<T: Int, const MEMORY: bool>(cpu: &mut Cpu, op: &Op, value: u16) -> Result<(), Trap> {
    if MEMORY {
        let address = cpu.ea(op);
        cpu.store::<u16>(address, value)
    } else {
        T::set(cpu, op.dst, u64::from(value));
        Ok(())
    }
}

impl Cpu {
    /// #GP(0) outside CPL 0.
    fn require_supervisor(&mut self) -> Result<(), Trap> {
        if self.cpl == 0 { Ok(()) } else { Err(self.gp(0)) }
    }

    /// Bits of RSP that address the stack.
    pub(super) fn stack_mask(&self) -> u64 {
        if self.long_mode() {
            u64::MAX
        } else if self.segments[SS].attributes & SEGMENT_BIG != 0 {
            0xffff_ffff
        } else {
            0xffff
        }
    }

    /// Loads the value `offset` bytes above the stack pointer.
    pub(super) fn peek<T: Int>(&mut self, offset: u64) -> Result<u64, Trap> {
        let address = self.gpr[RSP].wrapping_add(offset) & self.stack_mask();
        Ok(self.load::<T>(address)?.extend())
    }

    /// Stores `value` below the stack pointer, which stays: the `depth`-th of several pushes (from 1).
    pub(super) fn poke<T: Int>(&mut self, depth: u64, value: u64) -> Result<(), Trap> {
        let below = depth * T::BYTES as u64;
        let address = self.gpr[RSP].wrapping_sub(below) & self.stack_mask();
        self.store::<T>(address, T::truncate(value))
    }

    /// Moves the stack pointer by `bytes`.
    pub(super) fn move_stack(&mut self, bytes: i64) {
        let mask = self.stack_mask();
        let moved = self.gpr[RSP].wrapping_add_signed(bytes);
        // In compatibility mode the upper half of RSP is not visible, and is kept zero.
        let kept = if mask == 0xffff { self.gpr[RSP] & 0xffff_0000 } else { 0 };
        self.gpr[RSP] = moved & mask | kept;
    }

    /// Changes the flags in `mask` to those of `image`.
    fn change_flags(&mut self, image: u64, mask: u64) {
        let value = self.flags.read() & !mask | image & mask;
        self.flags.write(value);
        self.recompute_mode();
    }
}

/// Bytes of a stack slot of size `T`.
pub(super) const fn slot<T: Word>() -> i64 {
    T::BYTES as i64
}
