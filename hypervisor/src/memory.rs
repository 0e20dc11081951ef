//! Guest-physical memory with per-page tracking of writes.
//!
//! Every write into guest memory leaves a trace: device writes through the vm-memory traits call
//! [`PageTracker::mark_dirty`](Bitmap::mark_dirty), the software CPU sets the same flags itself. Two
//! readers depend on it: the copy and digest of dirty pages, and the software CPU's block cache (a
//! page that holds decoded code and is then written, by a disk read for example, must lose its
//! blocks).
//!
//! What must hold: a page whose `CODE` flag is set and that is written by anybody but the
//! software CPU's store instructions ends up in the list that [`PageTracker::take_stale`] returns,
//! and [`PageTracker::has_stale`] is true from then until it is taken.

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

use vm_memory::bitmap::{Bitmap, BitmapSlice, NewBitmap, WithBitmapSlice};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use crate::Error;

/// Bytes of a page.
pub const PAGE_SIZE: usize = 4096;

/// The guest's memory: RAM ranges mapped into this process.
pub type GuestMemory = GuestMemoryMmap<PageTracker>;

/// The page was written since the last [`PageTracker::take_dirty`].
pub(crate) const DIRTY: u8 = 1;
/// The software CPU holds decoded blocks of the page.
pub(crate) const CODE: u8 = 2;

/// Maps zeroed memory for the ranges `(first guest-physical address, bytes)`; both must be multiples
/// of the page size, ascending, not overlapping.
pub fn allocate(ranges: &[(u64, usize)]) -> Result<GuestMemory, Error> {
    let bytes = ranges.iter().map(|(_, len)| *len as u64).sum();
    let ranges: Vec<(GuestAddress, usize)> =
        ranges.iter().map(|(start, len)| (GuestAddress(*start), *len)).collect();
    GuestMemory::from_ranges(&ranges)
        .map_err(|error| Error::MapMemory { bytes, source: std::io::Error::other(error) })
}

