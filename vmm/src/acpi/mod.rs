//! The ACPI tables of the machine.
//!
//! The fixed (not hardware-reduced) model of ACPI: power button, PM timer and S5 through the PM1
//! registers, which Linux drives without any code in the DSDT. There are no GPEs and no legacy
//! interrupt controllers. The tables depend on constants and on whether there is a serial port.

use acpi_tables::aml::{
    self, AddressSpace, AddressSpaceCacheable, Device, EISAName, IO, Interrupt, Memory32Fixed,
    Name, Package, ResourceTemplate, Scope,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace as GasSpace, GAS};
use acpi_tables::sdt::Sdt;
use acpi_tables::{Aml, facs::FACS, mcfg::MCFG, rsdp::Rsdp, xsdt::XSDT};
use hypervisor::GuestMemory;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::machine::layout;

const OEM: [u8; 6] = *b"DYAD  ";
const OEM_TABLE: [u8; 8] = *b"DYADVM  ";
const OEM_REVISION: u32 = 1;

/// Writes all tables to [`layout::ACPI`], the RSDP first. `serial`: whether COM1 exists.
pub fn write(memory: &GuestMemory, serial: bool) -> Result<(), GuestMemoryError> {
    memory.write_slice(&tables(serial), GuestAddress(layout::ACPI.start))
}

/// The tables as they stand in memory from [`layout::ACPI`] on.
fn tables(serial: bool) -> Vec<u8> {
    let mut image = Image { bytes: vec![0; Rsdp::len().next_multiple_of(ALIGNMENT)] };
    let facs = image.add(&FACS::new());
    let dsdt = image.add(&dsdt(serial));
    let fadt = image.add(&fadt(facs, dsdt).finalize());
    let madt = image.add(&madt());
    let mut mcfg = MCFG::new(OEM, OEM_TABLE, OEM_REVISION);
    mcfg.add_ecam(layout::ECAM.start, 0, 0, 0);
    let mcfg = image.add(&mcfg);
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    for address in [fadt, madt, mcfg] {
        xsdt.add_entry(address);
    }
    let xsdt = image.add(&xsdt);
    let mut rsdp = Vec::new();
    Rsdp::new(OEM, xsdt).to_aml_bytes(&mut rsdp);
    image.bytes[..rsdp.len()].copy_from_slice(&rsdp);
    image.bytes
}

/// The FACS must be aligned to 64 bytes (ACPI 6.5, 5.2.10); the others gain by it too.
const ALIGNMENT: usize = 64;

struct Image {
    bytes: Vec<u8>,
}

impl Image {
    /// Appends `table`; the result is its address.
    fn add(&mut self, table: &dyn Aml) -> u64 {
        self.bytes.resize(self.bytes.len().next_multiple_of(ALIGNMENT), 0);
        let address = layout::ACPI.start + self.bytes.len() as u64;
        table.to_aml_bytes(&mut self.bytes);
        address
    }
}

/// FADT: where the fixed hardware is (ACPI 6.5, 5.2.9).
fn fadt(facs: u64, dsdt: u64) -> FADTBuilder {
    /// No VGA. The bits for a keyboard controller and legacy devices stay clear, so that Linux does
    /// not look for them.
    const BOOT_ARCH_NO_VGA: u16 = 1 << 2;
    const IO_BYTE: u8 = 8;
    let port = |width, size, address: u16| {
        GAS::new(GasSpace::SystemIo, width, 0, size, u64::from(address))
    };
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .dsdt_64(dsdt)
        .firmware_ctrl_64(facs)
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        .flag(Flags::SlpButton)
        .flag(Flags::FixRtc)
        .flag(Flags::TmrValExt)
        .flag(Flags::ResetRegSup);
    fadt.dsdt = (dsdt as u32).into();
    fadt.sci_int = u16::from(layout::SCI_IRQ).into();
    fadt.pm1a_evt_blk = u32::from(layout::PM1_EVENT).into();
    fadt.x_pm1a_evt_blk = port(32, AccessSize::WordAccess, layout::PM1_EVENT);
    fadt.pm1_evt_len = 4;
    fadt.pm1a_cnt_blk = u32::from(layout::PM1_CONTROL).into();
    fadt.x_pm1a_cnt_blk = port(16, AccessSize::WordAccess, layout::PM1_CONTROL);
    fadt.pm1_cnt_len = 2;
    fadt.pm_tmr_blk = u32::from(layout::PM_TIMER).into();
    fadt.x_pm_tmr_blk = port(32, AccessSize::DwordAccess, layout::PM_TIMER);
    fadt.pm_tmr_len = 4;
    // Latencies that say: no C2, no C3.
    fadt.p_lvl2_lat = 0xfff.into();
    fadt.p_lvl3_lat = 0xfff.into();
    fadt.century = crate::legacy::rtc::CENTURY;
    fadt.iapc_boot_arch = BOOT_ARCH_NO_VGA.into();
    fadt.reset_reg = port(IO_BYTE, AccessSize::ByteAccess, layout::RESET_CONTROL);
    fadt.reset_value = layout::RESET_VALUE;
    fadt
}

