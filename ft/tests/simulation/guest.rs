//! A guest: a deterministic machine with the service of the end-to-end tests. A request of a client is
//! written to the client's place on the disk; when the write has completed, the client is answered with
//! its running total. So every answer depends on a write, an input (its completion) and a state. Now and
//! then the guest reads the disk, and everything that follows depends on what it read. What has failed it asks for again.

use ft::{Digest, Event, ExecutionPoint, OutputNumber, PageHasher, PageHashes};
use serde::{Deserialize, Serialize};

use crate::disks::Disks;

pub const CLIENTS: usize = 3;
pub const PAGES: usize = 8;

/// What a disk is asked to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Op {
    Read,
    /// Of a client's request.
    Write(u64),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    pub id: u64,
    pub block: usize,
    pub op: Op,
}

impl Request {
    /// Whether the order of both makes a difference.
    fn overlaps(&self, other: &Self) -> bool {
        self.block == other.block && (self.op != Op::Read || other.op != Op::Read)
    }
}

/// What a guest does by itself.
#[derive(Clone, Debug)]
pub enum Effect {
    Output(OutputNumber, Output),
    /// No output: each side that does it does so for itself.
    Internal(Request),
}

/// What leaves a guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Output {
    /// To the disk.
    Disk(Request),
    /// To a client: its request and how many of its requests the guest has completed.
    Answer { client: usize, request: u64, total: u64 },
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Guest {
    pub point: u64,
    /// Stands for registers and memory: depends on every input and its point.
    pub state: u64,
    /// Pages of memory that nothing depends on.
    pub memory: [u64; PAGES],
    pub next_output: u64,
    /// Requests begun, by client.
    begun: [u64; CLIENTS],
    /// Requests on the disk, by client.
    done: [u64; CLIENTS],
    next_request: u64,
    disks: Disks,
    /// Handed out and not completed, in order. None overlaps another.
    pub outstanding: Vec<Request>,
    /// Kept in the front half until what they overlap is completed.
    waiting: Vec<Request>,
    /// What it will put out by itself, in order.
    due: Vec<(u64, Output)>,
}

impl Guest {
    pub fn new(disks: Disks) -> Self {
        Self {
            point: 0,
            state: 1,
            memory: [0; PAGES],
            next_output: 1,
            begun: [0; CLIENTS],
            done: [0; CLIENTS],
            next_request: 1,
            disks,
            outstanding: Vec::new(),
            waiting: Vec::new(),
            due: Vec::new(),
        }
    }

    pub fn request(client: usize, request: u64) -> Event {
        let mut frame = vec![client as u8];
        frame.extend_from_slice(&request.to_le_bytes());
        Event::Frames { device: 0, frames: vec![frame] }
    }

    fn mix(&mut self, value: u64) {
        let z = (self.state ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.state = z ^ (z >> 29);
    }

    /// Executes up to `point`; gives everything that it does, with its point.
    pub fn run_to(&mut self, point: u64, effects: &mut Vec<(u64, Effect)>) {
        assert!(point >= self.point, "a guest ran past its next record");
        while self.due.first().is_some_and(|(at, _)| *at <= point) {
            let (at, output) = self.due.remove(0);
            if let Output::Disk(request) = output {
                if self.outstanding.iter().any(|other| other.overlaps(&request)) {
                    self.waiting.push(request);
                    continue;
                }
                self.outstanding.push(request);
                if !self.disks.is_output(request.op) {
                    effects.push((at, Effect::Internal(request)));
                    continue;
                }
            }
            self.mix(at);
            effects.push((at, Effect::Output(OutputNumber(self.next_output), output)));
            self.next_output += 1;
        }
        self.point = point;
    }

    /// Applies an input here and now.
    pub fn apply(&mut self, event: &Event) {
        self.mix(self.point);
        self.memory[self.state as usize % PAGES] ^= self.state;
        match event {
            Event::Frames { frames, .. } => {
                for frame in frames {
                    let client = usize::from(frame[0]) % CLIENTS;
                    let request = u64::from_le_bytes(frame[1..9].try_into().expect("nine bytes"));
                    self.mix(request);
                    self.serve(client, request);
                }
            }
            Event::DiskCompletion { request, status, data, .. } => {
                self.mix(*request);
                if *status != 0 {
                    self.mix(u64::from(*status));
                }
                data.iter().for_each(|byte| self.mix(u64::from(*byte)));
                self.complete(*request, *status == 0);
            }
            Event::Anchor { tsc, rate } => self.mix(tsc ^ rate),
            _ => {}
        }
    }

    fn complete(&mut self, id: u64, done: bool) {
        let Some(index) = self.outstanding.iter().position(|request| request.id == id) else {
            return;
        };
        let request = self.outstanding.remove(index);
        if !done {
            let id = self.number();
            self.later(Output::Disk(Request { id, ..request }));
        } else if let Op::Write(value) = request.op {
            let client = request.block;
            self.done[client] = self.done[client].max(value);
            self.answer(client, value);
            if value.is_multiple_of(2) {
                let id = self.number();
                let block = (client + value as usize / 2) % CLIENTS;
                self.later(Output::Disk(Request { id, block, op: Op::Read }));
            }
        }
        for request in std::mem::take(&mut self.waiting) {
            self.at_point(self.point + 1, Output::Disk(request));
        }
    }

    fn number(&mut self) -> u64 {
        let id = self.next_request;
        self.next_request += 1;
        id
    }

    fn serve(&mut self, client: usize, request: u64) {
        if request == self.begun[client] + 1 {
            self.begun[client] = request;
            let id = self.number();
            self.later(Output::Disk(Request { id, block: client, op: Op::Write(request) }));
        } else if request > self.begun[client] + 1 || request <= self.done[client] {
            // Asked again, or for what should have been asked before: the client judges the answer.
            self.answer(client, request);
        }
    }

    fn answer(&mut self, client: usize, request: u64) {
        let total = self.done[client];
        self.later(Output::Answer { client, request, total });
    }

    fn later(&mut self, output: Output) {
        self.at_point(self.point + 200 + self.state % 1500, output);
    }

    fn at_point(&mut self, at: u64, output: Output) {
        let index = self.due.partition_point(|(due, _)| *due <= at);
        self.due.insert(index, (at, output));
    }

    pub fn digest(&self) -> Digest {
        let mut digest = Digest::default();
        digest.add("cpu", &self.state.to_le_bytes());
        digest.add("service", &postcard::to_stdvec(&self.quiet()).expect("encodes"));
        digest.add_hash("memory", self.page_hasher().finish());
        digest
    }

    /// All but memory.
    fn quiet(&self) -> Self {
        Self { memory: [0; PAGES], ..self.clone() }
    }

    fn page_hasher(&self) -> PageHasher {
        let mut hasher = PageHasher::new();
        for (number, content) in (0..).zip(&self.memory) {
            hasher.add(number, &content.to_le_bytes());
        }
        hasher
    }

    /// The pages of a digest taken now.
    pub fn pages(&self) -> PageHashes {
        self.page_hasher().into_list()
    }

    /// What the request with this number is to do, while it is under way.
    pub fn request_under_way(&self, id: u64) -> Option<Request> {
        self.outstanding.iter().find(|request| request.id == id).copied()
    }

    pub fn at(&self) -> ExecutionPoint {
        ExecutionPoint(self.point)
    }
}
