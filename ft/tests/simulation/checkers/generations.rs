//! A generation of protection is begun by the side that lives in it, and never again once it is over; and
//! when the faults have stopped, whoever serves is protected again.

use super::Verdict;
use crate::network::End;

#[derive(Default)]
pub struct Generations {
    newest: Option<(u64, End)>,
}

impl Generations {
    pub fn live(&mut self, end: End, generation: u64) {
        if self.newest.is_none_or(|(newest, _)| newest < generation) {
            self.newest = Some((generation, end));
        }
    }

    /// Who lives in the newest generation.
    pub fn newest(&self) -> Option<(u64, End)> {
        self.newest
    }

    /// The side on `end` asks for a backup in `generation`. From then on others may live in the next before
    /// it knows: a side that thaws may even take itself for protected, and loses.
    pub fn begins(&self, end: End, generation: u64) -> Verdict {
        match self.newest {
            Some((newest, live)) if newest == generation && live == end => Ok(()),
            newest => Err(format!(
                "{end:?} begins generation {generation}, but the newest and who lives in it are {newest:?}"
            )),
        }
    }

    pub fn over(&self, t: u64, progressed: bool, protected: bool) -> Verdict {
        if progressed && !protected {
            let newest = self.newest;
            return Err(format!(
                "at {t} us {newest:?} serves without a backup, and nothing hinders"
            ));
        }
        Ok(())
    }
}
