//! The host half of a network card: a TAP interface.
//!
//! A thread reads frames, as many as are there up to a limit, and hands them on as one batch. It has a few
//! batches under way at most: what comes while the guest is busy waits in the interface's own queue, which
//! the kernel bounds and whose drops it counts, and makes the next batch larger. Sending
//! is a system call that does not block, made by whoever releases the frames: a thread between would
//! only add delay. The interface may be attached long before it is started; what has piled up by
//! then is stale and thrown away.
//!
//! Frames pass with the virtio_net_hdr that the kernel reads and writes in front of each, so that nothing
//! is copied to add or remove it.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::Ipv4Addr;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use nix::poll::PollFlags;

use super::offload::{FRAME_MAX, HEADER_SIZE, Offloads};
use super::tap::{self, TapError};
use crate::poll::{Bell, PollThread, readable};
use crate::window::Window;

/// Frames in a batch at most, and bytes after which none is added.
pub const BATCH_MAX: usize = 64;
const BATCH_BYTES: usize = 256 << 10;

/// Batches that the guest has not taken yet, at most. The front half has room for all their frames.
pub const UNDER_WAY_MAX: usize = 4;

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
    /// What the guest's driver may be promised, and the interface must therefore be able to do.
    pub offloads: Offloads,
}

/// An attached TAP interface.
#[derive(Debug)]
pub struct NetBack {
    name: String,
    file: Arc<File>,
    thread: OnceLock<PollThread>,
    window: Arc<Window>,
    dropped: AtomicU64,
    /// How often the kernel would not have the offloads that a driver agreed to.
    refusals: AtomicU32,
}

impl NetBack {
    /// Attaches to the interface, makes it if need be, and brings it up.
    ///
    /// # Errors
    /// The step that failed.
    pub fn open(options: &TapOptions) -> Result<Self, TapError> {
        let (file, name) = tap::attach(options)?;
        Ok(Self::attached(file, name))
    }

