//! Client of the REST API that every `dyad` process serves on a Unix socket, for `dyad-remote` and for tests.
//!
//! One connection and one request at a time. What goes over the wire is typed where the caller says so:
//! [`Client::get`] and [`Client::put_json`] take any type with the shape of the endpoint's JSON, so that this
//! crate does not depend on the VMM it talks to.

mod response;

use std::io::{self, ErrorKind, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, UnixAddr, connect, setsockopt, socket, sockopt,
};
use nix::sys::time::TimeVal;
use serde::Serialize;
use serde::de::DeserializeOwned;

pub use response::Response;

/// How long a server has time to let a connection in, however long its answers take. One that works through its
/// connections has room for others.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nobody listens.
    #[error("cannot connect to '{}': is a dyad with this --api-socket running?", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Somebody listens and says nothing.
    #[error(
        "'{}' has not answered for {:.1} s: dyad does one call after the other, and may be busy with another client's, \
         or does not go on at all. What was asked for may still be done", path.display(), after.as_secs_f64()
    )]
    Silent {
        /// The socket.
        path: PathBuf,
        /// How long it had.
        after: Duration,
    },
    /// The connection broke while sending.
    #[error("cannot send the request")]
    Send(#[source] io::Error),
    /// The connection broke.
    #[error("cannot receive the answer")]
    Receive(#[source] io::Error),
    /// The answer is no HTTP.
    #[error("the server's answer is no HTTP response: {0}")]
    NotHttp(&'static str),
    /// The request could not be written as JSON.
    #[error("the request cannot be written as JSON")]
    Request(#[source] serde_json::Error),
    /// The answer has another shape than expected.
    #[error("the server's answer is not the JSON expected")]
    Json(#[source] serde_json::Error),
    /// The server refused.
    #[error("the server answered {status}: {}", chain.join(": "))]
    Refused {
        /// HTTP status.
        status: u16,
        /// The server's texts, outermost description first, root cause last.
        chain: Vec<String>,
    },
    /// The server refused, and did not say why in the way it should.
    #[error("the server answered {status}, with an explanation that cannot be read")]
    Unexplained {
        /// HTTP status.
        status: u16,
    },
}

/// A VMM's API.
#[derive(Debug, Clone)]
pub struct Client {
    path: PathBuf,
    timeout: Option<Duration>,
    connect_timeout: Duration,
}

impl Client {
    /// The VMM that listens on the Unix socket `path`. Connects with each call, not now.
    pub fn new(path: impl AsRef<Path>) -> Self {
        Self { path: path.as_ref().to_owned(), timeout: None, connect_timeout: CONNECT_TIMEOUT }
    }

    /// Gives up on a call when the server says nothing for this long. Without it, calls that take their time
    /// (a guest that boots, a VM that is copied) are waited for.
    pub fn with_timeout(self, timeout: Duration) -> Self {
        let connect_timeout = timeout.min(CONNECT_TIMEOUT);
        Self { timeout: Some(timeout), connect_timeout, ..self }
    }

    /// Sends one request to `/api/v1/<endpoint>` and returns the answer, whatever its status.
    pub fn request(
        &self,
        method: &str,
        endpoint: &str,
        body: Option<&[u8]>,
    ) -> Result<Response, Error> {
        let mut stream = self.connect()?;
        stream.set_write_timeout(self.timeout).map_err(Error::Send)?;
        stream.set_read_timeout(self.timeout).map_err(Error::Receive)?;
        let mut request =
            format!("{method} /api/v1/{endpoint} HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n");
        if let Some(body) = body {
            request += &format!("Content-Length: {}\r\n", body.len());
        }
        request += "\r\n";
        let mut bytes = request.into_bytes();
        bytes.extend_from_slice(body.unwrap_or_default());
        let answer = stream.write_all(&bytes).map_err(Error::Send);
        answer.and_then(|()| response::read(&mut stream)).map_err(|error| {
            match (error, self.timeout) {
                (Error::Send(cause) | Error::Receive(cause), Some(after))
                    if cause.kind() == ErrorKind::WouldBlock =>
                {
                    self.silent(after)
                }
                (error, _) => error,
            }
        })
    }

    /// A server that does not let connections in is not waited for without end.
    fn connect(&self) -> Result<UnixStream, Error> {
        let connected = || {
            let address = UnixAddr::new(&self.path)?;
            let socket =
                socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
            let ms = i64::try_from(self.connect_timeout.as_millis()).unwrap_or(i64::MAX);
            // It bounds the wait for a place in the queue of the server too (socket(7)).
            let timeout = TimeVal::new(ms / 1000, ms % 1000 * 1000);
            setsockopt(&socket, sockopt::SendTimeout, &timeout)?;
            while let Err(error) = connect(socket.as_raw_fd(), &address) {
                if error != Errno::EINTR {
                    return Err(error);
                }
            }
            Ok(UnixStream::from(socket))
        };
        connected().map_err(|error| match error {
            Errno::EAGAIN => self.silent(self.connect_timeout),
            error => Error::Connect { path: self.path.clone(), source: error.into() },
        })
    }

    fn silent(&self, after: Duration) -> Error {
        Error::Silent { path: self.path.clone(), after }
    }

    /// GET, with the answer read as `T`.
    pub fn get<T: DeserializeOwned>(&self, endpoint: &str) -> Result<T, Error> {
        let response = self.request("GET", endpoint, None)?.success()?;
        serde_json::from_slice(response.body.as_deref().unwrap_or_default()).map_err(Error::Json)
    }

    /// PUT without a body.
    pub fn put(&self, endpoint: &str) -> Result<(), Error> {
        self.request("PUT", endpoint, None)?.success().map(drop)
    }

    /// PUT of `body` as JSON.
    pub fn put_json(&self, endpoint: &str, body: &impl Serialize) -> Result<(), Error> {
        let body = serde_json::to_vec(body).map_err(Error::Request)?;
        self.request("PUT", endpoint, Some(&body))?.success().map(drop)
    }
}

#[cfg(test)]
mod tests {
    use nix::sys::socket::{Backlog, bind, listen};

    use super::*;

    const SOON: Duration = Duration::from_millis(50);

    fn silent(result: Result<(), Error>) {
        let error = result.unwrap_err();
        assert!(matches!(error, Error::Silent { after: SOON, .. }), "{error}");
        assert!(error.to_string().contains("has not answered for 0.1 s"), "{error}");
    }

    #[test]
    fn a_server_that_says_nothing_is_given_up() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("mute.sock");
        let server =
            socket(AddressFamily::Unix, SockType::Stream, SockFlag::empty(), None).unwrap();
        bind(server.as_raw_fd(), &UnixAddr::new(&path).unwrap()).unwrap();
        listen(&server, Backlog::new(0).unwrap()).unwrap();
        let client = Client::new(&path).with_timeout(SOON);
        let _in_the_queue = UnixStream::connect(&path).unwrap();
        // It does not let this one in.
        silent(client.put("vm.pause"));
        listen(&server, Backlog::new(9).unwrap()).unwrap();
        // It lets them in and does not answer.
        silent(client.put("vm.pause"));
        // It does not even read.
        silent(client.put_json("vm.create", &" ".repeat(8 << 20)));
    }
}
