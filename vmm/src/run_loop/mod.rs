//! The vCPU thread: owns the guest and asks a driver, whenever the guest stops, what to apply and how
//! far to run.
//!
//! ```text
//!            back halves ──events──┐                     ┌── frames, disk requests ──> back halves
//!                                  ▼                     │        (at once, or through the gate)
//!   control ──commands──────>  inbox ──> driver ──> guest ──effects──> driver
//!                                  ▲        │
//!            logging channel ──log─┘        └── records ──> logging channel
//! ```
//!
//! There are two drivers. [`live::Live`] takes events as they arrive and lets host time drive guest time;
//! with a [`recorder::Recorder`] attached it is the primary's *record* driver, without one it is *solo*.
//! [`replay::Replay`] takes events from the log alone. A guest changes drivers by command: solo to record when
//! protection starts, record to solo when the backup is lost, replay to solo when the backup goes live.
//!
//! What must hold: only this thread touches the guest. In a protected VM nothing reaches the guest except
//! as a record that both sides apply at the same execution point.

pub mod disks;
pub mod flushes;
pub mod gather;
pub mod inbox;
pub mod live;
pub mod outgoing;
pub mod pacer;
pub mod ranges;
pub mod recorder;
pub mod replay;
pub mod throttle;

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Instant;

use ft::{Control, Event, ExecutionPoint, LogPosition};
use rt_channel::{Receiver, Sender};

use crate::api::Counters;
use crate::device_tree::DeviceTree;
use crate::guest::{Guest, GuestError, GuestState};
use inbox::{InboxSender, inbox};
use live::Live;
use outgoing::Outlet;
use recorder::Recorder;
use replay::Replay;

/// What reaches the vCPU thread from other threads.
pub enum Message {
    /// From a back half: a frame, a completion, input, entropy.
    Event(Event),
    /// From the backup's channel: the next bytes of the log, in order.
    Log {
        /// Whole records.
        bytes: Vec<u8>,
        /// When they came. A replaying vCPU thread reads no clock itself.
        received: Instant,
    },
    /// From the control or the ft thread.
    Command(Command),
    /// Look again: something shared has changed (the log has room again).
    Wake,
}

/// Answers a command.
pub type Reply<T> = Sender<Result<T, CommandError>>;

/// What the control and ft threads may ask of the vCPU thread.
pub enum Command {
    /// Stop executing; time stands still.
    Pause(Reply<()>),
    /// Go on.
    Resume(Reply<()>),
    /// An input that originates here: power button, reset.
    Control(Control, Reply<()>),
    /// What `vm.info` and `vm.counters` show of the devices.
    Look(Reply<View>),
    /// The guest less its memory. Only while paused.
    Save(Reply<GuestState>),
    /// Pages written since last asked. Execution goes on. Not while recording or replaying: dirty rounds
    /// belong to the digests there.
    TakeDirtyPages(Reply<Vec<u64>>),
    /// Stop executing and hand out the last dirty pages and the state, for a copy that is to start from
    /// exactly here. Ends with `Record` or `Thaw`.
    Freeze(Reply<Frozen>),
    /// Leave `Freeze` as it was entered.
    Thaw,
    /// Leave `Freeze` as the recording side of a pair.
    Record(Box<Recorder>, Reply<()>),
    /// Give away this fraction of the time, 0 to 1, while a copy is being made.
    Throttle(f64),
    /// Write the hand-over record and stand still behind it.
    HandOver,
    /// Stop recording; outputs leave at once from now on, and a guest that stood still for a hand-over
    /// goes on. The thread first waits for `drained` to close, which says that the outputs made before have
    /// been dealt with, so that none is overtaken.
    StopRecording {
        /// Held by the ft thread.
        drained: Receiver<()>,
    },
    /// Have all that the guest flushes before a position of the log made stable once it is executed, and tell the replay's
    /// observer.
    MakeStable {
        /// The position.
        through: LogPosition,
    },
    /// Stop replaying once the whole log received so far has been executed and what the guest has flushed is stable, and
    /// run on alone.
    GoLive(Box<GoLive>),
    /// Execute nothing more, for good: another side is live.
    Halt,
    /// End the thread.
    Quit,
}

