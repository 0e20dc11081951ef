//! The guest side: a kernel of a few dozen instructions that loads a register image, drops to user mode at the
//! instruction under test, and stores the image when an exception or one of the two INT instructions
//! behind it brings control back.

use std::arch::global_asm;

use hypervisor::memory::{self, GuestMemory};
use hypervisor::soft::SoftHypervisor;
use hypervisor::{AccessContext, Bus, Exit, Hypervisor, LongModeEntry, Vcpu, Vm};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend as _};

use crate::layout::*;

/// The port the kernel writes to when it wants the next image.
const STOP_PORT: u16 = 0x99;
/// Bytes between two exception stubs.
const STUB_BYTES: u64 = 16;
const VECTORS: u64 = 0x82;

const CODE_SELECTOR: u16 = 0x08;
const DATA_SELECTOR: u16 = 0x10;
const USER_DATA_SELECTOR: u16 = 0x1b;
const USER_CODE_SELECTOR: u16 = 0x23;
const TSS_SELECTOR: u16 = 0x28;

global_asm!(
    ".balign 16",
    "guest_kernel:",
    "lidt [{idt_pointer}]",
    "mov eax, {tss}",
    "ltr ax",
    "mov rax, cr4",
    // OSFXSR, OSXMMEXCPT, FSGSBASE.
    "or rax, 0x10600",
    "mov cr4, rax",
    "mov rax, cr0",
    // MP and NE set, EM and TS clear.
    "or rax, 0x22",
    "and rax, -13",
    "mov cr0, rax",
    // EFER.SCE: SYSRET exists.
    "mov ecx, 0xc0000080",
    "rdmsr",
    "or eax, 1",
    "wrmsr",
    "2:",
    "mov edx, {port}",
    "out dx, al",
    "fxrstor64 [{input} + 256]",
    "mov rax, [{input} + 144]",
    "wrgsbase rax",
    "mov rsp, {stack}",
    "push {user_data}",
    "push qword ptr [{input} + 32]",
    "push qword ptr [{input} + 128]",
    "push {user_code}",
    "push qword ptr [{input} + 136]",
    "mov rax, [{input}]",
    "mov rcx, [{input} + 8]",
    "mov rdx, [{input} + 16]",
    "mov rbx, [{input} + 24]",
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
    "iretq",
    "3:",
    "mov [{output}], rax",
    "mov [{output} + 8], rcx",
    "mov [{output} + 16], rdx",
    "mov [{output} + 24], rbx",
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
    "pop qword ptr [{output} + 144]",
    "pop qword ptr [{output} + 152]",
    "pop qword ptr [{output} + 136]",
    "pop rax",
    "pop qword ptr [{output} + 128]",
    "pop qword ptr [{output} + 32]",
    "fxsave64 [{output} + 256]",
    "mov rax, cr2",
    "mov [{output} + 160], rax",
    "jmp 2b",
    ".balign 16",
    "guest_stubs:",
    ".set vector, 0",
    ".rept {vectors}",
    ".balign 16",
    // Vectors that push no error code get a zero in its place.
    ".if (vector == 8) || ((vector >= 10) && (vector <= 14)) || (vector == 17)",
    ".else",
    "push 0",
    ".endif",
    "push vector",
    "jmp 3b",
    ".set vector, vector + 1",
    ".endr",
    "guest_kernel_end:",
    idt_pointer = const IDT_POINTER,
    tss = const TSS_SELECTOR,
    port = const STOP_PORT,
    input = const INPUT,
    output = const OUTPUT,
    stack = const STACK_END,
    user_data = const USER_DATA_SELECTOR,
    user_code = const USER_CODE_SELECTOR,
    vectors = const VECTORS,
);

unsafe extern "C" {
    static guest_kernel: u8;
    static guest_stubs: u8;
    static guest_kernel_end: u8;
}

/// A virtual machine on the software processor, standing before the next image.
pub struct Guest {
    _vm: Box<dyn Vm>,
    vcpu: Box<dyn Vcpu>,
    memory: GuestMemory,
    host: *mut u8,
}

/// Stops the processor when the kernel asks for it; otherwise nothing is there.
struct StopBus;

impl Bus for StopBus {
    fn pio_read(&mut self, _: u16, data: &mut [u8], _: &mut AccessContext<'_>) {
        data.fill(0xff);
    }

    fn pio_write(&mut self, port: u16, _: &[u8], cx: &mut AccessContext<'_>) {
        cx.stop = port == STOP_PORT;
    }

    fn mmio_read(&mut self, _: u64, data: &mut [u8], _: &mut AccessContext<'_>) {
        data.fill(0xff);
    }

