//! What a card and its host may leave undone in a frame, and the header in front of each frame that says
//! what is (virtio 1.2, 5.1.6).
//!
//! A sender may leave the checksum of a TCP or UDP packet to the receiver, or hand over one packet of up to
//! 64 KiB to be cut into segments later: that makes one frame, one log record and one interrupt of what
//! would be forty. The header is data from outside in both directions, so nothing of it is believed:
//! [`outgoing`] and [`incoming`] pass on only what was negotiated and lies within the frame.

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_net as v;

/// struct virtio_net_hdr with num_buffers, always there with VIRTIO_F_VERSION_1.
pub const HEADER_SIZE: usize = 12;

/// Bytes of an Ethernet header: a frame has at least that.
pub const FRAME_MIN: usize = 14;
/// Bytes of a frame at most: what a TAP device can carry, and a driver must have room for (5.1.6.3.1).
pub const FRAME_MAX: usize = 65_550;

/// Offset of num_buffers in the header.
const NUM_BUFFERS: usize = 10;

/// The part of a gso_type that says how to cut.
const GSO_NONE: u8 = v::VIRTIO_NET_HDR_GSO_NONE as u8;
const GSO_TCPV4: u8 = v::VIRTIO_NET_HDR_GSO_TCPV4 as u8;
const GSO_TCPV6: u8 = v::VIRTIO_NET_HDR_GSO_TCPV6 as u8;
const GSO_UDP: u8 = v::VIRTIO_NET_HDR_GSO_UDP as u8;
/// The flag beside it: the packet has CWR set, which only its first segment keeps.
const GSO_ECN: u8 = v::VIRTIO_NET_HDR_GSO_ECN as u8;
const NEEDS_CSUM: u8 = v::VIRTIO_NET_HDR_F_NEEDS_CSUM as u8;
const DATA_VALID: u8 = v::VIRTIO_NET_HDR_F_DATA_VALID as u8;

/// A set of offloads: those a card offers, or those agreed on for one direction.
///
/// What a card offers is configuration and never what a host happens to be able to, since the guest sees
/// it and both sides of a pair must show it the same. UDP segmentation (VIRTIO_NET_F_HOST_USO) is not among
/// them: hosts have it since Linux 6.2 only.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offloads {
    /// Checksums of TCP and UDP.
    pub csum: bool,
    /// Segmentation of TCP over IPv4.
    pub tso4: bool,
    /// Segmentation of TCP over IPv6.
    pub tso6: bool,
    /// Segmentation of TCP with congestion notification.
    pub ecn: bool,
    /// Fragmentation of UDP.
    pub ufo: bool,
}

impl Offloads {
    /// The set an operator switched on. Whoever cuts a packet computes checksums, so without those there
    /// is nothing (5.1.3.1).
    #[must_use]
    pub fn new(csum: bool, tso: bool, ufo: bool) -> Self {
        Self { csum, tso4: csum && tso, tso6: csum && tso, ecn: csum && tso, ufo: csum && ufo }
    }

    /// The features that offer this set for both directions.
    pub(super) fn features(self) -> u64 {
        let each = Self::DEVICE.into_iter().zip(Self::DRIVER).zip(self.members());
        each.filter(|(_, on)| *on).map(|((device, driver), _)| 1 << device | 1 << driver).sum()
    }

    /// What `features` let the driver leave to the device.
    pub(super) fn of_device(features: u64) -> Self {
        Self::from_features(features, Self::DEVICE)
    }

    /// What `features` let the device leave to the driver.
    pub(super) fn of_driver(features: u64) -> Self {
        Self::from_features(features, Self::DRIVER)
    }

    /// In the order of [`Self::members`]: "device handles ...", "driver handles ..." (5.1.3).
    const DEVICE: [u32; 5] = [
        v::VIRTIO_NET_F_CSUM,
        v::VIRTIO_NET_F_HOST_TSO4,
        v::VIRTIO_NET_F_HOST_TSO6,
        v::VIRTIO_NET_F_HOST_ECN,
        v::VIRTIO_NET_F_HOST_UFO,
    ];
    const DRIVER: [u32; 5] = [
        v::VIRTIO_NET_F_GUEST_CSUM,
        v::VIRTIO_NET_F_GUEST_TSO4,
        v::VIRTIO_NET_F_GUEST_TSO6,
        v::VIRTIO_NET_F_GUEST_ECN,
        v::VIRTIO_NET_F_GUEST_UFO,
    ];

    fn members(self) -> [bool; 5] {
        [self.csum, self.tso4, self.tso6, self.ecn, self.ufo]
    }

