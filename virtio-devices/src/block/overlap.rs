//! Which disk requests may be under way together.
//!
//! Two requests that touch the same sectors, or whose buffers share a guest page, give a result that
//! depends on the order the host happens to do them in. So the later one waits for the earlier one. Two
//! that only read the same sectors, or only take data from the same page, cannot tell the difference.

use serde::{Deserialize, Serialize};

/// What a request touches.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Footprint {
    /// First sector.
    pub sector: u64,
    /// Number of sectors; 0 for a flush.
    pub sectors: u64,
    /// Whether it changes the sectors.
    pub writes_disk: bool,
    /// Guest pages of its data buffers, ascending.
    pub pages: Vec<u64>,
    /// Whether it changes the pages.
    pub writes_pages: bool,
}

impl Footprint {
    /// Whether the order of the two matters.
    pub fn conflicts_with(&self, other: &Self) -> bool {
        let sectors_matter = self.writes_disk || other.writes_disk;
        let pages_matter = self.writes_pages || other.writes_pages;
        (sectors_matter && self.shares_sectors(other)) || (pages_matter && self.shares_pages(other))
    }

    fn shares_sectors(&self, other: &Self) -> bool {
        let end = |f: &Self| f.sector.saturating_add(f.sectors);
        self.sectors > 0
            && other.sectors > 0
            && self.sector < end(other)
            && other.sector < end(self)
    }

    fn shares_pages(&self, other: &Self) -> bool {
        let (mut a, mut b) = (self.pages.iter().peekable(), other.pages.iter().peekable());
        while let (Some(x), Some(y)) = (a.peek(), b.peek()) {
            match x.cmp(y) {
                std::cmp::Ordering::Less => drop(a.next()),
                std::cmp::Ordering::Greater => drop(b.next()),
                std::cmp::Ordering::Equal => return true,
            }
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(sector: u64, sectors: u64, writes_disk: bool) -> Footprint {
        Footprint { sector, sectors, writes_disk, ..Footprint::default() }
    }

    fn memory(pages: &[u64], writes_pages: bool) -> Footprint {
        Footprint { pages: pages.to_vec(), writes_pages, ..Footprint::default() }
    }

    #[test]
    fn sectors_conflict_only_where_a_write_overlaps() {
        assert!(disk(8, 8, true).conflicts_with(&disk(15, 1, false)));
        assert!(disk(15, 1, false).conflicts_with(&disk(8, 8, true)));
        assert!(!disk(8, 8, true).conflicts_with(&disk(16, 1, true)));
        assert!(!disk(8, 8, false).conflicts_with(&disk(8, 8, false)));
        assert!(!disk(0, 0, true).conflicts_with(&disk(0, 8, true)));
        assert!(disk(u64::MAX - 1, 8, true).conflicts_with(&disk(u64::MAX - 1, 1, true)));
    }

    #[test]
    fn pages_conflict_only_where_one_is_written() {
        assert!(memory(&[1, 5, 9], true).conflicts_with(&memory(&[2, 3, 9], false)));
        assert!(!memory(&[1, 5, 9], false).conflicts_with(&memory(&[2, 3, 9], false)));
        assert!(!memory(&[1, 5, 9], true).conflicts_with(&memory(&[2, 3, 10], true)));
        assert!(!memory(&[], true).conflicts_with(&memory(&[2], true)));
    }
}
