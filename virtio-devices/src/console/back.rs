//! The host half of a console, for the virtio console and the serial port alike.
//!
//! One thread does all reading and writing. Output waits in a queue of bounded size; when nobody reads
//! it fast enough, the oldest goes. So a terminal that is stopped, or a socket whose client sleeps,
//! never holds up the guest.
//!
//! Input is read no faster than the guest takes it: little of it is under way at a time, and the rest stays with
//! whoever writes it, who waits as at any terminal. A socket's client that goes away meanwhile makes room for another; the
//! rest of what it wrote is read if the guest takes it before that one comes.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use nix::poll::PollFlags;

use super::output::Output;
use super::terminal::{self, RawMode};
use crate::poll::{Bell, PollThread, readable};
use crate::window::Window;

/// Bytes gathered for one write.
const WRITE_CHUNK: usize = 64 << 10;

/// Bytes read at a time.
const INPUT_CHUNK: usize = 4096;

/// Chunks read that the guest has not taken yet, at most. The front halves have room for twice as many: those of a
/// side that failed, and those of the one that took over.
const UNDER_WAY_MAX: usize = 2;

/// Where input goes; called on the console's thread.
pub type InputSink = Box<dyn Fn(Vec<u8>) + Send>;

/// What a console is connected to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ConsoleMode {
    /// Nothing: output is dropped, there is no input.
    Null,
    /// This process's standard input and output; a terminal is put into raw mode.
    Tty,
    /// A file that output is appended to.
    File(PathBuf),
    /// A new pseudo-terminal; see [`ConsoleBack::pty`].
    Pty,
    /// A Unix socket to listen on; one client at a time.
    Socket(PathBuf),
}

/// What can go wrong in opening a console.
#[derive(Debug, thiserror::Error)]
pub enum ConsoleBackError {
    /// The file cannot be opened.
    #[error("cannot open {} for the console's output", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// No pseudo-terminal.
    #[error("cannot make a pseudo-terminal for the console")]
    Pty {
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// Standard input or output cannot be used.
    #[error("cannot use the terminal for the console")]
    Tty {
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The socket cannot be listened on.
    #[error(
        "cannot listen on {} for the console; if the socket of an earlier run is in the way, remove it",
        path.display()
    )]
    Socket {
        /// The socket.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// No thread for it.
    #[error("cannot start the console's thread")]
    Thread {
        /// The cause.
        #[source]
        source: io::Error,
    },
}

/// An open console.
#[derive(Debug)]
pub struct ConsoleBack {
    mode: ConsoleMode,
    /// Opened early, until started.
    streams: Mutex<Option<Streams>>,
    pty: Option<PathBuf>,
    pending: Arc<Output>,
    window: Arc<Window>,
    running: OnceLock<Running>,
}

/// What there is from the start on. Fields are dropped in order: first the thread ends.
#[derive(Debug)]
struct Running {
    thread: PollThread,
    /// Puts the terminal back as it was.
    _raw_mode: Option<RawMode>,
    /// Removes the socket.
    _socket: Option<SocketFile>,
}

/// What the thread reads from and writes to.
#[derive(Debug, Default)]
struct Streams {
    input: Option<File>,
    /// Who writes the input has gone, though not all of it is read.
    leaving: bool,
    output: Option<File>,
    listener: Option<UnixListener>,
    /// The other side of a pseudo-terminal, held so that it has no end while no one uses it.
    _pty_user: Option<File>,
}

impl ConsoleBack {
    /// Opens files and makes the pseudo-terminal. The terminal is left alone and no socket is made until
    /// the start, so that a machine which only stands by takes them from nobody.
    ///
    /// # Errors
    /// If the file cannot be opened or there is no pseudo-terminal.
    pub fn open(mode: ConsoleMode) -> Result<Self, ConsoleBackError> {
        let mut streams = Streams::default();
        let mut pty = None;
        match &mode {
            ConsoleMode::Null | ConsoleMode::Tty | ConsoleMode::Socket(_) => {}
            ConsoleMode::File(path) => streams.output = Some(open_file(path)?),
            ConsoleMode::Pty => {
                let made =
                    terminal::open_pty().map_err(|source| ConsoleBackError::Pty { source })?;
                pty = Some(made.path);
                streams.input = Some(made.input);
                streams.output = Some(made.output);
                streams._pty_user = Some(made.user);
            }
        }
        let streams = Mutex::new(Some(streams));
        let window = Arc::new(Window::new(UNDER_WAY_MAX));
        let (pending, running) = (Arc::default(), OnceLock::new());
        Ok(Self { mode, streams, pty, pending, window, running })
    }

