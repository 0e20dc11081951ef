//! What does a disk's I/O: a ring shared with the kernel where it lets us, else a pool of threads.

use std::io;
use std::sync::Arc;

use nix::errno::Errno;

use super::image::Image;
use super::job::Job;
use super::pool::Pool;
use super::ring::Ring;
use crate::poll::Bell;

/// What became of a step.
pub(super) enum Outcome {
    /// The host did it: bytes, where there were any.
    Done(Result<usize, Errno>),
    /// It may not begin now; nothing has been done.
    Refused,
}

/// Hands steps to the host, many at a time, and takes back what it has done. The disk's thread alone calls it;
/// its bell rings when there is something to take.
pub(super) trait Engine: Send {
    /// How many jobs may be begun now.
    fn room(&self) -> usize;
    /// How many have been begun and not been taken back.
    fn under_way(&self) -> usize;
    /// Begins the next step of each, no more than there is room for. The valve is asked right before the host is.
    fn begin(&mut self, jobs: Vec<Job>);
    /// Gives jobs back whose step has come to an end.
    fn finished(&mut self, into: &mut Vec<(Job, Outcome)>);
}

/// Which one is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EngineKind {
    /// `io_uring`.
    IoUring,
    /// Threads.
    Threads,
}

/// `io_uring` if wanted and to be had, else threads.
pub(super) fn start(
    image: &Arc<Image>,
    bell: &Arc<Bell>,
    io_uring: bool,
) -> io::Result<(Box<dyn Engine>, EngineKind)> {
    let path = image.path.display();
    if io_uring {
        match Ring::new(image, bell) {
            Ok(ring) => {
                log::info!("disk {path}: I/O by io_uring");
                return Ok((Box::new(ring), EngineKind::IoUring));
            }
            Err(error) => {
                log::info!("disk {path}: I/O by threads, as the kernel has no io_uring: {error}");
            }
        }
    } else {
        log::info!("disk {path}: I/O by threads, as io_uring is switched off");
    }
    Ok((Box::new(Pool::start(image, bell)?), EngineKind::Threads))
}
