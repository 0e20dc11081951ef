//! The vCPU: its run loop, reset, and what the traits ask of it.

use std::sync::Arc;

use kvm_bindings::{KVM_MP_STATE_RUNNABLE, kvm_mp_state, kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuFd;

use super::exit::{self, Next};
use super::failed;
use super::kick::KvmKick;
use super::run_page::RunPage;
use super::state::{self, KvmState, Scope};
use super::vm::{KvmInterrupts, Shared};
use crate::bus::{AccessContext, Bus, InterruptSink};
use crate::clock::Anchor;
use crate::{Error, Exit, Kick, LongModeEntry, Vcpu, VcpuState};

/// CR0: protection, extension type, native x87 errors, write protection in the kernel too, paging.
const CR0: u64 = 1 | 1 << 4 | 1 << 5 | 1 << 16 | 1 << 31;
/// CR4: physical address extension.
const CR4: u64 = 1 << 5;
/// EFER: long mode enabled and active, no-execute.
const EFER: u64 = 1 << 8 | 1 << 10 | 1 << 11;
/// RFLAGS: the bit that is always set.
const RFLAGS: u64 = 1 << 1;

/// A virtual processor of the kernel's.
pub(super) struct KvmVcpu {
    fd: VcpuFd,
    /// The mapping belongs to `fd`.
    page: RunPage,
    shared: Arc<Shared>,
    interrupts: KvmInterrupts,
    kick: Arc<KvmKick>,
    /// MSRs that can be saved.
    msrs: Vec<u32>,
    /// The processor as it was made, which a reset goes back to.
    power_on: KvmState,
}

impl KvmVcpu {
    /// `listed_msrs` is the kernel's list of what it can save.
    pub(super) fn new(
        mut fd: VcpuFd,
        shared: Arc<Shared>,
        listed_msrs: &[u32],
    ) -> Result<Self, Error> {
        let msrs = state::saveable_msrs(&fd, listed_msrs)?;
        Ok(Self {
            power_on: KvmState::save(&fd, &shared, &msrs)?,
            page: RunPage::of(&mut fd),
            fd,
            interrupts: KvmInterrupts(Arc::clone(&shared)),
            shared,
            kick: Arc::new(KvmKick::new()?),
            msrs,
        })
    }

    /// Enters the guest until there is something to return, and never returns with an instruction half done:
    /// every way out but an error goes through an entry with `immediate_exit`, which finishes the last
    /// access and answers EINTR, or through an exit that has no access.
    fn enter(&mut self, kick: &KvmKick, bus: &mut dyn Bus) -> Result<Exit, Error> {
        let mut stop = false;
        loop {
            if stop || kick.requested() {
                self.fd.set_kvm_immediate_exit(1);
            }
            match self.fd.run() {
                Ok(exit) => {
                    let mut cx = AccessContext {
                        retired: 0,
                        tsc: self.shared.clock(),
                        interrupts: &mut self.interrupts,
                        stop: false,
                    };
                    let next = exit::handle(exit, &self.page, bus, &mut cx)?;
                    stop |= cx.stop;
                    if let Next::Return(exit) = next {
                        return Ok(exit);
                    }
                }
                Err(error) if error.errno() == libc::EINTR => {
                    // Cleared before the flag is looked at: a kick that comes in between has set the flag.
                    self.fd.set_kvm_immediate_exit(0);
                    if stop {
                        return Ok(Exit::Stopped);
                    }
                    if kick.take() {
                        return Ok(Exit::Kicked);
                    }
                }
                // A processor that waited for its start-up interrupt has got it.
                Err(error) if error.errno() == libc::EAGAIN => {}
                Err(error) => return Err(failed("KVM_RUN")(error)),
            }
        }
    }
}

impl Vcpu for KvmVcpu {
    fn run(&mut self, until: Option<u64>, bus: &mut dyn Bus) -> Result<Exit, Error> {
        if until.is_some() {
            let what = "stopping at an instruction count".to_owned();
            return Err(Error::Unsupported { backend: "kvm", what });
        }
        let kick = Arc::clone(&self.kick);
        let entered = kick.enter(self.page.immediate_exit());
        let result = self.enter(&kick, bus);
        drop(entered);
        self.fd.set_kvm_immediate_exit(0);
        result
    }

    /// Always 0: KVM does not count.
    fn retired(&self) -> u64 {
        0
    }

    fn kicker(&self) -> Arc<dyn Kick> {
        Arc::clone(&self.kick) as Arc<dyn Kick>
    }

    fn interrupts(&mut self) -> &mut dyn InterruptSink {
        &mut self.interrupts
    }

    /// Does nothing: guest time passes with the host's.
    fn set_anchor(&mut self, _anchor: Anchor) {}

    /// A line that holds now and says nothing of later: instructions do not make time here.
    fn anchor(&self) -> Anchor {
        Anchor { point: 0, tsc: self.tsc(), rate: 0 }
    }

    /// The guest's kvm-clock, which counts nanoseconds as devices expect. The TSC that RDTSC reads has the
    /// host's frequency.
    fn tsc(&self) -> u64 {
        self.shared.clock()
    }

    /// Always `None`: the kernel waits for the timer inside `run`.
    fn next_timer_tsc(&self) -> Option<u64> {
        None
    }

    fn reset(&mut self, entry: &LongModeEntry) -> Result<(), Error> {
        self.power_on.restore(&self.fd, &self.shared, Scope::AllButTime)?;
        // A processor other than the first would wait for its start-up interrupt.
        let running = kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE };
        self.fd.set_mp_state(running).map_err(failed("KVM_SET_MP_STATE"))?;
        let mut sregs = self.fd.get_sregs().map_err(failed("KVM_GET_SREGS"))?;
        enter_long_mode(&mut sregs, entry);
        self.fd.set_sregs(&sregs).map_err(failed("KVM_SET_SREGS"))?;
        let regs = kvm_regs {
            rip: entry.rip,
            rsp: entry.rsp,
            rsi: entry.rsi,
            rflags: RFLAGS,
            ..Default::default()
        };
        self.fd.set_regs(&regs).map_err(failed("KVM_SET_REGS"))
    }

    /// KVM keeps its translations as a processor keeps its own, so none are dropped.
    fn save(&mut self) -> Result<VcpuState, Error> {
        let state = KvmState::save(&self.fd, &self.shared, &self.msrs)?;
        Ok(VcpuState::Kvm(Box::new(state)))
    }

    fn restore(&mut self, state: &VcpuState) -> Result<(), Error> {
        let VcpuState::Kvm(state) = state else {
            return Err(Error::Restore {
                reason: "it was saved by another hypervisor; start with the one it was saved by"
                    .to_owned(),
            });
        };
        state.restore(&self.fd, &self.shared, Scope::All)
    }
}

