//! The LAPIC timer fires at exact instruction counts. The TSC runs one tick an instruction here, so that the TSC is the
//! count.

use crate::guest::*;
use hypervisor::Exit;
use hypervisor::clock::Anchor;
use iced_x86::IcedError;
use iced_x86::code_asm::*;

const VECTOR: u32 = 0x60;
const LVT_TIMER: u64 = 0x320;
const INITIAL: u64 = 0x380;
const CURRENT: u64 = 0x390;
const DIVIDE: u64 = 0x3e0;
const PERIODIC: u32 = 1 << 17;
const TSC_DEADLINE: u32 = 2 << 17;
const MASKED: u32 = 1 << 16;
/// Divide by one.
const BY_1: u32 = 0b1011;
/// TSC ticks of a count.
const TICK: u64 = 40;

fn write_lapic(a: &mut Asm, register: u64, value: u32) -> Result<(), IcedError> {
    a.mov(eax, (LAPIC + register) as u32)?;
    a.mov(dword_ptr(rax), value)
}

/// Stores the count of the RDTSC at `address`.
fn stamp(a: &mut Asm, address: u64) -> Result<(), IcedError> {
    a.rdtsc()?;
    a.mov(dword_ptr(address), eax)
}

fn nops(a: &mut Asm, count: usize) -> Result<(), IcedError> {
    (0..count).try_for_each(|_| a.nop())
}

/// Enables the timer, then starts it with `f`, of one instruction, and runs NOPs. Returns the guest, the count before
/// the starting instruction, and the address of the first NOP.
fn timed(
    lvt: u32,
    divide: u32,
    sled: usize,
    f: impl FnOnce(&mut Asm) -> Result<(), IcedError>,
) -> (Guest, u64, u64) {
    let mut guest = Guest::new();
    let labels = guest.kernel(|a| {
        write_lapic(a, LVT_TIMER, lvt)?;
        write_lapic(a, DIVIDE, divide)?;
        a.mov(ebx, (LAPIC + INITIAL) as u32)?;
        a.mov(ecx, 0x6e0)?;
        a.sti()?;
        stamp(a, DATA)?;
        a.xor(edx, edx)?;
        f(a)?;
        let start = here(a);
        nops(a, sled)?;
        Ok(vec![start])
    });
    guest.run();
    // RDTSC, MOV, XOR.
    let before = guest.read(DATA) as u32;
    (guest, u64::from(before) + 3, labels[0])
}

#[test]
fn one_shot_at_the_exact_instruction() {
    for (divide, divider) in [(BY_1, 1), (0, 2), (0b0010, 8)] {
        let (guest, started, sled) = timed(VECTOR, divide, 2000, |a| a.mov(dword_ptr(rbx), 3));
        let records = guest.records();
        assert_eq!(records.len(), 1);
        assert_eq!(records[0].vector, u64::from(VECTOR));
        // The starting instruction is one; then `rip - sled` one-byte NOPs.
        let fired = started + 1 + (records[0].rip - sled);
        assert_eq!(fired, started + 3 * divider * TICK);
    }
}

#[test]
fn periodic_keeps_its_period() {
    let (guest, started, sled) = timed(VECTOR | PERIODIC, BY_1, 2000, |a| a.mov(dword_ptr(rbx), 5));
    let records = guest.records();
    assert!(records.len() > 5, "{} interrupts", records.len());
    // Each handler runs the same instructions, which count as well.
    let gaps: Vec<u64> = records.windows(2).map(|pair| pair[1].rip - pair[0].rip).collect();
    assert!(gaps.iter().all(|gap| *gap == gaps[0]), "{gaps:?}");
    assert!(gaps[0] < 5 * TICK);
    assert_eq!(started + 1 + (records[0].rip - sled), started + 5 * TICK);
}

#[test]
fn tsc_deadline_at_the_exact_instruction() {
    // RAX holds the stamp.
    let mut guest = Guest::new();
    let labels = guest.kernel(|a| {
        write_lapic(a, LVT_TIMER, VECTOR | TSC_DEADLINE)?;
        a.mov(ecx, 0x6e0)?;
        a.sti()?;
        a.rdtsc()?;
        a.mov(ebx, eax)?;
        a.add(eax, 777)?;
        a.wrmsr()?;
        let sled = here(a);
        nops(a, 1000)?;
        // It has disarmed itself.
        a.rdmsr()?;
        a.mov(dword_ptr(DATA), eax)?;
        Ok(vec![sled])
    });
    let records = guest.run();
    assert_eq!(records.len(), 1);
    // RDTSC, MOV, ADD, WRMSR, then NOPs.
    assert_eq!(4 + (records[0].rip - labels[0]), 777);
    assert_eq!(guest.read(DATA) as u32, 0);
}

