//! What the primary says, and what a backup makes of it.

use std::time::Duration;

use super::state::{Cause, State};
use super::{Action, Backup, MAX_LOG_BUFFER_BYTES};
use crate::codec::MAX_RECORD_BYTES;
use crate::message::{
    CloneStart, DISK_HASH_BYTES, HELLO_MAGIC, Hello, MAX_DISK_HASHES, MAX_DISK_PIECE_BYTES,
    MAX_FRAME_BYTES, Message, PAGE_BYTES,
};
use crate::{LogPosition, PROTOCOL_VERSION, clip};

impl Backup {
    pub(super) fn message(&mut self, now: Duration, message: Message, actions: &mut Vec<Action>) {
        let state = &mut self.state;
        match message {
            Message::Heartbeat { stamp_us, .. } => {
                if state.renews_lease() {
                    self.peer_stamp_us = Some(stamp_us);
                    self.lease_base = Some(now);
                    self.heartbeat(now, actions);
                }
            }
            Message::Hello(hello) if matches!(state, State::Greeting) => {
                self.greeted(hello, actions);
            }
            Message::CloneStart(start) if matches!(state, State::Waiting) => {
                self.start(now, start, actions);
            }
            Message::Payload { bytes } if matches!(state, State::Receiving) => {
                actions.push(Action::LoadPayload { bytes });
            }
            Message::Pages { first, bytes } if matches!(state, State::Receiving) => {
                if bytes.is_empty() || !bytes.len().is_multiple_of(PAGE_BYTES) {
                    return self.violation(now, "sent part of a page", actions);
                }
                actions.push(Action::LoadPages { first, bytes });
            }
            Message::ZeroPages { first, count } if matches!(state, State::Receiving) => {
                actions.push(Action::LoadZeroPages { first, count });
            }
            Message::DiskHashes { disk, first, hashes } if matches!(state, State::Receiving) => {
                if hashes.is_empty() || !hashes.len().is_multiple_of(DISK_HASH_BYTES) {
                    return self.violation(now, "sent part of a hash", actions);
                }
                if hashes.len() > MAX_DISK_HASHES * DISK_HASH_BYTES {
                    return self.violation(now, "sent too many hashes at a time", actions);
                }
                actions.push(Action::CompareDisk { disk, first, hashes });
            }
            Message::DiskData { disk, offset, bytes } if matches!(state, State::Receiving) => {
                if bytes.len() > MAX_DISK_PIECE_BYTES {
                    return self.violation(now, "sent too much of a disk at a time", actions);
                }
                actions.push(Action::LoadDisk { disk, offset, bytes });
            }
            Message::DiskZeroes { disk, offset, len } if matches!(state, State::Receiving) => {
                if len > MAX_DISK_PIECE_BYTES as u64 {
                    return self.violation(now, "sent too much of a disk at a time", actions);
                }
                actions.push(Action::ZeroDisk { disk, offset, len });
            }
            // Said behind the loading of what came before, since actions are performed in order.
            Message::RoundEnd { round } if matches!(state, State::Receiving) => {
                actions.push(Action::Send(Message::RoundTaken { round }));
            }
            Message::State { point, bytes } if matches!(state, State::Receiving) => {
                self.executed_point = point;
                self.loading_since = Some(now);
                actions.push(Action::LoadState { point, bytes });
                self.change(State::Loading, None, actions);
            }
            Message::Armed if matches!(state, State::Settling) => {
                self.detector.set_timeout(now, self.timing.failure_timeout());
                actions.push(Action::Send(Message::Protecting));
                actions.push(Action::Protected);
                self.change(State::Replaying, None, actions);
            }
            Message::Log { position, bytes } if state.takes_log() => {
                self.log(now, position, bytes, actions);
            }
            // Not acknowledged, so no output leaves the primary by it.
            Message::Log { .. } if matches!(state, State::TakingOver(_)) => {}
            Message::HandOver { end } if matches!(state, State::Replaying) => {
                if end != self.received {
                    return self.violation(now, "handed over with part of its log unsent", actions);
                }
                self.take_over(now, Cause::HandOver, "the primary handed over".into(), actions);
            }
            // Either way the primary says that it releases nothing more.
            Message::HandOver { .. } | Message::Yielded
                if matches!(state, State::TakingOver(_)) =>
            {
                if let State::TakingOver(take) = state {
                    take.yielded = true;
                }
            }
            // The arbiter may have answered already. To give up now could leave nobody: the primary
            // may be about to learn that it has lost.
            Message::Disable { .. } if matches!(state, State::TakingOver(take) if take.in_doubt) => {
            }
            Message::Disable { reason } => {
                let reason = clip(&reason);
                actions.push(Action::Send(Message::Discarded { reason: reason.clone() }));
                self.discard(reason, actions);
            }
            Message::Hello(_)
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
            | Message::Accepted
            | Message::Refused { .. }
            | Message::Ready
            | Message::Protecting
            | Message::Ack { .. }
            | Message::Executed { .. }
            | Message::DigestUnequal { .. }
            | Message::TakenOver { .. }
            | Message::Live { .. }
            | Message::Discarded { .. } => {
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
}
