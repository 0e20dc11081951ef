//! The host half of a network card on a real TAP interface, in a network namespace of its own.
//! Needs root; skips aloud without.

use std::io::Write;
use std::net::{Ipv4Addr, UdpSocket};
use std::sync::mpsc;

use nix::sched::{CloneFlags, unshare};
use virtio_devices::net::back::{NetBack, TapOptions, UNDER_WAY_MAX, announcement};
use virtio_devices::net::{HEADER_SIZE, Offloads, TapError};

const HOST: Ipv4Addr = Ipv4Addr::new(10, 99, 0, 1);
const BROADCAST: Ipv4Addr = Ipv4Addr::new(10, 99, 0, 255);
const PORT: u16 = 9999;

/// Puts this thread into a network namespace of its own; false if that is not allowed.
fn namespace(test: &str) -> bool {
    let missing = if !nix::unistd::geteuid().is_root() {
        "root"
    } else if !std::path::Path::new("/dev/net/tun").exists() {
        "/dev/net/tun"
    } else if unshare(CloneFlags::CLONE_NEWNET).is_err() {
        "the right to make a network namespace"
    } else {
        return true;
    };
    // Past the harness, which keeps the output of tests that pass to itself.
    let mut terminal = std::io::stderr();
    writeln!(terminal, "SKIPPED {test}: it needs {missing}").unwrap();
    false
}

fn options(name: &str) -> TapOptions {
    let mask = Some(Ipv4Addr::new(255, 255, 255, 0));
    let offloads = Offloads::new(true, true, true);
    TapOptions { name: Some(name.into()), ip: Some(HOST), mask, mtu: Some(1400), offloads }
}

/// A UDP datagram from the guest to everybody, as a frame.
fn datagram(payload: &[u8]) -> Vec<u8> {
    let mut ip = vec![0x45, 0, 0, 28 + payload.len() as u8, 0, 0, 0, 0, 64, 17, 0, 0];
    ip.extend([10, 99, 0, 2]);
    ip.extend(BROADCAST.octets());
    let sum: u32 = ip.chunks(2).map(|w| u32::from(w[0]) << 8 | u32::from(w[1])).sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    ip[10..12].copy_from_slice(&(!(folded as u16)).to_be_bytes());
    let mut frame = vec![0; HEADER_SIZE];
    frame.extend([0xff; 6]);
    frame.extend([2, 0, 0, 0, 0, 2, 8, 0]);
    frame.extend(ip);
    frame.extend([0x27, 0x0e]);
    frame.extend(PORT.to_be_bytes());
    frame.extend((8 + payload.len() as u16).to_be_bytes());
    frame.extend([0, 0]);
    frame.extend(payload);
    frame
}

fn host_socket() -> UdpSocket {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, PORT)).unwrap();
    socket.set_broadcast(true).unwrap();
    socket
}

#[test]
fn frames_pass_both_ways_and_stale_ones_do_not() {
    if !namespace("frames_pass_both_ways_and_stale_ones_do_not") {
        return;
    }
    let back = NetBack::open(&options("dyadtest0")).unwrap();
    assert_eq!(back.name(), "dyadtest0");
    let socket = host_socket();
    socket.send_to(b"stale", (BROADCAST, PORT)).unwrap();
    let (sender, receiver) = mpsc::channel();
    back.start(Box::new(move |frames| drop(sender.send(frames)))).unwrap();
    socket.send_to(b"fresh", (BROADCAST, PORT)).unwrap();
    // The kernel has things of its own to say on a new link.
    let mut ends = receiver.iter().flatten();
    let first = ends.find(|f: &Vec<u8>| f.ends_with(b"stale") || f.ends_with(b"fresh")).unwrap();
    assert!(first.ends_with(b"fresh"));
    assert_eq!(first[HEADER_SIZE..HEADER_SIZE + 6], [0xff; 6], "a destination behind the header");

    back.send(&[datagram(b"hello"), announcement([2, 0, 0, 0, 0, 2]), datagram(b"again")]);
    let mut buffer = [0; 64];
    let mut heard = Vec::new();
    while heard.len() < 2 {
        let (len, from) = socket.recv_from(&mut buffer).unwrap();
        if from.ip() == Ipv4Addr::new(10, 99, 0, 2) {
            heard.push(buffer[..len].to_vec());
        }
    }
    assert_eq!(heard, [b"hello", b"again"]);
    assert_eq!(back.dropped(), 0);
    back.stop();
    assert!(nix::net::if_::if_nametoindex("dyadtest0").is_err(), "the interface is gone");
}

