//! Guest time: computed from the instruction count, never read from the host.

use serde::{Deserialize, Serialize};

/// Frequency of the guest's time stamp counter: one tick is one nanosecond.
pub const TSC_HZ: u64 = 1_000_000_000;

/// A straight line from instruction count to guest time.
///
/// Between two anchors the TSC is `tsc + ((retired - point) * rate >> 32)`. Every clock of the guest
/// (LAPIC timer, TSC deadline, PM timer, RTC) derives from it, so that two machines with the same
/// anchors at the same points read the same times at the same instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Anchor {
    /// Instructions retired when the line starts.
    pub point: u64,
    /// The TSC there, in ticks.
    pub tsc: u64,
    /// Ticks per instruction, in units of 2^-32.
    pub rate: u64,
}

impl Anchor {
    /// The TSC when `retired` instructions have retired; `retired` is not below `self.point`.
    #[must_use]
    pub fn tsc_at(&self, retired: u64) -> u64 {
        let ticks = (u128::from(retired - self.point) * u128::from(self.rate)) >> 32;
        self.tsc.saturating_add(u64::try_from(ticks).unwrap_or(u64::MAX))
    }

    /// The first instruction count at which the TSC is at least `tsc` (`u64::MAX` if never).
    #[must_use]
    pub fn point_at(&self, tsc: u64) -> u64 {
        let ticks = tsc.saturating_sub(self.tsc);
        if ticks == 0 {
            return self.point;
        }
        if self.rate == 0 {
            return u64::MAX;
        }
        let instructions = (u128::from(ticks) << 32).div_ceil(u128::from(self.rate));
        u64::try_from(instructions).map_or(u64::MAX, |n| self.point.saturating_add(n))
    }
}

impl Default for Anchor {
    /// Time zero at point zero, ten ticks (10 ns) an instruction.
    fn default() -> Self {
        Self { point: 0, tsc: 0, rate: 10 << 32 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn point_at_is_the_first_point_that_reaches_the_time(
            point in 0u64..1 << 48, tsc in 0u64..1 << 60, rate in 1u64..1 << 40, ahead in 0u64..1 << 40,
        ) {
            let anchor = Anchor { point, tsc, rate };
            let reached = anchor.point_at(tsc + ahead);
            if reached != u64::MAX {
                prop_assert!(anchor.tsc_at(reached) >= tsc + ahead);
                prop_assert!(reached == point || anchor.tsc_at(reached - 1) < tsc + ahead);
            }
        }
    }
}
