//! The software TLB: direct-mapped, one table per kind of access and privilege.
//!
//! What must hold: the contents are a function of the instructions executed since the last flush, and of
//! nothing else, because a guest can observe them (a stale translation, an accessed bit not set). So
//! what depends on anything else, the dirty set and which pages hold decoded code, is a flag in an entry that
//! makes its tag mismatch and so leads to the slow path; it never evicts an entry.

use crate::memory::PAGE_SIZE;

/// Entries of a table for one privilege.
const ENTRIES: usize = 1024;
/// Privileges that have tables of their own.
const CONTEXTS: usize = 3;
/// Slots of a table.
const SLOTS: usize = CONTEXTS * ENTRIES;

/// Which of the tables an access uses: it stands for the privilege. Holds the table's first slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(transparent)]
pub(super) struct Context(usize);

impl Context {
    /// CPL 3.
    pub(super) const USER: Context = Context(0);
    /// CPL 0 to 2 with RFLAGS.AC clear, and implicit supervisor accesses: with SMAP no user page is there.
    pub(super) const SUPERVISOR: Context = Context(ENTRIES);
    /// CPL 0 to 2 with RFLAGS.AC set.
    pub(super) const SUPERVISOR_AC: Context = Context(2 * ENTRIES);

    const ALL: [Context; CONTEXTS] = [Context::USER, Context::SUPERVISOR, Context::SUPERVISOR_AC];

    /// The slot of a linear address: always below `SLOTS`.
    #[inline(always)]
    pub(super) fn slot(self, linear: u64) -> Slot {
        Slot(self.0 + ((linear >> 12) as usize & (ENTRIES - 1)))
    }
}

/// An index into a table, made by [`Context::slot`] alone and therefore below `SLOTS`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Slot(usize);

/// Flag in a write tag: the page is not in the dirty set.
pub(super) const NOT_DIRTY: u64 = 1;
/// Flag in a write tag: the page may hold decoded code.
pub(super) const HAS_CODE: u64 = 2;
/// An empty entry: no flag combination of a page.
const EMPTY: u64 = 0x800;
/// The flag bits of a tag.
const FLAGS: u64 = PAGE_SIZE as u64 - 1;

/// One translation.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct Entry {
    /// Linear address of the page, plus flags.
    pub(super) tag: u64,
    /// Data tables: host address minus linear address. Fetch table: guest-physical address of the page.
    pub(super) target: u64,
}

const NO_ENTRY: Entry = Entry { tag: EMPTY, target: 0 };

/// Which table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Access {
    /// Loads.
    Read,
    /// Stores.
    Write,
    /// Instruction fetch.
    Fetch,
}

/// What a table walk found out about a page beyond its address.
#[derive(Debug, Clone, Copy)]
pub(super) struct PageKind {
    /// Stays when CR3 is written.
    pub(super) global: bool,
    /// Log2 of its size: 12, 21 or 30.
    pub(super) shift: u32,
}

/// All tables.
#[repr(C)]
pub(super) struct Tlb {
    read: [Entry; SLOTS],
    write: [Entry; SLOTS],
    fetch: [Entry; SLOTS],
    /// Slots filled with non-global pages since the last flush: what a CR3 write has to empty.
    filled: Vec<u16>,
    /// Bit set over the 2 MiB regions of which a piece of a large page may be cached.
    large_2m: Box<[u64; BLOOM / 64]>,
    /// The same for 1 GiB regions.
    large_1g: Box<[u64; BLOOM / 64]>,
}

const BLOOM: usize = 4096;
/// `filled` never grows beyond this; a flush then goes over everything.
const FILLED_MAX: usize = 4096;

impl Tlb {
    pub(super) fn new() -> Tlb {
        Tlb {
            read: [NO_ENTRY; SLOTS],
            write: [NO_ENTRY; SLOTS],
            fetch: [NO_ENTRY; SLOTS],
            filled: Vec::with_capacity(FILLED_MAX),
            large_2m: Box::new([0; BLOOM / 64]),
            large_1g: Box::new([0; BLOOM / 64]),
        }
    }

    #[inline(always)]
    pub(super) fn read_entry(&self, slot: Slot) -> Entry {
        // SAFETY: a `Slot` is below the table's length.
        unsafe { *self.read.get_unchecked(slot.0) }
    }

