//! The interrupt controllers: LAPIC and IOAPIC.

use serde::{Deserialize, Serialize};

use crate::bus::{InterruptSink, Msi};

/// LAPIC and IOAPIC.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IrqChip {
    id: u8,
}

impl IrqChip {
    /// Fresh from reset; `id` is the LAPIC's.
    pub fn new(id: u8) -> IrqChip {
        IrqChip { id }
    }

    /// A load from a guest-physical address that is not RAM. False if the address is none of the controllers'.
    pub fn mmio_read(&mut self, _address: u64, _data: &mut [u8], _tsc: u64) -> bool {
        false
    }

    /// A store, likewise.
    pub fn mmio_write(&mut self, _address: u64, _data: &[u8], _tsc: u64) -> bool {
        false
    }

    /// Fires the timer if it is due at `tsc`.
    pub fn advance(&mut self, _tsc: u64) {}

    /// When the timer fires next.
    pub fn next_timer_tsc(&self) -> Option<u64> {
        None
    }
}

impl InterruptSink for IrqChip {
    fn signal_msi(&mut self, _msi: Msi) {}

    fn set_line(&mut self, _gsi: u32, _high: bool) {}
}
