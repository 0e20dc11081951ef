//! Log records: what the primary writes, in the order in which it happened to its guest.

use serde::{Deserialize, Serialize};

use crate::{Digest, Event, ExecutionPoint, OutputNumber};

/// An entry at an execution point.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Where. Never less than the point of the record before.
    pub point: ExecutionPoint,
    /// What.
    pub entry: Entry,
}

/// What a record says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Entry {
    /// The guest got an input.
    Event(Event),
    /// The guest produced an output. The position at which this record ends is what must be
    /// acknowledged before the output leaves, since a backup that has this record will reach the
    /// state that produced it.
    Output {
        /// Which.
        number: OutputNumber,
    },
    /// Every output up to and including this one has left the gate and been given to its back half, which for
    /// frames is a system call that has returned. The backup drops its copies; disk requests it issues again from
    /// the devices' own books.
    Released {
        /// The last one that left.
        through: OutputNumber,
    },
    /// The state of the primary's guest at this point; the backup compares.
    Digest(Digest),
    /// Nothing happened up to here: lets the backup execute on.
    Mark,
}
