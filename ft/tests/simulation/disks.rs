//! The disks of the hosts, and what the two sides of a pair do about the requests of their guests: the rules of
//! `vmm/src/run_loop/disks.rs` in the small. A disk has one block for each client.

use std::collections::{BTreeMap, BTreeSet};

use ft::message::{DISK_BLOCK_BYTES, DISK_HASH_BYTES, Message};
use ft::{DiskMode, DiskReads, Event, LogPosition, backup};
use serde::{Deserialize, Serialize};

use crate::guest::{CLIENTS, Op, Request};
use crate::network::End;
use crate::node::Role;
use crate::plant::Plant;
use crate::world::{Happening, World};

/// What is on a disk, by block.
pub type Image = [u64; CLIENTS];

/// How a pair holds its disks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Disks {
    /// One image; the primary does everything, and the log has what was read.
    Shared,
    /// One image; the backup reads by itself.
    BackupReads,
    /// An image of each side's own.
    Mirrored,
}

impl Disks {
    /// All three come equally often.
    pub fn of_seed(seed: u64) -> Self {
        match seed % 3 {
            0 => Self::Shared,
            1 => Self::BackupReads,
            _ => Self::Mirrored,
        }
    }

    pub fn terms(self) -> (DiskMode, DiskReads) {
        match self {
            Self::Shared => (DiskMode::Shared, DiskReads::Log),
            Self::BackupReads => (DiskMode::Shared, DiskReads::Backup),
            Self::Mirrored => (DiskMode::Mirrored, DiskReads::Log),
        }
    }

    /// Whether a request leaves the VM: the primary alone does it, through the gate.
    pub fn is_output(self, op: Op) -> bool {
        op != Op::Read && self != Self::Mirrored
    }

    /// Whether a backup does a request itself.
    pub fn backup_does(self, op: Op) -> bool {
        match self {
            Self::Shared => false,
            Self::BackupReads => op == Op::Read,
            Self::Mirrored => true,
        }
    }
}

/// What was read, or nothing, if a request was done.
pub type Outcome = Result<Vec<u8>, Failed>;

/// A request failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Failed;

/// What a completion in the log is to the backup.
pub enum Settled {
    Apply(Event),
    Wait { failed: bool },
}

/// What a host has and knows of disks.
#[derive(Default)]
pub struct HostDisk {
    /// The host's own image. It outlives every process.
    pub image: Image,
    /// Backup: until when its way to its disks does nothing.
    pub hangs_until: u64,
    /// Until when what is asked of its disks fails.
    pub fails_until: u64,
    /// How much of it.
    pub fails_percent: u64,
    /// Primary: blocks in which a failed write may have left something else than on the backup.
    pub doubtful: BTreeSet<usize>,
    /// Live: what was under way when it went live, and is tried until it is done.
    inherited: BTreeMap<u64, Request>,
    /// What the guest has as completed while the host still works on it.
    strays: BTreeSet<u64>,
    /// Primary: blocks that the copy has yet to bring over, from its beginning to the freeze.
    uncopied: Option<BTreeSet<usize>>,
    /// Backup: what it was given to do, and how that ended once it has.
    pub issued: BTreeMap<u64, (Request, Option<Outcome>)>,
    /// Primary: where in the log the newest read of each block is completed.
    pub unread: [LogPosition; CLIENTS],
    /// Primary: what the backup is known to have executed.
    pub executed: LogPosition,
}

/// How often the rules had something to do.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tally {
    /// Blocks brought over by copies.
    pub copied: u64,
    /// A backup waited for its own disk.
    pub awaited: u64,
    /// A backup tried again what had failed on its own disk.
    pub tried_again: u64,
    /// A primary's guest was told of a failure.
    pub told: u64,
    /// Data that each side could have read for itself were shipped.
    pub shipped: u64,
    /// A write waited for the backup's read.
    pub behind: u64,
    /// Images were compared.
    pub compared: u64,
}

impl World {
    /// The image that a host works on.
    pub fn image(&mut self, node: usize) -> &mut Image {
        match self.disks {
            Disks::Mirrored => &mut self.nodes[node].disk.image,
            Disks::Shared | Disks::BackupReads => &mut self.disk,
        }
    }

    fn late(&mut self) -> u64 {
        if self.t < self.disk_slow_until && self.rng.percent(50) {
            self.rng.range(20_000, 500_000)
        } else {
            0
        }
    }

    /// How long the host's disks still hang.
    pub fn hang(&self, id: usize) -> u64 {
        self.nodes[id].disk.hangs_until.saturating_sub(self.t)
    }

    /// A host begins a request that is no output.
    pub fn issue(&mut self, id: usize, request: Request) {
        self.issue_later(id, request, 0);
    }

    /// As [`Self::issue`]; the guest never hears that it fails.
    fn issue_patiently(&mut self, id: usize, request: Request) {
        self.nodes[id].disk.inherited.insert(request.id, request);
        self.issue(id, request);
    }

