//! The virtio-pci transport (virtio 1.2, 4.1; the modern interface only).
//!
//! One 32-bit memory BAR holds everything: common configuration, ISR, device configuration,
//! notifications, MSI-X table and pending bits. Interrupts are MSI-X; a driver without MSI-X can poll
//! the ISR. After each call into the front half, the transport raises one interrupt for each queue that
//! got completions and whose driver wants to hear of them.

mod common;
mod config;
mod msix;

use std::ops::Range;

use serde::{Deserialize, Serialize};
use vm_memory::GuestMemory;

use self::common::{Common, CommonState, Written};
use self::config::{PciConfig, PciConfigState, WINDOW_DATA};
use self::msix::{Msix, MsixState};
use crate::effect::{DeviceEvent, Effect, Effects};
use crate::front::{DriverError, Front, FrontError, FrontState, Io, StateError};
use crate::queue::{QueueState, VirtQueue};

/// Bytes of BAR 0. Its address is a multiple of this.
pub const BAR_SIZE: u64 = 0x8000;

const COMMON_OFFSET: u64 = 0x0000;
const COMMON_SIZE: u64 = 56;
const ISR_OFFSET: u64 = 0x1000;
const ISR_SIZE: u64 = 1;
const DEVICE_OFFSET: u64 = 0x2000;
const DEVICE_SIZE: u64 = 0x1000;
const NOTIFY_OFFSET: u64 = 0x3000;
const NOTIFY_MULTIPLIER: u32 = 4;
const MSIX_TABLE_OFFSET: u64 = 0x4000;
const MSIX_PBA_OFFSET: u64 = 0x5000;
const PAGE: u64 = 0x1000;

/// Feature bits every device offers: VIRTIO_F_RING_INDIRECT_DESC, VIRTIO_F_RING_EVENT_IDX,
/// VIRTIO_F_VERSION_1 (virtio 1.2, 6).
const TRANSPORT_FEATURES: u64 = 1 << 28 | EVENT_IDX | VERSION_1;
const EVENT_IDX: u64 = 1 << 29;
const VERSION_1: u64 = 1 << 32;

/// Bits of the ISR (virtio 1.2, 4.1.4.5).
const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;

/// Version of [`VirtioPciState`].
const STATE_VERSION: u32 = 2;

/// A virtio device as a PCI function.
pub struct VirtioPci<M: GuestMemory> {
    front: Box<dyn Front<M>>,
    config: PciConfig,
    msix: Msix,
    common: Common,
    isr: u8,
    queues: Vec<VirtQueue>,
    bar_address: u32,
    /// How often the driver broke a rule. For the log alone, hence not saved.
    offences: u32,
}

/// A saved device with its transport. Equal devices have equal states.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VirtioPciState {
    version: u32,
    config: PciConfigState,
    msix: MsixState,
    common: CommonState,
    isr: u8,
    queues: Vec<QueueState>,
    front: FrontState,
}

impl<M: GuestMemory> VirtioPci<M> {
    /// A device just powered on, with BAR 0 at `bar_address` (a multiple of [`BAR_SIZE`]); memory
    /// decoding is off until the guest turns it on.
    #[must_use]
    pub fn new(front: Box<dyn Front<M>>, bar_address: u32) -> Self {
        let queues: Vec<_> = front.queue_sizes().iter().map(|&size| VirtQueue::new(size)).collect();
        // One for configuration changes, one for each queue.
        let vectors = queues.len() as u16 + 1;
        Self {
            config: PciConfig::new(front.device_id(), vectors, bar_address),
            msix: Msix::new(vectors),
            common: Common::new(&queues),
            isr: 0,
            queues,
            bar_address,
            offences: 0,
            front,
        }
    }

    /// The front half.
    #[must_use]
    pub fn front(&self) -> &dyn Front<M> {
        &*self.front
    }

    /// Guest-physical addresses of BAR 0, while the guest has it enabled.
    #[must_use]
    pub fn bar_range(&self) -> Option<Range<u64>> {
        self.config.bar_address().map(|start| start..start + BAR_SIZE)
    }