/// The devices as an operator sees them.
pub struct View {
    /// Devices and the resources they hold now.
    pub device_tree: DeviceTree,
    /// What they have done.
    pub counters: Counters,
}

/// The guest at the point from which primary and backup part.
pub struct Frozen {
    /// Pages written since the last `TakeDirtyPages`.
    pub pages: Vec<u64>,
    /// All else.
    pub state: GuestState,
    /// Whether the guest was paused by its user when it was frozen.
    pub paused: bool,
    /// Where it stands.
    pub point: ExecutionPoint,
}

/// What a replaying guest needs to run on alone.
pub struct GoLive {
    /// Its way to the outside.
    pub outlet: Arc<dyn Outlet>,
    /// Told when the guest is live.
    pub done: Reply<ExecutionPoint>,
}

/// Why the vCPU thread refused a command.
#[derive(Debug, Clone, thiserror::Error)]
pub enum CommandError {
    /// Not in this state.
    #[error("the VM is {state}, it must be {needed}")]
    WrongState {
        /// What it is.
        state: &'static str,
        /// What it would have to be.
        needed: &'static str,
    },
    /// The guest failed while carrying it out.
    #[error("{0}")]
    Guest(String),
    /// The thread has ended.
    #[error("the VM has stopped")]
    Stopped,
}

/// What the vCPU thread tells its owner. Called on the vCPU thread.
pub trait Observer: Send + Sync {
    /// The guest powered itself off.
    fn powered_off(&self);
    /// The guest rebooted itself.
    fn rebooted(&self);
    /// The guest was paused or resumed, by command or by the log.
    fn paused(&self, paused: bool);
    /// Execution cannot go on.
    fn failed(&self, error: &GuestError);
}

enum Driver {
    Live(Live),
    Replay(Replay),
    /// A backup that diverged, or a side that lost its claim: the guest stands still for good.
    Halted,
}

/// The two ends of a vCPU thread's inbox, made before the thread since the back halves need one of them.
pub struct Mailbox {
    /// For everybody else.
    pub sender: InboxSender<Message>,
    receiver: Receiver<Message>,
}

impl Mailbox {
    /// An inbox for the thread that `guest` will run on.
    #[must_use]
    pub fn new(guest: &Guest) -> Self {
        let (sender, receiver) = inbox(guest.kicker());
        Self { sender, receiver }
    }
}

/// A running vCPU thread.
pub struct VcpuThread {
    inbox: InboxSender<Message>,
    handle: Option<JoinHandle<()>>,
}

impl VcpuThread {
    /// Starts the thread of a guest that lives and is not protected.
    pub fn live(
        guest: Guest,
        outlet: Arc<dyn Outlet>,
        paused: bool,
        mailbox: Mailbox,
        observer: Arc<dyn Observer>,
    ) -> std::io::Result<Self> {
        let live = Live::new(&guest, outlet, guest.tsc(), Instant::now());
        Self::spawn(guest, Driver::Live(live), paused, mailbox, observer)
    }

    /// Starts the thread of a backup's guest.
    pub fn replay(
        guest: Guest,
        replay: Replay,
        paused: bool,
        mailbox: Mailbox,
        observer: Arc<dyn Observer>,
    ) -> std::io::Result<Self> {
        Self::spawn(guest, Driver::Replay(replay), paused, mailbox, observer)
    }

    fn spawn(
        guest: Guest,
        driver: Driver,
        paused: bool,
        mailbox: Mailbox,
        observer: Arc<dyn Observer>,
    ) -> std::io::Result<Self> {
        let run_loop = RunLoop {
            guest,
            driver,
            inbox: mailbox.receiver,
            observer,
            paused,
            frozen: false,
            powered_off: false,
            deferred: Vec::new(),
            deferred_commands: Vec::new(),
            go_live: None,
        };
        let handle =
            std::thread::Builder::new().name("vcpu0".into()).spawn(move || run_loop.run())?;
        Ok(Self { inbox: mailbox.sender, handle: Some(handle) })
    }

    /// The way to reach it.
    #[must_use]
    pub fn inbox(&self) -> &InboxSender<Message> {
        &self.inbox
    }
}

