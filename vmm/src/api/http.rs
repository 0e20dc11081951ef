//! HTTP as far as the API needs it: requests out of bytes, bytes out of responses. No sockets here.
//!
//! Parsing rests on `httparse`. The server in `dbs-uhttp` was read against what Cloud Hypervisor's clients
//! rely on and does not fit: it answers 500 when a request arrives in fragments more than a millisecond
//! apart, drops the answer to a client that closes its sending side, keeps any number of headers, and cannot
//! send 409, 429 or an empty body with a length.
//!
//! Responses must be exactly these bytes, because `ch-remote` reads them literally: an empty reason
//! phrase (it parses all that follows the version as a number), `HTTP/1.1` whatever was asked, the header
//! spelled `Content-Length: N`, none of it on 204, bodies in ASCII (it decodes each read by itself).

use serde::Serialize;

/// Most bytes in the request line and in each header line.
pub const MAX_LINE: usize = 1024;
/// Most bytes before the body.
pub const MAX_HEAD: usize = 16 << 10;
/// Most headers of a request.
pub const MAX_HEADERS: usize = 64;
/// Most bytes in the body of a request.
pub const MAX_BODY: usize = 4 << 20;

/// Value of the `Server` header. Clients have been seen to look at it.
const SERVER: &str = "Cloud Hypervisor API";

/// Methods the API knows. Any other is refused before anything else is looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names of the methods")]
pub enum Method {
    Get,
    Put,
    Patch,
    Delete,
}

/// A request, complete.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// What to do.
    pub method: Method,
    /// Path of the target, without scheme and host.
    pub path: String,
    /// Empty if there was none.
    pub body: Vec<u8>,
}

/// Bytes that are no request of ours.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HttpError {
    /// No HTTP at all.
    #[error("this is no HTTP request: {0}")]
    Syntax(#[from] httparse::Error),
    /// A line that is too long.
    #[error("the request line or a header is longer than {MAX_LINE} bytes")]
    LongLine,
    /// Too many headers.
    #[error("the headers are longer than {MAX_HEAD} bytes or more than {MAX_HEADERS}")]
    LongHead,
    /// A length that is no number, or two different ones.
    #[error("'Content-Length' must be one decimal number")]
    ContentLength,
    /// A body in chunks.
    #[error("'Transfer-Encoding' is not supported: send the body with a 'Content-Length'")]
    TransferEncoding,
    /// A body that is too long.
    #[error("the body has {0} bytes, the limit is {MAX_BODY}")]
    LongBody(u64),
    /// A method the API does not know.
    #[error("the method must be GET or PUT")]
    Method,
    /// A client that refuses plain bodies.
    #[error("'Accept-Encoding' forbids 'identity', the only encoding there is")]
    Encoding,
}

impl HttpError {
    /// Whether the end of the request is known all the same, so that the next one can be served.
    fn in_sync(&self) -> bool {
        matches!(self, Self::LongBody(_) | Self::Method | Self::Encoding)
    }
}

/// What [`RequestReader::pull`] found.
#[derive(Debug, PartialEq, Eq)]
pub enum Parsed {
    /// Nothing complete yet: more bytes are needed.
    Incomplete,
    /// The client waits for `100 Continue` before it sends the body.
    Continue,
    /// A request.
    Request(Request),
    /// A bad request; the next one can follow.
    Bad(HttpError),
    /// Garbage. Where the next request begins is not known: what follows must not be taken for requests.
    Lost(HttpError),
}

/// Cuts a stream of bytes into requests. Holds no more than one head and one body at a time, plus what the
/// caller pushes at once.
#[derive(Debug, Default)]
pub struct RequestReader {
    buffer: Vec<u8>,
    /// A request whose body is not complete.
    pending: Option<Pending>,
    /// Bytes of a refused body that are still to come.
    skip: u64,
}

#[derive(Debug)]
struct Pending {
    method: Method,
    path: String,
    length: usize,
}

/// What the head of a request says.
struct Head {
    method: Option<Method>,
    path: String,
    length: u64,
    expects_continue: bool,
    refuses_identity: bool,
}

