//! The primary's ft thread: carries out what [`ft::Primary`] decides.
//!
//! One thread owns the socket, the output gate and the state machine, and sleeps in one `ppoll`. The vCPU
//! thread hands it log bytes and outputs; nothing here ever waits for the vCPU thread except at the end of
//! protection, when the last outputs must not be overtaken.

use std::sync::Arc;
use std::sync::mpsc::RecvTimeoutError;
use std::thread::JoinHandle;
use std::time::Duration;

use ft::primary::{Action, Input};
use ft::status::{Failover, FtStatus};
use ft::{
    Arbiter, ExecutionPoint, Generation, LogPosition, OutputGate, Primary, PrimaryConfig, Unequal,
};
use hypervisor::GuestMemory;
use rt_channel::{Receiver, Sender};

use super::boot_time;
use super::clone::way::{CloneProgress, Compared, WayOut, way};
use super::clone::{CloneSender, CloneStep};
use super::marker::{self, Part};
use super::side::{Core, Handle, Side};
use super::wire::Wire;
use crate::backends::DiskImage;
use crate::boot::Payload;
use crate::config::VmConfig;
use crate::run_loop::disks::DiskPlan;
use crate::run_loop::inbox::InboxSender;
use crate::run_loop::outgoing::{Outgoing, Outlet};
use crate::run_loop::recorder::{Feedback, FromVcpu, HeldOutput, Recorder};
use crate::run_loop::{self, Command};

/// While more than this waits for the socket, no more of the clone is taken.
const CLONE_QUEUE_BYTES: usize = 4 << 20;

/// What the process around needs to know. Called on the ft thread.
pub trait PrimaryObserver: Send {
    /// Protection is in another state.
    fn changed(&self, state: &'static str, reason: Option<&str>);
    /// The backup takes the VM; it is being copied.
    fn accepted(&self);
    /// The VM survives the death of this host from now on.
    fn protected(&self);
    /// The backup did not take the VM, or protection never came about; the VM runs on as before.
    fn abandoned(&self, reason: &str);
    /// The VM runs on without a backup, in a new generation.
    fn alone(&self, generation: Generation, failover: &Failover);
    /// The VM goes on elsewhere, or may do: it has been stopped here.
    fn halted(&self, reason: &str);
    /// The backup's guest was found to differ.
    fn diverged(&self, point: ExecutionPoint, unequal: &Unequal);
}

/// What the ft thread works with.
pub struct PrimaryParts {
    /// Terms, name, capabilities, configuration.
    pub config: PrimaryConfig,
    /// A fresh connection to the backup.
    pub wire: Wire,
    /// Who decides in doubt.
    pub arbiter: Arc<dyn Arbiter>,
    /// The guest's thread.
    pub inbox: InboxSender<run_loop::Message>,
    /// The guest's memory.
    pub memory: GuestMemory,
    /// What the guest boots from.
    pub payload: Arc<Payload>,
    /// The back halves.
    pub outlet: Arc<dyn Outlet>,
    /// The images, if they are mirrored.
    pub disks: Vec<DiskImage>,
    /// The VM's configuration, as it is here.
    pub local: VmConfig,
    /// The control thread.
    pub observer: Box<dyn PrimaryObserver>,
}

/// A primary's ft thread.
pub struct PrimaryThread {
    handle: Handle<Primary>,
    /// Closed when the thread has ended.
    done: Receiver<()>,
}

impl PrimaryThread {
    /// Greets the backup, copies and protects, all in the background: the observer hears of it.
    pub fn start(parts: PrimaryParts) -> Result<Self, String> {
        let fail = |error: std::io::Error| format!("cannot set up the logging channel: {error}");
        let mut side = PrimarySide::new(parts).map_err(fail)?;
        let handle = side.core.handle.clone();
        let (running, done) = rt_channel::unbounded();
        std::thread::Builder::new()
            .name("ft-primary".into())
            .spawn(move || {
                side.run();
                drop(running);
            })
            .map_err(fail)?;
        Ok(Self { handle, done })
    }

    /// Asks for a hand-over, or for the end of protection. Returns when it is under way.
    pub fn command(&self, input: Input) -> Result<(), String> {
        self.handle.ask(input)
    }