    /// Reads configuration space from byte `offset`.
    pub fn config_read(&mut self, offset: u16, data: &mut [u8]) {
        let offset = usize::from(offset);
        match (offset, self.config.window()) {
            (WINDOW_DATA, Some((at, len))) if data.len() >= len => {
                data.fill(0);
                self.bar_read(at, &mut data[..len]);
            }
            _ => self.config.read(offset, data),
        }
    }

    /// Writes configuration space from byte `offset`.
    pub fn config_write(&mut self, offset: u16, data: &[u8], memory: &M, effects: &mut Effects) {
        let offset = usize::from(offset);
        if let (WINDOW_DATA, Some((at, len))) = (offset, self.config.window()) {
            if let Some(data) = data.get(..len) {
                self.bar_write(at, data, memory, effects);
            }
            return;
        }
        self.config.write(offset, data);
        let (enabled, masked) = (self.config.msix_enabled(), self.config.msix_function_masked());
        self.msix.set_control(enabled, masked, effects);
    }

    /// Reads BAR 0 from byte `offset`.
    pub fn bar_read(&mut self, offset: u64, data: &mut [u8]) {
        let at = offset % PAGE;
        match offset - at {
            COMMON_OFFSET => self.common.read(at, data, self.offered(), &self.queues),
            ISR_OFFSET => {
                data.fill(0);
                // Reading clears (virtio 1.2, 4.1.4.5).
                if at == 0 && !data.is_empty() {
                    data[0] = std::mem::take(&mut self.isr);
                }
            }
            DEVICE_OFFSET => self.front.read_config(at as usize, data),
            MSIX_TABLE_OFFSET => self.msix.read_table(at, data),
            MSIX_PBA_OFFSET => self.msix.read_pending(at, data),
            _ => data.fill(0),
        }
    }

    /// Writes BAR 0 from byte `offset`.
    pub fn bar_write(&mut self, offset: u64, data: &[u8], memory: &M, effects: &mut Effects) {
        let at = offset % PAGE;
        match offset - at {
            COMMON_OFFSET => self.common_write(at, data, memory, effects),
            DEVICE_OFFSET => self.front.write_config(at as usize, data),
            NOTIFY_OFFSET if at.is_multiple_of(u64::from(NOTIFY_MULTIPLIER)) => {
                self.notify((at / u64::from(NOTIFY_MULTIPLIER)) as usize, memory, effects);
            }
            MSIX_TABLE_OFFSET => self.msix.write_table(at, data, effects),
            _ => {}
        }
    }

    /// Gives the device an event.
    ///
    /// # Errors
    /// If the event cannot be for this device, which is unchanged then. What the guest does wrong is no
    /// error here.
    pub fn apply(
        &mut self,
        event: DeviceEvent,
        memory: &M,
        effects: &mut Effects,
    ) -> Result<(), FrontError> {
        let result = self.call(memory, effects, |front, io| match front.event(event, io) {
            Ok(()) => Ok(Ok(())),
            Err(FrontError::Driver(error)) => Err(error),
            Err(error) => Ok(Err(error)),
        });
        result.unwrap_or(Ok(()))
    }

    /// Effects handed out whose answers have not come, in order. A machine that goes live issues
    /// them again.
    #[must_use]
    pub fn outstanding(&self) -> Vec<Effect> {
        self.front.outstanding()
    }

    /// The front half's counters by name.
    #[must_use]
    pub fn counters(&self) -> Vec<(&'static str, u64)> {
        self.front.counters()
    }

    /// Resets device and transport as a reset of the machine does. Answers to outstanding effects are
    /// still to be given to [`VirtioPci::apply`].
    pub fn reset(&mut self) {
        self.reset_device();
        self.msix.reset();
        let vectors = self.queues.len() as u16 + 1;
        self.config = PciConfig::new(self.front.device_id(), vectors, self.bar_address);
    }

    /// Everything about the device.
    #[must_use]
    pub fn save(&self) -> VirtioPciState {
        VirtioPciState {
            version: STATE_VERSION,
            config: self.config.save(),
            msix: self.msix.save(),
            common: self.common.save(),
            isr: self.isr,
            queues: self.queues.iter().map(VirtQueue::save).collect(),
            front: self.front.save(),
        }
    }

