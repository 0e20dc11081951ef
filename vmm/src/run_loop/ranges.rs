//! A bounded set of sectors. When it would hold too many pieces it takes in what lies between two of them: whoever asks
//! may hear that a sector is in the set which is not, never the other way round.

use std::collections::BTreeMap;

/// Pieces at most.
const MAX_PIECES: usize = 1024;

/// See the module's documentation.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ranges {
    /// From the first sector of each piece to the one behind its last. They do not touch each other.
    pieces: BTreeMap<u64, u64>,
}

impl Ranges {
    /// Whether it holds nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// Whether a sector from `first` to before `end` is in it.
    #[must_use]
    pub fn overlaps(&self, first: u64, end: u64) -> bool {
        first < end && self.pieces.range(..end).next_back().is_some_and(|(_, &e)| e > first)
    }

    /// Takes the sectors from `first` to before `end` in.
    pub fn insert(&mut self, mut first: u64, mut end: u64) {
        if first >= end {
            return;
        }
        while let Some((&f, &e)) = self.pieces.range(..=end).next_back()
            && e >= first
        {
            (first, end) = (first.min(f), end.max(e));
            self.pieces.remove(&f);
        }
        self.pieces.insert(first, end);
        if self.pieces.len() > MAX_PIECES {
            self.join_nearest();
        }
    }

    /// Drops the sectors from `first` to before `end`.
    pub fn remove(&mut self, first: u64, end: u64) {
        while let Some((&f, &e)) = self.pieces.range(..end).next_back()
            && e > first
            && first < end
        {
            self.pieces.remove(&f);
            if f < first {
                self.pieces.insert(f, first);
            }
            if e > end {
                self.pieces.insert(end, e);
            }
        }
        if self.pieces.len() > MAX_PIECES {
            self.join_nearest();
        }
    }

    fn join_nearest(&mut self) {
        let gaps = self.pieces.iter().zip(self.pieces.iter().skip(1));
        let nearest = gaps.min_by_key(|((_, end), (first, _))| *first - *end);
        if let Some(((&first, _), (&second, &end))) = nearest {
            self.pieces.remove(&second);
            self.pieces.insert(first, end);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn it_is_a_set(steps in prop::collection::vec((any::<bool>(), 0u64..200, 0u64..40), 0..60)) {
            let (mut ranges, mut set) = (Ranges::default(), BTreeSet::new());
            for (insert, first, len) in steps {
                if insert {
                    ranges.insert(first, first + len);
                    set.extend(first..first + len);
                } else {
                    ranges.remove(first, first + len);
                    set.retain(|sector| !(first..first + len).contains(sector));
                }
                for sector in 0..260 {
                    prop_assert_eq!(ranges.overlaps(sector, sector + 1), set.contains(&sector));
                }
                prop_assert_eq!(ranges.is_empty(), set.is_empty());
            }
            prop_assert!(!ranges.overlaps(7, 7));
        }
    }

    #[test]
    fn it_stays_small_and_forgets_nothing() {
        let mut ranges = Ranges::default();
        for n in 0..3 * MAX_PIECES as u64 {
            ranges.insert(n * 10, n * 10 + 1);
        }
        assert_eq!(ranges.pieces.len(), MAX_PIECES);
        assert!((0..3 * MAX_PIECES as u64).all(|n| ranges.overlaps(n * 10, n * 10 + 1)));
        ranges.insert(0, u64::MAX);
        ranges.remove(5, u64::MAX);
        assert_eq!(ranges.pieces, BTreeMap::from([(0, 5)]));
    }
}
