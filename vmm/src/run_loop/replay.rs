//! The driver of a backup: takes every event from the log, at the point where the primary applied it.
//!
//! What must hold: the guest never runs past the point of the last record received, so that whatever the
//! primary recorded next can still be applied at its place. Its outputs are kept until the log says that
//! the primary has released them. A guest that cannot follow the log has diverged; that is an error, it is
//! reported, and such a guest never goes live.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Instant;

use ft::{
    Control, Decoder, Entry, Event, ExecutionPoint, KeptOutputs, LogPosition, OutputNumber,
    PageHashes, Record, Unequal,
};
use hypervisor::{Anchor, Exit};

use super::disks::{FollowedDisks, Settled};
use super::flushes::Goal;
use super::live::Live;
use super::outgoing::{Outgoing, Outlet, Routed, route};
use crate::guest::{Guest, GuestError};

/// What a replaying guest reports as it goes. Called on the vCPU thread.
pub trait ReplayObserver: Send {
    /// Every record before `position` has been applied; the guest stands at `point`.
    fn executed(&mut self, position: LogPosition, point: ExecutionPoint);
    /// Every record received so far has been applied.
    fn log_empty(&mut self);
    /// All that the guest flushed before `position` is stable on this side's disks. Told once, when it was asked for.
    fn stable(&mut self, position: LogPosition);
    /// What was asked for waits for a disk of this side; `failed`: a flush failed there and is tried again. Until
    /// [`Self::stable`].
    fn awaits_stable(&mut self, device: u8, failed: bool);
    /// The guest waits for a disk of this side; `failed`: a request failed there and is tried again. Until the next
    /// [`Self::executed`].
    fn awaits_disk(&mut self, device: u8, failed: bool);
    /// A digest was compared: `Some` is the first unequal component, with this side's pages.
    fn digest(&mut self, point: ExecutionPoint, unequal: Option<(Unequal, PageHashes)>);
    /// The guest cannot follow the log.
    fn diverged(&mut self, reason: String);
}

/// What the vCPU thread does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// Ask again at once.
    Again,
    /// All received records are executed: wait for more, or go live.
    LogEmpty,
    /// A disk of this side has yet to do what the primary's has done: wait for it.
    AwaitsDisk,
    /// The primary paused the guest, or let it go on.
    Paused(bool),
    /// The guest switched itself off.
    PoweredOff,
    /// The guest started over.
    Rebooted,
    /// The guest diverged; it must not run on.
    Diverged,
}

/// Somebody wants all to be stable that the guest flushed before a position of the log.
struct Wanted {
    through: LogPosition,
    /// The flushes that this takes: known once the log is executed so far.
    goal: Option<Goal>,
}

/// See the module's documentation.
pub struct Replay {
    log: Decoder,
    /// The next record, and the position behind it.
    next: Option<(Record, LogPosition)>,
    /// The position behind the last record applied.
    executed: LogPosition,
    /// What the observer wants to hear of.
    wanted: Option<Wanted>,
    kept: KeptOutputs<Outgoing>,
    next_output: OutputNumber,
    /// When the last piece of the log came, for the clock of the live side.
    last_log: Instant,
    disks: FollowedDisks,
    observer: Box<dyn ReplayObserver>,
}

impl Replay {
    /// Replays a log that starts at `start`.
    #[must_use]
    pub fn new(start: ExecutionPoint, observer: Box<dyn ReplayObserver>) -> Self {
        Self {
            log: Decoder::new(start),
            next: None,
            executed: LogPosition(0),
            wanted: None,
            kept: KeptOutputs::default(),
            next_output: OutputNumber(1),
            last_log: Instant::now(),
            disks: FollowedDisks::none(),
            observer,
        }
    }

    /// Has this side do disk requests itself, first those that `guest` has under way.
    #[must_use]
    pub fn with_disks(mut self, guest: &Guest, mut disks: FollowedDisks) -> Self {
        for (device, request) in guest.machine().outstanding() {
            disks.issue(device, request);
        }
        self.disks = disks;
        self
    }

