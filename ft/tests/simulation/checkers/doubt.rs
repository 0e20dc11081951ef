//! A side in doubt waits; a side that has lost is silent for ever.

use std::collections::BTreeSet;

use super::Verdict;
use crate::network::End;

#[derive(Default)]
pub struct Doubt {
    in_doubt: BTreeSet<(usize, u32)>,
    ended: BTreeSet<(usize, u32)>,
}

fn key(end: End) -> (usize, u32) {
    (end.node, end.life)
}

impl Doubt {
    pub fn in_doubt(&mut self, end: End) {
        self.in_doubt.insert(key(end));
    }

    pub fn decided(&mut self, end: End) {
        self.in_doubt.remove(&key(end));
    }

    pub fn ended(&mut self, end: End) {
        self.ended.insert(key(end));
    }

    pub fn acts(&self, end: End) -> Verdict {
        if self.ended.contains(&key(end)) {
            return Err(format!("{end:?} has halted and lets an output out"));
        }
        if self.in_doubt.contains(&key(end)) {
            return Err(format!("{end:?} waits for its claim and lets an output out"));
        }
        Ok(())
    }
}
