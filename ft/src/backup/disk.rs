//! A backup whose guest waits for a disk of this side.
//!
//! The primary's guest is stopped for as long as the backup's cannot go on, first by lag control, then by the bound of the
//! log. What must hold: no spare stops it for good. So a backup that waits too long says that it is none, and the primary
//! goes on without it. Nor may it leave nobody: it gives up only when it has just heard the primary, and once it takes
//! over from a primary that may be lost, or may have won, it goes on trying. The copy is made stable in one go, which may
//! take much longer than a request: that has [`COPY_PATIENCE`] times as long.

use std::time::Duration;

use super::state::State;
use super::{Action, Backup};
use crate::message::Message;

/// How often the time of a request a whole copy may take to be stable. The primary stands still once its log is full.
const COPY_PATIENCE: u32 = 6;

/// For what, and since when.
#[derive(Clone, Debug)]
pub(super) struct DiskWait {
    device: u8,
    failed: bool,
    since: Duration,
}

impl DiskWait {
    fn begin(wait: &mut Option<Self>, now: Duration, device: u8, failed: bool) {
        wait.get_or_insert(Self { device, failed, since: now }).failed |= failed;
    }
}

impl Backup {
    pub(super) fn awaits_disk(&mut self, now: Duration, device: u8, failed: bool) {
        DiskWait::begin(&mut self.disk_wait, now, device, failed);
    }

    pub(super) fn awaits_stable(&mut self, now: Duration, device: u8, failed: bool) {
        DiskWait::begin(&mut self.stable_wait, now, device, failed);
    }

    /// To be called when the primary has been heard: one that is silent may be dead, and this copy all there is.
    pub(super) fn give_up_on_disk(&mut self, now: Duration, actions: &mut Vec<Action>) {
        if !self.state.can_be_left() {
            return;
        }
        let timeout = self.timing.disk_timeout();
        let over = |since: Duration, bound| {
            let waited = now.saturating_sub(since);
            (waited >= bound).then_some(waited.as_millis())
        };
        let request = [&self.disk_wait, &self.stable_wait].into_iter().flatten().find_map(|wait| {
            let what = match wait.failed {
                true => "has failed a request again and again",
                false => "has not answered",
            };
            let waited = over(wait.since, timeout)?;
            Some(format!("its disk in slot {} {what} for {waited} ms", wait.device))
        });
        let copy = || {
            let since = self.loading_since.filter(|_| matches!(self.state, State::Loading))?;
            let waited = over(since, COPY_PATIENCE * timeout)?;
            Some(format!("its disks have not made the copy stable within {waited} ms"))
        };
        let Some(reason) = request.or_else(copy) else { return };
        self.tell(Message::Discarded { reason: reason.clone() }, actions);
        self.discard(reason, actions);
    }
}

#[cfg(test)]
mod tests {
    use super::super::{BackupConfig, Input};
    use super::*;
    use crate::message::{CloneStart, Hello};
    use crate::{
        Capabilities, DiskMode, DiskReads, ExecutionPoint, Generation, LogPosition, PairId, Terms,
        Timing,
    };

    const TIMEOUT_MS: u64 = 1_000;

    /// A backup that replays, and has ten bytes of log in front of it.
    struct Replaying {
        machine: Backup,
        actions: Vec<Action>,
    }

    impl Replaying {
        fn new() -> Self {
            let mut backup = Self::loading();
            for input in [
                Input::Loaded,
                Input::Message(Message::Armed),
                Input::Message(Message::Log { position: LogPosition(0), bytes: vec![0; 10] }),
            ] {
                backup.step(0, input);
            }
            assert!(backup.machine.protecting());
            backup
        }

        /// Has all that was copied, and makes it stable.
        fn loading() -> Self {
            let config = BackupConfig { who: "b".into(), capabilities: Capabilities::default() };
            let timing = Timing { disk_timeout_ms: TIMEOUT_MS, ..Timing::default() };
            let terms = Terms {
                pair: PairId::new("vm").expect("a name"),
                generation: Generation(1),
                timing,
                log_buffer_bytes: 1 << 20,
                arbiter_url: "file:/shared".into(),
                disk_mode: DiskMode::Mirrored,
                same_host: false,
                disk_reads: DiskReads::Log,
                standbys: Vec::new(),
                standby: "tcp:b:7700".into(),
            };
            let mut backup = Self { machine: Backup::new(at(0), config), actions: Vec::new() };
            let (point, start) = (ExecutionPoint(0), CloneStart { terms, config: Vec::new() });
            for input in [
                Input::Message(Message::Hello(Hello::new("a", Capabilities::default()))),
                Input::Message(Message::CloneStart(start)),
                Input::Accept,
                Input::Message(Message::State { point, bytes: Vec::new() }),
            ] {
                backup.step(0, input);
            }
            backup
        }

        fn step(&mut self, ms: u64, input: Input) {
            self.machine.step(at(ms), input, &mut self.actions).expect("legal");
        }

        fn executes(&mut self, ms: u64, position: u64) {
            let (point, position) = (ExecutionPoint(position), LogPosition(position));
            self.step(ms, Input::Executed { point, position, digests_compared: 0 });
        }

