//! The back half of a disk on real files, with `io_uring` and with threads: the same tests for both.

use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, mpsc};
use std::time::Duration;

use nix::errno::Errno;
use tempfile::{NamedTempFile, TempDir};
use virtio_devices::block::back::{
    BlockBack, BlockBackError, BlockOptions, EngineKind, Faults, Step, StepKind, Verdict,
};
use virtio_devices::{BlockCompletion, BlockOp, BlockRequest, BlockStatus};

const SECTOR: usize = 512;
const KINDS: [EngineKind; 2] = [EngineKind::IoUring, EngineKind::Threads];

/// Meddles as a test wants.
struct Meddler {
    before: Box<dyn Fn(Step) -> Verdict + Send + Sync>,
    after: Box<dyn Fn(Step) + Send + Sync>,
}

impl Faults for Meddler {
    fn before(&self, step: Step) -> Verdict {
        (self.before)(step)
    }

    fn after(&self, step: Step) {
        (self.after)(step);
    }
}

fn before(f: impl Fn(Step) -> Verdict + Send + Sync + 'static) -> Option<Arc<dyn Faults>> {
    Some(Arc::new(Meddler { before: Box::new(f), after: Box::new(|_| ()) }))
}

fn options(path: &Path, kind: EngineKind) -> BlockOptions {
    BlockOptions { io_uring: kind == EngineKind::IoUring, ..BlockOptions::new(path) }
}

fn image(sectors: usize) -> NamedTempFile {
    let file = NamedTempFile::new().unwrap();
    file.as_file().set_len((sectors * SECTOR) as u64).unwrap();
    file
}

fn write(sector: u64, byte: u8, sectors: usize) -> BlockOp {
    BlockOp::Write { sector, data: Arc::from(vec![byte; sectors * SECTOR]) }
}

fn read(sector: u64, sectors: usize) -> BlockOp {
    BlockOp::Read { sector, len: (sectors * SECTOR) as u32 }
}

/// A disk that runs, and what it has completed.
struct Disk {
    back: BlockBack,
    done: mpsc::Receiver<BlockCompletion>,
    next: u64,
}

impl Disk {
    fn start(options: &BlockOptions) -> Self {
        Self::start_with(options, Vec::new())
    }

    /// `early` is submitted before the start.
    fn start_with(options: &BlockOptions, early: Vec<BlockOp>) -> Self {
        let back = BlockBack::open_with(options).unwrap();
        let (sender, done) = mpsc::channel();
        let mut disk = Self { back, done, next: 0 };
        for op in early {
            disk.submit(op);
        }
        disk.back.start(Box::new(move |completion| drop(sender.send(completion)))).unwrap();
        let wanted = if options.io_uring { EngineKind::IoUring } else { EngineKind::Threads };
        let engine = disk.back.engine().unwrap();
        if engine != wanted {
            eprintln!("SKIPPED on io_uring: the kernel has none for us, threads are tested");
        }
        disk
    }

    fn submit(&mut self, op: BlockOp) -> u64 {
        let id = self.next;
        self.next += 1;
        self.back.submit(BlockRequest { id, op });
        id
    }

    fn run(&mut self, op: BlockOp) -> BlockCompletion {
        let id = self.submit(op);
        let completion = self.done.recv().unwrap();
        assert_eq!(completion.id, id);
        completion
    }

    fn ok(&mut self, op: BlockOp) -> Vec<u8> {
        let completion = self.run(op);
        assert_eq!(completion.status, BlockStatus::Ok);
        completion.data
    }

    fn failed(&mut self, op: BlockOp) {
        let completion = self.run(op);
        assert_eq!((completion.status, completion.data), (BlockStatus::IoError, Vec::new()));
    }
}

fn content(file: &NamedTempFile) -> Vec<u8> {
    std::fs::read(file.path()).unwrap()
}

fn every_operation(options: &BlockOptions, file: &NamedTempFile) {
    let mut disk = Disk::start(options);
    assert_eq!(disk.back.sectors(), 64);
    disk.ok(write(3, 0xab, 2));
    disk.ok(BlockOp::Flush);
    let expected = [vec![0; 512], vec![0xab; 1024], vec![0; 512]].concat();
    assert_eq!(disk.ok(read(2, 4)), expected);
    disk.ok(BlockOp::WriteZeroes { sector: 3, sectors: 1, unmap: false });
    disk.ok(BlockOp::Discard { sector: 4, sectors: 1 });
    disk.ok(write(5, 0xcd, 1));
    disk.ok(BlockOp::WriteZeroes { sector: 5, sectors: 1, unmap: true });
    let data = disk.ok(read(3, 3));
    assert_eq!(data[..512], [0; 512]);
    assert_eq!(data[1024..], [0; 512]);
    disk.ok(write(0, 7, 64));
    disk.back.stop();
    assert_eq!(content(file), vec![7; 64 * 512], "the size never changes");
}

