//! Saving and restoring the processor.

use serde::{Deserialize, Serialize};

use super::cpu::{CS, Cpu, Segment, TableRegister};
use super::fpu::Fpu;
use super::irqchip::IrqChip;
use super::msr::Msrs;
use crate::clock::Anchor;

/// Everything the guest can observe of the processor and its interrupt controllers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SoftState {
    gpr: [u64; 16],
    rip: u64,
    rflags: u64,
    retired: u64,
    segments: [Segment; 6],
    ldtr: Segment,
    tr: Segment,
    gdtr: TableRegister,
    idtr: TableRegister,
    cpl: u8,
    interrupt_shadow: bool,
    halted: bool,
    pending_debug: bool,
    cr0: u64,
    cr2: u64,
    cr3: u64,
    cr4: u64,
    efer: u64,
    dr: [u64; 8],
    xmm: [u128; 16],
    mxcsr: u32,
    fpu: Fpu,
    msrs: Msrs,
    anchor: Anchor,
    irqchip: IrqChip,
}

impl SoftState {
    /// The state of `cpu`, which is between two instructions.
    pub(super) fn of(cpu: &Cpu) -> SoftState {
        let mut gpr = [0; 16];
        gpr.copy_from_slice(&cpu.gpr[..16]);
        let mut segments = [Segment::default(); 6];
        segments.copy_from_slice(&cpu.segments[..6]);
        SoftState {
            gpr,
            rip: cpu.rip,
            rflags: cpu.flags.read(),
            retired: cpu.retired,
            segments,
            ldtr: cpu.ldtr,
            tr: cpu.tr,
            gdtr: cpu.gdtr,
            idtr: cpu.idtr,
            cpl: cpu.cpl,
            interrupt_shadow: cpu.interrupt_shadow,
            halted: cpu.halted,
            pending_debug: cpu.pending_debug,
            cr0: cpu.cr0,
            cr2: cpu.cr2,
            cr3: cpu.cr3,
            cr4: cpu.cr4,
            efer: cpu.efer,
            dr: cpu.dr,
            xmm: cpu.xmm,
            mxcsr: cpu.mxcsr,
            fpu: cpu.fpu.clone(),
            msrs: cpu.msrs.clone(),
            anchor: cpu.anchor,
            irqchip: cpu.irqchip.clone(),
        }
    }

    /// Makes `cpu` the processor this was saved from, with empty TLBs.
    pub(super) fn restore(&self, cpu: &mut Cpu) {
        cpu.gpr[..16].copy_from_slice(&self.gpr);
        cpu.rip = self.rip;
        cpu.flags.write(self.rflags);
        cpu.retired = self.retired;
        cpu.segments[..6].copy_from_slice(&self.segments);
        cpu.ldtr = self.ldtr;
        cpu.tr = self.tr;
        cpu.gdtr = self.gdtr;
        cpu.idtr = self.idtr;
        cpu.cpl = self.cpl;
        cpu.interrupt_shadow = self.interrupt_shadow;
        cpu.halted = self.halted;
        cpu.pending_debug = self.pending_debug;
        cpu.shutdown = false;
        cpu.stop_requested = false;
        cpu.cr0 = self.cr0;
        cpu.cr2 = self.cr2;
        cpu.cr3 = self.cr3;
        cpu.cr4 = self.cr4;
        cpu.efer = self.efer;
        cpu.dr = self.dr;
        cpu.xmm = self.xmm;
        cpu.mxcsr = self.mxcsr;
        cpu.fpu = self.fpu.clone();
        cpu.msrs = self.msrs.clone();
        cpu.anchor = self.anchor;
        cpu.irqchip = self.irqchip.clone();
        cpu.recompute_mode();
        cpu.flush_tlb(false);
    }

    /// Why this cannot be restored, if so: what no processor of ours could have saved.
    pub(super) fn check(&self) -> Result<(), String> {
        if self.cpl > 3 {
            return Err(format!("privilege level {} does not exist", self.cpl));
        }
        if self.anchor.point > self.retired {
            return Err(format!(
                "its time starts at instruction {}, after the {} it has retired",
                self.anchor.point, self.retired
            ));
        }
        if self.segments[CS].attributes == 0 && self.retired > 0 {
            return Err("it has no code segment".to_owned());
        }
        Ok(())
    }
}