    /// The pseudo-terminal's path, if that is the mode.
    #[must_use]
    pub fn pty(&self) -> Option<&Path> {
        self.pty.as_deref()
    }

    /// Starts reading and writing. Once only; a second call does nothing.
    ///
    /// # Errors
    /// If terminal or socket cannot be had, or the host has no thread to give.
    pub fn start(&self, sink: InputSink) -> Result<(), ConsoleBackError> {
        if self.mode == ConsoleMode::Null {
            return Ok(());
        }
        let streams = self.streams.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(mut streams) = streams else { return Ok(()) };
        let (mut raw_mode, mut socket) = (None, None);
        match &self.mode {
            ConsoleMode::Tty => {
                let tty = |source| ConsoleBackError::Tty { source };
                streams.input = Some(terminal::standard_input().map_err(tty)?);
                streams.output = Some(terminal::standard_output().map_err(tty)?);
                raw_mode = RawMode::enter().map_err(tty)?;
            }
            ConsoleMode::Socket(path) => {
                streams.listener = Some(listen(path)?);
                socket = Some(SocketFile(path.clone()));
            }
            ConsoleMode::Null | ConsoleMode::File(_) | ConsoleMode::Pty => {}
        }
        let (pending, window) = (Arc::clone(&self.pending), Arc::clone(&self.window));
        let worker = Worker { streams, pending, window, written: 0, writing: Vec::new(), sink };
        let thread = PollThread::spawn("console", move |bell| worker.run(bell))
            .map_err(|source| ConsoleBackError::Thread { source })?;
        let running = Running { thread, _raw_mode: raw_mode, _socket: socket };
        // Rung when it can be reached: whoever printed before could not.
        self.running.get_or_init(|| running).thread.ring();
        Ok(())
    }

    /// Queues output. Before the start it is kept.
    pub fn output(&self, bytes: &[u8]) {
        if self.mode == ConsoleMode::Null {
            return;
        }
        self.pending.push(bytes);
        if let Some(running) = self.running.get() {
            running.thread.ring();
        }
    }

    /// The guest has taken a chunk of input: another may follow.
    pub fn taken(&self) {
        if self.window.drain()
            && let Some(running) = self.running.get()
        {
            running.thread.ring();
        }
    }

    /// Writes what can be written at once, ends the thread, and leaves terminal and file system as
    /// they were.
    pub fn stop(self) {
        drop(self);
    }
}

fn open_file(path: &Path) -> Result<File, ConsoleBackError> {
    let opened = OpenOptions::new()
        .append(true)
        .create(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path);
    opened.map_err(|source| ConsoleBackError::File { path: path.into(), source })
}

fn listen(path: &Path) -> Result<UnixListener, ConsoleBackError> {
    let listening = UnixListener::bind(path).and_then(|listener| {
        listener.set_nonblocking(true)?;
        Ok(listener)
    });
    listening.map_err(|source| ConsoleBackError::Socket { path: path.into(), source })
}

/// A socket's name in the file system.
#[derive(Debug)]
struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        // Somebody else may have removed it.
        let _ = std::fs::remove_file(&self.0);
    }
}

