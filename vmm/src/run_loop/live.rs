//! The driver of a guest that lives: solo, or the primary of a pair.
//!
//! Events are applied where the guest happens to stop, in the order they arrive. With a [`Recorder`] each is
//! logged with that point, and each output waits for its place in the log to be acknowledged; without one
//! outputs leave at once. Nothing else differs, so that a guest behaves alike protected and not.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ft::{Control, Entry, Event};
use hypervisor::{Anchor, Exit};
use virtio_devices::BlockStatus;

use super::disks::{DiskPlan, UnderWay};
use super::gather::Gathering;
use super::outgoing::{Outgoing, Outlet, Routed, route};
use super::pacer::Pacer;
use super::recorder::Recorder;
use super::throttle::Throttle;
use crate::guest::{Guest, GuestError};

/// Guest time between two digests of a recorded guest, in nanoseconds.
const DIGEST_INTERVAL_NS: u64 = 500_000_000;

/// What the vCPU thread does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// Ask again at once.
    Again,
    /// Wait for a message, at most this long.
    Wait(Option<Duration>),
    /// The guest switched itself off.
    PoweredOff,
    /// The guest started over.
    Rebooted,
}

/// Where something came from that the guest had not asked for.
enum Unasked {
    Frames(u8),
    Console(u8),
    Serial,
}

impl Unasked {
    fn of(event: &Event) -> Option<Self> {
        match event {
            Event::Frames { device, .. } => Some(Self::Frames(*device)),
            Event::ConsoleInput { device, .. } => Some(Self::Console(*device)),
            Event::SerialInput { .. } => Some(Self::Serial),
            Event::DiskCompletion { .. }
            | Event::Entropy { .. }
            | Event::Control(_)
            | Event::Anchor { .. } => None,
        }
    }

    fn is_backlogged(&self, guest: &Guest) -> bool {
        match self {
            Self::Frames(device) | Self::Console(device) => guest.machine().backlogged(*device),
            Self::Serial => guest.machine().serial_backlogged(),
        }
    }

    /// Lets the back half hand over more.
    fn ask(&self, outlet: &dyn Outlet) {
        match self {
            Self::Frames(device) => outlet.frames_taken(*device),
            Self::Console(device) => outlet.console_taken(*device),
            Self::Serial => outlet.serial_taken(),
        }
    }
}

/// See the module's documentation.
pub struct Live {
    pacer: Pacer,
    outlet: Arc<dyn Outlet>,
    recorder: Option<Box<Recorder>>,
    /// Execution point at which the next anchor is due.
    anchor_due: u64,
    /// The guest executed HLT and has not been woken.
    asleep: bool,
    next_digest_tsc: u64,
    /// Fraction of its time that the guest gives away to a copy in the making.
    copy_throttle: f64,
    throttle: Throttle,
    /// One for each batch of frames or piece of input applied that its device still holds some of.
    backlogged: Vec<Unasked>,
    next_flush_tsc: u64,
    gathering: Gathering,
    /// What this side's disks had done for a guest that was not so far.
    early: Vec<Event>,
    /// Requests that this side's disks had begun when the guest went live here.
    inherited: BTreeSet<(u8, u64)>,
    /// As those, and completed for the guest before: how they end is nothing to it.
    strays: BTreeSet<(u8, u64)>,
}

impl Live {
    /// Drives `guest` from now on; its clock read `guest_ns` at the instant `at`.
    pub fn new(guest: &Guest, outlet: Arc<dyn Outlet>, guest_ns: u64, at: Instant) -> Self {
        let point = guest.point().0;
        Self {
            pacer: Pacer::new(guest_ns, at, point),
            outlet,
            recorder: None,
            anchor_due: point,
            asleep: false,
            next_digest_tsc: 0,
            copy_throttle: 0.0,
            throttle: Throttle::default(),
            backlogged: Vec::new(),
            next_flush_tsc: 0,
            gathering: Gathering::default(),
            early: Vec::new(),
            inherited: BTreeSet::new(),
            strays: BTreeSet::new(),
        }
    }

    /// Goes on with what the disks of this side, which was a backup, have under way.
    #[must_use]
    pub fn with_disks_under_way(self, disks: UnderWay) -> Self {
        let UnderWay { done: early, running, strays } = disks;
        Self { early, inherited: running.into_iter().collect(), strays, ..self }
    }

    /// Becomes the recording side of a pair.
    pub fn start_recording(&mut self, guest: &Guest, mut recorder: Box<Recorder>) {
        recorder.begin(guest);
        self.next_digest_tsc = guest.tsc() + DIGEST_INTERVAL_NS;
        self.next_flush_tsc = guest.tsc();
        self.anchor_due = guest.point().0;
        self.recorder = Some(recorder);
    }

    /// Becomes solo. Outputs that wait in the gate are not this driver's business.
    pub fn stop_recording(&mut self) {
        self.flush();
        self.recorder = None;
    }

    /// Ends the log here, with the backup to go on from this point.
    pub fn hand_over(&mut self, guest: &Guest) {
        self.record(guest, Entry::Event(Event::Control(Control::HandOver)));
        if let Some(recorder) = &mut self.recorder {
            recorder.hand_over();
        }
    }

