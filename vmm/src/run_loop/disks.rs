//! What the two sides of a pair do about the disk requests of their guests.
//!
//! | plan | writes | what was read |
//! | --- | --- | --- |
//! | [`DiskPlan::Primary`] | outputs of the primary | in the log |
//! | [`DiskPlan::BackupReads`] | outputs of the primary | read by the backup from the shared image |
//! | [`DiskPlan::Mirrored`] | internal to each side, on its own image | read by each side from its own image |
//!
//! Where a backup does requests itself, the log says when each completed, and how. It applies a completion there when its
//! own has come as well: [`FollowedDisks`]. Both sides then read the same, since a front half hands out together only
//! requests that can be done in any order, and both do. Its flushes alone nobody waits for: [`Flushes`].
//!
//! What the primary cannot know to be the same on both images, since a write failed on its own, has what is read there
//! shipped in the log: [`RecordedDisks`].

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use ft::{DiskMode, DiskReads, Event, LogPosition, Terms};
use virtio_devices::{BlockOp, BlockRequest, BlockStatus, SECTOR_SIZE};

use super::flushes::{Flushes, Goal};
use super::outgoing::Outlet;
use super::ranges::Ranges;
use crate::guest::Guest;

/// See the module's documentation.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum DiskPlan {
    /// The primary does everything.
    #[default]
    Primary,
    /// The backup reads by itself.
    BackupReads,
    /// Each side does everything on its own image.
    Mirrored,
}

impl DiskPlan {
    /// What was agreed on.
    #[must_use]
    pub fn of(terms: &Terms) -> Self {
        match (terms.disk_mode, terms.disk_reads) {
            (DiskMode::Mirrored, _) => Self::Mirrored,
            (DiskMode::Shared, DiskReads::Backup) => Self::BackupReads,
            (DiskMode::Shared, DiskReads::Log) => Self::Primary,
        }
    }

    /// Whether a backup works with disks itself.
    #[must_use]
    pub fn backup_has_disks(self) -> bool {
        self != Self::Primary
    }

    /// Whether a backup does such a request itself.
    #[must_use]
    pub fn backup_does(self, op: &BlockOp) -> bool {
        match self {
            Self::Primary => false,
            Self::BackupReads => matches!(op, BlockOp::Read { .. }),
            Self::Mirrored => true,
        }
    }

    /// The request as it is done. Discarded sectors may hold anything, and would not hold the same on two hosts with different
    /// file systems: on mirrored disks they become zeroes.
    #[must_use]
    pub fn request(self, request: BlockRequest) -> BlockRequest {
        match (self, request.op) {
            (Self::Mirrored, BlockOp::Discard { sector, sectors }) => {
                let op = BlockOp::WriteZeroes { sector, sectors, unmap: true };
                BlockRequest { op, ..request }
            }
            (_, op) => BlockRequest { op, ..request },
        }
    }
}

/// Reads that [`Unread`] knows one by one.
const MAX_UNREAD: usize = 4096;

/// First sector and the one behind the last; `None` for a flush.
#[must_use]
pub fn sectors(op: &BlockOp) -> Option<(u64, u64)> {
    let (sector, count) = match op {
        BlockOp::Read { sector, len } => (*sector, u64::from(*len) / SECTOR_SIZE),
        BlockOp::Write { sector, data } => (*sector, data.len() as u64 / SECTOR_SIZE),
        BlockOp::Flush => return None,
        BlockOp::Discard { sector, sectors } | BlockOp::WriteZeroes { sector, sectors, .. } => {
            (*sector, *sectors)
        }
    };
    Some((sector, sector.saturating_add(count)))
}

/// The recording side: decides what of a completion the log must hold.
#[derive(Debug, Default)]
pub struct RecordedDisks {
    plan: DiskPlan,
    /// By device: sectors that the two images may differ in.
    uncertain: BTreeMap<u8, Ranges>,
}

impl RecordedDisks {
    /// Nothing is uncertain yet.
    #[must_use]
    pub fn new(plan: DiskPlan) -> Self {
        Self { plan, uncertain: BTreeMap::new() }
    }

