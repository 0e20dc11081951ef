//! Bodies of requests and answers that are neither configurations nor about protection.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::config::{OptionString, OptionStringError, is_false};

/// Answer of `vmm.ping`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmmPing {
    /// Name and version of the program.
    pub build_version: String,
    /// Version of the package.
    pub version: String,
    /// Process id of the VMM.
    pub pid: i64,
    /// What was compiled in.
    pub features: Vec<String>,
}

/// Body of `vm.snapshot`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotConfig {
    /// An existing directory, as `file:///path`.
    pub destination_url: String,
}

impl SnapshotConfig {
    /// The directory to write to.
    pub fn directory(&self) -> Result<PathBuf, UrlError> {
        file_url(&self.destination_url)
    }
}

/// Body of `vm.restore`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestoreConfig {
    /// Directory of a snapshot, as `file:///path`.
    pub source_url: String,
    /// Whether to read all memory before the guest runs; Dyad always does.
    #[serde(default)]
    pub prefault: bool,
    /// When memory is read.
    #[serde(default)]
    pub memory_restore_mode: MemoryRestoreMode,
    /// TAP descriptors that come along with the request.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub net_fds: Option<Vec<RestoredNet>>,
    /// VFIO descriptors that come along with the request.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vfio_fds: Option<Vec<RestoredDevice>>,
    /// An iommufd descriptor that comes along with the request.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub iommufd_fd: Option<i32>,
    /// Whether the guest runs at once.
    #[serde(default, skip_serializing_if = "is_false")]
    pub resume: bool,
    /// Host NUMA nodes of memory zones.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub zone_updates: Vec<ZoneUpdate>,
}

/// What Dyad does not do in restoring a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RestoreConfigError {
    /// Two that contradict each other.
    #[error("'memory_restore_mode' OnDemand and 'prefault' exclude each other")]
    OnDemandAndPrefault,
    /// Memory read later.
    #[error("Dyad does not support 'memory_restore_mode' OnDemand yet: leave it out")]
    OnDemand,
    /// Descriptors.
    #[error("'net_fds', 'vfio_fds' and 'iommufd_fd' need descriptors, which Dyad does not take")]
    Descriptors,
    /// Memory zones.
    #[error("Dyad does not support memory zones yet: leave 'zone_updates' out")]
    Zones,
}

impl RestoreConfigError {
    /// The HTTP status that goes with it.
    pub fn status(self) -> u16 {
        match self {
            Self::OnDemandAndPrefault | Self::Descriptors => 400,
            Self::OnDemand | Self::Zones => 500,
        }
    }
}

impl RestoreConfig {
    /// The directory to read from.
    pub fn directory(&self) -> Result<PathBuf, UrlError> {
        file_url(&self.source_url)
    }

    /// Checks that this can be done.
    pub fn validate(&self) -> Result<(), RestoreConfigError> {
        fn any<T>(list: &Option<Vec<T>>) -> bool {
            list.as_ref().is_some_and(|list| !list.is_empty())
        }
        if self.memory_restore_mode == MemoryRestoreMode::OnDemand {
            return Err(if self.prefault {
                RestoreConfigError::OnDemandAndPrefault
            } else {
                RestoreConfigError::OnDemand
            });
        }
        if any(&self.net_fds) || any(&self.vfio_fds) || self.iommufd_fd.is_some() {
            return Err(RestoreConfigError::Descriptors);
        }
        if !self.zone_updates.is_empty() {
            return Err(RestoreConfigError::Zones);
        }
        Ok(())
    }
}

impl RestoreConfig {
    /// `source_url=file:///DIR,resume=on,...`
    pub fn from_option(text: &str) -> Result<Self, OptionStringError> {
        let options = OptionString::parse(
            text,
            &["source_url", "prefault", "memory_restore_mode", "resume"],
            &["net_fds", "vfio_fds", "iommufd_fd", "zone_updates"],
        )?;
        let modes = [("copy", MemoryRestoreMode::Copy), ("ondemand", MemoryRestoreMode::OnDemand)];
        let source_url = options.text("source_url").map(str::to_owned);
        Ok(Self {
            source_url: source_url.ok_or(OptionStringError::Missing("source_url"))?,
            prefault: options.toggle("prefault", false)?,
            memory_restore_mode: options.choice("memory_restore_mode", &modes)?.unwrap_or_default(),
            net_fds: None,
            vfio_fds: None,
            iommufd_fd: None,
            resume: options.toggle("resume", false)?,
            zone_updates: Vec::new(),
        })
    }
}

/// When the memory of a snapshot is read.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum MemoryRestoreMode {
    /// Before the guest runs.
    #[default]
    Copy,
    /// When the guest touches it.
    OnDemand,
}

/// TAP descriptors for a restored network device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestoredNet {
    /// The device.
    pub id: String,
    /// How many descriptors come along.
    pub num_fds: usize,
    /// Descriptor numbers, which mean nothing in JSON.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fds: Option<Vec<i32>>,
}

/// A descriptor for a restored VFIO device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestoredDevice {
    /// The device.
    pub id: String,
    /// A descriptor number, which means nothing in JSON.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fd: Option<i32>,
}

/// Host NUMA node of a memory zone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ZoneUpdate {
    /// The zone.
    pub id: String,
    /// The node.
    pub host_numa_node: u32,
}

/// A URL Dyad cannot use.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UrlError {
    /// Not `file:`.
    #[error("'{0}' is no file URL: expected file:///path/of/a/directory")]
    NotFile(String),
    /// Not `tcp:`.
    #[error("'{0}' is no TCP address: expected tcp:HOST:PORT, as in tcp:10.0.0.2:7700")]
    NotTcp(String),
    /// Not `ID=PATH`.
    #[error("'{0}' names no image of a disk: expected ID=PATH, as in _disk0=/images/vm.raw")]
    NotDiskPath(String),
}

/// `file:///path`, also in the short form `file:/path`.
pub(super) fn file_url(url: &str) -> Result<PathBuf, UrlError> {
    let path = url.strip_prefix("file://").or_else(|| url.strip_prefix("file:"));
    match path {
        Some(path) if path.starts_with('/') => Ok(PathBuf::from(path)),
        _ => Err(UrlError::NotFile(url.to_owned())),
    }
}
