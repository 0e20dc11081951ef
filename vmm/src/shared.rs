//! What more than one thread of the VMM changes: the control thread meets the ft threads and the vCPU
//! thread here.
//!
//! What must hold: the lock is held for moments only, and never while waiting for another thread.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ft::{FtStatus, Generation, PairId};

use crate::api::{Doorbell, VmEnd};
use crate::config::VmConfig;
use crate::event_monitor::EventMonitor;
use crate::vm::{Vm, VmDoorbell};

/// What more than one thread changes.
#[derive(Default)]
pub struct State {
    /// What `vm.create` gave, completed when the VM was booted.
    pub config: Option<VmConfig>,
    /// The VM, once it is booted or received.
    pub vm: Option<Vm>,
    /// How the guest ended.
    pub end: Option<VmEnd>,
    /// The VM lives elsewhere now, or may do: here it stands still for good.
    pub halted: bool,
    /// The pair this VM is or was part of, and the generation it lives in.
    pub membership: Option<(PairId, Generation)>,
    /// What remains to be told of protection that has ended.
    pub last: FtStatus,
}

/// [`State`], and who is told when it changes.
#[derive(Clone)]
pub struct Shared {
    state: Arc<Mutex<State>>,
    doorbell: Doorbell,
    events: EventMonitor,
}

impl Shared {
    /// Nothing yet. `doorbell` wakes the control thread, `events` is told of changes.
    pub fn new(doorbell: Doorbell, events: EventMonitor) -> Self {
        Self { state: Arc::default(), doorbell, events }
    }

    /// Takes the lock.
    pub fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has the control thread look whether the VM has ended.
    pub fn ring(&self) {
        self.doorbell.ring();
    }

    /// The VM is at its end.
    pub fn end(&self, end: VmEnd) {
        self.lock().end = Some(end);
        self.ring();
    }

    /// A change in the state of protection, for the log and the event monitor.
    pub fn protection_changed(&self, role: &str, state: &str, reason: Option<&str>) {
        match reason {
            Some(reason) => log::info!("{role}: {state}: {reason}"),
            None => log::info!("{role}: {state}"),
        }
        let reason = reason.unwrap_or_default();
        let properties = [("role", role), ("state", state), ("reason", reason)];
        let properties = properties.map(|(name, value)| (name, value.to_owned()));
        self.events.event_with("ft", "changed", properties);
    }

    /// For the vCPU thread.
    pub fn vm_doorbell(&self) -> Box<dyn VmDoorbell> {
        Box::new(EndOfVm(self.clone()))
    }
}

/// Tells the control thread that the guest has ended.
struct EndOfVm(Shared);

impl VmDoorbell for EndOfVm {
    fn powered_off(&self) {
        self.0.end(VmEnd::PowerOff);
    }

    fn failed(&self, reason: String) {
        self.0.end(VmEnd::Failure(reason));
    }
}

/// An error with its causes, in one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        if !text.ends_with(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        next = cause.source();
    }
    text
}
