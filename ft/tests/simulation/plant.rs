//! Bugs planted on purpose: a simulation that does not find them proves nothing. Each is put where the
//! production code is used, so that the code itself stays as it is.

/// One bug.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plant {
    /// Outputs go into the gate without the position of their record.
    GateReleasesEarly,
    /// The arbiter tells everybody that they have won.
    ClaimNotExclusive,
    /// Claims count also where no generation was announced.
    EmptyPlaceDecides,
    /// The backup takes what it has received for executed.
    LiveWithoutDraining,
    /// The primary takes the time at which an echo is read for the time at which it was sent.
    LeaseByReceipt,
    /// The back halves do not look at the lease.
    LeaseIgnoredByBackHalves,
    /// The backup's lease is shorter than the primary's.
    LeaseIgnoredByBackup,
    /// The clock stands still while the host sleeps (`CLOCK_MONOTONIC`).
    ClockStopsWhileFrozen,
    /// Who has lost the claim runs on.
    LoserGoesOn,
    /// The backup acknowledges what it is about to receive.
    AcknowledgedBeforeReceipt,
    /// The back halves are called quiet while a system call is under way.
    NotQuiesced,
    /// Outputs count as out when the gate has opened.
    ReleasedBeforeSent,
    /// Disk requests are not issued again when going live.
    NothingReissued,
    /// An arbiter's lost answer is never asked for again.
    NoRetry,
    /// A side that has lost the other begins the next generation without asking the arbiter.
    NextWithoutClaim,
    /// The survivor looks for a backup in the generation that is over.
    OldGenerationAgain,
    /// A search ends when a backup is lost.
    SearchGivesUp,
    /// A write leaves though the backup has yet to read what it overwrites.
    ReadNotAwaited,
    /// The backup applies a completion when the log says so, whatever its own disk says.
    OwnDiskNotAwaited,
    /// The backup takes what failed on its own disk for done.
    OwnFailureTaken,
    /// What a failed write left is not shipped.
    DoubtIgnored,
    /// A host that was in the pair before is taken to have the disk that it had.
    StaleDiskTrusted,
}
