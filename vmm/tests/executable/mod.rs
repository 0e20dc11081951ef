//! Guests of a few instructions, in the form of a kernel.

/// Where the guest of [`executable`] starts, and where it is loaded.
const ENTRY: u64 = 0x20_0000;

/// An ELF executable of one segment, as a kernel would be.
pub fn executable(code: &[u8]) -> Vec<u8> {
    let (header, entry) = (64u64, ENTRY.to_le_bytes());
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(16, 0);
    file.extend([2, 0, 62, 0, 1, 0, 0, 0]); // ET_EXEC, EM_X86_64
    file.extend(entry);
    file.extend(header.to_le_bytes());
    file.extend([0; 8 + 4]);
    file.extend([64, 0, 56, 0, 1, 0, 0, 0, 0, 0, 0, 0]); // one program header of 56 bytes
    file.extend([1, 0, 0, 0, 7, 0, 0, 0]); // PT_LOAD
    file.extend((header + 56).to_le_bytes());
    file.extend(entry);
    file.extend(entry);
    for _ in ["in the file", "in memory"] {
        file.extend((code.len() as u64).to_le_bytes());
    }
    file.extend(4096u64.to_le_bytes());
    file.extend(code);
    file
}
