//! What the backup says, and what a primary makes of it.

use std::time::Duration;

use super::state::State;
use super::{Action, Primary};
use crate::digest::MEMORY;
use crate::message::{CloneStart, HELLO_MAGIC, Hello, Message};
use crate::terms::same_host_refusal;
use crate::{DiskReads, LogPosition, PROTOCOL_VERSION, clip};

impl Primary {
    pub(super) fn message(&mut self, now: Duration, message: Message, actions: &mut Vec<Action>) {
        let state = &self.state;
        match message {
            Message::Heartbeat { stamp_us, echo_us } => {
                self.peer_stamp_us = Some(stamp_us);
                if let Some(echo_us) = echo_us {
                    // A peer cannot have heard what was not yet said.
                    let sent = Duration::from_micros(echo_us).min(now);
                    let until = sent + self.config.terms.timing.lease();
                    self.lease_until = self.lease_until.max(until);
                }
            }
            Message::Hello(hello) if matches!(state, State::Greeting) => {
                self.greeted(hello, actions);
            }
            Message::Refused { reason } if state.unarmed() => {
                self.abandon(format!("the backup refused: {}", clip(&reason)), actions);
            }
            Message::Accepted if matches!(state, State::Preparing) => {
                actions.push(Action::StartClone);
                self.change(State::Copying, None, actions);
            }
            Message::RoundTaken { round } if matches!(state, State::Copying) => {
                actions.push(Action::RoundTaken { round });
            }
            Message::DiskDiffers { disk, first, differing } if matches!(state, State::Copying) => {
                actions.push(Action::DiskDiffers { disk, first, differing });
            }
            Message::Ready if matches!(state, State::Settling) => {
                self.detector.set_timeout(now, self.config.terms.timing.failure_timeout());
                actions.push(Action::Send(Message::Armed));
                self.change(State::Arming, None, actions);
            }
            Message::Protecting if matches!(state, State::Arming) => {
                actions.push(Action::Protected);
                self.change(State::Protected, None, actions);
            }
            // Protection was ended before it had quite begun, or the backup was suspected.
            Message::Protecting if matches!(state, State::Disabling) || state.claiming() => {}
            Message::Ack { received } if state.logs() || state.claiming() => {
                self.acknowledge(now, received, actions);
            }
            Message::Executed { point, position, digests_compared }
                if state.logs() || state.claiming() =>
            {
                if position > self.appended {
                    return self.violation(now, "executed what was not yet recorded", actions);
                }
                if position > self.executed && self.config.terms.disk_reads == DiskReads::Backup {
                    actions.push(Action::BackupExecuted { position });
                }
                self.executed = self.executed.max(position);
                self.executed_point = self.executed_point.max(point);
                self.digests_compared = digests_compared;
                self.lag.executed(now, position, self.executed_point);
            }
            Message::DigestUnequal { point, mut unequal, pages } => {
                unequal.component = clip(&unequal.component);
                let memory = unequal.component == MEMORY;
                unequal.page = memory.then(|| self.digests.first_unequal(point, &pages)).flatten();
                let cause = format!("the backup's {unequal} differs");
                self.last_unequal = Some(unequal.clone());
                actions.push(Action::Diverged { point, unequal });
                self.given_up(now, cause, actions);
            }
            Message::Discarded { reason } => {
                self.given_up(now, format!("the backup gave up: {}", clip(&reason)), actions);
            }
            // What was consented to; that it is live follows.
            Message::TakenOver { .. } if state.consented() => {}
            Message::TakenOver { .. } if state.armed() => {
                // This side does nothing more by itself; but the arbiter has the last word.
                self.claim(now, "the backup says that it has taken over".into(), actions);
                self.yield_to_backup(actions);
            }
            Message::TakenOver { .. } if state.claiming() => self.yield_to_backup(actions),
            Message::Live { generation } if state.consented() => {
                self.halt(format!("handed over; generation {generation} is live"), actions);
            }
            // The arbiter's answer is on its way and says the same.
            Message::Live { .. } if state.claiming() => {}
            Message::Hello(_)
            | Message::Refused { .. }
            | Message::Accepted
            | Message::Ready
            | Message::Protecting
            | Message::Ack { .. }
            | Message::Executed { .. }
            | Message::TakenOver { .. }
            | Message::Live { .. }
            | Message::CloneStart(_)
            | Message::Payload { .. }
            | Message::Pages { .. }
            | Message::ZeroPages { .. }
            | Message::DiskHashes { .. }
            | Message::DiskDiffers { .. }
            | Message::DiskData { .. }
            | Message::DiskZeroes { .. }
            | Message::RoundEnd { .. }
            | Message::RoundTaken { .. }
            | Message::State { .. }
            | Message::Armed
            | Message::Log { .. }
            | Message::HandOver { .. }
            | Message::Yielded
            | Message::Disable { .. } => {
                let what = format!("sent {} out of turn", message.name());
                self.violation(now, &what, actions);
            }
        }
    }

    fn greeted(&mut self, hello: Hello, actions: &mut Vec<Action>) {
        if hello.magic != HELLO_MAGIC {
            return self.abandon("the backup's address answers, but not as a Dyad".into(), actions);
        }
        if hello.version != PROTOCOL_VERSION {
            let theirs = hello.version;
            return self.abandon(
                format!(
                    "the backup speaks protocol version {theirs}, this side {PROTOCOL_VERSION}: \
                     run the same Dyad on both hosts"
                ),
                actions,
            );
        }
        let lacking = hello.capabilities.lacking(&self.config.capabilities);
        if !lacking.is_empty() {
            return self.abandon(clip(&lacking.join("; ")), actions);
        }
        if hello.who == self.config.who {
            return self.abandon("the backup is this very process".into(), actions);
        }
        let ours = &self.config.capabilities;
        if hello.capabilities.same_host(ours) && !self.config.terms.same_host {
            return self.abandon(same_host_refusal(&ours.host), actions);
        }
        self.peer = Some(clip(&hello.who));
        actions.push(Action::Send(Message::CloneStart(CloneStart {
            terms: self.config.terms.clone(),
            config: self.config.vm_config.clone(),
        })));
        self.change(State::Preparing, None, actions);
    }

    fn acknowledge(&mut self, now: Duration, received: LogPosition, actions: &mut Vec<Action>) {
        if received > self.appended {
            return self.violation(now, "acknowledged what was not yet recorded", actions);
        }
        self.acknowledged = self.acknowledged.max(received);
        if let Some(point) = self.lag.point_before(self.acknowledged) {
            self.acknowledged_point = self.acknowledged_point.max(point);
        }
    }

    fn yield_to_backup(&mut self, actions: &mut Vec<Action>) {
        if let State::Claiming(claiming) = &mut self.state {
            claiming.yielding = true;
            actions.push(Action::Quiesce);
        }
    }

    /// The backup's word that it never goes live.
    fn given_up(&mut self, now: Duration, cause: String, actions: &mut Vec<Action>) {
        if self.state.unarmed() {
            self.abandon(cause, actions);
        } else {
            self.alone_by_consent(now, cause, actions);
        }
    }
}
