//! The logging channel: frames in and out, never blocking.
//!
//! What is written is buffered here and leaves as the [`Wire`] takes it; how much may wait is bounded by
//! those who write (the log buffer's limit, one chunk of a clone at a time). What is read is bounded by
//! [`ft::FrameReader`] and by not reading while the reader asks for a rest.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::time::Duration;

use ft::{FrameReader, Message};

use super::boot_time;
use super::wire::Wire;

/// Bytes queued that do not wait for [`Channel::flush`].
const CORK_BYTES: usize = 64 << 10;
/// How long the peer of a link that was hung up may take to close it too.
pub const PARTING: Duration = Duration::from_secs(1);
/// Bytes written that are not worth moving the rest for.
const FORGET_BYTES: usize = 1 << 20;

/// Why the channel is of no more use.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// The connection ended.
    #[error("the peer closed the connection")]
    Closed,
    /// As [`ChannelError::Closed`], while TLS was being set up.
    #[error("the peer closed the connection in the middle of the TLS handshake")]
    ClosedInHandshake,
    /// One side with certificates, one without.
    #[error(
        "the peer speaks without TLS (insecure=on), and this side wants TLS: give certificates to both sides (tls_dir=DIR), or insecure=on to both"
    )]
    PeerIsPlain,
    /// As [`ChannelError::PeerIsPlain`], seen from the other side.
    #[error(
        "the peer wants TLS, and this side was told insecure=on: give certificates to both sides (tls_dir=DIR), or insecure=on to both"
    )]
    PeerWantsTls,
    /// No Dyad at all.
    #[error("the peer speaks neither TLS nor Dyad's protocol: is it a Dyad?")]
    Stranger,
    /// TLS was refused, by this side or the other.
    #[error("{0}")]
    Tls(String),
    /// The connection failed.
    #[error("the connection failed")]
    Io(#[from] io::Error),
    /// The peer sends what is no message.
    #[error(transparent)]
    Message(#[from] ft::MessageError),
}

/// One connection between primary and backup.
pub struct Channel {
    wire: Wire,
    reader: FrameReader,
    output: Vec<u8>,
    /// How much of `output` has been written.
    written: usize,
}

impl Channel {
    /// Begins on a wire.
    #[must_use]
    pub fn new(wire: Wire) -> Self {
        Self { wire, reader: FrameReader::new(), output: Vec::new(), written: 0 }
    }

    /// Queues a message, to be written by the next [`Channel::flush`]; writes what the socket takes if
    /// much is queued.
    pub fn send(&mut self, message: &Message) -> Result<(), ChannelError> {
        message.append_frame(&mut self.output)?;
        if self.queued() < CORK_BYTES { Ok(()) } else { self.flush() }
    }

    /// Writes what the wire takes of what is queued.
    pub fn flush(&mut self) -> Result<(), ChannelError> {
        if self.queued() == 0 && !self.wire.has_unsent() {
            return Ok(());
        }
        self.written += self.wire.write(&self.output[self.written..])?;
        if self.queued() == 0 {
            self.output.clear();
            self.written = 0;
        } else {
            self.forget_written();
        }
        Ok(())
    }

    /// A writer that keeps the queue filled never sees it empty: what has left must not stay for ever.
    fn forget_written(&mut self) {
        if self.written >= FORGET_BYTES && self.written >= self.queued() {
            self.output.drain(..self.written);
            self.written = 0;
        }
    }

    /// Bytes queued and not yet taken by the wire.
    #[must_use]
    pub fn queued(&self) -> usize {
        self.output.len() - self.written
    }

    /// Whether anything can be sent as soon as the socket takes it.
    #[must_use]
    pub fn wants_to_write(&self) -> bool {
        self.wire.has_unsent() || self.queued() > 0 && self.wire.is_established()
    }

    /// Whether nothing more will be sent of what is queued, unless the peer says something first.
    fn has_said_all(&self) -> bool {
        !self.wants_to_write()
    }

    /// Ends the connection in one direction, behind all that was sent.
    fn end(&self) -> io::Result<()> {
        self.wire.end()
    }

    /// Reads once from the wire, then hands out what is complete through [`Channel::next_message`].
    pub fn fill(&mut self) -> Result<(), ChannelError> {
        self.wire.read(&mut self.reader)
    }

    /// The next complete message read.
    pub fn next_message(&mut self) -> Result<Option<Message>, ChannelError> {
        Ok(self.reader.next_message()?)
    }
}

impl AsRawFd for Channel {
    fn as_raw_fd(&self) -> RawFd {
        self.wire.as_raw_fd()
    }
}

/// A channel for as long as it lasts. Its loss is told once, by whichever call met it, and not at all
/// after [`Link::hang_up`].
pub struct Link {
    channel: Option<Channel>,
    hanging_up: bool,
    /// The peer has closed; what it said before has not all been read.
    unwritable: bool,
    /// All is said. Until when the peer may take to close the connection too.
    parting: Option<Duration>,
}

/// What came in.
pub struct Heard {
    /// Complete messages, in order.
    pub messages: Vec<Message>,
    /// Why nothing more will come.
    pub lost: Option<String>,
}

impl Link {
    /// Begins on a wire.
    #[must_use]
    pub fn new(wire: Wire) -> Self {
        Self {
            channel: Some(Channel::new(wire)),
            hanging_up: false,
            unwritable: false,
            parting: None,
        }
    }

    /// The channel, to be waited for.
    #[must_use]
    pub fn channel(&self) -> Option<&Channel> {
        self.channel.as_ref()
    }

    /// Whether more may come or go.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.channel.is_some()
    }

    /// Bytes that the wire has not taken; `None` once it is closed.
    #[must_use]
    pub fn queued(&self) -> Option<usize> {
        self.channel.as_ref().map(Channel::queued)
    }

    /// Closes the channel once everything is sent and, if it does not take long, the peer has closed it too: a socket that
    /// is closed while something in it is unread takes back what its peer has not read.
    pub fn hang_up(&mut self) {
        self.hanging_up = true;
    }

    /// Reads what is there. What came before the end is still good.
    pub fn read(&mut self) -> Heard {
        let mut messages = Vec::new();
        let Some(channel) = &mut self.channel else { return Heard { messages, lost: None } };
        let filled = channel.fill();
        let ended = loop {
            match channel.next_message() {
                Ok(Some(message)) => messages.push(message),
                Ok(None) => break filled,
                Err(error) => break Err(error),
            }
        };
        if self.parting.is_some() {
            messages.clear();
        }
        Heard { messages, lost: self.check(ended) }
    }

    /// As [`Channel::send`]; tells if the channel was lost by it.
    pub fn send(&mut self, message: &Message) -> Option<String> {
        if self.unwritable || self.parting.is_some() {
            return None;
        }
        let sent = self.channel.as_mut()?.send(message);
        self.written(sent)
    }

    /// Sends what is queued; tells if the channel was lost by it.
    pub fn flush(&mut self) -> Option<String> {
        let channel = self.channel.as_mut()?;
        let flushed = if self.unwritable { Ok(()) } else { channel.flush() };
        let lost = self.written(flushed);
        // To a peer that never came to speak TLS there is nothing to say.
        let said_all = self.unwritable || self.channel.as_ref().is_none_or(Channel::has_said_all);
        if self.hanging_up && said_all {
            self.part();
        }
        lost
    }

    fn part(&mut self) {
        let Some(channel) = &self.channel else { return };
        let now = boot_time();
        let over = match self.parting {
            Some(until) => now >= until,
            None => self.unwritable || channel.end().is_err(),
        };
        self.parting.get_or_insert(now + PARTING);
        if over {
            self.channel = None;
        }
    }

    /// A peer that closes the connection has often said why. That is still to be read, and the end of the
    /// connection with it.
    fn written(&mut self, result: Result<(), ChannelError>) -> Option<String> {
        if let Err(ChannelError::Io(error)) = &result
            && matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset)
        {
            self.unwritable = true;
            return None;
        }
        self.check(result)
    }

    fn check(&mut self, result: Result<(), ChannelError>) -> Option<String> {
        let error = result.err()?;
        self.channel = None;
        (!self.hanging_up).then(|| error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use std::io::Read;
    use std::net::TcpStream;

    use nix::sys::socket::setsockopt;
    use nix::sys::socket::sockopt::RcvBuf;

    use super::super::tls::Security;
    use super::*;

    /// Two links on one connection. What the first has not read waits in the socket of the second.
    fn links() -> [Link; 2] {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let ours = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        setsockopt(&ours, RcvBuf, &4096).unwrap();
        let (theirs, _) = listener.accept().unwrap();
        let ours = Wire::connecting(ours, &Security::Plain, "b").unwrap();
        [ours, Wire::accepting(theirs, &Security::Plain).unwrap()].map(Link::new)
    }

    #[test]
    fn the_last_word_arrives_though_the_other_side_was_not_heard_out() {
        let [mut primary, mut backup] = links();
        let piece = Message::Payload { bytes: vec![7; 60 << 10] };
        for link in [&mut primary, &mut backup] {
            assert_eq!((link.send(&piece), link.flush(), link.queued()), (None, None, Some(0)));
        }
        let reason = "a disk hangs".to_owned();
        assert_eq!(backup.send(&Message::Discarded { reason: reason.clone() }), None);
        backup.hang_up();
        let mut last = None;
        while backup.is_open() || primary.is_open() {
            backup.flush();
            // Until all is said it hears nobody, like one whose disks keep it busy.
            if backup.parting.is_some() {
                assert!(backup.read().messages.is_empty());
            }
            last = primary.read().messages.into_iter().last().or(last);
        }
        assert_eq!(last, Some(Message::Discarded { reason }));
    }

    #[test]
    fn a_peer_that_never_closes_is_left_after_a_moment() {
        let [mut ours, theirs] = links();
        ours.hang_up();
        assert_eq!(ours.flush(), None);
        assert!(ours.is_open(), "the peer has not closed it");
        ours.parting = Some(boot_time());
        assert_eq!(ours.flush(), None);
        assert!(!ours.is_open() && theirs.is_open());
    }

    #[test]
    fn a_queue_that_is_never_empty_does_not_grow() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let wire = Wire::connecting(stream, &Security::Plain, "b").unwrap();
        let mut channel = Channel::new(wire);
        let (mut peer, _) = listener.accept().unwrap();
        let message = Message::Payload { bytes: vec![7; 1 << 20] };
        // The socket's own buffers take some of it.
        while channel.queued() < 4 << 20 {
            channel.send(&message).unwrap();
        }
        let mut taken = vec![0; 1 << 20];
        for _ in 0..100 {
            peer.read_exact(&mut taken).unwrap();
            channel.flush().unwrap();
            while channel.queued() < 4 << 20 {
                channel.send(&message).unwrap();
            }
            assert!(channel.output.len() <= 12 << 20, "{} bytes are kept", channel.output.len());
        }
    }
}
