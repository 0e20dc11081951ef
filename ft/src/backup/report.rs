//! What a backup shows of itself.

use super::Backup;
use super::state::State;
use crate::Generation;
use crate::status::FtStatus;

impl Backup {
    /// Fills in what this side knows.
    pub fn status(&self, status: &mut FtStatus) {
        let generation = self.terms.as_ref().map_or(Generation(0), |terms| terms.generation);
        let (generation, reason) = match &self.state {
            State::Live { generation, reason } => (*generation, Some(reason.clone())),
            State::Discarded { reason } => (generation, Some(reason.clone())),
            State::TakingOver(take) => {
                (generation, Some(take.unreachable.clone().unwrap_or(take.failover.cause.clone())))
            }
            _ => (generation, None),
        };
        status.role = match self.state {
            State::Live { .. } => "alone".into(),
            _ => "backup".into(),
        };
        status.state = self.state_name().into();
        status.mode = "lockstep".into();
        status.pair = self.terms.as_ref().map(|terms| terms.pair.to_string());
        status.generation = generation.0;
        status.peer = self.peer.clone();
        status.arbiter_url = self.terms.as_ref().map(|terms| terms.arbiter_url.clone());
        status.reason = reason;
        status.log.executed_point = self.executed_point.0;
        status.log.acknowledged_bytes = self.received.0;
        status.log.executed_bytes = self.executed.0;
        status.digests_compared = self.digests_compared;
        status.digests_unequal = u64::from(self.last_unequal.is_some());
        status.last_unequal.clone_from(&self.last_unequal);
        status.last_failover.clone_from(&self.last_failover);
    }
}