    fn mmio_write(&mut self, _: u64, _: &[u8], _: &mut AccessContext<'_>) {}
}

impl Guest {
    /// Sets the machine up and runs it to the point where it asks for the first image.
    pub fn new() -> Self {
        let memory = memory::allocate(&[(BASE, REGION_BYTES)]).unwrap();
        write_kernel(&memory);
        write_descriptors(&memory);
        write_page_tables(&memory);
        let mut vm = SoftHypervisor.create_vm(memory.clone()).unwrap();
        let mut vcpu = vm.create_vcpu(0).unwrap();
        vcpu.reset(&LongModeEntry {
            rip: KERNEL,
            rsp: STACK_END,
            rsi: 0,
            cr3: TABLES,
            gdt_base: GDT,
            gdt_limit: 0x37,
            code_selector: CODE_SELECTOR,
            data_selector: DATA_SELECTOR,
        })
        .unwrap();
        let host = memory.get_host_address(GuestAddress(BASE)).unwrap();
        let mut guest = Self { _vm: vm, vcpu, memory, host };
        guest.run().expect("the guest's kernel starts");
        guest
    }

    /// Bytes of guest memory. Not for code: decoded instructions would not notice a change.
    pub fn bytes(&mut self, address: u64, len: usize) -> &mut [u8] {
        let offset = (address - BASE) as usize;
        assert!(offset + len <= REGION_BYTES);
        // SAFETY: inside the one region, which lives as long as `self.memory`; the processor, the only other user,
        // does not run while the slice is borrowed from `self`.
        unsafe { std::slice::from_raw_parts_mut(self.host.add(offset), len) }
    }

    /// Writes code, which the processor then decodes anew.
    pub fn write_code(&mut self, address: u64, code: &[u8]) {
        self.memory.write_slice(code, GuestAddress(address)).unwrap();
    }

    /// Runs one image; how it ended is in the output image. `Err` if control did not come back.
    pub fn run(&mut self) -> Result<(), String> {
        let limit = self.vcpu.retired() + 100_000;
        match self.vcpu.run(Some(limit), &mut StopBus).unwrap() {
            Exit::Stopped => Ok(()),
            exit => Err(format!("the guest did not come back: {exit:?}")),
        }
    }
}

fn write_kernel(memory: &GuestMemory) {
    let start = &raw const guest_kernel;
    let len = (&raw const guest_kernel_end).addr() - start.addr();
    assert!(KERNEL + len as u64 <= GDT, "the kernel is too long");
    // SAFETY: the assembly above, from its first label to its last.
    let code = unsafe { std::slice::from_raw_parts(start, len) };
    memory.write_slice(code, GuestAddress(KERNEL)).unwrap();
}

fn write_descriptors(memory: &GuestMemory) {
    let write = |at: u64, value: u64| memory.write_obj(value, GuestAddress(at)).unwrap();
    write(GDT + u64::from(CODE_SELECTOR), 0x00af_9b00_0000_ffff);
    write(GDT + u64::from(DATA_SELECTOR), 0x00cf_9300_0000_ffff);
    write(GDT + u64::from(USER_DATA_SELECTOR & !3), 0x00cf_f300_0000_ffff);
    write(GDT + u64::from(USER_CODE_SELECTOR & !3), 0x00af_fb00_0000_ffff);
    let low = 0x67 | (TSS & 0xff_ffff) << 16 | 0x89 << 40 | (TSS >> 24 & 0xff) << 56;
    write(GDT + u64::from(TSS_SELECTOR), low);
    write(GDT + u64::from(TSS_SELECTOR) + 8, TSS >> 32);
    // RSP0, at an offset that is not a multiple of eight.
    write(TSS + 4, STACK_END);
    // No I/O permission bitmap within the limit.
    memory.write_obj(0x68u16, GuestAddress(TSS + 0x66)).unwrap();

    memory.write_obj((VECTORS * 16 - 1) as u16, GuestAddress(IDT_POINTER)).unwrap();
    write(IDT_POINTER + 2, IDT);
    let stubs =
        KERNEL + ((&raw const guest_stubs).addr() - (&raw const guest_kernel).addr()) as u64;
    for vector in 0..VECTORS {
        let stub = stubs + vector * STUB_BYTES;
        // An interrupt gate; user mode may call the two vectors of the epilogues.
        let dpl = if vector >= FELL_THROUGH { 3 } else { 0 };
        let gate = stub & 0xffff
            | u64::from(CODE_SELECTOR) << 16
            | (0x8e00 | dpl << 13) << 32
            | (stub >> 16 & 0xffff) << 48;
        write(IDT + vector * 16, gate);
        write(IDT + vector * 16 + 8, stub >> 32);
    }
}

fn write_page_tables(memory: &GuestMemory) {
    const USER_WRITABLE: u64 = 7;
    let write = |at: u64, value: u64| memory.write_obj(value, GuestAddress(at)).unwrap();
    let page = |n: u64| TABLES + n * 0x1000;
    write(page(0), page(1) | USER_WRITABLE);
    write(page(1), page(2) | USER_WRITABLE);
    write(page(2) + (BASE >> 21 & 511) * 8, page(3) | USER_WRITABLE);
    for offset in (0..REGION_BYTES as u64).step_by(0x1000) {
        let address = BASE + offset;
        if crate::is_mapped(address) {
            write(page(3) + (address >> 12 & 511) * 8, address | USER_WRITABLE);
        }
    }
}
