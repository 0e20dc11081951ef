//! The thread that speaks HTTP: accepts connections, cuts requests out of them, has the control thread answer,
//! writes the answers back.
//!
//! One thread and one request at a time, so that calls take effect in the order in which they arrived. What a
//! client can make this thread hold is bounded: ten connections, one head and one body each, and no
//! reading from a client that does not read its answers.

use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::event_loop::Inbox;
use super::http::{Parsed, RequestReader, Response};
use super::route::route;
use super::socket::ApiSocket;

/// Most connections at a time.
pub const MAX_CONNECTIONS: usize = 10;

/// Bytes read at a time; with [`MAX_HEAD`](super::http::MAX_HEAD) and the length of the longest answer, this
/// bounds how much one read can make the thread hold.
const READ_SIZE: usize = 4096;

/// How long an ending server waits for each client to take the rest of its answer.
const FLUSH_TIMEOUT: Duration = Duration::from_millis(200);

const FULL: &[u8] = b"HTTP/1.1 503 \r\nServer: Cloud Hypervisor API\r\nConnection: close\r\n\
    Content-Type: application/json\r\nContent-Length: 29\r\n\r\n[\"Too many open connections\"]";

const CONTINUE: &[u8] =
    b"HTTP/1.1 100 \r\nServer: Cloud Hypervisor API\r\nConnection: keep-alive\r\n\r\n";

/// Why there is no server.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The listening socket.
    #[error("cannot make the API socket non-blocking")]
    NonBlocking(#[source] io::Error),
    /// What stops the thread.
    #[error("cannot create an event descriptor for the API thread")]
    EventFd(#[source] Errno),
    /// The thread.
    #[error("cannot start the API thread")]
    Thread(#[source] io::Error),
}

/// A running server. Dropping it ends it: answers already given still go out, the socket goes away.
pub struct Server {
    stop: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Serves `socket`; calls go to `inbox`.
    pub fn start(socket: ApiSocket, inbox: Inbox) -> Result<Self, ServerError> {
        socket.listener().set_nonblocking(true).map_err(ServerError::NonBlocking)?;
        let stop = EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
            .map_err(ServerError::EventFd)?;
        let stop = Arc::new(stop);
        let worker = Worker {
            socket,
            inbox,
            stop: Arc::clone(&stop),
            connections: Vec::new(),
            accepting: true,
        };
        let thread = std::thread::Builder::new()
            .name("api".to_owned())
            .spawn(move || worker.run())
            .map_err(ServerError::Thread)?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Err(error) = self.stop.write(1) {
            log::error!("cannot stop the API thread: {error}");
            return;
        }
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            log::error!("the API thread panicked");
        }
    }
}

struct Worker {
    socket: ApiSocket,
    inbox: Inbox,
    stop: Arc<EventFd>,
    connections: Vec<Connection>,
    /// False for a while after accepting failed, for want of descriptors or memory.
    accepting: bool,
}

impl Worker {
    fn run(mut self) {
        loop {
            let ready = match self.wait() {
                Ok(ready) => ready,
                Err(Errno::EINTR) => continue,
                Err(error) => {
                    log::error!("the API thread ends: cannot wait for clients: {error}");
                    return;
                }
            };
            if ready.stop {
                self.connections.iter_mut().for_each(Connection::finish);
                return;
            }
            let inbox = &self.inbox;
            let mut woken = ready.connections.into_iter();
            self.connections.retain_mut(|connection| {
                !woken.next().unwrap_or(false) || connection.advance(inbox)
            });
            self.accepting = true;
            if ready.listener {
                self.accept();
            }
        }
    }

    fn wait(&self) -> Result<Ready, Errno> {
        let accept = if self.accepting { PollFlags::POLLIN } else { PollFlags::empty() };
        let mut fds = vec![
            PollFd::new(self.stop.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.socket.listener().as_fd(), accept),
        ];
        fds.extend(
            self.connections
                .iter()
                .map(|connection| PollFd::new(connection.stream.as_fd(), connection.interest())),
        );
        let timeout = if self.accepting { PollTimeout::NONE } else { PollTimeout::from(1000u16) };
        poll(&mut fds, timeout)?;
        // `any` is None for flags this program does not know: something happened all the same.
        let mut happened = fds.iter().map(|fd| fd.any().unwrap_or(true));
        Ok(Ready {
            stop: happened.next().unwrap_or(false),
            listener: happened.next().unwrap_or(false),
            connections: happened.collect(),
        })
    }

    fn accept(&mut self) {
        loop {
            match self.socket.listener().accept() {
                Ok((mut stream, _)) => {
                    if let Err(error) = stream.set_nonblocking(true) {
                        log::warn!("an API connection was dropped: {error}");
                    } else if self.connections.len() < MAX_CONNECTIONS {
                        self.connections.push(Connection::new(stream));
                    } else if let Err(error) = stream.write_all(FULL) {
                        log::debug!("a client too many has gone: {error}");
                    }
                }
                Err(error) => match error.kind() {
                    ErrorKind::WouldBlock => return,
                    ErrorKind::Interrupted | ErrorKind::ConnectionAborted => {}
                    _ => {
                        // The connection stays in the queue, so waiting for it would return at once.
                        log::warn!("cannot accept an API connection: {error}");
                        self.accepting = false;
                        return;
                    }
                },
            }
        }
    }
}

/// What happened, in the order of the connections.
struct Ready {
    stop: bool,
    listener: bool,
    connections: Vec<bool>,
}

/// What may still come from a client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Input {
    /// Requests.
    Open,
    /// Bytes in which requests can no longer be told apart. They are read and thrown away, so that a client in
    /// the middle of sending gets to read its answer instead of an error.
    Lost,
    /// Nothing: the client has closed its side.
    Closed,
}

