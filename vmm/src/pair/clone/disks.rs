//! Mirrored disks as a [`Source`] of a copy.
//!
//! First the two images are compared, block by block, by hashes: only what differs is sent. So a first copy sends what there
//! is, and a copy made after a failure what has changed since; and there is no record of changes that could be out of
//! date. What the guest writes meanwhile is noted by the disk's back half, and goes over with the rounds.
//!
//! What must hold: when the guest has stopped and what is noted has been sent, the backup's image holds everything the guest
//! was told is written. Requests that are under way then are in the state of the guest, and the backup does them itself.

use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use ft::Message;
use ft::message::{DISK_BLOCK_BYTES, DISK_HASH_BYTES, MAX_DISK_HASHES, MAX_DISK_PIECE_BYTES};
use ft::status::CloneDisk;
use ring::digest::{Digest, SHA256, digest};
use virtio_devices::block::copy::{MAX_COPY_BYTES, Tracking};

use super::CloneError;
use super::source::{Pass, Source};
use super::way::{CloneProgress, Compared, Way};
use crate::backends::DiskImage;
use crate::run_loop::Frozen;

/// Blocks whose hashes go over in one message.
const WINDOW_BLOCKS: u64 = MAX_DISK_HASHES as u64;
/// Windows sent whose answers have not come. Bounds what the answers can hold; see [`super::way`].
pub(super) const WINDOWS_UNDER_WAY: usize = 3;
/// Bytes in one message.
const PIECE_BYTES: u64 = MAX_DISK_PIECE_BYTES as u64;
const _: () = assert!(MAX_DISK_PIECE_BYTES <= MAX_COPY_BYTES);

static ZEROES: [u8; DISK_BLOCK_BYTES] = [0; DISK_BLOCK_BYTES];

/// Hashes blocks; most of a sparse image are zeroes, which are told at a glance.
#[derive(Clone)]
pub(in crate::pair) struct Hasher {
    zeroes: Digest,
}

impl Hasher {
    /// One that has seen a block of zeroes.
    pub fn new() -> Self {
        Self { zeroes: digest(&SHA256, &ZEROES) }
    }

    /// The hash of a block.
    pub fn hash(&self, block: &[u8]) -> [u8; DISK_HASH_BYTES] {
        let digest = if block == ZEROES { self.zeroes } else { digest(&SHA256, block) };
        digest.as_ref().try_into().expect("SHA-256 has 32 bytes")
    }
}

/// The blocks of an image, in bytes.
pub(in crate::pair) fn block(number: u64, image_bytes: u64) -> Option<Range<u64>> {
    let start = number.checked_mul(DISK_BLOCK_BYTES as u64)?;
    (start < image_bytes).then(|| start..(start + DISK_BLOCK_BYTES as u64).min(image_bytes))
}

/// See the module's documentation.
pub struct DiskSource {
    /// Its number among the disks.
    number: u32,
    disk: DiskImage,
    tracking: Tracking,
    noted: Vec<Range<u64>>,
    progress: Arc<CloneProgress>,
}

impl DiskSource {
    /// From now on what the guest writes is noted.
    #[must_use]
    pub fn new(number: u32, disk: DiskImage, progress: Arc<CloneProgress>) -> Self {
        let tracking = disk.copy.track();
        let total_bytes = disk.copy.bytes();
        progress.update(|status| status.disk_total_bytes += total_bytes);
        progress.disk(&disk.id, |shown| shown.total_bytes = total_bytes);
        Self { number, disk, tracking, noted: Vec::new(), progress }
    }

    /// Sends what differs.
    pub fn compare(&mut self, way: &Way) -> Result<(), CloneError> {
        let hasher = Hasher::new();
        let blocks = self.disk.copy.bytes().div_ceil(DISK_BLOCK_BYTES as u64);
        let mut under_way = VecDeque::new();
        for first in (0..blocks).step_by(WINDOW_BLOCKS as usize) {
            let window = first..(first + WINDOW_BLOCKS).min(blocks);
            let hashes = self.hashes(&hasher, window.clone())?;
            way.message(Message::DiskHashes { disk: self.number, first, hashes })?;
            under_way.push_back(window);
            if under_way.len() == WINDOWS_UNDER_WAY
                && let Some(window) = under_way.pop_front()
            {
                self.answered(window, way)?;
            }
        }
        for window in under_way {
            self.answered(window, way)?;
        }
        Ok(())
    }

