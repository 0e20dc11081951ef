//! The ledger: what the test guest writes to its disk and what the tests read back from it.
//!
//! A ledger is a text file of lines `N TEXT`, numbered from 1 without a gap. A line counts once its
//! newline is on stable storage; bytes after the last newline are an append that never finished and
//! are cut off when the ledger is opened. The service answers a request only after `fsync` returned,
//! so every acknowledged number must be found in the file after any crash: that is the property the
//! tests of protection check, through the network and the disk together.
//!
//! The crate uses the standard library only: the service is linked statically and is the single
//! program in the guest besides busybox.

pub mod ledger;
pub mod service;
