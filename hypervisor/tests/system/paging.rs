//! Who may access which page, and what an access leaves in the page tables.

use crate::guest::*;
use iced_x86::code_asm::*;

const READ: u64 = 0;
const PRESENT: u64 = 1;
const WRITE: u64 = 2;
const AT_CPL_3: u64 = 4;
const RESERVED: u64 = 8;
const FETCH: u64 = 16;

/// Bits of a page table entry.
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;

/// The page the tests are about; CPL 3 may reach its directory.
const PAGE: u64 = USER_DATA_PAGE;

#[derive(Clone, Copy)]
enum Access {
    Read,
    Write,
    Fetch,
}

/// Makes one access to [`PAGE`], mapped by `entry`. `None` if it works, otherwise the error code.
fn access(mut guest: Guest, cpl: u8, entry: u64, access: Access) -> (Guest, Option<u64>) {
    guest.map(PAGE, PAGE | entry);
    // RET, for fetches.
    guest.write_bytes(PAGE, &[0xc3]);
    let body = |a: &mut Asm| {
        a.mov(eax, PAGE as u32)?;
        match access {
            Access::Read => a.mov(bl, byte_ptr(rax))?,
            Access::Write => a.mov(byte_ptr(rax), 0xc3)?,
            Access::Fetch => a.call(rax)?,
        }
        // Stands for success.
        a.ud2()?;
        Ok(vec![])
    };
    if cpl == 0 {
        guest.kernel(body)
    } else {
        guest.user(body)
    };
    let record = guest.run_to_fault();
    if record.vector == 6 {
        return (guest, None);
    }
    assert_eq!((record.vector, record.cr2), (14, PAGE), "{record:#x?}");
    (guest, Some(record.error))
}

fn error_of(cpl: u8, entry: u64, kind: Access) -> Option<u64> {
    access(Guest::new(), cpl, entry, kind).1
}

#[test]
fn not_present() {
    assert_eq!(error_of(0, 0, Access::Read), Some(READ));
    assert_eq!(error_of(0, 0, Access::Write), Some(WRITE));
    assert_eq!(error_of(0, 0, Access::Fetch), Some(FETCH));
    assert_eq!(error_of(3, 0, Access::Read), Some(AT_CPL_3));
    assert_eq!(error_of(3, 0, Access::Write), Some(AT_CPL_3 | WRITE));
    assert_eq!(error_of(3, 0, Access::Fetch), Some(AT_CPL_3 | FETCH));
}

#[test]
fn supervisor_pages_are_not_for_users() {
    for (kind, bits) in [(Access::Read, 0), (Access::Write, WRITE), (Access::Fetch, FETCH)] {
        assert_eq!(error_of(3, P | W, kind), Some(PRESENT | AT_CPL_3 | bits));
        assert_eq!(error_of(0, P | W, kind), None);
        assert_eq!(error_of(3, P | W | U, kind), None);
    }
}

#[test]
fn read_only_pages() {
    assert_eq!(error_of(3, P | U, Access::Write), Some(PRESENT | AT_CPL_3 | WRITE));
    assert_eq!(error_of(3, P | U, Access::Read), None);
    // The supervisor obeys only with CR0.WP.
    assert_eq!(error_of(0, P, Access::Write), Some(PRESENT | WRITE));
    let mut guest = Guest::new();
    guest.cr0 &= !CR0_WP;
    assert_eq!(access(guest, 0, P, Access::Write).1, None);
    let mut guest = Guest::new();
    guest.cr0 &= !CR0_WP;
    let error = Some(PRESENT | AT_CPL_3 | WRITE);
    assert_eq!(access(guest, 3, P | U, Access::Write).1, error);
}

