//! `etcd:HOST:PORT,HOST:PORT,...`: claims are transactions of an etcd cluster.
//!
//! A pair has one key, `dyad/PAIR/claim`, whose value is a [`Record`] and which changes by compare-and-put
//! alone. A transaction counts when a majority of the cluster has it on disk, and it is done as a whole or
//! not at all; a member without a majority gives no answer.
//!
//! What must hold:
//! - The record carries no lease and is never removed. A claim that expired could be won again, and a
//!   primary that thaws after a month must find that it has lost. Storage stays bounded since there is one
//!   record per pair and it only moves forwards. A lease is on what a question leaves behind by trying
//!   whether the cluster takes writes.
//! - A request without an answer may have taken effect. Asking again, another member too, is harmless: the
//!   record says who has won.
//! - All members listed belong to one cluster. Two etcd that know nothing of each other would each have a
//!   winner.
//!
//! Members are asked in the order listed, the next as soon as the one before has failed or has kept
//! silent for [`HEAD_START`]: the member that died with the primary's host must not delay a failover.
//!
//! The connection is plain HTTP without a password: the cluster must be one that only trusted hosts reach.

mod gateway;
mod record;

use std::io::{self, ErrorKind};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use gateway::{ANSWER, Member, Stored, Swapped};
use record::{Announced, Next, Record};

use super::{ArbiterUrl, Claim, Endpoint, Unreachable, check_who, ended, not_announced};
use crate::{Generation, PairId};

/// How long one member is waited for before the next is asked as well.
const HEAD_START: Duration = Duration::from_millis(100);
/// How often a record may change under one question.
const MAX_ATTEMPTS: usize = 8;
/// How long what [`Arbiter::verify`](super::Arbiter::verify) writes is kept.
const TRIAL_SECONDS: u32 = 60;

/// Claims as transactions of an etcd cluster.
#[derive(Clone, Debug)]
pub struct EtcdArbiter {
    members: Vec<Endpoint>,
}

fn key(pair: &PairId) -> String {
    format!("dyad/{pair}/claim")
}

impl EtcdArbiter {
    /// Uses the cluster with these members.
    #[must_use]
    pub fn new(members: Vec<Endpoint>) -> Self {
        Self { members }
    }

    fn failed(&self, step: impl Into<String>, source: io::Error) -> Unreachable {
        let arbiter = ArbiterUrl::Etcd(self.members.clone()).to_string();
        Unreachable { arbiter, step: step.into(), source }
    }

    /// Asks one member after the other until one answers. A member that is late may still act on the
    /// question after the answer of another was taken.
    fn ask<T: Send + 'static>(
        &self,
        question: impl Fn(&Member) -> io::Result<T> + Clone + Send + 'static,
    ) -> io::Result<T> {
        let (sender, answers) = channel();
        let mut members = self.members.iter();
        let mut awaited = 0;
        let mut failures = Vec::new();
        loop {
            if let Some(endpoint) = members.next() {
                let (sender, question, endpoint) =
                    (sender.clone(), question.clone(), endpoint.clone());
                std::thread::Builder::new().name("etcd".into()).spawn(move || {
                    let answer = question(&Member::new(&endpoint));
                    // Nobody listens any more if another member was faster.
                    let _ = sender.send((endpoint, answer));
                })?;
                awaited += 1;
            } else if awaited == 0 {
                return Err(no_answer(&failures));
            }
            // A member's answer comes or fails by itself; the bound is for the system's own delays.
            let patience =
                if members.len() > 0 { HEAD_START } else { ANSWER * MAX_ATTEMPTS as u32 };
            match answers.recv_timeout(patience) {
                Ok((_, Ok(answer))) => return Ok(answer),
                Ok((endpoint, Err(error))) => {
                    awaited -= 1;
                    failures.push((endpoint, error));
                }
                Err(RecvTimeoutError::Timeout) if members.len() > 0 => {}
                Err(_) => return Err(no_answer(&failures)),
            }
        }
    }

    /// All members that answer belong to one cluster.
    fn one_cluster(&self) -> io::Result<()> {
        let answers: Vec<(&Endpoint, String)> = std::thread::scope(|scope| {
            let cluster = |endpoint| Some((endpoint, Member::new(endpoint).cluster().ok()?));
            let asked: Vec<_> = self
                .members
                .iter()
                .map(|endpoint| scope.spawn(move || cluster(endpoint)))
                .collect();
            // A member that does not answer is no reason to refuse: that is what the others are for.
            asked.into_iter().filter_map(|thread| thread.join().ok().flatten()).collect()
        });
        for pair in answers.windows(2) {
            let ((a, one), (b, other)) = (&pair[0], &pair[1]);
            if one != other {
                let text = format!(
                    "{a} and {b} belong to different clusters: name members of one cluster, the same on both hosts"
                );
                return Err(io::Error::new(ErrorKind::InvalidInput, text));
            }
        }
        Ok(())
    }
}