    fn issue_later(&mut self, id: usize, request: Request, hang: u64) {
        let from = self.nodes[id].end();
        let takes = self.rng.range(10, 4_000) + self.late() + hang;
        self.after(takes, Happening::Worked { from, request });
    }

    /// A backup begins what it does itself.
    pub fn follow(&mut self, id: usize, request: Request) {
        if self.disks.backup_does(request.op) {
            self.nodes[id].disk.issued.insert(request.id, (request, None));
            let hang = self.hang(id);
            self.issue_later(id, request, hang);
        }
    }

    /// A host's disk does a request.
    pub fn worked(&mut self, from: End, request: Request) {
        if !self.lives(from) {
            return;
        }
        let disk = &self.nodes[from.node].disk;
        let fails = self.t < disk.fails_until && self.rng.percent(disk.fails_percent);
        let done = !fails || self.rng.percent(50);
        let block = &mut self.image(from.node)[request.block];
        let mut data = Vec::new();
        match request.op {
            Op::Read => data.extend_from_slice(&block.to_le_bytes()),
            Op::Write(value) if done => *block = value,
            Op::Write(_) => {}
        }
        let outcome = if fails { Err(Failed) } else { Ok(data) };
        if let (Op::Write(_), Some(uncopied)) =
            (request.op, &mut self.nodes[from.node].disk.uncopied)
        {
            uncopied.insert(request.block);
        }
        let late = self.late();
        self.after(late, Happening::Completed { at: from, request: request.id, outcome });
    }

    /// A process hears how a request has ended.
    pub fn completed(&mut self, id: usize, request: u64, ended: Outcome) {
        let node = &mut self.nodes[id];
        if node.disk.strays.remove(&request) {
            return;
        }
        match node.role {
            Role::Backup(_) => {
                if let Some((_, outcome)) = node.disk.issued.get_mut(&request) {
                    *outcome = Some(ended);
                }
                // A vCPU that waits for it is woken.
                if node.next_record.is_some() {
                    self.replay(id);
                }
            }
            Role::Primary(_) | Role::Solo => {
                match node.disk.inherited.remove(&request).filter(|_| ended.is_err()) {
                    Some(again) => self.issue_patiently(id, again),
                    None => node.inputs.push(completion(request, ended)),
                }
            }
            Role::Listening | Role::Idle => {}
        }
    }

    /// A completion as the backup applies it, or that its own disk is not so far.
    pub fn settle(&mut self, id: usize, event: &Event) -> Settled {
        let as_logged = || Settled::Apply(event.clone());
        let Event::DiskCompletion { request, status, data, .. } = event else { return as_logged() };
        let early = self.plant == Some(Plant::OwnDiskNotAwaited);
        let Some((issued, outcome)) = self.nodes[id].disk.issued.get(request).cloned() else {
            return as_logged();
        };
        let failed = *status != 0;
        let told = failed || !data.is_empty();
        // On a shared disk the primary's word does: nothing is left to be done here.
        let known = told && self.disks == Disks::BackupReads;
        let own = match outcome {
            Some(Err(Failed)) if !failed && self.plant != Some(Plant::OwnFailureTaken) => {
                self.tally.tried_again += 1;
                self.follow(id, issued);
                return Settled::Wait { failed: true };
            }
            Some(Ok(data)) => data,
            Some(Err(Failed)) if issued.op == Op::Read => vec![0; 8],
            Some(Err(Failed)) => Vec::new(),
            None if known => {
                self.nodes[id].disk.strays.insert(*request);
                Vec::new()
            }
            None if early && issued.op == Op::Read => {
                self.image(id)[issued.block].to_le_bytes().to_vec()
            }
            None if early => Vec::new(),
            None => {
                self.tally.awaited += 1;
                return Settled::Wait { failed: false };
            }
        };
        self.nodes[id].disk.issued.remove(request);
        if told { as_logged() } else { Settled::Apply(completion(*request, Ok(own))) }
    }

    /// A completion as the primary logs it: data that the backup has itself are left out.
    pub fn logged(&mut self, id: usize, request: Request, outcome: &Outcome) -> Event {
        let doubtful = &mut self.nodes[id].disk.doubtful;
        let ship = match (self.disks, request.op, outcome) {
            (_, Op::Write(_), Ok(_)) => {
                doubtful.remove(&request.block);
                false
            }
            (Disks::Mirrored, Op::Write(_), Err(Failed)) => {
                doubtful.insert(request.block);
                false
            }
            (Disks::Mirrored, Op::Read, Ok(_)) => doubtful.contains(&request.block),
            _ => false,
        };
        self.tally.told += u64::from(outcome.is_err());
        self.tally.shipped += u64::from(ship);
        let ship = ship && self.plant != Some(Plant::DoubtIgnored);
        let bare = outcome.is_ok() && !ship && self.disks.backup_does(request.op);
        completion(request.id, if bare { Ok(Vec::new()) } else { outcome.clone() })
    }

