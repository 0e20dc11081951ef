//! The back halves of a VM: the threads that reach disks, networks, terminals and randomness.
//!
//! Opened as a whole from a configuration, started apart from that: a backup opens everything early, so
//! that going live cannot fail for want of a file, but starts nothing, so that the world sees one
//! machine only. What happens in the world is handed to one sink as [`ft::Event`]s.
//!
//! Once opened they are shared as they are: the vCPU thread and the ft thread, which runs at real-time priority,
//! call them at the same time, and no call waits for a lock the other could hold.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use ft::Event;
use virtio_devices::BlockRequest;
use virtio_devices::block::back::{BlockBack, BlockBackError, BlockOptions, CompletionSink};
use virtio_devices::block::copy::ImageCopy;
use virtio_devices::block::latency::Latencies;
use virtio_devices::console::back::{ConsoleBack, ConsoleBackError, ConsoleMode as Connection};
use virtio_devices::net::back::{NetBack, TapOptions};
use virtio_devices::net::{Offloads, TapError};
use virtio_devices::rng::back::{RngBack, RngBackError};

use crate::api::Counters;
use crate::config::{ConsoleMode, DiskConfig, LockGranularity, NetConfig, VmConfig};
use crate::machine::{self, Kind};
use crate::pci::PciError;
use crate::run_loop::outgoing::Outlet;
use crate::shared::chain;

/// Where events go. Called on the back halves' threads; must not wait for any of them.
pub type EventSink = Arc<dyn Fn(Event) + Send + Sync>;

