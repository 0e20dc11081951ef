//! The block device (virtio 1.2, 5.2).

pub mod back;
mod front;
pub mod latency;
mod overlap;
mod state;

pub use front::{BlockConfig, BlockFront, MAX_REQUEST_BYTES, SERIAL_SIZE};
pub use state::BlockState;
