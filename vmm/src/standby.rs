//! The VM of a backup: made of what a primary sends, kept until it goes live or is worthless.

use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::Arc;

use ft::message::CloneStart;
use ft::search::MAX_STANDBYS;
use ft::{DiskMode, FtStatus, Generation, Terms};
use hypervisor::{GuestMemory, Hypervisor};

use crate::api::ft::DiskPath;
use crate::api::{ChosenSecurity, TcpUrl, VmEnd};
use crate::backends::DiskImage;
use crate::boot::Payload;
use crate::config::VmConfig;
use crate::machine::facts::{self, DiskSizes};
use crate::pair::backup::BackupHost;
use crate::pair::clone::{CloneHeader, CloneState};
use crate::pair::marker::{self, Part};
use crate::protection::Protection;
use crate::run_loop;
use crate::run_loop::disks::DiskPlan;
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
    /// Where disks have their images on this host, if not where the primary's configuration says.
    pub disks: Vec<DiskPath>,
    /// What is there before the primary's state has come.
    pub prepared: Option<Prepared>,
    /// What was agreed on about disks.
    pub plan: DiskPlan,
    /// The configuration of a VM whose images are made copies.
    pub mirrored: Option<VmConfig>,
}

/// `config` with the images of this host.
fn localized(config: &VmConfig, paths: &[DiskPath]) -> Result<VmConfig, String> {
    let mut config = config.clone();
    for DiskPath { id, path } in paths {
        let mut disks = config.disks.iter_mut().flatten();
        let disk = disks.find(|disk| disk.pci.id.as_ref() == Some(id)).ok_or_else(|| {
            format!("ft.receive names an image for the disk '{id}', which this VM does not have")
        })?;
        disk.path = Some(path.clone());
    }
    Ok(config)
}

/// Makes the images that are not there, empty and as large as the primary's; `sectors` are its sizes. Gives what was
/// made.
fn make_missing(config: &VmConfig, sectors: &[u64]) -> Result<Vec<PathBuf>, String> {
    let mut made = Vec::new();
    for (disk, sectors) in config.disks().iter().zip(sectors) {
        let Some(path) = disk.path.as_ref().filter(|_| !disk.readonly) else { continue };
        if path.exists() {
            continue;
        }
        let new = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
        let sized = new.and_then(|file| {
            // From here on it is there, whatever becomes of its size.
            made.push(path.clone());
            file.set_len(sectors.saturating_mul(512))
        });
        if let Err(error) = sized {
            discard_made(&made);
            return Err(format!("the backup cannot make disk image {}: {error}", path.display()));
        }
        log::info!("disk image {} was not there: made with {sectors} sectors", path.display());
    }
    Ok(made)
}

fn discard_made(made: &[PathBuf]) {
    for path in made {
        if let Err(error) = std::fs::remove_file(path) {
            log::warn!("cannot remove {}: {error}", path.display());
        }
    }
}

impl Standby {
    /// Opens everything for `config`, the primary's.
    fn open(
        &self,
        config: &VmConfig,
        header: &CloneHeader,
        terms: &Terms,
    ) -> Result<Prepared, String> {
        let local = localized(config, &self.disks)?;
        let mirrored = terms.disk_mode == DiskMode::Mirrored;
        if mirrored {
            marker::check_kinds(&local)?;
        }
        let primary_sectors = &header.host.disk_sectors;
        let made = if mirrored { make_missing(&local, primary_sectors)? } else { Vec::new() };
        let open = || -> Result<Prepared, String> {
            let prepared =
                Prepared::new(&*self.hypervisor, local.clone(), Some(header.host.clone()))
                    .map_err(|error| format!("the backup cannot take this VM: {}", chain(&error)))?
                    .travelling_as(config.clone());
            let sectors = prepared.disk_sectors();
            let there = DiskSizes { place: "on the primary", sectors: primary_sectors };
            let here = DiskSizes { place: "on the backup", sectors: &sectors };
            let differences = facts::disk_differences(&local, there, here);
            if !differences.is_empty() {
                return Err(differences.join("; "));
            }
            if mirrored {
                prepared.lock_disks().map_err(|error| {
                    format!(
                        "each side of a mirrored pair needs images of its own: {}; ft.receive on the backup can name \
                         others: disks=[ID=PATH,...]",
                        chain(&error)
                    )
                })?;
                marker::set(&local, Part::Backup, &terms.pair, terms.generation)?;
            }
            Ok(prepared)
        };
        open().inspect_err(|_| discard_made(&made))
    }
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
        let prepared = self.open(&config, &header, &start.terms)?;
        self.plan = DiskPlan::of(&start.terms);
        if self.plan == DiskPlan::Mirrored {
            for image in prepared.images() {
                log::warn!(
                    "disk image {} is being made a copy of the primary's: until the VM is protected it is no VM's disk",
                    image.copy.path().display()
                );
            }
            self.mirrored = Some(prepared.config().clone());
        }
        let memory = prepared.memory().clone();
        self.prepared = Some(prepared);
        Ok(memory)
    }

    fn images(&mut self) -> Vec<DiskImage> {
        match (&self.prepared, self.plan) {
            (Some(prepared), DiskPlan::Mirrored) => prepared.images(),
            _ => Vec::new(),
        }
    }

    fn load(
        &mut self,
        payload: Payload,
        state: CloneState,
        replay: Replay,
    ) -> Result<InboxSender<run_loop::Message>, String> {
        let prepared = self.prepared.take().ok_or("the state came before the configuration")?;
        let vm = prepared
            .replay(
                payload,
                &state.guest,
                state.paused,
                replay,
                self.plan,
                self.shared.vm_doorbell(),
            )
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
        if let Some(config) = self.mirrored.take() {
            marker::clear(&config);
        }
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
        for path in
            self.mirrored.take().iter().flat_map(VmConfig::disks).filter_map(|d| d.path.as_ref())
        {
            log::warn!(
                "disk image {} is no VM's disk now; the next copy makes it one again",
                path.display()
            );
        }
        self.prepared = None;
        let mut state = self.shared.lock();
        state.config = None;
        let vm = state.vm.take();
        if let Some(vm) = &vm {
            vm.back_halves().halt_disks();
        }
        state.last.reason = Some(reason.to_owned());
        drop(state);
        drop(vm);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::DiskConfig;

    #[test]
    fn an_image_that_cannot_be_made_whole_leaves_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let paths = ["a", "b"].map(|name| directory.path().join(name));
        let disk =
            |path: &PathBuf| DiskConfig { path: Some(path.clone()), ..DiskConfig::default() };
        let disks = paths.iter().map(disk).collect();
        let config = VmConfig { disks: Some(disks), ..VmConfig::default() };
        // No file is as large as that.
        let refused = make_missing(&config, &[8, u64::MAX]).unwrap_err();
        assert!(refused.contains(paths[1].to_str().unwrap()), "{refused}");
        assert!(paths.iter().all(|path| !path.exists()));
        assert_eq!(make_missing(&config, &[8, 8]).unwrap(), paths);
        assert!(make_missing(&config, &[8, 8]).unwrap().is_empty());
        assert!(paths.iter().all(|path| path.metadata().unwrap().len() == 4096));
    }
}