    /// What the operator is shown.
    #[must_use]
    pub fn status(&self) -> FtStatus {
        self.handle.status()
    }

    /// Waits for the thread to end by itself: after `Disable`, `HandOver` or a failure. False if it has not
    /// within `timeout`.
    #[must_use]
    pub fn wait(&self, timeout: Duration) -> bool {
        matches!(self.done.recv_timeout(timeout), Err(RecvTimeoutError::Disconnected))
    }

    /// Whether the thread has ended.
    #[must_use]
    pub fn ended(&self) -> bool {
        self.wait(Duration::ZERO)
    }
}

struct CloneThread {
    way: WayOut,
    handle: JoinHandle<()>,
}

/// State of the ft thread.
struct PrimarySide {
    core: Core<Primary>,
    gate: OutputGate<Outgoing>,
    arbiter: Arc<dyn Arbiter>,
    inbox: InboxSender<run_loop::Message>,
    memory: GuestMemory,
    payload: Arc<Payload>,
    outlet: Arc<dyn Outlet>,
    /// What the backup does with disks.
    plan: DiskPlan,
    max_lag: Duration,
    /// Until they are copied.
    disks: Vec<DiskImage>,
    local: VmConfig,
    observer: Box<dyn PrimaryObserver>,
    feedback: Arc<Feedback>,
    /// The state machine wants the guest to wait.
    log_full: bool,
    /// Bytes of outputs in the gate, or of what the guest has recorded and nobody taken, beyond which it waits.
    max_held_bytes: u64,
    /// What the vCPU thread was told.
    stalled: bool,
    /// Kept until the recorder is made: once the recorder is dropped, `flushes` closes.
    flush_sender: Option<Sender<FromVcpu>>,
    flushes: Receiver<FromVcpu>,
    /// The sizes of all that were taken.
    taken_bytes: u64,
    clone: Option<CloneThread>,
    quiescing: Option<JoinHandle<()>>,
    /// The guest records, and what it records may be sent.
    clone_sent: bool,
    progress: Arc<CloneProgress>,
    /// Until when disk requests may begin, as the back halves know it.
    lease: Option<Duration>,
}

impl Side for PrimarySide {
    type Machine = Primary;

    fn core(&mut self) -> &mut Core<Primary> {
        &mut self.core
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::Send(message) => self.send(&message),
            Action::HangUp => self.core.link.hang_up(),
            Action::StartClone => self.start_clone(),
            Action::RoundTaken { round } => {
                if let Some(clone) = &self.clone {
                    clone.way.round_taken(round);
                }
            }
            Action::DiskDiffers { disk, first, differing } => {
                let compared = Compared { disk, first, differing };
                if let Some(clone) = &self.clone
                    && !clone.way.compared(compared)
                {
                    let reason = "the backup answers what it was not asked".to_owned();
                    self.step(Input::CloneFailed { reason });
                }
            }
            Action::Protected => self.observer.protected(),
            Action::BackupExecuted { position } => {
                self.gate.executed(position);
                self.feedback.executed(position);
            }
            Action::Release { through } => {
                let outlet = &self.outlet;
                let released = self
                    .gate
                    .release(boot_time(), through, |_, outgoing| outgoing.release(&**outlet));
                if let Some(number) = released {
                    self.feedback.release(number);
                }
            }
            Action::Claim { pair, generation, who } => {
                self.core.claim(&self.arbiter, pair, generation, who);
            }
            Action::Abandoned { reason } => {
                self.stop_recording();
                self.observer.abandoned(&reason);
            }
            Action::GoAlone { generation, failover } => {
                self.stop_recording();
                self.observer.alone(generation, &failover);
            }
            Action::Halt { reason } => {
                self.inbox.send(run_loop::Message::Command(Command::Halt));
                self.gate.discard();
                self.observer.halted(&reason);
            }
            Action::LogHandOver => {
                self.inbox.send(run_loop::Message::Command(Command::HandOver));
            }
            Action::Quiesce => self.quiesce(),
            Action::Throttle(fraction) => {
                if self.feedback.set_throttle(fraction) {
                    self.inbox.send(run_loop::Message::Wake);
                }
            }
            Action::Stall => self.log_full = true,
            Action::Unstall => self.log_full = false,
            Action::Diverged { point, unequal } => self.observer.diverged(point, &unequal),
            Action::Changed { state, reason } => self.observer.changed(state, reason.as_deref()),
        }
    }

