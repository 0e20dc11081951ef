//! One virtual machine, from its configuration to its last instruction.

pub mod acpi;
pub mod api;
pub mod backends;
pub mod boot;
pub mod config;
pub mod device_tree;
pub mod legacy;
pub mod machine;
pub mod pci;
