//! The primary's side of the protocol, as a state machine: inputs and the time in, actions out.
//!
//! ```text
//!  Greeting ─Hello─▶ Preparing ─Accepted─▶ Copying ─CloneSent─▶ Settling
//!     │                  │                    │                 │     │ Ready
//!     └──────────────────┴─── any failure ────┴─────────────────┘     ▼
//!                                │                                  Arming
//!                                ▼                                    │ Protecting
//!                            Abandoned (nothing to claim)             ▼
//!                                                                 Protected
//!                                                                     │
//!  From Arming, Protected, HandingOver and Disabling:                 ├─ HandOver ─▶ HandingOver
//!    peer silent, lost or taking over ─▶ Claiming                     │   (peer live ─▶ Halted)
//!    peer gives up or its guest differs ─▶ Alone                      └─ Disable ─▶ Disabling
//!                                                                         (Discarded ─▶ Alone)
//!  Claiming ─ won ─▶ Alone
//!     │ └──── lost ─▶ Halted
//!     └─ arbiter out of reach: ask again, for ever
//! ```
//!
//! What must hold:
//! - Outputs are released only as far as they are acknowledged, only while the lease holds, and never
//!   while claiming. The lease counts from when this side *sent* the heartbeat that the peer echoed;
//!   an acknowledgement read after this host was frozen therefore releases nothing.
//! - From `Armed` on, this side goes on alone only by a won claim or by the peer's word that it never
//!   goes live. Before, the peer never goes live by itself, so no claim is needed.
//! - Whoever loses the claim halts for good.

mod digests;
mod io;
mod peer;
mod report;
mod state;

pub use io::{Action, IllegalInput, Input, PrimaryConfig};

use std::time::Duration;

use digests::RecentDigests;
use state::{Claiming, HandingOver, State};

use crate::arbiter::Claim;
use crate::detector::Detector;
use crate::lag::LagControl;
use crate::message::{Hello, MAX_CHUNK_BYTES, Message};
use crate::status::Failover;
use crate::{DiskReads, ExecutionPoint, Generation, LogPosition, PairId, Unequal, clip, micros};

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
    released_by_executed: LogPosition,
    recorded_point: ExecutionPoint,
    acknowledged_point: ExecutionPoint,
    executed_point: ExecutionPoint,
    lag: LagControl,
    stalled: bool,
    stalls: u64,
    digests: RecentDigests,
    digests_compared: u64,
    last_unequal: Option<Unequal>,
    last_failover: Option<Failover>,
}

