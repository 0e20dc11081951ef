//! The backup's side of the protocol, as a state machine: inputs and the time in, actions out.
//!
//! ```text
//!  Greeting ─Hello─▶ Waiting ─CloneStart─▶ Deciding ─Accept─▶ Receiving ─State─▶ Loading
//!     │                 │                     │                   │           │ Loaded
//!     │                 │                     │                   │           ▼
//!     └─────────────────┴─── any failure ─────┴───────────────────┴──────── Settling
//!                                   ▼                                         │ Armed
//!                               Discarded ◀─ Disable, guest differs ────── Replaying
//!                                   ▲                    primary silent or    │   ▲ heard again,
//!                                   │                    lost, hand-over,     │   │ nothing asked
//!                                   │                    operator's wish      ▼   │
//!                                   └─ claim lost, Disable, guest differs ─ TakingOver
//!                                                                             │ drained, claim won,
//!                                                                             ▼ lease over
//!                                                                            Live
//! ```
//!
//! What must hold:
//! - Before `Armed` the primary may run on without a claim; so this side never goes live by itself.
//! - Going live needs all three: every record received is executed, and what the guest has flushed is stable on this
//!   side's disks; the claim is won; the primary can no longer release outputs, because its lease has run out or it
//!   said so. The claim is asked for only after the first: a side that cannot go on must not have taken the VM from one
//!   that can.
//! - One that an operator wants to take over is a backup like any other until it has won the claim, and tells the
//!   primary only when it has drained the rest. An arbiter that is out of reach costs a healthy pair nothing.
//! - What decides the lease is when the newest heartbeat *that was echoed* arrived: the primary counts
//!   from when it sent that one.
//! - A backup whose guest differed, or that lost the claim, or that said `Discarded`, never goes live.
//! - A backup that waits for a disk of its own for too long gives itself up, for the primary stands still meanwhile; but
//!   only while it hears the primary, and never once it takes over from one that may be lost, or has asked for the
//!   claim: there may be no one else.

mod disk;
mod io;
mod peer;
mod report;
mod state;

pub use io::{Action, BackupConfig, IllegalInput, Input};

use std::time::Duration;

use disk::DiskWait;
use state::{Asked, Cause, State, TakeOver};

use crate::arbiter::Claim;
use crate::detector::Detector;
use crate::digest::MEMORY;
use crate::message::Message;
use crate::status::Failover;
use crate::{ExecutionPoint, LogPosition, PageHashes, Terms, Timing, Unequal, clip, micros};

/// The largest log buffer that a backup agrees to.
pub const MAX_LOG_BUFFER_BYTES: u64 = 1 << 30;

/// How long a connection may take to say what it wants.
const GREETING_TIMEOUT: Duration = Duration::from_secs(3);