#[test]
fn no_execute() {
    assert_eq!(error_of(0, P | W | NX, Access::Fetch), Some(PRESENT | FETCH));
    assert_eq!(error_of(3, P | W | U | NX, Access::Fetch), Some(PRESENT | AT_CPL_3 | FETCH));
    assert_eq!(error_of(3, P | W | U | NX, Access::Write), None);
    // Without EFER.NXE the bit is reserved.
    let mut guest = Guest::new();
    guest.efer &= !(1 << 11);
    assert_eq!(access(guest, 0, P | W | NX, Access::Read).1, Some(PRESENT | RESERVED));
}

#[test]
fn smep_and_smap() {
    let with = |bit| {
        let mut guest = Guest::new();
        guest.cr4 |= bit;
        guest
    };
    let user = P | W | U;
    assert_eq!(access(with(0), 0, user, Access::Fetch).1, None);
    assert_eq!(access(with(CR4_SMEP), 0, user, Access::Fetch).1, Some(PRESENT | FETCH));
    assert_eq!(access(with(CR4_SMEP), 0, user, Access::Read).1, None);
    assert_eq!(access(with(CR4_SMAP), 0, user, Access::Read).1, Some(PRESENT));
    assert_eq!(access(with(CR4_SMAP), 0, user, Access::Write).1, Some(PRESENT | WRITE));
    assert_eq!(access(with(CR4_SMAP), 0, user, Access::Fetch).1, None);
    assert_eq!(access(with(CR4_SMAP | CR4_SMEP), 3, user, Access::Fetch).1, None);
}

#[test]
fn stac_opens_user_pages_and_clac_closes_them() {
    let mut guest = Guest::new();
    guest.cr4 |= CR4_SMAP;
    let labels = guest.kernel(|a| {
        a.mov(eax, PAGE as u32)?;
        a.stac()?;
        a.mov(dword_ptr(rax), 77)?;
        a.mov(ebx, dword_ptr(rax))?;
        a.clac()?;
        let label = here(a);
        a.mov(ecx, dword_ptr(rax))?;
        Ok(vec![label])
    });
    let record = guest.run_to_fault();
    assert_eq!((record.vector, record.error, record.rip), (14, PRESENT, labels[0]));
    assert_eq!(guest.read(PAGE), 77);
}

#[test]
fn reserved_bits() {
    // Beyond the physical address width, at two levels.
    let error = Some(PRESENT | RESERVED);
    assert_eq!(error_of(0, P | W | 1 << 51, Access::Read), error);
    let mut guest = Guest::new();
    let directory = Guest::directory_entry_of(PAGE);
    let entry = guest.read(directory);
    guest.write(directory, entry | 1 << 51);
    assert_eq!(access(guest, 0, P | W, Access::Read).1, error);
    // A 2 MiB page with low address bits set.
    let mut guest = Guest::new();
    guest.write(directory, PAGE & !0x1f_ffff | 1 << 13 | 1 << 7 | P | W | U);
    assert_eq!(access(guest, 0, P | W, Access::Read).1, error);
}

#[test]
fn rights_of_all_levels_count() {
    let directory = Guest::directory_entry_of(PAGE);
    let mut guest = Guest::new();
    let entry = guest.read(directory);
    guest.write(directory, entry & !W);
    assert_eq!(access(guest, 0, P | W, Access::Write).1, Some(PRESENT | WRITE));
    let mut guest = Guest::new();
    guest.write(directory, entry | NX);
    assert_eq!(access(guest, 0, P | W, Access::Fetch).1, Some(PRESENT | FETCH));
}

#[test]
fn accessed_and_dirty_bits() {
    let directory = Guest::directory_entry_of(PAGE);
    let flags = |guest: &Guest| guest.read(Guest::entry_of(PAGE)) & (A | D);
    let (guest, _) = access(Guest::new(), 0, P | W, Access::Read);
    assert_eq!(flags(&guest), A);
    assert_eq!(guest.read(directory) & (A | D), A, "D is for the last level");
    let (guest, _) = access(Guest::new(), 0, P | W, Access::Write);
    assert_eq!(flags(&guest), A | D);
    let (guest, _) = access(Guest::new(), 0, P | W, Access::Fetch);
    assert_eq!(flags(&guest), A);
    // What is refused leaves no trace in the entry that refused it.
    let (guest, error) = access(Guest::new(), 3, P | U, Access::Write);
    assert!(error.is_some());
    assert_eq!(flags(&guest) & D, 0);
}

