//! What the state machines of both sides want done, carried out by their process.

use ft::message::{CloneStart, Message};
use ft::{Decoder, LogPosition, backup, primary};

use crate::disks::Disks;
use crate::guest::Output;
use crate::node::{Role, Tagged};
use crate::plant::Plant;
use crate::world::{Happening, World};

impl World {
    pub fn primary_actions(&mut self, id: usize, actions: Vec<primary::Action>) {
        let end = self.nodes[id].end();
        for action in actions {
            match action {
                primary::Action::Send(message) => {
                    self.send(id, &message);
                    if let (Message::Log { position, bytes }, Some(plant)) = (&message, self.plant)
                        && plant == Plant::AcknowledgedBeforeReceipt
                    {
                        let received = LogPosition(position.0 + bytes.len() as u64);
                        self.step_primary(id, primary::Input::Message(Message::Ack { received }));
                    }
                }
                primary::Action::HangUp => self.hang_up(id),
                primary::Action::StartClone => {
                    self.search_accepted(id);
                    let delay = self.rng.range(500, 20_000);
                    self.after(delay, Happening::CloneStep { at: end, step: 0 });
                }
                primary::Action::RoundTaken { round } => {
                    let step = u32::try_from(round).expect("a round that was sent");
                    let delay = self.rng.range(500, 20_000);
                    self.after(delay, Happening::CloneStep { at: end, step });
                }
                primary::Action::DiskDiffers { differing, .. } => self.disk_differs(id, &differing),
                primary::Action::BackupExecuted { position } => {
                    self.nodes[id].gate.executed(position);
                    self.nodes[id].disk.executed = position;
                }
                primary::Action::Protected => self.search_protected(id),
                primary::Action::Release { through } => {
                    self.release(id, through, true);
                }
                primary::Action::Claim { generation, who, .. } => self.claim(id, generation, who),
                primary::Action::Abandoned { reason } => {
                    self.note(|| format!("host{id} is not protected: {reason}"));
                    self.run_alone(id);
                    self.search_lost(id, &reason);
                }
                primary::Action::GoAlone { generation, failover } => {
                    self.note(|| format!("host{id} goes alone: {failover:?}"));
                    self.lives_in(id, generation.0);
                    self.run_alone(id);
                    self.search_lost(id, &failover.cause);
                }
                primary::Action::Halt { reason } => {
                    self.note(|| format!("host{id} halts: {reason}"));
                    if self.plant == Some(Plant::LoserGoesOn) {
                        self.run_alone(id);
                    } else {
                        self.checkers.ended(end);
                        self.halt(id);
                    }
                }
                primary::Action::LogHandOver => self.nodes[id].log_hand_over = true,
                primary::Action::Quiesce => {
                    self.nodes[id].quiescing = true;
                    self.after(1, Happening::Quiet { at: end });
                }
                primary::Action::Throttle(fraction) => self.nodes[id].throttle = fraction,
                primary::Action::Stall => self.nodes[id].stalled = true,
                primary::Action::Unstall => self.nodes[id].stalled = false,
                primary::Action::Diverged { unequal, .. } => {
                    self.note(|| format!("host{id} hears that the backup differs: {unequal}"));
                    self.search_differed(id);
                }
                primary::Action::Changed { state, reason } => {
                    self.note(|| {
                        format!("host{id} primary: {state} {}", reason.unwrap_or_default())
                    });
                }
            }
        }
    }

