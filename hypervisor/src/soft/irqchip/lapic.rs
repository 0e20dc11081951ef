//! The local APIC in xAPIC mode (Intel SDM vol. 3, chapter 11).
//!
//! x2APIC mode is not part of the CPU model. The LINT pins, the thermal sensor and the performance
//! counters are wired to nothing; their LVT entries are plain registers.

use super::timer::{Mode, Timer};
use super::vectors::VectorSet;
use serde::{Deserialize, Serialize};

/// Where the registers are after reset.
pub const DEFAULT_BASE: u64 = 0xfee0_0000;

/// `IA32_APIC_BASE`: this is the bootstrap processor.
pub const BASE_BSP: u64 = 1 << 8;
/// `IA32_APIC_BASE`: the APIC is enabled.
pub const BASE_ENABLE: u64 = 1 << 11;

/// Integrated APIC, version 0x14, six LVT entries.
const VERSION: u32 = 0x0005_0014;
/// Spurious-interrupt vector register: APIC software enable.
const SVR_ENABLE: u32 = 1 << 8;
/// LVT entry: masked.
const LVT_MASKED: u32 = 1 << 16;
/// The LVT entries, as indices into [`Lapic::lvt`] and in register order.
const LVT_TIMER: usize = 0;
const LVT_ERROR: usize = 5;
/// Bits a guest may write in each LVT entry.
const LVT_WRITABLE: [u32; 6] =
    [0x0007_00ff, 0x0001_07ff, 0x0001_07ff, 0x0001_a7ff, 0x0001_a7ff, 0x0001_00ff];
/// Error status: vector below 16 sent.
const ERROR_SEND_VECTOR: u32 = 1 << 5;
/// Error status: vector below 16 received.
const ERROR_RECEIVE_VECTOR: u32 = 1 << 6;
/// Error status: no such register.
const ERROR_REGISTER: u32 = 1 << 7;

/// Something a register write asks of the rest of the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    /// A level-triggered interrupt with this vector was finished: IOAPICs may send it again.
    EndOfInterrupt(u8),
    /// An interrupt command (the ICR) is to be sent.
    Send(u64),
}

/// The registers of one local APIC.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lapic {
    id: u8,
    base: u64,
    task_priority: u8,
    logical_destination: u32,
    destination_format: u32,
    spurious: u32,
    error: u32,
    /// Errors since the guest last wrote the error status register.
    error_latch: u32,
    command: u64,
    requested: VectorSet,
    in_service: VectorSet,
    level_triggered: VectorSet,
    lvt: [u32; 6],
    timer: Timer,
}

impl Lapic {
    /// A local APIC fresh from reset.
    #[must_use]
    pub fn new(id: u8) -> Self {
        let bsp = if id == 0 { BASE_BSP } else { 0 };
        Self {
            id,
            base: DEFAULT_BASE | BASE_ENABLE | bsp,
            task_priority: 0,
            logical_destination: 0,
            destination_format: u32::MAX,
            spurious: 0xff,
            error: 0,
            error_latch: 0,
            command: 0,
            requested: VectorSet::default(),
            in_service: VectorSet::default(),
            level_triggered: VectorSet::default(),
            lvt: [LVT_MASKED; 6],
            timer: Timer::default(),
        }
    }

    /// The APIC id.
    #[must_use]
    pub fn id(&self) -> u8 {
        self.id
    }

    /// `IA32_APIC_BASE`.
    #[must_use]
    pub fn base(&self) -> u64 {
        self.base
    }

    /// Writes `IA32_APIC_BASE`. Clearing the enable bit resets the registers (SDM vol. 3, 11.4.3).
    pub fn set_base(&mut self, base: u64) {
        if base & BASE_ENABLE == 0 {
            *self = Self::new(self.id);
        }
        self.base = base;
    }

    /// Whether the guest-physical `address` is one of the registers.
    #[must_use]
    pub fn claims(&self, address: u64) -> bool {
        self.base & BASE_ENABLE != 0 && address & !0xfff == self.base & !0xfff
    }

