//! What Linux finds in memory when it starts: `boot_params`, GDT and page tables.
//!
//! Documentation/arch/x86/boot.rst, "64-bit boot protocol": paging on with an identity mapping of
//! the kernel, `boot_params` and command line; flat segments with selectors 0x10 and 0x18; interrupts
//! off; RSI holds the address of `boot_params`.

use hypervisor::{GuestMemory, LongModeEntry};
use linux_loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::elf;
use crate::machine::layout;

const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;
/// `type_of_loader`: a loader without a number of its own.
const LOADER_UNDEFINED: u8 = 0xff;

/// What `boot_params` tells the kernel beyond its own header.
pub struct BootInfo {
    /// The kernel's setup header.
    pub header: setup_header,
    /// Bytes of RAM.
    pub ram_size: u64,
    /// Address and size of the initramfs; zero if there is none.
    pub initramfs: (u64, u64),
    /// Length of the command line at [`layout::CMDLINE`].
    pub cmdline_len: u32,
}

/// Writes all of it; the result is where to start.
pub fn write(
    info: &BootInfo,
    entry: u64,
    memory: &GuestMemory,
) -> Result<LongModeEntry, GuestMemoryError> {
    let mut params =
        boot_params { hdr: info.header, acpi_rsdp_addr: layout::ACPI.start, ..Default::default() };
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.cmd_line_ptr = layout::CMDLINE as u32;
    params.hdr.cmdline_size = info.cmdline_len;
    // Below 4 GiB by construction: see `place_initramfs`.
    params.hdr.ramdisk_image = info.initramfs.0 as u32;
    params.hdr.ramdisk_size = info.initramfs.1 as u32;
    let map = memory_map(info.ram_size);
    params.e820_table[..map.len()].copy_from_slice(&map);
    params.e820_entries = map.len() as u8;
    memory
        .write_slice(vm_memory::ByteValued::as_slice(&params), GuestAddress(layout::BOOT_PARAMS))?;

    write_page_tables(memory)?;
    // Null, unused, 64-bit code, data (Intel SDM vol. 3, 3.4.5): flat, present, DPL 0.
    let gdt: [u64; 4] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];
    for (index, descriptor) in gdt.iter().enumerate() {
        memory.write_obj(descriptor.to_le(), GuestAddress(layout::GDT + 8 * index as u64))?;
    }
    Ok(LongModeEntry {
        rip: entry,
        rsp: layout::BOOT_STACK,
        rsi: layout::BOOT_PARAMS,
        cr3: layout::PAGE_TABLES,
        gdt_base: layout::GDT,
        gdt_limit: (size_of_val(&gdt) - 1) as u16,
        code_selector: 0x10,
        data_selector: 0x18,
    })
}

/// The e820 map. What it does not name is free for devices.
fn memory_map(ram_size: u64) -> Vec<boot_e820_entry> {
    let mut map = vec![
        boot_e820_entry { addr: 0, size: layout::LOW_MEMORY_END, r#type: E820_RAM },
        boot_e820_entry {
            addr: layout::ACPI.start,
            size: layout::ACPI.end - layout::ACPI.start,
            r#type: E820_RESERVED,
        },
    ];
    for (start, size) in layout::ram_ranges(ram_size) {
        let from = start.max(layout::HIGH_MEMORY);
        let end = start + size as u64;
        map.push(boot_e820_entry { addr: from, size: end - from, r#type: E820_RAM });
    }
    map.push(boot_e820_entry {
        addr: layout::ECAM.start,
        size: layout::ECAM.end - layout::ECAM.start,
        r#type: E820_RESERVED,
    });
    map
}

/// Maps the first 4 GiB one to one with 2 MiB pages, writable (Intel SDM vol. 3, 4.5).
fn write_page_tables(memory: &GuestMemory) -> Result<(), GuestMemoryError> {
    const PRESENT_WRITABLE: u64 = 0b11;
    const LARGE: u64 = 1 << 7;
    const TABLE: u64 = 4096;
    let pdpt = layout::PAGE_TABLES + TABLE;
    let directories = pdpt + TABLE;
    elf::zero(memory, layout::PAGE_TABLES, 2 * TABLE)?;
    memory.write_obj((pdpt | PRESENT_WRITABLE).to_le(), GuestAddress(layout::PAGE_TABLES))?;
    for gib in 0..4 {
        let directory = directories + gib * TABLE;
        memory.write_obj((directory | PRESENT_WRITABLE).to_le(), GuestAddress(pdpt + 8 * gib))?;
        for page in 0..512 {
            let address = (gib << 30) | (page << 21);
            memory.write_obj(
                (address | LARGE | PRESENT_WRITABLE).to_le(),
                GuestAddress(directory + 8 * page),
            )?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_memory_map_covers_all_ram_but_the_firmware_hole() {
        for size in [128 << 20, 3 << 30, 5 << 30] {
            let map = memory_map(size);
            let ram: u64 = map.iter().filter(|e| e.r#type == E820_RAM).map(|e| e.size).sum();
            assert_eq!(ram, size - (layout::HIGH_MEMORY - layout::LOW_MEMORY_END));
        }
    }

    #[test]
    fn the_page_tables_translate_each_address_to_itself() {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        write_page_tables(&memory).unwrap();
        let entry = |table: u64, index: u64| -> u64 {
            memory.read_obj(GuestAddress(table + 8 * index)).unwrap()
        };
        for address in [0u64, 0x20_0000, 0x1234_5678, 0xffff_ffff] {
            let pdpt = entry(layout::PAGE_TABLES, 0) & !0xfff;
            let directory = entry(pdpt, address >> 30) & !0xfff;
            let page = entry(directory, (address >> 21) & 511);
            assert_eq!(page & 0xfff, 0x83);
            assert_eq!((page & !0xfff) | (address & 0x1f_ffff), address);
        }
        assert_eq!(entry(layout::PAGE_TABLES, 1), 0);
    }
}
