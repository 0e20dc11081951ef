//! Which device answers at which port or address.

use hypervisor::{AccessContext, Bus};
use virtio_devices::Effects;

use super::{Machine, MachineEffect, layout};
use crate::legacy::{Power, SerialPort};
use crate::pci::PciBus;

/// Bit of the reset control register that resets the processor when it goes up.
const RESET_CPU: u8 = 1 << 2;
/// Command to the keyboard controller to pulse the reset line.
const I8042_RESET: u8 = 0xfe;
const RTC_DATA: u16 = layout::RTC + 1;
const COM1_END: u16 = layout::COM1 + 7;
const PCI_DATA_END: u16 = layout::PCI_CONFIG_DATA + 3;

impl Bus for Machine {
    fn pio_read(&mut self, port: u16, data: &mut [u8], cx: &mut AccessContext<'_>) {
        data.fill(0xff);
        match (port, data.len()) {
            (layout::PCI_CONFIG_ADDRESS, 4) => {
                data.copy_from_slice(&self.pci.address().to_le_bytes())
            }
            (layout::PCI_CONFIG_DATA..=PCI_DATA_END, _) if in_dword(port, data) => {
                let at = self.pci.selected(port);
                self.pci.config_read(at, data);
            }
            _ if Power::claims(port) => self.power.read(port, data, cx.tsc),
            _ => {
                for (offset, byte) in (0..).zip(data) {
                    *byte = self.read_port(port.wrapping_add(offset), cx);
                }
            }
        }
    }

    fn pio_write(&mut self, port: u16, data: &[u8], cx: &mut AccessContext<'_>) {
        match (port, data.len()) {
            (layout::PCI_CONFIG_ADDRESS, 4) => {
                let value = data.iter().rev().fold(0, |value, byte| value << 8 | u32::from(*byte));
                self.pci.set_address(value);
            }
            (layout::PCI_CONFIG_DATA..=PCI_DATA_END, _) if in_dword(port, data) => {
                let mut effects = Effects::new();
                let at = self.pci.selected(port);
                if let Some(slot) = self.pci.config_write(at, data, &self.memory, &mut effects) {
                    self.route(slot, effects, cx);
                }
            }
            _ if Power::claims(port) => {
                if self.power.write(port, data) {
                    self.push(MachineEffect::PowerOff, cx);
                }
                self.drive_sci(cx);
            }
            _ => {
                for (offset, byte) in (0..).zip(data) {
                    self.write_port(port.wrapping_add(offset), *byte, cx);
                }
            }
        }
    }

    fn mmio_read(&mut self, address: u64, data: &mut [u8], _cx: &mut AccessContext<'_>) {
        data.fill(0xff);
        if layout::ECAM.contains(&address) {
            self.pci.config_read(PciBus::mapped(address), data);
        } else if let Some((slot, offset)) = self.pci.find_bar(address, data.len())
            && let Some(device) = self.pci.device_mut(slot)
        {
            device.bar_read(offset, data);
        }
    }

    fn mmio_write(&mut self, address: u64, data: &[u8], cx: &mut AccessContext<'_>) {
        let mut effects = Effects::new();
        let slot = if layout::ECAM.contains(&address) {
            self.pci.config_write(PciBus::mapped(address), data, &self.memory, &mut effects)
        } else {
            self.pci.find_bar(address, data.len()).and_then(|(slot, offset)| {
                let device = self.pci.device_mut(slot)?;
                let waits = device.front().backlogged();
                device.bar_write(offset, data, &self.memory, &mut effects);
                cx.stop |= self.stops_at_once && waits && !device.front().backlogged();
                Some(slot)
            })
        };
        if let Some(slot) = slot {
            self.route(slot, effects, cx);
        }
    }
}

/// Whether an access to the configuration data port stays within its four bytes.
fn in_dword(port: u16, data: &[u8]) -> bool {
    usize::from(port & 3) + data.len() <= 4
}

impl Machine {
    fn read_port(&mut self, port: u16, cx: &mut AccessContext<'_>) -> u8 {
        match port {
            layout::COM1..=COM1_END => {
                let register = (port - layout::COM1) as u8;
                self.with_serial(cx, |serial| serial.read(register)).unwrap_or(0xff)
            }
            RTC_DATA => self.rtc.read(cx.tsc),
            // No byte waits in either direction.
            layout::I8042_COMMAND => 0,
            layout::RESET_CONTROL => 0,
            _ => 0xff,
        }
    }

    fn with_serial<T>(
        &mut self,
        cx: &mut AccessContext<'_>,
        access: impl FnOnce(&mut SerialPort) -> T,
    ) -> Option<T> {
        let serial = self.serial.as_mut()?;
        let waits = serial.backlogged();
        let value = access(serial);
        cx.stop |= self.stops_at_once && waits && !serial.backlogged();
        self.after_serial(cx);
        Some(value)
    }

    fn write_port(&mut self, port: u16, value: u8, cx: &mut AccessContext<'_>) {
        match port {
            layout::COM1..=COM1_END => {
                let register = (port - layout::COM1) as u8;
                self.with_serial(cx, |serial| serial.write(register, value));
            }
            layout::RTC => self.rtc.select(value),
            RTC_DATA => self.rtc.write(value, cx.tsc),
            layout::I8042_COMMAND if value == I8042_RESET => self.push(MachineEffect::Reset, cx),
            layout::RESET_CONTROL if value & RESET_CPU != 0 => self.push(MachineEffect::Reset, cx),
            _ => {}
        }
    }
}