    /// Takes this fraction of its time from the guest, 0 to 1.
    pub fn set_throttle(&mut self, fraction: f64) {
        self.copy_throttle = fraction;
    }

    /// Whether a log is being written.
    pub fn is_recording(&self) -> bool {
        self.recorder.is_some()
    }

    /// Whether the guest waits for room in the log. What is applied to it is logged too, and has to wait alike.
    pub fn is_stalled(&self) -> bool {
        self.recorder.as_ref().is_some_and(|recorder| recorder.stalled())
    }

    /// Guest time stood still until now.
    pub fn resume(&mut self, guest: &Guest) {
        self.pacer.resume_at(guest.tsc(), guest.point().0);
        self.anchor_due = guest.point().0;
    }

    /// Applies an input here and logs it.
    pub fn apply(&mut self, guest: &mut Guest, event: Event) -> Result<(), GuestError> {
        if self.is_stray(&event) || self.issue_again(guest, &event) {
            return Ok(());
        }
        self.wake(guest)?;
        let recorder = self.recorder.as_mut();
        let stripped = recorder.and_then(|recorder| recorder.logged(guest, &event));
        guest.apply(&event)?;
        self.backlogged.extend(Unasked::of(&event));
        self.record(guest, Entry::Event(stripped.unwrap_or(event)));
        self.drain_effects(guest)?;
        self.take_more(guest);
        Ok(())
    }

    fn is_stray(&mut self, event: &Event) -> bool {
        matches!(event, Event::DiskCompletion { device, request, .. } if self.strays.remove(&(*device, *request)))
    }

    /// A request that was under way when the guest went live here is not reported as failed before it was tried as
    /// patiently as one that is issued again.
    fn issue_again(&mut self, guest: &Guest, event: &Event) -> bool {
        let &Event::DiskCompletion { device, request: id, status, .. } = event else {
            return false;
        };
        if !self.inherited.remove(&(device, id)) || status == BlockStatus::Ok.byte() {
            return false;
        }
        let mut all = guest.machine().outstanding().into_iter();
        let found = all.find(|(slot, request)| *slot == device && request.id == id);
        let again = found.is_some();
        if let Some((device, request)) = found {
            self.outlet.block_patiently(device, request);
        }
        again
    }

    /// Asks for more frames and input where the guest has taken what came. Until then they wait outside: a guest that
    /// is slower than its network would otherwise lose them here, and do nothing but be interrupted.
    fn take_more(&mut self, guest: &Guest) {
        let outlet = &self.outlet;
        self.backlogged.retain(|source| {
            let wait = source.is_backlogged(guest);
            if !wait {
                source.ask(&**outlet);
            }
            wait
        });
    }

    /// Logs a control operation that both sides carry out themselves.
    pub fn control(&mut self, guest: &Guest, control: Control) {
        self.record(guest, Entry::Event(Event::Control(control)));
        self.flush();
    }

    /// Runs the guest until there is something to do.
    pub fn advance(&mut self, guest: &mut Guest) -> Result<Next, GuestError> {
        if !guest.counts_exactly() {
            return self.advance_uncounted(guest);
        }
        for event in std::mem::take(&mut self.early) {
            self.apply(guest, event)?;
        }
        if guest.point().0 >= self.gathering.due() {
            self.send_outputs(guest);
        }
        let throttle = self.recorder.as_ref().map_or(0.0, |r| r.throttle()).max(self.copy_throttle);
        if let Some(rest) = self.throttle.before_run(throttle, Instant::now) {
            self.flush();
            return Ok(Next::Wait(Some(rest)));
        }
        self.wake(guest)?;
        if guest.point().0 >= self.anchor_due {
            let anchor = self.pacer.next_while_running(guest.point().0, guest.tsc());
            self.set_anchor(guest, anchor);
            self.between_anchors(guest)?;
        }
        if self.is_stalled() {
            self.flush();
            return Ok(Next::Wait(None));
        }
        let until = self.anchor_due.min(self.gathering.due());
        let exit = guest.run(Some(ft::ExecutionPoint(until)))?;
        self.throttle.after_run(throttle, Instant::now);
        self.take_more(guest);
        if let Some(next) = self.drain_effects(guest)? {
            return Ok(next);
        }
        Ok(match exit {
            Exit::Until | Exit::Kicked | Exit::Stopped => Next::Again,
            Exit::Halted => self.fall_asleep(guest),
            Exit::Shutdown => self.reboot(guest)?,
        })
    }

    /// On a backend that cannot count, time and HLT are the processor's own affair.
    fn advance_uncounted(&mut self, guest: &mut Guest) -> Result<Next, GuestError> {
        let exit = guest.run(None)?;
        self.take_more(guest);
        if let Some(next) = self.drain_effects(guest)? {
            return Ok(next);
        }
        Ok(match exit {
            Exit::Until | Exit::Kicked | Exit::Stopped => Next::Again,
            Exit::Halted => Next::Wait(None),
            Exit::Shutdown => self.reboot(guest)?,
        })
    }

