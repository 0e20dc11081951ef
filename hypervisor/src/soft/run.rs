//! The run loop.
//!
//! An execution point is the first moment at which the count of retired instructions has a value: a fault or an
//! interrupt delivered there changes state without changing the count. So
//! `run` returns only at such first moments, and a kick waits until an instruction has retired after a delivery; otherwise
//! a replay, which knows nothing but the count, would stop elsewhere. A shutdown is counted like an instruction: what was
//! applied before and what is applied to the machine that starts over have points of their own.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::block::{self, Blocks};
use super::cpu::{Cpu, NO_PAGE, SS, Trap, TrapKind};
use super::decode::{self, MAX_INSTRUCTION};
use super::exception::{DEBUG, GENERAL_PROTECTION, INVALID_OPCODE, STACK_FAULT, Source};
use super::flags::TF;
use super::op::{self, Handler, Op, REG_BLOCK};
use super::tlb::{self, Access};
use crate::Exit;
use crate::memory::PAGE_SIZE;

const PAGE_MASK: u64 = !(PAGE_SIZE as u64 - 1);
/// DR6.BS: the debug exception is a single step.
const DR6_BS: u64 = 1 << 14;
/// Unknown instructions logged before the log falls silent: a guest must not fill the host's disk.
const MAX_UNKNOWN_LOGGED: u32 = 64;
/// Exceptions and interrupts in a row, without an instruction retired between them, that end in a shutdown. Each takes at
/// least 40 bytes of a stack, so no guest that works comes near.
const MAX_DELIVERIES: u32 = 10_000;

/// The processor with its block cache.
pub(super) struct Core {
    pub(super) cpu: Box<Cpu>,
    blocks: Blocks,
    /// The block that ran last: where links start.
    last: u32,
    kicked: Arc<AtomicBool>,
    unknown_logged: u32,
    stale: Vec<u64>,
    /// The count at which something was delivered last, and how often since an instruction retired.
    delivered_at: u64,
    deliveries: u32,
}

impl Core {
    pub(super) fn new(cpu: Box<Cpu>, kicked: Arc<AtomicBool>) -> Core {
        Core {
            cpu,
            blocks: Blocks::new(),
            last: 0,
            kicked,
            unknown_logged: 0,
            stale: Vec::new(),
            delivered_at: 0,
            deliveries: 0,
        }
    }

    /// Executes until an exit. The caller has set the bus.
    pub(super) fn execute(&mut self, until: u64) -> Exit {
        // Whether this is the first moment of this count.
        let mut first_moment = true;
        self.deliveries = 0;
        loop {
            self.drop_written_code();
            let cpu = &mut *self.cpu;
            cpu.attention = false;
            if std::mem::take(&mut cpu.shutdown) {
                cpu.retired += 1;
                return Exit::Shutdown;
            }
            if first_moment {
                if std::mem::take(&mut cpu.stop_requested) {
                    return Exit::Stopped;
                }
                if cpu.retired >= until {
                    return Exit::Until;
                }
                if self.kicked.swap(false, Ordering::AcqRel) {
                    return Exit::Kicked;
                }
            }
            if std::mem::take(&mut cpu.pending_debug) {
                cpu.dr[6] |= DR6_BS;
                self.deliver(DEBUG, None, Source::Exception);
                first_moment = false;
                continue;
            }
            let tsc = cpu.anchor.tsc_at(cpu.retired);
            cpu.irqchip.advance(tsc);
            if !cpu.interrupt_shadow
                && let Some(vector) = cpu.poll_interrupt()
            {
                cpu.halted = false;
                self.deliver(vector, None, Source::External);
                first_moment = false;
                continue;
            }
            if cpu.halted {
                return Exit::Halted;
            }
            let timer = cpu.irqchip.next_timer_tsc();
            let timer = timer.map_or(u64::MAX, |tsc| cpu.anchor.point_at(tsc));
            // A timer that is due already has been fired by `advance`: what is left lies ahead.
            cpu.stop_at = until.min(timer.max(cpu.retired + 1));
            let stepping = cpu.flags.system & TF != 0;
            if std::mem::take(&mut cpu.interrupt_shadow) || stepping {
                cpu.stop_at = cpu.retired + 1;
            }
            let (before, cpl) = (cpu.retired, cpu.cpl);
            first_moment = self.blocks();
            // SYSCALL and INT n clear the flag on the way in; the supervisor is not stepped (SDM vol. 3, 17.3.1.4).
            let entered_supervisor = self.cpu.cpl < cpl;
            if stepping && self.cpu.retired != before && !entered_supervisor {
                self.cpu.pending_debug = true;
            }
        }
    }

