//! What stands around the micro-guest: its memory, its machine, a disk in memory, and a watchdog.

use std::arch::global_asm;
use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::Duration;

use ft::Event;
use hypervisor::kvm::KvmHypervisor;
use hypervisor::soft::SoftHypervisor;
use hypervisor::{
    AccessContext, Bus, Exit, GuestMemory, Hypervisor, LongModeEntry, Vcpu, VcpuState, Vm,
};
use virtio_devices::effect::SECTOR_SIZE;
use virtio_devices::{BlockOp, BlockRequest, BlockStatus};
use vm_memory::{Bytes, GuestAddress};
use vmm::config::{ConsoleMode, DiskConfig, VmConfig};
use vmm::machine::{HostFacts, Machine, MachineEffect, MachineState, layout};

global_asm!(include_str!("guest.s"));

unsafe extern "C" {
    static micro_guest_start: u8;
    static micro_guest_breakpoint: u8;
    static micro_guest_interrupt: u8;
    static micro_guest_faults: u8;
    static micro_guest_end: u8;
}

const MEMORY: u64 = 4 << 20;
const PAGE: u64 = 4096;
const DISK_SECTORS: u64 = 128;

// Where things lie in the guest; `guest.s` knows the same numbers.
const GDT: u64 = 0x1000;
const TSS: u64 = 0x2000;
const IDT: u64 = 0x5000;
const PAGE_TABLES: u64 = 0x6000;
const CODE: u64 = 0x1_0000;
const KERNEL_STACK: u64 = 0x2_4000;
const KERNEL_CODE: u16 = 0x08;
const KERNEL_DATA: u16 = 0x10;
/// The page disk requests read into.
pub const DATA_PAGE: u64 = 0x34;
/// The pages user mode computes in, and the highest the guest uses.
pub const PAYLOAD_PAGES: Range<u64> = 0x100..0x140;
const PAYLOAD_START: u64 = PAYLOAD_PAGES.start * PAGE;

/// The port whose write is a checkpoint.
const CHECKPOINT: u16 = 0x80;
/// Longer than any run takes on the slowest backend.
const PATIENCE: Duration = Duration::from_secs(120);

/// Every backend that works here.
pub fn backends() -> Vec<Arc<dyn Hypervisor>> {
    let mut backends: Vec<Arc<dyn Hypervisor>> = vec![Arc::new(SoftHypervisor)];
    match KvmHypervisor::open() {
        Ok(kvm) => backends.push(Arc::new(kvm)),
        Err(error) => println!("SKIPPED on kvm: {error}"),
    }
    backends
}

/// What the disk holds.
pub fn disk_image() -> Vec<u8> {
    let mut state = 0x9e37_79b9_u32;
    (0..DISK_SECTORS * SECTOR_SIZE)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        })
        .collect()
}

/// What `guest.s` computes, computed here.
pub fn expected_output(disk: &[u8]) -> String {
    let mut buffer = vec![0u64; 0x4_0000 / 8];
    let (mut x, mut sum, mut roots) = (0x2545_f491_4f6c_dd1d_u64, 0u64, 0f64);
    for _ in 0..400_000 {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        let word = &mut buffer[(x & 0x3_fff8) as usize / 8];
        sum = sum.rotate_left(5).wrapping_add(x).wrapping_add(*word);
        *word = sum;
        roots += ((x >> 20) as f64).sqrt();
    }
    sum ^= sum % 1_000_003;
    let mut checksum = 0u64;
    for request in 0..6 {
        let start = (request * 16 + 3) * SECTOR_SIZE as usize;
        for word in disk[start..start + 2048].as_chunks::<8>().0 {
            checksum = checksum.rotate_left(7) ^ u64::from_le_bytes(*word);
        }
    }
    format!("compute {sum:016x} {:016x}\ndisk {checksum:016x}\n", roots.to_bits())
}

/// Why the guest stands still.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stop {
    Checkpoint,
    Disk(DiskRequest),
    Off,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskRequest {
    pub device: u8,
    pub request: BlockRequest,
}

