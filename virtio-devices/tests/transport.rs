//! The PCI transport seen by a driver: capabilities, negotiation, MSI-X, resets.

mod common;

use common::{EVENT_IDX, Guest, INDIRECT, Memory, NEEDS_RESET, STATUS, VERSION_1, WRITE};
use virtio_devices::{
    ConsoleConfig, ConsoleFront, DeviceEvent, Effect, Front, FrontError, RngFront, StateError,
};

fn rng() -> Box<dyn Front<Memory>> {
    Box::new(RngFront::new())
}

fn console() -> Box<dyn Front<Memory>> {
    Box::new(ConsoleFront::new(&ConsoleConfig { size: Some((80, 25)) }))
}

#[test]
fn the_header_says_what_the_device_is() {
    let mut guest = Guest::cold(rng);
    assert_eq!(guest.config_read(0, 4), 0x1044_1af4);
    assert_eq!(guest.config_read(8, 4) >> 8, 0x00_ff00);
    assert_eq!(guest.config_read(8, 1), 1);
    // Sizing: all ones written, the size comes back.
    guest.config_write(0x10, &u32::MAX.to_le_bytes());
    assert_eq!(guest.config_read(0x10, 4), !0x7fff);
    guest.config_write(0x10, &0xd000_0000u32.to_le_bytes());
    guest.config_write(4, &2u16.to_le_bytes());
    assert_eq!(guest.device().bar_range(), Some(0xd000_0000..0xd000_8000));
    // Read-only stays; beyond the header there is nothing.
    guest.config_write(0, &[0; 4]);
    assert_eq!(guest.config_read(0, 4), 0x1044_1af4);
    assert_eq!(guest.config_read(0x100, 4), 0);
    assert_eq!(guest.config_read(0xfff, 4), 0);
    guest.config_write(0xfff, &[1; 4]);
}

#[test]
fn the_console_tells_its_size() {
    let mut guest = Guest::cold(console);
    guest.probe();
    assert_eq!(guest.offered(), VERSION_1 | EVENT_IDX | INDIRECT | 1);
    assert_eq!(guest.device_config(0, 4), 25 << 16 | 80);
    assert_eq!(guest.device_config(0x800, 8), 0);
}

#[test]
fn features_not_offered_are_refused() {
    let mut guest = Guest::cold(rng);
    guest.probe();
    for (low, high) in [(0u32, 0u32), (1 << 3, 1), (0, 3)] {
        guest.common_write(STATUS, &[0]);
        guest.common_write(STATUS, &[3]);
        guest.common_write(8, &0u32.to_le_bytes());
        guest.common_write(12, &low.to_le_bytes());
        guest.common_write(8, &1u32.to_le_bytes());
        guest.common_write(12, &high.to_le_bytes());
        guest.common_write(STATUS, &[11]);
        assert_eq!(guest.status(), 3, "features {low:#x}, {high:#x}");
        guest.common_write(STATUS, &[15]);
        assert_eq!(guest.status(), 3, "no DRIVER_OK without FEATURES_OK");
    }
}

#[test]
fn masked_vectors_wait_and_are_delivered_once() {
    let mut guest = Guest::start(rng, 0);
    let buffer = guest.allocate(64);
    let ask = |guest: &mut Guest| {
        guest.add(0, &[(buffer, 64, true)]);
        guest.kick(0);
        guest.apply(&DeviceEvent::Entropy(vec![1; 64])).unwrap();
    };
    ask(&mut guest);
    assert_eq!(guest.take_interrupts(), [(1, 1)].into());

    guest.set_vector(1, true);
    ask(&mut guest);
    ask(&mut guest);
    assert_eq!(guest.pending(), 2);
    guest.transplant();
    assert!(guest.take_interrupts().is_empty());
    guest.set_vector(1, false);
    assert_eq!(guest.take_interrupts(), [(1, 1)].into());
    assert_eq!(guest.pending(), 0);

    guest.set_msix_control(0xc000);
    ask(&mut guest);
    assert_eq!((guest.pending(), guest.take_interrupts().len()), (2, 0));
    guest.set_msix_control(0x8000);
    assert_eq!(guest.take_interrupts(), [(1, 1)].into());

    // Without MSI-X a driver polls the ISR, and reading it clears it.
    guest.set_msix_control(0);
    ask(&mut guest);
    assert_eq!((guest.isr(), guest.isr()), (1, 0));
    guest.set_msix_control(0x8000);

    // A vector that does not exist is read back as none.
    guest.common_write(22, &0u16.to_le_bytes());
    guest.common_write(26, &7u16.to_le_bytes());
    assert_eq!(guest.common_read(26, 2), 0xffff);
    ask(&mut guest);
    assert!(guest.take_interrupts().is_empty());
    guest.check();
}