/// MADT: one processor, one IOAPIC, and the SCI as level-triggered, active high (ACPI 6.5, 5.2.12).
/// PCAT_COMPAT stays clear: there are no 8259s.
fn madt() -> Sdt {
    /// Polarity active high, trigger mode level (MPS INTI flags).
    const LEVEL_HIGH: u16 = 0b1101;
    let mut madt = Sdt::new(*b"APIC", 36, 5, OEM, OEM_TABLE, OEM_REVISION);
    madt.append_slice(&(layout::LAPIC as u32).to_le_bytes());
    madt.append_slice(&0u32.to_le_bytes());
    // Processor local APIC: type, length, processor UID, APIC id, flags (enabled).
    madt.append_slice(&[0, 8, 0, 0, 1, 0, 0, 0]);
    // IOAPIC: type, length, id, reserved, address, first GSI.
    madt.append_slice(&[1, 12, 0, 0]);
    madt.append_slice(&(layout::IOAPIC as u32).to_le_bytes());
    madt.append_slice(&0u32.to_le_bytes());
    // Interrupt source override: type, length, bus ISA, source, GSI, flags.
    madt.append_slice(&[2, 10, 0, layout::SCI_IRQ]);
    madt.append_slice(&u32::from(layout::SCI_IRQ).to_le_bytes());
    madt.append_slice(&LEVEL_HIGH.to_le_bytes());
    // Local APIC NMI: type, length, all processors, flags, LINT1.
    madt.append_slice(&[4, 6, 0xff, 0, 0, 1]);
    madt
}

/// DSDT: PCI root, serial port, RTC, reserved memory, processor and `\_S5`.
fn dsdt(serial: bool) -> Sdt {
    let mut code = Vec::new();
    pci_root(&mut code);
    if serial {
        serial_port(&mut code);
    }
    platform(&mut code);
    let mut dsdt = Sdt::new(*b"DSDT", 36, 6, OEM, OEM_TABLE, OEM_REVISION);
    dsdt.append_slice(&code);
    dsdt
}

fn pci_root(code: &mut Vec<u8>) {
    Device::new(
        "\\_SB_.PCI0".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0A08")),
            &Name::new("_CID".into(), &EISAName::new("PNP0A03")),
            &Name::new("_SEG".into(), &aml::ZERO),
            &Name::new("_BBN".into(), &aml::ZERO),
            &Name::new("_UID".into(), &aml::ZERO),
            &Name::new("_CCA".into(), &aml::ONE),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![
                    &AddressSpace::new_bus_number(0u16, 0),
                    &IO::new(layout::PCI_CONFIG_ADDRESS, layout::PCI_CONFIG_ADDRESS, 1, 8),
                    &AddressSpace::new_memory(
                        AddressSpaceCacheable::NotCacheable,
                        true,
                        layout::MMIO32.start as u32,
                        (layout::MMIO32.end - 1) as u32,
                        None,
                    ),
                ]),
            ),
        ],
    )
    .to_aml_bytes(code);
    // Linux uses the memory-mapped configuration space only where a motherboard resource claims it.
    Device::new(
        "\\_SB_.MBRD".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0C02")),
            &Name::new("_UID".into(), &aml::ZERO),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![
                    &Memory32Fixed::new(
                        true,
                        layout::ECAM.start as u32,
                        (layout::ECAM.end - layout::ECAM.start) as u32,
                    ),
                    &IO::new(layout::PM1_EVENT, layout::PM1_EVENT, 1, 12),
                ]),
            ),
        ],
    )
    .to_aml_bytes(code);
}