#[test]
fn requests_do_what_they_ask_for() {
    for kind in KINDS {
        let file = image(64);
        every_operation(&options(file.path(), kind), &file);
    }
}

#[test]
fn the_page_cache_can_be_bypassed() {
    for kind in KINDS {
        let file = image(64);
        let options = BlockOptions { direct: true, ..options(file.path(), kind) };
        match BlockBack::open_with(&options) {
            Err(error @ BlockBackError::Direct { .. }) => {
                eprintln!("SKIPPED: the file system of temporary files refuses O_DIRECT: {error}");
            }
            opened => {
                opened.unwrap();
                every_operation(&options, &file);
            }
        }
    }
}

#[test]
fn many_requests_are_under_way_at_once() {
    for kind in KINDS {
        let file = image(64);
        let (under_way, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let (now, max, ended) = (Arc::clone(&under_way), Arc::clone(&most), Arc::clone(&under_way));
        let faults = Meddler {
            before: Box::new(move |_| {
                max.fetch_max(now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                Verdict::Go
            }),
            after: Box::new(move |_| {
                ended.fetch_sub(1, Ordering::SeqCst);
            }),
        };
        let options = BlockOptions { faults: Some(Arc::new(faults)), ..options(file.path(), kind) };
        let ops = (0..8).map(|n| write(n * 8, n as u8 + 1, 8)).collect();
        let disk = Disk::start_with(&options, ops);
        let mut ids: Vec<_> = (0..8).map(|_| disk.done.recv().unwrap().id).collect();
        ids.sort_unstable();
        assert_eq!(ids, [0, 1, 2, 3, 4, 5, 6, 7]);
        assert_eq!(most.load(Ordering::SeqCst), 8, "{kind:?}");
        let expected: Vec<u8> = (1..=8).flat_map(|byte| vec![byte; 8 * SECTOR]).collect();
        assert_eq!(content(&file), expected);
    }
}

/// A small generator with a seed.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

/// Regions that do not touch, each with one request at a time, as the front half would have it.
#[test]
fn random_requests_with_short_transfers_match_a_model() {
    const REGIONS: u64 = 24;
    const SECTORS: u64 = 16;
    for kind in KINDS {
        let mut random = Random(0x9e37_79b9_7f4a_7c15);
        let file = image((REGIONS * SECTORS) as usize);
        let count = AtomicU32::new(0);
        let faults = before(move |step| match count.fetch_add(1, Ordering::Relaxed) % 5 {
            0 => Verdict::AtMost((step.len / 2).max(1) as usize),
            1 => Verdict::Fail(Errno::EINTR),
            2 => Verdict::Fail(Errno::EAGAIN),
            _ => Verdict::Go,
        });
        let mut disk = Disk::start(&BlockOptions { faults, ..options(file.path(), kind) });
        let mut model = vec![0; (REGIONS * SECTORS) as usize * SECTOR];
        let mut begin = |disk: &mut Disk, model: &mut [u8], region: u64| -> (u64, Vec<u8>) {
            let (sector, sectors) = (region * SECTORS + random.below(8), 1 + random.below(8));
            let range = sector as usize * SECTOR..(sector + sectors) as usize * SECTOR;
            let (op, expected) = match random.below(8) {
                0..4 => (read(sector, sectors as usize), model[range].to_vec()),
                4 => {
                    model[range].fill(0);
                    (BlockOp::WriteZeroes { sector, sectors, unmap: true }, Vec::new())
                }
                5 => (BlockOp::Flush, Vec::new()),
                _ => {
                    let byte = random.below(256) as u8;
                    model[range].fill(byte);
                    (write(sector, byte, sectors as usize), Vec::new())
                }
            };
            (disk.submit(op), expected)
        };
        let mut under_way = HashMap::new();
        for region in 0..REGIONS {
            let (id, expected) = begin(&mut disk, &mut model, region);
            under_way.insert(id, (region, expected));
        }
        for round in 0..2000 {
            let done = disk.done.recv().unwrap();
            let (region, expected) = under_way.remove(&done.id).unwrap();
            assert_eq!((done.status, done.data), (BlockStatus::Ok, expected), "{kind:?} {round}");
            let (id, expected) = begin(&mut disk, &mut model, region);
            under_way.insert(id, (region, expected));
        }
        disk.back.stop();
        assert!(content(&file) == model, "{kind:?}");
    }
}

#[test]
fn errors_of_the_host_reach_the_guest_as_io_errors_of_that_request() {
    for kind in KINDS {
        let file = image(64);
        let faults = before(|step| match (step.kind, step.offset / 512) {
            (StepKind::Write, 8) => Verdict::Fail(Errno::ENOSPC),
            (StepKind::Read, 16) => Verdict::Fail(Errno::EIO),
            (StepKind::Sync, _) => Verdict::Fail(Errno::EIO),
            _ => Verdict::Go,
        });
        let mut disk = Disk::start(&BlockOptions { faults, ..options(file.path(), kind) });
        disk.ok(write(0, 1, 8));
        disk.failed(write(8, 1, 8));
        disk.failed(read(16, 1));
        disk.failed(BlockOp::Flush);
        disk.failed(read(u64::MAX, 1));
        assert_eq!(disk.ok(read(0, 8)), [1; 8 * SECTOR]);

        let mut read_only =
            Disk::start(&BlockOptions { read_only: true, ..options(file.path(), kind) });
        read_only.failed(write(0, 9, 1));
        assert_eq!(read_only.ok(read(0, 1)), [1; SECTOR]);
    }
}

#[test]
fn an_image_cut_short_underneath_gives_an_error() {
    for kind in KINDS {
        let file = image(64);
        let mut disk = Disk::start(&options(file.path(), kind));
        assert_eq!(disk.ok(read(60, 4)), [0; 4 * SECTOR]);
        file.as_file().set_len(62 * 512).unwrap();
        disk.failed(read(60, 4));
        assert_eq!(disk.ok(read(60, 2)), [0; 2 * SECTOR]);
    }
}

/// A file system of one mebibyte.
struct SmallHost(TempDir);

impl SmallHost {
    fn mount() -> Result<Self, String> {
        let dir = tempfile::tempdir().unwrap();
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=1m", "tmpfs"])
            .arg(dir.path())
            .output()
            .map_err(|error| error.to_string())?;
        if !mounted.status.success() {
            return Err(String::from_utf8_lossy(&mounted.stderr).into_owned());
        }
        Ok(Self(dir))
    }
}

impl Drop for SmallHost {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.0.path()).status();
    }
}

