//! One virtual machine, from its configuration to its last instruction.

pub mod config;
