//! Bodies of the calls about protection: `ft.receive`, `ft.enable`, `ft.status`.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use ::ft::search::MAX_STANDBYS;
pub use ::ft::status::{ClonePhase, CloneStatus, Failover, Reprotection, StandbyError};
pub use ::ft::{ArbiterUrl, DiskMode, DiskReads, FtStatus};
use ::ft::{BadTiming, Timing};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::security::ChannelSecurity;
use super::types::UrlError;
use crate::config::{OptionString, OptionStringError, is_false};

/// A TCP address as users write it: `tcp:HOST:PORT`, IPv6 addresses in brackets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TcpUrl {
    /// Name or address, without brackets.
    pub host: String,
    /// Port; 0 lets the system choose when listening.
    pub port: u16,
}

impl FromStr for TcpUrl {
    type Err = UrlError;

    fn from_str(url: &str) -> Result<Self, Self::Err> {
        let error = || UrlError::NotTcp(url.to_owned());
        let rest = url.strip_prefix("tcp:").ok_or_else(error)?;
        let rest = rest.strip_prefix("//").unwrap_or(rest);
        let (host, port) = rest.rsplit_once(':').ok_or_else(error)?;
        let bracketed = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
        let host = match bracketed {
            Some(host) => host,
            None if host.contains(':') => return Err(error()),
            None => host,
        };
        if host.is_empty() || host.contains(|c: char| c.is_whitespace() || c == '/') {
            return Err(error());
        }
        Ok(Self { host: host.to_owned(), port: port.parse().map_err(|_| error())? })
    }
}

impl fmt::Display for TcpUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "tcp:[{}]:{}", self.host, self.port)
        } else {
            write!(f, "tcp:{}:{}", self.host, self.port)
        }
    }
}

macro_rules! serde_as_text {
    ($type:ty) => {
        impl Serialize for $type {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

serde_as_text!(TcpUrl);

/// Body of `ft.receive`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FtReceiveConfig {
    /// Where to wait for the primary.
    pub listen_url: TcpUrl,
    /// How the primary and this host know each other. Also how the next backup is known, should the VM go
    /// on here.
    #[serde(flatten)]
    pub security: ChannelSecurity,
    /// Names of which the primary's certificate must have one; empty: any of the CA will do.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub allowed_peers: Vec<String>,
    /// A VM with more memory than this is refused; without it, one with more than the host has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_memory_bytes: Option<u64>,
    /// Where disks have their images on this host; the others have them where the primary has its own.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<DiskPath>,
}

/// The image of a disk on one host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskPath {
    /// The disk's id, as in `vm.info`.
    pub id: String,
    /// Its image.
    pub path: PathBuf,
}

impl FromStr for DiskPath {
    type Err = UrlError;

    /// `ID=PATH`.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.split_once('=') {
            Some((id, path)) if !id.is_empty() && !path.is_empty() => {
                Ok(Self { id: id.to_owned(), path: path.into() })
            }
            _ => Err(UrlError::NotDiskPath(text.to_owned())),
        }
    }
}

/// Body of `ft.enable`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FtEnableConfig {
    /// The backup's `listen_url`, as both hosts see it: the first choice.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backup_url: Option<TcpUrl>,
    /// Where else backups may be made, in order of preference. Whichever side goes on alone makes the next
    /// backup at one of these by itself; so both hosts should be among them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub standbys: Vec<TcpUrl>,
    /// How the backup and this host know each other. The backup's certificate must name the host by which
    /// it is reached.
    #[serde(flatten)]
    pub security: ChannelSecurity,
    /// How the backup follows.
    #[serde(default)]
    pub mode: FtMode,
    /// Who decides which side may live. The same for both sides.
    pub arbiter_url: ArbiterUrl,
    /// Who has the disks.
    #[serde(default = "default_disk_mode")]
    pub disk_mode: DiskMode,
    /// A standby may be on the host that has the VM: to try protection out, since what ends the host ends
    /// both sides.
    #[serde(default, skip_serializing_if = "is_false")]
    pub same_host: bool,
    /// Where the backup has from what the guest reads of shared disks.
    #[serde(default)]
    pub disk_reads: DiskReads,
    /// Milliseconds between heartbeats.
    #[serde(default = "default_heartbeat_ms")]
    pub heartbeat_ms: u64,
    /// Milliseconds of silence after which the other side counts as dead.
    #[serde(default = "default_failure_timeout_ms")]
    pub failure_timeout_ms: u64,
    /// Milliseconds the backup may be behind before the primary is slowed down.
    #[serde(default = "default_max_lag_ms")]
    pub max_lag_ms: u64,
    /// Milliseconds for which the backup may wait for a disk of its own before it gives itself up.
    #[serde(default = "default_disk_timeout_ms")]
    pub disk_timeout_ms: u64,
    /// Bytes of log that may wait for the backup before the primary stalls.
    #[serde(default = "default_log_buffer_bytes")]
    pub log_buffer_bytes: u64,
}

