//! What CPL 3 may not do, and how it comes and goes.

use crate::guest::*;
use iced_x86::IcedError;
use iced_x86::code_asm::*;

const LSTAR: u32 = 0xc000_0082;

/// Sets STAR, LSTAR and FMASK (IF, TF, DF), then enters CPL 3 at [`USER`].
fn with_syscall(guest: &mut Guest, handler: u64) {
    guest.kernel(|a| {
        for (index, high, low) in [
            // SYSCALL: 0x08, 0x10. SYSRET: 0x18 + 16 = 0x28 and 0x18 + 8 = 0x20.
            (LSTAR - 1, 0x0018_0008, 0),
            (LSTAR, (handler >> 32) as u32, handler as u32),
            (LSTAR + 2, 0, 0x700),
        ] {
            a.mov(ecx, index)?;
            a.mov(edx, high)?;
            a.mov(eax, low)?;
            a.wrmsr()?;
        }
        a.mov(ecx, USER as u32)?;
        a.mov(r11d, 0x202)?;
        a.mov(rsp, USER_STACK)?;
        a.sysretq()?;
        Ok(vec![])
    });
}

#[test]
fn syscall_and_sysret() {
    let mut guest = Guest::new();
    let handler = KERNEL + 0x2000;
    with_syscall(&mut guest, handler);
    guest.code(handler, |a| {
        a.mov(qword_ptr(DATA), rcx)?;
        a.mov(qword_ptr(DATA + 8), r11)?;
        a.pushfq()?;
        a.pop(rax)?;
        a.mov(qword_ptr(DATA + 16), rax)?;
        a.mov(eax, cs)?;
        a.mov(dword_ptr(DATA + 24), eax)?;
        a.mov(eax, ss)?;
        a.mov(dword_ptr(DATA + 28), eax)?;
        a.sysretq()?;
        Ok(vec![])
    });
    let labels = guest.user_code(|a| {
        a.std()?;
        a.stc()?;
        a.syscall()?;
        let back = here(a);
        a.ud2()?;
        Ok(vec![back])
    });
    let record = guest.run_to_fault();
    assert_eq!((record.vector, record.rip), (6, labels[0]));
    assert_eq!((record.cs, record.ss), (u64::from(USER_CODE), u64::from(USER_DATA)));
    assert_eq!(record.rsp, USER_STACK, "SYSCALL does not touch the stack");
    assert_eq!(guest.read(DATA), labels[0]);
    let (saved, inside) = (guest.read(DATA + 8), guest.read(DATA + 16));
    assert_eq!(saved & 0x601, 0x601, "IF, DF, CF before");
    assert_eq!(inside & 0x701, 0x001, "FMASK clears IF and DF, not CF");
    assert_eq!(record.rflags & 0x601, 0x601, "SYSRET restores them");
    assert_eq!(guest.read(DATA + 24), u64::from(KERNEL_DATA) << 32 | u64::from(KERNEL_CODE));
}

#[test]
fn syscall_needs_efer_sce_and_64_bit_mode() {
    let mut guest = Guest::new();
    guest.efer &= !1;
    guest.user(|a| {
        a.syscall()?;
        Ok(vec![])
    });
    assert_eq!(guest.run_to_fault().vector, 6);

    let mut guest = Guest::new();
    guest.user_32(|a| {
        a.syscall()?;
        Ok(vec![])
    });
    let record = guest.run_to_fault();
    assert_eq!((record.vector, record.cs), (6, u64::from(USER_CODE_32)));
}

#[test]
fn privileged_instructions_at_cpl_3() {
    // HLT, CLI, STI, WRMSR, RDMSR, MOV CR0, MOV from CR3, MOV DR7, LGDT, LIDT, LLDT, LTR, LMSW, CLTS, INVLPG, WBINVD,
    // SWAPGS, IN AL, OUT AL, SYSRET.
    let forms: [&[u8]; 20] = [
        &[0xf4],
        &[0xfa],
        &[0xfb],
        &[0x0f, 0x30],
        &[0x0f, 0x32],
        &[0x0f, 0x22, 0xc0],
        &[0x0f, 0x20, 0xd8],
        &[0x0f, 0x23, 0xf8],
        &[0x0f, 0x01, 0x10],
        &[0x0f, 0x01, 0x18],
        &[0x0f, 0x00, 0xd0],
        &[0x0f, 0x00, 0xd8],
        &[0x0f, 0x01, 0xf0],
        &[0x0f, 0x06],
        &[0x0f, 0x01, 0x38],
        &[0x0f, 0x09],
        &[0x0f, 0x01, 0xf8],
        &[0xe4, 0x80],
        &[0xe6, 0x80],
        &[0x48, 0x0f, 0x07],
    ];
    for bytes in forms {
        let mut guest = Guest::new();
        guest.user(|a| {
            a.mov(eax, USER_DATA_PAGE as u32)?;
            a.db(bytes)?;
            Ok(vec![])
        });
        let record = guest.run_to_fault();
        assert_eq!((record.vector, record.error), (13, 0), "{bytes:02x?}: {record:#x?}");
        assert_eq!(record.rip, USER + 5, "{bytes:02x?}");
    }
}

