//! How a copy of a running guest goes on after each of its rounds: one more, one more with the guest slowed
//! down, or the last.
//!
//! Pure: measurements in, a decision out. What it aims at is a short standstill. The guest's outputs wait
//! behind what is sent last, so that to the world outside the guest stands still until the rest has gone over,
//! though it runs again as soon as the rest has been copied aside. Both are held short.
//!
//! A guest that changes memory about as fast as it is sent would be copied for ever. It is slowed down until
//! each round leaves markedly less than the one before.

use std::time::Duration;

/// The rest may take so long to send, by the rate measured.
const REST_TIME: Duration = Duration::from_millis(50);
/// And be no larger, however fast it can be sent: it is copied aside while the guest stands still.
const REST_BYTES: u64 = 8 << 20;
/// So little is sent at once whatever was measured. An idle guest on a slow link changes this much all the
/// time.
const LEAST_REST_BYTES: u64 = 128 << 10;
/// A round that sends less says more about delays than about the rate.
const SAMPLE_BYTES: u64 = 1 << 20;
/// What one round leaves for the next must be less than this part of what it has sent.
const SHRINKING: f64 = 0.75;
/// The guest is slowed down until it changes at most this part of what can be sent meanwhile.
const AIM: f64 = 0.5;
/// One step takes at least this part of the time that the guest has left, and at most [`BOLD_STEP`] of it.
const SHY_STEP: f64 = 0.4;
/// See [`SHY_STEP`].
const BOLD_STEP: f64 = 0.8;
/// No guest is slowed down further: it must go on answering.
const MOST_THROTTLE: f64 = 0.999;
/// Rounds without gain at [`MOST_THROTTLE`] after which the copy is given up.
const MAX_VAIN_ROUNDS: u32 = 5;

/// What one round has shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Round {
    /// Bytes sent in it.
    pub sent_bytes: u64,
    /// From its begin until the backup had taken all of it.
    pub took: Duration,
    /// Bytes that the guest has changed meanwhile.
    pub changed_bytes: u64,
}

/// How to go on.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Next {
    /// Another round, while the guest gives away this fraction of its time.
    Round {
        /// 0 to 1.
        throttle: f64,
    },
    /// Stop the guest for the rest.
    Last,
    /// The guest cannot be slowed down enough for this link.
    GiveUp,
}

/// Judges the rounds of one copy.
#[derive(Debug, Default)]
pub struct Rounds {
    /// Bytes per second; `None` before the first sample.
    rate: Option<f64>,
    throttle: f64,
    vain_rounds: u32,
}

impl Rounds {
    /// How fast the backup takes what is sent, in bytes per second; zero before it is known.
    pub fn bytes_per_s(&self) -> u64 {
        self.rate.unwrap_or_default() as u64
    }

    /// Looks at a round that has ended.
    pub fn after(&mut self, round: Round) -> Next {
        let took = round.took.as_secs_f64().max(1e-6);
        if round.sent_bytes >= SAMPLE_BYTES {
            let sample = round.sent_bytes as f64 / took;
            self.rate = Some(self.rate.map_or(sample, |rate| (rate + sample) / 2.0));
        }
        if round.changed_bytes <= self.rest_bytes() {
            return Next::Last;
        }
        let shrinks = (round.changed_bytes as f64) < round.sent_bytes as f64 * SHRINKING;
        if shrinks {
            self.vain_rounds = 0;
        } else if self.throttle < MOST_THROTTLE {
            self.slow_down(round.changed_bytes as f64 / took);
        } else {
            self.vain_rounds += 1;
            if self.vain_rounds >= MAX_VAIN_ROUNDS {
                return Next::GiveUp;
            }
        }
        Next::Round { throttle: self.throttle }
    }

    /// So much may be left for the last round.
    fn rest_bytes(&self) -> u64 {
        let in_time = self.rate.unwrap_or_default() * REST_TIME.as_secs_f64();
        (in_time as u64).clamp(LEAST_REST_BYTES, REST_BYTES)
    }

