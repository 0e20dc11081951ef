//! The CMOS real time clock (MC146818), computed from the guest's TSC.
//!
//! The clock shows the wall time at which the machine started plus the guest time since; the guest
//! may set it, which only changes an offset. There are no alarms and no periodic interrupts: their enable
//! bits cannot be set. 24-hour mode only.

use hypervisor::clock::TSC_HZ;
use serde::{Deserialize, Serialize};

/// Index of the century in CMOS memory, named by the FADT.
pub const CENTURY: u8 = 0x32;

const SECONDS: u8 = 0;
const MINUTES: u8 = 2;
const HOURS: u8 = 4;
const WEEKDAY: u8 = 6;
const DAY: u8 = 7;
const MONTH: u8 = 8;
const YEAR: u8 = 9;
const STATUS_A: u8 = 10;
const STATUS_B: u8 = 11;
const STATUS_C: u8 = 12;
const STATUS_D: u8 = 13;

/// 32.768 kHz time base, 1.024 kHz rate.
const STATUS_A_DIVIDER: u8 = 0x26;
const UPDATE_IN_PROGRESS: u8 = 0x80;
const SET: u8 = 0x80;
const BINARY: u8 = 0x04;
const HOURS_24: u8 = 0x02;
const VALID: u8 = 0x80;
/// UIP goes up this long before the second changes, so that a reader who finds it down has this much
/// time to read all fields.
const UPDATE_TICKS: u64 = TSC_HZ * 244 / 1_000_000;

/// The clock. Also what is saved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rtc {
    index: u8,
    status_b: u8,
    /// Nanoseconds since 1970 when the TSC was zero, as far as this clock knows.
    base_ns: i64,
    /// The fields while the guest sets them (SET is on).
    setting: Option<Fields>,
    /// CMOS memory that is no clock register.
    memory: Vec<u8>,
}

/// Size of CMOS memory.
const MEMORY: usize = 128;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Fields {
    second: u8,
    minute: u8,
    hour: u8,
    day: u8,
    month: u8,
    year: u16,
}

impl Rtc {
    /// A clock that shows `boot_wall_ns` (nanoseconds since 1970) at TSC zero.
    #[must_use]
    pub fn new(boot_wall_ns: u64) -> Self {
        Self {
            index: 0,
            status_b: HOURS_24,
            base_ns: i64::try_from(boot_wall_ns).unwrap_or(i64::MAX),
            setting: None,
            memory: vec![0; MEMORY],
        }
    }

    /// Whether this could be the state of a clock.
    #[must_use]
    pub fn is_valid(&self) -> bool {
        self.memory.len() == MEMORY
    }

    /// After a reset: what a battery keeps stays.
    pub fn reset(&mut self) {
        self.index = 0;
        self.setting = None;
        self.status_b = (self.status_b & BINARY) | HOURS_24;
    }

    /// The guest writes the address port. Bit 7 masks NMIs on a PC and means nothing here.
    pub fn select(&mut self, value: u8) {
        self.index = value & 0x7f;
    }

    fn now_ns(&self, tsc: u64) -> i64 {
        self.base_ns.saturating_add(i64::try_from(tsc).unwrap_or(i64::MAX))
    }

    fn fields(&self, tsc: u64) -> Fields {
        self.setting.unwrap_or_else(|| Fields::at(self.now_ns(tsc).div_euclid(TSC_HZ as i64)))
    }

