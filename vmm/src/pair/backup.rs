//! The backup's ft thread: carries out what [`ft::Backup`] decides.
//!
//! It fills the guest's memory while the copy is being made, then feeds the log to the vCPU thread, and
//! has that thread go live when the state machine says so. The VM itself is built and owned by a
//! [`BackupHost`].

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use ft::backup::{Action, Input};
use ft::message::{CloneStart, PAGE_BYTES};
use ft::{
    Arbiter, Backup, BackupConfig, ExecutionPoint, FtStatus, Generation, LogPosition, PageHashes,
    Terms, Unequal,
};
use hypervisor::GuestMemory;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::boot_time;
use super::clone::CloneState;
use super::images::{Images, Told};
use super::side::{Core, Handle, Side};
use super::wire::Wire;
use crate::backends::DiskImage;
use crate::boot::Payload;
use crate::run_loop::inbox::InboxSender;
use crate::run_loop::outgoing::Outlet;
use crate::run_loop::replay::{Replay, ReplayObserver};
use crate::run_loop::{self, Command, GoLive};

/// No VM boots from more than this.
const MAX_PAYLOAD_BYTES: usize = 2 << 30;

/// The process around the ft thread: builds the VM and hears of its fate. Called on the ft thread.
pub trait BackupHost: Send {
    /// Makes the VM of `start` as far as possible without its memory: allocates that, opens disks and
    /// network without starting them. An error is told to the primary's operator.
    fn prepare(&mut self, start: &CloneStart) -> Result<GuestMemory, String>;
    /// The images of mirrored disks, in the order of the configuration, to be made copies of the primary's. None if
    /// the disks are shared.
    fn images(&mut self) -> Vec<DiskImage>;
    /// Memory and images are filled. Loads the rest and starts the vCPU thread on `replay`.
    fn load(
        &mut self,
        payload: Payload,
        state: CloneState,
        replay: Replay,
    ) -> Result<InboxSender<run_loop::Message>, String>;
    /// The back halves, not started.
    fn outlet(&self) -> Option<Arc<dyn Outlet>>;
    /// This side is in another state.
    fn changed(&mut self, state: &'static str, reason: Option<&str>);
    /// The VM is protected by this side.
    fn protected(&mut self);
    /// The VM runs here now; starts the back halves. `status` is what remains to be told of the pair.
    fn live(&mut self, terms: &Terms, status: FtStatus, generation: Generation);
    /// The copy is worthless: throw the VM away.
    fn discarded(&mut self, reason: &str);
}

/// The way to a backup's ft thread.
#[derive(Clone)]
pub struct BackupControl(Handle<Backup>);

impl BackupControl {
    /// Asks for a take-over, or for the copy to be discarded. Returns when it is under way.
    pub fn command(&self, input: Input) -> Result<(), String> {
        self.0.ask(input)
    }

    /// What the operator is shown.
    #[must_use]
    pub fn status(&self) -> FtStatus {
        self.0.status()
    }
}

/// How far the vCPU thread is; written by it, read by the ft thread.
#[derive(Debug, Default)]
struct Progress {
    at: Mutex<At>,
    digests: AtomicU64,
}

/// Where the guest stands: all of one moment.
#[derive(Clone, Copy, Debug, Default)]
struct At {
    position: LogPosition,
    point: ExecutionPoint,
    /// The disk that it waits for there, and whether a request failed on it.
    awaits: Option<(u8, bool)>,
    /// The disk on which something is yet to become stable, and whether a flush failed there.
    awaits_stable: Option<(u8, bool)>,
    /// What was flushed before it is stable: news that the ft thread has yet to take.
    stable: Option<LogPosition>,
}

impl Progress {
    fn at(&self) -> MutexGuard<'_, At> {
        self.at.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The vCPU thread's end of [`Progress`].
struct ProgressReporter {
    progress: Arc<Progress>,
    /// The latest published, and the latest the ft thread was woken for.
    executed: LogPosition,
    told: LogPosition,
    side: Handle<Backup>,
    waker: Arc<EventFd>,
}

impl ReplayObserver for ProgressReporter {
    fn executed(&mut self, position: LogPosition, point: ExecutionPoint) {
        // Published at once: a backup that falls behind never empties its log, and its lag is seen only
        // by what it reports on the way. The ft thread looks whenever it wakes, which it does for
        // every message and heartbeat.
        let mut at = self.progress.at();
        *at = At { position, point, awaits: None, ..*at };
        self.executed = position;
    }

