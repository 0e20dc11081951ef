//! What a configuration must satisfy to be booted.
//!
//! Two kinds of refusal: what is wrong in itself, as in Cloud Hypervisor, and what Dyad cannot do yet.
//! The latter matters as much: a VM that comes up without the device its owner asked for is worse than
//! one that does not come up. Only settings that cannot be noticed when they are not followed (hints
//! about host memory, permissions the guest then does not use) are taken without effect.

use std::collections::HashSet;
use std::net::IpAddr;
use std::path::PathBuf;

use super::{
    ConsoleMode, CoreScheduling, CpusConfig, DiskConfig, ImageType, MemoryConfig, NetConfig,
    PciCommon, PlatformConfig, VmConfig,
};
use crate::pci::{PciError, SLOTS};

/// Why a configuration cannot be booted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ValidationError {
    /// No payload.
    #[error("nothing to boot: give 'payload' a 'kernel' (on the command line: --kernel PATH)")]
    NoKernel,
    /// Kernel and firmware.
    #[error("'kernel' and 'firmware' exclude each other")]
    KernelAndFirmware,
    /// Something Cloud Hypervisor has and Dyad has not.
    #[error("Dyad does not support {what} yet: remove it from the configuration")]
    Unsupported {
        /// The device or setting, as the user knows it.
        what: String,
    },
    /// Fewer maximum than boot vCPUs, or none.
    #[error("'max_vcpus' ({max}) must be at least 'boot_vcpus' ({boot}), and that at least 1")]
    VcpuCount {
        /// Asked at boot.
        boot: u32,
        /// Asked at most.
        max: u32,
    },
    /// More vCPUs than possible.
    #[error(
        "Dyad runs one virtual CPU; {count} were asked for: set 'boot_vcpus' and 'max_vcpus' to 1"
    )]
    TooManyVcpus {
        /// Asked.
        count: u32,
    },
    /// Topology and number of vCPUs disagree.
    #[error("the CPU topology describes {product} processors, 'max_vcpus' is {max}")]
    Topology {
        /// Processors in the topology.
        product: u64,
        /// `max_vcpus`.
        max: u32,
    },
    /// Memory size out of range.
    #[error(
        "memory size {size} is not from 4096 to {MAX_MEMORY} bytes (1 TiB) in multiples of 4096"
    )]
    MemorySize {
        /// Asked, in bytes.
        size: u64,
    },
    /// Two devices with one name.
    #[error("the id '{0}' is used more than once: ids are unique over all devices")]
    DuplicateId(String),
    /// A name that belongs to Dyad.
    #[error("the id '{0}' starts with '__', which is reserved")]
    ReservedId(String),
    /// A device without what it needs.
    #[error("{device} needs '{field}'")]
    Missing {
        /// The device, as the user knows it.
        device: String,
        /// JSON field.
        field: &'static str,
    },
    /// A value no device can have.
    #[error("{device}: '{field}' is {value}; it must be {expected}")]
    Value {
        /// The device, as the user knows it.
        device: String,
        /// JSON field.
        field: &'static str,
        /// The value found.
        value: String,
        /// What would do.
        expected: &'static str,
    },
    /// More devices than slots.
    #[error("{full}: remove some", full = PciError::Full)]
    TooManyDevices,
    /// Two devices in one PCI slot.
    #[error("PCI slot {0} is asked for by more than one device")]
    DuplicateSlot(u8),
    /// One TAP for two devices.
    #[error("the TAP '{0}' is used by more than one network device")]
    DuplicateTap(String),
    /// One writable image for two disks.
    #[error("the image '{}' is used by more than one disk, at least one of which writes", .0.display())]
    DuplicateImage(PathBuf),
}

impl ValidationError {
    /// The HTTP status that goes with it.
    pub fn status(&self) -> u16 {
        match self {
            Self::DuplicateId(_) => 409,
            _ => 400,
        }
    }
}

fn unsupported(what: impl Into<String>) -> Result<(), ValidationError> {
    Err(ValidationError::Unsupported { what: what.into() })
}

/// Refuses each `what` whose condition holds.
fn refuse(device: &str, settings: &[(bool, &str)]) -> Result<(), ValidationError> {
    match settings.iter().find(|(asked, _)| *asked) {
        Some((_, what)) => unsupported(format!("{what} ({device})")),
        None => Ok(()),
    }
}

