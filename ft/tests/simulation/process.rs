//! The VMM process around the state machines: carries out their actions and brings them their inputs.
//! This is what the real runtime does with sockets, threads and timers.

use ft::message::{CloneStart, Message};
use ft::{
    Backup, BackupConfig, Capabilities, Decoder, DiskMode, Encoder, FrameReader, Generation,
    LogPosition, PairId, Primary, PrimaryConfig, Terms, Timing, backup, primary,
};

use crate::guest::Output;
use crate::network::Packet;
use crate::node::{Role, Tagged};
use crate::plant::Plant;
use crate::world::{Happening, World};

pub fn terms(generation: u64) -> Terms {
    let timing = Timing { clone_timeout_ms: 1_500, ..Timing::default() };
    Terms {
        pair: PairId::new("simulated").expect("a good name"),
        generation: Generation(generation),
        timing,
        log_buffer_bytes: 4_000,
        arbiter_url: "file:/nowhere".into(),
        disk_mode: DiskMode::Shared,
        standbys: vec!["tcp:a:7700".into(), "tcp:b:7700".into()],
        standby: "tcp:b:7700".into(),
    }
}

fn capabilities() -> Capabilities {
    Capabilities {
        cpu_model: "simulated".into(),
        memory_bytes: 1 << 20,
        devices: vec!["disk".into()],
        disk_modes: vec![DiskMode::Shared],
    }
}

impl World {
    /// `ft.enable`: the VM on `id` is to be protected by the process on `peer`.
    pub fn protect(&mut self, id: usize, peer: usize, terms: Terms) {
        let generation = terms.generation.0;
        if let Err(reason) = self.arbiter.announce(self.t, id, generation) {
            return self.note(|| format!("host{id} cannot be protected: {reason}"));
        }
        let ends = (self.nodes[id].end(), self.nodes[peer].end());
        let connection = self.network.connect(ends.0, ends.1);
        self.nodes[peer].connection = Some((connection, 1));
        let now = self.nodes[id].clock.now(self.t);
        let node = &mut self.nodes[id];
        node.connection = Some((connection, 0));
        node.reader = FrameReader::new();
        node.recording = false;
        let config = PrimaryConfig {
            terms,
            who: node.who(),
            capabilities: capabilities(),
            vm_config: b"{}".to_vec(),
        };
        let mut actions = Vec::new();
        node.role = Role::Primary(Box::new(Primary::new(now, config, &mut actions)));
        self.note(|| format!("host{id} wants to be protected by host{peer}"));
        self.primary_actions(id, actions);
        self.schedule_tick(id);
    }

    pub fn arrives(&mut self, connection: usize, end: usize, packet: Packet) {
        let id = self.network.connections[connection].ends[end].node;
        if self.nodes[id].connection != Some((connection, end)) {
            return;
        }
        match packet {
            Packet::Closed(why) => {
                self.network.connections[connection].open[end] = false;
                self.nodes[id].connection = None;
                self.connection_lost(id, why.into());
            }
            Packet::Bytes(bytes) => {
                if !self.network.connections[connection].open[end] {
                    return;
                }
                if matches!(self.nodes[id].role, Role::Listening) {
                    let now = self.nodes[id].clock.now(self.t);
                    let who = self.nodes[id].who();
                    let config = BackupConfig { who, capabilities: capabilities() };
                    self.nodes[id].role = Role::Backup(Box::new(Backup::new(now, config)));
                }
                self.nodes[id].reader.push(&bytes);
                loop {
                    match self.nodes[id].reader.next_message() {
                        Ok(Some(message)) => self.hears(id, message),
                        Ok(None) => break,
                        Err(error) => {
                            self.hang_up(id);
                            self.connection_lost(id, error.to_string());
                            break;
                        }
                    }
                }
            }
        }
    }

    fn connection_lost(&mut self, id: usize, reason: String) {
        match self.nodes[id].role {
            Role::Primary(_) => {
                self.step_primary(id, primary::Input::ConnectionLost { reason });
            }
            Role::Backup(_) => self.step_backup(id, backup::Input::ConnectionLost { reason }),
            Role::Listening | Role::Solo | Role::Idle => {}
        }
    }