#[test]
fn popf_at_cpl_3_cannot_touch_if_and_iopl() {
    let mut guest = Guest::new();
    guest.user(|a| {
        a.push(0x3003)?;
        a.popfq()?;
        a.ud2()?;
        Ok(vec![])
    });
    let record = guest.run_to_fault();
    assert_eq!(record.rflags & 0x3201, 0x0201, "IF stays, IOPL stays, CF is set");
}

#[test]
fn interrupts_from_user_mode_switch_to_rsp0() {
    let mut guest = Guest::new();
    let labels = guest.user(|a| {
        let label = here(a);
        a.ud2()?;
        Ok(vec![label])
    });
    let record = guest.run_to_fault();
    assert_eq!((record.rip, record.rsp), (labels[0], USER_STACK));
    assert_eq!(guest.read(RSP0 - 8), u64::from(USER_DATA));
    assert_eq!(guest.read(RSP0 - 40), labels[0]);
}

#[test]
fn the_stack_segment_is_null_after_a_switch_and_iret_takes_it_back() {
    let mut guest = Guest::new();
    guest.gate(6, KERNEL + 0x3000, 0x8e, 0);
    guest.code(KERNEL + 0x3000, |a| {
        a.mov(eax, ss)?;
        a.mov(qword_ptr(DATA), rax)?;
        // A fault inside the handler returns with that null selector.
        a.int(0x30)?;
        a.add(qword_ptr(rsp), 2)?;
        a.iretq()?;
        Ok(vec![])
    });
    guest.user(|a| {
        a.ud2()?;
        a.int3()?;
        Ok(vec![])
    });
    guest.gate(3, Guest::handler(3), 0xee, 0);
    let records = guest.run();
    assert_eq!(guest.read(DATA), 0);
    assert_eq!(
        records.iter().map(|r| (r.vector, r.ss)).collect::<Vec<_>>(),
        [(0x30, 0), (3, u64::from(USER_DATA)),]
    );
}

#[test]
fn iret_checks_what_it_returns_to() {
    // (CS, SS, RFLAGS.NT set first, vector, error)
    let cases = [
        (0, KERNEL_DATA, false, 13, 0),
        (KERNEL_DATA, KERNEL_DATA, false, 13, KERNEL_DATA),
        (KERNEL_CODE | 3, USER_DATA, false, 13, KERNEL_CODE),
        (USER_CODE, KERNEL_DATA, false, 13, KERNEL_DATA),
        (USER_CODE, 0, false, 13, 0),
        (ABSENT_CODE, KERNEL_DATA, false, 11, ABSENT_CODE),
        (KERNEL_CODE, KERNEL_DATA, true, 13, 0),
        (0x1000, KERNEL_DATA, false, 13, 0x1000),
    ];
    for (code, stack, nested, vector, error) in cases {
        let mut guest = Guest::new();
        let labels = guest.kernel(|a| {
            if nested {
                a.push(0x4002)?;
                a.popfq()?;
            }
            a.push(i32::from(stack))?;
            a.push(KERNEL_STACK as i32)?;
            a.push(2)?;
            a.push(i32::from(code))?;
            a.push(USER as i32)?;
            let label = here(a);
            a.iretq()?;
            Ok(vec![label])
        });
        let record = guest.run_to_fault();
        assert_eq!((record.vector, record.error), (vector, u64::from(error)), "{record:#x?}");
        assert_eq!(record.rip, labels[0]);
        assert_eq!(record.rsp, KERNEL_STACK - 40, "a failed IRET leaves the stack");
    }
}

