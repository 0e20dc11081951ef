//! The host half of a disk: a raw image file or block device.
//!
//! One thread executes requests in the order they were submitted. The front half hands out together
//! only what may be done in any order, so one after the other is always right. The image's size is a
//! multiple of a sector, as the guest knows no smaller unit.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::time::{ClockId, clock_gettime};

use super::latency::{Latencies, Timing};
use crate::effect::{BlockCompletion, BlockOp, BlockRequest, BlockStatus, SECTOR_SIZE};

/// Bytes written at a time where a range of zeroes has to be written out.
const ZEROES: usize = 128 << 10;

/// Where completions go; called on the disk's thread.
pub type CompletionSink = Box<dyn Fn(BlockCompletion) + Send>;

/// What can go wrong in opening a disk.
#[derive(Debug, thiserror::Error)]
pub enum BlockBackError {
    /// The image cannot be opened.
    #[error("cannot open disk image {} for {}", path.display(), if *read_only { "reading" } else { "reading and writing" })]
    Open {
        /// The image.
        path: PathBuf,
        /// Whether only for reading.
        read_only: bool,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// It is neither a file nor a block device.
    #[error("disk image {} is neither a regular file nor a block device", path.display())]
    Kind {
        /// The image.
        path: PathBuf,
    },
    /// Its size cannot be found out.
    #[error("cannot find out the size of disk image {}", path.display())]
    Size {
        /// The image.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// Its size is not a whole number of sectors.
    #[error(
        "disk image {} has {bytes} bytes, which is not a multiple of 512; \
         round it up with 'truncate --size=%512'", path.display()
    )]
    OddSize {
        /// The image.
        path: PathBuf,
        /// Its size.
        bytes: u64,
    },
    /// No thread for it.
    #[error("cannot start the thread of disk image {}", path.display())]
    Thread {
        /// The image.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

/// An open disk image.
#[derive(Debug)]
pub struct BlockBack {
    image: Arc<Image>,
    sectors: u64,
    sender: mpsc::Sender<Submitted>,
    /// Until started.
    receiver: Mutex<Option<mpsc::Receiver<Submitted>>>,
    thread: OnceLock<JoinHandle<()>>,
    latencies: Arc<Latencies>,
}

/// A request on its way to the thread.
#[derive(Debug)]
struct Submitted {
    request: BlockRequest,
    at: Instant,
}

#[derive(Debug)]
struct Image {
    path: PathBuf,
    file: File,
    valve: Arc<Valve>,
    failures: AtomicU32,
}

impl BlockBack {
    /// Opens the image at `path`. Nothing is read or written yet.
    ///
    /// # Errors
    /// If it cannot be opened or is no disk image.
    pub fn open(path: &Path, read_only: bool) -> Result<Self, BlockBackError> {
        let path = path.to_path_buf();
        let mut file = match OpenOptions::new().read(true).write(!read_only).open(&path) {
            Ok(file) => file,
            Err(source) => return Err(BlockBackError::Open { path, read_only, source }),
        };
        let bytes = match size(&mut file) {
            Ok(Some(bytes)) => bytes,
            Ok(None) => return Err(BlockBackError::Kind { path }),
            Err(source) => return Err(BlockBackError::Size { path, source }),
        };
        if !bytes.is_multiple_of(SECTOR_SIZE) {
            return Err(BlockBackError::OddSize { path, bytes });
        }
        let (sender, receiver) = mpsc::channel();
        let (valve, failures) = (Arc::default(), AtomicU32::new(0));
        let image = Arc::new(Image { path, file, valve, failures });
        let sectors = bytes / SECTOR_SIZE;
        Ok(Self {
            image,
            sectors,
            sender,
            receiver: Mutex::new(Some(receiver)),
            thread: OnceLock::new(),
            latencies: Arc::default(),
        })
    }

    /// Size in sectors of 512 bytes.
    #[must_use]
    pub fn sectors(&self) -> u64 {
        self.sectors
    }

    /// Starts the thread that executes requests, those already submitted first. Once only; a second
    /// call does nothing.
    ///
    /// # Errors
    /// If the host has no thread to give.
    pub fn start(&self, complete: CompletionSink) -> Result<(), BlockBackError> {
        let receiver = self.receiver.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(receiver) = receiver else { return Ok(()) };
        let (image, latencies) = (Arc::clone(&self.image), Arc::clone(&self.latencies));
        let work = move || {
            for Submitted { request, at } in receiver {
                if image.valve.enter() {
                    let timing = Timing::begin(&request.op, at);
                    let completion = image.execute(request);
                    image.valve.leave();
                    latencies.finished(timing);
                    complete(completion);
                }
            }
        };
        let spawned = std::thread::Builder::new().name("disk".into()).spawn(work);
        let thread = spawned
            .map_err(|source| BlockBackError::Thread { path: self.image.path.clone(), source })?;
        // Nobody else can have been here: the receiver is given away once.
        let _ = self.thread.set(thread);
        Ok(())
    }

    /// How long requests take, from submission to completion.
    #[must_use]
    pub fn latencies(&self) -> &Latencies {
        &self.latencies
    }

    /// Queues a request. It is executed once the disk is started. Takes no lock.
    pub fn submit(&self, request: BlockRequest) {
        let submitted = Submitted { request, at: Instant::now() };
        // The other end outlives this one until `stop`, which consumes it.
        if self.sender.send(submitted).is_err() {
            log::warn!("a request came for disk {} after its end", self.image.path.display());
        }
    }

    /// From now on begins no request: those queued are forgotten and never completed. For a
    /// machine that must not touch its disks any more.
    pub fn halt(&self) {
        self.image.valve.set(Flow::Halted);
    }

    /// What lets requests through or not; usable from other threads.
    #[must_use]
    pub fn valve(&self) -> Arc<Valve> {
        Arc::clone(&self.image.valve)
    }

    /// Executes what is queued (unless halted), then ends the thread and closes the image.
    pub fn stop(self) {
        drop(self);
    }
}

/// Lets a disk's requests through, one at a time, and only while this side may write.
///
/// A primary may write as long as it holds a lease, which its backup renews. A process that was frozen
/// and wakes after its successor went live finds the lease run out right before the system call, and
/// writes nothing.
#[derive(Debug, Default)]
pub struct Valve {
    state: Mutex<ValveState>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct ValveState {
    flow: Flow,
    /// A request is being executed.
    busy: bool,
    /// Until when requests may begin, by `CLOCK_BOOTTIME`; `None`: for ever.
    lease: Option<Duration>,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Flow {
    #[default]
    Open,
    /// Requests wait.
    Closed,
    /// Requests are forgotten, for good.
    Halted,
}

impl ValveState {
    fn lease_is_over(&self) -> bool {
        let now = || clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(Duration::MAX, Duration::from);
        self.lease.is_some_and(|until| now() >= until)
    }
}

impl Valve {
    /// Begins no request from now on, and returns when the one under way has ended.
    pub fn close(&self) {
        self.set(Flow::Closed);
        let mut state = self.lock();
        while state.busy {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Lets requests through again; those that waited come first.
    pub fn open(&self) {
        self.set(Flow::Open);
    }

    /// Lets no request begin after `until` (`CLOCK_BOOTTIME`, which counts while the host sleeps); `None`
    /// for a side that needs no lease.
    pub fn set_lease(&self, until: Option<Duration>) {
        self.lock().lease = until;
        self.changed.notify_all();
    }

    fn set(&self, flow: Flow) {
        let mut state = self.lock();
        if state.flow != Flow::Halted {
            state.flow = flow;
            self.changed.notify_all();
        }
    }

    /// Waits until a request may begin. False if it is halted.
    fn enter(&self) -> bool {
        let mut state = self.lock();
        while state.flow == Flow::Closed || (state.flow == Flow::Open && state.lease_is_over()) {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.busy = state.flow == Flow::Open;
        state.busy
    }

    fn leave(&self) {
        self.lock().busy = false;
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, ValveState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for BlockBack {
    fn drop(&mut self) {
        // Nobody is left to open a closed valve or to renew a lease; what waits belongs to another host.
        let stuck = {
            let state = self.image.valve.lock();
            state.flow == Flow::Closed || state.lease.is_some()
        };
        if stuck {
            self.halt();
        }
        // The thread ends when its channel is closed and empty.
        let (closed, _) = mpsc::channel();
        self.sender = closed;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("the thread of disk {} panicked", self.image.path.display());
        }
    }
}

impl Image {
    fn execute(&self, request: BlockRequest) -> BlockCompletion {
        let id = request.id;
        match self.perform(&request.op) {
            Ok(data) => BlockCompletion { id, status: BlockStatus::Ok, data },
            Err(error) => {
                // A full disk fails every write; the log must not grow with each.
                let count = self.failures.fetch_add(1, Ordering::Relaxed).wrapping_add(1);
                if count.is_power_of_two() {
                    let (path, what) = (self.path.display(), describe(&request.op));
                    log::warn!("disk {path}: {what} failed ({count} failures so far): {error}");
                }
                BlockCompletion { id, status: BlockStatus::IoError, data: Vec::new() }
            }
        }
    }

    fn perform(&self, op: &BlockOp) -> io::Result<Vec<u8>> {
        match op {
            BlockOp::Read { sector, len } => {
                let mut data = vec![0; *len as usize];
                self.file.read_exact_at(&mut data, byte_offset(*sector)?)?;
                return Ok(data);
            }
            BlockOp::Write { sector, data } => {
                self.file.write_all_at(data, byte_offset(*sector)?)?;
            }
            BlockOp::Flush => self.file.sync_data()?,
            BlockOp::Discard { sector, sectors } => {
                // A hint: where the host cannot follow it, nothing is wrong.
                self.fallocate(FallocateFlags::FALLOC_FL_PUNCH_HOLE, *sector, *sectors)?;
            }
            BlockOp::WriteZeroes { sector, sectors, unmap } => {
                let how = if *unmap {
                    FallocateFlags::FALLOC_FL_PUNCH_HOLE
                } else {
                    FallocateFlags::FALLOC_FL_ZERO_RANGE
                };
                if !self.fallocate(how, *sector, *sectors)? {
                    self.write_zeroes(*sector, *sectors)?;
                }
            }
        }
        Ok(Vec::new())
    }

    /// Whether the host's file system can do it.
    fn fallocate(&self, how: FallocateFlags, sector: u64, sectors: u64) -> io::Result<bool> {
        let offset = signed(byte_offset(sector)?)?;
        let len = signed(byte_offset(sectors)?)?;
        loop {
            match fallocate(&self.file, how | FallocateFlags::FALLOC_FL_KEEP_SIZE, offset, len) {
                Ok(()) => return Ok(true),
                Err(Errno::EINTR) => {}
                Err(Errno::EOPNOTSUPP | Errno::ENOSYS) => return Ok(false),
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn write_zeroes(&self, sector: u64, sectors: u64) -> io::Result<()> {
        let zeroes = vec![0; ZEROES];
        let mut offset = byte_offset(sector)?;
        let mut left = byte_offset(sectors)?;
        while left > 0 {
            let len = left.min(ZEROES as u64);
            self.file.write_all_at(&zeroes[..len as usize], offset)?;
            offset += len;
            left -= len;
        }
        Ok(())
    }
}

/// Size in bytes; `None` if it is no file and no block device.
fn size(file: &mut File) -> io::Result<Option<u64>> {
    use std::os::unix::fs::FileTypeExt;
    let kind = file.metadata()?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Ok(None);
    }
    // A block device's metadata has no size.
    file.seek(SeekFrom::End(0)).map(Some)
}

fn byte_offset(sector: u64) -> io::Result<u64> {
    sector.checked_mul(SECTOR_SIZE).ok_or_else(|| io::ErrorKind::InvalidInput.into())
}

fn signed(value: u64) -> io::Result<i64> {
    i64::try_from(value).map_err(|_| io::ErrorKind::InvalidInput.into())
}

fn describe(op: &BlockOp) -> String {
    match op {
        BlockOp::Read { sector, len } => format!("reading {len} bytes at sector {sector}"),
        BlockOp::Write { sector, data } => {
            format!("writing {} bytes at sector {sector}", data.len())
        }
        BlockOp::Flush => "flushing".into(),
        BlockOp::Discard { sector, sectors } => {
            format!("discarding {sectors} sectors at sector {sector}")
        }
        BlockOp::WriteZeroes { sector, sectors, .. } => {
            format!("zeroing {sectors} sectors at sector {sector}")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(back: &BlockBack, ops: Vec<BlockOp>) -> Vec<BlockCompletion> {
        let (sender, receiver) = mpsc::channel();
        back.start(Box::new(move |completion| sender.send(completion).unwrap())).unwrap();
        let count = ops.len();
        for (id, op) in ops.into_iter().enumerate() {
            back.submit(BlockRequest { id: id as u64, op });
        }
        (0..count).map(|_| receiver.recv().unwrap()).collect()
    }

    fn image(sectors: u64) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(sectors * SECTOR_SIZE).unwrap();
        file
    }

    fn write(sector: u64, byte: u8, sectors: usize) -> BlockOp {
        BlockOp::Write { sector, data: Arc::from(vec![byte; sectors * 512]) }
    }

    #[test]
    fn requests_are_executed_in_order_and_answered_by_id() {
        let file = image(64);
        let back = BlockBack::open(file.path(), false).unwrap();
        assert_eq!(back.sectors(), 64);
        let done = run(
            &back,
            vec![
                write(3, 0xab, 2),
                BlockOp::Flush,
                BlockOp::Read { sector: 2, len: 4 * 512 },
                BlockOp::WriteZeroes { sector: 3, sectors: 1, unmap: false },
                BlockOp::Discard { sector: 4, sectors: 1 },
                write(5, 0xcd, 1),
                BlockOp::WriteZeroes { sector: 5, sectors: 1, unmap: true },
                BlockOp::Read { sector: 3, len: 3 * 512 },
            ],
        );
        for (id, completion) in done.iter().enumerate() {
            assert_eq!((completion.id, completion.status), (id as u64, BlockStatus::Ok));
        }
        let expected = [vec![0; 512], vec![0xab; 1024], vec![0; 512]].concat();
        assert_eq!(done[2].data, expected);
        assert_eq!(done[7].data[..512], [0; 512]);
        assert_eq!(done[7].data[1024..], [0; 512]);
        back.stop();
        assert_eq!(file.as_file().metadata().unwrap().len(), 64 * 512, "the size never changes");
    }

    #[test]
    fn zeroes_can_be_written_out() {
        let file = image(600);
        let back = BlockBack::open(file.path(), false).unwrap();
        back.image.perform(&write(0, 0xff, 600)).unwrap();
        back.image.write_zeroes(1, 598).unwrap();
        let content = std::fs::read(file.path()).unwrap();
        assert!(content[..512].iter().all(|&b| b == 0xff));
        assert!(content[512..599 * 512].iter().all(|&b| b == 0));
        assert!(content[599 * 512..].iter().all(|&b| b == 0xff));
    }

    #[test]
    fn an_image_of_odd_size_is_refused_with_advice() {
        let file = tempfile::NamedTempFile::new().unwrap();
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
    }

    #[test]
    fn host_errors_reach_the_guest_as_io_errors() {
        let file = image(8);
        let read_only = BlockBack::open(file.path(), true).unwrap();
        let done = run(
            &read_only,
            vec![
                write(0, 1, 1),
                BlockOp::Read { sector: 7, len: 1024 },
                BlockOp::Read { sector: u64::MAX, len: 512 },
            ],
        );
        let failed = |c: &BlockCompletion| c.status == BlockStatus::IoError && c.data.is_empty();
        assert!(done.iter().all(failed), "{done:?}");
    }

    #[test]
    fn stop_finishes_the_queue_and_halt_forgets_it() {
        let file = image(8);
        let back = BlockBack::open(file.path(), false).unwrap();
        back.submit(BlockRequest { id: 0, op: write(0, 7, 8) });
        back.start(Box::new(|_| ())).unwrap();
        back.stop();
        assert_eq!(std::fs::read(file.path()).unwrap(), vec![7; 8 * 512]);

        let back = BlockBack::open(file.path(), false).unwrap();
        back.submit(BlockRequest { id: 0, op: write(0, 8, 8) });
        back.halt();
        back.start(Box::new(|completion| panic!("{completion:?}"))).unwrap();
        back.stop();
        assert_eq!(std::fs::read(file.path()).unwrap(), vec![7; 8 * 512]);
    }

    #[test]
    fn a_closed_valve_holds_requests_until_it_opens() {
        let file = image(8);
        let back = BlockBack::open(file.path(), false).unwrap();
        let (sender, done) = mpsc::channel();
        back.start(Box::new(move |completion| sender.send(completion.id).unwrap())).unwrap();
        back.submit(BlockRequest { id: 0, op: write(0, 1, 8) });
        assert_eq!(done.recv().unwrap(), 0);
        let valve = back.valve();
        valve.close();
        back.submit(BlockRequest { id: 1, op: write(0, 2, 8) });
        back.submit(BlockRequest { id: 2, op: write(0, 3, 8) });
        assert_eq!(done.try_recv(), Err(mpsc::TryRecvError::Empty));
        assert_eq!(std::fs::read(file.path()).unwrap(), vec![1; 8 * 512]);
        valve.open();
        assert_eq!((done.recv().unwrap(), done.recv().unwrap()), (1, 2));
        assert_eq!(std::fs::read(file.path()).unwrap(), vec![3; 8 * 512]);
    }

    #[test]
    fn without_a_lease_nothing_is_written() {
        let file = image(8);
        let back = BlockBack::open(file.path(), false).unwrap();
        let (sender, done) = mpsc::channel();
        back.start(Box::new(move |completion| sender.send(completion.id).unwrap())).unwrap();
        let valve = back.valve();
        valve.set_lease(Some(Duration::from_nanos(1)));
        back.submit(BlockRequest { id: 0, op: write(0, 1, 8) });
        assert_eq!(done.try_recv(), Err(mpsc::TryRecvError::Empty));
        assert_eq!(std::fs::read(file.path()).unwrap(), vec![0; 8 * 512]);
        valve.set_lease(Some(Duration::MAX));
        assert_eq!(done.recv().unwrap(), 0);
        valve.set_lease(Some(Duration::from_nanos(1)));
        back.submit(BlockRequest { id: 1, op: write(0, 2, 8) });
        back.stop();
        assert_eq!(std::fs::read(file.path()).unwrap(), vec![1; 8 * 512]);
    }
}
