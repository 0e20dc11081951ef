//! Processors, memory and the platform around them.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::yes;

/// Virtual processors.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpusConfig {
    /// Processors present at boot.
    pub boot_vcpus: u32,
    /// Most processors the VM may ever have.
    pub max_vcpus: u32,
    /// How the processors are grouped.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub topology: Option<CpuTopology>,
    /// Hyper-V enlightenments.
    #[serde(default)]
    pub kvm_hyperv: bool,
    /// Upper limit of the guest-physical address width in bits.
    #[serde(default = "default_max_phys_bits")]
    pub max_phys_bits: u8,
    /// Host CPUs each vCPU may run on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub affinity: Option<Vec<CpuAffinity>>,
    /// Processor features to turn on.
    #[serde(default)]
    pub features: CpuFeatures,
    /// Whether the guest may use hardware virtualisation itself, where the processor offers it.
    #[serde(default = "yes")]
    pub nested: bool,
    /// Which vCPUs may share a host core.
    #[serde(default)]
    pub core_scheduling: CoreScheduling,
    /// Which processor model the guest sees.
    #[serde(default)]
    pub profile: CpuProfile,
}

fn default_max_phys_bits() -> u8 {
    46
}

impl Default for CpusConfig {
    fn default() -> Self {
        Self {
            boot_vcpus: 1,
            max_vcpus: 1,
            topology: None,
            kvm_hyperv: false,
            max_phys_bits: default_max_phys_bits(),
            affinity: None,
            features: CpuFeatures::default(),
            nested: true,
            core_scheduling: CoreScheduling::default(),
            profile: CpuProfile::default(),
        }
    }
}

/// How processors are grouped; the product is `max_vcpus`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuTopology {
    /// Hardware threads per core.
    pub threads_per_core: u16,
    /// Cores per die.
    pub cores_per_die: u16,
    /// Dies per package.
    pub dies_per_package: u16,
    /// Packages.
    pub packages: u16,
}

/// Host CPUs one vCPU may run on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuAffinity {
    /// Index of the vCPU.
    pub vcpu: u32,
    /// Numbers of host CPUs.
    pub host_cpus: Vec<usize>,
}

/// Processor features that are off by default.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuFeatures {
    /// Matrix instructions.
    #[serde(default)]
    pub amx: bool,
}

/// Which vCPUs may share a host core.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum CoreScheduling {
    /// Those of one VM.
    #[default]
    Vm,
    /// None.
    Vcpu,
    /// Any.
    Off,
}

/// Which processor model the guest sees.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum CpuProfile {
    /// Whatever the hypervisor backend offers.
    #[default]
    Host,
}

/// Guest memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryConfig {
    /// RAM in bytes.
    pub size: u64,
    /// Whether the host may merge equal pages.
    #[serde(default)]
    pub mergeable: bool,
    /// How memory is added later.
    #[serde(default)]
    pub hotplug_method: HotplugMethod,
    /// Bytes that can be added later.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hotplug_size: Option<u64>,
    /// Bytes of those present at boot.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hotplugged_size: Option<u64>,
    /// Whether other processes may map the memory.
    #[serde(default)]
    pub shared: bool,
    /// Whether to use huge pages of the host.
    #[serde(default)]
    pub hugepages: bool,
    /// Their size in bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hugepage_size: Option<u64>,
    /// Whether to touch all memory before boot.
    #[serde(default)]
    pub prefault: bool,
    /// Whether to reserve host memory.
    #[serde(default)]
    pub reserve: bool,
    /// Whether the host may use transparent huge pages.
    #[serde(default = "yes")]
    pub thp: bool,
    /// Memory in separate regions.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub zones: Option<Vec<MemoryZoneConfig>>,
}

impl MemoryConfig {
    /// RAM of a VM that does not say how much it wants.
    pub const DEFAULT_SIZE: u64 = 512 << 20;
}

impl Default for MemoryConfig {
    fn default() -> Self {
        Self {
            size: Self::DEFAULT_SIZE,
            mergeable: false,
            hotplug_method: HotplugMethod::default(),
            hotplug_size: None,
            hotplugged_size: None,
            shared: false,
            hugepages: false,
            hugepage_size: None,
            prefault: false,
            reserve: false,
            thp: true,
            zones: None,
        }
    }
}

/// How memory is added to a running VM.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum HotplugMethod {
    /// As ACPI memory devices.
    #[default]
    Acpi,
    /// Through virtio-mem.
    VirtioMem,
}