impl VmConfig {
    /// Checks that this VM can be built. Runs at boot and touches no file.
    pub fn validate(&self) -> Result<(), ValidationError> {
        let payload = self.payload.as_ref().ok_or(ValidationError::NoKernel)?;
        match (&payload.kernel, &payload.firmware) {
            (Some(_), Some(_)) => return Err(ValidationError::KernelAndFirmware),
            (None, Some(_)) => unsupported("booting from firmware; boot a 'kernel' instead")?,
            (None, None) => return Err(ValidationError::NoKernel),
            (Some(_), None) => {}
        }
        self.validate_absent_devices()?;
        self.validate_device_count()?;
        validate_cpus(&self.cpus)?;
        validate_memory(&self.memory)?;
        if let Some(platform) = &self.platform {
            validate_platform(platform)?;
        }
        self.validate_consoles()?;
        for (index, disk) in self.disks().iter().enumerate() {
            validate_disk(&name("disk", index, &disk.pci), disk)?;
        }
        for (index, net) in self.net().iter().enumerate() {
            validate_net(&name("net", index, &net.pci), net)?;
        }
        validate_pci("rng", &self.rng.pci)?;
        self.validate_shared_names()
    }

    fn validate_absent_devices(&self) -> Result<(), ValidationError> {
        fn any<T>(list: &Option<Vec<T>>) -> bool {
            list.as_ref().is_some_and(|list| !list.is_empty())
        }
        refuse(
            "configuration",
            &[
                (any(&self.rate_limit_groups), "rate limits: 'rate_limit_groups'"),
                (self.balloon.is_some(), "the memory balloon: 'balloon'"),
                (any(&self.generic_vhost_user), "vhost-user devices: 'generic_vhost_user'"),
                (any(&self.fs), "shared file systems: 'fs'"),
                (any(&self.pmem), "persistent memory: 'pmem'"),
                (any(&self.devices), "VFIO devices: 'devices'"),
                (any(&self.user_devices), "vfio-user devices: 'user_devices'"),
                (any(&self.vdpa), "vDPA devices: 'vdpa'"),
                (self.vsock.is_some(), "the socket device: 'vsock'"),
                (self.pvpanic, "the panic device: 'pvpanic'"),
                (self.iommu, "the virtual IOMMU: 'iommu'"),
                (any(&self.numa), "NUMA nodes: 'numa'"),
                (self.watchdog, "the watchdog: 'watchdog'"),
                (self.rtc.is_some(), "the virtio clock: 'rtc'"),
                (any(&self.pci_segments), "PCI segments: 'pci_segments'"),
                (self.tpm.is_some(), "the TPM: 'tpm'"),
                (self.landlock_enable, "Landlock: 'landlock_enable'"),
                (any(&self.landlock_rules), "Landlock: 'landlock_rules'"),
                (self.debug_console.mode != ConsoleMode::Off, "the debug port: 'debug_console'"),
            ],
        )
    }

    fn validate_consoles(&self) -> Result<(), ValidationError> {
        let (serial, console) = (&self.serial, &self.console);
        validate_console_path("serial", serial.mode, &serial.file, &serial.socket)?;
        validate_console_path("console", console.mode, &console.file, &console.socket)?;
        if self.serial.mode == ConsoleMode::Tty && self.console.mode == ConsoleMode::Tty {
            log::warn!("serial port and console share the terminal; give one of them another mode");
        }
        validate_pci("console", &self.console.pci)
    }

    /// What is looked at further is few.
    fn validate_device_count(&self) -> Result<(), ValidationError> {
        let console = usize::from(self.console.mode != ConsoleMode::Off);
        let rng = 1;
        if self.disks().len() + self.net().len() + console + rng > MAX_DEVICES {
            return Err(ValidationError::TooManyDevices);
        }
        Ok(())
    }

    /// Names, slots and host resources no two devices may share.
    fn validate_shared_names(&self) -> Result<(), ValidationError> {
        let disks = self.disks().iter().map(|disk| &disk.pci);
        let nets = self.net().iter().map(|net| &net.pci);
        let mut ids = HashSet::new();
        let mut slots = HashSet::new();
        for pci in disks.chain(nets).chain([&self.rng.pci, &self.console.pci]) {
            if let Some(id) = &pci.id
                && !ids.insert(id)
            {
                return Err(ValidationError::DuplicateId(id.clone()));
            }
            if let Some(slot) = pci.pci_device_id
                && !slots.insert(slot)
            {
                return Err(ValidationError::DuplicateSlot(slot));
            }
        }
        let mut taps = HashSet::new();
        for tap in self.net().iter().filter_map(|net| net.tap.as_ref()) {
            if !taps.insert(tap) {
                return Err(ValidationError::DuplicateTap(tap.clone()));
            }
        }
        let mut images = Vec::new();
        for disk in self.disks() {
            let clash = images
                .iter()
                .any(|(path, readonly)| *path == &disk.path && !(*readonly && disk.readonly));
            if clash {
                return Err(ValidationError::DuplicateImage(disk.path.clone().unwrap_or_default()));
            }
            images.push((&disk.path, disk.readonly));
        }
        Ok(())
    }
}

