//! Guests that keep to no rule: garbage in rings, descriptors, registers and buffers.
//!
//! Whatever they do, nothing panics, memory stays bounded, both copies of the device stay equal, and a
//! reset brings a device that works.

mod common;

use common::{DATA, EVENT_IDX, Guest, HOLE, INDIRECT, Memory};
use proptest::prelude::*;
use virtio_devices::{
    BlockCompletion, BlockConfig, BlockFront, BlockOp, BlockStatus, ConsoleConfig, ConsoleFront,
    DeviceEvent, Effect, Front, NetConfig, NetFront, RngFront, net::Offloads,
};

type Make = fn() -> Box<dyn Front<Memory>>;

fn disk() -> Box<dyn Front<Memory>> {
    let config = BlockConfig { sectors: 1 << 20, read_only: false, serial: String::new() };
    Box::new(BlockFront::new(&config))
}

fn card() -> Box<dyn Front<Memory>> {
    let offloads = Offloads::new(true, true, true);
    Box::new(NetFront::new(&NetConfig { mac: [2; 6], mtu: None, offloads }))
}

fn console() -> Box<dyn Front<Memory>> {
    Box::new(ConsoleFront::new(&ConsoleConfig::default()))
}

fn rng() -> Box<dyn Front<Memory>> {
    Box::new(RngFront::new())
}

#[derive(Debug, Clone)]
enum Step {
    Descriptor {
        queue: usize,
        index: u16,
        descriptor: (u64, u32, u16, u16),
    },
    Head {
        queue: usize,
        head: u16,
    },
    Available {
        queue: usize,
        index: u16,
    },
    Memory {
        address: u64,
        bytes: Vec<u8>,
    },
    Notify {
        queue: usize,
    },
    BarWrite {
        offset: u64,
        data: Vec<u8>,
    },
    BarRead {
        offset: u64,
        len: usize,
    },
    ConfigWrite {
        offset: u16,
        data: Vec<u8>,
    },
    ConfigRead {
        offset: u16,
        len: usize,
    },
    Event(DeviceEvent),
    /// Answer the n-th effect that wants one, well or badly.
    Answer {
        which: prop::sample::Index,
        status: u8,
        short: bool,
    },
    Restart,
    Transplant,
}

fn address() -> impl Strategy<Value = u64> {
    prop_oneof![
        8 => (DATA..DATA + 0x4000).prop_map(|a| a & !7),
        2 => 0x10000..0x18000u64,
        1 => HOLE - 0x200..HOLE + 0x200,
        1 => any::<u64>(),
        1 => u64::MAX - 0x1000..=u64::MAX,
    ]
}

fn length() -> impl Strategy<Value = u32> {
    prop_oneof![
        1 => Just(0), 4 => 1..64u32, 2 => Just(16), 2 => Just(512), 2 => Just(4096),
        1 => 0..0x20000u32, 1 => any::<u32>(),
    ]
}

fn bytes() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        // A header of a frame: flags, gso_type, and lengths that often lie within the frame.
        (0..8u8, 0..6u8, prop::collection::vec(0..80u8, 4)).prop_map(|(flags, gso, lengths)| {
            let mut header = vec![flags, gso];
            header.extend(lengths.into_iter().flat_map(|length| [length, 0]));
            header.extend([0, 0]);
            header
        }),
        // The start of a disk request.
        (0..14u8, 0..3u8).prop_map(|(kind, sector)| {
            vec![kind, 0, 0, 0, 0, 0, 0, 0, sector, 0, 0, 0, 0, 0, 0, 0]
        }),
        prop::collection::vec(any::<u8>(), 1..32),
    ]
}

fn register() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        prop::collection::vec(any::<u8>(), 0..=8),
        prop_oneof![Just(1), Just(2), Just(4), Just(8)].prop_flat_map(|n| {
            prop::collection::vec(prop_oneof![Just(0u8), Just(1), Just(15), Just(255)], n)
        }),
    ]
}

