//! The console device (virtio 1.2, 5.3): port 0 only.

pub mod back;
mod front;
mod output;
mod state;
mod terminal;

pub use front::{ConsoleConfig, ConsoleFront};
pub use state::ConsoleState;
