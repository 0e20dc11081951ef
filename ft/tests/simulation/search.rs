//! How a VM comes by its next backup: the production [`Search`] with, around it, what a VMM does with a thread
//! and a socket. Whoever goes on alone looks on the standbys that came with the terms of its own copy, and
//! begins the next generation with fresh state machines.

use ft::{
    Backup, BackupConfig, Capabilities, DiskMode, FrameReader, Generation, LogPosition, OutputGate,
    PairId, Primary, PrimaryConfig, Search, Terms, Timing,
};

use crate::network::End;
use crate::node::{Role, Wish};
use crate::plant::Plant;
use crate::world::{Happening, World};

/// How long a host may take to accept a connection.
const CONNECT_TIMEOUT_US: u64 = 5_000_000;
/// A packet that is not answered is sent again after this time.
const RETRANSMISSION_US: u64 = 100_000;

/// The times that every generation goes by.
pub fn timing() -> Timing {
    Timing { clone_timeout_ms: 1_500, disk_timeout_ms: 1_200, ..Timing::default() }
}

fn address(host: usize) -> String {
    format!("tcp:host{host}:7700")
}

fn capabilities(host: usize) -> Capabilities {
    Capabilities {
        host: address(host),
        cpu_model: "simulated".into(),
        memory_bytes: 1 << 20,
        devices: vec!["disk".into()],
        disk_modes: vec![DiskMode::Shared, DiskMode::Mirrored],
    }
}

/// A connection being made.
#[derive(Clone, Copy, Debug)]
pub struct Attempt {
    pub from: End,
    wish: u32,
    standby: usize,
    give_up_at: u64,
}

impl World {
    /// The operator's `ft.enable`: names every host, the one with the VM last.
    pub fn enable(&mut self, id: usize) {
        let count = self.nodes.len();
        let standbys: Vec<String> = (1..=count).map(|next| address((id + next) % count)).collect();
        let generation = self.nodes[id].membership;
        if let Err(reason) = self.arbiter.announce(self.t, id, generation) {
            return self.note(|| format!("host{id} cannot be protected: {reason}"));
        }
        self.begin_search(id, standbys, None);
        if let Some(wish) = &mut self.nodes[id].wish {
            wish.asked_for = true;
        }
    }

    /// The VM has gone live on `id`, where it had its backup under `terms`.
    pub fn inherit(&mut self, id: usize, terms: &Terms) {
        self.begin_search(id, terms.standbys.clone(), Some(&terms.standby));
    }

    fn begin_search(&mut self, id: usize, standbys: Vec<String>, own: Option<&str>) {
        self.withdraw(id);
        let now = self.nodes[id].clock.now(self.t);
        let (mode, reads) = self.disks.terms();
        let search = Search::new(now, standbys.iter().map(String::as_str), own)
            .with_patience(timing().disk_patience(mode, reads));
        self.nodes[id].wish = Some(Wish { search, standbys, asked_for: false });
        self.schedule_search(id);
    }

    /// Nobody wants the VM on `id` protected any more.
    pub fn withdraw(&mut self, id: usize) {
        self.nodes[id].wishes += 1;
        self.nodes[id].wish = None;
    }

    fn schedule_search(&mut self, id: usize) {
        let node = &self.nodes[id];
        let Some(due) = node.wish.as_ref().and_then(|wish| wish.search.due()) else { return };
        let (at, end) = (node.clock.when(self.t, due), node.end());
        self.at(at, Happening::Search { at: end });
    }

    /// Asks the standby that is due, if one is.
    pub fn search(&mut self, id: usize) {
        let now = self.nodes[id].clock.now(self.t);
        let Some(wish) = &mut self.nodes[id].wish else { return };
        let Some(standby) = wish.search.next(now) else { return self.schedule_search(id) };
        let generation = self.nodes[id].membership;
        if let Err(reason) = self.arbiter.announce(self.t, id, generation) {
            return self.search_lost(id, &format!("the arbiter cannot be used: {reason}"));
        }
        let standby = (0..self.nodes.len()).find(|host| address(*host) == standby);
        let attempt = Attempt {
            from: self.nodes[id].end(),
            wish: self.nodes[id].wishes,
            standby: standby.expect("terms name hosts"),
            give_up_at: self.t + CONNECT_TIMEOUT_US,
        };
        let delay = self.rng.range(100, 2_000);
        self.after(delay, Happening::Connects(attempt));
    }

