//! What a VM is made of, as clients of the REST API and users of the command line describe it.
//!
//! The types mirror Cloud Hypervisor's JSON field by field, also where Dyad has nothing behind a field
//! yet: a client's configuration must parse, read back unchanged, and be refused *by name* at boot if it
//! asks for something Dyad cannot do. Nothing is silently ignored. Parsing checks shape and types only;
//! [`VmConfig::validate`] checks meaning and runs at boot.
//!
//! Rules of the JSON: unknown keys are ignored, a key given twice is an error, unset optional fields are
//! left out of answers, `null` is accepted only where a field is optional.

mod cli;
mod compute;
mod devices;
mod option_string;
mod unsupported;
mod validate;

pub use cli::{OptionError, VmOptions};
pub use compute::{
    CoreScheduling, CpuAffinity, CpuFeatures, CpuProfile, CpuTopology, CpusConfig, HotplugMethod,
    MemoryConfig, MemoryZoneConfig, NumaConfig, NumaDistance, PciSegmentConfig, PlatformConfig,
};
pub use devices::{
    ConsoleConfig, ConsoleMode, DebugConsoleConfig, DiskConfig, ImageType, LockGranularity,
    MacAddress, MacAddressError, NetConfig, PciCommon, QueueAffinity, RateLimitGroupConfig,
    RateLimiterConfig, RngConfig, SerialConfig, TokenBucketConfig, VhostMode,
};
pub use option_string::{OptionString, OptionStringError, Toggle, parse_size};
pub use unsupported::{
    BalloonConfig, DeviceConfig, FsConfig, GenericVhostUserConfig, LandlockAccess, LandlockConfig,
    PmemConfig, RtcConfig, TpmConfig, UserDeviceConfig, VdpaConfig, VsockConfig,
};
pub use validate::ValidationError;

use std::collections::HashSet;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// For `skip_serializing_if`: leaves a `false` out.
pub(crate) fn is_false(value: &bool) -> bool {
    !*value
}

/// For `serde(default)`: fields that are on unless said otherwise.
pub(crate) fn yes() -> bool {
    true
}

/// A whole virtual machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmConfig {
    /// Virtual processors.
    #[serde(default)]
    pub cpus: CpusConfig,
    /// Guest memory.
    #[serde(default)]
    pub memory: MemoryConfig,
    /// What to boot; required at boot, not before.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub payload: Option<PayloadConfig>,
    /// Named limits that disks can share.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate_limit_groups: Option<Vec<RateLimitGroupConfig>>,
    /// Block devices, in the order the guest finds them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disks: Option<Vec<DiskConfig>>,
    /// Network devices, in the order the guest finds them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub net: Option<Vec<NetConfig>>,
    /// Entropy device.
    #[serde(default)]
    pub rng: RngConfig,
    /// Memory balloon.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub balloon: Option<BalloonConfig>,
    /// Devices in other processes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub generic_vhost_user: Option<Vec<GenericVhostUserConfig>>,
    /// Shared file systems.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fs: Option<Vec<FsConfig>>,
    /// Persistent memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pmem: Option<Vec<PmemConfig>>,
    /// The 16550 serial port.
    #[serde(default)]
    pub serial: SerialConfig,
    /// The virtio console.
    #[serde(default)]
    pub console: ConsoleConfig,
    /// The write-only debug port.
    #[serde(default)]
    pub debug_console: DebugConsoleConfig,
    /// VFIO devices.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub devices: Option<Vec<DeviceConfig>>,
    /// vfio-user devices.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user_devices: Option<Vec<UserDeviceConfig>>,
    /// vDPA devices.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vdpa: Option<Vec<VdpaConfig>>,
    /// Host-guest socket device.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vsock: Option<VsockConfig>,
    /// The paravirtual panic device.
    #[serde(default)]
    pub pvpanic: bool,
    /// The virtio IOMMU.
    #[serde(default)]
    pub iommu: bool,
    /// NUMA nodes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub numa: Option<Vec<NumaConfig>>,
    /// The virtio watchdog.
    #[serde(default)]
    pub watchdog: bool,
    /// The virtio clock.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rtc: Option<RtcConfig>,
    /// PCI segments beyond the first.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pci_segments: Option<Vec<PciSegmentConfig>>,
    /// SMBIOS strings and IOMMU settings.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub platform: Option<PlatformConfig>,
    /// A TPM behind a socket.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tpm: Option<TpmConfig>,
    /// Whether to restrict the VMM's own file access.
    #[serde(default)]
    pub landlock_enable: bool,
    /// What it may still reach.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub landlock_rules: Option<Vec<LandlockConfig>>,
}