#[test]
fn a_driver_that_polls_is_not_interrupted() {
    let mut guest = Guest::start(rng, 0);
    let buffer = guest.allocate(64);
    guest.set_no_interrupt(0, true);
    guest.add(0, &[(buffer, 64, true)]);
    guest.kick(0);
    guest.apply(&DeviceEvent::Entropy(vec![1; 64])).unwrap();
    assert_eq!(guest.take_used(0).len(), 1);
    assert!(guest.take_interrupts().is_empty());
}

#[test]
fn the_window_in_configuration_space_reaches_the_bar() {
    let mut guest = Guest::start(rng, 0);
    let mut at = guest.config_read(0x34, 1) as u16;
    while guest.config_read(at, 1) != 9 || guest.config_read(at + 3, 1) != 5 {
        at = guest.config_read(at + 1, 1) as u16;
    }
    guest.config_write(at + 8, &(STATUS as u32).to_le_bytes());
    guest.config_write(at + 12, &1u32.to_le_bytes());
    assert_eq!(guest.config_read(at + 16, 1), 15);
    guest.config_write(at + 16, &[0]);
    assert_eq!(guest.status(), 0, "the device was reset through the window");
    // An improper window is nothing.
    for (offset, len) in [(0x7ffe_u32, 4u32), (1, 2), (0, 3), (u32::MAX, 4), (0, 0)] {
        guest.config_write(at + 8, &offset.to_le_bytes());
        guest.config_write(at + 12, &len.to_le_bytes());
        guest.config_read(at + 16, 4);
        guest.config_write(at + 16, &[0xff; 4]);
    }
    guest.check();
}

#[test]
fn a_broken_ring_asks_for_a_reset_and_the_reset_heals() {
    let mut guest = Guest::start(rng, EVENT_IDX);
    let buffer = guest.allocate(64);
    // More entries than the queue has.
    guest.set_available(0, 1000);
    guest.notify(0);
    assert_eq!(guest.status() & NEEDS_RESET, NEEDS_RESET);
    assert_eq!(guest.take_interrupts(), [(0, 1)].into(), "a configuration change is signalled");
    assert_eq!(guest.isr(), 2);
    guest.notify(0);
    assert!(guest.take_interrupts().is_empty(), "a dead device is silent");
    guest.transplant();

    guest.initialise(EVENT_IDX);
    guest.add(0, &[(buffer, 32, true)]);
    guest.kick(0);
    assert_eq!(guest.take_effects(), [Effect::EntropyWanted { len: 32 }]);
    guest.apply(&DeviceEvent::Entropy(vec![9; 32])).unwrap();
    assert_eq!(guest.take_used(0), [(0, 32)]);
    assert_eq!(guest.read(buffer, 32), [9; 32]);
    guest.check();
}

#[test]
fn rings_outside_memory_or_misaligned_are_refused() {
    for (register, address) in [
        (32, 0u64),
        (32, 0x5fff0),
        (40, 0x61000),
        (48, 0x9ff00),
        (32, u64::MAX - 15),
        (48, 0x20002),
    ] {
        let mut guest = Guest::cold(rng);
        guest.probe();
        guest.common_write(STATUS, &[3]);
        guest.common_write(22, &0u16.to_le_bytes());
        for good in [32u64, 40, 48] {
            guest.common_write(good, &0x20000u64.to_le_bytes());
        }
        guest.common_write(register, &address.to_le_bytes());
        guest.common_write(28, &1u16.to_le_bytes());
        assert_eq!(guest.common_read(28, 2), 0, "{address:#x}");
        assert_eq!(guest.status() & NEEDS_RESET, NEEDS_RESET, "{address:#x}");
    }
}

