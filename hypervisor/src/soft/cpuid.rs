//! The CPU model: what CPUID answers, on every host.
//!
//! | | |
//! | --- | --- |
//! | Vendor, family, model, stepping | GenuineIntel, 6, 28, 10 |
//! | Instructions | x86-64-v2: x87, MMX, SSE to SSE4.2, POPCNT, CMPXCHG16B, LAHF; FSGSBASE, RDTSCP, fast REP MOVSB/STOSB |
//! | Paging | 4 levels; 4 KiB, 2 MiB, 1 GiB pages; NX, SMEP, SMAP, global pages; 46-bit physical addresses |
//! | Time | 1 GHz invariant TSC from a 25 MHz crystal, TSC_ADJUST, TSC-deadline timer that never stops |
//! | Interrupts | xAPIC |
//! | Absent | AVX, XSAVE, AES, RDRAND, MONITOR, SYSENTER, PCID, x2APIC, virtual-8086, performance counters |
//!
//! Model 28 is an Atom that executes in order and does not speculate. Neither does an interpreter,
//! and a guest that recognises the model leaves out its mitigations for speculation, which would
//! cost instructions and protect from nothing. `IA32_ARCH_CAPABILITIES` says the same to those who
//! look there.
//!
//! RDRAND and RDSEED would be inputs that no log holds; entropy comes as an event, through virtio-rng.

use super::irqchip::timer::CRYSTAL_HZ;
use super::paging::PHYSICAL_ADDRESS_BITS;
use crate::clock::TSC_HZ;

/// Width of linear addresses.
const LINEAR_ADDRESS_BITS: u32 = 48;

/// Family 6, extended model 1, model 12, stepping 10.
const SIGNATURE: u32 = 0x0001_06ca;

const MAX_BASIC_LEAF: u32 = 0x16;
const MAX_HYPERVISOR_LEAF: u32 = 0x4000_0000;
const MAX_EXTENDED_LEAF: u32 = 0x8000_0008;

/// 48 characters, the last of them zero.
const BRAND: &[u8; 48] = b"Dyad software processor @ 1.00GHz\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0";

mod leaf1 {
    pub const ECX: u32 = SSE3 | SSSE3 | CX16 | SSE41 | SSE42 | POPCNT | TSC_DEADLINE | HYPERVISOR;
    const SSE3: u32 = 1 << 0;
    const SSSE3: u32 = 1 << 9;
    const CX16: u32 = 1 << 13;
    const SSE41: u32 = 1 << 19;
    const SSE42: u32 = 1 << 20;
    const POPCNT: u32 = 1 << 23;
    const TSC_DEADLINE: u32 = 1 << 24;
    const HYPERVISOR: u32 = 1 << 31;

    pub const EDX: u32 = FPU
        | DE
        | PSE
        | TSC
        | MSR
        | PAE
        | MCE
        | CX8
        | MTRR
        | PGE
        | MCA
        | CMOV
        | PAT
        | PSE36
        | CLFSH
        | MMX
        | FXSR
        | SSE
        | SSE2
        | SS;
    const FPU: u32 = 1 << 0;
    const DE: u32 = 1 << 2;
    const PSE: u32 = 1 << 3;
    const TSC: u32 = 1 << 4;
    const MSR: u32 = 1 << 5;
    const PAE: u32 = 1 << 6;
    const MCE: u32 = 1 << 7;
    const CX8: u32 = 1 << 8;
    /// Set only while `IA32_APIC_BASE` enables the APIC.
    pub const APIC: u32 = 1 << 9;
    const MTRR: u32 = 1 << 12;
    const PGE: u32 = 1 << 13;
    const MCA: u32 = 1 << 14;
    const CMOV: u32 = 1 << 15;
    const PAT: u32 = 1 << 16;
    const PSE36: u32 = 1 << 17;
    const CLFSH: u32 = 1 << 19;
    const MMX: u32 = 1 << 23;
    const FXSR: u32 = 1 << 24;
    const SSE: u32 = 1 << 25;
    const SSE2: u32 = 1 << 26;
    /// Self-snoop: memory types never need cache flushes.
    const SS: u32 = 1 << 27;
}