#[test]
fn a_store_after_a_load_sets_the_dirty_bit() {
    let mut guest = Guest::new();
    guest.kernel(|a| {
        a.mov(eax, PAGE as u32)?;
        a.mov(ebx, dword_ptr(rax))?;
        a.mov(rcx, qword_ptr(Guest::entry_of(PAGE)))?;
        a.mov(qword_ptr(DATA), rcx)?;
        a.mov(dword_ptr(rax), 5)?;
        Ok(vec![])
    });
    guest.run();
    assert_eq!(guest.read(DATA) & (A | D), A);
    assert_eq!(guest.read(Guest::entry_of(PAGE)) & (A | D), A | D);
}

#[test]
fn a_large_page_maps_2_mib() {
    let mut guest = Guest::new();
    let directory = Guest::directory_entry_of(PAGE);
    // The second 2 MiB of RAM in place of the third.
    guest.write(directory, DATA | 1 << 7 | P | W);
    guest.write(DATA + 0x12_3450, 0xfeed);
    guest.kernel(|a| {
        a.mov(eax, USER as u32 + 0x12_3450)?;
        a.mov(rbx, qword_ptr(rax))?;
        a.mov(qword_ptr(rax + 8), rbx)?;
        Ok(vec![])
    });
    guest.run();
    assert_eq!(guest.read(DATA + 0x12_3458), 0xfeed);
    assert_eq!(guest.read(directory) & (A | D), A | D);
}

#[test]
fn invlpg_and_cr3_drop_translations() {
    // Read, change the entry, read again: the old page until INVLPG, or until CR3 is written.
    for flush_all in [false, true] {
        let mut guest = Guest::new();
        let (other, entry) = (PAGE + 0x1000, Guest::entry_of(PAGE));
        guest.write(PAGE, 1);
        guest.write(other, 2);
        guest.kernel(|a| {
            a.mov(esi, PAGE as u32)?;
            a.mov(rax, qword_ptr(rsi))?;
            a.mov(rax, other | P | W)?;
            a.mov(qword_ptr(entry), rax)?;
            if flush_all {
                a.mov(rax, cr3)?;
                a.mov(cr3, rax)?;
            } else {
                a.invlpg(byte_ptr(rsi))?;
            }
            a.mov(rax, qword_ptr(rsi))?;
            a.mov(qword_ptr(DATA), rax)?;
            Ok(vec![])
        });
        guest.run();
        assert_eq!(guest.read(DATA), 2);
    }
}

#[test]
fn global_pages_survive_cr3() {
    let mut guest = Guest::new();
    let (other, entry) = (PAGE + 0x1000, Guest::entry_of(PAGE));
    guest.map(PAGE, PAGE | P | W | 1 << 8);
    guest.write(PAGE, 1);
    guest.write(other, 2);
    guest.kernel(|a| {
        a.mov(esi, PAGE as u32)?;
        a.mov(rax, qword_ptr(rsi))?;
        a.mov(rax, other | P | W)?;
        a.mov(qword_ptr(entry), rax)?;
        a.mov(rax, cr3)?;
        a.mov(cr3, rax)?;
        a.mov(rax, qword_ptr(rsi))?;
        a.mov(qword_ptr(DATA), rax)?;
        // CR4.PGE off drops them as well.
        a.mov(rax, CR4 & !(1 << 7))?;
        a.mov(cr4, rax)?;
        a.mov(rax, qword_ptr(rsi))?;
        a.mov(qword_ptr(DATA + 8), rax)?;
        Ok(vec![])
    });
    guest.run();
    assert_eq!((guest.read(DATA), guest.read(DATA + 8)), (1, 2));
}

