//! When interrupts are taken, in which order, and what ends them.

use crate::guest::*;
use hypervisor::{Exit, Msi};
use iced_x86::IcedError;
use iced_x86::code_asm::*;

/// OUT `value` to `port`.
fn out_to(a: &mut Asm, port: u16, value: u8) -> Result<(), IcedError> {
    a.mov(edx, u32::from(port))?;
    a.mov(eax, u32::from(value))?;
    a.out(dx, al)
}

fn write_lapic(a: &mut Asm, register: u64, value: u32) -> Result<(), IcedError> {
    a.mov(eax, (LAPIC + register) as u32)?;
    a.mov(dword_ptr(rax), value)
}

/// Programs an IOAPIC input: the low half of its redirection entry, for APIC 0.
fn redirect(a: &mut Asm, pin: u32, low: u32) -> Result<(), IcedError> {
    a.mov(ebx, IOAPIC as u32)?;
    for (index, value) in [(0x11 + 2 * pin, 0), (0x10 + 2 * pin, low)] {
        a.mov(dword_ptr(rbx), index)?;
        a.mov(dword_ptr(rbx + 0x10), value)?;
    }
    Ok(())
}

fn vectors(records: &[Record]) -> Vec<u64> {
    records.iter().map(|record| record.vector).collect()
}

#[test]
fn taken_right_after_the_instruction_that_raised_it() {
    let mut guest = Guest::new();
    let labels = guest.kernel(|a| {
        a.sti()?;
        a.nop()?;
        out_to(a, PORT_MSI, 0x40)?;
        let after = here(a);
        a.nop()?;
        Ok(vec![after])
    });
    let records = guest.run();
    assert_eq!(vectors(&records), [0x40]);
    assert_eq!(records[0].rip, labels[0]);
    assert_ne!(records[0].rflags & 1 << 9, 0, "the saved IF is set");
    assert_eq!(records[0].rflags & 1 << 16, 0, "an interrupt does not save RF");
}

#[test]
fn sti_shadows_one_instruction() {
    let mut guest = Guest::new();
    let labels = guest.kernel(|a| {
        out_to(a, PORT_MSI, 0x40)?;
        a.sti()?;
        a.nop()?;
        let after = here(a);
        a.nop()?;
        Ok(vec![after])
    });
    let records = guest.run();
    assert_eq!(vectors(&records), [0x40]);
    assert_eq!(records[0].rip, labels[0]);
}

#[test]
fn sti_cli_lets_nothing_through() {
    let mut guest = Guest::new();
    guest.kernel(|a| {
        out_to(a, PORT_MSI, 0x40)?;
        a.sti()?;
        a.cli()?;
        a.nop()?;
        Ok(vec![])
    });
    assert_eq!(vectors(&guest.run()), [0u64; 0]);
}

#[test]
fn the_shadow_survives_a_stop_between_the_two_instructions() {
    let mut guest = Guest::new();
    let labels = guest.kernel(|a| {
        out_to(a, PORT_MSI, 0x40)?;
        a.sti()?;
        a.nop()?;
        let after = here(a);
        a.nop()?;
        Ok(vec![after])
    });
    guest.reset();
    while guest.go_on(1) == Exit::Until {
        let state = guest.vcpu.save().unwrap();
        guest.vcpu.restore(&state).unwrap();
    }
    let records = guest.records();
    assert_eq!(vectors(&records), [0x40]);
    assert_eq!(records[0].rip, labels[0]);
}

#[test]
fn mov_ss_shadows_one_instruction() {
    let mut guest = Guest::new();
    let labels = guest.kernel(|a| {
        a.sti()?;
        a.nop()?;
        // The TPR holds the interrupt back until CR8 is written, behind which the stack is switched.
        a.mov(eax, 15)?;
        a.mov(cr8, rax)?;
        out_to(a, PORT_MSI, 0x40)?;
        a.mov(ebx, u32::from(KERNEL_DATA))?;
        a.cli()?;
        a.xor(eax, eax)?;
        a.mov(cr8, rax)?;
        a.push(0x202)?;
        a.mov(ss, bx)?;
        a.popfq()?;
        let after = here(a);
        a.nop()?;
        Ok(vec![after])
    });
    let records = guest.run();
    assert_eq!(vectors(&records), [0x40]);
    assert_eq!(records[0].rip, labels[0]);

    // IF set all along: raised in the shadow itself.
    let mut guest = Guest::new();
    let labels = guest.kernel(|a| {
        a.sti()?;
        a.mov(ebx, u32::from(KERNEL_DATA))?;
        a.mov(edx, u32::from(PORT_MSI))?;
        a.mov(eax, 0x40)?;
        a.cli()?;
        a.out(dx, al)?;
        a.sti()?;
        a.mov(ss, bx)?;
        a.nop()?;
        let after = here(a);
        a.nop()?;
        Ok(vec![after])
    });
    let records = guest.run();
    assert_eq!(records[0].rip, labels[0], "STI's shadow and then that of MOV SS");
}

