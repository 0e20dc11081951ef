//! The VMM of a process: at most one VM, driven by the control thread.
//!
//! Everything here happens on the control thread, except what [`BackupHost`] and [`PrimaryObserver`] do
//! on an ft thread and [`VmDoorbell`] on the vCPU thread. Those meet the control thread in [`State`]. What must
//! hold: its lock is held for moments only, and never while waiting for another thread.

use std::net::{TcpListener, TcpStream, ToSocketAddrs};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ft::message::CloneStart;
use ft::status::Failover;
use ft::{
    BackupConfig, Capabilities, ExecutionPoint, Generation, PairId, PrimaryConfig, Terms, Timing,
    Unequal,
};
use hypervisor::{GuestMemory, Hypervisor};

use crate::api::types::{RestoreConfig, SnapshotConfig};
use crate::api::{
    Control, ControlError, Counters, Doorbell, FtEnableConfig, FtReceiveConfig, FtStatus, TcpUrl,
    VmEnd, VmInfo, VmState,
};
use crate::boot::Payload;
use crate::config::VmConfig;
use crate::event_monitor::EventMonitor;
use crate::pair::backup::BackupHost;
use crate::pair::clone::{CloneHeader, CloneState};
use crate::pair::primary::{PrimaryObserver, PrimaryParts, PrimaryThread};
use crate::pair::receive::Receiver;
use crate::pair::{self, MACHINE_MODEL};
use crate::run_loop::inbox::InboxSender;
use crate::run_loop::outgoing::Outlet;
use crate::run_loop::replay::Replay;
use crate::run_loop::{self, Command, CommandError};
use crate::vm::{Prepared, Vm, VmDoorbell};

/// How long a backup may take to accept a TCP connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long the end of protection is waited for before the VM is taken down.
const DISABLE_TIMEOUT: Duration = Duration::from_secs(5);

/// One process's VMM.
pub struct Vmm {
    hypervisor: Arc<dyn Hypervisor>,
    doorbell: Doorbell,
    events: EventMonitor,
    /// Names this process among all that ever claim.
    who: String,
    state: Arc<Mutex<State>>,
    primary: Option<PrimaryThread>,
    receiver: Option<Receiver>,
}

/// What more than one thread changes.
#[derive(Default)]
struct State {
    config: Option<VmConfig>,
    vm: Option<Vm>,
    end: Option<VmEnd>,
    /// The VM lives elsewhere now, or may do: here it stands still for good.
    halted: bool,
    /// The pair this VM is or was part of, and the generation it lives in.
    membership: Option<(PairId, Generation)>,
    /// What remains to be told of protection that has ended.
    last: FtStatus,
}

