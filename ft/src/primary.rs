//! The primary's side of the protocol, as a state machine: inputs and the time in, actions out.
//!
//! ```text
//!  Greeting ─Hello─▶ Preparing ─Accepted─▶ Copying ─CloneSent─▶ Settling ─Ready─▶ Protected
//!     │                 │                     │                    │               │ │ │ │
//!     └─────────────────┴───── any failure ───┴────────────────────┘               │ │ │ │
//!                                   ▼                                              │ │ │ │
//!                               Abandoned (not armed: nothing to claim)            │ │ │ │
//!                                                                                  │ │ │ │
//!  Protected ─ peer silent, connection lost, peer has taken over ─▶ Claiming ◀─────┘ │ │ │
//!  Protected ─ HandOver ─▶ HandingOver ─ peer lives ─▶ Halted          │             │ │ │
//!                             └─ peer lost ─▶ Claiming                 │             │ │ │
//!  Protected ─ Disable ─▶ Disabling ─ Discarded ─▶ Alone               │             │ │ │
//!                             └─ peer lost ─▶ Claiming                 │             │ │ │
//!  Protected ─ peer's guest differs, peer gives up ─▶ Alone ◀─ won ────┤
//!                                                   Halted ◀─ lost ────┘
//!                                       (arbiter out of reach: ask again, for ever)
//! ```
//!
//! What must hold:
//! - Outputs are released only as far as they are acknowledged, only while the lease holds, and never
//!   while claiming. The lease counts from when this side *sent* the heartbeat that the peer echoed;
//!   an acknowledgement read after this host was frozen therefore releases nothing.
//! - From `Armed` on, this side goes on alone only by a won claim or by the peer's word that it never
//!   goes live. Before, the peer never goes live by itself, so no claim is needed.
//! - Whoever loses the claim halts for good.

use std::time::Duration;

use crate::arbiter::Claim;
use crate::detector::Detector;
use crate::lag::LagControl;
use crate::message::{CloneStart, Hello, Message};
use crate::status::{Failover, FtStatus};
use crate::{
    Capabilities, ExecutionPoint, Generation, LogPosition, PROTOCOL_VERSION, PairId, Terms,
    Unequal, clip, micros,
};

/// What a primary is started with.
#[derive(Clone, Debug)]
pub struct PrimaryConfig {
    /// How the pair works. Checked before: see [`crate::Timing::check`].
    pub terms: Terms,
    /// This process, as no other is named, ever: what it claims with.
    pub who: String,
    /// What the VM needs of a backup.
    pub capabilities: Capabilities,
    /// The VM's configuration, for the backup's VMM.
    pub vm_config: Vec<u8>,
}

/// What happens to a primary.
#[derive(Clone, Debug)]
pub enum Input {
    /// The peer said something.
    Message(Message),
    /// The connection is gone: refused, reset, closed, or it carried garbage.
    ConnectionLost {
        /// What was seen.
        reason: String,
    },
    /// Time has passed: at [`Primary::next_deadline`] or later.
    Tick,
    /// The whole clone, [`Message::State`] included, is on its way; the vCPU records from there at
    /// log position 0.
    CloneSent,
    /// The clone cannot be made, or the operator wants it no more.
    CloneFailed {
        /// Why.
        reason: String,
    },
    /// The vCPU has recorded this.
    Log {
        /// Where the bytes end; they start where the last ones ended.
        end: LogPosition,
        /// The point of the last record in them.
        point: ExecutionPoint,
        /// Whole records, at most [`crate::message::MAX_CHUNK_BYTES`].
        bytes: Vec<u8>,
    },
    /// The arbiter's answer to [`Action::Claim`].
    ArbiterAnswered(Result<Claim, String>),
    /// The operator wants the backup to take over.
    HandOver,
    /// The vCPU has logged [`crate::Control::HandOver`] as its last record and stands still. The
    /// bytes went in by [`Input::Log`].
    HandOverLogged {
        /// The end of the log.
        end: LogPosition,
    },
    /// The operator wants no more protection, or the VM is at its end.
    Disable {
        /// Why, for the backup's operator.
        reason: String,
    },
}

