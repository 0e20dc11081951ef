//! The seam between a disk's back half and the host, for tests: a place to put errors, short transfers and delays
//! where a host would have them. In production nothing is there.

use nix::errno::Errno;

/// A piece of I/O as the host is asked for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Step {
    /// What it does.
    pub kind: StepKind,
    /// Where in the image, in bytes.
    pub offset: u64,
    /// How many bytes.
    pub len: u64,
}

/// What a step does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StepKind {
    /// Reads.
    Read,
    /// Writes.
    Write,
    /// Makes stable what has been written.
    Sync,
    /// Gives space back or makes it zero.
    Allocate,
}

/// What becomes of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The host does it.
    Go,
    /// It fails without having been done, as if the host had returned this: of a sync it is believed as the host's own.
    Fail(Errno),
    /// The host transfers so many bytes at most.
    AtMost(usize),
}

/// Something that meddles.
pub trait Faults: Send + Sync {
    /// Called on the disk's thread before a step is handed on; leave to begin is asked for afterwards. May block, as a
    /// process does that is frozen with requests in its queue.
    fn before(&self, _step: Step) -> Verdict {
        Verdict::Go
    }

    /// Called when the host has done a step, which still counts as under way. May block.
    fn after(&self, _step: Step) {}
}
