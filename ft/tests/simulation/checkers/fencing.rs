//! Once a side lives in a generation, nothing of an older one reaches the world from another side: no
//! frame, and above all no write over what its successor wrote.

use super::Verdict;
use crate::network::End;

#[derive(Default)]
pub struct Fencing {
    newest: Option<(u64, End)>,
}

impl Fencing {
    pub fn live(&mut self, end: End, generation: u64) {
        if self.newest.is_none_or(|(newest, _)| newest < generation) {
            self.newest = Some((generation, end));
        }
    }

    pub fn landed(&self, t: u64, end: End, generation: u64) -> Verdict {
        self.not_stale(t, end, generation, "reached the world")
    }

    /// The gate opens for an output.
    pub fn released(&self, t: u64, end: End, generation: u64) -> Verdict {
        self.not_stale(t, end, generation, "was released")
    }

    fn not_stale(&self, t: u64, end: End, generation: u64, what: &str) -> Verdict {
        match self.newest {
            Some((newest, live)) if newest > generation && live != end => Err(format!(
                "at {t} us an output of {end:?} in generation {generation} {what}, but {live:?} lives in generation {newest}"
            )),
            _ => Ok(()),
        }
    }

    pub fn written(&self, t: u64, end: End, before: u64, request: u64) -> Verdict {
        if request < before {
            return Err(format!(
                "at {t} us {end:?} wrote request {request} over the newer request {before}"
            ));
        }
        Ok(())
    }
}
