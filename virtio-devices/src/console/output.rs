//! Output on its way to a console: a queue of bounded size that whoever runs the guest fills without a
//! lock, so that it never waits for a thread which writes to a slow terminal.

use std::sync::atomic::{AtomicUsize, Ordering};

use crossbeam_queue::SegQueue;

/// What may wait, in bytes of memory.
pub(super) const OUTPUT_MAX: usize = 4 << 20;

/// What a piece costs besides its bytes; a guest may print them one by one.
const PIECE_COST: usize = 64;

/// See the module's documentation.
#[derive(Debug, Default)]
pub(super) struct Output {
    pieces: SegQueue<Vec<u8>>,
    cost: AtomicUsize,
}

impl Output {
    /// Appends `bytes`. Where there is no room the oldest goes.
    pub fn push(&self, bytes: &[u8]) {
        let newest = bytes.len().saturating_sub(OUTPUT_MAX - PIECE_COST);
        let piece = bytes[newest..].to_vec();
        self.cost.fetch_add(cost(&piece), Ordering::Relaxed);
        self.pieces.push(piece);
        while self.cost.load(Ordering::Relaxed) > OUTPUT_MAX && self.take().is_some() {}
    }

    /// The oldest piece.
    pub fn take(&self) -> Option<Vec<u8>> {
        let piece = self.pieces.pop()?;
        self.cost.fetch_sub(cost(&piece), Ordering::Relaxed);
        Some(piece)
    }

    pub fn is_empty(&self) -> bool {
        self.pieces.is_empty()
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
        assert_eq!(output.cost.load(Ordering::Relaxed), 0);
    }
}
