//! Configurations from command line options, in Cloud Hypervisor's syntax.

use std::path::PathBuf;

use super::option_string::{OptionString, OptionStringError};
use super::{
    ConsoleConfig, ConsoleMode, CoreScheduling, CpuProfile, CpuTopology, CpusConfig, DiskConfig,
    HotplugMethod, ImageType, LockGranularity, MemoryConfig, NetConfig, PayloadConfig, PciCommon,
    RngConfig, SerialConfig, VhostMode, VmConfig,
};

type Result<T> = std::result::Result<T, OptionStringError>;

/// An option whose value cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{option} '{value}' cannot be used")]
pub struct OptionError {
    /// The option, as the user typed it.
    pub option: &'static str,
    /// Its value.
    pub value: String,
    /// Why.
    #[source]
    pub source: OptionStringError,
}

/// The options that describe a VM, as typed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[expect(missing_docs, reason = "the fields are named like the options")]
pub struct VmOptions {
    pub kernel: Option<PathBuf>,
    pub initramfs: Option<PathBuf>,
    pub firmware: Option<PathBuf>,
    pub cmdline: Option<String>,
    pub cpus: Option<String>,
    pub memory: Option<String>,
    pub disk: Vec<String>,
    pub net: Vec<String>,
    pub rng: Option<String>,
    pub serial: Option<String>,
    pub console: Option<String>,
}

impl VmOptions {
    /// Whether nothing describes a VM: the VMM is to wait for the API.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// The configuration the options describe.
    pub fn config(&self) -> std::result::Result<VmConfig, OptionError> {
        let mut config = VmConfig::default();
        if self.kernel.is_some() || self.firmware.is_some() {
            config.payload = Some(PayloadConfig {
                kernel: self.kernel.clone(),
                initramfs: self.initramfs.clone(),
                cmdline: self.cmdline.clone(),
                firmware: self.firmware.clone(),
            });
        }
        one("--cpus", &self.cpus, CpusConfig::from_option, &mut config.cpus)?;
        one("--memory", &self.memory, MemoryConfig::from_option, &mut config.memory)?;
        one("--rng", &self.rng, RngConfig::from_option, &mut config.rng)?;
        one("--serial", &self.serial, SerialConfig::from_option, &mut config.serial)?;
        one("--console", &self.console, ConsoleConfig::from_option, &mut config.console)?;
        config.disks = many("--disk", &self.disk, DiskConfig::from_option)?;
        config.net = many("--net", &self.net, NetConfig::from_option)?;
        Ok(config)
    }
}

fn one<T>(
    option: &'static str,
    value: &Option<String>,
    parse: impl Fn(&str) -> Result<T>,
    target: &mut T,
) -> std::result::Result<(), OptionError> {
    if let Some(value) = value {
        *target =
            parse(value).map_err(|source| OptionError { option, value: value.clone(), source })?;
    }
    Ok(())
}

fn many<T>(
    option: &'static str,
    values: &[String],
    parse: impl Fn(&str) -> Result<T>,
) -> std::result::Result<Option<Vec<T>>, OptionError> {
    if values.is_empty() {
        return Ok(None);
    }
    let parse = |value: &String| {
        parse(value).map_err(|source| OptionError { option, value: value.clone(), source })
    };
    values.iter().map(parse).collect::<std::result::Result<_, _>>().map(Some)
}

const NUMBER: &str = "a number";

