//! Records a real guest once, from power-on to power-off, and replays the log twice without a primary: the
//! digests along the way and at the end must be equal.
//!
//! The guest is the Debian kernel of `scripts/build-guest`. It reads and writes a disk, draws entropy and
//! prints, so that every kind of event but frames is in the log.

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use crossbeam_channel::Receiver;
use ft::{Digest, Event, ExecutionPoint, LogPosition, Unequal};
use hypervisor::soft::SoftHypervisor;
use vmm::backends::Backends;
use vmm::boot::Payload;
use vmm::config::{ConsoleMode, VmConfig};
use vmm::guest::Guest;
use vmm::machine::{HostFacts, layout};
use vmm::run_loop::live::{self, Live};
use vmm::run_loop::outgoing::Outlet;
use vmm::run_loop::recorder::{Feedback, FromVcpu, Recorder};
use vmm::run_loop::replay::{self, Replay, ReplayObserver};
use vmm_sys_util::eventfd::EventFd;

const MEMORY: u64 = 256 << 20;
const DISK_BYTES: usize = 8 << 20;
/// What the guest does: reads a disk, draws entropy, writes what it drew, reads that again.
const LOAD: &str = "sha256sum /dev/vda; dd if=/dev/urandom of=/dev/vda bs=64k count=32 conv=fsync; \
     sync; echo 3 >/proc/sys/vm/drop_caches; sha256sum /dev/vda; sleep 1; date; poweroff -f";

/// Where `scripts/build-guest` puts the guest.
fn guest_directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../build/guest")
}

/// The machine of both sides: a function of its configuration alone.
fn guest(config: &VmConfig, host: &HostFacts, payload: &Arc<Payload>) -> Guest {
    let memory = hypervisor::memory::allocate(&layout::ram_ranges(MEMORY)).unwrap();
    let mut guest = Guest::new(&SoftHypervisor, config, memory, host).unwrap();
    guest.set_payload(Arc::clone(payload));
    guest.boot().unwrap();
    // Digests are about what is written from here on.
    guest.take_dirty_pages().unwrap();
    guest
}

/// Runs the guest until it powers off; gives its last digest and point.
fn record(
    mut guest: Guest,
    outlet: Arc<dyn Outlet>,
    events: &Receiver<Event>,
    log: &mut File,
) -> (Digest, ExecutionPoint) {
    let (sink, flushes) = crossbeam_channel::unbounded();
    let waker = Arc::new(EventFd::new(0).unwrap());
    let feedback = Arc::new(Feedback::default());
    let recorder = Recorder::new(guest.point(), sink, waker, Arc::clone(&feedback));
    let mut live = Live::new(&guest, Arc::clone(&outlet), guest.tsc(), Instant::now());
    live.start_recording(&guest, Box::new(recorder));
    let mut next = live::Next::Again;
    loop {
        // A back half that says nothing and a guest that waits for it: the next timer ends the wait.
        let event = match next {
            live::Next::Wait(Some(timeout)) => events.recv_timeout(timeout).ok(),
            live::Next::Wait(None) => Some(events.recv().unwrap()),
            live::Next::Again => events.try_recv().ok(),
            live::Next::PoweredOff => break,
            live::Next::Rebooted => panic!("the guest rebooted"),
        };
        if let Some(event) = event {
            live.apply(&mut guest, event).unwrap();
        }
        next = live.advance(&mut guest).unwrap();
        // Written is acknowledged here: outputs leave after their records are in the file.
        for message in flushes.try_iter() {
            let FromVcpu::Flush(flush) = message else { panic!("a hand-over without a pair") };
            log.write_all(&flush.bytes).unwrap();
            for held in flush.outputs {
                held.outgoing.release(&*outlet);
                feedback.release(held.number);
            }
        }
    }
    for message in flushes.try_iter() {
        let FromVcpu::Flush(flush) = message else { panic!("a hand-over without a pair") };
        log.write_all(&flush.bytes).unwrap();
    }
    (guest.digest().unwrap(), guest.point())
}

/// Fails the test at the first difference; counts digests.
struct Judge(Arc<Mutex<u64>>);

