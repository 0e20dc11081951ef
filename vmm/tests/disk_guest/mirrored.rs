//! Two sides, each with an image of its own.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use ft::{Decoder, Entry, Event, ExecutionPoint};
use nix::errno::Errno;
use rt_channel::Receiver;
use tempfile::NamedTempFile;
use virtio_devices::block::back::{Faults, Step, StepKind, Verdict};
use virtio_devices::{BlockOp, BlockStatus};
use vmm::run_loop::disks::{DiskPlan, FollowedDisks};
use vmm::run_loop::outgoing::Outlet;
use vmm::run_loop::replay::Replay;

use crate::recording::{record_as, replay_with, run};
use crate::{DEVICE, Flaky, OneDisk, Setup, image};

/// Completions in a log: how many have failed, and how many have data.
fn completions(log: &[u8]) -> (usize, usize) {
    let mut decoder = Decoder::new(ExecutionPoint(0));
    decoder.push(log.to_vec());
    let (mut failed, mut shipped) = (0, 0);
    while let Some((record, _)) = decoder.next_record().unwrap() {
        if let Entry::Event(Event::DiskCompletion { status, data, .. }) = record.entry {
            failed += usize::from(status != BlockStatus::Ok.byte());
            shipped += usize::from(!data.is_empty());
        }
    }
    (failed, shipped)
}

fn faults(flaky: bool) -> Option<Arc<dyn Faults>> {
    flaky.then(|| Arc::new(Flaky(AtomicU32::new(0))) as Arc<dyn Faults>)
}

/// Gives the failed completions and those with data in the log.
fn mirror(primary_flaky: bool, backup_flaky: bool) -> (usize, usize) {
    let setup = Setup::new();
    let (ours, theirs) = (image(), image());
    let outlet = OneDisk::open(ours.path(), true, faults(primary_flaky));
    let events = outlet.start(DEVICE);
    let (mut log, mut primary) = (Vec::new(), setup.guest());
    let recorded =
        record_as(DiskPlan::Mirrored, &mut primary, outlet.clone(), &events, &mut log, |_| false);
    assert_eq!(outlet.report().0, 0, "a read gave something else than the write before it");
    drop(outlet);

    let outlet = OneDisk::open(theirs.path(), false, faults(backup_flaky));
    let events = outlet.start(DEVICE);
    let disks = FollowedDisks::new(DiskPlan::Mirrored, Arc::clone(&outlet) as Arc<dyn Outlet>);
    let mut backup = setup.guest();
    let (replay, off, _) = replay_with(&mut backup, &log[..], disks, &events);
    assert!(off, "the log ended before the guest powered off");
    assert_eq!(backup.digest().unwrap().first_unequal(&recorded.0), None);
    assert_eq!(backup.point(), recorded.1);
    drop((replay, outlet));
    let alike = std::fs::read(ours.path()).unwrap() == std::fs::read(theirs.path()).unwrap();
    assert!(alike || primary_flaky, "the images differ");
    completions(&log)
}

#[test]
fn each_side_reads_its_own_image_and_both_end_alike() {
    assert_eq!(mirror(false, false), (0, 0));
}

#[test]
fn what_fails_on_the_backup_alone_is_tried_until_it_is_done() {
    assert_eq!(mirror(false, true), (0, 0));
}

#[test]
fn what_failed_on_the_primary_is_applied_as_failed_and_doubtful_data_is_shipped() {
    let (failed, shipped) = mirror(true, true);
    println!("{failed} failed, {shipped} shipped");
    assert!(failed > 0 && shipped > 0);
}

/// Where each completion of a log ends.
fn ends(log: &[u8]) -> Vec<usize> {
    let mut decoder = Decoder::new(ExecutionPoint(0));
    decoder.push(log.to_vec());
    let mut ends = Vec::new();
    while let Some((record, position)) = decoder.next_record().unwrap() {
        if let Entry::Event(Event::DiskCompletion { .. }) = record.entry {
            ends.push(position.0 as usize);
        }
    }
    ends
}