impl CpusConfig {
    /// `boot=1,max=1,...`
    pub fn from_option(text: &str) -> Result<Self> {
        let options = OptionString::parse(
            text,
            &[
                "boot",
                "max",
                "topology",
                "kvm_hyperv",
                "max_phys_bits",
                "nested",
                "core_scheduling",
                "profile",
            ],
            &["affinity", "features"],
        )?;
        let default = Self::default();
        let boot_vcpus = options.value("boot", NUMBER)?.unwrap_or(default.boot_vcpus);
        Ok(Self {
            boot_vcpus,
            max_vcpus: options.value("max", NUMBER)?.unwrap_or(boot_vcpus),
            topology: options.with(
                "topology",
                "THREADS:CORES:DIES:PACKAGES",
                CpuTopology::from_option,
            )?,
            kvm_hyperv: options.toggle("kvm_hyperv", default.kvm_hyperv)?,
            max_phys_bits: options.value("max_phys_bits", NUMBER)?.unwrap_or(default.max_phys_bits),
            nested: options.toggle("nested", default.nested)?,
            core_scheduling: options
                .choice(
                    "core_scheduling",
                    &[
                        ("vm", CoreScheduling::Vm),
                        ("vcpu", CoreScheduling::Vcpu),
                        ("off", CoreScheduling::Off),
                    ],
                )?
                .unwrap_or_default(),
            profile: options.choice("profile", &[("host", CpuProfile::Host)])?.unwrap_or_default(),
            ..default
        })
    }
}

impl CpuTopology {
    fn from_option(text: &str) -> Option<Self> {
        let counts: Vec<u16> =
            text.split(':').map(|count| count.parse().ok()).collect::<Option<_>>()?;
        let [threads_per_core, cores_per_die, dies_per_package, packages] = counts[..] else {
            return None;
        };
        Some(Self { threads_per_core, cores_per_die, dies_per_package, packages })
    }
}

impl MemoryConfig {
    /// `size=512M,...`
    pub fn from_option(text: &str) -> Result<Self> {
        let options = OptionString::parse(
            text,
            &[
                "size",
                "mergeable",
                "shared",
                "hugepages",
                "hugepage_size",
                "hotplug_method",
                "hotplug_size",
                "hotplugged_size",
                "prefault",
                "reserve",
                "thp",
            ],
            &[],
        )?;
        Ok(Self {
            size: options.size("size")?.unwrap_or(Self::DEFAULT_SIZE),
            mergeable: options.toggle("mergeable", false)?,
            hotplug_method: options
                .choice(
                    "hotplug_method",
                    &[("acpi", HotplugMethod::Acpi), ("virtio-mem", HotplugMethod::VirtioMem)],
                )?
                .unwrap_or_default(),
            hotplug_size: options.size("hotplug_size")?,
            hotplugged_size: options.size("hotplugged_size")?,
            shared: options.toggle("shared", false)?,
            hugepages: options.toggle("hugepages", false)?,
            hugepage_size: options.size("hugepage_size")?,
            prefault: options.toggle("prefault", false)?,
            reserve: options.toggle("reserve", false)?,
            thp: options.toggle("thp", true)?,
            zones: None,
        })
    }
}

/// Keys of all PCI devices.
const PCI_KEYS: [&str; 4] = ["id", "iommu", "pci_segment", "pci_device_id"];

impl PciCommon {
    fn from_options(options: &OptionString) -> Result<Self> {
        Ok(Self {
            id: options.text("id").map(str::to_owned),
            iommu: options.toggle("iommu", false)?,
            pci_segment: options.value("pci_segment", NUMBER)?.unwrap_or(0),
            pci_device_id: options.value("pci_device_id", "a number from 1 to 31")?,
        })
    }
}

fn with_pci_keys<'a>(keys: &[&'a str]) -> Vec<&'a str> {
    [keys, &PCI_KEYS].concat()
}

/// Keys that limit a device's rate.
const THROTTLING_KEYS: [&str; 6] = [
    "bw_size",
    "bw_one_time_burst",
    "bw_refill_time",
    "ops_size",
    "ops_one_time_burst",
    "ops_refill_time",
];

