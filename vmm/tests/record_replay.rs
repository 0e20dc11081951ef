//! Records a real guest once, from power-on to power-off, and replays the log twice without a primary: the
//! digests along the way and at the end must be equal.
//!
//! The guest is the Debian kernel of `scripts/build-guest`. It reads and writes a disk, draws entropy and
//! prints, so that every kind of event but frames is in the log.

mod recording;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

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
    let mut primary = guest(&config, &host, &payload);
    let recorded = record(&mut primary, outlet, &events, &mut file, |_| false);
    drop(file);
    let serial = std::fs::read_to_string(scratch.path().join("serial.log")).unwrap();
    assert!(!serial.contains("panic"), "{serial}");
    assert_eq!(serial.matches("  /dev/vda").count(), 2, "both checksums were printed:\n{serial}");
    assert!(std::fs::read(&image).unwrap()[..4096].iter().any(|&byte| byte != 0x5a));

    // The replays have no disk to fall back on: everything must come from the log.
    std::fs::remove_file(&image).unwrap();
    for round in 1..=2 {
        let mut backup = guest(&config, &host, &payload);
        let (_, off, compared) = replay(&mut backup, File::open(&log).unwrap());
        assert!(off, "the log ended before the guest powered off");
        let (digest, point) = (backup.digest().unwrap(), backup.point());
        assert_eq!(digest.first_unequal(&recorded.0), None, "replay {round}");
        assert_eq!(point, recorded.1);
        assert!(compared > 2, "{compared} digests were compared");
        println!("replay {round}: {} instructions, {compared} digests equal", point.0);
    }
}
