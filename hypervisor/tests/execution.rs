//! The software CPU's core: exact stops, code that changes, the dirty set, saving and restoring.

use hypervisor::memory::{GuestMemory, allocate};
use hypervisor::soft::SoftHypervisor;
use hypervisor::{AccessContext, Bus, Exit, Hypervisor, LongModeEntry, Vcpu, VcpuState, Vm};
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use vm_memory::{Bytes, GuestAddress};

const RAM: usize = 8 << 20;
const PAGE_TABLES: u64 = 0x1000;
const STACK: u64 = 0x8_0000;
const CODE: u64 = 0x10_0000;
const DATA: u64 = 0x20_0000;
/// OUT to this port makes the device write the byte to [`PATCHED`].
const PORT_PATCH: u16 = 0x80;
const PATCHED: u64 = 0x30_0000;

/// A device that writes to memory, as a disk would.
struct Devices(GuestMemory);

impl Bus for Devices {
    fn pio_read(&mut self, _: u16, data: &mut [u8], _: &mut AccessContext<'_>) {
        data.fill(0xff);
    }

    fn pio_write(&mut self, port: u16, data: &[u8], _: &mut AccessContext<'_>) {
        assert_eq!(port, PORT_PATCH);
        self.0.write_slice(data, GuestAddress(PATCHED)).unwrap();
    }

    fn mmio_read(&mut self, _: u64, data: &mut [u8], _: &mut AccessContext<'_>) {
        data.fill(0xff);
    }

