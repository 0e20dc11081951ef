//! Distributions, as printed by the tests.

use serde::Serialize;
use std::time::Duration;

/// Smallest, middle, 99th percentile and largest of a set of times, in milliseconds.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Distribution {
    /// How many values there are.
    pub count: usize,
    /// Smallest value.
    pub min_ms: f64,
    /// Half of the values are at or below this one.
    pub median_ms: f64,
    /// 99 of 100 values are at or below this one.
    pub p99_ms: f64,
    /// Largest value.
    pub max_ms: f64,
}

impl Distribution {
    /// The distribution of `values`; `None` if there are none.
    #[must_use]
    pub fn of(values: impl IntoIterator<Item = Duration>) -> Option<Self> {
        let mut values: Vec<Duration> = values.into_iter().collect();
        values.sort_unstable();
        // Nearest rank: always a value that occurred.
        let rank = |percent: usize| {
            let at = (values.len() * percent).div_ceil(100).max(1) - 1;
            values.get(at).map(|value| value.as_secs_f64() * 1e3)
        };
        Some(Self {
            count: values.len(),
            min_ms: rank(0)?,
            median_ms: rank(50)?,
            p99_ms: rank(99)?,
            max_ms: rank(100)?,
        })
    }
}

impl std::fmt::Display for Distribution {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { count, min_ms, median_ms, p99_ms, max_ms } = self;
        write!(
            f,
            "min {min_ms:.1} ms, median {median_ms:.1} ms, p99 {p99_ms:.1} ms, max {max_ms:.1} ms ({count} values)"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_are_values_that_occurred() {
        let of = |range: std::ops::RangeInclusive<u64>| {
            Distribution::of(range.rev().map(Duration::from_millis)).unwrap()
        };
        let hundred = of(1..=100);
        assert_eq!(
            hundred,
            Distribution { count: 100, min_ms: 1.0, median_ms: 50.0, p99_ms: 99.0, max_ms: 100.0 }
        );
        let one = of(7..=7);
        assert_eq!((one.min_ms, one.median_ms, one.p99_ms, one.max_ms), (7.0, 7.0, 7.0, 7.0));
        assert_eq!(Distribution::of([]), None);
    }
}