impl RequestReader {
    /// Takes bytes from the client.
    pub fn push(&mut self, bytes: &[u8]) {
        let skipped = usize::try_from(self.skip).unwrap_or(usize::MAX).min(bytes.len());
        self.skip -= skipped as u64;
        self.buffer.extend_from_slice(&bytes[skipped..]);
    }

    /// The next request in what was pushed. Must be called until it returns [`Parsed::Incomplete`] before
    /// more is pushed.
    pub fn pull(&mut self) -> Parsed {
        if self.pending.is_none() {
            match self.parse_head() {
                Ok(None) => return Parsed::Incomplete,
                Ok(Some(head)) => match self.begin(head) {
                    Ok(false) => {}
                    Ok(true) => return Parsed::Continue,
                    Err(error) => return Parsed::Bad(error),
                },
                Err(error) => {
                    self.buffer.clear();
                    return Parsed::Lost(error);
                }
            }
        }
        match self.pending.take_if(|pending| pending.length <= self.buffer.len()) {
            Some(Pending { method, path, length }) => {
                let rest = self.buffer.split_off(length);
                let body = std::mem::replace(&mut self.buffer, rest);
                Parsed::Request(Request { method, path, body })
            }
            None => Parsed::Incomplete,
        }
    }

    /// Parses and removes the head at the start of the buffer, if it is complete.
    fn parse_head(&mut self) -> Result<Option<Head>, HttpError> {
        let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
        let mut request = httparse::Request::new(&mut headers);
        let seen = &self.buffer[..self.buffer.len().min(MAX_HEAD)];
        let length = match request.parse(seen) {
            Ok(httparse::Status::Complete(length)) => length,
            Ok(httparse::Status::Partial) => {
                check_lines(seen)?;
                return if seen.len() == MAX_HEAD { Err(HttpError::LongHead) } else { Ok(None) };
            }
            Err(httparse::Error::TooManyHeaders) => return Err(HttpError::LongHead),
            Err(error) => {
                check_lines(seen)?;
                return Err(error.into());
            }
        };
        check_lines(&seen[..length])?;
        let mut head = Head {
            method: match request.method {
                Some("GET") => Some(Method::Get),
                Some("PUT") => Some(Method::Put),
                Some("PATCH") => Some(Method::Patch),
                Some("DELETE") => Some(Method::Delete),
                _ => None,
            },
            path: absolute_path(request.path.unwrap_or_default()).to_owned(),
            length: 0,
            expects_continue: false,
            refuses_identity: false,
        };
        let mut stated = None;
        for header in &*request.headers {
            let value = header.value.trim_ascii();
            if header.name.eq_ignore_ascii_case("content-length") {
                let length = decimal(value).ok_or(HttpError::ContentLength)?;
                if stated.replace(length).is_some_and(|before| before != length) {
                    return Err(HttpError::ContentLength);
                }
            } else if header.name.eq_ignore_ascii_case("transfer-encoding") {
                // Where a chunked body ends is not looked for.
                if !value.eq_ignore_ascii_case(b"identity") {
                    return Err(HttpError::TransferEncoding);
                }
            } else if header.name.eq_ignore_ascii_case("expect") {
                head.expects_continue |= value.eq_ignore_ascii_case(b"100-continue");
            } else if header.name.eq_ignore_ascii_case("accept-encoding") {
                head.refuses_identity |= refuses_identity(value);
            }
        }
        head.length = stated.unwrap_or(0);
        self.buffer.drain(..length);
        Ok(Some(head))
    }

    /// Starts on the request with this head. True: the client waits to be told to go on.
    fn begin(&mut self, head: Head) -> Result<bool, HttpError> {
        let accepted = match usize::try_from(head.length) {
            Ok(length) if length <= MAX_BODY => Ok(length),
            _ => Err(HttpError::LongBody(head.length)),
        };
        let refused = match (accepted, head.method, head.refuses_identity) {
            (Ok(length), Some(method), false) => {
                let waits = head.expects_continue && length > self.buffer.len();
                self.pending = Some(Pending { method, path: head.path, length });
                return Ok(waits);
            }
            (Err(error), ..) => error,
            (_, None, _) => HttpError::Method,
            (_, _, true) => HttpError::Encoding,
        };
        debug_assert!(refused.in_sync());
        let here = usize::try_from(head.length).unwrap_or(usize::MAX).min(self.buffer.len());
        self.buffer.drain(..here);
        // A client that was refused instead of being told to continue sends no body.
        self.skip = if head.expects_continue { 0 } else { head.length - here as u64 };
        Err(refused)
    }
}

