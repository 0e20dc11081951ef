//! Loads a 64-bit x86 ELF executable into guest memory, segment by segment.
//!
//! The file may be anything: every offset is checked before it is used. Memory beyond a segment's
//! file data is zeroed, because after a reboot of the guest it holds remains of its last life.

use hypervisor::GuestMemory;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use crate::machine::layout;

/// Why an ELF file cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum ElfError {
    /// Not ELF, or of another class, byte order, machine or type.
    #[error("the kernel is no 64-bit x86 ELF executable: {reason}")]
    NotExecutable {
        /// What was found instead.
        reason: &'static str,
    },
    /// A header or segment reaches beyond the end of the file.
    #[error("the kernel file is cut short: {what} lies beyond its end")]
    CutShort {
        /// What does.
        what: &'static str,
    },
    /// There is nothing to load.
    #[error("the kernel has no loadable segment")]
    NoSegments,
    /// A segment does not fit into the guest's memory.
    #[error(
        "the kernel needs memory from {start:#x} to {end:#x}, which the VM does not have; give it more memory"
    )]
    OutsideMemory {
        /// First byte.
        start: u64,
        /// One past the last.
        end: u64,
    },
    /// A segment lies where the loader keeps its own structures.
    #[error(
        "the kernel wants to be loaded at {start:#x}, below 1 MiB; a Linux kernel for this VM lies above"
    )]
    TooLow {
        /// First byte.
        start: u64,
    },
    /// The entry point lies in no segment.
    #[error("the kernel's entry point {entry:#x} lies outside its segments")]
    BadEntry {
        /// The entry point.
        entry: u64,
    },
}

/// A kernel in guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Loaded {
    /// Guest-physical address of the first instruction.
    pub entry: u64,
    /// One past the last byte it occupies, zeroed memory included.
    pub end: u64,
}

const EHDR_SIZE: usize = 64;
const PHDR_SIZE: usize = 56;
const PT_LOAD: u32 = 1;
const EM_X86_64: u16 = 62;
const ET_EXEC: u16 = 2;

struct Segment {
    offset: u64,
    address: u64,
    file_size: u64,
    memory_size: u64,
}

/// Loads `file`. Physical addresses of the segments are taken as they are.
pub fn load(file: &[u8], memory: &GuestMemory) -> Result<Loaded, ElfError> {
    let (entry, segments) = parse(file)?;
    let mut end = 0;
    let mut entry_found = false;
    for segment in &segments {
        let stop = segment.address.saturating_add(segment.memory_size);
        if segment.address < layout::HIGH_MEMORY {
            return Err(ElfError::TooLow { start: segment.address });
        }
        let outside = ElfError::OutsideMemory { start: segment.address, end: stop };
        let Ok(size) = usize::try_from(segment.memory_size) else { return Err(outside) };
        if !memory.check_range(GuestAddress(segment.address), size) {
            return Err(outside);
        }
        entry_found |= (segment.address..stop).contains(&entry);
        end = end.max(stop);
    }
    if !entry_found {
        return Err(ElfError::BadEntry { entry });
    }
    for segment in &segments {
        write(file, segment, memory).map_err(|_| ElfError::OutsideMemory {
            start: segment.address,
            end: segment.address + segment.memory_size,
        })?;
    }
    Ok(Loaded { entry, end })
}

fn write(
    file: &[u8],
    segment: &Segment,
    memory: &GuestMemory,
) -> Result<(), vm_memory::GuestMemoryError> {
    // `parse` has checked that the range lies in the file.
    let data = &file[segment.offset as usize..][..segment.file_size as usize];
    memory.write_slice(data, GuestAddress(segment.address))?;
    zero(memory, segment.address + segment.file_size, segment.memory_size - segment.file_size)
}

/// Zeroes `size` bytes of guest memory from `address`.
pub fn zero(
    memory: &GuestMemory,
    mut address: u64,
    mut size: u64,
) -> Result<(), vm_memory::GuestMemoryError> {
    const ZEROES: [u8; 4096] = [0; 4096];
    while size > 0 {
        let len = size.min(ZEROES.len() as u64);
        memory.write_slice(&ZEROES[..len as usize], GuestAddress(address))?;
        address += len;
        size -= len;
    }
    Ok(())
}

/// The entry point and the segments to load. ELF-64 object file format, sections 3 and 6.
fn parse(file: &[u8]) -> Result<(u64, Vec<Segment>), ElfError> {
    let not_executable = |reason| Err(ElfError::NotExecutable { reason });
    let Some(header) = file.first_chunk::<EHDR_SIZE>() else {
        return not_executable("the file is too short");
    };
    match header {
        [0x7f, b'E', b'L', b'F', 2, 1, ..] => {}
        [0x7f, b'E', b'L', b'F', 1, ..] => return not_executable("it is a 32-bit one"),
        [0x7f, b'E', b'L', b'F', ..] => return not_executable("it is not little-endian"),
        _ => return not_executable("the ELF magic number is missing"),
    }
    if u16_at(header, 18) != EM_X86_64 {
        return not_executable("it is for another kind of processor");
    }
    if u16_at(header, 16) != ET_EXEC {
        return not_executable("it is an object file or library");
    }
    let entry = u64_at(header, 24);
    let table = usize::try_from(u64_at(header, 32)).unwrap_or(usize::MAX);
    if usize::from(u16_at(header, 54)) != PHDR_SIZE {
        return not_executable("its program headers have an unknown size");
    }
    let count = usize::from(u16_at(header, 56));
    let table = file
        .get(table..)
        .and_then(|rest| rest.get(..count * PHDR_SIZE))
        .ok_or(ElfError::CutShort { what: "the program header table" })?;
    let mut segments = Vec::new();
    for program_header in table.chunks_exact(PHDR_SIZE) {
        let segment = Segment {
            offset: u64_at(program_header, 8),
            address: u64_at(program_header, 24),
            file_size: u64_at(program_header, 32),
            memory_size: u64_at(program_header, 40),
        };
        if u32_at(program_header, 0) != PT_LOAD || segment.memory_size == 0 {
            continue;
        }
        let in_file = segment
            .offset
            .checked_add(segment.file_size)
            .is_some_and(|end| end <= file.len() as u64);
        if !in_file {
            return Err(ElfError::CutShort { what: "a segment" });
        }
        if segment.file_size > segment.memory_size {
            return not_executable("a segment is larger in the file than in memory");
        }
        segments.push(segment);
    }
    if segments.is_empty() {
        return Err(ElfError::NoSegments);
    }
    Ok((entry, segments))
}

