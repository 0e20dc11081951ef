//! The event monitor (`--event-monitor`): tells another program what happens to the VM, as it happens.
//!
//! Cloud Hypervisor's format: JSON objects over several lines, each followed by an empty line, with
//! `timestamp` (since the monitor started), `source`, `event` and `properties`. Its sources `vmm` and `vm`,
//! and `ft` beside them, for every change in the state of protection.
//!
//! What must hold: whoever reports never waits and reads no clock, since it may be a vCPU thread. A thread of
//! its own stamps and writes; what a slow reader has no room for is dropped, whole events only, and
//! counted.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rt_channel::{Receiver, Sender};
use serde::Serialize;

/// Events that may wait for a slow reader.
const MAX_WAITING: usize = 1024;
/// How long a reader that takes nothing may delay the end of the process.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// Where events are reported. Clones report to the same monitor; the default to none.
#[derive(Clone, Default)]
pub struct EventMonitor(Option<Arc<Reporter>>);

struct Reporter {
    sender: Sender<Report>,
    dropped: AtomicU64,
}

enum Report {
    Event(Event),
    Stop,
}

#[derive(Debug, Serialize)]
struct Event {
    source: &'static str,
    event: &'static str,
    properties: Option<BTreeMap<&'static str, String>>,
}

#[derive(Serialize)]
struct Stamped<'a> {
    timestamp: Timestamp,
    #[serde(flatten)]
    event: &'a Event,
}

#[derive(Serialize)]
struct Timestamp {
    secs: u64,
    nanos: u32,
}

impl EventMonitor {
    /// Reports that something happened.
    pub fn event(&self, source: &'static str, event: &'static str) {
        self.report(Event { source, event, properties: None });
    }

    /// Reports it with details.
    pub fn event_with<const N: usize>(
        &self,
        source: &'static str,
        event: &'static str,
        properties: [(&'static str, String); N],
    ) {
        self.report(Event { source, event, properties: Some(properties.into()) });
    }

    fn report(&self, event: Event) {
        let Some(reporter) = &self.0 else { return };
        let room = reporter.sender.len() < MAX_WAITING;
        if !room || reporter.sender.send(Report::Event(event)).is_err() {
            reporter.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// The thread that writes. Dropping it ends it, after what was reported before has been written.
pub struct EventWriter {
    monitor: EventMonitor,
    /// Closed when the thread has ended.
    done: Receiver<()>,
}

impl EventWriter {
    /// Writes to the file `path`, which is emptied first; a FIFO needs a reader already.
    pub fn create(path: &Path) -> io::Result<Self> {
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(path)?;
        Self::start(file)
    }

    /// Writes to `file`.
    pub fn start(file: File) -> io::Result<Self> {
        let (sender, receiver) = rt_channel::unbounded();
        let reporter = Arc::new(Reporter { sender, dropped: AtomicU64::new(0) });
        let monitor = EventMonitor(Some(Arc::clone(&reporter)));
        let start = Instant::now();
        let (running, done) = rt_channel::unbounded();
        std::thread::Builder::new().name("events".to_owned()).spawn(move || {
            write_events(file, &receiver, &reporter.dropped, start);
            drop(running);
        })?;
        Ok(Self { monitor, done })
    }

    /// Where to report.
    #[must_use]
    pub fn monitor(&self) -> EventMonitor {
        self.monitor.clone()
    }
}

impl Drop for EventWriter {
    fn drop(&mut self) {
        if let Some(reporter) = &self.monitor.0 {
            let _ = reporter.sender.send(Report::Stop);
        }
        // A reader that takes nothing keeps the thread; the process ends without it.
        let _: Result<(), _> = self.done.recv_timeout(LAST_WORDS);
    }
}

fn write_events(mut file: File, reports: &Receiver<Report>, dropped: &AtomicU64, start: Instant) {
    let mut told = 0;
    while let Ok(Report::Event(event)) = reports.recv() {
        let lost = dropped.load(Ordering::Relaxed);
        if lost > told {
            log::warn!("{} events were dropped: the event monitor is not read", lost - told);
            told = lost;
        }
        let since = start.elapsed();
        let timestamp = Timestamp { secs: since.as_secs(), nanos: since.subsec_nanos() };
        let written = serde_json::to_string_pretty(&Stamped { timestamp, event: &event })
            .map_err(io::Error::other)
            .and_then(|text| write_all(&mut file, format!("{text}\n\n").as_bytes()));
        if let Err(error) = written {
            log::warn!("the event monitor ends: {error}");
            return;
        }
    }
}

/// Writes to a descriptor that may not take everything at once.
fn write_all(file: &mut File, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match file.write(bytes) {
            Ok(0) => return Err(ErrorKind::WriteZero.into()),
            Ok(count) => bytes = &bytes[count..],
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                poll(&mut [PollFd::new(file.as_fd(), PollFlags::POLLOUT)], PollTimeout::NONE)?;
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};
    use std::io::Read;

    /// What a reader of the format makes of it.
    fn objects(text: &str) -> Vec<Value> {
        let parts = text.split("\n\n").filter(|part| !part.is_empty());
        parts.map(|part| serde_json::from_str(part).expect("each part is one object")).collect()
    }

    #[test]
    fn events_are_separated_by_empty_lines() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("events");
        std::fs::write(&path, "of yesterday").unwrap();
        let writer = EventWriter::create(&path).unwrap();
        let monitor = writer.monitor();
        monitor.event("vmm", "starting");
        monitor.event_with("ft", "changed", [("state", "alone\n\n".to_owned())]);
        drop(writer);
        monitor.event("vmm", "too late");
        let events = objects(&std::fs::read_to_string(&path).unwrap());
        assert_eq!(events.len(), 2);
        assert_eq!(events[0]["event"], "starting");
        assert_eq!(events[0]["properties"], Value::Null);
        assert!(
            events[0]["timestamp"]["secs"].is_u64() && events[0]["timestamp"]["nanos"].is_u64()
        );
        assert_eq!(events[1]["properties"], json!({"state": "alone\n\n"}));
    }

    #[test]
    fn a_reader_that_does_not_read_costs_events_and_nothing_else() {
        let (mut reader, writer) = std::os::unix::net::UnixStream::pair().unwrap();
        writer.set_nonblocking(true).unwrap();
        let thread = EventWriter::start(File::from(std::os::fd::OwnedFd::from(writer))).unwrap();
        let monitor = thread.monitor();
        let sent = 100 * MAX_WAITING;
        for _ in 0..sent {
            monitor.event("vm", "booted");
        }
        let reading = std::thread::spawn(move || {
            let mut text = String::new();
            reader.read_to_string(&mut text).unwrap();
            text
        });
        let dropped = monitor.0.as_ref().unwrap().dropped.load(Ordering::Relaxed);
        drop(thread);
        let events = objects(&reading.join().unwrap());
        assert!(dropped > 0, "the socket and the queue cannot hold them all");
        assert_eq!(events.len() as u64 + dropped, sent as u64);
    }

    #[test]
    fn nobody_has_to_listen() {
        EventMonitor::default().event("vmm", "starting");
    }
}