#[test]
fn a_full_host_gives_errors_and_goes_on_when_there_is_room() {
    let host = match SmallHost::mount() {
        Ok(host) => host,
        Err(error) => {
            eprintln!("SKIPPED: it needs to mount a tmpfs, which takes root: {error}");
            return;
        }
    };
    for kind in KINDS {
        let path = host.0.path().join("sparse.img");
        File::create(&path).unwrap().set_len(8 << 20).unwrap();
        let mut disk = Disk::start(&options(&path, kind));
        let mut full = false;
        for n in 0..16 {
            full |= disk.run(write(n * 256, 3, 256)).status == BlockStatus::IoError;
        }
        assert!(full, "two mebibytes went into one");
        assert_eq!(disk.ok(read(0, 256)), vec![3; 256 * SECTOR]);
        disk.ok(BlockOp::Discard { sector: 0, sectors: 16 * 256 });
        disk.ok(write(12 * 256, 4, 256));
        assert_eq!(disk.ok(read(12 * 256, 256)), vec![4; 256 * SECTOR]);
        // This file system knows no zeroing but by writing.
        disk.ok(BlockOp::WriteZeroes { sector: 12 * 256 + 1, sectors: 254, unmap: false });
        let data = disk.ok(read(12 * 256, 256));
        assert!(data[SECTOR..255 * SECTOR].iter().all(|&byte| byte == 0));
        assert!(data[255 * SECTOR..].iter().all(|&byte| byte == 4));
        drop(disk);
        std::fs::remove_file(&path).unwrap();
    }
}

/// Something that blocks those who pass until it is opened, and tells when somebody has come.
#[derive(Default)]
struct Gate {
    state: Mutex<(usize, bool)>,
    changed: Condvar,
}

impl Gate {
    fn pass(&self) {
        let mut state = self.state.lock().unwrap();
        state.0 += 1;
        self.changed.notify_all();
        drop(self.changed.wait_while(state, |state| !state.1).unwrap());
    }

