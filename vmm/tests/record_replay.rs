//! Records a real guest once, from power-on to power-off, and replays the log twice without a primary: the
//! digests along the way and at the end must be equal.
//!
//! The guest is the Debian kernel of `scripts/build-guest`. Once it reads and writes a disk, draws entropy and
//! prints; once it sends megabytes back to where they came from, with offloads and in batches. So every kind
//! of event is in one of the logs.

mod recording;

use std::fs::File;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use ft::{Digest, Event, ExecutionPoint};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use recording::{guest, record, replay};
use vmm::backends::Backends;
use vmm::boot::Payload;
use vmm::config::{ConsoleMode, VmConfig};
use vmm::machine::HostFacts;

const MEMORY: u64 = 256 << 20;
const DISK_BYTES: usize = 8 << 20;
/// What the guest does: reads a disk, draws entropy, writes what it drew, reads that again.
const LOAD: &str = "sha256sum /dev/vda; dd if=/dev/urandom of=/dev/vda bs=64k count=32 conv=fsync; \
     sync; echo 3 >/proc/sys/vm/drop_caches; sha256sum /dev/vda; sleep 1; date; poweroff -f";

/// Where `scripts/build-guest` puts the guest.
fn guest_directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../build/guest")
}

/// A recording, and all that is needed to replay it.
struct Recording {
    scratch: tempfile::TempDir,
    config: VmConfig,
    host: HostFacts,
    payload: Arc<Payload>,
    end: (Digest, ExecutionPoint),
}

impl Recording {
    /// Boots the guest with what `devices` adds to the configuration, has it run `load`, which powers it off.
    /// `watch` is called all along: what it finds wrong outside the guest ends the test by a panic. `None`, said
    /// aloud, without a guest.
    fn make(
        load: &str,
        devices: impl FnOnce(&mut VmConfig, &Path),
        mut watch: impl FnMut(),
    ) -> Option<Self> {
        let files = guest_directory();
        let (kernel, initramfs) = (files.join("vmlinuz"), files.join("initramfs"));
        if !kernel.exists() || !initramfs.exists() {
            eprintln!("SKIPPED: no guest in {}: run scripts/build-guest first", files.display());
            return None;
        }
        let scratch = tempfile::tempdir().unwrap();
        let mut config = VmConfig::default();
        config.memory.size = MEMORY;
        config.serial.mode = ConsoleMode::File;
        config.serial.file = Some(scratch.path().join("serial.log"));
        config.console.mode = ConsoleMode::Off;
        devices(&mut config, scratch.path());
        config.complete(|| [1, 2, 3, 4, 5]);
        let cmdline = format!("console=ttyS0 quiet dyad.run=shell {load}");
        let payload = Payload::read(&kernel, Some(&initramfs), &cmdline, MEMORY).unwrap();
        let payload = Arc::new(payload);

        let (sender, events) = rt_channel::unbounded();
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
        let mut file = File::create(scratch.path().join("log")).unwrap();
        let mut primary = guest(&config, &host, &payload);
        let end = record(&mut primary, outlet, &events, &mut file, |_| {
            watch();
            false
        });
        drop(file);
        Some(Self { scratch, config, host, payload, end })
    }

    fn log(&self) -> PathBuf {
        self.scratch.path().join("log")
    }

    /// What the guest printed.
    fn serial(&self) -> String {
        let serial = std::fs::read_to_string(self.scratch.path().join("serial.log")).unwrap();
        assert!(!serial.contains("panic"), "{serial}");
        serial
    }

    fn replays_to_equal_digests_twice(&self) {
        for round in 1..=2 {
            let mut backup = guest(&self.config, &self.host, &self.payload);
            let (_, off, compared) = replay(&mut backup, File::open(self.log()).unwrap());
            assert!(off, "the log ended before the guest powered off");
            let (digest, point) = (backup.digest().unwrap(), backup.point());
            assert_eq!(digest.first_unequal(&self.end.0), None, "replay {round}");
            assert_eq!(point, self.end.1);
            assert!(compared > 2, "{compared} digests were compared");
            println!("replay {round}: {} instructions, {compared} digests equal", point.0);
        }
    }
}

