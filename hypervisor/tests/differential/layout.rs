//! Where things are, in the guest and in this process alike: both see the same linear addresses, so that an instruction
//! with an address in it does the same in both.

/// Start of the region. Below 4 GiB, so that 32-bit addresses reach it.
pub const BASE: u64 = 0x3000_0000;

/// The guest's kernel: entry, exception stubs.
pub const KERNEL: u64 = BASE;
/// The guest's descriptor table.
pub const GDT: u64 = BASE + 0x2000;
/// The guest's task state segment.
pub const TSS: u64 = BASE + 0x2800;
/// What LIDT loads.
pub const IDT_POINTER: u64 = BASE + 0x2f00;
/// The guest's interrupt descriptor table.
pub const IDT: u64 = BASE + 0x3000;
/// The register image to start from.
pub const INPUT: u64 = BASE + 0x4000;
/// The register image found afterwards.
pub const OUTPUT: u64 = BASE + 0x5000;
/// Words of this test's own: saved stack pointer, addresses of the two epilogues.
pub const PRIVATE: u64 = BASE + 0x5800;
/// End of the stack the prologue and the guest's kernel use.
pub const STACK_END: u64 = BASE + 0x8000;
/// Two pages for the instruction under test and what follows it.
pub const CODE: u64 = BASE + 0x8000;
/// Bytes of it.
pub const CODE_BYTES: usize = 0x2000;
/// Two pages that memory operands lie in; around them nothing is mapped.
pub const SCRATCH: u64 = BASE + 0xc000;
/// Bytes of it.
pub const SCRATCH_BYTES: usize = 0x2000;
/// The guest's page tables: top level, then one of each, then one last-level table for the region.
pub const TABLES: u64 = BASE + 0x10000;
/// Bytes of guest memory in all.
pub const REGION_BYTES: usize = 0x20000;

/// Offsets in the images.
pub mod image {
    /// RFLAGS, behind the sixteen general registers.
    pub const FLAGS: usize = 128;
    /// Input: the instruction's address. Output: where it ended.
    pub const RIP: usize = 136;
    /// Input: the GS base.
    pub const GS_BASE: usize = 144;
    /// Output: the vector of the exception; [`super::FELL_THROUGH`] or [`super::BRANCHED`] if there was none.
    pub const VECTOR: usize = 144;
    /// Output: its error code.
    pub const ERROR: usize = 152;
    /// Output: CR2.
    pub const CR2: usize = 160;
    /// The FXSAVE image.
    pub const FX: usize = 256;
    /// Bytes of an image.
    pub const BYTES: usize = 768;
}

/// The instruction was followed by the next one.
pub const FELL_THROUGH: u64 = 0x80;
/// It went to the branch target.
pub const BRANCHED: u64 = 0x81;
