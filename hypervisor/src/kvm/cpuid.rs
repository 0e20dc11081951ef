//! The processor model: what the host's processor and KVM support, as a package of one core and one thread.
//!
//! A state saved under this model can be restored only on hosts that offer at least as much. What differs from
//! `KVM_GET_SUPPORTED_CPUID`: APIC ids and topology, which KVM reports as the host's; the hypervisor bit, and
//! the TSC-deadline timer, which the in-kernel LAPIC has (KVM reports it as a capability instead).

use kvm_bindings::{CpuId, kvm_cpuid_entry2};

/// Leaf 1, ECX: the LAPIC timer can be set to a TSC value.
const TSC_DEADLINE: u32 = 1 << 24;
/// Leaf 1, ECX: runs under a hypervisor.
const HYPERVISOR: u32 = 1 << 31;
/// Leaf 1, EDX: the package has room for several logical processors.
const HTT: u32 = 1 << 28;
/// Leaf 1, EBX: size of a cache line in CLFLUSH units, and brand index.
const KEPT_EBX: u32 = 0x0000_ffff;

/// Makes the `supported` leaves those of the vCPU with APIC id `id`.
pub(super) fn adapt(supported: &mut CpuId, id: u8, tsc_deadline: bool) {
    let id = u32::from(id);
    for entry in supported.as_mut_slice() {
        adapt_leaf(entry, id, tsc_deadline);
    }
}

/// Intel SDM vol. 2A, CPUID; AMD APM vol. 3, appendix E for 0x8000_00xx.
fn adapt_leaf(entry: &mut kvm_cpuid_entry2, id: u32, tsc_deadline: bool) {
    match entry.function {
        1 => {
            entry.ebx = (entry.ebx & KEPT_EBX) | 1 << 16 | id << 24;
            entry.ecx |= HYPERVISOR;
            if tsc_deadline {
                entry.ecx |= TSC_DEADLINE;
            }
            entry.edx &= !HTT;
        }
        // Caches: EAX 31:26 cores in the package, 25:14 processors sharing the cache, each less one.
        4 => entry.eax &= 0x3fff,
        // Extended topology: the thread level and the core level hold one processor each, and no bit of
        // the x2APIC id tells them apart.
        0xb | 0x1f => {
            entry.eax = 0;
            entry.edx = id;
            let level_type = match entry.index {
                0 => 1,
                1 => 2,
                _ => 0,
            };
            entry.ebx = u32::from(level_type != 0);
            entry.ecx = entry.index | level_type << 8;
        }
        // AMD: ECX 15:12 width of the core id, 7:0 cores less one.
        0x8000_0008 => entry.ecx &= !0xf0ff,
        // AMD cache topology: as leaf 4.
        0x8000_001d => entry.eax &= 0x3fff,
        // AMD: extended APIC id; core id and threads per core less one; node id and nodes less one.
        0x8000_001e => {
            entry.eax = id;
            entry.ebx = id & 0xff;
            entry.ecx = 0;
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn adapted(function: u32, index: u32, value: u32) -> kvm_cpuid_entry2 {
        let mut entry = kvm_cpuid_entry2 {
            function,
            index,
            eax: value,
            ebx: value,
            ecx: value,
            edx: value,
            ..Default::default()
        };
        adapt_leaf(&mut entry, 3, true);
        entry
    }

    #[test]
    fn the_package_has_one_processor_with_its_id() {
        let one = adapted(1, 0, 0x0a0b_080c & !(TSC_DEADLINE | HYPERVISOR));
        assert_eq!(one.ebx, 0x0301_080c);
        assert_eq!(one.ecx & (TSC_DEADLINE | HYPERVISOR), TSC_DEADLINE | HYPERVISOR);
        assert_eq!(adapted(1, 0, u32::MAX).edx & HTT, 0);
        assert_eq!(adapted(4, 2, u32::MAX).eax, 0x3fff);
        let threads = adapted(0xb, 0, 77);
        assert_eq!((threads.eax, threads.ebx, threads.ecx, threads.edx), (0, 1, 0x100, 3));
        let cores = adapted(0xb, 1, 77);
        assert_eq!((cores.eax, cores.ebx, cores.ecx, cores.edx), (0, 1, 0x201, 3));
        let end = adapted(0xb, 2, 77);
        assert_eq!((end.ebx, end.ecx, end.edx), (0, 2, 3));
        assert_eq!(adapted(0x8000_0008, 0, u32::MAX).ecx & 0xf0ff, 0);
    }

    #[test]
    fn all_else_is_the_hosts() {
        for function in [0, 7, 0xd, 0x4000_0001, 0x8000_0001] {
            assert_eq!(adapted(function, 0, 0x1234_5678).eax, 0x1234_5678);
            assert_eq!(adapted(function, 0, 0x1234_5678).ecx, 0x1234_5678);
        }
    }
}
