//! The arbiter: a test-and-set that answers late or not at all, acts when nobody waits any more, or is
//! for one host another place altogether, such as the directory under a file system that is not mounted.

use std::collections::{BTreeMap, BTreeSet};

use ft::Claim;

use crate::network::End;
use crate::plant::Plant;
use crate::world::{Happening, World};

#[derive(Default)]
pub struct ArbiterModel {
    pub claims: BTreeMap<u64, String>,
    announced: BTreeSet<u64>,
    /// By host: until when it reaches nothing.
    pub down_until: BTreeMap<usize, u64>,
    /// By host: until when it reaches an empty place instead.
    pub elsewhere_until: BTreeMap<usize, u64>,
    /// Claims made in such places.
    elsewhere: BTreeMap<(usize, u64), String>,
    /// Until when claims are made and answers lost.
    pub forgetful_until: u64,
    /// Until when answers take long.
    pub slow_until: u64,
    /// Until when questions fail and are acted upon later.
    pub late_until: u64,
}

fn until(map: &BTreeMap<usize, u64>, node: usize) -> u64 {
    map.get(&node).copied().unwrap_or(0)
}

impl ArbiterModel {
    /// What hinders a host from reaching the pair's place, if anything does.
    fn hindrance(&self, t: u64, node: usize) -> Option<&'static str> {
        if t < until(&self.down_until, node) {
            return Some("no such directory");
        }
        (t < until(&self.elsewhere_until, node)).then_some("the generation was not announced there")
    }

    /// The side on `node` lives in `generation` and looks for a backup.
    pub fn announce(&mut self, t: u64, node: usize, generation: u64) -> Result<(), String> {
        // An empty place takes an announcement, but the other side does not find it.
        if t < until(&self.elsewhere_until, node) {
            return Ok(());
        }
        if let Some(hindrance) = self.hindrance(t, node) {
            return Err(hindrance.into());
        }
        if let Some(winner) = self.claims.get(&generation) {
            return Err(format!("generation {generation} belongs to {winner}"));
        }
        self.announced.insert(generation);
        Ok(())
    }

    /// The side on `node` is to be the backup in `generation`.
    pub fn verify(&self, t: u64, node: usize, generation: u64) -> Result<(), String> {
        match self.hindrance(t, node) {
            Some(hindrance) => Err(hindrance.into()),
            None if !self.announced.contains(&generation) => Err("not announced".into()),
            None => Ok(()),
        }
    }

    fn claim(&mut self, generation: u64, who: &str) -> Result<Claim, String> {
        if !self.announced.contains(&generation) {
            return Err("not announced".into());
        }
        if !self.claims.contains_key(&generation) && self.announced.contains(&(generation + 1)) {
            return Ok(Claim::Lost { by: "the next generation".into() });
        }
        let winner = self.claims.entry(generation).or_insert_with(|| who.to_owned());
        if winner == who { Ok(Claim::Won) } else { Ok(Claim::Lost { by: winner.clone() }) }
    }
}

impl World {
    pub fn ask_arbiter(&mut self, by: End, who: String, generation: u64) {
        let t = self.t;
        let delay = if t < self.arbiter.slow_until {
            self.rng.range(100_000, 1_500_000)
        } else {
            self.rng.range(200, 5_000)
        };
        let answer = self.arbiters_answer(by, &who, generation);
        self.note(|| format!("arbiter: {who} claims {generation}: {answer:?}"));
        if answer.is_err() && self.plant == Some(Plant::NoRetry) {
            return;
        }
        self.after(delay, Happening::ArbiterAnswers { to: by, generation, answer });
    }

    fn arbiters_answer(&mut self, by: End, who: &str, generation: u64) -> Result<Claim, String> {
        let (t, plant) = (self.t, self.plant);
        let elsewhere = t < until(&self.arbiter.elsewhere_until, by.node);
        if elsewhere && plant == Some(Plant::EmptyPlaceDecides) {
            let place = self.arbiter.elsewhere.entry((by.node, generation));
            let winner = place.or_insert_with(|| who.to_owned());
            let lost = || Claim::Lost { by: winner.clone() };
            return Ok(if winner == who { Claim::Won } else { lost() });
        }
        if let Some(hindrance) = self.arbiter.hindrance(t, by.node) {
            return Err(hindrance.into());
        }
        if t < self.arbiter.late_until {
            let delay = self.rng.range(1_000, 2_000_000);
            self.after(delay, Happening::ClaimActs { who: who.to_owned(), generation });
            return Err("it has not answered in time".into());
        }
        let answer = self.arbiter.claim(generation, who);
        if t < self.arbiter.forgetful_until {
            return Err("the answer was lost".into());
        }
        match answer {
            Ok(Claim::Lost { .. }) if plant == Some(Plant::ClaimNotExclusive) => Ok(Claim::Won),
            answer => answer,
        }
    }

    /// A question that nobody waits for any more takes effect, if it still can.
    pub fn claim_acts(&mut self, who: &str, generation: u64) {
        let outcome = self.arbiter.claim(generation, who);
        self.note(|| {
            format!("arbiter: acts at last on {who}'s claim of {generation}: {outcome:?}")
        });
    }
}
