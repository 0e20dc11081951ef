//! A guest: a deterministic machine with the service of the end-to-end tests. A request of a client is
//! written to the client's place on the disk; when the write has completed, the client is answered with
//! its running total. So every answer depends on an output (the write), an input (its completion) and a
//! state.

use ft::{Digest, Event, ExecutionPoint, OutputNumber, PageHasher, PageHashes};
use serde::{Deserialize, Serialize};

pub const CLIENTS: usize = 3;
pub const PAGES: usize = 8;

/// What leaves a guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Output {
    /// To the shared disk.
    Write { id: u64, client: usize, request: u64 },
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
    next_write: u64,
    /// Submitted and not completed, in order.
    pub outstanding: Vec<(u64, usize, u64)>,
    /// What it will put out by itself, in order.
    due: Vec<(u64, Output)>,
}

impl Guest {
    pub fn new() -> Self {
        Self {
            point: 0,
            state: 1,
            memory: [0; PAGES],
            next_output: 1,
            begun: [0; CLIENTS],
            done: [0; CLIENTS],
            next_write: 1,
            outstanding: Vec::new(),
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

    /// Executes up to `point`; gives every output with its point and number.
    pub fn run_to(&mut self, point: u64, outputs: &mut Vec<(u64, OutputNumber, Output)>) {
        assert!(point >= self.point, "a guest ran past its next record");
        while self.due.first().is_some_and(|(at, _)| *at <= point) {
            let (at, output) = self.due.remove(0);
            self.mix(at);
            outputs.push((at, OutputNumber(self.next_output), output));
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
            Event::DiskCompletion { request, .. } => {
                self.mix(*request);
                if let Some(index) = self.outstanding.iter().position(|write| write.0 == *request) {
                    let (_, client, request) = self.outstanding.remove(index);
                    self.done[client] = self.done[client].max(request);
                    self.answer(client, request);
                }
            }
            Event::Anchor { tsc, rate } => self.mix(tsc ^ rate),
            _ => {}
        }
    }

    fn serve(&mut self, client: usize, request: u64) {
        if request == self.begun[client] + 1 {
            self.begun[client] = request;
            let id = self.next_write;
            self.next_write += 1;
            self.outstanding.push((id, client, request));
            self.later(Output::Write { id, client, request });
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
        let at = self.point + 200 + self.state % 1500;
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

    pub fn at(&self) -> ExecutionPoint {
        ExecutionPoint(self.point)
    }
}