#[test]
fn an_interface_in_use_is_refused_by_name() {
    if !namespace("an_interface_in_use_is_refused_by_name") {
        return;
    }
    let back = NetBack::open(&options("dyadtest1")).unwrap();
    let error = NetBack::open(&options("dyadtest1")).unwrap_err();
    assert!(matches!(&error, TapError::Busy { name } if name == "dyadtest1"), "{error}");
    drop(back);
    // Another test's child process may hold a copy of the descriptor until it executes its program.
    let back = loop {
        match NetBack::open(&options("dyadtest1")) {
            Err(TapError::Busy { .. }) => std::thread::yield_now(),
            result => break result.unwrap(),
        }
    };
    back.start(Box::new(drop)).unwrap();
    back.stop();
}

#[test]
fn without_a_name_the_kernel_chooses_one() {
    if !namespace("without_a_name_the_kernel_chooses_one") {
        return;
    }
    let back = NetBack::open(&TapOptions::default()).unwrap();
    assert_eq!(back.name(), "tap0");
}

const IP: usize = HEADER_SIZE + 14;
const TCP: usize = IP + 20;
const PAYLOAD: usize = TCP + 20;
const SEGMENT: u16 = 1300;

/// Sum of 16-bit words, folded.
fn ones_sum(parts: &[&[u8]]) -> u16 {
    let words = parts.iter().flat_map(|part| part.chunks(2));
    let sum = words.map(|w| u32::from(w[0]) << 8 | u32::from(*w.get(1).unwrap_or(&0)));
    let sum: u32 = sum.sum();
    let sum = (sum & 0xffff) + (sum >> 16);
    ((sum & 0xffff) + (sum >> 16)) as u16
}

/// Addresses, protocol and length, as TCP's checksum covers them.
fn pseudo_header(packet: &[u8]) -> Vec<u8> {
    let len = (packet.len() - TCP) as u16;
    [&packet[IP + 12..IP + 20], &[0, 6], &len.to_be_bytes()].concat()
}

/// A TCP segment to everybody, far larger than the MTU, for the host to cut and sum up.
fn uncut(payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![1, 1, 54, 0];
    packet.extend(SEGMENT.to_le_bytes());
    packet.extend([34, 0, 16, 0, 0, 0]);
    packet.extend([0xff; 6]);
    packet.extend([2, 0, 0, 0, 0, 2, 8, 0]);
    packet.extend([0x45, 0]);
    packet.extend((40 + payload.len() as u16).to_be_bytes());
    packet.extend([0, 1, 0x40, 0, 64, 6, 0, 0, 10, 98, 0, 2, 10, 98, 0, 3]);
    let checksum = !ones_sum(&[&packet[IP..TCP]]);
    packet[IP + 10..IP + 12].copy_from_slice(&checksum.to_be_bytes());
    packet.extend([0, 7, 0, 9, 0, 0, 1, 0, 0, 0, 0, 1, 0x50, 0x10, 4, 0, 0, 0, 0, 0]);
    packet.extend(payload);
    let pseudo = ones_sum(&[&pseudo_header(&packet)]);
    packet[TCP + 16..TCP + 18].copy_from_slice(&pseudo.to_be_bytes());
    packet
}

