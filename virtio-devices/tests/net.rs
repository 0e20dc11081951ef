//! The network card seen by a driver.

mod common;

use common::{DATA, EVENT_IDX, Guest, HOLE, INDIRECT, Memory, NEEDS_RESET};
use virtio_devices::{DeviceEvent, Effect, Front, NetConfig, NetFront};

const MRG_RXBUF: u64 = 1 << 15;
const MAC: [u8; 6] = [0x52, 0x54, 0, 0x12, 0x34, 0x56];
const RX: usize = 0;
const TX: usize = 1;

fn card() -> Box<dyn Front<Memory>> {
    Box::new(NetFront::new(&NetConfig { mac: MAC, mtu: Some(1400) }))
}

fn frame(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|i| (i % 251) as u8 ^ seed).collect()
}

fn receive(guest: &mut Guest, frames: Vec<Vec<u8>>) {
    guest.apply(&DeviceEvent::Frames(frames)).unwrap();
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
    assert_eq!(guest.offered() & 0xffffff, 1 << 3 | 1 << 5 | 1 << 15 | 1 << 16);
}

#[test]
fn one_notify_sends_one_batch_without_headers() {
    for features in [0, EVENT_IDX, INDIRECT] {
        let mut guest = Guest::start(card, features);
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
        assert_eq!(guest.take_effects(), [Effect::Frames(frames)]);
        assert_eq!(guest.take_used(TX).len(), 5);
        assert_eq!(guest.take_interrupts(), [(2, 1)].into());
        assert_eq!(counter(&guest, "tx_frames"), 5);
        guest.check();
    }
}

#[test]
fn frames_that_are_none_are_dropped() {
    let mut guest = Guest::start(card, 0);
    guest.add(TX, &[(DATA, 12, false)]);
    guest.add(TX, &[(DATA, 25, false)]);
    guest.add(TX, &[(DATA, 4, false)]);
    guest.add(TX, &[(DATA, 0x20000, false)]);
    guest.add(TX, &[(DATA, 60, true)]);
    guest.add(TX, &[(DATA, 0xffff_0000, false)]);
    guest.add(TX, &[(DATA, 26, false)]);
    guest.kick(TX);
    assert_eq!(guest.take_effects(), [Effect::Frames(vec![vec![0; 14]])]);
    assert_eq!(guest.take_used(TX).len(), 7);
    assert_eq!(counter(&guest, "tx_dropped"), 6);
    receive(&mut guest, vec![vec![0; 13], Vec::new(), vec![0; 65_551]]);
    assert_eq!(counter(&guest, "rx_dropped"), 3);
    guest.check();
}

#[test]
fn a_batch_received_raises_one_interrupt() {
    let mut guest = Guest::start(card, MRG_RXBUF);
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
        let mut guest = Guest::start(card, features);
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
    let mut guest = Guest::start(card, 0);
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
        let mut guest = Guest::start(card, features);
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
        let mut guest = Guest::start(card, MRG_RXBUF);
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
    let mut guest = Guest::start(card, MRG_RXBUF);
    for _ in 0..256 {
        guest.add(RX, &[(DATA, 20, true)]);
    }
    guest.kick(RX);
    receive(&mut guest, vec![frame(6000, 1), frame(60, 2)]);
    assert_eq!((counter(&guest, "rx_dropped"), counter(&guest, "rx_frames")), (1, 1));
    assert_eq!(guest.take_used(RX).len(), 4);
    guest.check();
}
