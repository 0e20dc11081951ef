//! Takes time from a guest that lives: it rests after it has run, in proportion.
//!
//! Used while a backup falls behind, and while a copy is made of a guest that changes faster than it can be
//! sent. What it rests is measured against the time that it has run, so that a guest which sleeps by itself
//! has done part of its resting already, and one which is woken often gains nothing by it. A debt is kept as time
//! run and not as rest: it costs what is taken now, however much was taken when it was made. Guest time goes on
//! meanwhile: to the guest its processor has become slower.

use std::time::{Duration, Instant};

/// A debt of rest shorter than this is added to the next: each rest costs a sleep and a wake-up.
const LEAST_REST: Duration = Duration::from_millis(2);
/// No rest is longer, that a guest which ran on because the host was busy does not pay for it.
const LONGEST_REST: Duration = Duration::from_millis(50);

/// See the module's documentation.
#[derive(Debug, Default)]
pub struct Throttle {
    /// What it has run and not rested for.
    ran: Duration,
    /// Until when rest has been counted.
    counted: Option<Instant>,
    /// When it was last let run.
    ran_from: Option<Instant>,
}

impl Throttle {
    /// The guest is about to run, `fraction` (0 to 1) of its time being taken. `Some` if it must rest first,
    /// for so long. Who lowers the fraction wakes the thread; at 1 the guest never runs.
    pub fn before_run(&mut self, fraction: f64, now: impl FnOnce() -> Instant) -> Option<Duration> {
        if fraction <= 0.0 {
            *self = Self::default();
            return None;
        }
        if fraction >= 1.0 {
            return Some(LONGEST_REST);
        }
        let now = now();
        let cost = cost(fraction);
        if let Some(counted) = self.counted.replace(now) {
            let rested = now.saturating_duration_since(counted);
            self.ran = self.ran.saturating_sub(rested.div_f64(cost));
        }
        let rest = self.ran.mul_f64(cost);
        if rest >= LEAST_REST {
            return Some(rest.min(LONGEST_REST));
        }
        self.ran_from = Some(now);
        None
    }

    /// The guest has run.
    pub fn after_run(&mut self, fraction: f64, now: impl FnOnce() -> Instant) {
        let Some(ran_from) = self.ran_from.take() else { return };
        let now = now();
        self.ran += now.saturating_duration_since(ran_from);
        self.ran = self.ran.min(LONGEST_REST.div_f64(cost(fraction)));
        self.counted = Some(now);
    }
}

/// The rest that a unit of running costs, more than 0. Bounded, that no time overflows.
fn cost(fraction: f64) -> f64 {
    (fraction / (1.0 - fraction)).clamp(1e-4, 1e4)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs a guest for a second: `run` at a time, then asleep for `sleep`. Gives the part of time it ran.
    fn share(fraction: f64, run: Duration, sleep: Duration) -> f64 {
        let start = Instant::now();
        let (mut now, mut ran) = (start, Duration::ZERO);
        let mut throttle = Throttle::default();
        while now < start + Duration::from_secs(1) {
            if let Some(rest) = throttle.before_run(fraction, || now) {
                now += rest;
                continue;
            }
            (now, ran) = (now + run, ran + run);
            throttle.after_run(fraction, || now);
            now += sleep;
        }
        ran.as_secs_f64()
    }

    const NO_TIME: Duration = Duration::ZERO;

    #[test]
    fn a_guest_gets_what_is_left() {
        for fraction in [0.1, 0.5, 0.9, 0.95] {
            for run_us in [20, 100, 1000] {
                let share = share(fraction, Duration::from_micros(run_us), NO_TIME);
                assert!((share - (1.0 - fraction)).abs() < 0.02, "{fraction} {run_us}: {share}");
            }
        }
        let share = share(0.999, Duration::from_micros(20), NO_TIME);
        assert!(share < 0.002, "{share}");
    }

    #[test]
    fn at_one_it_stands_still() {
        assert_eq!(share(1.0, Duration::from_millis(1), NO_TIME), 0.0);
    }

    #[test]
    fn sleeping_counts_as_rest() {
        let (millisecond, three) = (Duration::from_millis(1), Duration::from_millis(3));
        assert!((share(0.5, millisecond, three) - 0.25).abs() < 0.02);
        assert!((share(0.9, millisecond, three) - 0.1).abs() < 0.02);
    }

    #[test]
    fn what_is_given_back_is_given_back_at_once() {
        let now = Instant::now();
        let mut throttle = Throttle::default();
        assert_eq!(throttle.before_run(0.9, || now), None);
        let later = now + Duration::from_millis(3);
        throttle.after_run(0.9, || later);
        assert_eq!(throttle.before_run(0.9, || later), Some(Duration::from_millis(27)));
        assert_eq!(throttle.before_run(0.5, || later), Some(Duration::from_millis(3)));
        assert_eq!(throttle.before_run(0.0, || later), None);
        assert_eq!(throttle.before_run(0.9, || later), None);
    }
}