/// Why the back halves cannot be opened or started.
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    /// The devices cannot be placed.
    #[error("cannot place the PCI devices")]
    Pci(#[from] PciError),
    /// A disk.
    #[error("cannot use disk '{id}'")]
    Disk {
        /// Its id.
        id: String,
        /// Why.
        #[source]
        source: BlockBackError,
    },
    /// A disk without an image.
    #[error("disk '{id}' has no image; give it a 'path'")]
    DiskWithoutPath {
        /// Its id.
        id: String,
    },
    /// A network device.
    #[error("cannot use network device '{id}'")]
    Net {
        /// Its id.
        id: String,
        /// Why.
        #[source]
        source: TapError,
    },
    /// An address of a kind that is not supported on the host's side.
    #[error("network device '{id}' has the host address {address}; only IPv4 is supported")]
    NetAddress {
        /// Its id.
        id: String,
        /// The address.
        address: IpAddr,
    },
    /// The console or serial port.
    #[error("cannot use the {what}")]
    Console {
        /// `console` or `serial port`.
        what: &'static str,
        /// Why.
        #[source]
        source: ConsoleBackError,
    },
    /// A console connected to a file or socket that is not named.
    #[error("the {what} has a mode that needs a path; give it a '{field}'")]
    ConsoleWithoutPath {
        /// `console` or `serial port`.
        what: &'static str,
        /// `file` or `socket`.
        field: &'static str,
    },
    /// The entropy source.
    #[error("cannot use the entropy source")]
    Rng(#[source] RngBackError),
}

/// The image of a disk.
pub struct DiskImage {
    /// The disk's id.
    pub id: String,
    /// Whether the guest cannot write to it.
    pub read_only: bool,
    /// The image.
    pub copy: ImageCopy,
}

struct Disk {
    id: String,
    back: BlockBack,
}

struct Net {
    id: String,
    back: NetBack,
    mac: Option<[u8; 6]>,
}

/// The back halves of one VM, by device number (see [`crate::machine`]).
pub struct Backends {
    sink: EventSink,
    disks: BTreeMap<u8, Disk>,
    nets: BTreeMap<u8, Net>,
    consoles: BTreeMap<u8, ConsoleBack>,
    rngs: BTreeMap<u8, RngBack>,
    serial: Option<ConsoleBack>,
}

impl Backends {
    /// Opens everything `config` names. Nothing is read, written or taken from the world yet.
    pub fn open(config: &VmConfig, sink: EventSink) -> Result<Self, BackendError> {
        let mut backends = Self {
            sink,
            disks: BTreeMap::new(),
            nets: BTreeMap::new(),
            consoles: BTreeMap::new(),
            rngs: BTreeMap::new(),
            serial: None,
        };
        for device in machine::place(config)? {
            let slot = device.slot;
            match device.kind {
                Kind::Console => {
                    let console = &config.console;
                    let back =
                        open_console("console", console.mode, &console.file, &console.socket)?;
                    backends.consoles.extend(back.map(|back| (slot, back)));
                }
                Kind::Disk { index } => {
                    let disk = &config.disks()[index];
                    let id = device.id;
                    let Some(options) = block_options(disk) else {
                        return Err(BackendError::DiskWithoutPath { id });
                    };
                    let back = match BlockBack::open_with(&options) {
                        Ok(back) => back,
                        Err(source) => return Err(BackendError::Disk { id, source }),
                    };
                    backends.disks.insert(slot, Disk { id, back });
                }
                Kind::Net { index } => {
                    let net = &config.net()[index];
                    let id = device.id;
                    let options = tap_options(&id, net)?;
                    let back = match NetBack::open(&options) {
                        Ok(back) => back,
                        Err(source) => return Err(BackendError::Net { id, source }),
                    };
                    let mac = net.mac.map(|mac| mac.0);
                    backends.nets.insert(slot, Net { id, back, mac });
                }
                Kind::Rng => {
                    let back = RngBack::open(&config.rng.src).map_err(BackendError::Rng)?;
                    backends.rngs.insert(slot, back);
                }
            }
        }
        let serial = &config.serial;
        backends.serial = open_console("serial port", serial.mode, &serial.file, &serial.socket)?;
        Ok(backends)
    }

    /// Size of each disk in sectors, in the order of the configuration.
    #[must_use]
    pub fn disk_sectors(&self, config: &VmConfig) -> Vec<u64> {
        let by_id: HashMap<&str, u64> =
            self.disks.values().map(|disk| (disk.id.as_str(), disk.back.sectors())).collect();
        let placed = machine::place(config).unwrap_or_default();
        let disks = placed.iter().filter(|device| matches!(device.kind, Kind::Disk { .. }));
        disks.filter_map(|device| by_id.get(device.id.as_str()).copied()).collect()
    }

    /// Takes the disk images for this VM alone. A VM that starts does this first; one that takes over from
    /// another host does without until the images are free.
    pub fn lock_disks(&self) -> Result<(), BackendError> {
        for disk in self.disks.values() {
            disk.back
                .lock()
                .map_err(|source| BackendError::Disk { id: disk.id.clone(), source })?;
        }
        Ok(())
    }

    /// Starts to do and to receive: from now on this process is the one the world sees. What was
    /// submitted before is done first. A second call does nothing.
    pub fn start(&self) -> Result<(), BackendError> {
        for (device, disk) in &self.disks {
            disk.back
                .start(self.completions(*device))
                .map_err(|source| BackendError::Disk { id: disk.id.clone(), source })?;
            disk.back.go_live();
        }
        for (device, net) in &self.nets {
            let (device, sink) = (*device, Arc::clone(&self.sink));
            net.back
                .start(Box::new(move |frames| sink(Event::Frames { device, frames })))
                .map_err(|source| BackendError::Net { id: net.id.clone(), source })?;
        }
        for (device, rng) in &self.rngs {
            let (device, sink) = (*device, Arc::clone(&self.sink));
            rng.start(Box::new(move |bytes| sink(Event::Entropy { device, bytes })))
                .map_err(BackendError::Rng)?;
        }
        for (device, console) in &self.consoles {
            let (device, sink) = (*device, Arc::clone(&self.sink));
            console
                .start(Box::new(move |bytes| sink(Event::ConsoleInput { device, bytes })))
                .map_err(|source| BackendError::Console { what: "console", source })?;
        }
        if let Some(serial) = &self.serial {
            let sink = Arc::clone(&self.sink);
            serial
                .start(Box::new(move |bytes| sink(Event::SerialInput { bytes })))
                .map_err(|source| BackendError::Console { what: "serial port", source })?;
        }
        Ok(())
    }

    /// Starts the disks alone, for a side that follows a primary and does disk requests itself. Ends with
    /// [`Self::start`].
    pub fn follow(&self) -> Result<(), BackendError> {
        for (device, disk) in &self.disks {
            disk.back
                .follow(self.completions(*device))
                .map_err(|source| BackendError::Disk { id: disk.id.clone(), source })?;
        }
        Ok(())
    }

    fn completions(&self, device: u8) -> CompletionSink {
        let sink = Arc::clone(&self.sink);
        Box::new(move |completion: virtio_devices::BlockCompletion| {
            sink(Event::DiskCompletion {
                device,
                request: completion.id,
                status: completion.status.byte(),
                data: completion.data,
            });
        })
    }

    /// The images, in the order of `config`, for those who copy them.
    #[must_use]
    pub fn images(&self, config: &VmConfig) -> Vec<DiskImage> {
        let placed = machine::place(config).unwrap_or_default();
        let image = |device: &machine::Placed| {
            let Kind::Disk { index } = device.kind else { return None };
            let (disk, config) = (self.disks.get(&device.slot)?, config.disks().get(index)?);
            let (id, read_only) = (disk.id.clone(), config.readonly);
            Some(DiskImage { id, read_only, copy: disk.back.copy() })
        };
        placed.iter().filter_map(image).collect()
    }

    /// From now on begins no disk request: for a machine that lost its claim.
    pub fn halt_disks(&self) {
        for disk in self.disks.values() {
            disk.back.halt();
        }
    }

    /// The pseudo-terminal of the console, if it has one.
    #[must_use]
    pub fn console_pty(&self) -> Option<&Path> {
        self.consoles.values().find_map(ConsoleBack::pty)
    }

    /// The pseudo-terminal of the serial port, if it has one.
    #[must_use]
    pub fn serial_pty(&self) -> Option<&Path> {
        self.serial.as_ref().and_then(ConsoleBack::pty)
    }

    /// Disk latencies by device id. [`crate::machine::Machine::counters`] has the other counters, which
    /// outlive a change of host.
    #[must_use]
    pub fn counters(&self) -> Counters {
        let latencies = |disk: &Disk| (disk.id.clone(), latency_counters(disk.back.latencies()));
        self.disks.values().map(latencies).collect()
    }

    /// Ends all threads: what is queued for the disks is done, what can be written at once to the
    /// consoles is written, the rest is dropped.
    pub fn close(self) {
        drop(self);
    }
}

impl Outlet for Backends {
    fn block(&self, device: u8, request: BlockRequest) {
        if let Some(disk) = self.disks.get(&device) {
            disk.back.submit(request);
        }
    }

    fn block_patiently(&self, device: u8, request: BlockRequest) {
        if let Some(disk) = self.disks.get(&device) {
            disk.back.submit_patiently(request);
        }
    }

    fn frames(&self, device: u8, frames: &[Vec<u8>]) {
        if let Some(net) = self.nets.get(&device) {
            net.back.send(frames);
        }
    }

    fn frames_taken(&self, device: u8) {
        if let Some(net) = self.nets.get(&device) {
            net.back.taken();
        }
    }

    fn set_offloads(&self, device: u8, offloads: Offloads) {
        if let Some(net) = self.nets.get(&device) {
            net.back.set_offloads(offloads);
        }
    }

    fn console(&self, device: u8, bytes: &[u8]) {
        if let Some(console) = self.consoles.get(&device) {
            console.output(bytes);
        }
    }

    fn console_taken(&self, device: u8) {
        if let Some(console) = self.consoles.get(&device) {
            console.taken();
        }
    }

    fn serial(&self, bytes: &[u8]) {
        if let Some(serial) = &self.serial {
            serial.output(bytes);
        }
    }

    fn serial_taken(&self) {
        if let Some(serial) = &self.serial {
            serial.taken();
        }
    }

    fn entropy(&self, device: u8, len: u32) {
        if let Some(rng) = self.rngs.get(&device) {
            rng.request(len);
        }
    }

    fn close_disks(&self) {
        self.disks.values().for_each(|disk| disk.back.valve().close());
    }

    fn open_disks(&self) {
        self.disks.values().for_each(|disk| disk.back.valve().open());
    }

    fn set_write_through(&self, on: bool) -> Result<(), String> {
        for disk in self.disks.values() {
            disk.back.set_write_through(on).map_err(|source| {
                let id = disk.id.clone();
                chain(&BackendError::Disk { id, source })
            })?;
        }
        Ok(())
    }

    fn set_lease(&self, until: Option<Duration>) {
        self.disks.values().for_each(|disk| disk.back.valve().set_lease(until));
    }

    fn announce(&self) {
        for net in self.nets.values() {
            if let Some(mac) = net.mac {
                net.back.announce(mac);
            }
        }
    }
}

fn block_options(disk: &DiskConfig) -> Option<BlockOptions> {
    Some(BlockOptions {
        read_only: disk.readonly,
        direct: disk.direct,
        io_uring: !disk.disable_io_uring,
        lock_whole_file: disk.lock_granularity == LockGranularity::Full,
        ..BlockOptions::new(disk.path.as_deref()?)
    })
}

fn tap_options(id: &str, net: &NetConfig) -> Result<TapOptions, BackendError> {
    let ipv4 = |address: Option<IpAddr>| -> Result<Option<Ipv4Addr>, BackendError> {
        match address {
            None => Ok(None),
            Some(IpAddr::V4(address)) => Ok(Some(address)),
            Some(address) => Err(BackendError::NetAddress { id: id.to_owned(), address }),
        }
    };
    let (ip, mask) = (ipv4(net.ip)?, ipv4(net.mask)?);
    Ok(TapOptions { name: net.tap.clone(), ip, mask, mtu: net.mtu, offloads: net.offloads() })
}

fn open_console(
    what: &'static str,
    mode: ConsoleMode,
    file: &Option<PathBuf>,
    socket: &Option<PathBuf>,
) -> Result<Option<ConsoleBack>, BackendError> {
    let path = |path: &Option<PathBuf>, field| {
        path.clone().ok_or(BackendError::ConsoleWithoutPath { what, field })
    };
    let connection = match mode {
        ConsoleMode::Off => return Ok(None),
        ConsoleMode::Null => Connection::Null,
        ConsoleMode::Tty => Connection::Tty,
        ConsoleMode::Pty => Connection::Pty,
        ConsoleMode::File => Connection::File(path(file, "file")?),
        ConsoleMode::Socket => Connection::Socket(path(socket, "socket")?),
    };
    let opened = ConsoleBack::open(connection);
    opened.map(Some).map_err(|source| BackendError::Console { what, source })
}

/// As Cloud Hypervisor shows them.
fn latency_counters(latencies: &Latencies) -> BTreeMap<String, u64> {
    let mut counters = BTreeMap::new();
    for (name, latency) in [("read", latencies.read()), ("write", latencies.write())] {
        // Before the first request Cloud Hypervisor shows these, and clients know them.
        let average = latency.sum_us.checked_div(latency.count).unwrap_or(u64::MAX / 10_000);
        let max = if latency.count == 0 { u64::MAX } else { latency.max_us };
        let values = [("min", latency.min_us), ("max", max), ("avg", average)];
        counters.extend(values.map(|(which, value)| (format!("{name}_latency_{which}"), value)));
    }
    counters
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::sync::{Mutex, mpsc};

    use virtio_devices::BlockOp;

    use super::*;
    use crate::config::{ConsoleConfig, DiskConfig, SerialConfig};

    struct Host {
        backends: Backends,
        events: mpsc::Receiver<Event>,
    }

    fn open(config: &VmConfig) -> Result<Host, BackendError> {
        let (sender, events) = mpsc::channel();
        let sender = Mutex::new(sender);
        let sink = move |event| drop(sender.lock().unwrap().send(event));
        Ok(Host { backends: Backends::open(config, Arc::new(sink))?, events })
    }

    fn config() -> VmConfig {
        VmConfig {
            console: ConsoleConfig { mode: ConsoleMode::Null, ..ConsoleConfig::default() },
            ..VmConfig::default()
        }
    }

    fn with_disk(path: &Path) -> VmConfig {
        let disk = DiskConfig { path: Some(path.to_owned()), ..DiskConfig::default() };
        VmConfig { disks: Some(vec![disk]), ..config() }
    }

    #[test]
    fn a_disk_answers_once_started_and_is_timed() {
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().set_len(8192).unwrap();
        let config = with_disk(image.path());
        let host = open(&config).unwrap();
        assert_eq!(host.backends.disk_sectors(&config), [16]);
        let none = &host.backends.counters()["_disk0"];
        assert_eq!(
            (none["read_latency_min"], none["read_latency_avg"]),
            (u64::MAX, u64::MAX / 10_000)
        );
        let request = BlockRequest { id: 7, op: BlockOp::Read { sector: 1, len: 512 } };
        // Slot 2: the console has slot 1.
        host.backends.block(2, request);
        host.backends.start().unwrap();
        let event = host.events.recv().unwrap();
        let expected =
            Event::DiskCompletion { device: 2, request: 7, status: 0, data: vec![0; 512] };
        assert_eq!(event, expected);
        assert_ne!(host.backends.counters()["_disk0"]["read_latency_max"], u64::MAX);
        assert_eq!(host.backends.counters()["_disk0"]["write_latency_max"], u64::MAX);
    }

    #[test]
    fn entropy_comes_in_the_length_asked_for() {
        let host = open(&config()).unwrap();
        host.backends.start().unwrap();
        host.backends.entropy(2, 33);
        let Event::Entropy { device: 2, bytes } = host.events.recv().unwrap() else {
            panic!("another event");
        };
        assert_eq!(bytes.len(), 33);
    }

    #[test]
    fn a_pseudo_terminal_carries_the_serial_port_both_ways() {
        let serial = SerialConfig { mode: ConsoleMode::Pty, ..SerialConfig::default() };
        let host = open(&VmConfig { serial, ..config() }).unwrap();
        let path = host.backends.serial_pty().unwrap().to_owned();
        assert!(host.backends.console_pty().is_none());
        host.backends.start().unwrap();
        let mut terminal = std::fs::File::options().read(true).write(true).open(path).unwrap();
        host.backends.serial(b"login:");
        let mut output = [0; 6];
        terminal.read_exact(&mut output).unwrap();
        assert_eq!(&output, b"login:");
        terminal.write_all(b"x").unwrap();
        assert_eq!(host.events.recv().unwrap(), Event::SerialInput { bytes: b"x".to_vec() });
    }

    #[test]
    fn output_reaches_its_file_before_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("console");
        let console = ConsoleConfig {
            mode: ConsoleMode::File,
            file: Some(file.clone()),
            ..ConsoleConfig::default()
        };
        let host = open(&VmConfig { console, ..config() }).unwrap();
        host.backends.start().unwrap();
        host.backends.console(1, b"some output");
        host.backends.close();
        assert_eq!(std::fs::read(file).unwrap(), b"some output");
    }

    #[test]
    fn what_cannot_be_opened_is_named() {
        let missing = open(&with_disk(Path::new("/nonexistent/disk.raw"))).err().unwrap();
        assert!(matches!(&missing, BackendError::Disk { id, .. } if id == "_disk0"));
        let mut unnamed = config();
        unnamed.console.mode = ConsoleMode::File;
        let error = open(&unnamed).err().unwrap();
        assert!(matches!(
            error,
            BackendError::ConsoleWithoutPath { what: "console", field: "file" }
        ));
        let mut no_path = with_disk(Path::new("x"));
        no_path.disks.as_mut().unwrap()[0].path = None;
        assert!(matches!(open(&no_path).err().unwrap(), BackendError::DiskWithoutPath { .. }));
    }
}
