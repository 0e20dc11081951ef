//! A guest's driver, as far as a test needs one, and a device that is always two.
//!
//! Every access and every event goes to two devices with a memory each. They must hand out the same
//! effects, read back the same values and, at each [`Guest::check`], have the same state and memory,
//! byte for byte: that is what replay rests on. [`Guest::transplant`] replaces the second by one restored
//! from the serialised state of the first, in whatever it was in the middle of.

#![expect(dead_code, reason = "each test file uses a part of the driver")]

use std::collections::BTreeMap;

use virtio_devices::{DeviceEvent, Effect, Effects, Front, FrontError, VirtioPci, VirtioPciState};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

pub type Memory = GuestMemoryMmap<()>;
pub type Device = VirtioPci<Memory>;

pub const BAR: u32 = 0xc000_0000;
/// RAM has a hole from here on ...
pub const HOLE: u64 = 0x60000;
/// ... to here.
pub const HOLE_END: u64 = 0x80000;
pub const MEMORY_END: u64 = 0xa0000;
const RINGS: u64 = 0x10000;
/// Where the driver's buffers begin.
pub const DATA: u64 = 0x20000;

pub const VERSION_1: u64 = 1 << 32;
pub const EVENT_IDX: u64 = 1 << 29;
pub const INDIRECT: u64 = 1 << 28;

pub const STATUS: u64 = 20;
pub const NEEDS_RESET: u8 = 64;

/// Descriptor flags.
pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT_FLAG: u16 = 4;

/// A buffer for a chain: address, length, whether the device writes it.
pub type Piece = (u64, u32, bool);

/// One of the two devices.
struct Side {
    memory: Memory,
    device: Device,
}

impl Side {
    fn new(front: Box<dyn Front<Memory>>) -> Self {
        let ranges = [
            (GuestAddress(0), HOLE as usize),
            (GuestAddress(HOLE_END), (MEMORY_END - HOLE_END) as usize),
        ];
        Self { memory: Memory::from_ranges(&ranges).unwrap(), device: Device::new(front, BAR) }
    }

    fn bytes(&self) -> Vec<u8> {
        let mut all = Vec::new();
        for region in self.memory.iter() {
            let mut bytes = vec![0; region.len() as usize];
            self.memory.read_slice(&mut bytes, region.start_addr()).unwrap();
            all.extend(bytes);
        }
        all
    }

    fn state(&self) -> Vec<u8> {
        postcard::to_stdvec(&self.device.save()).unwrap()
    }
}

/// The driver's side of a queue.
#[derive(Clone, Debug, Default)]
struct DriverQueue {
    size: u16,
    base: u64,
    next_descriptor: u16,
    avail: u16,
    kicked: u16,
    used: u16,
}

/// Where the structures of the transport are, as its capabilities say.
#[derive(Clone, Debug, Default)]
struct Layout {
    common: u64,
    notify: u64,
    notify_multiplier: u64,
    isr: u64,
    device: u64,
    msix_control: u16,
    msix_table: u64,
    msix_pending: u64,
}

pub struct Guest {
    make: fn() -> Box<dyn Front<Memory>>,
    first: Side,
    second: Side,
    /// Effects other than interrupts, not yet looked at.
    pub effects: Effects,
    /// Interrupts by vector, not yet looked at.
    pub interrupts: BTreeMap<u32, usize>,
    queues: Vec<DriverQueue>,
    layout: Layout,
    features: u64,
    next_data: u64,
}

impl Guest {
    /// A device nobody has touched.
    pub fn cold(make: fn() -> Box<dyn Front<Memory>>) -> Self {
        let (first, second) = (Side::new(make()), Side::new(make()));
        Self {
            make,
            first,
            second,
            effects: Vec::new(),
            interrupts: BTreeMap::new(),
            queues: Vec::new(),
            layout: Layout::default(),
            features: 0,
            next_data: DATA,
        }
    }

    /// A device with a driver at work that accepted all offered features in `features`.
    pub fn start(make: fn() -> Box<dyn Front<Memory>>, features: u64) -> Self {
        let mut guest = Self::cold(make);
        guest.probe();
        guest.initialise(features);
        guest
    }

    // The device's four doors, each to both.

    pub fn config_read(&mut self, offset: u16, len: usize) -> u32 {
        let (mut a, mut b) = ([0; 4], [0; 4]);
        self.first.device.config_read(offset, &mut a[..len]);
        self.second.device.config_read(offset, &mut b[..len]);
        assert_eq!(a, b, "configuration space at {offset:#x}");
        u32::from_le_bytes(a)
    }

