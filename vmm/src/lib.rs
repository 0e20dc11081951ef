//! One virtual machine, from its configuration to its last instruction.

pub mod api;
pub mod config;
pub mod device_tree;
