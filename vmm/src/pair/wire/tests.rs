//! Two ends of a connection: what they say to each other, and what they say of each other.

use std::net::{Shutdown, TcpListener};
use std::os::fd::BorrowedFd;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use proptest::prelude::*;

use super::super::channel::Link;
use super::super::tls::tests::{Authority, expired, unchecked};
use super::*;

fn sockets() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let connecting = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (accepting, _) = listener.accept().unwrap();
    (connecting, accepting)
}

/// Both ends, driven by one thread.
struct Ends {
    links: [Link; 2],
    heard: [Vec<Message>; 2],
    lost: [Option<String>; 2],
}

const CONNECTING: usize = 0;
const ACCEPTING: usize = 1;

impl Ends {
    /// A side that has connected to 127.0.0.1, and one that has listened there.
    fn new(connecting: &Security, accepting: &Security) -> Self {
        let (first, second) = sockets();
        let first = Wire::connecting(first, connecting, "127.0.0.1").unwrap();
        let second = Wire::accepting(second, accepting).unwrap();
        Self {
            links: [Link::new(first), Link::new(second)],
            heard: [Vec::new(), Vec::new()],
            lost: [None, None],
        }
    }

    /// As a pair begins: the connecting side greets. True to the end of one of the sides or to an answer.
    fn greet(connecting: &Security, accepting: &Security) -> Self {
        let mut ends = Self::new(connecting, accepting);
        ends.send(CONNECTING, &hello());
        ends.run_until(|ends| {
            ends.lost.iter().all(Option::is_some)
                || ends.heard[ACCEPTING].len() == 1
                || ends.heard[CONNECTING].len() == 1
        });
        ends
    }

    fn send(&mut self, end: usize, message: &Message) {
        let lost = self.links[end].send(message);
        self.note(end, lost);
    }

    fn note(&mut self, end: usize, lost: Option<String>) {
        if lost.is_some() {
            assert_eq!(self.lost[end], None, "lost twice");
            self.lost[end] = lost;
        }
    }

    fn run_until(&mut self, condition: impl Fn(&Self) -> bool) {
        while !condition(self) {
            self.wait();
            for end in [CONNECTING, ACCEPTING] {
                let heard = self.links[end].read();
                self.heard[end].extend(heard.messages);
                self.note(end, heard.lost);
                let lost = self.links[end].flush();
                self.note(end, lost);
            }
        }
    }

    /// Until either end can go on. What never comes to pass fails here.
    fn wait(&self) {
        let mut fds = Vec::new();
        for channel in self.links.iter().filter_map(Link::channel) {
            let write = channel.wants_to_write();
            let flags = if write { PollFlags::POLLOUT } else { PollFlags::empty() };
            // SAFETY: the channel keeps the descriptor open.
            let fd = unsafe { BorrowedFd::borrow_raw(channel.as_raw_fd()) };
            fds.push(PollFd::new(fd, PollFlags::POLLIN | flags));
        }
        assert!(!fds.is_empty(), "both ends are closed");
        let ready = poll(&mut fds, PollTimeout::try_from(Duration::from_secs(30)).unwrap());
        assert_ne!(ready, Ok(0), "nothing happens: {:?} {:?}", self.lost, self.heard[0].len());
    }
}

fn hello() -> Message {
    Message::Hello(ft::message::Hello::new("test", ft::Capabilities::default()))
}

/// `connecting` speaks to `accepting` in vain, and both know why.
fn refused(connecting: &Security, accepting: &Security, words: [&str; 2]) {
    let ends = Ends::greet(connecting, accepting);
    for (end, word) in words.into_iter().enumerate() {
        let mut said = ends.lost[end].clone().unwrap_or_default();
        if let Some(Message::Refused { reason }) = ends.heard[end].first() {
            said = reason.clone();
        }
        assert!(said.contains(word), "end {end} says {said:?}, not {word:?}");
    }
    assert!(ends.heard[ACCEPTING].is_empty());
}

