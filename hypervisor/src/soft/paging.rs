//! Linear to guest-physical addresses: the 4-level walk of Intel SDM vol. 3, 5.5, with accessed and dirty bits, NX,
//! CR0.WP, SMEP and SMAP.

use super::cpu::{CR0_PG, CR0_WP, CR4_SMAP, CR4_SMEP, Cpu, EFER_NXE, Trap, TrapKind};
use super::exception::PAGE_FAULT;
use super::tlb::{Access, Context, PageKind};
use crate::memory::CODE;

/// Width of guest-physical addresses; higher bits are reserved in page table entries. CPUID says the same.
pub const PHYSICAL_ADDRESS_BITS: u32 = 46;

const PRESENT: u64 = 1 << 0;
const WRITABLE: u64 = 1 << 1;
const USER_PAGE: u64 = 1 << 2;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const LARGE: u64 = 1 << 7;
const GLOBAL: u64 = 1 << 8;
const NX: u64 = 1 << 63;
const ADDRESS: u64 = ((1 << PHYSICAL_ADDRESS_BITS) - 1) & !0xfff;
const RESERVED: u64 = ((1 << 52) - 1) & !((1 << PHYSICAL_ADDRESS_BITS) - 1);

/// Page fault error code: the page was present.
pub const ERROR_PRESENT: u32 = 1 << 0;
/// Page fault error code: a store.
pub const ERROR_WRITE: u32 = 1 << 1;
/// Page fault error code: at CPL 3.
pub const ERROR_USER: u32 = 1 << 2;
/// Page fault error code: a reserved bit is set in an entry.
pub const ERROR_RESERVED: u32 = 1 << 3;
/// Page fault error code: an instruction fetch.
pub const ERROR_FETCH: u32 = 1 << 4;

/// Where a page is.
pub(super) struct Translation {
    /// Guest-physical address of the linear address asked for.
    pub(super) physical: u64,
    pub(super) kind: PageKind,
}

/// Whether bits 48 to 63 repeat bit 47.
#[inline(always)]
pub fn is_canonical(linear: u64) -> bool {
    ((linear << 16) as i64 >> 16) as u64 == linear
}

impl Cpu {
    fn page_fault(&mut self, linear: u64, error: u32) -> Trap {
        self.cr2 = linear;
        self.trap = TrapKind::Exception { vector: PAGE_FAULT, error_code: Some(error) };
        Trap
    }

    /// Walks the page tables for an access with the privilege that `context` stands for. Sets A
    /// and D bits when the access is allowed; raises #PF, with CR2 set, when it is not.
    pub(super) fn walk(
        &mut self,
        linear: u64,
        access: Access,
        context: Context,
    ) -> Result<Translation, Trap> {
        if !is_canonical(linear) {
            self.trap = TrapKind::NonCanonical;
            return Err(Trap);
        }
        if self.cr0 & CR0_PG == 0 {
            return Ok(Translation {
                physical: linear,
                kind: PageKind { global: true, shift: 12 },
            });
        }
        let user = context == Context::USER;
        let mut error = if user { ERROR_USER } else { 0 };
        error |= match access {
            Access::Read => 0,
            Access::Write => ERROR_WRITE,
            Access::Fetch if self.efer & EFER_NXE != 0 || self.cr4 & CR4_SMEP != 0 => ERROR_FETCH,
            Access::Fetch => 0,
        };
        let nx_reserved = if self.efer & EFER_NXE == 0 { NX } else { 0 };

        let mut entries = [(0, 0); 4];
        let mut table = self.cr3 & ADDRESS;
        let mut rights = WRITABLE | USER_PAGE;
        let mut nx = 0;
        let mut shift = 39;
        let mut depth = 0;
        let leaf = loop {
            let address = table + ((linear >> shift) & 0x1ff) * 8;
            let entry = self.ram.read_u64(address).unwrap_or(u64::MAX);
            entries[depth] = (address, entry);
            depth += 1;
            if entry & PRESENT == 0 {
                return Err(self.page_fault(linear, error));
            }
            let mut reserved = RESERVED | nx_reserved;
            let leaf = shift == 12 || (entry & LARGE != 0 && shift != 39);
            if shift == 39 {
                reserved |= LARGE;
            } else if leaf && shift != 12 {
                // Bit 12 of a large page is its PAT bit.
                reserved |= ((1 << shift) - 1) & !0x1fff;
            }
            if entry & reserved != 0 {
                return Err(self.page_fault(linear, error | ERROR_RESERVED | ERROR_PRESENT));
            }
            rights &= entry;
            nx |= entry & NX;
            if leaf {
                break entry;
            }
            table = entry & ADDRESS;
            shift -= 9;
        };

        let user_page = rights & USER_PAGE != 0;
        let writable = rights & WRITABLE != 0;
        let allowed = match access {
            Access::Fetch => {
                nx == 0 && if user { user_page } else { !(user_page && self.cr4 & CR4_SMEP != 0) }
            }
            Access::Read | Access::Write => {
                let reachable = if user {
                    user_page
                } else {
                    !user_page || self.cr4 & CR4_SMAP == 0 || context == Context::SUPERVISOR_AC
                };
                let may_write = writable || (!user && self.cr0 & CR0_WP == 0);
                reachable && (access == Access::Read || may_write)
            }
        };
        if !allowed {
            return Err(self.page_fault(linear, error | ERROR_PRESENT));
        }
        for (number, (address, entry)) in entries[..depth].iter().enumerate() {
            let mut set = ACCESSED;
            if number + 1 == depth && access == Access::Write {
                set |= DIRTY;
            }
            if entry & set != set {
                self.write_entry(*address, entry | set, access)?;
            }
        }
        let offset = (1 << shift) - 1;
        let physical = (leaf & ADDRESS & !offset) | (linear & offset);
        Ok(Translation { physical, kind: PageKind { global: leaf & GLOBAL != 0, shift } })
    }

    /// Writes a page table entry. Where decoded code lies beside it, that is a store to code like any other: what it
    /// changes is gone before the next block runs, and the running one is left before.
    fn write_entry(&mut self, address: u64, entry: u64, access: Access) -> Result<(), Trap> {
        let tracked = self.ram.tracker(address);
        if tracked.is_some_and(|(tracker, page)| tracker.flags(page) & CODE != 0) {
            if access == Access::Fetch {
                // Between two blocks.
                self.fetched_over_code = true;
            } else if !self.single_step {
                self.trap = TrapKind::SingleStep;
                return Err(Trap);
            }
        }
        self.ram.write_u64(address, entry);
        Ok(())
    }

    /// Drops cached translations: all, or all but those of global pages.
    pub fn flush_tlb(&mut self, keep_global: bool) {
        self.tlb.flush(keep_global);
        self.fetch_page = super::cpu::NO_PAGE;
    }

    /// INVLPG: drops the cached translations of one page.
    pub fn invalidate_page(&mut self, linear: u64) {
        self.tlb.invalidate(linear);
        self.fetch_page = super::cpu::NO_PAGE;
    }
}