/// The thread's own.
struct Worker {
    streams: Streams,
    pending: Arc<Output>,
    window: Arc<Window>,
    /// Taken from `pending`; the first `written` bytes are out.
    writing: Vec<u8>,
    written: usize,
    sink: InputSink,
}

/// What a descriptor in the list to wait for is.
#[derive(Debug, Clone, Copy)]
enum Role {
    Input,
    /// What is not read for now; whether it will go on is all that is asked.
    Client,
    Output,
    Listener,
}

impl Worker {
    fn run(mut self, bell: &Bell) {
        loop {
            let (roles, wanted) = self.wanted();
            let ready = match bell.wait(&wanted) {
                Ok(ready) => ready,
                Err(error) => {
                    log::error!("the console ends: {error}");
                    return;
                }
            };
            drop(wanted);
            if bell.stopping() {
                self.write();
                return;
            }
            for (role, ready) in roles.into_iter().zip(ready) {
                match role {
                    Role::Input if readable(ready) => self.read(),
                    Role::Output if !ready.is_empty() => self.write(),
                    Role::Client if !ready.is_empty() => self.streams.leaving = true,
                    Role::Listener if readable(ready) => self.accept(),
                    Role::Input | Role::Client | Role::Output | Role::Listener => {}
                }
            }
        }
    }

    fn wanted(&self) -> (Vec<Role>, Vec<(BorrowedFd<'_>, PollFlags)>) {
        let Streams { input, leaving, output, listener, .. } = &self.streams;
        let (mut roles, mut fds) = (Vec::new(), Vec::new());
        let mut want = |role, fd, flags| {
            roles.push(role);
            fds.push((fd, flags));
        };
        if let Some(input) = input {
            if !self.window.is_closed() {
                want(Role::Input, input.as_fd(), PollFlags::POLLIN);
            } else if listener.is_some() && !leaving {
                // A hang-up is told without being asked for.
                want(Role::Client, input.as_fd(), PollFlags::empty());
            }
        }
        if let Some(listener) = listener {
            want(Role::Listener, listener.as_fd(), PollFlags::POLLIN);
        }
        let idle = self.written == self.writing.len() && self.pending.is_empty();
        if let Some(output) = output
            && !idle
        {
            want(Role::Output, output.as_fd(), PollFlags::POLLOUT);
        }
        (roles, fds)
    }

    fn read(&mut self) {
        let Some(input) = &mut self.streams.input else { return };
        let mut bytes = vec![0; INPUT_CHUNK];
        match input.read(&mut bytes) {
            Ok(0) => self.hang_up(),
            Ok(count) => {
                bytes.truncate(count);
                self.window.fill();
                (self.sink)(bytes);
            }
            Err(error) if passing(&error) => {}
            Err(error) => {
                log::warn!("no more console input: {error}");
                self.hang_up();
            }
        }
    }

    /// Writes pending output as long as it is taken.
    fn write(&mut self) {
        while self.streams.output.is_some() && self.gather() {
            let Some(output) = &mut self.streams.output else { return };
            match output.write(&self.writing[self.written..]) {
                Ok(written) => self.written += written,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => {
                    log::warn!("console output is lost from here on: {error}");
                    self.streams.output = None;
                    while self.gather() {
                        self.written = self.writing.len();
                    }
                }
            }
        }
    }

    /// Takes what is to be written next. False if there is nothing.
    fn gather(&mut self) -> bool {
        if self.written == self.writing.len() {
            self.written = 0;
            self.writing.clear();
            while self.writing.len() < WRITE_CHUNK
                && let Some(piece) = self.pending.take()
            {
                self.writing.extend(piece);
            }
        }
        !self.writing.is_empty()
    }

    /// The input has ended. A socket waits for its next client.
    fn hang_up(&mut self) {
        self.streams.input = None;
        self.streams.leaving = false;
        if self.streams.listener.is_some() {
            self.streams.output = None;
        }
    }

    fn accept(&mut self) {
        let Some(listener) = &self.streams.listener else { return };
        let client = match listener.accept() {
            Ok((client, _)) => client,
            Err(error) if passing(&error) => return,
            Err(error) => {
                log::warn!("a client of the console's socket was not accepted: {error}");
                return;
            }
        };
        if self.streams.input.is_some() && !self.streams.leaving {
            // One at a time: this one is shown the door by closing.
            return;
        }
        self.hang_up();
        match both_ways(client) {
            Ok((input, output)) => {
                self.streams.input = Some(input);
                self.streams.output = Some(output);
            }
            Err(error) => log::warn!("a client of the console's socket was lost: {error}"),
        }
    }
}

fn both_ways(client: UnixStream) -> io::Result<(File, File)> {
    client.set_nonblocking(true)?;
    let output = client.try_clone()?;
    Ok((File::from(std::os::fd::OwnedFd::from(client)), std::os::fd::OwnedFd::from(output).into()))
}

fn passing(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock)
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;