    /// `changing` is how fast the guest changes its memory as it is slowed down now, in bytes per second.
    fn slow_down(&mut self, changing: f64) {
        // Without a rate a round was so small that its time was all delay: a step will do.
        let wanted = self.rate.map_or(1.0, |rate| rate * AIM / changing);
        let runs = (1.0 - self.throttle) * wanted.clamp(1.0 - BOLD_STEP, 1.0 - SHY_STEP);
        self.throttle = (1.0 - runs).min(MOST_THROTTLE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A guest of `total` bytes that writes all over `working_set` bytes of them at `changing` bytes per
    /// second when it has all its time, copied over a link of `link` bytes per second. Gives the time that the
    /// rest takes, the highest throttle and the rounds; `None` if the copy is given up.
    fn copy(total: f64, working_set: f64, changing: f64, link: f64) -> Option<(f64, f64, u32)> {
        let mut rounds = Rounds::default();
        let (mut left, mut throttle, mut highest) = (total, 0.0_f64, 0.0_f64);
        for count in 1..1000 {
            let took = left / link + 0.002;
            let changed = (took * changing * (1.0 - throttle)).min(working_set);
            let round = Round {
                sent_bytes: left as u64,
                took: Duration::from_secs_f64(took),
                changed_bytes: changed as u64,
            };
            match rounds.after(round) {
                Next::Round { throttle: next } => throttle = next,
                Next::Last => return Some((changed / link, highest, count)),
                Next::GiveUp => return None,
            }
            highest = highest.max(throttle);
            left = changed;
        }
        panic!("rounds never end");
    }

    #[test]
    fn an_idle_guest_is_copied_in_one_round_and_not_slowed_down() {
        let (rest, throttle, rounds) = copy(1e9, 300e3, 1e6, 500e6).expect("converges");
        assert!(rest < 0.001, "{rest}");
        assert_eq!((throttle, rounds), (0.0, 1));
    }

    #[test]
    fn a_guest_that_changes_less_than_the_link_takes_is_not_slowed_down() {
        for changing in [10e6, 50e6, 200e6, 300e6] {
            let (rest, throttle, rounds) = copy(1e9, 500e6, changing, 500e6).expect("converges");
            assert!(rest <= 0.051, "{rest}");
            assert_eq!(throttle, 0.0, "changing {changing}");
            assert!(rounds < 15, "{rounds}");
        }
    }

    #[test]
    fn a_guest_that_outruns_the_link_is_slowed_down_until_rounds_shrink() {
        for (changing, link) in [(600e6, 500e6), (1e9, 100e6), (2e9, 10e6), (100e6, 1.2e6)] {
            let (rest, throttle, rounds) = copy(1e9, 500e6, changing, link).expect("converges");
            assert!(rest <= 0.11, "{rest}");
            assert!(throttle > 0.2 && throttle < 1.0, "changing {changing}: {throttle}");
            assert!(rounds < 40, "{rounds}");
        }
    }

    #[test]
    fn a_working_set_that_goes_over_in_no_time_needs_no_throttle() {
        // It is all changed again in each round, however short.
        let (rest, throttle, _) = copy(1e9, 4e6, 2e9, 500e6).expect("converges");
        assert!(rest < 0.01 && throttle == 0.0);
    }

    #[test]
    fn a_link_that_takes_nothing_ends_the_copy() {
        assert_eq!(copy(1e9, 500e6, 4e9, 100e3), None);
    }

    #[test]
    fn what_is_left_fits_the_time_measured() {
        let mut rounds = Rounds::default();
        let megabyte = |sent_bytes: u64, changed_bytes: u64| Round {
            sent_bytes: sent_bytes << 20,
            took: Duration::from_secs(1),
            changed_bytes: changed_bytes << 20,
        };
        // 20 MiB per second send 1 MiB in 50 ms.
        assert_eq!(rounds.after(megabyte(20, 2)), Next::Round { throttle: 0.0 });
        assert_eq!(rounds.bytes_per_s(), 20 << 20);
        assert_eq!(rounds.after(megabyte(20, 1)), Next::Last);
    }

    #[test]
    fn nonsense_does_no_harm() {
        let mut rounds = Rounds::default();
        for sent_bytes in [0, 1, u64::MAX] {
            for changed_bytes in [0, 1, u64::MAX] {
                for took in [Duration::ZERO, Duration::MAX] {
                    if let Next::Round { throttle } =
                        rounds.after(Round { sent_bytes, took, changed_bytes })
                    {
                        assert!((0.0..1.0).contains(&throttle), "{throttle}");
                    }
                }
            }
        }
    }
}