fn default_disk_mode() -> DiskMode {
    DiskMode::Shared
}

fn default_heartbeat_ms() -> u64 {
    Timing::default().heartbeat_ms
}

fn default_failure_timeout_ms() -> u64 {
    Timing::default().failure_timeout_ms
}

fn default_max_lag_ms() -> u64 {
    Timing::default().max_lag_ms
}

fn default_disk_timeout_ms() -> u64 {
    Timing::default().disk_timeout_ms
}

fn default_log_buffer_bytes() -> u64 {
    16 << 20
}

/// A value in [`FtReceiveConfig`] that cannot work.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum FtReceiveError {
    /// No VM is so small.
    #[error(
        "'max_memory_bytes' is 0, which refuses every VM: give what the largest may have, or leave it out"
    )]
    NoMemory,
}

/// A value in [`FtEnableConfig`] that cannot work.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum FtConfigError {
    /// A mode Dyad does not have yet.
    #[error("Dyad does not support {0} yet")]
    Unsupported(&'static str),
    /// A choice that is none.
    #[error("'disk_reads' is about shared disks: of mirrored ones each side reads its own")]
    Reads,
    /// Nobody to ask.
    #[error("neither 'backup_url' nor 'standbys' names a backup")]
    NoStandby,
    /// More than anybody has.
    #[error("'standbys' names {0}; name at most {MAX_STANDBYS}")]
    Standbys(usize),
    /// Times that cannot work.
    #[error(transparent)]
    Timing(#[from] BadTiming),
    /// A log buffer too small to work with, or larger than any host could want.
    #[error("'log_buffer_bytes' is {0}; it must be from {least} to {most}", least = LOG_BUFFER.start(), most = LOG_BUFFER.end())]
    LogBuffer(u64),
}

/// What `log_buffer_bytes` may be.
const LOG_BUFFER: std::ops::RangeInclusive<u64> = 64 << 10..=ft::backup::MAX_LOG_BUFFER_BYTES;

impl FtEnableConfig {
    /// The least one can say: both sides' addresses, all else by default.
    pub fn new(backup_url: TcpUrl, arbiter_url: ArbiterUrl) -> Self {
        Self {
            backup_url: Some(backup_url),
            standbys: Vec::new(),
            security: ChannelSecurity::default(),
            mode: FtMode::default(),
            arbiter_url,
            disk_mode: default_disk_mode(),
            same_host: false,
            disk_reads: DiskReads::default(),
            heartbeat_ms: default_heartbeat_ms(),
            failure_timeout_ms: default_failure_timeout_ms(),
            max_lag_ms: default_max_lag_ms(),
            disk_timeout_ms: default_disk_timeout_ms(),
            log_buffer_bytes: default_log_buffer_bytes(),
        }
    }

    /// Checks that the values can work together.
    pub fn validate(&self) -> Result<(), FtConfigError> {
        if self.mode == FtMode::Checkpoint {
            return Err(FtConfigError::Unsupported("protection by checkpoints: 'mode' checkpoint"));
        }
        if self.disk_reads == DiskReads::Backup && self.disk_mode == DiskMode::Mirrored {
            return Err(FtConfigError::Reads);
        }
        if self.candidates().next().is_none() {
            return Err(FtConfigError::NoStandby);
        }
        if self.standbys.len() > MAX_STANDBYS {
            return Err(FtConfigError::Standbys(self.standbys.len()));
        }
        self.timing().check()?;
        if !LOG_BUFFER.contains(&self.log_buffer_bytes) {
            return Err(FtConfigError::LogBuffer(self.log_buffer_bytes));
        }
        Ok(())
    }

    /// All who may be asked to hold the backup, first choice first.
    pub fn candidates(&self) -> impl Iterator<Item = &TcpUrl> {
        self.backup_url.iter().chain(&self.standbys)
    }

    /// The times both sides go by.
    pub fn timing(&self) -> Timing {
        Timing {
            disk_timeout_ms: self.disk_timeout_ms,
            ..Timing::new(self.heartbeat_ms, self.failure_timeout_ms, self.max_lag_ms)
        }
    }
}

impl FtReceiveConfig {
    /// The least one can say: an address, all else by default.
    pub fn new(listen_url: TcpUrl) -> Self {
        Self {
            listen_url,
            security: ChannelSecurity::default(),
            allowed_peers: Vec::new(),
            max_memory_bytes: None,
            disks: Vec::new(),
        }
    }

    /// Checks that a VM can be received.
    pub fn validate(&self) -> Result<(), FtReceiveError> {
        match self.max_memory_bytes {
            Some(0) => Err(FtReceiveError::NoMemory),
            Some(_) | None => Ok(()),
        }
    }

    /// `listen_url=tcp:HOST:PORT,tls_dir=/DIR,...`
    pub fn from_option(text: &str) -> Result<Self, OptionStringError> {
        let own = ["listen_url", "allowed_peers", "max_memory_bytes", "disks"];
        let keys = [&own[..], &ChannelSecurity::KEYS].concat();
        let options = OptionString::parse(text, &keys, &[])?;
        let listen_url = options.value("listen_url", "tcp:HOST:PORT")?;
        Ok(Self {
            security: ChannelSecurity::from_options(&options)?,
            allowed_peers: options.list("allowed_peers", "[NAME,...]")?.unwrap_or_default(),
            max_memory_bytes: options.size("max_memory_bytes")?,
            disks: options.list("disks", "[ID=PATH,...]")?.unwrap_or_default(),
            ..Self::new(listen_url.ok_or(OptionStringError::Missing("listen_url"))?)
        })
    }
}

/// What an arbiter may be, on the command line.
const ARBITERS: &str = "file:/DIRECTORY or etcd:[HOST:PORT,HOST:PORT,...]";

impl FtEnableConfig {
    /// `backup_url=tcp:HOST:PORT,arbiter_url=file:/DIR,standbys=[tcp:HOST:PORT,...],...`
    pub fn from_option(text: &str) -> Result<Self, OptionStringError> {
        let own = [
            "backup_url",
            "standbys",
            "mode",
            "arbiter_url",
            "disk_mode",
            "same_host",
            "disk_reads",
            "heartbeat_ms",
            "failure_timeout_ms",
            "max_lag_ms",
            "disk_timeout_ms",
            "log_buffer_bytes",
        ];
        let keys = [&own[..], &ChannelSecurity::KEYS].concat();
        let options = OptionString::parse(text, &keys, &[])?;
        let backup_url = options.value("backup_url", "tcp:HOST:PORT")?;
        let arbiter_url = options.value("arbiter_url", ARBITERS)?;
        let standbys = options.list("standbys", "[tcp:HOST:PORT,...]")?.unwrap_or_default();
        if backup_url.is_none() && standbys.is_empty() {
            return Err(OptionStringError::Missing("backup_url"));
        }
        let arbiter_url = arbiter_url.ok_or(OptionStringError::Missing("arbiter_url"))?;
        let modes = [("lockstep", FtMode::Lockstep), ("checkpoint", FtMode::Checkpoint)];
        let disk_modes = [("shared", DiskMode::Shared), ("mirrored", DiskMode::Mirrored)];
        let disk_reads = [("log", DiskReads::Log), ("backup", DiskReads::Backup)];
        let ms = |key, default| {
            options.value(key, "a number of milliseconds").map(|value| value.unwrap_or(default))
        };
        let log_buffer_bytes = options.size("log_buffer_bytes")?;
        Ok(Self {
            backup_url,
            standbys,
            security: ChannelSecurity::from_options(&options)?,
            mode: options.choice("mode", &modes)?.unwrap_or_default(),
            arbiter_url,
            disk_mode: options.choice("disk_mode", &disk_modes)?.unwrap_or(default_disk_mode()),
            same_host: options.toggle("same_host", false)?,
            disk_reads: options.choice("disk_reads", &disk_reads)?.unwrap_or_default(),
            heartbeat_ms: ms("heartbeat_ms", default_heartbeat_ms())?,
            failure_timeout_ms: ms("failure_timeout_ms", default_failure_timeout_ms())?,
            max_lag_ms: ms("max_lag_ms", default_max_lag_ms())?,
            disk_timeout_ms: ms("disk_timeout_ms", default_disk_timeout_ms())?,
            log_buffer_bytes: log_buffer_bytes.unwrap_or(default_log_buffer_bytes()),
        })
    }
}

/// How a backup follows its primary.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FtMode {
    /// It executes the same instructions with the same inputs.
    #[default]
    Lockstep,
    /// It receives the changed memory at intervals.
    Checkpoint,
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn enable(change: impl FnOnce(&mut serde_json::Value)) -> Result<FtEnableConfig, String> {
        let mut json = json!({"backup_url": "tcp:10.0.0.2:7700", "arbiter_url": "file:/shared"});
        change(&mut json);
        let config: FtEnableConfig =
            serde_json::from_value(json).map_err(|error| error.to_string())?;
        config.validate().map_err(|error| error.to_string())?;
        Ok(config)
    }

    #[test]
    fn urls_are_read_and_written() {
        for (text, host, port) in [
            ("tcp:10.0.0.2:7700", "10.0.0.2", 7700),
            ("tcp:[fe80::1]:1", "fe80::1", 1),
            ("tcp:backup.example:7700", "backup.example", 7700),
        ] {
            let url: TcpUrl = text.parse().unwrap();
            assert_eq!((url.host.as_str(), url.port), (host, port));
            assert_eq!(url.to_string(), text);
        }
        assert_eq!("tcp://h:1".parse::<TcpUrl>().unwrap().to_string(), "tcp:h:1");
        for text in
            ["", "h:1", "tcp:h", "tcp::1", "tcp:h:", "tcp:h:65536", "tcp:fe80::1:1", "udp:h:1"]
        {
            let error = text.parse::<TcpUrl>().unwrap_err();
            assert!(error.to_string().contains("tcp:HOST:PORT"), "{text}");
        }
    }

    #[test]
    fn what_is_left_out_has_defaults() {
        let config = enable(|_| {}).unwrap();
        assert_eq!(config.timing(), Timing::default());
        assert_eq!(config.mode, FtMode::Lockstep);
        assert_eq!(config.disk_mode, DiskMode::Shared);
        let backup_url = config.backup_url.clone().unwrap();
        let new = FtEnableConfig::new(backup_url, config.arbiter_url.clone());
        assert_eq!(config, new);
        let back = serde_json::to_value(&config).unwrap();
        assert_eq!(serde_json::from_value::<FtEnableConfig>(back).unwrap(), config);
    }

    #[test]
    fn option_strings_mean_what_the_json_means() {
        let text = "backup_url=tcp:10.0.0.2:7700,arbiter_url=file:/shared,heartbeat_ms=10,\
            disk_timeout_ms=2000,log_buffer_bytes=1M,mode=lockstep,disk_mode=shared,same_host=on";
        let expected = enable(|json| {
            json["heartbeat_ms"] = json!(10);
            json["disk_timeout_ms"] = json!(2000);
            json["log_buffer_bytes"] = json!(1 << 20);
            json["same_host"] = json!(true);
        });
        assert_eq!(FtEnableConfig::from_option(text), Ok(expected.unwrap()));
        for arbiter in ["etcd:[a:1,[::1]:2]", "\"etcd:a:1,[::1]:2\"", "etcd:[\"a:1\",[::1]:2]"] {
            let text = format!("arbiter_url={arbiter},backup_url=tcp:10.0.0.2:7700");
            let expected = enable(|json| json["arbiter_url"] = json!("etcd:a:1,[::1]:2"));
            assert_eq!(FtEnableConfig::from_option(&text), Ok(expected.unwrap()), "{text}");
        }
        let unprotected =
            FtEnableConfig::from_option("backup_url=tcp:h:1,arbiter_url=etcd:a:1,b:2");
        assert!(unprotected.unwrap_err().to_string().contains("brackets"));
        let standbys = ["tcp:a:7700", "tcp:[fe80::1]:7700"];
        let text = format!("standbys=[{}],arbiter_url=file:/shared", standbys.join(","));
        let expected = enable(|json| {
            json["backup_url"] = json!(null);
            json["standbys"] = json!(standbys);
        });
        assert_eq!(FtEnableConfig::from_option(&text), Ok(expected.unwrap()));
        let receive = FtReceiveConfig::from_option("listen_url=tcp:0.0.0.0:7700").unwrap();
        assert_eq!(receive.listen_url, "tcp:0.0.0.0:7700".parse().unwrap());
        for text in [
            "",
            "backup_url=tcp:h:1",
            "arbiter_url=file:/a",
            "backup_url=h",
            "mode=fast",
            "standbys=tcp:h:1,arbiter_url=file:/a",
            "standbys=[],arbiter_url=file:/a",
            "standbys=[tcp:h:1,h],arbiter_url=file:/a",
        ] {
            assert!(FtEnableConfig::from_option(text).is_err(), "{text}");
        }
        assert!(FtReceiveConfig::from_option("tcp:h:1").is_err());
        let text = "listen_url=tcp:h:1,allowed_peers=[a, 10.0.0.1],max_memory_bytes=1G,tls_dir=/t";
        let receive = FtReceiveConfig::from_option(text).unwrap();
        let json = json!({"listen_url": "tcp:h:1", "allowed_peers": ["a", "10.0.0.1"],
            "max_memory_bytes": 1 << 30, "tls_dir": "/t"});
        assert_eq!(serde_json::to_value(&receive).unwrap(), json);
        assert_eq!(serde_json::from_value::<FtReceiveConfig>(json).unwrap(), receive);
        assert!(FtReceiveConfig::from_option("listen_url=tcp:h:1,allowed_peers=a").is_err());
    }

    #[test]
    fn disks_are_shared_or_mirrored_and_each_host_may_have_its_own_paths() {
        let text = "backup_url=tcp:10.0.0.2:7700,arbiter_url=file:/shared,disk_mode=mirrored";
        let config = FtEnableConfig::from_option(text).unwrap();
        assert_eq!(config.disk_mode, DiskMode::Mirrored);
        assert_eq!(config, enable(|json| json["disk_mode"] = json!("mirrored")).unwrap());
        let reads = FtEnableConfig::from_option(&format!("{text},disk_reads=backup")).unwrap();
        assert_eq!(reads.validate(), Err(FtConfigError::Reads));
        let reads = enable(|json| json["disk_reads"] = json!("backup")).unwrap();
        assert_eq!(reads.disk_reads, DiskReads::Backup);
        let text = "listen_url=tcp:h:1,disks=[_disk0=/images/a.raw, data=/images/b=c.raw]";
        let receive = FtReceiveConfig::from_option(text).unwrap();
        let json = json!({"listen_url": "tcp:h:1", "disks": [
            {"id": "_disk0", "path": "/images/a.raw"}, {"id": "data", "path": "/images/b=c.raw"}]});
        assert_eq!(serde_json::to_value(&receive).unwrap(), json);
        for disks in ["_disk0", "[_disk0]", "[=x]", "[a=]"] {
            let text = format!("listen_url=tcp:h:1,disks={disks}");
            assert!(FtReceiveConfig::from_option(&text).is_err(), "{disks}");
        }
    }

    #[test]
    fn what_cannot_work_is_refused_by_name() {
        for (key, value) in [
            ("mode", json!("checkpoint")),
            ("mode", json!("Lockstep")),
            ("disk_mode", json!("none")),
            ("disk_reads", json!("none")),
            ("heartbeat_ms", json!(0)),
            ("failure_timeout_ms", json!(30)),
            ("max_lag_ms", json!(0)),
            ("disk_timeout_ms", json!(0)),
            ("log_buffer_bytes", json!(10)),
            ("backup_url", json!(null)),
            ("standbys", json!(vec!["tcp:h:1"; MAX_STANDBYS + 1])),
        ] {
            let error = enable(|json| json[key] = value.clone()).unwrap_err();
            assert!(
                error.contains(key) || error.contains("variant") || error.contains("null"),
                "{key}: {error}"
            );
        }
    }
}
