//! Responses, read from a stream.

use std::io::{self, ErrorKind, Read};

use crate::Error;

/// Most bytes before the body.
const MAX_HEAD: usize = 64 << 10;
/// Most bytes in a body.
const MAX_BODY: u64 = 64 << 20;

/// An answer of the server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Response {
    /// HTTP status.
    pub status: u16,
    /// The body; `None` if the answer stated no length, which is not the same as length 0.
    pub body: Option<Vec<u8>>,
}

impl Response {
    /// Itself if it is a success, else the error it describes.
    pub fn success(self) -> Result<Self, Error> {
        let status = self.status;
        if (200..300).contains(&status) {
            return Ok(self);
        }
        match serde_json::from_slice(self.body.as_deref().unwrap_or_default()) {
            Ok(chain) => Err(Error::Refused { status, chain }),
            Err(_) => Err(Error::Unexplained { status }),
        }
    }
}

/// Reads one response. An interim `100 Continue` before it is skipped.
pub(crate) fn read(stream: &mut impl Read) -> Result<Response, Error> {
    let mut reader = Reader { stream, buffer: Vec::new() };
    loop {
        let (status, length) = reader.head()?;
        if status == 100 {
            continue;
        }
        let body = match length {
            Some(length) if length > MAX_BODY => {
                return Err(Error::NotHttp("the body is too long"));
            }
            Some(length) => Some(reader.body(length as usize)?),
            None => None,
        };
        return Ok(Response { status, body });
    }
}

struct Reader<'a, R> {
    stream: &'a mut R,
    buffer: Vec<u8>,
}

impl<R: Read> Reader<'_, R> {
    fn fill(&mut self) -> Result<(), Error> {
        let mut bytes = [0; 4096];
        let length = loop {
            match self.stream.read(&mut bytes) {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                result => break result.map_err(Error::Receive)?,
            }
        };
        if length == 0 {
            let closed = io::Error::new(
                ErrorKind::UnexpectedEof,
                "the server closed the connection before the answer was complete",
            );
            return Err(Error::Receive(closed));
        }
        self.buffer.extend_from_slice(&bytes[..length]);
        Ok(())
    }

    /// Status and stated length of the body.
    fn head(&mut self) -> Result<(u16, Option<u64>), Error> {
        let end = loop {
            if let Some(at) = self.buffer.windows(4).position(|window| window == b"\r\n\r\n") {
                break at;
            }
            if self.buffer.len() > MAX_HEAD {
                return Err(Error::NotHttp("the head is too long"));
            }
            self.fill()?;
        };
        let rest = self.buffer.split_off(end + 4);
        let head = std::mem::replace(&mut self.buffer, rest);
        let head = std::str::from_utf8(&head[..end]).map_err(|_| Error::NotHttp("no text"))?;
        let mut lines = head.split("\r\n");
        // The reason phrase is empty with our server and means nothing with any other.
        let status = lines
            .next()
            .and_then(|line| line.strip_prefix("HTTP/1."))
            .and_then(|line| line.split(' ').nth(1))
            .filter(|status| status.len() == 3)
            .and_then(|status| status.parse().ok())
            .ok_or(Error::NotHttp("no status line"))?;
        let mut length = None;
        for line in lines {
            let (name, value) = line.split_once(':').ok_or(Error::NotHttp("no header"))?;
            if name.eq_ignore_ascii_case("content-length") {
                let value = value.trim().parse();
                length = Some(value.map_err(|_| Error::NotHttp("no number as content length"))?);
            }
        }
        Ok((status, length))
    }

    fn body(&mut self, length: usize) -> Result<Vec<u8>, Error> {
        while self.buffer.len() < length {
            self.fill()?;
        }
        self.buffer.truncate(length);
        Ok(std::mem::take(&mut self.buffer))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Gives one byte per read.
    struct Slow<'a>(&'a [u8]);

    impl Read for Slow<'_> {
        fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
            let Some((first, rest)) = self.0.split_first() else { return Ok(0) };
            self.0 = rest;
            out[0] = *first;
            Ok(1)
        }
    }

    fn parse(bytes: &[u8]) -> Result<Response, Error> {
        let slow = read(&mut Slow(bytes));
        let whole = read(&mut &bytes[..]);
        assert_eq!(slow.as_ref().ok(), whole.as_ref().ok());
        slow
    }

    #[test]
    fn empty_and_full_reason_phrases_are_read() {
        for head in ["HTTP/1.1 204 ", "HTTP/1.1 204", "HTTP/1.1 204 No Content"] {
            let response = parse(format!("{head}\r\nServer: x\r\n\r\n").as_bytes()).unwrap();
            assert_eq!(response, Response { status: 204, body: None });
        }
        let response = parse(b"HTTP/1.1 200 \r\ncontent-length: 2\r\n\r\n{}").unwrap();
        assert_eq!(response, Response { status: 200, body: Some(b"{}".to_vec()) });
        let response = parse(b"HTTP/1.1 200 \r\nContent-Length: 0\r\n\r\n").unwrap();
        assert_eq!(response, Response { status: 200, body: Some(Vec::new()) });
    }

    #[test]
    fn an_interim_answer_is_skipped() {
        let response = parse(b"HTTP/1.1 100 \r\n\r\nHTTP/1.1 204 \r\n\r\n").unwrap();
        assert_eq!(response.status, 204);
    }

    #[test]
    fn refusals_carry_the_servers_texts() {
        let refusal = |body: &str| {
            let head = format!("HTTP/1.1 500 \r\nContent-Length: {}\r\n\r\n{body}", body.len());
            parse(head.as_bytes()).unwrap().success().unwrap_err()
        };
        let Error::Refused { status: 500, chain } = refusal(r#"["a", "b"]"#) else { panic!() };
        assert_eq!(chain, ["a", "b"]);
        for body in ["", "oops", r#"{"error": 1}"#, "[1]"] {
            assert!(matches!(refusal(body), Error::Unexplained { status: 500 }), "{body}");
        }
    }

    #[test]
    fn garbage_and_broken_connections_are_errors() {
        for bytes in [
            &b"SSH-2.0\r\n\r\n"[..],
            b"HTTP/1.1 abc\r\n\r\n",
            b"HTTP/1.1\r\n\r\n",
            b"HTTP/1.1 20000 \r\n\r\n",
            b"HTTP/1.1 200 \r\nnonsense\r\n\r\n",
            b"HTTP/1.1 200 \r\nContent-Length: -1\r\n\r\n",
            b"HTTP/1.1 200 \r\nContent-Length: 99999999999\r\n\r\n",
            b"\xff\xff\r\n\r\n",
            &[b'x'; MAX_HEAD + 8192],
        ] {
            assert!(matches!(parse(bytes), Err(Error::NotHttp(_))));
        }
        for bytes in [&b""[..], b"HTTP/1.1 200", b"HTTP/1.1 200 \r\nContent-Length: 3\r\n\r\nab"] {
            assert!(matches!(parse(bytes), Err(Error::Receive(_))));
        }
    }
}