fn check_lines(head: &[u8]) -> Result<(), HttpError> {
    let longest = head.split(|byte| *byte == b'\n').map(<[u8]>::len).max();
    // The line end counts two bytes, of which the split has taken one.
    if longest.unwrap_or(0) > MAX_LINE + 1 { Err(HttpError::LongLine) } else { Ok(()) }
}

/// Digits only: `str::parse` alone would take a sign.
fn decimal(value: &[u8]) -> Option<u64> {
    let text = std::str::from_utf8(value).ok()?;
    if text.bytes().all(|byte| byte.is_ascii_digit()) { text.parse().ok() } else { None }
}

fn refuses_identity(value: &[u8]) -> bool {
    let value = value.to_ascii_lowercase();
    let items: Vec<Vec<u8>> = value
        .split(|byte| *byte == b',')
        .map(|item| item.iter().copied().filter(|byte| !byte.is_ascii_whitespace()).collect())
        .collect();
    let names_identity = items.iter().any(|item| item.starts_with(b"identity"));
    items.iter().any(|item| {
        item.as_slice() == b"identity;q=0" || (item.as_slice() == b"*;q=0" && !names_identity)
    })
}

/// `/path` of `/path` or `http://host/path`; else nothing, which no endpoint matches.
fn absolute_path(target: &str) -> &str {
    match target.strip_prefix("http://") {
        Some(rest) => rest.find('/').map_or("", |slash| &rest[slash..]),
        None if target.starts_with('/') => target,
        None => "",
    }
}

/// An answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Response {
    /// HTTP status.
    pub status: u16,
    /// `Some` of an empty text for an answer with `Content-Length: 0`, `None` for one without.
    pub body: Option<String>,
    /// What the body is.
    content_type: &'static str,
}

const JSON: &str = "application/json";

impl Response {
    /// Done, nothing to say.
    pub fn no_content() -> Self {
        Self { status: 204, body: None, content_type: JSON }
    }

    /// A status with an empty body of stated length.
    pub fn empty(status: u16) -> Self {
        Self { status, body: Some(String::new()), content_type: JSON }
    }

    /// 200 with a body.
    pub fn json(value: &impl Serialize) -> Self {
        match serde_json::to_string(value) {
            Ok(json) => Self { status: 200, body: Some(ascii(&json)), content_type: JSON },
            // Paths may be anything but UTF-8 only if they did not come through this API.
            Err(error) => {
                Self::error(500, ["The answer cannot be written as JSON", &error.to_string()])
            }
        }
    }

    /// 200 with a body that is no JSON.
    pub fn text(content_type: &'static str, body: String) -> Self {
        Self { status: 200, body: Some(body), content_type }
    }

    /// An error: texts from the outermost description to the root cause.
    pub fn error<T: AsRef<str>>(status: u16, chain: impl IntoIterator<Item = T>) -> Self {
        let chain: Vec<serde_json::Value> =
            chain.into_iter().map(|text| text.as_ref().into()).collect();
        let json = serde_json::Value::Array(chain).to_string();
        Self { status, body: Some(ascii(&json)), content_type: JSON }
    }

    /// Appends the answer, as it goes over the wire, to `out`.
    pub fn write(&self, out: &mut Vec<u8>) {
        let Self { status, body, content_type } = self;
        let mut head =
            format!("HTTP/1.1 {status} \r\nServer: {SERVER}\r\nConnection: keep-alive\r\n");
        if let Some(body) = body {
            let length = body.len();
            head += &format!("Content-Type: {content_type}\r\nContent-Length: {length}\r\n");
        }
        out.extend_from_slice(head.as_bytes());
        out.extend_from_slice(b"\r\n");
        out.extend_from_slice(body.as_deref().unwrap_or_default().as_bytes());
    }
}