mod leaf7 {
    pub const EBX: u32 = FSGSBASE | TSC_ADJUST | SMEP | ERMS | NO_FCS_FDS | SMAP;
    const FSGSBASE: u32 = 1 << 0;
    const TSC_ADJUST: u32 = 1 << 1;
    const SMEP: u32 = 1 << 7;
    const ERMS: u32 = 1 << 9;
    /// The x87's instruction and data pointers have no selectors.
    const NO_FCS_FDS: u32 = 1 << 13;
    const SMAP: u32 = 1 << 20;

    pub const EDX: u32 = FSRM | ARCH_CAPABILITIES;
    const FSRM: u32 = 1 << 4;
    const ARCH_CAPABILITIES: u32 = 1 << 29;
}

mod extended1 {
    pub const ECX: u32 = LAHF;
    const LAHF: u32 = 1 << 0;

    pub const EDX: u32 = SYSCALL | NX | PAGE_1G | RDTSCP | LM;
    const SYSCALL: u32 = 1 << 11;
    const NX: u32 = 1 << 20;
    const PAGE_1G: u32 = 1 << 26;
    const RDTSCP: u32 = 1 << 27;
    const LM: u32 = 1 << 29;
}

/// What CPUID leaves in the registers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Leaf {
    /// EAX.
    pub eax: u32,
    /// EBX.
    pub ebx: u32,
    /// ECX.
    pub ecx: u32,
    /// EDX.
    pub edx: u32,
}

impl Leaf {
    const fn new(eax: u32, ebx: u32, ecx: u32, edx: u32) -> Self {
        Self { eax, ebx, ecx, edx }
    }
}

/// The answer to CPUID with EAX = `leaf`, ECX = `subleaf`, on the processor with this APIC id.
#[must_use]
pub fn cpuid(leaf: u32, subleaf: u32, apic_id: u8, apic_enabled: bool) -> Leaf {
    match leaf {
        0..=MAX_BASIC_LEAF => basic(leaf, subleaf, apic_id, apic_enabled),
        // "DyadDyadDyad"; no leaves beyond the signature.
        MAX_HYPERVISOR_LEAF => {
            let word = u32::from_le_bytes(*b"Dyad");
            Leaf::new(MAX_HYPERVISOR_LEAF, word, word, word)
        }
        // Monitors of other makes are looked for at these leaves, and must not be found.
        0x4000_0001..=0x4fff_ffff => Leaf::default(),
        0x8000_0000..=MAX_EXTENDED_LEAF => extended(leaf),
        // Beyond the last leaf, Intel processors answer for the highest basic one (SDM vol. 2, CPUID).
        _ => basic(MAX_BASIC_LEAF, subleaf, apic_id, apic_enabled),
    }
}

fn basic(leaf: u32, subleaf: u32, apic_id: u8, apic_enabled: bool) -> Leaf {
    match leaf {
        0 => Leaf::new(
            MAX_BASIC_LEAF,
            u32::from_le_bytes(*b"Genu"),
            u32::from_le_bytes(*b"ntel"),
            u32::from_le_bytes(*b"ineI"),
        ),
        1 => {
            let apic = if apic_enabled { leaf1::APIC } else { 0 };
            // APIC id; one logical processor; CLFLUSH of 8 quadwords.
            let ebx = u32::from(apic_id) << 24 | 1 << 16 | 8 << 8;
            Leaf::new(SIGNATURE, ebx, leaf1::ECX, leaf1::EDX | apic)
        }
        // 0xff: caches are described by leaf 4.
        2 => Leaf::new(0x00ff_ff01, 0, 0, 0),
        4 => cache(subleaf),
        // ARAT: the APIC timer runs in every sleep state.
        6 => Leaf::new(1 << 2, 0, 0, 0),
        7 if subleaf == 0 => Leaf::new(0, leaf7::EBX, 0, leaf7::EDX),
        0xb => topology(subleaf, apic_id),
        // TSC frequency = crystal * EBX / EAX.
        0x15 => Leaf::new(1, (TSC_HZ / CRYSTAL_HZ) as u32, CRYSTAL_HZ as u32, 0),
        // Base, maximum and bus frequency in MHz.
        0x16 => {
            let mhz = (TSC_HZ / 1_000_000) as u32;
            Leaf::new(mhz, mhz, (CRYSTAL_HZ / 1_000_000) as u32, 0)
        }
        _ => Leaf::default(),
    }
}

