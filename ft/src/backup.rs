//! The backup's side of the protocol, as a state machine: inputs and the time in, actions out.
//!
//! ```text
//!  Greeting ─Hello─▶ Waiting ─CloneStart─▶ Deciding ─Accept─▶ Receiving ─State─▶ Loading ─Loaded─▶ Settling
//!     │                │                      │                   │                │               │
//!     └────────────────┴──────────── any failure, Disable ────────┴────────────────┴───────────────┤
//!                                              ▼                                                   │Armed
//!                                          Discarded ◀── Disable, guest differs, claim lost ──┐    ▼
//!                                                                                             ├─ Replaying
//!                                                                                             │    │ ▲
//!     Live ◀── claim won, drained, lease over ── TakingOver ◀── peer lost, silent, ───────────┼────┘ │
//!                                                 │      │       hands over, operator          │      │
//!                                                 │      └──── heard again, nothing asked ────┼──────┘
//!                                                 └───────────────────────────────────────────┘
//! ```
//!
//! What must hold:
//! - Before `Armed` the primary may run on without a claim; so this side never goes live by itself.
//! - Going live needs all three: every record received is executed; the claim is won; the primary can no
//!   longer release outputs, because its lease has run out or it said so.
//! - What decides the lease is when the newest heartbeat *that was echoed* arrived: the primary counts
//!   from when it sent that one.
//! - A backup whose guest differed, or that lost the claim, or that said `Discarded`, never goes live.

use std::time::Duration;

use crate::arbiter::Claim;
use crate::codec::MAX_RECORD_BYTES;
use crate::detector::Detector;
use crate::message::{CloneStart, HELLO_MAGIC, Hello, MAX_FRAME_BYTES, Message, PAGE_BYTES};
use crate::status::{Failover, FtStatus};
use crate::{
    Capabilities, ExecutionPoint, Generation, LogPosition, PROTOCOL_VERSION, PairId, Terms, Timing,
    Unequal, clip, micros,
};

/// The largest log buffer that a backup agrees to.
pub const MAX_LOG_BUFFER_BYTES: u64 = 1 << 30;

/// Reports of progress are no closer than this, so that they cost next to nothing.
const REPORT_PERIOD: Duration = Duration::from_millis(2);

/// What a backup is started with.
#[derive(Clone, Debug)]
pub struct BackupConfig {
    /// This process, as no other is named, ever: what it claims with.
    pub who: String,
    /// What this host offers.
    pub capabilities: Capabilities,
}

/// What happens to a backup.
#[derive(Clone, Debug)]
pub enum Input {
    /// The peer said something.
    Message(Message),
    /// The connection is gone: reset, closed, or it carried garbage.
    ConnectionLost {
        /// What was seen.
        reason: String,
    },
    /// Time has passed: at [`Backup::next_deadline`] or later.
    Tick,
    /// The VM of [`Action::Prepare`] can be taken: memory is there, disks are open but not started.
    Accept,
    /// The VM of [`Action::Prepare`] cannot be taken.
    Refuse {
        /// Why.
        reason: String,
    },
    /// Memory and state are loaded; the vCPU replays from log position 0.
    Loaded,
    /// The vCPU has come this far.
    Executed {
        /// The point.
        point: ExecutionPoint,
        /// The end of the last record applied: of all those handed out, once the vCPU has reached
        /// the point of the last one.
        position: LogPosition,
        /// Digests compared so far, all equal.
        digests_compared: u64,
    },
    /// The vCPU found a digest that differs; it has stopped.
    Unequal {
        /// Where.
        point: ExecutionPoint,
        /// The first difference.
        unequal: Unequal,
    },
    /// The copy cannot go on: a damaged log, a failed device, no memory.
    Failed {
        /// What happened.
        reason: String,
    },
    /// The arbiter's answer to [`Action::Claim`].
    ArbiterAnswered(Result<Claim, String>),
    /// The operator wants this side to take over.
    TakeOver,
    /// The operator wants this copy gone.
    Discard {
        /// Why, for the primary's operator.
        reason: String,
    },
}

