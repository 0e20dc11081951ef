//! Digests name what differs: the register, the device, the page.

use ft::{Digest, PageNumber};
use hypervisor::soft::SoftHypervisor;
use serde_json::{Value, json};
use vm_memory::{Bytes, GuestAddress};
use vmm::config::{ConsoleMode, VmConfig};
use vmm::guest::{Guest, PAGE_SIZE};
use vmm::machine::{HostFacts, layout};

const MEMORY: u64 = 16 << 20;

/// A guest just switched on.
fn guest() -> Guest {
    let mut config = VmConfig::default();
    config.memory.size = MEMORY;
    config.serial.mode = ConsoleMode::Null;
    config.console.mode = ConsoleMode::Off;
    config.complete(|| [1, 2, 3, 4, 5]);
    let host = HostFacts { boot_wall_ns: 1_700_000_000_000_000_000, disk_sectors: Vec::new() };
    let memory = hypervisor::memory::allocate(&layout::ram_ranges(MEMORY)).unwrap();
    Guest::new(&SoftHypervisor, &config, memory, &host).unwrap()
}

fn digest(guest: &mut Guest) -> Digest {
    guest.digest().unwrap()
}

/// The guest with one number of its saved state changed.
fn changed(path: &str, change: impl FnOnce(&mut Value)) -> Guest {
    let mut guest = guest();
    let mut state = serde_json::to_value(guest.save().unwrap()).unwrap();
    change(state.pointer_mut(path).unwrap_or_else(|| panic!("{path} is not in the state")));
    guest.restore(&serde_json::from_value(state).unwrap()).unwrap();
    guest
}

#[test]
fn equal_guests_have_equal_digests() {
    let (mut one, mut other) = (guest(), guest());
    assert_eq!(digest(&mut one).first_unequal(&digest(&mut other)), None);
    // A guest that was saved and restored is still the same.
    let mut restored = changed("/vcpu/Soft/rip", |_| {});
    assert_eq!(digest(&mut one).first_unequal(&digest(&mut restored)), None);
}

#[test]
fn the_register_or_device_is_named() {
    for (path, component) in [
        ("/vcpu/Soft/rip", "cpu.rip"),
        ("/vcpu/Soft/gpr/3", "cpu.general"),
        ("/vcpu/Soft/cr2", "cpu.control"),
        ("/vcpu/Soft/gdtr/base", "cpu.segments"),
        ("/vcpu/Soft/dr/1", "cpu.debug"),
        ("/vcpu/Soft/mxcsr", "cpu.fpu"),
        ("/machine/rtc/index", "rtc"),
    ] {
        let mut backup = changed(path, |value| {
            *value = json!(value.as_u64().expect("a number") ^ 8);
        });
        let unequal = digest(&mut guest()).first_unequal(&digest(&mut backup));
        let unequal = unequal.unwrap_or_else(|| panic!("{path} makes no difference"));
        assert_eq!(unequal.component, component, "{path}");
    }
}

#[test]
fn the_page_is_named() {
    let (mut primary, mut backup) = (guest(), guest());
    for page in [3, 0x123, 0x456] {
        for guest in [&primary, &backup] {
            guest.memory().write_slice(&[7; 100], GuestAddress(page * PAGE_SIZE + 8)).unwrap();
        }
    }
    backup.memory().write_slice(&[6], GuestAddress(0x123 * PAGE_SIZE + 50)).unwrap();
    let unequal = digest(&mut primary).first_unequal(&digest(&mut backup)).expect("they differ");
    assert_eq!(unequal.component, ft::digest::MEMORY);
    let (ours, theirs) = (primary.take_digest_pages(), backup.take_digest_pages());
    assert_eq!(ours.len(), 3);
    assert_eq!(ours.first_unequal(&theirs), Some(PageNumber(0x123)));
    // The next digest is about what is written from here on.
    assert_eq!(digest(&mut primary).first_unequal(&digest(&mut backup)), None);
    assert!(primary.take_digest_pages().is_empty());
}
