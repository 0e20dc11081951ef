//! The MSI-X table and its pending bits (PCI Local Bus 3.0, 6.8.2).
//!
//! A vector that is masked when it is signalled becomes pending and is delivered once when the mask goes.

use serde::{Deserialize, Serialize};

use crate::effect::{Effect, Effects};
use crate::front::StateError;

const ENTRY_SIZE: u64 = 16;

/// One vector.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Vector {
    address: u64,
    data: u32,
    masked: bool,
    pending: bool,
}

impl Vector {
    /// As after reset.
    const RESET: Self = Self { address: 0, data: 0, masked: true, pending: false };
}

/// The table.
#[derive(Debug, Clone)]
pub(super) struct Msix {
    vectors: Vec<Vector>,
    /// The function's switches, copied from configuration space.
    enabled: bool,
    function_masked: bool,
}

/// A saved table. The switches are in configuration space.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct MsixState {
    vectors: Vec<Vector>,
}

impl Msix {
    pub(super) fn new(vectors: u16) -> Self {
        Self {
            vectors: vec![Vector::RESET; usize::from(vectors)],
            enabled: false,
            function_masked: false,
        }
    }

    pub(super) fn enabled(&self) -> bool {
        self.enabled
    }

    /// Follows the switches in configuration space.
    pub(super) fn set_control(&mut self, enabled: bool, masked: bool, effects: &mut Effects) {
        self.enabled = enabled;
        self.function_masked = masked;
        self.deliver_pending(effects);
    }

    /// Raises `vector`; one that does not exist (VIRTIO_MSI_NO_VECTOR) is nothing.
    pub(super) fn signal(&mut self, vector: u16, effects: &mut Effects) {
        if !self.enabled {
            return;
        }
        let Some(v) = self.vectors.get_mut(usize::from(vector)) else { return };
        if v.masked || self.function_masked {
            v.pending = true;
        } else {
            effects.push(Effect::Interrupt { address: v.address, data: v.data });
        }
    }

    fn deliver_pending(&mut self, effects: &mut Effects) {
        if !self.enabled || self.function_masked {
            return;
        }
        for v in &mut self.vectors {
            if v.pending && !v.masked {
                v.pending = false;
                effects.push(Effect::Interrupt { address: v.address, data: v.data });
            }
        }
    }

    /// Reads the table. Accesses are of four or eight aligned bytes; anything else reads as zeroes.
    pub(super) fn read_table(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if !proper(offset, data.len()) {
            return;
        }
        for (i, word) in data.chunks_exact_mut(4).enumerate() {
            let at = offset + 4 * i as u64;
            let Some(v) = self.vectors.get((at / ENTRY_SIZE) as usize) else { return };
            let value = match at % ENTRY_SIZE {
                0 => v.address as u32,
                4 => (v.address >> 32) as u32,
                8 => v.data,
                _ => u32::from(v.masked),
            };
            word.copy_from_slice(&value.to_le_bytes());
        }
    }

    /// Writes the table.
    pub(super) fn write_table(&mut self, offset: u64, data: &[u8], effects: &mut Effects) {
        if !proper(offset, data.len()) {
            return;
        }
        for (i, word) in data.chunks_exact(4).enumerate() {
            let at = offset + 4 * i as u64;
            let value = u32::from_le_bytes([word[0], word[1], word[2], word[3]]);
            let Some(v) = self.vectors.get_mut((at / ENTRY_SIZE) as usize) else { return };
            match at % ENTRY_SIZE {
                // The two low bits of an address are always zero.
                0 => v.address = (v.address & !0xffff_ffff) | u64::from(value & !3),
                4 => v.address = (v.address & 0xffff_ffff) | u64::from(value) << 32,
                8 => v.data = value,
                _ => v.masked = value & 1 != 0,
            }
        }
        self.deliver_pending(effects);
    }

    /// Reads the pending bits.
    pub(super) fn read_pending(&self, offset: u64, data: &mut [u8]) {
        let mut bits = [0; 8];
        for (i, _) in self.vectors.iter().enumerate().filter(|(_, v)| v.pending) {
            bits[i / 8] |= 1 << (i % 8);
        }
        crate::front::copy_config(&bits, usize::try_from(offset).unwrap_or(usize::MAX), data);
    }

    pub(super) fn reset(&mut self) {
        self.vectors.fill(Vector::RESET);
        self.enabled = false;
        self.function_masked = false;
    }

    pub(super) fn save(&self) -> MsixState {
        MsixState { vectors: self.vectors.clone() }
    }

    pub(super) fn restore(
        &mut self,
        state: &MsixState,
        enabled: bool,
        masked: bool,
    ) -> Result<(), StateError> {
        if state.vectors.len() != self.vectors.len() {
            return Err(StateError::Mismatch { what: "number of interrupt vectors" });
        }
        self.vectors.clone_from(&state.vectors);
        self.enabled = enabled;
        self.function_masked = masked;
        Ok(())
    }
}

fn proper(offset: u64, len: usize) -> bool {
    matches!(len, 4 | 8) && offset.is_multiple_of(len as u64)
}
