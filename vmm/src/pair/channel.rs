//! The logging channel's socket: frames in and out, never blocking.
//!
//! What is written is buffered here and leaves as the socket takes it; how much may wait is bounded by
//! those who write (the log buffer's limit, one chunk of a clone at a time). What is read is bounded by
//! [`ft::FrameReader`] and by not reading while the reader asks for a rest.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::fd::{AsRawFd, RawFd};

use ft::{FrameReader, Message};

/// Bytes asked of the socket at once.
const READ_BYTES: usize = 256 << 10;

/// Why the channel is of no more use.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// The connection ended.
    #[error("the peer closed the connection")]
    Closed,
    /// The connection failed.
    #[error("the connection failed")]
    Io(#[from] io::Error),
    /// The peer sends what is no message.
    #[error(transparent)]
    Message(#[from] ft::MessageError),
}

/// One connection between primary and backup.
pub struct Channel {
    stream: TcpStream,
    reader: FrameReader,
    input: Vec<u8>,
    output: Vec<u8>,
    /// How much of `output` has been written.
    written: usize,
}

impl Channel {
    /// Takes over a connected socket.
    pub fn new(stream: TcpStream) -> io::Result<Self> {
        stream.set_nodelay(true)?;
        stream.set_nonblocking(true)?;
        Ok(Self {
            stream,
            reader: FrameReader::new(),
            input: vec![0; READ_BYTES],
            output: Vec::new(),
            written: 0,
        })
    }

    /// Queues a message and writes what the socket takes.
    pub fn send(&mut self, message: &Message) -> Result<(), ChannelError> {
        message.append_frame(&mut self.output)?;
        self.flush()
    }

    /// Writes what the socket takes of what is queued.
    pub fn flush(&mut self) -> Result<(), ChannelError> {
        while self.written < self.output.len() {
            match self.stream.write(&self.output[self.written..]) {
                Ok(0) => return Err(ChannelError::Closed),
                Ok(count) => self.written += count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        self.output.clear();
        self.written = 0;
        Ok(())
    }

    /// Bytes queued and not yet taken by the socket.
    #[must_use]
    pub fn queued(&self) -> usize {
        self.output.len() - self.written
    }

    /// Reads once from the socket, then hands out what is complete through [`Channel::next_message`].
    pub fn fill(&mut self) -> Result<(), ChannelError> {
        match self.stream.read(&mut self.input) {
            Ok(0) => Err(ChannelError::Closed),
            Ok(count) => {
                self.reader.push(&self.input[..count]);
                Ok(())
            }
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                ) =>
            {
                Ok(())
            }
            Err(error) => Err(error.into()),
        }
    }

    /// The next complete message read.
    pub fn next_message(&mut self) -> Result<Option<Message>, ChannelError> {
        Ok(self.reader.next_message()?)
    }
}

impl AsRawFd for Channel {
    fn as_raw_fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }
}

/// A channel for as long as it lasts. Its loss is told once, by whichever call met it, and not at all
/// after [`Link::hang_up`].
pub struct Link {
    channel: Option<Channel>,
    hanging_up: bool,
}

/// What came in.
pub struct Heard {
    /// Complete messages, in order.
    pub messages: Vec<Message>,
    /// Why nothing more will come.
    pub lost: Option<String>,
}

impl Link {
    /// Takes over a connected socket.
    pub fn new(stream: TcpStream) -> io::Result<Self> {
        Ok(Self { channel: Some(Channel::new(stream)?), hanging_up: false })
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

    /// Bytes that the socket has not taken; `None` once it is closed.
    #[must_use]
    pub fn queued(&self) -> Option<usize> {
        self.channel.as_ref().map(Channel::queued)
    }

    /// Closes the channel once everything is sent.
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
        Heard { messages, lost: self.check(ended) }
    }

    /// Sends a message; tells if the channel was lost by it.
    pub fn send(&mut self, message: &Message) -> Option<String> {
        let sent = self.channel.as_mut()?.send(message);
        self.check(sent)
    }

    /// Sends what is queued; tells if the channel was lost by it.
    pub fn flush(&mut self) -> Option<String> {
        let flushed = self.channel.as_mut()?.flush();
        let lost = self.check(flushed);
        if self.hanging_up && self.queued() == Some(0) {
            self.channel = None;
        }
        lost
    }

    fn check(&mut self, result: Result<(), ChannelError>) -> Option<String> {
        let error = result.err()?;
        self.channel = None;
        (!self.hanging_up).then(|| error.to_string())
    }
}