#[test]
fn iret_to_a_noncanonical_address() {
    let mut guest = Guest::new();
    let labels = guest.kernel(|a| {
        a.push(i32::from(USER_DATA))?;
        a.push(USER_STACK as i32)?;
        a.push(2)?;
        a.push(i32::from(USER_CODE))?;
        a.mov(rax, 1u64 << 47)?;
        a.push(rax)?;
        let label = here(a);
        a.iretq()?;
        Ok(vec![label])
    });
    let record = guest.run_to_fault();
    assert_eq!((record.vector, record.error, record.rip), (13, 0, labels[0]));
    assert_eq!(record.cs, u64::from(KERNEL_CODE));
}

#[test]
fn compatibility_mode_runs_32_bit_code() {
    let mut guest = Guest::new();
    guest.gate(0x80, Guest::handler(0x1f), 0xee, 0);
    let labels = guest.user_32(|a| {
        // INC EAX is one byte here and a prefix in 64-bit mode.
        a.mov(ebx, 0x1233)?;
        a.db(&[0x43])?;
        a.mov(eax, USER_DATA_PAGE as u32)?;
        a.mov(dword_ptr(eax), ebx)?;
        a.int(0x80)?;
        Ok(vec![here(a)])
    });
    let record = guest.run_to_fault();
    assert_eq!((record.vector, record.rip), (0x1f, labels[0]));
    assert_eq!(record.cs, u64::from(USER_CODE_32));
    assert_eq!(record.rsp, USER_STACK);
    assert_eq!(guest.read(USER_DATA_PAGE), 0x1234);
}

#[test]
fn compatibility_mode_has_a_32_bit_stack_and_32_bit_branches() {
    let mut guest = Guest::new();
    guest.gate(0x80, Guest::handler(0x1f), 0xee, 0);
    guest.user_32(|a| {
        let mut function = a.create_label();
        let mut again = a.create_label();
        let out = USER_DATA_PAGE as u32;
        a.push(0x1234)?;
        a.push(dword_ptr(esp))?;
        a.pop(dword_ptr(out))?;
        a.pop(dword_ptr(out + 4))?;
        // Through a register and by displacement; the callee releases its argument.
        a.push(7)?;
        a.call(function)?;
        a.mov(dword_ptr(out + 8), eax)?;
        a.mov(dword_ptr(out + 12), esp)?;
        a.mov(esi, 0x5555)?;
        a.pushad()?;
        a.xor(esi, esi)?;
        a.popad()?;
        a.mov(dword_ptr(out + 16), esi)?;
        a.xor(eax, eax)?;
        a.mov(ecx, 5)?;
        a.set_label(&mut again)?;
        a.inc(eax)?;
        a.loop_(again)?;
        a.mov(dword_ptr(out + 20), eax)?;
        a.mov(eax, 0x79)?;
        a.add(al, 0x35)?;
        a.daa()?;
        a.mov(dword_ptr(out + 24), eax)?;
        a.int(0x80)?;
        a.set_label(&mut function)?;
        a.enter(8, 0)?;
        a.mov(eax, dword_ptr(ebp + 8))?;
        a.leave()?;
        a.ret_1(4)?;
        Ok(vec![])
    });
    let record = guest.run_to_fault();
    assert_eq!((record.vector, record.rsp), (0x1f, USER_STACK), "{record:#x?}");
    let words = guest.read_bytes(USER_DATA_PAGE, 28);
    let words: Vec<u32> =
        words.chunks(4).map(|word| u32::from_le_bytes(word.try_into().unwrap())).collect();
    assert_eq!(words, [0x1234, 0x1234, 7, USER_STACK as u32, 0x5555, 5, 0x14]);
}

#[test]
fn single_steps_end_at_a_system_call() {
    let mut guest = Guest::new();
    let handler = KERNEL + 0x2000;
    with_syscall(&mut guest, handler);
    guest.code(handler, |a| {
        a.inc(dword_ptr(DATA))?;
        a.sysretq()?;
        Ok(vec![])
    });
    let labels = guest.user_code(|a| {
        a.push(0x302)?;
        a.popfq()?;
        // Not stepped: the flag is clear in the supervisor. It is back for the instruction behind.
        a.syscall()?;
        a.nop()?;
        Ok(vec![here(a)])
    });
    let record = guest.run_to_fault();
    assert_eq!((record.vector, record.rip, record.cs), (1, labels[0], u64::from(USER_CODE)));
    assert_eq!(guest.read(DATA) as u32, 1);
}

