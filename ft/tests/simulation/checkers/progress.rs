//! When the faults have stopped, the VM serves its clients again, unless everything that had a right to
//! it was destroyed: the winner of the claim, or, where nobody claimed, both sides. A winner that has found its guest to be
//! different has no right to it.

use std::collections::{BTreeMap, BTreeSet};

use super::Verdict;
use crate::network::End;
use crate::node::Node;

#[derive(Default)]
pub struct Progress {
    newest: Option<(u64, End)>,
    armed: Option<(u64, End)>,
    ended: BTreeSet<(usize, u32)>,
    crashed: BTreeSet<(usize, u32)>,
    /// The same by the names that processes claim with.
    crashed_claimants: BTreeSet<String>,
    /// Whoever discarded a guest that differed, and in which generation.
    differed: BTreeSet<(u64, String)>,
}

fn key(end: End) -> (usize, u32) {
    (end.node, end.life)
}

impl Progress {
    pub fn live(&mut self, end: End, generation: u64) {
        self.newest = Some((generation, end));
    }

    pub fn armed(&mut self, end: End, generation: u64) {
        self.armed = Some((generation, end));
    }

    pub fn ended(&mut self, end: End) {
        self.ended.insert(key(end));
    }

    pub fn differed(&mut self, generation: u64, who: String) {
        self.differed.insert((generation, who));
    }

    pub fn crashed(&mut self, end: End, who: String) {
        self.crashed_claimants.insert(who);
        self.crashed.insert(key(end));
    }

    pub fn over(
        &self,
        t: u64,
        progressed: bool,
        claims: &BTreeMap<u64, String>,
        nodes: &[Node],
    ) -> Verdict {
        let Some((generation, live)) = self.newest else { return Ok(()) };
        if progressed {
            return Ok(());
        }
        let states: Vec<_> = nodes
            .iter()
            .map(|node| format!("{} {} ({})", node.who(), node.state_name(), node.up))
            .collect();
        let destroyed = match claims.get(&generation) {
            Some(winner) if self.differed.contains(&(generation, winner.clone())) => {
                self.crashed.contains(&key(live))
            }
            Some(winner) => self.crashed_claimants.contains(winner),
            None => {
                let backup_gone = match self.armed {
                    Some((armed_in, backup)) if armed_in == generation => {
                        self.crashed.contains(&key(backup)) || self.ended.contains(&key(backup))
                    }
                    _ => true,
                };
                self.crashed.contains(&key(live)) && backup_gone
            }
        };
        if destroyed {
            return Ok(());
        }
        Err(format!(
            "at {t} us nobody serves, though {live:?} of generation {generation} is not all destroyed; claim: {:?}; {}",
            claims.get(&generation),
            states.join(", ")
        ))
    }
}