    /// Whether the APIC takes part in interrupt delivery at all.
    fn enabled(&self) -> bool {
        self.base & BASE_ENABLE != 0 && self.spurious & SVR_ENABLE != 0
    }

    /// Whether a message for `destination` is for this APIC.
    #[must_use]
    pub fn matches(&self, destination: u8, logical: bool) -> bool {
        if destination == 0xff {
            return true;
        }
        if !logical {
            return destination == self.id;
        }
        let own = (self.logical_destination >> 24) as u8;
        if self.destination_format >> 28 == 0xf {
            destination & own != 0
        } else {
            let cluster = destination >> 4;
            (cluster == 0xf || cluster == own >> 4) && destination & own & 0xf != 0
        }
    }

    /// Accepts a fixed interrupt; false if the APIC is disabled.
    pub fn accept(&mut self, vector: u8, level: bool) -> bool {
        if !self.enabled() {
            return false;
        }
        if vector < 16 {
            self.report(ERROR_RECEIVE_VECTOR);
            return true;
        }
        self.requested.insert(vector);
        if level {
            self.level_triggered.insert(vector);
        } else {
            self.level_triggered.remove(vector);
        }
        true
    }

    /// The highest requested vector, if its priority class exceeds the processor's.
    #[must_use]
    pub fn deliverable(&self) -> Option<u8> {
        let vector = self.requested.highest()?;
        (self.base & BASE_ENABLE != 0 && vector >> 4 > self.processor_priority() >> 4)
            .then_some(vector)
    }

    /// Moves `vector` from requested to in service: the processor has taken it.
    pub fn acknowledge(&mut self, vector: u8) {
        self.requested.remove(vector);
        self.in_service.insert(vector);
    }

    /// The task priority class, which the processor shows as CR8.
    #[must_use]
    pub fn cr8(&self) -> u64 {
        u64::from(self.task_priority >> 4)
    }

    /// Writes CR8 (only the low four bits count).
    pub fn set_cr8(&mut self, value: u64) {
        self.task_priority = ((value & 0xf) as u8) << 4;
    }

    /// The raw TSC of the next timer interrupt, if one is to come.
    #[must_use]
    pub fn next_timer(&self) -> Option<u64> {
        if self.lvt[LVT_TIMER] & LVT_MASKED != 0 { None } else { self.timer.expiry() }
    }

    /// Raises the timer interrupts due at the raw TSC `now`.
    pub fn advance(&mut self, now: u64) {
        if self.timer.advance(self.timer_mode(), now) {
            self.raise_lvt(LVT_TIMER);
        }
    }

    /// `IA32_TSC_DEADLINE`.
    pub fn tsc_deadline(&mut self, now: u64) -> u64 {
        self.advance(now);
        self.timer.deadline()
    }

    /// Writes `IA32_TSC_DEADLINE`; `adjust` is what the guest's TSC is ahead of the raw one.
    pub fn set_tsc_deadline(&mut self, deadline: u64, adjust: u64, now: u64) {
        self.advance(now);
        self.timer.set_deadline(self.timer_mode(), deadline, adjust, now);
        self.advance(now);
    }

    /// Reads the register at `offset` (a multiple of 16).
    pub fn read(&mut self, offset: u16, now: u64) -> u32 {
        let index = usize::from(offset >> 4);
        match offset {
            0x020 => u32::from(self.id) << 24,
            0x030 => VERSION,
            0x080 => u32::from(self.task_priority),
            0x0a0 => u32::from(self.processor_priority()),
            // Arbitration priority, remote read: not of this APIC generation, read as zero.
            0x090 | 0x0b0 | 0x0c0 => 0,
            0x0d0 => self.logical_destination,
            0x0e0 => self.destination_format,
            0x0f0 => self.spurious,
            0x100..=0x170 => self.in_service.word(index),
            0x180..=0x1f0 => self.level_triggered.word(index),
            0x200..=0x270 => self.requested.word(index),
            0x280 => self.error,
            0x300 => self.command as u32,
            0x310 => (self.command >> 32) as u32,
            0x320..=0x370 => self.lvt[index - 0x32],
            0x380 => self.timer.initial(),
            0x390 => {
                self.advance(now);
                self.timer.current(self.timer_mode(), now)
            }
            0x3e0 => self.timer.divide(),
            _ => {
                self.report(ERROR_REGISTER);
                0
            }
        }
    }