#[test]
fn a_deadline_in_the_past_fires_at_once_and_zero_disarms() {
    let mut guest = Guest::new();
    let labels = guest.kernel(|a| {
        write_lapic(a, LVT_TIMER, VECTOR | TSC_DEADLINE)?;
        a.mov(ecx, 0x6e0)?;
        a.xor(edx, edx)?;
        a.sti()?;
        a.mov(eax, 1)?;
        a.wrmsr()?;
        let after = here(a);
        a.rdtsc()?;
        a.add(eax, 500)?;
        a.wrmsr()?;
        a.xor(eax, eax)?;
        a.wrmsr()?;
        nops(a, 1000)?;
        Ok(vec![after])
    });
    let records = guest.run();
    assert_eq!(records.len(), 1);
    assert_eq!(records[0].rip, labels[0]);
}

#[test]
fn the_deadline_follows_tsc_adjust() {
    let mut guest = Guest::new();
    let labels = guest.kernel(|a| {
        write_lapic(a, LVT_TIMER, VECTOR | TSC_DEADLINE)?;
        // The guest's TSC is 10000 ahead.
        a.mov(ecx, 0x3b)?;
        a.mov(eax, 10_000)?;
        a.xor(edx, edx)?;
        a.wrmsr()?;
        a.mov(ecx, 0x6e0)?;
        a.sti()?;
        a.rdtsc()?;
        a.mov(dword_ptr(DATA), eax)?;
        a.add(eax, 300)?;
        a.wrmsr()?;
        let sled = here(a);
        nops(a, 1000)?;
        Ok(vec![sled])
    });
    let records = guest.run();
    assert!(guest.read(DATA) as u32 > 10_000);
    assert_eq!(4 + (records[0].rip - labels[0]), 300);
}

#[test]
fn the_current_count_counts_down() {
    let mut guest = Guest::new();
    guest.kernel(|a| {
        write_lapic(a, LVT_TIMER, VECTOR | MASKED)?;
        write_lapic(a, DIVIDE, BY_1)?;
        a.mov(ebx, LAPIC as u32)?;
        a.mov(dword_ptr(rbx + INITIAL as i32), 1000)?;
        a.mov(ecx, dword_ptr(rbx + CURRENT as i32))?;
        nops(a, 400)?;
        a.mov(edx, dword_ptr(rbx + CURRENT as i32))?;
        a.mov(dword_ptr(DATA), ecx)?;
        a.mov(dword_ptr(DATA + 4), edx)?;
        a.mov(dword_ptr(rbx + INITIAL as i32), 1)?;
        nops(a, 100)?;
        a.mov(edx, dword_ptr(rbx + CURRENT as i32))?;
        a.mov(dword_ptr(DATA + 8), edx)?;
        Ok(vec![])
    });
    assert!(guest.run().is_empty(), "masked");
    let counts = guest.read(DATA);
    assert_eq!((counts & 0xffff_ffff, counts >> 32), (1000, 1000 - 10));
    assert_eq!(guest.read(DATA + 8) as u32, 0);
}

#[test]
fn a_halted_processor_names_the_time_it_waits_for() {
    let mut guest = Guest::new();
    let labels = guest.kernel(|a| {
        write_lapic(a, LVT_TIMER, VECTOR)?;
        write_lapic(a, DIVIDE, BY_1)?;
        a.mov(eax, (LAPIC + INITIAL) as u32)?;
        a.mov(dword_ptr(rax), 1_000_000)?;
        a.sti()?;
        a.hlt()?;
        let after = here(a);
        a.nop()?;
        Ok(vec![after])
    });
    guest.reset();
    assert_eq!(guest.go_on(10_000), Exit::Halted);
    let due = guest.vcpu.next_timer_tsc().unwrap();
    let now = guest.vcpu.tsc();
    assert!(due > now && due <= now + 1_000_000 * TICK);
    // Time passes while the processor halts: a new anchor says so.
    let point = guest.vcpu.retired();
    guest.vcpu.set_anchor(Anchor { point, tsc: due - 1, rate: 1 << 32 });
    assert_eq!(guest.go_on(10_000), Exit::Halted);
    assert!(guest.records().is_empty(), "one tick too early");
    guest.vcpu.set_anchor(Anchor { point, tsc: due, rate: 1 << 32 });
    assert_eq!(guest.go_on(10_000), Exit::Halted);
    let records = guest.records();
    assert_eq!(records.len(), 1);
    assert_eq!(records[0].rip, labels[0]);
    assert_eq!(guest.vcpu.next_timer_tsc(), None);
}

#[test]
fn stopping_on_the_way_changes_nothing() {
    let build = || {
        let mut guest = Guest::new();
        guest.kernel(|a| {
            write_lapic(a, LVT_TIMER, VECTOR | PERIODIC)?;
            write_lapic(a, DIVIDE, BY_1)?;
            write_lapic(a, INITIAL, 7)?;
            a.sti()?;
            nops(a, 1500)?;
            Ok(vec![])
        });
        guest
    };
    let mut whole = build();
    let expected = whole.run();
    assert!(expected.len() > 3);
    for step in [1, 3, 64] {
        let mut guest = build();
        guest.reset();
        while guest.go_on(step) == Exit::Until {}
        assert_eq!(guest.records(), expected);
        assert_eq!(guest.vcpu.save().unwrap(), whole.vcpu.save().unwrap());
    }
}
