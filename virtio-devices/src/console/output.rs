//! Output on its way to a console: a queue of bounded size. Whoever runs the guest fills it and never waits for a slow
//! terminal: it is locked only as long as a piece is put in or taken out.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// What may wait, in bytes of memory.
pub(super) const OUTPUT_MAX: usize = 4 << 20;

/// What a piece costs besides its bytes; a guest may print them one by one.
const PIECE_COST: usize = 64;

/// See the module's documentation.
#[derive(Debug, Default)]
pub(super) struct Output(Mutex<Pieces>);

#[derive(Debug, Default)]
struct Pieces {
    queue: VecDeque<Vec<u8>>,
    cost: usize,
}

impl Output {
    /// Appends `bytes`. Where there is no room the oldest goes.
    pub fn push(&self, bytes: &[u8]) {
        let newest = bytes.len().saturating_sub(OUTPUT_MAX - PIECE_COST);
        let piece = bytes[newest..].to_vec();
        let mut pieces = self.lock();
        pieces.cost += cost(&piece);
        pieces.queue.push_back(piece);
        while pieces.cost > OUTPUT_MAX && pieces.take().is_some() {}
    }

    /// The oldest piece.
    pub fn take(&self) -> Option<Vec<u8>> {
        self.lock().take()
    }

    pub fn is_empty(&self) -> bool {
        self.lock().queue.is_empty()
    }

    fn lock(&self) -> MutexGuard<'_, Pieces> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Pieces {
    fn take(&mut self) -> Option<Vec<u8>> {
        let piece = self.queue.pop_front()?;
        self.cost -= cost(&piece);
        Some(piece)
    }
}

fn cost(piece: &[u8]) -> usize {
    piece.len() + PIECE_COST
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_stays_and_memory_is_bounded() {
        let output = Output::default();
        for _ in 0..3 {
            output.push(&vec![b'x'; OUTPUT_MAX]);
        }
        output.push(b"end");
        assert_eq!(
            output.take().unwrap(),
            b"end",
            "a piece that leaves no room beside it goes whole"
        );
        assert!(output.is_empty());
        for byte in 0..=u8::MAX {
            for _ in 0..1000 {
                output.push(&[byte]);
            }
        }
        let kept: Vec<u8> = std::iter::from_fn(|| output.take()).flatten().collect();
        assert_eq!(kept.len(), OUTPUT_MAX / (PIECE_COST + 1));
        assert_eq!(kept.last(), Some(&u8::MAX));
        assert_eq!(output.lock().cost, 0);
    }
}