    fn hashes(&mut self, hasher: &Hasher, window: Range<u64>) -> Result<Vec<u8>, CloneError> {
        let mut hashes = Vec::with_capacity(WINDOW_BLOCKS as usize * DISK_HASH_BYTES);
        let image_bytes = self.disk.copy.bytes();
        for range in window.filter_map(|number| block(number, image_bytes)) {
            hashes.extend(hasher.hash(self.read(range)?));
        }
        Ok(hashes)
    }

    fn answered(&mut self, window: Range<u64>, way: &Way) -> Result<(), CloneError> {
        let Compared { disk, first, differing } = way.compared()?;
        let blocks = (window.end - window.start) as usize;
        if disk != self.number || first != window.start || differing.len() != blocks.div_ceil(8) {
            let text = "the backup answers about disk blocks that it was not asked about";
            return Err(CloneError::Failed(text.into()));
        }
        let image_bytes = self.disk.copy.bytes();
        let compared: u64 =
            window.clone().filter_map(|n| block(n, image_bytes)).map(|r| r.end - r.start).sum();
        self.progress.update(|status| status.disk_compared_bytes += compared);
        self.progress.disk(&self.disk.id, |shown| shown.compared_bytes += compared);
        let differs = |number: &u64| {
            let index = (number - window.start) as usize;
            differing[index / 8] >> (index % 8) & 1 == 1
        };
        for range in window.clone().filter(differs).filter_map(|n| block(n, image_bytes)) {
            if self.disk.read_only {
                return Err(CloneError::Failed(format!(
                    "the read-only disk '{}' differs on the backup at byte {}, and a disk that the guest cannot \
                     write is not written there either: copy its image to the backup's host",
                    self.disk.id, range.start
                )));
            }
            self.pass(range, &mut |message| way.message(message))?;
        }
        Ok(())
    }

    fn read(&mut self, range: Range<u64>) -> Result<&[u8], CloneError> {
        let (id, len) = (&self.disk.id, (range.end - range.start) as usize);
        self.disk.copy.read(range.start, len).map_err(|error: io::Error| {
            CloneError::Failed(format!("cannot read disk '{id}' at byte {}: {error}", range.start))
        })
    }

    /// Passes on what a range holds.
    fn pass(&mut self, range: Range<u64>, pass: Pass<'_>) -> Result<(), CloneError> {
        let (disk, mut at) = (self.number, range.start);
        while at < range.end {
            let piece = at..(at + PIECE_BYTES).min(range.end);
            at = piece.end;
            let (offset, len) = (piece.start, piece.end - piece.start);
            let bytes = self.read(piece)?;
            let zeroes = bytes.chunks(ZEROES.len()).all(|chunk| chunk == &ZEROES[..chunk.len()]);
            let message = match zeroes {
                true => Message::DiskZeroes { disk, offset, len },
                false => Message::DiskData { disk, offset, bytes: bytes.to_vec() },
            };
            self.progress.update(|status| status.disk_copied_bytes += len);
            self.progress.disk(&self.disk.id, |shown| shown.copied_bytes += len);
            pass(message)?;
        }
        Ok(())
    }

    fn note(&mut self) {
        self.noted.extend(self.tracking.take());
        self.noted.sort_unstable_by_key(|range| range.start);
        let mut joined: Vec<Range<u64>> = Vec::new();
        for range in std::mem::take(&mut self.noted) {
            match joined.last_mut() {
                Some(last) if last.end >= range.start => last.end = last.end.max(range.end),
                _ => joined.push(range),
            }
        }
        self.noted = joined;
    }
}

impl Source for DiskSource {
    /// What is noted is what was written since [`DiskSource::compare`] began: all else has been sent by it.
    fn look(&mut self) -> Result<u64, CloneError> {
        self.note();
        Ok(self.noted.iter().map(|range| range.end - range.start).sum())
    }

    fn send(&mut self, pass: Pass<'_>) -> Result<(), CloneError> {
        for range in std::mem::take(&mut self.noted) {
            self.pass(range, pass)?;
        }
        Ok(())
    }

    fn send_last(&mut self, _frozen: &Frozen, pass: Pass<'_>) -> Result<(), CloneError> {
        self.note();
        self.send(pass)
    }
}

/// The disk's numbers in what is shown, which are there from the beginning.
pub(super) fn shown<'a>(disks: &'a mut Vec<CloneDisk>, id: &str) -> &'a mut CloneDisk {
    let index = disks.iter().position(|disk| disk.id == id).unwrap_or_else(|| {
        disks.push(CloneDisk { id: id.to_owned(), ..CloneDisk::default() });
        disks.len() - 1
    });
    &mut disks[index]
}