/// When a disk request is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// Where the guest stands now.
    AtOnce,
    /// After it has run on; it can only wait.
    WhileItWaits,
}

/// A saved guest.
pub struct Saved {
    vcpu: Vec<u8>,
    machine: Vec<u8>,
    memory: Vec<Vec<u8>>,
    output: Vec<u8>,
}

/// The machine, with a port that stops the guest.
struct WithCheckpoints<'a> {
    machine: &'a mut Machine,
    reached: bool,
}

impl Bus for WithCheckpoints<'_> {
    fn pio_read(&mut self, port: u16, data: &mut [u8], cx: &mut AccessContext<'_>) {
        self.machine.pio_read(port, data, cx);
    }

    fn pio_write(&mut self, port: u16, data: &[u8], cx: &mut AccessContext<'_>) {
        if port == CHECKPOINT {
            self.reached = true;
            cx.stop = true;
        } else {
            self.machine.pio_write(port, data, cx);
        }
    }

    fn mmio_read(&mut self, address: u64, data: &mut [u8], cx: &mut AccessContext<'_>) {
        self.machine.mmio_read(address, data, cx);
    }

    fn mmio_write(&mut self, address: u64, data: &[u8], cx: &mut AccessContext<'_>) {
        self.machine.mmio_write(address, data, cx);
    }
}

/// Kicks a guest that takes too long.
struct Watchdog {
    expired: Arc<AtomicBool>,
    /// Dropped to call it off.
    _alive: Sender<()>,
}

impl Watchdog {
    fn watch(vcpu: &dyn Vcpu) -> Self {
        let (kicker, expired) = (vcpu.kicker(), Arc::new(AtomicBool::new(false)));
        let (alive, ended) = channel();
        let flag = Arc::clone(&expired);
        std::thread::spawn(move || {
            if ended.recv_timeout(PATIENCE) == Err(RecvTimeoutError::Timeout) {
                flag.store(true, Ordering::SeqCst);
                kicker.kick();
            }
        });
        Self { expired, _alive: alive }
    }
}

/// The guest and all around it.
pub struct Micro {
    hypervisor: Arc<dyn Hypervisor>,
    machine: Machine,
    vm: Box<dyn Vm>,
    vcpu: Box<dyn Vcpu>,
    watchdog: Watchdog,
    disk: Vec<u8>,
    output: Vec<u8>,
    /// Most bytes of output that were there at a stop.
    longest_output: usize,
}

impl Micro {
    /// A guest before its first instruction.
    pub fn new(hypervisor: &Arc<dyn Hypervisor>) -> Self {
        let mut micro = Self::empty(hypervisor);
        load(micro.vm.memory());
        micro.vcpu.reset(&entry()).unwrap();
        micro
    }

    fn empty(hypervisor: &Arc<dyn Hypervisor>) -> Self {
        let mut config =
            VmConfig { disks: Some(vec![DiskConfig::default()]), ..Default::default() };
        config.serial.mode = ConsoleMode::Null;
        config.complete(|| [0; 5]);
        let memory = hypervisor::memory::allocate(&layout::ram_ranges(MEMORY)).unwrap();
        let facts = HostFacts { boot_wall_ns: 0, disk_sectors: vec![DISK_SECTORS] };
        let mut machine = Machine::new(&config, memory.clone(), &facts).unwrap();
        if !hypervisor.counts_exactly() {
            machine.stop_at_once();
        }
        let mut vm = hypervisor.create_vm(memory).unwrap();
        let vcpu = vm.create_vcpu(0).unwrap();
        Self {
            hypervisor: Arc::clone(hypervisor),
            machine,
            vm,
            watchdog: Watchdog::watch(&*vcpu),
            vcpu,
            disk: disk_image(),
            output: Vec::new(),
            longest_output: 0,
        }
    }

    /// What came out of the serial port.
    pub fn output(&self) -> String {
        String::from_utf8_lossy(&self.output).into_owned()
    }

    /// Most bytes of output that were there at a stop.
    pub fn longest_output(&self) -> usize {
        self.longest_output
    }

