//! PCI configuration space of a virtio device: header, one memory BAR, MSI-X and virtio capabilities
//! (PCI Local Bus 3.0, 6; virtio 1.2, 4.1).
//!
//! Plain bytes with a mask of what the guest may write. Everything with an effect beyond its own bytes
//! (MSI-X control, the window into the BAR) is noticed by the transport, which compares before and after.

use serde::{Deserialize, Serialize};

use super::{
    BAR_SIZE, COMMON_OFFSET, COMMON_SIZE, DEVICE_OFFSET, DEVICE_SIZE, ISR_OFFSET, ISR_SIZE,
    MSIX_PBA_OFFSET, MSIX_TABLE_OFFSET, NOTIFY_MULTIPLIER, NOTIFY_OFFSET,
};
use crate::front::StateError;

/// Bytes of configuration space with content. The rest of the 4096 a PCI Express function has reads as
/// zeroes: no extended capabilities.
pub(super) const CONFIG_SIZE: usize = 256;

const VENDOR_VIRTIO: u16 = 0x1af4;
const COMMAND: usize = 0x04;
const COMMAND_MEMORY: u16 = 1 << 1;
/// Memory space, bus master, INTx disable.
const COMMAND_WRITABLE: u16 = 1 << 1 | 1 << 2 | 1 << 10;
const STATUS_CAPABILITIES: u16 = 1 << 4;
const BAR0: usize = 0x10;

const CAP_MSIX: usize = 0x40;
const CAP_COMMON: usize = 0x4c;
const CAP_NOTIFY: usize = 0x5c;
const CAP_ISR: usize = 0x70;
const CAP_DEVICE: usize = 0x80;
const CAP_PCI_CFG: usize = 0x90;
/// The window's data: four bytes that stand for a piece of the BAR (virtio 1.2, 4.1.4.9).
pub(super) const WINDOW_DATA: usize = CAP_PCI_CFG + 16;

const ID_MSIX: u8 = 0x11;
const ID_VENDOR: u8 = 0x09;
const MSIX_CONTROL: usize = CAP_MSIX + 2;
const MSIX_ENABLE: u16 = 1 << 15;
const MSIX_FUNCTION_MASK: u16 = 1 << 14;

/// Types of virtio capabilities (virtio 1.2, 4.1.4).
const CFG_COMMON: u8 = 1;
const CFG_NOTIFY: u8 = 2;
const CFG_ISR: u8 = 3;
const CFG_DEVICE: u8 = 4;
const CFG_PCI: u8 = 5;

/// Configuration space.
#[derive(Debug, Clone)]
pub(super) struct PciConfig {
    bytes: [u8; CONFIG_SIZE],
    writable: [u8; CONFIG_SIZE],
}

/// Saved configuration space: its bytes. What is writable follows from the device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct PciConfigState {
    bytes: Vec<u8>,
}

impl PciConfig {
    /// For a device with `vectors` MSI-X vectors, its BAR at `bar_address`, a multiple of its size.
    pub(super) fn new(device_id: u16, vectors: u16, bar_address: u32) -> Self {
        let mut c = Self { bytes: [0; CONFIG_SIZE], writable: [0; CONFIG_SIZE] };
        // Class, subclass: network/Ethernet, mass storage/other, communication/other, unclassified.
        let (class, subclass) = match device_id {
            1 => (0x02, 0x00),
            2 => (0x01, 0x80),
            3 => (0x07, 0x80),
            _ => (0x00, 0xff),
        };
        c.set(0x00, &VENDOR_VIRTIO.to_le_bytes());
        c.set(0x02, &(0x1040 + device_id).to_le_bytes());
        c.set(0x06, &STATUS_CAPABILITIES.to_le_bytes());
        // Revision 1: a device without the legacy interface (virtio 1.2, 4.1.2.1).
        c.set(0x08, &[1, 0, subclass, class]);
        c.set(BAR0, &bar_address.to_le_bytes());
        c.set(0x2c, &VENDOR_VIRTIO.to_le_bytes());
        c.set(0x2e, &(0x40 + device_id).to_le_bytes());
        c.set(0x34, &[CAP_MSIX as u8]);
        c.allow(COMMAND, &COMMAND_WRITABLE.to_le_bytes());
        c.allow(0x0c, &[0xff]);
        c.allow(0x3c, &[0xff]);
        c.allow(BAR0, &(!(BAR_SIZE as u32 - 1)).to_le_bytes());

        c.set(CAP_MSIX, &[ID_MSIX, CAP_COMMON as u8]);
        c.set(MSIX_CONTROL, &(vectors - 1).to_le_bytes());
        c.set(CAP_MSIX + 4, &(MSIX_TABLE_OFFSET as u32).to_le_bytes());
        c.set(CAP_MSIX + 8, &(MSIX_PBA_OFFSET as u32).to_le_bytes());
        c.allow(MSIX_CONTROL, &(MSIX_ENABLE | MSIX_FUNCTION_MASK).to_le_bytes());

        c.virtio_capability(CAP_COMMON, CAP_NOTIFY, CFG_COMMON, 16, COMMON_OFFSET, COMMON_SIZE);
        let notify_size = u64::from(NOTIFY_MULTIPLIER) * u64::from(vectors);
        c.virtio_capability(CAP_NOTIFY, CAP_ISR, CFG_NOTIFY, 20, NOTIFY_OFFSET, notify_size);
        c.set(CAP_NOTIFY + 16, &NOTIFY_MULTIPLIER.to_le_bytes());
        c.virtio_capability(CAP_ISR, CAP_DEVICE, CFG_ISR, 16, ISR_OFFSET, ISR_SIZE);
        c.virtio_capability(CAP_DEVICE, CAP_PCI_CFG, CFG_DEVICE, 16, DEVICE_OFFSET, DEVICE_SIZE);
        c.virtio_capability(CAP_PCI_CFG, 0, CFG_PCI, 20, 0, 0);
        c.allow(CAP_PCI_CFG + 4, &[0xff]);
        c.allow(CAP_PCI_CFG + 8, &[0xff; 8]);
        c
    }

