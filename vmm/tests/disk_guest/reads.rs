//! One shared image that the backup reads by itself, while the primary goes on writing.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use ft::{Digest, Event, ExecutionPoint, LogPosition, OutputGate, PageHashes, Unequal};
use nix::errno::Errno;
use rt_channel::{Receiver, Sender, unbounded};
use virtio_devices::block::back::{Faults, Step, StepKind, Verdict};
use vmm::guest::Guest;
use vmm::run_loop::disks::{DiskPlan, FollowedDisks};
use vmm::run_loop::live::{self, Live};
use vmm::run_loop::outgoing::Outlet;
use vmm::run_loop::recorder::{Feedback, FromVcpu, HeldOutput, Recorder};
use vmm::run_loop::replay::{self, Replay, ReplayObserver};
use vmm_sys_util::eventfd::EventFd;

use crate::recording::{record_as, replay_with, run};
use crate::{DEVICE, OneDisk, Setup, image};

/// Longer than any position, and not the word for a side that runs alone.
const EVERYTHING: LogPosition = LogPosition(u64::MAX - 1);

/// Slow to read; some reads fail first.
struct Slow(AtomicU64);

impl Faults for Slow {
    fn before(&self, step: Step) -> Verdict {
        if step.kind != StepKind::Read {
            return Verdict::Go;
        }
        std::thread::sleep(Duration::from_micros(100));
        match self.0.fetch_add(1, Ordering::Relaxed) % 29 {
            0 => Verdict::Fail(Errno::EIO),
            _ => Verdict::Go,
        }
    }
}

/// What the backup tells while it follows.
struct Follower {
    executed: Arc<AtomicU64>,
    differs: Sender<String>,
}

impl ReplayObserver for Follower {
    fn executed(&mut self, position: LogPosition, _point: ExecutionPoint) {
        self.executed.store(position.0, Ordering::SeqCst);
    }
    fn log_empty(&mut self) {}
    fn stable(&mut self, _position: LogPosition) {}
    fn awaits_stable(&mut self, _device: u8, _failed: bool) {}
    fn awaits_disk(&mut self, _device: u8, _failed: bool) {}
    fn digest(&mut self, _point: ExecutionPoint, _unequal: Option<(Unequal, PageHashes)>) {}
    fn diverged(&mut self, reason: String) {
        let _ = self.differs.send(reason);
    }
}

/// The state in which a side ended.
type End = (Digest, ExecutionPoint);

/// Runs the primary to its end; every piece of log goes to `log` before the outputs behind it are held. Gives how many
/// outputs had to wait for the backup to read.
fn primary(
    guest: &mut Guest,
    outlet: &Arc<OneDisk>,
    events: &Receiver<Event>,
    log: &Sender<Vec<u8>>,
    executed: &dyn Fn() -> LogPosition,
) -> (End, usize) {
    let (sink, flushes) = unbounded();
    let feedback = Arc::new(Feedback::default());
    let waker = Arc::new(EventFd::new(0).unwrap());
    let recorder = Recorder::new(guest.point(), sink, waker, Arc::clone(&feedback));
    let way_out = Arc::clone(outlet) as Arc<dyn Outlet>;
    let mut live = Live::new(guest, Arc::clone(&way_out), guest.tsc(), Instant::now());
    live.start_recording(guest, Box::new(recorder.with_plan(DiskPlan::BackupReads)));
    let (mut gate, mut waited) = (OutputGate::new(), 0);
    let mut next = live::Next::Again;
    loop {
        let event = match next {
            live::Next::Again => events.try_recv().ok(),
            live::Next::Wait(_) => events.recv_timeout(Duration::from_micros(200)).ok(),
            live::Next::PoweredOff => break,
            live::Next::Rebooted => panic!("the guest rebooted"),
        };
        if let Some(event) = event {
            live.apply(guest, event).unwrap();
        }
        next = live.advance(guest).unwrap();
        feedback.executed(executed());
        gate.executed(executed());
        while let Ok(message) = flushes.try_recv() {
            let FromVcpu::Flush(flush) = message else { panic!("a hand-over without a pair") };
            log.send(flush.bytes).unwrap();
            for HeldOutput { number, position, behind, outgoing, .. } in flush.outputs {
                waited += usize::from(behind > executed());
                gate.hold_behind(Duration::ZERO, number, position, behind, 0, outgoing);
            }
        }
        gate.release(Duration::ZERO, EVERYTHING, |number, outgoing| {
            outgoing.release(&*way_out);
            feedback.release(number);
        });
    }
    ((guest.digest().unwrap(), guest.point()), waited)
}

/// Follows until the guest powers off; an error says what differed.
fn backup(
    guest: &mut Guest,
    outlet: &Arc<OneDisk>,
    events: &Receiver<Event>,
    log: &Receiver<Vec<u8>>,
    executed: Arc<AtomicU64>,
) -> Result<End, String> {
    let (differs, reasons) = unbounded();
    let replay = Replay::new(guest.point(), Box::new(Follower { executed, differs }));
    let way_out = Arc::clone(outlet) as Arc<dyn Outlet>;
    let mut replay = replay.with_disks(guest, FollowedDisks::new(DiskPlan::BackupReads, way_out));
    loop {
        match replay.advance(guest).map_err(|error| error.to_string())? {
            replay::Next::Again => {}
            replay::Next::AwaitsDisk => replay.completed(events.recv().unwrap()),
            replay::Next::LogEmpty => match log.recv() {
                Ok(bytes) => replay.receive(bytes, Instant::now()),
                Err(_) => return Err("the log ended before the guest powered off".into()),
            },
            replay::Next::PoweredOff => return Ok((guest.digest().unwrap(), guest.point())),
            replay::Next::Diverged => return Err(reasons.recv().unwrap()),
            other => panic!("{other:?}"),
        }
    }
}

