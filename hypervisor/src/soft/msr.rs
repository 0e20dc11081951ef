//! Model-specific registers.
//!
//! An MSR the CPU model does not have raises #GP, as on hardware, and one log line per MSR says so: a guest
//! that probes is normal, a guest that needs one we lack is found by reading the log.

use super::cpu::{CR0_PG, Cpu, EFER_LMA, EFER_LME, EFER_NXE, EFER_SCE, FS, GS, Trap};
use super::paging::{PHYSICAL_ADDRESS_BITS, is_canonical};
use serde::{Deserialize, Serialize};

const IA32_TSC: u32 = 0x10;
const IA32_PLATFORM_ID: u32 = 0x17;
const IA32_APIC_BASE: u32 = 0x1b;
const IA32_FEATURE_CONTROL: u32 = 0x3a;
const IA32_TSC_ADJUST: u32 = 0x3b;
const IA32_BIOS_SIGN_ID: u32 = 0x8b;
const MSR_PLATFORM_INFO: u32 = 0xce;
const IA32_MTRRCAP: u32 = 0xfe;
const IA32_ARCH_CAPABILITIES: u32 = 0x10a;
const MSR_MISC_FEATURES_ENABLES: u32 = 0x140;
const IA32_SYSENTER_CS: u32 = 0x174;
const IA32_SYSENTER_ESP: u32 = 0x175;
const IA32_SYSENTER_EIP: u32 = 0x176;
const IA32_MCG_CAP: u32 = 0x179;
const IA32_MCG_STATUS: u32 = 0x17a;
const IA32_MISC_ENABLE: u32 = 0x1a0;
const IA32_DEBUGCTL: u32 = 0x1d9;
const IA32_MTRR_PHYSBASE0: u32 = 0x200;
const IA32_MTRR_PHYSMASK_LAST: u32 = IA32_MTRR_PHYSBASE0 + 2 * MTRR_VARIABLE as u32 - 1;
const IA32_PAT: u32 = 0x277;
const IA32_MTRR_DEF_TYPE: u32 = 0x2ff;
const IA32_TSC_DEADLINE: u32 = 0x6e0;
const IA32_EFER: u32 = 0xc000_0080;
const IA32_STAR: u32 = 0xc000_0081;
const IA32_LSTAR: u32 = 0xc000_0082;
const IA32_CSTAR: u32 = 0xc000_0083;
const IA32_FMASK: u32 = 0xc000_0084;
const IA32_FS_BASE: u32 = 0xc000_0100;
const IA32_GS_BASE: u32 = 0xc000_0101;
const IA32_KERNEL_GS_BASE: u32 = 0xc000_0102;
const IA32_TSC_AUX: u32 = 0xc000_0103;

/// Variable-range MTRRs.
const MTRR_VARIABLE: usize = 8;
/// Fixed-range MTRRs: one of 64 KiB steps, two of 16 KiB, eight of 4 KiB.
const MTRR_FIXED: usize = 11;
/// Variable ranges, fixed ranges, write combining.
const MTRRCAP: u64 = MTRR_VARIABLE as u64 | 1 << 8 | 1 << 10;
/// MTRR type: uncacheable.
const UNCACHEABLE: u64 = 0;
/// MTRR type: write-back.
const WRITE_BACK: u64 = 6;
/// MTRRs enabled, default type write-back: how firmware leaves them, and what lets an operating system use the
/// PAT.
const MTRR_DEFAULT: u64 = 1 << 11 | WRITE_BACK;
/// WB, WT, UC-, UC, twice.
const PAT_RESET: u64 = 0x0007_0406_0007_0406;

/// RDCL_NO, SKIP_L1DFL_VMENTRY, SSB_NO, MDS_NO, PSCHANGE_MC_NO, TAA_NO, SBDR_SSDP_NO, FBSDP_NO, PSDP_NO, BHI_NO,
/// PBRSB_NO, GDS_NO, RFDS_NO, ITS_NO: an interpreter does not speculate.
const ARCH_CAPABILITIES: u64 = 1
    | 1 << 3
    | 1 << 4
    | 1 << 5
    | 1 << 6
    | 1 << 8
    | 7 << 13
    | 1 << 20
    | 1 << 24
    | 1 << 26
    | 1 << 27
    | 1 << 62;