/// Lets the host back `memory` with transparent huge pages (madvise(2), `MADV_HUGEPAGE`). A guest may so hold more of the
/// host's memory than it touches.
///
/// # Errors
///
/// If the host's kernel has none.
pub fn allow_huge_pages(memory: &GuestMemory) -> std::io::Result<()> {
    for region in memory.iter() {
        // SAFETY: the range is the region's own mapping, which `memory` keeps alive, and the advice changes
        // neither what it holds nor who may access it.
        let result =
            unsafe { libc::madvise(region.as_ptr().cast(), region.size(), libc::MADV_HUGEPAGE) };
        if result != 0 {
            return Err(std::io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Flags of the pages of one region. Clones share them.
#[derive(Debug, Clone, Default)]
pub struct PageTracker {
    pages: Arc<Pages>,
    /// Bytes from the region's start to where this slice starts.
    offset: usize,
}

#[derive(Debug, Default)]
struct Pages {
    flags: Box<[AtomicU8]>,
    /// Something is in `stale`.
    has_stale: AtomicBool,
    /// Pages (numbers within the region) written by a device while they held decoded blocks.
    stale: Mutex<Vec<u32>>,
}

impl PageTracker {
    /// Marks one page of the region as written by the software CPU, which has looked after
    /// its blocks itself.
    pub(crate) fn set_dirty(&self, page: usize) {
        if let Some(flags) = self.pages.flags.get(page) {
            flags.fetch_or(DIRTY, Ordering::Relaxed);
        }
    }

    /// The flags of one page of the region.
    pub(crate) fn flags(&self, page: usize) -> u8 {
        self.pages.flags.get(page).map_or(0, |flags| flags.load(Ordering::Relaxed))
    }

    /// Notes that blocks of `page` are decoded.
    pub(crate) fn set_code(&self, page: usize) {
        if let Some(flags) = self.pages.flags.get(page) {
            flags.fetch_or(CODE, Ordering::Relaxed);
        }
    }

    /// Notes that no block of `page` is left.
    pub(crate) fn clear_code(&self, page: usize) {
        if let Some(flags) = self.pages.flags.get(page) {
            flags.fetch_and(!CODE, Ordering::Relaxed);
        }
    }

    /// Whether [`Self::take_stale`] has something to return.
    pub(crate) fn has_stale(&self) -> bool {
        self.pages.has_stale.load(Ordering::Acquire)
    }

    /// Pages of the region whose blocks must be dropped.
    pub(crate) fn take_stale(&self) -> Vec<u32> {
        let mut stale = self.pages.stale.lock().unwrap_or_else(PoisonError::into_inner);
        self.pages.has_stale.store(false, Ordering::Release);
        std::mem::take(&mut *stale)
    }

    /// Appends the dirty pages (numbers within the region, plus `first`), ascending, and cleans them.
    pub fn take_dirty(&self, first: u64, pages: &mut Vec<u64>) {
        for (number, flags) in (first..).zip(&self.pages.flags) {
            if flags.load(Ordering::Relaxed) & DIRTY != 0 {
                flags.fetch_and(!DIRTY, Ordering::Relaxed);
                pages.push(number);
            }
        }
    }
}

impl<'a> WithBitmapSlice<'a> for PageTracker {
    type S = PageTracker;
}

impl BitmapSlice for PageTracker {}

impl Bitmap for PageTracker {
    fn mark_dirty(&self, offset: usize, len: usize) {
        if len == 0 {
            return;
        }
        let start = self.offset.saturating_add(offset);
        let last = start.saturating_add(len - 1) / PAGE_SIZE;
        for page in start / PAGE_SIZE..=last {
            let Some(flags) = self.pages.flags.get(page) else {
                return;
            };
            let before = flags.load(Ordering::Relaxed);
            if before == DIRTY {
                continue;
            }
            let before = flags.fetch_or(DIRTY, Ordering::Relaxed);
            if before & CODE != 0 {
                flags.fetch_and(!CODE, Ordering::Relaxed);
                let mut stale = self.pages.stale.lock().unwrap_or_else(PoisonError::into_inner);
                stale.push(u32::try_from(page).unwrap_or(u32::MAX));
                self.pages.has_stale.store(true, Ordering::Release);
            }
        }
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.flags(self.offset.saturating_add(offset) / PAGE_SIZE) & DIRTY != 0
    }

    fn slice_at(&self, offset: usize) -> PageTracker {
        PageTracker { pages: Arc::clone(&self.pages), offset: self.offset.saturating_add(offset) }
    }
}

impl NewBitmap for PageTracker {
    fn with_len(len: usize) -> Self {
        let flags = (0..len.div_ceil(PAGE_SIZE)).map(|_| AtomicU8::new(0)).collect();
        let pages =
            Pages { flags, has_stale: AtomicBool::new(false), stale: Mutex::new(Vec::new()) };
        PageTracker { pages: Arc::new(pages), offset: 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The flags of the mapping that holds `address`, of `/proc/self/smaps`.
    fn flags_of_mapping(address: usize) -> Vec<String> {
        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let mut inside = false;
        for line in maps.lines() {
            let range = line.split(' ').next().and_then(|range| range.split_once('-'));
            let bounds = range
                .map(|(from, to)| (usize::from_str_radix(from, 16), usize::from_str_radix(to, 16)));
            if let Some((Ok(from), Ok(to))) = bounds {
                inside = (from..to).contains(&address);
            }
            if let Some(flags) = line.strip_prefix("VmFlags:").filter(|_| inside) {
                return flags.split_whitespace().map(str::to_owned).collect();
            }
        }
        panic!("no mapping holds {address:#x}");
    }

    #[test]
    fn huge_pages_are_allowed_where_asked_for_and_nowhere_else() {
        if !std::fs::exists("/sys/kernel/mm/transparent_hugepage").unwrap() {
            println!("skipped: the kernel has no transparent huge pages");
            return;
        }
        let ranges = [(0, 4 << 20), (1 << 32, 2 << 20)];
        let (allowed, other) = (allocate(&ranges).unwrap(), allocate(&ranges).unwrap());
        allow_huge_pages(&allowed).unwrap();
        for (memory, is_allowed) in [(&allowed, true), (&other, false)] {
            for region in memory.iter() {
                let flags = flags_of_mapping(region.as_ptr() as usize);
                assert_eq!(flags.iter().any(|flag| flag == "hg"), is_allowed, "{flags:?}");
            }
        }
    }
}
