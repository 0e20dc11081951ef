//! The failure detector: suspects a peer that was silent for too long.
//!
//! A suspicion harms nobody: the claim decides who goes on. But a false one costs a pair its protection,
//! so a process that was itself asleep does not take its own absence for the peer's silence: it first
//! gives the messages that waited in its socket a moment to be read.

use std::time::Duration;

/// Watches one peer. All times are of the caller's clock, which must count while the host sleeps
/// (`CLOCK_BOOTTIME`).
#[derive(Clone, Debug)]
pub struct Detector {
    timeout: Duration,
    heard: Duration,
    looked: Duration,
    not_before: Duration,
}

impl Detector {
    /// Starts as if the peer had been heard at `now`.
    pub fn new(now: Duration, timeout: Duration) -> Self {
        Self { timeout, heard: now, looked: now, not_before: now }
    }

    /// Changes the silence that is allowed.
    pub fn set_timeout(&mut self, now: Duration, timeout: Duration) {
        self.timeout = timeout;
        self.heard = self.heard.max(now);
    }

    /// The peer said something.
    pub fn heard(&mut self, now: Duration) {
        self.look(now);
        self.heard = self.heard.max(now);
    }

    /// When the peer was heard last.
    pub fn last_heard(&self) -> Duration {
        self.heard
    }

    fn look(&mut self, now: Duration) {
        if now.saturating_sub(self.looked) > self.timeout / 2 {
            self.not_before = now + self.timeout / 8;
        }
        self.looked = self.looked.max(now);
    }

    /// Whether the peer has been silent for too long. Call it at [`Detector::deadline`] and at every
    /// heartbeat.
    pub fn suspects(&mut self, now: Duration) -> bool {
        self.look(now);
        now >= self.deadline()
    }

    /// When silence becomes suspicion.
    pub fn deadline(&self) -> Duration {
        (self.heard + self.timeout).max(self.not_before)
    }
}