    fn hears(&mut self, id: usize, mut message: Message) {
        match (&mut message, self.plant) {
            (Message::Heartbeat { echo_us: Some(echo), .. }, Some(Plant::LeaseByReceipt)) => {
                *echo = self.nodes[id].clock.now(self.t).as_micros() as u64;
            }
            (Message::CloneStart(start), Some(Plant::LeaseIgnoredByBackup)) => {
                start.terms.timing.lease_ms = 2 * start.terms.timing.heartbeat_ms;
                start.terms.timing.lease_margin_ms = 1;
            }
            _ => {}
        }
        match self.nodes[id].role {
            Role::Primary(_) => self.step_primary(id, primary::Input::Message(message)),
            Role::Backup(_) => self.step_backup(id, backup::Input::Message(message)),
            Role::Listening | Role::Solo | Role::Idle => {}
        }
    }

    pub fn tick(&mut self, id: usize, due: u64) {
        if self.nodes[id].tick_at != Some(due) {
            return;
        }
        self.nodes[id].tick_at = None;
        match self.nodes[id].role {
            Role::Primary(_) => self.step_primary(id, primary::Input::Tick),
            Role::Backup(_) => self.step_backup(id, backup::Input::Tick),
            Role::Listening | Role::Solo | Role::Idle => {}
        }
    }

    fn schedule_tick(&mut self, id: usize) {
        let node = &mut self.nodes[id];
        let Some(deadline) = node.next_deadline() else { return };
        let at = node.clock.when(self.t, deadline);
        if node.tick_at.is_none_or(|earlier| at < earlier) {
            node.tick_at = Some(at);
            let end = node.end();
            self.at(at, Happening::Tick { at: end, due: at });
        }
    }

    /// An operator's call, which may come at the wrong time and is then refused.
    pub fn operator(&mut self, id: usize, input: primary::Input) {
        if !self.nodes[id].up || self.t < self.nodes[id].frozen_until {
            return;
        }
        let now = self.nodes[id].clock.now(self.t);
        let Role::Primary(machine) = &mut self.nodes[id].role else { return };
        let mut actions = Vec::new();
        if machine.step(now, input, &mut actions).is_ok() {
            self.primary_actions(id, actions);
            self.schedule_tick(id);
        }
    }

    /// As [`World::operator`].
    pub fn operator_takes_over(&mut self, id: usize) {
        if !self.nodes[id].up || self.t < self.nodes[id].frozen_until {
            return;
        }
        let now = self.nodes[id].clock.now(self.t);
        let Role::Backup(machine) = &mut self.nodes[id].role else { return };
        let mut actions = Vec::new();
        if machine.step(now, backup::Input::TakeOver, &mut actions).is_ok() {
            self.backup_actions(id, actions);
            self.schedule_tick(id);
        }
    }

    pub fn step_primary(&mut self, id: usize, input: primary::Input) {
        let now = self.nodes[id].clock.now(self.t);
        let Role::Primary(machine) = &mut self.nodes[id].role else { return };
        let mut actions = Vec::new();
        if let Err(error) = machine.step(now, input, &mut actions) {
            self.checkers.illegal(format!("host{id}: {error}"));
        }
        self.primary_actions(id, actions);
        self.schedule_tick(id);
        if let Role::Primary(machine) = &self.nodes[id].role
            && machine.protected()
            && self.trace.is_some()
        {
            let mut status = ft::FtStatus::default();
            machine.status(now, &mut status);
            self.max_lag_us = self.max_lag_us.max(status.lag_us);
            if status.lag_us > terms(0).timing.max_lag_ms * 1_000 {
                self.lagging_us += self.t - self.lag_seen;
            }
            self.lag_seen = self.t;
        }
    }

    pub fn step_backup(&mut self, id: usize, input: backup::Input) {
        let now = self.nodes[id].clock.now(self.t);
        let Role::Backup(machine) = &mut self.nodes[id].role else { return };
        let mut actions = Vec::new();
        if let Err(error) = machine.step(now, input, &mut actions) {
            self.checkers.illegal(format!("host{id}: {error}"));
        }
        self.backup_actions(id, actions);
        self.schedule_tick(id);
    }

    pub fn send_packet(&mut self, connection: usize, end: usize, packet: Packet) {
        if !self.network.connections[connection].open[end] {
            return;
        }
        if matches!(packet, Packet::Closed(_)) {
            self.network.connections[connection].open[end] = false;
        }
        let arrival = self.network.send(self.t, &mut self.rng, connection, end, packet);
        if let Some((at, connection, end, packet)) = arrival {
            self.at(at, Happening::Arrives { connection, end, packet });
        }
    }

    fn send(&mut self, id: usize, message: &Message) {
        let Some((connection, end)) = self.nodes[id].connection else { return };
        let mut bytes = Vec::new();
        message.append_frame(&mut bytes).expect("fits a frame");
        // Streams know no frames.
        if self.rng.percent(10) && bytes.len() > 1 {
            let rest = bytes.split_off(self.rng.range(1, bytes.len() as u64) as usize);
            self.send_packet(connection, end, Packet::Bytes(bytes));
            bytes = rest;
        }
        self.send_packet(connection, end, Packet::Bytes(bytes));
    }

