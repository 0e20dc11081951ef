//! The network device (virtio 1.2, 5.1), without offloads.

mod front;
mod state;

pub use front::{FRAME_MAX, NetConfig, NetFront};
pub use state::NetState;
