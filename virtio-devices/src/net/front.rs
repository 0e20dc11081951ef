//! The guest-visible half of a network card.
//!
//! All the guest has queued at a notify leaves as one batch, and a batch received raises one interrupt.
//! Frames the guest has no buffers for wait in a backlog; what exceeds it is dropped and counted, by a
//! rule that depends on the state alone. The back half hands over no more while something waits there
//! ([`Front::backlogged`]), so that this happens to none that a guest was too slow for.
//!
//! Nothing else touches the rings: the back half has no guest memory to reach them with.

use vm_memory::GuestMemory;

use super::offload::{self, FRAME_MAX, FRAME_MIN, HEADER_SIZE, Offloads};
use super::state::{NetCounters, NetState};
use crate::effect::{DeviceEvent, Effect, Effects};
use crate::front::{DriverError, Front, FrontError, FrontState, Io, StateError, copy_config};
use crate::queue::{Chain, read_buffers, write_buffers};

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const QUEUE_SIZE: u16 = 256;

/// Feature bits (virtio 1.2, 5.1.3).
const F_MTU: u64 = 1 << 3;
const F_MAC: u64 = 1 << 5;
const F_MRG_RXBUF: u64 = 1 << 15;
const F_STATUS: u64 = 1 << 16;
const STATUS_LINK_UP: u16 = 1;

/// Frames that wait for buffers, and their bytes: more than the back half has under way at a time.
pub(super) const BACKLOG_MAX: usize = 256;
pub(super) const BACKLOG_BYTES_MAX: usize = 4 << 20;

/// What a network card is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NetConfig {
    /// The guest's hardware address.
    pub mac: [u8; 6],
    /// What the guest is told about the network's MTU, if anything.
    pub mtu: Option<u16>,
    /// What it offers to the guest's driver, each for both directions.
    pub offloads: Offloads,
}

/// The front half.
#[derive(Debug)]
pub struct NetFront {
    state: NetState,
}

impl NetFront {
    /// A network card just powered on, with its link up.
    #[must_use]
    pub fn new(config: &NetConfig) -> Self {
        let NetConfig { mac, mtu, offloads } = *config;
        Self { state: NetState { mac, mtu, offered: offloads, ..NetState::default() } }
    }

    fn receive<M: GuestMemory>(
        &mut self,
        frames: Vec<Vec<u8>>,
        io: &mut Io<'_, M>,
    ) -> Result<(), DriverError> {
        let agreed = Offloads::of_driver(self.state.features);
        for mut frame in frames {
            if !io.live || !offload::incoming(&mut frame, agreed) {
                self.state.counters.rx_dropped += 1;
                continue;
            }
            // Room is made first, so that the backlog holds only what does not fit in the queue.
            if !self.state.has_room(frame.len()) {
                self.deliver(io)?;
            }
            if self.state.has_room(frame.len()) {
                self.state.backlog.push_back(frame);
            } else {
                self.state.counters.rx_dropped += 1;
            }
        }
        self.deliver(io)
    }

    /// Moves frames from the backlog into the guest's buffers, as many as fit.
    fn deliver<M: GuestMemory>(&mut self, io: &mut Io<'_, M>) -> Result<(), DriverError> {
        while io.live
            && let Some(frame) = self.state.backlog.front_mut()
        {
            let needed = frame.len() as u64;
            let mergeable = self.state.features & F_MRG_RXBUF != 0;
            let Some(chains) = take_chains(needed, mergeable, io)? else { return Ok(()) };
            let len = needed - HEADER_SIZE as u64;
            if fill_chains(&chains, frame, io)? {
                self.state.counters.rx_frames += 1;
                self.state.counters.rx_bytes += len;
            } else {
                self.state.counters.rx_dropped += 1;
            }
            self.state.backlog.pop_front();
        }
        Ok(())
    }

    fn transmit<M: GuestMemory>(&mut self, io: &mut Io<'_, M>) -> Result<(), DriverError> {
        let mut frames = Vec::new();
        let result = self.take_frames(&mut frames, io);
        // What was taken before the driver did wrong has been given back as sent.
        if !frames.is_empty() {
            io.effects.push(Effect::Frames(frames));
        }
        result
    }

    fn take_frames<M: GuestMemory>(
        &mut self,
        frames: &mut Vec<Vec<u8>>,
        io: &mut Io<'_, M>,
    ) -> Result<(), DriverError> {
        let agreed = Offloads::of_device(self.state.features);
        let queue = &mut io.queues[TRANSMIT];
        while let Some(chain) = queue.pop(io.memory)? {
            let counters = &mut self.state.counters;
            let len = usize::try_from(chain.readable_len()).unwrap_or(usize::MAX);
            let mut frame = vec![0; if len <= HEADER_SIZE + FRAME_MAX { len } else { 0 }];
            read_buffers(io.memory, &chain.readable, &mut frame)?;
            if offload::outgoing(&mut frame, agreed) {
                counters.tx_frames += 1;
                counters.tx_bytes += (len - HEADER_SIZE) as u64;
                frames.push(frame);
            } else {
                counters.tx_dropped += 1;
            }
            queue.push_used(io.memory, chain.head, 0)?;
        }
        queue.request_notify(io.memory)
    }
}