    fn wait_for_somebody(&self) {
        let state = self.state.lock().unwrap();
        drop(self.changed.wait_while(state, |state| state.0 == 0).unwrap());
    }

    fn open(&self) {
        self.state.lock().unwrap().1 = true;
        self.changed.notify_all();
    }
}

#[test]
fn closing_waits_for_all_that_is_under_way_and_lets_nothing_begin() {
    for kind in KINDS {
        let file = image(64);
        let gate = Arc::new(Gate::default());
        let passage = Arc::clone(&gate);
        let faults =
            Meddler { before: Box::new(|_| Verdict::Go), after: Box::new(move |_| passage.pass()) };
        let options = BlockOptions { faults: Some(Arc::new(faults)), ..options(file.path(), kind) };
        let mut disk = Disk::start_with(&options, (0..6).map(|n| write(n * 8, 1, 8)).collect());
        gate.wait_for_somebody();
        let valve = disk.back.valve();
        let (closed, is_closed) = mpsc::channel();
        let closer = std::thread::spawn({
            let valve = Arc::clone(&valve);
            move || {
                valve.close();
                closed.send(()).unwrap();
            }
        });
        while valve.admits() {
            std::thread::yield_now();
        }
        disk.submit(write(48, 2, 8));
        assert!(is_closed.try_recv().is_err(), "requests are under way");
        gate.open();
        is_closed.recv().unwrap();
        closer.join().unwrap();
        let seen = content(&file);
        // Anything begun after the close would change the image or complete.
        let early: Vec<_> = disk.done.try_iter().collect();
        assert!(early.iter().all(|done| done.id < 6 && done.status == BlockStatus::Ok));
        assert_eq!(seen[48 * SECTOR..56 * SECTOR], [0; 8 * SECTOR]);
        assert_eq!(content(&file), seen);
        valve.open();
        let mut left = 7 - early.len();
        while left > 0 {
            disk.done.recv().unwrap();
            left -= 1;
        }
        assert_eq!(content(&file)[..56 * SECTOR], [vec![1; 48 * 512], vec![2; 8 * 512]].concat());
    }
}

#[test]
fn stop_finishes_the_queue_and_halt_forgets_it() {
    for kind in KINDS {
        let file = image(8);
        let options = options(file.path(), kind);
        Disk::start_with(&options, vec![write(0, 7, 8)]).back.stop();
        assert_eq!(content(&file), [7; 8 * SECTOR]);

        let back = BlockBack::open_with(&options).unwrap();
        back.submit(BlockRequest { id: 0, op: write(0, 8, 8) });
        back.halt();
        back.start(Box::new(|completion| panic!("{completion:?}"))).unwrap();
        back.submit(BlockRequest { id: 1, op: write(0, 9, 8) });
        back.valve().open();
        back.stop();
        assert_eq!(content(&file), [7; 8 * SECTOR]);
    }
}

#[test]
fn without_a_lease_nothing_is_written() {
    for kind in KINDS {
        let file = image(8);
        let mut disk = Disk::start(&options(file.path(), kind));
        let valve = disk.back.valve();
        valve.set_lease(Some(Duration::from_nanos(1)));
        disk.submit(write(0, 1, 8));
        // Time for a disk that does not heed its lease; one that does has all the time there is.
        assert!(disk.done.recv_timeout(Duration::from_millis(50)).is_err());
        assert_eq!(content(&file), [0; 8 * SECTOR]);
        valve.set_lease(Some(Duration::MAX));
        assert_eq!(disk.done.recv().unwrap().id, 0);
        valve.set_lease(Some(Duration::from_nanos(1)));
        disk.submit(write(0, 2, 8));
        disk.back.stop();
        assert_eq!(content(&file), [1; 8 * SECTOR]);
    }
}

