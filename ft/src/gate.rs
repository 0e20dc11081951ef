//! The output gate: holds what the guest sends until the backup could produce it too.
//!
//! The output rule: an output leaves only after the backup acknowledged the log up to the end of the
//! record that the output was logged with. Only then does a backup that goes live reach the state that
//! produced the output. The guest does not wait for it.

use std::collections::VecDeque;
use std::time::Duration;

use crate::{Histogram, LogPosition, OutputNumber, Percentiles};

struct Held<T> {
    number: OutputNumber,
    position: LogPosition,
    behind: LogPosition,
    since: Duration,
    bytes: usize,
    output: T,
}

/// Outputs on their way out, in the order in which the guest produced them.
pub struct OutputGate<T> {
    held: VecDeque<Held<T>>,
    held_bytes: usize,
    released: Option<OutputNumber>,
    executed: LogPosition,
    delays: Histogram,
}

impl<T> Default for OutputGate<T> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T> OutputGate<T> {
    /// Nothing held.
    pub fn new() -> Self {
        Self {
            held: VecDeque::new(),
            held_bytes: 0,
            released: None,
            executed: LogPosition(0),
            delays: Histogram::default(),
        }
    }

    /// Holds an output. `position` is the end of its [`crate::Entry::Output`] record, `bytes` its size
    /// in memory. Numbers and positions must ascend.
    ///
    /// # Panics
    /// If they do not: the run loop that numbers the outputs is broken.
    pub fn hold(
        &mut self,
        now: Duration,
        number: OutputNumber,
        position: LogPosition,
        bytes: usize,
        output: T,
    ) {
        self.hold_behind(now, number, position, LogPosition(0), bytes, output);
    }

    /// As [`OutputGate::hold`]; the output waits moreover until the backup has *executed* the log up to `behind`: it
    /// overwrites what the backup reads by itself before that.
    ///
    /// # Panics
    /// As [`OutputGate::hold`].
    pub fn hold_behind(
        &mut self,
        now: Duration,
        number: OutputNumber,
        position: LogPosition,
        behind: LogPosition,
        bytes: usize,
        output: T,
    ) {
        if let Some(last) = self.held.back() {
            assert!(last.number < number && last.position <= position, "outputs out of order");
        }
        assert!(self.released.is_none_or(|last| last < number), "an output was numbered twice");
        self.held_bytes += bytes;
        self.held.push_back(Held { number, position, behind, since: now, bytes, output });
    }

    /// The backup has executed the log up to `position`. What may leave by that, leaves with the next
    /// [`OutputGate::release`].
    pub fn executed(&mut self, position: LogPosition) {
        self.executed = self.executed.max(position);
    }

    /// Hands out, in order, every output whose position is at most `through`: call it on
    /// `Release { through }` and, with `LogPosition(u64::MAX)`, when the side runs alone. Returns the
    /// number handed out last, ever. What waits for the backup to execute, and everything after it, stays; but a side that runs
    /// alone waits for nobody.
    pub fn release(
        &mut self,
        now: Duration,
        through: LogPosition,
        mut send: impl FnMut(OutputNumber, T),
    ) -> Option<OutputNumber> {
        let alone = through == LogPosition(u64::MAX);
        let executed = self.executed;
        while self
            .held
            .front()
            .is_some_and(|first| first.position <= through && (first.behind <= executed || alone))
        {
            if let Some(held) = self.held.pop_front() {
                self.held_bytes -= held.bytes;
                self.delays.add(now.saturating_sub(held.since));
                self.released = Some(held.number);
                send(held.number, held.output);
            }
        }
        self.released
    }

    /// Drops everything held: this side has halted.
    pub fn discard(&mut self) -> usize {
        self.held_bytes = 0;
        std::mem::take(&mut self.held).len()
    }

    /// Outputs held now.
    pub fn held(&self) -> usize {
        self.held.len()
    }

    /// Their sizes together. The run loop stalls the guest when this passes its bound.
    pub fn held_bytes(&self) -> usize {
        self.held_bytes
    }

    /// The output handed out last. [`crate::Entry::Released`] follows when it has left the host.
    pub fn released(&self) -> Option<OutputNumber> {
        self.released
    }

    /// How long outputs were held.
    pub fn delays(&self) -> Percentiles {
        self.delays.percentiles()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn gate() -> OutputGate<&'static str> {
        let mut gate = OutputGate::new();
        gate.hold(Duration::ZERO, OutputNumber(1), LogPosition(10), 100, "a");
        gate.hold(MS, OutputNumber(2), LogPosition(10), 50, "b");
        gate.hold(2 * MS, OutputNumber(3), LogPosition(30), 7, "c");
        gate
    }

    fn release(gate: &mut OutputGate<&'static str>, ms: u32, through: u64) -> Vec<&'static str> {
        let mut sent = Vec::new();
        gate.release(ms * MS, LogPosition(through), |_, output| sent.push(output));
        sent
    }

    #[test]
    fn nothing_leaves_before_its_position() {
        let mut gate = gate();
        assert!(release(&mut gate, 3, 9).is_empty());
        assert_eq!((gate.held(), gate.held_bytes(), gate.released()), (3, 157, None));
    }

    #[test]
    fn leaves_in_order_up_to_the_position() {
        let mut gate = gate();
        assert_eq!(release(&mut gate, 3, 29), ["a", "b"]);
        assert_eq!((gate.held(), gate.held_bytes()), (1, 7));
        assert_eq!(gate.released(), Some(OutputNumber(2)));
        assert_eq!(release(&mut gate, 3, u64::MAX), ["c"]);
        assert_eq!(gate.held_bytes(), 0);
    }

    #[test]
    fn what_the_backup_has_yet_to_read_is_not_overwritten() {
        let mut gate = gate();
        gate.hold_behind(MS, OutputNumber(4), LogPosition(40), LogPosition(35), 1, "over");
        gate.hold(MS, OutputNumber(5), LogPosition(40), 1, "after");
        assert_eq!(release(&mut gate, 3, 40), ["a", "b", "c"]);
        gate.executed(LogPosition(34));
        assert!(release(&mut gate, 3, 40).is_empty());
        gate.executed(LogPosition(35));
        gate.executed(LogPosition(1));
        assert!(release(&mut gate, 3, 39).is_empty());
        assert_eq!(release(&mut gate, 3, 40), ["over", "after"]);
        gate.hold_behind(MS, OutputNumber(6), LogPosition(50), LogPosition(45), 1, "alone");
        assert_eq!(release(&mut gate, 3, u64::MAX), ["alone"]);
    }

    #[test]
    fn measures_delays() {
        let mut gate = gate();
        release(&mut gate, 12, 30);
        let delays = gate.delays();
        assert_eq!((delays.count, delays.max_us), (3, 12_000));
        assert!((11_000..=12_000).contains(&delays.p50_us), "{delays:?}");
    }

    #[test]
    fn a_halted_side_drops_all() {
        let mut gate = gate();
        assert_eq!(gate.discard(), 3);
        assert!(release(&mut gate, 3, u64::MAX).is_empty());
        assert_eq!(gate.held_bytes(), 0);
    }

    #[test]
    #[should_panic(expected = "numbered twice")]
    fn an_output_released_cannot_come_again() {
        let mut gate = gate();
        release(&mut gate, 3, u64::MAX);
        gate.hold(MS, OutputNumber(3), LogPosition(40), 1, "c");
    }
}