/// What a primary wants done, in this order.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Send this to the peer.
    Send(Message),
    /// Close the connection once everything is sent.
    HangUp,
    /// Send memory while the guest runs, then pause it, send the rest and the state, start recording,
    /// resume it with outputs going to the gate, and give [`Input::CloneSent`].
    StartClone,
    /// The VM is protected.
    Protected,
    /// Release the outputs up to this position. Each must be started before
    /// [`Primary::lease_until`] as it is at that moment, else wait for the lease to be renewed.
    Release {
        /// The position acknowledged.
        through: LogPosition,
    },
    /// Ask the arbiter, on another thread, and give [`Input::ArbiterAnswered`].
    Claim {
        /// The pair.
        pair: PairId,
        /// The generation that the claim ends.
        generation: Generation,
        /// The claimant.
        who: String,
    },
    /// The clone failed before it counted. Release all outputs, record no more, run as before.
    Abandoned {
        /// Why.
        reason: String,
    },
    /// Run on without a backup: release all outputs, record no more, and resume the vCPU if it stood
    /// still for a hand-over.
    GoAlone {
        /// The generation that this side now lives in.
        generation: Generation,
        /// Why and when.
        failover: Failover,
    },
    /// Stop the guest for good; drop all outputs, also those on their way to back halves.
    Halt {
        /// Why.
        reason: String,
    },
    /// Log [`crate::Control::HandOver`], stop the vCPU there and give [`Input::HandOverLogged`].
    LogHandOver,
    /// Let the vCPU rest for this fraction of time, 0 to 1.
    Throttle(f64),
    /// Stop the vCPU until [`Action::Unstall`]: the log buffers are full.
    Stall,
    /// Let the vCPU run again.
    Unstall,
    /// The peer's guest differs. [`Action::GoAlone`] follows; a fresh copy should be made.
    Diverged {
        /// Where.
        point: ExecutionPoint,
        /// In what.
        unequal: Unequal,
    },
    /// For the log and the event monitor.
    Changed {
        /// The new state.
        state: &'static str,
        /// Why, if there is more to say.
        reason: Option<String>,
    },
}

/// An input that the run loop must not give in this state.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{input} is not possible while the primary is {state}")]
pub struct IllegalInput {
    /// The input.
    pub input: &'static str,
    /// The state.
    pub state: &'static str,
}

#[derive(Clone, Debug)]
enum State {
    Greeting,
    Preparing,
    Copying,
    Settling,
    Protected,
    HandingOver(HandingOver),
    Disabling,
    Claiming(Claiming),
    Abandoned { reason: String },
    Alone { reason: String },
    Halted { reason: String },
}

#[derive(Clone, Debug)]
enum HandingOver {
    /// The vCPU is to log it.
    Logging,
    /// Logged; waiting until the backup has everything.
    Acknowledging { end: LogPosition },
    /// The backup has everything and may go live; this side may do nothing more.
    Consented,
}

#[derive(Clone, Debug)]
struct Claiming {
    /// When to ask again; `None` while an answer is awaited.
    retry_at: Option<Duration>,
    /// Why the last answer did not come.
    unreachable: Option<String>,
    failover: Failover,
}

/// The primary's state machine.
#[derive(Clone, Debug)]
pub struct Primary {
    config: PrimaryConfig,
    state: State,
    connected: bool,
    peer: Option<String>,
    detector: Detector,
    next_heartbeat: Duration,
    peer_stamp_us: Option<u64>,
    /// Until when outputs may be released; zero before the first echo.
    lease_until: Duration,
    appended: LogPosition,
    acknowledged: LogPosition,
    executed: LogPosition,
    released: LogPosition,
    recorded_point: ExecutionPoint,
    acknowledged_point: ExecutionPoint,
    executed_point: ExecutionPoint,
    lag: LagControl,
    stalled: bool,
    stalls: u64,
    digests_compared: u64,
    last_unequal: Option<Unequal>,
    last_failover: Option<Failover>,
}

impl Primary {
    /// Starts on a fresh connection; the first actions are its greeting.
    ///
    /// `now`, here and in [`Primary::step`], is of a clock that counts while the host sleeps
    /// (`CLOCK_BOOTTIME`), read after the input was received.
    pub fn new(now: Duration, config: PrimaryConfig, actions: &mut Vec<Action>) -> Self {
        let timing = config.terms.timing;
        let greeting = Hello::new(config.who.clone(), config.capabilities.clone());
        actions.push(Action::Send(Message::Hello(greeting)));
        Self {
            state: State::Greeting,
            connected: true,
            peer: None,
            detector: Detector::new(now, timing.clone_timeout()),
            next_heartbeat: now,
            peer_stamp_us: None,
            lease_until: Duration::ZERO,
            appended: LogPosition(0),
            acknowledged: LogPosition(0),
            executed: LogPosition(0),
            released: LogPosition(0),
            recorded_point: ExecutionPoint(0),
            acknowledged_point: ExecutionPoint(0),
            executed_point: ExecutionPoint(0),
            lag: LagControl::new(now, timing.max_lag()),
            stalled: false,
            stalls: 0,
            digests_compared: 0,
            last_unequal: None,
            last_failover: None,
            config,
        }
    }

