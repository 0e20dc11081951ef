//! The VMM of a process: at most one VM, driven by the control thread.
//!
//! Everything here happens on the control thread. It meets the ft threads and the vCPU thread in [`Shared`]
//! and in [`Protection`].

use std::net::TcpListener;
use std::path::PathBuf;
use std::sync::{Arc, MutexGuard};

use ft::BackupConfig;
use hypervisor::Hypervisor;

use crate::api::types::{RestoreConfig, SnapshotConfig};
use crate::api::{
    ChannelSecurity, ChosenSecurity, Control, ControlError, Counters, Doorbell, FtEnableConfig,
    FtReceiveConfig, FtStatus, VmEnd, VmInfo, VmState,
};
use crate::config::VmConfig;
use crate::event_monitor::EventMonitor;
use crate::pair;
use crate::pair::backup::{BackupControl, BackupHost};
use crate::pair::receive::Receiver;
use crate::pair::tls::Security;
use crate::protection::{Protection, Request};
use crate::run_loop::disks::DiskPlan;
use crate::run_loop::inbox::InboxSender;
use crate::run_loop::{self, Command, CommandError};
use crate::shared::{Shared, State};
use crate::standby::Standby;
use crate::vm::Vm;

/// One process's VMM.
pub struct Vmm {
    hypervisor: Arc<dyn Hypervisor>,
    /// Names this process among all that ever claim.
    who: String,
    shared: Shared,
    protection: Protection,
    /// Certificates for the logging channel, if a call names no others.
    tls_dir: Option<PathBuf>,
    receiver: Option<Receiver>,
}

impl Vmm {
    /// A VMM without a VM. `doorbell` wakes the control thread, `events` is told of changes.
    #[must_use]
    pub fn new(hypervisor: Arc<dyn Hypervisor>, doorbell: Doorbell, events: EventMonitor) -> Self {
        let (who, shared) = (process_name(), Shared::new(doorbell, events));
        let protection = Protection::new(who.clone(), shared.clone());
        Self { hypervisor, who, shared, protection, tls_dir: None, receiver: None }
    }

    /// The certificates of calls that name none.
    #[must_use]
    pub fn with_tls_dir(mut self, directory: Option<PathBuf>) -> Self {
        self.tls_dir = directory;
        self
    }

    /// How to know the other side of a logging channel, and that for now. `allowed` are the names a primary
    /// may have.
    fn security(
        &self,
        config: &ChannelSecurity,
        allowed: &[String],
    ) -> Result<(ChosenSecurity, Security), ControlError> {
        let chosen = config.chosen(self.tls_dir.as_ref()).map_err(|error| {
            ControlError::from_error(400, "The logging channel is not protected", &error)
        })?;
        if chosen == ChosenSecurity::Plain {
            if !allowed.is_empty() {
                let text =
                    "'allowed_peers' needs certificates: with insecure=on nobody's name is known";
                return Err(ControlError::new(400, text));
            }
            log::warn!(
                "insecure=on: whoever reaches the logging channel can read and change the guest"
            );
        }
        let security = chosen.load(allowed).map_err(|error| {
            ControlError::from_error(400, "The certificates cannot be used", &error)
        })?;
        Ok((chosen, security))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.shared.lock()
    }

