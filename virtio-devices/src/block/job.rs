//! A disk request on its way through the host: which step comes next, whatever the one before gave.
//!
//! Knows no thread, ring or file. A transfer that came out short is continued, an interrupted one
//! repeated; a range the file system cannot zero is written out; where writes must be stable when they complete, a
//! sync follows.

use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::FallocateFlags;

use super::faults::{Step, StepKind};
use super::latency::Timing;
use crate::effect::{BlockOp, BlockRequest, SECTOR_SIZE};

/// Bytes written at a time where a range of zeroes has to be written out.
const ZEROES: u64 = 128 << 10;

/// Alignment that bypassing the page cache asks of memory, on every file system there is.
pub(super) const DIRECT_ALIGNMENT: usize = 4096;

/// How often a request that was under way when its host died is tried on the new one before the guest is told, and
/// the first pause; each is twice the one before. Storage that both hosts reach often needs a moment to get over
/// the death of one of them.
const PATIENT_TRIES: u32 = 8;
const FIRST_PAUSE: Duration = Duration::from_millis(20);

/// The host has no room for this just now.
const BUSY_PAUSE: Duration = Duration::from_millis(1);

/// Whom to tell.
#[derive(Debug)]
pub(super) enum Reply {
    /// The front half.
    Completion { id: u64 },
    /// Whoever wants all that was written to be stable.
    Stable(mpsc::Sender<Result<(), Errno>>),
}

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct Job {
    pub reply: Reply,
    pub timing: Timing,
    /// Not to be tried before.
    pub not_before: Option<Instant>,
    /// Those that this sync is for, too.
    pub with: Vec<Job>,
    /// Of the next step at most so many bytes.
    pub at_most: Option<usize>,
    op: BlockOp,
    stage: Stage,
    buffer: Buffer,
    offset: u64,
    len: u64,
    done: u64,
    tries_left: u32,
    pause: Duration,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Allocate,
    Transfer,
    Sync,
}

/// What is transferred.
#[derive(Debug)]
enum Buffer {
    None,
    Shared(Arc<[u8]>),
    Own(Aligned),
}

/// What the host is asked for.
pub(super) enum Io<'a> {
    Read { offset: u64, into: &'a mut [u8] },
    Write { offset: u64, from: &'a [u8] },
    Sync,
    Allocate { how: FallocateFlags, offset: u64, len: u64 },
}

/// What comes after a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Progress {
    /// Another step.
    Again,
    /// It is done, or has failed.
    Done(Result<(), Errno>),
}

impl Job {
    /// `direct` asks for buffers that the page cache can be bypassed with. A `patient` request is tried several
    /// times.
    ///
    /// # Errors
    /// If no file can be so large.
    pub fn new(
        request: BlockRequest,
        timing: Timing,
        direct: bool,
        patient: bool,
    ) -> Result<Self, Errno> {
        let (sector, len) = match &request.op {
            BlockOp::Read { sector, len } => (*sector, u64::from(*len)),
            BlockOp::Write { sector, data } => (*sector, data.len() as u64),
            BlockOp::Flush => (0, 0),
            BlockOp::Discard { sector, sectors } | BlockOp::WriteZeroes { sector, sectors, .. } => {
                (*sector, sectors.checked_mul(SECTOR_SIZE).ok_or(Errno::EINVAL)?)
            }
        };
        let offset = sector.checked_mul(SECTOR_SIZE).ok_or(Errno::EINVAL)?;
        let end = offset.checked_add(len).ok_or(Errno::EINVAL)?;
        i64::try_from(end).map_err(|_| Errno::EINVAL)?;
        let alignment = if direct { DIRECT_ALIGNMENT } else { 1 };
        let (stage, buffer) = match &request.op {
            BlockOp::Read { len, .. } => {
                (Stage::Transfer, Buffer::Own(Aligned::zeroed(*len as usize, alignment)))
            }
            BlockOp::Write { data, .. } if direct => {
                let mut own = Aligned::zeroed(data.len(), alignment);
                own.bytes_mut().copy_from_slice(data);
                (Stage::Transfer, Buffer::Own(own))
            }
            BlockOp::Write { data, .. } => (Stage::Transfer, Buffer::Shared(Arc::clone(data))),
            BlockOp::Flush => (Stage::Sync, Buffer::None),
            BlockOp::Discard { .. } | BlockOp::WriteZeroes { .. } => {
                (Stage::Allocate, Buffer::None)
            }
        };
        Ok(Self {
            reply: Reply::Completion { id: request.id },
            timing,
            not_before: None,
            with: Vec::new(),
            at_most: None,
            op: request.op,
            stage,
            buffer,
            offset,
            len,
            done: 0,
            tries_left: if patient { PATIENT_TRIES } else { 0 },
            pause: FIRST_PAUSE,
        })
    }