    /// Takes one input and appends what is to be done.
    pub fn step(
        &mut self,
        now: Duration,
        input: Input,
        actions: &mut Vec<Action>,
    ) -> Result<(), IllegalInput> {
        if self.ended() {
            // Whatever was under way when it ended: a late message, answer or operator.
            return Ok(());
        }
        match input {
            Input::Message(message) => {
                self.detector.heard(now);
                self.message(now, message, actions);
            }
            Input::ConnectionLost { reason } => self.lost(now, reason, actions),
            Input::Tick => {}
            Input::CloneSent => match self.state {
                State::Copying => self.change(State::Settling, None, actions),
                _ => return Err(self.illegal("CloneSent")),
            },
            Input::CloneFailed { reason } => match self.state {
                State::Greeting | State::Preparing | State::Copying | State::Settling => {
                    self.abandon(reason, actions);
                }
                _ => return Err(self.illegal("CloneFailed")),
            },
            Input::Log { end, point, bytes } => self.log(now, end, point, bytes, actions)?,
            Input::ArbiterAnswered(answer) => self.answered(now, answer, actions)?,
            Input::HandOver => match self.state {
                State::Protected => {
                    actions.push(Action::LogHandOver);
                    self.change(State::HandingOver(HandingOver::Logging), None, actions);
                }
                _ => return Err(self.illegal("HandOver")),
            },
            Input::HandOverLogged { end } => match self.state {
                State::HandingOver(HandingOver::Logging) => {
                    let next = State::HandingOver(HandingOver::Acknowledging { end });
                    self.change(next, None, actions);
                }
                // The backup was lost in the meantime; going alone resumes the vCPU.
                State::Claiming(_) => {}
                _ => return Err(self.illegal("HandOverLogged")),
            },
            Input::Disable { reason } => match self.state {
                State::Greeting | State::Preparing | State::Copying | State::Settling => {
                    self.abandon(reason, actions);
                }
                State::Protected => {
                    actions.push(Action::Send(Message::Disable { reason: reason.clone() }));
                    self.change(State::Disabling, Some(reason), actions);
                }
                _ => return Err(self.illegal("Disable")),
            },
        }
        self.time(now, actions);
        self.release(now, actions);
        self.hand_over(actions);
        self.backpressure(actions);
        Ok(())
    }

    /// When [`Input::Tick`] is due; `None` if nothing is ever due again.
    pub fn next_deadline(&self) -> Option<Duration> {
        if self.ended() {
            return None;
        }
        let heartbeat = self.connected.then_some(self.next_heartbeat);
        let other = match &self.state {
            State::Claiming(claiming) => claiming.retry_at,
            _ => Some(self.detector.deadline()),
        };
        let lag = matches!(self.state, State::Protected).then(|| self.lag.deadline());
        [heartbeat, other, lag].into_iter().flatten().min()
    }

    /// Until when outputs may leave this side. The back halves look at it once more right before each
    /// system call. `Duration::MAX` when this side runs alone, `Duration::ZERO` when it has halted
    /// or asks for the claim.
    pub fn lease_until(&self) -> Duration {
        match self.state {
            State::Alone { .. } | State::Abandoned { .. } => Duration::MAX,
            State::Halted { .. }
            | State::Claiming(_)
            | State::HandingOver(HandingOver::Consented) => Duration::ZERO,
            _ => self.lease_until,
        }
    }

    /// The end of the log that the backup has acknowledged.
    pub fn acknowledged(&self) -> LogPosition {
        self.acknowledged
    }

    /// Whether the VM is protected: a failure of this side would not end it.
    pub fn protected(&self) -> bool {
        matches!(self.state, State::Protected)
    }

    /// Whether the machine is at its end: abandoned, alone or halted.
    pub fn ended(&self) -> bool {
        matches!(self.state, State::Abandoned { .. } | State::Alone { .. } | State::Halted { .. })
    }

