//! The LAPIC timer: one-shot, periodic and TSC-deadline (Intel SDM vol. 3, 11.5.4).
//!
//! The timer never ticks. It keeps the TSC at which it next expires, from which the run loop computes
//! an instruction count to stop at, and from which the current count is computed when the guest reads
//! it. All times here are raw TSC values, that is without the guest's `IA32_TSC_ADJUST`: the raw TSC
//! never goes backwards, whatever the guest writes.

use crate::clock::TSC_HZ;
use serde::{Deserialize, Serialize};

/// Frequency of the core crystal clock, which the timer counts (CPUID leaf 0x15).
pub const CRYSTAL_HZ: u64 = 25_000_000;

/// TSC ticks per tick of the crystal.
const TSC_PER_CRYSTAL: u64 = TSC_HZ / CRYSTAL_HZ;

/// The expiry of a timer that is not running.
const NEVER: u64 = u64::MAX;

/// What the timer does, from bits 17 and 18 of its LVT entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Counts down once.
    OneShot,
    /// Counts down and starts again.
    Periodic,
    /// Expires when the guest's TSC reaches `IA32_TSC_DEADLINE`.
    TscDeadline,
}

impl Mode {
    /// Decodes an LVT entry. The reserved encoding behaves as one-shot.
    #[must_use]
    pub fn from_lvt(entry: u32) -> Self {
        match (entry >> 17) & 3 {
            1 => Self::Periodic,
            2 => Self::TscDeadline,
            _ => Self::OneShot,
        }
    }
}

/// The counter behind the timer's registers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timer {
    /// Initial count register.
    initial: u32,
    /// Divide configuration register.
    divide: u32,
    /// Raw TSC at which the count reaches zero or the deadline is met; [`NEVER`] if not running.
    expiry: u64,
    /// `IA32_TSC_DEADLINE` as the guest wrote it; zero if disarmed.
    deadline: u64,
}

impl Default for Timer {
    fn default() -> Self {
        Self { initial: 0, divide: 0, expiry: NEVER, deadline: 0 }
    }
}

impl Timer {
    /// The raw TSC at which the timer expires next.
    #[must_use]
    pub fn expiry(&self) -> Option<u64> {
        (self.expiry != NEVER).then_some(self.expiry)
    }

    /// Lets time pass up to `now`; true if the timer expired at least once.
    ///
    /// Periods missed altogether are one expiry: the IRR holds one interrupt per vector anyway.
    pub fn advance(&mut self, mode: Mode, now: u64) -> bool {
        if now < self.expiry || self.expiry == NEVER {
            return false;
        }
        match mode {
            Mode::Periodic if self.period() != 0 => {
                let missed = (now - self.expiry) / self.period();
                let passed = (missed + 1).saturating_mul(self.period());
                self.expiry = self.expiry.saturating_add(passed);
            }
            Mode::OneShot | Mode::Periodic | Mode::TscDeadline => {
                self.expiry = NEVER;
                self.deadline = 0;
            }
        }
        true
    }

    /// Initial count register.
    #[must_use]
    pub fn initial(&self) -> u32 {
        self.initial
    }

    /// Writes the initial count register, which starts the countdown; zero stops it.
    pub fn set_initial(&mut self, mode: Mode, count: u32, now: u64) {
        // In TSC-deadline mode the counter does not run and writes are ignored.
        if mode == Mode::TscDeadline {
            return;
        }
        self.initial = count;
        self.expiry = if count == 0 { NEVER } else { now.saturating_add(self.period()) };
    }

    /// Current count register. Call [`Timer::advance`] first.
    #[must_use]
    pub fn current(&self, mode: Mode, now: u64) -> u32 {
        if mode == Mode::TscDeadline || self.expiry == NEVER {
            return 0;
        }
        let left = self.expiry.saturating_sub(now).div_ceil(self.tick());
        u32::try_from(left).unwrap_or(u32::MAX)
    }

    /// Divide configuration register.
    #[must_use]
    pub fn divide(&self) -> u32 {
        self.divide
    }

    /// Writes the divide configuration register. A running countdown keeps its current count.
    pub fn set_divide(&mut self, mode: Mode, divide: u32, now: u64) {
        let current = self.current(mode, now);
        self.divide = divide & 0b1011;
        if mode != Mode::TscDeadline && self.expiry != NEVER {
            self.expiry = now.saturating_add(u64::from(current) * self.tick());
        }
    }

    /// The mode in the LVT entry changed. Going into or out of TSC-deadline mode disarms the timer
    /// (SDM vol. 3, 11.5.4.1).
    pub fn change_mode(&mut self, from: Mode, to: Mode) {
        if from != to && (from == Mode::TscDeadline || to == Mode::TscDeadline) {
            self.initial = 0;
            self.expiry = NEVER;
            self.deadline = 0;
        }
    }

