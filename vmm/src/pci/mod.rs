//! The PCI bus: one bus, a host bridge in slot 0, virtio devices in the others.
//!
//! Configuration space is reached by configuration mechanism 1 (ports 0xcf8 and 0xcfc; PCI Local Bus
//! 3.0, 3.2.2.3.2) and memory-mapped. BARs get addresses here, at power-on, in slot order; the guest
//! may move them. Only function 0 exists. There are no interrupt pins: devices use MSI-X.

use std::collections::BTreeMap;

use hypervisor::GuestMemory;
use serde::{Deserialize, Serialize};
use virtio_devices::pci::BAR_SIZE;
use virtio_devices::{Effects, Front, VirtioPci, VirtioPciState};

use crate::machine::layout;

/// Slots of a bus.
pub const SLOTS: u8 = 32;
/// Host bridge: vendor Intel, a device id of no chip with quirks; class bridge, subclass host.
const HOST_BRIDGE: [u32; 4] = [0x0d57_8086, 0, 0x0600_0000, 0];

type Device = VirtioPci<GuestMemory>;

/// The bus with all its devices.
pub struct PciBus {
    /// CONFIG_ADDRESS.
    address: u32,
    devices: BTreeMap<u8, Device>,
}

/// A saved bus.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PciState {
    address: u32,
    /// By slot.
    pub(crate) devices: BTreeMap<u8, VirtioPciState>,
}

/// Why a device cannot be placed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PciError {
    /// The slot asked for does not exist or holds the host bridge.
    #[error("PCI slot {slot} cannot hold a device; choose 1 to 31")]
    NoSuchSlot {
        /// The slot.
        slot: u8,
    },
    /// Two devices want one slot.
    #[error("PCI slot {slot} is taken twice; give the devices different pci_device_id")]
    SlotTaken {
        /// The slot.
        slot: u8,
    },
    /// All slots are taken.
    #[error("the VM has more than 31 PCI devices")]
    Full,
}

/// Why a saved bus cannot be restored.
#[derive(Debug, thiserror::Error)]
pub enum PciStateError {
    /// The saved bus has devices in other slots.
    #[error("the saved machine has PCI devices in slots {saved:?}, this one in {configured:?}")]
    Slots {
        /// In the state.
        saved: Vec<u8>,
        /// Of this bus.
        configured: Vec<u8>,
    },
    /// A device does not fit its state.
    #[error("cannot restore the PCI device in slot {slot}")]
    Device {
        /// Its slot.
        slot: u8,
        /// Why.
        #[source]
        source: virtio_devices::StateError,
    },
}

/// Which register of which device a configuration access means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConfigAddress {
    slot: u8,
    offset: u16,
}

/// Chooses slots: those asked for first, then from 1 up in order.
///
/// `wanted` holds one entry for each device; the result is parallel to it.
pub fn assign_slots(wanted: &[Option<u8>]) -> Result<Vec<u8>, PciError> {
    let mut taken = [false; SLOTS as usize];
    taken[0] = true;
    for slot in wanted.iter().copied().flatten() {
        match taken.get_mut(usize::from(slot)) {
            Some(_) | None if slot == 0 || slot >= SLOTS => {
                return Err(PciError::NoSuchSlot { slot });
            }
            Some(true) | None => return Err(PciError::SlotTaken { slot }),
            Some(free) => *free = true,
        }
    }
    let mut free = (0..SLOTS).filter(|&slot| !taken[usize::from(slot)]);
    wanted.iter().map(|slot| slot.or_else(|| free.next()).ok_or(PciError::Full)).collect()
}

impl PciBus {
    /// A bus with `fronts` in the slots they come with.
    #[must_use]
    pub fn new(fronts: Vec<(u8, Box<dyn Front<GuestMemory>>)>) -> Self {
        let devices = fronts
            .into_iter()
            .map(|(slot, front)| (slot, VirtioPci::new(front, bar_address(slot))))
            .collect();
        Self { address: 0, devices }
    }

    /// The device in `slot`.
    pub fn device(&self, slot: u8) -> Option<&Device> {
        self.devices.get(&slot)
    }

    /// The device in `slot`, to change it.
    pub fn device_mut(&mut self, slot: u8) -> Option<&mut Device> {
        self.devices.get_mut(&slot)
    }

