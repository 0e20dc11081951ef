//! Saving and restoring a vCPU with the interrupt controllers and the clock of its VM.
//!
//! The kernel's structures are kept as the bytes they are. Their layout is the kernel's ABI; what a damaged
//! state may hold is for KVM to refuse.

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, Msrs, kvm_clock_data,
    kvm_irqchip, kvm_msr_entry,
};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::failed;
use super::vm::Shared;
use crate::Error;

const IA32_TSC: u32 = 0x10;
const IA32_TSC_DEADLINE: u32 = 0x6e0;
/// MSRs that belong to the state and that not every kernel lists: PAT, MTRRs, SWAPGS base, TSC_AUX and the
/// TSC deadline. Those the host does not have are left out.
const UNLISTED_MSRS: [std::ops::RangeInclusive<u32>; 8] = [
    0x200..=0x20f,
    0x250..=0x250,
    0x258..=0x259,
    0x268..=0x26f,
    0x277..=0x277,
    0x2ff..=0x2ff,
    0xc000_0102..=0xc000_0103,
    IA32_TSC_DEADLINE..=IA32_TSC_DEADLINE,
];
/// MSRs in one call; KVM takes at most 256.
const MSR_BATCH: usize = 128;
const IRQCHIPS: [u32; 3] = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC];

/// A structure of the kernel's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Raw(Vec<u8>);

impl Raw {
    fn of<T: IntoBytes + Immutable>(value: &T) -> Self {
        Self(value.as_bytes().to_vec())
    }

    fn get<T: FromBytes>(&self, name: &str) -> Result<T, Error> {
        T::read_from_bytes(&self.0).map_err(|_| Error::Restore {
            reason: format!(
                "its {name} has {} bytes instead of {}; the saved state is damaged",
                self.0.len(),
                size_of::<T>()
            ),
        })
    }
}

/// A processor saved through the KVM get calls.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KvmState {
    mp_state: Raw,
    regs: Raw,
    sregs: Raw,
    xsave: Raw,
    xcrs: Raw,
    debug_regs: Raw,
    lapic: Raw,
    /// Index and value.
    msrs: Vec<(u32, u64)>,
    events: Raw,
    /// In the order of [`IRQCHIPS`].
    irqchips: [Raw; 3],
    /// The guest's kvm-clock in nanoseconds.
    clock: u64,
}

/// How much to restore.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Scope {
    /// Everything.
    All,
    /// A reset: clocks go on.
    AllButTime,
}

impl KvmState {
    /// The state of a vCPU that is between two instructions. The run state comes first, since reading it
    /// lets KVM take pending INITs; the events come after the LAPIC, whose reading can move one there.
    pub(super) fn save(fd: &VcpuFd, shared: &Shared, msrs: &[u32]) -> Result<Self, Error> {
        Ok(Self {
            mp_state: Raw::of(&fd.get_mp_state().map_err(failed("KVM_GET_MP_STATE"))?),
            regs: Raw::of(&fd.get_regs().map_err(failed("KVM_GET_REGS"))?),
            sregs: Raw::of(&fd.get_sregs().map_err(failed("KVM_GET_SREGS"))?),
            // Fails, rather than cuts off, where the guest's extended state is larger than the 4096 bytes of
            // this call: that takes features (AMX) which a process must ask its kernel for.
            xsave: Raw::of(&fd.get_xsave().map_err(failed("KVM_GET_XSAVE"))?),
            xcrs: Raw::of(&fd.get_xcrs().map_err(failed("KVM_GET_XCRS"))?),
            debug_regs: Raw::of(&fd.get_debug_regs().map_err(failed("KVM_GET_DEBUGREGS"))?),
            lapic: Raw::of(&fd.get_lapic().map_err(failed("KVM_GET_LAPIC"))?),
            msrs: read_msrs(fd, msrs)?,
            events: Raw::of(&fd.get_vcpu_events().map_err(failed("KVM_GET_VCPU_EVENTS"))?),
            irqchips: {
                let mut chips = IRQCHIPS.map(|_| Raw(Vec::new()));
                for (chip_id, raw) in IRQCHIPS.into_iter().zip(&mut chips) {
                    let mut chip = kvm_irqchip { chip_id, ..Default::default() };
                    shared.fd.get_irqchip(&mut chip).map_err(failed("KVM_GET_IRQCHIP"))?;
                    *raw = Raw::of(&chip);
                }
                chips
            },
            clock: shared.clock(),
        })
    }