    /// `IA32_TSC_DEADLINE`. Call [`Timer::advance`] first.
    #[must_use]
    pub fn deadline(&self) -> u64 {
        self.deadline
    }

    /// Writes `IA32_TSC_DEADLINE`; zero disarms, and outside TSC-deadline mode writes are ignored.
    /// `adjust` is what the guest's TSC is ahead of `now`. A deadline already met expires at once.
    pub fn set_deadline(&mut self, mode: Mode, deadline: u64, adjust: u64, now: u64) {
        if mode != Mode::TscDeadline {
            return;
        }
        self.deadline = deadline;
        self.expiry = if deadline == 0 {
            NEVER
        } else {
            let ahead = deadline.saturating_sub(now.wrapping_add(adjust));
            // The last representable instant means "not running"; one tick before it is as far away.
            now.saturating_add(ahead).min(NEVER - 1)
        };
    }

    /// TSC ticks per count.
    fn tick(&self) -> u64 {
        let code = (self.divide & 3) | ((self.divide >> 1) & 4);
        // Codes 0 to 6 divide by 2 to 128, code 7 by 1.
        TSC_PER_CRYSTAL << ((code + 1) & 7)
    }

    /// TSC ticks from start to zero.
    fn period(&self) -> u64 {
        u64::from(self.initial) * self.tick()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_divider_counts_as_the_manual_says() {
        let codes = [
            (0b0000, 2),
            (0b0001, 4),
            (0b0010, 8),
            (0b0011, 16),
            (0b1000, 32),
            (0b1001, 64),
            (0b1010, 128),
            (0b1011, 1),
        ];
        for (code, divider) in codes {
            let mut timer = Timer::default();
            timer.set_divide(Mode::OneShot, code, 0);
            timer.set_initial(Mode::OneShot, 10, 1000);
            assert_eq!(timer.expiry(), Some(1000 + 10 * divider * 40));
            assert_eq!(timer.current(Mode::OneShot, 1000), 10);
            assert_eq!(timer.current(Mode::OneShot, 1000 + divider * 40), 9);
        }
    }

    #[test]
    fn one_shot_expires_once() {
        let mut timer = Timer::default();
        timer.set_divide(Mode::OneShot, 0b1011, 0);
        timer.set_initial(Mode::OneShot, 5, 100);
        assert!(!timer.advance(Mode::OneShot, 299));
        assert!(timer.advance(Mode::OneShot, 300));
        assert!(!timer.advance(Mode::OneShot, 100_000));
        assert_eq!(timer.current(Mode::OneShot, 100_000), 0);
        assert_eq!(timer.initial(), 5);
    }

    #[test]
    fn periodic_keeps_its_phase_over_missed_periods() {
        let mut timer = Timer::default();
        timer.set_divide(Mode::Periodic, 0b1011, 0);
        timer.set_initial(Mode::Periodic, 5, 0);
        assert!(timer.advance(Mode::Periodic, 1050));
        assert_eq!(timer.expiry(), Some(1200));
        assert!(timer.advance(Mode::Periodic, 1200));
        assert_eq!(timer.expiry(), Some(1400));
    }

    #[test]
    fn dividing_anew_keeps_the_count() {
        let mut timer = Timer::default();
        timer.set_divide(Mode::OneShot, 0b1011, 0);
        timer.set_initial(Mode::OneShot, 100, 0);
        timer.set_divide(Mode::OneShot, 0b0000, 50 * 40);
        assert_eq!(timer.current(Mode::OneShot, 50 * 40), 50);
        assert_eq!(timer.expiry(), Some(50 * 40 + 50 * 80));
    }

    #[test]
    fn the_deadline_follows_the_guests_view_of_the_tsc() {
        let mut timer = Timer::default();
        timer.set_deadline(Mode::OneShot, 5000, 0, 0);
        assert_eq!(timer.expiry(), None);
        timer.set_deadline(Mode::TscDeadline, 5000, 1000, 100);
        assert_eq!(timer.expiry(), Some(4000));
        assert_eq!(timer.deadline(), 5000);
        assert!(timer.advance(Mode::TscDeadline, 4000));
        assert_eq!(timer.deadline(), 0);
        timer.set_deadline(Mode::TscDeadline, 10, 0, 100);
        assert_eq!(timer.expiry(), Some(100));
        timer.change_mode(Mode::TscDeadline, Mode::Periodic);
        assert_eq!(timer.expiry(), None);
    }
}
