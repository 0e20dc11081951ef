//! ACPI fixed hardware: PM1 event and control registers and the power management timer.
//!
//! ACPI 6.5, 4.8.3. Of the events only the power button exists. The timer counts at 3.579545 MHz,
//! 32 bits wide, and has no overflow event (its status bit stays clear): Linux reads it as a clock only.

use hypervisor::clock::TSC_HZ;
use serde::{Deserialize, Serialize};

use crate::machine::layout;

/// Frequency of the power management timer.
const PM_TIMER_HZ: u64 = 3_579_545;
const POWER_BUTTON: u16 = 1 << 8;
/// What the driver may enable: timer, global lock, power button, sleep button, RTC.
const ENABLE_MASK: u16 = 1 | 1 << 5 | 1 << 8 | 1 << 9 | 1 << 10;
const SCI_ENABLE: u16 = 1;
const SLEEP_ENABLE: u16 = 1 << 13;
const SLEEP_TYPE_SHIFT: u32 = 10;
/// The sleep type of S5, named by `\_S5` in the DSDT.
pub const SLEEP_TYPE_OFF: u8 = 5;

/// The registers. Also what is saved.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Power {
    status: u16,
    enable: u16,
    control: u16,
}

impl Power {
    /// Whether `port` is one of these registers.
    #[must_use]
    pub fn claims(port: u16) -> bool {
        (layout::PM1_EVENT..layout::PM_TIMER + 4).contains(&port)
    }

    /// The guest reads ports from `port` on.
    pub fn read(&self, port: u16, data: &mut [u8], tsc: u64) {
        let ticks = u128::from(tsc) * u128::from(PM_TIMER_HZ) / u128::from(TSC_HZ);
        let mut registers = [0; 12];
        registers[0..2].copy_from_slice(&self.status.to_le_bytes());
        registers[2..4].copy_from_slice(&self.enable.to_le_bytes());
        registers[4..6].copy_from_slice(&(self.control | SCI_ENABLE).to_le_bytes());
        registers[8..12].copy_from_slice(&(ticks as u32).to_le_bytes());
        let start = usize::from(port - layout::PM1_EVENT);
        for (index, byte) in data.iter_mut().enumerate() {
            *byte = registers.get(start + index).copied().unwrap_or(0xff);
        }
    }

    /// The guest writes ports from `port` on. True if it turned the machine off.
    pub fn write(&mut self, port: u16, data: &[u8]) -> bool {
        let mut off = false;
        for (address, byte) in (port..).zip(data) {
            let high = address & 1 == 1;
            let value = if high { u16::from(*byte) << 8 } else { u16::from(*byte) };
            let kept = if high { 0x00ff } else { 0xff00 };
            match address - layout::PM1_EVENT {
                0 | 1 => self.status &= !value,
                2 | 3 => self.enable = (self.enable & kept) | (value & ENABLE_MASK),
                4 | 5 => {
                    // SLP_EN is write-only: it acts and reads as zero.
                    self.control = (self.control & kept) | (value & !SLEEP_ENABLE);
                    let sleep_type = (self.control >> SLEEP_TYPE_SHIFT) & 7;
                    off |= value & SLEEP_ENABLE != 0 && sleep_type == u16::from(SLEEP_TYPE_OFF);
                }
                _ => {}
            }
        }
        off
    }

    /// Somebody presses the power button.
    pub fn press_button(&mut self) {
        self.status |= POWER_BUTTON;
    }

    /// Whether the system control interrupt is asserted.
    #[must_use]
    pub fn sci(&self) -> bool {
        self.status & self.enable != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_u16(power: &Power, port: u16) -> u16 {
        let mut data = [0; 2];
        power.read(port, &mut data, 0);
        u16::from_le_bytes(data)
    }

    #[test]
    fn the_button_interrupts_only_when_enabled_until_acknowledged() {
        let mut power = Power::default();
        power.press_button();
        assert!(!power.sci());
        power.write(layout::PM1_EVENT + 2, &POWER_BUTTON.to_le_bytes());
        assert!(power.sci());
        assert_eq!(read_u16(&power, layout::PM1_EVENT), POWER_BUTTON);
        power.write(layout::PM1_EVENT, &POWER_BUTTON.to_le_bytes());
        assert!(!power.sci());
        assert_eq!(read_u16(&power, layout::PM1_EVENT + 2), POWER_BUTTON);
    }

    #[test]
    fn only_the_sleep_type_of_s5_turns_off() {
        let mut power = Power::default();
        let sleep = |kind: u16| (SLEEP_ENABLE | kind << SLEEP_TYPE_SHIFT).to_le_bytes();
        assert!(!power.write(layout::PM1_CONTROL, &sleep(3)));
        assert!(!power.write(layout::PM1_CONTROL, &(5u16 << SLEEP_TYPE_SHIFT).to_le_bytes()));
        assert!(power.write(layout::PM1_CONTROL, &sleep(5)));
        assert_eq!(read_u16(&power, layout::PM1_CONTROL), 5 << SLEEP_TYPE_SHIFT | SCI_ENABLE);
    }

    #[test]
    fn the_timer_runs_at_its_frequency_and_wraps() {
        let power = Power::default();
        let at = |tsc| {
            let mut data = [0; 4];
            power.read(layout::PM_TIMER, &mut data, tsc);
            u32::from_le_bytes(data)
        };
        assert_eq!(at(0), 0);
        assert_eq!(at(TSC_HZ), 3_579_545);
        assert_eq!(at(TSC_HZ * 2000), (3_579_545u64 * 2000) as u32);
    }
}