fn serial_port(code: &mut Vec<u8>) {
    Device::new(
        "\\_SB_.COM1".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0501")),
            &Name::new("_UID".into(), &aml::ZERO),
            &Name::new("_DDN".into(), &"COM1"),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![
                    &Interrupt::new(true, true, false, false, u32::from(layout::COM1_IRQ)),
                    &IO::new(layout::COM1, layout::COM1, 1, 8),
                ]),
            ),
        ],
    )
    .to_aml_bytes(code);
}

fn platform(code: &mut Vec<u8>) {
    // No interrupt: the clock can be read and set, but has no alarm.
    Device::new(
        "\\_SB_.RTC0".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0B00")),
            &Name::new("_UID".into(), &aml::ZERO),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![&IO::new(layout::RTC, layout::RTC, 1, 2)]),
            ),
        ],
    )
    .to_aml_bytes(code);
    Scope::new(
        "\\_SB_".into(),
        vec![&Device::new(
            "CPU0".into(),
            vec![&Name::new("_HID".into(), &"ACPI0007"), &Name::new("_UID".into(), &aml::ZERO)],
        )],
    )
    .to_aml_bytes(code);
    let soft_off = crate::legacy::power::SLEEP_TYPE_OFF;
    Name::new("\\_S5_".into(), &Package::new(vec![&soft_off, &aml::ZERO, &aml::ZERO, &aml::ZERO]))
        .to_aml_bytes(code);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    /// The table at guest-physical `address`.
    fn table(image: &[u8], address: u64) -> &[u8] {
        let rest = &image[(address - layout::ACPI.start) as usize..];
        let len = u32::from_le_bytes(rest[4..8].try_into().unwrap()) as usize;
        &rest[..len]
    }

    fn u64_at(bytes: &[u8], offset: usize) -> u64 {
        u64::from_le_bytes(bytes[offset..offset + 8].try_into().unwrap())
    }

    #[test]
    fn from_the_rsdp_every_table_is_reached_with_a_right_checksum() {
        let image = tables(true);
        assert!(image.len() as u64 <= layout::ACPI.end - layout::ACPI.start);
        assert_eq!(&image[..8], b"RSD PTR ");
        assert_eq!((sum(&image[..20]), sum(&image[..36])), (0, 0));
        let xsdt = table(&image, u64_at(&image, 24));
        assert_eq!((&xsdt[..4], sum(xsdt)), (&b"XSDT"[..], 0));
        let mut found = Vec::new();
        for entry in xsdt[36..].chunks_exact(8) {
            let table = table(&image, u64_at(entry, 0));
            assert_eq!(sum(table), 0);
            found.push(String::from_utf8(table[..4].to_vec()).unwrap());
        }
        assert_eq!(found, ["FACP", "APIC", "MCFG"]);
        let fadt = table(&image, u64_at(&xsdt[36..], 0));
        let dsdt = table(&image, u64_at(fadt, 140));
        assert_eq!((&dsdt[..4], sum(dsdt)), (&b"DSDT"[..], 0));
        let facs = u64_at(fadt, 132);
        assert_eq!(facs % 64, 0);
        assert_eq!(&table(&image, facs)[..4], b"FACS");
    }

    #[test]
    fn the_serial_port_is_named_only_where_there_is_one() {
        let named = |image: &[u8]| image.windows(5).any(|bytes| bytes == b"COM1\x08");
        assert!(named(&tables(true)));
        assert!(!named(&tables(false)));
    }

    #[test]
    fn the_fixed_registers_are_where_the_devices_answer() {
        let image = tables(true);
        let xsdt = table(&image, u64_at(&image, 24));
        let fadt = table(&image, u64_at(&xsdt[36..], 0));
        let u32_at =
            |offset: usize| u32::from_le_bytes(fadt[offset..offset + 4].try_into().unwrap());
        // Offsets of ACPI 6.5, table 5.9.
        assert_eq!(u32_at(56), u32::from(layout::PM1_EVENT));
        assert_eq!(u32_at(64), u32::from(layout::PM1_CONTROL));
        assert_eq!(u32_at(76), u32::from(layout::PM_TIMER));
        assert_eq!(fadt[46], layout::SCI_IRQ);
        assert_eq!(
            (fadt[128], u64_at(fadt, 120)),
            (layout::RESET_VALUE, u64::from(layout::RESET_CONTROL))
        );
        let hardware_reduced = 1 << 20;
        let power_button_is_no_fixed_one = 1 << 4;
        assert_eq!(u32_at(112) & (hardware_reduced | power_button_is_no_fixed_one), 0);
    }
}
