//! An IOAPIC with 24 inputs (82093AA data sheet; EOI register as in version 0x20).
//!
//! Inputs are logical: "high" means asserted, whatever polarity the redirection entry claims, since
//! devices here have no voltage. A guest that sets the polarity its firmware tables ask for sees no
//! difference.

use serde::{Deserialize, Serialize};

/// Where the registers are.
pub const BASE: u64 = 0xfec0_0000;
/// Number of inputs.
pub const PINS: usize = 24;

/// Version 0x20, 24 entries.
const VERSION: u32 = 0x0017_0020;
/// Redirection entry: remote IRR (read-only).
const REMOTE_IRR: u64 = 1 << 14;
/// Redirection entry: level-triggered.
const LEVEL: u64 = 1 << 15;
/// Redirection entry: masked.
const MASKED: u64 = 1 << 16;
/// The bits of a redirection entry a guest may write (delivery status and remote IRR it may not).
const WRITABLE: u64 = 0xff00_0000_0001_afff;

/// The registers of the IOAPIC.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ioapic {
    id: u32,
    select: u8,
    /// Asserted inputs, one bit each.
    lines: u32,
    redirections: [u64; PINS],
}

impl Default for Ioapic {
    fn default() -> Self {
        Self { id: 0, select: 0, lines: 0, redirections: [MASKED; PINS] }
    }
}

impl Ioapic {
    /// Whether the guest-physical `address` is one of the registers.
    #[must_use]
    pub fn claims(address: u64) -> bool {
        address & !0xfff == BASE
    }

    /// Drives an input; true if the pin now has an interrupt to send (see [`Ioapic::message`]).
    pub fn set_line(&mut self, pin: u32, high: bool) -> bool {
        if pin as usize >= PINS {
            return false;
        }
        let bit = 1 << pin;
        let rising = high && self.lines & bit == 0;
        if high {
            self.lines |= bit;
        } else {
            self.lines &= !bit;
        }
        let entry = self.redirections[pin as usize];
        if entry & LEVEL != 0 {
            self.wants_to_send(pin as usize)
        } else {
            // An edge at a masked input is lost.
            rising && entry & MASKED == 0
        }
    }

    /// The redirection entry of `pin`: what is sent, and to whom.
    #[must_use]
    pub fn message(&self, pin: usize) -> u64 {
        self.redirections[pin]
    }

    /// A local APIC accepted the level-triggered interrupt of `pin`; nothing more is sent before EOI.
    pub fn accepted(&mut self, pin: usize) {
        if self.redirections[pin] & LEVEL != 0 {
            self.redirections[pin] |= REMOTE_IRR;
        }
    }

    /// The handler of `vector` has finished: pins that wait for it may send again. Returns them as
    /// bits.
    pub fn end_of_interrupt(&mut self, vector: u8) -> u32 {
        let mut again = 0;
        for pin in 0..PINS {
            let entry = &mut self.redirections[pin];
            if *entry as u8 == vector && *entry & (LEVEL | REMOTE_IRR) == LEVEL | REMOTE_IRR {
                *entry &= !REMOTE_IRR;
                if self.wants_to_send(pin) {
                    again |= 1 << pin;
                }
            }
        }
        again
    }

    /// Reads the 32-bit register at `offset` in the page.
    #[must_use]
    pub fn read(&self, offset: u16) -> u32 {
        match offset {
            0x00 => u32::from(self.select),
            0x10 => match self.select {
                0 | 2 => self.id,
                1 => VERSION,
                index => match self.redirections.get(usize::from(index).wrapping_sub(0x10) / 2) {
                    Some(entry) => (entry >> (32 * (index & 1))) as u32,
                    None => 0,
                },
            },
            _ => 0,
        }
    }

    /// Writes the 32-bit register at `offset` in the page. Returns the pins that now have an
    /// interrupt to send, as bits.
    pub fn write(&mut self, offset: u16, value: u32) -> u32 {
        match offset {
            0x00 => self.select = value as u8,
            0x10 => match self.select {
                0 => self.id = value & 0x0f00_0000,
                index => {
                    let pin = usize::from(index).wrapping_sub(0x10) / 2;
                    if pin < PINS {
                        return self.set_redirection(pin, index & 1 == 1, value);
                    }
                }
            },
            0x40 => return self.end_of_interrupt(value as u8),
            _ => {}
        }
        0
    }

    fn set_redirection(&mut self, pin: usize, upper: bool, value: u32) -> u32 {
        let old = self.redirections[pin];
        let written = if upper {
            old & 0xffff_ffff | u64::from(value) << 32
        } else {
            old & !0xffff_ffff | u64::from(value)
        };
        let mut entry = written & WRITABLE | old & REMOTE_IRR;
        if entry & LEVEL == 0 {
            // An edge-triggered pin waits for nobody's EOI. Operating systems switch a pin to edge and
            // back to clear a remote IRR that is stuck.
            entry &= !REMOTE_IRR;
        }
        self.redirections[pin] = entry;
        u32::from(self.wants_to_send(pin)) << pin
    }

    /// Whether a level-triggered pin is asserted, unmasked and not waiting for EOI.
    fn wants_to_send(&self, pin: usize) -> bool {
        self.lines & 1 << pin != 0
            && self.redirections[pin] & (LEVEL | MASKED | REMOTE_IRR) == LEVEL
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn program(ioapic: &mut Ioapic, pin: u8, low: u32) -> u32 {
        ioapic.write(0x00, u32::from(0x10 + 2 * pin));
        ioapic.write(0x10, low)
    }

    #[test]
    fn registers_outside_the_table_are_harmless() {
        let mut ioapic = Ioapic::default();
        for select in 0..=255u32 {
            ioapic.write(0x00, select);
            ioapic.write(0x10, u32::MAX);
            let _ = ioapic.read(0x10);
        }
        ioapic.write(0x00, 1);
        assert_eq!(ioapic.read(0x10), VERSION);
        assert!(!ioapic.set_line(24, true));
        assert!(!ioapic.set_line(u32::MAX, true));
    }

    #[test]
    fn an_edge_is_sent_once_and_lost_when_masked() {
        let mut ioapic = Ioapic::default();
        assert!(!ioapic.set_line(4, true));
        assert_eq!(program(&mut ioapic, 4, 0x30), 0);
        assert!(!ioapic.set_line(4, true));
        assert!(!ioapic.set_line(4, false));
        assert!(ioapic.set_line(4, true));
    }

    #[test]
    fn a_level_is_sent_again_after_eoi_while_asserted() {
        let mut ioapic = Ioapic::default();
        program(&mut ioapic, 9, 0x31 | LEVEL as u32);
        assert!(ioapic.set_line(9, true));
        ioapic.accepted(9);
        assert!(!ioapic.set_line(9, true));
        assert_eq!(ioapic.read(0x10) & REMOTE_IRR as u32, REMOTE_IRR as u32);
        assert_eq!(ioapic.end_of_interrupt(0x30), 0);
        assert_eq!(ioapic.end_of_interrupt(0x31), 1 << 9);
        ioapic.accepted(9);
        ioapic.set_line(9, false);
        assert_eq!(ioapic.end_of_interrupt(0x31), 0);
    }

    #[test]
    fn unmasking_an_asserted_level_sends_it() {
        let mut ioapic = Ioapic::default();
        program(&mut ioapic, 3, (0x32 | LEVEL | MASKED) as u32);
        assert!(!ioapic.set_line(3, true));
        assert_eq!(program(&mut ioapic, 3, (0x32 | LEVEL) as u32), 1 << 3);
    }
}
