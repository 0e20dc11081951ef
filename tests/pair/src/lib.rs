//! Real guests on real `dyad` processes, one network namespace per host, and what is done to them.
//!
//! [`network`] makes two hosts and a switch; [`vmm`] is one `dyad` process in one of them; [`pair`] boots,
//! protects, kills and protects again; [`disk`] reads the image behind the guest's back. The programs in
//! `src/bin` and the tests in `tests/` are stories told with these. [`clients`] speak to real programs in the guest,
//! and [`bench`] measures them.

pub mod bench;
pub mod clients;
pub mod console;
pub mod cpu_time;
pub mod disk;
pub mod faults;
pub mod guest;
pub mod interrupt;
pub mod kills;
pub mod lab;
pub mod mirrors;
pub mod namespace;
pub mod network;
pub mod pair;
pub mod patience;
pub mod proxy;
pub mod requirements;
pub mod soak;
pub mod stream;
pub mod vmm;