    /// Makes the vCPU and its VM's interrupt controllers the ones this was saved from.
    ///
    /// The order matters: APIC base (in the special registers) before the LAPIC, the LAPIC before the TSC
    /// deadline, which it takes only in that timer mode; everything before the events, which KVM may
    /// clear while registers change.
    pub(super) fn restore(&self, fd: &VcpuFd, shared: &Shared, scope: Scope) -> Result<(), Error> {
        shared.remap()?;
        for (chip_id, raw) in IRQCHIPS.into_iter().zip(&self.irqchips) {
            let chip = kvm_irqchip { chip_id, ..raw.get("interrupt controller")? };
            shared.fd.set_irqchip(&chip).map_err(failed("KVM_SET_IRQCHIP"))?;
        }
        fd.set_mp_state(self.mp_state.get("run state")?).map_err(failed("KVM_SET_MP_STATE"))?;
        fd.set_regs(&self.regs.get("registers")?).map_err(failed("KVM_SET_REGS"))?;
        fd.set_sregs(&self.sregs.get("special registers")?).map_err(failed("KVM_SET_SREGS"))?;
        let xsave = self.xsave.get("extended state")?;
        // SAFETY: KVM reads no more than the guest's extended state, which fits the structure, as KVM_GET_XSAVE
        // has shown when this vCPU was made: it refuses otherwise.
        unsafe { fd.set_xsave(&xsave) }.map_err(failed("KVM_SET_XSAVE"))?;
        fd.set_xcrs(&self.xcrs.get("extended control registers")?)
            .map_err(failed("KVM_SET_XCRS"))?;
        fd.set_debug_regs(&self.debug_regs.get("debug registers")?)
            .map_err(failed("KVM_SET_DEBUGREGS"))?;
        fd.set_lapic(&self.lapic.get("LAPIC")?).map_err(failed("KVM_SET_LAPIC"))?;
        self.restore_msrs(fd, scope)?;
        fd.set_vcpu_events(&self.events.get("pending events")?)
            .map_err(failed("KVM_SET_VCPU_EVENTS"))?;
        if scope == Scope::All {
            let clock = kvm_clock_data { clock: self.clock, ..Default::default() };
            shared.fd.set_clock(&clock).map_err(failed("KVM_SET_CLOCK"))?;
        }
        Ok(())
    }

    fn restore_msrs(&self, fd: &VcpuFd, scope: Scope) -> Result<(), Error> {
        let time = |index| index == IA32_TSC && scope == Scope::AllButTime;
        let wanted: Vec<_> = self
            .msrs
            .iter()
            .copied()
            .filter(|(index, _)| *index != IA32_TSC_DEADLINE && !time(*index))
            .collect();
        write_msrs(fd, &wanted)?;
        let saved = |index| self.msrs.iter().find(|msr| msr.0 == index).map(|msr| msr.1);
        let Some(mut deadline) = saved(IA32_TSC_DEADLINE) else { return Ok(()) };
        if deadline != 0
            && let Some(saved_tsc) = saved(IA32_TSC)
            && let [(_, tsc)] = read_msrs(fd, &[IA32_TSC])?[..]
        {
            // As far ahead as it was, also where the TSC cannot be set. 0 would mean no deadline.
            deadline = deadline.wrapping_add(tsc.wrapping_sub(saved_tsc)).max(1);
        }
        write_msrs(fd, &[(IA32_TSC_DEADLINE, deadline)])
    }
}

/// Those of `listed` and [`UNLISTED_MSRS`] that this vCPU gives.
pub(super) fn saveable_msrs(fd: &VcpuFd, listed: &[u32]) -> Result<Vec<u32>, Error> {
    let mut indices = listed.to_vec();
    indices.extend(UNLISTED_MSRS.into_iter().flatten());
    indices.sort_unstable();
    indices.dedup();
    Ok(read_msrs(fd, &indices)?.into_iter().map(|(index, _)| index).collect())
}

/// The values of those MSRs that exist.
fn read_msrs(fd: &VcpuFd, indices: &[u32]) -> Result<Vec<(u32, u64)>, Error> {
    let mut values = Vec::with_capacity(indices.len());
    let mut rest = indices;
    while !rest.is_empty() {
        let batch = &rest[..rest.len().min(MSR_BATCH)];
        let mut msrs = batch_of(batch.iter().map(|&index| (index, 0)));
        // KVM stops at the first it cannot give.
        let read = fd.get_msrs(&mut msrs).map_err(failed("KVM_GET_MSRS"))?;
        values.extend(msrs.as_slice()[..read].iter().map(|msr| (msr.index, msr.data)));
        rest = if read < batch.len() { &rest[read + 1..] } else { &rest[read..] };
    }
    Ok(values)
}

/// Sets MSRs. One that cannot be set but has the wanted value already is no failure: some are read-only.
fn write_msrs(fd: &VcpuFd, values: &[(u32, u64)]) -> Result<(), Error> {
    let mut rest = values;
    while !rest.is_empty() {
        let batch = &rest[..rest.len().min(MSR_BATCH)];
        let msrs = batch_of(batch.iter().copied());
        let written = fd.set_msrs(&msrs).map_err(failed("KVM_SET_MSRS"))?;
        rest = &rest[written..];
        if written < batch.len() {
            let refused @ (index, value) = batch[written];
            if read_msrs(fd, &[index])? != [refused] {
                return Err(Error::Restore {
                    reason: format!(
                        "this host does not take {value:#x} for MSR {index:#x}; restore on a host \
                         with the processor and kernel it was saved on"
                    ),
                });
            }
            rest = &rest[1..];
        }
    }
    Ok(())
}

fn batch_of(values: impl Iterator<Item = (u32, u64)>) -> Msrs {
    let entries: Vec<_> =
        values.map(|(index, data)| kvm_msr_entry { index, data, ..Default::default() }).collect();
    Msrs::from_entries(&entries).expect("a batch is smaller than what KVM takes")
}
