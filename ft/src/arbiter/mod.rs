//! Arbiters decide who goes on when the two sides of a pair cannot hear each other.
//!
//! For each generation of a pair an arbiter lets exactly one side win, for ever. It is an atomic
//! test-and-set in a place that both hosts reach. A side that cannot reach it waits.

mod file;

pub use file::FileArbiter;

use crate::{Generation, PairId};

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

/// The arbiter gave no answer. Whether the claim was made is unknown; ask again.
#[derive(Debug, thiserror::Error)]
#[error("arbiter {arbiter} gives no answer: cannot {step}")]
pub struct Unreachable {
    /// Its URL.
    pub arbiter: String,
    /// What failed.
    pub step: String,
    /// Why.
    #[source]
    pub source: std::io::Error,
}

/// An atomic test-and-set per pair and generation. May block: call it on a thread of its own.
pub trait Arbiter: Send + Sync {
    /// Claims the end of `generation` of `pair` for `who`, which names one process for its whole
    /// life and no other.
    fn claim(&self, pair: &PairId, generation: Generation, who: &str)
    -> Result<Claim, Unreachable>;
}

/// An arbiter's URL that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum BadArbiter {
    /// No known kind.
    #[error(
        "arbiter_url {url:?} is of no known kind: use file:DIR with a directory that both hosts share"
    )]
    Unknown {
        /// The URL.
        url: String,
    },
    /// Not an absolute path.
    #[error("arbiter_url {url:?} must name an absolute directory, as file:/shared/dyad")]
    NotAbsolute {
        /// The URL.
        url: String,
    },
    /// No such directory.
    #[error("arbiter directory {dir:?} cannot be used: mount or create it on both hosts")]
    NoDirectory {
        /// The directory.
        dir: std::path::PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

/// Makes the arbiter that `url` names. The directory of a `file:` arbiter must exist.
pub fn open(url: &str) -> Result<Box<dyn Arbiter>, BadArbiter> {
    match url.split_once(':') {
        Some(("file", dir)) => Ok(Box::new(FileArbiter::open(dir)?)),
        _ => Err(BadArbiter::Unknown { url: url.chars().take(200).collect() }),
    }
}
