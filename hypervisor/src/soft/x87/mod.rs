//! x87 arithmetic: what handlers call to compute, without registers or memory of the guest.

pub mod host;
pub mod transcendental;
pub mod wide;

#[cfg(test)]
mod reference;