    fn take(&mut self) {
        self.take_clone_steps();
        self.take_flushes();
    }

    fn stepped(&mut self) {
        self.renew_lease();
    }

    fn performed(&mut self) {
        self.stall();
    }

    fn update_status(&mut self) {
        let now = boot_time();
        let (machine, gate, progress) = (&self.core.machine, &self.gate, &self.progress);
        let stalled = self.stalled;
        self.core.status.update(now, machine.state_name(), |status| {
            machine.status(now, status);
            status.held_outputs = gate.held() as u64;
            status.stalled = stalled;
            status.held_output_bytes = gate.held_bytes() as u64;
            status.output_delay = gate.delays();
            progress.read(status.clone.get_or_insert_default());
            progress.read_disks(&mut status.clone_disks);
        });
    }
}

impl PrimarySide {
    fn new(parts: PrimaryParts) -> std::io::Result<Self> {
        let (flush_sender, flushes) = rt_channel::unbounded();
        let mut actions = Vec::new();
        let max_held_bytes = parts.config.terms.log_buffer_bytes;
        let plan = DiskPlan::of(&parts.config.terms);
        let max_lag = parts.config.terms.timing.max_lag();
        let machine = Primary::new(boot_time(), parts.config, &mut actions);
        Ok(Self {
            core: Core::new(machine, parts.wire, actions)?,
            gate: OutputGate::new(),
            arbiter: parts.arbiter,
            inbox: parts.inbox,
            memory: parts.memory,
            payload: parts.payload,
            outlet: parts.outlet,
            plan,
            max_lag,
            disks: parts.disks,
            local: parts.local,
            observer: parts.observer,
            feedback: Arc::default(),
            log_full: false,
            max_held_bytes,
            stalled: false,
            flush_sender: Some(flush_sender),
            flushes,
            taken_bytes: 0,
            clone: None,
            quiescing: None,
            clone_sent: false,
            progress: Arc::default(),
            lease: None,
        })
    }

    /// Outputs that have been released but not yet performed are the back halves' to stop.
    fn renew_lease(&mut self) {
        if self.plan == DiskPlan::Mirrored {
            return; // what this side writes to its own image nobody else ever sees
        }
        let until = self.core.machine.lease_until();
        let lease = (until < Duration::MAX).then_some(until);
        if lease != self.lease {
            self.lease = lease;
            self.outlet.set_lease(lease);
        }
    }

    fn take_clone_steps(&mut self) {
        while self.core.link.queued().is_some_and(|bytes| bytes < CLONE_QUEUE_BYTES) {
            let Some(step) = self.clone.as_ref().and_then(|clone| clone.way.next_step()) else {
                return;
            };
            self.catch_up();
            match step {
                CloneStep::Message(message) => self.send(&message),
                CloneStep::Sent => {
                    self.clone_sent = true;
                    self.step(Input::CloneSent);
                }
                CloneStep::Failed(reason) => self.step(Input::CloneFailed { reason }),
            }
        }
    }

    fn take_flushes(&mut self) {
        while self.clone_sent {
            // Before a flush is taken: what the peer has said may end the pair, and whatever is in the queue leaves then.
            self.catch_up();
            if self.core.machine.ended() {
                return;
            }
            let Ok(message) = self.flushes.try_recv() else { return };
            match message {
                FromVcpu::Flush(flush) => {
                    self.taken_bytes += flush.size_bytes();
                    for held in flush.outputs {
                        let size = held.outgoing.size();
                        let HeldOutput { number, position, behind, made, outgoing } = held;
                        self.gate.hold_behind(made, number, position, behind, size, outgoing);
                    }
                    for (point, pages) in flush.digests {
                        self.step(Input::Digested { point, pages });
                    }
                    let (end, point, bytes) = (flush.end, flush.point, flush.bytes);
                    self.step(Input::Log { end, point, bytes });
                }
                FromVcpu::HandedOver { end } => self.step(Input::HandOverLogged { end }),
            }
        }
    }

