//! The common configuration structure (virtio 1.2, 4.1.4.3): features, status, queue set-up.

use serde::{Deserialize, Serialize};

use super::{COMMON_SIZE, VERSION_1};
use crate::front::{StateError, copy_config};
use crate::queue::{RingAddresses, VirtQueue};

/// Device status bits (virtio 1.2, 2.1).
const STATUS_DRIVER_OK: u8 = 4;
const STATUS_FEATURES_OK: u8 = 8;
const STATUS_NEEDS_RESET: u8 = 64;
const STATUS_FAILED: u8 = 128;

const NO_VECTOR: u16 = 0xffff;

/// The registers of one queue. They go into the queue when it is enabled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct QueueRegisters {
    max_size: u16,
    vector: u16,
    rings: RingAddresses,
}

/// The registers.
#[derive(Debug, Clone)]
pub(super) struct Common(CommonState);

/// The registers, saved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct CommonState {
    device_feature_select: u32,
    driver_feature_select: u32,
    driver_features: u64,
    config_vector: u16,
    status: u8,
    config_generation: u8,
    queue_select: u16,
    queues: Vec<QueueRegisters>,
}

/// What a write asks the transport to do.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Written {
    /// No more than was done.
    Nothing,
    /// Reset the device.
    Reset,
    /// The driver is ready and accepted these features.
    DriverOk {
        /// Feature bits.
        features: u64,
    },
    /// Start a queue.
    EnableQueue {
        /// Which; it exists.
        index: usize,
        /// Where its rings are.
        rings: RingAddresses,
    },
}

impl Common {
    pub(super) fn new(queues: &[VirtQueue]) -> Self {
        let registers = |queue: &VirtQueue| QueueRegisters {
            max_size: queue.max_size(),
            vector: NO_VECTOR,
            rings: RingAddresses { size: queue.max_size(), desc: 0, driver: 0, device: 0 },
        };
        Self(CommonState {
            device_feature_select: 0,
            driver_feature_select: 0,
            driver_features: 0,
            config_vector: NO_VECTOR,
            status: 0,
            config_generation: 0,
            queue_select: 0,
            queues: queues.iter().map(registers).collect(),
        })
    }

    /// Whether the driver has started the device and neither side has given up.
    pub(super) fn live(&self) -> bool {
        self.0.status & (STATUS_DRIVER_OK | STATUS_NEEDS_RESET | STATUS_FAILED) == STATUS_DRIVER_OK
    }

    /// Sets DEVICE_NEEDS_RESET; whether it was not set before.
    pub(super) fn set_needs_reset(&mut self) -> bool {
        let before = self.0.status;
        self.0.status |= STATUS_NEEDS_RESET;
        before & STATUS_NEEDS_RESET == 0
    }

    pub(super) fn config_vector(&self) -> u16 {
        self.0.config_vector
    }

    pub(super) fn queue_vector(&self, index: usize) -> u16 {
        self.0.queues.get(index).map_or(NO_VECTOR, |q| q.vector)
    }