/// The host bridge has slot 0.
const MAX_DEVICES: usize = SLOTS as usize - 1;

/// What to call a device in an error: its id, else its place in the list.
fn name(kind: &str, index: usize, pci: &PciCommon) -> String {
    match &pci.id {
        Some(id) => format!("{kind} '{id}'"),
        None => format!("{kind} number {index}"),
    }
}

fn validate_cpus(cpus: &CpusConfig) -> Result<(), ValidationError> {
    let (boot, max) = (cpus.boot_vcpus, cpus.max_vcpus);
    if boot == 0 || max < boot {
        return Err(ValidationError::VcpuCount { boot, max });
    }
    if max > 1 {
        return Err(ValidationError::TooManyVcpus { count: max });
    }
    if let Some(topology) = &cpus.topology {
        let product = [
            topology.threads_per_core,
            topology.cores_per_die,
            topology.dies_per_package,
            topology.packages,
        ]
        .into_iter()
        .fold(1u64, |product, count| product * u64::from(count));
        if product != u64::from(max) {
            return Err(ValidationError::Topology { product, max });
        }
    }
    // `nested` and `core_scheduling: Vm` are defaults and promise nothing that a VM with one vCPU and
    // without virtualisation of its own could miss.
    refuse(
        "cpus",
        &[
            (cpus.kvm_hyperv, "Hyper-V enlightenments: 'kvm_hyperv'"),
            (cpus.max_phys_bits < 46, "a 'max_phys_bits' below 46"),
            (cpus.affinity.is_some(), "pinning to host CPUs: 'affinity'"),
            (cpus.features.amx, "AMX: 'features.amx'"),
            (cpus.core_scheduling == CoreScheduling::Vcpu, "'core_scheduling' per vCPU"),
        ],
    )
}

/// Far from the end of the 46 bits of guest-physical addresses, and what is held for each page still fits a host.
const MAX_MEMORY: u64 = 1 << 40;

fn validate_memory(memory: &MemoryConfig) -> Result<(), ValidationError> {
    refuse(
        "memory",
        &[
            (memory.zones.is_some(), "memory zones: 'zones'"),
            (memory.hotplug_size.is_some_and(|size| size > 0), "memory hotplug: 'hotplug_size'"),
            (
                memory.hotplugged_size.is_some_and(|size| size > 0),
                "memory hotplug: 'hotplugged_size'",
            ),
            (memory.mergeable, "page merging: 'mergeable'"),
            (memory.shared, "memory shared with other processes: 'shared'"),
            (memory.hugepages || memory.hugepage_size.is_some(), "huge pages: 'hugepages'"),
            (memory.prefault, "'prefault'"),
            (memory.reserve, "'reserve'"),
        ],
    )?;
    if memory.size == 0 || memory.size > MAX_MEMORY || !memory.size.is_multiple_of(4096) {
        return Err(ValidationError::MemorySize { size: memory.size });
    }
    Ok(())
}

fn validate_platform(platform: &PlatformConfig) -> Result<(), ValidationError> {
    if *platform == PlatformConfig::default() {
        return Ok(());
    }
    unsupported("SMBIOS strings, PCI segments and IOMMU settings: 'platform'")
}

fn validate_console_path(
    device: &str,
    mode: ConsoleMode,
    file: &Option<PathBuf>,
    socket: &Option<PathBuf>,
) -> Result<(), ValidationError> {
    let (path, field) = match mode {
        ConsoleMode::Off | ConsoleMode::Null | ConsoleMode::Tty | ConsoleMode::Pty => return Ok(()),
        ConsoleMode::File => (file, "file"),
        ConsoleMode::Socket => (socket, "socket"),
    };
    match path {
        Some(_) => Ok(()),
        None => Err(ValidationError::Missing { device: device.to_owned(), field }),
    }
}

fn validate_pci(device: &str, pci: &PciCommon) -> Result<(), ValidationError> {
    if let Some(id) = &pci.id
        && id.starts_with("__")
    {
        return Err(ValidationError::ReservedId(id.clone()));
    }
    refuse(
        device,
        &[
            (pci.iommu, "devices behind an IOMMU: 'iommu'"),
            (pci.pci_segment != 0, "PCI segments: 'pci_segment'"),
        ],
    )?;
    match pci.pci_device_id {
        Some(slot) if !(1..=31).contains(&slot) => Err(ValidationError::Value {
            device: device.to_owned(),
            field: "pci_device_id",
            value: slot.to_string(),
            expected: "between 1 and 31 (0 is the host bridge)",
        }),
        _ => Ok(()),
    }
}

