//! The VM of a backup: made of what a primary sends, kept until it goes live or is worthless.

use std::sync::Arc;

use ft::message::CloneStart;
use ft::search::MAX_STANDBYS;
use ft::{FtStatus, Generation, Terms};
use hypervisor::{GuestMemory, Hypervisor};

use crate::api::{ChosenSecurity, TcpUrl, VmEnd};
use crate::boot::Payload;
use crate::config::VmConfig;
use crate::machine::facts;
use crate::pair::backup::BackupHost;
use crate::pair::clone::{CloneHeader, CloneState};
use crate::protection::Protection;
use crate::run_loop;
use crate::run_loop::inbox::InboxSender;
use crate::run_loop::outgoing::Outlet;
use crate::run_loop::replay::Replay;
use crate::shared::{Shared, chain};
use crate::vm::Prepared;

/// Holds the VM of a backup.
pub struct Standby {
    /// What executes it.
    pub hypervisor: Arc<dyn Hypervisor>,
    /// Where the VM is put once it is loaded.
    pub shared: Shared,
    /// Looks for the next backup once the VM is live.
    pub protection: Protection,
    /// How it is to know that.
    pub security: ChosenSecurity,
    /// What is there before the primary's state has come.
    pub prepared: Option<Prepared>,
}

/// The next backup will be looked for where the primary says: it must make sense.
fn check_standbys(terms: &Terms) -> Result<(), String> {
    if terms.standbys.len() > MAX_STANDBYS + 1 {
        return Err(format!("the primary names {} standbys", terms.standbys.len()));
    }
    for url in &terms.standbys {
        url.parse::<TcpUrl>().map_err(|error| format!("a standby of the primary's: {error}"))?;
    }
    Ok(())
}

impl BackupHost for Standby {
    fn prepare(&mut self, start: &CloneStart) -> Result<GuestMemory, String> {
        check_standbys(&start.terms)?;
        let header: CloneHeader = postcard::from_bytes(&start.config)
            .map_err(|error| format!("the primary's description of the VM is damaged: {error}"))?;
        let config: VmConfig = serde_json::from_str(&header.config)
            .map_err(|error| format!("the primary's configuration cannot be read: {error}"))?;
        config
            .validate()
            .map_err(|error| format!("the backup cannot run this VM: {}", chain(&error)))?;
        let devices = facts::facts(&config, &header.host)
            .map_err(|error| format!("the backup cannot build this VM: {}", chain(&error)))?;
        let differences = facts::differences(&header.devices, &devices);
        if !differences.is_empty() {
            return Err(differences.join("; "));
        }
        let prepared = Prepared::new(&*self.hypervisor, config, Some(header.host.clone()))
            .map_err(|error| format!("the backup cannot take this VM: {}", chain(&error)))?;
        let sectors = prepared.disk_sectors();
        let differences =
            facts::disk_differences(prepared.config(), &header.host.disk_sectors, &sectors);
        if !differences.is_empty() {
            return Err(differences.join("; "));
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
            .replay(payload, &state.guest, state.paused, replay, self.shared.vm_doorbell())
            .map_err(|error| format!("the backup cannot load this VM: {}", chain(&error)))?;
        let inbox = vm.inbox().clone();
        let mut shared = self.shared.lock();
        shared.config = Some(vm.config().clone());
        shared.vm = Some(vm);
        Ok(inbox)
    }

    fn outlet(&self) -> Option<Arc<dyn Outlet>> {
        let state = self.shared.lock();
        state.vm.as_ref().map(|vm| Arc::clone(vm.back_halves()) as Arc<dyn Outlet>)
    }

    fn changed(&mut self, state: &'static str, reason: Option<&str>) {
        self.shared.protection_changed("backup", state, reason);
    }

    fn protected(&mut self) {
        log::info!("this side protects the VM");
    }

    fn live(&mut self, terms: &Terms, status: FtStatus, generation: Generation) {
        let mut state = self.shared.lock();
        state.membership = Some((terms.pair.clone(), generation));
        state.last = status;
        let backends = state.vm.as_ref().map(|vm| Arc::clone(vm.back_halves()));
        drop(state);
        let Some(backends) = backends else { return };
        match backends.start() {
            Ok(()) => self.protection.inherit(terms, self.security.clone()),
            Err(error) => self.shared.end(VmEnd::Failure(chain(&error))),
        }
    }

    fn discarded(&mut self, reason: &str) {
        log::warn!("the backup was discarded: {reason}");
        self.prepared = None;
        let mut state = self.shared.lock();
        state.config = None;
        let vm = state.vm.take();
        state.last.reason = Some(reason.to_owned());
        drop(state);
        drop(vm);
    }
}