    /// The guest reads the data port.
    #[must_use]
    pub fn read(&self, tsc: u64) -> u8 {
        let fields = self.fields(tsc);
        match self.index {
            SECONDS => self.encode(fields.second),
            MINUTES => self.encode(fields.minute),
            HOURS => self.encode(fields.hour),
            WEEKDAY => self.encode(fields.weekday()),
            DAY => self.encode(fields.day),
            MONTH => self.encode(fields.month),
            YEAR => self.encode((fields.year % 100) as u8),
            CENTURY => self.encode((fields.year / 100) as u8),
            STATUS_A => {
                let into_second = self.now_ns(tsc).rem_euclid(TSC_HZ as i64) as u64;
                let updating = self.setting.is_none() && into_second >= TSC_HZ - UPDATE_TICKS;
                STATUS_A_DIVIDER | if updating { UPDATE_IN_PROGRESS } else { 0 }
            }
            STATUS_B => self.status_b,
            STATUS_C => 0,
            STATUS_D => VALID,
            other => self.memory.get(usize::from(other)).copied().unwrap_or(0xff),
        }
    }

    /// The guest writes the data port.
    pub fn write(&mut self, value: u8, tsc: u64) {
        match self.index {
            SECONDS | MINUTES | HOURS | DAY | MONTH | YEAR | CENTURY => self.set_field(value, tsc),
            STATUS_B => self.write_status_b(value, tsc),
            WEEKDAY | STATUS_A | STATUS_C | STATUS_D => {}
            other => {
                if let Some(byte) = self.memory.get_mut(usize::from(other)) {
                    *byte = value;
                }
            }
        }
    }

    fn set_field(&mut self, value: u8, tsc: u64) {
        let value = self.decode(value);
        let mut fields = self.fields(tsc);
        match self.index {
            SECONDS => fields.second = value,
            MINUTES => fields.minute = value,
            HOURS => fields.hour = value,
            DAY => fields.day = value,
            MONTH => fields.month = value,
            YEAR => fields.year = fields.year / 100 * 100 + u16::from(value % 100),
            _ => fields.year = u16::from(value) * 100 + fields.year % 100,
        }
        if self.setting.is_some() {
            self.setting = Some(fields);
        } else {
            self.set_time(fields, tsc);
        }
    }

    fn write_status_b(&mut self, value: u8, tsc: u64) {
        match (self.setting, value & SET != 0) {
            (None, true) => self.setting = Some(self.fields(tsc)),
            (Some(fields), false) => {
                self.setting = None;
                self.set_time(fields, tsc);
            }
            (None, false) | (Some(_), true) => {}
        }
        self.status_b = (value & (SET | BINARY)) | HOURS_24;
    }

    /// From now on the clock shows `fields`, half a second in: the real one restarts its divider so.
    fn set_time(&mut self, fields: Fields, tsc: u64) {
        let now = fields.seconds() * TSC_HZ as i64 + TSC_HZ as i64 / 2;
        self.base_ns = now.saturating_sub(i64::try_from(tsc).unwrap_or(i64::MAX));
    }

    fn encode(&self, value: u8) -> u8 {
        if self.status_b & BINARY != 0 { value } else { ((value / 10) << 4) | (value % 10) }
    }

    fn decode(&self, value: u8) -> u8 {
        if self.status_b & BINARY != 0 {
            value
        } else {
            (value >> 4).wrapping_mul(10).wrapping_add(value & 15)
        }
    }
}

