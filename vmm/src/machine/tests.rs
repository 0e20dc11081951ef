//! Tests of the machine as the guest and the event log see it.

use ft::{Control, Event};
use hypervisor::{AccessContext, Bus, GuestMemory, InterruptSink, Msi};
use proptest::prelude::*;

use super::*;
use crate::config::{DiskConfig, MacAddress, NetConfig, SerialConfig};

/// Interrupts as they came.
#[derive(Debug, Default, PartialEq, Eq)]
struct Interrupts {
    lines: Vec<(u32, bool)>,
    messages: Vec<Msi>,
}

impl InterruptSink for Interrupts {
    fn signal_msi(&mut self, msi: Msi) {
        self.messages.push(msi);
    }

    fn set_line(&mut self, gsi: u32, high: bool) {
        self.lines.push((gsi, high));
    }
}

struct Guest {
    machine: Machine,
    interrupts: Interrupts,
    tsc: u64,
    stopped: bool,
}

fn config() -> VmConfig {
    let mut config = VmConfig {
        disks: Some(vec![DiskConfig::default()]),
        net: Some(vec![NetConfig {
            mac: Some(MacAddress([2, 0, 0, 0, 0, 7])),
            ..NetConfig::default()
        }]),
        serial: SerialConfig { mode: ConsoleMode::Null, ..SerialConfig::default() },
        ..VmConfig::default()
    };
    config.complete(|| [1, 2, 3, 4, 5]);
    config
}

fn facts() -> HostFacts {
    HostFacts { boot_wall_ns: 1_700_000_000_000_000_000, disk_sectors: vec![2048] }
}

impl Guest {
    fn new() -> Self {
        let memory = hypervisor::memory::allocate(&layout::ram_ranges(2 << 20)).unwrap();
        let machine = Machine::new(&config(), memory, &facts()).unwrap();
        Self { machine, interrupts: Interrupts::default(), tsc: 0, stopped: false }
    }

