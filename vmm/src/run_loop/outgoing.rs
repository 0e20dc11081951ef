//! What leaves a guest, and the way it takes.

use std::time::Duration;

use virtio_devices::net::Offloads;
use virtio_devices::{BlockOp, BlockRequest};

use crate::machine::MachineEffect;

/// The back halves as the run loop and the output gate see them. Calls do not block on host I/O.
pub trait Outlet: Send + Sync {
    /// Starts a disk request; its completion arrives as an event.
    fn block(&self, device: u8, request: BlockRequest);
    /// As [`Outlet::block`]; tries several times, with growing pauses, before the request counts as failed.
    fn block_patiently(&self, device: u8, request: BlockRequest);
    /// Sends frames.
    fn frames(&self, device: u8, frames: &[Vec<u8>]);
    /// Lets a network device hand over more: the guest has taken a batch of what it received.
    fn frames_taken(&self, device: u8);
    /// Says what the guest takes undone in the frames it receives.
    fn set_offloads(&self, device: u8, offloads: Offloads);
    /// Writes to a virtio console.
    fn console(&self, device: u8, bytes: &[u8]);
    /// Lets a virtio console hand over more: the guest has taken a piece of its input.
    fn console_taken(&self, device: u8);
    /// Writes to the serial port.
    fn serial(&self, bytes: &[u8]);
    /// As [`Outlet::console_taken`], of the serial port.
    fn serial_taken(&self);
    /// Asks for random bytes; they arrive as an event.
    fn entropy(&self, device: u8, len: u32);
    /// Begins no disk request from now on, and returns when those under way have ended. Unlike the other
    /// calls this one may block.
    fn close_disks(&self);
    /// Lets disk requests begin again, those that waited first.
    fn open_disks(&self);
    /// From now on, or no longer, disk writes complete only when they are stable: a backup that takes over a shared
    /// disk does not write again what was completed, and what the host of this side remembers dies with it.
    /// Switching it on makes all stable that was completed before, and may block as long as that takes.
    fn set_write_through(&self, on: bool) -> Result<(), String>;
    /// Lets no disk request begin after `until`, by `CLOCK_BOOTTIME`; `None`: no such limit.
    fn set_lease(&self, until: Option<Duration>);
    /// Tells the network where the guest's addresses are now.
    fn announce(&self);
}

/// An output: something the world can see, and from which a backup that takes over must not differ.
#[derive(Debug)]
pub enum Outgoing {
    /// A request that changes a disk.
    Block {
        /// Device index.
        device: u8,
        /// The request.
        request: BlockRequest,
    },
    /// Frames of one notification.
    Frames {
        /// Device index.
        device: u8,
        /// Ethernet frames, each behind its virtio_net_hdr.
        frames: Vec<Vec<u8>>,
    },
    /// Bytes of a virtio console.
    Console {
        /// Device index.
        device: u8,
        /// The bytes.
        bytes: Vec<u8>,
    },
    /// Bytes of the serial port.
    Serial(Vec<u8>),
}

impl Outgoing {
    /// Bytes it holds in memory, payload only.
    #[must_use]
    pub fn size(&self) -> usize {
        match self {
            Self::Block { request, .. } => match &request.op {
                BlockOp::Write { data, .. } => data.len(),
                _ => 0,
            },
            Self::Frames { frames, .. } => frames.iter().map(Vec::len).sum(),
            Self::Console { bytes, .. } | Self::Serial(bytes) => bytes.len(),
        }
    }

    /// Lets it leave.
    pub fn release(self, outlet: &dyn Outlet) {
        match self {
            Self::Block { device, request } => outlet.block(device, request),
            Self::Frames { device, frames } => outlet.frames(device, &frames),
            Self::Console { device, bytes } => outlet.console(device, &bytes),
            Self::Serial(bytes) => outlet.serial(&bytes),
        }
    }
}

/// An effect of the devices, by what must happen to it.
pub enum Routed {
    /// Must obey the output rule.
    Output(Outgoing),
    /// Changes nothing outside: only asks for an input.
    Block(u8, BlockRequest),
    /// Asks for entropy.
    Entropy(u8, u32),
    /// Is about how input comes, which the log settles for a backup.
    Offloads(u8, Offloads),
    /// The guest switched itself off.
    PowerOff,
    /// The guest asked for a reset.
    Reset,
}

/// Classifies an effect. Disk reads pass at once: the front half holds them back behind writes they
/// overlap with. So do flushes, which are about nothing but what was completed before and show nobody anything.
#[must_use]
pub fn route(effect: MachineEffect) -> Routed {
    match effect {
        MachineEffect::Block { device, request } => match request.op {
            BlockOp::Read { .. } | BlockOp::Flush => Routed::Block(device, request),
            BlockOp::Write { .. } | BlockOp::Discard { .. } | BlockOp::WriteZeroes { .. } => {
                Routed::Output(Outgoing::Block { device, request })
            }
        },
        MachineEffect::Frames { device, frames } => {
            Routed::Output(Outgoing::Frames { device, frames })
        }
        MachineEffect::Offloads { device, offloads } => Routed::Offloads(device, offloads),
        MachineEffect::Console { device, bytes } => {
            Routed::Output(Outgoing::Console { device, bytes })
        }
        MachineEffect::Serial { bytes } => Routed::Output(Outgoing::Serial(bytes)),
        MachineEffect::EntropyWanted { device, len } => Routed::Entropy(device, len),
        MachineEffect::PowerOff => Routed::PowerOff,
        MachineEffect::Reset => Routed::Reset,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disk_requests_wait_at_the_gate_if_they_change_the_disk() {
        let waits = |op| {
            let effect = MachineEffect::Block { device: 1, request: BlockRequest { id: 7, op } };
            match route(effect) {
                Routed::Output(Outgoing::Block { device: 1, request }) if request.id == 7 => true,
                Routed::Block(1, request) if request.id == 7 => false,
                _ => panic!("not what the guest asked for"),
            }
        };
        assert!(waits(BlockOp::Write { sector: 0, data: vec![0; 512].into() }));
        assert!(waits(BlockOp::Discard { sector: 0, sectors: 1 }));
        assert!(waits(BlockOp::WriteZeroes { sector: 0, sectors: 1, unmap: true }));
        assert!(!waits(BlockOp::Read { sector: 0, len: 512 }));
        assert!(!waits(BlockOp::Flush));
    }
}