    /// `guest` is recorded from here on. A discard that it has under way began before the copy was taken, and may leave
    /// anything on this side.
    pub fn begin(&mut self, guest: &Guest) {
        if self.plan == DiskPlan::Mirrored {
            for (device, request) in guest.machine().outstanding() {
                if matches!(request.op, BlockOp::Discard { .. }) {
                    self.doubt(device, &request.op);
                }
            }
        }
    }

    /// What was agreed on.
    #[must_use]
    pub fn plan(&self) -> DiskPlan {
        self.plan
    }

    /// What is logged in place of the event, if not the event itself, and for a read whose data are left out, what was
    /// read. `op` finds the request of a completion, which is not applied yet.
    pub fn logged(
        &mut self,
        event: &Event,
        op: impl FnOnce(u8, u64) -> Option<BlockOp>,
    ) -> (Option<Event>, Option<(u8, u64, u64)>) {
        let &Event::DiskCompletion { device, request, status, ref data } = event else {
            return (None, None);
        };
        let failed = status != BlockStatus::Ok.byte();
        let doubts = self.uncertain.get(&device).is_some_and(|ranges| !ranges.is_empty());
        let bare = || Some(Event::DiskCompletion { device, request, status, data: Vec::new() });
        match self.plan {
            DiskPlan::Primary => (None, None),
            DiskPlan::BackupReads if failed || data.is_empty() => (None, None),
            DiskPlan::BackupReads => match op(device, request).as_ref().and_then(sectors) {
                Some((first, end)) => (bare(), Some((device, first, end))),
                None => (None, None),
            },
            DiskPlan::Mirrored if failed || doubts => {
                let ship = op(device, request).is_none_or(|op| self.judge(device, &op, failed));
                (if ship { None } else { bare() }, None)
            }
            DiskPlan::Mirrored => (bare(), None),
        }
    }

    /// Whether data must be shipped.
    fn judge(&mut self, device: u8, op: &BlockOp, failed: bool) -> bool {
        match op {
            BlockOp::Read { .. } => sectors(op).is_some_and(|(first, end)| {
                self.uncertain.get(&device).is_some_and(|ranges| ranges.overlaps(first, end))
            }),
            BlockOp::Flush => false,
            BlockOp::Write { .. } | BlockOp::Discard { .. } | BlockOp::WriteZeroes { .. } => {
                if failed {
                    self.doubt(device, op);
                } else if !matches!(op, BlockOp::Discard { .. })
                    && let Some((first, end)) = sectors(op)
                    && let Some(ranges) = self.uncertain.get_mut(&device)
                {
                    ranges.remove(first, end);
                }
                false
            }
        }
    }

    fn doubt(&mut self, device: u8, op: &BlockOp) {
        if let Some((first, end)) = sectors(op) {
            self.uncertain.entry(device).or_default().insert(first, end);
        }
    }
}

/// What a backup that reads by itself has yet to read: requests whose completions are logged and, as far as is known, not yet
/// executed there. A write to the same sectors waits for it.
#[derive(Debug, Default)]
pub struct Unread {
    /// Ascending by position.
    reads: VecDeque<(LogPosition, u8, u64, u64)>,
    /// The newest that had no room: every write waits for it.
    forgotten: LogPosition,
}

impl Unread {
    /// A read of the sectors from `first` to before `end` is completed at `position` of the log.
    pub fn add(&mut self, device: u8, first: u64, end: u64, position: LogPosition) {
        self.reads.push_back((position, device, first, end));
        if self.reads.len() > MAX_UNREAD
            && let Some((position, ..)) = self.reads.pop_front()
        {
            self.forgotten = position;
        }
    }

    /// Up to where the backup, which is at `executed`, must have executed the log before `op` may be done.
    pub fn before(&mut self, device: u8, op: &BlockOp, executed: LogPosition) -> LogPosition {
        while self.reads.front().is_some_and(|(position, ..)| *position <= executed) {
            self.reads.pop_front();
        }
        let Some((first, end)) = sectors(op) else { return LogPosition(0) };
        let overlaps = |read: &&(LogPosition, u8, u64, u64)| {
            read.1 == device && read.2 < end && first < read.3
        };
        let last = self.reads.iter().rev().find(overlaps);
        last.map_or(self.forgotten, |(position, ..)| *position)
    }
}

