//! The images of mirrored disks on the backup's side while they are made copies of the primary's.
//!
//! A thread of its own compares and writes, at ordinary priority. It takes one job after the other, and its queue is short:
//! while it is full the ft thread waits and neither reads nor speaks, so that a primary sends no faster than this host
//! writes. While a copy is made a side may be silent for longer ([`ft::Timing::clone_timeout`]), and a disk that hangs is given
//! up before ([`ft::Timing::copy_disk_timeout`]).
//!
//! What must hold: the guest replays only on images that hold everything sent, and its primary hears that it is ready only
//! when they hold it for good. A disk that hangs ends the copy, so that another standby is asked.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, TrySendError};
use std::thread::JoinHandle;
use std::time::Duration;

use ft::message::DISK_HASH_BYTES;
use rt_channel::{Receiver, Sender};

use super::boot_time;
use super::clone::disks::{Hasher, block};
use crate::backends::DiskImage;

/// Jobs that may wait.
const WAITING: usize = 4;
/// How often whoever waits for a disk looks whether it hangs.
const LOOK: Duration = Duration::from_millis(50);

/// What the thread tells.
pub enum Told {
    /// Blocks have been compared.
    Compared {
        /// Which disk.
        disk: u32,
        /// The first of them.
        first: u64,
        /// A bit for each, set where it differs.
        differing: Vec<u8>,
    },
    /// All that was written is stable.
    Stable,
    /// It cannot go on.
    Failed(String),
}

enum Job {
    Compare {
        disk: u32,
        first: u64,
        hashes: Vec<u8>,
    },
    Write {
        disk: u32,
        offset: u64,
        bytes: Vec<u8>,
    },
    Zero {
        disk: u32,
        offset: u64,
        len: u64,
    },
    /// Told when all before has been done.
    Barrier(Sender<()>),
    Stable,
}

/// Since when the disk has been at one request of a job, by [`boot_time`] in microseconds; 0 while it is at none.
#[derive(Default)]
struct UnderWay(AtomicU64);

impl UnderWay {
    fn begins(&self) {
        self.0.store(boot_time().as_micros() as u64, Ordering::Relaxed);
    }

    fn ends(&self) {
        self.0.store(0, Ordering::Relaxed);
    }

    /// Says so if it has been for `patience`.
    fn check(&self, patience: Duration) -> Result<(), String> {
        let since = match self.0.load(Ordering::Relaxed) {
            0 => return Ok(()),
            micros => Duration::from_micros(micros),
        };
        let waited = boot_time().saturating_sub(since);
        if waited < patience {
            return Ok(());
        }
        Err(format!("a disk of the backup has not answered for {} ms", waited.as_millis()))
    }
}

/// The way to the thread. It ends with this, and what it has not begun by then it leaves.
pub struct Images {
    jobs: Sender<Job>,
    under_way: Arc<UnderWay>,
    /// How long the disk may take for one request.
    patience: Duration,
    /// Nobody wants more of the thread.
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Images {
    /// Works on `disks`, in the order in which the primary numbers them, and tells of it on its thread. A disk that is at one
    /// request for longer than `patience` hangs.
    pub fn start(
        disks: Vec<DiskImage>,
        patience: Duration,
        tell: impl Fn(Told) + Send + 'static,
    ) -> Result<Self, String> {
        let (jobs, waiting) = rt_channel::bounded(WAITING);
        let over = Arc::new(AtomicBool::new(false));
        let under_way = Arc::<UnderWay>::default();
        let worker = Worker {
            disks,
            hasher: Hasher::new(),
            over: Arc::clone(&over),
            under_way: Arc::clone(&under_way),
        };
        let thread = std::thread::Builder::new().name("images".into());
        let thread = thread
            .spawn(move || worker.run(&waiting, &tell))
            .map_err(|error| format!("cannot start a thread: {error}"))?;
        Ok(Self { jobs, under_way, patience, over, thread: Some(thread) })
    }

    /// Compares blocks with the hashes of the primary's.
    pub fn compare(&self, disk: u32, first: u64, hashes: Vec<u8>) -> Result<(), String> {
        self.job(Job::Compare { disk, first, hashes })
    }

    /// Writes.
    pub fn write(&self, disk: u32, offset: u64, bytes: Vec<u8>) -> Result<(), String> {
        self.job(Job::Write { disk, offset, bytes })
    }

    /// Makes a range zero.
    pub fn zero(&self, disk: u32, offset: u64, len: u64) -> Result<(), String> {
        self.job(Job::Zero { disk, offset, len })
    }

    /// Waits until all that was asked for is done, or has failed, which has been told then.
    pub fn settle(&self) -> Result<(), String> {
        let (done, settled) = rt_channel::bounded(1);
        self.job(Job::Barrier(done))?;
        while settled.recv_timeout(LOOK) == Err(RecvTimeoutError::Timeout) {
            self.check()?;
        }
        Ok(())
    }

    /// Has all that was written made stable.
    pub fn make_stable(&self) -> Result<(), String> {
        self.job(Job::Stable)
    }

    /// Whether the disks do what they are asked for.
    pub fn check(&self) -> Result<(), String> {
        self.under_way.check(self.patience)
    }

    fn job(&self, mut job: Job) -> Result<(), String> {
        // The thread ends after this does.
        while let Err(TrySendError::Full(waiting)) = self.jobs.send_timeout(job, LOOK) {
            self.check()?;
            job = waiting;
        }
        Ok(())
    }
}

impl Drop for Images {
    /// The images are closed after this, and their locks gone.
    fn drop(&mut self) {
        self.over.store(true, Ordering::Release);
        let (closed, _) = rt_channel::unbounded();
        self.jobs = closed;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("the thread of the mirrored images panicked");
        }
    }
}

