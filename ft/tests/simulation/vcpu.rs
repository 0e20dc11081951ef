//! The vCPU threads: solo, recording and replaying.

use ft::{Control, Entry, Event, LogPosition, Record, backup, primary};

use crate::disks::{Disks, Failed, Settled};
use crate::guest::{Effect, Op, Output};
use crate::network::End;
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
        let mut effects = Vec::new();
        guest.run_to(guest.point + INSTRUCTIONS, &mut effects);
        let generation = node.generation;
        for (_, effect) in effects {
            match effect {
                Effect::Internal(request) => self.issue(id, request),
                Effect::Output(number, output) => {
                    let tagged = Tagged { number, output, generation, position: None };
                    self.give_to_back_half(id, tagged);
                }
            }
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
        let mut effects = Vec::new();
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
            let Some(guest) = &mut self.nodes[id].guest else { return };
            let completed = match &event {
                Event::DiskCompletion { request, status, data, .. } => {
                    let outcome = if *status == 0 { Ok(data.clone()) } else { Err(Failed) };
                    guest.request_under_way(*request).map(|found| (found, outcome))
                }
                _ => None,
            };
            guest.apply(&event);
            let at = guest.at();
            let logged = match &completed {
                Some((request, outcome)) => self.logged(id, *request, outcome),
                None => event,
            };
            let node = &mut self.nodes[id];
            let end = node.encoder.append(at, &Entry::Event(logged), &mut bytes);
            let end = end.expect("a record");
            if let Some((request, Ok(data))) = completed
                && request.op == Op::Read
            {
                self.checkers.primary_read(node.generation, end.0, data);
                if self.disks == Disks::BackupReads {
                    node.disk.unread[request.block] = end;
                }
            }
        }
        let node = &mut self.nodes[id];
        let Some(guest) = &mut node.guest else { return };
        let instructions = (INSTRUCTIONS as f64 * (1.0 - node.throttle)) as u64;
        guest.run_to(guest.point + instructions, &mut effects);
        let mut requests = Vec::new();
        for (point, effect) in effects {
            let (number, output) = match effect {
                Effect::Output(number, output) => (number, output),
                Effect::Internal(request) => {
                    requests.push(request);
                    continue;
                }
            };
            let behind = match &output {
                Output::Disk(_) if self.plant == Some(Plant::ReadNotAwaited) => LogPosition(0),
                Output::Disk(request) => node.disk.unread[request.block],
                Output::Answer { .. } => LogPosition(0),
            };
            self.tally.behind += u64::from(behind > node.disk.executed);
            let entry = Entry::Output { number };
            let point = ft::ExecutionPoint(point);
            let end = node.encoder.append(point, &entry, &mut bytes).expect("a record");
            let tagged =
                Tagged { number, output, generation: node.generation, position: Some(end.0) };
            let position = match self.plant {
                Some(Plant::GateReleasesEarly) => LogPosition(0),
                _ => end,
            };
            node.gate.hold_behind(now, number, position, behind, 100, tagged);
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
        for request in requests {
            self.issue(id, request);
        }
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

    pub fn replay(&mut self, id: usize) {
        let node = &self.nodes[id];
        let Some(guest) = node.guest.as_ref().filter(|_| node.loaded) else { return };
        let start = guest.point;
        let before = node.executed;
        let (mut unequal, mut awaits) = (None, None);
        // A backup may be a little faster than its primary, or it would never catch up.
        while self.nodes[id]
            .guest
            .as_ref()
            .is_some_and(|guest| guest.point < start + 2 * INSTRUCTIONS)
        {
            let (record, end) = match self.next_record(id) {
                Ok(Some(next)) => next,
                Ok(None) => break,
                Err(reason) => return self.step_backup(id, backup::Input::Failed { reason }),
            };
            self.run_behind(id, record.point.0);
            let entry = match record.entry {
                Entry::Event(event) => match self.settle(id, &event) {
                    Settled::Apply(settled) => Entry::Event(settled),
                    Settled::Wait { failed } => {
                        let record = Record { point: record.point, entry: Entry::Event(event) };
                        self.nodes[id].next_record = Some((record, end));
                        awaits = Some(failed);
                        break;
                    }
                },
                entry => entry,
            };
            let followed = self.is_followed(id);
            let node = &mut self.nodes[id];
            let Some(guest) = &mut node.guest else { return };
            node.executed = end.0;
            match entry {
                Entry::Event(event) => {
                    if let Event::DiskCompletion { data, .. } = &event
                        && !data.is_empty()
                        && !node.tainted
                    {
                        let backup = End { node: id, life: node.life };
                        let same = self.checkers.backup_read(
                            backup,
                            node.generation,
                            end.0,
                            data,
                            followed,
                        );
                        node.tainted |= !same;
                    }
                    guest.apply(&event);
                }
                Entry::Output { number } => {
                    // The first sign of a guest that differs may come before the next digest.
                    if number.0 >= guest.next_output {
                        let known = node.tainted || self.checkers.violation.is_some();
                        assert!(known, "a sound guest did not produce output {number}");
                        let reason = format!("output {number} does not come");
                        return self.step_backup(id, backup::Input::Failed { reason });
                    }
                }
                Entry::Released { through } => node.kept.released(through),
                Entry::Digest(digest) => {
                    node.digests += 1;
                    unequal = digest
                        .first_unequal(&guest.digest())
                        .map(|unequal| (unequal, guest.at(), guest.pages()));
                    if unequal.is_some() {
                        break;
                    }
                }
                Entry::Mark => {}
            }
        }
        self.compare_mirrors(id);
        let node = &self.nodes[id];
        let Some(point) = node.guest.as_ref().map(|guest| guest.at()) else { return };
        let position = LogPosition(node.executed);
        let digests_compared = node.digests;
        if let Some((unequal, point, pages)) = unequal {
            self.step_backup(id, backup::Input::Unequal { point, unequal, pages });
        } else if position.0 > before && self.plant != Some(Plant::LiveWithoutDraining) {
            self.step_backup(id, backup::Input::Executed { point, position, digests_compared });
        }
        if let Some(failed) = awaits {
            self.step_backup(id, backup::Input::AwaitsDisk { device: 0, failed });
        }
        if let Some(through) = self.nodes[id].make_stable.filter(|through| *through <= position)
            && self.plant != Some(Plant::LiveWithoutDraining)
        {
            let input = match self.disks == Disks::Mirrored && self.hang(id) > 0 {
                true => backup::Input::AwaitsStable { device: 0, failed: false },
                false => {
                    self.nodes[id].make_stable = None;
                    backup::Input::Stable { position: through }
                }
            };
            self.step_backup(id, input);
        }
    }

    /// The record to be applied next, with its end, if it has come.
    fn next_record(&mut self, id: usize) -> Result<Option<(Record, LogPosition)>, String> {
        let node = &mut self.nodes[id];
        if let Some(next) = node.next_record.take() {
            return Ok(Some(next));
        }
        loop {
            if let Some(next) = node.decoder.next_record().map_err(|error| error.to_string())? {
                return Ok(Some(next));
            }
            match node.log.pop_front() {
                Some(bytes) => node.decoder.push(bytes),
                None => return Ok(None),
            }
        }
    }

    /// The backup's guest executes up to `point`. Its outputs are kept, and its requests done as far as they are its own.
    fn run_behind(&mut self, id: usize, point: u64) {
        let node = &mut self.nodes[id];
        let Some(guest) = &mut node.guest else { return };
        let mut effects = Vec::new();
        guest.run_to(point, &mut effects);
        for (_, effect) in effects {
            match effect {
                Effect::Output(number, output) => self.nodes[id].kept.keep(number, 100, output),
                Effect::Internal(request) => self.follow(id, request),
            }
        }
    }
}