/// A primary is frozen with a write in its queue, past every decision but the last. Its lease runs out, its successor
/// writes to the same place, and it wakes.
#[test]
fn a_write_in_flight_when_the_process_froze_is_not_written_after_the_lease() {
    for kind in KINDS {
        let file = image(16);
        let gate = Arc::new(Gate::default());
        let frozen = Arc::clone(&gate);
        let faults = before(move |step| {
            if step.kind == StepKind::Write && step.offset == 0 {
                frozen.pass();
            }
            Verdict::Go
        });
        let mut disk = Disk::start(&BlockOptions { faults, ..options(file.path(), kind) });
        let valve = disk.back.valve();
        valve.set_lease(Some(Duration::MAX));
        disk.submit(write(0, 0xaa, 8));
        gate.wait_for_somebody();
        valve.set_lease(Some(Duration::from_nanos(1)));
        file.as_file().write_all_at(&[0x55; 8 * SECTOR], 0).unwrap();
        gate.open();
        disk.submit(write(8, 0xaa, 8));
        disk.back.halt();
        disk.back.stop();
        assert!(disk.done.recv().is_err(), "nothing is completed");
        let expected = [vec![0x55; 8 * SECTOR], vec![0; 8 * SECTOR]].concat();
        assert_eq!(content(&file), expected, "{kind:?}");
    }
}

/// The lease runs out between two pieces of one write.
#[test]
fn a_write_half_done_when_the_lease_ended_stays_half_done() {
    for kind in KINDS {
        let file = image(8);
        let (sender, valve) = mpsc::channel();
        let valve = Mutex::new(valve);
        let faults = Meddler {
            before: Box::new(|_| Verdict::AtMost(SECTOR)),
            after: Box::new(move |_| {
                let valve: Arc<virtio_devices::block::back::Valve> =
                    valve.lock().unwrap().recv().unwrap();
                valve.set_lease(Some(Duration::from_nanos(1)));
            }),
        };
        let options = BlockOptions { faults: Some(Arc::new(faults)), ..options(file.path(), kind) };
        let mut disk = Disk::start(&options);
        disk.submit(write(0, 1, 8));
        sender.send(disk.back.valve()).unwrap();
        assert!(disk.done.recv_timeout(Duration::from_millis(50)).is_err());
        // Nothing is under way, so that a close has nothing to wait for.
        disk.back.valve().close();
        disk.back.stop();
        assert_eq!(content(&file), [vec![1; SECTOR], vec![0; 7 * SECTOR]].concat(), "{kind:?}");
    }
}

#[test]
fn written_through_a_write_completes_when_a_sync_begun_after_it_has_ended() {
    for kind in KINDS {
        let file = image(256);
        let steps = Arc::new(Mutex::new(VecDeque::new()));
        let (begun, ended) = (Arc::clone(&steps), Arc::clone(&steps));
        let faults = Meddler {
            before: Box::new(move |step| {
                begun.lock().unwrap().push_back(("begin", step));
                Verdict::Go
            }),
            after: Box::new(move |step| ended.lock().unwrap().push_back(("end", step))),
        };
        let options = BlockOptions { faults: Some(Arc::new(faults)), ..options(file.path(), kind) };
        let mut disk = Disk::start(&options);
        disk.ok(write(0, 1, 1));
        assert!(steps.lock().unwrap().iter().all(|(_, step)| step.kind != StepKind::Sync));
        disk.back.set_write_through(true).unwrap();
        let last = steps.lock().unwrap().back().copied().unwrap();
        assert_eq!((last.0, last.1.kind), ("end", StepKind::Sync), "what came before is stable");
        steps.lock().unwrap().clear();
        for n in 0..32 {
            disk.submit(write(n * 8, 2, 8));
        }
        let mut completed = 0;
        while completed < 32 {
            let done = disk.done.recv().unwrap();
            completed += 1;
            let steps = steps.lock().unwrap();
            let written = |what: &(&str, Step)| {
                what.0 == "end"
                    && what.1.kind == StepKind::Write
                    && what.1.offset == done.id.wrapping_sub(1) * 4096
            };
            let mut later = steps.iter().skip_while(|what| !written(what));
            assert!(later.any(|what| what.0 == "begin" && what.1.kind == StepKind::Sync));
            assert!(later.any(|what| what.0 == "end" && what.1.kind == StepKind::Sync));
        }
        let syncs = |steps: &VecDeque<(&str, Step)>| {
            steps
                .iter()
                .filter(|(what, step)| *what == "end" && step.kind == StepKind::Sync)
                .count()
        };
        assert!(syncs(&steps.lock().unwrap()) <= 32, "syncs are shared");
        disk.back.set_write_through(false).unwrap();
        steps.lock().unwrap().clear();
        disk.ok(write(0, 3, 1));
        assert_eq!(syncs(&steps.lock().unwrap()), 0);
    }
}

