//! I/O by `io_uring`: one system call hands over many steps, and none is needed to take back what is done.
//!
//! Buffers belong to the table of jobs from the moment they are handed over until the kernel has said that
//! it is done with them; the ring is never let go of before that.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Duration;

use io_uring::types::{Fd, FsyncFlags};
use io_uring::{IoUring, Probe, opcode, squeue};
use nix::errno::Errno;

use super::engine::{Engine, Outcome};
use super::image::Image;
use super::job::{Io, Job};
use crate::poll::Bell;

/// Steps under way at most; a power of two.
const ENTRIES: u32 = 128;

/// Pause before the kernel is asked again when it has no memory for more.
const BUSY_PAUSE: Duration = Duration::from_millis(1);

pub(super) struct Ring {
    ring: IoUring,
    image: Arc<Image>,
    /// Jobs under way, by the number the kernel knows them by.
    jobs: Vec<Option<Job>>,
    free: Vec<usize>,
    back: Vec<(Job, Outcome)>,
    /// Written by the kernel whenever it has done something.
    _bell: Arc<Bell>,
}

impl Ring {
    /// Fails where the kernel is too old, or forbids it to this process.
    pub fn new(image: &Arc<Image>, bell: &Arc<Bell>) -> io::Result<Self> {
        let ring = IoUring::new(ENTRIES)?;
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        let needed =
            [opcode::Read::CODE, opcode::Write::CODE, opcode::Fsync::CODE, opcode::Fallocate::CODE];
        if !needed.iter().all(|&code| probe.is_supported(code)) {
            return Err(io::ErrorKind::Unsupported.into());
        }
        ring.submitter().register_eventfd(bell.as_raw_fd())?;
        Ok(Self {
            ring,
            image: Arc::clone(image),
            jobs: (0..ENTRIES).map(|_| None).collect(),
            free: (0..ENTRIES as usize).rev().collect(),
            back: Vec::new(),
            _bell: Arc::clone(bell),
        })
    }

    fn push(&mut self, mut job: Job) {
        let slot = self.free.pop().expect("no more is begun than there is room for");
        let entry = entry(&self.image, job.io()).user_data(slot as u64);
        self.jobs[slot] = Some(job);
        // SAFETY: the entry points into a heap buffer of the job, which stays in the table, untouched, until the
        // kernel has reported its completion; the image's descriptor is open as long as the ring is.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        pushed.expect("the queue is as long as the table");
    }

    /// Hands over what is in the queue, all of it allowed to begin.
    fn submit(&mut self) {
        loop {
            let result = self.ring.submit();
            let left = self.ring.submission().len();
            match result {
                _ if left == 0 => return,
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    log::warn!("disk {}: the kernel is short: {error}", self.image.path.display());
                    if !self.wait_for_leave(left) {
                        return;
                    }
                }
            }
        }
    }

    /// The kernel did not take `left` entries, which cannot be had back from the queue. So they are not under way,
    /// and leave to begin is asked for again. False once halted: then they are never handed over.
    fn wait_for_leave(&mut self, left: usize) -> bool {
        self.image.valve.leave(left);
        loop {
            std::thread::sleep(BUSY_PAUSE);
            self.reap();
            if self.image.valve.enter(left) {
                return true;
            }
            if self.image.valve.halted() {
                return false;
            }
        }
    }

    fn reap(&mut self) {
        let completed: Vec<(usize, i32)> =
            self.ring.completion().map(|done| (done.user_data() as usize, done.result())).collect();
        for (slot, result) in completed {
            let Some(mut job) = self.jobs.get_mut(slot).and_then(Option::take) else { continue };
            self.free.push(slot);
            self.image.step_done(&mut job);
            self.image.valve.leave(1);
            let result = usize::try_from(result).map_err(|_| Errno::from_raw(-result));
            self.back.push((job, Outcome::Done(result)));
        }
    }
}

fn entry(image: &Image, io: Io<'_>) -> squeue::Entry {
    let fd = Fd(image.file.as_raw_fd());
    match io {
        Io::Read { offset, into } => {
            opcode::Read::new(fd, into.as_mut_ptr(), into.len() as u32).offset(offset).build()
        }
        Io::Write { offset, from } => {
            opcode::Write::new(fd, from.as_ptr(), from.len() as u32).offset(offset).build()
        }
        Io::Sync => opcode::Fsync::new(fd).flags(FsyncFlags::DATASYNC).build(),
        Io::Allocate { how, offset, len } => {
            opcode::Fallocate::new(fd, len).offset(offset).mode(how.bits()).build()
        }
    }
}

impl Engine for Ring {
    fn room(&self) -> usize {
        self.free.len()
    }

    fn under_way(&self) -> usize {
        self.jobs.len() - self.free.len() + self.back.len()
    }

    fn begin(&mut self, jobs: Vec<Job>) {
        // One look for all: they leave in one system call, and filling the queue takes next to no time.
        if !self.image.valve.enter(jobs.len()) {
            self.back.extend(jobs.into_iter().map(|job| (job, Outcome::Refused)));
            return;
        }
        for job in jobs {
            self.push(job);
        }
        self.submit();
    }

    fn finished(&mut self, into: &mut Vec<(Job, Outcome)>) {
        self.reap();
        into.append(&mut self.back);
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // The kernel may be writing to buffers, or reading from them, that would go with the table.
        let unsubmitted = self.ring.submission().len();
        while self.jobs.len() - self.free.len() > unsubmitted {
            std::thread::sleep(BUSY_PAUSE);
            self.reap();
        }
    }
}
