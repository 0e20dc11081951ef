//! The output gate: holds what the guest sends until the backup could produce it too.
//!
//! The output rule: an output leaves only after the backup acknowledged the log up to the end of the
//! record that the output was logged with. Only then does a backup that goes live reach the state that
//! produced the output. The guest never waits for it.

use std::collections::VecDeque;
use std::time::Duration;

use crate::{Histogram, LogPosition, OutputNumber, Percentiles};

struct Held<T> {
    number: OutputNumber,
    position: LogPosition,
    since: Duration,
    bytes: usize,
    output: T,
}

/// Outputs on their way out, in the order in which the guest produced them.
pub struct OutputGate<T> {
    held: VecDeque<Held<T>>,
    held_bytes: usize,
    released: Option<OutputNumber>,
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
        Self { held: VecDeque::new(), held_bytes: 0, released: None, delays: Histogram::default() }
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
        if let Some(last) = self.held.back() {
            assert!(last.number < number && last.position <= position, "outputs out of order");
        }
        assert!(self.released.is_none_or(|last| last < number), "an output was numbered twice");
        self.held_bytes += bytes;
        self.held.push_back(Held { number, position, since: now, bytes, output });
    }

    /// Hands out, in order, every output whose position is at most `through`: call it on
    /// `Release { through }` and, with `LogPosition(u64::MAX)`, when the side runs alone. Returns the
    /// number handed out last, ever.
    pub fn release(
        &mut self,
        now: Duration,
        through: LogPosition,
        mut send: impl FnMut(OutputNumber, T),
    ) -> Option<OutputNumber> {
        while self.held.front().is_some_and(|first| first.position <= through) {
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