    /// Makes everything stable that has been written so far.
    pub fn stable(told: mpsc::Sender<Result<(), Errno>>) -> Self {
        Self {
            reply: Reply::Stable(told),
            timing: Timing::begin(&BlockOp::Flush, Instant::now()),
            not_before: None,
            with: Vec::new(),
            at_most: None,
            op: BlockOp::Flush,
            stage: Stage::Sync,
            buffer: Buffer::None,
            offset: 0,
            len: 0,
            done: 0,
            tries_left: 0,
            pause: FIRST_PAUSE,
        }
    }

    /// What it changes of the image: where, and how many bytes.
    pub fn writes(&self) -> Option<(u64, u64)> {
        match self.op {
            BlockOp::Write { .. } | BlockOp::Discard { .. } | BlockOp::WriteZeroes { .. } => {
                Some(self.range())
            }
            BlockOp::Read { .. } | BlockOp::Flush => None,
        }
    }

    /// What it touches of the image.
    pub fn range(&self) -> (u64, u64) {
        (self.offset, self.len)
    }

    /// Whether the next step is a sync, which it may share with others.
    pub fn wants_sync(&self) -> bool {
        self.stage == Stage::Sync
    }

    /// Whether it is a sync and nothing else: the guest's flush, or [`Job::stable`].
    pub fn is_flush(&self) -> bool {
        self.op == BlockOp::Flush
    }

