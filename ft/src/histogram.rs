//! Percentiles of durations in constant memory: buckets that grow with the value, eight to each
//! power of two, so that a reported figure is at most an eighth too large.

use serde::{Deserialize, Serialize};
use std::time::Duration;

const STEPS: usize = 8;
const BUCKETS: usize = 40 * STEPS;

/// Counts of durations by microseconds.
#[derive(Clone, Debug)]
pub struct Histogram {
    buckets: Box<[u64; BUCKETS]>,
    count: u64,
    max_us: u64,
}

/// Figures of a [`Histogram`], in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Percentiles {
    /// How many durations.
    pub count: u64,
    /// Half were at most this.
    pub p50_us: u64,
    /// All but one in a hundred were at most this.
    pub p99_us: u64,
    /// The longest.
    pub max_us: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self { buckets: Box::new([0; BUCKETS]), count: 0, max_us: 0 }
    }
}

fn bucket_of(us: u64) -> usize {
    if us < STEPS as u64 {
        return us as usize;
    }
    let power = us.ilog2() as usize - 3;
    let step = (us >> power) as usize & (STEPS - 1);
    ((power + 1) * STEPS + step).min(BUCKETS - 1)
}

/// The largest value in a bucket.
fn top_of(bucket: usize) -> u64 {
    let (power, step) = (bucket / STEPS, bucket % STEPS);
    match power {
        0 => step as u64,
        power => (((STEPS + step + 1) as u64) << (power - 1)) - 1,
    }
}

impl Histogram {
    /// Counts a duration.
    pub fn add(&mut self, duration: Duration) {
        let us = u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
        self.buckets[bucket_of(us)] += 1;
        self.count += 1;
        self.max_us = self.max_us.max(us);
    }

    /// The figures so far.
    pub fn percentiles(&self) -> Percentiles {
        Percentiles {
            count: self.count,
            p50_us: self.quantile(50),
            p99_us: self.quantile(99),
            max_us: self.max_us,
        }
    }

    fn quantile(&self, percent: u64) -> u64 {
        let rank = (u128::from(self.count) * u128::from(percent)).div_ceil(100) as u64;
        let mut seen = 0;
        for (bucket, count) in self.buckets.iter().enumerate() {
            seen += count;
            if seen >= rank && seen > 0 {
                return top_of(bucket).min(self.max_us);
            }
        }
        self.max_us
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_cover_all_values_in_order() {
        let mut last = 0;
        for us in (0..100_000).chain((17..63).map(|bit| 1 << bit)).chain([u64::MAX]) {
            let bucket = bucket_of(us);
            assert!(bucket >= last && bucket < BUCKETS);
            if bucket < BUCKETS - 1 {
                assert!(us <= top_of(bucket), "{us} lies above its bucket");
                assert!(top_of(bucket) <= us + us / 8, "{us} lies far below its bucket's top");
            }
            last = bucket;
        }
    }

    #[test]
    fn percentiles_are_right_to_an_eighth() {
        let mut histogram = Histogram::default();
        assert_eq!(histogram.percentiles(), Percentiles::default());
        for us in 1..=1000 {
            histogram.add(Duration::from_micros(us));
        }
        let figures = histogram.percentiles();
        assert_eq!((figures.count, figures.max_us), (1000, 1000));
        assert!((500..=563).contains(&figures.p50_us), "{figures:?}");
        assert!((990..=1000).contains(&figures.p99_us), "{figures:?}");
    }
}
