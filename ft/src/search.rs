//! Which standby is asked next to hold a backup, and when.
//!
//! ```text
//!  Due ─next─▶ Asking ─accepted─▶ Copying ─protected─▶ Protected
//!   ▲            │ refused           │ lost               │ lost, differed
//!   └────────────┴───────────────────┴────────────────────┘
//! ```
//!
//! What must hold: one standby is asked at a time. A round asks each of them once, beginning behind the one
//! that was lost, or with it if it was only its copy that differed. Between rounds there is a pause that
//! grows up to a bound: standbys that refuse cost next to nothing, and one that comes back is found soon.
//! A protection that does not last counts as an attempt that failed, so that a backup that breaks again and
//! again does not have the guest copied without end; nor, if it has the primary stand still for a sick disk before
//! it gives up, does it take more of the guest's time in the long run than a small part.

use std::time::Duration;

use crate::clip;
use crate::status::{Reprotection, StandbyError};

/// The most standbys that a VM may name.
pub const MAX_STANDBYS: usize = 16;
/// The pause after the first round.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
/// The longest pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// Protection that lasted so long was a success, if its backup did not stand in the primary's way.
const STEADY: Duration = LONGEST_PAUSE;
/// The longest pause behind a backup that stood in the primary's way, as a multiple of the time for which it may.
const PATIENCE_PAUSES: u32 = 10;

/// The search of one VM for its next backup, for as long as somebody wants it protected.
#[derive(Clone, Debug)]
pub struct Search {
    standbys: Vec<String>,
    state: State,
    /// Which standby is meant by `state`: the next one to be asked, or the one being asked or held.
    at: usize,
    /// How many have been asked in this round.
    asked: usize,
    /// Rounds in which nobody accepted, since it last went well.
    rounds: u64,
    pause: Duration,
    /// How long a backup may have the primary stand still before it is given up.
    patience: Duration,
    attempts: u64,
    /// The backup differed, and none has taken its place yet.
    resynchronising: bool,
    /// Of each standby, why it has no backup, since there was one last.
    errors: Vec<Option<String>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Due { at: Duration },
    Asking,
    Copying,
    Protected { since: Duration },
}

