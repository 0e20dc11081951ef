//! What every front half is to its transport: the trait [`Front`].

use serde::{Deserialize, Serialize};
use vm_memory::GuestMemory;

use crate::block::BlockState;
use crate::console::ConsoleState;
use crate::effect::{DeviceEvent, Effect, Effects};
use crate::net::NetState;
use crate::queue::VirtQueue;
use crate::rng::RngState;

/// The front half of a device: a deterministic function of its state, guest memory and these calls.
///
/// It reads no clock, no randomness and no file, and iterates over nothing of undefined order.
pub trait Front<M: GuestMemory>: Send {
    /// The virtio device ID (virtio 1.2, 5): 1 network, 2 block, 3 console, 4 entropy.
    fn device_id(&self) -> u16;

    /// Feature bits of the device type. The transport adds those of the rings and VIRTIO_F_VERSION_1.
    fn features(&self) -> u64;

    /// The queues and their greatest sizes, powers of two.
    fn queue_sizes(&self) -> &'static [u16];

    /// Reads device configuration from byte `offset`; zeroes beyond its end.
    fn read_config(&self, offset: usize, data: &mut [u8]);

    /// Writes device configuration; what is not writable is ignored.
    fn write_config(&mut self, offset: usize, data: &[u8]);

    /// The driver is ready (DRIVER_OK) and accepted `features`.
    fn activate(&mut self, features: u64, effects: &mut Effects);

    /// The driver, or the machine, reset the device. Effects under way stay so; their answers will
    /// still come and must then be taken without touching guest memory.
    fn reset(&mut self);

    /// The driver made chains available in `queue`.
    ///
    /// # Errors
    /// What the driver did wrong; the transport then asks it for a reset.
    fn notify(&mut self, queue: usize, io: &mut Io<'_, M>) -> Result<(), DriverError>;

    /// Something happened in the world.
    ///
    /// # Errors
    /// [`FrontError::Driver`] as for `notify`; anything else if the event cannot be for this device,
    /// whose state is then unchanged.
    fn event(&mut self, event: DeviceEvent, io: &mut Io<'_, M>) -> Result<(), FrontError>;

    /// The effects that were handed out and whose answers have not come, in order. A machine that goes
    /// live issues them again.
    fn outstanding(&self) -> Vec<Effect>;

    /// Whether more of what arrives unasked had better wait outside, since the guest has not taken yet what
    /// came before.
    fn backlogged(&self) -> bool {
        false
    }

    /// What it has done so far, by name; part of the state.
    fn counters(&self) -> Vec<(&'static str, u64)>;

    /// Everything the guest could observe, and the rest.
    fn save(&self) -> FrontState;

    /// Becomes the device `state` was saved from.
    ///
    /// # Errors
    /// If `state` is of another type of device or impossible.
    fn restore(&mut self, state: &FrontState) -> Result<(), StateError>;
}

/// What a front half works on during a call.
#[derive(Debug)]
pub struct Io<'a, M> {
    /// Guest memory.
    pub memory: &'a M,
    /// The device's queues.
    pub queues: &'a mut [VirtQueue],
    /// Where to put effects.
    pub effects: &'a mut Effects,
    /// Whether the driver has started the device and it is not broken. While it is not, queues must not
    /// be touched.
    pub live: bool,
}

/// A saved front half.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum FrontState {
    /// Of [`crate::BlockFront`].
    Block(BlockState),
    /// Of [`crate::NetFront`].
    Net(NetState),
    /// Of [`crate::ConsoleFront`].
    Console(ConsoleState),
    /// Of [`crate::RngFront`].
    Rng(RngState),
}

/// A rule of virtio that the driver broke, in a way no request's status can tell it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DriverError {
    /// The available ring claims more entries than the queue has.
    #[error("the available ring is inconsistent")]
    AvailableRing,
    /// The used ring cannot be written.
    #[error("the used ring cannot be written")]
    UsedRing,
    /// A ring is misaligned or outside RAM.
    #[error("a queue's ring at {address:#x} is misaligned or not in RAM")]
    RingAddress {
        /// As the driver wrote it.
        address: u64,
    },
    /// A chain loops or leaves its table.
    #[error("descriptor chain {head} has no proper end")]
    BrokenChain {
        /// Its head.
        head: u16,
    },
    /// A chain is longer than its queue, or than the device takes.
    #[error("descriptor chain {head} is too long")]
    LongChain {
        /// Its head.
        head: u16,
    },
    /// A readable descriptor follows a writable one.
    #[error("descriptor chain {head} has a readable part after a writable one")]
    MixedChain {
        /// Its head.
        head: u16,
    },
    /// A buffer is outside RAM.
    #[error("a buffer of {len} bytes at {address:#x} is not in RAM")]
    Memory {
        /// Guest-physical address.
        address: u64,
        /// Its length.
        len: u32,
    },
    /// A chain lacks a part every request of this device has.
    #[error("a descriptor chain lacks a required part")]
    ShortChain,
}

/// Why a front half did not take an event.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrontError {
    /// The driver broke a rule.
    #[error(transparent)]
    Driver(#[from] DriverError),
    /// An event of another type of device.
    #[error("an event of kind '{event}' was given to a device with virtio ID {device_id}")]
    WrongDevice {
        /// The event's kind.
        event: &'static str,
        /// The device's type.
        device_id: u16,
    },
    /// A completion of a request that is not outstanding.
    #[error("a completion came for disk request {id}, which is not outstanding")]
    UnknownRequest {
        /// The id in the completion.
        id: u64,
    },
    /// An answer nobody asked for.
    #[error("random bytes came that the guest had not asked for")]
    Unasked,
}

/// Why a saved device cannot be restored.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StateError {
    /// The state has a format of another version.
    #[error("the saved device has format {found}, this program reads {expected}")]
    Version {
        /// In the state.
        found: u32,
        /// What this program writes.
        expected: u32,
    },
    /// The state is of another kind of device, or of one configured differently.
    #[error("the saved device differs from the configured one in its {what}")]
    Mismatch {
        /// What differs.
        what: &'static str,
    },
    /// The state could not have been saved by a device.
    #[error("the saved device has an impossible {what}")]
    Invalid {
        /// What is impossible.
        what: &'static str,
    },
}

/// Copies what a configuration structure holds from `offset` on, zeroes beyond it.
pub(crate) fn copy_config(config: &[u8], offset: usize, data: &mut [u8]) {
    data.fill(0);
    if let Some(rest) = config.get(offset..) {
        let n = rest.len().min(data.len());
        data[..n].copy_from_slice(&rest[..n]);
    }
}
