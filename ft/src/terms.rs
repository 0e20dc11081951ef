//! What a pair agrees on before protection starts: versions, capabilities, timing.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::{Generation, PairId, clip};

/// Version of the messages and of the log. Two sides must have the same.
pub const PROTOCOL_VERSION: u32 = 5;

/// How a protected VM's disks are held.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DiskMode {
    /// Both hosts reach one image; only the live side touches it.
    Shared,
    /// Each side has its own image.
    Mirrored,
}

/// Where a backup has from what its guest reads of a shared disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DiskReads {
    /// From the log: the primary writes there what it has read.
    #[default]
    Log,
    /// From the disk: it reads by itself. The log says only when each read completed.
    Backup,
}

/// What a side needs (the primary) or has to offer (the backup).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Capabilities {
    /// Names the host among all, for as long as it runs; empty if it is not known.
    pub host: String,
    /// The CPU that guests see, as `soft-v1`. Must be equal.
    pub cpu_model: String,
    /// Guest memory: the primary's VM has it, the backup can give it.
    pub memory_bytes: u64,
    /// Kinds of device: the primary's VM has them, the backup knows them.
    pub devices: Vec<String>,
    /// Disk modes: the primary wants one, the backup knows them.
    pub disk_modes: Vec<DiskMode>,
}

impl Capabilities {
    /// Why an offering side (`self`) cannot take a VM with `needs`, each difference named; empty if
    /// it can.
    pub fn lacking(&self, needs: &Capabilities) -> Vec<String> {
        let mut lacking = Vec::new();
        if self.cpu_model != needs.cpu_model {
            lacking.push(format!(
                "the primary's VM has the CPU model {:?}, the backup has {:?}",
                needs.cpu_model, self.cpu_model
            ));
        }
        if self.memory_bytes < needs.memory_bytes {
            lacking.push(format!(
                "the VM has {} bytes of memory, the backup can give {}",
                needs.memory_bytes, self.memory_bytes
            ));
        }
        for device in needs.devices.iter().filter(|device| !self.devices.contains(device)) {
            lacking.push(format!("the backup does not know the device {device:?}"));
        }
        for mode in needs.disk_modes.iter().filter(|mode| !self.disk_modes.contains(mode)) {
            lacking.push(format!("the backup does not know the disk mode {mode:?}"));
        }
        lacking
    }

    /// Whether both are known to be of one host.
    pub fn same_host(&self, other: &Capabilities) -> bool {
        !self.host.is_empty() && self.host == other.host
    }
}

/// What a pair on one host is told, unless its operator wants it so.
pub(crate) fn same_host_refusal(host: &str) -> String {
    format!(
        "both sides are on one host ({}), so that what ends one ends the other: name a standby on another host, or, to try protection out, say same_host=on (JSON \"same_host\": true) in ft.enable",
        clip(host)
    )
}

/// The times that the two sides measure each other by. Chosen by the primary and sent to the backup:
/// were they to differ, fencing would not hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timing {
    /// How often each side says that it is there.
    pub heartbeat_ms: u64,
    /// Silence after which a side suspects the other.
    pub failure_timeout_ms: u64,
    /// How long after sending a heartbeat that the backup has echoed the primary may still release
    /// outputs.
    pub lease_ms: u64,
    /// How much longer than the lease the backup waits before it goes live: covers the drift of the
    /// two clocks over a lease, and the time from the primary's last look at its lease to the end of
    /// the system call that performs the output.
    pub lease_margin_ms: u64,
    /// Silence that is allowed while the clone is made, when the channel is full of memory pages.
    pub clone_timeout_ms: u64,
    /// How long to wait before asking an arbiter again that could not be reached.
    pub claim_retry_ms: u64,
    /// Lag that is not to be reached: the primary is slowed down from three tenths of it on, and stands still at four fifths.
    pub max_lag_ms: u64,
    /// How long a backup waits for a disk of its own to do one request before it gives itself up: for as long the
    /// primary may stand still for it.
    pub disk_timeout_ms: u64,
}

/// A [`Timing`] that cannot work.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum BadTiming {
    /// Zero or beyond a day.
    #[error("{name} is {value}; use 1 to 86400000")]
    OutOfRange {
        /// Which.
        name: &'static str,
        /// Its value.
        value: u64,
    },
    /// Heartbeats too rare.
    #[error(
        "heartbeat_ms is {heartbeat_ms} and failure_timeout_ms {failure_timeout_ms}; the timeout must be at least twice the heartbeat"
    )]
    RareHeartbeats {
        /// The heartbeat.
        heartbeat_ms: u64,
        /// The timeout.
        failure_timeout_ms: u64,
    },
    /// Lease too short to be renewed.
    #[error(
        "lease_ms is {lease_ms} and heartbeat_ms {heartbeat_ms}; the lease must be at least twice the heartbeat"
    )]
    ShortLease {
        /// The lease.
        lease_ms: u64,
        /// The heartbeat.
        heartbeat_ms: u64,
    },
}

impl Default for Timing {
    fn default() -> Self {
        Self::new(20, 300, 100)
    }
}

