//! The VMM process around the state machines: brings them their inputs and the time. This is what the real
//! runtime does with sockets, threads and timers. What becomes of their actions is in `actions.rs`.

use ft::message::Message;
use ft::{Generation, backup, primary};

use crate::network::Packet;
use crate::node::Role;
use crate::plant::Plant;
use crate::search::timing;
use crate::world::{Happening, World};

impl World {
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

    pub fn schedule_tick(&mut self, id: usize) {
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
            if status.lag_us > timing().max_lag_ms * 1_000 {
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

    pub fn send(&mut self, id: usize, message: &Message) {
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

    pub fn hang_up(&mut self, id: usize) {
        if let Some((connection, end)) = self.nodes[id].connection.take() {
            self.send_packet(connection, end, Packet::Closed("closed"));
        }
    }

    pub fn claim(&mut self, id: usize, generation: Generation, who: String) {
        let by = self.nodes[id].end();
        self.checkers.in_doubt(by);
        if self.plant == Some(Plant::NextWithoutClaim) {
            let answer = Ok(ft::Claim::Won);
            return self
                .after(0, Happening::ArbiterAnswers { to: by, generation: generation.0, answer });
        }
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
}