    fn stable(&mut self, position: LogPosition) {
        let mut at = self.progress.at();
        *at = At { stable: Some(position), awaits_stable: None, ..*at };
        drop(at);
        let _ = self.waker.write(1);
    }

    fn awaits_stable(&mut self, device: u8, failed: bool) {
        let before = self.progress.at().awaits_stable.replace((device, failed));
        if before != Some((device, failed)) {
            let _ = self.waker.write(1);
        }
    }

    fn awaits_disk(&mut self, device: u8, failed: bool) {
        let mut at = self.progress.at();
        let failed = failed || at.awaits.is_some_and(|(_, failed)| failed);
        at.awaits = Some((device, failed));
        drop(at);
        // How far this side is, is told now, as with an empty log.
        self.log_empty();
    }

    fn log_empty(&mut self) {
        if self.told != self.executed {
            self.told = self.executed;
            let _ = self.waker.write(1);
        }
    }

    fn digest(&mut self, point: ExecutionPoint, unequal: Option<(Unequal, PageHashes)>) {
        match unequal {
            None => {
                self.progress.digests.fetch_add(1, Ordering::Relaxed);
            }
            Some((unequal, pages)) => {
                self.side.tell(Input::Unequal { point, unequal, pages });
            }
        }
    }

    fn diverged(&mut self, reason: String) {
        self.side.tell(Input::Failed { reason });
    }
}

/// Asks for the place where a VM can be held, once a primary wants one to be; an error is for that primary.
pub(super) type Admit = Box<dyn FnOnce() -> Result<Box<dyn BackupHost>, String> + Send>;

/// State of the ft thread.
pub(super) struct BackupSide {
    core: Core<Backup>,
    /// Until a primary has asked.
    admit: Option<Admit>,
    host: Option<Box<dyn BackupHost>>,
    memory: Option<GuestMemory>,
    payload: Vec<u8>,
    inbox: Option<InboxSender<run_loop::Message>>,
    /// Until mirrored disks are loaded for good.
    images: Option<Images>,
    arbiter: Option<Arc<dyn Arbiter>>,
    progress: Arc<Progress>,
    /// Pieces of log on their way to the vCPU thread. They wait for the acknowledgement to have been written: the
    /// primary's outputs depend on that, and to wake a thread takes time.
    log: Vec<run_loop::Message>,
}

impl BackupSide {
    pub(super) fn new(
        wire: Wire,
        config: BackupConfig,
        admit: Admit,
    ) -> std::io::Result<(Self, BackupControl)> {
        let core = Core::new(Backup::new(boot_time(), config), wire, Vec::new())?;
        let control = BackupControl(core.handle.clone());
        let side = Self {
            core,
            admit: Some(admit),
            host: None,
            memory: None,
            payload: Vec::new(),
            inbox: None,
            images: None,
            arbiter: None,
            progress: Arc::default(),
            log: Vec::new(),
        };
        Ok((side, control))
    }

    /// Runs until this side is live or discarded and everything it had to say is said. True if a VM went
    /// live; false if this process can receive another.
    pub(super) fn serve(mut self) -> bool {
        self.run();
        self.core.machine.state_name() == "live"
    }
}

impl Side for BackupSide {
    type Machine = Backup;

    fn core(&mut self) -> &mut Core<Backup> {
        &mut self.core
    }

    fn act(&mut self, action: Action) {
        if let Err(reason) = self.carry_out(action) {
            self.step(Input::Failed { reason });
        }
    }

