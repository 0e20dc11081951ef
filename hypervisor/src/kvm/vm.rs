//! The VM: memory slots with their log of writes, interrupt controllers and routing, the clock.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use kvm_bindings::{
    CpuId, KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC,
    KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_MAX_CPUID_ENTRIES, KVM_MEM_LOG_DIRTY_PAGES,
    KvmIrqRouting, kvm_irq_routing_entry, kvm_irq_routing_irqchip, kvm_msi,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, Kvm, VmFd};
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};
use vmm_sys_util::eventfd::EventFd;

use super::failed;
use super::vcpu::KvmVcpu;
use crate::bus::{InterruptSink, Msi};
use crate::memory::{GuestMemory, PAGE_SIZE, PageTracker};
use crate::{Error, Vcpu, Vm};

/// Inputs of the IOAPIC; interrupts with higher numbers are messages.
const IOAPIC_PINS: u32 = 24;
/// Inputs of the two PICs.
const PIC_PINS: u32 = 16;
/// Where real mode and task switches are emulated on old Intel processors: a page and three pages below the
/// ACPI tables and firmware of a PC, outside RAM and device memory.
const IDENTITY_MAP: u64 = 0xfffb_c000;
const TSS: usize = 0xfffb_d000;

/// A virtual machine of the kernel's.
pub struct KvmVm {
    shared: Arc<Shared>,
    cpuid: CpuId,
    tsc_deadline: bool,
    /// MSRs this host can save.
    msrs: Vec<u32>,
}

impl KvmVm {
    pub(super) fn new(kvm: &Kvm, memory: GuestMemory) -> Result<Self, Error> {
        let fd = kvm.create_vm().map_err(failed("KVM_CREATE_VM"))?;
        fd.set_identity_map_address(IDENTITY_MAP).map_err(failed("KVM_SET_IDENTITY_MAP_ADDR"))?;
        fd.set_tss_address(TSS).map_err(failed("KVM_SET_TSS_ADDR"))?;
        fd.create_irq_chip().map_err(failed("KVM_CREATE_IRQCHIP"))?;
        let shared = Shared {
            slots: slots(&memory)?,
            fd,
            routes: Mutex::new(default_routes()),
            last_clock: AtomicU64::new(0),
            memory,
        };
        for slot in &shared.slots {
            shared.map(slot)?;
        }
        let msrs = kvm.get_msr_index_list().map_err(failed("KVM_GET_MSR_INDEX_LIST"))?;
        Ok(Self {
            shared: Arc::new(shared),
            cpuid: kvm
                .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
                .map_err(failed("KVM_GET_SUPPORTED_CPUID"))?,
            tsc_deadline: kvm.check_extension(Cap::TscDeadlineTimer),
            msrs: msrs.as_slice().to_vec(),
        })
    }

    /// Lets every signal of `event` deliver `msi`, without a visit to this process. The result is what
    /// [`KvmVm::remove_irqfd`] needs.
    pub fn add_irqfd(&self, event: &EventFd, msi: Msi) -> Result<u32, Error> {
        let gsi = self.shared.route(msi)?;
        self.shared.fd.register_irqfd(event, gsi).map_err(failed("KVM_IRQFD"))?;
        Ok(gsi)
    }

    /// Ends what [`KvmVm::add_irqfd`] began.
    pub fn remove_irqfd(&self, event: &EventFd, gsi: u32) -> Result<(), Error> {
        self.shared.fd.unregister_irqfd(event, gsi).map_err(failed("KVM_IRQFD"))?;
        self.shared.unroute(gsi)
    }
}

impl Vm for KvmVm {
    fn memory(&self) -> &GuestMemory {
        &self.shared.memory
    }