    fn from_features(features: u64, bits: [u32; 5]) -> Self {
        let [csum, tso4, tso6, ecn, ufo] = bits.map(|bit| features & 1 << bit != 0);
        // A driver that breaks the rules of dependence (5.1.3.1) gets what it gets by the rules. The kernel
        // refuses a set that breaks them.
        let (tso4, tso6) = (csum && tso4, csum && tso6);
        Self { csum, tso4, tso6, ecn: ecn && (tso4 || tso6), ufo: csum && ufo }
    }

    /// Whether a packet with this gso_type may be left uncut.
    fn covers(self, gso_type: u8) -> bool {
        let ecn = gso_type & GSO_ECN != 0;
        match gso_type & !GSO_ECN {
            GSO_NONE => !ecn,
            GSO_TCPV4 => self.tso4 && (self.ecn || !ecn),
            GSO_TCPV6 => self.tso6 && (self.ecn || !ecn),
            GSO_UDP => self.ufo && !ecn,
            _ => false,
        }
    }
}

/// A header, taken apart; num_buffers apart.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Header {
    flags: u8,
    gso_type: u8,
    hdr_len: u16,
    gso_size: u16,
    csum_start: u16,
    csum_offset: u16,
}

impl Header {
    fn of(packet: &[u8]) -> Self {
        let word = |at: usize| u16::from_le_bytes([packet[at], packet[at + 1]]);
        Self {
            flags: packet[0],
            gso_type: packet[1],
            hdr_len: word(2),
            gso_size: word(4),
            csum_start: word(6),
            csum_offset: word(8),
        }
    }

    fn write(self, packet: &mut [u8]) {
        packet[0] = self.flags;
        packet[1] = self.gso_type;
        let words = [self.hdr_len, self.gso_size, self.csum_start, self.csum_offset, 0];
        for (to, word) in packet[2..HEADER_SIZE].as_chunks_mut::<2>().0.iter_mut().zip(words) {
            *to = word.to_le_bytes();
        }
    }

    /// What is left of it under `allowed`; `None` if it speaks of bytes that the frame of `len` bytes does
    /// not have, or contradicts itself.
    fn sane(self, len: usize, allowed: Offloads) -> Option<Self> {
        let mut clean = Self { flags: self.flags & NEEDS_CSUM, ..Self::default() };
        if clean.flags != 0 {
            let (start, offset) = (usize::from(self.csum_start), usize::from(self.csum_offset));
            if !allowed.csum || start < FRAME_MIN || start + offset + 2 > len {
                return None;
            }
            (clean.csum_start, clean.csum_offset) = (self.csum_start, self.csum_offset);
        }
        if self.gso_type == GSO_NONE {
            return Some(clean);
        }
        // Shortest header, and where its checksum is.
        let (transport, checksum) = if self.gso_type == GSO_UDP { (8, 6) } else { (20, 16) };
        let proper = allowed.covers(self.gso_type)
            && clean.flags != 0
            && self.csum_offset == checksum
            && usize::from(self.csum_start) + transport <= len
            && usize::from(self.hdr_len) <= len
            && self.gso_size > 0;
        (clean.gso_type, clean.hdr_len, clean.gso_size) =
            (self.gso_type, self.hdr_len, self.gso_size);
        proper.then_some(clean)
    }
}

/// Whether `packet`, header and frame, is of a size that a network can carry.
fn proper_size(packet: &[u8]) -> bool {
    (HEADER_SIZE + FRAME_MIN..=HEADER_SIZE + FRAME_MAX).contains(&packet.len())
}

/// Makes what a driver sent fit for the host: its header then says nothing that was not agreed on. False
/// if it must not be sent.
pub(super) fn outgoing(packet: &mut [u8], agreed: Offloads) -> bool {
    if !proper_size(packet) {
        return false;
    }
    // A driver without any of them has no reason to fill in the header at all.
    let header = if agreed.csum { Header::of(packet) } else { Header::default() };
    let Some(clean) = header.sane(packet.len() - HEADER_SIZE, agreed) else { return false };
    clean.write(packet);
    true
}