/// How a request ended on this side.
#[derive(Debug)]
struct Outcome {
    ok: bool,
    data: Vec<u8>,
}

/// The following side: does requests itself and has completions applied when both sides have done them.
pub struct FollowedDisks {
    plan: DiskPlan,
    outlet: Option<Arc<dyn Outlet>>,
    /// What was issued here and has not been completed in the log; what this side made of it, once it has. The front half
    /// bounds how many there are and what they hold.
    issued: BTreeMap<(u8, u64), (BlockRequest, Option<Outcome>)>,
    flushes: Flushes,
    /// What was completed for the guest while the host still works on it: nobody waits for how that ends.
    strays: BTreeSet<(u8, u64)>,
}

/// What becomes of a completion in the log.
#[derive(Debug, PartialEq, Eq)]
pub enum Settled {
    /// It is applied, as this.
    Apply(Event),
    /// This side is not so far.
    Wait {
        /// The completion.
        event: Event,
        /// Its device.
        device: u8,
        /// Whether it failed here, and is tried again.
        failed: bool,
    },
}

/// What a side that goes live does about requests that are under way.
#[derive(Debug, Default)]
pub struct UnderWay {
    /// Done here, not yet completed for the guest.
    pub done: Vec<Event>,
    /// The host works on them. All others must be issued again.
    pub running: Vec<(u8, u64)>,
    /// The host works on them, and the guest has them completed.
    pub strays: BTreeSet<(u8, u64)>,
}

impl FollowedDisks {
    /// Of a backup that does none.
    #[must_use]
    pub fn none() -> Self {
        Self {
            plan: DiskPlan::Primary,
            outlet: None,
            issued: BTreeMap::new(),
            flushes: Flushes::default(),
            strays: BTreeSet::new(),
        }
    }

    /// Of a backup that does what `plan` says by way of `outlet`.
    #[must_use]
    pub fn new(plan: DiskPlan, outlet: Arc<dyn Outlet>) -> Self {
        Self { plan, outlet: Some(outlet), ..Self::none() }
    }

    /// Whether such a request is an output, which the primary alone performs.
    #[must_use]
    pub fn leaves_to_primary(&self, op: &BlockOp) -> bool {
        !self.plan.backup_does(op)
    }

    /// The guest has handed out a request, or had when it was copied.
    pub fn issue(&mut self, device: u8, request: BlockRequest) {
        let Some(outlet) = self.outlet.as_ref().filter(|_| self.plan.backup_does(&request.op))
        else {
            return;
        };
        if request.op == BlockOp::Flush {
            return self.flushes.want(device, request);
        }
        let request = self.plan.request(request);
        self.issued.insert((device, request.id), (request.clone(), None));
        outlet.block(device, request);
    }

    /// This side has done a request.
    pub fn completed(&mut self, event: Event) {
        let Event::DiskCompletion { device, request, status, data } = event else { return };
        let Some(outlet) = &self.outlet else { return };
        let ok = status == BlockStatus::Ok.byte();
        if self.strays.remove(&(device, request))
            || self.flushes.completed(device, request, ok, &**outlet)
        {
            return;
        }
        if let Some((_, outcome)) = self.issued.get_mut(&(device, request)) {
            *outcome = Some(Outcome { ok, data });
        }
    }

    /// Begins the flushes that are due at this guest time.
    pub fn begin_flushes(&mut self, now_ns: u64) {
        if let Some(outlet) = &self.outlet {
            self.flushes.begin_due(now_ns, &**outlet);
        }
    }

    /// A disk whose flushes fail here, so that the guest waits whatever it does.
    pub fn failing(&self, now_ns: u64) -> Option<u8> {
        self.flushes.failing(now_ns)
    }

    /// What all that the guest has flushed so far needs to be stable.
    pub fn goal(&self) -> Goal {
        self.flushes.goal()
    }

    /// `None` once `goal` is reached; else it is under way: a disk that is waited for, and whether a flush failed there.
    pub fn reach(&mut self, goal: &Goal, now_ns: u64) -> Option<(u8, bool)> {
        self.flushes.reach(goal, now_ns, &**self.outlet.as_ref()?)
    }