    pub fn config_write(&mut self, offset: u16, data: &[u8]) {
        self.both(|side, effects| {
            side.device.config_write(offset, data, &side.memory, effects);
        });
    }

    pub fn bar_read(&mut self, offset: u64, len: usize) -> u64 {
        let (mut a, mut b) = ([0; 8], [0; 8]);
        self.first.device.bar_read(offset, &mut a[..len]);
        self.second.device.bar_read(offset, &mut b[..len]);
        assert_eq!(a, b, "BAR at {offset:#x}");
        u64::from_le_bytes(a)
    }

    pub fn bar_write(&mut self, offset: u64, data: &[u8]) {
        self.both(|side, effects| side.device.bar_write(offset, data, &side.memory, effects));
    }

    pub fn apply(&mut self, event: &DeviceEvent) -> Result<(), FrontError> {
        self.both(|side, effects| side.device.apply(event.clone(), &side.memory, effects))
    }

    pub fn reset_machine(&mut self) {
        self.both(|side, _| side.device.reset());
    }

    fn both<R: PartialEq + std::fmt::Debug>(
        &mut self,
        mut run: impl FnMut(&mut Side, &mut Effects) -> R,
    ) -> R {
        let (mut first, mut second) = (Vec::new(), Vec::new());
        let result = run(&mut self.first, &mut first);
        assert_eq!(result, run(&mut self.second, &mut second), "the devices answer differently");
        assert_eq!(first, second, "the devices hand out different effects");
        for effect in first {
            match effect {
                Effect::Interrupt { address, data } => {
                    assert_eq!(address, 0xfee0_0000, "vector {data}");
                    *self.interrupts.entry(data).or_default() += 1;
                }
                other => self.effects.push(other),
            }
        }
        result
    }

    pub fn write(&mut self, address: u64, bytes: &[u8]) {
        for side in [&self.first, &self.second] {
            // Garbage may point anywhere.
            let _ = side.memory.write(bytes, GuestAddress(address));
        }
    }

