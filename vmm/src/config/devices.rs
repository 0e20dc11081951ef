//! Devices Dyad has: disks, network, entropy, serial port, consoles.

use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize};
use virtio_devices::net::Offloads;

use super::{is_false, yes};

/// Replaces a descriptor number: one that came in JSON means nothing in this process, and using it
/// would reach into an unrelated file.
pub(crate) fn discard_descriptor<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<i32>, D::Error> {
    Ok(Option::<i32>::deserialize(deserializer)?.map(|_| -1))
}

fn discard_descriptors<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<Vec<i32>>, D::Error> {
    Ok(Option::<Vec<i32>>::deserialize(deserializer)?.map(|fds| vec![-1; fds.len()]))
}

/// What all PCI devices have in common.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PciCommon {
    /// Name, unique in the VM; must not start with `__`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// Whether the device sits behind the IOMMU.
    #[serde(default, skip_serializing_if = "is_false")]
    pub iommu: bool,
    /// PCI segment.
    #[serde(default)]
    pub pci_segment: u16,
    /// Requested slot on the bus, 1 to 31.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pci_device_id: Option<u8>,
}

/// A block device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskConfig {
    /// PCI placement and name.
    #[serde(flatten)]
    pub pci: PciCommon,
    /// Image file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// Whether the guest may not write.
    #[serde(default)]
    pub readonly: bool,
    /// Whether to bypass the host's page cache.
    #[serde(default)]
    pub direct: bool,
    /// Virtqueues.
    #[serde(default = "one_queue")]
    pub num_queues: usize,
    /// Entries per virtqueue.
    #[serde(default = "default_disk_queue_size")]
    pub queue_size: u16,
    /// Whether another process serves the device.
    #[serde(default)]
    pub vhost_user: bool,
    /// Its socket.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vhost_socket: Option<PathBuf>,
    /// Name of a shared limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate_limit_group: Option<String>,
    /// A limit of its own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate_limiter_config: Option<RateLimiterConfig>,
    /// Serial number, at most 20 bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub serial: Option<String>,
    /// Host CPUs of the queue threads.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub queue_affinity: Option<Vec<QueueAffinity>>,
    /// Whether an image may name other files.
    #[serde(default)]
    pub backing_files: bool,
    /// Whether space may be given back to the host.
    #[serde(default = "yes")]
    pub sparse: bool,
    /// Format of the image.
    #[serde(default)]
    pub image_type: ImageType,
    /// How much of the image is locked.
    #[serde(default)]
    pub lock_granularity: LockGranularity,
    /// Whether not to use `io_uring`, but threads.
    #[serde(default)]
    pub disable_io_uring: bool,
    /// Whether not to use Linux AIO (Dyad never does).
    #[serde(default)]
    pub disable_aio: bool,
}

fn one_queue() -> usize {
    1
}

fn default_disk_queue_size() -> u16 {
    128
}

impl Default for DiskConfig {
    fn default() -> Self {
        Self {
            pci: PciCommon::default(),
            path: None,
            readonly: false,
            direct: false,
            num_queues: one_queue(),
            queue_size: default_disk_queue_size(),
            vhost_user: false,
            vhost_socket: None,
            rate_limit_group: None,
            rate_limiter_config: None,
            serial: None,
            queue_affinity: None,
            backing_files: false,
            sparse: true,
            image_type: ImageType::default(),
            lock_granularity: LockGranularity::default(),
            disable_io_uring: false,
            disable_aio: false,
        }
    }
}

/// Host CPUs that serve one virtqueue.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueAffinity {
    /// Index of the queue.
    pub queue_index: u16,
    /// Numbers of host CPUs.
    pub host_cpus: Vec<usize>,
}

/// Format of a disk image.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the variants are the names of the formats")]
pub enum ImageType {
    Raw,
    Qcow2,
    FixedVhd,
    Vhdx,
    FlatVmdk,
    /// To be found out at boot.
    #[default]
    Unknown,
}

/// How much of a disk image is locked against other processes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum LockGranularity {
    /// The bytes of the image.
    #[default]
    ByteRange,
    /// The file.
    Full,
}

/// A MAC address. Text form `xx:xx:xx:xx:xx:xx`, written in lower case.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct MacAddress(pub [u8; 6]);

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Text that is no MAC address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "'{0}' is no MAC address: expected six pairs of hexadecimal digits, as in 2e:00:00:00:00:01"
)]
pub struct MacAddressError(String);

impl FromStr for MacAddress {
    type Err = MacAddressError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let error = || MacAddressError(text.to_owned());
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().ok_or_else(error)?;
            // from_str_radix alone would also take "+1".
            if part.len() != 2 || !part.bytes().all(|digit| digit.is_ascii_hexdigit()) {
                return Err(error());
            }
            *byte = u8::from_str_radix(part, 16).map_err(|_| error())?;
        }
        if parts.next().is_some() { Err(error()) } else { Ok(Self(bytes)) }
    }
}

