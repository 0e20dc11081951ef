//! How much a back half may have read that its guest has not taken yet.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// Counts what is under way between a back half's thread and the guest. What is beyond it stays with whoever sends.
#[derive(Debug)]
pub(crate) struct Window {
    max: usize,
    under_way: AtomicUsize,
    /// The thread waits for its bell, which says that there is room again.
    closed: AtomicBool,
}

impl Window {
    /// An open window, for `max` pieces at a time.
    pub(crate) fn new(max: usize) -> Self {
        Self { max, under_way: AtomicUsize::new(0), closed: AtomicBool::new(false) }
    }

    /// Counts a piece handed over.
    pub(crate) fn fill(&self) {
        self.under_way.fetch_add(1, Ordering::SeqCst);
    }

    /// Whether no further piece may be handed over now. If so, the next [`Window::drain`] asks for the bell.
    pub(crate) fn is_closed(&self) -> bool {
        self.closed.store(true, Ordering::SeqCst);
        let full = self.under_way.load(Ordering::SeqCst) >= self.max;
        if !full {
            self.closed.store(false, Ordering::SeqCst);
        }
        full
    }

    /// Counts a piece taken; whether to ring the bell.
    pub(crate) fn drain(&self) -> bool {
        // A piece that was never counted is no reason to count below zero.
        let _ =
            self.under_way.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1));
        self.closed.swap(false, Ordering::SeqCst)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_window_closes_when_nothing_is_taken_and_asks_for_one_ring() {
        let window = Window::new(4);
        for _ in 0..4 {
            assert!(!window.is_closed());
            window.fill();
        }
        assert!(window.is_closed());
        assert!(window.drain(), "the thread sleeps");
        assert!(!window.drain(), "it has been woken");
        assert!(!window.is_closed());
        for _ in 0..2 * 4 {
            assert!(!window.drain());
        }
        window.fill();
        assert!(!window.is_closed());
    }
}