fn event() -> impl Strategy<Value = DeviceEvent> {
    let frame = prop::collection::vec(any::<u8>(), 0..200);
    prop_oneof![
        prop::collection::vec(frame, 0..20).prop_map(DeviceEvent::Frames),
        prop::collection::vec(any::<u8>(), 0..5000).prop_map(DeviceEvent::ConsoleInput),
        prop::collection::vec(any::<u8>(), 0..100).prop_map(DeviceEvent::Entropy),
        (0..20u64, any::<u8>()).prop_map(|(id, status)| {
            let status = BlockStatus::from_byte(status);
            DeviceEvent::BlockCompletion(BlockCompletion { id, status, data: vec![1; 512] })
        }),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    let queue = || 0..2usize;
    let index = || prop_oneof![9 => 0..16u16, 1 => any::<u16>()];
    let flags = prop_oneof![9 => 0..8u16, 1 => any::<u16>()];
    prop_oneof![
        12 => (queue(), 0..16u16, (address(), length(), flags, index()))
            .prop_map(|(queue, index, descriptor)| Step::Descriptor { queue, index, descriptor }),
        8 => (queue(), index()).prop_map(|(queue, head)| Step::Head { queue, head }),
        1 => (queue(), any::<u16>()).prop_map(|(queue, index)| Step::Available { queue, index }),
        6 => (address(), bytes()).prop_map(|(address, bytes)| Step::Memory { address, bytes }),
        8 => queue().prop_map(|queue| Step::Notify { queue }),
        2 => (0..0x9000u64, register()).prop_map(|(offset, data)| Step::BarWrite { offset, data }),
        2 => (0..60u64, register()).prop_map(|(offset, data)| Step::BarWrite { offset, data }),
        1 => (0..0x9000u64, 0..=8usize).prop_map(|(offset, len)| Step::BarRead { offset, len }),
        2 => (any::<u16>(), register())
            .prop_map(|(offset, data)| Step::ConfigWrite { offset, data }),
        2 => (0..260u16, register()).prop_map(|(offset, data)| Step::ConfigWrite { offset, data }),
        1 => (0..260u16, 0..=4usize).prop_map(|(offset, len)| Step::ConfigRead { offset, len }),
        3 => event().prop_map(Step::Event),
        4 => (any::<prop::sample::Index>(), 0..3u8, prop::bool::weighted(0.1))
            .prop_map(|(which, status, short)| Step::Answer { which, status, short }),
        1 => Just(Step::Restart),
        1 => Just(Step::Transplant),
    ]
}

/// The event that answers an effect.
fn answer(effect: &Effect, status: u8, short: bool) -> Option<DeviceEvent> {
    match effect {
        Effect::Block(request) => {
            let len = match &request.op {
                BlockOp::Read { len, .. } => *len as usize - usize::from(short),
                _ => 0,
            };
            let status = BlockStatus::from_byte(status);
            let data = vec![0x5a; len];
            Some(DeviceEvent::BlockCompletion(BlockCompletion { id: request.id, status, data }))
        }
        Effect::EntropyWanted { len } => Some(DeviceEvent::Entropy(vec![0xa5; *len as usize])),
        Effect::Interrupt { .. }
        | Effect::Frames(_)
        | Effect::Offloads(_)
        | Effect::ConsoleOutput(_) => None,
    }
}

fn torment(make: Make, features: u64, steps: Vec<Step>) {
    let mut guest = Guest::start(make, features);
    let queues = guest.common_read(18, 2) as usize;
    for step in steps {
        match step {
            Step::Descriptor { queue, index, descriptor } => {
                let table = guest.table(queue % queues);
                guest.descriptor(table, index, descriptor);
            }
            Step::Head { queue, head } => guest.add_head(queue % queues, head),
            Step::Available { queue, index } => guest.set_available(queue % queues, index),
            Step::Memory { address, bytes } => guest.write(address, &bytes),
            Step::Notify { queue } => guest.notify(queue),
            Step::BarWrite { offset, data } => guest.bar_write(offset, &data),
            Step::BarRead { offset, len } => drop(guest.bar_read(offset, len)),
            Step::ConfigWrite { offset, data } => guest.config_write(offset, &data),
            Step::ConfigRead { offset, len } => drop(guest.config_read(offset, len)),
            // An event that cannot be is refused; that both do so is what matters.
            Step::Event(event) => drop(guest.apply(&event)),
            Step::Answer { which, status, short } => {
                let outstanding = guest.device().outstanding();
                if !outstanding.is_empty()
                    && let Some(event) = answer(which.get(&outstanding), status, short)
                {
                    guest.apply(&event).unwrap();
                }
            }
            Step::Restart => guest.initialise_after_anything(features),
            Step::Transplant => guest.transplant(),
        }
        let interrupts: usize = guest.take_interrupts().values().sum();
        assert!(interrupts <= 4, "{interrupts} interrupts for one access");
        let effects = guest.take_effects();
        assert!(effects.len() <= 256, "{} effects for one access", effects.len());
    }
    guest.check();
    assert!(guest.state_size() < 20 << 20, "a state of {} bytes", guest.state_size());
    for event in guest.device().outstanding().iter().filter_map(|it| answer(it, 0, false)) {
        guest.apply(&event).unwrap();
    }
    guest.initialise_after_anything(features);
    guest.check();
    works(&mut guest);
}

/// One honest use of the device succeeds.
fn works(guest: &mut Guest) {
    guest.take_effects();
    match guest.device().front().device_id() {
        1 => {
            let mut packet = vec![0; 72];
            packet[12..].fill(7);
            guest.add(0, &[(DATA, 100, true)]);
            guest.kick(0);
            guest.apply(&DeviceEvent::Frames(vec![packet.clone()])).unwrap();
            assert_eq!(guest.read(DATA + 12, 60), [7; 60]);
            guest.add(1, &[(DATA, 72, false)]);
            guest.kick(1);
            assert_eq!(guest.take_effects(), [Effect::Frames(vec![packet])]);
        }
        2 => {
            guest.write(DATA, &[0; 17]);
            guest.write(DATA + 16, &[0xff]);
            let data = (DATA + 0x1000, 512, true);
            guest.add(0, &[(DATA, 16, false), data, (DATA + 16, 1, true)]);
            guest.kick(0);
            let effect = guest.take_effects().pop().expect("a request");
            guest.apply(&answer(&effect, 0, false).unwrap()).unwrap();
            assert_eq!(guest.read(DATA + 0x1000, 512), [0x5a; 512]);
            assert_eq!(guest.read(DATA + 16, 1), [0]);
        }
        3 => {
            guest.write(DATA, b"still here");
            guest.add(1, &[(DATA, 10, false)]);
            guest.kick(1);
            assert_eq!(guest.take_effects(), [Effect::ConsoleOutput(b"still here".to_vec())]);
            guest.add(0, &[(DATA, 10, true)]);
            guest.kick(0);
            guest.apply(&DeviceEvent::ConsoleInput(b"input".to_vec())).unwrap();
            assert_eq!(guest.read(DATA, 10), b"input here"[..]);
        }
        _ => {
            guest.add(0, &[(DATA, 10, true)]);
            guest.kick(0);
            assert_eq!(guest.take_effects(), [Effect::EntropyWanted { len: 10 }]);
            guest.apply(&DeviceEvent::Entropy(vec![3; 10])).unwrap();
            assert_eq!(guest.read(DATA, 10), [3; 10]);
        }
    }
    guest.check();
}

fn features() -> impl Strategy<Value = u64> {
    // With and without event indices, indirect descriptors, mergeable buffers, flush.
    (any::<bool>(), any::<bool>(), any::<bool>()).prop_map(|(event, indirect, device)| {
        let mut features = 0;
        features |= if event { EVENT_IDX } else { 0 };
        features |= if indirect { INDIRECT } else { 0 };
        features | if device { 0xff_ffff } else { 0 }
    })
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    prop::collection::vec(step(), 1..150)
}

proptest! {
    #[test]
    fn the_disk_survives(steps in steps(), features in features()) {
        torment(disk, features, steps);
    }

    #[test]
    fn the_network_card_survives(steps in steps(), features in features()) {
        torment(card, features, steps);
    }

    #[test]
    fn the_console_survives(steps in steps(), features in features()) {
        torment(console, features, steps);
    }

    #[test]
    fn the_entropy_source_survives(steps in steps(), features in features()) {
        torment(rng, features, steps);
    }
}