    /// What the requests that are under way need when `id` goes live: what runs goes on, what is done is told, the rest
    /// begins again. Gives the writes that are to go through the back halves.
    pub fn take_over_requests(&mut self, id: usize, outstanding: Vec<Request>) -> Vec<Request> {
        let mut issued = std::mem::take(&mut self.nodes[id].disk.issued);
        let mut writes = Vec::new();
        for request in outstanding {
            match issued.remove(&request.id) {
                Some((_, Some(Ok(data)))) => {
                    self.nodes[id].inputs.push(completion(request.id, Ok(data)));
                }
                Some((_, None)) => {
                    self.nodes[id].disk.inherited.insert(request.id, request);
                }
                Some((_, Some(Err(Failed)))) => self.issue_patiently(id, request),
                None if self.disks.is_output(request.op) => writes.push(request),
                None => self.issue_patiently(id, request),
            }
        }
        writes
    }

    /// The copy begins: the primary says what is on its disk.
    pub fn compare_disks(&mut self, id: usize) {
        if self.disks != Disks::Mirrored {
            return;
        }
        let mut hashes = Vec::new();
        for block in self.nodes[id].disk.image {
            let mut hash = [0; DISK_HASH_BYTES];
            hash[..8].copy_from_slice(&block.to_le_bytes());
            hashes.extend_from_slice(&hash);
        }
        self.nodes[id].disk.uncopied = Some(BTreeSet::new());
        self.send(id, &Message::DiskHashes { disk: 0, first: 0, hashes });
    }

    /// The backup looks what of it is different.
    pub fn compare_disk(&mut self, id: usize, hashes: &[u8]) {
        // Whoever had a VM before knows what is on its disk.
        let trusted = self.plant == Some(Plant::StaleDiskTrusted) && self.nodes[id].life > 0;
        let blocks = self.nodes[id].disk.image.iter().zip(hashes.chunks(DISK_HASH_BYTES));
        let bits = blocks.enumerate().map(|(index, (ours, theirs))| {
            let differs = ours.to_le_bytes() != theirs[..8] && !trusted;
            u8::from(differs) << index
        });
        let differing = vec![bits.sum()];
        self.step_backup(id, backup::Input::DiskCompared { disk: 0, first: 0, differing });
    }

    /// The primary learns it.
    pub fn disk_differs(&mut self, id: usize, differing: &[u8]) {
        if let Some(uncopied) = &mut self.nodes[id].disk.uncopied {
            uncopied.extend((0..CLIENTS).filter(|block| differing[0] >> block & 1 != 0));
        }
    }

    /// The guest stands still: the primary sends what differs, and what was written since it was compared.
    pub fn send_disk(&mut self, id: usize) {
        self.nodes[id].disk.doubtful.clear();
        for block in self.nodes[id].disk.uncopied.take().unwrap_or_default() {
            let bytes = self.nodes[id].disk.image[block].to_le_bytes().to_vec();
            let offset = (block * DISK_BLOCK_BYTES) as u64;
            self.send(id, &Message::DiskData { disk: 0, offset, bytes });
        }
    }

    pub fn load_disk(&mut self, id: usize, offset: u64, bytes: &[u8]) {
        let block = offset as usize / DISK_BLOCK_BYTES;
        self.nodes[id].disk.image[block] = u64::from_le_bytes(bytes.try_into().expect("a block"));
        self.tally.copied += 1;
    }

    /// Whether the primary of the backup `id` still records for it. One that runs alone waits for no read, and its backup
    /// never goes live.
    pub fn is_followed(&self, id: usize) -> bool {
        let Some((connection, end)) = self.nodes[id].connection else { return false };
        let other = self.network.connections[connection].ends[1 - end];
        let primary = &self.nodes[other.node];
        self.lives(other)
            && primary.recording
            && matches!(primary.role, Role::Primary(_))
            && primary.connection == Some((connection, 1 - end))
    }

    /// Compares the images of a pair, if its backup `id` has executed all that there is.
    pub fn compare_mirrors(&mut self, id: usize) {
        let backup = &self.nodes[id];
        let Some((connection, end)) = backup.connection else { return };
        let other = self.network.connections[connection].ends[1 - end];
        if self.disks != Disks::Mirrored || !self.lives(other) {
            return;
        }
        let primary = &self.nodes[other.node];
        let Role::Primary(machine) = &primary.role else { return };
        let all = primary.connection == Some((connection, 1 - end))
            && machine.protected()
            && primary.recording
            && primary.encoder.position().0 == backup.executed;
        if !all || backup.tainted {
            return;
        }
        let Some(guest) = &backup.guest else { return };
        self.tally.compared += 1;
        let images = (&primary.disk.image, &backup.disk.image);
        let under_way = guest.outstanding.iter().map(|request| request.block);
        let unlike = under_way.chain(primary.disk.doubtful.iter().copied()).collect();
        self.checkers.mirrors(self.t, images, &unlike);
    }
}

pub fn completion(request: u64, outcome: Outcome) -> Event {
    let status = u8::from(outcome.is_err());
    Event::DiskCompletion { device: 0, request, status, data: outcome.unwrap_or_default() }
}