struct Worker {
    disks: Vec<DiskImage>,
    hasher: Hasher,
    over: Arc<AtomicBool>,
    under_way: Arc<UnderWay>,
}

impl Worker {
    fn run(mut self, jobs: &Receiver<Job>, tell: &dyn Fn(Told)) {
        let mut failed = false;
        for image in &self.disks {
            self.under_way.begins();
            image.copy.forget_cached();
        }
        self.under_way.ends();
        while let Ok(job) = jobs.recv() {
            if let Job::Barrier(done) = job {
                let _ = done.send(());
                continue;
            }
            // After a failure the copy is given up: what else was sent counts for nothing.
            if failed || self.over.load(Ordering::Acquire) {
                continue;
            }
            let performed = self.perform(job);
            self.under_way.ends();
            match performed {
                Ok(Some(told)) => tell(told),
                Ok(None) => {}
                Err(reason) => {
                    failed = true;
                    tell(Told::Failed(reason));
                }
            }
        }
    }

    fn perform(&mut self, job: Job) -> Result<Option<Told>, String> {
        match job {
            Job::Compare { disk, first, hashes } => {
                let differing = self.differing(disk, first, &hashes)?;
                return Ok(Some(Told::Compared { disk, first, differing }));
            }
            Job::Write { disk, offset, bytes } => {
                self.under_way.begins();
                let image = self.writable(disk)?;
                let written = image.copy.write(offset, &bytes);
                written.map_err(|error| trouble("write", image, offset, &error))?;
            }
            Job::Zero { disk, offset, len } => {
                let under_way = Arc::clone(&self.under_way);
                let image = self.writable(disk)?;
                let zeroed = image.copy.zero(offset, len, || under_way.begins());
                zeroed.map_err(|error| trouble("write", image, offset, &error))?;
            }
            Job::Barrier(_) => {}
            // This may take longer than a request: the state machine has an eye on it.
            Job::Stable => {
                for image in self.disks.iter().filter(|image| !image.read_only) {
                    image.copy.sync().map_err(|error| trouble("sync", image, 0, &error))?;
                }
                return Ok(Some(Told::Stable));
            }
        }
        Ok(None)
    }

    fn image(&mut self, disk: u32) -> Result<&mut DiskImage, String> {
        let found = usize::try_from(disk).ok().and_then(|index| self.disks.get_mut(index));
        found.ok_or_else(|| format!("the primary sent blocks of disk {disk}, which is not there"))
    }

    fn writable(&mut self, disk: u32) -> Result<&mut DiskImage, String> {
        let image = self.image(disk)?;
        match image.read_only {
            true => Err(format!("the primary sent blocks of the read-only disk '{}'", image.id)),
            false => Ok(image),
        }
    }

