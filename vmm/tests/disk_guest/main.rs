//! A guest that is rude to its disk ([`guest.s`](guest.s)), on real images with many requests under way: recorded once
//! it replays twice to equal digests, with errors of the host too; and what was under way when its host died
//! is done by the side that goes on.

#[path = "../executable/mod.rs"]
mod executable;
mod mirrored;
mod reads;
#[path = "../recording/mod.rs"]
mod recording;

use std::arch::global_asm;
use std::collections::BTreeSet;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use executable::executable;
use ft::Event;
use nix::errno::Errno;
use recording::{guest, record, replay, run};
use rt_channel::{Receiver, unbounded};
use tempfile::NamedTempFile;
use virtio_devices::block::back::{
    BlockBack, BlockOptions, CompletionSink, Faults, Step, StepKind, Verdict,
};
use virtio_devices::net::Offloads;
use virtio_devices::{BlockOp, BlockRequest, BlockStatus};
use vmm::boot::{BootFile, Payload};
use vmm::config::{ConsoleMode, DiskConfig, VmConfig};
use vmm::machine::HostFacts;
use vmm::run_loop::outgoing::Outlet;

global_asm!(include_str!("guest.s"));

unsafe extern "C" {
    static disk_guest_start: u8;
    static disk_guest_end: u8;
}

const MEMORY: u64 = 32 << 20;
const SECTORS: u64 = 128;
const ROUNDS: u32 = 100;

fn code() -> &'static [u8] {
    let len = (&raw const disk_guest_end).addr() - (&raw const disk_guest_start).addr();
    // SAFETY: the two labels enclose initialized, read-only data of one section of this program.
    unsafe { std::slice::from_raw_parts(&raw const disk_guest_start, len) }
}

/// Held by the one whose guest runs. The guest waits for its disk by looking again and again: two of them leave no
/// processor to the disks.
static TURN: Mutex<()> = Mutex::new(());

/// The machine of both sides.
struct Setup {
    _turn: MutexGuard<'static, ()>,
    config: VmConfig,
    host: HostFacts,
    payload: Arc<Payload>,
}

impl Setup {
    fn new() -> Self {
        let mut config =
            VmConfig { disks: Some(vec![DiskConfig::default()]), ..VmConfig::default() };
        config.memory.size = MEMORY;
        config.serial.mode = ConsoleMode::Null;
        config.console.mode = ConsoleMode::Off;
        config.complete(|| [0; 5]);
        let host = HostFacts { boot_wall_ns: 0, disk_sectors: vec![SECTORS] };
        let kernel = BootFile { path: "guest.s".into(), content: executable(code()) };
        let payload = Payload { kernel, initramfs: None, cmdline: String::new() };
        // Whose test has failed has had its turn.
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        Self { _turn: turn, config, host, payload: Arc::new(payload) }
    }

    fn guest(&self) -> vmm::guest::Guest {
        guest(&self.config, &self.host, &self.payload)
    }
}

/// One disk, and what comes out of the serial port.
struct OneDisk {
    disk: BlockBack,
    serial: Mutex<Vec<u8>>,
    submitted: Mutex<Vec<u64>>,
    slow: Mutex<Slow>,
}

/// Which requests reach the disk late.
#[derive(Default)]
struct Slow {
    /// All but flushes and these.
    but: Option<BTreeSet<u64>>,
    held: Vec<BlockRequest>,
}

impl Slow {
    fn holds(&self, request: &BlockRequest) -> bool {
        let late = |in_time: &BTreeSet<u64>| !in_time.contains(&request.id);
        request.op != BlockOp::Flush && self.but.as_ref().is_some_and(late)
    }
}

impl OneDisk {
    fn open(image: &Path, io_uring: bool, faults: Option<Arc<dyn Faults>>) -> Arc<Self> {
        let options = BlockOptions { io_uring, faults, ..BlockOptions::new(image) };
        Arc::new(Self {
            disk: BlockBack::open_with(&options).unwrap(),
            serial: Mutex::default(),
            submitted: Mutex::default(),
            slow: Mutex::default(),
        })
    }

    /// Of what is asked for from now on, the disk gets only flushes and these until [`Self::let_go`].
    fn hold_all_but(&self, in_time: BTreeSet<u64>) {
        self.slow.lock().unwrap().but = Some(in_time);
    }

