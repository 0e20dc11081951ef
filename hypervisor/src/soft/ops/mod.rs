//! What instructions do, by group.

mod alu;
mod bits;
mod control;
pub mod fp;
pub mod fused;
pub mod integer;
mod io;
pub mod legacy;
mod mov;
mod muldiv;
mod shift;
mod stack;
mod string;
pub mod system;
