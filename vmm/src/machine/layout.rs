//! Where things lie in guest-physical memory and I/O ports.
//!
//! Every address the machine, the loader and the ACPI tables must agree on stands here once. Two
//! hosts that run the same VM must agree too: changing a constant makes saved states unusable.

use std::ops::Range;

/// RAM below this address is contiguous from 0; what does not fit continues at [`HIGH_RAM`].
pub const LOW_RAM_END: u64 = 0xc000_0000;
/// Where RAM continues when there is more than [`LOW_RAM_END`].
pub const HIGH_RAM: u64 = 1 << 32;

/// The window for memory BARs.
pub const MMIO32: Range<u64> = 0xc000_0000..0xe800_0000;
/// PCI configuration space, memory-mapped (PCI Express enhanced configuration access).
pub const ECAM: Range<u64> = 0xe800_0000..0xe810_0000;
/// IOAPIC registers; the controller itself belongs to the hypervisor backend.
pub const IOAPIC: u64 = 0xfec0_0000;
/// LAPIC registers; likewise.
pub const LAPIC: u64 = 0xfee0_0000;

/// GDT of the entry to 64-bit mode.
pub const GDT: u64 = 0x500;
/// Linux's `boot_params` ("zero page").
pub const BOOT_PARAMS: u64 = 0x7000;
/// Top of the stack at entry; Linux sets up its own at once.
pub const BOOT_STACK: u64 = 0x8ff0;
/// Identity page tables: PML4, PDPT, then four page directories.
pub const PAGE_TABLES: u64 = 0x9000;
/// The kernel command line.
pub const CMDLINE: u64 = 0x2_0000;
/// Room for the command line with its final NUL.
pub const CMDLINE_ROOM: u64 = 0x1_0000;
/// End of conventional memory as PC firmware leaves it.
pub const LOW_MEMORY_END: u64 = 0x9_fc00;
/// ACPI tables, RSDP first (in the range PC operating systems search for it).
pub const ACPI: Range<u64> = 0xe_0000..0x10_0000;
/// Kernels and initramfs lie at or above 1 MiB.
pub const HIGH_MEMORY: u64 = 0x10_0000;

/// First serial port, registers and interrupt line.
pub const COM1: u16 = 0x3f8;
/// See [`COM1`].
pub const COM1_IRQ: u8 = 4;
/// CMOS address and data port.
pub const RTC: u16 = 0x70;
/// Keyboard controller's command port, of which only the reset pulse exists.
pub const I8042_COMMAND: u16 = 0x64;
/// PM1a event block: status, then enable.
pub const PM1_EVENT: u16 = 0x600;
/// PM1a control block.
pub const PM1_CONTROL: u16 = 0x604;
/// Power management timer.
pub const PM_TIMER: u16 = 0x608;
/// ACPI system control interrupt: level-triggered, active high.
pub const SCI_IRQ: u8 = 9;
/// PCI configuration address register.
pub const PCI_CONFIG_ADDRESS: u16 = 0xcf8;
/// PCI configuration data register.
pub const PCI_CONFIG_DATA: u16 = 0xcfc;
/// Reset control register, which ACPI names too.
pub const RESET_CONTROL: u16 = 0xcf9;
/// What to write there for a reset.
pub const RESET_VALUE: u8 = 0x06;

/// The RAM ranges (address, bytes) of a machine with `size` bytes.
#[must_use]
pub fn ram_ranges(size: u64) -> Vec<(u64, usize)> {
    let low = size.min(LOW_RAM_END);
    let mut ranges = vec![(0, low as usize)];
    if size > low {
        ranges.push((HIGH_RAM, (size - low) as usize));
    }
    ranges
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_is_split_around_the_hole_below_4_gib() {
        assert_eq!(ram_ranges(1 << 30), [(0, 1 << 30)]);
        assert_eq!(ram_ranges(3 << 30), [(0, 3 << 30)]);
        assert_eq!(ram_ranges(5 << 30), [(0, 3 << 30), (1 << 32, 2 << 30)]);
    }
}
