//! The states of a backup; each holds what is valid in it.

use std::time::Duration;

use crate::Generation;
use crate::status::Failover;

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
    pub asked: Asked,
    /// Why the arbiter's last answer did not come.
    pub unreachable: Option<String>,
    /// The primary said that it releases nothing more.
    pub yielded: bool,
    /// It can release nothing more: it said so, or its lease has run out.
    pub fenced: bool,
    /// What the timeline counts from.
    pub zero: Duration,
    /// The timeline so far.
    pub failover: Failover,
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
                Asked::No => "draining",
                Asked::Waiting if take.unreachable.is_none() => "claiming",
                Asked::Waiting | Asked::RetryAt(_) => "waiting for arbiter",
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
        matches!(self, State::Loading | State::Settling | State::Replaying)
    }

    pub(super) fn executes(&self) -> bool {
        matches!(self, State::Settling | State::Replaying | State::TakingOver(_))
    }

    /// Whether the primary's heartbeats are echoed, which renews its lease. A side that takes over
    /// stops; when an operator forces it, only once the claim is won, so that a lost claim has cost
    /// nothing.
    pub(super) fn renews_lease(&self) -> bool {
        match self {
            State::TakingOver(take) => {
                take.cause == Cause::Forced && !matches!(take.asked, Asked::Won)
            }
            _ => !self.ended(),
        }
    }

    /// Whether this side still says that it is there. One that takes over from a primary that it does
    /// not hear keeps quiet: if that primary lives after all, it shall suspect and claim in its turn.
    pub(super) fn beats(&self) -> bool {
        match self {
            State::TakingOver(take) => match take.cause {
                Cause::HandOver => true,
                Cause::Forced => !matches!(take.asked, Asked::Won),
                Cause::Silent | Cause::Lost => false,
            },
            _ => !self.ended(),
        }
    }
}
