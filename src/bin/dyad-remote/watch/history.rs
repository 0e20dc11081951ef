//! What was seen before, for the sparklines. Bounded: the oldest is forgotten.

use std::collections::VecDeque;

use vmm::api::FtStatus;

/// Looks remembered; wider than most terminals.
const LENGTH: usize = 512;

/// The curves that are drawn, in the order in which they stand on the screen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Curve {
    /// Microseconds that the backup is behind.
    Lag,
    /// Bits of log a second.
    LogRate,
    /// Microseconds that outputs waited, the 99th percentile.
    OutputDelay,
    /// Thousandths of its time that the guest gives away.
    Throttle,
    /// Digests compared since the look before.
    Digests,
}

/// All of them.
pub const CURVES: [Curve; 5] =
    [Curve::Lag, Curve::LogRate, Curve::OutputDelay, Curve::Throttle, Curve::Digests];

/// Past values of each curve.
#[derive(Debug, Default)]
pub struct History {
    values: [VecDeque<u64>; CURVES.len()],
    digests: Option<u64>,
}

impl History {
    /// Adds a look.
    pub fn add(&mut self, status: &FtStatus) {
        let before = self.digests.replace(status.digests_compared);
        for curve in CURVES {
            let value = match curve {
                Curve::Lag => status.lag_us,
                Curve::LogRate => (status.log.mbit_per_s * 1e6) as u64,
                Curve::OutputDelay => status.output_delay.p99_us,
                Curve::Throttle => (status.throttle * 1e3) as u64,
                // A new generation counts from zero again.
                Curve::Digests => {
                    status.digests_compared.saturating_sub(before.unwrap_or(u64::MAX))
                }
            };
            let values = &mut self.values[curve as usize];
            values.push_back(value);
            if values.len() > LENGTH {
                values.pop_front();
            }
        }
    }

    /// The last `count` values of a curve, oldest first.
    pub fn last(&self, curve: Curve, count: usize) -> impl Iterator<Item = u64> + '_ {
        let values = &self.values[curve as usize];
        values.iter().skip(values.len().saturating_sub(count)).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_values_are_kept() {
        let mut history = History::default();
        for look in 0..LENGTH as u64 + 10 {
            let digests_compared = 2 * look;
            history.add(&FtStatus { lag_us: look, digests_compared, ..FtStatus::default() });
        }
        let lags: Vec<u64> = history.last(Curve::Lag, 3).collect();
        assert_eq!(lags, [LENGTH as u64 + 7, LENGTH as u64 + 8, LENGTH as u64 + 9]);
        assert_eq!(history.last(Curve::Lag, usize::MAX).count(), LENGTH);
        assert!(history.last(Curve::Digests, 5).all(|digests| digests == 2));
    }

    #[test]
    fn the_first_look_and_a_new_generation_compare_nothing() {
        let mut history = History::default();
        for digests_compared in [70, 72, 1] {
            history.add(&FtStatus { digests_compared, ..FtStatus::default() });
        }
        assert_eq!(history.last(Curve::Digests, 9).collect::<Vec<_>>(), [0, 2, 0]);
    }
}