    fn let_go(&self) {
        for request in std::mem::take(&mut *self.slow.lock().unwrap()).held {
            self.disk.submit(request);
        }
    }

    fn start(&self, device: u8) -> Receiver<Event> {
        let (complete, events) = completions(device);
        self.disk.start(complete).unwrap();
        events
    }

    /// As [`Self::start`], beside another that works with the image.
    fn follow(&self, device: u8) -> Receiver<Event> {
        let (complete, events) = completions(device);
        self.disk.follow(complete).unwrap();
        events
    }

    /// Mismatches, failed requests, checksum.
    fn report(&self) -> (u64, u64, u64) {
        let text = String::from_utf8(self.serial.lock().unwrap().clone()).unwrap();
        let numbers: Vec<_> =
            text.split_whitespace().map(|word| u64::from_str_radix(word, 16).unwrap()).collect();
        (numbers[0], numbers[1], numbers[2])
    }
}

impl Outlet for OneDisk {
    fn block(&self, device: u8, request: BlockRequest) {
        assert_eq!(device, DEVICE);
        self.submitted.lock().unwrap().push(request.id);
        let mut slow = self.slow.lock().unwrap();
        if slow.holds(&request) {
            slow.held.push(request);
        } else {
            self.disk.submit(request);
        }
    }
    fn block_patiently(&self, device: u8, request: BlockRequest) {
        assert_eq!(device, DEVICE);
        self.submitted.lock().unwrap().push(request.id);
        self.disk.submit_patiently(request);
    }
    fn frames(&self, _device: u8, _frames: &[Vec<u8>]) {}
    fn frames_taken(&self, _device: u8) {}
    fn set_offloads(&self, _device: u8, _offloads: Offloads) {}
    fn console(&self, _device: u8, _bytes: &[u8]) {}
    fn console_taken(&self, _device: u8) {}
    fn serial(&self, bytes: &[u8]) {
        self.serial.lock().unwrap().extend(bytes);
    }
    fn serial_taken(&self) {}
    fn entropy(&self, _device: u8, _len: u32) {}
    fn close_disks(&self) {
        self.disk.valve().close();
    }
    fn open_disks(&self) {
        self.disk.valve().open();
    }
    fn set_write_through(&self, on: bool) -> Result<(), String> {
        self.disk.set_write_through(on).map_err(|error| error.to_string())
    }
    fn set_lease(&self, until: Option<Duration>) {
        self.disk.valve().set_lease(until);
    }
    fn announce(&self) {}
}

/// A place for completions, and where they come out.
fn completions(device: u8) -> (CompletionSink, Receiver<Event>) {
    let (sender, events) = unbounded();
    let complete = move |done: virtio_devices::BlockCompletion| {
        let _ = sender.send(Event::DiskCompletion {
            device,
            request: done.id,
            status: done.status.byte(),
            data: done.data,
        });
    };
    (Box::new(complete), events)
}

/// Where the disk is.
const DEVICE: u8 = 1;

fn image() -> NamedTempFile {
    let file = NamedTempFile::new().unwrap();
    let content: Vec<u8> = (0..SECTORS * 512).map(|n| (n * 7 + n / 512) as u8).collect();
    std::fs::write(file.path(), content).unwrap();
    file
}

/// Every so often the host is short of something.
struct Flaky(AtomicU32);

impl Faults for Flaky {
    fn before(&self, step: Step) -> Verdict {
        match (self.0.fetch_add(1, Ordering::Relaxed) % 23, step.kind) {
            (0, StepKind::Write) => Verdict::Fail(Errno::ENOSPC),
            // An error of the storage would be for good.
            (0, StepKind::Sync) => Verdict::Fail(Errno::ECANCELED),
            (0, _) => Verdict::Fail(Errno::EIO),
            (1, _) => Verdict::Fail(Errno::EINTR),
            (2, StepKind::Read | StepKind::Write) => Verdict::AtMost(300),
            _ => Verdict::Go,
        }
    }
}

