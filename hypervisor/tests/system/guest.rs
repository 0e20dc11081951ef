//! A small machine: 8 MiB, page tables, descriptor tables, and handlers that record what was delivered.

use hypervisor::bus::{AccessContext, Bus, Msi};
use hypervisor::clock::Anchor;
use hypervisor::memory::{GuestMemory, allocate};
use hypervisor::soft::SoftHypervisor;
use hypervisor::{Exit, Hypervisor, LongModeEntry, Vcpu};
use iced_x86::code_asm::*;
use iced_x86::{BlockEncoderOptions, IcedError};
use vm_memory::{Bytes, GuestAddress};

/// The assembler, and its error, under which a test's code is written.
pub type Asm = CodeAssembler;
/// What code that writes instructions returns: the labels whose addresses the test wants.
pub type Labels = Result<Vec<CodeLabel>, IcedError>;

pub const KERNEL_CODE: u16 = 0x08;
pub const KERNEL_DATA: u16 = 0x10;
pub const USER_CODE_32: u16 = 0x1b;
pub const USER_DATA: u16 = 0x23;
pub const USER_CODE: u16 = 0x2b;
pub const TSS: u16 = 0x30;
/// Present bit clear, otherwise kernel data.
pub const ABSENT_DATA: u16 = 0x40;
/// Present bit clear, otherwise kernel code.
pub const ABSENT_CODE: u16 = 0x48;

pub const GDT: u64 = 0x1000;
pub const IDT: u64 = 0x2000;
pub const TSS_BASE: u64 = 0x3000;
const HANDLERS: u64 = 0x4000;
/// Number of records; whether interrupt handlers leave out EOI.
const RECORD_COUNT: u64 = 0x6000;
pub const NO_EOI: u64 = 0x6010;
const RECORDS: u64 = 0x6040;
const MAX_RECORDS: u64 = 100;
const PML4: u64 = 0x10000;
const PDPT: u64 = 0x11000;
const PD: u64 = 0x12000;
const PT: u64 = 0x13000;
const PD_DEVICES: u64 = 0x17000;
/// The top of the stack of CPL 0, of RSP0 and of IST1.
pub const KERNEL_STACK: u64 = 0x80000;
pub const RSP0: u64 = 0x90000;
pub const IST1: u64 = 0xa0000;
pub const KERNEL: u64 = 0x10_0000;
/// A supervisor page nothing else uses.
pub const DATA: u64 = 0x20_0000;
/// 2 MiB of pages for CPL 3.
pub const USER: u64 = 0x40_0000;
pub const USER_DATA_PAGE: u64 = 0x48_0000;
pub const USER_STACK: u64 = 0x50_0000;
const RAM: usize = 8 << 20;

pub const LAPIC: u64 = 0xfee0_0000;
pub const IOAPIC: u64 = 0xfec0_0000;

pub const P: u64 = 1;
pub const W: u64 = 2;
pub const U: u64 = 4;
pub const A: u64 = 1 << 5;
pub const D: u64 = 1 << 6;
pub const NX: u64 = 1 << 63;

pub const CR0_WP: u64 = 1 << 16;
pub const CR4_SMEP: u64 = 1 << 20;
pub const CR4_SMAP: u64 = 1 << 21;
/// PAE, PGE, OSFXSR, OSXMMEXCPT, FSGSBASE.
pub const CR4: u64 = 1 << 5 | 1 << 7 | 1 << 9 | 1 << 10 | 1 << 16;
/// PE, MP, ET, NE, WP, PG.
pub const CR0: u64 = 0x8001_0033;

/// OUT to this port sends an MSI with the value as vector to APIC 0.
pub const PORT_MSI: u16 = 0x500;
/// OUT to these ports raises or lowers the IOAPIC input named by the value.
pub const PORT_RAISE: u16 = 0x501;
pub const PORT_LOWER: u16 = 0x502;

/// One delivered exception or interrupt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Record {
    pub vector: u64,
    pub error: u64,
    pub rip: u64,
    pub cs: u64,
    pub rflags: u64,
    pub rsp: u64,
    pub ss: u64,
    pub cr2: u64,
}

/// The devices: a way for the guest to raise interrupts at itself.
struct Devices;

impl Bus for Devices {
    fn pio_read(&mut self, _: u16, data: &mut [u8], _: &mut AccessContext<'_>) {
        data.fill(0xff);
    }

