//! The console device (virtio 1.2, 5.3): port 0 only.

mod front;
mod state;

pub use front::{ConsoleConfig, ConsoleFront};
pub use state::ConsoleState;