impl Primary {
    /// Starts on a fresh connection; the first actions are its greeting.
    ///
    /// `now`, here and in [`Primary::step`], is of a clock that keeps to real time also while the
    /// process or the host stands still (`CLOCK_BOOTTIME`), read after the input was received.
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
            released_by_executed: LogPosition(0),
            recorded_point: ExecutionPoint(0),
            acknowledged_point: ExecutionPoint(0),
            executed_point: ExecutionPoint(0),
            lag: LagControl::new(now, timing.max_lag()),
            stalled: false,
            stalls: 0,
            digests: RecentDigests::default(),
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
            Input::ConnectionLost { reason } => self.lost(now, clip(&reason), actions),
            Input::Tick => {}
            Input::CloneSent if matches!(self.state, State::Copying) => {
                self.change(State::Settling, None, actions);
            }
            Input::CloneFailed { reason } if self.state.unarmed() => self.abandon(reason, actions),
            Input::Log { end, point, bytes } => self.log(now, end, point, bytes, actions)?,
            Input::Digested { point, pages } => self.digests.add(point, pages),
            Input::ArbiterAnswered { generation, answer } => {
                if generation == self.config.terms.generation {
                    self.answered(now, answer, actions);
                }
            }
            Input::HandOver if matches!(self.state, State::Protected) => {
                actions.push(Action::LogHandOver);
                self.change(State::HandingOver(HandingOver::Logging), None, actions);
            }
            Input::HandOverLogged { end }
                if matches!(self.state, State::HandingOver(HandingOver::Logging)) =>
            {
                let next = State::HandingOver(HandingOver::Acknowledging { end });
                self.change(next, None, actions);
            }
            Input::Quiesced => self.quiesced(now, actions),
            // The backup was lost in the meantime; going alone resumes the vCPU.
            Input::HandOverLogged { .. } if self.state.claiming() => {}
            Input::Disable { reason } if self.state.unarmed() => self.abandon(reason, actions),
            Input::Disable { reason } if matches!(self.state, State::Arming | State::Protected) => {
                actions.push(Action::Send(Message::Disable { reason: clip(&reason) }));
                self.change(State::Disabling, Some(reason), actions);
            }
            Input::CloneSent => return Err(self.illegal("CloneSent")),
            Input::CloneFailed { .. } => return Err(self.illegal("CloneFailed")),
            Input::HandOver => return Err(self.illegal("HandOver")),
            Input::HandOverLogged { .. } => return Err(self.illegal("HandOverLogged")),
            Input::Disable { .. } => return Err(self.illegal("Disable")),
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
            State::HandingOver(HandingOver::Consented { until }) => {
                Some(self.detector.deadline().min(*until))
            }
            _ => Some(self.detector.deadline()),
        };
        let lag = self.state.measures_lag().then(|| self.lag.deadline());
        [heartbeat, other, lag].into_iter().flatten().min()
    }

    /// Until when outputs may leave this side. The back halves look at it once more right before each
    /// system call, and wait while it has passed. `Duration::MAX` when this side runs alone or its
    /// backup is not armed, `Duration::ZERO` when it has halted, asks for the claim or has handed over.
    pub fn lease_until(&self) -> Duration {
        match self.state {
            State::Alone { .. } | State::Abandoned { .. } => Duration::MAX,
            _ if self.state.unarmed() => Duration::MAX,
            _ if self.state.releases() => self.lease_until,
            _ => Duration::ZERO,
        }
    }

    /// What this side is part of, and the period of protection.
    pub fn membership(&self) -> (PairId, Generation) {
        (self.config.terms.pair.clone(), self.config.terms.generation)
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
        self.state.ended()
    }

    /// The state's name.
    pub fn state_name(&self) -> &'static str {
        self.state.name()
    }

    fn log(
        &mut self,
        now: Duration,
        end: LogPosition,
        point: ExecutionPoint,
        bytes: Vec<u8>,
        actions: &mut Vec<Action>,
    ) -> Result<(), IllegalInput> {
        let position = self.appended;
        let fits = position.0 + bytes.len() as u64 == end.0 && bytes.len() <= MAX_CHUNK_BYTES;
        if !fits {
            return Err(self.illegal("Log with a gap or too long"));
        }
        if self.state.logs() {
            self.lag.appended(now, end, point);
            actions.push(Action::Send(Message::Log { position, bytes }));
            self.beat_soon(now, actions);
        } else if !self.state.claiming() {
            return Err(self.illegal("Log"));
        }
        self.appended = end;
        self.recorded_point = point;
        Ok(())
    }

    fn answered(
        &mut self,
        now: Duration,
        answer: Result<Claim, String>,
        actions: &mut Vec<Action>,
    ) {
        let retry = now + self.config.terms.timing.claim_retry();
        let State::Claiming(claiming) = &mut self.state else { return };
        if claiming.retry_at.is_some() {
            return;
        }
        match answer {
            Ok(Claim::Won) => {
                let since = micros(now.saturating_sub(claiming.zero));
                let mut failover = claiming.failover.clone();
                failover.claimed_us = Some(since);
                failover.live_us = Some(since);
                if self.connected {
                    let reason = format!("the primary goes on alone: {}", failover.cause);
                    actions.push(Action::Send(Message::Disable { reason }));
                }
                self.go_alone(failover, actions);
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
                    let state = self.state.name();
                    actions.push(Action::Changed { state, reason: Some(reason) });
                }
            }
        }
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
            self.suspect(now, format!("silent for {} ms", silence.as_millis()), actions);
        } else if let State::HandingOver(HandingOver::Consented { until }) = self.state
            && now >= until
        {
            self.claim(now, "the backup does not finish the hand-over".into(), actions);
        } else if self.state.measures_lag()
            && let Some(throttle) = self.lag.control(now)
        {
            actions.push(Action::Throttle(throttle));
        }
        self.beat_if_due(now, now, actions);
    }

    /// A heartbeat that is due soon goes along with what is being sent: it wakes nobody by itself then, here
    /// nor there.
    fn beat_soon(&mut self, now: Duration, actions: &mut Vec<Action>) {
        self.beat_if_due(now, now + self.config.terms.timing.heartbeat() / 2, actions);
    }

    /// Sends a heartbeat if it is due at `by`.
    fn beat_if_due(&mut self, now: Duration, by: Duration, actions: &mut Vec<Action>) {
        if self.connected && by >= self.next_heartbeat && !self.ended() {
            self.next_heartbeat = now + self.config.terms.timing.heartbeat();
            actions.push(Action::Send(Message::Heartbeat {
                stamp_us: micros(now),
                echo_us: self.peer_stamp_us,
            }));
        }
    }

    fn release(&mut self, now: Duration, actions: &mut Vec<Action>) {
        // Where the backup reads by itself, outputs can wait for what it has executed.
        let reads = self.config.terms.disk_reads == DiskReads::Backup;
        let more = self.acknowledged > self.released
            || (reads && self.executed > self.released_by_executed);
        if self.state.releases() && more && now < self.lease_until() {
            self.released = self.acknowledged;
            self.released_by_executed = self.executed;
            actions.push(Action::Release { through: self.acknowledged });
        }
    }

    fn hand_over(&mut self, actions: &mut Vec<Action>) {
        if let State::HandingOver(HandingOver::Acknowledging { end }) = self.state
            && self.acknowledged >= end
        {
            actions.push(Action::Quiesce);
            self.state = State::HandingOver(HandingOver::Quiescing { end });
        }
    }

    /// No output of this side is under way, and none will be unless it wins the claim.
    fn quiesced(&mut self, now: Duration, actions: &mut Vec<Action>) {
        match &mut self.state {
            State::HandingOver(HandingOver::Quiescing { end }) => {
                actions.push(Action::Send(Message::HandOver { end: *end }));
                let until = now + 5 * self.config.terms.timing.failure_timeout();
                self.state = State::HandingOver(HandingOver::Consented { until });
            }
            State::Claiming(claiming) if claiming.yielding => {
                claiming.yielding = false;
                if self.connected {
                    actions.push(Action::Send(Message::Yielded));
                }
            }
            // Overtaken by a claim that was won or lost.
            _ => {}
        }
    }

    /// Appended and not executed is what both buffers hold together; so one bound on the primary
    /// bounds the backup's too.
    fn backpressure(&mut self, actions: &mut Vec<Action>) {
        if self.ended() || self.state.claiming() {
            return; // nothing is buffered any more
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
    fn suspect(&mut self, now: Duration, reason: String, actions: &mut Vec<Action>) {
        let cause = format!("the backup was lost: {reason}");
        if self.state.unarmed() {
            self.abandon(cause, actions);
        } else if self.state.armed() {
            self.claim(now, cause, actions);
        }
    }

    fn lost(&mut self, now: Duration, reason: String, actions: &mut Vec<Action>) {
        self.connected = false;
        self.suspect(now, reason, actions);
    }

    fn violation(&mut self, now: Duration, what: &str, actions: &mut Vec<Action>) {
        actions.push(Action::HangUp);
        self.lost(now, format!("it {what}"), actions);
    }

    fn claim(&mut self, now: Duration, cause: String, actions: &mut Vec<Action>) {
        let zero = self.detector.last_heard();
        let since = micros(now.saturating_sub(zero));
        let failover = Failover {
            cause: cause.clone(),
            suspected_us: since,
            asked_us: Some(since),
            generation: self.config.terms.generation.next().0,
            ..Failover::default()
        };
        let next = Claiming { retry_at: None, unreachable: None, yielding: false, zero, failover };
        self.change(State::Claiming(next), Some(cause), actions);
        // Nobody is behind any more. The arbiter may take long, and only the outputs wait for it.
        self.let_run(actions);
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
        let generation = self.config.terms.generation.next().0;
        let mut failover = Failover { cause, generation, ..Failover::default() };
        if let State::Claiming(claiming) = &self.state {
            failover = claiming.failover.clone();
            failover.live_us = Some(micros(now.saturating_sub(claiming.zero)));
        }
        self.go_alone(failover, actions);
    }

    fn go_alone(&mut self, failover: Failover, actions: &mut Vec<Action>) {
        let reason = failover.cause.clone();
        self.last_failover = Some(failover.clone());
        self.unburden(actions);
        let generation = self.config.terms.generation.next();
        actions.push(Action::GoAlone { generation, failover });
        self.change(State::Alone { reason: reason.clone() }, Some(reason), actions);
    }

    fn abandon(&mut self, reason: String, actions: &mut Vec<Action>) {
        if self.connected {
            actions.push(Action::Send(Message::Disable { reason: clip(&reason) }));
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
        self.let_run(actions);
    }

    /// Gives the guest all its time back, whether it was stalled or slowed down.
    fn let_run(&mut self, actions: &mut Vec<Action>) {
        if std::mem::take(&mut self.stalled) {
            actions.push(Action::Unstall);
        }
        if self.lag.release() {
            actions.push(Action::Throttle(0.0));
        }
    }

    fn change(&mut self, next: State, reason: Option<String>, actions: &mut Vec<Action>) {
        self.state = next;
        actions.push(Action::Changed { state: self.state.name(), reason });
    }

    fn illegal(&self, input: &'static str) -> IllegalInput {
        IllegalInput { input, state: self.state.name() }
    }
}