/// A region of guest memory with its own backing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryZoneConfig {
    /// Name.
    pub id: String,
    /// Bytes.
    pub size: u64,
    /// Backing file or directory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file: Option<PathBuf>,
    /// As in [`MemoryConfig`].
    #[serde(default)]
    pub shared: bool,
    /// As in [`MemoryConfig`].
    #[serde(default)]
    pub hugepages: bool,
    /// As in [`MemoryConfig`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hugepage_size: Option<u64>,
    /// Host NUMA node.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host_numa_node: Option<u32>,
    /// As in [`MemoryConfig`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hotplug_size: Option<u64>,
    /// As in [`MemoryConfig`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hotplugged_size: Option<u64>,
    /// As in [`MemoryConfig`].
    #[serde(default)]
    pub prefault: bool,
    /// As in [`MemoryConfig`].
    #[serde(default)]
    pub reserve: bool,
    /// As in [`MemoryConfig`].
    #[serde(default)]
    pub mergeable: bool,
}

/// A NUMA node of the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NumaConfig {
    /// Number of the node.
    pub guest_numa_id: u32,
    /// vCPUs in it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpus: Option<Vec<u32>>,
    /// Distances to others.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub distances: Option<Vec<NumaDistance>>,
    /// Memory zones in it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_zones: Option<Vec<String>>,
    /// PCI segments in it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pci_segments: Option<Vec<u16>>,
    /// The device that makes up the node.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device_id: Option<String>,
}

/// Distance from one NUMA node to another.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NumaDistance {
    /// The other node.
    pub destination: u32,
    /// Relative cost, 10 = local.
    pub distance: u8,
}

/// A PCI segment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PciSegmentConfig {
    /// Number.
    #[serde(default)]
    pub pci_segment: u16,
    /// Share of the 32-bit MMIO space.
    #[serde(default = "one")]
    pub mmio32_aperture_weight: u32,
    /// Share of the 64-bit MMIO space.
    #[serde(default = "one")]
    pub mmio64_aperture_weight: u32,
}

fn one() -> u32 {
    1
}

/// SMBIOS strings and IOMMU settings.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlatformConfig {
    /// PCI segments.
    #[serde(default = "one_segment")]
    pub num_pci_segments: u16,
    /// Segments behind the IOMMU.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub iommu_segments: Option<Vec<u16>>,
    /// Address width of the IOMMU.
    #[serde(default = "default_iommu_address_width_bits")]
    pub iommu_address_width_bits: u8,
    /// SMBIOS serial number.
    #[serde(alias = "serial_number", skip_serializing_if = "Option::is_none")]
    pub system_serial_number: Option<String>,
    /// SMBIOS UUID.
    #[serde(alias = "uuid", skip_serializing_if = "Option::is_none")]
    pub system_uuid: Option<String>,
    /// SMBIOS OEM strings.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub oem_strings: Option<Vec<String>>,
    /// SMBIOS manufacturer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub system_manufacturer: Option<String>,
    /// SMBIOS product name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub system_product_name: Option<String>,
    /// SMBIOS version.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub system_version: Option<String>,
    /// SMBIOS family.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub system_family: Option<String>,
    /// SMBIOS stock keeping unit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub system_sku_number: Option<String>,
    /// SMBIOS asset tag.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub chassis_asset_tag: Option<String>,
    /// Whether VFIO goes through iommufd.
    #[serde(default)]
    pub iommufd: bool,
    /// A descriptor number, which has no meaning in JSON and is dropped.
    #[serde(default, skip_serializing, deserialize_with = "super::devices::discard_descriptor")]
    pub iommufd_fd: Option<i32>,
    /// Whether VFIO devices may reach each other.
    #[serde(default = "yes")]
    pub vfio_p2p_dma: bool,
}

fn one_segment() -> u16 {
    1
}

fn default_iommu_address_width_bits() -> u8 {
    64
}

impl Default for PlatformConfig {
    fn default() -> Self {
        Self {
            num_pci_segments: one_segment(),
            iommu_segments: None,
            iommu_address_width_bits: default_iommu_address_width_bits(),
            system_serial_number: None,
            system_uuid: None,
            oem_strings: None,
            system_manufacturer: None,
            system_product_name: None,
            system_version: None,
            system_family: None,
            system_sku_number: None,
            chassis_asset_tag: None,
            iommufd: false,
            iommufd_fd: None,
            vfio_p2p_dma: true,
        }
    }
}
