//! An open image as those see it who copy it while its disk works on it.
//!
//! What must hold: no write is missed. A write is noted before the host gets it and once more when the host has done
//! it, before anybody hears of that. So whoever takes what is noted and reads it afterwards has either all of a write,
//! or finds it noted again.

use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::errno::Errno;
use nix::fcntl::FallocateFlags;

use super::image::Image;
use super::job::{Aligned, DIRECT_ALIGNMENT, Io};

/// Most bytes that are read at a time.
pub const MAX_COPY_BYTES: usize = 1 << 20;
/// Writes are noted in units of this many bytes.
const UNIT_BYTES: u64 = 4096;
/// Units in one word of the map.
const WORD_UNITS: u64 = u64::BITS as u64;

/// See the module's documentation. I/O here asks no valve: it is about images that nobody else works with.
pub struct ImageCopy {
    image: Arc<Image>,
    buffer: Aligned,
}

impl ImageCopy {
    pub(super) fn new(image: Arc<Image>) -> Self {
        Self { image, buffer: Aligned::zeroed(MAX_COPY_BYTES, DIRECT_ALIGNMENT) }
    }

    /// The size of the image.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.image.bytes()
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.image.path
    }

    /// Has what is read from here on come from the storage. What an earlier process could not write, the host may still show,
    /// and not say again that it was lost.
    pub fn forget_cached(&self) {
        self.image.forget_cached();
    }

    /// Reads `len` bytes at `offset`, whole sectors of at most [`MAX_COPY_BYTES`].
    ///
    /// # Errors
    /// If the host cannot, or the image ends before.
    pub fn read(&mut self, offset: u64, len: usize) -> io::Result<&[u8]> {
        let mut done = 0;
        while done < len {
            let into = &mut self.buffer.bytes_mut()[done..len];
            match self.image.perform(Io::Read { offset: offset + done as u64, into }) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => done += count,
                Err(Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(&self.buffer.bytes()[..len])
    }

    /// Writes `bytes` at `offset`, whole sectors.
    ///
    /// # Errors
    /// If that is not within the image, or the host cannot.
    pub fn write(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.check(offset, bytes.len() as u64)?;
        for (piece, bytes) in bytes.chunks(MAX_COPY_BYTES).enumerate() {
            let offset = offset + (piece * MAX_COPY_BYTES) as u64;
            self.buffer.bytes_mut()[..bytes.len()].copy_from_slice(bytes);
            let mut done = 0;
            while done < bytes.len() {
                let from = &self.buffer.bytes()[done..bytes.len()];
                match self.image.perform(Io::Write { offset: offset + done as u64, from }) {
                    Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                    Ok(count) => done += count,
                    Err(Errno::EINTR) => {}
                    Err(error) => return Err(error.into()),
                }
            }
        }
        Ok(())
    }

    /// Has a range read as zeroes; where the file system can, it takes no space any more. Tells of each request as it
    /// begins.
    ///
    /// # Errors
    /// If that is not within the image, or the host cannot.
    pub fn zero(&mut self, offset: u64, len: u64, mut begins: impl FnMut()) -> io::Result<()> {
        self.check(offset, len)?;
        let how = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        begins();
        if self.image.perform(Io::Allocate { how, offset, len }).is_ok() {
            return Ok(());
        }
        let zeroes = vec![0; MAX_COPY_BYTES];
        let end = offset + len;
        for at in (offset..end).step_by(MAX_COPY_BYTES) {
            let count = (end - at).min(MAX_COPY_BYTES as u64) as usize;
            begins();
            self.write(at, &zeroes[..count])?;
        }
        Ok(())
    }

    /// Makes all that was written stable. The disk may work on the image meanwhile.
    ///
    /// # Errors
    /// If the host cannot, or could not once since the image was opened.
    pub fn sync(&self) -> io::Result<()> {
        Ok(self.image.sync_beside()?)
    }

    /// Notes what is written from now on, until the end of what this gives.
    #[must_use]
    pub fn track(&self) -> Tracking {
        let written = Arc::new(Written::new(self.bytes()));
        self.image.track(Some(Arc::clone(&written)));
        Tracking { image: Arc::clone(&self.image), written }
    }

    fn check(&self, offset: u64, len: u64) -> io::Result<()> {
        let within = offset.checked_add(len).is_some_and(|end| end <= self.bytes());
        let sectors = offset.is_multiple_of(512) && len.is_multiple_of(512);
        if within && sectors { Ok(()) } else { Err(io::ErrorKind::InvalidInput.into()) }
    }
}

/// An image whose writes are noted. One at a time per image.
pub struct Tracking {
    image: Arc<Image>,
    written: Arc<Written>,
}

impl Tracking {
    /// What was written since this was asked last, in bytes, ascending, not touching each other.
    #[must_use]
    pub fn take(&self) -> Vec<Range<u64>> {
        self.written.take()
    }
}

impl Drop for Tracking {
    fn drop(&mut self) {
        self.image.track(None);
    }
}

/// A bit for each unit of an image.
#[derive(Debug)]
pub(super) struct Written {
    words: Vec<AtomicU64>,
    bytes: u64,
}

impl Written {
    fn new(bytes: u64) -> Self {
        let words = bytes.div_ceil(UNIT_BYTES * WORD_UNITS);
        Self { words: (0..words).map(|_| AtomicU64::new(0)).collect(), bytes }
    }

    /// Notes a range, which lies within the image.
    pub fn note(&self, offset: u64, len: u64) {
        if len == 0 {
            return;
        }
        let (first, last) = (offset / UNIT_BYTES, (offset + len - 1) / UNIT_BYTES);
        for word in first / WORD_UNITS..=last / WORD_UNITS {
            let from = first.max(word * WORD_UNITS) % WORD_UNITS;
            let to = last.min(word * WORD_UNITS + WORD_UNITS - 1) % WORD_UNITS;
            let bits = (u64::MAX >> (WORD_UNITS - 1 - to)) & (u64::MAX << from);
            if let Some(word) = self.words.get(word as usize) {
                word.fetch_or(bits, Ordering::SeqCst);
            }
        }
    }

    fn take(&self) -> Vec<Range<u64>> {
        let mut ranges: Vec<Range<u64>> = Vec::new();
        for (index, word) in self.words.iter().enumerate() {
            if word.load(Ordering::SeqCst) == 0 {
                continue;
            }
            let bits = word.swap(0, Ordering::SeqCst);
            for bit in (0..WORD_UNITS).filter(|bit| bits >> bit & 1 == 1) {
                let start = (index as u64 * WORD_UNITS + bit) * UNIT_BYTES;
                let end = (start + UNIT_BYTES).min(self.bytes);
                match ranges.last_mut() {
                    Some(last) if last.end == start => last.end = end,
                    _ => ranges.push(start..end),
                }
            }
        }
        ranges
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::back::BlockBack;
    use crate::effect::{BlockOp, BlockRequest};

    #[test]
    fn written_units_are_found_once_and_put_together() {
        let written = Written::new(1 << 20 | 512);
        assert!(written.take().is_empty());
        written.note(5000, 1);
        written.note(8192, 512);
        written.note(60 * 4096, 10 * 4096);
        written.note(1 << 20, 512);
        written.note(0, 0);
        let expected = [4096..12288, 60 * 4096..70 * 4096, 1 << 20..1 << 20 | 512];
        assert_eq!(written.take(), expected);
        assert!(written.take().is_empty());
    }

    #[test]
    fn a_disk_notes_what_it_writes_and_only_while_asked_to() {
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().set_len(1 << 20).unwrap();
        let disk = BlockBack::open(image.path(), false).unwrap();
        let (sender, completions) = std::sync::mpsc::channel();
        disk.start(Box::new(move |done| sender.send(done.id).unwrap())).unwrap();
        let write = |id, sector| {
            let op = BlockOp::Write { sector, data: Arc::from(vec![7; 512]) };
            disk.submit(BlockRequest { id, op });
            assert_eq!(completions.recv().unwrap(), id);
        };
        let mut copy = disk.copy();
        write(1, 8);
        let (tracking, unit) = (copy.track(), 8192..12288);
        write(2, 16);
        disk.submit(BlockRequest { id: 3, op: BlockOp::Read { sector: 800, len: 512 } });
        assert_eq!(completions.recv().unwrap(), 3);
        assert_eq!(tracking.take(), std::slice::from_ref(&unit));
        assert_eq!(copy.read(8192, 512).unwrap(), [7; 512]);
        let zeroes = BlockOp::WriteZeroes { sector: 16, sectors: 1, unmap: false };
        disk.submit(BlockRequest { id: 4, op: zeroes });
        assert_eq!(completions.recv().unwrap(), 4);
        assert_eq!(tracking.take(), std::slice::from_ref(&unit));
        drop(tracking);
        write(5, 24);
        assert!(copy.track().take().is_empty());
    }

    #[test]
    fn a_copy_writes_and_zeroes_within_the_image_only() {
        for direct in [false, true] {
            let image = tempfile::NamedTempFile::new_in(env!("CARGO_MANIFEST_DIR")).unwrap();
            image.as_file().set_len(8192).unwrap();
            let options = crate::block::back::BlockOptions {
                direct,
                ..crate::block::back::BlockOptions::new(image.path())
            };
            let Ok(disk) = BlockBack::open_with(&options) else {
                eprintln!("SKIPPED: the file system here cannot bypass its page cache");
                continue;
            };
            let mut copy = disk.copy();
            copy.write(512, &[9; 1024]).unwrap();
            assert_eq!(copy.read(0, 2048).unwrap()[511..513], [0, 9]);
            copy.zero(1024, 512, || ()).unwrap();
            assert_eq!(copy.read(512, 1024).unwrap()[511..513], [9, 0]);
            copy.sync().unwrap();
            for (offset, len) in [(8192, 512), (u64::MAX - 511, 512), (1, 512), (0, 100)] {
                assert!(copy.write(offset, &vec![0; len]).is_err());
                assert!(copy.zero(offset, len as u64, || ()).is_err());
            }
            assert!(copy.read(7680, 1024).is_err());
        }
    }
}
