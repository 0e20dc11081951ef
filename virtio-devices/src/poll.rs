//! A thread that waits for file descriptors and can be stopped at once.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

/// What the thread waits for besides its descriptors: its owner.
#[derive(Debug)]
pub(crate) struct Bell {
    event: EventFd,
    stop: AtomicBool,
}

impl Bell {
    pub(crate) fn new() -> io::Result<Self> {
        let flags = EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC;
        Ok(Self { event: EventFd::from_flags(flags)?, stop: AtomicBool::new(false) })
    }

    /// Wakes the thread.
    pub(crate) fn ring(&self) {
        // Fails only when the counter is about to overflow: then the bell is ringing anyway.
        let _ = self.event.write(1);
    }

    /// Whether the thread is to end.
    pub(crate) fn stopping(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    /// Waits until the bell rings, at most for `timeout`.
    pub(crate) fn wait_at_most(&self, timeout: Option<Duration>) -> io::Result<()> {
        // Rounded up, or the last fraction of a millisecond would be spent asking again and again.
        let ms = |timeout: Duration| timeout.as_micros().div_ceil(1000);
        let timeout = timeout.map_or(PollTimeout::NONE, |timeout| {
            PollTimeout::try_from(ms(timeout)).unwrap_or(PollTimeout::MAX)
        });
        let mut fds = [PollFd::new(self.event.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
        // Not blocking: at worst there is nothing to read.
        let _ = self.event.read();
        Ok(())
    }

    /// Waits until the bell rings or one of `wanted` is ready, and says what each is ready for.
    pub(crate) fn wait(
        &self,
        wanted: &[(BorrowedFd<'_>, PollFlags)],
    ) -> io::Result<Vec<PollFlags>> {
        let mut fds = vec![PollFd::new(self.event.as_fd(), PollFlags::POLLIN)];
        fds.extend(wanted.iter().map(|&(fd, flags)| PollFd::new(fd, flags)));
        while let Err(error) = poll(&mut fds, PollTimeout::NONE) {
            if error != Errno::EINTR {
                return Err(error.into());
            }
        }
        let ready = |fd: &PollFd<'_>| fd.revents().unwrap_or(PollFlags::empty());
        if !ready(&fds[0]).is_empty() {
            // Not blocking: at worst there is nothing to read.
            let _ = self.event.read();
        }
        Ok(fds[1..].iter().map(ready).collect())
    }
}

/// For those who ring it by descriptor, as the kernel does.
impl AsRawFd for Bell {
    fn as_raw_fd(&self) -> RawFd {
        self.event.as_fd().as_raw_fd()
    }
}

/// A running thread and its bell. Dropping it stops the thread and waits for its end.
#[derive(Debug)]
pub(crate) struct PollThread {
    bell: Arc<Bell>,
    thread: Option<JoinHandle<()>>,
}

impl PollThread {
    /// Runs `work` on a thread of its own until it returns, which it does when its bell says so.
    pub(crate) fn spawn(name: &str, work: impl FnOnce(&Bell) + Send + 'static) -> io::Result<Self> {
        let bell = Arc::new(Bell::new()?);
        let inside = Arc::clone(&bell);
        let thread = std::thread::Builder::new().name(name.into()).spawn(move || work(&inside))?;
        Ok(Self { bell, thread: Some(thread) })
    }

    /// Wakes it.
    pub(crate) fn ring(&self) {
        self.bell.ring();
    }
}

impl Drop for PollThread {
    fn drop(&mut self) {
        self.bell.stop.store(true, Ordering::Release);
        self.bell.ring();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("the thread of a device's back half panicked");
        }
    }
}

/// Whether a descriptor is ready for reading, or has something to say that a read will tell.
pub(crate) fn readable(ready: PollFlags) -> bool {
    ready.intersects(PollFlags::POLLIN | PollFlags::POLLHUP | PollFlags::POLLERR)
}
