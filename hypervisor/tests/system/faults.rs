//! Each exception with its error code and saved instruction pointer.

use crate::guest::*;
use hypervisor::Exit;
use iced_x86::code_asm::*;

/// Runs one instruction, written by `f`, at CPL 0; it must raise `vector` with `error`.
#[track_caller]
fn expect_kernel_fault(vector: u64, error: u64, f: impl FnOnce(&mut Asm) -> Labels) -> Record {
    let mut guest = Guest::new();
    let labels = guest.kernel(|a| f(a));
    let record = guest.run_to_fault();
    assert_eq!((record.vector, record.error), (vector, error), "{record:#x?}");
    assert_eq!(record.rip, labels[0], "the saved RIP is the faulting instruction's");
    assert_eq!(record.cs, u64::from(KERNEL_CODE));
    assert_eq!(record.ss, u64::from(KERNEL_DATA));
    record
}

/// As [`expect_kernel_fault`], at CPL 3.
#[track_caller]
fn expect_user_fault(vector: u64, error: u64, f: impl FnOnce(&mut Asm) -> Labels) -> Record {
    let mut guest = Guest::new();
    let labels = guest.user(|a| f(a));
    let record = guest.run_to_fault();
    assert_eq!((record.vector, record.error), (vector, error), "{record:#x?}");
    assert_eq!(record.rip, labels[0], "the saved RIP is the faulting instruction's");
    assert_eq!(record.cs, u64::from(USER_CODE));
    assert_eq!(record.ss, u64::from(USER_DATA));
    record
}

#[test]
fn divide_error() {
    let record = expect_kernel_fault(0, 0, |a| {
        a.xor(ecx, ecx)?;
        let label = here(a);
        a.div(ecx)?;
        Ok(vec![label])
    });
    assert_ne!(record.rflags & 1 << 16, 0, "a fault saves RF");
}

#[test]
fn breakpoint_saves_the_next_instruction() {
    let mut guest = Guest::new();
    let labels = guest.kernel(|a| {
        a.int3()?;
        Ok(vec![here(a)])
    });
    let record = guest.run_to_fault();
    assert_eq!((record.vector, record.rip), (3, labels[0]));
    assert_eq!(record.rflags & 1 << 16, 0, "a trap does not save RF");
}

#[test]
fn int_n_saves_the_next_instruction() {
    let mut guest = Guest::new();
    let labels = guest.kernel(|a| {
        a.int(0x1f)?;
        Ok(vec![here(a)])
    });
    let record = guest.run_to_fault();
    assert_eq!((record.vector, record.error, record.rip), (0x1f, 0, labels[0]));
}

#[test]
fn undefined_opcodes() {
    // UD2, UD1, PUSH ES, a bare LOCK NOP, MOV to CS, SYSENTER, XGETBV, MONITOR, a VEX instruction.
    let forms: [&[u8]; 9] = [
        &[0x0f, 0x0b],
        &[0x0f, 0xb9, 0xc0],
        &[0x06],
        &[0xf0, 0x90],
        &[0x8e, 0xc8],
        &[0x0f, 0x34],
        &[0x0f, 0x01, 0xd0],
        &[0x0f, 0x01, 0xc8],
        &[0xc5, 0xf8, 0x77],
    ];
    for bytes in forms {
        expect_kernel_fault(6, 0, |a| {
            let label = here(a);
            a.db(bytes)?;
            Ok(vec![label])
        });
    }
}

#[test]
fn noncanonical_addresses() {
    expect_kernel_fault(13, 0, |a| {
        a.mov(rax, 0x8000_0000_0000u64)?;
        let label = here(a);
        a.mov(rbx, qword_ptr(rax))?;
        Ok(vec![label])
    });
    expect_kernel_fault(12, 0, |a| {
        a.mov(rbp, 0x8000_0000_0000u64)?;
        let label = here(a);
        a.mov(rbx, qword_ptr(rbp))?;
        Ok(vec![label])
    });
}

