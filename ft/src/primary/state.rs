//! The states of a primary; each holds what is valid in it.

use std::time::Duration;

use crate::LogPosition;
use crate::status::Failover;

#[derive(Clone, Debug)]
pub(super) enum State {
    Greeting,
    Preparing,
    Copying,
    Settling,
    /// The backup may think itself armed, this side does not know: no longer without a claim, not yet
    /// protected.
    Arming,
    Protected,
    HandingOver(HandingOver),
    Disabling,
    Claiming(Claiming),
    Abandoned {
        reason: String,
    },
    Alone {
        reason: String,
    },
    Halted {
        reason: String,
    },
}

#[derive(Clone, Debug)]
pub(super) enum HandingOver {
    /// The vCPU is to log it.
    Logging,
    /// Logged; waiting until the backup has everything.
    Acknowledging { end: LogPosition },
    /// The backup has everything; waiting for this side's last outputs to have ended.
    Quiescing { end: LogPosition },
    /// The backup has everything and may go live. This side does nothing more, unless it has heard of
    /// no success by `until` and wins the claim.
    Consented { until: Duration },
}

#[derive(Clone, Debug)]
pub(super) struct Claiming {
    /// When to ask again; `None` while an answer is awaited.
    pub retry_at: Option<Duration>,
    /// Why the last answer did not come.
    pub unreachable: Option<String>,
    /// The backup wants to hear when this side's outputs have ended.
    pub yielding: bool,
    /// What the timeline counts from: when the backup was heard last.
    pub zero: Duration,
    /// The timeline so far.
    pub failover: Failover,
}

impl State {
    pub(super) fn name(&self) -> &'static str {
        match self {
            State::Greeting => "greeting",
            State::Preparing => "waiting for the backup to prepare",
            State::Copying => "copying",
            State::Settling => "waiting for the backup to load",
            State::Arming => "arming",
            State::Protected => "protected",
            State::HandingOver(_) => "handing over",
            State::Disabling => "disabling",
            State::Claiming(Claiming { unreachable: Some(_), .. }) => "waiting for arbiter",
            State::Claiming(_) => "claiming",
            State::Abandoned { .. } => "abandoned",
            State::Alone { .. } => "alone",
            State::Halted { .. } => "halted",
        }
    }

    /// The backup does not go live by itself yet.
    pub(super) fn unarmed(&self) -> bool {
        match self {
            State::Greeting | State::Preparing | State::Copying | State::Settling => true,
            State::Arming
            | State::Protected
            | State::HandingOver(_)
            | State::Disabling
            | State::Claiming(_)
            | State::Abandoned { .. }
            | State::Alone { .. }
            | State::Halted { .. } => false,
        }
    }

    /// The backup may go live by a claim, and this side has made none.
    pub(super) fn armed(&self) -> bool {
        match self {
            State::Arming | State::Protected | State::HandingOver(_) | State::Disabling => true,
            State::Greeting
            | State::Preparing
            | State::Copying
            | State::Settling
            | State::Claiming(_)
            | State::Abandoned { .. }
            | State::Alone { .. }
            | State::Halted { .. } => false,
        }
    }

    pub(super) fn ended(&self) -> bool {
        match self {
            State::Abandoned { .. } | State::Alone { .. } | State::Halted { .. } => true,
            State::Greeting
            | State::Preparing
            | State::Copying
            | State::Settling
            | State::Arming
            | State::Protected
            | State::HandingOver(_)
            | State::Disabling
            | State::Claiming(_) => false,
        }
    }

    pub(super) fn claiming(&self) -> bool {
        matches!(self, State::Claiming(_))
    }

    pub(super) fn consented(&self) -> bool {
        matches!(self, State::HandingOver(HandingOver::Consented { .. }))
    }

    /// Log is written, and may be acknowledged and executed.
    pub(super) fn logs(&self) -> bool {
        matches!(self, State::Settling) || self.armed()
    }

    /// Outputs that are acknowledged may leave.
    pub(super) fn releases(&self) -> bool {
        let handed_over = matches!(
            self,
            State::HandingOver(HandingOver::Quiescing { .. } | HandingOver::Consented { .. })
        );
        self.logs() && !handed_over
    }

    /// The backup executes and can be waited for. While it loads it executes nothing, and only the
    /// bound on the log buffer holds.
    pub(super) fn measures_lag(&self) -> bool {
        self.armed()
            && match self {
                State::HandingOver(step) => matches!(step, HandingOver::Logging),
                _ => true,
            }
    }
}
