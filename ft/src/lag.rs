//! Lag: host time from the primary recording a point to the backup having executed it. It is the
//! time that a failover takes beyond detection, so it is kept small: a feedback loop takes CPU
//! time from the primary while lag is large and gives it back after.
//!
//! Measured on the primary's clock alone: when a position was appended, and when the backup's report
//! of having executed it arrived. It includes the way there and back, and so errs on the safe side; the few
//! milliseconds that records without an output are collected before they are appended here it leaves out.
//!
//! What is measured is old news: when a slow backup reports that a record took 100 ms, those behind it
//! will take longer still. So the loop acts on what is coming: the time that the primary ran for what the
//! backup has not executed, by the backup's speed, which is how much of that it executes in a second.
//! Instructions would be no measure: some take ten times as long as others, on both sides alike.
//!
//! What is taken is proportional to that and has no memory. A guest that never rests, on two hosts of the
//! same speed, keeps every delay that its backup ever had, so its lag rises until a little is taken: just what
//! the backup lacks, for a backup with something to execute never idles. When the reason is gone, so is
//! the throttle.

use std::collections::VecDeque;
use std::time::Duration;

use crate::{ExecutionPoint, Histogram, LogPosition, Percentiles};

/// The loop acts no more often than this.
const LEAST_PERIOD: Duration = Duration::from_millis(5);

/// The loop acts so often when nothing is heard: else it does with what is heard, without a wake-up of its own.
const PERIOD: Duration = Duration::from_millis(20);

/// The part of `max_lag` up to which nothing is taken. A few times what is collected before it is sent: a
/// backup that keeps up must not be short of work between two pieces of log, nor because its processor was the
/// slower one for a moment and is the faster one now.
const FREE: f64 = 0.3;

/// The part of `max_lag` at which the primary stands still. What it has recorded by then is executed within
/// `max_lag` even if the speed was overestimated a little.
const FULL: f64 = 0.8;

/// Samples kept; older neighbours are merged beyond.
const MAX_SAMPLES: usize = 4096;

/// Appends closer than this share a sample.
const GRAIN: Duration = Duration::from_micros(200);

/// Reports closer than this say little about the speed: there are milliseconds from record to record.
const SPEED_PERIOD: Duration = Duration::from_millis(6);

/// A primary that runs must append more often than this: one that took longer counts as idle in between, which takes
/// a backup no time.
pub const LONGEST_RUN: Duration = Duration::from_millis(10);

/// A backup that stands still is taken to be so fast.
const LEAST_SPEED: f64 = 0.001;

#[derive(Clone, Copy, Debug)]
struct Sample {
    end: LogPosition,
    mark: Mark,
    first: Duration,
    last: Duration,
}

/// A point, and for how long the primary had run when it came there.
#[derive(Clone, Copy, Debug, Default)]
struct Mark {
    point: ExecutionPoint,
    ran: Duration,
}

/// Measures lag and answers with a throttle.
#[derive(Clone, Debug)]
pub struct LagControl {
    max_lag: Duration,
    samples: VecDeque<Sample>,
    /// When the log grew last.
    appended: Duration,
    recorded: Mark,
    executed: LogPosition,
    executed_point: ExecutionPoint,
    /// The last sample that was executed whole.
    behind: Mark,
    /// Since when the backup has had something to execute all the time, and what it had executed then, as time
    /// that the primary ran for it.
    busy_from: Option<(Duration, Duration)>,
    /// For how long the primary ran for what the backup executes in one unit of time.
    speed: f64,
    lags: Histogram,
    throttle: f64,
    /// Time taken so far.
    taken: Duration,
    /// When the loop acted last.
    acted: Duration,
}

impl LagControl {
    /// Keeps lag below `max_lag`.
    pub fn new(now: Duration, max_lag: Duration) -> Self {
        Self {
            max_lag,
            samples: VecDeque::new(),
            appended: now,
            recorded: Mark::default(),
            executed: LogPosition(0),
            executed_point: ExecutionPoint(0),
            behind: Mark::default(),
            busy_from: None,
            speed: 1.0,
            lags: Histogram::default(),
            throttle: 0.0,
            taken: Duration::ZERO,
            acted: now,
        }
    }

