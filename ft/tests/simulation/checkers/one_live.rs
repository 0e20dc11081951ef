//! Never two sides live in one generation.

use std::collections::BTreeMap;

use super::Verdict;
use crate::network::End;

#[derive(Default)]
pub struct OneLive {
    live: BTreeMap<u64, End>,
}

impl OneLive {
    pub fn live(&mut self, end: End, generation: u64) -> Verdict {
        match self.live.insert(generation, end) {
            Some(other) if other != end => {
                Err(format!("{end:?} and {other:?} both live in generation {generation}"))
            }
            _ => Ok(()),
        }
    }
}
