//! How faults come over the world, and how its manager sets things right again.

use crate::faults::Fault;
use crate::network::Packet;
use crate::node::Role;
use crate::plant::Plant;
use crate::world::{Happening, World};

impl World {
    pub fn fault(&mut self, fault: Fault) {
        self.note(|| format!("FAULT {fault:?}"));
        let t = self.t;
        match fault {
            Fault::CrashProcess { node } => self.crash(node, true),
            Fault::CrashHost { node } => self.crash(node, false),
            Fault::CrashLive => {
                if let Some((_, live)) = self.checkers.newest()
                    && self.lives(live)
                {
                    self.crash(live.node, true);
                }
            }
            Fault::Freeze { node, for_us } => {
                self.nodes[node].frozen_until = self.nodes[node].frozen_until.max(t + for_us);
                if self.plant == Some(Plant::ClockStopsWhileFrozen) {
                    self.nodes[node].clock.jump(-(for_us as i64));
                }
                self.after(for_us, Happening::Thaw { node });
            }
            Fault::Partition { for_us } => {
                for from in 0..self.nodes.len() {
                    self.block_from(from, for_us);
                }
            }
            Fault::PartitionOneWay { from, for_us } => self.block_from(from, for_us),
            Fault::Reset => self.reset(),
            Fault::SlowLink { for_us } => self.network.slow_until = t + for_us,
            Fault::Garbage { to } => {
                if let Some((connection, end)) = self.nodes[to].connection
                    && self.nodes[to].reader.pending_bytes() == 0
                {
                    let packet = Packet::Bytes(vec![0xff; 64]);
                    self.after(0, Happening::Arrives { connection, end, packet });
                }
            }
            Fault::ArbiterDown { node, for_us } => {
                for host in 0..self.nodes.len() {
                    if node.is_none_or(|node| node == host) {
                        self.arbiter.down_until.insert(host, t + for_us);
                    }
                }
            }
            Fault::ArbiterForgetful { for_us } => self.arbiter.forgetful_until = t + for_us,
            Fault::ArbiterLate { for_us } => self.arbiter.late_until = t + for_us,
            Fault::ArbiterElsewhere { node, for_us } => {
                self.arbiter.elsewhere_until.insert(node, t + for_us);
            }
            Fault::SlowDisk { for_us } => self.disk_slow_until = t + for_us,
            Fault::DiskFails { node, for_us, percent } => {
                let disk = &mut self.nodes[node].disk;
                disk.fails_until = disk.fails_until.max(self.t + for_us);
                disk.fails_percent = percent;
            }
            Fault::DiskHangs { node, for_us } => {
                let disk = &mut self.nodes[node].disk;
                disk.hangs_until = disk.hangs_until.max(t + for_us);
            }
            Fault::ArbiterSlow { for_us } => self.arbiter.slow_until = t + for_us,
            Fault::SlowReplay { for_us } => {
                for node in &mut self.nodes {
                    node.slow_until = t + for_us;
                }
            }
            Fault::ClockJump { node, by_us } => {
                // That a clock keeps to real time while its host is a backup is what every lease
                // rests on; a primary's may do what it likes, forwards.
                if !matches!(self.nodes[node].role, Role::Backup(_)) {
                    self.nodes[node].clock.jump(by_us as i64);
                }
            }
            Fault::FlipBit => {
                for node in &mut self.nodes {
                    if let (Role::Backup(_), Some(guest)) = (&node.role, &mut node.guest) {
                        guest.state ^= 1;
                        node.tainted = true;
                    }
                }
            }
            Fault::FlipInPage { page } => {
                for node in &mut self.nodes {
                    if let (Role::Backup(_), Some(guest)) = (&node.role, &mut node.guest) {
                        guest.memory[page] ^= 1;
                        node.tainted = true;
                    }
                }
            }
            Fault::HandOver => {
                for node in 0..self.nodes.len() {
                    if matches!(self.nodes[node].role, Role::Primary(_)) {
                        self.operator(node, ft::primary::Input::HandOver);
                    }
                }
            }
            Fault::TakeOver => {
                for node in 0..self.nodes.len() {
                    if matches!(self.nodes[node].role, Role::Backup(_)) {
                        self.operator_takes_over(node);
                    }
                }
            }
            Fault::Disable => {
                for node in 0..self.nodes.len() {
                    if self.nodes[node].wish.is_some() {
                        self.withdraw(node);
                        let reason = "the operator wants it".into();
                        self.operator(node, ft::primary::Input::Disable { reason });
                    }
                }
            }
        }
    }

