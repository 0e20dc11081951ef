//! The world: virtual time, hosts, the network, the shared disk, the arbiter, clients, and the faults
//! that come over them. One seed, one history.

use std::collections::BinaryHeap;

use crate::arbiter::ArbiterModel;
use crate::checkers::{Checkers, Violation};
use crate::disks::{self, Disks, Image, Tally};
use crate::faults::{Fault, plan};
use crate::guest::{CLIENTS, Guest, Op, Output, Request};
use crate::network::{End, Network, Packet};
use crate::node::{Clock, Node, Role, Tagged};
use crate::plant::Plant;
use crate::rng::Rng;
use crate::search::Attempt;

/// Faults come until here.
pub const FAULTS_END_US: u64 = 7_000_000;

/// Within this time after the last fault everything must work again.
pub const RECOVERY_US: u64 = 25_000_000;

/// Something that happens at a time.
#[derive(Clone, Debug)]
pub enum Happening {
    Arrives {
        connection: usize,
        end: usize,
        packet: Packet,
    },
    Tick {
        at: End,
        due: u64,
    },
    Quantum {
        at: End,
    },
    BackHalf {
        at: End,
    },
    /// The last system call of the back halves may have ended.
    Quiet {
        at: End,
    },
    /// A system call of a back half takes effect.
    Landed {
        from: End,
        tagged: Tagged,
    },
    CloneStep {
        at: End,
        step: u32,
    },
    Loaded {
        at: End,
    },
    Accept {
        at: End,
    },
    AskArbiter {
        by: End,
        who: String,
        generation: u64,
    },
    ArbiterAnswers {
        to: End,
        generation: u64,
        answer: Result<ft::Claim, String>,
    },
    /// The arbiter acts on a question that was given up.
    ClaimActs {
        who: String,
        generation: u64,
    },
    /// The disk tells that a request is done.
    Completed {
        at: End,
        request: u64,
        outcome: disks::Outcome,
    },
    /// A host's disk does what is no output.
    Worked {
        from: End,
        request: Request,
    },
    Thaw {
        node: usize,
    },
    Heal,
    Fault(Fault),
    /// A standby may be due to be asked.
    Search {
        at: End,
    },
    Connects(Attempt),
    /// A client asks, or asks again.
    ClientAsks {
        client: usize,
    },
    RequestArrives {
        node: usize,
        client: usize,
        request: u64,
    },
    /// The cluster's manager looks after its hosts.
    Manage,
}

struct Scheduled {
    at: u64,
    sequence: u64,
    happening: Happening,
}

impl PartialEq for Scheduled {
    fn eq(&self, other: &Self) -> bool {
        (self.at, self.sequence) == (other.at, other.sequence)
    }
}
impl Eq for Scheduled {}
impl PartialOrd for Scheduled {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Scheduled {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (other.at, other.sequence).cmp(&(self.at, self.sequence))
    }
}

pub struct World {
    pub t: u64,
    pub rng: Rng,
    queue: BinaryHeap<Scheduled>,
    sequence: u64,
    pub nodes: Vec<Node>,
    pub network: Network,
    pub arbiter: ArbiterModel,
    /// Until when the disk tells late that a write is done.
    pub disk_slow_until: u64,
    pub disks: Disks,
    /// What is on the shared disk, by client.
    pub disk: Image,
    pub tally: Tally,
    /// The request that each client waits for.
    pub waiting: [u64; CLIENTS],
    pub checkers: Checkers,
    pub plant: Option<Plant>,
    pub trace: Option<Vec<String>>,
    pub protections: u64,
    pub failovers: u64,
    /// How long each took since the primary was heard last.
    pub failover_us: Vec<u64>,
    /// When a client had an answer that it waited for.
    pub answered_at: Vec<u64>,
    pub max_lag_us: u64,
    /// Time with more lag than allowed.
    pub lagging_us: u64,
    pub lag_seen: u64,
}

/// How a run went.
#[derive(Debug)]
pub struct Outcome {
    pub violation: Option<Violation>,
    pub trace: Vec<String>,
    pub protections: u64,
    pub failovers: u64,
    pub failover_us: Vec<u64>,
    /// When a client had an answer that it waited for.
    pub answered_at: Vec<u64>,
    pub max_lag_us: u64,
    pub lagging_us: u64,
    /// CPU time taken from the primary at the end.
    pub throttle: f64,
    /// The VM was lost because everything that held it was destroyed.
    pub lost: bool,
    /// The newest generation that anybody lived in.
    pub generation: u64,
    pub tally: Tally,
}