#[test]
fn a_recorded_guest_replays_to_equal_digests_twice() {
    let load = format!("dyad.exec=\"{LOAD}\"");
    let disk = |config: &mut VmConfig, scratch: &Path| {
        let path = Some(scratch.join("disk.img"));
        std::fs::write(scratch.join("disk.img"), vec![0x5a; DISK_BYTES]).unwrap();
        config.disks = Some(vec![vmm::config::DiskConfig { path, ..Default::default() }]);
    };
    let Some(recording) = Recording::make(&load, disk, || {}) else { return };
    let serial = recording.serial();
    assert_eq!(serial.matches("  /dev/vda").count(), 2, "both checksums were printed:\n{serial}");
    let image = recording.scratch.path().join("disk.img");
    assert!(std::fs::read(&image).unwrap()[..4096].iter().any(|&byte| byte != 0x5a));
    // The replays have no disk to fall back on: everything must come from the log.
    std::fs::remove_file(&image).unwrap();
    recording.replays_to_equal_digests_twice();
}

/// How long the guest may stay silent. It bounds a failure; no passing run waits for it.
const PATIENCE: Duration = Duration::from_secs(120);

/// The next connection that the guest makes.
fn accept(listener: &TcpListener) -> TcpStream {
    let mut fds = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
    let patience = PollTimeout::try_from(PATIENCE).unwrap();
    assert_eq!(poll(&mut fds, patience).unwrap(), 1, "the guest has not called");
    listener.accept().unwrap().0
}

/// Sends `bytes` to the guest, which calls and sends them back, and compares. It calls again then, and waits until that
/// ends: if it powered off when its echo had ended, the unsent rest of the answer would be lost.
fn echo(listener: &TcpListener, bytes: usize) {
    let mut stream = accept(listener);
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    let sent: Vec<u8> = (0..bytes).map(|i| (i % 251) as u8 ^ (i >> 12) as u8).collect();
    let mut other = stream.try_clone().unwrap();
    let mut back = Vec::new();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            other.write_all(&sent).unwrap();
            other.shutdown(std::net::Shutdown::Write).unwrap();
        });
        stream.read_to_end(&mut back).unwrap();
    });
    assert!(sent == back, "{} bytes went, {} came back", sent.len(), back.len());
    accept(listener);
}

/// The longest frame and the largest batch of the log.
fn largest_received(log: &Path) -> (usize, usize) {
    let mut decoder = ft::Decoder::new(ExecutionPoint(0));
    decoder.push(std::fs::read(log).unwrap());
    let (mut longest, mut most) = (0, 0);
    while let Some((record, _)) = decoder.next_record().unwrap() {
        if let ft::Entry::Event(Event::Frames { frames, .. }) = record.entry {
            longest = frames.iter().map(Vec::len).max().unwrap_or(0).max(longest);
            most = frames.len().max(most);
        }
    }
    (longest, most)
}

#[test]
fn a_guest_with_offloads_and_batches_replays_to_equal_digests_twice() {
    // A network namespace of this thread's own; threads it starts are in it too.
    let namespace = nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET);
    if namespace.is_err() || !Path::new("/dev/net/tun").exists() {
        eprintln!("SKIPPED: a network needs root and /dev/net/tun");
        return;
    }
    let load = "dyad.ip=10.99.9.2/24 ipv6.disable=1 \
         dyad.exec=\"nc 10.99.9.1 7203 -e cat; nc 10.99.9.1 7203 </dev/null; poweroff -f\"";
    let network = |config: &mut VmConfig, _: &Path| {
        let tap = Some("dyadrec0".to_owned());
        let (ip, mask) = (Some("10.99.9.1"), Some("255.255.255.0"));
        let [ip, mask] = [ip, mask].map(|text| text.map(|text| text.parse().unwrap()));
        config.net = Some(vec![vmm::config::NetConfig { tap, ip, mask, ..Default::default() }]);
    };
    let listener = TcpListener::bind("0.0.0.0:7203").unwrap();
    let mut peer = Some(std::thread::spawn(move || echo(&listener, 6 << 20)));
    // A guest whose peer failed would never power off.
    let watch = || {
        if let Some(ended) = peer.take_if(|peer| peer.is_finished()) {
            ended.join().unwrap();
        }
    };
    let Some(recording) = Recording::make(load, network, watch) else { return };
    if let Some(peer) = peer {
        peer.join().unwrap();
    }
    recording.serial();
    let (longest, most) = largest_received(&recording.log());
    println!("longest frame {longest} bytes, largest batch {most} frames");
    assert!(longest > 3000, "the longest frame had {longest} bytes: nothing was offloaded");
    assert!(most > 1, "no batch had more than {most} frame");
    recording.replays_to_equal_digests_twice();
}
