//! virtio devices (virtio 1.2), each in two halves, and their PCI transport.
//!
//! The *front* half of a device is what the guest sees: configuration, queues, interrupts. It is a
//! deterministic function of its state, guest memory and the calls made to it. It holds no locks, file
//! descriptors or threads, runs on the vCPU's thread only, and is saved and restored whole. What it
//! wants done in the world it hands out as an [`Effect`]; what happened in the world it is told as a
//! [`DeviceEvent`]. Two machines that get the same accesses and the same events at the same execution
//! points therefore stay equal, byte for byte.
//!
//! The *back* half does host I/O on its own thread and knows nothing of guest memory. Owned buffers
//! pass between the two, and nothing else. The front copies what is to be written out of guest memory
//! when the guest notifies, and copies what was read into guest memory when the completion is applied,
//! so a guest that scribbles over its buffers in between races with nothing.
//!
//! Every device's folder has the same files: `front.rs`, `state.rs` (what is saved), `back.rs`.
//!
//! A guest can break the rules of virtio in any way it likes. The answer is an error status on the
//! request where the specification has one, else `DEVICE_NEEDS_RESET`; memory use stays bounded.

pub mod block;
pub mod console;
pub mod effect;
pub mod front;
pub mod net;
pub mod pci;
mod poll;
pub mod queue;
pub mod rng;
mod window;

pub use block::{BlockConfig, BlockFront};
pub use console::{ConsoleConfig, ConsoleFront};
pub use effect::{
    BlockCompletion, BlockOp, BlockRequest, BlockStatus, DeviceEvent, Effect, Effects, SECTOR_SIZE,
};
pub use front::{DriverError, Front, FrontError, FrontState, Io, StateError};
pub use net::{NetConfig, NetFront};
pub use pci::{VirtioPci, VirtioPciState};
pub use queue::{Buffer, Chain, VirtQueue};
pub use rng::RngFront;
