//! What `ft.status` tells, in the shape in which it is shown.

use serde::{Deserialize, Serialize};

use crate::{Percentiles, Unequal};

/// Protection as one side sees it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct FtStatus {
    /// `none`, `primary`, `backup`, or `alone` once a claim was won.
    pub role: String,
    /// The state machine's state, as `protected` or `waiting for arbiter`.
    pub state: String,
    /// `lockstep` or `checkpoint`.
    pub mode: String,
    /// Name of the pair.
    pub pair: Option<String>,
    /// The generation this side runs in.
    pub generation: u64,
    /// Who the other side is.
    pub peer: Option<String>,
    /// Where claims are made.
    pub arbiter_url: Option<String>,
    /// Why this side is in its state, if it is not the plain course of things.
    pub reason: Option<String>,
    /// Points and positions.
    pub log: LogStatus,
    /// Lag now, in microseconds.
    pub lag_us: u64,
    /// Lags measured.
    pub lag: Percentiles,
    /// How long outputs were held.
    pub output_delay: Percentiles,
    /// Outputs held now.
    pub held_outputs: u64,
    /// Bytes of them.
    pub held_output_bytes: u64,
    /// Fraction of CPU time taken from the primary.
    pub throttle: f64,
    /// Time taken so far.
    pub throttled_us: u64,
    /// Whether the primary stands still because buffers are full.
    pub stalled: bool,
    /// How often it did.
    pub stalls: u64,
    /// Digests compared.
    pub digests_compared: u64,
    /// Digests that differed.
    pub digests_unequal: u64,
    /// The last difference.
    pub last_unequal: Option<Unequal>,
    /// Progress of the copy, while one is made.
    pub clone: Option<CloneStatus>,
    /// The same for each mirrored disk.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub clone_disks: Vec<CloneDisk>,
    /// The last failover of this VM on this side.
    pub last_failover: Option<Failover>,
    /// How this side looks for a backup; absent if nobody wants the VM protected, or it is the backup.
    pub reprotection: Option<Reprotection>,
}

/// The search for a standby that holds the next backup; see [`crate::Search`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reprotection {
    /// `searching`, `asking`, `copying`, `protected`; `resynchronising` from when the backup was found to
    /// differ until a fresh copy is complete; `no standby` if this side knows none but itself.
    pub state: String,
    /// All that may be asked, in turn.
    pub standbys: Vec<String>,
    /// The one that is asked next, is being asked, or holds the backup.
    pub standby: Option<String>,
    /// How many were asked since protection last lasted.
    pub attempts: u64,
    /// Milliseconds until the next is asked.
    pub next_attempt_ms: Option<u64>,
    /// Why those that were asked hold no backup, in the order of `standbys`; none once there is one.
    pub errors: Vec<StandbyError>,
}

/// Why one standby holds no backup.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StandbyError {
    /// Which.
    pub standby: String,
    /// What it said or what became of it, when it was asked last.
    pub error: String,
}

/// How far the log has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LogStatus {
    /// Execution point recorded last.
    pub recorded_point: u64,
    /// Execution point of what the backup has acknowledged.
    pub acknowledged_point: u64,
    /// Execution point that the backup has reached.
    pub executed_point: u64,
    /// Bytes recorded.
    pub recorded_bytes: u64,
    /// Bytes acknowledged.
    pub acknowledged_bytes: u64,
    /// Bytes executed.
    pub executed_bytes: u64,
    /// Rate of the last second or so.
    pub mbit_per_s: f64,
}

/// A copy being made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct CloneStatus {
    /// What it does.
    pub phase: ClonePhase,
    /// Bytes of memory to copy.
    pub total_bytes: u64,
    /// Bytes sent, repeats included.
    pub sent_bytes: u64,
    /// Bytes found changed since they were sent, when last looked.
    pub dirty_bytes: u64,
    /// Rounds begun.
    pub rounds: u64,
    /// How fast the backup takes what is sent, measured.
    pub link_bytes_per_s: u64,
    /// Fraction of its time that the guest gives away so that the copy can catch up with it.
    pub throttle: f64,
    /// How long the guest stood still, once known.
    pub pause_us: Option<u64>,
    /// Bytes of mirrored disks.
    #[serde(default)]
    pub disk_total_bytes: u64,
    /// Bytes of them that were compared with the backup's.
    #[serde(default)]
    pub disk_compared_bytes: u64,
    /// Bytes of them that were sent since they differed or were written meanwhile, zeroes included.
    #[serde(default)]
    pub disk_copied_bytes: u64,
}

/// How far the copy of one mirrored disk is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CloneDisk {
    /// The disk's id.
    pub id: String,
    /// Its size.
    pub total_bytes: u64,
    /// Bytes that were compared with the backup's.
    pub compared_bytes: u64,
    /// Bytes that were sent since they differed or were written meanwhile, zeroes included.
    pub copied_bytes: u64,
}

/// How far a copy is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ClonePhase {
    /// Nothing has been sent.
    #[default]
    Starting,
    /// The guest runs, and what differs of its mirrored disks goes over.
    Disks,
    /// The guest runs, and everything it holds goes over once.
    Everything,
    /// The guest runs, and what it has changed goes over again.
    Changes,
    /// The guest stands still for the rest.
    Pause,
    /// The guest runs on and records; the rest is on its way.
    Sent,
}

/// What happened when, in microseconds from the moment the other side was heard last.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failover {
    /// Why.
    pub cause: String,
    /// Suspicion.
    pub suspected_us: u64,
    /// Every record received was executed (on the backup).
    pub drained_us: Option<u64>,
    /// The lease of the other side had run out (on the backup).
    pub lease_over_us: Option<u64>,
    /// The claim was first asked for.
    pub asked_us: Option<u64>,
    /// The claim was answered.
    pub claimed_us: Option<u64>,
    /// The guest ran on alone.
    pub live_us: Option<u64>,
    /// The generation that started.
    pub generation: u64,
}