    fn attached(file: File, name: String) -> Self {
        Self {
            name,
            file: Arc::new(file),
            thread: OnceLock::new(),
            window: Arc::new(Window::new(UNDER_WAY_MAX)),
            dropped: AtomicU64::new(0),
            refusals: AtomicU32::new(0),
        }
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
            window: Arc::clone(&self.window),
            buffer: vec![0; HEADER_SIZE + FRAME_MAX],
        };
        receiver.discard_stale();
        let thread = PollThread::spawn("net", move |bell| receiver.run(bell, &sink))
            .map_err(|source| TapError::Thread { name: self.name.clone(), source })?;
        // A second caller at the same moment loses: its thread ends at once.
        let _ = self.thread.set(thread);
        Ok(())
    }

    /// The guest has taken a batch: another may follow.
    pub fn taken(&self) {
        if self.window.drain()
            && let Some(thread) = self.thread.get()
        {
            thread.ring();
        }
    }

    /// Lets frames come in with these things left undone, which the guest's driver has agreed to. If the
    /// kernel will not, frames come without, which any driver takes.
    pub fn set_offloads(&self, offloads: Offloads) {
        if let Err(error) = tap::set_offloads(&self.file, &self.name, offloads) {
            // A guest may reset its card all day; the log must not grow with it.
            let count = self.refusals.fetch_add(1, Ordering::Relaxed).wrapping_add(1);
            if count.is_power_of_two() {
                let name = &self.name;
                log::warn!("{name}: received frames will be small ({count} times so far): {error}");
            }
        }
    }

    /// Sends frames, each behind its header. One that the kernel does not take is lost, as on any network,
    /// and counted.
    pub fn send(&self, frames: &[Vec<u8>]) {
        for frame in frames {
            while let Err(error) = (&*self.file).write(frame) {
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

/// A reverse ARP request from `mac` (RFC 903), behind a header: no one answers it, but every switch learns
/// the way. Gratuitous ARP, which would need the guest's IP address, could add nothing: the MAC address
/// stays the same, so what neighbours have in their ARP caches remains true.
#[must_use]
pub fn announcement(mac: [u8; 6]) -> Vec<u8> {
    let mut frame = vec![0; HEADER_SIZE];
    frame.extend_from_slice(&[0xff; 6]);
    frame.extend_from_slice(&mac);
    // Ethertype RARP; hardware Ethernet, protocol IPv4, their address lengths, operation 3.
    frame.extend_from_slice(&[0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3]);
    for _ in ["sender", "target"] {
        frame.extend_from_slice(&mac);
        frame.extend_from_slice(&[0; 4]);
    }
    // The shortest frame Ethernet allows, without its checksum.
    frame.resize(HEADER_SIZE + 60, 0);
    frame
}

/// The thread's own.
struct Receiver {
    name: String,
    file: Arc<File>,
    window: Arc<Window>,
    buffer: Vec<u8>,
}

impl Receiver {
    fn run(mut self, bell: &Bell, sink: &FrameSink) {
        loop {
            let tap = (self.file.as_fd(), PollFlags::POLLIN);
            let wanted: &[_] = if self.window.is_closed() { &[] } else { &[tap] };
            let ready = bell.wait(wanted);
            if bell.stopping() {
                return;
            }
            let received = match ready {
                Ok(ready) if ready.first().is_some_and(|tap| readable(*tap)) => self.receive(),
                Ok(_) => continue,
                Err(error) => Err(error),
            };
            match received {
                Ok(frames) if frames.is_empty() => {}
                Ok(frames) => {
                    self.window.fill();
                    sink(frames);
                }
                Err(error) => {
                    log::error!("{}: no more frames can be received: {error}", self.name);
                    return;
                }
            }
        }
    }

    /// Reads what is waiting, up to a batch.
    fn receive(&mut self) -> io::Result<Vec<Vec<u8>>> {
        let (mut frames, mut bytes) = (Vec::new(), 0);
        while frames.len() < BATCH_MAX
            && bytes < BATCH_BYTES
            && let Some(len) = self.read()?
        {
            if len > HEADER_SIZE {
                frames.push(self.buffer[..len].to_vec());
                bytes += len;
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
    use std::sync::Mutex;

    use super::*;

    /// Lines written to the log by the tests of this program.
    struct Lines(Mutex<Vec<String>>);

    impl log::Log for Lines {
        fn enabled(&self, _: &log::Metadata<'_>) -> bool {
            true
        }

        fn log(&self, record: &log::Record<'_>) {
            self.0.lock().unwrap().push(record.args().to_string());
        }

        fn flush(&self) {}
    }

    #[test]
    fn a_guest_that_resets_its_card_all_day_does_not_fill_the_log() {
        static LINES: Lines = Lines(Mutex::new(Vec::new()));
        log::set_logger(&LINES).unwrap();
        log::set_max_level(log::LevelFilter::Warn);
        // No TAP interface: it takes no offloads.
        let back = NetBack::attached(File::open("/dev/null").unwrap(), "null0".to_owned());
        for _ in 0..1000 {
            back.set_offloads(Offloads::default());
        }
        let lines = LINES.0.lock().unwrap();
        let ours = lines.iter().filter(|line| line.starts_with("null0: ")).count();
        assert_eq!(ours, 10, "the first and each that doubles their number");
    }

    #[test]
    fn the_announcement_is_a_reverse_arp_broadcast() {
        let mac = [2, 3, 4, 5, 6, 7];
        let packet = announcement(mac);
        let (header, frame) = packet.split_at(HEADER_SIZE);
        assert_eq!(header, [0; HEADER_SIZE]);
        assert_eq!(frame.len(), 60);
        assert_eq!(frame[0..6], [0xff; 6]);
        assert_eq!(frame[6..12], mac);
        assert_eq!(frame[12..22], [0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3]);
        assert_eq!(frame[22..28], mac);
        assert_eq!(frame[32..38], mac);
    }
}
