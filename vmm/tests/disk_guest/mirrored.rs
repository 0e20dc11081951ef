//! Two sides, each with an image of its own.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use ft::{Decoder, Entry, Event, ExecutionPoint};
use nix::errno::Errno;
use virtio_devices::BlockStatus;
use virtio_devices::block::back::{Faults, Step, StepKind, Verdict};
use vmm::run_loop::disks::{DiskPlan, FollowedDisks};
use vmm::run_loop::outgoing::Outlet;

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

/// The completions of a log: which request, and where it ends.
fn completed(log: &[u8]) -> Vec<(u64, usize)> {
    let mut decoder = Decoder::new(ExecutionPoint(0));
    decoder.push(log.to_vec());
    let mut completed = Vec::new();
    while let Some((record, position)) = decoder.next_record().unwrap() {
        if let Entry::Event(Event::DiskCompletion { request, .. }) = record.entry {
            completed.push((request, position.0 as usize));
        }
    }
    completed
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
    let completed = completed(&log);
    let died = (1..=completed.len()).rev().any(|count| {
        let (done, end) = (&completed[..count], completed[count - 1].1);
        goes_on_alone(&setup, &log[..end], done.iter().map(|(request, _)| *request).collect())
    });
    assert!(died, "at no completion were there requests under way");
}

/// Follows `log`, in which the requests `done` complete, and goes on alone, where what is under way then fails at first.
/// False if too little was.
fn goes_on_alone(setup: &Setup, log: &[u8], done: BTreeSet<u64>) -> bool {
    let image = image();
    let faults = Arc::new(FailsAtFirst::default());
    let options = Some(Arc::clone(&faults) as Arc<dyn Faults>);
    let outlet = OneDisk::open(image.path(), true, options);
    outlet.hold_all_but(done);
    let events = outlet.start(DEVICE);
    let way_out = Arc::clone(&outlet) as Arc<dyn Outlet>;
    let disks = FollowedDisks::new(DiskPlan::Mirrored, Arc::clone(&way_out));
    let mut backup = setup.guest();
    let (mut replay, off, _) = replay_with(&mut backup, log, disks, &events);
    assert!(!off);
    let under_way = outlet.slow.lock().unwrap().held.len();
    if under_way < 4 {
        return false;
    }
    while !replay.make_stable(&backup) {
        replay.completed(events.recv().unwrap());
    }
    let mut live = replay.go_live(&backup, &way_out);
    faults.0.store(under_way as u32, Ordering::SeqCst);
    outlet.let_go();
    assert!(run(&mut live, &mut backup, &events, |_| false));
    assert_eq!(faults.0.load(Ordering::SeqCst), 0, "none of them is left to fail");
    drop((live, way_out));
    let (mismatches, failed, _) = outlet.report();
    assert_eq!((mismatches, failed), (0, 0));
    true
}

/// Fails as many reads and writes as this says, the next ones.
#[derive(Default)]
struct FailsAtFirst(AtomicU32);

impl Faults for FailsAtFirst {
    fn before(&self, step: Step) -> Verdict {
        let take = |left: u32| left.checked_sub(1);
        let fails = matches!(step.kind, StepKind::Read | StepKind::Write)
            && self.0.try_update(Ordering::SeqCst, Ordering::SeqCst, take).is_ok();
        if fails { Verdict::Fail(Errno::EIO) } else { Verdict::Go }
    }
}
