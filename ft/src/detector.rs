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

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    /// A detector that is looked at every 10 ms, as a state machine with heartbeats does.
    fn first_suspicion(detector: &mut Detector, from: u64, to: u64) -> Option<u64> {
        (from..to).step_by(10).find(|now| detector.suspects(ms(*now)))
    }

    #[test]
    fn silence_is_suspicious_after_the_timeout() {
        let mut detector = Detector::new(ms(0), ms(200));
        detector.heard(ms(40));
        assert_eq!(first_suspicion(&mut detector, 50, 1000), Some(240));
    }

    #[test]
    fn whoever_is_heard_is_not_suspected() {
        let mut detector = Detector::new(ms(0), ms(200));
        for now in (0..5_000).step_by(150) {
            assert_eq!(first_suspicion(&mut detector, now, now + 150), None);
            detector.heard(ms(now + 150));
        }
    }

    #[test]
    fn who_has_slept_listens_before_it_suspects() {
        let mut detector = Detector::new(ms(0), ms(200));
        assert!(!detector.suspects(ms(3_000)), "its own absence");
        detector.heard(ms(3_001));
        assert_eq!(first_suspicion(&mut detector, 3_010, 5_000), Some(3_210));
    }

    #[test]
    fn who_has_slept_suspects_soon_if_it_hears_nothing() {
        let mut detector = Detector::new(ms(0), ms(200));
        assert!(!detector.suspects(ms(3_000)));
        assert_eq!(detector.deadline(), ms(3_025));
        assert!(detector.suspects(ms(3_025)));
    }
}
