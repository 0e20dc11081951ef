//! Arbiters decide who goes on when the two sides of a pair cannot hear each other.
//!
//! For each generation of a pair an arbiter lets exactly one side win, for ever. It is an atomic
//! test-and-set in a place that both hosts reach. A side that cannot reach it waits.
//!
//! A generation must be *announced* before its end can be claimed: the primary announces it when it
//! looks for a backup, and the backup, before it agrees, makes sure that it sees the announcement. So both
//! are known to reach the same place, and a place where nothing was announced decides nothing: the empty
//! directory under a file system that is not mounted, or an etcd of the same address on either host.
//!
//! Here alone this crate reaches outside: files and HTTP, always behind [`Arbiter`], which may block.

mod etcd;
mod file;
mod url;

pub use etcd::EtcdArbiter;
pub use file::FileArbiter;
pub use url::{ArbiterUrl, BadArbiter, Endpoint};

use std::io;

use crate::{Generation, PairId};

/// The longest name of a claimant.
pub const MAX_WHO_BYTES: usize = 1024;

/// The answer to a claim.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Claim {
    /// The asking side may go on. It may ask again and is told the same.
    Won,
    /// Another has won.
    Lost {
        /// Who.
        by: String,
    },
}

/// The arbiter gave no answer. Whether what was asked for has been done is unknown; ask again.
#[derive(Debug, thiserror::Error)]
#[error("arbiter {arbiter} gives no answer: cannot {step}")]
pub struct Unreachable {
    /// Its URL.
    pub arbiter: String,
    /// What failed.
    pub step: String,
    /// Why.
    #[source]
    pub source: io::Error,
}

/// An atomic test-and-set per pair and generation. May block: call it on a thread of its own.
///
/// `who` names one process for its whole life and no other: one line, at most [`MAX_WHO_BYTES`].
pub trait Arbiter: Send + Sync {
    /// Makes `generation` known, so that its end can be claimed. For the side that lives in it, before
    /// it has a backup in it; again does no harm. An error also if its end has been claimed already: then
    /// the asking side is not the live one.
    fn announce(&self, pair: &PairId, generation: Generation, who: &str)
    -> Result<(), Unreachable>;

    /// Makes sure that a claim could be made from here: the announcement is seen, and what a claim
    /// writes can be written. Changes nothing.
    fn verify(&self, pair: &PairId, generation: Generation, who: &str) -> Result<(), Unreachable>;

    /// Claims the end of `generation`. Whoever claims a generation that is over for good, because a
    /// later one was announced, has lost.
    fn claim(&self, pair: &PairId, generation: Generation, who: &str)
    -> Result<Claim, Unreachable>;
}

/// Makes the arbiter that `url` names. Nothing is asked of it yet.
#[must_use]
pub fn open(url: &ArbiterUrl) -> Box<dyn Arbiter> {
    match url {
        ArbiterUrl::File(directory) => Box::new(FileArbiter::new(directory)),
        ArbiterUrl::Etcd(endpoints) => Box::new(EtcdArbiter::new(endpoints.clone())),
    }
}

/// A claimant's name is stored as one line and compared as a whole.
fn check_who(who: &str) -> io::Result<()> {
    if who.is_empty() || who.len() > MAX_WHO_BYTES || who.contains('\n') {
        let text = format!("a claimant's name is one line of 1 to {MAX_WHO_BYTES} bytes");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    Ok(())
}

/// What is said of a place where a generation was not announced.
fn not_announced(pair: &PairId, generation: Generation) -> io::Error {
    io::Error::new(
        io::ErrorKind::NotFound,
        format!(
            "generation {generation} of {pair} was not announced there, so it is not the place that the pair was protected with, or its contents are gone"
        ),
    )
}

/// What is said to a side that wants to live in a generation that is over.
fn ended(pair: &PairId, generation: Generation, by: &str) -> io::Error {
    io::Error::new(
        io::ErrorKind::AlreadyExists,
        format!(
            "the end of generation {generation} of {pair} belongs to {by}: this VM goes on there"
        ),
    )
}