/// Flat segments, paging on, no interrupt table.
fn enter_long_mode(sregs: &mut kvm_sregs, entry: &LongModeEntry) {
    // Type 3: data, writable, accessed.
    let data = kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector: entry.data_selector,
        type_: 3,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    // Type 11: code, readable, accessed.
    sregs.cs = kvm_segment { selector: entry.code_selector, type_: 11, db: 0, l: 1, ..data };
    (sregs.ds, sregs.es, sregs.ss) = (data, data, data);
    let unused = kvm_segment { selector: 0, ..data };
    (sregs.fs, sregs.gs) = (unused, unused);
    let system = kvm_segment { limit: 0xffff, present: 1, ..Default::default() };
    // Type 2: LDT; type 11: busy TSS.
    sregs.ldt = kvm_segment { type_: 2, ..system };
    sregs.tr = kvm_segment { type_: 11, ..system };
    sregs.gdt.base = entry.gdt_base;
    sregs.gdt.limit = entry.gdt_limit;
    sregs.idt.base = 0;
    sregs.idt.limit = 0xffff;
    sregs.cr0 = CR0;
    sregs.cr2 = 0;
    sregs.cr3 = entry.cr3;
    sregs.cr4 = CR4;
    sregs.cr8 = 0;
    sregs.efer = EFER;
}
