//! Kill after kill under load, and the account that must balance at the end.

use crate::lab::Lab;
use crate::network::Side;
use crate::pair::{Death, Pair, Protected, Timing};
use anyhow::{Context, Result, bail};
use ft::FtStatus;
use ledger_client::load::{Acknowledged, Load, Options};
use ledger_client::stats::Distribution;
use ledger_client::verdict::Verdict;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

/// How many kills, and when.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Kills of the primary, one after another.
    pub kills: u32,
    /// Chooses the moments.
    pub seed: u64,
    /// How the hosts die.
    pub death: Death,
    /// Connections under load.
    pub connections: usize,
    /// Whether each survivor makes its next backup by itself, or is asked to.
    pub by_itself: bool,
    /// Longest time from the first answer under protection to the kill; chance decides up to it.
    pub longest_wait: Duration,
    /// Times to protect with; `None` for Dyad's own.
    pub timing: Option<Timing>,
}

impl Default for Plan {
    fn default() -> Self {
        Self {
            kills: 1,
            seed: 1,
            death: Death::Process,
            connections: 1,
            by_itself: false,
            longest_wait: Duration::from_secs(2),
            timing: None,
        }
    }
}

/// One kill and what came of it.
#[derive(Clone, Debug)]
pub struct Kill {
    /// Which one, from 1.
    pub number: u32,
    /// Where the primary was.
    pub side: Side,
    /// What protecting before it took.
    pub protected: Protected,
    /// From the kill to the first answer of the new primary.
    pub failover: Duration,
    /// `ft.status` of the new primary after that answer.
    pub status: FtStatus,
    /// Digests compared while the pair stood.
    pub digests: u64,
}

/// Everything counted over all kills.
#[derive(Clone, Debug)]
pub struct Account {
    /// Each kill.
    pub kills: Vec<Kill>,
    /// The client's answers against the disk.
    pub verdict: Verdict,
    /// Every answer the client got.
    pub answers: Vec<Acknowledged>,
}

impl Account {
    /// Times from kill to first answer.
    #[must_use]
    pub fn failover_times(&self) -> Option<Distribution> {
        Distribution::of(self.kills.iter().map(|kill| kill.failover))
    }

    /// Times the guest stood still for protecting.
    #[must_use]
    pub fn pauses(&self) -> Option<Distribution> {
        Distribution::of(self.kills.iter().map(|kill| kill.protected.pause))
    }

    /// All figures.
    #[must_use]
    pub fn to_json(&self) -> Value {
        json!({
            "kills": self.kills.len(),
            "verdict": self.verdict,
            "failover": self.failover_times(),
            "protect_pause": self.pauses(),
            "digests_compared": self.kills.iter().map(|kill| kill.digests).sum::<u64>(),
        })
    }
}

impl Plan {
    /// Boots a guest in `lab`, kills its primary as planned and balances the account. `tell` hears of
    /// each kill.
    ///
    /// # Errors
    ///
    /// The first thing that went wrong: a broken connection, an answer out of order, unequal digests, an
    /// acknowledged line the disk does not hold, a file system with errors.
    pub fn run(&self, lab: Lab, tell: impl FnMut(&Kill)) -> Result<Account> {
        let mut pair = Pair::boot(lab)?;
        pair.timing = self.timing;
        let address = pair.lab.service()?;
        let load = pair.lab.load(Options {
            connections: self.connections,
            ..Options::new(address, &format!("seed{}", self.seed))
        })?;
        let kills = self.kill_all(&mut pair, &load, tell).with_context(|| pair.describe())?;
        let answers = load.stop()?;
        let lab = pair.power_off()?;
        let contents = lab.disk.ledger()?;
        let verdict = Verdict::of(&answers, &contents);
        if !verdict.is_clean() {
            bail!("the account does not balance: {verdict:?}");
        }
        Ok(Account { kills, verdict, answers })
    }

    fn kill_all(
        &self,
        pair: &mut Pair,
        load: &Load,
        mut tell: impl FnMut(&Kill),
    ) -> Result<Vec<Kill>> {
        let mut random = StdRng::seed_from_u64(self.seed);
        let mut kills = Vec::new();
        let longest_wait_us = u64::try_from(self.longest_wait.as_micros())?.max(1);
        for number in 1..=self.kills {
            let protected = match (self.by_itself, number) {
                (false, _) => pair.protect(),
                (true, 1) => pair.protect_for_good(),
                (true, _) => pair.reprotect(),
            };
            let protected = protected.with_context(|| format!("before kill {number}"))?;
            // A random moment under load: at least one answer has passed the gate, then chance decides.
            load.wait_for_answers(load.answered() + 1)?;
            std::thread::sleep(Duration::from_micros(random.random_range(0..longest_wait_us)));
            let digests = pair.digests_are_equal()?;
            // The status call above must not set the moment of death.
            std::thread::sleep(Duration::from_micros(random.random_range(0..20_000)));
            let side = pair.side;
            // The process takes a while to be gone for good, and the backup does not wait for that.
            let killed = Instant::now();
            let dead = pair.kill_primary(self.death)?;
            let first =
                load.first_answer_after(dead).with_context(|| format!("after kill {number}"))?;
            let status = pair.wait_until_alone()?;
            let failover = first.duration_since(killed);
            let kill = Kill { number, side, protected, failover, status, digests };
            tell(&kill);
            kills.push(kill);
        }
        Ok(kills)
    }
}

/// Waits until `load` has answered `more` requests beyond now; how long that took.
///
/// # Errors
///
/// The load's failure.
pub fn progress(load: &Load, more: usize) -> Result<Duration> {
    let start = Instant::now();
    load.wait_for_answers(load.answered() + more)?;
    Ok(start.elapsed())
}
