//! When the outputs of a recorded guest are sent on: each at once, or several together.
//!
//! A piece of log costs several thread switches on both hosts, and so does each frame on its own for whoever receives it. A
//! guest that never rests loses nothing by an output that leaves a moment later, for it works on meanwhile; one that waits
//! for an answer loses all of that moment. Which of them a guest is shows when it sleeps: with outputs still
//! collected there was nothing for it to do but wait. Then outputs leave at once for a while, until it is tried again.
//! Network cards moderate their interrupts for the same reason.
//!
//! What must hold: nothing stays collected while the guest sleeps, and nothing for longer than one quantum of its
//! execution. An output made after as much silence leaves at once in any case.

/// Quanta of execution for which a guest that was seen to wait has its outputs sent at once: a trial that fails delays one
/// answer, by the fraction of a quantum that a guest takes to fall asleep.
const HASTE_QUANTA: u64 = 64;

/// See the module's documentation. All positions are execution points.
#[derive(Debug)]
pub struct Gathering {
    /// Where the outputs collected are due; `u64::MAX` if there are none.
    due: u64,
    /// Where the quantum that began with the last outputs sent ends.
    until: u64,
    /// Until where no output waits.
    hasty_until: u64,
}

impl Default for Gathering {
    fn default() -> Self {
        Self { due: u64::MAX, until: 0, hasty_until: 0 }
    }
}

impl Gathering {
    /// The guest made an output at `point`. True if what is collected is to be sent on now; if not, it is at
    /// [`Gathering::due`], or when the guest sleeps.
    #[must_use]
    pub fn made(&mut self, point: u64) -> bool {
        let now = point >= self.until || point < self.hasty_until;
        if !now {
            self.due = self.until;
        }
        now
    }

    /// Where outputs that wait are to be sent on at the latest; `u64::MAX` if none wait.
    #[must_use]
    pub fn due(&self) -> u64 {
        self.due
    }

    /// Outputs are sent on at `point` while the guest runs, `quantum` being the length of one in instructions.
    pub fn sends(&mut self, point: u64, quantum: u64) {
        self.until = point.saturating_add(quantum);
    }

    /// Everything collected has been sent on.
    pub fn sent(&mut self) {
        self.due = u64::MAX;
    }

    /// The guest falls asleep at `point`, which has everything sent on.
    pub fn sleeps(&mut self, point: u64, quantum: u64) {
        if self.due != u64::MAX {
            self.hasty_until = point.saturating_add(quantum.saturating_mul(HASTE_QUANTA));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const QUANTUM: u64 = 1000;

    /// A guest that makes an output every `gap` instructions and sleeps `sleeps_after` instructions behind each, if at
    /// all. Gives how many pieces were sent, and the instructions that outputs waited for in all.
    fn run(gap: u64, sleeps_after: Option<u64>, outputs: u64) -> (u64, u64) {
        let mut gathering = Gathering::default();
        let mut waiting: Vec<u64> = Vec::new();
        let (mut pieces, mut waited) = (0, 0);
        for point in 0..outputs * gap {
            let mut send = point >= gathering.due();
            if point.is_multiple_of(gap) {
                waiting.push(point);
                send |= gathering.made(point);
            }
            if send {
                gathering.sends(point, QUANTUM);
            }
            if sleeps_after == Some(point % gap) {
                gathering.sleeps(point, QUANTUM);
                send |= !waiting.is_empty();
            }
            if send {
                gathering.sent();
                pieces += 1;
                waited += waiting.drain(..).map(|made| point - made).sum::<u64>();
            }
            assert_eq!(gathering.due() == u64::MAX, waiting.is_empty());
            assert!(waiting.first().is_none_or(|made| point - made < QUANTUM));
        }
        (pieces, waited)
    }

    #[test]
    fn a_guest_that_never_rests_has_its_outputs_gathered() {
        let (pieces, _) = run(100, None, 1000);
        assert!((95..=105).contains(&pieces), "{pieces} pieces");
    }

    #[test]
    fn a_guest_that_waits_for_answers_has_each_output_sent_at_once() {
        let (pieces, waited) = run(400, Some(100), 10_000);
        assert_eq!(pieces, 10_000);
        let trials = 10_000 * 400 / (HASTE_QUANTA * QUANTUM) + 1;
        assert!(waited <= trials * 100, "{waited} instructions in at most {trials} trials");
    }

    #[test]
    fn an_output_after_silence_leaves_at_once() {
        assert_eq!(run(QUANTUM, None, 100), (100, 0));
    }

    #[test]
    fn a_guest_that_became_busy_is_found_out() {
        let mut gathering = Gathering::default();
        assert!(gathering.made(0));
        gathering.sends(0, QUANTUM);
        assert!(!gathering.made(10));
        gathering.sleeps(20, QUANTUM);
        gathering.sent();
        let haste_ends = 20 + HASTE_QUANTA * QUANTUM;
        gathering.sends(haste_ends - 1, QUANTUM);
        assert!(gathering.made(haste_ends - 1));
        assert!(!gathering.made(haste_ends), "tried again");
        gathering.sent();
        gathering.sleeps(haste_ends + 5, QUANTUM);
        assert!(!gathering.made(haste_ends + 6), "a sleep with nothing collected says nothing");
    }
}
