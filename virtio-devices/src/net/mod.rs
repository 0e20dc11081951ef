//! The network device (virtio 1.2, 5.1), with checksum and segmentation offload.

pub mod back;
mod front;
pub mod offload;
mod state;
mod tap;

pub use front::{NetConfig, NetFront};
pub use offload::{FRAME_MAX, HEADER_SIZE, Offloads};
pub use state::NetState;
pub use tap::TapError;