#[test]
fn swapgs_and_the_base_registers() {
    let mut guest = Guest::new();
    guest.kernel(|a| {
        a.mov(ecx, 0xc000_0102u32)?;
        a.mov(edx, 0xffff_8000u32)?;
        a.mov(eax, 0x1000)?;
        a.wrmsr()?;
        a.mov(eax, DATA as u32)?;
        a.wrgsbase(rax)?;
        a.mov(rbx, qword_ptr(0x100).gs())?;
        a.swapgs()?;
        a.rdgsbase(rcx)?;
        a.swapgs()?;
        a.mov(qword_ptr(DATA), rbx)?;
        a.mov(qword_ptr(DATA + 8), rcx)?;
        // Not canonical.
        a.mov(rax, 1u64 << 47)?;
        a.wrfsbase(rax)?;
        Ok(vec![])
    });
    guest.write(DATA + 0x100, 0x5151);
    let record = guest.run_to_fault();
    assert_eq!((record.vector, record.error), (13, 0));
    assert_eq!((guest.read(DATA), guest.read(DATA + 8)), (0x5151, 0xffff_8000_0000_1000));
}

#[test]
fn control_registers_refuse_nonsense() {
    // CR0: NW without CD, PG without PE, PE off. CR4: unknown bit, PAE off. CR3: beyond the address width. CR8: 16.
    type Write = fn(&mut Asm) -> Result<(), IcedError>;
    let cases: [(u64, Write); 7] = [
        (CR0 | 1 << 29, |a| a.mov(cr0, rax)),
        (CR0 & !1, |a| a.mov(cr0, rax)),
        (CR0 & !(1 << 31), |a| a.mov(cr0, rax)),
        (CR4 | 1 << 22, |a| a.mov(cr4, rax)),
        (CR4 & !(1 << 5), |a| a.mov(cr4, rax)),
        (1 << 60, |a| a.mov(cr3, rax)),
        (16, |a| a.mov(cr8, rax)),
    ];
    for (value, write) in cases {
        let mut guest = Guest::new();
        let labels = guest.kernel(|a| {
            a.mov(rax, value)?;
            let label = here(a);
            write(a)?;
            Ok(vec![label])
        });
        let record = guest.run_to_fault();
        assert_eq!((record.vector, record.error), (13, 0), "{value:#x}");
        assert_eq!(record.rip, labels[0]);
    }
}

#[test]
fn unknown_msrs_raise_gp() {
    for bytes in [[0x0f, 0x32], [0x0f, 0x30]] {
        let mut guest = Guest::new();
        guest.kernel(|a| {
            a.mov(ecx, 0xdead)?;
            a.db(&bytes)?;
            Ok(vec![])
        });
        let record = guest.run_to_fault();
        assert_eq!((record.vector, record.error), (13, 0));
    }
}

#[test]
fn rdtsc_obeys_cr4_tsd() {
    let mut guest = Guest::new();
    guest.cr4 |= 1 << 2;
    guest.user(|a| {
        a.rdtsc()?;
        Ok(vec![])
    });
    assert_eq!(guest.run_to_fault().vector, 13);
}

#[test]
fn the_trap_flag_steps_one_instruction() {
    let mut guest = Guest::new();
    let labels = guest.user(|a| {
        a.push(0x302)?;
        a.popfq()?;
        a.mov(eax, 1)?;
        let after = here(a);
        a.mov(eax, 2)?;
        Ok(vec![after])
    });
    let record = guest.run_to_fault();
    assert_eq!((record.vector, record.rip), (1, labels[0]));
    assert_ne!(record.rflags & 1 << 8, 0);
}

#[test]
fn lsl_reads_a_limit_the_selector_may_see() {
    let mut guest = Guest::new();
    // A data segment for CPL 3 whose limit carries a number, as Linux keeps the CPU's.
    guest.write(GDT + 0x40, 0x0000_f300_0000_0005);
    guest.user(|a| {
        a.mov(ecx, 0x43)?;
        a.mov(ebx, USER_DATA_PAGE as u32)?;
        a.lsl(eax, ecx)?;
        a.mov(dword_ptr(rbx), eax)?;
        a.setz(byte_ptr(rbx + 4))?;
        // Kernel data is not visible.
        a.mov(ecx, u32::from(KERNEL_DATA))?;
        a.lsl(eax, ecx)?;
        a.setz(byte_ptr(rbx + 5))?;
        a.ud2()?;
        Ok(vec![])
    });
    assert_eq!(guest.run_to_fault().vector, 6);
    assert_eq!(guest.read(USER_DATA_PAGE), 0x01_0000_0005);
}
