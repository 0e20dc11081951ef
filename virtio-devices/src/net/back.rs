//! The host half of a network card: a TAP interface.
//!
//! A thread reads frames, as many as are there up to a limit, and hands them on as one batch. Sending
//! is a system call that does not block, made by whoever releases the frames: a thread between would
//! only add delay. The interface may be attached long before it is started; what has piled up by
//! then is stale and thrown away.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::Ipv4Addr;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use nix::poll::PollFlags;

use super::tap::{self, TapError};
use crate::net::FRAME_MAX;
use crate::poll::{Bell, PollThread, readable};

/// Frames in a batch at most.
pub const BATCH_MAX: usize = 64;

/// The TAP's header: struct virtio_net_hdr with num_buffers, all zero as nothing is offloaded.
const HEADER_SIZE: usize = tap::HEADER_SIZE;

/// Where received frames go; called on the card's thread.
pub type FrameSink = Box<dyn Fn(Vec<Vec<u8>>) + Send>;

/// Which TAP interface, and how to set it up.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TapOptions {
    /// Its name; it is attached to if it exists, else created. Without a name the kernel chooses one.
    pub name: Option<String>,
    /// The host's address on it, if to be set.
    pub ip: Option<Ipv4Addr>,
    /// The network mask that goes with `ip`.
    pub mask: Option<Ipv4Addr>,
    /// Its MTU, if to be set.
    pub mtu: Option<u16>,
}

/// An attached TAP interface.
#[derive(Debug)]
pub struct NetBack {
    name: String,
    file: Arc<File>,
    thread: OnceLock<PollThread>,
    dropped: AtomicU64,
}

impl NetBack {
    /// Attaches to the interface, makes it if need be, and brings it up.
    ///
    /// # Errors
    /// The step that failed.
    pub fn open(options: &TapOptions) -> Result<Self, TapError> {
        let (file, name) = tap::attach(options)?;
        Ok(Self { name, file: Arc::new(file), thread: OnceLock::new(), dropped: AtomicU64::new(0) })
    }

    /// The interface's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Starts to receive. Frames that came before are thrown away. Once only; a second call does nothing.
    ///
    /// # Errors
    /// If the host has no thread to give.
    pub fn start(&self, sink: FrameSink) -> Result<(), TapError> {
        if self.thread.get().is_some() {
            return Ok(());
        }
        let mut receiver = Receiver {
            name: self.name.clone(),
            file: Arc::clone(&self.file),
            buffer: vec![0; HEADER_SIZE + FRAME_MAX],
        };
        receiver.discard_stale();
        let thread = PollThread::spawn("net", move |bell| receiver.run(bell, &sink))
            .map_err(|source| TapError::Thread { name: self.name.clone(), source })?;
        // A second caller at the same moment loses: its thread ends at once.
        let _ = self.thread.set(thread);
        Ok(())
    }

    /// Sends frames. A frame the kernel does not take is lost, as on any network, and counted.
    pub fn send(&self, frames: &[Vec<u8>]) {
        let mut packet = Vec::new();
        for frame in frames {
            packet.clear();
            packet.resize(HEADER_SIZE, 0);
            packet.extend_from_slice(frame);
            while let Err(error) = (&*self.file).write(&packet) {
                if error.kind() != io::ErrorKind::Interrupted {
                    self.dropped.fetch_add(1, Ordering::Relaxed);
                    log::debug!("{}: a frame of {} bytes lost: {error}", self.name, frame.len());
                    break;
                }
            }
        }
    }

    /// Tells the network that `mac` is now reached through this interface.
    pub fn announce(&self, mac: [u8; 6]) {
        self.send(&[announcement(mac)]);
    }

    /// Frames the kernel did not take.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }

    /// Ends the thread and detaches from the interface; one made by [`NetBack::open`] vanishes.
    pub fn stop(self) {
        drop(self);
    }
}

/// A reverse ARP request from `mac` (RFC 903): no one answers it, but every switch learns the way.
/// Unlike gratuitous ARP it needs no IP address, which only the guest knows.
#[must_use]
pub fn announcement(mac: [u8; 6]) -> Vec<u8> {
    let mut frame = Vec::with_capacity(60);
    frame.extend_from_slice(&[0xff; 6]);
    frame.extend_from_slice(&mac);
    // Ethertype RARP; hardware Ethernet, protocol IPv4, their address lengths, operation 3.
    frame.extend_from_slice(&[0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3]);
    for _ in ["sender", "target"] {
        frame.extend_from_slice(&mac);
        frame.extend_from_slice(&[0; 4]);
    }
    // The shortest frame Ethernet allows, without its checksum.
    frame.resize(60, 0);
    frame
}

/// The thread's own.
struct Receiver {
    name: String,
    file: Arc<File>,
    buffer: Vec<u8>,
}

impl Receiver {
    fn run(mut self, bell: &Bell, sink: &FrameSink) {
        loop {
            let ready = bell.wait(&[(self.file.as_fd(), PollFlags::POLLIN)]);
            if bell.stopping() {
                return;
            }
            let received = match ready {
                Ok(ready) if readable(ready[0]) => self.receive(),
                Ok(_) => continue,
                Err(error) => Err(error),
            };
            match received {
                Ok(frames) if frames.is_empty() => {}
                Ok(frames) => sink(frames),
                Err(error) => {
                    log::error!("{}: no more frames can be received: {error}", self.name);
                    return;
                }
            }
        }
    }

    fn receive(&mut self) -> io::Result<Vec<Vec<u8>>> {
        let mut frames = Vec::new();
        while frames.len() < BATCH_MAX
            && let Some(len) = self.read()?
        {
            if len > HEADER_SIZE {
                frames.push(self.buffer[HEADER_SIZE..len].to_vec());
            }
        }
        Ok(frames)
    }

    fn discard_stale(&mut self) {
        // An error will be met again, and reported, by the first read that matters.
        while let Ok(Some(_)) = self.read() {}
    }

    /// Reads one packet into the buffer; `None` if there is none.
    fn read(&mut self) -> io::Result<Option<usize>> {
        loop {
            match (&*self.file).read(&mut self.buffer) {
                Ok(len) => return Ok(Some(len)),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_announcement_is_a_reverse_arp_broadcast() {
        let mac = [2, 3, 4, 5, 6, 7];
        let frame = announcement(mac);
        assert_eq!(frame.len(), 60);
        assert_eq!(frame[0..6], [0xff; 6]);
        assert_eq!(frame[6..12], mac);
        assert_eq!(frame[12..22], [0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3]);
        assert_eq!(frame[22..28], mac);
        assert_eq!(frame[32..38], mac);
    }
}