impl Fields {
    /// The fields at `seconds` since 1970, by the Gregorian calendar. Years are counted from March, so
    /// that the leap day is the last of its year.
    fn at(seconds: i64) -> Self {
        let days = seconds.div_euclid(86_400) + 719_468;
        let second_of_day = seconds.rem_euclid(86_400);
        let era = days.div_euclid(146_097);
        let day_of_era = days.rem_euclid(146_097);
        let year_of_era =
            (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let month_from_march = (5 * day_of_year + 2) / 153;
        let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
        let year = era * 400 + year_of_era + i64::from(month <= 2);
        Self {
            second: (second_of_day % 60) as u8,
            minute: (second_of_day / 60 % 60) as u8,
            hour: (second_of_day / 3600) as u8,
            day: (day_of_year - (153 * month_from_march + 2) / 5 + 1) as u8,
            month: month as u8,
            year: year.clamp(0, 9999) as u16,
        }
    }

    /// Seconds since 1970. Takes whatever a guest wrote: a 31 February is some day in March.
    fn seconds(self) -> i64 {
        let month = i64::from(self.month);
        let year = i64::from(self.year) - i64::from(month <= 2);
        let era = year.div_euclid(400);
        let year_of_era = year.rem_euclid(400);
        let month_from_march = if month > 2 { month - 3 } else { month + 9 };
        let day_of_year = (153 * month_from_march + 2) / 5 + i64::from(self.day) - 1;
        let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
        let days = era * 146_097 + day_of_era - 719_468;
        let time =
            i64::from(self.hour) * 3600 + i64::from(self.minute) * 60 + i64::from(self.second);
        days * 86_400 + time
    }

    /// 1 is Sunday.
    fn weekday(self) -> u8 {
        // 1 January 1970 was a Thursday.
        ((self.seconds().div_euclid(86_400) + 4).rem_euclid(7) + 1) as u8
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read(rtc: &mut Rtc, index: u8, tsc: u64) -> u8 {
        rtc.select(index);
        rtc.read(tsc)
    }

    fn write(rtc: &mut Rtc, index: u8, value: u8, tsc: u64) {
        rtc.select(index);
        rtc.write(value, tsc);
    }

    fn shown(rtc: &mut Rtc, tsc: u64) -> [u8; 8] {
        [CENTURY, YEAR, MONTH, DAY, WEEKDAY, HOURS, MINUTES, SECONDS]
            .map(|index| read(rtc, index, tsc))
    }

    #[test]
    fn the_clock_shows_boot_time_plus_guest_time() {
        // 2024-02-29 23:59:58 UTC, a Thursday.
        let mut rtc = Rtc::new(1_709_251_198 * TSC_HZ);
        assert_eq!(shown(&mut rtc, 0), [0x20, 0x24, 0x02, 0x29, 5, 0x23, 0x59, 0x58]);
        assert_eq!(shown(&mut rtc, 2 * TSC_HZ), [0x20, 0x24, 0x03, 0x01, 6, 0, 0, 0]);
        assert_eq!(read(&mut rtc, STATUS_A, TSC_HZ / 2) & UPDATE_IN_PROGRESS, 0);
        assert_ne!(read(&mut rtc, STATUS_A, TSC_HZ - 1) & UPDATE_IN_PROGRESS, 0);
    }

    #[test]
    fn a_time_set_in_either_encoding_is_kept_and_goes_on() {
        let mut rtc = Rtc::new(0);
        let tsc = 7 * TSC_HZ;
        write(&mut rtc, STATUS_B, SET | BINARY, tsc);
        for (index, value) in [
            (CENTURY, 20),
            (YEAR, 31),
            (MONTH, 12),
            (DAY, 31),
            (HOURS, 23),
            (MINUTES, 59),
            (SECONDS, 59),
        ] {
            write(&mut rtc, index, value, tsc);
        }
        assert_eq!(shown(&mut rtc, 9 * TSC_HZ)[7], 59);
        write(&mut rtc, STATUS_B, 0, tsc);
        assert_eq!(shown(&mut rtc, tsc + TSC_HZ)[..4], [0x20, 0x32, 0x01, 0x01]);
        assert_eq!(read(&mut rtc, STATUS_B, tsc), HOURS_24);
    }

    proptest! {
        #[test]
        fn calendar_and_seconds_are_inverse(seconds in 0i64..253_402_300_800) {
            prop_assert_eq!(Fields::at(seconds).seconds(), seconds);
        }

        #[test]
        fn no_guest_makes_it_panic(boot in any::<u64>(), accesses in proptest::collection::vec((any::<u8>(), any::<u8>(), any::<u64>()), 0..50)) {
            let mut rtc = Rtc::new(boot);
            for (index, value, tsc) in accesses {
                write(&mut rtc, index, value, tsc);
                read(&mut rtc, index.wrapping_add(value), tsc);
                shown(&mut rtc, tsc);
            }
        }
    }
}