    /// A host is asked for a connection, or asked again.
    pub fn connects(&mut self, attempt: Attempt) {
        let Attempt { from, wish, standby, give_up_at } = attempt;
        let id = from.node;
        if self.nodes[id].wishes != wish {
            return;
        }
        let peer = &self.nodes[standby];
        let unheard = self.network.is_blocked(id, standby, self.t)
            || self.network.is_blocked(standby, id, self.t)
            || !peer.powered;
        if unheard && self.t < give_up_at {
            return self.after(RETRANSMISSION_US, Happening::Connects(attempt));
        }
        let refusal = match &peer.role {
            _ if unheard => Some("nobody answers"),
            _ if !peer.up => Some("connection refused"),
            Role::Listening if peer.connection.is_none() => None,
            Role::Backup(_) => Some("it has a VM already"),
            Role::Listening | Role::Primary(_) | Role::Solo | Role::Idle => {
                Some("connection refused")
            }
        };
        match refusal {
            Some(reason) => self.search_lost(id, reason),
            None => self.protect(id, standby),
        }
    }

    /// A new generation of the pair begins, if it comes to that: fresh machines on both sides.
    fn protect(&mut self, id: usize, standby: usize) {
        let ends = (self.nodes[id].end(), self.nodes[standby].end());
        self.checkers.begins(ends.0, self.nodes[id].membership);
        let connection = self.network.connect(ends.0, ends.1);
        let peer = &mut self.nodes[standby];
        peer.connection = Some((connection, 1));
        let config = BackupConfig { who: peer.who(), capabilities: capabilities(standby) };
        let machine = Backup::new(peer.clock.now(self.t), config);
        peer.role = Role::Backup(Box::new(machine));
        let node = &mut self.nodes[id];
        node.connection = Some((connection, 0));
        node.reader = FrameReader::new();
        node.recording = false;
        node.gate = OutputGate::new();
        node.disk.unread = Default::default();
        node.disk.executed = LogPosition(0);
        let (disk_mode, disk_reads) = self.disks.terms();
        let standbys = node.wish.as_ref().map(|wish| wish.standbys.clone()).unwrap_or_default();
        let config = PrimaryConfig {
            terms: Terms {
                pair: PairId::new("simulated").expect("a good name"),
                generation: Generation(node.membership),
                timing: timing(),
                log_buffer_bytes: 4_000,
                arbiter_url: "file:/nowhere".into(),
                disk_mode,
                disk_reads,
                same_host: false,
                standbys,
                standby: address(standby),
            },
            who: node.who(),
            capabilities: capabilities(id),
            vm_config: b"{}".to_vec(),
        };
        let mut actions = Vec::new();
        let machine = Primary::new(node.clock.now(self.t), config, &mut actions);
        node.role = Role::Primary(Box::new(machine));
        self.note(|| format!("host{id} wants to be protected by host{standby}"));
        self.primary_actions(id, actions);
        self.schedule_tick(id);
        self.schedule_tick(standby);
    }

    /// The standby takes the copy.
    pub fn search_accepted(&mut self, id: usize) {
        let Some(wish) = &mut self.nodes[id].wish else { return };
        wish.search.accepted();
        wish.asked_for = false;
    }

    pub fn search_protected(&mut self, id: usize) {
        self.protections += 1;
        let now = self.nodes[id].clock.now(self.t);
        if let Some(wish) = &mut self.nodes[id].wish {
            wish.search.protected(now);
        }
    }

    pub fn search_differed(&mut self, id: usize) {
        if let Some(wish) = &mut self.nodes[id].wish {
            wish.search.differed();
        }
    }

    /// The standby did not take the VM, or it or its copy was lost.
    pub fn search_lost(&mut self, id: usize, reason: &str) {
        let (now, plant) = (self.nodes[id].clock.now(self.t), self.plant);
        let Some(wish) = &mut self.nodes[id].wish else { return };
        let standby = wish.search.standby().unwrap_or("nobody").to_owned();
        if plant == Some(Plant::SearchGivesUp) && !wish.asked_for {
            return;
        }
        wish.search.lost(now, reason);
        let refused_by_all = wish.asked_for && wish.search.rounds() > 0;
        self.note(|| format!("host{id} has no backup at {standby}: {reason}"));
        if refused_by_all {
            // The operator is told so, and asks again.
            return self.withdraw(id);
        }
        self.schedule_search(id);
    }
}