#[test]
fn both_sides_of_one_authority_speak() {
    let authority = Authority::new();
    let (a, b) = (authority.identity("a.example"), authority.identity("127.0.0.1"));
    let mut ends = Ends::greet(&a, &b);
    assert_eq!(ends.heard[ACCEPTING], [hello()]);
    ends.send(ACCEPTING, &hello());
    ends.run_until(|ends| ends.heard[CONNECTING].len() == 1);

    // More than any socket or buffer holds at once, both ways, in frames of all sizes.
    let mut sent = vec![hello()];
    for size in [1, 100, 16 << 10, (16 << 10) + 1, 1 << 20, ft::message::MAX_CHUNK_BYTES] {
        let bytes = (0..size).map(|index| (index * 7 + index / 251) as u8).collect();
        sent.push(Message::Payload { bytes });
    }
    for end in [CONNECTING, ACCEPTING] {
        sent[1..].iter().for_each(|message| ends.send(end, message));
    }
    ends.run_until(|ends| ends.heard.iter().all(|heard| heard.len() == sent.len()));
    assert!(ends.heard.iter().all(|heard| *heard == sent));
    assert_eq!(ends.lost, [None, None]);

    // What was sent before a hang-up arrives, and then the end.
    ends.send(CONNECTING, &Message::Yielded);
    ends.links[CONNECTING].hang_up();
    ends.run_until(|ends| ends.lost[ACCEPTING].is_some() && !ends.links[CONNECTING].is_open());
    assert_eq!(ends.heard[ACCEPTING].last(), Some(&Message::Yielded));
    assert_eq!(ends.lost[CONNECTING], None);
}

#[test]
fn strangers_are_refused_by_both_sides() {
    let (ours, theirs) = (Authority::new(), Authority::new());
    let (a, b) = (ours.identity("a"), ours.identity("127.0.0.1"));
    let refuses = "refuses this host's certificate: it is not signed by the CA";
    let is_foreign = "the peer's certificate is not signed by the CA";
    refused(&a, &theirs.identity("127.0.0.1"), [is_foreign, refuses]);
    refused(&theirs.identity("a"), &b, [is_foreign, refuses]);

    let (_directory, old) = ours.host("127.0.0.1", expired);
    let old = unchecked(&old);
    refused(
        &a,
        &old,
        ["the peer's certificate has expired 3 days ago", "has expired, by the peer's"],
    );
    refused(&old, &b, ["has expired, by the peer's clock", "the peer's certificate has expired"]);

    let elsewhere = ours.identity("b.example");
    let names = "names DnsName(\"b.example\"), and this side has connected to '127.0.0.1'";
    refused(&a, &elsewhere, [names, "refuses this host's certificate (BadCertificate)"]);

    let picky = ours.allowing("127.0.0.1", &["c.example", "10.0.0.1"]);
    refused(
        &a,
        &picky,
        ["none of the names in the peer's 'allowed_peers'", "none of the names in"],
    );
    let c = ours.identity("c.example");
    assert_eq!(Ends::greet(&c, &picky).heard[ACCEPTING], [hello()]);
}

#[test]
fn one_side_without_certificates_is_named_on_both() {
    let authority = Authority::new();
    let (a, b) = (authority.identity("a"), authority.identity("127.0.0.1"));
    refused(&Security::Plain, &b, ["it wants TLS", "the peer speaks without TLS"]);
    refused(&a, &Security::Plain, ["the peer speaks without TLS", "the peer wants TLS"]);
    let plain = Ends::greet(&Security::Plain, &Security::Plain);
    assert_eq!(plain.heard[ACCEPTING], [hello()]);
}

/// What an accepting wire says of bytes, in pieces, and the end of the connection.
fn judge(security: &Security, pieces: &[&[u8]]) -> (Vec<Message>, String) {
    let (mut stranger, accepting) = sockets();
    let mut link = Link::new(Wire::accepting(accepting, security).unwrap());
    let mut messages = Vec::new();
    for piece in pieces {
        // It may have been refused already.
        let _ = stranger.write_all(piece);
        let heard = link.read();
        messages.extend(heard.messages);
        if let Some(lost) = heard.lost {
            return (messages, lost);
        }
        assert_eq!(link.flush(), None);
    }
    let _ = stranger.shutdown(Shutdown::Write);
    loop {
        let mut fds = [link.channel().unwrap()].map(|channel| {
            // SAFETY: the channel keeps the descriptor open.
            let fd = unsafe { BorrowedFd::borrow_raw(channel.as_raw_fd()) };
            PollFd::new(fd, PollFlags::POLLIN)
        });
        poll(&mut fds, PollTimeout::NONE).unwrap();
        let heard = link.read();
        messages.extend(heard.messages);
        if let Some(lost) = heard.lost {
            return (messages, lost);
        }
    }
}