/// Fast strings; BTS and PEBS unavailable.
const MISC_ENABLE_RESET: u64 = 1 | 1 << 11 | 1 << 12;
/// What a guest may change in `IA32_MISC_ENABLE`: fast strings.
const MISC_ENABLE_WRITABLE: u64 = 1;

/// MSRs that have no field of their own in [`Cpu`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Msrs {
    /// `IA32_STAR`: segment selectors of SYSCALL and SYSRET.
    pub star: u64,
    /// `IA32_LSTAR`: where SYSCALL goes.
    pub lstar: u64,
    /// `IA32_CSTAR`: kept, never used; Intel processors have no SYSCALL in compatibility mode.
    pub cstar: u64,
    /// `IA32_FMASK`: flags SYSCALL clears.
    pub fmask: u64,
    /// `IA32_KERNEL_GS_BASE`: what SWAPGS exchanges with the GS base.
    pub kernel_gs_base: u64,
    /// `IA32_TSC_AUX`: what RDTSCP leaves in ECX.
    pub tsc_aux: u32,
    /// `IA32_TSC_ADJUST`: what the guest's TSC is ahead of the raw one.
    pub tsc_adjust: u64,
    pat: u64,
    sysenter: [u64; 3],
    misc_enable: u64,
    debugctl: u64,
    mcg_status: u64,
    mtrr_default: u64,
    mtrr_fixed: [u64; MTRR_FIXED],
    mtrr_variable: [u64; 2 * MTRR_VARIABLE],
    #[serde(skip)]
    reported: Reported,
}

impl Default for Msrs {
    fn default() -> Self {
        Self {
            star: 0,
            lstar: 0,
            cstar: 0,
            fmask: 0,
            kernel_gs_base: 0,
            tsc_aux: 0,
            tsc_adjust: 0,
            pat: PAT_RESET,
            sysenter: [0; 3],
            misc_enable: MISC_ENABLE_RESET,
            debugctl: 0,
            mcg_status: 0,
            mtrr_default: MTRR_DEFAULT,
            mtrr_fixed: [0; MTRR_FIXED],
            mtrr_variable: [0; 2 * MTRR_VARIABLE],
            reported: Reported::default(),
        }
    }
}

/// Which unknown MSRs the log has already named. Not part of the guest's state: all values are equal.
#[derive(Debug, Clone, Default)]
struct Reported(Vec<(u32, Direction)>);

impl PartialEq for Reported {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Eq for Reported {}

impl Reported {
    /// No guest fills the log, or memory, with more than this.
    const MAX: usize = 64;