    fn block_from(&mut self, from: usize, for_us: u64) {
        for to in 0..self.nodes.len() {
            self.network.block(from, to, self.t + for_us);
        }
        self.after(for_us + 1, Happening::Heal);
    }

    fn crash(&mut self, node: usize, kernel_lives: bool) {
        if !self.nodes[node].up {
            return;
        }
        let end = self.nodes[node].end();
        self.checkers.crashed(end, self.nodes[node].who());
        self.nodes[node].up = false;
        self.nodes[node].powered = kernel_lives;
        self.nodes[node].backlog.clear();
        if kernel_lives && let Some((connection, end)) = self.nodes[node].connection {
            self.send_packet(connection, end, Packet::Closed("reset by peer"));
        }
    }

    /// Connections break, with what is under way in them; each side learns of it sooner or later.
    fn reset(&mut self) {
        for id in 0..self.network.connections.len() {
            if self.network.connections[id].open != [true, true] {
                continue;
            }
            for end in 0..2 {
                self.network.drop_held(id, end);
                self.network.connections[id].open[end] = false;
                let late = if self.rng.percent(70) {
                    self.rng.range(100, 5_000)
                } else {
                    self.rng.range(5_000, 1_000_000)
                };
                let packet = Packet::Closed("broken");
                self.after(late, Happening::Arrives { connection: id, end, packet });
            }
        }
    }

    /// A frozen process finds everything that happened meanwhile, in any order but that of each
    /// connection's bytes.
    pub fn thaw(&mut self, node: usize) {
        if self.t < self.nodes[node].frozen_until {
            return;
        }
        let backlog = std::mem::take(&mut self.nodes[node].backlog);
        let (arrivals, mut others): (Vec<_>, Vec<_>) = backlog
            .into_iter()
            .partition(|happening| matches!(happening, Happening::Arrives { .. }));
        let mut arrivals = arrivals.into_iter().peekable();
        while arrivals.peek().is_some() || !others.is_empty() {
            let take_arrival = others.is_empty() || self.rng.percent(60);
            let next = match (take_arrival, arrivals.peek().is_some()) {
                (true, true) => arrivals.next(),
                _ if !others.is_empty() => {
                    let index = self.rng.range(0, others.len() as u64) as usize;
                    Some(others.swap_remove(index))
                }
                _ => arrivals.next(),
            };
            if let Some(happening) = next {
                self.happen(happening);
            }
        }
    }

    /// Restarts what has ended, as a VMM that waits for a VM, and asks for protection where nobody has.
    pub fn manage(&mut self) {
        for id in 0..self.nodes.len() {
            let node = &self.nodes[id];
            let ended = !node.up || matches!(node.role, Role::Idle);
            if ended && self.t >= node.frozen_until && self.rng.percent(20) {
                self.nodes[id].restart();
                let at = self.nodes[id].end();
                self.after(1_000, Happening::Quantum { at });
                let who = self.nodes[id].who();
                self.note(|| format!("{who} starts"));
            }
        }
        let unprotected = (0..self.nodes.len()).find(|id| {
            let node = &self.nodes[*id];
            let awake = node.up && self.t >= node.frozen_until;
            awake && matches!(node.role, Role::Solo) && node.wish.is_none()
        });
        if let Some(id) = unprotected
            && self.rng.percent(60)
        {
            self.enable(id);
        }
        self.after(60_000, Happening::Manage);
    }
}
