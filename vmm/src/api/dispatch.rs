//! What each call does in each state of the VM: Cloud Hypervisor's table, in one place.
//!
//! | state | meaning |
//! | --- | --- |
//! | none | no VM is configured |
//! | `Created` | configured, not booted; also after `vm.shutdown` |
//! | `Running`, `Paused` | booted |

use super::control::{Control, ControlError, Counters, VmState};
use super::http::Response;
use super::metrics;
use super::route::Call;
use super::types::VmmPing;
use crate::event_monitor::EventMonitor;

/// What follows a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// The VMM serves the next one.
    Serve,
    /// The VMM ends.
    Exit,
}

/// State a call needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Needs {
    /// None in particular.
    Nothing,
    /// No VM.
    NoVm,
    /// A configuration.
    Vm,
    /// [`VmState::Created`].
    Created,
    /// [`VmState::Running`] or [`VmState::Paused`].
    Booted,
    /// [`VmState::Running`].
    Running,
    /// [`VmState::Paused`].
    Paused,
}

impl Needs {
    fn met_by(self, state: Option<VmState>) -> bool {
        match self {
            Self::Nothing => true,
            Self::NoVm => state.is_none(),
            Self::Vm => state.is_some(),
            Self::Created => state == Some(VmState::Created),
            Self::Booted => state.is_some_and(VmState::is_booted),
            Self::Running => state == Some(VmState::Running),
            Self::Paused => state == Some(VmState::Paused),
        }
    }

    fn text(self) -> &'static str {
        match self {
            Self::Nothing => "any state",
            Self::NoVm => "a VMM without a VM",
            Self::Vm => "a configured VM",
            Self::Created => "a VM that is configured and not booted",
            Self::Booted => "a booted VM",
            Self::Running => "a running VM",
            Self::Paused => "a paused VM",
        }
    }
}

/// Name of the call, the state it needs, and the status if there is no VM at all.
fn requirement(call: &Call) -> (&'static str, Needs, u16) {
    match call {
        Call::Ping => ("vmm.ping", Needs::Nothing, 500),
        Call::VmmShutdown => ("vmm.shutdown", Needs::Nothing, 500),
        Call::Metrics => ("metrics", Needs::Nothing, 500),
        Call::Create(_) => ("vm.create", Needs::NoVm, 500),
        Call::Delete => ("vm.delete", Needs::Nothing, 500),
        Call::Boot => ("vm.boot", Needs::Created, 404),
        Call::Shutdown => ("vm.shutdown", Needs::Booted, 500),
        Call::Reboot => ("vm.reboot", Needs::Booted, 404),
        Call::Pause => ("vm.pause", Needs::Running, 500),
        Call::Resume => ("vm.resume", Needs::Paused, 500),
        Call::PowerButton => ("vm.power-button", Needs::Booted, 500),
        Call::Info => ("vm.info", Needs::Vm, 404),
        Call::Counters => ("vm.counters", Needs::Booted, 500),
        Call::Snapshot(_) => ("vm.snapshot", Needs::Paused, 500),
        Call::Restore(_) => ("vm.restore", Needs::NoVm, 500),
        Call::FtReceive(_) => ("ft.receive", Needs::NoVm, 500),
        Call::FtEnable(_) => ("ft.enable", Needs::Running, 404),
        Call::FtStatus => ("ft.status", Needs::Nothing, 500),
        Call::FtFailover => ("ft.failover", Needs::Nothing, 500),
        Call::FtDisable => ("ft.disable", Needs::Nothing, 500),
        Call::Unsupported { name, .. } => match *name {
            "vm.nmi" => ("vm.nmi", Needs::Booted, 500),
            // These two are legal before there is a VM, the first even without one.
            "vm.receive-migration" | "vm.send-migration" => (name, Needs::Nothing, 500),
            name => (name, Needs::Vm, 404),
        },
    }
}

/// What the event monitor is told before a call is judged, and after it has succeeded.
fn announcements(call: &Call) -> (Option<&'static str>, Option<&'static str>) {
    match call {
        Call::Boot => (Some("booting"), Some("booted")),
        Call::Reboot => (Some("rebooting"), Some("rebooted")),
        Call::Pause => (Some("pausing"), Some("paused")),
        Call::Resume => (Some("resuming"), Some("resumed")),
        Call::Snapshot(_) => (Some("snapshotting"), Some("snapshotted")),
        Call::Restore(_) => (Some("restoring"), Some("restored")),
        Call::Shutdown => (None, Some("shutdown")),
        _ => (None, None),
    }
}