#[test]
fn a_flush_syncs_what_was_completed_since_the_last_sync_and_only_that() {
    for kind in KINDS {
        let file = image(8);
        let (syncs, fail) = (Arc::new(AtomicU32::new(0)), Arc::new(AtomicU32::new(0)));
        let (counted, failing) = (Arc::clone(&syncs), Arc::clone(&fail));
        let faults = before(move |step| {
            if step.kind == StepKind::Sync {
                counted.fetch_add(1, Ordering::SeqCst);
                if failing.swap(0, Ordering::SeqCst) > 0 {
                    // The host has not begun it, so that it hides nothing.
                    return Verdict::Fail(Errno::ECANCELED);
                }
            }
            Verdict::Go
        });
        let mut disk = Disk::start(&BlockOptions { faults, ..options(file.path(), kind) });
        let synced = |times: u32| assert_eq!(syncs.swap(0, Ordering::SeqCst), times, "{kind:?}");
        disk.ok(BlockOp::Flush);
        synced(1); // who wrote to the image before is not known
        disk.ok(read(0, 1));
        disk.ok(BlockOp::Flush);
        synced(0);
        disk.ok(write(0, 1, 8));
        fail.store(1, Ordering::SeqCst);
        disk.failed(BlockOp::Flush);
        synced(1);
        disk.ok(BlockOp::Flush);
        synced(1);
        disk.back.set_write_through(true).unwrap();
        disk.ok(write(0, 2, 8));
        synced(1);
        disk.ok(BlockOp::Flush);
        synced(0);
        disk.back.set_write_through(false).unwrap();
        disk.ok(BlockOp::Discard { sector: 0, sectors: 1 });
        disk.ok(BlockOp::Flush);
        synced(1);
    }
}

/// The storage loses data once: the host says so once, and takes what was lost for stable from then on.
#[derive(Default)]
struct LosesOnce {
    writes: AtomicU32,
    syncs: AtomicU32,
}

impl LosesOnce {
    fn steps(&self) -> (u32, u32) {
        (self.writes.load(Ordering::SeqCst), self.syncs.load(Ordering::SeqCst))
    }
}

impl Faults for LosesOnce {
    fn before(&self, step: Step) -> Verdict {
        match step.kind {
            StepKind::Write => drop(self.writes.fetch_add(1, Ordering::SeqCst)),
            StepKind::Sync if self.syncs.fetch_add(1, Ordering::SeqCst) == 0 => {
                return Verdict::Fail(Errno::EIO);
            }
            _ => {}
        }
        Verdict::Go
    }
}

/// An image whose storage loses data once, and how to open it.
fn losing(kind: EngineKind) -> (NamedTempFile, Arc<LosesOnce>, BlockOptions) {
    let (file, loses) = (image(64), Arc::new(LosesOnce::default()));
    let faults = Some(Arc::clone(&loses) as Arc<dyn Faults>);
    let options = BlockOptions { faults, ..options(file.path(), kind) };
    (file, loses, options)
}

#[test]
fn a_flush_that_failed_fails_until_the_image_is_opened_anew() {
    for kind in KINDS {
        let (_file, loses, options) = losing(kind);
        let mut disk = Disk::start(&options);
        disk.ok(write(0, 1, 8));
        disk.failed(BlockOp::Flush);
        disk.failed(BlockOp::Flush);
        disk.ok(write(0, 2, 8));
        assert_eq!(disk.ok(read(0, 8)), [2; 8 * SECTOR]);
        disk.failed(BlockOp::Flush);
        let error = disk.back.set_write_through(true).unwrap_err();
        assert!(matches!(error, BlockBackError::Sync { .. }), "{error}");
        let error = disk.back.copy().sync().unwrap_err();
        assert_eq!(error.raw_os_error(), Some(Errno::EIO as i32));
        assert_eq!(loses.steps(), (2, 1), "the host is not asked again");
        disk.back.stop();
        Disk::start(&options).ok(BlockOp::Flush);
    }
}

#[test]
fn what_could_not_be_made_stable_when_write_through_began_fails_the_next_flush() {
    for kind in KINDS {
        let (_file, loses, options) = losing(kind);
        let mut disk = Disk::start(&options);
        disk.ok(write(0, 1, 8));
        disk.back.set_write_through(true).unwrap_err();
        disk.back.set_write_through(false).unwrap();
        disk.failed(BlockOp::Flush);
        assert_eq!(loses.steps(), (1, 1));
    }
}