/// The front halves have virtqueues of one size each; the default of the configuration is that size.
fn validate_queue_size(device: &str, size: u16, only: u16) -> Result<(), ValidationError> {
    if size == only {
        return Ok(());
    }
    if !size.is_power_of_two() {
        return Err(ValidationError::Value {
            device: device.to_owned(),
            field: "queue_size",
            value: size.to_string(),
            expected: "a power of two",
        });
    }
    unsupported(format!("a 'queue_size' other than {only} ({device})"))
}

fn validate_disk(device: &str, disk: &DiskConfig) -> Result<(), ValidationError> {
    validate_pci(device, &disk.pci)?;
    refuse(
        device,
        &[
            (disk.vhost_user || disk.vhost_socket.is_some(), "vhost-user disks: 'vhost_user'"),
            (disk.rate_limit_group.is_some(), "rate limits: 'rate_limit_group'"),
            (disk.rate_limiter_config.is_some(), "rate limits: 'rate_limiter_config'"),
            (disk.queue_affinity.is_some(), "pinning to host CPUs: 'queue_affinity'"),
            (disk.backing_files, "images with backing files: 'backing_files'"),
            (!disk.sparse, "fully allocated images: 'sparse' off"),
        ],
    )?;
    match disk.image_type {
        ImageType::Raw | ImageType::Unknown => {}
        other => unsupported(format!(
            "images of type {other:?} ({device}); convert it to raw, for example with qemu-img"
        ))?,
    }
    if disk.path.is_none() {
        return Err(ValidationError::Missing { device: device.to_owned(), field: "path" });
    }
    if disk.num_queues != 1 {
        return Err(ValidationError::Value {
            device: device.to_owned(),
            field: "num_queues",
            value: disk.num_queues.to_string(),
            expected: "1, one per vCPU",
        });
    }
    validate_queue_size(device, disk.queue_size, DiskConfig::default().queue_size)?;
    match &disk.serial {
        Some(serial) if serial.len() > 20 => Err(ValidationError::Value {
            device: device.to_owned(),
            field: "serial",
            value: format!("'{serial}'"),
            expected: "at most 20 bytes",
        }),
        _ => Ok(()),
    }
}

fn validate_net(device: &str, net: &NetConfig) -> Result<(), ValidationError> {
    validate_pci(device, &net.pci)?;
    refuse(
        device,
        &[
            (net.vhost_user || net.vhost_socket.is_some(), "vhost-user networking: 'vhost_user'"),
            (net.fds.is_some(), "TAP descriptors: 'fds'; name the TAP with 'tap'"),
            (net.rate_limiter_config.is_some(), "rate limits: 'rate_limiter_config'"),
            (net.host_mac.is_some(), "setting the TAP's MAC address: 'host_mac'"),
        ],
    )?;
    let value = |field, value: String, expected| {
        Err(ValidationError::Value { device: device.to_owned(), field, value, expected })
    };
    // IFNAMSIZ is 16, the terminating zero included.
    if let Some(tap) = &net.tap
        && (tap.is_empty() || tap.len() > 15 || tap.contains(['/', ' ', '\0']))
    {
        return value("tap", format!("'{tap}'"), "an interface name of 1 to 15 bytes");
    }
    if net.num_queues != 2 {
        return value("num_queues", net.num_queues.to_string(), "2, one pair per vCPU");
    }
    if net.ip.is_some() != net.mask.is_some() {
        let field = if net.ip.is_some() { "mask" } else { "ip" };
        return Err(ValidationError::Missing { device: device.to_owned(), field });
    }
    for (field, address) in [("ip", net.ip), ("mask", net.mask)] {
        if let Some(address @ IpAddr::V6(_)) = address {
            return value(field, address.to_string(), "an IPv4 address");
        }
    }
    if let Some(mtu) = net.mtu
        && mtu < 1280
    {
        return value("mtu", mtu.to_string(), "at least 1280");
    }
    if let Some(mac) = net.mac
        && (mac.0[0] & 1 != 0 || mac.0 == [0; 6])
    {
        return value("mac", mac.to_string(), "a unicast address");
    }
    validate_queue_size(device, net.queue_size, NetConfig::default().queue_size)
}
