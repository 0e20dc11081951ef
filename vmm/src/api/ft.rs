//! Bodies of the calls about protection: `ft.receive`, `ft.enable`, `ft.status`.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::types::{UrlError, file_url};

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

/// Who decides which side may live: `file:DIR`, a directory both hosts reach.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ArbiterUrl {
    /// Claims are files created exclusively in this directory.
    File(PathBuf),
}

impl FromStr for ArbiterUrl {
    type Err = UrlError;

    fn from_str(url: &str) -> Result<Self, Self::Err> {
        file_url(url).map(Self::File).map_err(|_| UrlError::NotArbiter(url.to_owned()))
    }
}

impl fmt::Display for ArbiterUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(directory) => write!(f, "file:{}", directory.display()),
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
serde_as_text!(ArbiterUrl);

/// Body of `ft.receive`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FtReceiveConfig {
    /// Where to wait for the primary.
    pub listen_url: TcpUrl,
}

/// Body of `ft.enable`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FtEnableConfig {
    /// The backup's `listen_url`, as seen from here.
    pub backup_url: TcpUrl,
    /// How the backup follows.
    #[serde(default)]
    pub mode: FtMode,
    /// Who decides which side may live. The same for both sides.
    pub arbiter_url: ArbiterUrl,
    /// Who has the disks.
    #[serde(default)]
    pub disk_mode: DiskMode,
    /// Milliseconds between heartbeats.
    #[serde(default = "default_heartbeat_ms")]
    pub heartbeat_ms: u64,
    /// Milliseconds of silence after which the other side counts as dead.
    #[serde(default = "default_failure_timeout_ms")]
    pub failure_timeout_ms: u64,
    /// Milliseconds the backup may be behind before the primary is slowed down.
    #[serde(default = "default_max_lag_ms")]
    pub max_lag_ms: u64,
    /// Bytes of log that may wait for the backup before the primary stalls.
    #[serde(default = "default_log_buffer_bytes")]
    pub log_buffer_bytes: u64,
}

fn default_heartbeat_ms() -> u64 {
    50
}

fn default_failure_timeout_ms() -> u64 {
    400
}

fn default_max_lag_ms() -> u64 {
    100
}

fn default_log_buffer_bytes() -> u64 {
    16 << 20
}

/// A value in [`FtEnableConfig`] that cannot work.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FtConfigError {
    /// A mode Dyad does not have yet.
    #[error("Dyad does not support {0} yet")]
    Unsupported(&'static str),
    /// A number out of range.
    #[error("'{field}' is {value}; it must be from {min} to {max}")]
    Range {
        /// JSON field.
        field: &'static str,
        /// The value found.
        value: u64,
        /// Least value.
        min: u64,
        /// Greatest value.
        max: u64,
    },
}

impl FtEnableConfig {
    /// The least one can say: both sides' addresses, all else by default.
    pub fn new(backup_url: TcpUrl, arbiter_url: ArbiterUrl) -> Self {
        Self {
            backup_url,
            mode: FtMode::default(),
            arbiter_url,
            disk_mode: DiskMode::default(),
            heartbeat_ms: default_heartbeat_ms(),
            failure_timeout_ms: default_failure_timeout_ms(),
            max_lag_ms: default_max_lag_ms(),
            log_buffer_bytes: default_log_buffer_bytes(),
        }
    }

    /// Checks that the values can work together.
    pub fn validate(&self) -> Result<(), FtConfigError> {
        if self.mode == FtMode::Checkpoint {
            return Err(FtConfigError::Unsupported("protection by checkpoints: 'mode' checkpoint"));
        }
        if self.disk_mode == DiskMode::Mirrored {
            return Err(FtConfigError::Unsupported("mirrored disks: 'disk_mode' mirrored"));
        }
        // Below three heartbeats, one delayed heartbeat would count as a death.
        let least_timeout = self.heartbeat_ms.saturating_mul(3);
        for (field, value, min, max) in [
            ("heartbeat_ms", self.heartbeat_ms, 1, 10_000),
            ("failure_timeout_ms", self.failure_timeout_ms, least_timeout, 60_000),
            ("max_lag_ms", self.max_lag_ms, 1, 60_000),
            ("log_buffer_bytes", self.log_buffer_bytes, 64 << 10, 4 << 30),
        ] {
            if !(min..=max).contains(&value) {
                return Err(FtConfigError::Range { field, value, min, max });
            }
        }
        Ok(())
    }

