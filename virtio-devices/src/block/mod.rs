//! The block device (virtio 1.2, 5.2).

pub mod back;
pub mod copy;
mod engine;
mod faults;
mod front;
mod image;
mod job;
pub mod latency;
mod overlap;
mod pool;
mod ring;
mod state;
mod valve;
mod worker;

pub use front::{BlockConfig, BlockFront, MAX_REQUEST_BYTES, SERIAL_SIZE};
pub use state::BlockState;
