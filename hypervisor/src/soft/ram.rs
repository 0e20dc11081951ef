//! Guest-physical memory as the processor reaches it: host addresses and page flags without a search through trait
//! objects.

use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

use crate::memory::{GuestMemory, PAGE_SIZE, PageTracker};

/// The RAM of a machine.
pub(super) struct Ram {
    regions: Vec<Region>,
    #[expect(dead_code, reason = "keeps the mappings alive")]
    memory: GuestMemory,
}

struct Region {
    /// First guest-physical address.
    start: u64,
    /// Bytes, a multiple of the page size.
    len: u64,
    /// Host address of the first byte, exposed provenance.
    host: usize,
    tracker: PageTracker,
}

impl Ram {
    pub(super) fn new(memory: GuestMemory) -> Ram {
        let regions = memory
            .iter()
            .filter_map(|region| {
                let host = region.get_host_address(MemoryRegionAddress(0)).ok()?;
                let len = region.len() & !(PAGE_SIZE as u64 - 1);
                Some(Region {
                    start: region.start_addr().raw_value(),
                    len,
                    host: host.expose_provenance(),
                    tracker: (*region).bitmap().clone(),
                })
            })
            .collect();
        Ram { regions, memory }
    }

    #[inline]
    fn region(&self, physical: u64) -> Option<&Region> {
        self.regions.iter().find(|region| physical.wrapping_sub(region.start) < region.len)
    }

    /// Host address of the page at `physical` (any address in it), if it is RAM.
    #[inline]
    pub(super) fn host_page(&self, physical: u64) -> Option<usize> {
        let physical = physical & !(PAGE_SIZE as u64 - 1);
        let region = self.region(physical)?;
        Some(region.host.wrapping_add((physical - region.start) as usize))
    }

    /// The tracker and page number within it of a host address inside a RAM page.
    pub(super) fn tracker_of_host(&self, host: usize) -> Option<(u64, &PageTracker, usize)> {
        self.regions.iter().find_map(|region| {
            let offset = host.wrapping_sub(region.host);
            ((offset as u64) < region.len).then(|| {
                (
                    region.start + (offset & !(PAGE_SIZE - 1)) as u64,
                    &region.tracker,
                    offset / PAGE_SIZE,
                )
            })
        })
    }

    /// The tracker and page number within it of a guest-physical address.
    pub(super) fn tracker(&self, physical: u64) -> Option<(&PageTracker, usize)> {
        let region = self.region(physical)?;
        Some((&region.tracker, (physical - region.start) as usize / PAGE_SIZE))
    }

    /// Reads an aligned 64-bit word, such as a page table entry.
    #[inline]
    pub(super) fn read_u64(&self, physical: u64) -> Option<u64> {
        let host = self.host_page(physical)? + (physical as usize & (PAGE_SIZE - 8));
        // SAFETY: the address is 8-byte aligned and inside a page of guest RAM, which stays mapped as long as
        // `self.memory`; only this thread accesses guest memory while the processor runs.
        Some(unsafe { std::ptr::with_exposed_provenance::<u64>(host).read() })
    }

    /// Reads bytes that all lie in one page. What is not RAM leaves `bytes` as it was.
    pub(super) fn read_bytes(&self, physical: u64, bytes: &mut [u8]) {
        let Some(page) = self.host_page(physical) else {
            return;
        };
        let offset = physical as usize & (PAGE_SIZE - 1);
        let len = bytes.len().min(PAGE_SIZE - offset);
        let from = std::ptr::with_exposed_provenance::<u8>(page + offset);
        // SAFETY: as in `read_u64`; `len` stays inside the page.
        unsafe { std::ptr::copy_nonoverlapping(from, bytes.as_mut_ptr(), len) };
    }

    /// Writes an aligned 64-bit word, as a device would: the page becomes dirty, its blocks stale.
    pub(super) fn write_u64(&self, physical: u64, value: u64) {
        use vm_memory::bitmap::Bitmap;
        let Some(page) = self.host_page(physical) else {
            return;
        };
        let host = page + (physical as usize & (PAGE_SIZE - 8));
        // SAFETY: as in `read_u64`.
        unsafe { std::ptr::with_exposed_provenance_mut::<u64>(host).write(value) };
        if let Some((tracker, number)) = self.tracker(physical) {
            tracker.mark_dirty(number * PAGE_SIZE, 8);
        }
    }

    /// Whether a device wrote to decoded code.
    pub(super) fn has_stale(&self) -> bool {
        self.regions.iter().any(|region| region.tracker.has_stale())
    }

    /// Guest-physical addresses of the pages whose blocks must be dropped.
    pub(super) fn take_stale(&self, pages: &mut Vec<u64>) {
        for region in &self.regions {
            if region.tracker.has_stale() {
                let stale = region.tracker.take_stale();
                pages.extend(
                    stale.iter().map(|page| region.start + u64::from(*page) * PAGE_SIZE as u64),
                );
            }
        }
    }

    /// Appends the dirty page frame numbers and cleans them.
    pub(super) fn take_dirty(&self, pages: &mut Vec<u64>) {
        for region in &self.regions {
            region.tracker.take_dirty(region.start / PAGE_SIZE as u64, pages);
        }
    }
}
