//! How a backup is made: the steps of the copy on both sides.

use ft::message::Message;
use ft::{Encoder, backup, primary};

use crate::node::Role;
use crate::world::{Happening, World};

impl World {
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
            let guest = self.nodes[id].guest.as_ref();
            for request in guest.map(|guest| guest.outstanding.clone()).unwrap_or_default() {
                self.follow(id, request);
            }
            self.step_backup(id, backup::Input::Loaded);
        }
    }

    pub fn clone_step(&mut self, id: usize, step: u32) {
        if self.nodes[id].state_name() != "copying" {
            return;
        }
        let at = self.nodes[id].end();
        if step < 2 {
            if step == 0 {
                self.compare_disks(id);
            }
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
        self.send_disk(id);
        self.send(id, &Message::State { point, bytes: state });
        self.nodes[id].encoder = Encoder::new(point);
        self.nodes[id].recording = true;
        self.step_primary(id, primary::Input::CloneSent);
    }
}
