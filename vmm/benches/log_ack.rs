//! From a piece of log to its acknowledgement over loopback: plain and inside TLS by turns, so that both
//! meet the same load of the machine, and the ratio means something where the times do not. The two ends have a
//! processor each: to wake a thread on another one costs more than all else here, so where the scheduler puts them
//! must not decide.
//!
//! `cargo bench -p vmm --bench log_ack`

use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ft::{LogPosition, Message};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use vmm::pair::channel::Link;
use vmm::pair::tls::{Identity, Security, TlsFiles};
use vmm::pair::wire::Wire;

/// Exchanges measured in one go.
const TURN: usize = 500;
/// Turns of each kind.
const TURNS: usize = 30;
/// Bytes of log: a heartbeat's worth, a busy millisecond, a burst of disk writes.
const SIZES: [usize; 3] = [64, 4 << 10, 256 << 10];

/// A host with the address both ends have.
fn identity() -> Security {
    let directory = tempfile::tempdir().expect("a directory for certificates");
    let (authority, key) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca = params.self_signed(&authority).unwrap().pem();
    let issuer = Issuer::new(params, authority);
    let host = CertificateParams::new(["127.0.0.1".to_owned()]).unwrap();
    let host = host.signed_by(&key, &issuer).unwrap();
    let files = TlsFiles::in_directory(directory.path());
    std::fs::write(&files.ca, ca).unwrap();
    std::fs::write(&files.certificate, host.pem()).unwrap();
    std::fs::write(&files.key, key.serialize_pem()).unwrap();
    Security::Tls(Arc::new(Identity::load(&files, &[]).expect("good certificates")))
}

/// Keeps the calling thread on one processor, if there are so many.
fn stay_on(processor: usize) {
    let mut set = CpuSet::new();
    if processor < std::thread::available_parallelism().map_or(1, usize::from) {
        set.set(processor).unwrap();
        sched_setaffinity(Pid::from_raw(0), &set).unwrap();
    }
}

/// Sleeps until the other end has said something, as an ft thread does.
fn wait(link: &Link) {
    let channel = link.channel().expect("an open channel");
    let writing = channel.wants_to_write();
    let flags = if writing { PollFlags::POLLOUT } else { PollFlags::empty() };
    // SAFETY: the link keeps the descriptor open.
    let fd = unsafe { BorrowedFd::borrow_raw(channel.as_raw_fd()) };
    let mut fds = [PollFd::new(fd, PollFlags::POLLIN | flags)];
    poll(&mut fds, PollTimeout::NONE).expect("poll");
}

/// Acknowledges whatever comes, until the end.
fn acknowledge(mut link: Link) {
    let mut received = 0;
    loop {
        wait(&link);
        let heard = link.read();
        for message in heard.messages {
            if let Message::Log { bytes, .. } = message {
                received += bytes.len() as u64;
                link.send(&Message::Ack { received: LogPosition(received) });
            }
        }
        if heard.lost.is_some() {
            return;
        }
        link.flush();
    }
}

/// A connection and its other end.
struct Pair {
    link: Link,
    sent: u64,
    times: Vec<Duration>,
}

impl Pair {
    fn new(security: &Security) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (accepted, _) = listener.accept().unwrap();
        let wire = Wire::accepting(accepted, security).unwrap();
        std::thread::spawn(move || {
            stay_on(1);
            acknowledge(Link::new(wire));
        });
        let mut link = Link::new(Wire::connecting(stream, security, "127.0.0.1").unwrap());
        // As every connection begins: longer frames are taken only after it.
        link.send(&Message::Hello(ft::message::Hello::new("bench", ft::Capabilities::default())));
        Self { link, sent: 0, times: Vec::new() }
    }

    fn exchange(&mut self, log: &[u8]) {
        let position = LogPosition(self.sent);
        let message = Message::Log { position, bytes: log.to_vec() };
        self.sent += log.len() as u64;
        let started = Instant::now();
        self.link.send(&message);
        self.link.flush();
        loop {
            wait(&self.link);
            let heard = self.link.read();
            assert_eq!(heard.lost, None, "the connection is lost");
            let end = Message::Ack { received: LogPosition(self.sent) };
            if heard.messages.contains(&end) {
                break;
            }
            self.link.flush();
        }
        self.times.push(started.elapsed());
    }

    /// Median and 99th percentile, in microseconds.
    fn percentiles(&mut self) -> [f64; 2] {
        self.times.sort();
        let at = |share: usize| self.times[self.times.len() * share / 100].as_secs_f64() * 1e6;
        [at(50), at(99)]
    }
}

fn main() {
    let tls = identity();
    stay_on(0);
    println!("log to acknowledgement over loopback, median and 99th percentile");
    for size in SIZES {
        let log = vec![0x5a; size];
        let mut pairs = [Pair::new(&Security::Plain), Pair::new(&tls)];
        for pair in &mut pairs {
            // Handshake and warm-up.
            (0..TURN).for_each(|_| pair.exchange(&log));
            pair.times.clear();
        }
        for _ in 0..TURNS {
            for pair in &mut pairs {
                (0..TURN).for_each(|_| pair.exchange(&log));
            }
        }
        let [plain, tls] = &mut pairs;
        let ([plain, plain_99], [tls, tls_99]) = (plain.percentiles(), tls.percentiles());
        println!(
            "{size:7} bytes: plain {plain:7.1} us, {plain_99:7.1} us; TLS {tls:7.1} us, {tls_99:7.1} us; \
             ratio {:.2}, {:.2}",
            tls / plain,
            tls_99 / plain_99
        );
    }
}
