//! Client of the REST API that every `dyad` process serves on a Unix socket, for `dyad-remote` and for tests.
//!
//! One connection and one request at a time. What goes over the wire is typed where the caller says so:
//! [`Client::get`] and [`Client::put_json`] take any type with the shape of the endpoint's JSON, so that this
//! crate does not depend on the VMM it talks to.

mod response;

use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;

pub use response::Response;

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
    /// The connection broke while sending.
    #[error("cannot send the request")]
    Send(#[source] io::Error),
    /// The connection broke, or nothing came in time.
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
}

impl Client {
    /// The VMM that listens on the Unix socket `path`. Connects with each call, not now.
    pub fn new(path: impl AsRef<Path>) -> Self {
        Self { path: path.as_ref().to_owned(), timeout: None }
    }

    /// Gives up on a call when the server says nothing for this long. Without it, calls that take their time
    /// (a guest that boots, a VM that is copied) are waited for.
    pub fn with_timeout(self, timeout: Duration) -> Self {
        Self { timeout: Some(timeout), ..self }
    }

    /// Sends one request to `/api/v1/<endpoint>` and returns the answer, whatever its status.
    pub fn request(
        &self,
        method: &str,
        endpoint: &str,
        body: Option<&[u8]>,
    ) -> Result<Response, Error> {
        let mut stream = UnixStream::connect(&self.path)
            .map_err(|source| Error::Connect { path: self.path.clone(), source })?;
        stream.set_read_timeout(self.timeout).map_err(Error::Receive)?;
        let mut request =
            format!("{method} /api/v1/{endpoint} HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n");
        if let Some(body) = body {
            request += &format!("Content-Length: {}\r\n", body.len());
        }
        request += "\r\n";
        let mut bytes = request.into_bytes();
        bytes.extend_from_slice(body.unwrap_or_default());
        stream.write_all(&bytes).map_err(Error::Send)?;
        response::read(&mut stream)
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
