//! Events: the only inputs of a guest.
//!
//! A guest's state changes by executing instructions, by device emulation synchronous with them, and by
//! applying one of these at an execution point. Two guests that start equal and get equal events at
//! equal points stay equal; so whatever is not a function of these must not reach a guest.

use serde::{Deserialize, Serialize};

use crate::bytes;

/// One input of the guest. Applied at the execution point of the record that carries it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Event {
    /// From this point on the guest's TSC is `tsc` plus `rate` times the instructions retired since.
    Anchor {
        /// TSC at the point.
        tsc: u64,
        /// TSC ticks per retired instruction, in units of 2^-32.
        rate: u64,
    },
    /// Frames from the network, in order.
    Frames {
        /// Index of the device in the VM's configuration.
        device: u8,
        /// A virtio_net_hdr (virtio 1.2, section 5.1.6) with an Ethernet frame behind it, each.
        #[serde(with = "bytes::many")]
        frames: Vec<Vec<u8>>,
    },
    /// A disk request finished.
    DiskCompletion {
        /// Index of the device.
        device: u8,
        /// The request's number, counted per device by its front half.
        request: u64,
        /// The virtio-blk status byte (virtio 1.2, section 5.2.6).
        status: u8,
        /// What was read; empty for anything but a read.
        #[serde(with = "bytes::one")]
        data: Vec<u8>,
    },
    /// Bytes typed into a virtio console.
    ConsoleInput {
        /// Index of the device.
        device: u8,
        /// The bytes.
        #[serde(with = "bytes::one")]
        bytes: Vec<u8>,
    },
    /// Bytes typed into the serial port.
    SerialInput {
        /// The bytes.
        #[serde(with = "bytes::one")]
        bytes: Vec<u8>,
    },
    /// Randomness from the host.
    Entropy {
        /// Index of the device.
        device: u8,
        /// The bytes.
        #[serde(with = "bytes::one")]
        bytes: Vec<u8>,
    },
    /// An operator's action, applied by both sides at the same point.
    Control(Control),
}

/// What an operator does to a VM. In the log, so that both sides do it together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Control {
    /// Stop executing until [`Control::Resume`].
    Pause,
    /// Go on executing.
    Resume,
    /// Press the power button: the guest may shut down.
    PowerButton,
    /// Cut the power: the VM ends on both sides, and the backup does not go live.
    PowerOff,
    /// Reset the machine.
    Reset,
    /// Protection ends here; the backup is discarded.
    Disable,
    /// The primary stops here for good and the backup goes live. The last record of its log.
    HandOver,
}

impl Event {
    /// Bytes of payload that the event carries, apart from its fixed fields.
    pub fn payload_bytes(&self) -> usize {
        match self {
            Event::Frames { frames, .. } => frames.iter().map(|frame| frame.len() + 3).sum(),
            Event::DiskCompletion { data, .. } => data.len(),
            Event::ConsoleInput { bytes, .. }
            | Event::SerialInput { bytes }
            | Event::Entropy { bytes, .. } => bytes.len(),
            Event::Anchor { .. } | Event::Control(_) => 0,
        }
    }
}