    fn hang_up(&mut self, id: usize) {
        if let Some((connection, end)) = self.nodes[id].connection.take() {
            self.send_packet(connection, end, Packet::Closed("closed"));
        }
    }

    fn claim(&mut self, id: usize, generation: Generation, who: String) {
        let by = self.nodes[id].end();
        self.checkers.in_doubt(by);
        let delay = self.rng.range(100, 2_000);
        self.after(delay, Happening::AskArbiter { by, who, generation: generation.0 });
    }

    pub fn arbiter_answers(
        &mut self,
        id: usize,
        generation: u64,
        answer: Result<ft::Claim, String>,
    ) {
        let generation = Generation(generation);
        match self.nodes[id].role {
            Role::Primary(_) => {
                self.step_primary(id, primary::Input::ArbiterAnswered { generation, answer })
            }
            Role::Backup(_) => {
                self.step_backup(id, backup::Input::ArbiterAnswered { generation, answer })
            }
            Role::Listening | Role::Solo | Role::Idle => {}
        }
    }

    fn primary_actions(&mut self, id: usize, actions: Vec<primary::Action>) {
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
                    let delay = self.rng.range(500, 20_000);
                    self.after(delay, Happening::CloneStep { at: end, step: 0 });
                }
                primary::Action::RoundTaken { round } => {
                    let step = u32::try_from(round).expect("a round that was sent");
                    let delay = self.rng.range(500, 20_000);
                    self.after(delay, Happening::CloneStep { at: end, step });
                }
                primary::Action::Protected => self.protections += 1,
                primary::Action::Release { through } => {
                    self.release(id, through, true);
                }
                primary::Action::Claim { generation, who, .. } => self.claim(id, generation, who),
                primary::Action::Abandoned { reason } => {
                    self.note(|| format!("host{id} is not protected: {reason}"));
                    self.run_alone(id);
                }
                primary::Action::GoAlone { generation, failover } => {
                    self.note(|| format!("host{id} goes alone: {failover:?}"));
                    self.nodes[id].generation = generation.0;
                    self.checkers.live(end, generation.0);
                    self.run_alone(id);
                }
                primary::Action::Halt { reason } => {
                    self.note(|| format!("host{id} halts: {reason}"));
                    if self.plant == Some(Plant::LoserGoesOn) {
                        self.run_alone(id);
                    } else {
                        self.checkers.ended(end);
                        self.forget_guest(id);
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
                }
                primary::Action::Changed { state, reason } => {
                    self.note(|| {
                        format!("host{id} primary: {state} {}", reason.unwrap_or_default())
                    });
                }
            }
        }
    }

    fn backup_actions(&mut self, id: usize, actions: Vec<backup::Action>) {
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
                | backup::Action::LoadZeroPages { .. } => {}
                backup::Action::LoadState { point, bytes } => {
                    let node = &mut self.nodes[id];
                    node.guest = Some(postcard::from_bytes(&bytes).expect("a guest"));
                    node.decoder = Decoder::new(point);
                    let delay = self.rng.range(500, 30_000);
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
                backup::Action::Protected => self.checkers.armed(end, self.nodes[id].generation),
                backup::Action::Claim { generation, who, .. } => self.claim(id, generation, who),
                backup::Action::GoLive { generation, failover } => {
                    self.note(|| format!("host{id} goes live: {failover:?}"));
                    self.failover_us.extend(failover.live_us);
                    self.go_live(id, generation.0);
                }
                backup::Action::Discard { reason } => {
                    self.note(|| format!("host{id} discards: {reason}"));
                    self.checkers.ended(end);
                    self.forget_guest(id);
                }
                backup::Action::Changed { state, reason } => {
                    self.note(|| {
                        format!("host{id} backup: {state} {}", reason.unwrap_or_default())
                    });
                }
            }
        }
    }

    fn release(&mut self, id: usize, through: LogPosition, checked: bool) {
        let now = self.nodes[id].clock.now(self.t);
        let mut released = Vec::new();
        self.nodes[id].gate.release(now, through, |_, tagged| released.push(tagged));
        let end = self.nodes[id].end();
        let backup = self.nodes[id]
            .connection
            .map(|(connection, end)| self.network.connections[connection].ends[1 - end]);
        for tagged in released {
            if checked {
                self.checkers.released(end, backup, &tagged);
            }
            self.give_to_back_half(id, tagged);
        }
    }

    pub fn give_to_back_half(&mut self, id: usize, tagged: Tagged) {
        let node = &mut self.nodes[id];
        node.back.push_back(tagged);
        if !std::mem::replace(&mut node.back_scheduled, true) {
            let at = node.end();
            let delay = self.rng.range(20, 500);
            self.after(delay, Happening::BackHalf { at });
        }
    }

    /// One system call of the back halves, unless the lease forbids it.
    pub fn back_half(&mut self, id: usize) {
        let now = self.nodes[id].clock.now(self.t);
        let at = self.nodes[id].end();
        let ignored = self.plant == Some(Plant::LeaseIgnoredByBackHalves);
        let may = now < self.nodes[id].lease_until() || ignored;
        let delay = if may {
            if let Some(tagged) = self.nodes[id].back.pop_front() {
                self.checkers.performed(at, &tagged);
                // Well within the margin of the lease.
                let takes = self.rng.range(10, 4_000);
                self.nodes[id].under_way += 1;
                self.after(takes, Happening::Landed { from: at, tagged });
            }
            self.rng.range(20, 300)
        } else {
            2_000
        };
        let more = !self.nodes[id].back.is_empty();
        self.nodes[id].back_scheduled = more;
        if more {
            self.after(delay, Happening::BackHalf { at });
        }
    }

    /// Tells a primary that waits for it that its back halves are quiet.
    pub fn quiet(&mut self, id: usize) {
        let node = &mut self.nodes[id];
        let early = self.plant == Some(Plant::NotQuiesced);
        if node.quiescing && (node.under_way == 0 || early) {
            node.quiescing = false;
            self.step_primary(id, primary::Input::Quiesced);
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

    fn forget_guest(&mut self, id: usize) {
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
        let received = machine.received().0;
        let executed = node.decoder.position().0;
        let kept: Vec<_> = node.kept.take().collect();
        let guest = node.guest.as_ref().expect("a backup has a guest");
        let numbers: Vec<u64> = kept.iter().map(|(number, _)| number.0).collect();
        self.checkers.live(end, generation);
        self.checkers.goes_live(end, generation - 1, executed, received, guest, node.tainted);
        self.checkers.takes_over_outputs(guest.next_output, &numbers);
        let outstanding = guest.outstanding.clone();
        node.role = Role::Solo;
        node.generation = generation;
        let mut outputs = Vec::new();
        if self.plant != Some(Plant::NothingReissued) {
            for (write, client, request) in outstanding {
                let output = Output::Write { id: write, client, request };
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

    pub fn accept(&mut self, id: usize) {
        let node = &self.nodes[id];
        let Role::Backup(machine) = &node.role else { return };
        if node.state_name() != "preparing" {
            return;
        }
        let generation = machine.terms().map_or(0, |terms| terms.generation.0);
        match self.arbiter.verify(self.t, id, generation) {
            Ok(()) => self.step_backup(id, backup::Input::Accept),
            Err(reason) => self.step_backup(id, backup::Input::Refuse { reason }),
        }
    }

    pub fn loaded(&mut self, id: usize) {
        if self.nodes[id].state_name() == "loading" {
            self.nodes[id].loaded = true;
            self.step_backup(id, backup::Input::Loaded);
        }
    }

    pub fn clone_step(&mut self, id: usize, step: u32) {
        if self.nodes[id].state_name() != "copying" {
            return;
        }
        let at = self.nodes[id].end();
        if step < 2 {
            self.send(id, &Message::Payload { bytes: vec![1; 100] });
            let page = vec![7; ft::message::PAGE_BYTES];
            let first = u64::from(step);
            self.send(id, &Message::Pages { first, bytes: page });
            self.send(id, &Message::ZeroPages { first: 2, count: 2 });
            // The next round begins when the backup has taken this one.
            self.send(id, &Message::RoundEnd { round: u64::from(step) + 1 });
            return;
        }
        if !self.nodes[id].back.is_empty() {
            // What went out before the copy was taken is no part of it.
            return self.after(100, Happening::CloneStep { at, step });
        }
        let guest = self.nodes[id].guest.as_ref().expect("a primary has a guest");
        let point = guest.at();
        let state = postcard::to_stdvec(guest).expect("encodes");
        self.send(id, &Message::State { point, bytes: state });
        self.nodes[id].encoder = Encoder::new(point);
        self.nodes[id].recording = true;
        self.step_primary(id, primary::Input::CloneSent);
    }
}
