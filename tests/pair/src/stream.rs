//! TCP streams through the guest: whether every byte comes back in its place, and how many a second go through.
//!
//! The guest serves three ports: one takes everything, one sends without end, one sends back what it gets. In the
//! small guest [`SERVE`] starts them; in the one with programs `dyad.start=streams` does.

use crate::lab::Lab;
use crate::pair::CHANGE;
use crate::patience::eventually;
use anyhow::{Context, Result, anyhow, ensure};
use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Kernel parameter that makes the small guest serve the three ports.
pub const SERVE: &str = "dyad.exec=\"nc -ll -p 7201 -e dd of=/dev/null bs=64k 2>/dev/null & \
     nc -ll -p 7202 -e dd if=/dev/zero bs=64k 2>/dev/null & nc -ll -p 7203 -e cat &\"";

/// Takes everything.
const SINK: u16 = 7201;
/// Sends without end.
const SOURCE: u16 = 7202;
/// Sends back.
const ECHO: u16 = 7203;

/// Bytes read or written at once.
const PIECE: usize = 64 << 10;

/// The byte at a place in a stream: no stretch of it looks like its neighbours.
fn byte_at(place: u64) -> u8 {
    (place.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8
}

fn fill(piece: &mut [u8], start: u64) {
    for (place, byte) in (start..).zip(piece) {
        *byte = byte_at(place);
    }
}

/// A stream that goes to the guest and comes back, each byte checked against its place.
pub struct Echo {
    back: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    writer: JoinHandle<Result<u64>>,
    reader: JoinHandle<Result<u64>>,
}

impl Echo {
    /// Begins to send and to check.
    ///
    /// # Errors
    ///
    /// If the guest does not answer.
    pub fn start(lab: &Lab) -> Result<Self> {
        let stream = lab.connect(ECHO)?;
        let other = stream.try_clone()?;
        let (back, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let (count, flag) = (Arc::clone(&back), Arc::clone(&stop));
        let writer = std::thread::spawn(move || send(stream, &flag));
        let reader = std::thread::spawn(move || check(other, &count));
        Ok(Self { back, stop, writer, reader })
    }

    /// Bytes that have come back.
    #[must_use]
    pub fn back(&self) -> u64 {
        self.back.load(Ordering::Acquire)
    }

    /// Waits until `bytes` more have come back.
    ///
    /// # Errors
    ///
    /// If they do not within [`CHANGE`], or a byte was wrong.
    pub fn progress(&self, bytes: u64) -> Result<()> {
        let goal = self.back() + bytes;
        eventually(CHANGE, "the stream goes on", || {
            ensure!(!self.reader.is_finished(), "the stream has ended at byte {}", self.back());
            Ok((self.back() >= goal).then_some(()))
        })
    }

    /// Ends the stream and waits until all that was sent has come back; gives its length.
    ///
    /// # Errors
    ///
    /// If the connection broke, a byte was wrong, or some are missing.
    pub fn finish(self) -> Result<u64> {
        self.stop.store(true, Ordering::Release);
        let join = |thread: JoinHandle<Result<u64>>| {
            thread.join().map_err(|_| anyhow!("a thread of the stream panicked"))?
        };
        let sent = join(self.writer).context("sending")?;
        let back = join(self.reader).context("receiving")?;
        ensure!(sent == back, "{sent} bytes went to the guest, {back} came back");
        Ok(sent)
    }
}

fn send(mut stream: TcpStream, stop: &AtomicBool) -> Result<u64> {
    let (mut piece, mut sent) = (vec![0; PIECE], 0);
    while !stop.load(Ordering::Acquire) {
        fill(&mut piece, sent);
        stream.write_all(&piece)?;
        sent += PIECE as u64;
    }
    stream.shutdown(Shutdown::Write)?;
    Ok(sent)
}

fn check(mut stream: TcpStream, back: &AtomicU64) -> Result<u64> {
    let (mut piece, mut expected, mut place) = (vec![0; PIECE], vec![0; PIECE], 0);
    loop {
        let len = stream.read(&mut piece)?;
        if len == 0 {
            return Ok(place);
        }
        fill(&mut expected[..len], place);
        if let Some(at) = piece[..len].iter().zip(&expected).position(|(a, b)| a != b) {
            return Err(anyhow!("byte {} came back wrong", place + at as u64));
        }
        place += len as u64;
        back.store(place, Ordering::Release);
    }
}

/// What one direction carried.
#[derive(Clone, Copy, Debug)]
pub struct Rate {
    /// How much.
    pub bytes: u64,
    /// In what time.
    pub took: Duration,
}

impl Rate {
    /// Millions of bytes in a second.
    #[must_use]
    pub fn megabytes_per_second(&self) -> f64 {
        self.bytes as f64 / 1e6 / self.took.as_secs_f64()
    }
}

/// Sends `bytes` to the guest, and waits until it has taken them all.
///
/// # Errors
///
/// If the connection breaks.
pub fn measure_receive(lab: &Lab, bytes: u64) -> Result<Rate> {
    let mut stream = lab.connect(SINK)?;
    let start = Instant::now();
    let (piece, mut sent) = (vec![0; PIECE], 0);
    while sent < bytes {
        stream.write_all(&piece)?;
        sent += PIECE as u64;
    }
    // The guest closes when it has read the end.
    stream.shutdown(Shutdown::Write)?;
    ensure!(stream.read(&mut [0])? == 0, "the guest's sink sends");
    Ok(Rate { bytes: sent, took: start.elapsed() })
}

/// Reads `bytes` from the guest.
///
/// # Errors
///
/// If the connection breaks.
pub fn measure_transmit(lab: &Lab, bytes: u64) -> Result<Rate> {
    let mut stream = lab.connect(SOURCE)?;
    let start = Instant::now();
    let (mut piece, mut read) = (vec![0; PIECE], 0);
    while read < bytes {
        let len = stream.read(&mut piece)?;
        ensure!(len > 0, "the guest's source ended after {read} bytes");
        read += len as u64;
    }
    Ok(Rate { bytes: read, took: start.elapsed() })
}