    /// The next step. What it points to stays where it is until the job is dropped or advanced.
    pub fn io(&mut self) -> Io<'_> {
        let (done, offset) = (self.done as usize, self.offset + self.done);
        let left = (self.len - self.done) as usize;
        let count = left.min(self.at_most.unwrap_or(left));
        match (self.stage, &self.op, &mut self.buffer) {
            (Stage::Transfer, BlockOp::Read { .. }, Buffer::Own(own)) => {
                Io::Read { offset, into: &mut own.bytes_mut()[done..done + count] }
            }
            (Stage::Transfer, BlockOp::Write { .. }, Buffer::Own(own)) => {
                Io::Write { offset, from: &own.bytes()[done..done + count] }
            }
            (Stage::Transfer, _, Buffer::Own(zeroes)) => {
                let count = count.min(zeroes.len);
                Io::Write { offset, from: &zeroes.bytes()[..count] }
            }
            (Stage::Transfer, _, Buffer::Shared(data)) => {
                Io::Write { offset, from: &data[done..done + count] }
            }
            (Stage::Allocate, op, _) => {
                let how = match op {
                    BlockOp::WriteZeroes { unmap: false, .. } => {
                        FallocateFlags::FALLOC_FL_ZERO_RANGE
                    }
                    _ => FallocateFlags::FALLOC_FL_PUNCH_HOLE,
                };
                let how = how | FallocateFlags::FALLOC_FL_KEEP_SIZE;
                Io::Allocate { how, offset: self.offset, len: self.len }
            }
            (Stage::Sync, ..) | (Stage::Transfer, _, Buffer::None) => Io::Sync,
        }
    }

    /// The next step, for whoever wants to know.
    pub fn step(&mut self) -> Step {
        let (kind, offset, len) = match self.io() {
            Io::Read { offset, into } => (StepKind::Read, offset, into.len() as u64),
            Io::Write { offset, from } => (StepKind::Write, offset, from.len() as u64),
            Io::Sync => (StepKind::Sync, 0, 0),
            Io::Allocate { offset, len, .. } => (StepKind::Allocate, offset, len),
        };
        Step { kind, offset, len }
    }

    /// The step gave `result`: bytes, where there were any.
    pub fn advance(&mut self, result: Result<usize, Errno>, write_through: bool) -> Progress {
        self.at_most = None;
        match result {
            Err(Errno::EINTR) => Progress::Again,
            Err(Errno::EAGAIN) => self.pause(BUSY_PAUSE),
            Err(Errno::EOPNOTSUPP | Errno::ENOSYS) if self.stage == Stage::Allocate => {
                self.do_without()
            }
            Err(_) if self.tries_left > 0 => {
                self.tries_left -= 1;
                let pause = self.pause;
                self.pause *= 2;
                self.pause(pause)
            }
            Err(error) => Progress::Done(Err(error)),
            Ok(count) => self.went(count, write_through),
        }
    }

    fn went(&mut self, count: usize, write_through: bool) -> Progress {
        match self.stage {
            Stage::Sync => return Progress::Done(Ok(())),
            Stage::Allocate => {}
            // The image ends here: somebody made it shorter. Or a device that takes nothing.
            Stage::Transfer if count == 0 => return self.advance(Err(Errno::EIO), write_through),
            Stage::Transfer => {
                self.done += count as u64;
                if self.done < self.len {
                    return Progress::Again;
                }
            }
        }
        if write_through && !matches!(self.op, BlockOp::Read { .. }) {
            self.stage = Stage::Sync;
            return Progress::Again;
        }
        Progress::Done(Ok(()))
    }

    /// The file system cannot give back or zero a range.
    fn do_without(&mut self) -> Progress {
        if !matches!(self.op, BlockOp::WriteZeroes { .. }) {
            // A hint: where the host cannot follow it, nothing is wrong.
            return Progress::Done(Ok(()));
        }
        self.stage = Stage::Transfer;
        let len = self.len.min(ZEROES) as usize;
        self.buffer = Buffer::Own(Aligned::zeroed(len, DIRECT_ALIGNMENT));
        Progress::Again
    }

    fn pause(&mut self, pause: Duration) -> Progress {
        self.not_before = Some(Instant::now() + pause);
        Progress::Again
    }

    /// What has been read.
    pub fn into_data(self) -> Vec<u8> {
        match (self.op, self.buffer) {
            (BlockOp::Read { .. }, Buffer::Own(own)) => own.into_vec(),
            _ => Vec::new(),
        }
    }

    /// What it is, for a message.
    pub fn describe(&self) -> String {
        match &self.op {
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
}

/// Bytes that begin at a multiple of some number.
#[derive(Debug)]
pub(super) struct Aligned {
    storage: Vec<u8>,
    start: usize,
    len: usize,
}

impl Aligned {
    pub fn zeroed(len: usize, alignment: usize) -> Self {
        let storage = vec![0; len + alignment - 1];
        let start = storage.as_ptr().align_offset(alignment);
        Self { storage, start, len }
    }

    pub fn bytes(&self) -> &[u8] {
        &self.storage[self.start..self.start + self.len]
    }

    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.storage[self.start..self.start + self.len]
    }

    fn into_vec(mut self) -> Vec<u8> {
        self.storage.drain(..self.start);
        self.storage.truncate(self.len);
        self.storage
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(op: BlockOp, patient: bool) -> Job {
        let timing = Timing::begin(&op, Instant::now());
        Job::new(BlockRequest { id: 1, op }, timing, false, patient).unwrap()
    }

    fn write() -> BlockOp {
        BlockOp::Write { sector: 2, data: Arc::from(vec![1; 1024]) }
    }

    #[test]
    fn short_transfers_are_continued_and_interrupted_ones_repeated() {
        let mut job = job(write(), false);
        assert_eq!(job.step(), Step { kind: StepKind::Write, offset: 1024, len: 1024 });
        assert_eq!(job.advance(Ok(100), false), Progress::Again);
        assert_eq!(job.step(), Step { kind: StepKind::Write, offset: 1124, len: 924 });
        assert_eq!(job.advance(Err(Errno::EINTR), false), Progress::Again);
        assert_eq!(job.step(), Step { kind: StepKind::Write, offset: 1124, len: 924 });
        assert_eq!(job.advance(Ok(924), false), Progress::Done(Ok(())));
    }

    #[test]
    fn written_through_a_write_ends_with_a_sync_and_a_read_does_not() {
        let mut write = job(write(), false);
        assert_eq!(write.advance(Ok(1024), true), Progress::Again);
        assert_eq!(write.step().kind, StepKind::Sync);
        assert_eq!(write.advance(Err(Errno::EIO), true), Progress::Done(Err(Errno::EIO)));
        let mut read = job(BlockOp::Read { sector: 0, len: 512 }, false);
        assert_eq!(read.advance(Ok(512), true), Progress::Done(Ok(())));
        assert_eq!(read.into_data(), [0; 512]);
    }

    #[test]
    fn the_end_of_a_truncated_image_is_an_error() {
        let mut read = job(BlockOp::Read { sector: 0, len: 1024 }, false);
        assert_eq!(read.advance(Ok(512), false), Progress::Again);
        assert_eq!(read.advance(Ok(0), false), Progress::Done(Err(Errno::EIO)));
    }

    #[test]
    fn what_cannot_be_zeroed_is_written_out_and_a_discard_is_let_be() {
        let sectors = 600;
        let mut zero = job(BlockOp::WriteZeroes { sector: 1, sectors, unmap: false }, false);
        assert_eq!(zero.step(), Step { kind: StepKind::Allocate, offset: 512, len: 600 * 512 });
        assert_eq!(zero.advance(Err(Errno::EOPNOTSUPP), false), Progress::Again);
        let mut written = 0;
        loop {
            let step = zero.step();
            assert_eq!((step.kind, step.offset), (StepKind::Write, 512 + written));
            written += step.len;
            match zero.advance(Ok(step.len as usize), false) {
                Progress::Again => {}
                done => break assert_eq!(done, Progress::Done(Ok(()))),
            }
        }
        assert_eq!(written, 600 * 512);
        let mut discard = job(BlockOp::Discard { sector: 1, sectors }, false);
        assert_eq!(discard.advance(Err(Errno::EOPNOTSUPP), true), Progress::Done(Ok(())));
    }

    #[test]
    fn a_patient_request_fails_only_after_several_tries() {
        let mut job = job(write(), true);
        for _ in 0..PATIENT_TRIES {
            assert_eq!(job.advance(Err(Errno::EIO), false), Progress::Again);
            assert!(job.not_before.take().is_some());
        }
        assert_eq!(job.advance(Err(Errno::EIO), false), Progress::Done(Err(Errno::EIO)));
    }
}