    fn mmio_write(&mut self, _: u64, _: &[u8], _: &mut AccessContext<'_>) {}
}

struct Guest {
    memory: GuestMemory,
    vm: Box<dyn Vm>,
    vcpu: Box<dyn Vcpu>,
}

impl Guest {
    /// A processor at the start of `code`, with the first GiB mapped to itself.
    fn new(code: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Guest {
        let guest = Guest::empty();
        guest.assemble(CODE, code);
        guest
    }

    fn empty() -> Guest {
        let memory = allocate(&[(0, RAM)]).unwrap();
        for (address, value) in
            [(PAGE_TABLES, 0x2003u64), (0x2000, 0x3003), (0x3000, 0x83), (0x3008, 0x20_0083)]
        {
            memory.write_obj(value, GuestAddress(address)).unwrap();
        }
        for (address, value) in [(0x3010, 0x40_0083u64), (0x3018, 0x60_0083)] {
            memory.write_obj(value, GuestAddress(address)).unwrap();
        }
        let mut vm = SoftHypervisor.create_vm(memory.clone()).unwrap();
        let mut vcpu = vm.create_vcpu(0).unwrap();
        let entry = LongModeEntry {
            rip: CODE,
            rsp: STACK,
            rsi: 0,
            cr3: PAGE_TABLES,
            gdt_base: 0,
            gdt_limit: 0,
            code_selector: 0x10,
            data_selector: 0x18,
        };
        vcpu.reset(&entry).unwrap();
        Guest { memory, vm, vcpu }
    }

    fn assemble(&self, at: u64, code: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) {
        let mut assembler = CodeAssembler::new(64).unwrap();
        code(&mut assembler).unwrap();
        let bytes = assembler.assemble(at).unwrap();
        self.memory.write_slice(&bytes, GuestAddress(at)).unwrap();
    }

    fn run(&mut self, until: Option<u64>) -> Exit {
        self.vcpu.run(until, &mut Devices(self.memory.clone())).unwrap()
    }

    fn run_to_halt(&mut self) {
        assert_eq!(self.run(Some(self.vcpu.retired() + 10_000_000)), Exit::Halted);
    }

    fn read(&self, address: u64) -> u64 {
        self.memory.read_obj(GuestAddress(address)).unwrap()
    }

    fn all_memory(&self) -> Vec<u8> {
        let mut bytes = vec![0; RAM];
        self.memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
        bytes
    }

    fn state(&mut self) -> VcpuState {
        self.vcpu.save().unwrap()
    }
}

/// A bit of everything that counts: branches, calls, strings that end in mid-page and beyond, flags.
fn mixed(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut again = a.create_label();
    let mut function = a.create_label();
    let mut over = a.create_label();
    a.jmp(over)?;
    a.set_label(&mut function)?;
    a.push(rcx)?;
    a.mov(ecx, 37)?;
    a.lea(rdi, qword_ptr(DATA as i32 + 0xff0))?;
    a.mov(al, r8b)?;
    a.rep().stosb()?;
    a.mov(ecx, 9)?;
    a.lea(rsi, qword_ptr(DATA as i32 + 0xff0))?;
    a.lea(rdi, qword_ptr(DATA as i32 + 0x1ffc))?;
    a.rep().movsq()?;
    a.xor(ecx, ecx)?;
    a.rep().movsb()?;
    a.pop(rcx)?;
    a.ret()?;
    a.set_label(&mut over)?;
    a.mov(r8d, 1)?;
    a.mov(ecx, 20)?;
    a.set_label(&mut again)?;
    a.call(function)?;
    a.imul_3(r8, r8, 7)?;
    a.adc(r9, r8)?;
    a.rol(r9, 5)?;
    a.mov(qword_ptr(DATA as i32 + 8).index_by(rcx), r9)?;
    a.dec(ecx)?;
    a.jne(again)?;
    a.hlt()?;
    Ok(())
}

/// `[rcx * 8 + displacement]`.
trait IndexBy {
    fn index_by(self, register: AsmRegister64) -> AsmMemoryOperand;
}

impl IndexBy for AsmMemoryOperand {
    fn index_by(self, register: AsmRegister64) -> AsmMemoryOperand {
        self + register * 8
    }
}

#[test]
fn stops_at_every_count_and_ends_the_same() {
    let mut whole = Guest::new(mixed);
    whole.run_to_halt();
    let (count, state, memory) = (whole.vcpu.retired(), whole.state(), whole.all_memory());

    let mut stepped = Guest::new(mixed);
    for point in 1..count {
        assert_eq!(stepped.run(Some(point)), Exit::Until);
        assert_eq!(stepped.vcpu.retired(), point);
    }
    assert_eq!(stepped.run(Some(count + 1)), Exit::Halted);
    assert_eq!(stepped.state(), state);
    assert!(stepped.all_memory() == memory, "memory differs after stepping");

    for stride in [2, 3, 7, 61] {
        let mut guest = Guest::new(mixed);
        while guest.run(Some(guest.vcpu.retired() + stride)) == Exit::Until {}
        assert_eq!(guest.state(), state, "in steps of {stride}");
        assert!(guest.all_memory() == memory, "memory differs in steps of {stride}");
    }
}

#[test]
fn a_restored_processor_goes_on_alike() {
    let mut original = Guest::new(mixed);
    original.run_to_halt();
    let (count, end) = (original.vcpu.retired(), original.state());

    let mut first = Guest::new(mixed);
    assert_eq!(first.run(Some(count / 2)), Exit::Until);
    let half = first.state();
    let mut second = Guest::empty();
    second.memory.write_slice(&first.all_memory(), GuestAddress(0)).unwrap();
    second.vcpu.restore(&half).unwrap();
    assert_eq!(second.state(), half);
    second.run_to_halt();
    assert_eq!(second.state(), end);
    assert!(second.all_memory() == original.all_memory(), "memory differs after restoring");
}

#[test]
fn each_iteration_counts_and_can_be_resumed() {
    let mut guest = Guest::new(|a| {
        a.mov(ecx, 5000)?;
        a.mov(edi, DATA as u32 + 100)?;
        a.mov(eax, 0x55)?;
        a.rep().stosb()?;
        a.hlt()
    });
    // Three instructions, then 1234 bytes.
    assert_eq!(guest.run(Some(3 + 1234)), Exit::Until);
    let mut bytes = [0; 5200];
    guest.memory.read_slice(&mut bytes, GuestAddress(DATA)).unwrap();
    assert_eq!(bytes.iter().filter(|byte| **byte == 0x55).count(), 1234);
    guest.run_to_halt();
    assert_eq!(guest.vcpu.retired(), 3 + 5000 + 1);
    guest.memory.read_slice(&mut bytes, GuestAddress(DATA)).unwrap();
    assert_eq!(bytes.iter().filter(|byte| **byte == 0x55).count(), 5000);
    assert!(bytes[100..5100].iter().all(|byte| *byte == 0x55));
}

#[test]
fn overlapping_copies_go_byte_by_byte() {
    let mut guest = Guest::new(|a| {
        a.mov(dword_ptr(DATA as i32), 0x0403_0201)?;
        a.mov(esi, DATA as u32)?;
        a.mov(edi, DATA as u32 + 3)?;
        a.mov(ecx, 9000)?;
        a.rep().movsb()?;
        // Downward over itself.
        a.std()?;
        a.mov(esi, DATA as u32 + 0x5000)?;
        a.mov(edi, DATA as u32 + 0x4ffd)?;
        a.mov(ecx, 100)?;
        a.rep().movsb()?;
        a.hlt()
    });
    guest.run_to_halt();
    let mut bytes = [0; 9003];
    guest.memory.read_slice(&mut bytes, GuestAddress(DATA)).unwrap();
    assert!(bytes.iter().zip([1, 2, 3].iter().cycle()).all(|(byte, expected)| byte == expected));
}

#[test]
fn an_instruction_may_change_the_next_one() {
    let mut guest = Guest::new(|a| {
        let mut patched = a.create_label();
        a.lea(rdi, ptr(patched))?;
        a.mov(byte_ptr(rdi + 1), 77)?;
        a.nop()?;
        a.set_label(&mut patched)?;
        // B0 ib.
        a.mov(al, 1)?;
        a.mov(byte_ptr(DATA as i32), al)?;
        a.hlt()
    });
    guest.run_to_halt();
    assert_eq!(guest.read(DATA) & 0xff, 77);
    assert_eq!(guest.vcpu.retired(), 6);
}

#[test]
fn a_loop_that_rewrites_itself_runs_what_it_wrote() {
    let mut guest = Guest::new(|a| {
        let mut again = a.create_label();
        let mut patched = a.create_label();
        a.lea(rdi, ptr(patched))?;
        a.xor(ebx, ebx)?;
        a.mov(ecx, 100)?;
        a.set_label(&mut again)?;
        a.mov(byte_ptr(rdi + 1), cl)?;
        a.set_label(&mut patched)?;
        a.mov(al, 0)?;
        a.movzx(eax, al)?;
        a.add(ebx, eax)?;
        a.dec(ecx)?;
        a.jne(again)?;
        a.mov(dword_ptr(DATA as i32), ebx)?;
        a.hlt()
    });
    guest.run_to_halt();
    assert_eq!(guest.read(DATA) as u32, (1..=100).sum::<u32>());
}

/// Calls code at [`PATCHED`], lets a device overwrite it, and calls it again.
#[test]
fn a_device_may_write_code() {
    let mut guest = Guest::new(|a| {
        a.mov(ebx, PATCHED as u32)?;
        a.xor(ecx, ecx)?;
        a.call(rbx)?;
        // RET in place of INC ECX's first byte.
        a.mov(al, 0xc3)?;
        a.out(PORT_PATCH as u32, al)?;
        a.call(rbx)?;
        a.mov(dword_ptr(DATA as i32), ecx)?;
        a.hlt()
    });
    guest.assemble(PATCHED, |a| {
        a.inc(ecx)?;
        a.ret()
    });
    guest.run_to_halt();
    assert_eq!(guest.read(DATA) as u32, 1);
    assert_eq!(guest.vcpu.retired(), 2 + 3 + 2 + 2 + 2);
}

#[test]
fn memory_written_between_runs_is_executed() {
    let mut guest = Guest::new(|a| {
        a.mov(ebx, PATCHED as u32)?;
        a.call(rbx)?;
        a.call(rbx)?;
        a.mov(dword_ptr(DATA as i32), ecx)?;
        a.hlt()
    });
    guest.assemble(PATCHED, |a| {
        a.mov(ecx, 1)?;
        a.ret()
    });
    assert_eq!(guest.run(Some(4)), Exit::Until);
    guest.assemble(PATCHED, |a| {
        a.mov(ecx, 2)?;
        a.ret()
    });
    guest.run_to_halt();
    assert_eq!(guest.read(DATA) as u32, 2);
}

#[test]
fn an_instruction_may_cross_a_page() {
    let mut guest = Guest::empty();
    guest.assemble(CODE, |a| {
        a.mov(ecx, 3)?;
        a.jmp(CODE + 0xffd)
    });
    // Five bytes, three of them on the first page; then back to itself.
    guest.assemble(CODE + 0xffd, |a| {
        a.mov(eax, 0x1234_5678)?;
        a.dec(ecx)?;
        a.jne(CODE + 0xffd)?;
        a.mov(dword_ptr(DATA as i32), eax)?;
        a.hlt()
    });
    guest.run_to_halt();
    assert_eq!(guest.read(DATA) as u32, 0x1234_5678);
    assert_eq!(guest.vcpu.retired(), 2 + 3 * 3 + 2);
    // Its second half changes: what was decoded before must be gone.
    let memory = guest.memory.clone();
    let mut guest = Guest { memory, ..guest };
    guest.assemble(CODE + 0x1002, |a| a.jmp(CODE + 0x1100));
    guest.assemble(CODE + 0x1100, |a| {
        a.mov(dword_ptr(DATA as i32 + 4), eax)?;
        a.hlt()
    });
    let entry = LongModeEntry {
        rip: CODE,
        rsp: STACK,
        rsi: 0,
        cr3: PAGE_TABLES,
        gdt_base: 0,
        gdt_limit: 0,
        code_selector: 0x10,
        data_selector: 0x18,
    };
    guest.vcpu.reset(&entry).unwrap();
    guest.run_to_halt();
    assert_eq!(guest.read(DATA) >> 32, 0x1234_5678);
}

#[test]
fn the_dirty_set_has_the_pages_written_since_it_was_taken() {
    let page = |address: u64| address >> 12;
    let mut guest = Guest::new(|a| {
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.inc(dword_ptr(DATA as i32))?;
        a.mov(byte_ptr(DATA as i32 + 0x3fff), 1)?;
        a.jmp(again)
    });
    let mut pages = Vec::new();
    guest.vm.take_dirty_pages(&mut pages).unwrap();
    for written in [PAGE_TABLES, 0x2000, 0x3000, CODE] {
        assert!(pages.contains(&page(written)), "{written:#x} was written by the loader");
    }
    assert!(pages.is_sorted());

    // The guest's store is cached as one to a dirty page; the set must see the next one all the same.
    for _ in 0..3 {
        let until = guest.vcpu.retired() + 30;
        assert_eq!(guest.run(Some(until)), Exit::Until);
        pages.clear();
        guest.vm.take_dirty_pages(&mut pages).unwrap();
        pages.retain(|page| *page >= CODE >> 12);
        assert_eq!(pages, [page(DATA), page(DATA + 0x3fff)]);
    }
    pages.clear();
    guest.vm.take_dirty_pages(&mut pages).unwrap();
    assert!(pages.is_empty(), "{pages:?}");
}

#[test]
fn a_kick_ends_a_run() {
    let mut guest = Guest::new(|a| {
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.jmp(again)
    });
    let kicker = guest.vcpu.kicker();
    kicker.kick();
    assert_eq!(guest.run(None), Exit::Kicked);
    assert_eq!(guest.vcpu.retired(), 0, "a kick before the run ends it at once");
    let thread = std::thread::spawn(move || kicker.kick());
    assert_eq!(guest.run(None), Exit::Kicked);
    thread.join().unwrap();
}

#[test]
fn a_rep_has_done_what_came_before_its_fault() {
    let mut guest = Guest::new(|a| {
        a.mov(rcx, -1i64)?;
        a.xor(edi, edi)?;
        a.mov(esi, DATA as u32)?;
        a.rep().lodsb()?;
        a.hlt()
    });
    // LODS walks off the mapped memory, faults, and with no IDT that is the end.
    assert_eq!(guest.run(None), Exit::Shutdown);
    let mapped = RAM as u64 - DATA;
    assert_eq!(guest.vcpu.retired(), 3 + mapped + 1, "a shutdown is counted");
}
