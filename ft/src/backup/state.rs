//! The states of a backup; each holds what is valid in it.

use std::time::Duration;

use crate::status::Failover;
use crate::{Generation, LogPosition};

#[derive(Clone, Debug)]
pub(super) enum State {
    Greeting,
    Waiting,
    Deciding,
    Receiving,
    Loading,
    Settling,
    Replaying,
    TakingOver(TakeOver),
    Live { generation: Generation, reason: String },
    Discarded { reason: String },
}

/// Why a backup takes over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cause {
    /// The primary was not heard, the connection stands. It may be heard again.
    Silent,
    /// The connection is gone.
    Lost,
    /// The primary wants it.
    HandOver,
    /// The operator wants it.
    Forced,
}

#[derive(Clone, Debug)]
pub(super) enum Asked {
    No,
    /// An answer is awaited.
    Waiting,
    /// The arbiter could not be reached.
    RetryAt(Duration),
    Won,
}

#[derive(Clone, Debug)]
pub(super) struct TakeOver {
    pub cause: Cause,
    /// The end of the log when it began, or when the arbiter was out of reach last.
    pub from: LogPosition,
    pub asked: Asked,
    /// The arbiter has been asked, and may have answered even if the answer has not come: this side may have won.
    pub in_doubt: bool,
    /// Why the arbiter's last answer did not come.
    pub unreachable: Option<String>,
    /// The primary has been told that the claim is won.
    pub told: bool,
    /// The primary said that it releases nothing more.
    pub yielded: bool,
    /// It can release nothing more: it said so, or its lease has run out.
    pub fenced: bool,
    /// What the timeline counts from.
    pub zero: Duration,
    /// The timeline so far.
    pub failover: Failover,
}

impl TakeOver {
    /// Whether this side is a backup as before: an operator wants it to take over from a primary that may be well, and it
    /// does not know that it may. So a lost claim costs nothing, nor does an arbiter that is out of reach.
    fn follows(&self) -> bool {
        self.cause == Cause::Forced && !matches!(self.asked, Asked::Won)
    }

    /// Whether the VM is still left to a primary that may be well if this side gives up. Once the arbiter has been asked,
    /// the primary may be about to learn that it has lost.
    fn can_be_left(&self) -> bool {
        self.cause == Cause::Forced && !self.in_doubt
    }
}

impl State {
    pub(super) fn name(&self) -> &'static str {
        match self {
            State::Greeting => "greeting",
            State::Waiting => "waiting for the primary",
            State::Deciding => "preparing",
            State::Receiving => "receiving",
            State::Loading => "loading",
            State::Settling => "waiting to be armed",
            State::Replaying => "replaying",
            State::TakingOver(take) => match take.asked {
                Asked::No if take.unreachable.is_none() => "draining",
                Asked::Waiting if take.unreachable.is_none() => "claiming",
                Asked::No | Asked::Waiting | Asked::RetryAt(_) => "waiting for arbiter",
                Asked::Won => "claimed",
            },
            State::Live { .. } => "live",
            State::Discarded { .. } => "discarded",
        }
    }

    pub(super) fn ended(&self) -> bool {
        matches!(self, State::Live { .. } | State::Discarded { .. })
    }

    pub(super) fn takes_log(&self) -> bool {
        match self {
            State::Loading | State::Settling | State::Replaying => true,
            State::TakingOver(take) => take.follows(),
            _ => false,
        }
    }

    /// Whether this side may give itself up for want of a disk: somebody else has the VM then.
    pub(super) fn can_be_left(&self) -> bool {
        match self {
            State::TakingOver(take) => take.can_be_left(),
            _ => !self.ended(),
        }
    }

    pub(super) fn executes(&self) -> bool {
        matches!(self, State::Settling | State::Replaying | State::TakingOver(_))
    }

    /// Whether the primary's heartbeats are echoed, which renews its lease. A side that takes over
    /// stops.
    pub(super) fn renews_lease(&self) -> bool {
        match self {
            State::TakingOver(take) => take.follows(),
            _ => !self.ended(),
        }
    }

    /// Whether this side still says that it is there. One that takes over from a primary that it does
    /// not hear keeps quiet: if that primary lives after all, it shall suspect and claim in its turn.
    pub(super) fn beats(&self) -> bool {
        match self {
            State::TakingOver(take) => match take.cause {
                Cause::HandOver => true,
                Cause::Forced => !take.told,
                Cause::Silent | Cause::Lost => false,
            },
            _ => !self.ended(),
        }
    }
}
