//! The bytes of the logging channel on their way: as they are, or inside TLS; never blocking.
//!
//! A TLS session lives on the thread of its side. What is written is encrypted at once and leaves with one
//! system call; what is read is decrypted in pieces of one record. A peer that speaks plainly to a side with
//! certificates, or the other way round, is recognised by its first three bytes and told so in words it
//! understands, so that neither operator waits for a timeout.

use std::io::{self, BufRead, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use ft::{FrameReader, Message};
use rustls::{ClientConnection, ServerConnection};

use super::channel::ChannelError;
use super::tls::{self, Security};

/// Bytes asked of the socket at once.
const READ_BYTES: usize = 256 << 10;
/// Encrypted bytes that may wait for the socket.
const ENCRYPTED_BYTES: usize = 256 << 10;
/// By so many bytes a TLS record is told from a frame.
const HEAD_BYTES: usize = 3;

/// A connected socket with what protects it.
pub struct Wire {
    stream: TcpStream,
    session: Session,
    role: Role,
    input: Box<[u8]>,
    opening: Opening,
}

enum Session {
    Plain,
    Tls(Box<rustls::Connection>),
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Role {
    Connecting,
    Accepting,
}

/// What the peer has begun with.
enum Opening {
    /// Too little to tell.
    Head(Vec<u8>),
    /// As it should be.
    Known,
    /// A frame, where TLS is wanted.
    Frame(FrameReader),
}

impl Wire {
    /// On the side that has connected to `host`.
    pub fn connecting(stream: TcpStream, security: &Security, host: &str) -> io::Result<Self> {
        let session = match security {
            Security::Plain => Session::Plain,
            Security::Tls(identity) => {
                let name = tls::host_name(host).ok_or_else(|| {
                    let text = format!("'{host}' cannot be the name in a certificate");
                    io::Error::new(io::ErrorKind::InvalidInput, text)
                })?;
                let config = Arc::clone(&identity.connecting);
                let connection = ClientConnection::new(config, name).map_err(io::Error::other)?;
                Session::tls(rustls::Connection::Client(connection))
            }
        };
        Self::new(stream, session, Role::Connecting)
    }

    /// On the side that has listened.
    pub fn accepting(stream: TcpStream, security: &Security) -> io::Result<Self> {
        let session = match security {
            Security::Plain => Session::Plain,
            Security::Tls(identity) => {
                let config = Arc::clone(&identity.accepting);
                let connection = ServerConnection::new(config).map_err(io::Error::other)?;
                Session::tls(rustls::Connection::Server(connection))
            }
        };
        Self::new(stream, session, Role::Accepting)
    }

    fn new(stream: TcpStream, session: Session, role: Role) -> io::Result<Self> {
        stream.set_nodelay(true)?;
        stream.set_nonblocking(true)?;
        let input = vec![0; READ_BYTES].into_boxed_slice();
        let opening = Opening::Head(Vec::with_capacity(HEAD_BYTES));
        Ok(Self { stream, session, role, input, opening })
    }

    /// Whether [`Wire::write`] takes anything: not before TLS is established.
    pub fn is_established(&self) -> bool {
        match &self.session {
            Session::Plain => true,
            Session::Tls(tls) => !tls.is_handshaking(),
        }
    }

    /// Whether bytes taken by [`Wire::write`], or of TLS itself, wait for the socket.
    pub fn has_unsent(&self) -> bool {
        match &self.session {
            Session::Plain => false,
            Session::Tls(tls) => tls.wants_write(),
        }
    }

    /// Takes what it can of `bytes`, and sends what the socket takes. Less than all were taken only if the
    /// socket is full or TLS is not established.
    pub fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let tls = match &mut self.session {
            Session::Plain => return write_all_it_takes(&mut self.stream, bytes),
            Session::Tls(tls) => tls,
        };
        let mut taken = 0;
        loop {
            if !tls.is_handshaking() {
                taken += tls.writer().write(&bytes[taken..])?;
            }
            let full = !send_encrypted(tls, &mut self.stream)?;
            if full || taken == bytes.len() || tls.is_handshaking() {
                return Ok(taken);
            }
        }
    }

    /// Sends nothing more: the peer reads the end of the connection behind what was sent.
    pub fn end(&self) -> io::Result<()> {
        self.stream.shutdown(Shutdown::Write)
    }

    /// Reads once from the socket and passes on what arrived.
    pub fn read(&mut self, reader: &mut FrameReader) -> Result<(), ChannelError> {
        let count = match self.stream.read(&mut self.input) {
            Ok(0) => return Err(self.closed()),
            Ok(count) => count,
            Err(error) if is_nothing_now(&error) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        let input = std::mem::take(&mut self.input);
        let result = self.received(&input[..count], reader);
        self.input = input;
        result
    }

    fn closed(&self) -> ChannelError {
        if self.is_established() { ChannelError::Closed } else { ChannelError::ClosedInHandshake }
    }

    fn received(&mut self, bytes: &[u8], reader: &mut FrameReader) -> Result<(), ChannelError> {
        match &mut self.opening {
            Opening::Known => self.pass_on(bytes, reader),
            Opening::Frame(frames) => {
                frames.push(bytes);
                self.judge_frame()
            }
            Opening::Head(head) => {
                head.extend_from_slice(bytes);
                if head.len() < HEAD_BYTES {
                    return Ok(());
                }
                let head = std::mem::take(head);
                self.opened(&head, reader)
            }
        }
    }

    /// `head` is all that has come, and enough to know what it is.
    fn opened(&mut self, head: &[u8], reader: &mut FrameReader) -> Result<(), ChannelError> {
        match (&self.session, begins_tls(head)) {
            (Session::Plain, false) | (Session::Tls(_), true) => {
                self.opening = Opening::Known;
                self.pass_on(head, reader)
            }
            (Session::Plain, true) => {
                let error = ChannelError::PeerWantsTls;
                self.tell_plainly("it was told insecure=on");
                Err(error)
            }
            (Session::Tls(_), false) => {
                let mut frames = FrameReader::new();
                frames.push(head);
                self.opening = Opening::Frame(frames);
                self.judge_frame()
            }
        }
    }

    /// A peer that begins with no TLS record on a side that wants TLS: a Dyad without it, or a stranger.
    fn judge_frame(&mut self) -> Result<(), ChannelError> {
        let Opening::Frame(frames) = &mut self.opening else { return Ok(()) };
        match frames.next_message() {
            Ok(None) => Ok(()),
            Ok(Some(Message::Hello(_) | Message::Refused { .. })) => {
                let error = ChannelError::PeerIsPlain;
                self.tell_plainly(
                    "it wants TLS, and this side was told insecure=on: give certificates to both \
                     sides (tls_dir=DIR), or insecure=on to both",
                );
                Err(error)
            }
            Ok(Some(_)) | Err(_) => Err(ChannelError::Stranger),
        }
    }

    /// The last word to a peer that was not understood, in a form that both kinds of side recognise. The
    /// connecting side has nobody to tell: its peer has spoken last.
    fn tell_plainly(&mut self, reason: &str) {
        if self.role == Role::Connecting {
            return;
        }
        let mut frame = Vec::new();
        let message = Message::Refused { reason: reason.to_owned() };
        if message.append_frame(&mut frame).is_ok() {
            // It is short, and the first that is sent: the socket takes it.
            let _ = self.stream.write(&frame);
        }
    }

    fn pass_on(&mut self, bytes: &[u8], reader: &mut FrameReader) -> Result<(), ChannelError> {
        let tls = match &mut self.session {
            Session::Plain => {
                reader.push(bytes);
                return Ok(());
            }
            Session::Tls(tls) => tls,
        };
        let result = decrypt(tls, bytes, reader);
        if result.is_err() {
            // The peer's operator wants to know why: the alert goes out, if the socket takes it.
            let _ = send_encrypted(tls, &mut self.stream);
        }
        result
    }
}

impl Session {
    fn tls(mut connection: rustls::Connection) -> Self {
        connection.set_buffer_limit(Some(ENCRYPTED_BYTES));
        Self::Tls(Box::new(connection))
    }
}

impl AsRawFd for Wire {
    fn as_raw_fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }
}

/// Whether `head`, at least [`HEAD_BYTES`] long, begins a TLS record: a content type and version 3.x. A frame
/// with this beginning would be longer than any greeting.
fn begins_tls(head: &[u8]) -> bool {
    matches!(head, [20..=23, 3, 1..=4, ..])
}

fn is_nothing_now(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

/// How much of `bytes` the socket took.
fn write_all_it_takes(stream: &mut TcpStream, bytes: &[u8]) -> io::Result<usize> {
    let mut taken = 0;
    while taken < bytes.len() {
        match stream.write(&bytes[taken..]) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => taken += count,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(taken)
}

/// Sends what has been encrypted; false if the socket did not take all.
fn send_encrypted(tls: &mut rustls::Connection, stream: &mut TcpStream) -> io::Result<bool> {
    while tls.wants_write() {
        match tls.write_tls(stream) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(true)
}

/// Passes on what `bytes` hold, record by record. What came before an error is still good.
fn decrypt(
    tls: &mut rustls::Connection,
    mut bytes: &[u8],
    reader: &mut FrameReader,
) -> Result<(), ChannelError> {
    while !bytes.is_empty() {
        // Takes a piece of them; nothing is read from anywhere else, so this cannot fail for want of bytes.
        tls.read_tls(&mut bytes)?;
        let state = tls.process_new_packets();
        drain(tls, reader);
        let state = state.map_err(|error| ChannelError::Tls(tls::explain(&error)))?;
        if state.peer_has_closed() {
            return Err(ChannelError::Closed);
        }
    }
    Ok(())
}

/// Passes on what has been decrypted.
fn drain(tls: &mut rustls::Connection, reader: &mut FrameReader) {
    let mut plain = tls.reader();
    // An error is the end of the session, which is told where it was met.
    while let Ok(piece) = plain.fill_buf()
        && !piece.is_empty()
    {
        reader.push(piece);
        let length = piece.len();
        plain.consume(length);
    }
}

#[cfg(test)]
mod tests;