    fn create_vcpu(&mut self, id: u8) -> Result<Box<dyn Vcpu>, Error> {
        let fd = self.shared.fd.create_vcpu(u64::from(id)).map_err(failed("KVM_CREATE_VCPU"))?;
        let mut cpuid = self.cpuid.clone();
        super::cpuid::adapt(&mut cpuid, id, self.tsc_deadline);
        fd.set_cpuid2(&cpuid).map_err(failed("KVM_SET_CPUID2"))?;
        Ok(Box::new(KvmVcpu::new(fd, Arc::clone(&self.shared), &self.msrs)?))
    }

    /// May name pages that were only read: KVM logs a page when it maps it for writing, which it does for a read
    /// too where the guest could write.
    fn take_dirty_pages(&mut self, pages: &mut Vec<u64>) -> Result<(), Error> {
        self.shared.collect_dirty_log()?;
        for slot in &self.shared.slots {
            slot.tracker.take_dirty(slot.start / PAGE_SIZE as u64, pages);
        }
        Ok(())
    }
}

/// What the VM and its vCPUs use together. The memory is unmapped after the VM's descriptor was closed.
pub(super) struct Shared {
    pub(super) fd: VmFd,
    slots: Vec<Slot>,
    /// The kernel's table of interrupt routes, which it takes only whole.
    routes: Mutex<Vec<kvm_irq_routing_entry>>,
    last_clock: AtomicU64,
    memory: GuestMemory,
}

/// A region of guest memory as KVM knows it.
struct Slot {
    number: u32,
    /// First guest-physical address.
    start: u64,
    /// Bytes.
    len: u64,
    /// Host address of the first byte.
    host: u64,
    tracker: PageTracker,
}

fn slots(memory: &GuestMemory) -> Result<Vec<Slot>, Error> {
    (0..)
        .zip(memory.iter())
        .map(|(number, region)| {
            let host = region.get_host_address(MemoryRegionAddress(0)).map_err(|error| {
                Error::MapMemory { bytes: region.len(), source: std::io::Error::other(error) }
            })?;
            Ok(Slot {
                number,
                start: region.start_addr().raw_value(),
                len: region.len(),
                host: host.expose_provenance() as u64,
                tracker: (*region).bitmap().clone(),
            })
        })
        .collect()
}

impl Shared {
    fn map(&self, slot: &Slot) -> Result<(), Error> {
        self.set_slot(slot, slot.len)
    }

    /// A length of 0 removes the slot.
    fn set_slot(&self, slot: &Slot, len: u64) -> Result<(), Error> {
        let region = kvm_userspace_memory_region {
            slot: slot.number,
            flags: KVM_MEM_LOG_DIRTY_PAGES,
            guest_phys_addr: slot.start,
            memory_size: len,
            userspace_addr: slot.host,
        };
        // SAFETY: `self.memory` keeps the mapping, which is as long as the slot, until `self.fd` is closed and
        // no vCPU, each of which holds `self` too, is left.
        unsafe { self.fd.set_user_memory_region(region) }
            .map_err(failed("KVM_SET_USER_MEMORY_REGION"))
    }

    /// Makes KVM forget what it derived from guest memory. Its log of writes is kept.
    pub(super) fn remap(&self) -> Result<(), Error> {
        self.collect_dirty_log()?;
        for slot in &self.slots {
            self.set_slot(slot, 0)?;
            self.map(slot)?;
        }
        Ok(())
    }

    /// Moves KVM's log of writes into the page trackers, where device writes are noted too.
    fn collect_dirty_log(&self) -> Result<(), Error> {
        for slot in &self.slots {
            let log = self
                .fd
                .get_dirty_log(slot.number, slot.len as usize)
                .map_err(failed("KVM_GET_DIRTY_LOG"))?;
            for (index, word) in log.into_iter().enumerate() {
                let mut left = word;
                while left != 0 {
                    slot.tracker.set_dirty(index * 64 + left.trailing_zeros() as usize);
                    left &= left - 1;
                }
            }
        }
        Ok(())
    }