impl Serialize for MacAddress {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for MacAddress {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// A network device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetConfig {
    /// PCI placement and name.
    #[serde(flatten)]
    pub pci: PciCommon,
    /// Name of the host's TAP device; without one, a TAP is created.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tap: Option<String>,
    /// Address of the TAP on the host.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ip: Option<IpAddr>,
    /// Network mask of the TAP on the host.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mask: Option<IpAddr>,
    /// MAC address the guest sees.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mac: Option<MacAddress>,
    /// MAC address of the TAP on the host.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host_mac: Option<MacAddress>,
    /// Largest packet, in bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u16>,
    /// Virtqueues, two per pair.
    #[serde(default = "two_queues")]
    pub num_queues: usize,
    /// Entries per virtqueue.
    #[serde(default = "default_net_queue_size")]
    pub queue_size: u16,
    /// Whether another process serves the device.
    #[serde(default)]
    pub vhost_user: bool,
    /// Its socket.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vhost_socket: Option<PathBuf>,
    /// Who listens on it.
    #[serde(default)]
    pub vhost_mode: VhostMode,
    /// TAP descriptors; numbers in JSON are dropped.
    #[serde(
        default,
        skip_serializing_if = "Option::is_none",
        deserialize_with = "discard_descriptors"
    )]
    pub fds: Option<Vec<i32>>,
    /// A bandwidth limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate_limiter_config: Option<RateLimiterConfig>,
    /// Whether TCP segmentation may be offloaded; only with `offload_csum`.
    #[serde(default = "yes")]
    pub offload_tso: bool,
    /// Whether UDP fragmentation may be offloaded; only with `offload_csum`.
    #[serde(default = "yes")]
    pub offload_ufo: bool,
    /// Whether checksums may be offloaded.
    #[serde(default = "yes")]
    pub offload_csum: bool,
}

fn two_queues() -> usize {
    2
}

fn default_net_queue_size() -> u16 {
    256
}

impl Default for NetConfig {
    fn default() -> Self {
        Self {
            pci: PciCommon::default(),
            tap: None,
            ip: None,
            mask: None,
            mac: None,
            host_mac: None,
            mtu: None,
            num_queues: two_queues(),
            queue_size: default_net_queue_size(),
            vhost_user: false,
            vhost_socket: None,
            vhost_mode: VhostMode::default(),
            fds: None,
            rate_limiter_config: None,
            offload_tso: true,
            offload_ufo: true,
            offload_csum: true,
        }
    }
}

impl NetConfig {
    /// What the guest is offered. Only this decides it, so that it is the same on both sides of a pair.
    pub(crate) fn offloads(&self) -> Offloads {
        Offloads::new(self.offload_csum, self.offload_tso, self.offload_ufo)
    }
}

/// Who listens on a vhost-user socket.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum VhostMode {
    /// The other process.
    #[default]
    Client,
    /// The VMM.
    Server,
}

/// The entropy device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RngConfig {
    /// PCI placement and name.
    #[serde(flatten)]
    pub pci: PciCommon,
    /// Where entropy comes from.
    pub src: PathBuf,
}

impl RngConfig {
    /// Entropy source of a VM that does not name one.
    pub const DEFAULT_SOURCE: &str = "/dev/urandom";
}

impl Default for RngConfig {
    fn default() -> Self {
        Self { pci: PciCommon::default(), src: PathBuf::from(Self::DEFAULT_SOURCE) }
    }
}

/// Where the bytes of a serial port or console go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ConsoleMode {
    /// The device does not exist.
    Off,
    /// A pseudo terminal made by the VMM.
    Pty,
    /// Standard input and output.
    Tty,
    /// A file, output only.
    File,
    /// A Unix socket the VMM listens on.
    Socket,
    /// The device exists, its output is dropped.
    Null,
}

/// The 16550 serial port.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SerialConfig {
    /// Where its bytes go.
    pub mode: ConsoleMode,
    /// Path for [`ConsoleMode::File`]; for [`ConsoleMode::Pty`] the terminal, filled in by the VMM.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file: Option<PathBuf>,
    /// Path for [`ConsoleMode::Socket`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub socket: Option<PathBuf>,
}

impl Default for SerialConfig {
    fn default() -> Self {
        Self { mode: ConsoleMode::Null, file: None, socket: None }
    }
}

/// The virtio console.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConsoleConfig {
    /// Where its bytes go.
    pub mode: ConsoleMode,
    /// As in [`SerialConfig`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file: Option<PathBuf>,
    /// As in [`SerialConfig`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub socket: Option<PathBuf>,
    /// PCI placement and name.
    #[serde(flatten)]
    pub pci: PciCommon,
}

impl Default for ConsoleConfig {
    fn default() -> Self {
        Self { mode: ConsoleMode::Tty, file: None, socket: None, pci: PciCommon::default() }
    }
}

/// A port whose written bytes are logged.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DebugConsoleConfig {
    /// Where its bytes go.
    pub mode: ConsoleMode,
    /// As in [`SerialConfig`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file: Option<PathBuf>,
    /// I/O port.
    #[serde(default = "default_debug_port", skip_serializing_if = "Option::is_none")]
    pub iobase: Option<u16>,
}

fn default_debug_port() -> Option<u16> {
    Some(0xe9)
}

impl Default for DebugConsoleConfig {
    fn default() -> Self {
        Self { mode: ConsoleMode::Off, file: None, iobase: default_debug_port() }
    }
}

/// A limit on bandwidth, operations or both. Here unset members are written as `null`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RateLimiterConfig {
    /// In bytes.
    pub bandwidth: Option<TokenBucketConfig>,
    /// In operations.
    pub ops: Option<TokenBucketConfig>,
}

/// A token bucket.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenBucketConfig {
    /// Tokens it holds.
    pub size: u64,
    /// Tokens it holds once, at the start, beyond that.
    pub one_time_burst: Option<u64>,
    /// Milliseconds until an empty bucket is full.
    pub refill_time: u64,
}

/// A limit that several disks share.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RateLimitGroupConfig {
    /// Name.
    pub id: String,
    /// The limit.
    pub rate_limiter_config: RateLimiterConfig,
}