impl Search {
    /// Looks among `standbys`, in this order and each once, but never at `own`, the address at which this
    /// side itself was reached.
    pub fn new<'a>(
        now: Duration,
        standbys: impl IntoIterator<Item = &'a str>,
        own: Option<&str>,
    ) -> Self {
        let mut candidates: Vec<String> = Vec::new();
        for standby in standbys {
            if Some(standby) != own && !candidates.iter().any(|known| known == standby) {
                candidates.push(standby.to_owned());
            }
        }
        Self {
            errors: vec![None; candidates.len()],
            standbys: candidates,
            state: State::Due { at: now },
            at: 0,
            asked: 0,
            rounds: 0,
            pause: FIRST_PAUSE,
            patience: Duration::ZERO,
            attempts: 0,
            resynchronising: false,
        }
    }

    /// For backups that may have the primary stand still for so long before they give up.
    #[must_use]
    pub fn with_patience(self, patience: Duration) -> Self {
        Self { patience, ..self }
    }

    /// When [`Search::next`] has something to say; `None` while nobody is to be asked.
    pub fn due(&self) -> Option<Duration> {
        match self.state {
            State::Due { at } if !self.standbys.is_empty() => Some(at),
            _ => None,
        }
    }

    /// The standby to ask now, if one is due. [`Search::refused`] or [`Search::accepted`] is to follow.
    pub fn next(&mut self, now: Duration) -> Option<String> {
        if self.due()? > now {
            return None;
        }
        self.attempts += 1;
        self.asked += 1;
        self.state = State::Asking;
        self.standbys.get(self.at).cloned()
    }

    /// The standby takes the copy.
    pub fn accepted(&mut self) {
        self.state = State::Copying;
    }

    /// The copy is complete; the VM is protected.
    pub fn protected(&mut self, now: Duration) {
        self.state = State::Protected { since: now };
        self.resynchronising = false;
        self.errors.fill(None);
    }

    /// The guest of the backup differs; [`Search::lost`] follows.
    pub fn differed(&mut self) {
        self.resynchronising = true;
    }

    /// Nobody answered, or the standby did not take the VM, or the copy was not finished, or the backup
    /// was lost or gave up.
    pub fn lost(&mut self, now: Duration, reason: &str) {
        let protected_since = match self.state {
            State::Due { .. } => return,
            State::Asking | State::Copying => None,
            State::Protected { since } => Some(since),
        };
        if let Some(error) = self.errors.get_mut(self.at) {
            *error = Some(clip(reason));
        }
        if let Some(since) = protected_since {
            // Its place in the round is used up, unless its host is known to be well.
            self.asked = usize::from(!self.resynchronising);
            if now.saturating_sub(since) >= STEADY + self.patience {
                (self.rounds, self.attempts, self.pause) = (0, 0, FIRST_PAUSE);
                return self.wait_until(now, !self.resynchronising);
            }
        }
        if protected_since.is_some() || self.asked >= self.standbys.len() {
            self.rounds += 1;
            self.asked = 0;
            // Asking costs the guest nothing, a protection that did not last perhaps all that it was patient.
            let longest = match protected_since {
                Some(_) => LONGEST_PAUSE.max(PATIENCE_PAUSES * self.patience),
                None => LONGEST_PAUSE,
            };
            let at = now + self.pause.min(longest);
            self.pause = (2 * self.pause).min(longest.max(self.pause));
            // A copy that differed as soon as it was made is made again where it was.
            return self.wait_until(at, protected_since.is_none() || !self.resynchronising);
        }
        self.wait_until(now, true);
    }

    fn wait_until(&mut self, at: Duration, move_on: bool) {
        if move_on {
            self.at = (self.at + 1) % self.standbys.len().max(1);
        }
        self.state = State::Due { at };
    }

    /// The standby that is asked next, is being asked, or holds the backup.
    pub fn standby(&self) -> Option<&str> {
        self.standbys.get(self.at).map(String::as_str)
    }

    /// Rounds in which nobody accepted, since it last went well.
    pub fn rounds(&self) -> u64 {
        self.rounds
    }

    /// Whether there is anybody to ask.
    pub fn is_hopeless(&self) -> bool {
        self.standbys.is_empty()
    }

    /// What the operator is shown.
    pub fn status(&self, now: Duration) -> Reprotection {
        let state = match self.state {
            _ if self.standbys.is_empty() => "no standby",
            State::Protected { .. } => "protected",
            _ if self.resynchronising => "resynchronising",
            State::Due { .. } => "searching",
            State::Asking => "asking",
            State::Copying => "copying",
        };
        let next_attempt = match self.state {
            State::Due { at } if !self.standbys.is_empty() => Some(at.saturating_sub(now)),
            _ => None,
        };
        let errors = self.standbys.iter().zip(&self.errors).filter_map(|(standby, error)| {
            let (standby, error) = (standby.clone(), error.clone()?);
            Some(StandbyError { standby, error })
        });
        Reprotection {
            state: state.into(),
            standbys: self.standbys.clone(),
            standby: self.standby().map(str::to_owned),
            attempts: self.attempts,
            next_attempt_ms: next_attempt
                .map(|left| u64::try_from(left.as_millis()).unwrap_or(u64::MAX)),
            errors: errors.collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn search(standbys: &[&str], own: Option<&str>) -> Search {
        Search::new(ms(0), standbys.iter().copied(), own)
    }

    /// Asks whoever is next, when it is due, and has it refuse: who it was and when.
    fn refusal(search: &mut Search) -> (String, u64) {
        let due = search.due().unwrap();
        let standby = search.next(due).unwrap();
        search.lost(due, "not today");
        (standby, due.as_millis() as u64)
    }

    fn protect(search: &mut Search, now: u64) -> String {
        let standby = search.next(ms(now)).unwrap();
        search.accepted();
        search.protected(ms(now));
        standby
    }

    #[test]
    fn standbys_are_asked_in_turn_with_growing_pauses_between_rounds() {
        let mut search = search(&["a", "b", "a"], None);
        let asked: Vec<_> = (0..16).map(|_| refusal(&mut search)).collect();
        let mut at = 0;
        for (round, pair) in asked.chunks(2).enumerate() {
            assert_eq!(pair, [("a".into(), at), ("b".into(), at)], "round {round}");
            at += (250 << round).min(10_000);
        }
        assert_eq!(search.rounds(), 8);
    }

    #[test]
    fn one_is_asked_at_a_time_and_not_before_it_is_due() {
        let mut search = search(&["a", "b"], None);
        assert_eq!(search.next(ms(0)).as_deref(), Some("a"));
        assert_eq!(search.due(), None);
        assert_eq!(search.next(ms(9)), None);
        search.lost(ms(9), "no");
        assert_eq!(search.next(ms(9)).as_deref(), Some("b"));
        search.lost(ms(9), "no");
        assert_eq!(search.next(ms(258)), None);
        assert_eq!(search.status(ms(200)).next_attempt_ms, Some(59));
        assert_eq!(search.next(ms(259)).as_deref(), Some("a"));
    }

    #[test]
    fn a_side_never_asks_itself() {
        let mut one = search(&["a", "b"], Some("a"));
        assert_eq!(refusal(&mut one).0, "b");
        assert_eq!(refusal(&mut one).0, "b");
        let mut none = search(&["a", "a"], Some("a"));
        assert_eq!((none.due(), none.next(ms(1_000_000))), (None, None));
        assert!(none.is_hopeless());
        assert_eq!(none.status(ms(0)).state, "no standby");
    }

    #[test]
    fn after_a_loss_the_others_come_first() {
        let mut search = search(&["a", "b", "c"], None);
        assert_eq!(refusal(&mut search).0, "a");
        assert_eq!(protect(&mut search, 0), "b");
        search.lost(ms(20_000), "it died");
        let asked: Vec<_> = (0..4).map(|_| refusal(&mut search)).collect();
        let expected = [("c", 20_000), ("a", 20_000), ("b", 20_250), ("c", 20_250)];
        assert_eq!(asked, expected.map(|(name, at)| (name.to_owned(), at)));
    }

    #[test]
    fn the_only_standby_is_asked_again_after_its_loss() {
        let mut search = search(&["a"], None);
        protect(&mut search, 0);
        search.lost(ms(60_000), "it died");
        assert_eq!(refusal(&mut search), ("a".into(), 60_000));
        assert_eq!(refusal(&mut search), ("a".into(), 60_250));
    }

    #[test]
    fn a_copy_that_differed_is_made_again_on_the_same_standby() {
        let mut search = search(&["a", "b"], None);
        protect(&mut search, 0);
        search.differed();
        search.lost(ms(30_000), "rax differs");
        assert_eq!(search.status(ms(30_000)).state, "resynchronising");
        assert_eq!(search.next(ms(30_000)).as_deref(), Some("a"));
        search.accepted();
        assert_eq!(search.status(ms(30_000)).state, "resynchronising");
        search.lost(ms(30_500), "the copy failed");
        assert_eq!(protect(&mut search, 30_500), "b", "the next one, since that did not work");
        assert_eq!(search.status(ms(30_500)).state, "protected");
    }

    #[test]
    fn protection_that_does_not_last_makes_the_pauses_grow() {
        let mut search = search(&["a"], None);
        let mut now = 0;
        for pause in [250, 500, 1_000, 2_000, 4_000, 8_000, 10_000, 10_000] {
            protect(&mut search, now);
            now += 500;
            search.differed();
            search.lost(ms(now), "rax differs again");
            assert_eq!(search.due(), Some(ms(now + pause)));
            now += pause;
        }
        protect(&mut search, now);
        search.lost(ms(now + 10_000), "it died");
        assert_eq!(search.due(), Some(ms(now + 10_000)), "it had lasted");
    }

    #[test]
    fn a_backup_that_stands_in_the_way_again_and_again_takes_a_small_part_of_the_time() {
        let patience = ms(12_000);
        let mut search = search(&["a"], None).with_patience(patience);
        let (mut now, mut last) = (0, 0);
        for _ in 0..12 {
            protect(&mut search, now);
            now += 12_500;
            search.lost(ms(now), "its disk has not answered");
            let due = search.due().unwrap().as_millis() as u64;
            last = due - now;
            now = due;
        }
        assert_eq!(last, 120_000);
        // That nobody takes the VM is found out at no cost, so it is not waited longer than else.
        let asked = refusal(&mut search).1;
        assert_eq!(search.due(), Some(ms(asked + 10_000)));
        now = asked + 10_000;
        protect(&mut search, now);
        search.lost(ms(now + 12_500), "its disk has not answered");
        assert_eq!(search.due(), Some(ms(now + 12_500 + 120_000)), "it has not been forgotten");
    }

    #[test]
    fn what_is_late_changes_nothing() {
        let mut search = search(&["a", "b"], None);
        refusal(&mut search);
        let before = search.status(ms(0));
        search.lost(ms(5), "not today");
        assert_eq!(search.status(ms(0)), before);
    }

    #[test]
    fn the_status_tells_who_when_and_why_not() {
        let mut search = search(&["a", "b"], None);
        assert_eq!(search.status(ms(0)).state, "searching");
        search.next(ms(0));
        assert_eq!(search.status(ms(0)).state, "asking");
        search.accepted();
        assert_eq!(search.status(ms(0)).state, "copying");
        search.lost(ms(100), "no room");
        let status = search.status(ms(100));
        assert_eq!((status.state.as_str(), status.attempts), ("searching", 1));
        assert_eq!(status.standby.as_deref(), Some("b"));
        assert_eq!(status.next_attempt_ms, Some(0));
        let error = |standby: &str, error: &str| StandbyError {
            standby: standby.into(),
            error: error.into(),
        };
        assert_eq!(status.errors, [error("a", "no room")]);
        refusal(&mut search);
        let status = search.status(ms(100));
        assert_eq!(status.errors, [error("a", "no room"), error("b", "not today")]);
        assert_eq!(status.next_attempt_ms, Some(250));
        protect(&mut search, 350);
        assert_eq!(search.status(ms(350)).errors, []);
    }
}