    fn differing(&mut self, disk: u32, first: u64, hashes: &[u8]) -> Result<Vec<u8>, String> {
        let (hasher, under_way) = (self.hasher.clone(), Arc::clone(&self.under_way));
        let image = self.image(disk)?;
        let theirs = hashes.chunks_exact(DISK_HASH_BYTES);
        let mut differing = vec![0; theirs.len().div_ceil(8)];
        for (index, hash) in theirs.enumerate() {
            under_way.begins();
            let number = first.saturating_add(index as u64);
            let range = block(number, image.copy.bytes())
                .ok_or_else(|| format!("disk '{}' has no block {number}", image.id))?;
            let read = image.copy.read(range.start, (range.end - range.start) as usize);
            // What cannot be read may still be written.
            let same = read.is_ok_and(|bytes| hasher.hash(bytes) == hash);
            differing[index / 8] |= u8::from(!same) << (index % 8);
        }
        Ok(differing)
    }
}

fn trouble(what: &str, image: &DiskImage, offset: u64, error: &std::io::Error) -> String {
    let path = image.copy.path().display();
    format!("cannot {what} disk image {path} of the backup at byte {offset}: {error}")
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;
    use std::sync::Arc;

    use ft::Message;
    use ft::message::DISK_BLOCK_BYTES;
    use tempfile::NamedTempFile;
    use virtio_devices::block::back::BlockBack;
    use vmm_sys_util::eventfd::EventFd;

    use super::*;
    use crate::pair::clone::CloneStep;
    use crate::pair::clone::disks::DiskSource;
    use crate::pair::clone::source::Source;
    use crate::pair::clone::way::{CloneProgress, Compared, way};

    const BLOCK: usize = DISK_BLOCK_BYTES;
    const PATIENCE: Duration = Duration::from_secs(60);
    /// Its last block is not whole.
    const BYTES: usize = 200 * BLOCK + 1536;

    fn image(fill: impl Fn(usize) -> u8) -> NamedTempFile {
        let file = NamedTempFile::new().unwrap();
        fs::write(file.path(), (0..BYTES).map(fill).collect::<Vec<u8>>()).unwrap();
        file
    }

    fn disk(path: &Path, read_only: bool) -> DiskImage {
        let copy = BlockBack::open(path, read_only).unwrap().copy();
        DiskImage { id: "_disk0".into(), read_only, copy }
    }

    /// Copies the disk of `source` to `images` as the ft threads would; gives the bytes copied, or why not.
    fn copy(ours: &Path, theirs: &Path, read_only: bool) -> Result<u64, String> {
        let (told, answers) = rt_channel::unbounded();
        let tell = move |what| drop(told.send(what));
        let images = Images::start(vec![disk(theirs, read_only)], PATIENCE, tell).unwrap();
        let (way, out) = way(Arc::new(EventFd::new(0).unwrap()));
        let progress = Arc::new(CloneProgress::default());
        let mut source = DiskSource::new(0, disk(ours, read_only), Arc::clone(&progress));
        std::thread::scope(|scope| {
            let sender = scope.spawn(move || {
                let compared = source.compare(&way);
                assert_eq!(source.look().unwrap(), 0, "nobody writes");
                compared.map_err(|error| format!("{error:?}"))
            });
            while !sender.is_finished() {
                while let Some(CloneStep::Message(message)) = out.next_step() {
                    match message {
                        Message::DiskHashes { disk, first, hashes } => {
                            images.compare(disk, first, hashes).unwrap();
                        }
                        Message::DiskData { disk, offset, bytes } => {
                            images.write(disk, offset, bytes).unwrap();
                        }
                        Message::DiskZeroes { disk, offset, len } => {
                            images.zero(disk, offset, len).unwrap();
                        }
                        other => panic!("{}", other.name()),
                    }
                }
                while let Ok(told) = answers.try_recv() {
                    match told {
                        Told::Compared { disk, first, differing } => {
                            assert!(out.compared(Compared { disk, first, differing }));
                        }
                        Told::Failed(reason) => panic!("{reason}"),
                        Told::Stable => panic!("nobody asked"),
                    }
                }
                std::thread::yield_now();
            }
            let mut left = Vec::new();
            while let Some(CloneStep::Message(message)) = out.next_step() {
                left.push(message);
            }
            for message in left {
                match message {
                    Message::DiskData { disk, offset, bytes } => {
                        images.write(disk, offset, bytes).unwrap()
                    }
                    Message::DiskZeroes { disk, offset, len } => {
                        images.zero(disk, offset, len).unwrap();
                    }
                    // Asked before the copy was given up.
                    Message::DiskHashes { .. } => {}
                    other => panic!("{}", other.name()),
                }
            }
            sender.join().unwrap()?;
            images.settle().unwrap();
            images.make_stable().unwrap();
            assert!(matches!(answers.recv().unwrap(), Told::Stable));
            let mut disks = Vec::new();
            progress.read_disks(&mut disks);
            assert_eq!(disks[0].compared_bytes, BYTES as u64);
            Ok(disks[0].copied_bytes)
        })
    }

    #[test]
    fn only_what_differs_is_copied_and_the_images_are_alike() {
        let ours = image(|at| ((at / BLOCK % 3) as u8).wrapping_mul((at % 251) as u8));
        let theirs = image(|_| 0);
        let first = copy(ours.path(), theirs.path(), false).unwrap();
        assert!(fs::read(ours.path()).unwrap() == fs::read(theirs.path()).unwrap());
        // A third of the blocks is zeroes on both.
        let expected = (BYTES - 67 * BLOCK) as u64;
        assert_eq!(first, expected);
        assert_eq!(copy(ours.path(), theirs.path(), false), Ok(0));

        let mut content = fs::read(theirs.path()).unwrap();
        for at in [5, 70 * BLOCK, 70 * BLOCK + 1, BYTES - 1] {
            content[at] ^= 1;
        }
        content[130 * BLOCK..131 * BLOCK].fill(0xee);
        fs::write(theirs.path(), content).unwrap();
        let again = copy(ours.path(), theirs.path(), false).unwrap();
        assert_eq!(again, 3 * BLOCK as u64 + 1536);
        assert!(fs::read(ours.path()).unwrap() == fs::read(theirs.path()).unwrap());
    }

    #[test]
    fn a_read_only_disk_is_compared_and_never_written() {
        let ours = image(|at| at as u8);
        let theirs = image(|at| at as u8);
        assert_eq!(copy(ours.path(), theirs.path(), true), Ok(0));
        let theirs = image(|at| at as u8 ^ u8::from(at == 9 * BLOCK));
        let refused = copy(ours.path(), theirs.path(), true).unwrap_err();
        assert!(refused.contains("read-only") && refused.contains("589824"), "{refused}");
    }

    #[test]
    fn what_no_primary_sends_ends_the_copy_and_harms_nothing() {
        let zeroes = vec![0; DISK_HASH_BYTES];
        type Bad<'a> = &'a dyn Fn(&Images) -> Result<(), String>;
        let bad: [Bad<'_>; 7] = [
            &|images| images.compare(7, 0, zeroes.clone()),
            &|images| images.compare(0, u64::MAX, zeroes.clone()),
            &|images| images.compare(0, 201, zeroes.clone()),
            &|images| images.write(0, BYTES as u64, vec![1; 512]),
            &|images| images.write(0, 3, vec![1; 512]),
            &|images| images.zero(0, u64::MAX - 511, 1024),
            &|images| images.write(1, 0, vec![1; 512]),
        ];
        let (image, other) = (image(|_| 5), image(|_| 6));
        for bad in bad {
            let (told, answers) = rt_channel::unbounded();
            let disks = vec![disk(image.path(), false), disk(other.path(), true)];
            let images = Images::start(disks, PATIENCE, move |what| drop(told.send(what))).unwrap();
            bad(&images).unwrap();
            // Nothing after it counts.
            images.write(0, 0, vec![9; 512]).unwrap();
            images.settle().unwrap();
            assert!(matches!(answers.recv().unwrap(), Told::Failed(_)));
        }
        assert!(fs::read(image.path()).unwrap().iter().all(|&byte| byte == 5));
        assert!(fs::read(other.path()).unwrap().iter().all(|&byte| byte == 6));
    }

    #[test]
    fn a_disk_that_is_at_one_request_for_too_long_hangs() {
        let under_way = UnderWay::default();
        assert_eq!(under_way.check(Duration::ZERO), Ok(()), "it has nothing to do");
        under_way.begins();
        assert_eq!(under_way.check(PATIENCE), Ok(()));
        let hangs = under_way.check(Duration::ZERO).unwrap_err();
        assert!(hangs.contains("has not answered for"), "{hangs}");
        under_way.ends();
        assert_eq!(under_way.check(Duration::ZERO), Ok(()));
    }
}