impl World {
    fn new(seed: u64, disks: Disks, plant: Option<Plant>, traced: bool) -> Self {
        let mut rng = Rng::new(seed);
        // Mostly a standby more than the pair needs.
        let count = if rng.percent(25) { 2 } else { 3 };
        let nodes = (0..count)
            .map(|id| {
                let offset = rng.range(1_000_000, 1_000_000_000) as i64;
                let drift = rng.range(0, 2001) as i64 - 1000;
                let mut node = Node::new(id, Clock::new(offset, drift));
                if id > 0 {
                    // Its disk holds something else.
                    node.disk.image = [u64::MAX / 2; CLIENTS];
                }
                node
            })
            .collect();
        Self {
            t: 0,
            rng,
            queue: BinaryHeap::new(),
            sequence: 0,
            nodes,
            network: Network::new(),
            arbiter: ArbiterModel::default(),
            disk_slow_until: 0,
            disks,
            disk: [0; CLIENTS],
            tally: Tally::default(),
            waiting: [1; CLIENTS],
            checkers: Checkers::new(),
            plant,
            trace: traced.then(Vec::new),
            protections: 0,
            failovers: 0,
            failover_us: Vec::new(),
            answered_at: Vec::new(),
            max_lag_us: 0,
            lagging_us: 0,
            lag_seen: 0,
        }
    }

    /// Runs the history of a seed.
    pub fn run(seed: u64, plant: Option<Plant>, traced: bool) -> Outcome {
        let mut world = World::new(seed, Disks::of_seed(seed), plant, traced);
        let faults = plan(&mut world.rng, world.nodes.len(), FAULTS_END_US);
        world.run_with(&faults)
    }

    /// Runs a history with these faults: a story told by hand.
    pub fn story(seed: u64, faults: &[(u64, Fault)]) -> Outcome {
        Self::story_on(seed, Disks::of_seed(seed), faults)
    }

    /// As [`World::story`], with disks held like this.
    pub fn story_on(seed: u64, disks: Disks, faults: &[(u64, Fault)]) -> Outcome {
        World::new(seed, disks, None, true).run_with(faults)
    }

    fn run_with(mut self, faults: &[(u64, Fault)]) -> Outcome {
        let first = self.nodes[0].end();
        self.nodes[0].guest = Some(Guest::new(self.disks));
        self.nodes[0].generation = 1;
        self.nodes[0].membership = 1;
        self.nodes[0].role = Role::Solo;
        self.checkers.live(first, 1);
        for node in 0..self.nodes.len() {
            let at = self.nodes[node].end();
            self.after(1_000, Happening::Quantum { at });
        }
        for client in 0..CLIENTS {
            self.after(5_000, Happening::ClientAsks { client });
        }
        self.after(10_000, Happening::Manage);
        for (at, fault) in faults {
            self.after(*at, Happening::Fault(*fault));
        }
        // Every fault that has an end is over three seconds later.
        let calm = FAULTS_END_US + 3_500_000;
        let mut goal = None;
        while let Some(next) = self.queue.pop() {
            self.t = next.at;
            self.happen(next.happening);
            if self.checkers.violation.is_some() || self.t > calm + RECOVERY_US {
                break;
            }
            if self.t > calm {
                let goal = goal.get_or_insert(self.waiting);
                let served =
                    self.waiting.iter().zip(goal.iter()).all(|(now, then)| *now > *then + 3);
                if served && self.protected() {
                    break;
                }
            }
        }
        let mut lost = false;
        if self.checkers.violation.is_none() {
            let progressed = goal.is_some_and(|goal| {
                self.waiting.iter().zip(goal.iter()).all(|(now, then)| *now > *then + 3)
            });
            lost = !progressed;
            let protected = self.protected();
            self.checkers.progress(
                self.t,
                progressed,
                protected,
                &self.arbiter.claims,
                &self.nodes,
            );
        }
        Outcome {
            violation: self.checkers.violation.take(),
            trace: self.trace.unwrap_or_default(),
            protections: self.protections,
            failovers: self.failovers,
            failover_us: self.failover_us,
            answered_at: self.answered_at,
            max_lag_us: self.max_lag_us,
            lagging_us: self.lagging_us,
            throttle: self.nodes.iter().map(|node| node.throttle).fold(0.0, f64::max),
            lost,
            generation: self.checkers.newest().map_or(0, |(generation, _)| generation),
            tally: self.tally,
        }
    }

    /// Whether some side's death would be survived.
    fn protected(&self) -> bool {
        self.nodes.iter().any(|node| {
            let Role::Primary(machine) = &node.role else { return false };
            node.up && self.t >= node.frozen_until && machine.protected()
        })
    }

    pub fn after(&mut self, delay_us: u64, happening: Happening) {
        self.at(self.t + delay_us, happening);
    }

    pub fn at(&mut self, at: u64, happening: Happening) {
        self.sequence += 1;
        self.queue.push(Scheduled { at, sequence: self.sequence, happening });
    }

    pub fn note(&mut self, text: impl FnOnce() -> String) {
        if let Some(trace) = &mut self.trace {
            trace.push(format!("{:>9} us  {}", self.t, text()));
        }
    }

    /// Whether that process still exists.
    pub fn lives(&self, end: End) -> bool {
        self.nodes[end.node].up && self.nodes[end.node].life == end.life
    }