impl Drop for VcpuThread {
    fn drop(&mut self) {
        self.inbox.send(Message::Command(Command::Quit));
        if let Some(handle) = self.handle.take() {
            let _ = handle.join();
        }
    }
}

/// Sends a command and waits for its answer.
pub fn ask<T>(
    inbox: &InboxSender<Message>,
    command: impl FnOnce(Reply<T>) -> Command,
) -> Result<T, CommandError> {
    let (reply, answer) = rt_channel::bounded(1);
    inbox.send(Message::Command(command(reply)));
    answer.recv().unwrap_or(Err(CommandError::Stopped))
}

/// State of the vCPU thread.
struct RunLoop {
    guest: Guest,
    driver: Driver,
    inbox: Receiver<Message>,
    observer: Arc<dyn Observer>,
    /// The user paused the guest.
    paused: bool,
    /// A copy is being made from this point.
    frozen: bool,
    powered_off: bool,
    /// Events that arrived while the guest stood still, in order.
    deferred: Vec<Event>,
    /// What the user asked for while a copy was being made or the guest was being handed over: it would be in neither the
    /// copied state nor the log.
    deferred_commands: Vec<Command>,
    /// To be done when the log has been executed and all is stable.
    go_live: Option<Box<GoLive>>,
}

/// Whether the thread goes on.
enum Flow {
    Continue,
    Quit,
}

impl RunLoop {
    fn run(mut self) {
        loop {
            match self.turn() {
                Ok(Flow::Continue) => {}
                Ok(Flow::Quit) => return,
                Err(error) => {
                    log::error!("the guest has stopped: {error}");
                    self.observer.failed(&error);
                    self.driver = Driver::Halted;
                }
            }
        }
    }

    /// Handles what is in the inbox, then lets the driver advance once.
    fn turn(&mut self) -> Result<Flow, GuestError> {
        while let Ok(message) = self.inbox.try_recv() {
            if let Flow::Quit = self.handle(message)? {
                return Ok(Flow::Quit);
            }
        }
        if self.frozen {
            return self.wait(None);
        }
        self.apply_deferred()?;
        match &mut self.driver {
            Driver::Halted => self.wait(None),
            // A paused backup goes on reading the log: that is where it learns that the pause is over.
            Driver::Live(live) if self.paused || self.powered_off => {
                live.flush();
                self.wait(None)
            }
            Driver::Live(live) => match live.advance(&mut self.guest)? {
                live::Next::Again => Ok(Flow::Continue),
                live::Next::Wait(timeout) => self.wait(timeout),
                live::Next::PoweredOff => self.power_off(),
                live::Next::Rebooted => self.rebooted(),
            },
            Driver::Replay(replay) => match replay.advance(&mut self.guest)? {
                replay::Next::Again => Ok(Flow::Continue),
                replay::Next::LogEmpty => {
                    match self.go_live.take_if(|_| replay.make_stable(&self.guest)) {
                        Some(go_live) => self.go_live(*go_live),
                        None => self.wait(None),
                    }
                }
                replay::Next::AwaitsDisk => self.wait(None),
                replay::Next::Paused(paused) => {
                    self.set_paused(paused);
                    Ok(Flow::Continue)
                }
                replay::Next::PoweredOff => {
                    // The primary tells what becomes of the pair. The log goes on to its end, which is here.
                    self.powered_off = true;
                    Ok(Flow::Continue)
                }
                replay::Next::Rebooted => self.rebooted(),
                replay::Next::Diverged => {
                    self.driver = Driver::Halted;
                    Ok(Flow::Continue)
                }
            },
        }
    }

    fn wait(&mut self, timeout: Option<std::time::Duration>) -> Result<Flow, GuestError> {
        let message = match timeout {
            Some(timeout) => self.inbox.recv_timeout(timeout).ok(),
            None => match self.inbox.recv() {
                Ok(message) => Some(message),
                Err(_) => return Ok(Flow::Quit),
            },
        };
        match message {
            Some(message) => self.handle(message),
            None => Ok(Flow::Continue),
        }
    }