    fn take(&mut self) {
        let (At { position, point, awaits, awaits_stable, .. }, stable) = {
            let mut at = self.progress.at();
            (*at, at.stable.take())
        };
        if position > LogPosition(0) && !self.core.machine.ended() {
            self.catch_up();
            let digests_compared = self.progress.digests.load(Ordering::Relaxed);
            self.step(Input::Executed { point, position, digests_compared });
        }
        if let Some(position) = stable {
            self.catch_up();
            self.step(Input::Stable { position });
        }
        if let Some(Err(reason)) = self.images.as_ref().map(Images::check) {
            self.catch_up();
            self.step(Input::Failed { reason });
        }
        if let Some((device, failed)) = awaits {
            self.catch_up();
            self.step(Input::AwaitsDisk { device, failed });
        }
        if let Some((device, failed)) = awaits_stable {
            self.catch_up();
            self.step(Input::AwaitsStable { device, failed });
        }
    }

    fn written(&mut self) {
        self.post_log();
    }

    fn update_status(&mut self) {
        let now = boot_time();
        let (machine, progress) = (&self.core.machine, &self.progress);
        self.core.status.update(now, machine.state_name(), |status| {
            machine.status(status);
            let At { awaits, awaits_stable, .. } = *progress.at();
            let waits = match (awaits.or(awaits_stable), machine.takes_over()) {
                _ if machine.ended() => return,
                (Some((device, true)), _) => format!(
                    "a request failed on this side's disk in slot {device} and is tried again; the backup falls behind"
                ),
                (Some((device, false)), true) => {
                    format!("waits for this side's disk in slot {device}")
                }
                _ => return,
            };
            status.reason = Some(match status.reason.take() {
                Some(reason) => format!("{reason}; {waits}"),
                None => waits,
            });
        });
    }
}

impl BackupSide {
    fn post_log(&mut self) {
        for piece in self.log.drain(..) {
            if let Some(inbox) = &self.inbox {
                inbox.post(piece);
            }
        }
    }

    fn carry_out(&mut self, action: Action) -> Result<(), String> {
        if !matches!(action, Action::Send(_) | Action::Replay { .. }) {
            self.post_log();
        }
        match action {
            Action::Send(message) => self.send(&message),
            Action::HangUp => self.core.link.hang_up(),
            Action::Prepare(start) => match self.prepare(&start) {
                Ok(()) => self.step(Input::Accept),
                Err(reason) => self.step(Input::Refuse { reason }),
            },
            Action::LoadPayload { bytes } => {
                if self.payload.len() + bytes.len() > MAX_PAYLOAD_BYTES {
                    return Err("the primary's kernel and initramfs are too large".into());
                }
                self.payload.extend_from_slice(&bytes);
            }
            Action::LoadPages { first, bytes } => self.load_pages(first, &bytes)?,
            Action::LoadZeroPages { first, count } => self.load_zero_pages(first, count)?,
            Action::CompareDisk { disk, first, hashes } => {
                self.images()?.compare(disk, first, hashes)?;
            }
            Action::LoadDisk { disk, offset, bytes } => {
                self.images()?.write(disk, offset, bytes)?
            }
            Action::ZeroDisk { disk, offset, len } => self.images()?.zero(disk, offset, len)?,
            Action::LoadState { point, bytes } => {
                if let Some(images) = &self.images {
                    images.settle()?;
                }
                self.load_state(point, &bytes)?;
                match &self.images {
                    Some(images) => images.make_stable()?,
                    None => self.step(Input::Loaded),
                }
            }
            Action::Replay { bytes, .. } => {
                self.log.push(run_loop::Message::Log { bytes, received: Instant::now() });
            }
            Action::Protected => {
                self.images = None;
                self.host()?.protected();
            }
            Action::MakeStable { through } => {
                if let Some(inbox) = &self.inbox {
                    inbox.send(run_loop::Message::Command(Command::MakeStable { through }));
                }
            }
            Action::Claim { pair, generation, who } => {
                if let Some(arbiter) = &self.arbiter {
                    self.core.claim(arbiter, pair, generation, who);
                }
            }
            Action::GoLive { generation, .. } => {
                self.write();
                self.go_live(generation)?;
            }
            Action::Discard { reason } => {
                // What follows may take long: the primary is to hear the last word before, and whoever looks to see it.
                self.write();
                self.update_status();
                // Whoever uses the images next finds them closed.
                self.images = None;
                if let Some(inbox) = &self.inbox {
                    inbox.send(run_loop::Message::Command(Command::Halt));
                }
                if let Some(host) = &mut self.host {
                    host.discarded(&reason);
                }
            }
            Action::Changed { state, reason } => match &mut self.host {
                Some(host) => host.changed(state, reason.as_deref()),
                None => log::info!("connection {state}: {}", reason.unwrap_or_default()),
            },
        }
        Ok(())
    }