/// Takes chains with room for `needed` bytes. If the driver has not made that many available, takes none
/// and asks it to notify when it makes more. The chains may still be too small: all of the queue
/// together, or the one a driver without mergeable buffers offers for a frame. [`fill_chains`] sees to that.
fn take_chains<M: GuestMemory>(
    needed: u64,
    mergeable: bool,
    io: &mut Io<'_, M>,
) -> Result<Option<Vec<Chain>>, DriverError> {
    let queue = &mut io.queues[RECEIVE];
    let mut chains: Vec<Chain> = Vec::new();
    let mut room = 0;
    while room < needed {
        if chains.len() == usize::from(queue.size()) {
            // The whole queue together is too small for this frame: it can never be delivered.
            break;
        }
        match queue.pop(io.memory)? {
            Some(chain) => {
                // The header lies in the first chain whole (5.1.6.4).
                if chain.writable_len() < HEADER_SIZE as u64 {
                    return Err(DriverError::ShortChain);
                }
                room += chain.writable_len();
                chains.push(chain);
            }
            None => {
                // Before the chains go back: the next one to come is what to be told of, not the
                // first of those that do not suffice.
                queue.request_notify(io.memory)?;
                queue.undo_pop(chains.len() as u16);
                return Ok(None);
            }
        }
        if !mergeable {
            break;
        }
    }
    Ok(Some(chains))
}

/// Writes header and frame into `chains` and gives them to the driver; if they are too small, gives
/// them back for the next frame and returns false.
fn fill_chains<M: GuestMemory>(
    chains: &[Chain],
    packet: &mut [u8],
    io: &mut Io<'_, M>,
) -> Result<bool, DriverError> {
    let room: u64 = chains.iter().map(Chain::writable_len).sum();
    let queue = &mut io.queues[RECEIVE];
    if room < packet.len() as u64 {
        queue.undo_pop(chains.len() as u16);
        return Ok(false);
    }
    offload::set_num_buffers(packet, chains.len() as u16);
    let mut rest = &*packet;
    for chain in chains {
        let written = write_buffers(io.memory, &chain.writable, rest)?;
        rest = &rest[written..];
        queue.push_used(io.memory, chain.head, written as u32)?;
    }
    Ok(true)
}

impl<M: GuestMemory> Front<M> for NetFront {
    fn device_id(&self) -> u16 {
        1
    }

    fn features(&self) -> u64 {
        let mtu = if self.state.mtu.is_some() { F_MTU } else { 0 };
        F_MAC | F_STATUS | F_MRG_RXBUF | mtu | self.state.offered.features()
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[QUEUE_SIZE, QUEUE_SIZE]
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        let mut config = [0; 12];
        config[0..6].copy_from_slice(&self.state.mac);
        config[6..8].copy_from_slice(&STATUS_LINK_UP.to_le_bytes());
        config[8..10].copy_from_slice(&1u16.to_le_bytes());
        config[10..12].copy_from_slice(&self.state.mtu.unwrap_or(0).to_le_bytes());
        copy_config(&config, offset, data);
    }

    fn write_config(&mut self, _offset: usize, _data: &[u8]) {}

    fn activate(&mut self, features: u64, effects: &mut Effects) {
        self.state.features = features;
        effects.push(Effect::Offloads(Offloads::of_driver(features)));
    }

    fn reset(&mut self) {
        self.state.features = 0;
        self.state.backlog.clear();
    }

    fn notify(&mut self, queue: usize, io: &mut Io<'_, M>) -> Result<(), DriverError> {
        match queue {
            RECEIVE => self.deliver(io),
            _ => self.transmit(io),
        }
    }

    fn event(&mut self, event: DeviceEvent, io: &mut Io<'_, M>) -> Result<(), FrontError> {
        match event {
            DeviceEvent::Frames(frames) => Ok(self.receive(frames, io)?),
            other => Err(FrontError::WrongDevice { event: other.name(), device_id: 1 }),
        }
    }

    /// Nothing waits for an answer, but the host that goes live has yet to learn what the driver takes.
    fn outstanding(&self) -> Vec<Effect> {
        match self.state.features {
            0 => Vec::new(),
            features => vec![Effect::Offloads(Offloads::of_driver(features))],
        }
    }

    fn backlogged(&self) -> bool {
        !self.state.backlog.is_empty()
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        let NetCounters { rx_frames, rx_bytes, rx_dropped, tx_frames, tx_bytes, tx_dropped } =
            self.state.counters;
        vec![
            ("rx_bytes", rx_bytes),
            ("rx_frames", rx_frames),
            ("rx_dropped", rx_dropped),
            ("tx_bytes", tx_bytes),
            ("tx_frames", tx_frames),
            ("tx_dropped", tx_dropped),
        ]
    }

    fn save(&self) -> FrontState {
        FrontState::Net(self.state.clone())
    }

    fn restore(&mut self, state: &FrontState) -> Result<(), StateError> {
        let FrontState::Net(state) = state else {
            return Err(StateError::Mismatch { what: "device type" });
        };
        if state.mac != self.state.mac || state.mtu != self.state.mtu {
            return Err(StateError::Mismatch { what: "hardware address or MTU" });
        }
        if state.offered != self.state.offered {
            return Err(StateError::Mismatch { what: "offloads" });
        }
        if state.backlog.len() > BACKLOG_MAX
            || state.backlog_bytes() > BACKLOG_BYTES_MAX
            || state.backlog.iter().any(|packet| packet.len() < HEADER_SIZE + FRAME_MIN)
        {
            return Err(StateError::Invalid { what: "receive backlog" });
        }
        self.state = state.clone();
        Ok(())
    }
}