    #[inline(always)]
    pub(super) fn write_entry(&self, slot: Slot) -> Entry {
        // SAFETY: a `Slot` is below the table's length.
        unsafe { *self.write.get_unchecked(slot.0) }
    }

    #[inline(always)]
    pub(super) fn fetch_entry(&self, slot: Slot) -> Entry {
        // SAFETY: a `Slot` is below the table's length.
        unsafe { *self.fetch.get_unchecked(slot.0) }
    }

    /// Caches a translation. `target` as in [`Entry`], `flags` for write entries.
    pub(super) fn fill(
        &mut self,
        access: Access,
        slot: Slot,
        page: u64,
        target: u64,
        flags: u64,
        kind: PageKind,
    ) {
        let slot = slot.0;
        let (table, number) = match access {
            Access::Read => (&mut self.read, 0),
            Access::Write => (&mut self.write, 1),
            Access::Fetch => (&mut self.fetch, 2),
        };
        table[slot] = Entry { tag: page | flags, target };
        if !kind.global && self.filled.len() < FILLED_MAX {
            self.filled.push((number * SLOTS + slot) as u16);
        }
        let large = match kind.shift {
            12 => return,
            21 => &mut self.large_2m,
            _ => &mut self.large_1g,
        };
        let (word, bit) = bloom(page >> kind.shift);
        large[word] |= bit;
    }

    /// Removes flags of a write entry.
    pub(super) fn clear_write_flags(&mut self, slot: Slot, flags: u64) {
        self.write[slot.0].tag &= !flags;
    }

    /// Empties everything, or all but global pages.
    pub(super) fn flush(&mut self, keep_global: bool) {
        if keep_global && self.filled.len() < FILLED_MAX {
            for number in self.filled.drain(..) {
                let (table, slot) = (usize::from(number) / SLOTS, usize::from(number) % SLOTS);
                match table {
                    0 => self.read[slot].tag = EMPTY,
                    1 => self.write[slot].tag = EMPTY,
                    _ => self.fetch[slot].tag = EMPTY,
                }
            }
            return;
        }
        // Dropping global pages too where that was not asked for is allowed, and a function of the
        // instructions executed all the same.
        self.filled.clear();
        self.read = [NO_ENTRY; SLOTS];
        self.write = [NO_ENTRY; SLOTS];
        self.fetch = [NO_ENTRY; SLOTS];
        *self.large_2m = [0; BLOOM / 64];
        *self.large_1g = [0; BLOOM / 64];
    }

    /// Drops the translations of one page, global or not, whatever its size.
    pub(super) fn invalidate(&mut self, linear: u64) {
        let page = linear & !FLAGS;
        for context in Context::ALL {
            let slot = context.slot(linear).0;
            for table in [&mut self.read, &mut self.write, &mut self.fetch] {
                if table[slot].tag & !(NOT_DIRTY | HAS_CODE) == page {
                    table[slot].tag = EMPTY;
                }
            }
        }
        let cached = |large: &[u64; BLOOM / 64], shift: u32| {
            let (word, bit) = bloom(linear >> shift);
            large[word] & bit != 0
        };
        if cached(&self.large_1g, 30) {
            self.invalidate_region(linear, 30);
        } else if cached(&self.large_2m, 21) {
            self.invalidate_region(linear, 21);
        }
    }

    fn invalidate_region(&mut self, linear: u64, shift: u32) {
        for table in [&mut self.read, &mut self.write, &mut self.fetch] {
            for entry in table.iter_mut() {
                if entry.tag & EMPTY == 0 && entry.tag >> shift == linear >> shift {
                    entry.tag = EMPTY;
                }
            }
        }
    }

    /// Calls `f` with each cached write translation: its slot and the host address of its page. The flags it returns are
    /// added to the tag.
    pub(super) fn flag_writes(&mut self, mut f: impl FnMut(usize) -> u64) {
        for entry in &mut self.write {
            if entry.tag & EMPTY == 0 {
                let host = (entry.tag & !FLAGS).wrapping_add(entry.target);
                entry.tag |= f(host as usize);
            }
        }
    }
}

fn bloom(number: u64) -> (usize, u64) {
    let bit = (number ^ (number >> 12) ^ (number >> 24)) as usize % BLOOM;
    (bit / 64, 1 << (bit % 64))
}
