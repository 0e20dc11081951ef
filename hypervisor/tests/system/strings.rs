//! String instructions across page ends: a fault in the second page leaves a state to resume from.

use crate::guest::*;
use iced_x86::code_asm::*;

/// First of two pages.
const PAGE: u64 = USER_DATA_PAGE;
const SECOND: u64 = PAGE + 0x1000;

/// Pushes RCX, RSI, RDI and RAX to [`DATA`] from the fault handler, maps [`SECOND`] and resumes.
fn saving_handler(guest: &mut Guest) {
    guest.gate(14, KERNEL + 0x1000, 0x8e, 0);
    guest.code(KERNEL + 0x1000, |a| {
        a.mov(qword_ptr(DATA), rcx)?;
        a.mov(qword_ptr(DATA + 8), rsi)?;
        a.mov(qword_ptr(DATA + 16), rdi)?;
        a.push(rax)?;
        a.mov(rax, cr2)?;
        a.mov(qword_ptr(DATA + 24), rax)?;
        a.mov(rax, SECOND | P | W)?;
        a.mov(qword_ptr(Guest::entry_of(SECOND)), rax)?;
        a.pop(rax)?;
        a.add(rsp, 8)?;
        a.iretq()?;
        Ok(vec![])
    });
    guest.map(SECOND, 0);
}

/// RCX, RSI, RDI and CR2 at the fault.
fn at_fault(guest: &Guest) -> [u64; 4] {
    [0, 8, 16, 24].map(|offset| guest.read(DATA + offset))
}

#[test]
fn rep_stosb_stops_at_the_page_and_goes_on() {
    let mut guest = Guest::new();
    saving_handler(&mut guest);
    guest.kernel(|a| {
        a.mov(edi, PAGE as u32 + 0xff0)?;
        a.mov(ecx, 0x30)?;
        a.mov(al, 0xab)?;
        a.rep().stosb()?;
        a.mov(qword_ptr(DATA + 32), rcx)?;
        a.mov(qword_ptr(DATA + 40), rdi)?;
        Ok(vec![])
    });
    guest.run();
    assert_eq!(at_fault(&guest)[0], 0x20);
    assert_eq!(at_fault(&guest)[2], SECOND);
    assert_eq!(at_fault(&guest)[3], SECOND);
    assert_eq!((guest.read(DATA + 32), guest.read(DATA + 40)), (0, PAGE + 0x1020));
    assert_eq!(guest.read_bytes(PAGE + 0xff0, 0x30), [0xab; 0x30]);
    assert_eq!(guest.read_bytes(PAGE + 0x1020, 1), [0]);
}

#[test]
fn rep_movsq_with_an_element_across_the_page_end() {
    let mut guest = Guest::new();
    saving_handler(&mut guest);
    let source: Vec<u8> = (0..64).collect();
    guest.write_bytes(DATA + 0x100, &source);
    guest.kernel(|a| {
        a.mov(esi, DATA as u32 + 0x100)?;
        a.mov(edi, PAGE as u32 + 0xfec)?;
        a.mov(ecx, 8)?;
        a.rep().movsq()?;
        Ok(vec![])
    });
    guest.run();
    // Two elements fit; the third crosses and must not have been started.
    assert_eq!(at_fault(&guest), [6, DATA + 0x110, PAGE + 0xffc, SECOND]);
    assert_eq!(guest.read_bytes(PAGE + 0xfec, 64), source);
}

#[test]
fn rep_movsb_with_the_source_in_the_missing_page() {
    let mut guest = Guest::new();
    saving_handler(&mut guest);
    let source: Vec<u8> = (1..=32).collect();
    guest.write_bytes(SECOND - 16, &source);
    guest.kernel(|a| {
        a.mov(esi, SECOND as u32 - 16)?;
        a.mov(edi, DATA as u32 + 0x200)?;
        a.mov(ecx, 32)?;
        a.rep().movsb()?;
        Ok(vec![])
    });
    guest.run();
    assert_eq!(at_fault(&guest), [16, SECOND, DATA + 0x210, SECOND]);
    assert_eq!(guest.read_bytes(DATA + 0x200, 32), source);
}

