//! What a kernel file is, and the ELF executable in it.

use linux_loader::bootparam::setup_header;

use super::unpack::{self, UnpackError};

/// Why a file is not taken as a kernel.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// Neither bzImage nor ELF.
    #[error("the file is neither a bzImage nor an ELF kernel (vmlinux)")]
    NoKernel,
    /// A bzImage of a boot protocol before 2.08 (Linux 2.6.26) does not say where its payload is.
    #[error("the bzImage has boot protocol {}.{:02}; at least 2.08 is needed", version >> 8, version & 0xff)]
    TooOld {
        /// Protocol version as in the header.
        version: u16,
    },
    /// A 32-bit kernel.
    #[error("the bzImage holds a 32-bit kernel; a 64-bit one (x86-64) is needed")]
    No64Bit,
    /// The payload reaches beyond the end of the file.
    #[error("the bzImage is cut short: its payload should end at byte {end}, the file has {len}")]
    CutShort {
        /// One past the payload.
        end: u64,
        /// Size of the file.
        len: u64,
    },
    /// The payload does not unpack.
    #[error(transparent)]
    Unpack(#[from] UnpackError),
}

/// A kernel ready to be placed in guest memory.
pub struct Kernel {
    /// The ELF executable.
    pub elf: Vec<u8>,
    /// The setup header of the bzImage, or for a bare vmlinux one that says the same.
    pub header: setup_header,
    /// Longest command line the kernel takes, without its final NUL.
    pub cmdline_max: u64,
}

/// Offset of the setup header (Documentation/arch/x86/boot.rst, "The real-mode kernel header").
const HEADER: usize = 0x1f1;
const BOOT_FLAG: u16 = 0xaa55;
const MAGIC: u32 = u32::from_le_bytes(*b"HdrS");
/// Protocol that introduced `payload_offset` and `payload_length`.
const PROTOCOL_PAYLOAD: u16 = 0x208;
/// Protocol that introduced `xloadflags`.
const PROTOCOL_XLOADFLAGS: u16 = 0x20c;
/// `xloadflags`: there is a 64-bit kernel.
const XLF_KERNEL_64: u16 = 1;
/// COMMAND_LINE_SIZE of x86 kernels, NUL included.
const COMMAND_LINE_SIZE: u32 = 2048;
/// `initrd_addr_max` of all 64-bit kernels.
const INITRD_ADDR_MAX: u32 = 0x7fff_ffff;
/// CONFIG_PHYSICAL_ALIGN of 64-bit kernels.
const KERNEL_ALIGNMENT: u32 = 0x20_0000;

/// Takes `file` apart; the unpacked kernel has `limit` bytes at most.
pub fn parse(file: Vec<u8>, limit: u64) -> Result<Kernel, KernelError> {
    if file.starts_with(b"\x7fELF") {
        let header = setup_header {
            boot_flag: BOOT_FLAG,
            header: MAGIC,
            version: PROTOCOL_XLOADFLAGS,
            kernel_alignment: KERNEL_ALIGNMENT,
            initrd_addr_max: INITRD_ADDR_MAX,
            cmdline_size: COMMAND_LINE_SIZE - 1,
            xloadflags: XLF_KERNEL_64,
            ..Default::default()
        };
        return Ok(Kernel { elf: file, header, cmdline_max: u64::from(COMMAND_LINE_SIZE - 1) });
    }
    let header = read_header(&file).ok_or(KernelError::NoKernel)?;
    let version = header.version;
    if version < PROTOCOL_PAYLOAD {
        return Err(KernelError::TooOld { version });
    }
    if version >= PROTOCOL_XLOADFLAGS && header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(KernelError::No64Bit);
    }
    // A count of zero means four, for the sake of the oldest kernels.
    let sectors = if header.setup_sects == 0 { 4 } else { u64::from(header.setup_sects) };
    let start = (sectors + 1) * 512 + u64::from(header.payload_offset);
    let end = start + u64::from(header.payload_length);
    let len = file.len() as u64;
    if end > len {
        return Err(KernelError::CutShort { end, len });
    }
    let elf = unpack::unpack(&file[start as usize..end as usize], limit)?;
    Ok(Kernel { elf, header, cmdline_max: u64::from(header.cmdline_size) })
}