fn u16_at(bytes: &[u8], offset: usize) -> u16 {
    u16::from_le_bytes([bytes[offset], bytes[offset + 1]])
}

fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    u32::from(u16_at(bytes, offset)) | u32::from(u16_at(bytes, offset + 2)) << 16
}

fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    u64::from(u32_at(bytes, offset)) | u64::from(u32_at(bytes, offset + 4)) << 32
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::*;

    pub const ENTRY: u64 = 0x20_0000;

    /// An executable with one segment at [`ENTRY`]: `code`, then as many zero bytes.
    pub fn executable(code: &[u8]) -> Vec<u8> {
        let mut file = vec![0; EHDR_SIZE + PHDR_SIZE];
        file[..7].copy_from_slice(&[0x7f, b'E', b'L', b'F', 2, 1, 1]);
        file[16..18].copy_from_slice(&ET_EXEC.to_le_bytes());
        file[18..20].copy_from_slice(&EM_X86_64.to_le_bytes());
        file[24..32].copy_from_slice(&ENTRY.to_le_bytes());
        file[32..40].copy_from_slice(&(EHDR_SIZE as u64).to_le_bytes());
        file[54..56].copy_from_slice(&(PHDR_SIZE as u16).to_le_bytes());
        file[56..58].copy_from_slice(&1u16.to_le_bytes());
        let program_header = &mut file[EHDR_SIZE..];
        program_header[..4].copy_from_slice(&PT_LOAD.to_le_bytes());
        program_header[8..16].copy_from_slice(&((EHDR_SIZE + PHDR_SIZE) as u64).to_le_bytes());
        program_header[24..32].copy_from_slice(&ENTRY.to_le_bytes());
        program_header[32..40].copy_from_slice(&(code.len() as u64).to_le_bytes());
        program_header[40..48].copy_from_slice(&(2 * code.len() as u64).to_le_bytes());
        file.extend(code);
        file
    }

    fn memory() -> GuestMemory {
        GuestMemory::from_ranges(&[(GuestAddress(0), 4 << 20)]).unwrap()
    }

    #[test]
    fn a_segment_is_copied_and_what_follows_it_zeroed() {
        let memory = memory();
        memory.write_slice(&[0xff; 4096], GuestAddress(ENTRY)).unwrap();
        let loaded = load(&executable(b"some code"), &memory).unwrap();
        assert_eq!(loaded, Loaded { entry: ENTRY, end: ENTRY + 18 });
        let mut bytes = [0; 19];
        memory.read_slice(&mut bytes, GuestAddress(ENTRY)).unwrap();
        assert_eq!(&bytes, b"some code\0\0\0\0\0\0\0\0\0\xff");
    }

    #[test]
    fn what_is_wrong_is_named() {
        let memory = memory();
        let good = executable(b"code");
        let with = |offset: usize, bytes: &[u8]| {
            let mut file = good.clone();
            file[offset..offset + bytes.len()].copy_from_slice(bytes);
            load(&file, &memory).unwrap_err()
        };
        assert!(matches!(with(4, &[1]), ElfError::NotExecutable { reason: "it is a 32-bit one" }));
        assert!(matches!(with(18, &[183]), ElfError::NotExecutable { .. }));
        assert!(matches!(
            with(32, &[0xff; 8]),
            ElfError::CutShort { what: "the program header table" }
        ));
        assert!(matches!(
            with(EHDR_SIZE + 8, &[0xff; 8]),
            ElfError::CutShort { what: "a segment" }
        ));
        assert!(matches!(with(EHDR_SIZE + 40, &[0xff; 8]), ElfError::OutsideMemory { .. }));
        assert!(matches!(
            with(EHDR_SIZE + 24, &0x1000u64.to_le_bytes()),
            ElfError::TooLow { start: 0x1000 }
        ));
        assert!(matches!(with(24, &[0; 8]), ElfError::BadEntry { entry: 0 }));
        assert!(matches!(with(56, &[0, 0]), ElfError::NoSegments));
        assert!(matches!(load(b"\x7fELF", &memory), Err(ElfError::NotExecutable { .. })));
    }

    proptest! {
        #[test]
        fn no_file_makes_it_panic(changes in proptest::collection::vec((0usize..120, any::<u8>()), 0..20), cut in 0usize..130) {
            let mut file = executable(b"code and data");
            for (offset, byte) in changes {
                file[offset] = byte;
            }
            file.truncate(cut);
            let _ = load(&file, &memory());
        }
    }
}