#[test]
fn popf_and_iret_enable_at_once() {
    let mut guest = Guest::new();
    let labels = guest.kernel(|a| {
        out_to(a, PORT_MSI, 0x40)?;
        a.push(0x202)?;
        a.popfq()?;
        let after = here(a);
        a.nop()?;
        Ok(vec![after])
    });
    assert_eq!(guest.run()[0].rip, labels[0]);
}

#[test]
fn higher_classes_first_and_equal_classes_wait() {
    let mut guest = Guest::new();
    guest.kernel(|a| {
        for vector in [0x31, 0x52, 0x41, 0x5f] {
            out_to(a, PORT_MSI, vector)?;
        }
        a.sti()?;
        a.nop()?;
        a.nop()?;
        Ok(vec![])
    });
    assert_eq!(vectors(&guest.run()), [0x5f, 0x52, 0x41, 0x31]);
}

#[test]
fn an_interrupt_in_service_holds_back_its_class_and_lower_ones() {
    let mut guest = Guest::new();
    guest.kernel(|a| {
        a.mov(qword_ptr(NO_EOI), 1)?;
        a.sti()?;
        out_to(a, PORT_MSI, 0x50)?;
        out_to(a, PORT_MSI, 0x58)?;
        out_to(a, PORT_MSI, 0x48)?;
        out_to(a, PORT_MSI, 0x60)?;
        Ok(vec![])
    });
    assert_eq!(vectors(&guest.run()), [0x50, 0x60]);
}

#[test]
fn the_task_priority_masks_through_cr8_and_memory() {
    let mut guest = Guest::new();
    let labels = guest.kernel(|a| {
        a.sti()?;
        a.mov(eax, 5)?;
        a.mov(cr8, rax)?;
        out_to(a, PORT_MSI, 0x5f)?;
        a.nop()?;
        out_to(a, PORT_MSI, 0x60)?;
        let first = here(a);
        a.mov(eax, LAPIC as u32 + 0x80)?;
        a.mov(ecx, dword_ptr(rax))?;
        write_lapic(a, 0x80, 0x4f)?;
        let second = here(a);
        a.mov(rbx, cr8)?;
        a.mov(dword_ptr(DATA), ecx)?;
        a.mov(dword_ptr(DATA + 4), ebx)?;
        Ok(vec![first, second])
    });
    let records = guest.run();
    assert_eq!(vectors(&records), [0x60, 0x5f]);
    assert_eq!([records[0].rip, records[1].rip], labels[..]);
    assert_eq!(guest.read(DATA), 4 << 32 | 0x50);
}

#[test]
fn an_edge_at_the_ioapic_is_one_interrupt() {
    let mut guest = Guest::new();
    guest.kernel(|a| {
        redirect(a, 4, 0x44)?;
        a.sti()?;
        out_to(a, PORT_RAISE, 4)?;
        out_to(a, PORT_RAISE, 4)?;
        out_to(a, PORT_LOWER, 4)?;
        out_to(a, PORT_RAISE, 4)?;
        Ok(vec![])
    });
    assert_eq!(vectors(&guest.run()), [0x44, 0x44]);
}

#[test]
fn a_level_comes_back_after_eoi_until_lowered() {
    let mut guest = Guest::new();
    guest.gate(0x45, KERNEL + 0x4000, 0x8e, 0);
    // Counts, lowers the line the third time, EOI.
    guest.code(KERNEL + 0x4000, |a| {
        let mut eoi = a.create_label();
        a.inc(dword_ptr(DATA))?;
        a.cmp(dword_ptr(DATA), 3)?;
        a.jne(eoi)?;
        out_to(a, PORT_LOWER, 9)?;
        a.set_label(&mut eoi)?;
        // Remote IRR while in service.
        a.mov(ebx, IOAPIC as u32)?;
        a.mov(dword_ptr(rbx), 0x10 + 2 * 9)?;
        a.mov(ecx, dword_ptr(rbx + 0x10))?;
        a.mov(dword_ptr(DATA + 4), ecx)?;
        write_lapic(a, 0xb0, 0)?;
        a.iretq()?;
        Ok(vec![])
    });
    guest.kernel(|a| {
        redirect(a, 9, 0x45 | 1 << 15)?;
        a.sti()?;
        out_to(a, PORT_RAISE, 9)?;
        for _ in 0..8 {
            a.nop()?;
        }
        a.mov(ecx, dword_ptr(rbx + 0x10))?;
        a.mov(dword_ptr(DATA + 8), ecx)?;
        Ok(vec![])
    });
    guest.run();
    assert_eq!(guest.read_bytes(DATA, 4), [3, 0, 0, 0]);
    assert_eq!(guest.read(DATA + 4) >> 14 & 3, 3, "level, remote IRR");
    assert_eq!(guest.read(DATA + 8) >> 14 & 3, 2, "remote IRR is clear at the end");
}