    pub fn backup_actions(&mut self, id: usize, actions: Vec<backup::Action>) {
        let end = self.nodes[id].end();
        for action in actions {
            match action {
                backup::Action::Send(message) => self.send(id, &message),
                backup::Action::HangUp => self.hang_up(id),
                backup::Action::Prepare(start) => {
                    let CloneStart { terms, .. } = *start;
                    self.nodes[id].generation = terms.generation.0;
                    let delay = self.rng.range(500, 10_000);
                    self.after(delay, Happening::Accept { at: end });
                }
                backup::Action::LoadPayload { .. }
                | backup::Action::LoadPages { .. }
                | backup::Action::LoadZeroPages { .. }
                | backup::Action::ZeroDisk { .. } => {}
                backup::Action::CompareDisk { hashes, .. } => self.compare_disk(id, &hashes),
                backup::Action::LoadDisk { offset, bytes, .. } => {
                    self.load_disk(id, offset, &bytes);
                }
                backup::Action::LoadState { point, bytes } => {
                    let node = &mut self.nodes[id];
                    node.guest = Some(postcard::from_bytes(&bytes).expect("a guest"));
                    node.decoder = Decoder::new(point);
                    let stable = if self.disks == Disks::Mirrored { self.hang(id) } else { 0 };
                    let delay = self.rng.range(500, 30_000) + stable;
                    self.after(delay, Happening::Loaded { at: end });
                }
                backup::Action::Replay { end: position, bytes } => {
                    self.checkers.received(end, position.0);
                    self.nodes[id].log.push_back(bytes);
                    if self.plant == Some(Plant::LiveWithoutDraining) {
                        let point = ft::ExecutionPoint(0);
                        self.step_backup(
                            id,
                            backup::Input::Executed { point, position, digests_compared: 0 },
                        );
                    }
                }
                backup::Action::MakeStable { through } => {
                    self.nodes[id].make_stable = Some(through);
                    if self.plant == Some(Plant::LiveWithoutDraining) {
                        self.step_backup(id, backup::Input::Stable { position: through });
                    }
                }
                backup::Action::Protected => self.checkers.armed(end, self.nodes[id].generation),
                backup::Action::Claim { generation, who, .. } => self.claim(id, generation, who),
                backup::Action::GoLive { generation, failover } => {
                    self.note(|| format!("host{id} goes live: {failover:?}"));
                    self.failover_us.extend(failover.live_us);
                    self.go_live(id, generation.0);
                }
                backup::Action::Discard { reason } => {
                    self.note(|| format!("host{id} discards: {reason}"));
                    if self.nodes[id].tainted {
                        let node = &self.nodes[id];
                        self.checkers.differed(node.generation, node.who());
                    }
                    self.checkers.ended(end);
                    self.listen_again(id);
                }
                backup::Action::Changed { state, reason } => {
                    self.note(|| {
                        format!("host{id} backup: {state} {}", reason.unwrap_or_default())
                    });
                }
            }
        }
    }

    fn run_alone(&mut self, id: usize) {
        self.nodes[id].role = Role::Solo;
        self.release(id, LogPosition(u64::MAX), false);
        let node = &mut self.nodes[id];
        node.recording = false;
        node.paused = false;
        node.log_hand_over = false;
        node.stalled = false;
        node.throttle = 0.0;
    }

    /// From here on `id` lives in `generation`, and looks for a backup in it.
    fn lives_in(&mut self, id: usize, generation: u64) {
        self.checkers.live(self.nodes[id].end(), generation);
        let old = self.plant == Some(Plant::OldGenerationAgain);
        let node = &mut self.nodes[id];
        node.generation = generation;
        node.membership = generation - u64::from(old);
    }

    fn halt(&mut self, id: usize) {
        self.withdraw(id);
        let node = &mut self.nodes[id];
        node.role = Role::Idle;
        node.guest = None;
        node.gate.discard();
        node.back.clear();
        node.log.clear();
    }

    fn go_live(&mut self, id: usize, generation: u64) {
        self.failovers += 1;
        let end = self.nodes[id].end();
        let node = &mut self.nodes[id];
        let Role::Backup(machine) = &node.role else { return };
        let terms = machine.terms().cloned();
        let received = machine.received().0;
        let executed = node.executed;
        let kept: Vec<_> = node.kept.take().collect();
        let numbers: Vec<u64> = kept.iter().map(|(number, _)| number.0).collect();
        self.lives_in(id, generation);
        let node = &mut self.nodes[id];
        let guest = node.guest.as_ref().expect("a backup has a guest");
        self.checkers.goes_live(end, generation - 1, executed, received, guest, node.tainted);
        self.checkers.takes_over_outputs(guest.next_output, &numbers);
        let tainted = node.tainted;
        let outstanding = guest.outstanding.clone();
        node.role = Role::Solo;
        if let Some(terms) = terms {
            self.inherit(id, &terms);
        }
        if !tainted {
            let image = *self.image(id);
            self.checkers.survivors_disk(self.t, &image, &self.waiting);
        }
        let mut outputs = Vec::new();
        if self.plant != Some(Plant::NothingReissued) {
            for request in self.take_over_requests(id, outstanding) {
                let output = Output::Disk(request);
                // Its number, unless the predecessor has said that it is out.
                let number = kept.iter().find(|(_, other)| *other == output);
                outputs.push((number.map_or(ft::OutputNumber(0), |(number, _)| *number), output));
            }
        }
        let answers = kept.into_iter().filter(|(_, out)| matches!(out, Output::Answer { .. }));
        outputs.extend(answers);
        for (number, output) in outputs {
            self.give_to_back_half(id, Tagged { number, output, generation, position: None });
        }
    }

    /// A VMM that has discarded its VM waits for the next, as the same process.
    fn listen_again(&mut self, id: usize) {
        self.nodes[id].listen_again();
        let at = self.nodes[id].end();
        self.after(1_000, Happening::Quantum { at });
    }
}