#[test]
fn answers_to_what_was_asked_before_a_reset_are_dropped() {
    let mut guest = Guest::start(rng, 0);
    let buffer = guest.allocate(64);
    guest.add(0, &[(buffer, 64, true)]);
    guest.kick(0);
    guest.reset_machine();
    assert!(guest.device().bar_range().is_none());
    assert_eq!(guest.device().outstanding(), [Effect::EntropyWanted { len: 64 }]);
    guest.probe();
    guest.initialise(0);
    guest.add(0, &[(buffer, 16, true)]);
    guest.kick(0);
    guest.transplant();
    guest.apply(&DeviceEvent::Entropy(vec![1; 64])).unwrap();
    assert_eq!(guest.read(buffer, 64), [0; 64], "no memory is touched for the old driver");
    guest.apply(&DeviceEvent::Entropy(vec![2; 16])).unwrap();
    assert_eq!(guest.take_used(0), [(0, 16)]);
    assert_eq!(guest.read(buffer, 16), [2; 16]);
    let unasked = guest.apply(&DeviceEvent::Entropy(vec![3; 16]));
    assert_eq!(unasked, Err(FrontError::Unasked));
    guest.check();
}

#[test]
fn events_and_states_of_other_devices_are_refused() {
    let mut guest = Guest::start(rng, 0);
    let wrong = guest.apply(&DeviceEvent::ConsoleInput(vec![1]));
    assert_eq!(wrong, Err(FrontError::WrongDevice { event: "console input", device_id: 4 }));
    let state = Guest::start(console, 0).save();
    let mut other = common::Device::new(rng(), common::BAR);
    assert!(matches!(other.restore(&state), Err(StateError::Mismatch { .. })));
}

#[test]
fn console_input_waits_for_buffers_and_is_bounded() {
    for features in [0, EVENT_IDX] {
        let mut guest = Guest::start(console, features);
        let buffer = guest.allocate(0x1000);
        let text: Vec<u8> = (0..100_000).map(|i| (i % 251) as u8).collect();
        guest.apply(&DeviceEvent::ConsoleInput(text.clone())).unwrap();
        assert!(guest.take_interrupts().is_empty());
        guest.transplant();
        let mut got = Vec::new();
        for _ in 0..40 {
            guest.add(0, &[(buffer, 1000, true), (buffer + 1000, 1000, true)]);
            guest.kick(0);
            for (_, len) in guest.take_used(0) {
                got.extend(guest.read(buffer, len as usize));
            }
        }
        assert_eq!(got, text[..64 << 10], "what exceeds the backlog is lost, in order");
        let dropped = guest.device().counters()[2];
        assert_eq!(dropped, ("dropped_bytes", 100_000 - (64 << 10)));
        // The last buffers wait for the next input.
        guest.take_interrupts();
        guest.apply(&DeviceEvent::ConsoleInput(b"x".to_vec())).unwrap();
        assert_eq!((guest.take_used(0).len(), guest.take_interrupts()), (1, [(1, 1)].into()));
        guest.check();
    }
}

#[test]
fn console_output_leaves_as_one_effect_for_a_notify() {
    let mut guest = Guest::start(console, INDIRECT);
    let text = guest.allocate(64);
    guest.write(text, b"hello, world");
    guest.add(1, &[(text, 5, false), (text + 5, 2, false)]);
    guest.add_indirect(1, &[(text + 7, 5, false)]);
    guest.kick(1);
    assert_eq!(guest.take_effects(), [Effect::ConsoleOutput(b"hello, world".to_vec())]);
    assert_eq!(guest.take_used(1), [(0, 0), (2, 0)]);
    assert_eq!(guest.take_interrupts(), [(2, 1)].into());
    guest.check();
}

#[test]
fn a_chain_that_loops_is_found() {
    let mut guest = Guest::start(console, INDIRECT);
    let table = guest.table(1);
    guest.descriptor(table, 0, (common::DATA, 8, common::NEXT, 1));
    guest.descriptor(table, 1, (common::DATA, 8, common::NEXT, 0));
    guest.add_head(1, 0);
    guest.notify(1);
    assert_eq!(guest.status() & NEEDS_RESET, NEEDS_RESET);
    assert!(guest.take_effects().is_empty());

    // The same in an indirect table as long as one can be.
    guest.initialise(INDIRECT);
    let indirect = common::DATA;
    guest.descriptor(indirect, 0, (common::DATA, 0, common::NEXT, 0));
    guest.descriptor(table, 0, (indirect, 0xffff0, common::INDIRECT_FLAG, 0));
    guest.add_head(1, 0);
    guest.notify(1);
    assert_eq!(guest.status() & NEEDS_RESET, NEEDS_RESET);

    // Directions mixed.
    guest.initialise(0);
    guest.descriptor(table, 0, (common::DATA, 8, common::NEXT | WRITE, 1));
    guest.descriptor(table, 1, (common::DATA, 8, 0, 0));
    guest.add_head(1, 0);
    guest.notify(1);
    assert_eq!(guest.status() & NEEDS_RESET, NEEDS_RESET);
    guest.check();
}