    fn handle(&mut self, message: Message) -> Result<Flow, GuestError> {
        match message {
            Message::Wake => {}
            Message::Event(event) => self.event(event)?,
            Message::Log { bytes, received } => {
                if let Driver::Replay(replay) = &mut self.driver {
                    replay.receive(bytes, received);
                }
            }
            Message::Command(Command::Quit) => return Ok(Flow::Quit),
            Message::Command(command) => self.command(command)?,
        }
        Ok(Flow::Continue)
    }

    fn event(&mut self, event: Event) -> Result<(), GuestError> {
        if let Driver::Replay(replay) = &mut self.driver {
            // What this side's own disks have done. Of other back halves nothing is asked yet.
            replay.completed(event);
            return Ok(());
        }
        if self.stands_still() || !self.deferred.is_empty() {
            // Devices have only so many requests, and networks and consoles so many pieces, under way.
            self.deferred.push(event);
            return Ok(());
        }
        match &mut self.driver {
            Driver::Live(live) => live.apply(&mut self.guest, event),
            // A back half that is being stopped may still have something to say.
            Driver::Replay(_) | Driver::Halted => Ok(()),
        }
    }

    /// Whether nothing may be applied to the guest now.
    fn stands_still(&self) -> bool {
        let stalled = matches!(&self.driver, Driver::Live(live) if live.is_stalled());
        self.paused || self.frozen || stalled
    }

    fn apply_deferred(&mut self) -> Result<(), GuestError> {
        if self.stands_still() {
            return Ok(());
        }
        for event in std::mem::take(&mut self.deferred) {
            self.event(event)?;
        }
        Ok(())
    }

    fn command(&mut self, command: Command) -> Result<(), GuestError> {
        match command {
            Command::Pause(_) | Command::Resume(_) | Command::Control(..) if self.frozen => {
                self.deferred_commands.push(command);
            }
            Command::Pause(reply) => {
                let result = self.user_pause(true);
                let _ = reply.send(result);
            }
            Command::Resume(reply) => {
                let result = self.user_pause(false);
                let resumed = result.is_ok();
                let _ = reply.send(result);
                if resumed {
                    self.apply_deferred()?;
                }
            }
            Command::Control(control, reply) => {
                let result = match &mut self.driver {
                    Driver::Live(live) if !self.powered_off => {
                        live.apply(&mut self.guest, Event::Control(control))?;
                        Ok(())
                    }
                    _ => Err(self.wrong_state("running on this side")),
                };
                let _ = reply.send(result);
            }
            Command::Look(reply) => {
                let machine = self.guest.machine();
                let (device_tree, counters) = (machine.device_tree(), machine.counters());
                let _ = reply.send(Ok(View { device_tree, counters }));
            }
            Command::Save(reply) => {
                let result = self.save();
                let _ = reply.send(result);
            }
            Command::TakeDirtyPages(reply) => {
                let result = self.copyable().and_then(|()| {
                    self.guest
                        .take_dirty_pages()
                        .map_err(|error| CommandError::Guest(error.to_string()))
                });
                let _ = reply.send(result);
            }
            Command::Freeze(reply) => {
                let result = self.freeze();
                let _ = reply.send(result);
            }
            Command::Thaw => self.thaw()?,
            Command::Record(recorder, reply) => {
                let result = match &mut self.driver {
                    Driver::Live(live) => {
                        live.start_recording(&self.guest, recorder);
                        Ok(())
                    }
                    Driver::Replay(_) | Driver::Halted => Err(self.wrong_state("running")),
                };
                self.thaw()?;
                let _ = reply.send(result);
            }
            Command::Throttle(fraction) => {
                if let Driver::Live(live) = &mut self.driver {
                    live.set_throttle(fraction);
                }
            }
            Command::HandOver => {
                if let Driver::Live(live) = &mut self.driver {
                    live.hand_over(&self.guest);
                    self.frozen = true;
                }
            }
            Command::StopRecording { drained } => {
                if let Driver::Live(live) = &mut self.driver {
                    live.stop_recording();
                }
                let _ = drained.recv();
                self.thaw()?;
            }
            Command::Halt => {
                self.driver = Driver::Halted;
                // Whoever waits for an answer learns that the VM has stopped.
                self.deferred_commands.clear();
            }
            Command::MakeStable { through } => {
                if let Driver::Replay(replay) = &mut self.driver {
                    replay.make_stable_through(through);
                }
            }
            Command::GoLive(go_live) => match self.driver {
                Driver::Replay(_) => self.go_live = Some(go_live),
                Driver::Live(_) | Driver::Halted => {
                    let _ = go_live.done.send(Err(self.wrong_state("replaying")));
                }
            },
            Command::Quit => {}
        }
        Ok(())
    }