    fn fall_asleep(&mut self, guest: &Guest) -> Next {
        self.asleep = true;
        self.pacer.halted(guest.point().0);
        self.gathering.sleeps(guest.point().0, self.pacer.quantum());
        // Without this the backup would stay a quantum behind for as long as the guest sleeps.
        self.record(guest, Entry::Mark);
        self.flush();
        Next::Wait(guest.next_timer_tsc().map(|tsc| self.pacer.time_until(tsc)))
    }

    /// Lets a sleeping guest's clock catch up, which may fire its timer.
    fn wake(&mut self, guest: &mut Guest) -> Result<(), GuestError> {
        if !std::mem::take(&mut self.asleep) {
            return Ok(());
        }
        let anchor = self.pacer.next_after_halt(guest.point().0, guest.tsc());
        self.set_anchor(guest, anchor);
        self.between_anchors(guest)
    }

    fn set_anchor(&mut self, guest: &mut Guest, anchor: Anchor) {
        guest.set_anchor(anchor);
        self.anchor_due = self.pacer.end_of_quantum(&anchor);
        self.record(guest, Entry::Event(Event::Anchor { tsc: anchor.tsc, rate: anchor.rate }));
    }

    /// Housekeeping of the log, at each anchor.
    fn between_anchors(&mut self, guest: &mut Guest) -> Result<(), GuestError> {
        if let Some(recorder) = &mut self.recorder {
            recorder.record_released(guest.point());
        }
        if guest.tsc() >= self.next_digest_tsc {
            self.digest(guest)?;
        }
        if guest.tsc() >= self.next_flush_tsc {
            self.send_on(guest);
        }
        Ok(())
    }

    /// Has both sides take a digest here.
    pub fn digest(&mut self, guest: &mut Guest) -> Result<(), GuestError> {
        self.next_digest_tsc = guest.tsc().saturating_add(DIGEST_INTERVAL_NS);
        if let Some(recorder) = &mut self.recorder {
            let digest = guest.digest()?;
            recorder.digest(guest.point(), digest, guest.take_digest_pages());
            self.flush();
        }
        Ok(())
    }

    /// Sends what the devices handed out on its way.
    fn drain_effects(&mut self, guest: &mut Guest) -> Result<Option<Next>, GuestError> {
        if guest.effects().is_empty() {
            return Ok(None);
        }
        let point = guest.point();
        let (mut end, mut outputs) = (None, false);
        for effect in std::mem::take(guest.effects()) {
            match route(effect) {
                Routed::Output(outgoing) => match (&mut self.recorder, outgoing) {
                    // On this side's own image, which the other never sees.
                    (Some(recorder), Outgoing::Block { device, request })
                        if recorder.plan() == DiskPlan::Mirrored =>
                    {
                        self.outlet.block(device, recorder.plan().request(request));
                    }
                    (Some(recorder), outgoing) => {
                        recorder.output(point, outgoing);
                        outputs = true;
                    }
                    (None, outgoing) => outgoing.release(&*self.outlet),
                },
                Routed::Block(device, request) => self.outlet.block(device, request),
                Routed::Entropy(device, len) => self.outlet.entropy(device, len),
                Routed::Offloads(device, offloads) => self.outlet.set_offloads(device, offloads),
                Routed::PowerOff => end = Some(Next::PoweredOff),
                Routed::Reset => end = Some(Next::Rebooted),
            }
        }
        match end {
            Some(Next::Rebooted) => self.reboot(guest).map(Some),
            Some(end) => {
                self.record(guest, Entry::Mark);
                self.flush();
                Ok(Some(end))
            }
            None => {
                if outputs && self.gathering.made(point.0) {
                    self.send_outputs(guest);
                }
                Ok(None)
            }
        }
    }

    /// The backup comes to the same point by itself and does the same.
    fn reboot(&mut self, guest: &mut Guest) -> Result<Next, GuestError> {
        self.record(guest, Entry::Mark);
        self.flush();
        guest.reboot()?;
        Ok(Next::Rebooted)
    }

    fn record(&mut self, guest: &Guest, entry: Entry) {
        if let Some(recorder) = &mut self.recorder {
            recorder.record(guest.point(), &entry);
        }
    }

    fn send_outputs(&mut self, guest: &Guest) {
        self.gathering.sends(guest.point().0, self.pacer.quantum());
        self.send_on(guest);
    }

    /// Sends on what is collected of a guest that runs on; the next time is an interval away, if nothing else comes before.
    fn send_on(&mut self, guest: &Guest) {
        if let Some(recorder) = &self.recorder {
            let interval_ns = recorder.flush_interval().as_nanos() as u64;
            self.next_flush_tsc = guest.tsc().saturating_add(interval_ns);
        }
        self.flush();
    }

    /// Sends on what is collected: nothing waits while the guest stands still.
    pub fn flush(&mut self) {
        self.gathering.sent();
        if let Some(recorder) = &mut self.recorder {
            recorder.flush();
        }
    }
}