    /// Whether all is stable that the guest has flushed; if not, it is under way.
    pub fn make_stable(&mut self, now_ns: u64) -> bool {
        self.reach(&self.goal(), now_ns).is_none()
    }

    /// The guest has switched itself off: has its last flushes done.
    pub fn end(&mut self) {
        if let Some(outlet) = &self.outlet {
            self.flushes.begin_last(&**outlet);
        }
    }

    /// The log says that a request has completed, at this guest time.
    pub fn settle(&mut self, event: Event, now_ns: u64) -> Settled {
        let Event::DiskCompletion { device, request: id, status, ref data } = event else {
            return Settled::Apply(event);
        };
        if let Some(failed) = self.flushes.overdue(device, now_ns) {
            return Settled::Wait { event, device, failed };
        }
        let key = (device, id);
        let ok = status == BlockStatus::Ok.byte();
        let Some((request, outcome)) = self.issued.get_mut(&key) else {
            return Settled::Apply(event);
        };
        let told = !ok || !data.is_empty();
        if told && matches!(request.op, BlockOp::Read { .. }) && self.plan == DiskPlan::BackupReads
        {
            if outcome.is_none() {
                self.strays.insert(key);
            }
            self.issued.remove(&key);
            return Settled::Apply(event);
        }
        match outcome.take() {
            None => Settled::Wait { event, device, failed: false },
            Some(ours) if ours.ok || !ok => {
                self.issued.remove(&key);
                if told {
                    return Settled::Apply(event);
                }
                let (request, data) = (id, ours.data);
                Settled::Apply(Event::DiskCompletion { device, request, status, data })
            }
            Some(_) => {
                if let Some(outlet) = &self.outlet {
                    outlet.block_patiently(device, request.clone());
                }
                Settled::Wait { event, device, failed: true }
            }
        }
    }