    fn with<R>(&mut self, act: impl FnOnce(&mut Machine, &mut AccessContext<'_>) -> R) -> R {
        let mut cx = AccessContext {
            retired: self.tsc,
            tsc: self.tsc,
            interrupts: &mut self.interrupts,
            stop: false,
        };
        let result = act(&mut self.machine, &mut cx);
        self.stopped |= cx.stop;
        result
    }

    fn out(&mut self, port: u16, data: &[u8]) {
        self.with(|machine, cx| machine.pio_write(port, data, cx));
    }

    fn input(&mut self, port: u16, len: usize) -> u32 {
        let mut data = [0; 4];
        self.with(|machine, cx| machine.pio_read(port, &mut data[..len], cx));
        u32::from_le_bytes(data)
    }

    fn config_read(&mut self, slot: u8, register: u8) -> u32 {
        self.select(slot, register);
        self.input(layout::PCI_CONFIG_DATA, 4)
    }

    fn config_write(&mut self, slot: u8, register: u8, value: u32) {
        self.select(slot, register);
        self.out(layout::PCI_CONFIG_DATA, &value.to_le_bytes());
    }

    fn select(&mut self, slot: u8, register: u8) {
        let address = 1 << 31 | u32::from(slot) << 11 | u32::from(register);
        self.out(layout::PCI_CONFIG_ADDRESS, &address.to_le_bytes());
    }

    fn load(&mut self, address: u64, len: usize) -> u64 {
        let mut data = [0; 8];
        self.with(|machine, cx| machine.mmio_read(address, &mut data[..len], cx));
        u64::from_le_bytes(data)
    }

    fn event(&mut self, event: &Event) -> Result<(), MachineError> {
        self.with(|machine, cx| machine.apply(event, cx))
    }
}

#[test]
fn devices_are_found_in_slot_order_by_both_ways_into_configuration_space() {
    let mut guest = Guest::new();
    assert_eq!(guest.config_read(0, 0), 0x0d57_8086);
    // Console, disk, network card, entropy source: virtio device ids 3, 2, 1, 4.
    for (slot, id) in [(1, 0x1043), (2, 0x1042), (3, 0x1041), (4, 0x1044)] {
        assert_eq!(guest.config_read(slot, 0), id << 16 | 0x1af4);
        assert_eq!(
            guest.load(layout::ECAM.start + (u64::from(slot) << 15), 4) as u32,
            id << 16 | 0x1af4
        );
        assert_eq!(guest.config_read(slot, 0x10), pci::bar_address(slot));
    }
    assert_eq!(guest.config_read(5, 0), u32::MAX);
    // No second function, no second bus.
    assert_eq!(guest.load(layout::ECAM.start + (1 << 15) + (1 << 12), 4) as u32, u32::MAX);
    guest.out(layout::PCI_CONFIG_ADDRESS, &0x8001_0800u32.to_le_bytes());
    assert_eq!(guest.input(layout::PCI_CONFIG_DATA, 4), u32::MAX);
    // Parts of a dword.
    guest.select(1, 0);
    assert_eq!(guest.input(layout::PCI_CONFIG_DATA + 2, 2), 0x1043);
    assert_eq!(guest.input(layout::PCI_CONFIG_DATA + 1, 1), 0x1a);
}

#[test]
fn a_bar_answers_where_the_guest_puts_it_once_enabled() {
    let mut guest = Guest::new();
    let home = u64::from(pci::bar_address(2));
    // The number of queues in the common configuration (virtio 1.2, 4.1.4.3).
    let queues = |guest: &mut Guest, base: u64| guest.load(base + 18, 2);
    assert_eq!(queues(&mut guest, home), 0xffff);
    guest.config_write(2, 4, 2);
    assert_eq!(queues(&mut guest, home), 1);
    let moved = layout::MMIO32.end - 0x10_0000;
    guest.config_write(2, 0x10, moved as u32);
    assert_eq!(queues(&mut guest, moved), 1);
    assert_eq!(queues(&mut guest, home), 0xffff);
}

#[test]
fn slots_asked_for_are_given_and_conflicts_named() {
    assert_eq!(pci::assign_slots(&[None, Some(1), None]).unwrap(), [2, 1, 3]);
    assert_eq!(pci::assign_slots(&[Some(0)]), Err(PciError::NoSuchSlot { slot: 0 }));
    assert_eq!(pci::assign_slots(&[Some(32)]), Err(PciError::NoSuchSlot { slot: 32 }));
    assert_eq!(pci::assign_slots(&[Some(3), Some(3)]), Err(PciError::SlotTaken { slot: 3 }));
    assert_eq!(pci::assign_slots(&[None; 32]), Err(PciError::Full));
    assert!(pci::assign_slots(&[None; 31]).is_ok());
}

#[test]
fn serial_output_is_queued_without_a_stop_and_input_interrupts() {
    let mut guest = Guest::new();
    for byte in b"ok\n" {
        guest.out(layout::COM1, &[*byte]);
    }
    assert_eq!(*guest.machine.effects(), [MachineEffect::Serial { bytes: b"ok\n".to_vec() }]);
    assert!(!guest.stopped);
    guest.out(layout::COM1 + 1, &[1]);
    guest.interrupts = Interrupts::default();
    guest.event(&Event::SerialInput { bytes: b"x".to_vec() }).unwrap();
    assert_eq!(guest.interrupts.lines, [(4, true), (4, false)]);
    assert_eq!(guest.input(layout::COM1, 1), u32::from(b'x'));
}

#[test]
fn a_machine_that_stops_at_once_does_so_at_output_and_when_input_was_taken() {
    let mut guest = Guest::new();
    guest.machine.stop_at_once();
    guest.out(layout::COM1, b"x");
    assert!(std::mem::take(&mut guest.stopped));
    assert_eq!(*guest.machine.effects(), [MachineEffect::Serial { bytes: b"x".to_vec() }]);
    guest.input(layout::COM1 + 5, 1);
    assert!(!guest.stopped, "nothing came out");

    let mut taken = 0;
    guest.event(&Event::SerialInput { bytes: vec![b'y'; 1000] }).unwrap();
    while !guest.stopped {
        assert!(guest.machine.serial_backlogged());
        guest.input(layout::COM1, 1);
        taken += 1;
    }
    assert!(!guest.machine.serial_backlogged());
    assert!((1..1000).contains(&taken), "{taken} bytes taken");
}

#[test]
fn the_power_button_raises_the_sci_and_soft_off_stops() {
    let mut guest = Guest::new();
    guest.out(layout::PM1_EVENT + 2, &0x100u16.to_le_bytes());
    guest.interrupts = Interrupts::default();
    guest.event(&Event::Control(Control::PowerButton)).unwrap();
    assert_eq!(guest.interrupts.lines, [(9, true)]);
    guest.out(layout::PM1_EVENT, &0x100u16.to_le_bytes());
    assert_eq!(guest.interrupts.lines, [(9, true), (9, false)]);
    assert!(!guest.stopped);
    guest.out(layout::PM1_CONTROL, &0x3400u16.to_le_bytes());
    assert_eq!(*guest.machine.effects(), [MachineEffect::PowerOff]);
    assert!(guest.stopped);
}

#[test]
fn each_way_to_reset_resets() {
    for (port, value) in
        [(layout::RESET_CONTROL, layout::RESET_VALUE), (layout::I8042_COMMAND, 0xfe)]
    {
        let mut guest = Guest::new();
        guest.out(port, &[value]);
        assert_eq!(*guest.machine.effects(), [MachineEffect::Reset]);
        assert!(guest.stopped);
    }
    let mut guest = Guest::new();
    guest.event(&Event::Control(Control::Reset)).unwrap();
    assert_eq!(*guest.machine.effects(), [MachineEffect::Reset]);
}

#[test]
fn events_that_cannot_be_are_errors_and_change_nothing() {
    let mut guest = Guest::new();
    let before = guest.machine.save();
    let disk = |device| Event::DiskCompletion { device, request: 0, status: 0, data: Vec::new() };
    let console = Event::ConsoleInput { device: 2, bytes: vec![1] };
    assert!(matches!(guest.event(&disk(9)), Err(MachineError::NoSuchDevice { device: 9 })));
    assert!(matches!(guest.event(&disk(2)), Err(MachineError::Event { device: 2, .. })));
    assert!(matches!(guest.event(&console), Err(MachineError::Event { device: 2, .. })));
    assert!(guest.event(&Event::Control(Control::Pause)).is_err());
    assert!(guest.event(&Event::Anchor { tsc: 0, rate: 0 }).is_err());
    assert_eq!(guest.machine.save(), before);
}

#[test]
fn a_machine_needs_the_size_of_each_disk() {
    let memory = || hypervisor::memory::allocate(&layout::ram_ranges(2 << 20)).unwrap();
    let host = HostFacts::default();
    let error = Machine::new(&config(), memory(), &host).err().unwrap();
    assert!(matches!(error, MachineError::DiskSizes { disks: 1, sizes: 0 }));
}

#[test]
fn the_device_tree_has_two_nodes_for_each_virtio_device() {
    let guest = Guest::new();
    let tree = guest.machine.device_tree();
    let names: Vec<_> = tree.keys().map(String::as_str).collect();
    let transports =
        ["_virtio-pci-__console", "_virtio-pci-__rng", "_virtio-pci-_disk0", "_virtio-pci-_net1"];
    let devices = ["__console", "__ioapic", "__rng", "__serial", "_disk0", "_net1"];
    assert!(transports.iter().chain(&devices).all(|name| names.contains(name)), "{names:?}");
    assert_eq!(names.len(), transports.len() + devices.len());
    assert_eq!(tree["_virtio-pci-_net1"].pci_bdf.as_deref(), Some("0000:00:03.0"));
    assert_eq!(tree["_net1"].parent.as_deref(), Some("_virtio-pci-_net1"));
    let json = serde_json::to_value(&tree["_net1"].resources).unwrap();
    assert_eq!(json, serde_json::json!([{"MacAddress": "02:00:00:00:00:07"}]));
}

#[test]
fn a_reset_machine_is_like_a_new_one() {
    let mut guest = Guest::new();
    let new = guest.machine.save();
    guest.config_write(2, 4, 7);
    guest.config_write(3, 0x10, 0xd000_0000);
    guest.out(layout::COM1 + 1, &[3]);
    guest.out(layout::RTC, &[0x0b]);
    guest.event(&Event::Control(Control::PowerButton)).unwrap();
    assert_ne!(guest.machine.save(), new);
    guest.machine.reset();
    assert_eq!(guest.machine.save(), new);
}

#[test]
fn the_state_of_a_machine_with_other_devices_is_refused() {
    let guest = Guest::new();
    let restored = |change: fn(&mut VmConfig)| {
        let mut config = config();
        change(&mut config);
        let memory = hypervisor::memory::allocate(&layout::ram_ranges(2 << 20)).unwrap();
        let disk_sectors = vec![2048; config.disks().len()];
        let host = HostFacts { disk_sectors, ..facts() };
        Machine::new(&config, memory, &host).unwrap().restore(&guest.machine.save())
    };
    restored(|_| ()).unwrap();
    let no_serial = restored(|config| config.serial.mode = ConsoleMode::Off);
    assert!(matches!(no_serial, Err(RestoreError::SerialPresence)), "{no_serial:?}");
    let no_disk = restored(|config| config.disks = None);
    assert!(matches!(no_disk, Err(RestoreError::Pci(_))), "{no_disk:?}");
    // The same slots, but a disk where there was a network card.
    let other_kind = restored(|config| {
        config.net = None;
        config.disks = Some(vec![DiskConfig::default(); 2]);
    });
    assert!(matches!(other_kind, Err(RestoreError::Pci(_))), "{other_kind:?}");
}

/// Something a guest or the world does to a machine.
#[derive(Debug, Clone)]
enum Act {
    Out(u16, Vec<u8>),
    In(u16, usize),
    Store(u64, Vec<u8>),
    Load(u64, usize),
    Config(u8, u8, u32),
    Serial(Vec<u8>),
    Console(Vec<u8>),
    Frames(Vec<Vec<u8>>),
}

fn width() -> impl Strategy<Value = usize> {
    prop_oneof![Just(1), Just(2), Just(4)]
}

fn port() -> impl Strategy<Value = u16> {
    prop_oneof![
        layout::COM1..layout::COM1 + 8,
        layout::RTC..layout::RTC + 2,
        layout::PM1_EVENT..layout::PM_TIMER + 4,
        layout::PCI_CONFIG_ADDRESS..layout::PCI_CONFIG_DATA + 4,
        any::<u16>(),
    ]
}

fn address() -> impl Strategy<Value = u64> {
    prop_oneof![
        (1u8..5, 0u64..0x40).prop_map(|(slot, offset)| u64::from(pci::bar_address(slot)) + offset),
        (1u8..5, 0u64..0x8000)
            .prop_map(|(slot, offset)| u64::from(pci::bar_address(slot)) + offset),
        (1u8..5, 0u64..8)
            .prop_map(|(slot, queue)| u64::from(pci::bar_address(slot)) + 0x3000 + 4 * queue),
        layout::ECAM,
        any::<u64>(),
    ]
}

fn act() -> impl Strategy<Value = Act> {
    let bytes = |len: usize| proptest::collection::vec(any::<u8>(), len);
    let store = (address(), prop_oneof![Just(1usize), Just(2), Just(4), Just(8)]);
    prop_oneof![
        1 => (port(), width())
            .prop_flat_map(move |(port, len)| bytes(len).prop_map(move |data| Act::Out(port, data))),
        1 => (port(), width()).prop_map(|(port, len)| Act::In(port, len)),
        8 => store.prop_flat_map(|(address, len)| {
            let small = proptest::collection::vec(prop_oneof![0u8..16, any::<u8>()], len);
            small.prop_map(move |data| Act::Store(address, data))
        }),
        2 => (address(), width()).prop_map(|(address, len)| Act::Load(address, len)),
        2 => (0u8..6, any::<u8>(), any::<u32>())
            .prop_map(|(slot, register, value)| Act::Config(slot, register & 0xfc, value)),
        1 => bytes(40).prop_map(Act::Serial),
        1 => bytes(40).prop_map(Act::Console),
        1 => proptest::collection::vec(bytes(100), 0..4).prop_map(Act::Frames),
    ]
}

fn perform(guest: &mut Guest, act: &Act) {
    guest.tsc += 1000;
    match act {
        Act::Out(port, data) => guest.out(*port, data),
        Act::In(port, len) => {
            guest.input(*port, *len);
        }
        Act::Store(address, data) => {
            guest.with(|machine, cx| machine.mmio_write(*address, data, cx))
        }
        Act::Load(address, len) => {
            guest.load(*address, *len);
        }
        Act::Config(slot, register, value) => guest.config_write(*slot, *register, *value),
        Act::Serial(bytes) => guest.event(&Event::SerialInput { bytes: bytes.clone() }).unwrap(),
        Act::Console(bytes) => {
            guest.event(&Event::ConsoleInput { device: 1, bytes: bytes.clone() }).unwrap()
        }
        Act::Frames(frames) => {
            guest.event(&Event::Frames { device: 3, frames: frames.clone() }).unwrap()
        }
    }
}

proptest! {
    /// A hostile guest: nothing panics, and a machine restored in the middle goes on exactly like the
    /// one it was saved from.
    #[test]
    fn a_restored_machine_behaves_as_the_saved_one_whatever_the_guest_does(
        before in proptest::collection::vec(act(), 0..60),
        after in proptest::collection::vec(act(), 0..60),
    ) {
        let mut guest = Guest::new();
        // Memory decoding on, so that the accesses reach the devices.
        for slot in 1..5 {
            guest.config_write(slot, 4, 6);
        }
        for act in &before {
            perform(&mut guest, act);
        }
        let mut twin = Guest::new();
        copy_memory(&guest.machine.memory, &twin.machine.memory);
        let state = guest.machine.save();
        let bytes = postcard::to_stdvec(&state).unwrap();
        twin.machine.restore(&postcard::from_bytes(&bytes).unwrap()).unwrap();
        twin.tsc = guest.tsc;
        prop_assert_eq!(&twin.machine.save(), &state);
        prop_assert_eq!(twin.machine.components(), guest.machine.components());
        guest.machine.effects().clear();
        guest.interrupts = Interrupts::default();
        for act in &after {
            perform(&mut guest, act);
            perform(&mut twin, act);
        }
        prop_assert_eq!(guest.machine.effects(), twin.machine.effects());
        prop_assert_eq!(guest.interrupts, twin.interrupts);
        prop_assert_eq!(guest.machine.save(), twin.machine.save());
    }
}

fn copy_memory(from: &GuestMemory, to: &GuestMemory) {
    use vm_memory::{Bytes, GuestAddress};
    let mut ram = vec![0; 2 << 20];
    from.read_slice(&mut ram, GuestAddress(0)).unwrap();
    to.write_slice(&ram, GuestAddress(0)).unwrap();
}