    /// Runs blocks until the stop count, a kick, or something to look at. True if it ended right after an
    /// instruction retired.
    fn blocks(&mut self) -> bool {
        loop {
            let cpu = &mut *self.cpu;
            let link = usize::from(cpu.rip != cpu.gpr[usize::from(REG_BLOCK)]);
            let physical = if cpu.rip & PAGE_MASK == cpu.fetch_page {
                cpu.fetch_physical | (cpu.rip & !PAGE_MASK)
            } else {
                match cpu.enter_page() {
                    Ok(physical) => {
                        if std::mem::take(&mut cpu.fetched_over_code) {
                            self.drop_written_code();
                        }
                        physical
                    }
                    Err(Trap) => {
                        let (vector, error_code) = exception(cpu.trap, false);
                        self.deliver(vector, error_code, Source::Exception);
                        return false;
                    }
                }
            };
            let cpu = &mut *self.cpu;
            let key = block::key(physical, cpu.mode);
            let number = match self.blocks.linked(self.last, link, key) {
                Some(number) => number,
                None => match self.blocks.find(cpu, self.last, link, key) {
                    Some(number) => number,
                    None => {
                        let first_moment = self.crossing();
                        if self.done(first_moment) {
                            return first_moment;
                        }
                        continue;
                    }
                },
            };
            self.last = number;
            let first_moment = self.block(number);
            if self.done(first_moment) {
                return first_moment;
            }
        }
    }

    /// Whether the inner loop has to end here.
    #[inline(always)]
    fn done(&self, first_moment: bool) -> bool {
        self.cpu.attention
            || self.cpu.retired >= self.cpu.stop_at
            || (first_moment && self.kicked.load(Ordering::Relaxed))
    }

    /// Runs one block, or as much of it as the stop count allows. True if it ended right after an instruction retired.
    #[inline(always)]
    fn block(&mut self, number: u32) -> bool {
        let cpu = &mut *self.cpu;
        let block = self.blocks.get(number);
        let start = cpu.rip;
        cpu.gpr[usize::from(REG_BLOCK)] = start;
        let left = cpu.stop_at - cpu.retired;
        let count = u64::from(block.count);
        if left < count {
            return self.part(number, left as usize);
        }
        let ops = &*block.ops;
        let body = usize::from(block.body);
        for op in &ops[..body] {
            if (op.run)(cpu, op).is_err() {
                return self.trapped(*op, start, false);
            }
        }
        let end = start.wrapping_add(u64::from(block.size));
        cpu.rip = end;
        if block.ends {
            cpu.retired += body as u64;
            let tail = &ops[ops.len() - 1];
            if (tail.run)(cpu, tail).is_err() {
                // What is fused cannot fail but in its first half.
                return self.trapped(ops[body], start, true);
            }
            // REP has counted all iterations but the last itself.
            cpu.retired += count - body as u64;
        } else {
            cpu.retired += count;
        }
        cpu.gpr[usize::from(REG_BLOCK)] = end;
        true
    }

    /// Runs the first `count` instructions of a block that has more.
    #[cold]
    fn part(&mut self, number: u32, count: usize) -> bool {
        let cpu = &mut *self.cpu;
        let start = cpu.rip;
        let block = self.blocks.get(number);
        for op in &block.ops[..count] {
            if (op.run)(cpu, op).is_err() {
                return self.trapped(*op, start, false);
            }
        }
        cpu.retired += count as u64;
        cpu.rip = start.wrapping_add(u64::from(block.ops[count].offset));
        true
    }

