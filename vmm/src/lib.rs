//! One virtual machine, from its configuration to its last instruction.

pub mod acpi;
pub mod api;
pub mod backends;
pub mod boot;
pub mod config;
pub mod device_tree;
pub mod event_monitor;
pub mod guest;
pub mod legacy;
pub mod machine;
pub mod non_blocking;
pub mod pair;
pub mod parts;
pub mod pci;
pub mod protection;
mod regular_file;
pub mod run_loop;
pub mod shared;
pub mod snapshot;
pub mod standby;
pub mod vm;
pub mod vmm;