#[test]
fn a_self_ipi() {
    let mut guest = Guest::new();
    guest.kernel(|a| {
        a.sti()?;
        write_lapic(a, 0x300, 0x4_0077)?;
        a.nop()?;
        // Physical destination 0, and logical destination by LDR.
        write_lapic(a, 0x310, 0)?;
        write_lapic(a, 0x300, 0x78)?;
        write_lapic(a, 0xd0, 0x0200_0000)?;
        write_lapic(a, 0x310, 0x0200_0000)?;
        write_lapic(a, 0x300, 0x879)?;
        // Nobody: all but self, another id.
        write_lapic(a, 0x300, 0xc_007a)?;
        write_lapic(a, 0x310, 0x0500_0000)?;
        write_lapic(a, 0x300, 0x7b)?;
        Ok(vec![])
    });
    assert_eq!(vectors(&guest.run()), [0x77, 0x78, 0x79]);
}

#[test]
fn an_nmi_ignores_if_and_blocks_until_iret() {
    let mut guest = Guest::new();
    guest.gate(2, KERNEL + 0x4000, 0x8e, 0);
    guest.code(KERNEL + 0x4000, |a| {
        let mut leave = a.create_label();
        a.inc(dword_ptr(DATA))?;
        a.cmp(dword_ptr(DATA), 1)?;
        a.jne(leave)?;
        // Another one while the first is handled: held.
        write_lapic(a, 0x300, 0x4_0400)?;
        a.mov(ecx, dword_ptr(DATA))?;
        a.mov(dword_ptr(DATA + 4), ecx)?;
        a.set_label(&mut leave)?;
        a.iretq()?;
        Ok(vec![])
    });
    guest.kernel(|a| {
        write_lapic(a, 0x300, 0x4_0400)?;
        a.nop()?;
        a.mov(ecx, dword_ptr(DATA))?;
        a.mov(dword_ptr(DATA + 8), ecx)?;
        Ok(vec![])
    });
    guest.run();
    assert_eq!(guest.read(DATA), 1 << 32 | 2);
    assert_eq!(guest.read_bytes(DATA + 8, 1), [2]);
}

#[test]
fn hlt_wakes_for_an_interrupt_from_outside() {
    let mut guest = Guest::new();
    let labels = guest.kernel(|a| {
        a.sti()?;
        a.hlt()?;
        let after = here(a);
        a.mov(dword_ptr(DATA), 1)?;
        Ok(vec![after])
    });
    guest.reset();
    assert_eq!(guest.go_on(10_000), Exit::Halted);
    let count = guest.vcpu.retired();
    assert_eq!(guest.go_on(10_000), Exit::Halted, "nothing happens without an interrupt");
    assert_eq!(guest.vcpu.retired(), count, "a halted processor does not count");
    guest.vcpu.interrupts().signal_msi(Msi { address: LAPIC, data: 0x41 });
    assert_eq!(guest.go_on(10_000), Exit::Halted);
    let records = guest.records();
    assert_eq!(vectors(&records), [0x41]);
    assert_eq!(records[0].rip, labels[0]);
    assert_eq!(guest.read(DATA) as u32, 1);
}

#[test]
fn hlt_without_if_sleeps_on() {
    let mut guest = Guest::new();
    guest.kernel(|a| {
        a.hlt()?;
        a.mov(dword_ptr(DATA), 1)?;
        Ok(vec![])
    });
    guest.reset();
    assert_eq!(guest.go_on(10_000), Exit::Halted);
    guest.vcpu.interrupts().signal_msi(Msi { address: LAPIC, data: 0x41 });
    assert_eq!(guest.go_on(10_000), Exit::Halted);
    assert_eq!(guest.read(DATA) as u32, 0);
}

#[test]
fn a_disabled_apic_takes_nothing() {
    let mut guest = Guest::new();
    guest.kernel(|a| {
        a.sti()?;
        write_lapic(a, 0xf0, 0xff)?;
        out_to(a, PORT_MSI, 0x40)?;
        a.nop()?;
        Ok(vec![])
    });
    assert_eq!(vectors(&guest.run()), [0u64; 0]);
}

#[test]
fn saved_interrupt_state_goes_on_in_another_processor() {
    let build = || {
        let mut guest = Guest::new();
        guest.kernel(|a| {
            redirect(a, 3, 0x53 | 1 << 15)?;
            out_to(a, PORT_MSI, 0x61)?;
            out_to(a, PORT_RAISE, 3)?;
            out_to(a, PORT_LOWER, 3)?;
            a.sti()?;
            a.nop()?;
            a.nop()?;
            Ok(vec![])
        });
        guest
    };
    let mut whole = build();
    let expected = whole.run();
    assert_eq!(vectors(&expected), [0x61, 0x53]);

    let mut guest = build();
    guest.reset();
    while guest.go_on(3) == Exit::Until {
        let state = guest.vcpu.save().unwrap();
        let mut other = build();
        other.copy_memory_from(&guest);
        other.vcpu.restore(&state).unwrap();
        assert_eq!(other.vcpu.save().unwrap(), state);
        guest = other;
    }
    assert_eq!(guest.records(), expected);
    assert_eq!(guest.vcpu.retired(), whole.vcpu.retired());
}