impl Timing {
    /// Derives the rest: the lease is as long as the failure timeout, so that fencing does not delay
    /// a failover after silence.
    pub fn new(heartbeat_ms: u64, failure_timeout_ms: u64, max_lag_ms: u64) -> Self {
        Self {
            heartbeat_ms,
            failure_timeout_ms,
            lease_ms: failure_timeout_ms,
            lease_margin_ms: (failure_timeout_ms / 10).max(5),
            clone_timeout_ms: failure_timeout_ms.saturating_mul(10).max(10_000),
            claim_retry_ms: (failure_timeout_ms / 2).max(10),
            max_lag_ms,
            disk_timeout_ms: 10_000,
        }
    }

    /// Checks the numbers, which come from an operator or a peer.
    pub fn check(&self) -> Result<(), BadTiming> {
        for (name, value) in [
            ("heartbeat_ms", self.heartbeat_ms),
            ("failure_timeout_ms", self.failure_timeout_ms),
            ("lease_ms", self.lease_ms),
            ("lease_margin_ms", self.lease_margin_ms),
            ("clone_timeout_ms", self.clone_timeout_ms),
            ("claim_retry_ms", self.claim_retry_ms),
            ("max_lag_ms", self.max_lag_ms),
            ("disk_timeout_ms", self.disk_timeout_ms),
        ] {
            if !(1..=86_400_000).contains(&value) {
                return Err(BadTiming::OutOfRange { name, value });
            }
        }
        if self.failure_timeout_ms < 2 * self.heartbeat_ms {
            return Err(BadTiming::RareHeartbeats {
                heartbeat_ms: self.heartbeat_ms,
                failure_timeout_ms: self.failure_timeout_ms,
            });
        }
        if self.lease_ms < 2 * self.heartbeat_ms {
            return Err(BadTiming::ShortLease {
                lease_ms: self.lease_ms,
                heartbeat_ms: self.heartbeat_ms,
            });
        }
        Ok(())
    }

    /// [`Timing::heartbeat_ms`].
    pub fn heartbeat(&self) -> Duration {
        Duration::from_millis(self.heartbeat_ms)
    }

    /// [`Timing::failure_timeout_ms`].
    pub fn failure_timeout(&self) -> Duration {
        Duration::from_millis(self.failure_timeout_ms)
    }

    /// [`Timing::lease_ms`].
    pub fn lease(&self) -> Duration {
        Duration::from_millis(self.lease_ms)
    }

    /// [`Timing::lease_ms`] and [`Timing::lease_margin_ms`].
    pub fn lease_and_margin(&self) -> Duration {
        Duration::from_millis(self.lease_ms + self.lease_margin_ms)
    }

    /// [`Timing::clone_timeout_ms`].
    pub fn clone_timeout(&self) -> Duration {
        Duration::from_millis(self.clone_timeout_ms)
    }

    /// [`Timing::claim_retry_ms`].
    pub fn claim_retry(&self) -> Duration {
        Duration::from_millis(self.claim_retry_ms)
    }

    /// [`Timing::max_lag_ms`].
    pub fn max_lag(&self) -> Duration {
        Duration::from_millis(self.max_lag_ms)
    }

    /// [`Timing::disk_timeout_ms`].
    pub fn disk_timeout(&self) -> Duration {
        Duration::from_millis(self.disk_timeout_ms)
    }

    /// How long a disk may take for one request while it is made a copy. The side that waits for it is silent meanwhile,
    /// and must have said why it gives up before that counts as its end.
    pub fn copy_disk_timeout(&self) -> Duration {
        self.disk_timeout().min(self.clone_timeout() / 2)
    }

    /// How long a backup may have the primary stand still before it gives itself up; zero if it works with no disk.
    pub fn disk_patience(&self, mode: DiskMode, reads: DiskReads) -> Duration {
        match (mode, reads) {
            (DiskMode::Shared, DiskReads::Log) => Duration::ZERO,
            (DiskMode::Shared, DiskReads::Backup) | (DiskMode::Mirrored, _) => self.disk_timeout(),
        }
    }
}

/// What the primary asks of a backup for one generation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Terms {
    /// The VM.
    pub pair: PairId,
    /// This period of protection.
    pub generation: Generation,
    /// The times.
    pub timing: Timing,
    /// Bytes of log that may be appended and not yet executed; beyond, the primary stalls.
    pub log_buffer_bytes: u64,
    /// Where claims are made, as `file:DIR`.
    pub arbiter_url: String,
    /// How disks are held.
    pub disk_mode: DiskMode,
    /// Both sides may be on one host.
    pub same_host: bool,
    /// Where the backup has from what its guest reads of a shared disk; with mirrored disks it reads its own.
    pub disk_reads: DiskReads,
    /// Where backups may be made, as `tcp:HOST:PORT`: the side that goes on alone looks there for the next.
    pub standbys: Vec<String>,
    /// Which of them this backup is; it need not be its own successor.
    pub standby: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_given_up_before_the_side_that_waits_for_it_counts_as_silent() {
        let timeout = |disk_timeout_ms| {
            let timing = Timing { disk_timeout_ms, ..Timing::default() };
            assert!(timing.copy_disk_timeout() * 2 <= timing.clone_timeout());
            timing.copy_disk_timeout()
        };
        assert_eq!(timeout(1_500), Duration::from_millis(1_500));
        assert_eq!(timeout(Timing::default().disk_timeout_ms), Duration::from_secs(5));
        assert_eq!(timeout(60_000), Duration::from_secs(5));
    }
}