/// The header, as far as the file's own header reaches (it says so itself, in the jump over it).
fn read_header(file: &[u8]) -> Option<setup_header> {
    let start = file.get(HEADER..)?;
    let size = size_of::<setup_header>();
    let present = (0x202 - HEADER) + usize::from(*file.get(0x201)?);
    let mut header = setup_header::default();
    let bytes = vm_memory::ByteValued::as_mut_slice(&mut header);
    let known = present.min(size);
    bytes[..known].copy_from_slice(start.get(..known)?);
    (header.boot_flag == BOOT_FLAG && header.header == MAGIC).then_some(header)
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::super::unpack::tests::pack;
    use super::*;

    /// A bzImage around `payload`.
    pub fn bzimage(payload: &[u8]) -> Vec<u8> {
        let header = setup_header {
            setup_sects: 1,
            boot_flag: BOOT_FLAG,
            jump: 0x66eb,
            header: MAGIC,
            version: 0x20f,
            xloadflags: XLF_KERNEL_64,
            kernel_alignment: KERNEL_ALIGNMENT,
            initrd_addr_max: INITRD_ADDR_MAX,
            cmdline_size: COMMAND_LINE_SIZE - 1,
            payload_offset: 16,
            payload_length: u32::try_from(payload.len()).unwrap(),
            ..Default::default()
        };
        let mut file = vec![0; 1024 + 16];
        file[HEADER..HEADER + size_of::<setup_header>()]
            .copy_from_slice(vm_memory::ByteValued::as_slice(&header));
        file.extend(payload);
        file.extend([0xee; 100]);
        file
    }

    #[test]
    fn a_bzimage_of_each_format_gives_its_elf() {
        let elf = super::super::elf::tests::executable(b"code");
        for format in ["none", "gzip", "xz", "lzma", "zstd", "lz4"] {
            let kernel = parse(bzimage(&pack(format, &elf)), 1 << 20).unwrap();
            assert!(kernel.elf == elf, "{format}");
            assert_eq!(kernel.cmdline_max, 2047);
        }
        assert!(parse(elf.clone(), 1 << 20).unwrap().elf == elf);
    }

    #[test]
    fn what_is_no_kernel_is_refused_with_the_reason() {
        let good = bzimage(&pack("gzip", b"\x7fELF"));
        let with = |offset: usize, bytes: &[u8]| {
            let mut file = good.clone();
            file[offset..offset + bytes.len()].copy_from_slice(bytes);
            parse(file, 1 << 20).err().unwrap()
        };
        assert!(matches!(with(0x1fe, &[0]), KernelError::NoKernel));
        assert!(matches!(with(0x202, &[0]), KernelError::NoKernel));
        assert!(matches!(with(0x206, &[7, 2]), KernelError::TooOld { version: 0x207 }));
        assert!(matches!(with(0x236, &[0]), KernelError::No64Bit));
        assert!(matches!(with(0x24c, &[0xff; 4]), KernelError::CutShort { .. }));
        assert!(matches!(with(0x24c, &[3, 0, 0, 0]), KernelError::Unpack(_)));
        assert!(matches!(parse(b"#!/bin/sh".to_vec(), 1 << 20), Err(KernelError::NoKernel)));
        assert!(matches!(parse(Vec::new(), 1 << 20), Err(KernelError::NoKernel)));
    }

    proptest! {
        #[test]
        fn no_file_makes_it_panic(changes in proptest::collection::vec((0x1f0usize..0x280, any::<u8>()), 0..12), cut in 0usize..1200) {
            let mut file = bzimage(&pack("lz4", &[7; 300]));
            for (offset, byte) in changes {
                file[offset] = byte;
            }
            file.truncate(cut);
            let _ = parse(file, 1 << 16);
        }
    }
}