    pub fn read(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.first.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    /// State and memory of the two are equal.
    pub fn check(&self) {
        assert!(self.first.state() == self.second.state(), "the devices' states differ");
        assert!(self.first.bytes() == self.second.bytes(), "the devices' memories differ");
    }

    /// Moves the second device into a fresh one by way of its serialised state.
    pub fn transplant(&mut self) {
        self.check();
        let bytes = self.first.state();
        let state: VirtioPciState = postcard::from_bytes(&bytes).unwrap();
        let mut fresh = Side::new((self.make)());
        fresh.device.restore(&state).unwrap();
        let (low, high) = (self.read(0, HOLE as usize), self.read(HOLE_END, 0x20000));
        fresh.memory.write_slice(&low, GuestAddress(0)).unwrap();
        fresh.memory.write_slice(&high, GuestAddress(HOLE_END)).unwrap();
        self.second = fresh;
        self.check();
    }

    pub fn state_size(&self) -> usize {
        self.first.state().len()
    }

    pub fn save(&self) -> VirtioPciState {
        self.first.device.save()
    }

    pub fn device(&self) -> &Device {
        &self.first.device
    }

    // What a driver does.

    /// Finds the structures through the capabilities and switches memory decoding and MSI-X on.
    pub fn probe(&mut self) {
        assert_eq!(self.config_read(0, 2), 0x1af4);
        assert_ne!(self.config_read(6, 2) & 0x10, 0, "there is a list of capabilities");
        assert!(self.device().bar_range().is_none(), "no decoding before it is switched on");
        self.config_write(4, &6u16.to_le_bytes());
        assert_eq!(self.device().bar_range().unwrap().start, u64::from(BAR));
        let mut at = self.config_read(0x34, 1) as u16;
        let mut seen = Vec::new();
        while at != 0 {
            let id = self.config_read(at, 1);
            match id {
                0x11 => {
                    self.layout.msix_control = at + 2;
                    self.layout.msix_table = u64::from(self.config_read(at + 4, 4));
                    self.layout.msix_pending = u64::from(self.config_read(at + 8, 4));
                }
                0x09 => {
                    let kind = self.config_read(at + 3, 1);
                    let offset = u64::from(self.config_read(at + 8, 4));
                    match kind {
                        1 => self.layout.common = offset,
                        2 => {
                            self.layout.notify = offset;
                            self.layout.notify_multiplier = u64::from(self.config_read(at + 16, 4));
                        }
                        3 => self.layout.isr = offset,
                        4 => self.layout.device = offset,
                        _ => {}
                    }
                    seen.push(kind);
                }
                other => panic!("capability {other:#x}"),
            }
            at = self.config_read(at + 1, 1) as u16;
        }
        assert_eq!(seen, [1, 2, 3, 4, 5]);
    }

    pub fn set_msix_control(&mut self, value: u16) {
        self.config_write(self.layout.msix_control, &value.to_le_bytes());
    }

    /// Sets a vector's message to its own number.
    pub fn set_vector(&mut self, vector: u16, masked: bool) {
        let entry = self.layout.msix_table + 16 * u64::from(vector);
        self.bar_write(entry, &0xfee0_0000u64.to_le_bytes());
        self.bar_write(entry + 8, &u32::from(vector).to_le_bytes());
        self.bar_write(entry + 12, &u32::from(masked).to_le_bytes());
    }

    pub fn pending(&mut self) -> u64 {
        self.bar_read(self.layout.msix_pending, 8)
    }

    pub fn isr(&mut self) -> u64 {
        self.bar_read(self.layout.isr, 1)
    }

    pub fn common_read(&mut self, register: u64, len: usize) -> u64 {
        self.bar_read(self.layout.common + register, len)
    }

    pub fn common_write(&mut self, register: u64, data: &[u8]) {
        self.bar_write(self.layout.common + register, data);
    }

    pub fn status(&mut self) -> u8 {
        self.common_read(STATUS, 1) as u8
    }

    pub fn device_config(&mut self, offset: u64, len: usize) -> u64 {
        self.bar_read(self.layout.device + offset, len)
    }

    pub fn offered(&mut self) -> u64 {
        let mut features = 0;
        for half in 0..2u32 {
            self.common_write(0, &half.to_le_bytes());
            features |= self.common_read(4, 4) << (32 * half);
        }
        features
    }

    /// From reset to DRIVER_OK, as virtio 1.2, 3.1.1 has it.
    pub fn initialise(&mut self, features: u64) {
        self.common_write(STATUS, &[0]);
        assert_eq!(self.status(), 0);
        self.common_write(STATUS, &[1]);
        self.common_write(STATUS, &[3]);
        self.features = self.offered() & (features | VERSION_1);
        for half in 0..2u32 {
            self.common_write(8, &half.to_le_bytes());
            self.common_write(12, &((self.features >> (32 * half)) as u32).to_le_bytes());
        }
        self.common_write(STATUS, &[11]);
        assert_eq!(self.status(), 11, "the features are accepted");
        let count = self.common_read(18, 2) as u16;
        self.set_msix_control(0x8000);
        self.set_vector(0, false);
        self.common_write(16, &0u16.to_le_bytes());
        self.queues.clear();
        for index in 0..count {
            self.set_vector(index + 1, false);
            let base = RINGS + 0x4000 * u64::from(index);
            // Left over from the driver before.
            self.write(base, &[0; 0x4000]);
            self.common_write(22, &index.to_le_bytes());
            let size = self.common_read(24, 2) as u16;
            self.common_write(26, &(index + 1).to_le_bytes());
            self.common_write(32, &(base as u32).to_le_bytes());
            self.common_write(36, &0u32.to_le_bytes());
            self.common_write(40, &(base + 0x1000).to_le_bytes());
            self.common_write(48, &(base + 0x2000).to_le_bytes());
            self.common_write(28, &1u16.to_le_bytes());
            assert_eq!(self.common_read(28, 2), 1);
            self.queues.push(DriverQueue { size, base, ..DriverQueue::default() });
        }
        self.common_write(STATUS, &[15]);
        assert_eq!(self.status(), 15);
    }

    /// From whatever a guest made of the device to DRIVER_OK.
    pub fn initialise_after_anything(&mut self, features: u64) {
        self.reset_machine();
        self.probe();
        self.initialise(features);
    }

    /// Room for `len` bytes of data, page-aligned; old room is used again when there is no more.
    pub fn allocate(&mut self, len: u32) -> u64 {
        let len = u64::from(len).next_multiple_of(0x1000);
        if self.next_data + len > HOLE {
            self.next_data = DATA;
        }
        let address = self.next_data;
        self.next_data += len;
        address
    }

    pub fn descriptor(&mut self, table: u64, index: u16, descriptor: (u64, u32, u16, u16)) {
        let (address, len, flags, next) = descriptor;
        let mut bytes = address.to_le_bytes().to_vec();
        bytes.extend(len.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        self.write(table + 16 * u64::from(index), &bytes);
    }

    pub fn table(&self, queue: usize) -> u64 {
        self.queues[queue].base
    }

    /// Makes a chain of `pieces` available and returns its head.
    pub fn add(&mut self, queue: usize, pieces: &[Piece]) -> u16 {
        let DriverQueue { size, base, next_descriptor: head, .. } = self.queues[queue].clone();
        for (i, &(address, len, write)) in pieces.iter().enumerate() {
            let last = i + 1 == pieces.len();
            let flags = if last { 0 } else { NEXT } | if write { WRITE } else { 0 };
            let index = (head + i as u16) % size;
            self.descriptor(base, index, (address, len, flags, (index + 1) % size));
        }
        self.queues[queue].next_descriptor = (head + pieces.len() as u16) % size;
        self.add_head(queue, head);
        head
    }

    /// The same through an indirect table.
    pub fn add_indirect(&mut self, queue: usize, pieces: &[Piece]) -> u16 {
        let table = self.allocate(16 * pieces.len() as u32);
        for (i, &(address, len, write)) in pieces.iter().enumerate() {
            let last = i + 1 == pieces.len();
            let flags = if last { 0 } else { NEXT } | if write { WRITE } else { 0 };
            self.descriptor(table, i as u16, (address, len, flags, i as u16 + 1));
        }
        let DriverQueue { size, base, next_descriptor: head, .. } = self.queues[queue].clone();
        self.descriptor(base, head, (table, 16 * pieces.len() as u32, INDIRECT_FLAG, 0));
        self.queues[queue].next_descriptor = (head + 1) % size;
        self.add_head(queue, head);
        head
    }

    pub fn add_head(&mut self, queue: usize, head: u16) {
        let q = &mut self.queues[queue];
        let ring = q.base + 0x1000;
        let slot = ring + 4 + 2 * u64::from(q.avail % q.size);
        q.avail = q.avail.wrapping_add(1);
        let avail = q.avail;
        self.write(slot, &head.to_le_bytes());
        self.set_available(queue, avail);
    }

    pub fn set_available(&mut self, queue: usize, index: u16) {
        self.write(self.queues[queue].base + 0x1002, &index.to_le_bytes());
    }

    /// Tells the driver's wish: no interrupts.
    pub fn set_no_interrupt(&mut self, queue: usize, wish: bool) {
        self.write(self.queues[queue].base + 0x1000, &u16::from(wish).to_le_bytes());
    }

    /// Notifies, if the device wants to know.
    pub fn kick(&mut self, queue: usize) {
        let q = self.queues[queue].clone();
        self.queues[queue].kicked = q.avail;
        if self.features & EVENT_IDX != 0 {
            let event = self.read_u16(q.base + 0x2000 + 4 + 8 * u64::from(q.size));
            // Virtio 1.2, 2.7.10: vring_need_event.
            let passed = q.avail.wrapping_sub(event).wrapping_sub(1);
            if passed >= q.avail.wrapping_sub(q.kicked) {
                return;
            }
        }
        self.notify(queue);
    }

    pub fn notify(&mut self, queue: usize) {
        let at = self.layout.notify + self.layout.notify_multiplier * queue as u64;
        self.bar_write(at, &(queue as u16).to_le_bytes());
    }

    pub fn read_u16(&self, address: u64) -> u16 {
        let bytes = self.read(address, 2);
        u16::from_le_bytes([bytes[0], bytes[1]])
    }

    /// Takes what the device has given back: head and length of each.
    pub fn take_used(&mut self, queue: usize) -> Vec<(u16, u32)> {
        let q = self.queues[queue].clone();
        let ring = q.base + 0x2000;
        let end = self.read_u16(ring + 2);
        let mut taken = Vec::new();
        let mut at = q.used;
        while at != end {
            let entry = self.read(ring + 4 + 8 * u64::from(at % q.size), 8);
            let word = |i: usize| u32::from_le_bytes(entry[i..i + 4].try_into().unwrap());
            taken.push((word(0) as u16, word(4)));
            at = at.wrapping_add(1);
        }
        self.queues[queue].used = end;
        if self.features & EVENT_IDX != 0 {
            // Ask for an interrupt at the very next one.
            self.write(q.base + 0x1004 + 2 * u64::from(q.size), &end.to_le_bytes());
        }
        taken
    }

    pub fn take_effects(&mut self) -> Effects {
        std::mem::take(&mut self.effects)
    }

    /// Interrupts by vector since the last call.
    pub fn take_interrupts(&mut self) -> BTreeMap<u32, usize> {
        std::mem::take(&mut self.interrupts)
    }
}