    /// A back half of this side has done something.
    pub fn completed(&mut self, event: Event) {
        self.disks.completed(event);
    }

    /// Takes the next bytes of the log, which came at `received`.
    pub fn receive(&mut self, bytes: Vec<u8>, received: Instant) {
        self.last_log = received;
        self.log.push(bytes);
    }

    /// Executes up to and including the next record.
    pub fn advance(&mut self, guest: &mut Guest) -> Result<Next, GuestError> {
        self.tell_stable(guest);
        if self.next.is_none() {
            self.next = match self.log.next_record() {
                Ok(next) => next,
                Err(error) => return Ok(self.diverged(error.to_string())),
            };
        }
        let Some((record, _)) = &self.next else {
            self.observer.log_empty();
            return Ok(Next::LogEmpty);
        };
        let point = record.point;
        let here = guest.point();
        if here == point {
            return self.apply_next(guest);
        }
        if here > point {
            return Ok(self.diverged(format!(
                "the log holds a record for point {}, but the guest stands at {}",
                point.0, here.0
            )));
        }
        let exit = guest.run(Some(point))?;
        if exit == Exit::Kicked {
            // Not a point the primary knows. What the devices have handed out goes with the next output.
            return Ok(Next::Again);
        }
        if let Some(next) = self.drain_effects(guest)? {
            return Ok(next);
        }
        match exit {
            Exit::Until | Exit::Kicked | Exit::Stopped => Ok(Next::Again),
            Exit::Halted if guest.point() == point => Ok(Next::Again),
            Exit::Halted => Ok(self.diverged(format!(
                "the guest sleeps at point {}, the primary's ran on to {}",
                guest.point().0,
                point.0
            ))),
            Exit::Shutdown => {
                guest.reboot()?;
                Ok(Next::Rebooted)
            }
        }
    }

    /// Has all that the guest flushes before `through` made stable as soon as it is executed, and the observer told.
    pub fn make_stable_through(&mut self, through: LogPosition) {
        self.wanted = Some(Wanted { through, goal: None });
    }

    fn tell_stable(&mut self, guest: &Guest) {
        let Some(wanted) = self.wanted.as_mut().filter(|wanted| wanted.through <= self.executed)
        else {
            return;
        };
        let goal = wanted.goal.get_or_insert_with(|| self.disks.goal());
        match self.disks.reach(goal, guest.tsc()) {
            Some((device, failed)) => self.observer.awaits_stable(device, failed),
            None => {
                self.observer.stable(wanted.through);
                self.wanted = None;
            }
        }
    }

    /// Whether all is stable that the guest has flushed on this side's disks; if not, that is under way, and completions will
    /// come. Asked when the log is empty, before [`Self::go_live`].
    pub fn make_stable(&mut self, guest: &Guest) -> bool {
        self.disks.make_stable(guest.tsc())
    }

    /// The log has ended and been executed: what was still to come out comes out now, and the guest runs
    /// on alone.
    pub fn go_live(mut self, guest: &Guest, outlet: &Arc<dyn Outlet>) -> Live {
        outlet.announce();
        // Disk requests are re-issued from the devices' own books, which also know the reads; what was
        // kept here besides is frames and console bytes.
        let disks = self.disks.under_way();
        let mut begun: BTreeSet<(u8, u64)> = disks.running.iter().copied().collect();
        begun.extend(disks.done.iter().filter_map(|event| match event {
            Event::DiskCompletion { device, request, .. } => Some((*device, *request)),
            _ => None,
        }));
        for (device, request) in guest.machine().outstanding() {
            if !begun.contains(&(device, request.id)) {
                outlet.block_patiently(device, request);
            }
        }
        for (device, len) in guest.machine().entropy_wanted() {
            outlet.entropy(device, len);
        }
        for (device, offloads) in guest.machine().offloads() {
            outlet.set_offloads(device, offloads);
        }
        for (_, outgoing) in self.kept.take() {
            if !matches!(outgoing, Outgoing::Block { .. }) {
                outgoing.release(&**outlet);
            }
        }
        Live::new(guest, Arc::clone(outlet), guest.tsc(), self.last_log).with_disks_under_way(disks)
    }