    /// The state's name.
    pub fn state_name(&self) -> &'static str {
        match &self.state {
            State::Greeting => "greeting",
            State::Preparing => "waiting for the backup to prepare",
            State::Copying => "copying",
            State::Settling => "waiting for the backup to load",
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
        status.stalled = self.stalled;
        status.stalls = self.stalls;
        status.digests_compared = self.digests_compared;
        status.digests_unequal = u64::from(self.last_unequal.is_some());
        status.last_unequal.clone_from(&self.last_unequal);
        status.last_failover.clone_from(&self.last_failover);
    }

    fn message(&mut self, now: Duration, message: Message, actions: &mut Vec<Action>) {
        match (&self.state, message) {
            (_, Message::Heartbeat { stamp_us, echo_us }) => {
                self.peer_stamp_us = Some(stamp_us);
                if let Some(echo_us) = echo_us {
                    // A peer cannot have heard what was not yet said.
                    let sent = Duration::from_micros(echo_us).min(now);
                    let until = sent + self.config.terms.timing.lease();
                    self.lease_until = self.lease_until.max(until);
                }
            }
            (State::Greeting, Message::Hello(hello)) => self.greeted(hello, actions),
            (State::Preparing, Message::Accepted) => {
                actions.push(Action::StartClone);
                self.change(State::Copying, None, actions);
            }
            (State::Greeting | State::Preparing, Message::Refused { reason }) => {
                self.abandon(format!("the backup refused: {}", clip(&reason)), actions);
            }
            (State::Settling, Message::Ready) => {
                self.detector.set_timeout(now, self.config.terms.timing.failure_timeout());
                actions.push(Action::Send(Message::Armed));
                actions.push(Action::Protected);
                self.change(State::Protected, None, actions);
            }
            (
                State::Settling
                | State::Protected
                | State::HandingOver(_)
                | State::Disabling
                | State::Claiming(_),
                Message::Ack { received },
            ) => self.acknowledge(now, received, actions),
            (
                State::Settling
                | State::Protected
                | State::HandingOver(_)
                | State::Disabling
                | State::Claiming(_),
                Message::Executed { point, position, digests_compared },
            ) => {
                if position > self.appended {
                    return self.violation(now, "executed what was not yet recorded", actions);
                }
                self.executed = self.executed.max(position);
                self.executed_point = self.executed_point.max(point);
                self.digests_compared = digests_compared;
                self.lag.executed(now, position);
            }
            (
                State::Protected | State::HandingOver(_) | State::Disabling | State::Claiming(_),
                Message::DigestUnequal { point, unequal },
            ) => {
                let cause = format!("the backup's {} differs", clip(&unequal.component));
                self.last_unequal = Some(unequal.clone());
                actions.push(Action::Diverged { point, unequal });
                self.alone_by_consent(now, cause, actions);
            }
            (
                State::Protected | State::HandingOver(_) | State::Disabling | State::Claiming(_),
                Message::Discarded { reason },
            ) => {
                let cause = format!("the backup is gone: {}", clip(&reason));
                self.alone_by_consent(now, cause, actions);
            }
            (
                State::Greeting | State::Preparing | State::Copying | State::Settling,
                Message::Discarded { reason },
            ) => self.abandon(format!("the backup gave up: {}", clip(&reason)), actions),
            (State::Settling, Message::DigestUnequal { unequal, .. }) => {
                let what = clip(&unequal.component);
                self.abandon(format!("the fresh copy's {what} differs"), actions);
            }
            (
                State::Protected | State::HandingOver(_) | State::Disabling | State::Claiming(_),
                Message::TakenOver { .. },
            ) => {
                // The arbiter has the last word; but this side does nothing more without it.
                actions.push(Action::Send(Message::Yielded));
                if !matches!(self.state, State::Claiming(_)) {
                    self.claim(now, "the backup says that it has taken over".into(), actions);
                }
            }
            (State::HandingOver(HandingOver::Consented), Message::Live { generation }) => {
                self.halt(format!("handed over; generation {generation} is live"), actions);
            }
            // The arbiter's answer is on its way and will say the same.
            (State::Claiming(_), Message::Live { .. }) => {}
            (_, message) => {
                let what = format!("sent {} out of turn", message.name());
                self.violation(now, &what, actions);
            }
        }
    }

