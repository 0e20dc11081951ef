//! The way of an output from the gate through the back halves.

use ft::{LogPosition, primary};

use crate::node::Tagged;
use crate::plant::Plant;
use crate::world::{Happening, World};

impl World {
    pub fn release(&mut self, id: usize, through: LogPosition, checked: bool) {
        let now = self.nodes[id].clock.now(self.t);
        let mut released = Vec::new();
        self.nodes[id].gate.release(now, through, |_, tagged| released.push(tagged));
        let end = self.nodes[id].end();
        let backup = self.nodes[id]
            .connection
            .map(|(connection, end)| self.network.connections[connection].ends[1 - end]);
        for tagged in released {
            if checked {
                self.checkers.released(self.t, end, backup, &tagged);
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
}