/// Executes one call and tells the event monitor.
pub fn dispatch(call: Call, control: &mut dyn Control, events: &EventMonitor) -> (Response, Next) {
    let (before, after) = announcements(&call);
    if let Some(event) = before {
        events.event("vm", event);
    }
    let (response, next) = execute(call, control, events);
    if let Some(event) = after
        && response.status < 300
    {
        events.event("vm", event);
    }
    (response, next)
}

/// Stops the VM, if there is one, and forgets it.
pub fn delete(control: &mut dyn Control, events: &EventMonitor) -> Result<(), ControlError> {
    let state = control.state();
    control.delete()?;
    if state.is_some_and(VmState::is_booted) {
        events.event("vm", "shutdown");
    }
    if state.is_some() {
        events.event("vm", "deleted");
    }
    Ok(())
}

fn execute(call: Call, control: &mut dyn Control, events: &EventMonitor) -> (Response, Next) {
    let (name, needs, without_vm) = requirement(&call);
    let state = control.state();
    if !needs.met_by(state) {
        let (status, is) = match state {
            None => (without_vm, "no VM is configured: call vm.create first".to_owned()),
            // vm.reboot of a VM that is only configured is the one call that finds no VM there.
            Some(VmState::Created) if call == Call::Reboot => {
                (404, "the VM is not booted: call vm.boot first".to_owned())
            }
            Some(state) => (500, format!("the VM is {state:?}")),
        };
        return (
            Response::error(status, [&format!("{name} needs {}", needs.text()), &is]),
            Next::Serve,
        );
    }
    let done = |result: Result<(), ControlError>| match result {
        Ok(()) => Response::no_content(),
        Err(error) => refusal(&error),
    };
    let response = match call {
        Call::Ping => Response::json(&ping()),
        Call::VmmShutdown => {
            // The VMM ends in any case; the VM's devices should not be torn off.
            if let Err(error) = delete(control, events) {
                log::warn!("the VM could not be stopped in order: {error}");
            }
            return (Response::empty(200), Next::Exit);
        }
        Call::Info => json_or_refusal(control.info()),
        Call::Counters => json_or_refusal(control.counters()),
        Call::Metrics => metrics(state, control),
        Call::FtStatus => json_or_refusal(control.ft_status()),
        Call::Create(config) => done(control.create(*config)),
        Call::Delete => done(delete(control, events)),
        Call::Boot => done(control.boot()),
        Call::Shutdown => done(control.shutdown()),
        Call::Reboot => done(control.reboot()),
        Call::Pause => done(control.pause()),
        Call::Resume => done(control.resume()),
        Call::PowerButton => done(control.power_button()),
        Call::Snapshot(config) => done(control.snapshot(&config)),
        Call::Restore(config) => done(control.restore(&config)),
        Call::FtReceive(config) => done(control.ft_receive(&config)),
        Call::FtEnable(config) => done(control.ft_enable(&config)),
        Call::FtFailover => done(control.ft_failover()),
        Call::FtDisable => done(control.ft_disable()),
        Call::Unsupported { name, what } => {
            Response::error(500, [name, &format!("Dyad does not support {what} yet")])
        }
    };
    (response, Next::Serve)
}

/// What monitoring collects; without a VM there is less of it.
fn metrics(state: Option<VmState>, control: &dyn Control) -> Response {
    let counters = match state {
        Some(state) if state.is_booted() => control.counters(),
        _ => Ok(Counters::new()),
    };
    match control.ft_status().and_then(|status| Ok((status, counters?))) {
        Ok((status, counters)) => {
            Response::text(metrics::CONTENT_TYPE, metrics::text(state, &status, &counters))
        }
        Err(error) => refusal(&error),
    }
}

/// Who answers `vmm.ping`.
pub fn ping() -> VmmPing {
    let version = env!("CARGO_PKG_VERSION").to_owned();
    VmmPing {
        build_version: format!("dyad-v{version}"),
        version,
        pid: i64::from(std::process::id()),
        // None of those that Cloud Hypervisor names.
        features: vec!["kvm".to_owned()],
    }
}

fn json_or_refusal<T: serde::Serialize>(result: Result<T, ControlError>) -> Response {
    match result {
        Ok(value) => Response::json(&value),
        Err(error) => refusal(&error),
    }
}

fn refusal(error: &ControlError) -> Response {
    Response::error(error.status, &error.chain)
}