    /// Writes the register at `offset` (a multiple of 16).
    pub fn write(&mut self, offset: u16, value: u32, now: u64) -> Option<Request> {
        self.advance(now);
        match offset {
            0x080 => self.task_priority = value as u8,
            0x0b0 => return self.end_of_interrupt(),
            0x0d0 => self.logical_destination = value & 0xff00_0000,
            0x0e0 => self.destination_format = value | 0x0fff_ffff,
            0x0f0 => self.set_spurious(value),
            0x280 => self.error = std::mem::take(&mut self.error_latch),
            0x300 => {
                // Bit 12, delivery status, always reads as idle.
                self.command = self.command & !0xffff_ffff | u64::from(value & 0x000c_cfff);
                return Some(Request::Send(self.command));
            }
            0x310 => {
                self.command = self.command & 0xffff_ffff | u64::from(value & 0xff00_0000) << 32;
            }
            0x320..=0x370 => self.set_lvt(usize::from(offset >> 4) - 0x32, value, now),
            0x380 => self.timer.set_initial(self.timer_mode(), value, now),
            0x3e0 => self.timer.set_divide(self.timer_mode(), value, now),
            // Read-only registers. The id is one, as on recent processors.
            0x020 | 0x030 | 0x090 | 0x0a0 | 0x0c0 | 0x100..=0x270 | 0x390 => {}
            _ => self.report(ERROR_REGISTER),
        }
        None
    }

    /// Notes that an interrupt command named a vector below 16.
    pub fn report_sent_vector(&mut self) {
        self.report(ERROR_SEND_VECTOR);
    }

    /// The processor priority: task priority, or the class in service if that is higher
    /// (SDM vol. 3, 11.8.3.1).
    fn processor_priority(&self) -> u8 {
        let service = self.in_service.highest().unwrap_or(0);
        if self.task_priority >> 4 >= service >> 4 { self.task_priority } else { service & 0xf0 }
    }

    fn timer_mode(&self) -> Mode {
        Mode::from_lvt(self.lvt[LVT_TIMER])
    }

    fn end_of_interrupt(&mut self) -> Option<Request> {
        let vector = self.in_service.highest()?;
        self.in_service.remove(vector);
        self.level_triggered.contains(vector).then_some(Request::EndOfInterrupt(vector))
    }

    fn set_spurious(&mut self, value: u32) {
        // Bit 12, suppressing EOI broadcasts, is not offered in the version register.
        self.spurious = value & 0x3ff;
        if self.spurious & SVR_ENABLE == 0 {
            // A disabled APIC masks its LVT (SDM vol. 3, 11.4.7.2).
            self.lvt.iter_mut().for_each(|entry| *entry |= LVT_MASKED);
        }
    }

    fn set_lvt(&mut self, index: usize, value: u32, now: u64) {
        let mut entry = value & LVT_WRITABLE[index];
        if self.spurious & SVR_ENABLE == 0 {
            entry |= LVT_MASKED;
        }
        let before = self.timer_mode();
        self.lvt[index] = entry;
        if index == LVT_TIMER {
            self.timer.change_mode(before, self.timer_mode());
            self.advance(now);
        }
    }

    fn raise_lvt(&mut self, index: usize) {
        let entry = self.lvt[index];
        if entry & LVT_MASKED == 0 {
            self.accept(entry as u8, false);
        }
    }

    fn report(&mut self, error: u32) {
        let news = self.error_latch & error == 0;
        self.error_latch |= error;
        let entry = self.lvt[LVT_ERROR];
        // The vector check keeps an illegal error vector from reporting itself without end.
        if news && entry & LVT_MASKED == 0 && entry as u8 >= 16 {
            self.accept(entry as u8, false);
        }
    }
}
