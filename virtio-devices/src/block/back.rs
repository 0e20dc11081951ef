//! The host half of a disk: a raw image file or block device.
//!
//! Requests are handed to the host as they come and many are under way at a time, by `io_uring` or by threads
//! ([`super::engine`]). The front half hands out together only what may be done in any order. A flush covers
//! what was completed before it was submitted, which is what a driver may ask of it (virtio 1.2, 5.2.6.2). The image's
//! size is a multiple of a sector, as the guest knows no smaller unit.
//!
//! A device has a volatile write cache: what is completed is durable after the next flush. That does not do
//! for an image that two hosts share, since a backup which takes over does not write again what was completed,
//! and the cache of the dead host is gone. There writes complete only when they are stable
//! ([`BlockBack::set_write_through`]).
//!
//! An error of the host reaches the guest as an I/O error of that request; its status is part of the completion, which
//! is logged, so that both sides of a pair show the guest the same. Only requests that were under way on another host are
//! tried several times: those submitted before the start, and where it is asked for. A sync that failed is never believed to
//! succeed later, whoever asks for it: see [`super::image`].

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::Instant;

use nix::errno::Errno;
use rt_channel::{Receiver, Sender};

use super::copy::ImageCopy;
use super::engine;
pub use super::engine::EngineKind;
pub use super::faults::{Faults, Step, StepKind, Verdict};
use super::image::Image;
use super::latency::Latencies;
pub use super::valve::Valve;
use super::worker::{Queues, Worker};
use crate::effect::{BlockCompletion, BlockRequest};
use crate::poll::Bell;

/// Where completions go; called on the disk's thread.
pub type CompletionSink = Box<dyn Fn(BlockCompletion) + Send>;