impl DiskConfig {
    /// `path=PATH,readonly=on,...`
    pub fn from_option(text: &str) -> Result<Self> {
        let keys = with_pci_keys(&[
            "path",
            "readonly",
            "direct",
            "num_queues",
            "queue_size",
            "vhost_user",
            "socket",
            "serial",
            "backing_files",
            "sparse",
            "image_type",
            "lock_granularity",
            "_disable_io_uring",
            "_disable_aio",
        ]);
        let unsupported = [&["rate_limit_group", "queue_affinity"][..], &THROTTLING_KEYS].concat();
        let options = OptionString::parse(text, &keys, &unsupported)?;
        let default = Self::default();
        let image_types = [
            ("raw", ImageType::Raw),
            ("qcow2", ImageType::Qcow2),
            ("vhd", ImageType::FixedVhd),
            ("vhdx", ImageType::Vhdx),
            ("vmdk", ImageType::FlatVmdk),
        ];
        let locks = [("byte-range", LockGranularity::ByteRange), ("full", LockGranularity::Full)];
        Ok(Self {
            pci: PciCommon::from_options(&options)?,
            path: options.text("path").map(PathBuf::from),
            readonly: options.toggle("readonly", default.readonly)?,
            direct: options.toggle("direct", default.direct)?,
            num_queues: options.value("num_queues", NUMBER)?.unwrap_or(default.num_queues),
            queue_size: options.value("queue_size", NUMBER)?.unwrap_or(default.queue_size),
            vhost_user: options.toggle("vhost_user", default.vhost_user)?,
            vhost_socket: options.text("socket").map(PathBuf::from),
            serial: options.text("serial").map(str::to_owned),
            backing_files: options.toggle("backing_files", default.backing_files)?,
            sparse: options.toggle("sparse", default.sparse)?,
            image_type: options.choice("image_type", &image_types)?.unwrap_or_default(),
            lock_granularity: options.choice("lock_granularity", &locks)?.unwrap_or_default(),
            disable_io_uring: options.toggle("_disable_io_uring", default.disable_io_uring)?,
            disable_aio: options.toggle("_disable_aio", default.disable_aio)?,
            ..default
        })
    }
}

impl NetConfig {
    /// `tap=NAME,mac=MAC,...`
    pub fn from_option(text: &str) -> Result<Self> {
        let keys = with_pci_keys(&[
            "tap",
            "ip",
            "mask",
            "mac",
            "host_mac",
            "mtu",
            "num_queues",
            "queue_size",
            "vhost_user",
            "socket",
            "vhost_mode",
            "offload_tso",
            "offload_ufo",
            "offload_csum",
        ]);
        let unsupported = [&["fd"][..], &THROTTLING_KEYS].concat();
        let options = OptionString::parse(text, &keys, &unsupported)?;
        let default = Self::default();
        let mac = "six pairs of hexadecimal digits, as in 2e:00:00:00:00:01";
        let modes = [("client", VhostMode::Client), ("server", VhostMode::Server)];
        Ok(Self {
            pci: PciCommon::from_options(&options)?,
            tap: options.text("tap").map(str::to_owned),
            ip: options.value("ip", "an IP address")?,
            mask: options.value("mask", "a network mask, as in 255.255.255.0")?,
            mac: options.value("mac", mac)?,
            host_mac: options.value("host_mac", mac)?,
            mtu: options.value("mtu", NUMBER)?,
            num_queues: options.value("num_queues", NUMBER)?.unwrap_or(default.num_queues),
            queue_size: options.value("queue_size", NUMBER)?.unwrap_or(default.queue_size),
            vhost_user: options.toggle("vhost_user", default.vhost_user)?,
            vhost_socket: options.text("socket").map(PathBuf::from),
            vhost_mode: options.choice("vhost_mode", &modes)?.unwrap_or_default(),
            offload_tso: options.toggle("offload_tso", default.offload_tso)?,
            offload_ufo: options.toggle("offload_ufo", default.offload_ufo)?,
            offload_csum: options.toggle("offload_csum", default.offload_csum)?,
            ..default
        })
    }
}

