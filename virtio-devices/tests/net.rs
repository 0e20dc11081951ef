//! The network card seen by a driver.

mod common;

use common::{DATA, EVENT_IDX, Guest, HOLE, INDIRECT, Memory, NEEDS_RESET};
use virtio_devices::net::{FRAME_MAX, HEADER_SIZE, Offloads};
use virtio_devices::{DeviceEvent, Effect, Front, NetConfig, NetFront};

const MRG_RXBUF: u64 = 1 << 15;
const MAC: [u8; 6] = [0x52, 0x54, 0, 0x12, 0x34, 0x56];
const RX: usize = 0;
const TX: usize = 1;

/// All offloads: checksum, and segmentation of both kinds, in both directions.
const OFFLOADS: u64 = 0x7f83;
/// A header of a driver that leaves a TCP packet uncut: NEEDS_CSUM, TCPv4, 54, 1448, 34, 16.
const TCP: [u8; HEADER_SIZE] = [1, 1, 54, 0, 0xa8, 5, 34, 0, 16, 0, 0, 0];
const PLAIN: [u8; HEADER_SIZE] = [0; HEADER_SIZE];

fn card() -> Box<dyn Front<Memory>> {
    let offloads = Offloads::new(true, true, true);
    Box::new(NetFront::new(&NetConfig { mac: MAC, mtu: Some(1400), offloads }))
}

/// A card whose driver has said what it takes.
fn start(features: u64) -> Guest {
    let mut guest = Guest::start(card, features);
    let offloads =
        Offloads::new(features & 2 != 0, features & 0x380 == 0x380, features & 0x400 != 0);
    assert_eq!(guest.take_effects(), [Effect::Offloads(offloads)]);
    guest
}

fn frame(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|i| (i % 251) as u8 ^ seed).collect()
}

/// As frames pass between the halves.
fn packet(header: [u8; HEADER_SIZE], frame: &[u8]) -> Vec<u8> {
    [&header[..], frame].concat()
}

fn receive(guest: &mut Guest, frames: Vec<Vec<u8>>) {
    let packets = frames.iter().map(|frame| packet(PLAIN, frame)).collect();
    guest.apply(&DeviceEvent::Frames(packets)).unwrap();
}

fn sent(frames: &[Vec<u8>]) -> Effect {
    Effect::Frames(frames.iter().map(|frame| packet(PLAIN, frame)).collect())
}

fn counter(guest: &Guest, name: &str) -> u64 {
    guest.device().counters().into_iter().find(|(n, _)| *n == name).unwrap().1
}

#[test]
fn configuration_tells_address_link_and_mtu() {
    let mut guest = Guest::cold(card);
    guest.probe();
    assert_eq!(guest.device_config(0, 6).to_le_bytes()[..6], MAC);
    assert_eq!(guest.device_config(6, 2), 1);
    assert_eq!(guest.device_config(10, 2), 1400);
    assert_eq!(guest.offered() & 0xffffff, 1 << 3 | 1 << 5 | 1 << 15 | 1 << 16 | OFFLOADS);
}

#[test]
fn one_notify_sends_one_batch_with_blank_headers() {
    for features in [0, EVENT_IDX, INDIRECT] {
        let mut guest = start(features);
        let frames: Vec<_> = (0..5).map(|i| frame(60 + i * 300, i as u8)).collect();
        for (i, frame) in frames.iter().enumerate() {
            let at = guest.allocate(0x1000);
            guest.write(at, &[0xee; 12]);
            guest.write(at + 12, frame);
            // Header and data together, apart, or cut anywhere.
            let cut = [12, 12 + 14, 5, 0, 30][i];
            let len = 12 + frame.len() as u32;
            guest.add(TX, &[(at, cut, false), (at + u64::from(cut), len - cut, false)]);
        }
        guest.kick(TX);
        // The driver overwrites its buffers as soon as it likes.
        guest.write(DATA, &[0; 0x5000]);
        assert_eq!(guest.take_effects(), [sent(&frames)]);
        assert_eq!(guest.take_used(TX).len(), 5);
        assert_eq!(guest.take_interrupts(), [(2, 1)].into());
        assert_eq!(counter(&guest, "tx_frames"), 5);
        guest.check();
    }
}

