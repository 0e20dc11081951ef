//! No output is released before the backup has its record in its hands.

use std::collections::BTreeMap;

use super::Verdict;
use crate::node::Tagged;

#[derive(Default)]
pub struct OutputRule {
    received: BTreeMap<u64, u64>,
}

impl OutputRule {
    pub fn received(&mut self, generation: u64, position: u64) {
        // A generation can see several attempts at a copy, each with a log of its own; the last
        // one counts.
        self.received.insert(generation, position);
    }

    pub fn released(&self, tagged: &Tagged) -> Verdict {
        let received = self.received.get(&tagged.generation).copied().unwrap_or(0);
        match tagged.position {
            Some(position) if position > received => Err(format!(
                "output {} needs log position {position}, the backup has {received}",
                tagged.number
            )),
            _ => Ok(()),
        }
    }
}