    /// The guest's clock (kvm-clock): nanoseconds since the VM was created, or since the restored one was.
    pub(super) fn clock(&self) -> u64 {
        match self.fd.get_clock() {
            Ok(data) => {
                self.last_clock.store(data.clock, Ordering::Relaxed);
                data.clock
            }
            Err(error) => {
                log::error!("KVM_GET_CLOCK failed, guest time stands still: {error}");
                self.last_clock.load(Ordering::Relaxed)
            }
        }
    }

    /// Adds a route for `msi`; the result is its interrupt number.
    fn route(&self, msi: Msi) -> Result<u32, Error> {
        let mut routes = self.routes.lock().unwrap_or_else(PoisonError::into_inner);
        let taken = |gsi| routes.iter().any(|route| route.gsi == gsi);
        let gsi = (IOAPIC_PINS..).find(|gsi| !taken(*gsi)).unwrap_or(u32::MAX);
        let mut changed = routes.clone();
        changed.push(message_route(gsi, msi));
        self.install(&changed)?;
        *routes = changed;
        Ok(gsi)
    }

    fn unroute(&self, gsi: u32) -> Result<(), Error> {
        let mut routes = self.routes.lock().unwrap_or_else(PoisonError::into_inner);
        let mut changed = routes.clone();
        changed.retain(|route| route.gsi != gsi || gsi < IOAPIC_PINS);
        self.install(&changed)?;
        *routes = changed;
        Ok(())
    }

    fn install(&self, routes: &[kvm_irq_routing_entry]) -> Result<(), Error> {
        let table = KvmIrqRouting::from_entries(routes).map_err(|_| Error::Unsupported {
            backend: "kvm",
            what: format!("a table of {} interrupt routes", routes.len()),
        })?;
        self.fd.set_gsi_routing(&table).map_err(failed("KVM_SET_GSI_ROUTING"))
    }
}

/// The routes a new interrupt controller has: lines reach the IOAPIC and, up to 15, the PICs.
fn default_routes() -> Vec<kvm_irq_routing_entry> {
    let mut routes = Vec::new();
    for gsi in 0..IOAPIC_PINS {
        if gsi < PIC_PINS {
            let chip = if gsi < 8 { KVM_IRQCHIP_PIC_MASTER } else { KVM_IRQCHIP_PIC_SLAVE };
            routes.push(line_route(gsi, chip, gsi % 8));
        }
        routes.push(line_route(gsi, KVM_IRQCHIP_IOAPIC, gsi));
    }
    routes
}

fn line_route(gsi: u32, irqchip: u32, pin: u32) -> kvm_irq_routing_entry {
    let mut route =
        kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_IRQCHIP, ..Default::default() };
    route.u.irqchip = kvm_irq_routing_irqchip { irqchip, pin };
    route
}

fn message_route(gsi: u32, msi: Msi) -> kvm_irq_routing_entry {
    let mut route = kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_MSI, ..Default::default() };
    route.u.msi.address_lo = msi.address as u32;
    route.u.msi.address_hi = (msi.address >> 32) as u32;
    route.u.msi.data = msi.data;
    route
}

/// Raises interrupts in the kernel's controllers.
pub(super) struct KvmInterrupts(pub(super) Arc<Shared>);

impl InterruptSink for KvmInterrupts {
    fn signal_msi(&mut self, msi: Msi) {
        let message = kvm_msi {
            address_lo: msi.address as u32,
            address_hi: (msi.address >> 32) as u32,
            data: msi.data,
            ..Default::default()
        };
        // The guest chose address and data: a message that reaches no LAPIC is lost, as on hardware.
        if let Err(error) = self.0.fd.signal_msi(message) {
            log::debug!("{msi:?} reaches no interrupt controller: {error}");
        }
    }

    fn set_line(&mut self, gsi: u32, high: bool) {
        if let Err(error) = self.0.fd.set_irq_line(gsi, high) {
            log::error!("cannot drive interrupt line {gsi}: {error}");
        }
    }
}
