//! Puts a kernel into guest memory so that the processor can start it.
//!
//! bzImage files are unpacked here, on the host; what runs is always the ELF kernel inside, entered at
//! its 64-bit entry point. Nothing here depends on the host but the files themselves, and the same
//! files give the same memory, byte for byte.

mod elf;
mod kernel;
mod linux;
mod unpack;

use std::io::Read;
use std::path::{Path, PathBuf};

use hypervisor::{GuestMemory, LongModeEntry};
use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion};

pub use elf::ElfError;
pub use kernel::KernelError;
pub use unpack::UnpackError;

use crate::machine::layout;
use crate::regular_file;

/// Why a guest cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The kernel or initramfs cannot be read.
    #[error("cannot read {what} {}", path.display())]
    Read {
        /// `kernel` or `initramfs`.
        what: &'static str,
        /// Its path.
        path: PathBuf,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// It is a directory, a device or a pipe.
    #[error("{what} {} is not a regular file", path.display())]
    Kind {
        /// `kernel` or `initramfs`.
        what: &'static str,
        /// Its path.
        path: PathBuf,
    },
    /// The file is larger than the guest's memory.
    #[error("{what} {} does not fit into {ram_size} bytes of memory", path.display())]
    FileTooLarge {
        /// `kernel` or `initramfs`.
        what: &'static str,
        /// Its path.
        path: PathBuf,
        /// Bytes of RAM.
        ram_size: u64,
    },
    /// The file is no kernel this machine can start.
    #[error("cannot boot {}", path.display())]
    Kernel {
        /// Its path.
        path: PathBuf,
        /// What is wrong.
        #[source]
        source: KernelError,
    },
    /// The kernel in the file cannot be placed in memory.
    #[error("cannot load {}", path.display())]
    Elf {
        /// Its path.
        path: PathBuf,
        /// What is wrong.
        #[source]
        source: ElfError,
    },
    /// The command line is longer than the kernel takes.
    #[error("the kernel command line has {len} bytes; this kernel takes {max} at most")]
    CmdlineTooLong {
        /// Its length.
        len: u64,
        /// The most allowed.
        max: u64,
    },
    /// The command line has a NUL byte.
    #[error("the kernel command line has a NUL byte at {position}")]
    CmdlineNul {
        /// Where.
        position: usize,
    },
    /// There is no room for the initramfs above the kernel.
    #[error(
        "no room for an initramfs of {size} bytes between the kernel's end at {kernel_end:#x} and {limit:#x}; give the VM more memory"
    )]
    InitramfsPlace {
        /// Its size.
        size: u64,
        /// Where the kernel ends.
        kernel_end: u64,
        /// Where the initramfs must end.
        limit: u64,
    },
    /// The guest has too little memory for what every guest needs.
    #[error("the VM's memory is too small to boot anything; give it at least 64 MiB")]
    Memory(#[source] GuestMemoryError),
}

/// What a guest boots from, and boots from again at every reset. Kept in memory, because both sides of a
/// protected pair must reboot from the same bytes without asking a file system.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Payload {
    /// The kernel.
    pub kernel: BootFile,
    /// The initial RAM file system.
    pub initramfs: Option<BootFile>,
    /// The kernel command line.
    pub cmdline: String,
}

/// A file as it was read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BootFile {
    /// Where it was read from, for error messages.
    pub path: PathBuf,
    /// What it held.
    pub content: Vec<u8>,
}

impl Payload {
    /// Reads the files for a guest with `ram_size` bytes of memory.
    pub fn read(
        kernel: &Path,
        initramfs: Option<&Path>,
        cmdline: &str,
        ram_size: u64,
    ) -> Result<Self, LoadError> {
        Ok(Self {
            kernel: read_file("kernel", kernel, ram_size)?,
            initramfs: initramfs.map(|path| read_file("initramfs", path, ram_size)).transpose()?,
            cmdline: cmdline.to_owned(),
        })
    }
}