/// Reports of progress are no closer than this, so that they cost next to nothing.
const REPORT_PERIOD: Duration = Duration::from_millis(5);

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
    /// What the guest flushed before it is stable, as far as that was asked for.
    stable: Option<LogPosition>,
    reported: LogPosition,
    next_report: Duration,
    digests_compared: u64,
    disk_wait: Option<DiskWait>,
    stable_wait: Option<DiskWait>,
    /// When all that was copied had come.
    loading_since: Option<Duration>,
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
            detector: Detector::new(now, GREETING_TIMEOUT),
            next_heartbeat: now + timing.heartbeat(),
            peer_stamp_us: None,
            lease_base: None,
            received: LogPosition(0),
            executed: LogPosition(0),
            executed_point: ExecutionPoint(0),
            stable: None,
            reported: LogPosition(0),
            next_report: now,
            digests_compared: 0,
            disk_wait: None,
            stable_wait: None,
            loading_since: None,
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
                // A connection that only beats and wants nothing is given up.
                let beats = matches!(message, Message::Heartbeat { .. });
                if !(beats && matches!(self.state, State::Greeting | State::Waiting)) {
                    self.detector.heard(now);
                }
                self.heard_again(now, actions);
                self.message(now, message, actions);
                self.give_up_on_disk(now, actions);
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
            Input::DiskCompared { disk, first, differing } => {
                // The primary may have given the copy up meanwhile.
                if matches!(self.state, State::Receiving) {
                    actions.push(Action::Send(Message::DiskDiffers { disk, first, differing }));
                }
            }
            Input::Executed { point, position, digests_compared } => {
                if position > self.received || position < self.executed {
                    return Err(self.illegal("Executed beyond what was received"));
                }
                if position > self.executed {
                    self.disk_wait = None;
                }
                self.executed = position;
                self.executed_point = point;
                self.digests_compared = digests_compared;
            }
            Input::Stable { position } => {
                if position > self.executed {
                    return Err(self.illegal("Stable beyond what was executed"));
                }
                self.stable = self.stable.max(Some(position));
                self.stable_wait = None;
            }
            Input::AwaitsDisk { device, failed } => self.awaits_disk(now, device, failed),
            Input::AwaitsStable { device, failed } => self.awaits_stable(now, device, failed),
            Input::Unequal { point, unequal, pages } => {
                let reason = format!("the backup's {} differs", clip(&unequal.component));
                self.last_unequal = Some(unequal.clone());
                let memory = unequal.component == MEMORY;
                let pages = if memory { pages } else { PageHashes::default() };
                self.tell(Message::DigestUnequal { point, unequal, pages }, actions);
                self.discard(reason, actions);
            }
            Input::Failed { reason } | Input::Discard { reason } => {
                self.tell(Message::Discarded { reason: clip(&reason) }, actions);
                self.discard(reason, actions);
            }
            Input::ArbiterAnswered { generation, answer } => {
                if self.terms.as_ref().is_some_and(|terms| terms.generation == generation) {
                    self.answered(now, answer, actions);
                }
            }
            Input::TakeOver => match &mut self.state {
                State::Replaying => {
                    let reason = "the operator wants this side to take over".into();
                    self.take_over(now, Cause::Forced, reason, actions);
                }
                // Already at it: what the operator adds is that being heard again ends nothing. It would not, either,
                // once the arbiter has been asked.
                State::TakingOver(take) => {
                    if take.cause == Cause::Silent && !take.in_doubt {
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
        let heartbeat = (self.connected && self.state.beats()).then_some(self.next_heartbeat);
        let report = self.report_is_due().then_some(self.next_report);
        let other = match &self.state {
            State::TakingOver(take) => match take.asked {
                Asked::RetryAt(at) => Some(at),
                Asked::No | Asked::Won if !take.fenced => Some(self.lease_over_at()),
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

    /// Whether this side is on its way to be live.
    pub fn takes_over(&self) -> bool {
        matches!(self.state, State::TakingOver(_))
    }

    /// Whether the machine is at its end: live or discarded.
    pub fn ended(&self) -> bool {
        self.state.ended()
    }

    /// The end of the log received.
    pub fn received(&self) -> LogPosition {
        self.received
    }

    /// What this side claims with.
    pub fn who(&self) -> &str {
        &self.config.who
    }

    /// The terms of the pair, once known.
    pub fn terms(&self) -> Option<&Terms> {
        self.terms.as_ref()
    }

    /// The state's name.
    pub fn state_name(&self) -> &'static str {
        self.state.name()
    }

    fn answered(
        &mut self,
        now: Duration,
        answer: Result<Claim, String>,
        actions: &mut Vec<Action>,
    ) {
        let retry = now + self.timing.claim_retry();
        let State::TakingOver(take) = &mut self.state else { return };
        if !matches!(take.asked, Asked::Waiting) {
            return;
        }
        match answer {
            Ok(Claim::Won) => {
                take.asked = Asked::Won;
                take.failover.claimed_us = Some(micros(now.saturating_sub(take.zero)));
                take.unreachable = None;
                if self.stable < Some(self.received) {
                    actions.push(Action::MakeStable { through: self.received });
                }
                actions.push(Action::Changed { state: self.state.name(), reason: None });
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
                if take.from < self.received {
                    // What was drained to ask may be long ago.
                    take.from = self.received;
                    actions.push(Action::MakeStable { through: self.received });
                }
                if first {
                    actions
                        .push(Action::Changed { state: self.state.name(), reason: Some(reason) });
                }
            }
        }
    }

    /// Silence ended before anything was asked of the arbiter: as if nothing had been.
    fn heard_again(&mut self, now: Duration, actions: &mut Vec<Action>) {
        if let State::TakingOver(TakeOver { cause: Cause::Silent, in_doubt: false, .. }) =
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
        if self.connected && self.state.beats() {
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
        let stable = self.stable;
        let drained = !self.state.takes_log() && stable == Some(self.received);
        let State::TakingOver(take) = &mut self.state else { return };
        let Some(terms) = &self.terms else { return };
        let since = micros(now.saturating_sub(take.zero));
        let fenced = lease_over || take.yielded;
        take.fenced = fenced;
        if drained && take.failover.drained_us.is_none() {
            take.failover.drained_us = Some(since);
        }
        if fenced && take.failover.lease_over_us.is_none() {
            take.failover.lease_over_us = Some(since);
        }
        if matches!(take.asked, Asked::RetryAt(at) if now >= at) {
            take.asked = Asked::No;
        }
        // A copy that turns out different while it drains, or whose disk fails, must not have taken the VM from a
        // primary that lives. And the primary is to win where both could go on.
        let may_ask = stable >= Some(take.from) && (fenced || take.cause == Cause::Forced);
        if may_ask && matches!(take.asked, Asked::No) {
            take.asked = Asked::Waiting;
            take.in_doubt = true;
            take.failover.asked_us.get_or_insert(since);
            actions.push(Action::Claim {
                pair: terms.pair.clone(),
                generation: terms.generation,
                who: self.config.who.clone(),
            });
        }
        if !(matches!(take.asked, Asked::Won) && drained) {
            return;
        }
        let told = std::mem::replace(&mut take.told, true);
        let live = fenced.then(|| take.failover.clone());
        let generation = terms.generation;
        if !told {
            self.tell(Message::TakenOver { generation }, actions);
        }
        if let Some(mut failover) = live {
            failover.live_us = Some(since);
            let generation = generation.next();
            let reason = failover.cause.clone();
            self.last_failover = Some(failover.clone());
            actions.push(Action::GoLive { generation, failover });
            self.tell(Message::Live { generation }, actions);
            actions.push(Action::HangUp);
            self.change(State::Live { generation, reason: reason.clone() }, Some(reason), actions);
        }
    }

    fn report_is_due(&self) -> bool {
        self.connected && self.executed > self.reported && self.state.executes()
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
            from: self.received,
            asked: Asked::No,
            in_doubt: false,
            unreachable: None,
            told: false,
            yielded: cause == Cause::HandOver,
            fenced: false,
            zero,
            failover,
        };
        self.change(State::TakingOver(take), Some(reason), actions);
        actions.push(Action::MakeStable { through: self.received });
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
        actions.push(Action::Changed { state: self.state.name(), reason });
    }

    fn illegal(&self, input: &'static str) -> IllegalInput {
        IllegalInput { input, state: self.state.name() }
    }
}
