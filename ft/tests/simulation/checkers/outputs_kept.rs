//! No output is lost in a failover: each one that the guest has produced was sent by its predecessor or
//! will be sent by the side that goes live.

use std::collections::BTreeSet;

use super::Verdict;

#[derive(Default)]
pub struct OutputsKept {
    performed: BTreeSet<u64>,
}

impl OutputsKept {
    pub fn performed(&mut self, number: u64) {
        self.performed.insert(number);
    }

    pub fn goes_live(&self, next_output: u64, kept: &[u64]) -> Verdict {
        match (1..next_output).find(|n| !self.performed.contains(n) && !kept.contains(n)) {
            Some(number) => Err(format!("output {number} was never sent and is not kept")),
            None => Ok(()),
        }
    }
}