    /// All devices with their slots, in order of slots.
    pub fn devices(&self) -> impl Iterator<Item = (u8, &Device)> {
        self.devices.iter().map(|(slot, device)| (*slot, device))
    }

    /// The device whose BAR holds all of `len` bytes at `address`, and the offset in it.
    pub fn find_bar(&self, address: u64, len: usize) -> Option<(u8, u64)> {
        self.devices.iter().find_map(|(slot, device)| {
            let range = device.bar_range()?;
            let end = address.checked_add(len as u64)?;
            (range.start <= address && end <= range.end).then(|| (*slot, address - range.start))
        })
    }

    /// Reads CONFIG_ADDRESS.
    #[must_use]
    pub fn address(&self) -> u32 {
        self.address
    }

    /// Writes CONFIG_ADDRESS.
    pub fn set_address(&mut self, value: u32) {
        self.address = value & 0x80ff_fffc;
    }

    /// What an access to the data port at `port` means, if CONFIG_ADDRESS names something.
    #[must_use]
    pub fn selected(&self, port: u16) -> Option<ConfigAddress> {
        const ENABLE: u32 = 1 << 31;
        let [register, function, bus, _] = self.address.to_le_bytes();
        (self.address & ENABLE != 0 && bus == 0 && function & 7 == 0).then(|| ConfigAddress {
            slot: function >> 3,
            offset: u16::from(register) + (port - layout::PCI_CONFIG_DATA),
        })
    }

    /// What a memory-mapped access means, if a function 0 is there.
    #[must_use]
    pub fn mapped(address: u64) -> Option<ConfigAddress> {
        if !layout::ECAM.contains(&address) {
            return None;
        }
        let offset = address - layout::ECAM.start;
        let function = (offset >> 12) & 7;
        (function == 0).then_some(ConfigAddress {
            slot: (offset >> 15) as u8,
            offset: (offset & 0xfff) as u16,
        })
    }

    /// Reads configuration space; all ones where there is nothing. `data` does not cross a dword.
    pub fn config_read(&mut self, at: Option<ConfigAddress>, data: &mut [u8]) {
        data.fill(0xff);
        let Some(ConfigAddress { slot, offset }) = at else { return };
        if slot == 0 {
            read_host_bridge(offset, data);
        } else if let Some(device) = self.devices.get_mut(&slot) {
            device.config_read(offset, data);
        }
    }

    /// Writes configuration space.
    pub fn config_write(
        &mut self,
        at: Option<ConfigAddress>,
        data: &[u8],
        memory: &GuestMemory,
        effects: &mut Effects,
    ) -> Option<u8> {
        let ConfigAddress { slot, offset } = at?;
        self.devices.get_mut(&slot)?.config_write(offset, data, memory, effects);
        Some(slot)
    }

    /// All devices and the bus become as at power-on.
    pub fn reset(&mut self) {
        self.address = 0;
        for device in self.devices.values_mut() {
            device.reset();
        }
    }

    /// The state of the bus and all devices.
    #[must_use]
    pub fn save(&self) -> PciState {
        let devices = self.devices.iter().map(|(slot, device)| (*slot, device.save())).collect();
        PciState { address: self.address, devices }
    }

    /// Becomes the bus `state` was saved from.
    pub fn restore(&mut self, state: &PciState) -> Result<(), PciStateError> {
        let saved: Vec<u8> = state.devices.keys().copied().collect();
        let configured: Vec<u8> = self.devices.keys().copied().collect();
        if saved != configured {
            return Err(PciStateError::Slots { saved, configured });
        }
        for ((slot, device), saved) in self.devices.iter_mut().zip(state.devices.values()) {
            device
                .restore(saved)
                .map_err(|source| PciStateError::Device { slot: *slot, source })?;
        }
        self.address = state.address;
        Ok(())
    }
}

/// Where the BAR of the device in `slot` is at power-on.
#[must_use]
pub fn bar_address(slot: u8) -> u32 {
    (layout::MMIO32.start + u64::from(slot) * BAR_SIZE) as u32
}

fn read_host_bridge(offset: u16, data: &mut [u8]) {
    for (index, byte) in data.iter_mut().enumerate() {
        let at = usize::from(offset) + index;
        *byte = HOST_BRIDGE.get(at / 4).map_or(0, |dword| dword.to_le_bytes()[at % 4]);
    }
}