/// What can go wrong with a disk.
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
    /// The page cache cannot be bypassed in units of a sector.
    #[error(
        "the storage of disk image {} does not give sectors of 512 bytes without the page cache; \
         leave 'direct=on' out", path.display()
    )]
    Direct {
        /// The image.
        path: PathBuf,
    },
    /// Another VM holds it.
    #[error(
        "disk image {} is in use by another VM{}; stop that VM first, or give this one another image",
        path.display(), if *read_only { ", which writes to it" } else { "" }
    )]
    InUse {
        /// The image.
        path: PathBuf,
        /// Whether this one would only read.
        read_only: bool,
    },
    /// It cannot be locked.
    #[error("cannot lock disk image {}", path.display())]
    Lock {
        /// The image.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// What has been written cannot be made stable.
    #[error("what was written to disk image {} cannot be made durable", path.display())]
    Sync {
        /// The image.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
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

/// Which image, and how to reach it.
#[derive(Clone)]
pub struct BlockOptions {
    /// The image.
    pub path: PathBuf,
    /// Whether only for reading.
    pub read_only: bool,
    /// Whether to bypass the host's page cache.
    pub direct: bool,
    /// Whether to use `io_uring` where the kernel has it.
    pub io_uring: bool,
    /// Whether the lock is on the file as a whole, else on the bytes there are.
    pub lock_whole_file: bool,
    /// Tests only.
    pub faults: Option<Arc<dyn Faults>>,
}

impl BlockOptions {
    /// What is usual.
    #[must_use]
    pub fn new(path: &Path) -> Self {
        Self {
            path: path.to_path_buf(),
            read_only: false,
            direct: false,
            io_uring: true,
            lock_whole_file: false,
            faults: None,
        }
    }
}

/// An open disk image.
#[derive(Debug)]
pub struct BlockBack {
    image: Arc<Image>,
    io_uring: bool,
    sender: Sender<Submitted>,
    /// Until started.
    receiver: Mutex<Option<Receiver<Submitted>>>,
    started: AtomicBool,
    running: OnceLock<(JoinHandle<()>, EngineKind)>,
    latencies: Arc<Latencies>,
    bell: Arc<Bell>,
}

/// What goes to the thread.
#[derive(Debug)]
pub(super) enum Submitted {
    Request { request: BlockRequest, at: Instant, patient: bool },
    Stable(mpsc::Sender<Result<(), Errno>>),
    Live,
}

impl BlockBack {
    /// Opens the image at `path`. Nothing is read or written yet.
    ///
    /// # Errors
    /// If it cannot be opened or is no disk image.
    pub fn open(path: &Path, read_only: bool) -> Result<Self, BlockBackError> {
        Self::open_with(&BlockOptions { read_only, ..BlockOptions::new(path) })
    }

    /// Opens an image. Nothing is read or written yet.
    ///
    /// # Errors
    /// If it cannot be opened or is no disk image.
    pub fn open_with(options: &BlockOptions) -> Result<Self, BlockBackError> {
        let bell = Bell::new()
            .map_err(|source| BlockBackError::Thread { path: options.path.clone(), source })?;
        let bell = Arc::new(bell);
        let image = Image::open(options, Arc::new(Valve::new(Arc::clone(&bell))))?;
        let (sender, receiver) = rt_channel::unbounded();
        Ok(Self {
            image: Arc::new(image),
            io_uring: options.io_uring,
            sender,
            receiver: Mutex::new(Some(receiver)),
            started: AtomicBool::new(false),
            running: OnceLock::new(),
            latencies: Arc::default(),
            bell,
        })
    }

    /// Size in sectors of 512 bytes.
    #[must_use]
    pub fn sectors(&self) -> u64 {
        self.image.sectors()
    }

    /// Takes the image for this VM alone, or with others that only read too. It stays so until the end.
    ///
    /// # Errors
    /// If another has it.
    pub fn lock(&self) -> Result<(), BlockBackError> {
        self.image.lock()
    }

    /// Whether it is taken.
    #[must_use]
    pub fn locked(&self) -> bool {
        self.image.locked()
    }

    /// Starts to execute requests, those already submitted first. If the image has not been locked, it is as soon
    /// as it can be. Once only; a second call does nothing.
    ///
    /// # Errors
    /// If the host has no thread to give.
    pub fn start(&self, complete: CompletionSink) -> Result<(), BlockBackError> {
        let receiver = self.receiver.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(requests) = receiver else { return Ok(()) };
        self.started.store(true, Ordering::Release);
        let no_thread = |source| BlockBackError::Thread { path: self.image.path.clone(), source };
        let (engine, kind) =
            engine::start(&self.image, &self.bell, self.io_uring).map_err(no_thread)?;
        let worker = Worker {
            image: Arc::clone(&self.image),
            requests,
            bell: Arc::clone(&self.bell),
            engine,
            complete,
            latencies: Arc::clone(&self.latencies),
            queues: Queues::default(),
        };
        let builder = std::thread::Builder::new().name("disk".into());
        let thread = builder.spawn(move || worker.run()).map_err(no_thread)?;
        // Nobody else can have been here: the receiver is given away once.
        let _ = self.running.set((thread, kind));
        Ok(())
    }

    /// As [`Self::start`], for a side that follows another's VM: it takes no lock, and reads what the other wrote last.
    /// Ends with [`Self::go_live`].
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn follow(&self, complete: CompletionSink) -> Result<(), BlockBackError> {
        self.image.following.store(true, Ordering::Release);
        self.start(complete)
    }

    /// A side that followed is the one that lives now. Any other call does nothing.
    pub fn go_live(&self) {
        if self.image.following.swap(false, Ordering::AcqRel) {
            self.send(Submitted::Live);
        }
    }

    /// The image, for those who copy it.
    #[must_use]
    pub fn copy(&self) -> ImageCopy {
        ImageCopy::new(Arc::clone(&self.image))
    }

    /// What does the I/O; `None` before the start.
    #[must_use]
    pub fn engine(&self) -> Option<EngineKind> {
        self.running.get().map(|(_, kind)| *kind)
    }

    /// How long requests take, from submission to completion.
    #[must_use]
    pub fn latencies(&self) -> &Latencies {
        &self.latencies
    }

    /// Queues a request. It is executed once the disk is started.
    pub fn submit(&self, request: BlockRequest) {
        let patient = !self.started.load(Ordering::Acquire);
        self.queue(request, patient);
    }

    /// As [`Self::submit`], and tries it several times, with growing pauses, before it counts as failed.
    pub fn submit_patiently(&self, request: BlockRequest) {
        self.queue(request, true);
    }

    fn queue(&self, request: BlockRequest, patient: bool) {
        self.send(Submitted::Request { request, at: Instant::now(), patient });
    }

    fn send(&self, submitted: Submitted) {
        // The other end outlives this one until `stop`, which consumes it.
        if self.sender.send(submitted).is_err() {
            log::warn!("a request came for disk {} after its end", self.image.path.display());
        }
        self.bell.ring();
    }

    /// From now on, or no longer, writes complete only when they are stable. Switching it on waits until all that
    /// was completed before is stable too.
    ///
    /// # Errors
    /// If it cannot be made stable, or could not once since the image was opened.
    pub fn set_write_through(&self, on: bool) -> Result<(), BlockBackError> {
        self.image.write_through.store(on, Ordering::Release);
        if !on || !self.started.load(Ordering::Acquire) {
            return Ok(());
        }
        let (told, answer) = mpsc::channel();
        self.send(Submitted::Stable(told));
        match answer.recv() {
            // No answer: halted, and nothing will be completed any more.
            Ok(Ok(())) | Err(_) => Ok(()),
            Ok(Err(error)) => {
                Err(BlockBackError::Sync { path: self.image.path.clone(), source: error.into() })
            }
        }
    }

    /// From now on begins no request: those queued are forgotten and never completed. For a
    /// machine that must not touch its disks any more.
    pub fn halt(&self) {
        self.image.valve.halt();
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

impl Drop for BlockBack {
    fn drop(&mut self) {
        // Nobody is left to open a closed valve or to renew a lease; what waits belongs to another host.
        if self.image.valve.held_by_others() {
            self.halt();
        }
        // The thread ends when its channel is closed and empty.
        let (closed, _) = rt_channel::unbounded();
        self.sender = closed;
        self.bell.ring();
        if let Some((thread, _)) = self.running.take()
            && thread.join().is_err()
        {
            log::error!("the thread of disk {} panicked", self.image.path.display());
        }
    }
}
