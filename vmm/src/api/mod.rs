//! The control surface: a REST API over a Unix socket, with Cloud Hypervisor's endpoints under `/api/v1` and
//! the `ft.` calls beside them.
//!
//! What must hold: Cloud Hypervisor's clients work unchanged, down to the bytes of the status line; calls
//! are served strictly one after the other; a wrong call is answered with what is wrong and what to do, and
//! never harms the running VM.

pub mod control;
pub mod ft;
pub mod types;

pub use control::{Control, ControlError, Counters, VmInfo, VmState};
pub use ft::{FtEnableConfig, FtReceiveConfig, FtStatus};