fn record_once_replay_twice(io_uring: bool, flaky: bool) {
    let setup = Setup::new();
    let image = image();
    let faults = || Arc::new(Flaky(AtomicU32::new(0))) as Arc<dyn Faults>;
    let outlet = OneDisk::open(image.path(), io_uring, flaky.then(faults));
    let events = outlet.start(DEVICE);
    let mut log = Vec::new();
    let mut primary = setup.guest();
    let recorded = record(&mut primary, outlet.clone(), &events, &mut log, |_| false);
    let (mismatches, failed, checksum) = outlet.report();
    println!("io_uring {io_uring}: {failed} failed, checksum {checksum:x}, {} bytes", log.len());
    assert_eq!(mismatches, 0, "a read gave something else than the write before it");
    assert_eq!(failed > 0, flaky, "{failed} requests failed");
    assert_eq!(outlet.submitted.lock().unwrap().len() as u32, 16 * ROUNDS);
    for round in 1..=2 {
        let mut backup = setup.guest();
        let (_, off, _) = replay(&mut backup, &log[..]);
        assert!(off, "the log ended before the guest powered off");
        assert_eq!(backup.digest().unwrap().first_unequal(&recorded.0), None, "replay {round}");
        assert_eq!(backup.point(), recorded.1);
    }
}

#[test]
fn rude_requests_replay_to_equal_digests_with_io_uring() {
    record_once_replay_twice(true, false);
}

#[test]
fn rude_requests_replay_to_equal_digests_with_threads() {
    record_once_replay_twice(false, false);
}

#[test]
fn errors_of_the_host_replay_to_equal_digests() {
    record_once_replay_twice(true, true);
    record_once_replay_twice(false, true);
}

/// Fails each step some times, a sync before it has begun.
struct Recovering(AtomicU32);

impl Faults for Recovering {
    fn before(&self, step: Step) -> Verdict {
        let take = |left: u32| left.checked_sub(1);
        match self.0.try_update(Ordering::SeqCst, Ordering::SeqCst, take) {
            Ok(_) if step.kind == StepKind::Sync => Verdict::Fail(Errno::ECANCELED),
            Ok(_) => Verdict::Fail(Errno::EIO),
            Err(_) => Verdict::Go,
        }
    }
}

#[test]
fn requests_outstanding_at_a_failover_are_issued_again_and_never_reported_as_errors() {
    let setup = Setup::new();
    let image = image();
    let mut log = Vec::new();
    let mut primary = setup.guest();
    {
        let outlet = OneDisk::open(image.path(), true, None);
        let events = outlet.start(DEVICE);
        // In the middle of a round, with requests under way, the host dies: what it was asked for may or may not have
        // been done, what waits in its queues never is.
        record(&mut primary, outlet.clone(), &events, &mut log, |guest| {
            let submitted = outlet.submitted.lock().unwrap().len();
            submitted > 400 && guest.machine().outstanding().len() >= 4
        });
        outlet.disk.halt();
    }
    let mut backup = setup.guest();
    let (replay, off, _) = replay(&mut backup, &log[..]);
    assert!(!off);
    let outstanding: BTreeSet<u64> =
        backup.machine().outstanding().into_iter().map(|(_, request)| request.id).collect();
    assert!(outstanding.len() >= 4, "{outstanding:?}");

    // The storage needs a moment to get over it.
    let faults = Arc::new(Recovering(AtomicU32::new(10)));
    let outlet = OneDisk::open(image.path(), true, Some(faults));
    let way_out = Arc::clone(&outlet) as Arc<dyn Outlet>;
    let mut live = replay.go_live(&backup, &way_out);
    let issued: BTreeSet<u64> = outlet.submitted.lock().unwrap().iter().copied().collect();
    assert_eq!(issued, outstanding);
    let events = outlet.start(DEVICE);
    let (passed, checked) = unbounded();
    let completed = Arc::new(Mutex::new(BTreeSet::new()));
    let seen = Arc::clone(&completed);
    let watch = std::thread::spawn(move || {
        while let Ok(event) = events.recv() {
            if let Event::DiskCompletion { request, status, .. } = &event {
                assert_eq!(*status, BlockStatus::Ok.byte(), "request {request}");
                seen.lock().unwrap().insert(*request);
            }
            if passed.send(event).is_err() {
                return;
            }
        }
    });
    assert!(run(&mut live, &mut backup, &checked, |_| false));
    drop((live, way_out));
    let (mismatches, failed, _) = outlet.report();
    assert_eq!((mismatches, failed), (0, 0));
    assert!(completed.lock().unwrap().is_superset(&outstanding));
    drop(outlet);
    watch.join().unwrap();
}
