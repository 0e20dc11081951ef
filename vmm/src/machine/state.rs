//! Saving and restoring a machine, and its parts for digests.

use hypervisor::GuestMemory;
use serde::{Deserialize, Serialize};

use super::Machine;
use crate::legacy::serial::{SerialState, SerialStateError};
use crate::legacy::{Power, Rtc, SerialPort};
use crate::pci::{PciState, PciStateError};

/// Changes with the layout of [`MachineState`].
const VERSION: u32 = 1;

/// Everything about a machine but its memory and processor. Equal machines have equal states.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineState {
    version: u32,
    serial: Option<SerialState>,
    power: Power,
    rtc: Rtc,
    pci: PciState,
}

/// Why a saved machine cannot be restored.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The state has a format of another version.
    #[error("the saved machine has format {found}, this program reads {VERSION}")]
    Version {
        /// In the state.
        found: u32,
    },
    /// One has a serial port, the other has none.
    #[error("the saved machine and this one differ in having a serial port")]
    SerialPresence,
    /// The serial port's state is impossible.
    #[error(transparent)]
    Serial(#[from] SerialStateError),
    /// The clock's state is impossible.
    #[error("the saved real time clock has no proper memory")]
    Rtc,
    /// The PCI devices do not fit.
    #[error(transparent)]
    Pci(#[from] PciStateError),
}

impl Machine {
    /// The machine's state. Effects still queued are not part of it.
    #[must_use]
    pub fn save(&self) -> MachineState {
        MachineState {
            version: VERSION,
            serial: self.serial.as_ref().map(SerialPort::save),
            power: self.power.clone(),
            rtc: self.rtc.clone(),
            pci: self.pci.save(),
        }
    }

    /// Becomes the machine `state` was saved from. After an error this machine must not be used.
    pub fn restore(&mut self, state: &MachineState) -> Result<(), RestoreError> {
        if state.version != VERSION {
            return Err(RestoreError::Version { found: state.version });
        }
        match (&mut self.serial, &state.serial) {
            (Some(serial), Some(saved)) => serial.restore(saved)?,
            (None, None) => {}
            _ => return Err(RestoreError::SerialPresence),
        }
        if !state.rtc.is_valid() {
            return Err(RestoreError::Rtc);
        }
        self.pci.restore(&state.pci)?;
        self.power = state.power.clone();
        self.rtc = state.rtc.clone();
        self.effects.clear();
        Ok(())
    }

    /// The state in named parts, always the same ones in the same order, for comparing two sides.
    #[must_use]
    pub fn components(&self) -> Vec<(String, Vec<u8>)> {
        let mut parts = vec![
            ("serial".to_owned(), encode(&self.serial.as_ref().map(SerialPort::save))),
            ("power".to_owned(), encode(&self.power)),
            ("rtc".to_owned(), encode(&self.rtc)),
            ("pci".to_owned(), encode(&self.pci.address())),
        ];
        for placed in &self.placed {
            let device =
                self.pci.device(placed.slot).map(virtio_devices::VirtioPci::<GuestMemory>::save);
            parts.push((placed.id.clone(), encode(&device)));
        }
        parts
    }
}

fn encode(value: &impl Serialize) -> Vec<u8> {
    // Serialising plain data into a growing vector has no way to fail.
    postcard::to_stdvec(value).unwrap_or_default()
}