impl RngConfig {
    /// `src=PATH,...`
    pub fn from_option(text: &str) -> Result<Self> {
        let options = OptionString::parse(text, &with_pci_keys(&["src"]), &[])?;
        Ok(Self {
            pci: PciCommon::from_options(&options)?,
            src: PathBuf::from(options.text("src").unwrap_or(Self::DEFAULT_SOURCE)),
        })
    }
}

/// Mode and path of a console, from `off`, `null`, `tty`, `pty`, `file=PATH` or `socket=PATH`, and what else
/// stands in `text`.
struct Output {
    mode: ConsoleMode,
    file: Option<PathBuf>,
    socket: Option<PathBuf>,
    rest: OptionString,
}

fn output(text: &str, keys: &[&str]) -> Result<Output> {
    let (first, others) = text.split_once(',').unwrap_or((text, ""));
    let mode = match first {
        "off" => Some(ConsoleMode::Off),
        "null" => Some(ConsoleMode::Null),
        "tty" => Some(ConsoleMode::Tty),
        "pty" => Some(ConsoleMode::Pty),
        _ => None,
    };
    let keys = [keys, &["file", "socket"]].concat();
    let rest = OptionString::parse(if mode.is_some() { others } else { text }, &keys, &[])?;
    let file = rest.text("file").map(PathBuf::from);
    let socket = rest.text("socket").map(PathBuf::from);
    let mode = match (mode, &file, &socket) {
        (Some(mode), None, None) => mode,
        (None, Some(_), None) => ConsoleMode::File,
        (None, None, Some(_)) => ConsoleMode::Socket,
        _ => {
            return Err(OptionStringError::Value {
                key: "mode".to_owned(),
                value: text.to_owned(),
                expected: "one of off, null, tty, pty, file=PATH, socket=PATH".to_owned(),
            });
        }
    };
    Ok(Output { mode, file, socket, rest })
}

impl SerialConfig {
    /// `tty`, `file=PATH`, ...
    pub fn from_option(text: &str) -> Result<Self> {
        let Output { mode, file, socket, .. } = output(text, &[])?;
        Ok(Self { mode, file, socket })
    }
}

