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

/// What a host has and knows of disks.
#[derive(Default)]
pub struct HostDisk {
    /// The host's own image. It outlives every process.
    pub image: Image,
    /// Backup: until when its way to its disks does nothing.
    pub hangs_until: u64,
    /// Primary: blocks that the copy has yet to bring over, from its beginning to the freeze.
    uncopied: Option<BTreeSet<usize>>,
    /// Backup: what it was given to do, and what it read once it is done.
    pub issued: BTreeMap<u64, (Request, Option<Vec<u8>>)>,
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
        let block = &mut self.image(from.node)[request.block];
        let mut data = Vec::new();
        match request.op {
            Op::Read => data.extend_from_slice(&block.to_le_bytes()),
            Op::Write(value) => *block = value,
        }
        if let (Op::Write(_), Some(uncopied)) =
            (request.op, &mut self.nodes[from.node].disk.uncopied)
        {
            uncopied.insert(request.block);
        }
        let late = self.late();
        self.after(late, Happening::Completed { at: from, request: request.id, data });
    }

    /// A process hears that a request is done.
    pub fn completed(&mut self, id: usize, request: u64, data: Vec<u8>) {
        let node = &mut self.nodes[id];
        match node.role {
            Role::Backup(_) => {
                if let Some((_, outcome)) = node.disk.issued.get_mut(&request) {
                    *outcome = Some(data);
                }
                // A vCPU that waits for it is woken.
                if node.next_record.is_some() {
                    self.replay(id);
                }
            }
            Role::Primary(_) | Role::Solo => node.inputs.push(completion(request, data)),
            Role::Listening | Role::Idle => {}
        }
    }

    /// A completion as the backup applies it, or nothing as long as its own disk is not so far.
    pub fn settle(&mut self, id: usize, event: &Event) -> Option<Event> {
        let Event::DiskCompletion { request, .. } = event else { return Some(event.clone()) };
        let early = self.plant == Some(Plant::OwnDiskNotAwaited);
        let Some((issued, outcome)) = self.nodes[id].disk.issued.get(request).cloned() else {
            return Some(event.clone());
        };
        let data = match outcome {
            Some(data) => data,
            None if early && issued.op == Op::Read => {
                self.image(id)[issued.block].to_le_bytes().to_vec()
            }
            None if early => Vec::new(),
            None => {
                self.tally.awaited += 1;
                return None;
            }
        };
        self.nodes[id].disk.issued.remove(request);
        Some(completion(*request, data))
    }

    /// What the requests that are under way need when `id` goes live: what runs goes on, what is done is told, the rest
    /// begins again. Gives the writes that are to go through the back halves.
    pub fn take_over_requests(&mut self, id: usize, outstanding: Vec<Request>) -> Vec<Request> {
        let mut issued = std::mem::take(&mut self.nodes[id].disk.issued);
        let mut writes = Vec::new();
        for request in outstanding {
            match issued.remove(&request.id) {
                Some((_, Some(data))) => {
                    self.nodes[id].inputs.push(completion(request.id, data));
                }
                Some((_, None)) => {}
                None if self.disks.is_output(request.op) => writes.push(request),
                None => self.issue(id, request),
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
        self.checkers.mirrors(self.t, images, &guest.outstanding);
    }
}

pub fn completion(request: u64, data: Vec<u8>) -> Event {
    Event::DiskCompletion { device: 0, request, status: 0, data }
}
