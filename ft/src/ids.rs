//! The numbers that name things in the protocol, each its own type so that a log position can never
//! be taken for an execution point.

use std::fmt;

use serde::{Deserialize, Serialize};

macro_rules! number {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(
            Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
        )]
        #[serde(transparent)]
        pub struct $name(pub u64);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

number! {
    /// Guest instructions retired since the VM was created.
    ExecutionPoint
}
number! {
    /// Bytes of the log stream since the clone's state was taken. A record *ends* at a position; a
    /// position is acknowledged when every byte before it was received.
    LogPosition
}
number! {
    /// One period of protection of a pair. A claim names the generation that it ends: whoever wins
    /// the claim for generation *n* is the only live side of generation *n* + 1.
    Generation
}
number! {
    /// Counts a guest's outputs (frames, disk writes, console bytes), the same on both sides.
    OutputNumber
}

impl Generation {
    /// The generation that the winner of this one's claim runs in.
    pub fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

/// Names a protected VM across hosts and generations. 1 to 64 characters of `a-z A-Z 0-9 - _`, so
/// that an arbiter may use it in a file name or a key.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PairId(String);

/// A text that cannot be a [`PairId`].
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{0:?} cannot name a pair: use 1 to 64 letters, digits, '-' and '_'")]
pub struct BadPairId(pub String);

impl PairId {
    /// Checks `name`.
    pub fn new(name: impl Into<String>) -> Result<Self, BadPairId> {
        let name = name.into();
        let fits = (1..=64).contains(&name.len());
        let plain = name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_');
        if fits && plain { Ok(Self(name)) } else { Err(BadPairId(name.chars().take(80).collect())) }
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for PairId {
    type Error = BadPairId;
    fn try_from(name: String) -> Result<Self, BadPairId> {
        Self::new(name)
    }
}

impl From<PairId> for String {
    fn from(id: PairId) -> Self {
        id.0
    }
}

impl fmt::Display for PairId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