/// A backup that follows at once, or reads only when the primary has long gone on: that is what a gate without the rule lets
/// happen. Gives both ends, and how many outputs waited.
fn shared(obeys: bool) -> (End, Result<End, String>, usize) {
    let setup = Setup::new();
    let image = image();
    let ours = OneDisk::open(image.path(), true, None);
    let our_events = ours.start(DEVICE);
    let slow = Arc::new(Slow(AtomicU64::new(0)));
    let theirs = OneDisk::open(image.path(), true, Some(slow));
    let their_events = theirs.follow(DEVICE);
    let (sender, log) = unbounded();
    let executed = Arc::new(AtomicU64::new(0));
    let seen = Arc::clone(&executed);
    std::thread::scope(|scope| {
        let (setup, theirs, their_events) = (&setup, &theirs, &their_events);
        let (finished, turn) = unbounded::<()>();
        let follower = scope.spawn(move || {
            if !obeys {
                let _ = turn.recv();
            }
            backup(&mut setup.guest(), theirs, their_events, &log, executed)
        });
        let position = move || match obeys {
            true => LogPosition(seen.load(Ordering::SeqCst)),
            false => EVERYTHING,
        };
        let (end, waited) = primary(&mut setup.guest(), &ours, &our_events, &sender, &position);
        drop((finished, sender));
        assert_eq!(ours.report().0, 0, "a read gave something else than the write before it");
        (end, follower.join().unwrap(), waited)
    })
}

#[test]
fn a_backup_that_reads_the_shared_image_by_itself_stays_equal() {
    let (primary, backup, waited) = shared(true);
    let backup = backup.unwrap();
    println!("{waited} outputs waited for the backup to read");
    assert!(waited > 0, "nothing was ever overwritten that the backup had yet to read");
    assert_eq!(backup.0.first_unequal(&primary.0), None);
    assert_eq!(backup.1, primary.1);
}

#[test]
fn a_write_that_does_not_wait_for_the_backups_read_is_found() {
    let (primary, backup, _) = shared(false);
    let equal = backup.is_ok_and(|end| end.0.first_unequal(&primary.0).is_none());
    assert!(!equal, "the backup read what had been overwritten, and nobody noticed");
}

/// Every read fails.
struct Unreadable;

impl Faults for Unreadable {
    fn before(&self, step: Step) -> Verdict {
        match step.kind == StepKind::Read {
            true => Verdict::Fail(Errno::EIO),
            false => Verdict::Go,
        }
    }
}

/// Begins nothing until it is opened.
#[derive(Default)]
struct Held(Mutex<bool>, Condvar);

impl Held {
    fn open(&self) {
        *self.0.lock().unwrap() = true;
        self.1.notify_all();
    }
}

impl Faults for Held {
    fn before(&self, _step: Step) -> Verdict {
        drop(self.1.wait_while(self.0.lock().unwrap(), |open| !*open).unwrap());
        Verdict::Go
    }
}

#[test]
fn a_read_completed_for_the_guest_before_it_went_live_is_nothing_to_it_when_the_host_has_done_it() {
    let setup = Setup::new();
    let image = image();
    let (mut log, mut primary) = (Vec::new(), setup.guest());
    {
        // What fails on the primary is told in the log, and the backup does not wait for its own.
        let outlet = OneDisk::open(image.path(), true, Some(Arc::new(Unreadable)));
        let events = outlet.start(DEVICE);
        let plan = DiskPlan::BackupReads;
        record_as(plan, &mut primary, outlet.clone(), &events, &mut log, |_| {
            outlet.submitted.lock().unwrap().len() > 400
        });
        outlet.disk.halt();
    }
    let held = Arc::new(Held::default());
    let outlet = OneDisk::open(image.path(), true, Some(Arc::clone(&held) as Arc<dyn Faults>));
    let events = outlet.follow(DEVICE);
    let way_out = Arc::clone(&outlet) as Arc<dyn Outlet>;
    let disks = FollowedDisks::new(DiskPlan::BackupReads, Arc::clone(&way_out));
    let mut backup = setup.guest();
    let (replay, off, _) = replay_with(&mut backup, &log[..], disks, &events);
    assert!(!off);
    let begun: BTreeSet<u64> = outlet.submitted.lock().unwrap().iter().copied().collect();
    let outstanding: BTreeSet<u64> =
        backup.machine().outstanding().into_iter().map(|(_, request)| request.id).collect();
    let mut strays = &begun - &outstanding;
    assert!(strays.len() > 50, "{} reads are under way that nobody waits for", strays.len());

    let mut live = replay.go_live(&backup, &way_out);
    outlet.disk.go_live();
    held.open();
    // The host does the oldest first, so that all of them come before the guest is at its end.
    let (passed, checked) = unbounded();
    std::thread::scope(|scope| {
        let (strays, events) = (&mut strays, &events);
        scope.spawn(move || {
            while let Ok(event) = events.recv() {
                if let Event::DiskCompletion { request, .. } = &event {
                    strays.remove(request);
                }
                if passed.send(event).is_err() {
                    return;
                }
            }
        });
        assert!(run(&mut live, &mut backup, &checked, |_| false));
        assert_eq!(outlet.report().0, 0, "a read gave something else than the write before it");
        drop((live, way_out, checked, outlet));
    });
    assert_eq!(strays, BTreeSet::new(), "the host did not do these, so that nothing was tried");
}
