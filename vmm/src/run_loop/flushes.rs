//! The flushes of a backup that has images of its own.
//!
//! Nobody is told that something is stable on a backup: what its guest has flushed is stable on the primary's image, and what
//! the primary has let out the backup holds in its memory, executed or not. So its guest does not wait for these
//! flushes. They are gathered, and done one at a time on each disk, with a pause between them: a disk that is slow to sync
//! does not hold back both guests.
//!
//! What must hold: a side goes live only when all that its guest has flushed is stable here, too; and when the guest switches
//! itself off, nothing that it has flushed is left undone. A flush that hangs is noticed: before long the guest's other requests to
//! that disk wait for it. So is one that fails. It is asked for again, but the disk grants none that follows one in which data
//! may have been lost, so before long all that the guest does waits for it: this side must not go live with such an image.

use std::collections::BTreeMap;

use virtio_devices::BlockRequest;

use super::outgoing::Outlet;

/// Guest time from the start of one flush to that of the next, in nanoseconds. What is written in that time has to become
/// stable before a backup goes live.
const INTERVAL_NS: u64 = 100_000_000;

/// Guest time, in nanoseconds, that a flush may take before the guest waits for it.
const OVERDUE_NS: u64 = 1_000_000_000;

/// See the module's documentation. Times are guest times in nanoseconds.
#[derive(Debug, Default)]
pub struct Flushes(BTreeMap<u8, Disk>);

#[derive(Debug, Default)]
struct Disk {
    /// The newest flush of the guest that was not begun.
    wanted: Option<BlockRequest>,
    running: Option<Running>,
    /// How many were begun, and how many have ended well.
    begun: u64,
    ended: u64,
    /// When the next may begin.
    next_ns: u64,
}

#[derive(Debug)]
struct Running {
    request: BlockRequest,
    since_ns: u64,
    /// It is tried again.
    failed: bool,
}

/// How many flushes must have ended on each disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Goal(BTreeMap<u8, u64>);

impl Disk {
    fn begin(&mut self, device: u8, now_ns: u64, outlet: &dyn Outlet) {
        if self.running.is_none()
            && let Some(request) = self.wanted.take()
        {
            self.next_ns = now_ns.saturating_add(INTERVAL_NS);
            let running = Running { request: request.clone(), since_ns: now_ns, failed: false };
            self.running = Some(running);
            self.begun += 1;
            outlet.block(device, request);
        }
    }
}

impl Flushes {
    /// The guest wants all writes to be stable that were completed before.
    pub fn want(&mut self, device: u8, request: BlockRequest) {
        self.0.entry(device).or_default().wanted = Some(request);
    }

    /// Begins what is due.
    pub fn begin_due(&mut self, now_ns: u64, outlet: &dyn Outlet) {
        for (device, disk) in &mut self.0 {
            if now_ns >= disk.next_ns {
                disk.begin(*device, now_ns, outlet);
            }
        }
    }

    /// What all that the guest has flushed so far needs to be stable.
    #[must_use]
    pub fn goal(&self) -> Goal {
        let number = |disk: &Disk| disk.begun + u64::from(disk.wanted.is_some());
        Goal(self.0.iter().map(|(device, disk)| (*device, number(disk))).collect())
    }

    /// Begins what `goal` needs, due or not. `None` once it is reached, however much the guest has flushed since; else a disk
    /// that is not so far, and whether a flush failed there.
    pub fn reach(&mut self, goal: &Goal, now_ns: u64, outlet: &dyn Outlet) -> Option<(u8, bool)> {
        let mut awaited = None;
        for (device, number) in &goal.0 {
            if let Some(disk) = self.0.get_mut(device).filter(|disk| disk.ended < *number) {
                disk.begin(*device, now_ns, outlet);
                let failed = disk.running.as_ref().is_some_and(|running| running.failed);
                awaited = awaited.or(Some((*device, failed)));
            }
        }
        awaited
    }

    /// The guest has ended: begins whatever it wants, beside what runs, for no later record would.
    pub fn begin_last(&mut self, outlet: &dyn Outlet) {
        for (device, disk) in &mut self.0 {
            if let Some(request) = disk.wanted.take() {
                outlet.block(*device, request);
            }
        }
    }

    /// A request has ended. False if it is none of these.
    pub fn completed(&mut self, device: u8, id: u64, ok: bool, outlet: &dyn Outlet) -> bool {
        let Some(disk) = self.0.get_mut(&device) else { return false };
        let Some(running) = disk.running.as_mut().filter(|running| running.request.id == id) else {
            return false;
        };
        if ok {
            disk.running = None;
            disk.ended += 1;
        } else {
            running.failed = true;
            outlet.block_patiently(device, running.request.clone());
        }
        true
    }

    /// A disk on which a flush has failed, and not succeeded for so long that the guest must not go on.
    #[must_use]
    pub fn failing(&self, now_ns: u64) -> Option<u8> {
        self.0.keys().copied().find(|device| self.overdue(*device, now_ns) == Some(true))
    }

    /// Whether the guest must wait for a flush on this disk; if so, whether that has failed and is tried again.
    #[must_use]
    pub fn overdue(&self, device: u8, now_ns: u64) -> Option<bool> {
        let running = self.0.get(&device)?.running.as_ref()?;
        (now_ns > running.since_ns.saturating_add(OVERDUE_NS)).then_some(running.failed)
    }
}