    /// The backup held, unless it has gone live.
    fn backup(&self) -> Option<BackupControl> {
        self.receiver.as_ref()?.current().filter(|backup| backup.status().role == "backup")
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

    fn take_down(&mut self, reason: &str) -> Option<VmConfig> {
        // The backup must not outlive the VM.
        if let Err(reason) = self.protection.end(reason) {
            log::info!("no protection was ended: {reason}");
        }
        self.protection.forget();
        // Discards a backup that is not live.
        self.receiver = None;
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

    /// Whether a VM may be made here: a standby gets its own from a primary.
    fn check_free(&self) -> Result<(), ControlError> {
        if self.receiver.is_none() {
            return Ok(());
        }
        let text = "This VMM waits for a primary: it gets its VM from there (vm.delete ends that)";
        Err(ControlError::new(500, text))
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
        self.check_free()?;
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
        let vm = Vm::boot(&*self.hypervisor, &config, self.shared.vm_doorbell())
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
            (Some(vm), _) => vm.shown_config(),
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
        self.check_free()?;
        let what = "The VM could not be restored";
        let fail =
            |error: &(dyn std::error::Error + 'static)| ControlError::from_error(500, what, error);
        let directory = config.directory().map_err(|error| fail(&error))?;
        let vm = Vm::from_snapshot(&*self.hypervisor, &directory, self.shared.vm_doorbell())
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
        let (chosen, security) = self.security(&config.security, &config.allowed_peers)?;
        let what = format!("Cannot listen on {}", config.listen_url);
        let fail = |error: std::io::Error| ControlError::from_error(500, what.clone(), &error);
        let url = &config.listen_url;
        let listener = TcpListener::bind((url.host.as_str(), url.port)).map_err(fail)?;
        let (hypervisor, shared) = (Arc::clone(&self.hypervisor), self.shared.clone());
        let protection = self.protection.clone();
        let mut capabilities = pair::capabilities();
        if let Some(most) = config.max_memory_bytes {
            capabilities.memory_bytes = capabilities.memory_bytes.min(most);
        }
        let backup = BackupConfig { who: self.who.clone(), capabilities };
        let disks = config.disks.clone();
        let make_host = Box::new(move || {
            Box::new(Standby {
                hypervisor: Arc::clone(&hypervisor),
                shared: shared.clone(),
                protection: protection.clone(),
                security: chosen.clone(),
                disks: disks.clone(),
                prepared: None,
                plan: DiskPlan::default(),
                mirrored: None,
            }) as Box<dyn BackupHost>
        });
        self.receiver = Some(Receiver::start(listener, security, backup, make_host).map_err(fail)?);
        Ok(())
    }

    fn ft_enable(&mut self, config: &FtEnableConfig) -> Result<(), ControlError> {
        config.validate().map_err(|error| {
            ControlError::from_error(400, "The VM cannot be protected in this way", &error)
        })?;
        if !self.hypervisor.counts_exactly() {
            let name = self.hypervisor.name();
            return Err(ControlError::new(
                500,
                format!(
                    "protection in lockstep needs a hypervisor that counts instructions exactly; this VM runs on {name}: start dyad with --hypervisor soft"
                ),
            ));
        }
        if self.backup().is_some() {
            let text = "this side is the backup: ask the primary's VMM";
            return Err(ControlError::new(500, text));
        }
        let (chosen, _) = self.security(&config.security, &[])?;
        self.protection.enable(Request::of(config, chosen))
    }

    fn ft_status(&self) -> Result<FtStatus, ControlError> {
        // First the backup: it may go live while it is asked, and what is to be told then is the protection's.
        let backup = self.backup().map(|backup| backup.status());
        if let Some(status) = self.protection.status().or(backup) {
            return Ok(status);
        }
        let mut status = self.lock().last.clone();
        if self.receiver.as_ref().is_some_and(|receiver| !receiver.ended()) {
            status.role = "backup".into();
            status.state = "listening".into();
            status.peer = None;
        }
        if status.role.is_empty() {
            status.role = "none".into();
            status.state = "unprotected".into();
        }
        Ok(status)
    }

    fn ft_failover(&mut self) -> Result<(), ControlError> {
        let result = match self.backup() {
            Some(backup) => backup.command(ft::backup::Input::TakeOver),
            None => self.protection.hand_over(),
        };
        result.map_err(|reason| ControlError {
            status: 500,
            chain: vec!["There is nobody to fail over to".into(), reason],
        })
    }

    fn ft_disable(&mut self) -> Result<(), ControlError> {
        if self.backup().is_some() {
            let text = "this side is the backup: ask the primary's VMM";
            return Err(ControlError::new(500, text));
        }
        let ended = self.protection.end("protection was disabled");
        ended.map_err(|reason| ControlError::new(500, reason))
    }

    fn ended(&self) -> Option<VmEnd> {
        self.lock().end.clone()
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        self.protection.close();
    }
}

/// Host name, process and a random number: no other process has it, ever.
fn process_name() -> String {
    let host = nix::unistd::gethostname()
        .map(|name| name.to_string_lossy().into_owned())
        .unwrap_or_else(|_| "unknown".into());
    format!("{host}/{}/{}", std::process::id(), random_hex())
}

pub(crate) fn random_hex() -> String {
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
