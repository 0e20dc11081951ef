//! What instructions do, by group.

pub mod fp;
pub mod integer;
pub mod system;