/// Loads kernel, initramfs and command line. ACPI tables are not written here.
pub fn load(memory: &GuestMemory, payload: &Payload) -> Result<LongModeEntry, LoadError> {
    let ram_size = memory.iter().map(GuestMemoryRegion::len).sum();
    let path = &payload.kernel.path;
    let kernel = kernel::parse(payload.kernel.content.clone(), ram_size)
        .map_err(|source| LoadError::Kernel { path: path.clone(), source })?;
    let loaded = elf::load(&kernel.elf, memory)
        .map_err(|source| LoadError::Elf { path: path.clone(), source })?;
    let cmdline_len = write_cmdline(memory, &payload.cmdline, kernel.cmdline_max)?;

    let mut initramfs = (0, 0);
    if let Some(file) = &payload.initramfs {
        let size = file.content.len() as u64;
        let limit = ram_size
            .min(layout::LOW_RAM_END)
            .min(u64::from(kernel.header.initrd_addr_max).saturating_add(1));
        let address = place_initramfs(size, loaded.end, limit)?;
        memory.write_slice(&file.content, GuestAddress(address)).map_err(LoadError::Memory)?;
        initramfs = (address, size);
    }
    let info = linux::BootInfo { header: kernel.header, ram_size, initramfs, cmdline_len };
    linux::write(&info, loaded.entry, memory).map_err(LoadError::Memory)
}

/// Reads a regular file of at most `ram_size` bytes, so that a wrong path (a disk image, a device) costs no more.
fn read_file(what: &'static str, path: &Path, ram_size: u64) -> Result<BootFile, LoadError> {
    let failed = |source| LoadError::Read { what, path: path.to_owned(), source };
    let file = regular_file::open(path).map_err(failed)?;
    let file = file.ok_or_else(|| LoadError::Kind { what, path: path.to_owned() })?;
    let mut content = Vec::new();
    file.take(ram_size + 1).read_to_end(&mut content).map_err(failed)?;
    if content.len() as u64 > ram_size {
        return Err(LoadError::FileTooLarge { what, path: path.to_owned(), ram_size });
    }
    Ok(BootFile { path: path.to_owned(), content })
}

fn write_cmdline(memory: &GuestMemory, cmdline: &str, kernel_max: u64) -> Result<u32, LoadError> {
    let max = kernel_max.min(layout::CMDLINE_ROOM - 1);
    let len = cmdline.len() as u64;
    if len > max {
        return Err(LoadError::CmdlineTooLong { len, max });
    }
    if let Some(position) = cmdline.bytes().position(|byte| byte == 0) {
        return Err(LoadError::CmdlineNul { position });
    }
    let bytes = [cmdline.as_bytes(), &[0]].concat();
    memory.write_slice(&bytes, GuestAddress(layout::CMDLINE)).map_err(LoadError::Memory)?;
    Ok(len as u32)
}

