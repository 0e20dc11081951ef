//! The host half of an entropy source: a file, as a rule `/dev/urandom`.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock, PoisonError, mpsc};

use nix::poll::PollFlags;

use crate::poll::{Bell, PollThread, readable};

/// Where random bytes go; called on the source's thread, once for each request, in order.
pub type EntropySink = Box<dyn Fn(Vec<u8>) + Send>;

/// What can go wrong in opening an entropy source.
#[derive(Debug, thiserror::Error)]
pub enum RngBackError {
    /// The file cannot be opened.
    #[error("cannot open the source of random numbers {}", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// No thread for it.
    #[error("cannot start the thread of the source of random numbers {}", path.display())]
    Thread {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

/// An open entropy source.
#[derive(Debug)]
pub struct RngBack {
    path: PathBuf,
    /// Until started: the file, and the lengths asked for and not yet given.
    source: Mutex<Option<(File, mpsc::Receiver<u32>)>>,
    wanted: mpsc::Sender<u32>,
    thread: OnceLock<PollThread>,
}

impl RngBack {
    /// Opens the source at `path`. Nothing is read yet.
    ///
    /// # Errors
    /// If it cannot be opened.
    pub fn open(path: &Path) -> Result<Self, RngBackError> {
        let path = path.to_path_buf();
        // A source that runs dry must not keep its thread from ending.
        let opened = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(&path);
        let file = match opened {
            Ok(file) => file,
            Err(source) => return Err(RngBackError::Open { path, source }),
        };
        let (wanted, asked) = mpsc::channel();
        let source = Mutex::new(Some((file, asked)));
        Ok(Self { path, source, wanted, thread: OnceLock::new() })
    }

    /// Starts the thread that reads. Once only; a second call does nothing.
    ///
    /// # Errors
    /// If the host has no thread to give.
    pub fn start(&self, sink: EntropySink) -> Result<(), RngBackError> {
        let source = self.source.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some((file, asked)) = source else { return Ok(()) };
        let source = Source { path: self.path.clone(), file, sink };
        let thread = PollThread::spawn("rng", move |bell| source.run(bell, &asked))
            .map_err(|source| RngBackError::Thread { path: self.path.clone(), source })?;
        // Rung when it can be reached: whoever asked before could not.
        self.thread.get_or_init(|| thread).ring();
        Ok(())
    }

    /// Asks for `len` bytes. Answered once the source is started. Takes no lock.
    pub fn request(&self, len: u32) {
        // Fails where the source has dried up for good, which was reported.
        let _ = self.wanted.send(len);
        if let Some(thread) = self.thread.get() {
            thread.ring();
        }
    }

    /// Ends the thread. What is unanswered stays so.
    pub fn stop(self) {
        drop(self);
    }
}

/// The thread's own.
struct Source {
    path: PathBuf,
    file: File,
    sink: EntropySink,
}

impl Source {
    fn run(mut self, bell: &Bell, asked: &mpsc::Receiver<u32>) {
        let mut next = None;
        while !bell.stopping() {
            next = next.or_else(|| asked.try_recv().ok());
            let waited = match next {
                None => bell.wait(&[]),
                Some(_) => bell.wait(&[(self.file.as_fd(), PollFlags::POLLIN)]),
            };
            let ready = match waited {
                Ok(ready) => ready,
                Err(error) => return self.give_up(&error),
            };
            let (Some(len), Some(&ready)) = (next, ready.first()) else { continue };
            if !readable(ready) {
                continue;
            }
            let mut bytes = vec![0; len as usize];
            match self.file.read(&mut bytes) {
                Ok(0) => return self.give_up(&io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => {
                    bytes.truncate(count);
                    next = None;
                    (self.sink)(bytes);
                }
                Err(e)
                    if matches!(
                        e.kind(),
                        io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock
                    ) => {}
                Err(error) => return self.give_up(&error),
            }
        }
    }

    fn give_up(&self, error: &io::Error) {
        let path = self.path.display();
        log::error!("no more random numbers for the guest: reading {path} failed: {error}");
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn requests_are_answered_in_order_with_their_lengths() {
        let back = RngBack::open(Path::new("/dev/urandom")).unwrap();
        back.request(16);
        let (sender, receiver) = mpsc::channel();
        back.start(Box::new(move |bytes| sender.send(bytes).unwrap())).unwrap();
        back.request(64);
        back.request(1);
        let lengths: Vec<_> = (0..3).map(|_| receiver.recv().unwrap().len()).collect();
        assert_eq!(lengths, [16, 64, 1]);
        back.stop();
        assert!(receiver.recv().is_err(), "the thread is gone");
    }

    #[test]
    fn a_dry_source_can_be_stopped() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fifo");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        // Held open for writing, so that the source is dry, not at its end.
        let _writer = OpenOptions::new().read(true).write(true).open(&path).unwrap();
        let back = RngBack::open(&path).unwrap();
        back.start(Box::new(|bytes| panic!("{bytes:?} from nowhere"))).unwrap();
        back.request(8);
        back.stop();
    }

    #[test]
    fn a_missing_source_is_named() {
        let error = RngBack::open(Path::new("/nonexistent/random")).unwrap_err();
        assert!(error.to_string().contains("/nonexistent/random"), "{error}");
    }
}