    fn start(back: &ConsoleBack) -> mpsc::Receiver<Vec<u8>> {
        let (sender, receiver) = mpsc::channel();
        // A test that has seen enough no longer listens.
        back.start(Box::new(move |bytes| drop(sender.send(bytes)))).unwrap();
        receiver
    }

    fn collect(receiver: &mpsc::Receiver<Vec<u8>>, len: usize) -> Vec<u8> {
        let mut all = Vec::new();
        while all.len() < len {
            all.extend(receiver.recv().unwrap());
        }
        all
    }

    #[test]
    fn a_file_gets_all_output_appended_and_a_stop_loses_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console.log");
        std::fs::write(&path, "before\n").unwrap();
        let back = ConsoleBack::open(ConsoleMode::File(path.clone())).unwrap();
        back.output(b"early\n");
        let input = start(&back);
        back.output(b"late\n");
        back.stop();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "before\nearly\nlate\n");
        assert!(input.recv().is_err(), "a file gives no input");
    }

    #[test]
    fn a_pty_carries_both_ways_without_echo() {
        let back = ConsoleBack::open(ConsoleMode::Pty).unwrap();
        let path = back.pty().unwrap().to_path_buf();
        let input = start(&back);
        let mut user = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NOCTTY)
            .open(path)
            .unwrap();
        back.output(b"login: ");
        let mut seen = [0; 7];
        user.read_exact(&mut seen).unwrap();
        assert_eq!(&seen, b"login: ");
        user.write_all(b"root\r\x03").unwrap();
        assert_eq!(collect(&input, 6), b"root\r\x03");
        drop(user);
        back.stop();
    }

    /// Takes all of a socket's input, each chunk only when nothing more has come for a while.
    #[test]
    fn no_more_is_read_than_the_guest_takes_and_nothing_is_lost() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console.sock");
        let back = ConsoleBack::open(ConsoleMode::Socket(path.clone())).unwrap();
        let input = start(&back);
        let sent: Vec<u8> = (0..400_000u32).flat_map(|n| n.to_le_bytes()).collect();
        let mut client = UnixStream::connect(&path).unwrap();
        let bytes = sent.clone();
        let writer = std::thread::spawn(move || client.write_all(&bytes).unwrap());
        let mut received = Vec::new();
        for _ in 0..UNDER_WAY_MAX {
            received.extend(input.recv().unwrap());
        }
        let silence = Duration::from_millis(100);
        for _ in 0..5 {
            assert!(input.recv_timeout(silence).is_err(), "it reads although nothing was taken");
            back.taken();
            received.extend(input.recv().unwrap());
        }
        assert!(!writer.is_finished(), "what is not read waits with the writer");
        while received.len() < sent.len() {
            back.taken();
            received.extend(input.recv().unwrap());
        }
        writer.join().unwrap();
        assert!(received == sent, "in order");
        back.stop();
    }

    #[test]
    fn output_leaves_while_input_waits() {
        let back = ConsoleBack::open(ConsoleMode::Pty).unwrap();
        let path = back.pty().unwrap().to_path_buf();
        let input = start(&back);
        let mut options = OpenOptions::new();
        let options = options.read(true).write(true).custom_flags(libc::O_NOCTTY);
        let mut user = options.open(path).unwrap();
        for _ in 0..UNDER_WAY_MAX {
            user.write_all(b"x").unwrap();
            assert_eq!(input.recv().unwrap(), b"x");
        }
        user.write_all(b"y").unwrap();
        back.output(b"still here");
        let mut seen = [0; 10];
        user.read_exact(&mut seen).unwrap();
        assert_eq!(&seen, b"still here");
        assert!(input.try_recv().is_err());
        back.taken();
        assert_eq!(input.recv().unwrap(), b"y");
        drop(user);
        back.stop();
    }

    #[test]
    fn a_socket_serves_one_client_after_another_and_goes_away() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console.sock");
        let back = ConsoleBack::open(ConsoleMode::Socket(path.clone())).unwrap();
        assert!(!path.exists(), "a console that only stands by takes no name");
        let input = start(&back);
        for message in [b"one".as_slice(), b"second"] {
            let mut client = UnixStream::connect(&path).unwrap();
            client.write_all(message).unwrap();
            assert_eq!(collect(&input, message.len()), message);
            back.taken();
            back.output(message);
            let mut echo = vec![0; message.len()];
            client.read_exact(&mut echo).unwrap();
            assert_eq!(echo, message);
            // The next client is turned away until the end of this one has been seen.
            client.shutdown(std::net::Shutdown::Write).unwrap();
            assert_eq!(client.read(&mut [0]).unwrap(), 0);
        }
        back.stop();
        assert!(!path.exists());
    }

    /// Fills the window, and leaves more unread.
    fn client_that_waits(path: &Path, input: &mpsc::Receiver<Vec<u8>>) -> UnixStream {
        let mut client = UnixStream::connect(path).unwrap();
        for _ in 0..UNDER_WAY_MAX {
            client.write_all(b"x").unwrap();
            assert_eq!(input.recv().unwrap(), b"x");
        }
        client.write_all(b"rest").unwrap();
        client
    }

    /// Connects until it is not turned away: then it gets what `back` puts out.
    fn served(back: &ConsoleBack, path: &Path) -> UnixStream {
        loop {
            let mut client = UnixStream::connect(path).unwrap();
            back.output(b"!");
            if client.read(&mut [0]).unwrap_or(0) == 1 {
                return client;
            }
        }
    }

    #[test]
    fn a_client_that_goes_while_the_guest_reads_nothing_makes_room_for_another() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console.sock");
        let back = ConsoleBack::open(ConsoleMode::Socket(path.clone())).unwrap();
        let input = start(&back);
        drop(client_that_waits(&path, &input));
        let mut second = served(&back, &path);
        second.write_all(b"second").unwrap();
        back.taken();
        assert_eq!(input.recv().unwrap(), b"second");
        back.stop();
    }

    #[test]
    fn what_a_client_wrote_before_it_went_is_read_when_the_guest_takes_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console.sock");
        let back = ConsoleBack::open(ConsoleMode::Socket(path.clone())).unwrap();
        let input = start(&back);
        drop(client_that_waits(&path, &input));
        back.taken();
        assert_eq!(input.recv().unwrap(), b"rest");
        back.stop();
    }

    #[test]
    fn errors_name_what_failed() {
        let file = ConsoleBack::open(ConsoleMode::File("/nonexistent/log".into())).unwrap_err();
        assert!(file.to_string().contains("/nonexistent/log"), "{file}");
        let socket = ConsoleMode::Socket("/nonexistent/socket".into());
        let error = ConsoleBack::open(socket).unwrap().start(Box::new(drop)).unwrap_err();
        assert!(error.to_string().contains("/nonexistent/socket"), "{error}");
    }
}
