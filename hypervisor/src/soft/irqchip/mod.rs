//! The interrupt controllers of the software CPU: one local APIC and one IOAPIC.
//!
//! They are part of the deterministic machine: every function is computed from its arguments and the
//! saved state, time comes in as a raw TSC value, and nothing here knows the host. There is no 8259
//! PIC and no PIT.

pub mod ioapic;
pub mod lapic;
pub mod timer;
mod vectors;

use crate::bus::{InterruptSink, Msi};
use ioapic::Ioapic;
use lapic::{Lapic, Request};
use serde::{Deserialize, Serialize};

/// Vector of the non-maskable interrupt.
const NMI: u8 = 2;

/// The interrupt controllers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IrqChip {
    /// The processor's local APIC.
    pub lapic: Lapic,
    ioapic: Ioapic,
    nmi_requested: bool,
    /// An NMI handler runs: no other NMI before the next IRET.
    nmi_blocked: bool,
}

/// An interrupt message: what IOAPIC entries, MSIs and interrupt commands have in common.
struct Message {
    destination: u8,
    logical: bool,
    delivery_mode: u8,
    vector: u8,
    level: bool,
}

impl IrqChip {
    /// Interrupt controllers fresh from reset, for the processor with this APIC id.
    #[must_use]
    pub fn new(apic_id: u8) -> Self {
        Self {
            lapic: Lapic::new(apic_id),
            ioapic: Ioapic::default(),
            nmi_requested: false,
            nmi_blocked: false,
        }
    }

    /// A load from a guest-physical address that is not RAM, at the raw TSC `tsc`. False if the address is none of
    /// the controllers'.
    ///
    /// Registers are 32 bits wide on 16-byte boundaries. Bytes between them read as zero.
    pub fn mmio_read(&mut self, address: u64, data: &mut [u8], tsc: u64) -> bool {
        let offset = (address & 0xff0) as u16;
        let value = if Ioapic::claims(address) {
            self.ioapic.read(offset)
        } else if self.lapic.claims(address) {
            self.lapic.read(offset, tsc)
        } else {
            return false;
        };
        let bytes = value.to_le_bytes();
        let skip = (address & 0xf) as usize;
        for (index, byte) in data.iter_mut().enumerate() {
            *byte = bytes.get(skip + index).copied().unwrap_or(0);
        }
        true
    }

    /// A store, likewise. Only aligned 32-bit stores have an effect, as the manual demands them (SDM vol. 3,
    /// 11.4.1); of a wider one the low half counts.
    pub fn mmio_write(&mut self, address: u64, data: &[u8], tsc: u64) -> bool {
        let for_ioapic = Ioapic::claims(address);
        if !for_ioapic && !self.lapic.claims(address) {
            return false;
        }
        let (Some(bytes), 0) = (data.first_chunk::<4>(), address & 0xf) else {
            return true;
        };
        let offset = (address & 0xff0) as u16;
        let value = u32::from_le_bytes(*bytes);
        if for_ioapic {
            let pins = self.ioapic.write(offset, value);
            self.send_pins(pins);
            return true;
        }
        match self.lapic.write(offset, value, tsc) {
            Some(Request::EndOfInterrupt(vector)) => {
                let pins = self.ioapic.end_of_interrupt(vector);
                self.send_pins(pins);
            }
            Some(Request::Send(command)) => self.send_command(command),
            None => {}
        }
        true
    }

    /// The raw TSC of the next timer interrupt. Constant time: the run loop asks often.
    #[must_use]
    pub fn next_timer_tsc(&self) -> Option<u64> {
        self.lapic.next_timer()
    }

    /// Raises the timer interrupts due at the raw TSC `tsc`.
    pub fn advance(&mut self, tsc: u64) {
        self.lapic.advance(tsc);
    }

    /// Takes the interrupt of highest priority for the processor, given its interrupt flag: vector 2 is an NMI. Interrupt
    /// shadows are the processor's business.
    pub fn acknowledge(&mut self, interrupt_flag: bool) -> Option<u8> {
        if self.nmi_requested && !self.nmi_blocked {
            self.nmi_requested = false;
            self.nmi_blocked = true;
            return Some(NMI);
        }
        if !interrupt_flag {
            return None;
        }
        let vector = self.lapic.deliverable()?;
        self.lapic.acknowledge(vector);
        Some(vector)
    }

    /// IRET was executed: NMIs are possible again.
    pub fn unblock_nmi(&mut self) {
        self.nmi_blocked = false;
    }

    fn send_pins(&mut self, pins: u32) {
        for pin in (0..ioapic::PINS).filter(|pin| pins & 1 << pin != 0) {
            self.send_pin(pin);
        }
    }

    fn send_pin(&mut self, pin: usize) {
        let entry = self.ioapic.message(pin);
        let message = Message {
            destination: (entry >> 56) as u8,
            logical: entry & 1 << 11 != 0,
            delivery_mode: (entry >> 8 & 7) as u8,
            vector: entry as u8,
            level: entry & 1 << 15 != 0,
        };
        if self.deliver(&message) {
            self.ioapic.accepted(pin);
        }
    }

    /// Sends an interrupt command (SDM vol. 3, 11.6.1). With one processor, "all excluding self"
    /// reaches nobody.
    fn send_command(&mut self, command: u64) {
        let own = self.lapic.id();
        let (destination, logical) = match command >> 18 & 3 {
            0 => ((command >> 56) as u8, command & 1 << 11 != 0),
            1 | 2 => (own, false),
            _ => return,
        };
        let delivery_mode = (command >> 8 & 7) as u8;
        let vector = command as u8;
        if delivery_mode <= 1 && vector < 16 {
            self.lapic.report_sent_vector();
            return;
        }
        // Interrupt commands are edge-triggered on processors of this kind.
        self.deliver(&Message { destination, logical, delivery_mode, vector, level: false });
    }

    /// Brings a message to the local APIC; false if nobody accepted it.
    fn deliver(&mut self, message: &Message) -> bool {
        if !self.lapic.matches(message.destination, message.logical) {
            return false;
        }
        match message.delivery_mode {
            // Fixed, and lowest priority among one.
            0 | 1 => self.lapic.accept(message.vector, message.level),
            4 => {
                self.nmi_requested = true;
                true
            }
            // SMI, INIT, start-up and ExtINT: there is no SMM, no second processor and no PIC.
            other => {
                log::debug!("interrupt message with delivery mode {other} ignored");
                false
            }
        }
    }
}

impl InterruptSink for IrqChip {
    fn signal_msi(&mut self, msi: Msi) {
        // SDM vol. 3, 11.11: 0xfee in the upper bits, destination, destination mode.
        if msi.address >> 20 != 0xfee {
            return;
        }
        self.deliver(&Message {
            destination: (msi.address >> 12) as u8,
            logical: msi.address & 1 << 2 != 0,
            delivery_mode: (msi.data >> 8 & 7) as u8,
            vector: msi.data as u8,
            // No EOI ever returns to the sender, so a "level" message is delivered like an edge.
            level: false,
        });
    }

    fn set_line(&mut self, gsi: u32, high: bool) {
        if self.ioapic.set_line(gsi, high) {
            self.send_pin(gsi as usize);
        }
    }
}
