//! The backup's copies of outputs that the primary may not have released.
//!
//! The backup's guest produces every output again. Those that the log says are out are dropped; the
//! rest are sent when the backup goes live. An output can thus be sent twice, by each side once, which
//! networks and disks tolerate; it can never be lost.

use std::collections::VecDeque;

use crate::OutputNumber;

/// Outputs produced by a replaying guest, in order.
pub struct KeptOutputs<T> {
    kept: VecDeque<(OutputNumber, usize, T)>,
    kept_bytes: usize,
    released: Option<OutputNumber>,
}

impl<T> Default for KeptOutputs<T> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T> KeptOutputs<T> {
    /// Nothing kept.
    pub fn new() -> Self {
        Self { kept: VecDeque::new(), kept_bytes: 0, released: None }
    }

    /// Keeps an output of `bytes` in memory, unless it is known to be out. Numbers must ascend.
    ///
    /// # Panics
    /// If they do not: the run loop that numbers the outputs is broken.
    pub fn keep(&mut self, number: OutputNumber, bytes: usize, output: T) {
        assert!(self.kept.back().is_none_or(|last| last.0 < number), "outputs out of order");
        if self.released.is_none_or(|released| released < number) {
            self.kept_bytes += bytes;
            self.kept.push_back((number, bytes, output));
        }
    }

    /// The log says that the primary released these.
    pub fn released(&mut self, through: OutputNumber) {
        self.released = self.released.max(Some(through));
        while self.kept.front().is_some_and(|first| first.0 <= through) {
            if let Some((_, bytes, _)) = self.kept.pop_front() {
                self.kept_bytes -= bytes;
            }
        }
    }

    /// Everything kept, in order: what to send when going live.
    pub fn take(&mut self) -> impl Iterator<Item = (OutputNumber, T)> + use<T> {
        self.kept_bytes = 0;
        std::mem::take(&mut self.kept).into_iter().map(|(number, _, output)| (number, output))
    }

    /// Outputs kept now.
    pub fn len(&self) -> usize {
        self.kept.len()
    }

    /// Whether nothing is kept.
    pub fn is_empty(&self) -> bool {
        self.kept.is_empty()
    }

    /// Their sizes together.
    pub fn bytes(&self) -> usize {
        self.kept_bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kept() -> KeptOutputs<char> {
        let mut kept = KeptOutputs::new();
        for (number, output) in [(1, 'a'), (2, 'b'), (3, 'c')] {
            kept.keep(OutputNumber(number), 10, output);
        }
        kept
    }

    fn rest(mut kept: KeptOutputs<char>) -> String {
        kept.take().map(|(_, output)| output).collect()
    }

    #[test]
    fn what_is_not_known_to_be_out_is_kept() {
        let mut kept = kept();
        kept.released(OutputNumber(1));
        assert_eq!((kept.len(), kept.bytes()), (2, 20));
        assert_eq!(rest(kept), "bc");
    }

    #[test]
    fn an_output_can_be_known_to_be_out_before_it_is_produced() {
        let mut kept = KeptOutputs::new();
        kept.released(OutputNumber(2));
        for (number, output) in [(1, 'a'), (2, 'b'), (3, 'c')] {
            kept.keep(OutputNumber(number), 10, output);
        }
        assert_eq!(kept.bytes(), 10);
        assert_eq!(rest(kept), "c");
    }

    #[test]
    fn an_old_report_takes_nothing_back() {
        let mut kept = kept();
        kept.released(OutputNumber(3));
        kept.released(OutputNumber(1));
        assert!(kept.is_empty());
    }
}
