//! The vCPU threads: solo, recording and replaying.

use ft::{Control, Entry, Event, LogPosition, backup, primary};

use crate::guest::Output;
use crate::node::{Role, Tagged};
use crate::plant::Plant;
use crate::world::{Happening, World};

/// How long a vCPU runs before it looks for news.
const QUANTUM_US: u64 = 2_000;

/// Instructions in that time.
const INSTRUCTIONS: u64 = 2_000;

/// A digest each so many quanta.
const DIGEST_QUANTA: u64 = 25;

impl World {
    pub fn quantum(&mut self, id: usize) {
        let at = self.nodes[id].end();
        let mut next = QUANTUM_US + self.rng.range(0, 200);
        match self.nodes[id].role {
            Role::Solo => self.run_solo(id),
            Role::Primary(_) if self.nodes[id].recording => self.record(id),
            Role::Primary(_) => self.run_solo(id),
            Role::Backup(_) => {
                if self.t < self.nodes[id].slow_until {
                    next *= 8;
                }
                self.replay(id);
            }
            Role::Listening | Role::Idle => next *= 10,
        }
        self.after(next, Happening::Quantum { at });
    }

    fn run_solo(&mut self, id: usize) {
        let node = &mut self.nodes[id];
        let Some(guest) = &mut node.guest else { return };
        for event in node.inputs.drain(..) {
            guest.apply(&event);
        }
        let mut outputs = Vec::new();
        guest.run_to(guest.point + INSTRUCTIONS, &mut outputs);
        let generation = node.generation;
        for (_, number, output) in outputs {
            self.give_to_back_half(id, Tagged { number, output, generation, position: None });
        }
    }

    fn record(&mut self, id: usize) {
        let now = self.nodes[id].clock.now(self.t);
        let node = &mut self.nodes[id];
        let hand_over = std::mem::take(&mut node.log_hand_over);
        if node.paused || ((node.stalled || node.throttle >= 1.0) && !hand_over) {
            return;
        }
        let Some(guest) = &mut node.guest else { return };
        node.quanta += 1;
        let mut bytes = Vec::new();
        let mut outputs = Vec::new();
        let out_now = if self.plant == Some(Plant::ReleasedBeforeSent) {
            node.gate.released()
        } else {
            node.performed
        };
        if out_now > node.recorded_released
            && let Some(through) = out_now
        {
            let entry = Entry::Released { through };
            node.encoder.append(guest.at(), &entry, &mut bytes).expect("a record");
            node.recorded_released = out_now;
        }
        let mut events: Vec<Event> = node.inputs.drain(..).collect();
        events.push(Event::Anchor { tsc: now.as_nanos() as u64, rate: 3 << 32 });
        for event in events {
            guest.apply(&event);
            node.encoder.append(guest.at(), &Entry::Event(event), &mut bytes).expect("a record");
        }
        let instructions = (INSTRUCTIONS as f64 * (1.0 - node.throttle)) as u64;
        guest.run_to(guest.point + instructions, &mut outputs);
        for (point, number, output) in outputs {
            let entry = Entry::Output { number };
            let point = ft::ExecutionPoint(point);
            let end = node.encoder.append(point, &entry, &mut bytes).expect("a record");
            let tagged =
                Tagged { number, output, generation: node.generation, position: Some(end.0) };
            let position = match self.plant {
                Some(Plant::GateReleasesEarly) => LogPosition(0),
                _ => end,
            };
            node.gate.hold(now, number, position, 100, tagged);
        }
        let mut digested = None;
        let last = if hand_over {
            let event = Event::Control(Control::HandOver);
            guest.apply(&event);
            Entry::Event(event)
        } else if node.quanta.is_multiple_of(DIGEST_QUANTA) {
            digested = Some(guest.pages());
            Entry::Digest(guest.digest())
        } else {
            Entry::Mark
        };
        let point = guest.at();
        let end = node.encoder.append(point, &last, &mut bytes).expect("a record");
        self.checkers.recorded(node.generation, end.0, guest);
        if let Some(pages) = digested {
            self.step_primary(id, primary::Input::Digested { point, pages });
        }
        self.step_primary(id, primary::Input::Log { end, point, bytes });
        if hand_over {
            self.nodes[id].paused = true;
            if self.nodes[id].recording {
                self.step_primary(id, primary::Input::HandOverLogged { end });
            }
        }
    }

    fn replay(&mut self, id: usize) {
        let node = &mut self.nodes[id];
        if !node.loaded {
            return;
        }
        let Some(guest) = &mut node.guest else { return };
        let start = guest.point;
        let before = node.decoder.position();
        let mut unequal = None;
        // A backup may be a little faster than its primary, or it would never catch up.
        while guest.point < start + 2 * INSTRUCTIONS {
            let record = match node.decoder.next_record() {
                Ok(Some((record, _))) => record,
                Err(error) => {
                    let reason = error.to_string();
                    return self.step_backup(id, backup::Input::Failed { reason });
                }
                Ok(None) => match node.log.pop_front() {
                    Some(bytes) => {
                        node.decoder.push(&bytes);
                        continue;
                    }
                    None => break,
                },
            };
            let mut outputs: Vec<(u64, ft::OutputNumber, Output)> = Vec::new();
            guest.run_to(record.point.0, &mut outputs);
            for (_, number, output) in outputs {
                node.kept.keep(number, 100, output);
            }
            match record.entry {
                Entry::Event(event) => guest.apply(&event),
                Entry::Output { number } => {
                    // The first sign of a guest that differs may come before the next digest.
                    if number.0 >= guest.next_output {
                        assert!(node.tainted, "a sound guest did not produce output {number}");
                        let reason = format!("output {number} does not come");
                        return self.step_backup(id, backup::Input::Failed { reason });
                    }
                }
                Entry::Released { through } => node.kept.released(through),
                Entry::Digest(digest) => {
                    node.digests += 1;
                    unequal = digest
                        .first_unequal(&guest.digest())
                        .map(|unequal| (unequal, guest.pages()));
                    if unequal.is_some() {
                        break;
                    }
                }
                Entry::Mark => {}
            }
        }
        let point = guest.at();
        let position = node.decoder.position();
        let digests_compared = node.digests;
        if let Some((unequal, pages)) = unequal {
            self.step_backup(id, backup::Input::Unequal { point, unequal, pages });
        } else if position > before && self.plant != Some(Plant::LiveWithoutDraining) {
            self.step_backup(id, backup::Input::Executed { point, position, digests_compared });
        }
    }
}