    /// The log now ends at `end`, the last record being at `point`.
    pub fn appended(&mut self, now: Duration, end: LogPosition, point: ExecutionPoint) {
        let elapsed = now.saturating_sub(self.appended).min(LONGEST_RUN);
        self.appended = now;
        self.recorded.point = point;
        self.recorded.ran += elapsed.mul_f64(1.0 - self.throttle);
        let full = self.samples.len() >= MAX_SAMPLES;
        if let Some(last) = self.samples.back_mut()
            && (full || now.saturating_sub(last.first) < GRAIN)
        {
            (last.end, last.mark, last.last) = (end, self.recorded, now);
            return;
        }
        self.samples.push_back(Sample { end, mark: self.recorded, first: now, last: now });
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
            self.behind = sample.mark;
        }
        self.executed_point = self.executed_point.max(point);
        self.measure_speed(now);
    }

    fn measure_speed(&mut self, now: Duration) {
        let executed = self.executed_ran();
        if self.samples.is_empty() {
            // Whoever has caught up is not slower.
            self.speed = self.speed.max(1.0);
            self.busy_from = None;
            return;
        }
        let (since, from) = *self.busy_from.get_or_insert((now, executed));
        let elapsed = now.saturating_sub(since);
        if elapsed >= SPEED_PERIOD {
            let ran = executed.saturating_sub(from);
            let measured = ran.as_secs_f64() / elapsed.as_secs_f64();
            self.speed = ((self.speed + measured) / 2.0).max(LEAST_SPEED);
            self.busy_from = Some((now, executed));
        }
    }

    /// For how long the primary ran for what the backup has executed.
    fn executed_ran(&self) -> Duration {
        let Some(Sample { mark: next, .. }) = self.samples.front() else {
            return self.recorded.ran;
        };
        let behind = self.behind;
        let instructions = next.point.0.saturating_sub(behind.point.0).max(1) as f64;
        let executed = self.executed_point.0.saturating_sub(behind.point.0) as f64;
        behind.ran + (next.ran - behind.ran).mul_f64((executed / instructions).min(1.0))
    }

    /// How long the backup will take for what it has not executed.
    fn ahead(&self) -> Duration {
        let left = self.recorded.ran - self.executed_ran();
        left.div_f64(self.speed)
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

    /// Runs the loop if it may run again. `Some` if the throttle changed: the fraction of time, 0 to 1, that
    /// the primary's vCPU should not run; at 1 it stands still.
    pub fn control(&mut self, now: Duration) -> Option<f64> {
        if now < self.acted + LEAST_PERIOD {
            return None;
        }
        let before = self.throttle;
        self.taken += now.saturating_sub(self.acted).mul_f64(before);
        self.acted = now;
        let part = self.lag(now).max(self.ahead()).as_secs_f64() / self.max_lag.as_secs_f64();
        let throttle = ((part - FREE) / (FULL - FREE)).clamp(0.0, 1.0);
        // Steps of a hundredth: whoever is told should not be told of nothing.
        self.throttle = (throttle * 100.0).round() / 100.0;
        (self.throttle != before).then_some(self.throttle)
    }

    /// Takes nothing any more. Whether anything was taken.
    pub fn release(&mut self) -> bool {
        std::mem::take(&mut self.throttle) != 0.0
    }

    /// When [`LagControl::control`] is due at the latest.
    pub fn deadline(&self) -> Duration {
        self.acted + PERIOD
    }

    /// The fraction taken now.
    pub fn throttle(&self) -> f64 {
        self.throttle
    }

    /// The time taken from the primary since the beginning.
    pub fn taken(&self) -> Duration {
        self.taken
    }

    /// The newest recorded point that lies in the log before `position`, as far as it is still known.
    pub fn point_before(&self, position: LogPosition) -> Option<ExecutionPoint> {
        self.samples
            .iter()
            .rev()
            .find(|sample| sample.end <= position)
            .map(|sample| sample.mark.point)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    /// A primary that records 1000 instructions and 10 bytes in a millisecond it is allowed to run, and a
    /// backup that executes `speed` of that. Gives the worst lag and the throttle at the end.
    fn run(
        control: &mut LagControl,
        from: u64,
        to: u64,
        backlog: &mut f64,
        speed: f64,
    ) -> Duration {
        let mut worst = ms(0);
        for now in from..to {
            let recorded = control.recorded.point.0 + (1000.0 * (1.0 - control.throttle())) as u64;
            control.appended(ms(now), LogPosition(recorded / 100), ExecutionPoint(recorded));
            *backlog = (*backlog + 1000.0 * speed).min(recorded as f64);
            let point = *backlog as u64;
            control.executed(ms(now), LogPosition(point / 100), ExecutionPoint(point));
            control.control(ms(now));
            worst = worst.max(control.lag(ms(now)));
        }
        worst
    }

    #[test]
    fn a_backup_that_keeps_up_costs_nothing() {
        let mut control = LagControl::new(ms(0), ms(100));
        assert!(run(&mut control, 0, 2_000, &mut 0.0, 1.2) < ms(5));
        assert_eq!(control.throttle(), 0.0);
        assert!(control.lags().count > 100);
    }

    #[test]
    fn a_slow_backup_slows_the_primary_until_it_is_fast_again() {
        for speed in [0.9, 0.6, 0.4, 0.2] {
            let mut control = LagControl::new(ms(0), ms(100));
            let mut executed = 0.0;
            run(&mut control, 0, 500, &mut executed, 1.2);
            let worst = run(&mut control, 500, 3_000, &mut executed, speed);
            assert!(worst < ms(100), "speed {speed}: lag reached {worst:?}");
            let lost = (control.throttle() + speed - 1.0).abs();
            assert!(lost < 0.06, "speed {speed}: {} is taken", control.throttle());
            let taken = control.taken();
            run(&mut control, 3_000, 3_500, &mut executed, 1.2);
            assert_eq!(control.throttle(), 0.0);
            assert!(control.taken() - taken < ms(60), "the time is not given back at once");
        }
    }

    #[test]
    fn hiccups_of_a_backup_as_fast_as_its_primary_cost_what_they_last() {
        let mut control = LagControl::new(ms(0), ms(100));
        let mut executed = 0.0;
        let mut worst = ms(0);
        for second in 0..60 {
            let from = second * 1_000;
            worst = worst.max(run(&mut control, from, from + 980, &mut executed, 1.0));
            worst = worst.max(run(&mut control, from + 980, from + 1_000, &mut executed, 0.0));
        }
        assert!(worst < ms(60), "lag reached {worst:?}");
        let share = control.taken().as_secs_f64() / 60.0;
        assert!(share < 0.025, "a backup that lacks 2 % of its time costs {share}");
    }

    #[test]
    fn instructions_that_take_longer_on_both_sides_cost_nothing() {
        let mut control = LagControl::new(ms(0), ms(100));
        // Now fast instructions, now slow ones; the backup does the same 15 ms later.
        let mut points = vec![0_u64];
        for now in 0..2_000_u64 {
            let instructions = if now / 70 % 2 == 0 { 1_000 } else { 50 };
            points.push(points[now as usize] + instructions);
            let (recorded, executed) =
                (points[now as usize], points[now.saturating_sub(15) as usize]);
            control.appended(ms(now), LogPosition(recorded), ExecutionPoint(recorded));
            control.executed(ms(now), LogPosition(executed), ExecutionPoint(executed));
            control.control(ms(now));
        }
        assert!(control.taken() < ms(10), "{:?} were taken", control.taken());
    }

    #[test]
    fn a_backup_that_stands_still_stops_the_primary() {
        let mut control = LagControl::new(ms(0), ms(100));
        let mut executed = 0.0;
        run(&mut control, 0, 200, &mut executed, 1.0);
        run(&mut control, 200, 400, &mut executed, 0.0);
        assert_eq!(control.throttle(), 1.0);
    }

    #[test]
    fn nothing_outstanding_is_no_lag() {
        let mut control = LagControl::new(ms(0), ms(100));
        control.appended(ms(5), LogPosition(10), ExecutionPoint(7));
        assert_eq!(control.lag(ms(25)), ms(20));
        assert_eq!(control.point_before(LogPosition(10)), Some(ExecutionPoint(7)));
        control.executed(ms(25), LogPosition(10), ExecutionPoint(7));
        assert_eq!(control.lag(ms(90)), ms(0));
        assert_eq!(control.lags().max_us, 20_000);
    }
}