impl ReplayObserver for Judge {
    fn executed(&mut self, _position: LogPosition, _point: ExecutionPoint) {}
    fn log_empty(&mut self) {}
    fn digest(&mut self, point: ExecutionPoint, unequal: Option<Unequal>) {
        assert_eq!(unequal, None, "at point {}", point.0);
        *self.0.lock().unwrap() += 1;
    }
    fn diverged(&mut self, reason: String) {
        panic!("{reason}");
    }
}

/// Replays `log` in pieces as a network would deliver them.
fn replay(mut guest: Guest, log: &Path) -> (Digest, ExecutionPoint, u64) {
    let digests = Arc::new(Mutex::new(0));
    let mut replay = Replay::new(guest.point(), Box::new(Judge(Arc::clone(&digests))));
    let mut file = File::open(log).unwrap();
    let mut piece = vec![0; 1 << 16];
    loop {
        match replay.advance(&mut guest).unwrap() {
            replay::Next::Again => {}
            replay::Next::LogEmpty => match file.read(&mut piece).unwrap() {
                0 => panic!("the log ended before the guest powered off"),
                count => replay.receive(&piece[..count], Instant::now()),
            },
            replay::Next::PoweredOff => break,
            other => panic!("{other:?}"),
        }
    }
    let compared = *digests.lock().unwrap();
    (guest.digest().unwrap(), guest.point(), compared)
}

#[test]
fn a_recorded_guest_replays_to_equal_digests_twice() {
    let files = guest_directory();
    let (kernel, initramfs) = (files.join("vmlinuz"), files.join("initramfs"));
    if !kernel.exists() || !initramfs.exists() {
        eprintln!("SKIPPED: no guest in {}: run scripts/build-guest first", files.display());
        return;
    }
    let scratch = tempfile::tempdir().unwrap();
    let image = scratch.path().join("disk.img");
    std::fs::write(&image, vec![0x5a; DISK_BYTES]).unwrap();

    let mut config = VmConfig::default();
    config.memory.size = MEMORY;
    config.serial.mode = ConsoleMode::File;
    config.serial.file = Some(scratch.path().join("serial.log"));
    config.console.mode = ConsoleMode::Off;
    config.disks =
        Some(vec![vmm::config::DiskConfig { path: Some(image.clone()), ..Default::default() }]);
    config.complete(|| [1, 2, 3, 4, 5]);
    let cmdline = format!("console=ttyS0 quiet dyad.run=shell dyad.exec=\"{LOAD}\"");
    let payload = Arc::new(Payload::read(&kernel, Some(&initramfs), &cmdline, MEMORY).unwrap());

    let (sender, events) = crossbeam_channel::unbounded();
    let sink = Arc::new(move |event| {
        let _ = sender.send(event);
    });
    let backends = Backends::open(&config, sink).unwrap();
    backends.start().unwrap();
    let host = HostFacts {
        boot_wall_ns: 1_700_000_000_000_000_000,
        disk_sectors: backends.disk_sectors(&config),
    };
    let outlet = Arc::new(backends);

    let log = scratch.path().join("log");
    let mut file = File::create(&log).unwrap();
    let recorded = record(guest(&config, &host, &payload), outlet, &events, &mut file);
    drop(file);
    let serial = std::fs::read_to_string(scratch.path().join("serial.log")).unwrap();
    assert!(!serial.contains("panic"), "{serial}");
    assert_eq!(serial.matches("  /dev/vda").count(), 2, "both checksums were printed:\n{serial}");
    assert!(std::fs::read(&image).unwrap()[..4096].iter().any(|&byte| byte != 0x5a));

    // The replays have no disk to fall back on: everything must come from the log.
    std::fs::remove_file(&image).unwrap();
    for round in 1..=2 {
        let (digest, point, compared) = replay(guest(&config, &host, &payload), &log);
        assert_eq!(digest.first_unequal(&recorded.0), None, "replay {round}");
        assert_eq!(point, recorded.1);
        assert!(compared > 2, "{compared} digests were compared");
        println!("replay {round}: {} instructions, {compared} digests equal", point.0);
    }
}