    /// Runs to the next stop.
    pub fn run(&mut self) -> Stop {
        loop {
            let (exit, stop) = self.run_once();
            if let Some(stop) = stop {
                return stop;
            }
            // A kick may come after the guest has stopped for another reason, and then counts here.
            assert!(
                matches!(exit, Exit::Stopped | Exit::Kicked),
                "{exit:?} after {:?}",
                self.output()
            );
        }
    }

    fn run_once(&mut self) -> (Exit, Option<Stop>) {
        let mut bus = WithCheckpoints { machine: &mut self.machine, reached: false };
        let exit = self.vcpu.run(None, &mut bus).unwrap();
        assert!(!self.watchdog.expired.load(Ordering::SeqCst), "stuck after {:?}", self.output());
        let mut stop = bus.reached.then_some(Stop::Checkpoint);
        for effect in std::mem::take(self.machine.effects()) {
            match effect {
                MachineEffect::Serial { bytes } => {
                    self.longest_output = self.longest_output.max(bytes.len());
                    self.output.extend(bytes);
                }
                MachineEffect::Block { device, request } => {
                    stop = Some(Stop::Disk(DiskRequest { device, request }));
                }
                MachineEffect::PowerOff => stop = Some(Stop::Off),
                other => panic!("the guest does not do this: {other:?}"),
            }
        }
        (exit, stop)
    }

    /// Answers a disk request.
    pub fn answer(&mut self, asked: &DiskRequest, when: Answer) {
        if when == Answer::WhileItWaits {
            // Kicked anywhere on its way to HLT or in it.
            let kicker = self.vcpu.kicker();
            let exit = std::thread::scope(|scope| {
                scope.spawn(move || kicker.kick());
                self.run_once()
            });
            assert!(matches!(exit, (Exit::Kicked | Exit::Halted, None)), "{exit:?}");
        }
        let BlockOp::Read { sector, len } = asked.request.op else {
            panic!("the guest only reads: {asked:?}");
        };
        let start = (sector * SECTOR_SIZE) as usize;
        let event = Event::DiskCompletion {
            device: asked.device,
            request: asked.request.id,
            status: BlockStatus::Ok.byte(),
            data: self.disk[start..start + len as usize].to_vec(),
        };
        let (retired, tsc) = (self.vcpu.retired(), self.vcpu.tsc());
        let interrupts = self.vcpu.interrupts();
        let mut cx = AccessContext { retired, tsc, interrupts, stop: false };
        self.machine.apply(&event, &mut cx).unwrap();
    }

    /// Everything, as bytes.
    pub fn save(&mut self) -> Saved {
        Saved {
            vcpu: postcard::to_stdvec(&self.vcpu.save().unwrap()).unwrap(),
            machine: postcard::to_stdvec(&self.machine.save()).unwrap(),
            memory: self.pages(),
            output: self.output.clone(),
        }
    }

    /// Becomes the guest that was saved.
    pub fn restore(&mut self, saved: &Saved) {
        for (page, bytes) in (0..).zip(&saved.memory) {
            self.vm.memory().write_slice(bytes, GuestAddress(page * PAGE)).unwrap();
        }
        let machine: MachineState = postcard::from_bytes(&saved.machine).unwrap();
        self.machine.restore(&machine).unwrap();
        let vcpu: VcpuState = postcard::from_bytes(&saved.vcpu).unwrap();
        self.vcpu.restore(&vcpu).unwrap();
        self.output.clone_from(&saved.output);
    }

    /// The same guest in a new VM; the old one is gone.
    pub fn moved(mut self) -> Self {
        let saved = self.save();
        let mut moved = Self::empty(&self.hypervisor);
        drop(self);
        moved.restore(&saved);
        moved
    }

    /// As after the reset button, with memory as at the start.
    pub fn reset(&mut self) {
        let zeroes = vec![0; PAGE as usize];
        for page in 0..MEMORY / PAGE {
            self.vm.memory().write_slice(&zeroes, GuestAddress(page * PAGE)).unwrap();
        }
        load(self.vm.memory());
        self.machine.reset();
        self.vcpu.reset(&entry()).unwrap();
        self.output.clear();
    }

