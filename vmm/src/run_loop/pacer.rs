//! Makes guest time follow host time, by choosing anchors.
//!
//! The guest's clock is a line over its instruction count ([`hypervisor::Anchor`]). The running side
//! draws a new line about once a millisecond, and whenever a halted guest wakes: it starts where the old
//! one ended, so time never jumps backwards, and is steep enough to meet host time one quantum later.
//! Here alone a host clock becomes guest time, and on the running side alone: what is read reaches the guest
//! as a recorded event and in no other way.

use std::time::{Duration, Instant};

use hypervisor::Anchor;

/// Host time between two anchors of a busy guest.
const QUANTUM: Duration = Duration::from_millis(1);
/// Guest time never runs faster than this many times host time while it catches up.
const MAX_CATCH_UP: u64 = 8;
/// Instructions per quantum before the first measurement: 100 million a second.
const FIRST_QUANTUM_INSTRUCTIONS: u64 = 100_000;
/// Bounds for the measured length of a quantum, in instructions.
const QUANTUM_INSTRUCTIONS: std::ops::RangeInclusive<u64> = 1_000..=10_000_000;

/// Chooses anchors. All times are nanoseconds; one TSC tick is one nanosecond.
#[derive(Debug)]
pub struct Pacer {
    /// Host instant that `guest_origin_ns` belongs to.
    origin: Instant,
    /// Guest time the guest should have had at `origin`.
    guest_origin_ns: u64,
    /// Instructions the guest executes in one quantum of host time, measured.
    quantum_instructions: u64,
    /// When and where the present line began.
    line: (Instant, u64),
}

impl Pacer {
    /// Guest time was `guest_ns` at the instant `at`, and goes on from there as host time does.
    #[must_use]
    pub fn new(guest_ns: u64, at: Instant, retired: u64) -> Self {
        Self {
            origin: at,
            guest_origin_ns: guest_ns,
            quantum_instructions: FIRST_QUANTUM_INSTRUCTIONS,
            line: (Instant::now(), retired),
        }
    }

    /// Time stood still for the guest (a pause): it goes on from `guest_ns` now.
    pub fn resume_at(&mut self, guest_ns: u64, retired: u64) {
        self.origin = Instant::now();
        self.guest_origin_ns = guest_ns;
        self.line = (self.origin, retired);
    }

    /// The line for a guest that has been running: it has now retired `retired` instructions and its TSC
    /// reads `tsc`.
    #[must_use]
    pub fn next_while_running(&mut self, retired: u64, tsc: u64) -> Anchor {
        let now = Instant::now();
        self.measure(now, retired);
        self.draw(now, retired, tsc)
    }

    /// The line for a guest that wakes from HLT: its time first jumps to host time.
    #[must_use]
    pub fn next_after_halt(&mut self, retired: u64, tsc: u64) -> Anchor {
        let now = Instant::now();
        let tsc = tsc.max(self.guest_time_at(now));
        self.draw(now, retired, tsc)
    }

    /// The guest went to sleep: instructions until here belong to the measurement, the sleep does not.
    pub fn halted(&mut self, retired: u64) {
        self.measure(Instant::now(), retired);
    }

    /// How long the host may sleep before guest time reaches `tsc`.
    #[must_use]
    pub fn time_until(&self, tsc: u64) -> Duration {
        Duration::from_nanos(tsc.saturating_sub(self.guest_time_at(Instant::now())))
    }

    /// Where a guest on the line `anchor` is due for the next one.
    #[must_use]
    pub fn end_of_quantum(&self, anchor: &Anchor) -> u64 {
        anchor.point.saturating_add(self.quantum_instructions)
    }

    /// Instructions that the guest executes in about a millisecond.
    #[must_use]
    pub fn quantum(&self) -> u64 {
        self.quantum_instructions
    }

    fn guest_time_at(&self, now: Instant) -> u64 {
        self.guest_origin_ns.saturating_add(nanos(now.saturating_duration_since(self.origin)))
    }

    /// Takes the guest's speed over the present line into the running average.
    fn measure(&mut self, now: Instant, retired: u64) {
        let (since, from) = self.line;
        self.line = (now, retired);
        let elapsed = nanos(now.saturating_duration_since(since));
        let executed = retired.saturating_sub(from);
        // Too short a run says more about interruptions than about speed.
        if executed < *QUANTUM_INSTRUCTIONS.start() || elapsed == 0 {
            return;
        }
        let per_quantum = u128::from(executed) * QUANTUM.as_nanos() / u128::from(elapsed);
        let sample = u64::try_from(per_quantum).unwrap_or(u64::MAX);
        let average = (self.quantum_instructions.saturating_mul(7).saturating_add(sample)) / 8;
        self.quantum_instructions =
            average.clamp(*QUANTUM_INSTRUCTIONS.start(), *QUANTUM_INSTRUCTIONS.end());
    }

    /// From (`retired`, `tsc`) to where host time will be one quantum from now.
    fn draw(&mut self, now: Instant, retired: u64, tsc: u64) -> Anchor {
        self.line = (now, retired);
        let quantum = nanos(QUANTUM);
        let target = self.guest_time_at(now).saturating_add(quantum);
        // A guest that is ahead of the host creeps on until the host has caught up.
        let ticks = target.saturating_sub(tsc).clamp(quantum / 64, quantum * MAX_CATCH_UP);
        let rate = (u128::from(ticks) << 32) / u128::from(self.quantum_instructions);
        Anchor { point: retired, tsc, rate: u64::try_from(rate).unwrap_or(u64::MAX) }
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_never_runs_backwards_and_is_continuous() {
        let mut pacer = Pacer::new(5_000, Instant::now(), 0);
        let mut anchor = pacer.next_while_running(0, 5_000);
        for _ in 0..100 {
            let end = pacer.end_of_quantum(&anchor);
            let tsc = anchor.tsc_at(end);
            let next = pacer.next_while_running(end, tsc);
            assert_eq!((next.point, next.tsc), (end, tsc));
            assert!(next.rate > 0);
            anchor = next;
        }
    }

    #[test]
    fn a_guest_far_behind_catches_up_at_a_bounded_rate() {
        let now = Instant::now();
        let behind = now.checked_sub(Duration::from_secs(10)).unwrap_or(now);
        let mut pacer = Pacer::new(0, behind, 0);
        let anchor = pacer.next_while_running(0, 0);
        let quantum = pacer.end_of_quantum(&anchor);
        assert!(anchor.tsc_at(quantum) <= nanos(QUANTUM) * MAX_CATCH_UP);
    }

    #[test]
    fn a_waking_guest_jumps_to_host_time() {
        let now = Instant::now();
        let earlier = now.checked_sub(Duration::from_secs(3)).unwrap_or(now);
        let mut pacer = Pacer::new(1_000, earlier, 7);
        let anchor = pacer.next_after_halt(7, 2_000);
        assert_eq!(anchor.point, 7);
        assert!(anchor.tsc >= nanos(now.duration_since(earlier)));
    }
}
