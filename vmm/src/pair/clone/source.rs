//! What takes part in the rounds of a copy.

use ft::Message;

use super::CloneError;
use crate::run_loop::Frozen;

/// Takes a message of the copy on its way, or keeps it until the guest runs again.
pub type Pass<'a> = &'a mut dyn FnMut(Message) -> Result<(), CloneError>;

/// A part of the VM that changes while it is copied.
///
/// What must hold: whatever changes after a look is found by the next one. A change that falls between is
/// sent twice at worst, and never missed.
pub trait Source {
    /// Notes what has changed since this was called last, the first time everything. Gives the bytes that
    /// are noted and not sent.
    fn look(&mut self) -> Result<u64, CloneError>;

    /// Passes on what is noted.
    fn send(&mut self, pass: Pass<'_>) -> Result<(), CloneError>;

    /// The guest stands still: passes on what is noted and what it has changed since. That leaves when the
    /// guest runs again, so no answer to it may be waited for.
    fn send_last(&mut self, frozen: &Frozen, pass: Pass<'_>) -> Result<(), CloneError>;
}