    /// This side goes live.
    #[must_use]
    pub fn under_way(self) -> UnderWay {
        let mut all = UnderWay { strays: self.strays, ..UnderWay::default() };
        for ((device, request), (_, outcome)) in self.issued {
            match outcome {
                None => all.running.push((device, request)),
                Some(Outcome { ok: false, .. }) => {}
                Some(Outcome { ok: true, data }) => {
                    let status = BlockStatus::Ok.byte();
                    all.done.push(Event::DiskCompletion { device, request, status, data });
                }
            }
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::time::Duration;

    use virtio_devices::net::Offloads;

    use super::*;

    const OK: u8 = BlockStatus::Ok as u8;
    const FAILED: u8 = BlockStatus::IoError as u8;

    fn read(sector: u64, sectors: u32) -> BlockOp {
        BlockOp::Read { sector, len: sectors * 512 }
    }

    fn write(sector: u64, sectors: usize) -> BlockOp {
        BlockOp::Write { sector, data: Arc::from(vec![0; sectors * 512]) }
    }

    fn done(request: u64, status: u8, data: &[u8]) -> Event {
        Event::DiskCompletion { device: 1, request, status, data: data.to_vec() }
    }

    /// What of a read's data the log has after `before`, each a request and whether it failed.
    fn shipped(before: &[(BlockOp, bool)], read: &BlockOp) -> bool {
        let mut disks = RecordedDisks::new(DiskPlan::Mirrored);
        for (op, failed) in before {
            let event = done(1, if *failed { FAILED } else { OK }, &[]);
            let (logged, _) = disks.logged(&event, |_, _| Some(op.clone()));
            assert!(logged.is_none_or(|logged| logged == event), "it has no data");
        }
        let (logged, _) = disks.logged(&done(2, OK, b"data"), |_, _| Some(read.clone()));
        logged.is_none_or(|bare| {
            assert_eq!(bare, done(2, OK, b""));
            false
        })
    }

    #[test]
    fn what_a_failed_write_left_is_shipped_until_it_is_overwritten() {
        let fails = |sector, sectors| (write(sector, sectors), true);
        assert!(!shipped(&[], &read(8, 8)));
        assert!(!shipped(&[(write(8, 8), false), (read(8, 8), true)], &read(8, 8)));
        assert!(shipped(&[fails(8, 8)], &read(15, 1)));
        assert!(!shipped(&[fails(8, 8)], &read(16, 1)));
        assert!(shipped(&[fails(8, 8), (write(8, 7), false)], &read(8, 8)));
        assert!(!shipped(&[fails(8, 8), (write(8, 7), false)], &read(8, 7)));
        assert!(!shipped(&[fails(8, 8), (write(0, 99), false)], &read(8, 8)));
        // What a discard leaves is not the same everywhere.
        let discard = BlockOp::Discard { sector: 0, sectors: 99 };
        assert!(shipped(&[fails(8, 8), (discard, false)], &read(8, 8)));
        let zeroes = BlockOp::WriteZeroes { sector: 0, sectors: 99, unmap: true };
        assert!(shipped(&[(zeroes.clone(), true)], &read(98, 1)));
        assert!(!shipped(&[fails(8, 8), (zeroes, false)], &read(8, 8)));
    }

    #[test]
    fn a_write_waits_for_the_last_read_of_its_sectors_alone() {
        let mut unread = Unread::default();
        unread.add(1, 8, 16, LogPosition(100));
        unread.add(1, 12, 14, LogPosition(200));
        unread.add(2, 0, 99, LogPosition(300));
        let start = LogPosition(0);
        assert_eq!(unread.before(1, &write(13, 1), start), LogPosition(200));
        assert_eq!(unread.before(1, &write(8, 1), start), LogPosition(100));
        assert_eq!(unread.before(1, &write(16, 1), start), start);
        assert_eq!(unread.before(1, &BlockOp::Flush, start), start);
        assert_eq!(unread.before(1, &write(8, 1), LogPosition(100)), start);
        for position in 1..=MAX_UNREAD as u64 {
            unread.add(1, 500, 501, LogPosition(1000 + position));
        }
        // There was no room for all: it waits for those that it knows no more.
        assert_eq!(unread.before(1, &write(0, 1), LogPosition(100)), LogPosition(300));
    }

    /// What was issued, and whether patiently.
    #[derive(Default)]
    struct Noted(Mutex<Vec<(u64, bool)>>);

    impl Outlet for Noted {
        fn block(&self, _: u8, request: BlockRequest) {
            self.0.lock().unwrap().push((request.id, false));
        }
        fn block_patiently(&self, _: u8, request: BlockRequest) {
            self.0.lock().unwrap().push((request.id, true));
        }
        fn frames(&self, _: u8, _: &[Vec<u8>]) {}
        fn frames_taken(&self, _: u8) {}
        fn set_offloads(&self, _: u8, _: Offloads) {}
        fn console(&self, _: u8, _: &[u8]) {}
        fn console_taken(&self, _: u8) {}
        fn serial(&self, _: &[u8]) {}
        fn serial_taken(&self) {}
        fn entropy(&self, _: u8, _: u32) {}
        fn close_disks(&self) {}
        fn open_disks(&self) {}
        fn set_write_through(&self, _: bool) -> Result<(), String> {
            Ok(())
        }
        fn set_lease(&self, _: Option<Duration>) {}
        fn announce(&self) {}
    }

    impl Noted {
        fn take(&self) -> Vec<(u64, bool)> {
            std::mem::take(&mut *self.0.lock().unwrap())
        }
    }

    fn following(plan: DiskPlan, ops: &[BlockOp]) -> (FollowedDisks, Arc<Noted>) {
        let noted = Arc::new(Noted::default());
        let mut disks = FollowedDisks::new(plan, Arc::clone(&noted) as Arc<dyn Outlet>);
        for (id, op) in (0..).zip(ops) {
            disks.issue(1, BlockRequest { id, op: op.clone() });
        }
        (disks, noted)
    }

    #[test]
    fn a_completion_is_applied_when_both_sides_have_done_it() {
        let (mut disks, noted) = following(DiskPlan::Mirrored, &[read(0, 1), write(1, 1)]);
        let wait = |event: Event, failed| Settled::Wait { event, device: 1, failed };
        assert_eq!(disks.settle(done(0, OK, b""), 0), wait(done(0, OK, b""), false));
        disks.completed(done(1, FAILED, b""));
        disks.completed(done(0, OK, b"ours"));
        assert_eq!(disks.settle(done(0, OK, b""), 0), Settled::Apply(done(0, OK, b"ours")));
        // Failed here alone: tried again. Failed there as well: so it is.
        assert_eq!(disks.settle(done(1, OK, b""), 0), wait(done(1, OK, b""), true));
        assert_eq!(disks.settle(done(1, OK, b""), 0), wait(done(1, OK, b""), false));
        disks.completed(done(1, FAILED, b""));
        assert_eq!(disks.settle(done(1, FAILED, b""), 0), Settled::Apply(done(1, FAILED, b"")));
        assert_eq!(*noted.0.lock().unwrap(), [(0, false), (1, false), (1, true)]);
    }

    #[test]
    fn what_is_shipped_counts_more_than_what_was_read_here() {
        let (mut disks, _) = following(DiskPlan::Mirrored, &[read(0, 1), read(1, 1)]);
        disks.completed(done(0, OK, b"ours"));
        disks.completed(done(1, OK, b"ours"));
        let shipped = done(0, OK, b"theirs");
        assert_eq!(disks.settle(shipped.clone(), 0), Settled::Apply(shipped));
        let failed = done(1, FAILED, b"");
        assert_eq!(disks.settle(failed.clone(), 0), Settled::Apply(failed));
    }

    #[test]
    fn a_backup_that_only_reads_waits_for_nothing_else() {
        let ops = [read(0, 1), write(1, 1), read(2, 1)];
        let (mut disks, noted) = following(DiskPlan::BackupReads, &ops);
        assert_eq!(*noted.0.lock().unwrap(), [(0, false), (2, false)]);
        assert_eq!(disks.settle(done(1, OK, b""), 0), Settled::Apply(done(1, OK, b"")));
        let failed = done(0, FAILED, b"");
        assert_eq!(disks.settle(failed.clone(), 0), Settled::Apply(failed));
        disks.completed(done(0, OK, b"late"));
        assert_eq!(disks.under_way().running, [(1, 2)]);
    }

    #[test]
    fn a_read_that_was_not_waited_for_is_known_until_the_host_has_done_it() {
        let ops = [read(0, 1), read(1, 1), read(2, 1)];
        let (mut disks, _) = following(DiskPlan::BackupReads, &ops);
        disks.completed(done(2, OK, b"ours"));
        for request in 0..3 {
            let failed = done(request, FAILED, b"");
            assert_eq!(disks.settle(failed.clone(), 0), Settled::Apply(failed));
        }
        disks.completed(done(0, OK, b"late"));
        let all = disks.under_way();
        assert_eq!(all.strays, BTreeSet::from([(1, 1)]));
        assert_eq!((all.done, all.running), (vec![], vec![]));
    }

    #[test]
    fn going_live_takes_over_what_is_done_and_what_runs() {
        let ops = [read(0, 1), write(1, 1), write(2, 1)];
        let (mut disks, _) = following(DiskPlan::Mirrored, &ops);
        disks.completed(done(0, OK, b"ours"));
        disks.completed(done(1, FAILED, b""));
        let all = disks.under_way();
        assert_eq!((all.done, all.running), (vec![done(0, OK, b"ours")], vec![(1, 2)]));
    }

    const MS: u64 = 1_000_000;

    #[test]
    fn flushes_are_gathered_and_nobody_waits_for_them() {
        let flush = |id| BlockRequest { id, op: BlockOp::Flush };
        let (mut disks, noted) = following(DiskPlan::Mirrored, &[]);
        for id in 0..3 {
            disks.issue(1, flush(id));
            disks.begin_flushes(id);
            assert_eq!(disks.settle(done(id, OK, b""), id), Settled::Apply(done(id, OK, b"")));
        }
        assert_eq!(noted.take(), [(0, false)]);
        // One at a time, and not before its time.
        disks.begin_flushes(100 * MS);
        assert_eq!(noted.take(), []);
        disks.completed(done(0, OK, b""));
        disks.begin_flushes(100 * MS - 1);
        assert_eq!(noted.take(), []);
        disks.begin_flushes(100 * MS);
        assert_eq!(noted.take(), [(2, false)]);
        disks.completed(done(2, OK, b""));
        disks.begin_flushes(300 * MS);
        assert_eq!(noted.take(), []);
    }

    #[test]
    fn before_it_goes_live_all_is_stable_that_was_flushed() {
        let (mut disks, noted) = following(DiskPlan::Mirrored, &[BlockOp::Flush, BlockOp::Flush]);
        assert!(!disks.make_stable(0));
        assert_eq!(noted.take(), [(1, false)]);
        disks.issue(1, BlockRequest { id: 2, op: BlockOp::Flush });
        assert!(!disks.make_stable(0));
        disks.completed(done(1, OK, b""));
        assert!(!disks.make_stable(0), "one was wanted since");
        disks.completed(done(2, OK, b""));
        assert!(disks.make_stable(0));
        assert_eq!(noted.take(), [(2, false)]);
        assert!(following(DiskPlan::BackupReads, &[BlockOp::Flush]).0.make_stable(0));
    }

    #[test]
    fn a_guest_that_flushes_all_the_time_does_not_keep_it_from_being_stable_so_far() {
        let (mut disks, noted) = following(DiskPlan::Mirrored, &[BlockOp::Flush]);
        disks.begin_flushes(0);
        disks.issue(1, BlockRequest { id: 1, op: BlockOp::Flush });
        let goal = disks.goal();
        assert_eq!(disks.reach(&goal, 0), Some((1, false)));
        disks.issue(1, BlockRequest { id: 2, op: BlockOp::Flush });
        disks.completed(done(0, OK, b""));
        assert_eq!(disks.reach(&goal, 0), Some((1, false)), "one was wanted then");
        disks.issue(1, BlockRequest { id: 3, op: BlockOp::Flush });
        assert_eq!(noted.take(), [(0, false), (2, false)], "a later one does as well");
        disks.completed(done(2, OK, b""));
        assert_eq!(disks.reach(&goal, 0), None);
        assert!(!disks.make_stable(0));
    }

    #[test]
    fn a_guest_that_ends_has_its_last_flush_done_beside_the_one_that_runs() {
        let (mut disks, noted) = following(DiskPlan::Mirrored, &[BlockOp::Flush]);
        disks.begin_flushes(0);
        disks.issue(1, BlockRequest { id: 1, op: BlockOp::Flush });
        disks.end();
        assert_eq!(noted.take(), [(0, false), (1, false)]);
        disks.end();
        assert_eq!(noted.take(), []);
    }

    #[test]
    fn a_flush_that_fails_or_hangs_is_waited_for_after_a_while() {
        let (mut disks, noted) = following(DiskPlan::Mirrored, &[BlockOp::Flush, write(0, 1)]);
        disks.begin_flushes(0);
        disks.completed(done(1, OK, b""));
        let write = || done(1, OK, b"");
        let wait = |failed| Settled::Wait { event: write(), device: 1, failed };
        assert_eq!(disks.settle(write(), 1001 * MS), wait(false));
        assert_eq!(disks.failing(1001 * MS), None);
        disks.completed(done(0, FAILED, b""));
        assert_eq!((disks.failing(1000 * MS), disks.failing(1001 * MS)), (None, Some(1)));
        assert!(!disks.make_stable(1001 * MS), "it does not go live");
        assert_eq!(disks.reach(&disks.goal(), 1001 * MS), Some((1, true)));
        assert_eq!(disks.settle(write(), 1001 * MS), wait(true));
        assert_eq!(noted.take(), [(1, false), (0, false), (0, true)]);
        disks.completed(done(0, OK, b""));
        assert_eq!(disks.failing(1001 * MS), None);
        assert_eq!(disks.settle(write(), 1001 * MS), Settled::Apply(write()));
    }

    #[test]
    fn discards_become_zeroes_where_both_sides_must_read_the_same() {
        let op = BlockOp::Discard { sector: 3, sectors: 4 };
        let request = BlockRequest { id: 1, op };
        let zeroes = BlockOp::WriteZeroes { sector: 3, sectors: 4, unmap: true };
        assert_eq!(DiskPlan::Mirrored.request(request.clone()).op, zeroes);
        assert_eq!(DiskPlan::BackupReads.request(request.clone()), request);
    }
}