/// Deterministic cache parameters. The caches do not exist; the sizes steer software: with a large
/// last level, glibc copies with REP MOVSB instead of streaming stores.
fn cache(subleaf: u32) -> Leaf {
    const DATA: u32 = 1;
    const INSTRUCTION: u32 = 2;
    const UNIFIED: u32 = 3;
    let (kind, level, ways, sets) = match subleaf {
        0 => (DATA, 1, 8, 64),
        1 => (INSTRUCTION, 1, 8, 64),
        2 => (UNIFIED, 2, 16, 1024),
        3 => (UNIFIED, 3, 16, 32768),
        _ => return Leaf::default(),
    };
    const SELF_INITIALIZING: u32 = 1 << 8;
    // 64-byte lines, one partition.
    Leaf::new(kind | level << 5 | SELF_INITIALIZING, (ways - 1) << 22 | 63, sets - 1, 0)
}

/// Extended topology: one thread in one core.
fn topology(subleaf: u32, apic_id: u8) -> Leaf {
    let id = u32::from(apic_id);
    match subleaf {
        0 => Leaf::new(0, 1, 1 << 8, id),
        1 => Leaf::new(0, 1, 2 << 8 | 1, id),
        _ => Leaf::new(0, 0, subleaf & 0xff, id),
    }
}

fn extended(leaf: u32) -> Leaf {
    match leaf {
        0x8000_0000 => Leaf::new(MAX_EXTENDED_LEAF, 0, 0, 0),
        0x8000_0001 => Leaf::new(0, 0, extended1::ECX, extended1::EDX),
        0x8000_0002..=0x8000_0004 => {
            let start = (leaf - 0x8000_0002) as usize * 16;
            let word = |index: usize| {
                let at = start + index * 4;
                u32::from_le_bytes([BRAND[at], BRAND[at + 1], BRAND[at + 2], BRAND[at + 3]])
            };
            Leaf::new(word(0), word(1), word(2), word(3))
        }
        // 1 MiB of second-level cache, 16 ways, 64-byte lines.
        0x8000_0006 => Leaf::new(0, 0, 1024 << 16 | 8 << 12 | 64, 0),
        // Invariant TSC.
        0x8000_0007 => Leaf::new(0, 0, 0, 1 << 8),
        0x8000_0008 => Leaf::new(PHYSICAL_ADDRESS_BITS | LINEAR_ADDRESS_BITS << 8, 0, 0, 0),
        _ => Leaf::default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(leaf: u32, subleaf: u32) -> Leaf {
        cpuid(leaf, subleaf, 0, true)
    }

    #[test]
    fn the_tsc_frequency_follows_from_leaf_0x15() {
        let leaf = at(0x15, 0);
        assert_eq!(u64::from(leaf.ecx) * u64::from(leaf.ebx) / u64::from(leaf.eax), TSC_HZ);
    }

    #[test]
    fn leaves_beyond_the_last_answer_like_the_last() {
        assert_eq!(at(0x17, 0), at(0x16, 0));
        assert_eq!(at(0x8000_0009, 0), at(0x16, 0));
        assert_eq!(at(u32::MAX, 0), at(0x16, 0));
    }

    #[test]
    fn no_other_monitor_is_found() {
        assert_eq!(at(0x4000_0000, 0).ebx.to_le_bytes(), *b"Dyad");
        assert_eq!(at(0x4000_0100, 0), Leaf::default());
    }

    #[test]
    fn the_apic_bit_follows_the_apic() {
        assert_ne!(at(1, 0).edx & leaf1::APIC, 0);
        assert_eq!(cpuid(1, 0, 0, false).edx & leaf1::APIC, 0);
    }
}
