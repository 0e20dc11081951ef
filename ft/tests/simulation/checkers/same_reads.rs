//! What the backup's guest is given as read is what the primary's was given at that position of the log, wherever each
//! of them read it.

use std::collections::{BTreeMap, BTreeSet};

use super::Verdict;
use crate::network::End;

#[derive(Default)]
pub struct SameReads {
    /// By generation and position: what the primary's guest was given.
    given: BTreeMap<(u64, u64), Vec<u8>>,
    /// Backups that have read something else.
    differ: BTreeSet<(usize, u32)>,
}

impl SameReads {
    pub fn primary(&mut self, generation: u64, position: u64, data: Vec<u8>) {
        self.given.insert((generation, position), data);
    }

    pub fn backup(&mut self, end: End, generation: u64, position: u64, data: &[u8]) -> Verdict {
        match self.given.get(&(generation, position)) {
            Some(given) if given == data => Ok(()),
            given => {
                self.differ.insert((end.node, end.life));
                Err(format!(
                    "at position {position} of generation {generation} the backup has read {data:?}, the primary {given:?}"
                ))
            }
        }
    }

    pub fn goes_live(&self, end: End) -> Verdict {
        if self.differ.contains(&(end.node, end.life)) {
            return Err(format!("{end:?} goes live, but has read what its primary has not"));
        }
        Ok(())
    }
}
