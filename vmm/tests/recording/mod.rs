//! A guest recorded without a pair, and its log replayed.

use std::io::{Read, Write};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use ft::{Digest, Event, ExecutionPoint, LogPosition, PageHashes, Unequal};
use hypervisor::soft::SoftHypervisor;
use rt_channel::Receiver;
use vmm::boot::Payload;
use vmm::config::VmConfig;
use vmm::guest::Guest;
use vmm::machine::{HostFacts, layout};
use vmm::run_loop::disks::{DiskPlan, FollowedDisks};
use vmm::run_loop::live::{self, Live};
use vmm::run_loop::outgoing::Outlet;
use vmm::run_loop::recorder::{Feedback, FromVcpu, Recorder};
use vmm::run_loop::replay::{self, Replay, ReplayObserver};
use vmm_sys_util::eventfd::EventFd;

/// The machine of both sides: a function of its configuration alone.
pub fn guest(config: &VmConfig, host: &HostFacts, payload: &Arc<Payload>) -> Guest {
    let memory = hypervisor::memory::allocate(&layout::ram_ranges(config.memory.size)).unwrap();
    let mut guest = Guest::new(&SoftHypervisor, config, memory, host).unwrap();
    guest.set_payload(Arc::clone(payload));
    guest.boot().unwrap();
    // Digests are about what is written from here on.
    guest.take_dirty_pages().unwrap();
    guest
}

/// Runs a guest until it powers off, or until `stop` says so, which is false then.
pub fn run(
    live: &mut Live,
    guest: &mut Guest,
    events: &Receiver<Event>,
    mut stop: impl FnMut(&Guest) -> bool,
) -> bool {
    let mut next = live::Next::Again;
    loop {
        // A back half that says nothing and a guest that waits for it: the next timer ends the wait.
        let event = match next {
            live::Next::Wait(Some(timeout)) => events.recv_timeout(timeout).ok(),
            live::Next::Wait(None) => Some(events.recv().unwrap()),
            live::Next::Again => events.try_recv().ok(),
            live::Next::PoweredOff => return true,
            live::Next::Rebooted => panic!("the guest rebooted"),
        };
        if let Some(event) = event {
            live.apply(guest, event).unwrap();
        }
        next = live.advance(guest).unwrap();
        if stop(guest) {
            return false;
        }
    }
}

/// Runs the guest until it powers off or `stop` says so; gives its last digest and point.
pub fn record(
    guest: &mut Guest,
    outlet: Arc<dyn Outlet>,
    events: &Receiver<Event>,
    log: &mut impl Write,
    stop: impl FnMut(&Guest) -> bool,
) -> (Digest, ExecutionPoint) {
    record_as(DiskPlan::Primary, guest, outlet, events, log, stop)
}

/// As [`record`], for a backup that does with disks what `plan` says.
pub fn record_as(
    plan: DiskPlan,
    guest: &mut Guest,
    outlet: Arc<dyn Outlet>,
    events: &Receiver<Event>,
    log: &mut impl Write,
    mut stop: impl FnMut(&Guest) -> bool,
) -> (Digest, ExecutionPoint) {
    let (sink, flushes) = rt_channel::unbounded();
    let waker = Arc::new(EventFd::new(0).unwrap());
    let feedback = Arc::new(Feedback::default());
    let recorder = Recorder::new(guest.point(), sink, waker, Arc::clone(&feedback)).with_plan(plan);
    let mut live = Live::new(guest, Arc::clone(&outlet), guest.tsc(), Instant::now());
    live.start_recording(guest, Box::new(recorder));
    // Written is acknowledged here: outputs leave after their records are in the file.
    let mut flush = |release: bool| {
        while let Ok(message) = flushes.try_recv() {
            let FromVcpu::Flush(flush) = message else { panic!("a hand-over without a pair") };
            log.write_all(&flush.bytes).unwrap();
            for held in flush.outputs.into_iter().filter(|_| release) {
                held.outgoing.release(&*outlet);
                feedback.release(held.number);
            }
        }
    };
    run(&mut live, guest, events, |guest| {
        let stop = stop(guest);
        // A primary that dies has logged its last outputs, and not let them go.
        flush(!stop);
        stop
    });
    flush(false);
    (guest.digest().unwrap(), guest.point())
}

/// Fails the test at the first difference; counts digests.
struct Judge(Arc<Mutex<u64>>);

impl ReplayObserver for Judge {
    fn executed(&mut self, _position: LogPosition, _point: ExecutionPoint) {}
    fn log_empty(&mut self) {}
    fn stable(&mut self, _position: LogPosition) {}
    fn awaits_stable(&mut self, _device: u8, _failed: bool) {}
    fn awaits_disk(&mut self, _device: u8, _failed: bool) {}
    fn digest(&mut self, point: ExecutionPoint, unequal: Option<(Unequal, PageHashes)>) {
        assert_eq!(unequal, None, "at point {}", point.0);
        *self.0.lock().unwrap() += 1;
    }
    fn diverged(&mut self, reason: String) {
        panic!("{reason}");
    }
}

/// Replays `log` to its end, in pieces as a network would deliver them. True if the guest powered off there. The
/// number is of digests that were equal.
pub fn replay(guest: &mut Guest, log: impl Read) -> (Replay, bool, u64) {
    let (_silent, nothing) = rt_channel::unbounded();
    replay_with(guest, log, FollowedDisks::none(), &nothing)
}

/// As [`replay`], by a side that works with disks itself; `events` is what they have done.
pub fn replay_with(
    guest: &mut Guest,
    mut log: impl Read,
    disks: FollowedDisks,
    events: &Receiver<Event>,
) -> (Replay, bool, u64) {
    let digests = Arc::new(Mutex::new(0));
    let replay = Replay::new(guest.point(), Box::new(Judge(Arc::clone(&digests))));
    let mut replay = replay.with_disks(guest, disks);
    let mut piece = vec![0; 1 << 16];
    let off = loop {
        match replay.advance(guest).unwrap() {
            replay::Next::Again | replay::Next::Rebooted => {}
            replay::Next::LogEmpty => match log.read(&mut piece).unwrap() {
                0 => break false,
                count => replay.receive(piece[..count].to_vec(), Instant::now()),
            },
            replay::Next::AwaitsDisk => replay.completed(events.recv().unwrap()),
            replay::Next::PoweredOff => break true,
            other => panic!("{other:?}"),
        }
    };
    let compared = *digests.lock().unwrap();
    (replay, off, compared)
}