    /// The guest waits while the log buffers are full, and also while it has made more outputs than may be
    /// held: nobody bounds those if the backup is silent and the arbiter too. Nor is there anybody who takes what it records
    /// while the last of its copy is on the way.
    fn stall(&mut self) {
        let full = self.log_full
            || self.gate.held_bytes() as u64 > self.max_held_bytes
            || self.feedback.flushed_bytes().saturating_sub(self.taken_bytes) > self.max_held_bytes;
        if full != self.stalled {
            self.stalled = full;
            self.feedback.set_stalled(full);
            if !full {
                self.inbox.send(run_loop::Message::Wake);
            }
        }
    }

    fn start_clone(&mut self) {
        self.observer.accepted();
        let Some(flush_sender) = self.flush_sender.take() else { return };
        let (way, way_out) = way(self.core.handle.waker());
        let clone = CloneSender {
            inbox: self.inbox.clone(),
            memory: self.memory.clone(),
            payload: Arc::clone(&self.payload),
            disks: std::mem::take(&mut self.disks),
            way,
            progress: Arc::clone(&self.progress),
        };
        let (waker, feedback) = (self.core.handle.waker(), Arc::clone(&self.feedback));
        let (plan, max_lag) = (self.plan, self.max_lag);
        let recorder = move |point| {
            Recorder::new(point, flush_sender, waker, feedback)
                .with_plan(plan)
                .with_max_lag(max_lag)
        };
        let thread = std::thread::Builder::new().name("clone".into());
        let (outlet, local) = (Arc::clone(&self.outlet), self.local.clone());
        let (pair, generation) = self.core.machine.membership();
        let work = move || {
            // The backup is armed only after this has ended. From then on all that is completed on a shared disk is
            // stable, and an image of a pair is known for one.
            let ready = match plan {
                DiskPlan::Mirrored => marker::set(&local, Part::Primary, &pair, generation),
                DiskPlan::Primary | DiskPlan::BackupReads => outlet.set_write_through(true),
            };
            match ready {
                Ok(()) => clone.run(recorder),
                Err(reason) => clone.fail(reason),
            }
        };
        match thread.spawn(work) {
            Ok(handle) => self.clone = Some(CloneThread { way: way_out, handle }),
            Err(error) => {
                self.step(Input::CloneFailed { reason: format!("cannot start a thread: {error}") });
            }
        }
    }

    /// Frames and console bytes leave in the call that releases them; only disk requests take time.
    fn quiesce(&mut self) {
        if self.plan == DiskPlan::Mirrored {
            return self.step(Input::Quiesced);
        }
        let outlet = Arc::clone(&self.outlet);
        let handle = self.core.handle.clone();
        let close = move || {
            outlet.close_disks();
            handle.tell(Input::Quiesced);
        };
        match std::thread::Builder::new().name("quiesce".into()).spawn(close) {
            Ok(handle) => self.quiescing = Some(handle),
            // Without it the backup waits for the lease to run out, as after a failure.
            Err(error) => log::warn!("cannot start a thread: {error}"),
        }
    }

    /// Lets the guest run on unrecorded, with every output it has made released in order.
    fn stop_recording(&mut self) {
        // The peer need not wait for what follows to hear the last word.
        self.write();
        if let Some(clone) = self.clone.take() {
            // It may wait for room on its way; after this it either never records or has said so.
            drop(clone.way);
            let _ = clone.handle.join();
        }
        self.flush_sender = None;
        if let Some(handle) = self.quiescing.take() {
            // Else it could close the disks after they have been opened.
            let _ = handle.join();
        }
        if self.plan == DiskPlan::Mirrored {
            marker::clear(&self.local);
        }
        self.outlet.open_disks();
        if let Err(error) = self.outlet.set_write_through(false) {
            log::warn!("{error}");
        }
        let (draining, drained) = rt_channel::unbounded::<()>();
        self.inbox.send(run_loop::Message::Command(Command::StopRecording { drained }));
        let outlet = Arc::clone(&self.outlet);
        self.gate.release(boot_time(), LogPosition(u64::MAX), |_, outgoing| {
            outgoing.release(&*outlet);
        });
        // Ends when the vCPU thread drops its recorder.
        while let Ok(message) = self.flushes.recv() {
            if let FromVcpu::Flush(flush) = message {
                for held in flush.outputs {
                    held.outgoing.release(&*outlet);
                }
            }
        }
        drop(draining);
    }
}

#[cfg(test)]
mod tests;