        fn claims(&self) -> bool {
            self.actions.iter().any(|action| matches!(action, Action::Claim { .. }))
        }

        fn hears(&mut self, ms: u64) {
            let stamp_us = ms * 1_000;
            self.step(ms, Input::Message(Message::Heartbeat { stamp_us, echo_us: None }));
        }

        fn awaits(&mut self, ms: u64, failed: bool) {
            self.step(ms, Input::AwaitsDisk { device: 3, failed });
        }

        /// The primary's last word from this side, if there was one.
        fn gave_up(&self) -> Option<&str> {
            self.actions.iter().find_map(|action| match action {
                Action::Send(Message::Discarded { reason }) => Some(reason.as_str()),
                _ => None,
            })
        }
    }

    fn at(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn a_backup_whose_disk_stands_still_for_too_long_gives_itself_up() {
        for (failed, what) in [(true, "failed a request"), (false, "not answered")] {
            let mut backup = Replaying::new();
            backup.awaits(10, false);
            for ms in (100..TIMEOUT_MS + 10).step_by(100) {
                backup.awaits(ms, failed);
                backup.hears(ms);
            }
            backup.hears(TIMEOUT_MS + 9);
            assert_eq!(backup.gave_up(), None);
            backup.hears(TIMEOUT_MS + 10);
            let reason = backup.gave_up().expect("it said so");
            assert!(reason.contains(what) && reason.contains("slot 3"), "{reason}");
            assert_eq!(backup.machine.state_name(), "discarded");
        }
    }

    #[test]
    fn each_request_has_its_own_time() {
        let mut backup = Replaying::new();
        for position in 1..=5 {
            let ms = position * (TIMEOUT_MS - 1);
            let (point, position) = (ExecutionPoint(position), LogPosition(position));
            backup.hears(ms);
            backup.step(ms, Input::Executed { point, position, digests_compared: 0 });
            backup.awaits(ms, false);
            // Told again how far it is, which is no further.
            backup.step(ms, Input::Executed { point, position, digests_compared: 0 });
        }
        assert_eq!(backup.gave_up(), None);
        backup.hears(6 * (TIMEOUT_MS - 1) + 1);
        assert!(backup.gave_up().is_some());
    }

    #[test]
    fn a_copy_that_does_not_become_stable_is_given_up() {
        let patience = TIMEOUT_MS * u64::from(COPY_PATIENCE);
        let mut backup = Replaying::loading();
        for ms in (100..patience).step_by(100) {
            backup.hears(ms);
        }
        assert_eq!(backup.gave_up(), None);
        let mut other = Replaying { machine: backup.machine.clone(), actions: Vec::new() };
        backup.hears(patience);
        assert!(backup.gave_up().is_some_and(|reason| reason.contains("stable")));
        other.step(patience - 1, Input::Loaded);
        other.hears(patience + 1);
        assert!(other.gave_up().is_none());
    }

    #[test]
    fn a_primary_that_is_silent_is_not_left_and_one_that_is_lost_is_taken_over_from() {
        let mut backup = Replaying::new();
        backup.awaits(0, true);
        backup.hears(TIMEOUT_MS - 1);
        backup.step(TIMEOUT_MS + 100, Input::Tick);
        assert!(backup.gave_up().is_none() && backup.machine.protecting());
        backup.step(2 * TIMEOUT_MS, Input::ConnectionLost { reason: "reset".into() });
        for ms in (2 * TIMEOUT_MS..60 * TIMEOUT_MS).step_by(100) {
            backup.awaits(ms, true);
            backup.step(ms, Input::Tick);
        }
        assert!(backup.gave_up().is_none() && backup.machine.state_name() == "draining");
        backup.executes(60 * TIMEOUT_MS, 10);
        backup.awaits(60 * TIMEOUT_MS, false);
        backup.step(90 * TIMEOUT_MS, Input::Tick);
        assert!(!backup.claims(), "what the guest has flushed is not stable yet");
        let position = LogPosition(10);
        backup.step(90 * TIMEOUT_MS, Input::Stable { position });
        assert!(backup.claims() && backup.gave_up().is_none(), "it goes on when the disk does");
    }

    #[test]
    fn an_operators_take_over_does_not_have_a_primary_wait_for_the_disk_for_good() {
        for asks in [false, true] {
            let mut backup = Replaying::new();
            backup.step(5, Input::TakeOver);
            backup.executes(6, 1);
            if asks {
                backup.executes(6, 10);
                backup.step(6, Input::Stable { position: LogPosition(10) });
            }
            for (ms, position) in (10..TIMEOUT_MS + 10).step_by(200).zip(2..) {
                // A guest that goes on is no sign of a disk that does.
                backup.executes(ms, if asks { 10 } else { position });
                backup.step(ms, Input::AwaitsStable { device: 3, failed: true });
                backup.hears(ms);
                assert!(backup.gave_up().is_none() && !backup.machine.ended());
            }
            backup.hears(TIMEOUT_MS + 10);
            // Once it has asked, it may have won without knowing.
            assert_eq!((backup.gave_up().is_some(), backup.claims()), (!asks, asks));
        }
    }
}