    fn pio_write(&mut self, port: u16, data: &[u8], access: &mut AccessContext<'_>) {
        match port {
            PORT_MSI => {
                let msi = Msi { address: 0xfee0_0000, data: u32::from(data[0]) };
                access.interrupts.signal_msi(msi);
            }
            PORT_RAISE => access.interrupts.set_line(u32::from(data[0]), true),
            PORT_LOWER => access.interrupts.set_line(u32::from(data[0]), false),
            _ => {}
        }
    }

    fn mmio_read(&mut self, _: u64, data: &mut [u8], _: &mut AccessContext<'_>) {
        data.fill(0xff);
    }

    fn mmio_write(&mut self, _: u64, _: &[u8], _: &mut AccessContext<'_>) {}
}

/// The machine under test.
pub struct Guest {
    memory: GuestMemory,
    pub vcpu: Box<dyn Vcpu>,
    pub cr0: u64,
    pub cr4: u64,
    pub efer: u32,
}

impl Guest {
    pub fn new() -> Self {
        let memory = allocate(&[(0, RAM)]).unwrap();
        let mut vm = SoftHypervisor.create_vm(memory.clone()).unwrap();
        let vcpu = vm.create_vcpu(0).unwrap();
        // SCE, LME, LMA, NXE.
        let mut guest = Self { memory, vcpu, cr0: CR0, cr4: CR4, efer: 0xd01 };
        guest.write_descriptors();
        guest.write_page_tables();
        guest.write_handlers();
        guest
    }

    pub fn write(&mut self, address: u64, value: u64) {
        self.memory.write_obj(value, GuestAddress(address)).unwrap();
    }

    pub fn read(&self, address: u64) -> u64 {
        self.memory.read_obj(GuestAddress(address)).unwrap()
    }

    pub fn write_bytes(&mut self, address: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(address)).unwrap();
    }

