//! A side goes live exactly in the state that its predecessor had at the end of what was received, and
//! not before the record of any output that has reached the world.

use std::collections::BTreeMap;

use super::Verdict;
use crate::guest::Guest;
use crate::network::End;
use crate::node::Tagged;

#[derive(Default)]
pub struct Drained {
    /// By generation and position: the primary's point and state.
    recorded: BTreeMap<(u64, u64), (u64, u64)>,
    /// By generation: the furthest record of an output that has reached the world, with its number.
    landed: BTreeMap<u64, (u64, u64)>,
}

impl Drained {
    pub fn recorded(&mut self, generation: u64, position: u64, guest: &Guest) {
        self.recorded.insert((generation, position), (guest.point, guest.state));
    }

    pub fn landed(&mut self, tagged: &Tagged) {
        if let Some(position) = tagged.position {
            let furthest = self.landed.entry(tagged.generation).or_default();
            *furthest = (*furthest).max((position, tagged.number.0));
        }
    }

    pub fn goes_live(
        &self,
        end: End,
        generation: u64,
        executed: u64,
        received: u64,
        guest: &Guest,
        tainted: bool,
    ) -> Verdict {
        if executed != received {
            return Err(format!(
                "{end:?} goes live having executed {executed} of {received} bytes received"
            ));
        }
        if let Some((_, number)) = self.landed.get(&generation)
            && *number >= guest.next_output
        {
            return Err(format!(
                "{end:?} goes live before output {number}, which has reached the world"
            ));
        }
        let expected = self.recorded.get(&(generation, executed));
        // What was flipped in a guest and not yet seen by a digest, nobody can know.
        if !tainted && executed != 0 && expected != Some(&(guest.point, guest.state)) {
            return Err(format!(
                "{end:?} goes live at position {executed} in state {:?}, its primary was in {expected:?}",
                (guest.point, guest.state)
            ));
        }
        Ok(())
    }
}