/// Makes what came from the network fit for the driver: a checksum it would not compute is computed here.
/// That happens when the frame was under way while a driver gave way to another, or before the host's
/// interface had learned what is agreed on. False if it cannot be delivered.
pub(super) fn incoming(packet: &mut [u8], agreed: Offloads) -> bool {
    if !proper_size(packet) {
        return false;
    }
    let header = Header::of(packet);
    let allowed = Offloads { csum: true, ..agreed };
    let Some(mut clean) = header.sane(packet.len() - HEADER_SIZE, allowed) else { return false };
    if clean.flags & NEEDS_CSUM != 0 && !agreed.csum {
        let (start, offset) = (usize::from(clean.csum_start), usize::from(clean.csum_offset));
        complete_checksum(&mut packet[HEADER_SIZE + start..], offset);
        clean = Header::default();
    }
    if agreed.csum && clean.flags == 0 {
        clean.flags = header.flags & DATA_VALID;
    }
    clean.write(packet);
    true
}

/// How many buffers a received packet takes (5.1.6.4).
pub(super) fn set_num_buffers(packet: &mut [u8], count: u16) {
    packet[NUM_BUFFERS..HEADER_SIZE].copy_from_slice(&count.to_le_bytes());
}

/// Computes the Internet checksum (RFC 1071) of `data`, whose checksum field at `offset` holds the sum of
/// the pseudo-header.
fn complete_checksum(data: &mut [u8], offset: usize) {
    let (words, rest) = data.as_chunks::<2>();
    let mut sum: u64 = words.iter().map(|word| u64::from(u16::from_be_bytes(*word))).sum();
    sum += rest.first().map_or(0, |last| u64::from(*last) << 8);
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    // Zero would mean "no checksum" to UDP; the other zero of ones' complement means the same to both.
    let checksum = match !(sum as u16) {
        0 => 0xffff,
        checksum => checksum,
    };
    data[offset..offset + 2].copy_from_slice(&checksum.to_be_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: Offloads = Offloads { csum: true, tso4: true, tso6: true, ecn: true, ufo: true };
    const NONE: Offloads =
        Offloads { csum: false, tso4: false, tso6: false, ecn: false, ufo: false };

    /// A header as a driver writes it for a big TCP segment, and the frame's length.
    fn tcp() -> Header {
        Header {
            flags: NEEDS_CSUM,
            gso_type: GSO_TCPV4,
            hdr_len: 54,
            gso_size: 1448,
            csum_start: 34,
            csum_offset: 16,
        }
    }

    fn packet(header: Header, len: usize) -> Vec<u8> {
        let mut packet: Vec<u8> = (0..HEADER_SIZE + len).map(|i| i as u8).collect();
        header.write(&mut packet);
        packet
    }

    #[test]
    fn what_was_agreed_on_passes_unchanged() {
        let udp = Header { gso_type: GSO_UDP, csum_offset: 6, ..tcp() };
        let plain = Header { gso_type: 0, hdr_len: 0, gso_size: 0, ..tcp() };
        let ecn = Header { gso_type: GSO_TCPV6 | GSO_ECN, ..tcp() };
        for header in [Header::default(), tcp(), udp, plain, ecn] {
            let sent = packet(header, 5000);
            let mut passed = sent.clone();
            assert!(outgoing(&mut passed, ALL), "{header:?}");
            assert_eq!(passed, sent, "{header:?}");
            assert!(incoming(&mut passed, ALL), "{header:?}");
            assert_eq!(passed, sent, "{header:?}");
        }
    }

    #[test]
    fn headers_that_lie_are_refused() {
        let len = 200;
        let lies = [
            Header { csum_start: 13, ..tcp() },
            Header { csum_start: len as u16 - 17, ..tcp() },
            Header { csum_start: u16::MAX, csum_offset: u16::MAX, ..tcp() },
            Header { csum_start: len as u16 - 19, ..tcp() },
            Header { csum_offset: 6, ..tcp() },
            Header { gso_type: GSO_UDP, ..tcp() },
            Header { gso_type: GSO_UDP | GSO_ECN, csum_offset: 6, ..tcp() },
            Header { gso_type: GSO_ECN, ..tcp() },
            Header { gso_type: 2, ..tcp() },
            Header { gso_type: 5, ..tcp() },
            Header { gso_size: 0, ..tcp() },
            Header { hdr_len: len as u16 + 1, ..tcp() },
            Header { flags: 0, ..tcp() },
            Header { flags: DATA_VALID, ..tcp() },
        ];
        assert!(outgoing(&mut packet(tcp(), len), ALL));
        for header in lies {
            assert!(!outgoing(&mut packet(header, len), ALL), "{header:?}");
            assert!(!incoming(&mut packet(header, len), ALL), "{header:?}");
        }
    }

    #[test]
    fn what_was_not_agreed_on_is_refused_or_blank() {
        let without = [
            (Offloads { tso4: false, ..ALL }, GSO_TCPV4),
            (Offloads { tso6: false, ..ALL }, GSO_TCPV6),
            (Offloads { ecn: false, ..ALL }, GSO_TCPV4 | GSO_ECN),
        ];
        for (agreed, gso_type) in without {
            let header = Header { gso_type, ..tcp() };
            assert!(outgoing(&mut packet(header, 3000), ALL));
            assert!(!outgoing(&mut packet(header, 3000), agreed));
            assert!(!incoming(&mut packet(header, 3000), agreed));
        }
        // Without any the header is not looked at; it may hold anything.
        let mut sent = packet(tcp(), 60);
        assert!(outgoing(&mut sent, NONE));
        assert_eq!(sent[..HEADER_SIZE], [0; HEADER_SIZE]);
        assert!(!incoming(&mut packet(tcp(), 3000), NONE));
    }

    #[test]
    fn sizes_are_bounded() {
        for (len, proper) in [(13, false), (14, true), (FRAME_MAX, true), (FRAME_MAX + 1, false)] {
            let mut sent = packet(Header::default(), len);
            assert_eq!(outgoing(&mut sent, NONE), proper, "{len}");
            assert_eq!(incoming(&mut sent, NONE), proper, "{len}");
        }
        assert!(!outgoing(&mut [0; 5], ALL) && !incoming(&mut [], ALL));
    }

    #[test]
    fn a_checksum_the_driver_would_not_compute_is_computed() {
        // A UDP datagram from 10.0.0.1:1 to 10.0.0.2:2 with the payload "abc".
        let mut frame = vec![0; 34];
        frame.extend([0, 1, 0, 2, 0, 11, 0, 0, b'a', b'b', b'c']);
        let pseudo: u16 = 0x0a00 + 0x0001 + 0x0a00 + 0x0002 + 17 + 11;
        frame[40..42].copy_from_slice(&pseudo.to_be_bytes());
        let header =
            Header { flags: NEEDS_CSUM, csum_start: 34, csum_offset: 6, ..Header::default() };
        let mut received = vec![0; HEADER_SIZE];
        header.write(&mut received);
        received.extend(&frame);
        let mut left = received.clone();
        assert!(incoming(&mut left, Offloads { csum: true, ..NONE }));
        assert_eq!(left, received, "a driver that computes checksums gets it as it came");
        assert!(incoming(&mut received, NONE));
        assert_eq!(received[..HEADER_SIZE], [0; HEADER_SIZE]);
        // The sum of pseudo-header and datagram with a right checksum is all ones.
        let sum: u32 = [0x0a00, 1, 0x0a00, 2, 17, 11, 1, 2, 11, 0x6162, 0x6300].iter().sum();
        let checksum = !((sum & 0xffff) + (sum >> 16)) as u16;
        assert_eq!(received[HEADER_SIZE + 40..HEADER_SIZE + 42], checksum.to_be_bytes());
    }

    #[test]
    fn a_known_good_checksum_is_told_to_those_who_understand() {
        let header = Header { flags: DATA_VALID, ..Header::default() };
        let mut received = packet(header, 60);
        assert!(incoming(&mut received, ALL));
        assert_eq!(received[0], DATA_VALID);
        assert!(incoming(&mut received, NONE));
        assert_eq!(received[0], 0);
    }

    #[test]
    fn features_and_sets_go_to_and_fro() {
        assert_eq!(Offloads::new(false, true, true), NONE);
        assert_eq!(Offloads::new(true, true, true), ALL);
        assert_eq!(ALL.features(), 0b111_1111_1000_0011);
        assert_eq!(Offloads::of_device(ALL.features()), ALL);
        assert_eq!(Offloads::of_driver(ALL.features()), ALL);
        // TSO without checksums is against the rules.
        assert_eq!(Offloads::of_device(1 << 11), NONE);
        // So is congestion notification without TSO, of either kind.
        let csum = Offloads { csum: true, ..NONE };
        assert_eq!(Offloads::of_device(1 | 1 << 13), csum);
        assert_eq!(Offloads::of_driver(1 << 1 | 1 << 9), csum);
        assert_eq!(Offloads::of_driver(1 << 7 | 1 << 9), NONE);
        let tso4 = Offloads { tso4: true, ecn: true, ..csum };
        assert_eq!(Offloads::of_driver(1 << 1 | 1 << 7 | 1 << 9), tso4);
        let tso6 = Offloads { tso6: true, ecn: true, ..csum };
        assert_eq!(Offloads::of_driver(1 << 1 | 1 << 8 | 1 << 9), tso6);
        assert_eq!(Offloads::new(true, false, false).features(), 0b11);
    }
}