#[test]
fn written_through_every_write_fails_after_a_sync_that_failed() {
    for kind in KINDS {
        let (_file, loses, options) = losing(kind);
        let back = BlockBack::open_with(&options).unwrap();
        // Before the start nothing is completed that would have to be made stable.
        back.set_write_through(true).unwrap();
        let (sender, done) = mpsc::channel();
        back.start(Box::new(move |completion| drop(sender.send(completion)))).unwrap();
        let mut disk = Disk { back, done, next: 0 };
        for n in 0..4 {
            disk.submit(write(n * 8, 1, 8));
        }
        for _ in 0..4 {
            assert_eq!(disk.done.recv().unwrap().status, BlockStatus::IoError, "{kind:?}");
        }
        disk.failed(write(32, 1, 8));
        disk.failed(BlockOp::Flush);
        assert_eq!(loses.steps(), (5, 1));
        // A write that need not be stable says nothing of that.
        disk.back.set_write_through(false).unwrap();
        disk.ok(write(40, 1, 8));
        disk.failed(BlockOp::Flush);
    }
}

/// Takes all the tries there are, for both kinds at once.
#[test]
fn patience_does_not_make_a_failed_sync_good() {
    let patient = |kind| {
        let (file, loses, options) = losing(kind);
        let back = BlockBack::open_with(&options).unwrap();
        back.set_write_through(true).unwrap();
        let (sender, done) = mpsc::channel();
        for (id, op) in [(0, write(0, 1, 8)), (1, BlockOp::Flush)] {
            back.submit(BlockRequest { id, op });
        }
        back.start(Box::new(move |completion| drop(sender.send(completion)))).unwrap();
        back.submit_patiently(BlockRequest { id: 2, op: BlockOp::Flush });
        for _ in 0..3 {
            assert_eq!(done.recv().unwrap().status, BlockStatus::IoError, "{kind:?}");
        }
        assert_eq!(loses.steps(), (1, 1), "{kind:?}");
        drop(file);
    };
    std::thread::scope(|scope| {
        for kind in KINDS {
            scope.spawn(move || patient(kind));
        }
    });
}

/// A block device that has less room than it says; its writes fail when the page cache is written back.
struct OverbookedDevice {
    path: String,
    _host: SmallHost,
}

impl OverbookedDevice {
    fn attach() -> Result<Self, String> {
        let host = SmallHost::mount()?;
        let sparse = host.0.path().join("sparse.img");
        File::create(&sparse).unwrap().set_len(8 << 20).unwrap();
        let attached = Command::new("losetup").args(["--find", "--show"]).arg(&sparse).output();
        let attached = attached.map_err(|error| error.to_string())?;
        if !attached.status.success() {
            return Err(String::from_utf8_lossy(&attached.stderr).into_owned());
        }
        let path = String::from_utf8_lossy(&attached.stdout).trim().to_owned();
        Ok(Self { path, _host: host })
    }
}

impl Drop for OverbookedDevice {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["--detach", &self.path]).status();
    }
}

#[test]
fn data_that_the_host_lost_once_stays_lost() {
    for kind in KINDS {
        let device = match OverbookedDevice::attach() {
            Ok(device) => device,
            Err(error) => {
                eprintln!("SKIPPED: it needs to mount a tmpfs and attach a loop device: {error}");
                return;
            }
        };
        let mut disk = Disk::start(&options(Path::new(&device.path), kind));
        for n in 0..16 {
            disk.ok(write(n * 256, 3, 256));
        }
        disk.failed(BlockOp::Flush);
        disk.failed(BlockOp::Flush);
        drop(disk);
        // Opened anew, the image is what the storage has: two mebibytes did not go into one.
        let mut disk = Disk::start(&options(Path::new(&device.path), kind));
        let lost = (0..16).any(|n| disk.run(read(n * 256, 256)).data != [3; 256 * SECTOR]);
        assert!(lost, "{kind:?}");
        drop(disk);
    }
}

#[test]
fn what_a_killed_process_could_not_write_is_not_copied_from_the_hosts_memory() {
    let device = match OverbookedDevice::attach() {
        Ok(device) => device,
        Err(error) => {
            eprintln!("SKIPPED: it needs to mount a tmpfs and attach a loop device: {error}");
            return;
        }
    };
    // Unlike that of a file, a device's page cache goes when nobody has it open.
    let _open = File::open(&device.path).unwrap();
    let bytes = vec![3; 2 << 20];
    let mut killed = File::options().write(true).open(&device.path).unwrap();
    killed.write_all(&bytes).unwrap();
    killed.sync_data().unwrap_err();
    drop(killed);
    let back = BlockBack::open(Path::new(&device.path), false).unwrap();
    let mut copy = back.copy();
    let mut shown =
        || [0, 1 << 20].map(|offset| copy.read(offset, 1 << 20).unwrap() == &bytes[..1 << 20]);
    assert_eq!(shown(), [true, true], "the host remembers");
    back.copy().forget_cached();
    assert_ne!(shown(), [true, true]);
}