impl Vmm {
    /// A VMM without a VM. `doorbell` wakes the control thread, `events` is told of changes.
    #[must_use]
    pub fn new(hypervisor: Arc<dyn Hypervisor>, doorbell: Doorbell, events: EventMonitor) -> Self {
        Self {
            hypervisor,
            doorbell,
            events,
            who: process_name(),
            state: Arc::default(),
            primary: None,
            receiver: None,
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    fn vm_doorbell(&self) -> Box<dyn VmDoorbell> {
        Box::new(EndOfVm { state: Arc::clone(&self.state), doorbell: self.doorbell.clone() })
    }

    /// Runs `f` with the way to the vCPU thread, not holding the lock.
    fn with_inbox<T>(
        &self,
        what: &str,
        f: impl FnOnce(&InboxSender<run_loop::Message>) -> Result<T, CommandError>,
    ) -> Result<T, ControlError> {
        let inbox = self.lock().vm.as_ref().map(|vm| vm.inbox().clone());
        let inbox = inbox.ok_or_else(|| ControlError::new(500, "The VM is not running"))?;
        f(&inbox).map_err(|error| ControlError::from_error(500, what, &error))
    }

    /// Ends protection from this side, if there is any: the backup must not outlive the VM.
    fn end_protection(&mut self, reason: &str) {
        if let Some(primary) = self.primary.take() {
            let disable = ft::primary::Input::Disable { reason: reason.to_owned() };
            match primary.command(disable) {
                Ok(()) => {
                    if !primary.wait(DISABLE_TIMEOUT) {
                        log::warn!(
                            "the end of protection is not confirmed: {}",
                            primary.status().state
                        );
                    }
                }
                Err(reason) => log::info!("protection had ended: {reason}"),
            }
            self.lock().last = primary.status();
        }
        // Discards a backup that is not live.
        self.receiver = None;
    }

    fn take_down(&mut self, reason: &str) -> Option<VmConfig> {
        self.end_protection(reason);
        let mut state = self.lock();
        state.end = None;
        state.halted = false;
        state.membership = None;
        let vm = state.vm.take();
        let config = state.config.clone();
        drop(state);
        drop(vm);
        config
    }

    fn protect(&mut self, request: &FtEnableConfig) -> Result<(), ControlError> {
        let refuse = |text: String| ControlError::new(500, text);
        if !self.hypervisor.counts_exactly() {
            let name = self.hypervisor.name();
            return Err(refuse(format!(
                "protection in lockstep needs a hypervisor that counts instructions exactly; this VM runs on {name}: start dyad with --hypervisor soft"
            )));
        }
        if self.primary.as_ref().is_some_and(|primary| !primary.ended()) {
            return Err(refuse("the VM is protected already, or about to be".into()));
        }
        if self.receiver.as_ref().is_some_and(|receiver| receiver.current().is_some()) {
            return Err(refuse("this side is the backup: ask the primary's VMM".into()));
        }
        let timing =
            Timing::new(request.heartbeat_ms, request.failure_timeout_ms, request.max_lag_ms);
        timing
            .check()
            .map_err(|error| ControlError::from_error(400, "The times do not fit", &error))?;
        let (pair, generation) = self.membership()?;
        let arbiter = pair::arbiter::announce(&request.arbiter_url, &pair, generation, &self.who)
            .map_err(|reason| {
            let what = "The arbiter cannot be used; both hosts must reach it".to_owned();
            ControlError { status: 500, chain: vec![what, reason] }
        })?;
        let stream = connect(&request.backup_url)?;
        let terms = Terms {
            pair,
            generation,
            timing,
            log_buffer_bytes: request.log_buffer_bytes,
            arbiter_url: request.arbiter_url.to_string(),
            disk_mode: request.disk_mode,
        };
        let parts = self.primary_parts(terms, stream, arbiter)?;
        let primary = PrimaryThread::start(parts).map_err(|reason| {
            let what = format!("The VM is not protected: {} did not take it", request.backup_url);
            ControlError { status: 500, chain: vec![what, reason] }
        })?;
        self.primary = Some(primary);
        Ok(())
    }

    /// The pair's identity, made when a VM is first protected.
    fn membership(&self) -> Result<(PairId, Generation), ControlError> {
        let mut state = self.lock();
        if let Some(membership) = &state.membership {
            return Ok(membership.clone());
        }
        let pair = PairId::new(format!("vm-{}", random_hex()))
            .map_err(|error| ControlError::from_error(500, "Cannot name the pair", &error))?;
        let membership = (pair, Generation(1));
        state.membership = Some(membership.clone());
        Ok(membership)
    }

    fn primary_parts(
        &self,
        terms: Terms,
        stream: TcpStream,
        arbiter: Arc<dyn ft::Arbiter>,
    ) -> Result<PrimaryParts, ControlError> {
        let state = self.lock();
        let vm =
            state.vm.as_ref().ok_or_else(|| ControlError::new(500, "The VM is not running"))?;
        let config = serde_json::to_string(vm.config()).map_err(|error| {
            ControlError::from_error(500, "Cannot encode the configuration", &error)
        })?;
        let header = CloneHeader { config, host: vm.host().clone() };
        let capabilities = Capabilities {
            cpu_model: MACHINE_MODEL.into(),
            memory_bytes: vm.config().memory.size,
            devices: devices(vm.config()),
            disk_modes: vec![terms.disk_mode],
        };
        let observer = Observer {
            state: Arc::clone(&self.state),
            doorbell: self.doorbell.clone(),
            events: self.events.clone(),
            pair: terms.pair.clone(),
        };
        Ok(PrimaryParts {
            config: PrimaryConfig {
                terms,
                who: self.who.clone(),
                capabilities,
                vm_config: crate::guest::encode(&header),
            },
            stream,
            arbiter,
            inbox: vm.inbox().clone(),
            memory: vm.memory().clone(),
            payload: Arc::clone(vm.payload()),
            outlet: Arc::clone(vm.back_halves()) as Arc<dyn Outlet>,
            observer: Box::new(observer),
        })
    }
}

impl Control for Vmm {
    fn state(&self) -> Option<VmState> {
        let state = self.lock();
        match (&state.config, &state.vm) {
            (_, Some(_)) if state.halted => Some(VmState::Shutdown),
            (_, Some(vm)) if vm.paused() => Some(VmState::Paused),
            (_, Some(_)) => Some(VmState::Running),
            (Some(_), None) => Some(VmState::Created),
            (None, None) => None,
        }
    }

    fn create(&mut self, config: VmConfig) -> Result<(), ControlError> {
        if self.receiver.is_some() {
            return Err(ControlError::new(
                500,
                "This VMM waits for a primary: it gets its VM from there",
            ));
        }
        self.lock().config = Some(config);
        Ok(())
    }

    fn boot(&mut self) -> Result<(), ControlError> {
        let config = self.lock().config.clone();
        let mut config = config.ok_or_else(|| ControlError::new(404, "No VM is configured"))?;
        config.complete(random_bytes);
        config.validate().map_err(|error| {
            ControlError::from_error(error.status(), "The configuration cannot be booted", &error)
        })?;
        let vm = Vm::boot(&*self.hypervisor, &config, self.vm_doorbell())
            .map_err(|error| ControlError::from_error(500, "The VM could not boot", &error))?;
        let mut state = self.lock();
        state.config = Some(config);
        state.vm = Some(vm);
        Ok(())
    }

    fn delete(&mut self) -> Result<(), ControlError> {
        self.take_down("the VM was deleted");
        let mut state = self.lock();
        state.config = None;
        state.last = FtStatus::default();
        Ok(())
    }

    fn shutdown(&mut self) -> Result<(), ControlError> {
        self.take_down("the VM was shut down");
        Ok(())
    }

    fn reboot(&mut self) -> Result<(), ControlError> {
        let paused = self.state() == Some(VmState::Paused);
        self.with_inbox("The VM could not reboot", |inbox| {
            if paused {
                run_loop::ask(inbox, Command::Resume)?;
            }
            run_loop::ask(inbox, |reply| Command::Control(ft::Control::Reset, reply))
        })
    }

    fn pause(&mut self) -> Result<(), ControlError> {
        self.with_inbox("The VM could not be paused", |inbox| run_loop::ask(inbox, Command::Pause))
    }

    fn resume(&mut self) -> Result<(), ControlError> {
        self.with_inbox("The VM could not be resumed", |inbox| {
            run_loop::ask(inbox, Command::Resume)
        })
    }

    fn power_button(&mut self) -> Result<(), ControlError> {
        self.with_inbox("The power button could not be pressed", |inbox| {
            run_loop::ask(inbox, |reply| Command::Control(ft::Control::PowerButton, reply))
        })
    }

    fn info(&self) -> Result<VmInfo, ControlError> {
        let vm_state = self.state().ok_or_else(|| ControlError::new(404, "No VM is configured"))?;
        let device_tree = if vm_state.is_booted() {
            let view = self.with_inbox("The devices cannot be seen", |inbox| {
                run_loop::ask(inbox, Command::Look)
            })?;
            Some(view.device_tree)
        } else {
            None
        };
        let state = self.lock();
        let config = match (&state.vm, &state.config) {
            (Some(vm), _) => vm.config().clone(),
            (None, Some(config)) => config.clone(),
            (None, None) => return Err(ControlError::new(404, "No VM is configured")),
        };
        Ok(VmInfo { memory_actual_size: config.memory.size, config, state: vm_state, device_tree })
    }

    fn counters(&self) -> Result<Counters, ControlError> {
        let mut counters = self
            .with_inbox("The counters cannot be seen", |inbox| run_loop::ask(inbox, Command::Look))?
            .counters;
        let latencies = self.lock().vm.as_ref().map(|vm| vm.back_halves().counters());
        for (device, values) in latencies.unwrap_or_default() {
            counters.entry(device).or_default().extend(values);
        }
        Ok(counters)
    }

    fn snapshot(&mut self, config: &SnapshotConfig) -> Result<(), ControlError> {
        let what = "The snapshot could not be written";
        let fail =
            |error: &(dyn std::error::Error + 'static)| ControlError::from_error(500, what, error);
        let directory = config.directory().map_err(|error| fail(&error))?;
        let job = self.lock().vm.as_ref().map(Vm::snapshot);
        let job = job.ok_or_else(|| ControlError::new(500, "The VM is not running"))?;
        job.write(&directory).map_err(|error| fail(&error))
    }

    fn restore(&mut self, config: &RestoreConfig) -> Result<(), ControlError> {
        let what = "The VM could not be restored";
        let fail =
            |error: &(dyn std::error::Error + 'static)| ControlError::from_error(500, what, error);
        let directory = config.directory().map_err(|error| fail(&error))?;
        let vm = Vm::from_snapshot(&*self.hypervisor, &directory, self.vm_doorbell())
            .map_err(|error| fail(&error))?;
        let mut state = self.lock();
        state.config = Some(vm.config().clone());
        state.vm = Some(vm);
        drop(state);
        if config.resume { self.resume() } else { Ok(()) }
    }

    fn ft_receive(&mut self, config: &FtReceiveConfig) -> Result<(), ControlError> {
        if !self.hypervisor.counts_exactly() {
            let name = self.hypervisor.name();
            return Err(ControlError::new(
                500,
                format!(
                    "a backup needs a hypervisor that counts instructions exactly, and this VMM uses {name}: start dyad with --hypervisor soft"
                ),
            ));
        }
        if self.receiver.as_ref().is_some_and(|receiver| !receiver.ended()) {
            return Err(ControlError::new(500, "this VMM waits for a primary already"));
        }
        let what = format!("Cannot listen on {}", config.listen_url);
        let fail = |error: std::io::Error| ControlError::from_error(500, what.clone(), &error);
        let url = &config.listen_url;
        let listener = TcpListener::bind((url.host.as_str(), url.port)).map_err(fail)?;
        let host = Host {
            hypervisor: Arc::clone(&self.hypervisor),
            state: Arc::clone(&self.state),
            doorbell: self.doorbell.clone(),
            events: self.events.clone(),
            prepared: None,
        };
        let backup = BackupConfig { who: self.who.clone(), capabilities: pair::capabilities() };
        let make_host = Box::new(move || Box::new(host.again()) as Box<dyn BackupHost>);
        self.receiver = Some(Receiver::start(listener, backup, make_host).map_err(fail)?);
        Ok(())
    }

    fn ft_enable(&mut self, config: &FtEnableConfig) -> Result<(), ControlError> {
        config.validate().map_err(|error| {
            ControlError::from_error(400, "The VM cannot be protected in this way", &error)
        })?;
        self.protect(config)
    }

    fn ft_status(&self) -> Result<FtStatus, ControlError> {
        if let Some(primary) = &self.primary {
            return Ok(primary.status());
        }
        let mut status = self.lock().last.clone();
        if let Some(receiver) = &self.receiver {
            if let Some(backup) = receiver.current() {
                return Ok(backup.status());
            }
            if !receiver.ended() {
                status.role = "backup".into();
                status.state = "listening".into();
                status.peer = None;
            }
        }
        if status.role.is_empty() {
            status.role = "none".into();
            status.state = "unprotected".into();
        }
        Ok(status)
    }

    fn ft_failover(&mut self) -> Result<(), ControlError> {
        let result = match (&self.primary, self.receiver.as_ref().and_then(Receiver::current)) {
            (Some(primary), _) => primary.command(ft::primary::Input::HandOver),
            (None, Some(backup)) => backup.command(ft::backup::Input::TakeOver),
            (None, None) => Err("this VM is not protected".into()),
        };
        result.map_err(|reason| ControlError {
            status: 500,
            chain: vec!["There is nobody to fail over to".into(), reason],
        })
    }

    fn ft_disable(&mut self) -> Result<(), ControlError> {
        if self.primary.as_ref().is_none_or(PrimaryThread::ended) {
            let backup =
                self.receiver.as_ref().is_some_and(|receiver| receiver.current().is_some());
            let text = if backup {
                "this side is the backup: ask the primary's VMM"
            } else {
                "the VM is not protected"
            };
            return Err(ControlError::new(500, text));
        }
        let receiver = self.receiver.take();
        self.end_protection("protection was disabled");
        self.receiver = receiver;
        Ok(())
    }

    fn ended(&self) -> Option<VmEnd> {
        self.lock().end.clone()
    }
}

/// Tells the control thread that the guest has ended.
struct EndOfVm {
    state: Arc<Mutex<State>>,
    doorbell: Doorbell,
}

impl VmDoorbell for EndOfVm {
    fn powered_off(&self) {
        lock(&self.state).end = Some(VmEnd::PowerOff);
        self.doorbell.ring();
    }

    fn failed(&self, reason: String) {
        lock(&self.state).end = Some(VmEnd::Failure(reason));
        self.doorbell.ring();
    }
}

/// What a primary's ft thread reports.
struct Observer {
    state: Arc<Mutex<State>>,
    doorbell: Doorbell,
    events: EventMonitor,
    pair: PairId,
}

impl PrimaryObserver for Observer {
    fn changed(&self, state: &'static str, reason: Option<&str>) {
        tell_change(&self.events, "primary", state, reason);
    }

    fn protected(&self) {
        log::info!("the VM is protected");
    }

    fn abandoned(&self, reason: &str) {
        log::warn!("the VM is not protected: {reason}");
    }

    fn alone(&self, generation: Generation, failover: &Failover) {
        log::warn!("the VM runs on without a backup: {}", failover.cause);
        lock(&self.state).membership = Some((self.pair.clone(), generation));
    }

    fn halted(&self, reason: &str) {
        log::warn!("the VM has been halted here: {reason}");
        let mut state = lock(&self.state);
        state.halted = true;
        if let Some(vm) = &state.vm {
            vm.back_halves().halt_disks();
        }
        drop(state);
        self.doorbell.ring();
    }

    fn diverged(&self, point: ExecutionPoint, unequal: &Unequal) {
        log::error!("the backup's {} differs at point {}", unequal.component, point.0);
    }
}

/// Holds the VM of a backup.
struct Host {
    hypervisor: Arc<dyn Hypervisor>,
    state: Arc<Mutex<State>>,
    doorbell: Doorbell,
    events: EventMonitor,
    prepared: Option<Prepared>,
}

impl Host {
    /// For the next connection.
    fn again(&self) -> Self {
        Self {
            hypervisor: Arc::clone(&self.hypervisor),
            state: Arc::clone(&self.state),
            doorbell: self.doorbell.clone(),
            events: self.events.clone(),
            prepared: None,
        }
    }

    fn vm_doorbell(&self) -> Box<dyn VmDoorbell> {
        Box::new(EndOfVm { state: Arc::clone(&self.state), doorbell: self.doorbell.clone() })
    }
}

impl BackupHost for Host {
    fn prepare(&mut self, start: &CloneStart) -> Result<GuestMemory, String> {
        let header: CloneHeader = postcard::from_bytes(&start.config)
            .map_err(|error| format!("the primary's description of the VM is damaged: {error}"))?;
        let config: VmConfig = serde_json::from_str(&header.config)
            .map_err(|error| format!("the primary's configuration cannot be read: {error}"))?;
        config
            .validate()
            .map_err(|error| format!("the backup cannot run this VM: {}", chain(&error)))?;
        let prepared = Prepared::new(&*self.hypervisor, config, Some(header.host.clone()))
            .map_err(|error| format!("the backup cannot take this VM: {}", chain(&error)))?;
        let sectors = prepared.disk_sectors();
        if sectors != header.host.disk_sectors {
            return Err(format!(
                "the disks differ: {:?} sectors on the primary, {sectors:?} on the backup",
                header.host.disk_sectors
            ));
        }
        let memory = prepared.memory().clone();
        self.prepared = Some(prepared);
        Ok(memory)
    }

    fn load(
        &mut self,
        payload: Payload,
        state: CloneState,
        replay: Replay,
    ) -> Result<InboxSender<run_loop::Message>, String> {
        let prepared = self.prepared.take().ok_or("the state came before the configuration")?;
        let vm = prepared
            .replay(payload, &state.guest, state.paused, replay, self.vm_doorbell())
            .map_err(|error| format!("the backup cannot load this VM: {}", chain(&error)))?;
        let inbox = vm.inbox().clone();
        let mut shared = lock(&self.state);
        shared.config = Some(vm.config().clone());
        shared.vm = Some(vm);
        Ok(inbox)
    }

    fn outlet(&self) -> Option<Arc<dyn Outlet>> {
        let state = lock(&self.state);
        state.vm.as_ref().map(|vm| Arc::clone(vm.back_halves()) as Arc<dyn Outlet>)
    }

    fn changed(&mut self, state: &'static str, reason: Option<&str>) {
        tell_change(&self.events, "backup", state, reason);
    }

    fn protected(&mut self) {
        log::info!("this side protects the VM");
    }

    fn live(&mut self, terms: &Terms, status: FtStatus, generation: Generation) {
        let mut state = lock(&self.state);
        state.membership = Some((terms.pair.clone(), generation));
        state.last = status;
        let backends = state.vm.as_ref().map(|vm| Arc::clone(vm.back_halves()));
        drop(state);
        let Some(backends) = backends else { return };
        if let Err(error) = backends.start() {
            lock(&self.state).end = Some(VmEnd::Failure(chain(&error)));
            self.doorbell.ring();
        }
    }

    fn discarded(&mut self, reason: &str) {
        log::warn!("the backup was discarded: {reason}");
        self.prepared = None;
        let mut state = lock(&self.state);
        state.config = None;
        let vm = state.vm.take();
        state.last.reason = Some(reason.to_owned());
        drop(state);
        drop(vm);
    }
}

/// For the log and the event monitor.
fn tell_change(events: &EventMonitor, role: &str, state: &str, reason: Option<&str>) {
    match reason {
        Some(reason) => log::info!("{role}: {state}: {reason}"),
        None => log::info!("{role}: {state}"),
    }
    let reason = reason.unwrap_or_default();
    let properties = [("role", role), ("state", state), ("reason", reason)];
    events.event_with("ft", "changed", properties.map(|(name, value)| (name, value.to_owned())));
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An error with its causes, in one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
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

fn connect(url: &TcpUrl) -> Result<TcpStream, ControlError> {
    let what =
        format!("No backup answers at {url}: is dyad running there, and did it get ft.receive?");
    let fail = |error: std::io::Error| ControlError::from_error(500, what.clone(), &error);
    let mut last = std::io::Error::from(std::io::ErrorKind::AddrNotAvailable);
    for address in (url.host.as_str(), url.port).to_socket_addrs().map_err(fail)? {
        match TcpStream::connect_timeout(&address, CONNECT_TIMEOUT) {
            Ok(stream) => return Ok(stream),
            Err(error) => last = error,
        }
    }
    Err(fail(last))
}

/// The kinds of device that a configuration uses, as [`pair::capabilities`] names them.
fn devices(config: &VmConfig) -> Vec<String> {
    let mut devices = vec!["virtio-rng"];
    if !config.disks().is_empty() {
        devices.push("virtio-blk");
    }
    if !config.net().is_empty() {
        devices.push("virtio-net");
    }
    if config.console.mode != crate::config::ConsoleMode::Off {
        devices.push("virtio-console");
    }
    if config.serial.mode != crate::config::ConsoleMode::Off {
        devices.push("serial");
    }
    devices.into_iter().map(String::from).collect()
}

/// Host name, process and a random number: no other process has it, ever.
fn process_name() -> String {
    let host = nix::unistd::gethostname()
        .map(|name| name.to_string_lossy().into_owned())
        .unwrap_or_else(|_| "unknown".into());
    format!("{host}/{}/{}", std::process::id(), random_hex())
}

fn random_hex() -> String {
    let high = random_bytes();
    let low = random_bytes();
    high.iter().chain(&low).map(|byte| format!("{byte:02x}")).collect()
}

/// Host randomness for names and addresses, from the kernel. Never reaches a running guest.
fn random_bytes() -> [u8; 5] {
    use std::io::Read;
    let mut bytes = [0; 5];
    std::fs::File::open("/dev/urandom")
        .and_then(|mut file| file.read_exact(&mut bytes))
        .expect("every Linux has /dev/urandom");
    bytes
}