    pub fn take_dirty_pages(&mut self) -> BTreeSet<u64> {
        let mut pages = Vec::new();
        self.vm.take_dirty_pages(&mut pages).unwrap();
        assert!(pages.is_sorted_by(|a, b| a < b), "ascending, without repeats");
        pages.into_iter().collect()
    }

    /// The content of memory, page by page.
    pub fn pages(&self) -> Vec<Vec<u8>> {
        let page = |number| {
            let mut bytes = vec![0; PAGE as usize];
            self.vm.memory().read_slice(&mut bytes, GuestAddress(number * PAGE)).unwrap();
            bytes
        };
        (0..MEMORY / PAGE).map(page).collect()
    }

    /// The page of the guest's first instruction.
    pub fn code_page(&self) -> u64 {
        CODE / PAGE
    }
}

fn entry() -> LongModeEntry {
    LongModeEntry {
        rip: CODE,
        rsp: KERNEL_STACK,
        rsi: 0,
        cr3: PAGE_TABLES,
        gdt_base: GDT,
        gdt_limit: 0x37,
        code_selector: KERNEL_CODE,
        data_selector: KERNEL_DATA,
    }
}

/// Distance of a label of `guest.s` from the first.
fn offset(label: *const u8) -> usize {
    label.addr() - (&raw const micro_guest_start).addr()
}

fn image() -> &'static [u8] {
    let len = offset(&raw const micro_guest_end);
    // SAFETY: the two labels enclose initialized, read-only data of one section of this program.
    unsafe { std::slice::from_raw_parts(&raw const micro_guest_start, len) }
}

/// Puts image, tables and stacks where the guest expects them.
fn load(memory: &GuestMemory) {
    let put = |address, bytes: &[u8]| memory.write_slice(bytes, GuestAddress(address)).unwrap();
    let put_words = |address, words: &[u64]| {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        put(address, &bytes);
    };
    put(CODE, image());
    // Null; kernel code and data; user data and code; TSS (available, 64-bit), whose limit takes in the whole map
    // of ports.
    let tss_limit = 0x67 + 8193;
    let tss_low = 0x0000_8900_0000_0000 | TSS << 16 | tss_limit;
    put_words(
        GDT,
        &[
            0,
            0x00af_9b00_0000_ffff,
            0x00cf_9300_0000_ffff,
            0x00cf_f300_0000_ffff,
            0x00af_fb00_0000_ffff,
            tss_low,
            0,
        ],
    );
    // Stack of the kernel; where the map of ports begins, in the upper half of the last word. All ports are free.
    put(TSS + 4, &KERNEL_STACK.to_le_bytes());
    put(TSS + 0x66, &0x68u16.to_le_bytes());
    put(TSS + 0x68 + 8192, &[0xff]);
    let gate = |vector: u64, target: usize, privilege: u64| {
        let target = CODE + target as u64;
        let low = (target & 0xffff)
            | u64::from(KERNEL_CODE) << 16
            | (0x8e00 | privilege << 13) << 32
            | (target & 0xffff_0000) << 32;
        put_words(IDT + vector * 16, &[low, 0]);
    };
    for vector in 0..32 {
        gate(vector, offset(&raw const micro_guest_faults) + 16 * vector as usize, 0);
    }
    gate(3, offset(&raw const micro_guest_breakpoint), 3);
    gate(0x40, offset(&raw const micro_guest_interrupt), 0);

    // Four levels, 2 MiB pages: present, writable, user, accessed, dirty; 4 GiB mapped to themselves.
    let table = 0x27;
    put_words(PAGE_TABLES, &[PAGE_TABLES + PAGE + table]);
    for gib in 0..4 {
        let directory = PAGE_TABLES + (2 + gib) * PAGE;
        put_words(PAGE_TABLES + PAGE + gib * 8, &[directory | table]);
        let entries: Vec<u64> = (0..512).map(|n| (gib << 30 | n << 21) | 0xe7).collect();
        put_words(directory, &entries);
    }
    assert!(offset(&raw const micro_guest_end) < 0x1000 && CODE < PAYLOAD_START);
}