    fn apply_next(&mut self, guest: &mut Guest) -> Result<Next, GuestError> {
        let Some((record, position)) = self.next.take() else { return Ok(Next::LogEmpty) };
        let point = record.point;
        if let Some(device) = self.disks.failing(guest.tsc()) {
            self.next = Some((record, position));
            self.observer.awaits_disk(device, true);
            return Ok(Next::AwaitsDisk);
        }
        self.disks.begin_flushes(guest.tsc());
        let entry = match record.entry {
            Entry::Event(event @ Event::DiskCompletion { .. }) => {
                match self.disks.settle(event, guest.tsc()) {
                    Settled::Apply(event) => Entry::Event(event),
                    Settled::Wait { event, device, failed } => {
                        self.next = Some((Record { point, entry: Entry::Event(event) }, position));
                        self.observer.awaits_disk(device, failed);
                        return Ok(Next::AwaitsDisk);
                    }
                }
            }
            entry => entry,
        };
        let record = Record { point, entry };
        let mut next = Next::Again;
        match record.entry {
            Entry::Event(Event::Anchor { tsc, rate }) => {
                guest.set_anchor(Anchor { point: record.point.0, tsc, rate });
            }
            Entry::Event(Event::Control(Control::Pause)) => next = Next::Paused(true),
            Entry::Event(Event::Control(Control::Resume)) => next = Next::Paused(false),
            // The ft thread acts on these; to the guest they are nothing.
            Entry::Event(Event::Control(Control::Disable | Control::HandOver)) => {}
            Entry::Event(event) => {
                guest.apply(&event)?;
                if let Some(end) = self.drain_effects(guest)? {
                    next = end;
                }
            }
            Entry::Output { number } => {
                if number >= self.next_output {
                    return Ok(self.diverged(format!(
                        "the primary made output {} at point {}, this side has made {}",
                        number.0,
                        record.point.0,
                        self.next_output.0 - 1
                    )));
                }
            }
            Entry::Released { through } => self.kept.released(through),
            Entry::Digest(theirs) => {
                let ours = guest.digest()?;
                let unequal = theirs.first_unequal(&ours);
                let reason = unequal.as_ref().map(|part| format!("{} differs", part.component));
                let pages = guest.take_digest_pages();
                self.observer.digest(record.point, unequal.map(|unequal| (unequal, pages)));
                if let Some(reason) = reason {
                    return Ok(self.diverged(reason));
                }
            }
            Entry::Mark => {}
        }
        self.executed = position;
        self.observer.executed(position, record.point);
        Ok(next)
    }

    fn diverged(&mut self, reason: String) -> Next {
        self.observer.diverged(reason);
        Next::Diverged
    }

    fn drain_effects(&mut self, guest: &mut Guest) -> Result<Option<Next>, GuestError> {
        let mut end = None;
        for effect in std::mem::take(guest.effects()) {
            match route(effect) {
                Routed::Output(Outgoing::Block { device, request })
                    if !self.disks.leaves_to_primary(&request.op) =>
                {
                    self.disks.issue(device, request);
                }
                Routed::Output(outgoing) => {
                    let bytes = outgoing.size();
                    self.kept.keep(self.next_output, bytes, outgoing);
                    self.next_output = OutputNumber(self.next_output.0 + 1);
                }
                Routed::Block(device, request) => self.disks.issue(device, request),
                // Their answers come with the log, and so do frames as the primary's host makes them.
                Routed::Entropy(..) | Routed::Offloads(..) => {}
                Routed::PowerOff => end = Some(Next::PoweredOff),
                Routed::Reset => end = Some(Next::Rebooted),
            }
        }
        match end {
            Some(Next::Rebooted) => guest.reboot()?,
            Some(Next::PoweredOff) => self.disks.end(),
            _ => {}
        }
        Ok(end)
    }
}
