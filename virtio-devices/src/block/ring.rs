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
    /// How often the kernel was short.
    shortages: u64,
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
            shortages: 0,
            _bell: Arc::clone(bell),
        })
    }

    /// Returns where in the table it is.
    fn push(&mut self, mut job: Job) -> usize {
        let slot = self.free.pop().expect("no more is begun than there is room for");
        let entry = entry(&self.image, job.io()).user_data(slot as u64);
        self.jobs[slot] = Some(job);
        // SAFETY: the entry points into a heap buffer of the job, which stays in the table, untouched, until the
        // kernel has reported its completion; the image's descriptor is open as long as the ring is.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        pushed.expect("the queue is as long as the table");
        slot
    }

    /// Hands over what is in the queue, all of it allowed to begin: the jobs in `slots`, in this order. `submit` is the
    /// system call.
    fn hand_over(
        &mut self,
        slots: &[usize],
        mut submit: impl FnMut(&IoUring) -> io::Result<usize>,
    ) {
        loop {
            let result = submit(&self.ring);
            let left = self.ring.submission().len();
            match result {
                _ if left == 0 => return,
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    self.shortages += 1;
                    if self.shortages.is_power_of_two() {
                        let (path, count) = (self.image.path.display(), self.shortages);
                        log::warn!(
                            "disk {path}: the kernel is short ({count} times so far): {error}"
                        );
                    }
                    if !self.wait_for_leave(left) {
                        self.forget(&slots[slots.len() - left..]);
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

    /// Lets go of jobs that the kernel has not taken and, halted as this disk is, never will: nothing is handed over any
    /// more, so that nobody looks at the queue, whose entries point to their buffers. Without this they would count as under
    /// way for ever, and the disk's thread would not end.
    fn forget(&mut self, slots: &[usize]) {
        for &slot in slots {
            self.jobs[slot] = None;
            self.free.push(slot);
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
        let slots: Vec<usize> = jobs.into_iter().map(|job| self.push(job)).collect();
        self.hand_over(&slots, IoUring::submit);
    }

    fn finished(&mut self, into: &mut Vec<(Job, Outcome)>) {
        self.reap();
        into.append(&mut self.back);
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // The kernel may be writing to buffers, or reading from them, that would go with the table.
        while self.jobs.len() > self.free.len() {
            std::thread::sleep(BUSY_PAUSE);
            self.reap();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::block::back::BlockOptions;
    use crate::block::latency::Timing;
    use crate::block::valve::Valve;
    use crate::effect::{BlockOp, BlockRequest};

    fn write(id: u64) -> Job {
        let op = BlockOp::Write { sector: id, data: vec![1; 512].into() };
        let timing = Timing::begin(&op, Instant::now());
        Job::new(BlockRequest { id, op }, timing, false, false).unwrap()
    }

    #[test]
    fn halting_while_the_kernel_is_short_leaves_nothing_under_way() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(1 << 16).unwrap();
        let bell = Arc::new(Bell::new().unwrap());
        let valve = Arc::new(Valve::new(Arc::clone(&bell)));
        let image = Image::open(&BlockOptions::new(file.path()), Arc::clone(&valve)).unwrap();
        let mut ring = match Ring::new(&Arc::new(image), &bell) {
            Ok(ring) => ring,
            Err(error) => {
                eprintln!("SKIPPED: no io_uring here: {error}");
                return;
            }
        };
        assert!(valve.enter(3));
        let slots: Vec<usize> = (0..3).map(|id| ring.push(write(id))).collect();
        let mut tries = 0;
        ring.hand_over(&slots, |_| {
            tries += 1;
            if tries == 3 {
                valve.halt();
            }
            Err(Errno::EAGAIN.into())
        });
        assert_eq!((ring.under_way(), ring.room()), (0, ENTRIES as usize));
        assert!(valve.quiet());
        ring.begin(vec![write(4)]);
        let mut finished = Vec::new();
        ring.finished(&mut finished);
        assert!(matches!(finished[..], [(_, Outcome::Refused)]));
        assert_eq!(ring.under_way(), 0);
        drop(ring);
        assert_eq!(std::fs::read(file.path()).unwrap(), vec![0; 1 << 16], "halted, it wrote");
    }
}