    /// The process that a happening needs to be awake for it.
    fn subject(&self, happening: &Happening) -> Option<End> {
        match happening {
            Happening::Arrives { connection, end, .. } => {
                Some(self.network.connections[*connection].ends[*end])
            }
            Happening::Tick { at, .. }
            | Happening::Quantum { at }
            | Happening::BackHalf { at }
            | Happening::Quiet { at }
            | Happening::CloneStep { at, .. }
            | Happening::Loaded { at }
            | Happening::Search { at }
            | Happening::Completed { at, .. }
            | Happening::Accept { at } => Some(*at),
            Happening::ArbiterAnswers { to, .. } => Some(*to),
            Happening::Connects(attempt) => Some(attempt.from),
            Happening::Landed { .. }
            | Happening::Worked { .. }
            | Happening::AskArbiter { .. }
            | Happening::ClaimActs { .. }
            | Happening::Thaw { .. }
            | Happening::Heal
            | Happening::Fault(_)
            | Happening::ClientAsks { .. }
            | Happening::RequestArrives { .. }
            | Happening::Manage => None,
        }
    }

    pub fn happen(&mut self, happening: Happening) {
        if let Some(subject) = self.subject(&happening) {
            if !self.lives(subject) {
                return;
            }
            if self.t < self.nodes[subject.node].frozen_until {
                self.nodes[subject.node].backlog.push(happening);
                return;
            }
        }
        match happening {
            Happening::Arrives { connection, end, packet } => self.arrives(connection, end, packet),
            Happening::Tick { at, due } => self.tick(at.node, due),
            Happening::Quantum { at } => self.quantum(at.node),
            Happening::BackHalf { at } => self.back_half(at.node),
            Happening::Quiet { at } => self.quiet(at.node),
            Happening::Landed { from, tagged } => self.landed(from, tagged),
            Happening::CloneStep { at, step } => self.clone_step(at.node, step),
            Happening::Loaded { at } => self.loaded(at.node),
            Happening::Accept { at } => self.accept(at.node),
            Happening::AskArbiter { by, who, generation } => self.ask_arbiter(by, who, generation),
            Happening::ArbiterAnswers { to, generation, answer } => {
                self.arbiter_answers(to.node, generation, answer);
            }
            Happening::ClaimActs { who, generation } => self.claim_acts(&who, generation),
            Happening::Completed { at, request, outcome } => {
                self.completed(at.node, request, outcome);
            }
            Happening::Worked { from, request } => self.worked(from, request),
            Happening::Thaw { node } => self.thaw(node),
            Happening::Heal => self.heal(),
            Happening::Fault(fault) => self.fault(fault),
            Happening::ClientAsks { client } => self.client_asks(client),
            Happening::RequestArrives { node, client, request } => {
                if matches!(self.nodes[node].role, Role::Primary(_) | Role::Solo) {
                    self.nodes[node].inputs.push(Guest::request(client, request));
                }
            }
            Happening::Search { at } => self.search(at.node),
            Happening::Connects(attempt) => self.connects(attempt),
            Happening::Manage => self.manage(),
        }
    }

    fn client_asks(&mut self, client: usize) {
        let request = self.waiting[client];
        for node in 0..self.nodes.len() {
            let delay = self.rng.range(100, 1_000);
            self.after(delay, Happening::RequestArrives { node, client, request });
        }
        // TCP retransmits.
        self.after(250_000, Happening::ClientAsks { client });
    }

    /// An output has reached the world.
    fn landed(&mut self, from: End, tagged: Tagged) {
        self.checkers.landed(self.t, from, &tagged);
        match tagged.output {
            Output::Disk(Request { op: Op::Read, .. }) => unreachable!("a read is no output"),
            Output::Disk(Request { id, block, op: Op::Write(value) }) => {
                self.checkers.written(self.t, from, self.disk[block], value);
                self.disk[block] = value;
                let late = if self.t < self.disk_slow_until {
                    self.rng.range(20_000, 1_000_000)
                } else {
                    0
                };
                let outcome = Ok(Vec::new());
                self.after(late, Happening::Completed { at: from, request: id, outcome });
            }
            Output::Answer { client, request, total } => {
                let awaited = self.waiting[client];
                let held = self.image(from.node)[client];
                self.checkers.answered(self.t, awaited, request, total, held);
                if request == awaited && total >= request {
                    self.waiting[client] += 1;
                    self.answered_at.push(self.t);
                    let next = self.waiting[client];
                    let pause = self.rng.range(500, 20_000);
                    for node in 0..self.nodes.len() {
                        let delay = pause + self.rng.range(100, 1_000);
                        self.after(
                            delay,
                            Happening::RequestArrives { node, client, request: next },
                        );
                    }
                }
            }
        }
        if self.lives(from) {
            let node = &mut self.nodes[from.node];
            node.performed = node.performed.max(Some(tagged.number));
            node.under_way -= 1;
            self.after(1, Happening::Quiet { at: from });
        }
    }

    fn heal(&mut self) {
        for (at, connection, end, packet) in self.network.healed(self.t, &mut self.rng) {
            self.at(at, Happening::Arrives { connection, end, packet });
        }
    }
}