#[test]
fn backwards_into_the_missing_page() {
    let mut guest = Guest::new();
    saving_handler(&mut guest);
    // The missing page lies below here.
    let third = SECOND + 0x1000;
    guest.kernel(|a| {
        a.mov(edi, third as u32 + 8)?;
        a.mov(ecx, 6)?;
        a.mov(eax, 0x0102_0304)?;
        a.std()?;
        a.rep().stosd()?;
        a.cld()?;
        Ok(vec![])
    });
    guest.run();
    assert_eq!(at_fault(&guest)[0], 3);
    assert_eq!(at_fault(&guest)[2], third - 4);
    assert_eq!(guest.read_bytes(third - 12, 24), [4, 3, 2, 1].repeat(6));
}

#[test]
fn repe_cmpsb_finds_the_difference_in_the_second_page() {
    let mut guest = Guest::new();
    saving_handler(&mut guest);
    guest.write_bytes(SECOND - 8, &[7; 16]);
    guest.write_bytes(DATA + 0x300, &[7; 16]);
    guest.write_bytes(DATA + 0x30c, &[9]);
    guest.kernel(|a| {
        a.mov(esi, SECOND as u32 - 8)?;
        a.mov(edi, DATA as u32 + 0x300)?;
        a.mov(ecx, 16)?;
        a.repe().cmpsb()?;
        a.setb(byte_ptr(DATA + 48))?;
        a.mov(qword_ptr(DATA + 32), rcx)?;
        a.mov(qword_ptr(DATA + 40), rsi)?;
        Ok(vec![])
    });
    guest.run();
    assert_eq!(at_fault(&guest), [8, SECOND, DATA + 0x308, SECOND]);
    assert_eq!((guest.read(DATA + 32), guest.read(DATA + 40)), (3, SECOND + 5));
    assert_eq!(guest.read(DATA + 48), 1, "7 is below 9");
}

#[test]
fn every_iteration_counts_one() {
    let count_of = |iterations: u32| {
        let mut guest = Guest::new();
        guest.kernel(|a| {
            a.mov(edi, PAGE as u32)?;
            a.mov(ecx, iterations)?;
            a.rep().stosb()?;
            Ok(vec![])
        });
        guest.run();
        guest.vcpu.retired()
    };
    let one = count_of(1);
    assert_eq!(count_of(0), one, "none counts one as well");
    assert_eq!(count_of(2), one + 1);
    assert_eq!(count_of(5000), one + 4999);
}

#[test]
fn a_repetition_stops_at_any_iteration() {
    let mut guest = Guest::new();
    guest.kernel(|a| {
        a.mov(edi, PAGE as u32)?;
        a.mov(ecx, 3000)?;
        a.mov(al, 1)?;
        a.rep().stosb()?;
        Ok(vec![])
    });
    guest.run();
    let whole = guest.vcpu.retired();
    // The same guest again, stopped all the way: same memory at the end, same count.
    let mut stopped = Guest::new();
    stopped.kernel(|a| {
        a.mov(edi, PAGE as u32)?;
        a.mov(ecx, 3000)?;
        a.mov(al, 1)?;
        a.rep().stosb()?;
        Ok(vec![])
    });
    stopped.reset();
    while stopped.go_on(7) == hypervisor::Exit::Until {
        let written = stopped.read_bytes(PAGE, 3001).iter().filter(|byte| **byte == 1).count();
        assert!(written <= 3000);
    }
    assert_eq!(stopped.vcpu.retired(), whole);
    assert_eq!(stopped.read_bytes(PAGE, 3001), guest.read_bytes(PAGE, 3001));
}
