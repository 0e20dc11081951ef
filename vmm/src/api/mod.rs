//! The control surface: a REST API over a Unix socket, with Cloud Hypervisor's endpoints under `/api/v1` and
//! the `ft.` calls beside them.
//!
//! What must hold: Cloud Hypervisor's clients work unchanged, down to the bytes of the status line; calls
//! are served strictly one after the other; a wrong call is answered with what is wrong and what to do, and
//! never harms the running VM.
//!
//! ```text
//!  socket ── server ── http ── route ──Call──▶ event_loop ── dispatch ── dyn Control
//!            (thread `api`)            ◀─Response─  (control thread)
//! ```

pub mod control;
pub mod dispatch;
pub mod event_loop;
pub mod ft;
pub mod http;
mod metrics;
pub mod route;
pub mod security;
pub mod server;
pub mod socket;
pub mod types;

pub use control::{Control, ControlError, Counters, VmEnd, VmInfo, VmState};
pub use event_loop::{Doorbell, EventLoop, Inbox, LoopError};
pub use ft::{
    ArbiterUrl, FtConfigError, FtEnableConfig, FtMode, FtReceiveConfig, FtStatus, TcpUrl,
};
pub use security::{ChannelSecurity, ChosenSecurity, SecurityError};
pub use server::{Server, ServerError};
pub use socket::{ApiSocket, SocketError};
