//! A host with one VMM process: what it holds. What it does is in `process.rs`.

use std::collections::VecDeque;
use std::time::Duration;

use ft::{
    Backup, Decoder, Encoder, FrameReader, KeptOutputs, OutputGate, OutputNumber, Primary, Search,
};

use crate::disks::HostDisk;
use crate::guest::{Guest, Output};
use crate::network::End;
use crate::world::Happening;

/// A host's clock: runs a little fast or slow, started some time ago, and may jump.
#[derive(Clone, Debug)]
pub struct Clock {
    offset: i64,
    /// Parts per million.
    drift: i64,
}

impl Clock {
    pub fn new(offset_us: i64, drift: i64) -> Self {
        Self { offset: offset_us, drift }
    }

    pub fn now(&self, t: u64) -> Duration {
        let t = t as i64;
        Duration::from_micros((t + t / 1000 * self.drift / 1000 + self.offset) as u64)
    }

    /// When this clock shows `at`, from `t` on.
    pub fn when(&self, t: u64, at: Duration) -> u64 {
        let left = at.saturating_sub(self.now(t)).as_micros() as u64;
        t + left + left / 500 + 1
    }

    pub fn jump(&mut self, by_us: i64) {
        self.offset += by_us;
    }
}

/// An output with what the checkers want to know of it.
#[derive(Clone, Debug)]
pub struct Tagged {
    pub number: OutputNumber,
    pub output: Output,
    /// The generation in which it was released.
    pub generation: u64,
    /// The end of its record, if it went through the gate.
    pub position: Option<u64>,
}

/// What a process is at the moment.
pub enum Role {
    /// Waits for a primary.
    Listening,
    Primary(Box<Primary>),
    Backup(Box<Backup>),
    /// Runs a VM without a backup.
    Solo,
    /// Has halted or discarded its guest.
    Idle,
}

/// That a VM be protected.
pub struct Wish {
    pub search: Search,
    /// Who may be asked, for the terms of the next generation.
    pub standbys: Vec<String>,
    /// An operator waits until a standby takes the VM or all have refused.
    pub asked_for: bool,
}

pub struct Node {
    pub id: usize,
    /// Counts what it has been: a backup that was discarded is no other than a process that has ended.
    pub life: u32,
    /// Counts its processes. One claims under one name, whatever it has been.
    pub process: u32,
    pub up: bool,
    /// Its kernel answers for a process that has ended.
    pub powered: bool,
    pub frozen_until: u64,
    /// What waited while it was frozen.
    pub backlog: Vec<Happening>,
    pub clock: Clock,
    pub role: Role,
    /// The generation its VM lives in.
    pub generation: u64,
    /// The generation in which it looks for a backup.
    pub membership: u64,
    pub wish: Option<Wish>,
    /// Counts them: what belongs to an earlier one changes nothing.
    pub wishes: u32,
    pub connection: Option<(usize, usize)>,
    pub reader: FrameReader,
    pub guest: Option<Guest>,
    /// Inputs for the guest, from the back halves.
    pub inputs: Vec<ft::Event>,
    pub encoder: Encoder,
    pub decoder: Decoder,
    /// Log handed to the vCPU and not decoded yet.
    pub log: VecDeque<Vec<u8>>,
    /// A record that the replaying vCPU cannot apply yet, with its end.
    pub next_record: Option<(ft::Record, ft::LogPosition)>,
    /// The end of the last record applied.
    pub executed: u64,
    pub disk: HostDisk,
    pub loaded: bool,
    /// Backup: somebody wants to know when all before it is executed and stable.
    pub make_stable: Option<ft::LogPosition>,
    /// The vCPU writes the log; before the clone is sent it runs as if alone.
    pub recording: bool,
    pub digests: u64,
    pub quanta: u64,
    pub paused: bool,
    pub log_hand_over: bool,
    pub stalled: bool,
    pub throttle: f64,
    pub slow_until: u64,
    pub tainted: bool,
    pub gate: OutputGate<Tagged>,
    pub kept: KeptOutputs<Output>,
    /// Outputs at the back halves, in order.
    pub back: VecDeque<Tagged>,
    pub back_scheduled: bool,
    /// System calls under way.
    pub under_way: u64,
    pub quiescing: bool,
    /// The last output that has left.
    pub performed: Option<OutputNumber>,
    pub recorded_released: Option<OutputNumber>,
    pub tick_at: Option<u64>,
}

impl Node {
    pub fn new(id: usize, clock: Clock) -> Self {
        Self {
            id,
            life: 0,
            process: 0,
            up: true,
            powered: true,
            frozen_until: 0,
            backlog: Vec::new(),
            clock,
            role: Role::Listening,
            generation: 0,
            membership: 0,
            wish: None,
            wishes: 0,
            connection: None,
            reader: FrameReader::new(),
            guest: None,
            inputs: Vec::new(),
            encoder: Encoder::new(ft::ExecutionPoint(0)),
            decoder: Decoder::new(ft::ExecutionPoint(0)),
            log: VecDeque::new(),
            next_record: None,
            executed: 0,
            disk: HostDisk::default(),
            loaded: false,
            make_stable: None,
            recording: false,
            digests: 0,
            quanta: 0,
            paused: false,
            log_hand_over: false,
            stalled: false,
            throttle: 0.0,
            slow_until: 0,
            tainted: false,
            gate: OutputGate::new(),
            kept: KeptOutputs::new(),
            back: VecDeque::new(),
            back_scheduled: false,
            under_way: 0,
            quiescing: false,
            performed: None,
            recorded_released: None,
            tick_at: None,
        }
    }

    /// The next process on this host.
    pub fn restart(&mut self) {
        self.listen_again();
        self.process += 1;
    }

    /// The same process without a VM.
    pub fn listen_again(&mut self) {
        let fresh = Self::new(self.id, self.clock.clone());
        let old = std::mem::replace(self, fresh);
        self.life = old.life + 1;
        self.process = old.process;
        self.wishes = old.wishes + 1;
        self.frozen_until = old.frozen_until;
        self.slow_until = old.slow_until;
        self.backlog = old.backlog;
        self.disk.image = old.disk.image;
        self.disk.hangs_until = old.disk.hangs_until;
        self.disk.fails_until = old.disk.fails_until;
        self.disk.fails_percent = old.disk.fails_percent;
    }

    pub fn end(&self) -> End {
        End { node: self.id, life: self.life }
    }

    pub fn who(&self) -> String {
        format!("host{}.{}", self.id, self.process)
    }

    pub fn next_deadline(&self) -> Option<Duration> {
        match &self.role {
            Role::Primary(primary) => primary.next_deadline(),
            Role::Backup(backup) => backup.next_deadline(),
            Role::Listening | Role::Solo | Role::Idle => None,
        }
    }

    /// Until when outputs may leave.
    pub fn lease_until(&self) -> Duration {
        match &self.role {
            Role::Primary(primary) => primary.lease_until(),
            Role::Solo => Duration::MAX,
            Role::Listening | Role::Backup(_) | Role::Idle => Duration::ZERO,
        }
    }

    pub fn state_name(&self) -> &'static str {
        match &self.role {
            Role::Listening => "listening",
            Role::Primary(primary) => primary.state_name(),
            Role::Backup(backup) => backup.state_name(),
            Role::Solo => "solo",
            Role::Idle => "idle",
        }
    }
}
