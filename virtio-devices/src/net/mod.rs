//! The network device (virtio 1.2, 5.1), without offloads.

pub mod back;
mod front;
mod state;
mod tap;

pub use front::{FRAME_MAX, NetConfig, NetFront};
pub use state::NetState;
pub use tap::TapError;