    fn user_pause(&mut self, pause: bool) -> Result<(), CommandError> {
        let needed = if pause { "running" } else { "paused" };
        if self.paused == pause || self.powered_off {
            return Err(self.wrong_state(needed));
        }
        let Driver::Live(live) = &mut self.driver else {
            return Err(self.wrong_state("running on this side"));
        };
        live.control(&self.guest, if pause { Control::Pause } else { Control::Resume });
        if !pause {
            live.resume(&self.guest);
        }
        self.set_paused(pause);
        Ok(())
    }

    fn set_paused(&mut self, paused: bool) {
        self.paused = paused;
        self.observer.paused(paused);
    }

    fn save(&mut self) -> Result<GuestState, CommandError> {
        if !self.paused {
            return Err(self.wrong_state("paused"));
        }
        let failed = |error: GuestError| CommandError::Guest(error.to_string());
        if let Driver::Live(live) = &mut self.driver {
            // Saving drops cached translations, which a backup must do at the same point.
            live.digest(&mut self.guest).map_err(failed)?;
        }
        self.guest.save().map_err(failed)
    }

    /// Whether a copy of the guest can be made now.
    fn copyable(&self) -> Result<(), CommandError> {
        match &self.driver {
            Driver::Live(live) if !live.is_recording() && !self.powered_off => Ok(()),
            _ => Err(self.wrong_state("running unprotected on this side")),
        }
    }

    fn freeze(&mut self) -> Result<Frozen, CommandError> {
        self.copyable()?;
        let mut frozen = || -> Result<Frozen, GuestError> {
            let state = self.guest.save()?;
            let pages = self.guest.take_dirty_pages()?;
            Ok(Frozen { pages, state, paused: self.paused, point: self.guest.point() })
        };
        let frozen = frozen().map_err(|error| CommandError::Guest(error.to_string()))?;
        self.frozen = true;
        Ok(frozen)
    }

    fn thaw(&mut self) -> Result<(), GuestError> {
        self.frozen = false;
        self.apply_deferred()?;
        for command in std::mem::take(&mut self.deferred_commands) {
            self.command(command)?;
        }
        Ok(())
    }

    fn go_live(&mut self, go_live: GoLive) -> Result<Flow, GuestError> {
        let Driver::Replay(replay) = std::mem::replace(&mut self.driver, Driver::Halted) else {
            return Ok(Flow::Continue);
        };
        let mut live = replay.go_live(&self.guest, &go_live.outlet);
        if self.paused {
            live.resume(&self.guest);
        }
        self.driver = Driver::Live(live);
        let _ = go_live.done.send(Ok(self.guest.point()));
        if self.powered_off {
            // The primary died between the power-off and telling of it.
            self.observer.powered_off();
        }
        Ok(Flow::Continue)
    }

    fn power_off(&mut self) -> Result<Flow, GuestError> {
        self.powered_off = true;
        self.observer.powered_off();
        Ok(Flow::Continue)
    }

    fn rebooted(&mut self) -> Result<Flow, GuestError> {
        self.observer.rebooted();
        Ok(Flow::Continue)
    }

    fn wrong_state(&self, needed: &'static str) -> CommandError {
        let state = match &self.driver {
            Driver::Halted => "halted",
            _ if self.powered_off => "powered off",
            Driver::Replay(_) => "a backup",
            Driver::Live(live) if live.is_recording() => "protected",
            Driver::Live(_) if self.paused => "paused",
            Driver::Live(_) => "running",
        };
        CommandError::WrongState { state, needed }
    }
}
