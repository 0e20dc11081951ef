//! The host side: the same bytes executed by the processor this test runs on.
//!
//! A prologue loads the register image, jumps to the instruction, and one of two epilogues stores the image and
//! returns. A fault arrives as a signal, whose handler stores the image from the signal frame and
//! leaves through the epilogue's end.

use std::arch::global_asm;
use std::ptr;

use crate::layout::*;

const SAVED_STACK: u64 = PRIVATE;
const FALL_THROUGH: u64 = PRIVATE + 8;
const BRANCH: u64 = PRIVATE + 16;
const DEFAULT_MXCSR: u64 = PRIVATE + 24;

global_asm!(
    "native_run:",
    "push rbx",
    "push rbp",
    "push r12",
    "push r13",
    "push r14",
    "push r15",
    "mov [{saved}], rsp",
    "fxrstor64 [{input} + 256]",
    "mov rax, [{input} + 144]",
    "wrgsbase rax",
    "mov rsp, {stack}",
    "push qword ptr [{input} + 128]",
    "popfq",
    "mov rax, [{input}]",
    "mov rcx, [{input} + 8]",
    "mov rdx, [{input} + 16]",
    "mov rbx, [{input} + 24]",
    "mov rsp, [{input} + 32]",
    "mov rbp, [{input} + 40]",
    "mov rsi, [{input} + 48]",
    "mov rdi, [{input} + 56]",
    "mov r8, [{input} + 64]",
    "mov r9, [{input} + 72]",
    "mov r10, [{input} + 80]",
    "mov r11, [{input} + 88]",
    "mov r12, [{input} + 96]",
    "mov r13, [{input} + 104]",
    "mov r14, [{input} + 112]",
    "mov r15, [{input} + 120]",
    "jmp qword ptr [{input} + 136]",
    "native_branched:",
    "mov qword ptr [{output} + 144], {branched}",
    "jmp 2f",
    "native_fell_through:",
    "mov qword ptr [{output} + 144], {fell_through}",
    "2:",
    "mov [{output}], rax",
    "mov [{output} + 8], rcx",
    "mov [{output} + 16], rdx",
    "mov [{output} + 24], rbx",
    "mov [{output} + 32], rsp",
    "mov [{output} + 40], rbp",
    "mov [{output} + 48], rsi",
    "mov [{output} + 56], rdi",
    "mov [{output} + 64], r8",
    "mov [{output} + 72], r9",
    "mov [{output} + 80], r10",
    "mov [{output} + 88], r11",
    "mov [{output} + 96], r12",
    "mov [{output} + 104], r13",
    "mov [{output} + 112], r14",
    "mov [{output} + 120], r15",
    "mov rsp, {stack}",
    "pushfq",
    "pop qword ptr [{output} + 128]",
    "fxsave64 [{output} + 256]",
    "native_leave:",
    "cld",
    "fninit",
    "ldmxcsr [{mxcsr}]",
    "mov rsp, [{saved}]",
    "pop r15",
    "pop r14",
    "pop r13",
    "pop r12",
    "pop rbp",
    "pop rbx",
    "ret",
    saved = const SAVED_STACK,
    input = const INPUT,
    output = const OUTPUT,
    stack = const STACK_END,
    branched = const BRANCHED,
    fell_through = const FELL_THROUGH,
    mxcsr = const DEFAULT_MXCSR,
);

unsafe extern "C" {
    fn native_run();
    static native_branched: u8;
    static native_fell_through: u8;
    static native_leave: u8;
}

/// What the test needs of the host and the host lacks.
pub fn missing() -> Option<&'static str> {
    const HWCAP2_FSGSBASE: u64 = 1 << 1;
    // SAFETY: reads the auxiliary vector.
    let capabilities = unsafe { libc::getauxval(libc::AT_HWCAP2) };
    if !is_x86_feature_detected!("sse4.2") {
        Some("SSE4.2")
    } else if !is_x86_feature_detected!("popcnt") || !is_x86_feature_detected!("cmpxchg16b") {
        Some("POPCNT or CMPXCHG16B")
    } else if capabilities & HWCAP2_FSGSBASE == 0 {
        Some("FSGSBASE for user mode")
    } else {
        None
    }
}

/// The region mapped into this process, and the signal handlers. One at a time.
pub struct Native(());

impl Native {
    /// Maps the region and takes the signals.
    pub fn new() -> Self {
        let flags = libc::MAP_PRIVATE
            | libc::MAP_ANONYMOUS
            | libc::MAP_FIXED_NOREPLACE
            | libc::MAP_POPULATE;
        let protection = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
        for offset in (0..REGION_BYTES as u64).step_by(0x1000) {
            let address = BASE + offset;
            if !crate::is_mapped(address) {
                continue;
            }
            let wanted = ptr::with_exposed_provenance_mut(address as usize);
            // SAFETY: maps fresh memory where nothing is mapped, or fails.
            let mapped = unsafe { libc::mmap(wanted, 0x1000, protection, flags, -1, 0) };
            assert_eq!(mapped, wanted, "cannot map the test's memory at {address:#x}");
        }
        let mut native = Self(());
        for (at, value) in [
            (FALL_THROUGH, (&raw const native_fell_through).addr() as u64),
            (BRANCH, (&raw const native_branched).addr() as u64),
            (DEFAULT_MXCSR, 0x1f80),
        ] {
            native.bytes(at, 8).copy_from_slice(&value.to_le_bytes());
        }
        take_signals();
        native
    }

