//! An open disk image, its size, and its lock against other VMs.
//!
//! A VM that lives holds an advisory lock on each of its images: exclusive where it writes, shared where it only
//! reads. It belongs to the open file, so that it vanishes with the process however that ends, and network file systems
//! pass it to every host. A backup that follows a primary holds none; when it goes live it takes the lock as soon as it
//! can, since a predecessor that is frozen, and fenced by its lease, may hold it for any time.
//!
//! The host tells an open file once of data that it could not bring to the storage, and takes the pages for clean then: the
//! next sync would succeed, and the data still be lost. So what must hold: once a sync has failed, every later one of the
//! open image fails with the same error, and the host is not asked again. Writes that fail are another matter: nobody
//! believes them to be done, and they may be tried again.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, PosixFadviseAdvice, fallocate, fcntl, posix_fadvise};
use nix::unistd::{Whence, fdatasync};

use super::back::{BlockBackError, BlockOptions};
use super::copy::Written;
use super::faults::{Faults, Step, Verdict};
use super::job::{Aligned, DIRECT_ALIGNMENT, Io, Job};
use super::valve::Valve;
use crate::effect::SECTOR_SIZE;

/// A page of the host's page cache, or more.
const PAGE_BYTES: u64 = 4096;

/// See the module's documentation.
pub(super) struct Image {
    pub path: PathBuf,
    pub file: File,
    /// The same file opened once more: the host tells it, too, of data that was lost.
    witness: File,
    pub valve: Arc<Valve>,
    pub direct: bool,
    /// Writes complete only when they are stable.
    pub write_through: AtomicBool,
    /// Another host's VM works with it, and this one follows.
    pub following: AtomicBool,
    /// Who wants to know what is written.
    written: Mutex<Option<Arc<Written>>>,
    bytes: u64,
    read_only: bool,
    lock_whole_file: bool,
    locked: AtomicBool,
    failures: AtomicU32,
    /// The error of the first sync that failed; zero if none has.
    sync_failure: AtomicI32,
    faults: Option<Arc<dyn Faults>>,
}

impl std::fmt::Debug for Image {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Image").field("path", &self.path).finish_non_exhaustive()
    }
}

impl Image {
    pub fn open(options: &BlockOptions, valve: Arc<Valve>) -> Result<Self, BlockBackError> {
        let BlockOptions { path, read_only, direct, .. } = options.clone();
        // What is no disk must not keep the caller waiting: a pipe would, for somebody who writes to it.
        let flags = libc::O_NONBLOCK | if direct { libc::O_DIRECT } else { 0 };
        let opened =
            OpenOptions::new().read(true).write(!read_only).custom_flags(flags).open(&path);
        let mut file = match opened {
            Ok(file) => file,
            Err(error) if direct && error.raw_os_error() == Some(libc::EINVAL) => {
                return Err(BlockBackError::Direct { path });
            }
            Err(source) => return Err(BlockBackError::Open { path, read_only, source }),
        };
        let bytes = match size(&mut file) {
            Ok(Some(bytes)) => bytes,
            Ok(None) => return Err(BlockBackError::Kind { path }),
            Err(source) => return Err(BlockBackError::Size { path, source }),
        };
        if let Err(error) = set_blocking(&file) {
            return Err(BlockBackError::Open { path, read_only, source: error.into() });
        }
        let witness = match File::open(format!("/proc/self/fd/{}", file.as_raw_fd())) {
            Ok(witness) => witness,
            Err(source) => return Err(BlockBackError::Open { path, read_only, source }),
        };
        if !bytes.is_multiple_of(SECTOR_SIZE) {
            return Err(BlockBackError::OddSize { path, bytes });
        }
        if direct && !takes_sectors(&file) {
            return Err(BlockBackError::Direct { path });
        }
        Ok(Self {
            path,
            file,
            witness,
            valve,
            direct,
            write_through: AtomicBool::new(false),
            following: AtomicBool::new(false),
            written: Mutex::default(),
            bytes,
            read_only,
            lock_whole_file: options.lock_whole_file,
            locked: AtomicBool::new(false),
            failures: AtomicU32::new(0),
            sync_failure: AtomicI32::new(0),
            faults: options.faults.clone(),
        })
    }

    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    pub fn sectors(&self) -> u64 {
        self.bytes / SECTOR_SIZE
    }

