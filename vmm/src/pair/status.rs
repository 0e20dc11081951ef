//! The status of an ft thread, on its way to whoever asks for it.
//!
//! What must hold: the ft thread does not wait for a reader, who may be put to sleep at any moment by a busy host;
//! and what a reader sees last is what the ft thread said last. So there are two places: a reader is in one of
//! them at a time, and the ft thread writes into the other.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::Duration;

use ft::FtStatus;

/// Status is renewed no more often than this, unless the state changes or somebody asks.
const STATUS_PERIOD: Duration = Duration::from_millis(20);
/// The log rate shown is the mean over this time.
const RATE_PERIOD: Duration = Duration::from_secs(1);

/// A status and its number: the highest is the latest.
type Place = Mutex<(u64, FtStatus)>;

/// Where the status is read.
#[derive(Clone, Default)]
pub struct StatusCell(Arc<[Place; 2]>);

fn lock(place: &Place) -> MutexGuard<'_, (u64, FtStatus)> {
    // Whoever panicked has left a whole status.
    place.lock().unwrap_or_else(PoisonError::into_inner)
}

impl StatusCell {
    /// The latest.
    #[must_use]
    pub fn get(&self) -> FtStatus {
        let [one, other] = &*self.0;
        let (number, status) = lock(one).clone();
        let other = lock(other);
        if other.0 > number { other.1.clone() } else { status }
    }
}

/// The ft thread's end.
#[derive(Default)]
pub(super) struct StatusWriter {
    cell: StatusCell,
    number: u64,
    status: FtStatus,
    state: &'static str,
    renewed: Duration,
    expired: bool,
    /// When the present rate measurement began, and the log position then.
    rate_from: (Duration, u64),
}

impl StatusWriter {
    /// Where what is written is read.
    pub(super) fn cell(&self) -> StatusCell {
        self.cell.clone()
    }

    /// Has the next update renew it.
    pub(super) fn expire(&mut self) {
        self.expired = true;
    }

    /// As it was renewed last.
    pub(super) fn latest(&self) -> FtStatus {
        self.status.clone()
    }

    /// Renews it if it is due.
    pub(super) fn update(
        &mut self,
        now: Duration,
        state: &'static str,
        fill: impl FnOnce(&mut FtStatus),
    ) {
        let changed = self.state != state;
        let expired = std::mem::take(&mut self.expired);
        if !changed && !expired && now < self.renewed + STATUS_PERIOD {
            return;
        }
        self.state = state;
        self.renewed = now;
        fill(&mut self.status);
        let log = &mut self.status.log;
        let bytes = log.recorded_bytes.max(log.acknowledged_bytes);
        let (since, from) = self.rate_from;
        let elapsed = now.saturating_sub(since);
        if elapsed >= RATE_PERIOD {
            let bits = bytes.saturating_sub(from) as f64 * 8.0;
            log.mbit_per_s = bits / elapsed.as_secs_f64() / 1e6;
            self.rate_from = (now, bytes);
        }
        self.publish(changed);
    }

    /// A change of state may be the last: it waits if it must, which takes two readers that sleep.
    fn publish(&mut self, changed: bool) {
        self.number += 1;
        let free = self.cell.0.iter().find_map(|place| match place.try_lock() {
            Ok(place) => Some(place),
            Err(TryLockError::Poisoned(place)) => Some(place.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        });
        let place = free.or_else(|| changed.then(|| lock(&self.cell.0[0])));
        if let Some(mut place) = place {
            place.0 = self.number;
            place.1.clone_from(&self.status);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(writer: &mut StatusWriter, at_ms: u64, state: &'static str) {
        writer.update(Duration::from_millis(at_ms), state, |status| {
            status.state = state.into();
            status.lag_us = at_ms;
        });
    }

    #[test]
    fn a_reader_that_sleeps_keeps_nobody_waiting_and_the_latest_is_seen() {
        let mut writer = StatusWriter::default();
        let cell = writer.cell();
        write(&mut writer, 100, "one");
        for sleeper in [0, 1, 0] {
            let place = lock(&cell.0[sleeper]);
            // Would never return if it waited.
            write(&mut writer, 200, "two");
            write(&mut writer, 300, "three");
            drop(place);
            let seen = cell.get();
            assert_eq!((seen.state.as_str(), seen.lag_us), ("three", 300));
            write(&mut writer, 400, "four");
            assert_eq!(cell.get().state, "four");
        }
    }

    #[test]
    fn it_is_renewed_now_and_then_at_every_change_and_for_who_asks() {
        let mut writer = StatusWriter::default();
        let cell = writer.cell();
        for (at_ms, state, seen) in
            [(100, "one", 100), (110, "one", 100), (111, "two", 111), (131, "two", 131)]
        {
            write(&mut writer, at_ms, state);
            assert_eq!(cell.get().lag_us, seen);
        }
        writer.expire();
        write(&mut writer, 132, "two");
        assert_eq!((cell.get().lag_us, writer.latest().lag_us), (132, 132), "somebody has asked");
        write(&mut writer, 133, "two");
        assert_eq!(cell.get().lag_us, 132);
        let both = [lock(&cell.0[0]), lock(&cell.0[1])];
        write(&mut writer, 153, "two");
        drop(both);
        assert_eq!(cell.get().lag_us, 132, "nothing has changed that it would wait for");
        write(&mut writer, 173, "two");
        assert_eq!(cell.get().lag_us, 173);
    }
}