    /// Time between heartbeats.
    pub fn heartbeat(&self) -> Duration {
        Duration::from_millis(self.heartbeat_ms)
    }

    /// Silence after which the other side counts as dead.
    pub fn failure_timeout(&self) -> Duration {
        Duration::from_millis(self.failure_timeout_ms)
    }

    /// How far the backup may be behind.
    pub fn max_lag(&self) -> Duration {
        Duration::from_millis(self.max_lag_ms)
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

/// Who has the disks of a protected VM.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DiskMode {
    /// Both hosts reach one image; only the live side touches it.
    #[default]
    Shared,
    /// Each side has its own image.
    Mirrored,
}

/// What this VMM is in a pair.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FtRole {
    /// Not in a pair.
    #[default]
    None,
    /// Its guest is the live one, and recorded.
    Primary,
    /// Its guest follows.
    Backup,
}

/// Where a pair stands.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FtState {
    /// The VM, if there is one, runs alone.
    #[default]
    Unprotected,
    /// A backup waits for its primary.
    Listening,
    /// The VM is being copied.
    Copying,
    /// Both sides are in step: the death of the primary would be survived.
    Protected,
    /// The sides were unequal; the backup is being made anew and must not go live.
    Resynchronising,
    /// The other side is silent; the claim is being asked for.
    Claiming,
    /// This side lost the claim; its guest is halted for good.
    Fenced,
}

/// Answer of `ft.status`. Positions are absent outside a pair.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct FtStatus {
    /// What this side is.
    pub role: FtRole,
    /// Where the pair stands.
    pub state: FtState,
    /// How the backup follows.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mode: Option<FtMode>,
    /// Counts the sides that have been live so far.
    pub generation: u64,
    /// Address of the other side.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peer: Option<String>,
    /// Why the VM is not protected, if it was or was to be.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_error: Option<String>,
    /// How much of the VM's memory has been copied to the backup, in bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub copied_bytes: Option<u64>,
    /// Microseconds the guest stood still when it was last protected.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub protect_pause_us: Option<u64>,
    /// Execution point up to which the log has been written (instructions).
    pub recorded_point: u64,
    /// Execution point up to which the backup has received the log.
    pub acknowledged_point: u64,
    /// Execution point the backup has executed.
    pub executed_point: u64,
    /// Bytes of log written since protection began.
    pub log_bytes: u64,
    /// Bytes of log per second, over the last second or so.
    pub log_bytes_per_second: u64,
    /// Host time from the primary recording a point to the backup executing it.
    pub lag_us: Quantiles,
    /// How long outputs were held.
    pub output_delay_us: Quantiles,
    /// Outputs held now.
    pub held_outputs: u64,
    /// Share of its time the primary is kept from executing to let the backup catch up, in 1/1000.
    pub throttle_permille: u32,
    /// Digests compared.
    pub digests_compared: u64,
    /// Digests that differed.
    pub digests_unequal: u64,
    /// What happened when this side last went live.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_failover: Option<FailoverReport>,
}

/// Median, 99th percentile and maximum of a duration, in microseconds, with the most recent value.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Quantiles {
    /// Most recent.
    pub last: u64,
    /// Median.
    pub p50: u64,
    /// 99th percentile.
    pub p99: u64,
    /// Maximum.
    pub max: u64,
}

/// How a side went live. Times are microseconds since the other side was last heard.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FailoverReport {
    /// What began it.
    pub cause: FailoverCause,
    /// The generation it began.
    pub generation: u64,
    /// Unix time, in milliseconds, when this side went live.
    pub live_unix_ms: u64,
    /// The other side was given up.
    pub detected_us: u64,
    /// The claim was won.
    pub claimed_us: u64,
    /// All received records were executed.
    pub replayed_us: u64,
    /// The guest ran again and its outputs left.
    pub live_us: u64,
    /// Disk requests issued again.
    pub reissued_disk_requests: u64,
    /// Held outputs released.
    pub released_outputs: u64,
}

/// What began a failover.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FailoverCause {
    /// The other side was silent for too long.
    Silence,
    /// The connection was closed.
    ConnectionLost,
    /// `ft.failover` on the primary.
    HandOver,
    /// `ft.failover` on the backup.
    TakeOver,
}