    fn prepare(&mut self, start: &CloneStart) -> Result<(), String> {
        let (terms, who) = (&start.terms, self.core.machine.who());
        let arbiter =
            super::arbiter::verify(&terms.arbiter_url, &terms.pair, terms.generation, who)
                .map_err(|reason| format!("it cannot use the arbiter: {reason}"))?;
        self.arbiter = Some(arbiter);
        let admit = self.admit.take().ok_or("a second VM was sent")?;
        let host = self.host.insert(admit()?);
        self.memory = Some(host.prepare(start)?);
        let disks = host.images();
        if !disks.is_empty() {
            let side = self.core.handle.clone();
            let tell = move |told| {
                side.tell(match told {
                    Told::Compared { disk, first, differing } => {
                        Input::DiskCompared { disk, first, differing }
                    }
                    Told::Stable => Input::Loaded,
                    Told::Failed(reason) => Input::Failed { reason },
                });
            };
            self.images = Some(Images::start(disks, terms.timing.copy_disk_timeout(), tell)?);
        }
        Ok(())
    }

    fn images(&self) -> Result<&Images, String> {
        self.images.as_ref().ok_or_else(|| "disk blocks came, and no disk is mirrored".into())
    }

    fn host(&mut self) -> Result<&mut dyn BackupHost, String> {
        match &mut self.host {
            Some(host) => Ok(&mut **host),
            None => Err("there is no VM".into()),
        }
    }

    fn load_pages(&self, first: u64, bytes: &[u8]) -> Result<(), String> {
        let memory = self.memory.as_ref().ok_or("pages came before the configuration")?;
        let address = first.checked_mul(PAGE_BYTES as u64).ok_or("a page number is too large")?;
        memory
            .write_slice(bytes, GuestAddress(address))
            .map_err(|_| format!("page {first:#x} is not in the VM's memory"))
    }

    fn load_zero_pages(&self, first: u64, count: u64) -> Result<(), String> {
        // A count beyond memory fails at the first page that is not there.
        for page in first..first.saturating_add(count) {
            self.load_pages(page, &[0; PAGE_BYTES])?;
        }
        Ok(())
    }

    fn load_state(&mut self, point: ExecutionPoint, bytes: &[u8]) -> Result<(), String> {
        let damaged =
            |what: &str, error: postcard::Error| format!("the {what} is damaged: {error}");
        let payload = postcard::from_bytes(&std::mem::take(&mut self.payload))
            .map_err(|error| damaged("kernel payload", error))?;
        let state = postcard::from_bytes(bytes).map_err(|error| damaged("state", error))?;
        let reporter = ProgressReporter {
            progress: Arc::clone(&self.progress),
            executed: LogPosition(0),
            told: LogPosition(0),
            side: self.core.handle.clone(),
            waker: self.core.handle.waker(),
        };
        let replay = Replay::new(point, Box::new(reporter));
        self.inbox = Some(self.host()?.load(payload, state, replay)?);
        Ok(())
    }

    fn go_live(&mut self, generation: Generation) -> Result<(), String> {
        let (Some(inbox), Some(host), Some(terms)) =
            (&self.inbox, &mut self.host, self.core.machine.terms().cloned())
        else {
            return Err("there is no VM to go live".into());
        };
        let outlet = host.outlet().ok_or("the VM is gone")?;
        let point = run_loop::ask(inbox, |done| Command::GoLive(Box::new(GoLive { outlet, done })))
            .map_err(|error| error.to_string())?;
        log::info!("live in generation {} at point {}", generation.0, point.0);
        let mut status = FtStatus::default();
        self.core.machine.status(&mut status);
        host.live(&terms, status, generation);
        Ok(())
    }
}
