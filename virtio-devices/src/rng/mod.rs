//! The entropy device (virtio 1.2, 5.4).

pub mod back;
mod front;
mod state;

pub use front::RngFront;
pub use state::RngState;