    pub fn read_bytes(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    /// Maps the 4 KiB page at `linear` (below 8 MiB) anew: physical address and flags.
    pub fn map(&mut self, linear: u64, entry: u64) {
        self.write(Self::entry_of(linear), entry);
    }

    /// Where the page table entry of `linear` is.
    pub fn entry_of(linear: u64) -> u64 {
        PT + (linear >> 12) * 8
    }

    /// Where the page directory entry of `linear` is.
    pub fn directory_entry_of(linear: u64) -> u64 {
        PD + (linear >> 21) * 8
    }

    /// Points a gate at other code. `kind` is its type byte: 0x8e, or 0xee for CPL 3.
    pub fn gate(&mut self, vector: u8, handler: u64, kind: u64, ist: u64) {
        let low = handler & 0xffff
            | u64::from(KERNEL_CODE) << 16
            | ist << 32
            | kind << 40
            | (handler & 0xffff_0000) << 32;
        let at = IDT + u64::from(vector) * 16;
        self.write(at, low);
        self.write(at + 8, handler >> 32);
    }

    /// The recording handler of a vector.
    pub fn handler(vector: u8) -> u64 {
        HANDLERS + u64::from(vector) * 16
    }

    /// Places code at `address`; returns the addresses of the labels it hands back.
    pub fn code(&mut self, address: u64, f: impl FnOnce(&mut Asm) -> Labels) -> Vec<u64> {
        self.code_for(64, address, f)
    }

    /// As [`Guest::code`], for compatibility mode.
    pub fn code_32(&mut self, address: u64, f: impl FnOnce(&mut Asm) -> Labels) -> Vec<u64> {
        self.code_for(32, address, f)
    }

    fn code_for(
        &mut self,
        bitness: u32,
        address: u64,
        f: impl FnOnce(&mut Asm) -> Labels,
    ) -> Vec<u64> {
        let mut asm = Asm::new(bitness).unwrap();
        let labels = f(&mut asm).unwrap();
        // A label needs an instruction to stand before.
        asm.nop().unwrap();
        let options = BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS;
        let result = asm.assemble_options(address, options).unwrap();
        let addresses = labels.iter().map(|label| result.label_ip(label).unwrap()).collect();
        self.write_bytes(address, &result.inner.code_buffer);
        addresses
    }

    /// Runs `f`'s code at CPL 0 until the processor halts. The code ends in HLT by itself.
    pub fn kernel(&mut self, f: impl FnOnce(&mut Asm) -> Labels) -> Vec<u64> {
        let setup = (self.cr0, self.cr4, self.efer);
        self.code(KERNEL, |a| {
            prologue(a, setup)?;
            let labels = f(a)?;
            a.cli()?;
            a.hlt()?;
            Ok(labels)
        })
    }

    /// Runs `f`'s code at CPL 3 in 64-bit mode, at [`USER`].
    pub fn user(&mut self, f: impl FnOnce(&mut Asm) -> Labels) -> Vec<u64> {
        self.enter_user(USER_CODE);
        self.code(USER, f)
    }

    /// Runs `f`'s code at CPL 3 in compatibility mode, at [`USER`].
    pub fn user_32(&mut self, f: impl FnOnce(&mut Asm) -> Labels) -> Vec<u64> {
        self.enter_user(USER_CODE_32);
        self.code_32(USER, f)
    }

    /// Places code at [`USER`], for a guest that gets there by itself.
    pub fn user_code(&mut self, f: impl FnOnce(&mut Asm) -> Labels) -> Vec<u64> {
        self.code(USER, f)
    }

    /// Takes over the whole memory of another guest.
    pub fn copy_memory_from(&mut self, other: &Guest) {
        let bytes = other.read_bytes(0, RAM);
        self.write_bytes(0, &bytes);
    }

    /// Whether another guest has the same memory.
    pub fn memory_equals(&self, other: &Guest) -> bool {
        self.read_bytes(0, RAM) == other.read_bytes(0, RAM)
    }

    fn enter_user(&mut self, selector: u16) {
        self.kernel(|a| {
            a.push(i32::from(USER_DATA))?;
            a.mov(rax, USER_STACK)?;
            a.push(rax)?;
            a.push(0x202)?;
            a.push(i32::from(selector))?;
            a.mov(rax, USER)?;
            a.push(rax)?;
            a.iretq()?;
            Ok(vec![])
        });
    }

    /// Starts the processor at [`KERNEL`], one TSC tick an instruction.
    pub fn reset(&mut self) {
        let entry = LongModeEntry {
            rip: KERNEL,
            rsp: KERNEL_STACK,
            rsi: 0,
            cr3: PML4,
            gdt_base: GDT,
            gdt_limit: 0x4f,
            code_selector: KERNEL_CODE,
            data_selector: KERNEL_DATA,
        };
        self.vcpu.reset(&entry).unwrap();
        let point = self.vcpu.retired();
        self.vcpu.set_anchor(Anchor { point, tsc: point, rate: 1 << 32 });
    }

    /// Resets and runs to the end; panics if the guest does not end by halting.
    pub fn run(&mut self) -> Vec<Record> {
        let exit = self.run_to_exit();
        assert_eq!(exit, Exit::Halted, "{:#x?}", self.records());
        self.records()
    }

    /// Resets and runs to whatever ends it.
    pub fn run_to_exit(&mut self) -> Exit {
        self.reset();
        self.go_on(1_000_000)
    }

    /// Runs on, at most `instructions` further.
    pub fn go_on(&mut self, instructions: u64) -> Exit {
        let until = self.vcpu.retired() + instructions;
        self.vcpu.run(Some(until), &mut Devices).unwrap()
    }

    /// What the handlers recorded.
    pub fn records(&self) -> Vec<Record> {
        let count = self.read(RECORD_COUNT);
        assert!(count <= MAX_RECORDS, "{count} records");
        (0..count)
            .map(|number| {
                let field = |index: u64| self.read(RECORDS + number * 64 + index * 8);
                Record {
                    vector: field(0),
                    error: field(1),
                    rip: field(2),
                    cs: field(3),
                    rflags: field(4),
                    rsp: field(5),
                    ss: field(6),
                    cr2: field(7),
                }
            })
            .collect()
    }

    /// The single record of a guest that raised one fault.
    pub fn run_to_fault(&mut self) -> Record {
        let records = self.run();
        assert_eq!(records.len(), 1, "{records:#x?}");
        records[0]
    }

    fn write_descriptors(&mut self) {
        let descriptors = [
            0,
            0x00af_9b00_0000_ffff,
            0x00cf_9300_0000_ffff,
            0x00cf_fb00_0000_ffff,
            0x00cf_f300_0000_ffff,
            0x00af_fb00_0000_ffff,
            0x0000_8900_3000_0067,
            0,
            0x00cf_1300_0000_ffff,
            0x00af_1b00_0000_ffff,
        ];
        for (number, descriptor) in descriptors.into_iter().enumerate() {
            self.write(GDT + number as u64 * 8, descriptor);
        }
        self.write(TSS_BASE + 4, RSP0);
        self.write(TSS_BASE + 0x24, IST1);
        // The I/O map starts beyond the TSS: there is none.
        self.write_bytes(TSS_BASE + 102, &[0x68, 0]);
        for vector in 0..=255 {
            self.gate(vector, Self::handler(vector), 0x8e, 0);
        }
    }

    fn write_page_tables(&mut self) {
        self.write(PML4, PDPT | P | W | U);
        self.write(PDPT, PD | P | W | U);
        self.write(PDPT + 3 * 8, PD_DEVICES | P | W | U);
        for device in [IOAPIC, LAPIC] {
            self.write(PD_DEVICES + (device >> 21 & 0x1ff) * 8, device | 1 << 7 | P | W);
        }
        for table in 0..4 {
            self.write(PD + table * 8, (PT + table * 0x1000) | P | W | U);
        }
        for page in 0..RAM as u64 / 4096 {
            let linear = page * 4096;
            let user = if (USER..USER + (2 << 20)).contains(&linear) { U } else { 0 };
            self.map(linear, linear | P | W | user);
        }
    }

    fn write_handlers(&mut self) {
        let common = HANDLERS + 256 * 16;
        for vector in 0..=255u8 {
            self.code(Self::handler(vector), |a| {
                if !matches!(vector, 8 | 10..=14 | 17 | 21) {
                    a.push(0)?;
                }
                a.push(i32::from(vector))?;
                a.jmp(common)?;
                Ok(vec![])
            });
        }
        self.code(common, |a| {
            let mut halt = a.create_label();
            let mut interrupt = a.create_label();
            let mut leave = a.create_label();
            a.push(rax)?;
            a.push(rbx)?;
            a.mov(rbx, qword_ptr(RECORD_COUNT))?;
            a.inc(qword_ptr(RECORD_COUNT))?;
            a.shl(rbx, 6)?;
            a.add(rbx, RECORDS as i32)?;
            for field in 0..7 {
                a.mov(rax, qword_ptr(rsp + 16 + field * 8))?;
                a.mov(qword_ptr(rbx + field * 8), rax)?;
            }
            a.mov(rax, cr2)?;
            a.mov(qword_ptr(rbx + 56), rax)?;
            a.cmp(qword_ptr(rsp + 16), 32)?;
            a.jae(interrupt)?;
            a.jmp(halt)?;
            a.set_label(&mut interrupt)?;
            a.cmp(qword_ptr(NO_EOI), 0)?;
            a.jne(leave)?;
            a.mov(eax, (LAPIC + 0xb0) as u32)?;
            a.mov(dword_ptr(rax), 0)?;
            a.set_label(&mut leave)?;
            a.pop(rbx)?;
            a.pop(rax)?;
            a.add(rsp, 16)?;
            a.iretq()?;
            a.set_label(&mut halt)?;
            a.cli()?;
            a.hlt()?;
            Ok(vec![])
        });
    }
}

/// Loads the descriptor tables, control registers and EFER, and enables the APIC.
fn prologue(a: &mut Asm, setup: (u64, u64, u32)) -> Result<(), IcedError> {
    let (cr0_value, cr4_value, efer) = setup;
    let pointer = DATA + 0xff0;
    a.mov(word_ptr(pointer), 0xfff)?;
    a.mov(qword_ptr(pointer + 2), IDT as i32)?;
    a.lidt(ptr(pointer))?;
    a.mov(eax, u32::from(TSS))?;
    a.ltr(ax)?;
    a.mov(ecx, 0xc000_0080u32)?;
    a.xor(edx, edx)?;
    a.mov(eax, efer)?;
    a.wrmsr()?;
    a.mov(rax, cr4_value)?;
    a.mov(cr4, rax)?;
    a.mov(rax, cr0_value)?;
    a.mov(cr0, rax)?;
    a.mov(eax, (LAPIC + 0xf0) as u32)?;
    a.mov(dword_ptr(rax), 0x1ff)?;
    Ok(())
}

/// A label here.
pub fn here(a: &mut Asm) -> CodeLabel {
    let mut label = a.create_label();
    a.set_label(&mut label).unwrap();
    label
}
