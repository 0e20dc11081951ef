//! The guest's memory as a [`Source`] of a copy.
//!
//! Pages that are read while the guest writes them may be torn: they are dirty again and go over again.

use ft::Message;
use ft::message::PAGE_BYTES;
use hypervisor::GuestMemory;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::CloneError;
use super::source::{Pass, Source};
use crate::run_loop::inbox::InboxSender;
use crate::run_loop::{self, Command, Frozen};

/// Pages in one message.
const RUN_PAGES: usize = 256;

static ZERO_PAGE: [u8; PAGE_BYTES] = [0; PAGE_BYTES];

/// See the module's documentation.
pub struct MemorySource {
    memory: GuestMemory,
    /// The guest's thread, which knows the dirty pages.
    inbox: InboxSender<run_loop::Message>,
    noted: Noted,
    buffer: Vec<u8>,
}

/// What has to go over.
enum Noted {
    /// Nobody has looked yet.
    Nothing,
    /// All pages that hold anything but zeros, which is what a new backup's memory holds.
    Everything,
    /// These, ascending, whatever they hold.
    Pages(Vec<u64>),
}

impl MemorySource {
    /// Copies `memory`, which the guest behind `inbox` writes.
    #[must_use]
    pub fn new(memory: GuestMemory, inbox: InboxSender<run_loop::Message>) -> Self {
        Self { memory, inbox, noted: Noted::Nothing, buffer: vec![0; RUN_PAGES * PAGE_BYTES] }
    }

    fn note(&mut self, dirty: &[u64]) {
        if let Noted::Pages(pages) = &mut self.noted {
            pages.extend_from_slice(dirty);
            pages.sort_unstable();
            pages.dedup();
        }
    }

    fn noted_bytes(&self) -> u64 {
        match &self.noted {
            Noted::Nothing => 0,
            Noted::Everything => self.memory.iter().map(GuestMemoryRegion::len).sum(),
            Noted::Pages(pages) => (pages.len() * PAGE_BYTES) as u64,
        }
    }

    /// Passes on what `count` pages from `first` on hold. Zero pages are left out if nobody needs to hear
    /// of them.
    fn run(
        &mut self,
        first: u64,
        count: usize,
        zeros: bool,
        pass: Pass<'_>,
    ) -> Result<(), CloneError> {
        let bytes = &mut self.buffer[..count * PAGE_BYTES];
        self.memory
            .read_slice(bytes, GuestAddress(first * PAGE_BYTES as u64))
            .map_err(|error| CloneError::Failed(format!("cannot read guest memory: {error}")))?;
        let is_zero = |page: &[u8]| page == ZERO_PAGE;
        let pages: Vec<&[u8]> = bytes.chunks_exact(PAGE_BYTES).collect();
        let mut next = first;
        for alike in pages.chunk_by(|a, b| is_zero(a) == is_zero(b)) {
            let (first, count) = (next, alike.len() as u64);
            next += count;
            if !is_zero(alike[0]) {
                pass(Message::Pages { first, bytes: alike.concat() })?;
            } else if zeros {
                pass(Message::ZeroPages { first, count })?;
            }
        }
        Ok(())
    }
}

impl Source for MemorySource {
    fn look(&mut self) -> Result<u64, CloneError> {
        let dirty = run_loop::ask(&self.inbox, Command::TakeDirtyPages)?;
        match self.noted {
            // What was dirty up to here went into an earlier copy or into none.
            Noted::Nothing => self.noted = Noted::Everything,
            Noted::Everything | Noted::Pages(_) => self.note(&dirty),
        }
        Ok(self.noted_bytes())
    }

    fn send(&mut self, pass: Pass<'_>) -> Result<(), CloneError> {
        match std::mem::replace(&mut self.noted, Noted::Pages(Vec::new())) {
            Noted::Nothing => {}
            Noted::Everything => {
                let regions = self.memory.iter();
                let regions: Vec<(u64, u64)> = regions
                    .map(|region| (region.start_addr().raw_value(), region.len()))
                    .map(|(start, len)| (start / PAGE_BYTES as u64, len / PAGE_BYTES as u64))
                    .collect();
                for (first, count) in regions {
                    for page in (first..first + count).step_by(RUN_PAGES) {
                        let count = (first + count - page).min(RUN_PAGES as u64);
                        self.run(page, count as usize, false, pass)?;
                    }
                }
            }
            Noted::Pages(pages) => {
                let runs = pages.chunk_by(|a, b| a + 1 == *b);
                for run in runs.flat_map(|run| run.chunks(RUN_PAGES)) {
                    self.run(run[0], run.len(), true, pass)?;
                }
            }
        }
        Ok(())
    }

    fn send_last(&mut self, frozen: &Frozen, pass: Pass<'_>) -> Result<(), CloneError> {
        self.note(&frozen.pages);
        self.send(pass)
    }
}