    fn greeted(&mut self, hello: Hello, actions: &mut Vec<Action>) {
        if hello.magic != crate::message::HELLO_MAGIC {
            return self.abandon("the backup's address answers, but not as a Dyad".into(), actions);
        }
        if hello.version != PROTOCOL_VERSION {
            let theirs = hello.version;
            return self.abandon(
                format!(
                    "the backup speaks protocol version {theirs}, this side {PROTOCOL_VERSION}: run the same Dyad on both hosts"
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

    fn log(
        &mut self,
        now: Duration,
        end: LogPosition,
        point: ExecutionPoint,
        bytes: Vec<u8>,
        actions: &mut Vec<Action>,
    ) -> Result<(), IllegalInput> {
        if matches!(self.state, State::Greeting | State::Preparing | State::Copying) {
            return Err(self.illegal("Log before CloneSent"));
        }
        let position = self.appended;
        if position.0 + bytes.len() as u64 != end.0 || bytes.len() > crate::message::MAX_CHUNK_BYTES
        {
            return Err(self.illegal("Log with a gap or too long"));
        }
        self.appended = end;
        self.recorded_point = point;
        if !matches!(self.state, State::Claiming(_)) {
            self.lag.appended(now, end, point);
            actions.push(Action::Send(Message::Log { position, bytes }));
        }
        Ok(())
    }

    fn answered(
        &mut self,
        now: Duration,
        answer: Result<Claim, String>,
        actions: &mut Vec<Action>,
    ) -> Result<(), IllegalInput> {
        let retry = now + self.config.terms.timing.claim_retry();
        let State::Claiming(claiming) = &mut self.state else {
            return Err(self.illegal("ArbiterAnswered"));
        };
        match answer {
            Ok(Claim::Won) => {
                let mut failover = claiming.failover.clone();
                failover.claimed_us = Some(micros(now.saturating_sub(self.detector.last_heard())));
                if self.connected {
                    let reason = format!("the primary goes on alone: {}", failover.cause);
                    actions.push(Action::Send(Message::Disable { reason }));
                }
                self.go_alone(now, failover, actions);
            }
            Ok(Claim::Lost { by }) => {
                let cause = claiming.failover.cause.clone();
                self.halt(format!("{cause}; the claim was won by {}", clip(&by)), actions);
            }
            Err(reason) => {
                let first = claiming.unreachable.is_none();
                claiming.unreachable = Some(reason.clone());
                claiming.retry_at = Some(retry);
                if first {
                    actions
                        .push(Action::Changed { state: self.state_name(), reason: Some(reason) });
                }
            }
        }
        Ok(())
    }

    /// Everything that is due by the clock.
    fn time(&mut self, now: Duration, actions: &mut Vec<Action>) {
        if self.ended() {
            return;
        }
        if let State::Claiming(claiming) = &mut self.state {
            if claiming.retry_at.is_some_and(|at| now >= at) {
                claiming.retry_at = None;
                self.ask(actions);
            }
        } else if self.detector.suspects(now) {
            let silence = now.saturating_sub(self.detector.last_heard());
            self.lost(now, format!("silent for {} ms", silence.as_millis()), actions);
        } else if matches!(self.state, State::Protected)
            && let Some(throttle) = self.lag.control(now)
        {
            actions.push(Action::Throttle(throttle));
        }
        if self.connected && now >= self.next_heartbeat && !self.ended() {
            self.next_heartbeat = now + self.config.terms.timing.heartbeat();
            actions.push(Action::Send(Message::Heartbeat {
                stamp_us: micros(now),
                echo_us: self.peer_stamp_us,
            }));
        }
    }

    fn release(&mut self, now: Duration, actions: &mut Vec<Action>) {
        let may = match self.state {
            State::Settling
            | State::Protected
            | State::Disabling
            | State::HandingOver(HandingOver::Logging | HandingOver::Acknowledging { .. }) => true,
            State::Greeting
            | State::Preparing
            | State::Copying
            | State::HandingOver(HandingOver::Consented)
            | State::Claiming(_)
            | State::Abandoned { .. }
            | State::Alone { .. }
            | State::Halted { .. } => false,
        };
        if may && self.acknowledged > self.released && now < self.lease_until {
            self.released = self.acknowledged;
            actions.push(Action::Release { through: self.acknowledged });
        }
    }

    fn hand_over(&mut self, actions: &mut Vec<Action>) {
        if let State::HandingOver(HandingOver::Acknowledging { end }) = self.state
            && self.acknowledged >= end
        {
            actions.push(Action::Send(Message::HandOver { end }));
            self.state = State::HandingOver(HandingOver::Consented);
        }
    }

    /// Appended and not executed is what both buffers hold together; so one bound on the primary
    /// bounds the backup's too.
    fn backpressure(&mut self, actions: &mut Vec<Action>) {
        if self.ended() {
            return;
        }
        let behind = self.appended.0 - self.executed.0;
        let limit = self.config.terms.log_buffer_bytes;
        if !self.stalled && behind >= limit {
            self.stalled = true;
            self.stalls += 1;
            actions.push(Action::Stall);
        } else if self.stalled && behind <= limit / 2 {
            self.stalled = false;
            actions.push(Action::Unstall);
        }
    }

    /// The peer is of no use any more: what that means depends on whether it was armed.
    fn lost(&mut self, now: Duration, reason: String, actions: &mut Vec<Action>) {
        let gone = reason.clone();
        match self.state {
            State::Greeting | State::Preparing | State::Copying | State::Settling => {
                self.abandon(format!("the backup was lost: {reason}"), actions);
            }
            State::Protected | State::HandingOver(_) | State::Disabling => {
                self.claim(now, format!("the backup was lost: {reason}"), actions);
            }
            State::Claiming(_)
            | State::Abandoned { .. }
            | State::Alone { .. }
            | State::Halted { .. } => {}
        }
        if !gone.starts_with("silent") {
            self.connected = false;
        }
    }

    fn violation(&mut self, now: Duration, what: &str, actions: &mut Vec<Action>) {
        actions.push(Action::HangUp);
        self.lost(now, format!("it {what}"), actions);
    }

    fn claim(&mut self, now: Duration, cause: String, actions: &mut Vec<Action>) {
        let since = micros(now.saturating_sub(self.detector.last_heard()));
        let failover = Failover {
            cause: cause.clone(),
            suspected_us: since,
            asked_us: Some(since),
            generation: self.config.terms.generation.next().0,
            ..Failover::default()
        };
        let next = Claiming { retry_at: None, unreachable: None, failover };
        self.change(State::Claiming(next), Some(cause), actions);
        self.ask(actions);
    }

    fn ask(&mut self, actions: &mut Vec<Action>) {
        actions.push(Action::Claim {
            pair: self.config.terms.pair.clone(),
            generation: self.config.terms.generation,
            who: self.config.who.clone(),
        });
    }

    fn alone_by_consent(&mut self, now: Duration, cause: String, actions: &mut Vec<Action>) {
        let failover = Failover {
            cause,
            generation: self.config.terms.generation.next().0,
            ..Failover::default()
        };
        self.go_alone(now, failover, actions);
    }

    fn go_alone(&mut self, now: Duration, mut failover: Failover, actions: &mut Vec<Action>) {
        failover.live_us = Some(micros(now.saturating_sub(self.detector.last_heard())));
        let reason = failover.cause.clone();
        self.last_failover = Some(failover.clone());
        self.unburden(actions);
        let generation = self.config.terms.generation.next();
        actions.push(Action::GoAlone { generation, failover });
        self.change(State::Alone { reason: reason.clone() }, Some(reason), actions);
    }

    fn abandon(&mut self, reason: String, actions: &mut Vec<Action>) {
        if self.connected {
            actions.push(Action::Send(Message::Disable { reason: reason.clone() }));
        }
        self.unburden(actions);
        actions.push(Action::Abandoned { reason: reason.clone() });
        self.change(State::Abandoned { reason: reason.clone() }, Some(reason), actions);
    }

    fn halt(&mut self, reason: String, actions: &mut Vec<Action>) {
        actions.push(Action::HangUp);
        actions.push(Action::Halt { reason: reason.clone() });
        self.change(State::Halted { reason: reason.clone() }, Some(reason), actions);
    }

    /// Ends what protection cost the guest.
    fn unburden(&mut self, actions: &mut Vec<Action>) {
        actions.push(Action::HangUp);
        if std::mem::take(&mut self.stalled) {
            actions.push(Action::Unstall);
        }
        if self.lag.throttle() != 0.0 {
            actions.push(Action::Throttle(0.0));
        }
    }

    fn change(&mut self, next: State, reason: Option<String>, actions: &mut Vec<Action>) {
        self.state = next;
        actions.push(Action::Changed { state: self.state_name(), reason });
    }

    fn illegal(&self, input: &'static str) -> IllegalInput {
        IllegalInput { input, state: self.state_name() }
    }
}