fn ip(arguments: &str) {
    let output = std::process::Command::new("ip").args(arguments.split(' ')).output().unwrap();
    assert!(output.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Two cards on one bridge: what one guest leaves undone reaches the other as it is if it may, else done.
#[test]
fn big_frames_pass_both_ways_uncut_or_cut_as_agreed() {
    if !namespace("big_frames_pass_both_ways_uncut_or_cut_as_agreed") {
        return;
    }
    let open = |name: &str| {
        let options = TapOptions { ip: None, mask: None, ..options(name) };
        let back = NetBack::open(&options).unwrap();
        let (sender, receiver) = mpsc::channel();
        back.start(Box::new(move |frames| drop(sender.send(frames)))).unwrap();
        (back, receiver)
    };
    let cards = [open("dyadtest2"), open("dyadtest3")];
    ip("link add dyadbr type bridge stp_state 0 forward_delay 0 mcast_snooping 0");
    for name in ["dyadtest2", "dyadtest3", "dyadbr"] {
        if name != "dyadbr" {
            ip(&format!("link set {name} master dyadbr"));
        }
        ip(&format!("link set {name} up"));
    }
    let payload: Vec<u8> = (0..40_000).map(|i| (i % 239) as u8).collect();
    let packet = uncut(&payload);
    // The kernel has things of its own to say on a new link; each batch taken makes room for another.
    let hear = |at: usize, segments: usize| {
        let (back, receiver) = &cards[at];
        let mut heard: Vec<Vec<u8>> = Vec::new();
        while heard.len() < segments {
            let batch = receiver.recv().unwrap();
            back.taken();
            heard.extend(batch.into_iter().filter(|p| p.len() > PAYLOAD && p[IP + 9] == 6));
        }
        heard
    };
    for (from, to) in [(0, 1), (1, 0)] {
        cards[to].0.set_offloads(Offloads::new(true, true, true));
        cards[from].0.send(std::slice::from_ref(&packet));
        let whole = hear(to, 1);
        assert_eq!(whole[0][IP..], packet[IP..]);
        assert_eq!(whole[0][..2], [1, 1], "to be summed up and cut");
        assert_eq!(whole[0][4..6], SEGMENT.to_le_bytes());

        cards[to].0.set_offloads(Offloads::default());
        cards[from].0.send(std::slice::from_ref(&packet));
        let segments = hear(to, payload.len().div_ceil(usize::from(SEGMENT)));
        let joined: Vec<u8> = segments.iter().flat_map(|p| p[PAYLOAD..].to_vec()).collect();
        assert!(joined == payload, "all bytes in order");
        for segment in segments {
            assert_eq!(segment[..10], [0; 10], "nothing left undone");
            assert_eq!(ones_sum(&[&pseudo_header(&segment), &segment[TCP..]]), 0xffff);
        }
        assert_eq!(cards[from].0.dropped(), 0);
    }
}

/// A guest that takes nothing is handed a few batches; what comes meanwhile waits and comes as larger ones.
#[test]
fn frames_that_are_not_taken_wait_outside() {
    if !namespace("frames_that_are_not_taken_wait_outside") {
        return;
    }
    let back = NetBack::open(&options("dyadtest4")).unwrap();
    let (sender, receiver) = mpsc::channel();
    back.start(Box::new(move |frames| drop(sender.send(frames)))).unwrap();
    let socket = host_socket();
    let numbered = |frame: &Vec<u8>| {
        let number = frame.strip_suffix(b"!")?.last_chunk::<2>()?;
        Some(u16::from_be_bytes(*number))
    };
    let (mut sent, mut heard, mut batches) = (0u16, Vec::new(), 0);
    // Until the window is full; the kernel's own frames may take part of it.
    while batches < UNDER_WAY_MAX {
        socket.send_to(&[&sent.to_be_bytes()[..], b"!"].concat(), (BROADCAST, PORT)).unwrap();
        sent += 1;
        let batch = receiver.recv().unwrap();
        batches += 1;
        heard.extend(batch.iter().filter_map(numbered));
    }
    for _ in 0..200 {
        socket.send_to(&[&sent.to_be_bytes()[..], b"!"].concat(), (BROADCAST, PORT)).unwrap();
        sent += 1;
    }
    assert!(receiver.try_recv().is_err(), "nothing was taken, so nothing more comes");
    let mut after = 0;
    while heard.len() < usize::from(sent) {
        back.taken();
        let batch = receiver.recv().unwrap();
        after += 1;
        heard.extend(batch.iter().filter_map(numbered));
    }
    assert_eq!(heard, (0..sent).collect::<Vec<_>>());
    assert!(after < 20, "200 frames came in {after} batches");
    back.stop();
}