impl Default for VmConfig {
    /// What the empty JSON object means.
    fn default() -> Self {
        Self {
            cpus: CpusConfig::default(),
            memory: MemoryConfig::default(),
            payload: None,
            rate_limit_groups: None,
            disks: None,
            net: None,
            rng: RngConfig::default(),
            balloon: None,
            generic_vhost_user: None,
            fs: None,
            pmem: None,
            serial: SerialConfig::default(),
            console: ConsoleConfig::default(),
            debug_console: DebugConsoleConfig::default(),
            devices: None,
            user_devices: None,
            vdpa: None,
            vsock: None,
            pvpanic: false,
            iommu: false,
            numa: None,
            watchdog: false,
            rtc: None,
            pci_segments: None,
            platform: None,
            tpm: None,
            landlock_enable: false,
            landlock_rules: None,
        }
    }
}

impl VmConfig {
    /// The disks, or an empty slice.
    pub fn disks(&self) -> &[DiskConfig] {
        self.disks.as_deref().unwrap_or_default()
    }

    /// The network devices, or an empty slice.
    pub fn net(&self) -> &[NetConfig] {
        self.net.as_deref().unwrap_or_default()
    }

    /// RAM in bytes, zones included.
    pub fn memory_size(&self) -> u64 {
        let zones = self.memory.zones.as_deref().unwrap_or_default();
        zones.iter().fold(self.memory.size, |sum, zone| sum.saturating_add(zone.size))
    }

    /// Fills in what the user left open and the guest can see: device ids and MAC addresses. Runs at
    /// boot; the result shows in later answers and is what a backup gets, so that both sides build the
    /// same machine. `random` yields 5 random bytes per MAC address.
    ///
    /// All kinds of device share one counter (`_disk0`, `_net1`), as in Cloud Hypervisor.
    pub fn complete(&mut self, mut random: impl FnMut() -> [u8; 5]) {
        let mut taken = self.explicit_ids();
        let mut counter = 0u32;
        let mut fill = |id: &mut Option<String>, prefix: &str| {
            if id.is_none() {
                let name = loop {
                    let name = format!("{prefix}{counter}");
                    counter += 1;
                    if !taken.contains(&name) {
                        break name;
                    }
                };
                taken.insert(name.clone());
                *id = Some(name);
            }
        };
        for disk in self.disks.iter_mut().flatten() {
            fill(&mut disk.pci.id, "_disk");
        }
        for net in self.net.iter_mut().flatten() {
            fill(&mut net.pci.id, "_net");
            net.mac.get_or_insert_with(|| {
                let [a, b, c, d, e] = random();
                // 0x2e: locally administered, unicast.
                MacAddress([0x2e, a, b, c, d, e])
            });
        }
    }

    fn explicit_ids(&self) -> HashSet<String> {
        let disks = self.disks().iter().map(|disk| &disk.pci.id);
        let nets = self.net().iter().map(|net| &net.pci.id);
        disks.chain(nets).flatten().cloned().collect()
    }
}

/// What to boot.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PayloadConfig {
    /// A Linux bzImage or an ELF vmlinux.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kernel: Option<PathBuf>,
    /// Initial RAM file system.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub initramfs: Option<PathBuf>,
    /// Kernel command line.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cmdline: Option<String>,
    /// Firmware instead of a kernel.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub firmware: Option<PathBuf>,
}

#[cfg(test)]
mod tests;
