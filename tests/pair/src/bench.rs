//! What protection costs and how long a failover takes, measured in one run.
//!
//! [`workloads`] says what is run in the guest; [`measure`] runs it protected and unprotected in turn, and kills;
//! [`bare`] measures the machine alone;
//! [`results`] is what comes out of it, kept as JSON from the first figure on; [`report`] with `targets` and `misses`,
//! and [`plots`], make the document of it.

pub mod bare;
pub mod measure;
mod misses;
pub mod plots;
pub mod report;
pub mod results;
mod targets;
pub mod workloads;
