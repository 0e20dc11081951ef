//! Lag: host time from the primary recording a point to the backup having executed it. It is the
//! time that a failover takes beyond detection, so it is kept small: a slow feedback loop takes CPU
//! time from the primary while lag is large and gives it back after.
//!
//! Measured on the primary's clock alone: when a position was appended, and when the backup's report
//! of having executed it arrived. It includes the way there and back, and so errs on the safe side.
//!
//! What is measured is old news: when a slow backup reports that a record took 100 ms, those behind it
//! will take longer still. So the loop acts on what is coming, the instructions recorded and not yet
//! executed by the rate at which the backup executes.

use std::collections::VecDeque;
use std::time::Duration;

use crate::{ExecutionPoint, Histogram, LogPosition, Percentiles};

/// How often the loop acts: slow against the reports, so that it does not hunt.
const PERIOD: Duration = Duration::from_millis(20);

/// The most CPU time that the loop takes. Beyond `max_lag` the primary is stopped altogether.
const MAX_THROTTLE: f64 = 0.95;

/// Samples kept; older neighbours are merged beyond.
const MAX_SAMPLES: usize = 4096;

/// Appends closer than this share a sample.
const GRAIN: Duration = Duration::from_micros(200);

/// Reports closer than this say little about the rate.
const RATE_PERIOD: Duration = Duration::from_millis(4);

#[derive(Clone, Copy, Debug)]
struct Sample {
    end: LogPosition,
    point: ExecutionPoint,
    first: Duration,
    last: Duration,
}

/// Measures lag and answers with a throttle.
#[derive(Clone, Debug)]
pub struct LagControl {
    max_lag: Duration,
    samples: VecDeque<Sample>,
    executed: LogPosition,
    recorded_point: ExecutionPoint,
    executed_point: ExecutionPoint,
    /// Since when the backup has had something to execute all the time, and its point then.
    busy_from: Option<(Duration, ExecutionPoint)>,
    /// Instructions per second that it executes when it has something to execute.
    rate: Option<f64>,
    lags: Histogram,
    throttle: f64,
    next: Duration,
}

impl LagControl {
    /// Keeps lag below `max_lag`.
    pub fn new(now: Duration, max_lag: Duration) -> Self {
        Self {
            max_lag,
            samples: VecDeque::new(),
            executed: LogPosition(0),
            recorded_point: ExecutionPoint(0),
            executed_point: ExecutionPoint(0),
            busy_from: None,
            rate: None,
            lags: Histogram::default(),
            throttle: 0.0,
            next: now + PERIOD,
        }
    }

    /// The log now ends at `end`, the last record being at `point`.
    pub fn appended(&mut self, now: Duration, end: LogPosition, point: ExecutionPoint) {
        self.recorded_point = point;
        let full = self.samples.len() >= MAX_SAMPLES;
        if let Some(last) = self.samples.back_mut()
            && (full || now.saturating_sub(last.first) < GRAIN)
        {
            (last.end, last.point, last.last) = (end, point, now);
            return;
        }
        self.samples.push_back(Sample { end, point, first: now, last: now });
    }

    /// The backup has executed the log up to `position`, and has come to `point`.
    pub fn executed(&mut self, now: Duration, position: LogPosition, point: ExecutionPoint) {
        self.executed = self.executed.max(position);
        let mut newest = None;
        while self.samples.front().is_some_and(|sample| sample.end <= self.executed) {
            newest = self.samples.pop_front();
        }
        if let Some(sample) = newest {
            self.lags.add(now.saturating_sub(sample.last));
        }
        self.executed_point = self.executed_point.max(point);
        self.measure_rate(now);
    }

    fn measure_rate(&mut self, now: Duration) {
        let busy = !self.samples.is_empty();
        match self.busy_from {
            Some((since, from)) if busy => {
                let elapsed = now.saturating_sub(since);
                if elapsed >= RATE_PERIOD {
                    let instructions = (self.executed_point.0 - from.0) as f64;
                    let measured = (instructions / elapsed.as_secs_f64()).max(1.0);
                    self.rate = Some(self.rate.map_or(measured, |rate| (rate + measured) / 2.0));
                    self.busy_from = Some((now, self.executed_point));
                }
            }
            _ => self.busy_from = busy.then_some((now, self.executed_point)),
        }
    }

    /// How long the backup will take for what it has not executed.
    fn ahead(&self) -> Duration {
        match (self.rate, self.samples.is_empty()) {
            (Some(rate), false) => {
                let left = self.recorded_point.0.saturating_sub(self.executed_point.0) as f64;
                Duration::from_secs_f64((left / rate).min(3600.0))
            }
            _ => Duration::ZERO,
        }
    }

    /// The lag now: the age of the oldest record not executed; zero when all were.
    pub fn lag(&self, now: Duration) -> Duration {
        match self.samples.front() {
            Some(sample) => now.saturating_sub(sample.first),
            None => Duration::ZERO,
        }
    }

    /// The lags measured.
    pub fn lags(&self) -> Percentiles {
        self.lags.percentiles()
    }

    /// Runs the loop if it is due. `Some` if the throttle changed: the fraction of time, 0 to 1, that
    /// the primary's vCPU should not run.
    pub fn control(&mut self, now: Duration) -> Option<f64> {
        if now < self.next {
            return None;
        }
        self.next = now + PERIOD;
        let before = self.throttle;
        let ratio = self.lag(now).max(self.ahead()).as_secs_f64() / self.max_lag.as_secs_f64();
        self.throttle = if ratio >= 1.0 {
            1.0
        } else if ratio > 0.5 {
            (self.throttle.min(MAX_THROTTLE) + 0.1 * (ratio - 0.4)).min(MAX_THROTTLE)
        } else if ratio < 0.3 {
            let eased = self.throttle.min(MAX_THROTTLE) * 0.9 - 0.002;
            if eased < 0.005 { 0.0 } else { eased }
        } else {
            self.throttle.min(MAX_THROTTLE)
        };
        (self.throttle != before).then_some(self.throttle)
    }

    /// When [`LagControl::control`] is due.
    pub fn deadline(&self) -> Duration {
        self.next
    }

    /// The fraction taken now.
    pub fn throttle(&self) -> f64 {
        self.throttle
    }

    /// The newest recorded point that lies in the log before `position`, as far as it is still known.
    pub fn point_before(&self, position: LogPosition) -> Option<ExecutionPoint> {
        self.samples.iter().rev().find(|sample| sample.end <= position).map(|sample| sample.point)
    }
}
