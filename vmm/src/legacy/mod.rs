//! Devices of the PC platform that are neither PCI nor virtio.
//!
//! Register models only: no descriptors, no clocks, no threads. Each is a function of its state and
//! of what the guest and the event log did to it; time comes as an argument (ticks of the guest's TSC).
//! There are no 8259s, no 8254 and no keyboard: their ports read as all ones, and the ACPI tables say so.

pub mod power;
pub mod rtc;
pub mod serial;

pub use power::Power;
pub use rtc::Rtc;
pub use serial::SerialPort;