/// As high as possible, on a page boundary, above the kernel.
fn place_initramfs(size: u64, kernel_end: u64, limit: u64) -> Result<u64, LoadError> {
    limit
        .checked_sub(size)
        .map(|start| start & !0xfff)
        .filter(|&start| start >= kernel_end)
        .ok_or(LoadError::InitramfsPlace { size, kernel_end, limit })
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn memory() -> GuestMemory {
        GuestMemory::from_ranges(&[(GuestAddress(0), 64 << 20)]).unwrap()
    }

    fn file(content: &[u8]) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(content).unwrap();
        file
    }

    fn load(
        memory: &GuestMemory,
        kernel: &Path,
        initramfs: Option<&Path>,
        cmdline: &str,
    ) -> Result<LongModeEntry, LoadError> {
        let ram_size = memory.iter().map(GuestMemoryRegion::len).sum();
        super::load(memory, &Payload::read(kernel, initramfs, cmdline, ram_size)?)
    }

    fn read(memory: &GuestMemory, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    #[test]
    fn a_bzimage_with_initramfs_is_ready_to_start() {
        let memory = memory();
        let elf = elf::tests::executable(b"code");
        let kernel = file(&kernel::tests::bzimage(&unpack::tests::pack("lz4", &elf)));
        let initramfs = file(&[7; 5000]);
        let entry = load(&memory, kernel.path(), Some(initramfs.path()), "console=ttyS0").unwrap();
        assert_eq!(entry.rip, elf::tests::ENTRY);
        assert_eq!(entry.rsi, layout::BOOT_PARAMS);
        assert_eq!(read(&memory, entry.rip, 4), b"code");
        assert_eq!(read(&memory, layout::CMDLINE, 14), b"console=ttyS0\0");
        // Fields at their offsets in Documentation/arch/x86/zero-page.rst.
        let params = read(&memory, layout::BOOT_PARAMS, 4096);
        let u32_at =
            |offset: usize| u32::from_le_bytes(params[offset..offset + 4].try_into().unwrap());
        assert_eq!(&params[0x202..0x206], b"HdrS");
        assert_eq!(params[0x210], 0xff);
        assert_eq!(u64::from(u32_at(0x228)), layout::CMDLINE);
        assert_eq!(u64::from(u32_at(0x70)), layout::ACPI.start);
        assert_eq!(u32_at(0x21c), 5000);
        assert_eq!(read(&memory, u64::from(u32_at(0x218)), 5000), [7; 5000]);
        assert_eq!(params[0x1e8], 4);
    }

    #[test]
    fn files_that_cannot_be_used_are_named() {
        let memory = memory();
        let kernel = file(&elf::tests::executable(b"code"));
        let text = |result: Result<LongModeEntry, LoadError>| result.unwrap_err().to_string();
        let missing = Path::new("/nonexistent/vmlinuz");
        assert!(text(load(&memory, missing, None, "")).contains("/nonexistent/vmlinuz"));
        assert!(
            text(load(&memory, kernel.path(), Some(missing), ""))
                .contains("initramfs /nonexistent")
        );
        assert!(matches!(
            load(&memory, file(b"text").path(), None, ""),
            Err(LoadError::Kernel { .. })
        ));
        assert!(matches!(
            load(&memory, file(b"\x7fELF").path(), None, ""),
            Err(LoadError::Elf { .. })
        ));
        let huge = file(b"");
        huge.as_file().set_len((64 << 20) + 1).unwrap();
        assert!(matches!(
            load(&memory, huge.path(), None, ""),
            Err(LoadError::FileTooLarge { .. })
        ));
        let long = "x".repeat(2048);
        assert!(matches!(
            load(&memory, kernel.path(), None, &long),
            Err(LoadError::CmdlineTooLong { len: 2048, max: 2047 })
        ));
        assert!(matches!(
            load(&memory, kernel.path(), None, "a\0b"),
            Err(LoadError::CmdlineNul { position: 1 })
        ));
        let large = file(&vec![1; 63 << 20]);
        assert!(matches!(
            load(&memory, kernel.path(), Some(large.path()), ""),
            Err(LoadError::InitramfsPlace { .. })
        ));
    }

    #[test]
    fn what_is_no_file_is_refused_and_waited_for_by_nobody() {
        let memory = memory();
        let kernel = file(&elf::tests::executable(b"code"));
        let directory = tempfile::tempdir().unwrap();
        let pipe = directory.path().join("pipe");
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
        for path in [pipe.as_path(), directory.path(), Path::new("/dev/zero")] {
            let error = load(&memory, path, None, "").unwrap_err();
            assert!(matches!(error, LoadError::Kind { what: "kernel", .. }), "{error}");
            let error = load(&memory, kernel.path(), Some(path), "").unwrap_err();
            assert!(matches!(error, LoadError::Kind { what: "initramfs", .. }), "{error}");
            assert!(error.to_string().contains(&path.display().to_string()), "{error}");
        }
    }
}