/// JSON with all that is not ASCII written as `\uXXXX`, in UTF-16 as JSON wants it. Outside of strings JSON
/// is ASCII already, so nothing else is touched.
fn ascii(json: &str) -> String {
    if json.is_ascii() {
        return json.to_owned();
    }
    let mut out = String::with_capacity(json.len() + 16);
    for c in json.chars() {
        if c.is_ascii() {
            out.push(c);
        } else {
            for unit in c.encode_utf16(&mut [0; 2]) {
                out += &format!("\\u{unit:04x}");
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reader(bytes: &[u8]) -> RequestReader {
        let mut reader = RequestReader::default();
        reader.push(bytes);
        reader
    }

    fn request(method: Method, path: &str, body: &[u8]) -> Parsed {
        Parsed::Request(Request { method, path: path.to_owned(), body: body.to_vec() })
    }

    fn lost(bytes: &[u8]) -> HttpError {
        match reader(bytes).pull() {
            Parsed::Lost(error) => error,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn every_fragmentation_gives_the_same_requests() {
        let bytes = b"PUT /a HTTP/1.1\r\nHost: localhost\r\ncontent-length: 3\r\n\r\nxyzGET /b HTTP/1.0\r\n\r\n";
        for cut in 0..=bytes.len() {
            let mut reader = RequestReader::default();
            let mut found = Vec::new();
            for part in [&bytes[..cut], &bytes[cut..]] {
                reader.push(part);
                loop {
                    match reader.pull() {
                        Parsed::Incomplete => break,
                        parsed => found.push(parsed),
                    }
                }
            }
            let expected = [request(Method::Put, "/a", b"xyz"), request(Method::Get, "/b", b"")];
            assert_eq!(found, expected, "cut at {cut}");
        }
    }

    #[test]
    fn targets_with_scheme_and_host_are_taken() {
        let path = |target: &str| match reader(format!("GET {target} HTTP/1.1\r\n\r\n").as_bytes())
            .pull()
        {
            Parsed::Request(request) => request.path,
            other => panic!("{other:?}"),
        };
        assert_eq!(path("http://localhost:80/api/v1/x"), "/api/v1/x");
        assert_eq!(path("/api?x=1"), "/api?x=1");
        assert_eq!(path("http://localhost"), "");
        assert_eq!(path("*"), "");
    }

    #[test]
    fn lines_up_to_the_limit_are_taken() {
        let head = |length: usize| {
            let line = format!("GET /{} HTTP/1.1", "a".repeat(length - 14));
            assert_eq!(line.len(), length);
            format!("{line}\r\nX: y\r\n\r\n")
        };
        assert!(matches!(reader(head(MAX_LINE).as_bytes()).pull(), Parsed::Request(_)));
        assert_eq!(lost(head(MAX_LINE + 1).as_bytes()), HttpError::LongLine);
        // Also when the end of the line never comes.
        assert_eq!(lost(&vec![b'a'; MAX_LINE + 2]), HttpError::LongLine);
        let many = format!("GET / HTTP/1.1\r\n{}\r\n", "X: y\r\n".repeat(MAX_HEADERS + 1));
        assert_eq!(lost(many.as_bytes()), HttpError::LongHead);
        let filler = format!("X: {}\r\n", "y".repeat(900));
        let long = format!("GET / HTTP/1.1\r\n{}\r\n", filler.repeat(20));
        assert_eq!(lost(long.as_bytes()), HttpError::LongHead);
    }

    #[test]
    fn lengths_that_could_be_read_in_two_ways_are_refused() {
        let head = |headers: &str| lost(format!("PUT / HTTP/1.1\r\n{headers}\r\n\r\n").as_bytes());
        assert_eq!(head("Content-Length: +3"), HttpError::ContentLength);
        assert_eq!(head("Content-Length: 3, 3"), HttpError::ContentLength);
        assert_eq!(head("Content-Length: 3\r\nContent-Length: 4"), HttpError::ContentLength);
        assert_eq!(head("Content-Length: 99999999999999999999999"), HttpError::ContentLength);
        assert_eq!(head("Transfer-Encoding: chunked"), HttpError::TransferEncoding);
    }

    #[test]
    fn a_refused_body_is_skipped_not_served() {
        let body = vec![b'x'; MAX_BODY + 1];
        let mut reader =
            reader(format!("PUT /a HTTP/1.1\r\nContent-Length: {}\r\n\r\n", body.len()).as_bytes());
        assert_eq!(reader.pull(), Parsed::Bad(HttpError::LongBody(body.len() as u64)));
        for part in body.chunks(4096) {
            reader.push(part);
            assert_eq!(reader.pull(), Parsed::Incomplete);
            assert!(reader.buffer.is_empty());
        }
        reader.push(b"GET /b HTTP/1.1\r\n\r\n");
        assert_eq!(reader.pull(), request(Method::Get, "/b", b""));
        // The same with a method that does not exist.
        reader.push(b"POST /a HTTP/1.1\r\nContent-Length: 21\r\n\r\nGET /c HTTP/1.1\r\n\r\n..");
        assert_eq!(reader.pull(), Parsed::Bad(HttpError::Method));
        assert_eq!(reader.pull(), Parsed::Incomplete);
        reader.push(b"GET /b HTTP/1.1\r\n\r\n");
        assert_eq!(reader.pull(), request(Method::Get, "/b", b""));
    }

    #[test]
    fn the_largest_body_is_taken() {
        let head = format!("PUT /a HTTP/1.1\r\nContent-Length: {MAX_BODY}\r\n\r\n");
        let mut reader = reader(head.as_bytes());
        reader.push(&vec![b'x'; MAX_BODY]);
        assert_eq!(reader.pull(), request(Method::Put, "/a", &vec![b'x'; MAX_BODY]));
    }

    #[test]
    fn a_client_that_asks_is_told_to_continue_once() {
        let mut reader =
            reader(b"PUT /a HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n");
        assert_eq!(reader.pull(), Parsed::Continue);
        assert_eq!(reader.pull(), Parsed::Incomplete);
        reader.push(b"{}");
        assert_eq!(reader.pull(), request(Method::Put, "/a", b"{}"));
    }

    #[test]
    fn clients_that_refuse_plain_bodies_are_refused() {
        for (value, refused) in [
            ("gzip", false),
            ("gzip, identity;q=0", true),
            ("*;q=0", true),
            ("* ; q=0", true),
            ("identity;q=0.5, *;q=0", false),
        ] {
            let head = format!("GET / HTTP/1.1\r\nAccept-Encoding: {value}\r\n\r\n");
            let parsed = reader(head.as_bytes()).pull();
            assert_eq!(parsed == Parsed::Bad(HttpError::Encoding), refused, "{value}");
        }
    }

    #[test]
    fn garbage_is_lost() {
        for bytes in [&b"\x16\x03\x01\x02\x00\x01"[..], b"GET\r\n\r\n", b"GET / HTTP/2.0\r\n\r\n"] {
            assert!(matches!(lost(bytes), HttpError::Syntax(_)));
        }
    }

    #[test]
    fn responses_have_the_bytes_clients_expect() {
        let bytes = |response: Response| {
            let mut out = Vec::new();
            response.write(&mut out);
            String::from_utf8(out).unwrap()
        };
        assert_eq!(
            bytes(Response::no_content()),
            "HTTP/1.1 204 \r\nServer: Cloud Hypervisor API\r\nConnection: keep-alive\r\n\r\n"
        );
        assert_eq!(
            bytes(Response::json(&serde_json::json!({"a": 1}))),
            "HTTP/1.1 200 \r\nServer: Cloud Hypervisor API\r\nConnection: keep-alive\r\n\
             Content-Type: application/json\r\nContent-Length: 7\r\n\r\n{\"a\":1}"
        );
        assert!(bytes(Response::empty(200)).ends_with("Content-Length: 0\r\n\r\n"));
    }

    #[test]
    fn bodies_are_ascii() {
        let response = Response::error(500, ["größe \u{1f980} \"x\""]);
        let body = response.body.unwrap();
        assert_eq!(body, r#"["gr\u00f6\u00dfe \ud83e\udd80 \"x\""]"#);
        let back: Vec<String> = serde_json::from_str(&body).unwrap();
        assert_eq!(back, ["größe \u{1f980} \"x\""]);
    }
}
