//! The network between hosts: byte streams in order, delayed, held back by partitions, broken by
//! resets. As with TCP, nothing in a standing connection is lost, only late.

use std::collections::BTreeMap;

use crate::rng::Rng;

/// Who holds an end of a connection: a node and which of its lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct End {
    pub node: usize,
    pub life: u32,
}

/// What travels.
#[derive(Clone, Debug)]
pub enum Packet {
    Bytes(Vec<u8>),
    /// The other side hung up, or its process died.
    Closed(&'static str),
}

struct Direction {
    last_arrival: u64,
    held: Vec<Packet>,
}

pub struct Connection {
    pub ends: [End; 2],
    /// Whether each end still takes part.
    pub open: [bool; 2],
    directions: [Direction; 2],
}

pub struct Network {
    pub connections: Vec<Connection>,
    /// Until when nothing passes from one node to another.
    blocked: BTreeMap<(usize, usize), u64>,
    pub slow_until: u64,
}

/// A packet's arrival: when, on which connection, at which end.
pub type Arrival = (u64, usize, usize, Packet);

impl Network {
    pub fn new() -> Self {
        Self { connections: Vec::new(), blocked: BTreeMap::new(), slow_until: 0 }
    }

    pub fn connect(&mut self, from: End, to: End) -> usize {
        let direction = || Direction { last_arrival: 0, held: Vec::new() };
        self.connections.push(Connection {
            ends: [from, to],
            open: [true, true],
            directions: [direction(), direction()],
        });
        self.connections.len() - 1
    }

    pub fn is_blocked(&self, from: usize, to: usize, now: u64) -> bool {
        self.blocked.get(&(from, to)).is_some_and(|until| now < *until)
    }

    pub fn block(&mut self, from: usize, to: usize, until: u64) {
        let entry = self.blocked.entry((from, to)).or_default();
        *entry = (*entry).max(until);
    }

    /// Sends from an end; gives the arrival, unless a partition holds the packet back.
    pub fn send(
        &mut self,
        now: u64,
        rng: &mut Rng,
        id: usize,
        from: usize,
        packet: Packet,
    ) -> Option<Arrival> {
        let to = 1 - from;
        let (a, b) = {
            let connection = &self.connections[id];
            (connection.ends[from].node, connection.ends[to].node)
        };
        let blocked = self.is_blocked(a, b, now);
        let slow = now < self.slow_until;
        let connection = &mut self.connections[id];
        if !connection.open[to] {
            return None;
        }
        let direction = &mut connection.directions[to];
        if blocked || !direction.held.is_empty() {
            direction.held.push(packet);
            return None;
        }
        let delay = if slow { rng.range(20_000, 90_000) } else { rng.range(50, 1_500) };
        direction.last_arrival = (now + delay).max(direction.last_arrival);
        Some((direction.last_arrival, id, to, packet))
    }

    /// What partitions held back and no longer do.
    pub fn healed(&mut self, now: u64, rng: &mut Rng) -> Vec<Arrival> {
        let mut arrivals = Vec::new();
        for id in 0..self.connections.len() {
            for to in 0..2 {
                let ends = self.connections[id].ends;
                if self.is_blocked(ends[1 - to].node, ends[to].node, now) {
                    continue;
                }
                let direction = &mut self.connections[id].directions[to];
                for packet in std::mem::take(&mut direction.held) {
                    // A retransmission timer has to fire first.
                    let arrival = now + rng.range(100, 30_000);
                    direction.last_arrival = arrival.max(direction.last_arrival);
                    arrivals.push((direction.last_arrival, id, to, packet));
                }
            }
        }
        arrivals
    }

    /// Everything under way to this end is lost.
    pub fn drop_held(&mut self, id: usize, to: usize) {
        self.connections[id].directions[to].held.clear();
    }
}