    /// Bytes of the region, all of them mapped.
    pub fn bytes(&mut self, address: u64, len: usize) -> &mut [u8] {
        for at in [address, address + len as u64 - 1] {
            assert!(crate::is_mapped(at), "{at:#x} is not mapped");
        }
        let start = ptr::with_exposed_provenance_mut::<u8>(address as usize);
        // SAFETY: mapped by `new`, and used by nobody else while the slice is borrowed from `self`.
        unsafe { std::slice::from_raw_parts_mut(start, len) }
    }

    /// What to put behind the instruction, and at its branch target: `jmp [epilogue]`.
    pub fn landing(target: bool) -> [u8; 7] {
        let pointer = if target { BRANCH } else { FALL_THROUGH } as u32;
        let [a, b, c, d] = pointer.to_le_bytes();
        [0xff, 0x24, 0x25, a, b, c, d]
    }

    /// Executes the image in the region.
    pub fn run(&mut self) {
        // SAFETY: keeps to the ABI, whatever the instruction under test does: the two epilogues or the signal handler
        // bring control to `native_leave`, which restores what callers own. The instruction itself was
        // chosen so that it writes nowhere but to the scratch pages.
        unsafe { native_run() };
    }
}

fn take_signals() {
    // SAFETY: an alternate stack that lives for ever, and handlers for the faults that instructions
    // under test raise.
    unsafe {
        let bytes = 1 << 16;
        let stack = libc::stack_t {
            ss_sp: Box::leak(vec![0u8; bytes].into_boxed_slice()).as_mut_ptr().cast(),
            ss_flags: 0,
            ss_size: bytes,
        };
        assert_eq!(libc::sigaltstack(&stack, ptr::null_mut()), 0);
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_fault as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        for signal in [libc::SIGSEGV, libc::SIGBUS, libc::SIGFPE, libc::SIGILL, libc::SIGTRAP] {
            assert_eq!(libc::sigaction(signal, &action, ptr::null_mut()), 0);
        }
    }
}

/// The general registers of a signal frame in encoding order.
const FRAME_ORDER: [i32; 16] = [
    libc::REG_RAX,
    libc::REG_RCX,
    libc::REG_RDX,
    libc::REG_RBX,
    libc::REG_RSP,
    libc::REG_RBP,
    libc::REG_RSI,
    libc::REG_RDI,
    libc::REG_R8,
    libc::REG_R9,
    libc::REG_R10,
    libc::REG_R11,
    libc::REG_R12,
    libc::REG_R13,
    libc::REG_R14,
    libc::REG_R15,
];

extern "C" fn on_fault(signal: i32, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel hands a ucontext to a handler with SA_SIGINFO.
    let context = unsafe { &mut *context.cast::<libc::ucontext_t>() };
    let registers = &mut context.uc_mcontext.gregs;
    let rip = registers[libc::REG_RIP as usize] as u64;
    if !(CODE..CODE + CODE_BYTES as u64).contains(&rip) && rip != 0 && rip >> 16 != 0 {
        // Not the instruction under test: this test itself is wrong. Let the default action kill it.
        // SAFETY: resets a handler.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
        return;
    }
    let mut output = [0u8; image::BYTES];
    let mut put = |at: usize, value: i64| output[at..at + 8].copy_from_slice(&value.to_le_bytes());
    for (n, register) in FRAME_ORDER.into_iter().enumerate() {
        put(8 * n, registers[register as usize]);
    }
    put(image::FLAGS, registers[libc::REG_EFL as usize]);
    put(image::RIP, registers[libc::REG_RIP as usize]);
    put(image::VECTOR, registers[libc::REG_TRAPNO as usize]);
    put(image::ERROR, registers[libc::REG_ERR as usize]);
    put(image::CR2, registers[libc::REG_CR2 as usize]);
    // SAFETY: on x86-64 the kernel always passes the FXSAVE image.
    let fx = unsafe { &*context.uc_mcontext.fpregs.cast::<[u8; 512]>() };
    output[image::FX..].copy_from_slice(fx);
    let to = ptr::with_exposed_provenance_mut::<[u8; image::BYTES]>(OUTPUT as usize);
    // SAFETY: the output image is mapped; whoever called `native_run` does not look at it meanwhile.
    unsafe { to.write(output) };
    registers[libc::REG_RIP as usize] = (&raw const native_leave).addr() as i64;
    // Without TF, DF and AC.
    registers[libc::REG_EFL as usize] = 0x202;
}
