//! The host half of a network card on a real TAP interface, in a network namespace of its own.
//! Needs root; skips aloud without.

use std::io::Write;
use std::net::{Ipv4Addr, UdpSocket};
use std::sync::mpsc;

use nix::sched::{CloneFlags, unshare};
use virtio_devices::net::TapError;
use virtio_devices::net::back::{NetBack, TapOptions, announcement};

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
    TapOptions { name: Some(name.into()), ip: Some(HOST), mask, mtu: Some(1400) }
}

/// A UDP datagram from the guest to everybody, as a frame.
fn datagram(payload: &[u8]) -> Vec<u8> {
    let mut ip = vec![0x45, 0, 0, 28 + payload.len() as u8, 0, 0, 0, 0, 64, 17, 0, 0];
    ip.extend([10, 99, 0, 2]);
    ip.extend(BROADCAST.octets());
    let sum: u32 = ip.chunks(2).map(|w| u32::from(w[0]) << 8 | u32::from(w[1])).sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    ip[10..12].copy_from_slice(&(!(folded as u16)).to_be_bytes());
    let mut frame = vec![0xff; 6];
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
    assert_eq!(first[0..6], [0xff; 6], "a frame begins with its destination");

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
    let back = NetBack::open(&options("dyadtest1")).unwrap();
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
