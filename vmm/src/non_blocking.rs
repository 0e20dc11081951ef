//! Text for a reader who may be slow: a thread of its own writes it.
//!
//! What must hold: whoever sends never waits for the reader and formats as little as possible, since it may be an ft thread,
//! whose silence costs the protection, or the vCPU thread. What a slow reader has no room for is dropped, whole
//! items only, and counted.

use std::fs::File;
use std::io::{self, ErrorKind, Write};
use std::ops::ControlFlow;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rt_channel::{Receiver, Sender};

/// Items that may wait for a slow reader.
pub(crate) const MAX_WAITING: usize = 1024;
/// How long a reader that takes nothing may delay the end of the process.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// Makes text of items, on the thread that writes.
pub trait Format<T>: Send + 'static {
    /// The text of an item.
    fn text(&mut self, item: T) -> Vec<u8>;
    /// The text, if any, that says that so many items were dropped where it stands.
    fn dropped(&mut self, count: u64) -> Vec<u8>;
    /// Writing has failed, with part of the text perhaps written. Whether to go on with the next item.
    fn failed(&mut self, error: &io::Error) -> ControlFlow<()>;
}

enum Order<T> {
    /// An item, and how many were dropped right before it.
    Write(T, u64),
    /// Closed once all before is written.
    Flush(Sender<()>),
    Stop,
}

struct Queue<T> {
    orders: Sender<Order<T>>,
    /// Items dropped since one was taken.
    dropped: AtomicU64,
}

/// Where items are sent. Clones send to the same writer.
pub struct NonBlocking<T>(Arc<Queue<T>>);

impl<T> Clone for NonBlocking<T> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<T> NonBlocking<T> {
    /// Has an item written, if there is room for it.
    pub fn send(&self, item: T) {
        if self.0.orders.len() >= MAX_WAITING {
            self.0.dropped.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let dropped = self.0.dropped.swap(0, Ordering::Relaxed);
        // Fails where writing has failed for good, which was reported.
        let _ = self.0.orders.send(Order::Write(item, dropped));
    }

    /// Waits until all that was sent before is written; not for long, where the reader takes nothing.
    pub fn flush(&self) {
        let (writing, written) = rt_channel::unbounded();
        if self.0.orders.send(Order::Flush(writing)).is_ok() {
            let _ = written.recv_timeout(LAST_WORDS);
        }
    }
}

/// The thread that writes. Dropping it ends it, after what was sent before has been written.
pub struct Writer<T> {
    sender: NonBlocking<T>,
}

impl<T: Send + 'static> Writer<T> {
    /// Writes to `file`. The thread is called `name`.
    pub fn start(name: &str, file: File, format: impl Format<T>) -> io::Result<Self> {
        let (orders, received) = rt_channel::unbounded();
        let queue = Arc::new(Queue { orders, dropped: AtomicU64::new(0) });
        std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || write_items(file, &received, format))?;
        Ok(Self { sender: NonBlocking(queue) })
    }

    /// Where to send.
    #[must_use]
    pub fn sender(&self) -> NonBlocking<T> {
        self.sender.clone()
    }
}

impl<T> Drop for Writer<T> {
    fn drop(&mut self) {
        // A reader that takes nothing keeps the thread; the process ends without it.
        self.sender.flush();
        let _ = self.sender.0.orders.send(Order::Stop);
    }
}

fn write_items<T>(mut file: File, orders: &Receiver<Order<T>>, mut format: impl Format<T>) {
    while let Ok(order) = orders.recv() {
        let (item, dropped) = match order {
            Order::Write(item, dropped) => (item, dropped),
            Order::Flush(written) => {
                drop(written);
                continue;
            }
            Order::Stop => return,
        };
        let mut text = if dropped > 0 { format.dropped(dropped) } else { Vec::new() };
        text.append(&mut format.text(item));
        if let Err(error) = write_all(&mut file, &text)
            && format.failed(&error).is_break()
        {
            return;
        }
    }
}

/// Writes to a descriptor that may not take everything at once.
fn write_all(file: &mut File, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match file.write(bytes) {
            Ok(0) => return Err(ErrorKind::WriteZero.into()),
            Ok(count) => bytes = &bytes[count..],
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                poll(&mut [PollFd::new(file.as_fd(), PollFlags::POLLOUT)], PollTimeout::NONE)?;
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixStream;

    use super::*;

    /// One letter for each item, one for each drop told.
    struct Letters;

    impl Format<char> for Letters {
        fn text(&mut self, item: char) -> Vec<u8> {
            item.to_string().into_bytes()
        }

        fn dropped(&mut self, count: u64) -> Vec<u8> {
            format!("<{count}>").into_bytes()
        }

        fn failed(&mut self, _: &io::Error) -> ControlFlow<()> {
            ControlFlow::Continue(())
        }
    }

    fn pair() -> (UnixStream, Writer<char>) {
        let (reader, writer) = UnixStream::pair().unwrap();
        let file = File::from(OwnedFd::from(writer));
        (reader, Writer::start("letters", file, Letters).unwrap())
    }

    #[test]
    fn a_flush_waits_for_what_was_sent_and_the_end_does_too() {
        let (mut reader, writer) = pair();
        reader.set_nonblocking(true).unwrap();
        writer.sender().send('a');
        writer.sender().flush();
        let mut text = [0; 8];
        assert_eq!(reader.read(&mut text).unwrap(), 1);
        writer.sender().send('b');
        drop(writer);
        assert_eq!(reader.read(&mut text).unwrap(), 1);
        assert_eq!(text[0], b'b');
    }

    #[test]
    fn who_sends_to_a_reader_that_does_not_read_is_not_kept() {
        let (mut reader, writer) = pair();
        let sender = writer.sender();
        // Until the socket is full, and the queue behind it.
        let mut sent = 0;
        while sender.0.dropped.load(Ordering::Relaxed) == 0 {
            sender.send('x');
            sent += 1;
        }
        let reading = std::thread::spawn(move || {
            let mut text = String::new();
            reader.read_to_string(&mut text).unwrap();
            text
        });
        sender.flush();
        sender.send('y');
        drop((writer, sender));
        let text = reading.join().unwrap();
        assert_eq!(text, format!("{}<1>y", "x".repeat(sent - 1)));
    }

    #[test]
    fn after_a_failure_it_goes_on_if_it_is_to() {
        let (reader, writer) = pair();
        drop(reader);
        writer.sender().send('a');
        writer.sender().flush();
        assert!(writer.sender().0.orders.send(Order::Write('b', 0)).is_ok(), "somebody takes it");
    }
}