#[test]
fn frames_that_are_none_are_dropped() {
    let mut guest = start(0);
    guest.add(TX, &[(DATA, 12, false)]);
    guest.add(TX, &[(DATA, 25, false)]);
    guest.add(TX, &[(DATA, 4, false)]);
    guest.add(TX, &[(DATA, 0x20000, false)]);
    guest.add(TX, &[(DATA, 60, true)]);
    guest.add(TX, &[(DATA, 0xffff_0000, false)]);
    guest.add(TX, &[(DATA, 26, false)]);
    guest.kick(TX);
    assert_eq!(guest.take_effects(), [sent(&[vec![0; 14]])]);
    assert_eq!(guest.take_used(TX).len(), 7);
    assert_eq!(counter(&guest, "tx_dropped"), 6);
    receive(&mut guest, vec![vec![0; 13], Vec::new(), vec![0; FRAME_MAX + 1]]);
    assert_eq!(counter(&guest, "rx_dropped"), 3);
    guest.check();
}

#[test]
fn a_batch_received_raises_one_interrupt() {
    let mut guest = start(MRG_RXBUF);
    let buffers: Vec<u64> = (0..8).map(|_| guest.allocate(0x800)).collect();
    for &buffer in &buffers {
        guest.add(RX, &[(buffer, 0x600, true)]);
    }
    guest.kick(RX);
    let frames: Vec<_> = (0..6).map(|i| frame(64 + 10 * i, i as u8)).collect();
    receive(&mut guest, frames.clone());
    assert_eq!(guest.take_interrupts(), [(1, 1)].into());
    let used = guest.take_used(RX);
    for ((frame, &buffer), (_, len)) in frames.iter().zip(&buffers).zip(used) {
        assert_eq!(len as usize, 12 + frame.len());
        assert_eq!(guest.read(buffer, 12), [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
        assert_eq!(guest.read(buffer + 12, frame.len()), frame[..]);
    }
    guest.check();
}

#[test]
fn large_frames_spread_over_mergeable_buffers() {
    for features in [MRG_RXBUF, MRG_RXBUF | EVENT_IDX] {
        let mut guest = start(features);
        let buffers: Vec<u64> = (0..5).map(|_| guest.allocate(0x400)).collect();
        for &buffer in &buffers[..4] {
            guest.add(RX, &[(buffer, 0x400, true)]);
        }
        guest.kick(RX);
        let big = frame(4 * 0x400, 9);
        receive(&mut guest, vec![big.clone()]);
        assert!(guest.take_used(RX).is_empty(), "twelve bytes too few: no buffer is taken");
        guest.transplant();
        guest.add(RX, &[(buffers[4], 0x400, true)]);
        guest.kick(RX);
        let used = guest.take_used(RX);
        assert_eq!(used.iter().map(|u| u.1).collect::<Vec<_>>(), [0x400, 0x400, 0x400, 0x400, 12]);
        let mut packet = Vec::new();
        for (&buffer, (_, len)) in buffers.iter().zip(used) {
            packet.extend(guest.read(buffer, len as usize));
        }
        assert_eq!(packet[10], 5, "number of buffers");
        assert_eq!(packet[12..], big);
        guest.check();
    }
}

#[test]
fn without_mergeable_buffers_a_frame_that_does_not_fit_is_dropped() {
    let mut guest = start(0);
    let buffer = guest.allocate(0x800);
    guest.add(RX, &[(buffer, 12, true), (buffer + 12, 100, true)]);
    guest.kick(RX);
    let fits = frame(100, 3);
    receive(&mut guest, vec![frame(101, 1), fits.clone()]);
    assert_eq!(guest.take_used(RX), [(0, 112)]);
    assert_eq!(guest.read(buffer + 12, 100), fits);
    assert_eq!((counter(&guest, "rx_dropped"), counter(&guest, "rx_frames")), (1, 1));
    guest.check();
}

#[test]
fn frames_wait_for_buffers_in_a_bounded_backlog() {
    for features in [MRG_RXBUF, MRG_RXBUF | EVENT_IDX] {
        let mut guest = start(features);
        let frames: Vec<_> = (0..300).map(|i| frame(100, i as u8)).collect();
        receive(&mut guest, frames.clone());
        assert_eq!(counter(&guest, "rx_dropped"), 300 - 256);
        guest.transplant();
        let buffer = guest.allocate(0x1000);
        let mut got = Vec::new();
        for _ in 0..256 {
            guest.add(RX, &[(buffer, 200, true)]);
            guest.kick(RX);
            for (_, len) in guest.take_used(RX) {
                got.push(guest.read(buffer + 12, len as usize - 12));
            }
        }
        assert_eq!(got, frames[..256]);
        // The backlog is empty and the next buffers find none.
        guest.add(RX, &[(buffer, 200, true)]);
        guest.kick(RX);
        assert!(guest.take_used(RX).is_empty());
        guest.check();
    }
}

#[test]
fn a_driver_that_is_not_there_gets_nothing() {
    let mut guest = Guest::cold(card);
    receive(&mut guest, vec![frame(60, 0)]);
    assert_eq!(counter(&guest, "rx_dropped"), 1);
    guest.check();
}

#[test]
fn buffers_that_cannot_take_a_header_ask_for_a_reset() {
    for pieces in [[(DATA, 11, true)], [(DATA, 100, false)], [(HOLE, 1000, true)]] {
        let mut guest = start(MRG_RXBUF);
        guest.add(RX, &pieces);
        guest.kick(RX);
        receive(&mut guest, vec![frame(60, 0)]);
        assert_eq!(guest.status() & NEEDS_RESET, NEEDS_RESET, "{pieces:?}");
        receive(&mut guest, vec![frame(60, 0)]);
        guest.transplant();
        guest.initialise(MRG_RXBUF);
        let buffer = guest.allocate(0x1000);
        guest.add(RX, &[(buffer, 100, true)]);
        guest.kick(RX);
        receive(&mut guest, vec![frame(60, 7)]);
        assert_eq!(guest.take_used(RX).len(), 1);
        guest.check();
    }
}

#[test]
fn a_frame_larger_than_all_buffers_together_does_not_block_the_queue() {
    let mut guest = start(MRG_RXBUF);
    for _ in 0..256 {
        guest.add(RX, &[(DATA, 20, true)]);
    }
    guest.kick(RX);
    receive(&mut guest, vec![frame(6000, 1), frame(60, 2)]);
    assert_eq!((counter(&guest, "rx_dropped"), counter(&guest, "rx_frames")), (1, 1));
    assert_eq!(guest.take_used(RX).len(), 4);
    guest.check();
}

#[test]
fn an_uncut_packet_passes_both_ways_where_that_was_agreed() {
    let mut guest = start(MRG_RXBUF | OFFLOADS);
    let big = packet(TCP, &frame(60_000, 5));
    guest.write(DATA, &big);
    guest.add(TX, &[(DATA, 12, false), (DATA + 12, 60_000, false)]);
    guest.kick(TX);
    assert_eq!(guest.take_effects(), [Effect::Frames(vec![big.clone()])]);

    let buffers: Vec<u64> = (0..16).map(|_| guest.allocate(0x1000)).collect();
    for &buffer in &buffers {
        guest.add(RX, &[(buffer, 0x1000, true)]);
    }
    guest.kick(RX);
    guest.transplant();
    guest.apply(&DeviceEvent::Frames(vec![big.clone()])).unwrap();
    let used = guest.take_used(RX);
    let read = |(buffer, (_, len)): (&u64, &(u16, u32))| guest.read(*buffer, *len as usize);
    let got: Vec<u8> = buffers.iter().zip(&used).flat_map(read).collect();
    assert_eq!(got[..10], TCP[..10]);
    assert_eq!(got[10..12], [15, 0], "number of buffers");
    assert_eq!(got[12..], big[12..]);
    assert_eq!(counter(&guest, "rx_bytes"), 60_000);
    guest.check();
}

#[test]
fn a_header_that_lies_drops_its_frame_and_no_other() {
    let mut guest = start(MRG_RXBUF | OFFLOADS);
    let lies: [(usize, u8); 6] = [(1, 9), (4, 0), (3, 0xff), (7, 0xff), (8, 17), (0, 0)];
    for (i, (at, value)) in lies.into_iter().enumerate() {
        let mut header = TCP;
        header[at] = value;
        if at == 4 {
            header[5] = 0;
        }
        let at = DATA + 0x400 * i as u64;
        guest.write(at, &packet(header, &frame(0x300, 1)));
        guest.add(TX, &[(at, 12 + 0x300, false)]);
    }
    let good = packet(TCP, &frame(0x300, 2));
    let at = guest.allocate(0x400) + 0x4000;
    guest.write(at, &good);
    guest.add(TX, &[(at, 12 + 0x300, false)]);
    guest.kick(TX);
    assert_eq!(guest.take_effects(), [Effect::Frames(vec![good])]);
    assert_eq!(guest.take_used(TX).len(), 7, "the driver gets all its buffers back");
    assert_eq!((counter(&guest, "tx_dropped"), counter(&guest, "tx_frames")), (6, 1));
    guest.check();
}

#[test]
fn what_the_driver_takes_is_forgotten_by_a_reset_and_kept_by_a_move() {
    let agreed = || Effect::Offloads(Offloads::new(true, true, true));
    let mut guest = start(MRG_RXBUF | OFFLOADS);
    guest.transplant();
    assert_eq!(guest.device().outstanding(), [agreed()], "a host that goes live learns it");
    guest.reset_machine();
    assert_eq!(guest.device().outstanding(), []);
    guest.probe();
    guest.initialise(MRG_RXBUF);
    let none = Effect::Offloads(Offloads::default());
    assert_eq!(guest.take_effects(), [none]);
    // The next driver takes whole frames only. What was under way for the one before it: a checksum is
    // computed, a packet to be cut is lost.
    let buffer = guest.allocate(0x1000);
    guest.add(RX, &[(buffer, 0x1000, true)]);
    guest.kick(RX);
    let unsummed = [1, 0, 0, 0, 0, 0, 34, 0, 6, 0, 0, 0];
    let frames = vec![packet(TCP, &frame(3000, 1)), packet(unsummed, &[0; 60])];
    guest.apply(&DeviceEvent::Frames(frames)).unwrap();
    assert_eq!(guest.take_used(RX), [(0, 72)]);
    assert_eq!(guest.read(buffer, 12), [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
    assert_eq!(guest.read(buffer + 12 + 40, 2), [0xff, 0xff]);
    assert_eq!(counter(&guest, "rx_dropped"), 1);
    guest.check();
}

#[test]
fn a_card_that_offers_other_offloads_is_not_the_saved_one() {
    let guest = start(0);
    let other = NetConfig { mac: MAC, mtu: Some(1400), offloads: Offloads::default() };
    let front: Box<dyn Front<Memory>> = Box::new(NetFront::new(&other));
    let mut device = common::Device::new(front, common::BAR);
    let error = device.restore(&guest.save()).unwrap_err();
    assert!(error.to_string().contains("offloads"), "{error}");
}

#[test]
fn a_busy_driver_keeps_frames_outside() {
    let mut guest = start(MRG_RXBUF);
    let buffer = guest.allocate(0x1000);
    guest.add(RX, &[(buffer, 200, true)]);
    guest.kick(RX);
    receive(&mut guest, vec![frame(60, 1)]);
    assert!(!guest.device().front().backlogged());
    receive(&mut guest, vec![frame(60, 2)]);
    assert!(guest.device().front().backlogged());
    guest.add(RX, &[(buffer, 200, true)]);
    guest.kick(RX);
    assert!(!guest.device().front().backlogged());
}