impl ConsoleConfig {
    /// `tty`, `file=PATH`, ...
    pub fn from_option(text: &str) -> Result<Self> {
        let Output { mode, file, socket, rest } = output(text, &PCI_KEYS)?;
        Ok(Self { mode, file, socket, pci: PciCommon::from_options(&rest)? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn json(config: impl serde::Serialize) -> Value {
        serde_json::to_value(config).unwrap()
    }

    #[test]
    fn options_mean_what_the_json_means() {
        let options = VmOptions {
            kernel: Some("/vmlinuz".into()),
            initramfs: Some("/initrd".into()),
            cmdline: Some("console=ttyS0".into()),
            cpus: Some("boot=1,topology=1:1:1:1".into()),
            memory: Some("size=1G".into()),
            disk: vec!["path=/a,readonly=on,image_type=raw,id=root,serial=x".into()],
            net: vec!["tap=t0,mac=2E:00:00:00:00:01".into(), String::new()],
            rng: Some("src=/dev/random".into()),
            serial: Some("tty".into()),
            console: Some("file=/tmp/a,pci_device_id=3".into()),
            ..VmOptions::default()
        };
        let expected: VmConfig = serde_json::from_value(json!({
            "payload": {"kernel": "/vmlinuz", "initramfs": "/initrd", "cmdline": "console=ttyS0"},
            "cpus": {"boot_vcpus": 1, "max_vcpus": 1, "topology": {"threads_per_core": 1,
                "cores_per_die": 1, "dies_per_package": 1, "packages": 1}},
            "memory": {"size": 1 << 30},
            "disks": [{"path": "/a", "readonly": true, "image_type": "Raw", "id": "root",
                "serial": "x"}],
            "net": [{"tap": "t0", "mac": "2e:00:00:00:00:01"}, {}],
            "rng": {"src": "/dev/random"},
            "serial": {"mode": "Tty"},
            "console": {"mode": "File", "file": "/tmp/a", "pci_device_id": 3},
        }))
        .unwrap();
        assert_eq!(options.config().unwrap(), expected);
        assert!(!options.is_empty());
    }

    #[test]
    fn no_options_mean_the_defaults() {
        assert!(VmOptions::default().is_empty());
        assert_eq!(VmOptions::default().config().unwrap(), VmConfig::default());
        assert_eq!(json(CpusConfig::from_option("").unwrap()), json(CpusConfig::default()));
        assert_eq!(json(MemoryConfig::from_option("").unwrap()), json(MemoryConfig::default()));
        assert_eq!(json(DiskConfig::from_option("").unwrap()), json(DiskConfig::default()));
        assert_eq!(json(NetConfig::from_option("").unwrap()), json(NetConfig::default()));
        assert_eq!(json(RngConfig::from_option("").unwrap()), json(RngConfig::default()));
    }

    #[test]
    fn max_vcpus_follow_boot_vcpus() {
        assert_eq!(CpusConfig::from_option("boot=4").unwrap().max_vcpus, 4);
        assert_eq!(CpusConfig::from_option("boot=4,max=8").unwrap().max_vcpus, 8);
    }

    #[test]
    fn consoles_take_one_destination() {
        let mode = |text: &str| SerialConfig::from_option(text).map(|config| config.mode);
        assert_eq!(mode("off"), Ok(ConsoleMode::Off));
        assert_eq!(mode("null"), Ok(ConsoleMode::Null));
        assert_eq!(mode("pty"), Ok(ConsoleMode::Pty));
        assert_eq!(mode("socket=/s"), Ok(ConsoleMode::Socket));
        for text in ["", "TTY", "file", "file=", "tty,file=/a", "file=/a,socket=/b", "tty,id=x"] {
            assert!(mode(text).is_err(), "{text}");
        }
        assert_eq!(ConsoleConfig::from_option("tty,id=x").unwrap().pci.id, Some("x".into()));
    }

    #[test]
    fn bad_values_name_option_value_and_remedy() {
        let report = |options: VmOptions| {
            let error = options.config().unwrap_err();
            format!("{error}: {}", error.source)
        };
        for (value, named) in [
            ("size=lots", "suffix K, M or G"),
            ("size", "key=value"),
            ("szie=1G", "no key 'szie'"),
            ("size=1G,size=2G", "twice"),
            ("shared=maybe", "on or off"),
            ("hotplug_method=magic", "acpi, virtio-mem"),
        ] {
            let text = report(VmOptions { memory: Some(value.into()), ..VmOptions::default() });
            assert!(
                text.contains("--memory") && text.contains(value) && text.contains(named),
                "{text}"
            );
        }
        for (value, named) in [
            ("/a", "key=value"),
            ("path=/a,readonly=perhaps", "on or off"),
            ("path=/a,image_type=iso", "raw, qcow2"),
            ("path=/a,queue_size=70000", "a number"),
            ("path=/a,bw_size=1", "not support 'bw_size'"),
        ] {
            let text = report(VmOptions { disk: vec![value.into()], ..VmOptions::default() });
            assert!(text.contains("--disk") && text.contains(named), "{text}");
        }
        for (value, named) in [
            ("mac=zz", "2e:00"),
            ("ip=1.2.3", "IP address"),
            ("fd=3", "not support 'fd'"),
            ("tap", "key=value"),
        ] {
            let text = report(VmOptions { net: vec![value.into()], ..VmOptions::default() });
            assert!(text.contains("--net") && text.contains(named), "{text}");
        }
        for value in ["boot=none", "topology=1:1:1", "topology=1:1:1:x", "features=amx"] {
            let text = report(VmOptions { cpus: Some(value.into()), ..VmOptions::default() });
            assert!(text.contains("--cpus"), "{text}");
        }
    }
}