    /// Takes the lock, or says that another has it.
    pub fn lock(&self) -> Result<(), BlockBackError> {
        let kind = if self.read_only { libc::F_RDLCK } else { libc::F_WRLCK };
        match self.set_lock(kind) {
            Ok(()) => {
                self.locked.store(true, Ordering::Release);
                Ok(())
            }
            Err(Errno::EAGAIN | Errno::EACCES) => {
                let (path, read_only) = (self.path.clone(), self.read_only);
                Err(BlockBackError::InUse { path, read_only })
            }
            Err(error) => {
                Err(BlockBackError::Lock { path: self.path.clone(), source: error.into() })
            }
        }
    }

    /// Lets others have it: this side's machine has ended.
    pub fn unlock(&self) {
        if self.locked.swap(false, Ordering::AcqRel)
            && let Err(error) = self.set_lock(libc::F_UNLCK)
        {
            log::warn!("disk image {} stays locked: {error}", self.path.display());
        }
    }

    pub fn locked(&self) -> bool {
        self.locked.load(Ordering::Acquire)
    }

    fn set_lock(&self, kind: i32) -> nix::Result<()> {
        let len = if self.lock_whole_file { 0 } else { self.bytes.cast_signed() };
        let lock = libc::flock {
            l_type: kind as libc::c_short,
            l_whence: Whence::SeekSet as libc::c_short,
            l_start: 0,
            l_len: len,
            l_pid: 0,
        };
        fcntl(&self.file, FcntlArg::F_OFD_SETLK(&lock)).map(|_| ())
    }

    /// Forgets what this host remembers of the image: another may have written to it since.
    pub fn forget_cached(&self) {
        let advice = PosixFadviseAdvice::POSIX_FADV_DONTNEED;
        if let Err(error) = posix_fadvise(self.file.as_fd(), 0, 0, advice) {
            log::debug!("disk {}: the page cache was kept: {error}", self.path.display());
        }
    }

    /// Before a request is handed to the host.
    pub fn before(&self, job: &Job) {
        if let Some((offset, len)) = job.writes() {
            self.note(offset, len);
        } else if self.following.load(Ordering::Acquire) && !self.locked() {
            // What this host remembers may be older than what the other one has written.
            let (offset, end) = (job.range().0, job.range().0 + job.range().1);
            let start = offset / PAGE_BYTES * PAGE_BYTES;
            let len = end.next_multiple_of(PAGE_BYTES) - start;
            let advice = PosixFadviseAdvice::POSIX_FADV_DONTNEED;
            let (start, len) = (start.cast_signed(), len.cast_signed());
            // Where it cannot be had there is no page cache.
            let _ = posix_fadvise(self.file.as_fd(), start, len, advice);
        }
    }

    /// When the host has done with a request, before anybody hears of it.
    pub fn after(&self, job: &Job) {
        if let Some((offset, len)) = job.writes() {
            self.note(offset, len);
        }
    }

    fn note(&self, offset: u64, len: u64) {
        if let Some(written) = &*self.written.lock().unwrap_or_else(PoisonError::into_inner) {
            written.note(offset, len);
        }
    }

    /// Has what is written noted there from now on.
    pub fn track(&self, written: Option<Arc<Written>>) {
        *self.written.lock().unwrap_or_else(PoisonError::into_inner) = written;
    }

