//! The pages of the digests that the backup may still be about to compare.

use std::collections::VecDeque;

use crate::{ExecutionPoint, PageHashes, PageNumber};

/// Digests remembered. A backup is never so many behind, or the primary would stand still.
const MAX_DIGESTS: usize = 16;
/// Pages remembered, of all digests together; four MiB.
const MAX_PAGES: usize = 1 << 18;

/// See the module's documentation.
#[derive(Clone, Debug, Default)]
pub(super) struct RecentDigests {
    digests: VecDeque<(ExecutionPoint, PageHashes)>,
    pages: usize,
}

impl RecentDigests {
    /// Remembers one, and forgets the oldest beyond the bounds.
    pub(super) fn add(&mut self, point: ExecutionPoint, pages: PageHashes) {
        self.pages += pages.len();
        self.digests.push_back((point, pages));
        while self.digests.len() > MAX_DIGESTS || self.pages > MAX_PAGES {
            let Some((_, oldest)) = self.digests.pop_front() else { return };
            self.pages -= oldest.len();
        }
    }

    /// The first page that differed at `point` from what a backup says of its own; `None` if that was too
    /// long ago.
    pub(super) fn first_unequal(
        &self,
        point: ExecutionPoint,
        theirs: &PageHashes,
    ) -> Option<PageNumber> {
        let (_, ours) = self.digests.iter().find(|(at, _)| *at == point)?;
        ours.first_unequal(theirs)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::PageHasher;

    #[test]
    fn old_digests_are_forgotten() {
        let list = |fill: u8, count: u64| {
            let mut hasher = PageHasher::new();
            (0..count).for_each(|number| hasher.add(number, &[fill]));
            hasher.into_list()
        };
        let mut recent = RecentDigests::default();
        for point in 0..100 {
            recent.add(ExecutionPoint(point), list(1, 3));
        }
        assert_eq!(recent.digests.len(), MAX_DIGESTS);
        assert_eq!(recent.first_unequal(ExecutionPoint(5), &list(2, 3)), None);
        let last = ExecutionPoint(99);
        assert_eq!(recent.first_unequal(last, &list(2, 3)), Some(PageNumber(0)));
        assert_eq!(recent.first_unequal(last, &list(1, 2)), Some(PageNumber(2)));
        for point in 100..110 {
            recent.add(ExecutionPoint(point), list(1, 1 << 16));
            assert!(recent.pages <= MAX_PAGES);
        }
        assert_eq!(recent.digests.len(), 4);
    }
}