#[test]
fn an_access_across_a_page_end_has_no_effect_if_the_second_page_faults() {
    let mut guest = Guest::new();
    guest.map(PAGE + 0x1000, 0);
    guest.write(PAGE + 0xff8, 0x1111_1111_1111_1111);
    let labels = guest.kernel(|a| {
        a.mov(eax, PAGE as u32 + 0xffc)?;
        a.mov(rbx, -1i64 as u64)?;
        let label = here(a);
        a.mov(qword_ptr(rax), rbx)?;
        Ok(vec![label])
    });
    let record = guest.run_to_fault();
    assert_eq!((record.vector, record.error, record.cr2), (14, WRITE, PAGE + 0x1000));
    assert_eq!(record.rip, labels[0]);
    assert_eq!(guest.read(PAGE + 0xff8), 0x1111_1111_1111_1111);
}

#[test]
fn an_instruction_across_a_page_end_faults_in_the_second_page() {
    let mut guest = Guest::new();
    guest.map(PAGE + 0x1000, (PAGE + 0x1000) | P | W | NX);
    // MOV EAX, imm32, of which two bytes are in the first page.
    guest.write_bytes(PAGE + 0xffe, &[0xb8, 1, 2, 3, 4]);
    guest.kernel(|a| {
        a.mov(eax, PAGE as u32 + 0xffe)?;
        a.jmp(rax)?;
        Ok(vec![])
    });
    let record = guest.run_to_fault();
    assert_eq!((record.vector, record.error), (14, PRESENT | FETCH));
    assert_eq!((record.rip, record.cr2), (PAGE + 0xffe, PAGE + 0x1000));
}

#[test]
fn a_fetch_fault_names_the_instruction_in_cr2() {
    let mut guest = Guest::new();
    guest.map(PAGE, 0);
    guest.kernel(|a| {
        a.mov(eax, PAGE as u32 + 0x345)?;
        a.jmp(rax)?;
        Ok(vec![])
    });
    let record = guest.run_to_fault();
    assert_eq!((record.vector, record.rip, record.cr2), (14, PAGE + 0x345, PAGE + 0x345));
}

#[test]
fn code_beside_a_page_table_entry_sees_what_an_access_leaves_there() {
    const ENTRY: u64 = PAGE + 0x1_0000;
    for kind in [Access::Read, Access::Write, Access::Fetch] {
        let mut guest = Guest::new();
        guest.map(ENTRY, ENTRY | P | W);
        guest.write_bytes(ENTRY, &[0xc3]);
        // MOV RAX, the entry itself; RET. The entries before and behind are of pages that nothing uses.
        let routine = Guest::entry_of(ENTRY) - 2;
        guest.write_bytes(routine, &[0x48, 0xb8]);
        guest.write_bytes(routine + 10, &[0xc3]);
        guest.kernel(|a| {
            a.mov(rbx, routine)?;
            a.mov(rcx, ENTRY)?;
            a.call(rbx)?;
            a.mov(rdx, rax)?;
            match kind {
                Access::Read => a.mov(sil, byte_ptr(rcx))?,
                Access::Write => a.mov(byte_ptr(rcx), 0xc3)?,
                Access::Fetch => a.call(rcx)?,
            }
            a.call(rbx)?;
            a.mov(rcx, DATA)?;
            a.mov(qword_ptr(rcx), rdx)?;
            a.mov(qword_ptr(rcx + 8), rax)?;
            Ok(vec![])
        });
        guest.run();
        let accessed = if matches!(kind, Access::Write) { ACCESSED | DIRTY } else { ACCESSED };
        assert_eq!(guest.read(DATA), ENTRY | P | W);
        assert_eq!(guest.read(DATA + 8), ENTRY | P | W | accessed);
    }
}
