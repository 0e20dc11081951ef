//! The event monitor (`--event-monitor`): tells another program what happens to the VM, as it happens.
//!
//! Cloud Hypervisor's format: JSON objects over several lines, each followed by an empty line, with
//! `timestamp` (since the monitor started), `source`, `event` and `properties`. Its sources `vmm` and `vm`,
//! and `ft` beside them, for every change in the state of protection.
//!
//! What must hold: whoever reports never waits and reads no clock, since it may be a vCPU thread. A thread of
//! its own stamps and writes ([`crate::non_blocking`]); what a slow reader has no room for is dropped.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::ops::ControlFlow;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::Instant;

use serde::Serialize;

use crate::non_blocking::{Format, NonBlocking, Writer};

/// Where events are reported. Clones report to the same monitor; the default to none.
#[derive(Clone, Default)]
pub struct EventMonitor(Option<NonBlocking<Event>>);

/// What happened.
#[derive(Debug, Serialize)]
pub struct Event {
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
        if let Some(sender) = &self.0 {
            sender.send(event);
        }
    }
}

/// The thread that writes. Dropping it ends it, after what was reported before has been written.
pub struct EventWriter(Writer<Event>);

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
        Writer::start("events", file, Stamp(Instant::now())).map(Self)
    }

    /// Where to report.
    #[must_use]
    pub fn monitor(&self) -> EventMonitor {
        EventMonitor(Some(self.0.sender()))
    }
}

/// Stamps events with the time since this.
struct Stamp(Instant);

impl Format<Event> for Stamp {
    fn text(&mut self, event: Event) -> Vec<u8> {
        let since = self.0.elapsed();
        let timestamp = Timestamp { secs: since.as_secs(), nanos: since.subsec_nanos() };
        let mut text = serde_json::to_vec_pretty(&Stamped { timestamp, event: &event })
            .expect("strings and numbers are JSON");
        text.extend_from_slice(b"\n\n");
        text
    }

    fn dropped(&mut self, count: u64) -> Vec<u8> {
        log::warn!("{count} events were dropped: the event monitor is not read");
        Vec::new()
    }

    fn failed(&mut self, error: &io::Error) -> ControlFlow<()> {
        log::warn!("the event monitor ends: {error}");
        ControlFlow::Break(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::non_blocking::MAX_WAITING;
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
        drop(thread);
        let events = objects(&reading.join().unwrap());
        assert!(events.len() >= MAX_WAITING);
        assert!(events.len() < sent, "the socket and the queue cannot hold them all");
    }

    #[test]
    fn nobody_has_to_listen() {
        EventMonitor::default().event("vmm", "starting");
    }
}