/// What a backup wants done, in this order.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Send this to the peer.
    Send(Message),
    /// Close the connection once everything is sent.
    HangUp,
    /// Look whether this VM can be taken; give [`Input::Accept`] or [`Input::Refuse`].
    Prepare(Box<CloneStart>),
    /// Put pages into guest memory.
    LoadPages {
        /// Page number of the first.
        first: u64,
        /// Their contents, whole pages.
        bytes: Vec<u8>,
    },
    /// Make pages of guest memory zero.
    LoadZeroPages {
        /// Page number of the first.
        first: u64,
        /// How many. Not checked against the size of memory.
        count: u64,
    },
    /// Load CPU and devices, make a [`crate::Decoder`] at this point, and give [`Input::Loaded`].
    LoadState {
        /// The point.
        point: ExecutionPoint,
        /// The state.
        bytes: Vec<u8>,
    },
    /// Hand these whole records to the vCPU. They may come before [`Input::Loaded`] was given.
    Replay {
        /// Where they end.
        end: LogPosition,
        /// The records.
        bytes: Vec<u8>,
    },
    /// The VM is protected by this side from here on.
    Protected,
    /// Ask the arbiter, on another thread, and give [`Input::ArbiterAnswered`].
    Claim {
        /// The pair.
        pair: PairId,
        /// The generation that the claim ends.
        generation: Generation,
        /// The claimant.
        who: String,
    },
    /// Go live: every record is executed. Re-issue disk requests, release kept outputs, announce the
    /// MAC, anchor time, run.
    GoLive {
        /// The generation that this side now lives in.
        generation: Generation,
        /// Why and when.
        failover: Failover,
    },
    /// Stop the vCPU and throw the copy away. It must never run again.
    Discard {
        /// Why.
        reason: String,
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
#[error("{input} is not possible while the backup is {state}")]
pub struct IllegalInput {
    /// The input.
    pub input: &'static str,
    /// The state.
    pub state: &'static str,
}

#[derive(Clone, Debug)]
enum State {
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

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cause {
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
enum Asked {
    No,
    /// An answer is awaited.
    Waiting,
    /// The arbiter could not be reached.
    RetryAt(Duration),
    Won,
}

#[derive(Clone, Debug)]
struct TakeOver {
    cause: Cause,
    asked: Asked,
    unreachable: Option<String>,
    /// The primary said that it releases nothing more.
    yielded: bool,
    /// What the timeline counts from.
    zero: Duration,
    failover: Failover,
}

/// The backup's state machine.
#[derive(Clone, Debug)]
pub struct Backup {
    config: BackupConfig,
    state: State,
    terms: Option<Terms>,
    timing: Timing,
    connected: bool,
    peer: Option<String>,
    detector: Detector,
    next_heartbeat: Duration,
    peer_stamp_us: Option<u64>,
    /// When the newest heartbeat arrived that was or will be echoed.
    lease_base: Option<Duration>,
    received: LogPosition,
    executed: LogPosition,
    executed_point: ExecutionPoint,
    reported: LogPosition,
    next_report: Duration,
    digests_compared: u64,
    last_unequal: Option<Unequal>,
    last_failover: Option<Failover>,
}

impl Backup {
    /// Starts on a fresh connection.
    ///
    /// `now`, here and in [`Backup::step`], is of a clock that counts while the host sleeps
    /// (`CLOCK_BOOTTIME`), read *after* the input was received: were it read before, a heartbeat
    /// could seem older than the lease it gave.
    pub fn new(now: Duration, config: BackupConfig) -> Self {
        let timing = Timing::default();
        Self {
            config,
            state: State::Greeting,
            terms: None,
            timing,
            connected: true,
            peer: None,
            detector: Detector::new(now, timing.clone_timeout()),
            next_heartbeat: now + timing.heartbeat(),
            peer_stamp_us: None,
            lease_base: None,
            received: LogPosition(0),
            executed: LogPosition(0),
            executed_point: ExecutionPoint(0),
            reported: LogPosition(0),
            next_report: now,
            digests_compared: 0,
            last_unequal: None,
            last_failover: None,
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
                self.heard_again(now, actions);
                self.message(now, message, actions);
            }
            Input::ConnectionLost { reason } => self.lost(now, reason, actions),
            Input::Tick => {}
            Input::Accept => match self.state {
                State::Deciding => {
                    actions.push(Action::Send(Message::Accepted));
                    self.change(State::Receiving, None, actions);
                }
                _ => return Err(self.illegal("Accept")),
            },
            Input::Refuse { reason } => match self.state {
                State::Deciding => self.refuse(reason, actions),
                _ => return Err(self.illegal("Refuse")),
            },
            Input::Loaded => match self.state {
                State::Loading => {
                    actions.push(Action::Send(Message::Ready));
                    self.change(State::Settling, None, actions);
                }
                _ => return Err(self.illegal("Loaded")),
            },
            Input::Executed { point, position, digests_compared } => {
                if position > self.received || position < self.executed {
                    return Err(self.illegal("Executed beyond what was received"));
                }
                self.executed = position;
                self.executed_point = point;
                self.digests_compared = digests_compared;
            }
            Input::Unequal { point, unequal } => {
                let reason = format!("the backup's {} differs", clip(&unequal.component));
                self.last_unequal = Some(unequal.clone());
                self.tell(Message::DigestUnequal { point, unequal }, actions);
                self.discard(reason, actions);
            }
            Input::Failed { reason } | Input::Discard { reason } => {
                self.tell(Message::Discarded { reason: clip(&reason) }, actions);
                self.discard(reason, actions);
            }
            Input::ArbiterAnswered(answer) => self.answered(now, answer, actions)?,
            Input::TakeOver => match &mut self.state {
                State::Replaying => {
                    let reason = "the operator wants this side to take over".into();
                    self.take_over(now, Cause::Forced, reason, actions);
                }
                // Already at it: what the operator adds is that it need not be heard again.
                State::TakingOver(take) => {
                    if take.cause == Cause::Silent {
                        take.cause = Cause::Forced;
                    }
                }
                _ => return Err(self.illegal("TakeOver")),
            },
        }
        self.time(now, actions);
        self.advance(now, actions);
        self.report(now, actions);
        Ok(())
    }

    /// When [`Input::Tick`] is due; `None` if nothing is ever due again.
    pub fn next_deadline(&self) -> Option<Duration> {
        if self.ended() {
            return None;
        }
        let heartbeat = self.connected.then_some(self.next_heartbeat);
        let report = self.report_is_due().then_some(self.next_report);
        let other = match &self.state {
            State::TakingOver(take) => match take.asked {
                Asked::RetryAt(at) => Some(at),
                Asked::No | Asked::Won if !take.yielded => Some(self.lease_over_at()),
                Asked::No | Asked::Won | Asked::Waiting => None,
            },
            _ => Some(self.detector.deadline()),
        };
        [heartbeat, report, other].into_iter().flatten().min()
    }

    /// Whether this side would take over if the primary failed.
    pub fn protecting(&self) -> bool {
        matches!(self.state, State::Replaying)
    }

    /// Whether the machine is at its end: live or discarded.
    pub fn ended(&self) -> bool {
        matches!(self.state, State::Live { .. } | State::Discarded { .. })
    }

    /// The end of the log received.
    pub fn received(&self) -> LogPosition {
        self.received
    }

    /// The terms of the pair, once known.
    pub fn terms(&self) -> Option<&Terms> {
        self.terms.as_ref()
    }

    /// The state's name.
    pub fn state_name(&self) -> &'static str {
        match &self.state {
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

    fn message(&mut self, now: Duration, message: Message, actions: &mut Vec<Action>) {
        match (&mut self.state, message) {
            (state, Message::Heartbeat { stamp_us, .. }) => {
                // Echoing renews the primary's lease. A side that takes over stops; when an operator
                // forces it, only once the claim is won, so that a lost claim has cost nothing.
                let echo = match state {
                    State::TakingOver(take) => {
                        take.cause == Cause::Forced && !matches!(take.asked, Asked::Won)
                    }
                    _ => true,
                };
                if echo {
                    self.peer_stamp_us = Some(stamp_us);
                    self.lease_base = Some(now);
                    self.heartbeat(now, actions);
                }
            }
            (State::Greeting, Message::Hello(hello)) => self.greeted(hello, actions),
            (State::Waiting, Message::CloneStart(start)) => self.start(now, start, actions),
            (State::Receiving, Message::Pages { first, bytes }) => {
                if bytes.is_empty() || !bytes.len().is_multiple_of(PAGE_BYTES) {
                    return self.violation(now, "sent part of a page", actions);
                }
                actions.push(Action::LoadPages { first, bytes });
            }
            (State::Receiving, Message::ZeroPages { first, count }) => {
                actions.push(Action::LoadZeroPages { first, count });
            }
            (State::Receiving, Message::State { point, bytes }) => {
                self.executed_point = point;
                actions.push(Action::LoadState { point, bytes });
                self.change(State::Loading, None, actions);
            }
            (State::Settling, Message::Armed) => {
                self.detector.set_timeout(now, self.timing.failure_timeout());
                actions.push(Action::Protected);
                self.change(State::Replaying, None, actions);
            }
            (
                State::Loading | State::Settling | State::Replaying,
                Message::Log { position, bytes },
            ) => self.log(now, position, bytes, actions),
            (State::Replaying, Message::HandOver { end }) => {
                if end != self.received {
                    return self.violation(now, "handed over with part of its log unsent", actions);
                }
                let reason = "the primary handed over".into();
                self.take_over(now, Cause::HandOver, reason, actions);
            }
            (State::TakingOver(take), Message::Yielded) => take.yielded = true,
            (State::TakingOver(take), Message::Disable { .. } | Message::HandOver { .. })
                if matches!(take.asked, Asked::Won) => {}
            (State::TakingOver(take), Message::HandOver { end }) if take.cause == Cause::Forced => {
                // Both operators want the same; with the primary's consent it is sooner.
                if end == self.received {
                    take.cause = Cause::HandOver;
                    take.yielded = true;
                }
            }
            (_, Message::Disable { reason }) => {
                actions.push(Action::Send(Message::Discarded { reason: clip(&reason) }));
                self.discard(clip(&reason), actions);
            }
            // Not acknowledged, so nothing leaves the primary by it; what counts was received before.
            (State::TakingOver(_), _) => {}
            (_, message) => {
                let what = format!("sent {} out of turn", message.name());
                self.violation(now, &what, actions);
            }
        }
    }

    fn greeted(&mut self, hello: Hello, actions: &mut Vec<Action>) {
        if hello.magic != HELLO_MAGIC {
            return self.discard("what connected is no Dyad".into(), actions);
        }
        let ours = Hello::new(self.config.who.clone(), self.config.capabilities.clone());
        actions.push(Action::Send(Message::Hello(ours)));
        if hello.version != PROTOCOL_VERSION {
            let theirs = hello.version;
            return self.refuse(
                format!(
                    "the primary speaks protocol version {theirs}, this side {PROTOCOL_VERSION}: run the same Dyad on both hosts"
                ),
                actions,
            );
        }
        let lacking = self.config.capabilities.lacking(&hello.capabilities);
        if !lacking.is_empty() {
            return self.refuse(clip(&lacking.join("; ")), actions);
        }
        self.peer = Some(clip(&hello.who));
        self.change(State::Waiting, None, actions);
    }

    fn start(&mut self, now: Duration, start: CloneStart, actions: &mut Vec<Action>) {
        if let Err(error) = start.terms.timing.check() {
            return self.refuse(error.to_string(), actions);
        }
        let wanted = start.terms.log_buffer_bytes;
        if !(1..=MAX_LOG_BUFFER_BYTES).contains(&wanted) {
            return self.refuse(
                format!("log_buffer_bytes is {wanted}; use 1 to {MAX_LOG_BUFFER_BYTES}"),
                actions,
            );
        }
        self.timing = start.terms.timing;
        self.detector.set_timeout(now, self.timing.clone_timeout());
        self.terms = Some(start.terms.clone());
        actions.push(Action::Prepare(Box::new(start)));
        self.change(State::Deciding, None, actions);
    }

    fn log(
        &mut self,
        now: Duration,
        position: LogPosition,
        bytes: Vec<u8>,
        actions: &mut Vec<Action>,
    ) {
        if position != self.received {
            return self.violation(now, "left a gap in its log", actions);
        }
        let end = LogPosition(position.0.saturating_add(bytes.len() as u64));
        // The primary stalls at its bound, but what it was about to append still comes.
        let bound = self.terms.as_ref().map_or(0, |terms| terms.log_buffer_bytes)
            + 2 * (MAX_RECORD_BYTES + MAX_FRAME_BYTES) as u64;
        if end.0 - self.executed.0 > bound {
            return self.violation(now, "sent more log than agreed", actions);
        }
        self.received = end;
        actions.push(Action::Replay { end, bytes });
        actions.push(Action::Send(Message::Ack { received: end }));
    }

    fn answered(
        &mut self,
        now: Duration,
        answer: Result<Claim, String>,
        actions: &mut Vec<Action>,
    ) -> Result<(), IllegalInput> {
        let illegal = self.illegal("ArbiterAnswered");
        let retry = now + self.timing.claim_retry();
        let State::TakingOver(take) = &mut self.state else { return Err(illegal) };
        if !matches!(take.asked, Asked::Waiting) {
            return Err(illegal);
        }
        match answer {
            Ok(Claim::Won) => {
                take.asked = Asked::Won;
                take.failover.claimed_us = Some(micros(now.saturating_sub(take.zero)));
                if let Some(terms) = &self.terms {
                    let generation = terms.generation;
                    self.tell(Message::TakenOver { generation }, actions);
                }
                actions.push(Action::Changed { state: self.state_name(), reason: None });
            }
            Ok(Claim::Lost { by }) => {
                let reason = format!("the claim was won by {}", clip(&by));
                self.tell(Message::Discarded { reason: reason.clone() }, actions);
                self.discard(reason, actions);
            }
            Err(reason) => {
                let first = take.unreachable.is_none();
                take.unreachable = Some(reason.clone());
                take.asked = Asked::RetryAt(retry);
                if first {
                    actions
                        .push(Action::Changed { state: self.state_name(), reason: Some(reason) });
                }
            }
        }
        Ok(())
    }

    /// Silence ended before anything was asked of the arbiter: as if nothing had been.
    fn heard_again(&mut self, now: Duration, actions: &mut Vec<Action>) {
        if let State::TakingOver(TakeOver { cause: Cause::Silent, asked: Asked::No, .. }) =
            self.state
        {
            self.detector.heard(now);
            self.change(State::Replaying, Some("the primary is heard again".into()), actions);
        }
    }

    /// Everything that is due by the clock.
    fn time(&mut self, now: Duration, actions: &mut Vec<Action>) {
        if self.ended() {
            return;
        }
        if !matches!(self.state, State::TakingOver(_)) && self.detector.suspects(now) {
            let silence = now.saturating_sub(self.detector.last_heard()).as_millis();
            let reason = format!("the primary was silent for {silence} ms");
            if matches!(self.state, State::Replaying) {
                self.take_over(now, Cause::Silent, reason, actions);
            } else {
                self.tell(Message::Discarded { reason: reason.clone() }, actions);
                self.discard(reason, actions);
            }
        }
        if now >= self.next_heartbeat && !self.ended() {
            self.heartbeat(now, actions);
        }
    }

    fn heartbeat(&mut self, now: Duration, actions: &mut Vec<Action>) {
        if self.connected {
            self.next_heartbeat = now + self.timing.heartbeat();
            actions.push(Action::Send(Message::Heartbeat {
                stamp_us: micros(now),
                echo_us: self.peer_stamp_us,
            }));
        }
    }

    /// From when on the primary releases nothing more, unless it is heard and echoed again.
    fn lease_over_at(&self) -> Duration {
        self.lease_base.map_or(Duration::ZERO, |base| base + self.timing.lease_and_margin())
    }

    /// Takes the steps towards going live that are possible now.
    fn advance(&mut self, now: Duration, actions: &mut Vec<Action>) {
        let lease_over = now >= self.lease_over_at();
        let drained = self.executed == self.received;
        let State::TakingOver(take) = &mut self.state else { return };
        let Some(terms) = &self.terms else { return };
        let since = Some(micros(now.saturating_sub(take.zero)));
        let fenced = lease_over || take.yielded;
        if drained && take.failover.drained_us.is_none() {
            take.failover.drained_us = since;
        }
        if fenced && take.failover.lease_over_us.is_none() {
            take.failover.lease_over_us = since;
        }
        let ask = match take.asked {
            // A copy that turns out different while it drains must not have taken the VM from a
            // primary that lives. And the primary is to win where both could go on.
            Asked::No => drained && (fenced || take.cause == Cause::Forced),
            Asked::RetryAt(at) => now >= at,
            Asked::Waiting | Asked::Won => false,
        };
        if ask {
            take.asked = Asked::Waiting;
            take.failover.asked_us.get_or_insert(since.unwrap_or_default());
            actions.push(Action::Claim {
                pair: terms.pair.clone(),
                generation: terms.generation,
                who: self.config.who.clone(),
            });
        }
        if matches!(take.asked, Asked::Won) && drained && fenced {
            let mut failover = take.failover.clone();
            failover.live_us = since;
            let generation = terms.generation.next();
            let reason = failover.cause.clone();
            self.last_failover = Some(failover.clone());
            actions.push(Action::GoLive { generation, failover });
            self.tell(Message::Live { generation }, actions);
            actions.push(Action::HangUp);
            self.change(State::Live { generation, reason: reason.clone() }, Some(reason), actions);
        }
    }

    fn report_is_due(&self) -> bool {
        self.connected
            && self.executed > self.reported
            && matches!(self.state, State::Settling | State::Replaying | State::TakingOver(_))
    }

    fn report(&mut self, now: Duration, actions: &mut Vec<Action>) {
        if self.report_is_due() && now >= self.next_report {
            self.reported = self.executed;
            self.next_report = now + REPORT_PERIOD;
            actions.push(Action::Send(Message::Executed {
                point: self.executed_point,
                position: self.executed,
                digests_compared: self.digests_compared,
            }));
        }
    }

    /// The connection is of no use any more.
    fn lost(&mut self, now: Duration, reason: String, actions: &mut Vec<Action>) {
        self.connected = false;
        match &mut self.state {
            State::Replaying => {
                let reason = format!("the primary was lost: {reason}");
                self.take_over(now, Cause::Lost, reason, actions);
            }
            State::TakingOver(take) => {
                if take.cause == Cause::Silent {
                    take.cause = Cause::Lost;
                }
            }
            State::Greeting
            | State::Waiting
            | State::Deciding
            | State::Receiving
            | State::Loading
            | State::Settling => {
                self.discard(format!("the primary was lost: {reason}"), actions);
            }
            State::Live { .. } | State::Discarded { .. } => {}
        }
    }

    fn violation(&mut self, now: Duration, what: &str, actions: &mut Vec<Action>) {
        actions.push(Action::HangUp);
        self.lost(now, format!("it {what}"), actions);
    }

    fn take_over(
        &mut self,
        now: Duration,
        cause: Cause,
        reason: String,
        actions: &mut Vec<Action>,
    ) {
        // A failover is felt from when the primary was heard last; one that is wanted, from now.
        let zero = match cause {
            Cause::Silent | Cause::Lost => self.detector.last_heard(),
            Cause::HandOver | Cause::Forced => now,
        };
        let failover = Failover {
            cause: reason.clone(),
            suspected_us: micros(now.saturating_sub(zero)),
            generation: self.terms.as_ref().map_or(0, |terms| terms.generation.next().0),
            ..Failover::default()
        };
        let take = TakeOver {
            cause,
            asked: Asked::No,
            unreachable: None,
            yielded: cause == Cause::HandOver,
            zero,
            failover,
        };
        self.change(State::TakingOver(take), Some(reason), actions);
    }

    fn refuse(&mut self, reason: String, actions: &mut Vec<Action>) {
        self.tell(Message::Refused { reason: clip(&reason) }, actions);
        self.discard(reason, actions);
    }

    fn discard(&mut self, reason: String, actions: &mut Vec<Action>) {
        actions.push(Action::HangUp);
        actions.push(Action::Discard { reason: reason.clone() });
        self.change(State::Discarded { reason: reason.clone() }, Some(reason), actions);
    }

    fn tell(&self, message: Message, actions: &mut Vec<Action>) {
        if self.connected {
            actions.push(Action::Send(message));
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
