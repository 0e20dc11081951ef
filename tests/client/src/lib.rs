//! A client of the ledger service that notices everything a failover could do wrong.
//!
//! [`load::Load`] keeps TCP connections open, sends numbered requests one after another and remembers each
//! answer; a connection that ends, an answer out of order or a number given twice is an error, not a
//! reason to reconnect. [`verdict::Verdict`] holds the remembered answers against the ledger read from the
//! disk. [`stats`] turns times into the figures that are printed.

pub mod load;
pub mod stats;
pub mod verdict;