    fn set(&mut self, at: usize, value: &[u8]) {
        self.bytes[at..at + value.len()].copy_from_slice(value);
    }

    fn allow(&mut self, at: usize, mask: &[u8]) {
        self.writable[at..at + mask.len()].copy_from_slice(mask);
    }

    fn virtio_capability(
        &mut self,
        at: usize,
        next: usize,
        kind: u8,
        len: u8,
        offset: u64,
        size: u64,
    ) {
        self.set(at, &[ID_VENDOR, next as u8, len, kind]);
        self.set(at + 8, &(offset as u32).to_le_bytes());
        self.set(at + 12, &(size as u32).to_le_bytes());
    }

    pub(super) fn read(&self, offset: usize, data: &mut [u8]) {
        crate::front::copy_config(&self.bytes, offset, data);
    }

    pub(super) fn write(&mut self, offset: usize, data: &[u8]) {
        for (i, value) in data.iter().enumerate() {
            let Some(at) = offset.checked_add(i).filter(|&at| at < CONFIG_SIZE) else { return };
            let mask = self.writable[at];
            self.bytes[at] = (self.bytes[at] & !mask) | (value & mask);
        }
    }

    fn u16_at(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.bytes[at], self.bytes[at + 1]])
    }

    fn u32_at(&self, at: usize) -> u32 {
        u32::from_le_bytes([
            self.bytes[at],
            self.bytes[at + 1],
            self.bytes[at + 2],
            self.bytes[at + 3],
        ])
    }

    /// Where the BAR answers, if memory decoding is on.
    pub(super) fn bar_address(&self) -> Option<u64> {
        let enabled = self.u16_at(COMMAND) & COMMAND_MEMORY != 0;
        enabled.then(|| u64::from(self.u32_at(BAR0) & !(BAR_SIZE as u32 - 1)))
    }

    pub(super) fn msix_enabled(&self) -> bool {
        self.u16_at(MSIX_CONTROL) & MSIX_ENABLE != 0
    }

    pub(super) fn msix_function_masked(&self) -> bool {
        self.u16_at(MSIX_CONTROL) & MSIX_FUNCTION_MASK != 0
    }

    /// The piece of the BAR that the window stands for, as offset and length, if it is a proper one.
    pub(super) fn window(&self) -> Option<(u64, usize)> {
        let bar = self.bytes[CAP_PCI_CFG + 4];
        let offset = u64::from(self.u32_at(CAP_PCI_CFG + 8));
        let len = self.u32_at(CAP_PCI_CFG + 12);
        let proper = bar == 0
            && matches!(len, 1 | 2 | 4)
            && offset.is_multiple_of(u64::from(len))
            && offset + u64::from(len) <= BAR_SIZE;
        proper.then_some((offset, len as usize))
    }

    pub(super) fn save(&self) -> PciConfigState {
        PciConfigState { bytes: self.bytes.to_vec() }
    }

    pub(super) fn restore(&mut self, state: &PciConfigState) -> Result<(), StateError> {
        let bytes: [u8; CONFIG_SIZE] = state
            .bytes
            .as_slice()
            .try_into()
            .map_err(|_| StateError::Invalid { what: "PCI configuration space" })?;
        let differs = (0..CONFIG_SIZE).any(|i| (bytes[i] ^ self.bytes[i]) & !self.writable[i] != 0);
        if differs {
            return Err(StateError::Mismatch { what: "PCI configuration space" });
        }
        self.bytes = bytes;
        Ok(())
    }
}