#[test]
fn segment_loads() {
    // Beyond the GDT.
    expect_kernel_fault(13, 0x1000, |a| {
        a.mov(eax, 0x1003)?;
        let label = here(a);
        a.mov(ds, ax)?;
        Ok(vec![label])
    });
    // Not present.
    expect_kernel_fault(11, u64::from(ABSENT_DATA), |a| {
        a.mov(eax, u32::from(ABSENT_DATA))?;
        let label = here(a);
        a.mov(es, ax)?;
        Ok(vec![label])
    });
    expect_kernel_fault(12, u64::from(ABSENT_DATA), |a| {
        a.mov(eax, u32::from(ABSENT_DATA))?;
        let label = here(a);
        a.mov(ss, ax)?;
        Ok(vec![label])
    });
    // Kernel data at CPL 3, and a null stack segment there.
    expect_user_fault(13, u64::from(KERNEL_DATA), |a| {
        a.mov(eax, u32::from(KERNEL_DATA))?;
        let label = here(a);
        a.mov(ds, ax)?;
        Ok(vec![label])
    });
    expect_user_fault(13, 0, |a| {
        a.xor(eax, eax)?;
        let label = here(a);
        a.mov(ss, ax)?;
        Ok(vec![label])
    });
}

#[test]
fn returning_to_a_segment_that_is_not_there() {
    expect_kernel_fault(11, u64::from(ABSENT_CODE), |a| {
        a.push(i32::from(ABSENT_CODE))?;
        a.push(0)?;
        let label = here(a);
        a.db(&[0x48, 0xcb])?;
        Ok(vec![label])
    });
}

#[test]
fn page_fault_with_address_and_error_code() {
    let mut guest = Guest::new();
    let labels = guest.kernel(|a| {
        a.mov(qword_ptr(Guest::entry_of(DATA)), 0)?;
        a.mov(eax, DATA as u32 + 0x123)?;
        a.invlpg(byte_ptr(rax))?;
        let label = here(a);
        a.mov(byte_ptr(rax), 1)?;
        Ok(vec![label])
    });
    let record = guest.run_to_fault();
    assert_eq!((record.vector, record.error, record.cr2), (14, 2, DATA + 0x123));
    assert_eq!(record.rip, labels[0]);
}

#[test]
fn device_not_available_and_x87_error() {
    expect_kernel_fault(7, 0, |a| {
        a.mov(rax, CR0 | 1 << 3)?;
        a.mov(cr0, rax)?;
        let label = here(a);
        a.fninit()?;
        Ok(vec![label])
    });
    expect_kernel_fault(7, 0, |a| {
        a.mov(rax, CR0 | 1 << 3)?;
        a.mov(cr0, rax)?;
        let label = here(a);
        a.addps(xmm0, xmm1)?;
        Ok(vec![label])
    });
}

#[test]
fn software_interrupt_through_a_kernel_gate() {
    expect_user_fault(13, 0x80 << 3 | 2, |a| {
        let label = here(a);
        a.int(0x80)?;
        Ok(vec![label])
    });
}

#[test]
fn software_interrupt_through_a_user_gate() {
    let mut guest = Guest::new();
    guest.gate(0x80, Guest::handler(0x1f), 0xee, 0);
    let labels = guest.user(|a| {
        a.int(0x80)?;
        Ok(vec![here(a)])
    });
    let record = guest.run_to_fault();
    assert_eq!((record.vector, record.rip, record.rsp), (0x1f, labels[0], USER_STACK));
    assert_eq!(record.ss, u64::from(USER_DATA));
}

#[test]
fn a_gate_that_is_not_there() {
    // The error code names the IDT entry; for a fault of the processor EXT is set.
    let mut guest = Guest::new();
    guest.gate(6, Guest::handler(6), 0x0e, 0);
    guest.kernel(|a| {
        a.ud2()?;
        Ok(vec![])
    });
    let record = guest.run_to_fault();
    assert_eq!((record.vector, record.error), (11, 6 << 3 | 3));

    let mut guest = Guest::new();
    guest.gate(0x1f, Guest::handler(0x1f), 0x0e, 0);
    guest.kernel(|a| {
        a.int(0x1f)?;
        Ok(vec![])
    });
    let record = guest.run_to_fault();
    assert_eq!((record.vector, record.error), (11, 0x1f << 3 | 2));
}

#[test]
fn two_contributory_faults_are_a_double_fault() {
    let mut guest = Guest::new();
    // #GP for lack of a gate type while delivering #GP.
    guest.gate(13, Guest::handler(13), 0x80, 0);
    let labels = guest.kernel(|a| {
        a.mov(ecx, 0x1234_5678)?;
        let label = here(a);
        a.rdmsr()?;
        Ok(vec![label])
    });
    let record = guest.run_to_fault();
    assert_eq!((record.vector, record.error, record.rip), (8, 0, labels[0]));
}

