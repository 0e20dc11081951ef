//! What must hold in every history, watched from outside: the checkers see both sides at once, which no
//! side can.

mod doubt;
mod drained;
mod fencing;
mod generations;
mod mirrors;
mod nothing_lost;
mod one_live;
mod output_rule;
mod outputs_kept;
mod progress;
mod same_reads;

use std::collections::{BTreeMap, BTreeSet};

use crate::disks::Image;
use crate::guest::Guest;
use crate::network::End;
use crate::node::{Node, Tagged};

/// What did not hold.
#[derive(Clone, Debug)]
pub struct Violation {
    pub checker: &'static str,
    pub text: String,
}

/// What a checker says: nothing, or what is wrong.
pub type Verdict = Result<(), String>;

#[derive(Default)]
pub struct Checkers {
    pub violation: Option<Violation>,
    doubt: doubt::Doubt,
    drained: drained::Drained,
    fencing: fencing::Fencing,
    generations: generations::Generations,
    one_live: one_live::OneLive,
    output_rule: output_rule::OutputRule,
    outputs_kept: outputs_kept::OutputsKept,
    progress: progress::Progress,
    same_reads: same_reads::SameReads,
}

impl Checkers {
    pub fn new() -> Self {
        Self::default()
    }

    fn judge(&mut self, checker: &'static str, verdict: Verdict) {
        if let (Err(text), None) = (verdict, &self.violation) {
            self.violation = Some(Violation { checker, text });
        }
    }

    /// The process around a state machine gave an input that it must not give.
    pub fn illegal(&mut self, text: String) {
        self.judge("illegal_input", Err(text));
    }

    /// A side has gone live, or goes on alone, in this generation.
    pub fn live(&mut self, end: End, generation: u64) {
        self.doubt.decided(end);
        self.fencing.live(end, generation);
        self.generations.live(end, generation);
        self.progress.live(end, generation);
        let verdict = self.one_live.live(end, generation);
        self.judge("one_live", verdict);
    }

    /// A side has asked the arbiter.
    pub fn in_doubt(&mut self, end: End) {
        self.doubt.in_doubt(end);
    }

    /// A side has halted or discarded its guest.
    pub fn ended(&mut self, end: End) {
        self.doubt.ended(end);
        self.progress.ended(end);
    }

    /// What it has discarded was different from its primary's.
    pub fn differed(&mut self, generation: u64, who: String) {
        self.progress.differed(generation, who);
    }

    pub fn crashed(&mut self, end: End, who: String) {
        self.progress.crashed(end, who);
    }

    /// A side asks for a backup in `generation`.
    pub fn begins(&mut self, end: End, generation: u64) {
        let verdict = self.generations.begins(end, generation);
        self.judge("generations", verdict);
    }

    /// The newest generation that a side has lived in, and which.
    pub fn newest(&self) -> Option<(u64, End)> {
        self.generations.newest()
    }

    pub fn armed(&mut self, end: End, generation: u64) {
        self.progress.armed(end, generation);
    }

    /// A primary has recorded up to here, in this state.
    pub fn recorded(&mut self, generation: u64, position: u64, guest: &Guest) {
        self.drained.recorded(generation, position, guest);
    }

    /// A backup has the log up to here in its hands.
    pub fn received(&mut self, backup: End, position: u64) {
        self.output_rule.received(backup, position);
    }

    /// A primary with this backup has let an output out of the gate.
    pub fn released(&mut self, t: u64, end: End, backup: Option<End>, tagged: &Tagged) {
        let verdict = self.fencing.released(t, end, tagged.generation);
        self.judge("fencing", verdict);
        let verdict = self.output_rule.released(backup, tagged);
        self.judge("output_rule", verdict);
        let verdict = self.doubt.acts(end);
        self.judge("doubt", verdict);
    }

    /// A back half has begun a system call.
    pub fn performed(&mut self, end: End, tagged: &Tagged) {
        self.outputs_kept.performed(tagged.number.0);
        let verdict = self.doubt.acts(end);
        self.judge("doubt", verdict);
    }

    /// The system call has had its effect.
    pub fn landed(&mut self, t: u64, end: End, tagged: &Tagged) {
        self.drained.landed(tagged);
        let verdict = self.fencing.landed(t, end, tagged.generation);
        self.judge("fencing", verdict);
    }

    /// A write has reached the disk over what was there.
    pub fn written(&mut self, t: u64, end: End, before: u64, request: u64) {
        let verdict = self.fencing.written(t, end, before, request);
        self.judge("fencing", verdict);
    }

    /// A client has an answer.
    pub fn answered(&mut self, t: u64, awaited: u64, request: u64, total: u64, disk: u64) {
        let verdict = nothing_lost::answered(t, awaited, request, total, disk);
        self.judge("nothing_lost", verdict);
    }

    /// A backup goes live at the end of `generation`.
    pub fn goes_live(
        &mut self,
        end: End,
        generation: u64,
        executed: u64,
        received: u64,
        guest: &Guest,
        tainted: bool,
    ) {
        let verdict = self.same_reads.goes_live(end);
        self.judge("same_reads", verdict);
        let verdict = self.drained.goes_live(end, generation, executed, received, guest, tainted);
        self.judge("drained", verdict);
    }

    /// What a side that goes live will send of its predecessor's outputs.
    pub fn takes_over_outputs(&mut self, next_output: u64, kept: &[u64]) {
        let verdict = self.outputs_kept.goes_live(next_output, kept);
        self.judge("outputs_kept", verdict);
    }

    /// The backup has executed all that its primary has recorded.
    pub fn mirrors(&mut self, t: u64, images: (&Image, &Image), unlike: &BTreeSet<usize>) {
        let verdict = mirrors::equal(t, images, unlike);
        self.judge("mirrors", verdict);
    }

    /// A side goes live with this disk.
    pub fn survivors_disk(&mut self, t: u64, image: &Image, waiting: &Image) {
        let verdict = mirrors::survivor(t, image, waiting);
        self.judge("mirrors", verdict);
    }

    /// The primary's guest is given what was read; its record ends here.
    pub fn primary_read(&mut self, generation: u64, position: u64, data: Vec<u8>) {
        self.same_reads.primary(generation, position, data);
    }

    /// The backup's guest is given what was read. Gives whether it is the same. Where its primary no longer records for
    /// it (`followed`), it may differ as long as it does not go live.
    pub fn backup_read(
        &mut self,
        end: End,
        generation: u64,
        position: u64,
        data: &[u8],
        followed: bool,
    ) -> bool {
        let verdict = self.same_reads.backup(end, generation, position, data);
        let same = verdict.is_ok();
        if followed {
            self.judge("same_reads", verdict);
        }
        same
    }

    /// The history is over.
    pub fn progress(
        &mut self,
        t: u64,
        progressed: bool,
        protected: bool,
        claims: &BTreeMap<u64, String>,
        nodes: &[Node],
    ) {
        let verdict = self.progress.over(t, progressed, claims, nodes);
        self.judge("progress", verdict);
        let verdict = self.generations.over(t, progressed, protected);
        self.judge("generations", verdict);
    }
}