    fn add(&mut self, index: u32, direction: Direction, value: u64) {
        if self.0.len() >= Self::MAX || self.0.contains(&(index, direction)) {
            return;
        }
        self.0.push((index, direction));
        match direction {
            Direction::Read => log::warn!("guest read MSR {index:#x}: not supported, #GP"),
            Direction::Write => {
                log::warn!("guest wrote {value:#x} to MSR {index:#x}: not supported, #GP");
            }
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Direction {
    Read,
    Write,
}

impl Cpu {
    /// The TSC without the guest's adjustment, which is what timers count by. Exact in handlers that end a block.
    #[must_use]
    pub fn raw_tsc(&self) -> u64 {
        self.anchor.tsc_at(self.retired)
    }

    /// RDMSR.
    pub(super) fn read_msr(&mut self, index: u32) -> Result<u64, Trap> {
        let msrs = &self.msrs;
        Ok(match index {
            IA32_TSC => self.tsc(),
            IA32_PLATFORM_ID | MSR_MISC_FEATURES_ENABLES => 0,
            IA32_APIC_BASE => self.irqchip.lapic.base(),
            // Locked, with neither VMX nor SGX.
            IA32_FEATURE_CONTROL => 1,
            IA32_TSC_ADJUST => msrs.tsc_adjust,
            // Microcode revision 1.
            IA32_BIOS_SIGN_ID => 1 << 32,
            // Maximum non-turbo ratio 10 (of 100 MHz).
            MSR_PLATFORM_INFO => 10 << 8,
            IA32_MTRRCAP => MTRRCAP,
            IA32_ARCH_CAPABILITIES => ARCH_CAPABILITIES,
            IA32_SYSENTER_CS..=IA32_SYSENTER_EIP => {
                msrs.sysenter[(index - IA32_SYSENTER_CS) as usize]
            }
            // No machine check banks.
            IA32_MCG_CAP => 0,
            IA32_MCG_STATUS => msrs.mcg_status,
            IA32_MISC_ENABLE => msrs.misc_enable,
            IA32_DEBUGCTL => msrs.debugctl,
            IA32_MTRR_PHYSBASE0..=IA32_MTRR_PHYSMASK_LAST => {
                msrs.mtrr_variable[(index - IA32_MTRR_PHYSBASE0) as usize]
            }
            IA32_PAT => msrs.pat,
            IA32_MTRR_DEF_TYPE => msrs.mtrr_default,
            IA32_TSC_DEADLINE => {
                let now = self.raw_tsc();
                self.irqchip.lapic.tsc_deadline(now)
            }
            IA32_EFER => self.efer,
            IA32_STAR => msrs.star,
            IA32_LSTAR => msrs.lstar,
            IA32_CSTAR => msrs.cstar,
            IA32_FMASK => msrs.fmask,
            IA32_FS_BASE => self.segments[FS].base,
            IA32_GS_BASE => self.segments[GS].base,
            IA32_KERNEL_GS_BASE => msrs.kernel_gs_base,
            IA32_TSC_AUX => u64::from(msrs.tsc_aux),
            _ => match fixed_mtrr(index) {
                Some(slot) => msrs.mtrr_fixed[slot],
                None => {
                    self.msrs.reported.add(index, Direction::Read, 0);
                    return Err(self.gp(0));
                }
            },
        })
    }

    /// WRMSR. Values with reserved bits set raise #GP.
    pub(super) fn write_msr(&mut self, index: u32, value: u64) -> Result<(), Trap> {
        let legal = match index {
            IA32_EFER => return self.write_efer(value),
            IA32_MTRR_PHYSBASE0..=IA32_MTRR_PHYSMASK_LAST | IA32_MTRR_DEF_TYPE | IA32_PAT => {
                self.write_memory_type(index, value)
            }
            IA32_LSTAR | IA32_CSTAR | IA32_SYSENTER_ESP | IA32_SYSENTER_EIP | IA32_FS_BASE
            | IA32_GS_BASE | IA32_KERNEL_GS_BASE => {
                is_canonical(value) && {
                    *self.address_msr(index) = value;
                    true
                }
            }
            IA32_TSC => {
                let adjust = value.wrapping_sub(self.raw_tsc());
                self.set_tsc_adjust(adjust);
                true
            }
            IA32_TSC_ADJUST => {
                self.set_tsc_adjust(value);
                true
            }
            IA32_TSC_DEADLINE => {
                let now = self.raw_tsc();
                self.irqchip.lapic.set_tsc_deadline(value, self.msrs.tsc_adjust, now);
                true
            }
            IA32_APIC_BASE => self.write_apic_base(value),
            // Writing zero before CPUID asks for the microcode revision.
            IA32_BIOS_SIGN_ID => true,
            MSR_MISC_FEATURES_ENABLES => value == 0,
            IA32_SYSENTER_CS => {
                self.msrs.sysenter[0] = value & 0xffff_ffff;
                true
            }
            IA32_MCG_STATUS => {
                self.msrs.mcg_status = value;
                value == 0
            }
            IA32_MISC_ENABLE => {
                let kept = self.msrs.misc_enable & !MISC_ENABLE_WRITABLE;
                self.msrs.misc_enable = kept | value & MISC_ENABLE_WRITABLE;
                true
            }
            // LBR and BTF are kept and have no effect.
            IA32_DEBUGCTL => {
                self.msrs.debugctl = value & 3;
                value & !3 == 0
            }
            IA32_STAR => {
                self.msrs.star = value;
                true
            }
            IA32_FMASK => {
                self.msrs.fmask = value & 0xffff_ffff;
                true
            }
            IA32_TSC_AUX => match u32::try_from(value) {
                Ok(value) => {
                    self.msrs.tsc_aux = value;
                    true
                }
                Err(_) => false,
            },
            _ => match fixed_mtrr(index) {
                Some(slot) if value.to_le_bytes().into_iter().all(is_mtrr_type) => {
                    self.msrs.mtrr_fixed[slot] = value;
                    true
                }
                Some(_) => false,
                None => {
                    self.msrs.reported.add(index, Direction::Write, value);
                    false
                }
            },
        };
        if legal { Ok(()) } else { Err(self.gp(0)) }
    }

    /// The MSRs that hold an address, which must be canonical.
    fn address_msr(&mut self, index: u32) -> &mut u64 {
        match index {
            IA32_LSTAR => &mut self.msrs.lstar,
            IA32_CSTAR => &mut self.msrs.cstar,
            IA32_SYSENTER_ESP => &mut self.msrs.sysenter[1],
            IA32_SYSENTER_EIP => &mut self.msrs.sysenter[2],
            IA32_FS_BASE => &mut self.segments[FS].base,
            IA32_GS_BASE => &mut self.segments[GS].base,
            _ => &mut self.msrs.kernel_gs_base,
        }
    }

    fn write_efer(&mut self, value: u64) -> Result<(), Trap> {
        let changed = value ^ self.efer;
        let known = EFER_SCE | EFER_LME | EFER_LMA | EFER_NXE;
        if value & !known != 0 || changed & EFER_LME != 0 && self.cr0 & CR0_PG != 0 {
            return Err(self.gp(0));
        }
        // LMA is read-only: it follows LME and paging.
        self.efer = value & !EFER_LMA | self.efer & EFER_LMA;
        if changed & EFER_NXE != 0 {
            self.flush_tlb(false);
        }
        self.recompute_mode();
        Ok(())
    }

    fn write_apic_base(&mut self, value: u64) -> bool {
        use super::irqchip::lapic::{BASE_BSP, BASE_ENABLE};
        let address = (1 << PHYSICAL_ADDRESS_BITS) - 0x1000;
        let legal = value & !(address | BASE_BSP | BASE_ENABLE) == 0;
        if legal {
            self.irqchip.lapic.set_base(value);
        }
        legal
    }

    /// Changes the guest's view of the TSC. A deadline is a value of that view, so it moves.
    fn set_tsc_adjust(&mut self, adjust: u64) {
        let now = self.raw_tsc();
        let deadline = self.irqchip.lapic.tsc_deadline(now);
        self.msrs.tsc_adjust = adjust;
        self.irqchip.lapic.set_tsc_deadline(deadline, adjust, now);
    }

    /// MTRRs and PAT: kept for the guest to read. All memory is coherent here whatever its type.
    fn write_memory_type(&mut self, index: u32, value: u64) -> bool {
        let above = !((1u64 << PHYSICAL_ADDRESS_BITS) - 1);
        let slot = match index {
            IA32_PAT => {
                // UC- (7) is a type of the PAT alone.
                let legal = value.to_le_bytes().into_iter().all(|t| t == 7 || is_mtrr_type(t));
                if legal {
                    self.msrs.pat = value;
                }
                return legal;
            }
            IA32_MTRR_DEF_TYPE => {
                let legal = value & !0xcff == 0 && is_mtrr_type(value as u8);
                if legal {
                    self.msrs.mtrr_default = value;
                }
                return legal;
            }
            _ => (index - IA32_MTRR_PHYSBASE0) as usize,
        };
        let legal = if slot & 1 == 0 {
            value & (above | 0xf00) == 0 && is_mtrr_type(value as u8)
        } else {
            value & (above | 0x7ff) == 0
        };
        if legal {
            self.msrs.mtrr_variable[slot] = value;
        }
        legal
    }
}

/// UC, WC, WT, WP, WB.
fn is_mtrr_type(kind: u8) -> bool {
    matches!(u64::from(kind), UNCACHEABLE | 1 | 4 | 5 | WRITE_BACK)
}

/// The fixed-range MTRR at this index.
fn fixed_mtrr(index: u32) -> Option<usize> {
    match index {
        0x250 => Some(0),
        0x258..=0x259 => Some((index - 0x258) as usize + 1),
        0x268..=0x26f => Some((index - 0x268) as usize + 3),
        _ => None,
    }
}
