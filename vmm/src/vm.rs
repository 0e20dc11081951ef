//! A VM of this process: its vCPU thread, its back halves, and what the control thread keeps of it.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{SystemTime, UNIX_EPOCH};

use hypervisor::{GuestMemory, Hypervisor};

use crate::backends::{BackendError, Backends, DiskImage, EventSink};
use crate::boot::{LoadError, Payload};
use crate::config::{ValidationError, VmConfig};
use crate::guest::{Guest, GuestError, GuestState};
use crate::machine::facts::{self, DiskSizes};
use crate::machine::{HostFacts, layout};
use crate::pair::marker::{self, Marked};
use crate::run_loop::disks::{DiskPlan, FollowedDisks};
use crate::run_loop::inbox::InboxSender;
use crate::run_loop::outgoing::Outlet;
use crate::run_loop::replay::Replay;
use crate::run_loop::{self, Command, CommandError, Mailbox, Message, Observer, VcpuThread, View};
use crate::snapshot::{self, SavedVm, SnapshotError};

/// Why a VM could not be started.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// It has no kernel.
    #[error("the configuration names no kernel")]
    NoKernel,
    /// Its files cannot be read.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// Its back halves cannot be opened.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// The guest cannot be made.
    #[error(transparent)]
    Guest(#[from] GuestError),
    /// Its image may not be what it seems.
    #[error(transparent)]
    Marked(#[from] Marked),
    /// Its memory cannot be had.
    #[error(transparent)]
    Hypervisor(#[from] hypervisor::Error),
    /// It cannot be read from a snapshot.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// It is not one that this program can run.
    #[error(transparent)]
    Config(#[from] ValidationError),
    /// Its images are not as large as when it was saved.
    #[error("the disk images have changed since the snapshot: {differences}")]
    Disks {
        /// What differs.
        differences: String,
    },
    /// A thread cannot be started.
    #[error("cannot start the vCPU thread")]
    Thread(#[source] std::io::Error),
}

/// A VM that is built but does not run yet: a backup being filled, or one about to boot.
pub struct Prepared {
    guest: Guest,
    mailbox: Mailbox,
    backends: Arc<Backends>,
    config: VmConfig,
    /// As it travels from host to host: with the paths of the first.
    travelling: VmConfig,
    host: HostFacts,
    memory: GuestMemory,
}

impl Prepared {
    /// Allocates memory, opens the back halves and builds the machine. `host` is `None` for a VM that is
    /// switched on here and now. `config` is complete and valid.
    pub fn new(
        hypervisor: &dyn Hypervisor,
        config: VmConfig,
        host: Option<HostFacts>,
    ) -> Result<Self, VmError> {
        let memory = hypervisor::memory::allocate(&layout::ram_ranges(config.memory.size))?;
        if config.memory.thp
            && let Err(error) = hypervisor::memory::allow_huge_pages(&memory)
        {
            log::info!("guest memory is without transparent huge pages: {error}");
        }
        let slot: Arc<OnceLock<InboxSender<Message>>> = Arc::default();
        let backends = Backends::open(&config, event_sink(Arc::clone(&slot)))?;
        let host = host.unwrap_or_else(|| HostFacts {
            boot_wall_ns: wall_ns(),
            disk_sectors: backends.disk_sectors(&config),
        });
        let guest = Guest::new(hypervisor, &config, memory.clone(), &host)?;
        let mailbox = Mailbox::new(&guest);
        let _ = slot.set(mailbox.sender.clone());
        let backends = Arc::new(backends);
        let travelling = config.clone();
        Ok(Self { guest, mailbox, backends, config, travelling, host, memory })
    }

    /// The memory, to be filled.
    #[must_use]
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Its configuration, complete.
    #[must_use]
    pub fn config(&self) -> &VmConfig {
        &self.config
    }

    /// The disks as they are here; a backup's must be as large as the primary's.
    #[must_use]
    pub fn disk_sectors(&self) -> Vec<u64> {
        self.backends.disk_sectors(&self.config)
    }

    /// The guest knows its disks by the sizes they had when it was saved: they must have them still.
    fn check_disks(&self) -> Result<(), VmError> {
        let sectors = self.disk_sectors();
        let saved = DiskSizes { place: "in the snapshot", sectors: &self.host.disk_sectors };
        let here = DiskSizes { place: "now", sectors: &sectors };
        let differences = facts::disk_differences(&self.config, saved, here);
        if differences.is_empty() {
            return Ok(());
        }
        Err(VmError::Disks { differences: differences.join("; ") })
    }

    /// Has the next backup be told `config`, whose paths are not those of this host.
    #[must_use]
    pub fn travelling_as(self, config: VmConfig) -> Self {
        Self { travelling: config, ..self }
    }

    /// Takes the images for this VM alone.
    pub fn lock_disks(&self) -> Result<(), BackendError> {
        self.backends.lock_disks()
    }

    /// The images, in the order of the configuration.
    #[must_use]
    pub fn images(&self) -> Vec<DiskImage> {
        self.backends.images(&self.config)
    }

    /// Boots the payload and runs.
    pub fn boot(mut self, payload: Payload, doorbell: Box<dyn VmDoorbell>) -> Result<Vm, VmError> {
        self.backends.lock_disks()?;
        marker::check(&self.config)?;
        self.guest.set_payload(Arc::new(payload.clone()));
        self.guest.boot()?;
        let vm = self.live(payload, false, doorbell)?;
        vm.backends.start()?;
        Ok(vm)
    }

    /// Goes on from a saved state; memory has been filled. Disk requests that were under way are issued
    /// again.
    pub fn restore(
        mut self,
        payload: Payload,
        state: &GuestState,
        doorbell: Box<dyn VmDoorbell>,
    ) -> Result<Vm, VmError> {
        self.backends.lock_disks()?;
        marker::check(&self.config)?;
        self.guest.set_payload(Arc::new(payload.clone()));
        self.guest.restore(state)?;
        for (device, request) in self.guest.machine().outstanding() {
            self.backends.block(device, request);
        }
        for (device, len) in self.guest.machine().entropy_wanted() {
            self.backends.entropy(device, len);
        }
        for (device, offloads) in self.guest.machine().offloads() {
            self.backends.set_offloads(device, offloads);
        }
        let vm = self.live(payload, true, doorbell)?;
        vm.backends.start()?;
        Ok(vm)
    }

    /// Replays a primary's log from `state`; memory has been filled. The back halves stay unstarted, but for disks that this
    /// side works with itself, as `plan` says.
    pub fn replay(
        mut self,
        payload: Payload,
        state: &GuestState,
        paused: bool,
        replay: Replay,
        plan: DiskPlan,
        doorbell: Box<dyn VmDoorbell>,
    ) -> Result<Vm, VmError> {
        self.guest.set_payload(Arc::new(payload.clone()));
        self.guest.restore(state)?;
        // Digests are about pages written from here on, on both sides.
        self.guest.take_dirty_pages()?;
        let replay = if plan.backup_has_disks() {
            self.backends.follow()?;
            let outlet = Arc::clone(&self.backends) as Arc<dyn Outlet>;
            replay.with_disks(&self.guest, FollowedDisks::new(plan, outlet))
        } else {
            replay
        };
        let shared = Arc::new(VmShared::new(paused, doorbell));
        let observer = Arc::clone(&shared) as Arc<dyn Observer>;
        let vcpu = VcpuThread::replay(self.guest, replay, paused, self.mailbox, observer)
            .map_err(VmError::Thread)?;
        Ok(Vm {
            vcpu,
            backends: self.backends,
            config: self.config,
            travelling: self.travelling,
            host: self.host,
            memory: self.memory,
            payload: Arc::new(payload),
            shared,
        })
    }

    fn live(
        self,
        payload: Payload,
        paused: bool,
        doorbell: Box<dyn VmDoorbell>,
    ) -> Result<Vm, VmError> {
        let shared = Arc::new(VmShared::new(paused, doorbell));
        let observer = Arc::clone(&shared) as Arc<dyn Observer>;
        let outlet = Arc::clone(&self.backends) as Arc<dyn Outlet>;
        let vcpu = VcpuThread::live(self.guest, outlet, paused, self.mailbox, observer)
            .map_err(VmError::Thread)?;
        Ok(Vm {
            vcpu,
            backends: self.backends,
            config: self.config,
            travelling: self.travelling,
            host: self.host,
            memory: self.memory,
            payload: Arc::new(payload),
            shared,
        })
    }
}

/// Told when the guest ended by itself. Called on the vCPU thread.
pub trait VmDoorbell: Send + Sync {
    /// The guest switched itself off.
    fn powered_off(&self);
    /// The VM cannot go on.
    fn failed(&self, reason: String);
}

/// A VM that runs, is paused, or follows a primary.
pub struct Vm {
    // Dropped first: nothing may call the back halves' sink or outlet while they close.
    vcpu: VcpuThread,
    backends: Arc<Backends>,
    config: VmConfig,
    travelling: VmConfig,
    host: HostFacts,
    memory: GuestMemory,
    payload: Arc<Payload>,
    shared: Arc<VmShared>,
}

impl Vm {
    /// Boots `config`, which is complete and valid.
    pub fn boot(
        hypervisor: &dyn Hypervisor,
        config: &VmConfig,
        doorbell: Box<dyn VmDoorbell>,
    ) -> Result<Self, VmError> {
        let payload = read_payload(config)?;
        Prepared::new(hypervisor, config.clone(), None)?.boot(payload, doorbell)
    }

    /// Reads a snapshot, whose files and images may be any by now: a configuration that is not valid or a disk of another
    /// size is refused. The VM is paused.
    pub fn from_snapshot(
        hypervisor: &dyn Hypervisor,
        directory: &Path,
        doorbell: Box<dyn VmDoorbell>,
    ) -> Result<Self, VmError> {
        let (config, saved) = snapshot::read(directory)?;
        config.validate()?;
        let payload = read_payload(&config)?;
        let prepared = Prepared::new(hypervisor, config, Some(saved.host))?;
        prepared.check_disks()?;
        snapshot::read_memory(directory, prepared.memory())?;
        prepared.restore(payload, &saved.guest, doorbell)
    }

    /// What is needed to write a snapshot without holding on to the VM.
    #[must_use]
    pub fn snapshot(&self) -> SnapshotJob {
        SnapshotJob {
            inbox: self.inbox().clone(),
            host: self.host.clone(),
            config: self.config.clone(),
            memory: self.memory.clone(),
        }
    }

    /// The way to its vCPU thread.
    #[must_use]
    pub fn inbox(&self) -> &InboxSender<Message> {
        self.vcpu.inbox()
    }

    /// Its back halves.
    #[must_use]
    pub fn back_halves(&self) -> &Arc<Backends> {
        &self.backends
    }

    /// Its configuration, complete.
    #[must_use]
    pub fn config(&self) -> &VmConfig {
        &self.config
    }

    /// Its configuration as clients see it: the pseudo-terminals it was given are named as files.
    #[must_use]
    pub fn shown_config(&self) -> VmConfig {
        let mut config = self.config.clone();
        if let Some(path) = self.backends.serial_pty() {
            config.serial.file = Some(path.to_owned());
        }
        if let Some(path) = self.backends.console_pty() {
            config.console.file = Some(path.to_owned());
        }
        config
    }

    /// Its configuration as a next backup is told it.
    #[must_use]
    pub fn travelling(&self) -> &VmConfig {
        &self.travelling
    }

    /// What the machine took from the host it was first started on.
    #[must_use]
    pub fn host(&self) -> &HostFacts {
        &self.host
    }

    /// Its memory.
    #[must_use]
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// What it boots from.
    #[must_use]
    pub fn payload(&self) -> &Arc<Payload> {
        &self.payload
    }

    /// Whether it is paused.
    #[must_use]
    pub fn paused(&self) -> bool {
        self.shared.paused.load(Ordering::Acquire)
    }

    /// Its devices as they are now.
    pub fn look(&self) -> Result<View, CommandError> {
        run_loop::ask(self.inbox(), Command::Look)
    }
}

/// A snapshot about to be written.
pub struct SnapshotJob {
    inbox: InboxSender<Message>,
    host: HostFacts,
    config: VmConfig,
    memory: GuestMemory,
}

impl SnapshotJob {
    /// Writes it; the VM must be paused.
    pub fn write(self, directory: &Path) -> Result<(), SnapshotFailure> {
        let state = run_loop::ask(&self.inbox, Command::Save)?;
        let saved = SavedVm::new(self.host, state);
        Ok(snapshot::write(directory, &self.config, &saved, &self.memory)?)
    }
}

/// Why a snapshot was not written.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotFailure {
    /// The VM did not give its state.
    #[error(transparent)]
    Command(#[from] CommandError),
    /// It could not be written.
    #[error(transparent)]
    Write(#[from] SnapshotError),
}

/// What the vCPU thread tells the control thread.
struct VmShared {
    paused: AtomicBool,
    doorbell: Box<dyn VmDoorbell>,
}

impl VmShared {
    fn new(paused: bool, doorbell: Box<dyn VmDoorbell>) -> Self {
        Self { paused: AtomicBool::new(paused), doorbell }
    }
}

impl Observer for VmShared {
    fn powered_off(&self) {
        self.doorbell.powered_off();
    }

    fn rebooted(&self) {
        log::info!("the guest was reset");
    }

    fn paused(&self, paused: bool) {
        self.paused.store(paused, Ordering::Release);
    }

    fn failed(&self, error: &GuestError) {
        self.doorbell.failed(error.to_string());
    }
}

/// Passes what happens outside to the vCPU thread, once there is one.
fn event_sink(inbox: Arc<OnceLock<InboxSender<Message>>>) -> EventSink {
    Arc::new(move |event| {
        let Some(inbox) = inbox.get() else { return };
        // Every back half bounds what it has under way, so the inbox need not.
        inbox.send(Message::Event(event));
    })
}

fn read_payload(config: &VmConfig) -> Result<Payload, VmError> {
    let payload = config.payload.as_ref().ok_or(VmError::NoKernel)?;
    let kernel = payload.kernel.as_deref().ok_or(VmError::NoKernel)?;
    let cmdline = payload.cmdline.as_deref().unwrap_or_default();
    Ok(Payload::read(kernel, payload.initramfs.as_deref(), cmdline, config.memory.size)?)
}

/// Nanoseconds since 1970.
fn wall_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use hypervisor::soft::SoftHypervisor;
    use serde_json::{Value, json};
    use tempfile::TempDir;
    use vm_memory::{Bytes, GuestAddress};

    use super::*;

    /// Where the byte is that tells one snapshot from another.
    const ADDRESS: GuestAddress = GuestAddress(0x10_0000);

    struct Silent;

    impl VmDoorbell for Silent {
        fn powered_off(&self) {}
        fn failed(&self, _reason: String) {}
    }

    /// A snapshot of a VM just powered on, with one disk of 16 sectors, `image`. Beside it is what it boots from.
    fn snapshot() -> TempDir {
        let directory = tempfile::tempdir().unwrap();
        write_snapshot(&directory, 0).unwrap();
        directory
    }

    /// Writes one to `directory`, of a VM with `byte` in its memory.
    fn write_snapshot(directory: &TempDir, byte: u8) -> Result<(), SnapshotError> {
        let path = |name: &str| directory.path().join(name);
        fs::write(path("kernel"), b"never looked at").unwrap();
        fs::write(path("image"), [0; 16 * 512]).unwrap();
        let config = json!({
            "payload": {"kernel": path("kernel")},
            "memory": {"size": 64 << 20},
            "disks": [{"path": path("image"), "id": "data"}],
            "serial": {"mode": "Null"},
            "console": {"mode": "Off"},
        });
        let mut config: VmConfig = serde_json::from_value(config).unwrap();
        config.complete(|| [0; 5]);
        config.validate().unwrap();
        let mut prepared = Prepared::new(&SoftHypervisor, config, None).unwrap();
        let saved = SavedVm::new(prepared.host.clone(), prepared.guest.save().unwrap());
        prepared.memory.write_obj(byte, ADDRESS).unwrap();
        snapshot::write(directory.path(), &prepared.config, &saved, &prepared.memory)
    }

    fn restored(directory: &TempDir) -> Result<Vm, VmError> {
        Vm::from_snapshot(&SoftHypervisor, directory.path(), Box::new(Silent))
    }

    #[test]
    fn a_disk_must_be_as_large_as_it_was() {
        let directory = snapshot();
        assert!(restored(&directory).unwrap().paused());
        let image = fs::File::options().write(true).open(directory.path().join("image")).unwrap();
        for sectors in [8, 32] {
            image.set_len(sectors * 512).unwrap();
            let error = restored(&directory).map(|_| ()).unwrap_err().to_string();
            let difference =
                format!("the disk 'data' has 16 sectors in the snapshot, {sectors} now");
            assert!(error.ends_with(&difference), "{error}");
        }
        image.set_len(16 * 512).unwrap();
        assert!(restored(&directory).is_ok());
    }

    fn byte(vm: &Vm) -> u8 {
        vm.memory().read_obj(ADDRESS).unwrap()
    }

    fn names(directory: &TempDir) -> Vec<String> {
        let entries = fs::read_dir(directory.path()).unwrap();
        let mut names: Vec<String> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_snapshot_that_fails_costs_neither_the_one_before_nor_leaves_a_part() {
        let directory = tempfile::tempdir().unwrap();
        write_snapshot(&directory, 1).unwrap();
        let before = names(&directory);
        for name in ["config.json", "memory-ranges", "state.json"] {
            // As good as a full disk: the file cannot be written.
            let blocked = directory.path().join(format!("{name}.unfinished"));
            fs::create_dir(&blocked).unwrap();
            let error = write_snapshot(&directory, 2).unwrap_err();
            assert!(error.to_string().contains(name), "{error}");
            fs::remove_dir(&blocked).unwrap();
            assert_eq!(names(&directory), before);
            assert_eq!(byte(&restored(&directory).unwrap()), 1);
        }
        // A process that was killed leaves what it had written.
        fs::write(directory.path().join("memory-ranges.unfinished"), "half").unwrap();
        write_snapshot(&directory, 3).unwrap();
        assert_eq!(names(&directory), before);
        assert_eq!(byte(&restored(&directory).unwrap()), 3);
    }

    #[test]
    fn a_pipe_in_a_snapshot_is_refused_and_waited_for_by_nobody() {
        let directory = snapshot();
        for name in ["config.json", "state.json", "memory-ranges"] {
            let path = directory.path().join(name);
            fs::remove_file(&path).unwrap();
            nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
            let error = restored(&directory).map(|_| ()).unwrap_err().to_string();
            assert!(error.contains(&format!("{name} is not a regular file")), "{error}");
            // Nor is one in the place of a file to be written.
            write_snapshot(&directory, 0).unwrap();
            assert!(restored(&directory).is_ok());
        }
    }

    #[test]
    fn pseudo_terminals_are_shown_and_not_kept() {
        let directory = snapshot();
        let path = directory.path().join("config.json");
        let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        config["serial"]["mode"] = "Pty".into();
        config["console"]["mode"] = "Pty".into();
        let config: VmConfig = serde_json::from_value(config).unwrap();
        let payload = read_payload(&config).unwrap();
        let mut prepared = Prepared::new(&SoftHypervisor, config, None).unwrap();
        let state = prepared.guest.save().unwrap();
        let vm = prepared.restore(payload, &state, Box::new(Silent)).unwrap();
        let shown = vm.shown_config();
        for file in [shown.serial.file, shown.console.file] {
            let file = file.unwrap();
            assert!(file.starts_with("/dev/pts") && file.exists(), "{}", file.display());
        }
        assert_eq!((&vm.config().serial.file, &vm.config().console.file), (&None, &None));
    }

    #[test]
    fn a_configuration_that_cannot_be_run_is_refused() {
        let directory = snapshot();
        let path = directory.path().join("config.json");
        let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        config["cpus"]["boot_vcpus"] = 2.into();
        config["cpus"]["max_vcpus"] = 2.into();
        fs::write(&path, config.to_string()).unwrap();
        let error = restored(&directory).map(|_| ()).unwrap_err();
        assert!(matches!(error, VmError::Config(_)), "{error}");
    }
}