    /// Reads from byte `at`.
    pub(super) fn read(&self, at: u64, data: &mut [u8], offered: u64, queues: &[VirtQueue]) {
        let s = &self.0;
        let half = |features: u64, select: u32| match select {
            0 => features as u32,
            1 => (features >> 32) as u32,
            _ => 0,
        };
        let mut image = [0; COMMON_SIZE as usize];
        let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &s.device_feature_select.to_le_bytes());
        put(4, &half(offered, s.device_feature_select).to_le_bytes());
        put(8, &s.driver_feature_select.to_le_bytes());
        put(12, &half(s.driver_features, s.driver_feature_select).to_le_bytes());
        put(16, &s.config_vector.to_le_bytes());
        put(18, &(s.queues.len() as u16).to_le_bytes());
        put(20, &[s.status, s.config_generation]);
        put(22, &s.queue_select.to_le_bytes());
        // A queue that does not exist has size 0.
        let selected = usize::from(s.queue_select);
        if let (Some(registers), Some(queue)) = (s.queues.get(selected), queues.get(selected)) {
            put(24, &registers.rings.size.to_le_bytes());
            put(26, &registers.vector.to_le_bytes());
            put(28, &u16::from(queue.ready()).to_le_bytes());
            put(30, &s.queue_select.to_le_bytes());
            put(32, &registers.rings.desc.to_le_bytes());
            put(40, &registers.rings.driver.to_le_bytes());
            put(48, &registers.rings.device.to_le_bytes());
        }
        copy_config(&image, usize::try_from(at).unwrap_or(usize::MAX), data);
    }

    /// Writes a whole register, or one half of a 64-bit one; anything else is ignored.
    pub(super) fn write(&mut self, at: u64, data: &[u8], offered: u64, vectors: u16) -> Written {
        let mut bytes = [0; 8];
        let Some(low) = bytes.get_mut(..data.len()) else { return Written::Nothing };
        low.copy_from_slice(data);
        let value = u64::from_le_bytes(bytes);
        let vector = if value < u64::from(vectors) { value as u16 } else { NO_VECTOR };
        let s = &mut self.0;
        match (at, data.len()) {
            (0, 4) => s.device_feature_select = value as u32,
            (8, 4) => s.driver_feature_select = value as u32,
            // Features are settled with FEATURES_OK (virtio 1.2, 3.1.1).
            (12, 4) if s.status & STATUS_FEATURES_OK == 0 => match s.driver_feature_select {
                0 => s.driver_features = (s.driver_features & !0xffff_ffff) | value,
                1 => s.driver_features = (s.driver_features & 0xffff_ffff) | value << 32,
                _ => {}
            },
            (16, 2) => s.config_vector = vector,
            (20, 1) => return self.write_status(value as u8, offered),
            (22, 2) => s.queue_select = value as u16,
            (24..56, _) => return self.write_queue(at, data.len(), value, vector),
            _ => {}
        }
        Written::Nothing
    }

    fn write_status(&mut self, value: u8, offered: u64) -> Written {
        if value == 0 {
            return Written::Reset;
        }
        let s = &mut self.0;
        let before = s.status;
        // Bits go by reset only, and NEEDS_RESET is the device's own.
        let mut after = before | (value & !STATUS_NEEDS_RESET);
        let acceptable = s.driver_features & !offered == 0 && s.driver_features & VERSION_1 != 0;
        if before & STATUS_FEATURES_OK == 0 && !acceptable {
            after &= !STATUS_FEATURES_OK;
        }
        if after & STATUS_FEATURES_OK == 0 {
            after &= !STATUS_DRIVER_OK;
        }
        s.status = after;
        if after & !before & STATUS_DRIVER_OK != 0 {
            return Written::DriverOk { features: s.driver_features };
        }
        Written::Nothing
    }

    fn write_queue(&mut self, at: u64, len: usize, value: u64, vector: u16) -> Written {
        let index = usize::from(self.0.queue_select);
        let Some(queue) = self.0.queues.get_mut(index) else { return Written::Nothing };
        let rings = &mut queue.rings;
        match (at, len) {
            (24, 2) => {
                let size = value as u16;
                if size.is_power_of_two() && size <= queue.max_size {
                    rings.size = size;
                }
            }
            (26, 2) => queue.vector = vector,
            (28, 2) if value == 1 => return Written::EnableQueue { index, rings: *rings },
            (32..56, 4 | 8) if at.is_multiple_of(len as u64) => {
                let address = match at {
                    32..40 => &mut rings.desc,
                    40..48 => &mut rings.driver,
                    _ => &mut rings.device,
                };
                *address = match (len, at % 8) {
                    (8, _) => value,
                    (_, 0) => (*address & !0xffff_ffff) | value,
                    _ => (*address & 0xffff_ffff) | value << 32,
                };
            }
            _ => {}
        }
        Written::Nothing
    }

    pub(super) fn save(&self) -> CommonState {
        self.0.clone()
    }

    pub(super) fn restore(&mut self, state: &CommonState) -> Result<(), StateError> {
        let sizes = |s: &CommonState| s.queues.iter().map(|q| q.max_size).collect::<Vec<_>>();
        if sizes(state) != sizes(&self.0) {
            return Err(StateError::Mismatch { what: "queues" });
        }
        self.0 = state.clone();
        Ok(())
    }
}
