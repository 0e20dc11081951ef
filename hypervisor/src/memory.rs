//! Guest-physical memory with per-page tracking of writes.
//!
//! Every write into guest memory leaves a trace: device writes through the vm-memory traits call
//! [`PageTracker::mark_dirty`](vm_memory::bitmap::Bitmap::mark_dirty), the software CPU sets the same flags itself. Two readers depend on it: the
//! copy and digest of dirty pages, and the software CPU's block cache (a page that holds decoded code
//! and is then written, by a disk read for example, must lose its blocks).

use vm_memory::GuestMemoryMmap;

/// The guest's memory: RAM ranges mapped into this process.
pub type GuestMemory = GuestMemoryMmap<()>;