    /// Makes the system call of a step.
    pub fn perform(&self, io: Io<'_>) -> Result<usize, Errno> {
        let errno = |error: io::Error| Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO));
        match io {
            Io::Read { offset, into } => self.file.read_at(into, offset).map_err(errno),
            Io::Write { offset, from } => self.file.write_at(from, offset).map_err(errno),
            Io::Sync => fdatasync(&self.file).map(|()| 0),
            Io::Allocate { how, offset, len } => {
                fallocate(&self.file, how, offset.cast_signed(), len.cast_signed()).map(|()| 0)
            }
        }
    }

    /// Makes all that was written stable, beside the syncs that the disk does by itself.
    pub fn sync_beside(&self) -> Result<(), Errno> {
        if let Some(error) = self.sync_failure() {
            return Err(error);
        }
        let result = fdatasync(&self.witness);
        self.synced(result);
        result
    }

    /// With what every sync fails from now on; `None` as long as the host may be asked for one.
    pub fn sync_failure(&self) -> Option<Errno> {
        match self.sync_failure.load(Ordering::Acquire) {
            0 => None,
            error => Some(Errno::from_raw(error)),
        }
    }

    /// A sync has ended so. Called before anybody hears of that, and before the next sync begins.
    pub fn synced(&self, result: Result<(), Errno>) {
        let Err(error) = result else { return };
        if may_hide_loss(error)
            && self
                .sync_failure
                .compare_exchange(0, error as i32, Ordering::AcqRel, Ordering::Acquire)
                .is_ok()
        {
            log::error!(
                "disk {}: the host could not make durable what was written: {error}. Some of it may be lost, and the \
                 host will not say so again, so every flush of this image fails until it is opened anew. See to the \
                 storage, then stop this VM, check the file systems on the image, and start it again; if this is the \
                 backup of a pair, have the pair make a new one",
                self.path.display()
            );
        }
    }

    /// What a test wants to become of a step.
    pub fn verdict(&self, job: &mut Job) -> Verdict {
        self.faults.as_ref().map_or(Verdict::Go, |faults| faults.before(job.step()))
    }

    /// The host has done a step of `job`.
    pub fn step_done(&self, job: &mut Job) {
        if let Some(faults) = &self.faults {
            let step: Step = job.step();
            faults.after(step);
        }
    }

    /// Says that a request failed.
    pub fn report(&self, job: &Job, error: Errno) {
        // A full disk fails every write; the log must not grow with each.
        let count = self.failures.fetch_add(1, Ordering::Relaxed).wrapping_add(1);
        if count.is_power_of_two() {
            let (path, what) = (self.path.display(), job.describe());
            log::warn!("disk {path}: {what} failed ({count} failures so far): {error}");
        }
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        // Whoever opens it next should see what the storage has, not what it was to have.
        if self.sync_failure().is_some() {
            self.forget_cached();
        }
    }
}

/// Whether a sync that failed so may have been the only one to be told of lost data. Not one that was kept from running.
fn may_hide_loss(error: Errno) -> bool {
    !matches!(error, Errno::EINTR | Errno::EAGAIN | Errno::ECANCELED)
}

/// Size in bytes; `None` if it is no file and no block device.
fn size(file: &mut File) -> io::Result<Option<u64>> {
    let kind = file.metadata()?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Ok(None);
    }
    // A block device's metadata has no size.
    file.seek(SeekFrom::End(0)).map(Some)
}

/// Takes O_NONBLOCK back. Files and block devices know no such thing, but there are kernels whose `io_uring` answers
/// EAGAIN because of it where it would else wait.
fn set_blocking(file: &File) -> nix::Result<()> {
    let flags = OFlag::from_bits_retain(fcntl(file, FcntlArg::F_GETFL)?);
    fcntl(file, FcntlArg::F_SETFL(flags - OFlag::O_NONBLOCK)).map(|_| ())
}

/// Whether single sectors can be had without the page cache.
fn takes_sectors(file: &File) -> bool {
    let mut sector = Aligned::zeroed(SECTOR_SIZE as usize, DIRECT_ALIGNMENT);
    let read = file.read_at(sector.bytes_mut(), 0);
    !read.is_err_and(|error| error.raw_os_error() == Some(libc::EINVAL))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::poll::Bell;

    #[test]
    fn an_open_image_is_one_that_is_waited_for() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let valve = Arc::new(Valve::new(Arc::new(Bell::new().unwrap())));
        for direct in [false, true] {
            let options = BlockOptions { direct, ..BlockOptions::new(file.path()) };
            let image = match Image::open(&options, Arc::clone(&valve)) {
                Ok(image) => image,
                // Not every file system can do without the page cache.
                Err(BlockBackError::Direct { .. }) if direct => continue,
                Err(error) => panic!("{error}"),
            };
            let flags = fcntl(&image.file, FcntlArg::F_GETFL).unwrap();
            assert_eq!(flags & libc::O_NONBLOCK, 0);
            assert_eq!(flags & libc::O_DIRECT != 0, direct);
        }
    }
}