#[test]
fn a_double_fault_on_an_interrupt_stack() {
    let mut guest = Guest::new();
    guest.gate(8, Guest::handler(8), 0x8e, 1);
    guest.kernel(|a| {
        // No stack: pushing the frame of #UD faults, and so does that of #PF.
        a.mov(rsp, 0x70_0000_0000u64)?;
        a.ud2()?;
        Ok(vec![])
    });
    let record = guest.run_to_fault();
    assert_eq!((record.vector, record.rsp), (8, 0x70_0000_0000));
    assert_eq!(record.cr2, 0x70_0000_0000 - 8);
}

#[test]
fn a_fault_in_the_double_fault_is_shutdown() {
    let mut guest = Guest::new();
    guest.kernel(|a| {
        a.mov(rsp, 0x70_0000_0000u64)?;
        a.ud2()?;
        Ok(vec![])
    });
    assert_eq!(guest.run_to_exit(), Exit::Shutdown);
}

#[test]
fn frames_are_aligned_and_ist_switches_without_privilege_change() {
    let mut guest = Guest::new();
    guest.gate(6, Guest::handler(6), 0x8e, 1);
    guest.kernel(|a| {
        a.lea(rsp, qword_ptr(rsp - 5))?;
        a.ud2()?;
        Ok(vec![])
    });
    let record = guest.run_to_fault();
    assert_eq!(record.rsp, KERNEL_STACK - 5);
    assert_eq!(guest.read(IST1 - 8), u64::from(KERNEL_DATA));
    assert_eq!(guest.read(IST1 - 16), KERNEL_STACK - 5);

    let mut guest = Guest::new();
    guest.kernel(|a| {
        a.lea(rsp, qword_ptr(rsp - 5))?;
        a.ud2()?;
        Ok(vec![])
    });
    assert_eq!(guest.run_to_fault().rsp, KERNEL_STACK - 5);
    assert_eq!(guest.read(KERNEL_STACK - 32), KERNEL_STACK - 5);
}

#[test]
fn faults_do_not_count_and_change_nothing() {
    let mut guest = Guest::new();
    guest.kernel(|a| {
        a.mov(rdi, DATA)?;
        a.mov(rax, 0x8000_0000_0000u64)?;
        a.rdtsc()?;
        a.mov(dword_ptr(rdi), eax)?;
        a.rdtsc()?;
        a.mov(dword_ptr(rdi + 4), eax)?;
        Ok(vec![])
    });
    guest.run();
    let (first, second) = (guest.read(DATA) as u32, guest.read(DATA + 4) as u32);
    assert_eq!(second - first, 2, "RDTSC, MOV");

    // The same with a fault between: the handler's instructions count, the fault does not.
    let mut guest = Guest::new();
    guest.gate(6, KERNEL + 0x1000, 0x8e, 0);
    guest.code(KERNEL + 0x1000, |a| {
        a.add(qword_ptr(rsp), 2)?;
        a.iretq()?;
        Ok(vec![])
    });
    guest.kernel(|a| {
        a.mov(rdi, DATA)?;
        a.rdtsc()?;
        a.mov(dword_ptr(rdi), eax)?;
        a.ud2()?;
        a.rdtsc()?;
        a.mov(dword_ptr(rdi + 4), eax)?;
        Ok(vec![])
    });
    guest.run();
    let (first, second) = (guest.read(DATA) as u32, guest.read(DATA + 4) as u32);
    assert_eq!(second - first, 4, "RDTSC, MOV, ADD, IRETQ");
}

#[test]
fn handlers_that_cannot_run_end_in_shutdown() {
    // The double fault's stack starts anew each time, so this would go on for ever.
    let mut guest = Guest::new();
    guest.gate(8, Guest::handler(8), 0x8e, 1);
    for page in [0x4000, 0x5000] {
        guest.map(page, page | P | W | NX);
    }
    guest.kernel(|a| {
        a.ud2()?;
        Ok(vec![])
    });
    assert_eq!(guest.run_to_exit(), Exit::Shutdown);
}