struct Connection {
    stream: UnixStream,
    reader: RequestReader,
    input: Input,
    out: Vec<u8>,
}

impl Connection {
    fn new(stream: UnixStream) -> Self {
        Self { stream, reader: RequestReader::default(), input: Input::Open, out: Vec::new() }
    }

    fn interest(&self) -> PollFlags {
        if self.out.is_empty() { PollFlags::POLLIN } else { PollFlags::POLLOUT }
    }

    /// Writes and reads as far as it goes without waiting. False: the connection is at its end.
    fn advance(&mut self, inbox: &Inbox) -> bool {
        let step = |connection: &mut Self| -> io::Result<bool> {
            if !connection.flush()? {
                return Ok(true);
            }
            connection.read(inbox)?;
            let flushed = connection.flush()?;
            Ok(!(flushed && connection.input == Input::Closed))
        };
        match step(self) {
            Ok(open) => open,
            Err(error) if error.kind() == ErrorKind::WouldBlock => true,
            Err(error) => {
                log::debug!("an API client has gone: {error}");
                false
            }
        }
    }

    /// One read, and all requests it completes.
    fn read(&mut self, inbox: &Inbox) -> io::Result<()> {
        let mut bytes = [0; READ_SIZE];
        let length = loop {
            match self.stream.read(&mut bytes) {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                result => break result?,
            }
        };
        if length == 0 {
            self.input = Input::Closed;
            return Ok(());
        }
        if self.input != Input::Open {
            return Ok(());
        }
        self.reader.push(&bytes[..length]);
        loop {
            match self.reader.pull() {
                Parsed::Incomplete => return Ok(()),
                Parsed::Continue => self.out.extend_from_slice(CONTINUE),
                Parsed::Request(request) => {
                    let response = match route(&request) {
                        Ok(call) => inbox.call(call),
                        Err(refusal) => refusal,
                    };
                    log::debug!("{:?} {} -> {}", request.method, request.path, response.status);
                    response.write(&mut self.out);
                }
                Parsed::Bad(error) => bad_request(&error).write(&mut self.out),
                Parsed::Lost(error) => {
                    bad_request(&error).write(&mut self.out);
                    self.input = Input::Lost;
                    return Ok(());
                }
            }
        }
    }

    /// Writes what it can. True: all of it.
    fn flush(&mut self) -> io::Result<bool> {
        while !self.out.is_empty() {
            match self.stream.write(&self.out) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(length) => drop(self.out.drain(..length)),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        if self.input == Input::Lost {
            // The client sees the end after its answer and does not wait for more.
            self.stream.shutdown(Shutdown::Write)?;
        }
        Ok(true)
    }

    /// Writes the rest, waiting a little for the client.
    fn finish(&mut self) {
        let write = |connection: &mut Self| -> io::Result<()> {
            connection.stream.set_nonblocking(false)?;
            connection.stream.set_write_timeout(Some(FLUSH_TIMEOUT))?;
            connection.stream.write_all(&connection.out)
        };
        if let Err(error) = write(self) {
            log::debug!("an API client did not take its answer: {error}");
        }
    }
}

fn bad_request(error: &super::http::HttpError) -> Response {
    Response::error(400, ["Bad Request", &error.to_string()])
}