    /// Becomes the device `state` was saved from.
    ///
    /// # Errors
    /// If `state` is of another device or impossible; this device is then not to be used.
    pub fn restore(&mut self, state: &VirtioPciState) -> Result<(), StateError> {
        if state.version != STATE_VERSION {
            return Err(StateError::Version { found: state.version, expected: STATE_VERSION });
        }
        if state.queues.len() != self.queues.len() {
            return Err(StateError::Mismatch { what: "number of queues" });
        }
        self.config.restore(&state.config)?;
        let (enabled, masked) = (self.config.msix_enabled(), self.config.msix_function_masked());
        self.msix.restore(&state.msix, enabled, masked)?;
        self.common.restore(&state.common)?;
        self.isr = state.isr;
        for (queue, state) in self.queues.iter_mut().zip(&state.queues) {
            queue.restore(state)?;
        }
        self.front.restore(&state.front)
    }

    fn offered(&self) -> u64 {
        TRANSPORT_FEATURES | self.front.features()
    }

    fn common_write(&mut self, at: u64, data: &[u8], memory: &M, effects: &mut Effects) {
        let vectors = self.queues.len() as u16 + 1;
        match self.common.write(at, data, self.offered(), vectors) {
            Written::Nothing => {}
            Written::Reset => self.reset_device(),
            Written::DriverOk { features } => {
                for queue in &mut self.queues {
                    queue.set_event_idx(features & EVENT_IDX != 0);
                }
                self.front.activate(features, effects);
            }
            Written::EnableQueue { index, rings } => {
                let queue = &mut self.queues[index];
                if !queue.ready()
                    && let Err(error) = queue.enable(memory, &rings)
                {
                    self.needs_reset(&error, effects);
                }
            }
        }
    }

    fn notify(&mut self, queue: usize, memory: &M, effects: &mut Effects) {
        let ready = self.queues.get(queue).is_some_and(VirtQueue::ready);
        if ready && self.common.live() {
            self.call(memory, effects, |front, io| front.notify(queue, io));
        }
    }

    /// Calls the front half, then interrupts for what it completed. `None` if the driver did wrong.
    fn call<R>(
        &mut self,
        memory: &M,
        effects: &mut Effects,
        run: impl FnOnce(&mut dyn Front<M>, &mut Io<'_, M>) -> Result<R, DriverError>,
    ) -> Option<R> {
        let live = self.common.live();
        let mut io = Io { memory, queues: &mut self.queues, effects, live };
        let mut result = run(&mut *self.front, &mut io);
        for (index, queue) in self.queues.iter_mut().enumerate() {
            match queue.take_interrupt(memory) {
                Ok(false) => {}
                Ok(true) => {
                    if !self.msix.enabled() {
                        self.isr |= ISR_QUEUE;
                    }
                    self.msix.signal(self.common.queue_vector(index), effects);
                }
                Err(error) => result = result.and(Err(error)),
            }
        }
        result.map_err(|error| self.needs_reset(&error, effects)).ok()
    }

    /// Tells the driver that it must reset the device (virtio 1.2, 2.1.2). Until then the device is dead.
    fn needs_reset(&mut self, error: &DriverError, effects: &mut Effects) {
        let id = self.front.device_id();
        if self.common.set_needs_reset() {
            self.offences = self.offences.saturating_add(1);
            // A guest may do this all day; the log must not grow with it.
            if self.offences.is_power_of_two() {
                let times = self.offences;
                log::warn!(
                    "driver of the guest's virtio device {id} broke a rule ({times} so far): {error}"
                );
            }
            self.isr |= ISR_CONFIG;
            self.msix.signal(self.common.config_vector(), effects);
        }
    }

    fn reset_device(&mut self) {
        self.front.reset();
        for queue in &mut self.queues {
            queue.reset();
        }
        self.common = Common::new(&self.queues);
        self.isr = 0;
    }
}
