//! What can go wrong in a backend. Nothing a guest does is among it.

/// An error of a backend.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The host refused memory for the guest.
    #[error("cannot map {bytes} bytes of guest memory")]
    MapMemory {
        /// Bytes asked for.
        bytes: u64,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// `/dev/kvm` cannot be used.
    #[error(
        "cannot open /dev/kvm: load KVM's module for this processor and get access to the device, or \
         use --hypervisor soft"
    )]
    OpenKvm {
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// A KVM call failed.
    #[error("{call} failed")]
    Kvm {
        /// The ioctl's name.
        call: &'static str,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// The state to restore is not one this backend saved.
    #[error("cannot restore the processor: {reason}")]
    Restore {
        /// What does not fit.
        reason: String,
    },
    /// The backend cannot do what was asked.
    #[error("the {backend} hypervisor does not support {what}")]
    Unsupported {
        /// Backend name.
        backend: &'static str,
        /// What was asked.
        what: String,
    },
    /// The host processor or kernel stopped the guest for a reason the guest did not cause.
    #[error("the processor stopped: {reason}")]
    Stopped {
        /// Reason as the backend gave it.
        reason: String,
    },
}
