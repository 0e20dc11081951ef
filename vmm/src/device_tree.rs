//! What a booted VM consists of, as `vm.info` shows it: one node per device, with its name, its place
//! and what it occupies. The JSON is Cloud Hypervisor's.
//!
//! A virtio device has two nodes: its PCI transport `_virtio-pci-<id>`, which has the bus address and the
//! BARs, and the device `<id>` itself, whose parent is the former. Devices without a name of their own have
//! fixed ones: `__serial`, `__console`, `__rng`, `__ioapic`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// All devices by id.
pub type DeviceTree = BTreeMap<String, DeviceNode>;

/// One device.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceNode {
    /// Its name, the key it is found under.
    pub id: String,
    /// What it occupies.
    pub resources: Vec<Resource>,
    /// Names of devices below it.
    pub children: Vec<String>,
    /// Name of the device above it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub parent: Option<String>,
    /// PCI address, `SSSS:BB:DD.F` in lower-case hexadecimal.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pci_bdf: Option<String>,
}

/// Something a device occupies. Addresses and sizes are in bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Resource {
    /// A PCI base address register.
    PciBar {
        /// Which of the six.
        index: usize,
        /// Guest-physical address or I/O port.
        base: u64,
        /// Length.
        size: u64,
        /// Address space.
        type_: PciBarType,
        /// Whether reads have no side effects.
        prefetchable: bool,
    },
    /// I/O ports.
    PioAddressRange {
        /// First port.
        base: u16,
        /// Number of ports.
        size: u16,
    },
    /// Memory-mapped registers.
    MmioAddressRange {
        /// Guest-physical address.
        base: u64,
        /// Length.
        size: u64,
    },
    /// A line of the interrupt controller.
    LegacyIrq(u32),
    /// Message-signalled interrupts.
    MsiIrq {
        /// Kind.
        ty: MsiIrqType,
        /// First vector.
        base: u32,
        /// Number of vectors.
        size: u32,
    },
    /// A MAC address.
    MacAddress(String),
}

/// Address space of a BAR.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum PciBarType {
    /// I/O ports.
    Io,
    /// Memory below 4 GiB.
    Mmio32,
    /// Memory anywhere.
    Mmio64,
}

/// Kind of message-signalled interrupts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum MsiIrqType {
    /// PCI MSI.
    PciMsi,
    /// PCI MSI-X.
    PciMsix,
    /// Neither.
    GenericMsi,
}