    /// An instruction of a block that starts at `start` did not complete. True if it has by the time this returns.
    #[cold]
    #[inline(never)]
    fn trapped(&mut self, op: Op, start: u64, last: bool) -> bool {
        let cpu = &mut *self.cpu;
        if !last {
            cpu.retired += u64::from(op.number);
        }
        let rip = start.wrapping_add(u64::from(op.offset));
        cpu.rip = rip;
        if cpu.trap == TrapKind::SingleStep {
            // Once more, with everything exact, so that devices and code pages may be accessed.
            cpu.single_step = true;
            cpu.rip = rip.wrapping_add(u64::from(op.len));
            let result = (op.run)(cpu, &op);
            cpu.single_step = false;
            if result.is_ok() {
                cpu.retired += 1;
                self.drop_written_code();
                return true;
            }
            cpu.rip = rip;
        }
        let (vector, error_code) = exception(cpu.trap, on_stack(&op));
        if vector == INVALID_OPCODE && std::ptr::fn_addr_eq(op.run, op::undefined as Handler) {
            self.log_unknown(rip);
        }
        self.deliver(vector, error_code, Source::Exception);
        false
    }

    /// Runs an instruction that lies in two pages: decoded anew each time.
    #[cold]
    fn crossing(&mut self) -> bool {
        let cpu = &mut *self.cpu;
        let start = cpu.rip;
        let mut bytes = [0; MAX_INSTRUCTION];
        let first = PAGE_SIZE - (start as usize & (PAGE_SIZE - 1));
        let fetched = cpu.fetch(start, &mut bytes[..first.min(MAX_INSTRUCTION)]).and_then(|()| {
            if first < MAX_INSTRUCTION {
                cpu.fetch(start.wrapping_add(first as u64), &mut bytes[first..])
            } else {
                Ok(())
            }
        });
        if std::mem::take(&mut cpu.fetched_over_code) {
            self.drop_written_code();
        }
        let cpu = &mut *self.cpu;
        if fetched.is_err() {
            cpu.rip = start;
            let (vector, error_code) = exception(cpu.trap, false);
            self.deliver(vector, error_code, Source::Exception);
            return false;
        }
        let decoded = decode::block(&bytes, start, cpu.bitness(), 1);
        let Some(op) = decoded.ops.first() else {
            self.deliver(INVALID_OPCODE, None, Source::Exception);
            return false;
        };
        cpu.gpr[usize::from(REG_BLOCK)] = start;
        cpu.rip = start.wrapping_add(u64::from(op.len));
        if (op.run)(cpu, op).is_err() {
            return self.trapped(*op, start, true);
        }
        cpu.retired += 1;
        true
    }

    fn deliver(&mut self, vector: u8, error_code: Option<u32>, source: Source) {
        // The stack may be anywhere.
        self.cpu.single_step = true;
        self.cpu.deliver(vector, error_code, source);
        self.cpu.single_step = false;
        // What the outer loop decided, such as to step singly, held for the interrupted code.
        self.cpu.attention = true;
        self.drop_written_code();
        self.count_delivery();
    }

    /// A guest whose handlers fault at their first instruction, whatever the fault, would never again come to a
    /// moment at which `run` may return.
    fn count_delivery(&mut self) {
        if self.cpu.retired != self.delivered_at {
            self.delivered_at = self.cpu.retired;
            self.deliveries = 0;
        }
        self.deliveries += 1;
        if self.deliveries > MAX_DELIVERIES {
            log::warn!(
                "the guest only faults, without executing anything: shut down like a triple fault"
            );
            self.cpu.shutdown = true;
        }
    }

    /// Drops the blocks of pages that were written.
    fn drop_written_code(&mut self) {
        let cpu = &mut *self.cpu;
        if cpu.ram.has_stale() {
            cpu.ram.take_stale(&mut self.stale);
        }
        self.stale.append(&mut cpu.overwritten);
        for page in self.stale.drain(..) {
            self.blocks.drop_page(page);
        }
    }

