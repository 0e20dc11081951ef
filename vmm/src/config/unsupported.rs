//! Devices of Cloud Hypervisor that Dyad does not have yet. They parse, so that a client learns by name
//! what is refused, and they read back unchanged.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::PciCommon;
use super::devices::discard_descriptor;

/// A memory balloon.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonConfig {
    /// PCI placement and name.
    #[serde(flatten)]
    pub pci: PciCommon,
    /// Bytes taken from the guest.
    pub size: u64,
    /// Whether it shrinks when the guest runs out of memory.
    #[serde(default)]
    pub deflate_on_oom: bool,
    /// Whether the guest reports free pages.
    #[serde(default)]
    pub free_page_reporting: bool,
}

/// A vhost-user device of any type.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GenericVhostUserConfig {
    /// PCI placement and name.
    #[serde(flatten)]
    pub pci: PciCommon,
    /// Socket of the serving process.
    pub socket: PathBuf,
    /// Entries of each virtqueue.
    pub queue_sizes: Vec<u16>,
    /// Virtio device type.
    pub device_type: u32,
}

/// A shared file system.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FsConfig {
    /// PCI placement and name.
    #[serde(flatten)]
    pub pci: PciCommon,
    /// Name the guest mounts it by.
    pub tag: String,
    /// Socket of the serving process.
    pub socket: PathBuf,
    /// Virtqueues.
    #[serde(default = "one_queue")]
    pub num_queues: usize,
    /// Entries per virtqueue.
    #[serde(default = "default_fs_queue_size")]
    pub queue_size: u16,
}

fn one_queue() -> usize {
    1
}

fn default_fs_queue_size() -> u16 {
    1024
}

/// Persistent memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PmemConfig {
    /// PCI placement and name.
    #[serde(flatten)]
    pub pci: PciCommon,
    /// Backing file.
    pub file: PathBuf,
    /// Bytes, if not the size of the file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub size: Option<u64>,
    /// Whether writes are lost.
    #[serde(default)]
    pub discard_writes: bool,
}

/// A VFIO device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceConfig {
    /// PCI placement and name.
    #[serde(flatten)]
    pub pci: PciCommon,
    /// Its path in sysfs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// A descriptor number, which has no meaning in JSON and is dropped.
    #[serde(default, skip_serializing, deserialize_with = "discard_descriptor")]
    pub fd: Option<i32>,
    /// Group of devices that may reach each other.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub x_nv_gpudirect_clique: Option<u8>,
    /// BARs not to map.
    #[serde(default)]
    pub x_exclude_mmap_bars: Vec<u8>,
}

/// A vfio-user device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UserDeviceConfig {
    /// PCI placement and name.
    #[serde(flatten)]
    pub pci: PciCommon,
    /// Socket of the serving process.
    pub socket: PathBuf,
}

/// A vDPA device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VdpaConfig {
    /// PCI placement and name.
    #[serde(flatten)]
    pub pci: PciCommon,
    /// Its path in `/dev`.
    pub path: PathBuf,
    /// Virtqueues.
    #[serde(default = "one_queue")]
    pub num_queues: usize,
}

/// A host-guest socket device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VsockConfig {
    /// PCI placement and name.
    #[serde(flatten)]
    pub pci: PciCommon,
    /// The guest's context id.
    pub cid: u32,
    /// Unix socket on the host.
    pub socket: PathBuf,
}

/// The virtio clock.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RtcConfig {
    /// PCI placement and name.
    #[serde(flatten)]
    pub pci: PciCommon,
}

/// A TPM behind a socket.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TpmConfig {
    /// Socket of the serving process.
    pub socket: PathBuf,
}

/// A path the VMM may still reach under Landlock.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LandlockConfig {
    /// File or directory.
    pub path: PathBuf,
    /// What is allowed.
    pub access: LandlockAccess,
}

/// What Landlock allows on a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum LandlockAccess {
    /// Reading.
    #[serde(rename = "r")]
    Read,
    /// Writing.
    #[serde(rename = "w")]
    Write,
    /// Both.
    #[serde(rename = "rw")]
    ReadWrite,
}
