//! What a primary shows of itself.

use std::time::Duration;

use super::Primary;
use super::state::State;
use crate::micros;
use crate::status::FtStatus;

impl Primary {
    /// Fills in what this side knows.
    pub fn status(&self, now: Duration, status: &mut FtStatus) {
        let terms = &self.config.terms;
        let (generation, reason) = match &self.state {
            State::Alone { reason } => (terms.generation.next(), Some(reason.clone())),
            State::Abandoned { reason } | State::Halted { reason } => {
                (terms.generation, Some(reason.clone()))
            }
            State::Claiming(claiming) => (
                terms.generation,
                Some(claiming.unreachable.clone().unwrap_or(claiming.failover.cause.clone())),
            ),
            _ => (terms.generation, None),
        };
        status.role = match self.state {
            State::Alone { .. } => "alone".into(),
            _ => "primary".into(),
        };
        status.state = self.state_name().into();
        status.mode = "lockstep".into();
        status.pair = Some(terms.pair.to_string());
        status.generation = generation.0;
        status.peer = self.peer.clone();
        status.arbiter_url = Some(terms.arbiter_url.clone());
        status.reason = reason;
        status.log.recorded_point = self.recorded_point.0;
        status.log.acknowledged_point = self.acknowledged_point.0;
        status.log.executed_point = self.executed_point.0;
        status.log.recorded_bytes = self.appended.0;
        status.log.acknowledged_bytes = self.acknowledged.0;
        status.log.executed_bytes = self.executed.0;
        status.lag_us = if self.ended() { 0 } else { micros(self.lag.lag(now)) };
        status.lag = self.lag.lags();
        status.throttle = if self.ended() { 0.0 } else { self.lag.throttle() };
        status.throttled_us = micros(self.lag.taken());
        status.stalled = self.stalled;
        status.stalls = self.stalls;
        status.digests_compared = self.digests_compared;
        status.digests_unequal = u64::from(self.last_unequal.is_some());
        status.last_unequal.clone_from(&self.last_unequal);
        status.last_failover.clone_from(&self.last_failover);
    }
}
