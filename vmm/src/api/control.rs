//! What the REST API controls: the trait [`Control`], its answers and its errors.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::ft::{FtEnableConfig, FtReceiveConfig, FtStatus};
use super::types::{RestoreConfig, SnapshotConfig};
use crate::config::VmConfig;
use crate::device_tree::DeviceTree;

/// The one virtual machine of a VMM process, as its API sees it.
///
/// The server calls these one after the other, never two at a time, and
/// only in states where the operation makes sense: it asks [`Control::state`] first and answers the rest
/// itself. An error must leave the VM as it was.
pub trait Control {
    /// `None` as long as no VM is configured.
    fn state(&self) -> Option<VmState>;

    /// Stores a configuration. Called with no VM configured.
    fn create(&mut self, config: VmConfig) -> Result<(), ControlError>;

    /// Validates the stored configuration, builds the VM and starts it. Called in
    /// [`VmState::Created`], in which it stays if this fails.
    fn boot(&mut self) -> Result<(), ControlError>;

    /// Stops the VM, if it runs, and forgets its configuration. Called in any state; without a VM there
    /// is nothing to do and that is a success.
    fn delete(&mut self) -> Result<(), ControlError>;

    /// Stops the VM and keeps its configuration: back to [`VmState::Created`]. Called on a booted VM.
    fn shutdown(&mut self) -> Result<(), ControlError>;

    /// Starts the VM afresh, from the kernel on. Called on a booted VM.
    fn reboot(&mut self) -> Result<(), ControlError>;

    /// Called in [`VmState::Running`]. When it returns, the guest executes nothing more.
    fn pause(&mut self) -> Result<(), ControlError>;

    /// Called in [`VmState::Paused`].
    fn resume(&mut self) -> Result<(), ControlError>;

    /// Presses the ACPI power button. Called on a booted VM.
    fn power_button(&mut self) -> Result<(), ControlError>;

    /// Configuration, state and devices. Called with a VM configured.
    fn info(&self) -> Result<VmInfo, ControlError>;

    /// Statistics of disks and network devices. Called on a booted VM.
    fn counters(&self) -> Result<Counters, ControlError>;

    /// Writes the whole VM into a directory. Called in [`VmState::Paused`], and stays there.
    fn snapshot(&mut self, config: &SnapshotConfig) -> Result<(), ControlError>;

    /// Builds a VM from a snapshot, paused or, if `config` says so, running. Called with no VM
    /// configured; there is none afterwards either if this fails.
    fn restore(&mut self, config: &RestoreConfig) -> Result<(), ControlError>;

    /// Becomes the backup of whichever primary connects. Called with no VM configured. Returns as soon as
    /// the VMM listens.
    fn ft_receive(&mut self, config: &FtReceiveConfig) -> Result<(), ControlError>;

    /// Protects the running VM. Called in [`VmState::Running`]. `config` has been checked
    /// ([`FtEnableConfig::validate`]).
    fn ft_enable(&mut self, config: &FtEnableConfig) -> Result<(), ControlError>;

    /// Called in any state.
    fn ft_status(&self) -> Result<FtStatus, ControlError>;

    /// On the primary: hands the VM over to the backup. On the backup: takes over, if the claim is won.
    fn ft_failover(&mut self) -> Result<(), ControlError>;

    /// On the primary: goes on unprotected; the backup is discarded.
    fn ft_disable(&mut self) -> Result<(), ControlError>;

    /// Whether the guest has ended by itself. Asked whenever a [`Doorbell`](super::Doorbell) was rung;
    /// afterwards [`Control::shutdown`] or [`Control::delete`] follows.
    fn ended(&self) -> Option<VmEnd>;
}

/// How a guest ended by itself. A reset is no end: it is followed within the VMM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VmEnd {
    /// It switched itself off.
    PowerOff,
    /// Something in the VMM failed, and the guest cannot go on.
    Failure(String),
}

/// State of a configured VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum VmState {
    /// Configured, not booted; also after a shutdown.
    Created,
    /// Its guest executes (on a backup: follows the primary).
    Running,
    /// A legal value of the API that clients do not normally see.
    Shutdown,
    /// Its guest stands still.
    Paused,
}

impl VmState {
    /// Whether there is a VM with devices, not only a configuration.
    pub fn is_booted(self) -> bool {
        matches!(self, Self::Running | Self::Paused)
    }
}

/// Answer of `vm.info`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmInfo {
    /// The configuration, with everything filled in that was left open.
    pub config: VmConfig,
    /// The state.
    pub state: VmState,
    /// RAM in bytes.
    pub memory_actual_size: u64,
    /// The devices, once the VM is booted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device_tree: Option<DeviceTree>,
}

/// Answer of `vm.counters`: device id, name of the counter, value. Block devices have `read_bytes`,
/// `write_bytes`, `read_ops`, `write_ops` and, in microseconds, `read_latency_min`, `_max`, `_avg` and the
/// same for `write`; network devices `rx_bytes`, `rx_frames`, `tx_bytes`, `tx_frames`.
pub type Counters = BTreeMap<String, BTreeMap<String, u64>>;

/// Why an operation was not done: an HTTP status and texts for people, the outermost description first
/// and the root cause last.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}", chain.join(": "))]
pub struct ControlError {
    /// 400 for a bad configuration, 404 for something that does not exist, 409 for an id used twice, else 500.
    pub status: u16,
    /// What failed, why, and what to do.
    pub chain: Vec<String>,
}

impl ControlError {
    /// An error with one text.
    pub fn new(status: u16, text: impl Into<String>) -> Self {
        Self { status, chain: vec![text.into()] }
    }

    /// `context`, then `error` and all its sources.
    pub fn from_error(
        status: u16,
        context: impl Into<String>,
        error: &(dyn std::error::Error + 'static),
    ) -> Self {
        let mut chain = vec![context.into()];
        let mut next = Some(error);
        while let Some(error) = next {
            let text = error.to_string();
            // An error that is transparent about its source would say everything twice.
            if chain.last() != Some(&text) {
                chain.push(text);
            }
            next = error.source();
        }
        Self { status, chain }
    }
}