#[test]
fn requests_from_before_the_start_are_tried_again_before_the_guest_is_told() {
    for kind in KINDS {
        let file = image(8);
        let failures = Arc::new(AtomicU32::new(3));
        let left = Arc::clone(&failures);
        let faults = before(move |_| {
            let take = |left: u32| left.checked_sub(1);
            match left.try_update(Ordering::SeqCst, Ordering::SeqCst, take) {
                Ok(_) => Verdict::Fail(Errno::EIO),
                Err(_) => Verdict::Go,
            }
        });
        let options = BlockOptions { faults, ..options(file.path(), kind) };
        let mut disk = Disk::start_with(&options, vec![write(0, 1, 8)]);
        assert_eq!(disk.done.recv().unwrap().status, BlockStatus::Ok);
        assert_eq!(content(&file), [1; 8 * SECTOR]);
        failures.store(1, Ordering::SeqCst);
        disk.failed(write(0, 2, 8));
        disk.ok(write(0, 3, 8));
    }
}

#[test]
fn an_image_is_one_vms_alone_and_readers_share() {
    let file = image(8);
    let writer = BlockBack::open(file.path(), false).unwrap();
    writer.lock().unwrap();
    let second = BlockBack::open(file.path(), false).unwrap();
    let error = second.lock().unwrap_err();
    assert!(matches!(error, BlockBackError::InUse { .. }), "{error}");
    let text = error.to_string();
    assert!(text.contains(file.path().to_str().unwrap()) && text.contains("in use by another VM"));
    let reader = BlockBack::open(file.path(), true).unwrap();
    assert!(matches!(reader.lock(), Err(BlockBackError::InUse { read_only: true, .. })));
    drop(writer);
    reader.lock().unwrap();
    BlockBack::open(file.path(), true).unwrap().lock().unwrap();
    assert!(second.lock().is_err(), "the reader is still there");
    drop(reader);
    second.lock().unwrap();
    let whole = BlockOptions { lock_whole_file: true, ..options(file.path(), EngineKind::Threads) };
    assert!(BlockBack::open_with(&whole).unwrap().lock().is_err());
}

/// As a backup that goes live while its predecessor is frozen, fenced, and still there.
#[test]
fn a_side_that_goes_live_works_without_the_lock_and_takes_it_when_it_is_free() {
    let file = image(8);
    let mut predecessor = Disk::start(&options(file.path(), EngineKind::Threads));
    predecessor.back.lock().unwrap();
    predecessor.ok(write(0, 1, 1));
    let mut live = Disk::start(&options(file.path(), EngineKind::IoUring));
    live.ok(write(0, 2, 1));
    assert!(!live.back.locked());
    // It wakes, loses its claim and lets go.
    predecessor.back.halt();
    while !live.back.locked() {
        std::thread::yield_now();
    }
    assert!(!predecessor.back.locked());
    assert!(BlockBack::open(file.path(), false).unwrap().lock().is_err());
}

#[test]
fn an_image_of_odd_size_is_refused_with_advice() {
    let file = NamedTempFile::new().unwrap();
    file.as_file().set_len(1000).unwrap();
    let error = BlockBack::open(file.path(), false).unwrap_err();
    assert!(matches!(error, BlockBackError::OddSize { bytes: 1000, .. }), "{error}");
    assert!(error.to_string().contains("truncate"), "{error}");
}

#[test]
fn what_is_no_image_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let missing = BlockBack::open(&dir.path().join("none"), false).unwrap_err();
    assert!(matches!(missing, BlockBackError::Open { .. }), "{missing}");
    let directory = BlockBack::open(dir.path(), true).unwrap_err();
    assert!(matches!(directory, BlockBackError::Kind { .. }), "{directory}");
    let device = BlockBack::open(Path::new("/dev/null"), false).unwrap_err();
    assert!(matches!(device, BlockBackError::Kind { .. }), "{device}");
    let pipe = dir.path().join("pipe");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
    for read_only in [true, false] {
        // Nobody waits for somebody to write to it.
        let error = BlockBack::open(&pipe, read_only).unwrap_err();
        assert!(matches!(error, BlockBackError::Kind { .. }), "{error}");
    }
}