#[test]
fn garbage_is_refused() {
    let tls = Authority::new().identity("127.0.0.1");
    for (bytes, word) in [
        (&b"GET / HTTP/1.1\r\n\r\n"[..], "neither TLS nor Dyad"),
        (&[0xff; 70_000], "neither TLS nor Dyad"),
        (b"", "in the middle of the TLS handshake"),
        (&[0x16], "in the middle of the TLS handshake"),
        (&[0x16, 3, 1], "in the middle of the TLS handshake"),
        (&[0x16, 3, 3, 0xff, 0xff, 1, 1], "TLS failed"),
        (&[0x17, 3, 3, 0, 1, 1], "TLS failed"),
        (&[0x16, 3, 1, 0, 4, 1, 0xff, 0xff, 0xff], "TLS failed"),
    ] {
        let (messages, lost) = judge(&tls, &[bytes]);
        assert!(messages.is_empty() && lost.contains(word), "{bytes:x?}: {lost}");
    }
    let (_, lost) = judge(&Security::Plain, &[&[0x16], &[3], &[1, 2, 0, 1, 0]]);
    assert!(lost.contains("the peer wants TLS"), "{lost}");
    let mut frame = Vec::new();
    hello().append_frame(&mut frame).unwrap();
    let bytes: Vec<&[u8]> = frame.chunks(1).collect();
    let (_, lost) = judge(&tls, &bytes);
    assert!(lost.contains("without TLS"), "{lost}");
    let (messages, lost) = judge(&Security::Plain, &bytes);
    assert_eq!((messages, lost.as_str()), (vec![hello()], "the peer closed the connection"));
}

/// The first bytes that a connecting side sends.
fn client_hello(security: &Security) -> Vec<u8> {
    let (connecting, mut accepting) = sockets();
    let mut wire = Wire::connecting(connecting, security, "127.0.0.1").unwrap();
    wire.write(&[]).unwrap();
    drop(wire);
    let mut bytes = Vec::new();
    accepting.read_to_end(&mut bytes).unwrap();
    bytes
}

/// Garbage after the handshake: a peer that has a certificate and then breaks the session.
#[test]
fn a_broken_session_is_refused() {
    let authority = Authority::new();
    let (a, b) = (authority.identity("a"), authority.identity("127.0.0.1"));
    for junk in [&[0x17, 3, 3, 0, 40][..], &[0xff; 40_000], &[0x17, 3, 3, 0xff, 0xff], b"x"] {
        let mut ends = Ends::greet(&a, &b);
        let raw = ends.links[CONNECTING].channel().unwrap().as_raw_fd();
        // SAFETY: the link keeps the descriptor open, and the copy is closed by its owner.
        let copy = unsafe { BorrowedFd::borrow_raw(raw) }.try_clone_to_owned().unwrap();
        let mut raw = TcpStream::from(copy);
        raw.write_all(junk).unwrap();
        raw.write_all(&[0x55; 64]).unwrap();
        ends.run_until(|ends| ends.lost[ACCEPTING].is_some());
        assert!(ends.lost[ACCEPTING].as_ref().unwrap().contains("TLS failed"), "{:?}", ends.lost);
        assert_eq!(ends.heard[ACCEPTING], [hello()]);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn no_first_bytes_do_harm(
        bytes in proptest::collection::vec(any::<u8>(), 0..2000),
        (at, value, cut) in (any::<prop::sample::Index>(), any::<u8>(), any::<prop::sample::Index>()),
    ) {
        let security = Authority::new().identity("127.0.0.1");
        let (messages, _) = judge(&security, &[&bytes]);
        prop_assert!(messages.is_empty());
        let mut greeting = client_hello(&security);
        let index = at.index(greeting.len());
        greeting[index] = value;
        let (head, tail) = greeting.split_at(cut.index(greeting.len()));
        let (messages, _) = judge(&security, &[head, tail, &bytes]);
        prop_assert!(messages.is_empty());
    }
}