fn no_answer(failures: &[(Endpoint, io::Error)]) -> io::Error {
    match failures {
        [] => io::Error::new(ErrorKind::TimedOut, "it has not answered in time"),
        [(_, error)] => io::Error::new(error.kind(), error.to_string()),
        _ => {
            let texts: Vec<_> =
                failures.iter().map(|(endpoint, error)| format!("{endpoint}: {error}")).collect();
            io::Error::new(failures[0].1.kind(), texts.join("; "))
        }
    }
}

fn decode(stored: &Stored) -> io::Result<Option<Record>> {
    let Some(bytes) = stored else { return Ok(None) };
    let record = serde_json::from_slice(bytes).map_err(|error| {
        let text = format!("the pair's key does not hold what was put there: {error}");
        io::Error::new(ErrorKind::InvalidData, text)
    })?;
    Ok(Some(record))
}

fn encode(record: &Record) -> io::Result<Vec<u8>> {
    Ok(serde_json::to_vec(record)?)
}

/// Goes from record to record until there is an answer; `None` where nothing was announced. Begins at
/// `expected`, which spares a question where it is right.
fn settle<T>(
    member: &Member,
    key: &str,
    mut stored: Stored,
    decide: impl Fn(Option<&Record>) -> Next<T>,
) -> io::Result<Option<T>> {
    for _ in 0..MAX_ATTEMPTS {
        match decide(decode(&stored)?.as_ref()) {
            Next::Answer(answer) => return Ok(Some(answer)),
            Next::NotAnnounced => return Ok(None),
            Next::Replace(record) => {
                let new = encode(&record)?;
                stored = match member.swap(key, stored.as_deref(), &new)? {
                    Swapped::Yes => Some(new),
                    Swapped::No(found) => found,
                };
            }
        }
    }
    Err(io::Error::new(ErrorKind::WouldBlock, "the pair's key keeps changing"))
}

impl super::Arbiter for EtcdArbiter {
    fn announce(
        &self,
        pair: &PairId,
        generation: Generation,
        who: &str,
    ) -> Result<(), Unreachable> {
        let step = || format!("announce generation {generation} of {pair}");
        check_who(who)
            .and_then(|()| self.one_cluster())
            .map_err(|error| self.failed(step(), error))?;
        let key = key(pair);
        let announced = self.ask(move |member| {
            let stored = member.get(&key)?;
            settle(member, &key, stored, |record| record::announce(record, generation))
        });
        match announced.map_err(|error| self.failed(step(), error))? {
            Some(Announced::Yes) => Ok(()),
            Some(Announced::Ended { by }) => Err(self.failed(step(), ended(pair, generation, &by))),
            None => Err(self.failed(step(), not_announced(pair, generation))),
        }
    }

    fn verify(&self, pair: &PairId, generation: Generation, who: &str) -> Result<(), Unreachable> {
        let step = || format!("find generation {generation} of {pair}");
        check_who(who)
            .and_then(|()| self.one_cluster())
            .map_err(|error| self.failed(step(), error))?;
        let (key, trial, who) = (key(pair), format!("dyad/{pair}/trial"), who.to_owned());
        let found = self.ask(move |member| {
            member.put_for(&trial, &who, TRIAL_SECONDS)?;
            decode(&member.get(&key)?)
        });
        match found.map_err(|error| self.failed(step(), error))? {
            Some(record) if record.generation == generation => match record.winner {
                None => Ok(()),
                Some(by) => Err(self.failed(step(), ended(pair, generation, &by))),
            },
            _ => Err(self.failed(step(), not_announced(pair, generation))),
        }
    }

    fn claim(
        &self,
        pair: &PairId,
        generation: Generation,
        who: &str,
    ) -> Result<Claim, Unreachable> {
        let step = || format!("claim generation {generation} of {pair}");
        check_who(who).map_err(|error| self.failed(step(), error))?;
        let (key, who) = (key(pair), who.to_owned());
        let claimed = self.ask(move |member| {
            // What is there unless it was claimed already: one transaction decides, in one round trip.
            let expected = encode(&Record::announced(generation))?;
            let found = settle(member, &key, Some(expected), |record| {
                record::claim(record, generation, &who)
            })?;
            // Of this member's cluster; another may know better.
            found.ok_or_else(|| not_announced_here(generation))
        });
        claimed.map_err(|error| self.failed(step(), error))
    }
}

fn not_announced_here(generation: Generation) -> io::Error {
    let text = format!(
        "generation {generation} was not announced there, so it is not the cluster that the pair was protected with, or its data is gone"
    );
    io::Error::new(ErrorKind::NotFound, text)
}