    /// The dirty set has been emptied.
    pub(super) fn forget_dirty(&mut self) {
        self.cpu.tlb.flag_writes(|_| tlb::NOT_DIRTY);
    }

    /// Drops all decoded code: another machine begins.
    pub(super) fn forget_code(&mut self) {
        self.blocks.clear(&self.cpu);
        self.last = 0;
    }

    fn log_unknown(&mut self, rip: u64) {
        if self.unknown_logged >= MAX_UNKNOWN_LOGGED {
            return;
        }
        self.unknown_logged += 1;
        let mut bytes = [0; MAX_INSTRUCTION];
        let cpu = &mut *self.cpu;
        let first = (PAGE_SIZE - (rip as usize & (PAGE_SIZE - 1))).min(MAX_INSTRUCTION);
        let physical = cpu.fetch_physical | (rip & !PAGE_MASK);
        if cpu.fetch_page == rip & PAGE_MASK {
            cpu.ram.read_bytes(physical, &mut bytes[..first]);
        }
        log::warn!(
            "unknown instruction at {rip:#x}: {:02x?}, raising #UD in the guest",
            &bytes[..first]
        );
    }
}

/// Vector and error code of a trap. `on_stack`: the memory operand is in the stack segment.
fn exception(trap: TrapKind, on_stack: bool) -> (u8, Option<u32>) {
    match trap {
        TrapKind::Exception { vector, error_code } => (vector, error_code),
        TrapKind::NonCanonical if on_stack => (STACK_FAULT, Some(0)),
        // A single step that asks to be one again reached something that cannot be accessed at all.
        TrapKind::NonCanonical | TrapKind::SingleStep => (GENERAL_PROTECTION, Some(0)),
    }
}

/// [`SS`] as in [`Op::segment`].
const STACK: u8 = SS as u8;

/// Whether the memory operand is relative to RSP or RBP, and not moved to another segment. (Instructions with an
/// implicit stack operand have RSP as their base: see `decode`.)
fn on_stack(op: &Op) -> bool {
    (op.base == 4 || op.base == 5)
        && matches!(op.segment & op::SEGMENT_NUMBER, op::NO_SEGMENT | STACK)
}

impl Cpu {
    /// Finds the page `rip` is in. The fetch TLB is looked at exactly when control enters another page.
    fn enter_page(&mut self) -> Result<u64, Trap> {
        let page = self.rip & PAGE_MASK;
        let physical = self.fetch_page_physical(self.rip)?;
        self.fetch_page = page;
        self.fetch_physical = physical;
        Ok(physical | (self.rip & !PAGE_MASK))
    }

    /// The guest-physical address of the page that `linear`, which a fault names in CR2, is in.
    fn fetch_page_physical(&mut self, linear: u64) -> Result<u64, Trap> {
        let page = linear & PAGE_MASK;
        let slot = self.fetch_context.slot(page);
        let entry = self.tlb.fetch_entry(slot);
        if entry.tag == page {
            return Ok(entry.target);
        }
        let found = self.walk(linear, Access::Fetch, self.fetch_context)?;
        let physical = found.physical & PAGE_MASK;
        if self.ram.host_page(physical).is_none() {
            // No device holds code. What is nowhere reads as all ones, which is no instruction.
            return Err(self.ud());
        }
        self.tlb.fill(Access::Fetch, slot, page, physical, 0, found.kind);
        Ok(physical)
    }

    /// Reads instruction bytes, all of one page, which becomes the current one.
    fn fetch(&mut self, linear: u64, bytes: &mut [u8]) -> Result<(), Trap> {
        let page = linear & PAGE_MASK;
        self.fetch_page = NO_PAGE;
        let physical = self.fetch_page_physical(linear)?;
        self.fetch_page = page;
        self.fetch_physical = physical;
        self.ram.read_bytes(physical | (linear & !PAGE_MASK), bytes);
        Ok(())
    }

    /// Bits of the default operand size.
    pub(super) fn bitness(&self) -> u32 {
        match self.mode {
            0 => 64,
            1 => 32,
            _ => 16,
        }
    }
}