#[test]
fn requests_under_way_when_the_primary_dies_are_done_on_the_backups_image() {
    let setup = Setup::new();
    let ours = image();
    let (mut log, mut primary) = (Vec::new(), setup.guest());
    {
        let outlet = OneDisk::open(ours.path(), true, None);
        let events = outlet.start(DEVICE);
        record_as(DiskPlan::Mirrored, &mut primary, outlet.clone(), &events, &mut log, |_| {
            outlet.submitted.lock().unwrap().len() > 400
        });
        outlet.disk.halt();
    }
    // The log ends where the primary died: somewhere with requests under way.
    let died = ends(&log).into_iter().rev().any(|end| goes_on_alone(&setup, &log[..end]));
    assert!(
        died,
        "at no completion were there requests under way that failed when this side was live"
    );
}

/// Follows `log` and goes on alone, where what is under way then fails at first. False if nothing was.
fn goes_on_alone(setup: &Setup, log: &[u8]) -> bool {
    let seen = Arc::new(Seen::default());
    let (backup, ..) = follow(setup, log, Arc::clone(&seen) as Arc<dyn Faults>);
    let under_way = backup.machine().outstanding();
    if under_way.len() < 4 {
        return false;
    }
    // Each is the last step of its kind at its place, since those that overlap wait for each other.
    let steps = seen.0.lock().unwrap().clone();
    let nth = |kind, sector: u64| {
        let count = steps.iter().filter(|s| s.kind == kind && s.offset == sector * 512).count();
        (kind, sector * 512, count)
    };
    // One for each place: a second request there has not begun, and would be confused with what the guest asks for later.
    let mut targets = Vec::new();
    for (_, request) in &under_way {
        let target = match &request.op {
            BlockOp::Read { sector, .. } => nth(StepKind::Read, *sector),
            BlockOp::Write { sector, .. } => nth(StepKind::Write, *sector),
            _ => continue,
        };
        if !targets.contains(&target) {
            targets.push(target);
        }
    }
    let late = Arc::new(FailsLate {
        following: AtomicBool::new(true),
        failed_live: AtomicU32::new(0),
        left: Mutex::new(targets),
    });
    let (mut backup, replay, outlet, events, _image) =
        follow(setup, log, Arc::clone(&late) as Arc<dyn Faults>);
    let way_out = Arc::clone(&outlet) as Arc<dyn Outlet>;
    let mut live = replay.go_live(&backup, &way_out);
    late.following.store(false, Ordering::SeqCst);
    assert!(run(&mut live, &mut backup, &events, |_| false));
    drop((live, way_out));
    let (mismatches, failed, _) = outlet.report();
    assert_eq!((mismatches, failed), (0, 0));
    late.failed_live.load(Ordering::SeqCst) > 0
}

type Following = (vmm::guest::Guest, Replay, Arc<OneDisk>, Receiver<Event>, NamedTempFile);

fn follow(setup: &Setup, log: &[u8], faults: Arc<dyn Faults>) -> Following {
    let image = image();
    let outlet = OneDisk::open(image.path(), true, Some(faults));
    let events = outlet.start(DEVICE);
    let disks = FollowedDisks::new(DiskPlan::Mirrored, Arc::clone(&outlet) as Arc<dyn Outlet>);
    let mut backup = setup.guest();
    let (replay, off, _) = replay_with(&mut backup, log, disks, &events);
    assert!(!off);
    (backup, replay, outlet, events, image)
}

/// Every step there was.
#[derive(Default)]
struct Seen(Mutex<Vec<Step>>);

impl Faults for Seen {
    fn before(&self, step: Step) -> Verdict {
        self.0.lock().unwrap().push(step);
        Verdict::Go
    }
}

/// Fails the n-th step of a kind at a place, if it can when this side has gone live.
struct FailsLate {
    following: AtomicBool,
    failed_live: AtomicU32,
    left: Mutex<Vec<(StepKind, u64, usize)>>,
}

impl Faults for FailsLate {
    fn before(&self, step: Step) -> Verdict {
        let mut left = self.left.lock().unwrap();
        let mut place = left.iter_mut().find(|(kind, offset, count)| {
            *kind == step.kind && *offset == step.offset && *count > 0
        });
        let Some((.., count)) = &mut place else { return Verdict::Go };
        *count -= 1;
        if *count > 0 {
            return Verdict::Go;
        }
        // What the log says is done may wait behind it on the disk's thread.
        let patience = Instant::now() + Duration::from_millis(200);
        while self.following.load(Ordering::SeqCst) && Instant::now() < patience {
            std::thread::yield_now();
        }
        let live = !self.following.load(Ordering::SeqCst);
        self.failed_live.fetch_add(u32::from(live), Ordering::SeqCst);
        Verdict::Fail(Errno::EIO)
    }
}
