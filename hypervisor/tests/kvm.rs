//! What only KVM has, and what it refuses, on guests of a few bytes. Where `/dev/kvm` does not open, each test
//! says that it skips.

use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use hypervisor::kvm::{KvmHypervisor, KvmVm};
use hypervisor::soft::SoftHypervisor;
use hypervisor::{AccessContext, Bus, Error, Exit, Hypervisor, LongModeEntry, Msi, Vcpu, Vm};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

const CODE: u64 = 0x1_0000;
const HANDLER: u64 = 0x1_1000;
const STACK: u64 = 0x2_0000;
const IDT: u64 = 0x5000;
const PAGE_TABLES: u64 = 0x6000;
const GDT: u64 = 0x1000;

/// `lidt [0x5000 - 10]; sti`, the interrupt table of `Guest::new`.
const INTERRUPTS_ON: [u8; 9] = [0x0f, 0x01, 0x1c, 0x25, 0xf6, 0x4f, 0x00, 0x00, 0xfb];
/// `hlt; jmp` to the `hlt`.
const WAIT: [u8; 3] = [0xf4, 0xeb, 0xfd];
/// `out 0x10, al; iretq`.
const ANSWER: [u8; 4] = [0xe6, 0x10, 0x48, 0xcf];

/// Writes to devices, in order; each stops the guest.
#[derive(Default)]
struct Ports(Vec<(u16, Vec<u8>)>);

impl Bus for Ports {
    fn pio_read(&mut self, _port: u16, data: &mut [u8], _cx: &mut AccessContext<'_>) {
        data.fill(0x5a);
    }

    fn pio_write(&mut self, port: u16, data: &[u8], cx: &mut AccessContext<'_>) {
        self.0.push((port, data.to_vec()));
        cx.stop = true;
    }

    fn mmio_read(&mut self, _address: u64, data: &mut [u8], _cx: &mut AccessContext<'_>) {
        data.fill(0xa5);
    }

    fn mmio_write(&mut self, address: u64, data: &[u8], cx: &mut AccessContext<'_>) {
        self.pio_write(address as u16, data, cx);
    }
}

struct Guest {
    vm: KvmVm,
    vcpu: Box<dyn Vcpu>,
    bus: Ports,
}

impl Guest {
    /// A guest that starts with `code`; vector 0x41 answers.
    fn new(code: &[u8]) -> Option<Self> {
        let kvm = match KvmHypervisor::open() {
            Ok(kvm) => kvm,
            Err(error) => {
                println!("SKIPPED: {error}");
                return None;
            }
        };
        let memory = hypervisor::memory::allocate(&[(0, 1 << 20)]).unwrap();
        let put = |address, bytes: &[u8]| memory.write_slice(bytes, GuestAddress(address)).unwrap();
        put(CODE, code);
        put(HANDLER, &ANSWER);
        put(GDT + 8, &0x00af_9b00_0000_ffff_u64.to_le_bytes());
        put(GDT + 16, &0x00cf_9300_0000_ffff_u64.to_le_bytes());
        put(IDT - 10, &0xfff_u16.to_le_bytes());
        put(IDT - 8, &IDT.to_le_bytes());
        let gate = (HANDLER & 0xffff) | 8 << 16 | 0x8e00 << 32 | (HANDLER & 0xffff_0000) << 32;
        put(IDT + 0x41 * 16, &gate.to_le_bytes());
        // One page of 2 MiB.
        put(PAGE_TABLES, &(PAGE_TABLES + 0x1000 + 0x23).to_le_bytes());
        put(PAGE_TABLES + 0x1000, &(PAGE_TABLES + 0x2000 + 0x23).to_le_bytes());
        put(PAGE_TABLES + 0x2000, &0xe3_u64.to_le_bytes());
        let mut vm = kvm.create_kvm_vm(memory).unwrap();
        let mut vcpu = vm.create_vcpu(0).unwrap();
        vcpu.reset(&LongModeEntry {
            rip: CODE,
            rsp: STACK,
            rsi: 0,
            cr3: PAGE_TABLES,
            gdt_base: GDT,
            gdt_limit: 0x17,
            code_selector: 8,
            data_selector: 16,
        })
        .unwrap();
        Some(Self { vm, vcpu, bus: Ports::default() })
    }

    /// Runs until something happens; a watchdog kicks a guest that is stuck.
    fn run(&mut self) -> Exit {
        let kicker = self.vcpu.kicker();
        let (alive, ended) = channel::<()>();
        std::thread::scope(|scope| {
            scope.spawn(move || {
                if ended.recv_timeout(Duration::from_secs(30)) == Err(RecvTimeoutError::Timeout) {
                    kicker.kick();
                }
            });
            let exit = self.vcpu.run(None, &mut self.bus).unwrap();
            drop(alive);
            exit
        })
    }
}

fn waiting_guest() -> Option<Guest> {
    let mut code = INTERRUPTS_ON.to_vec();
    code.extend(WAIT);
    Guest::new(&code)
}

fn msi(vector: u32) -> Msi {
    Msi { address: 0xfee0_0000, data: vector }
}

#[test]
fn an_instruction_count_is_refused() {
    let Some(mut guest) = Guest::new(&WAIT) else { return };
    let error = guest.vcpu.run(Some(1000), &mut guest.bus).unwrap_err();
    assert!(matches!(error, Error::Unsupported { backend: "kvm", .. }), "{error}");
    assert_eq!(guest.vcpu.retired(), 0);
}

#[test]
fn a_kick_reaches_a_guest_that_waits_and_one_that_will_run() {
    let Some(mut guest) = Guest::new(&WAIT) else { return };
    guest.vcpu.kicker().kick();
    assert_eq!(guest.run(), Exit::Kicked);
    for _ in 0..200 {
        let kicker = guest.vcpu.kicker();
        std::thread::scope(|scope| {
            scope.spawn(move || kicker.kick());
            assert_eq!(guest.vcpu.run(None, &mut guest.bus).unwrap(), Exit::Kicked);
        });
    }
}

#[test]
fn an_access_that_stops_the_guest_is_done_when_it_has_stopped() {
    // mov eax, 0x12345678; out 0x30, eax; in al, 0x31; out 0x32, al
    let code = [0xb8, 0x78, 0x56, 0x34, 0x12, 0xe7, 0x30, 0xe4, 0x31, 0xe6, 0x32, 0xf4];
    let Some(mut guest) = Guest::new(&code) else { return };
    assert_eq!(guest.run(), Exit::Stopped);
    // Had OUT not been finished, KVM would finish it over the registers restored here.
    let saved = guest.vcpu.save().unwrap();
    assert_eq!(guest.run(), Exit::Stopped);
    guest.vcpu.restore(&saved).unwrap();
    assert_eq!(guest.run(), Exit::Stopped);
    let word = 0x1234_5678_u32.to_le_bytes().to_vec();
    assert_eq!(guest.bus.0, [(0x30, word), (0x32, vec![0x5a]), (0x32, vec![0x5a])]);
}

#[test]
fn a_triple_fault_is_a_shutdown() {
    // Without an interrupt table: ud2.
    let Some(mut guest) = Guest::new(&[0x0f, 0x0b]) else { return };
    assert_eq!(guest.run(), Exit::Shutdown);
}

#[test]
fn another_backends_state_is_refused() {
    let Some(mut guest) = Guest::new(&WAIT) else { return };
    let memory = hypervisor::memory::allocate(&[(0, 1 << 20)]).unwrap();
    let mut vm = SoftHypervisor.create_vm(memory).unwrap();
    let state = vm.create_vcpu(0).unwrap().save().unwrap();
    assert!(matches!(guest.vcpu.restore(&state), Err(Error::Restore { .. })));
}

#[test]
fn a_message_wakes_the_guest_from_this_process_and_by_irqfd() {
    let Some(mut guest) = waiting_guest() else { return };
    // The LAPIC is off after reset and takes no message until its spurious vector register (at 0xf0) is on.
    enable_lapic(&mut *guest.vcpu);
    guest.vcpu.interrupts().signal_msi(msi(0x41));
    assert_eq!(guest.run(), Exit::Stopped);
    assert_eq!(guest.bus.0.len(), 1);

    let event = EventFd::new(0).unwrap();
    let gsi = guest.vm.add_irqfd(&event, msi(0x41)).unwrap();
    assert!(gsi >= 24, "lines keep their numbers");
    for signals in 2..10 {
        event.write(1).unwrap();
        assert_eq!(guest.run(), Exit::Stopped);
        assert_eq!(guest.bus.0.len(), signals);
    }
    guest.vm.remove_irqfd(&event, gsi).unwrap();
    event.write(1).unwrap();
    guest.vcpu.kicker().kick();
    assert_eq!(guest.run(), Exit::Kicked);
    assert_eq!(guest.bus.0.len(), 9);
}

/// As the guest would: by the saved state, whose LAPIC page is the one stretch of 1024 bytes in it.
fn enable_lapic(vcpu: &mut dyn Vcpu) {
    let mut state = serde_json::to_value(vcpu.save().unwrap()).unwrap();
    state["Kvm"]["lapic"][0xf0] = 0xff.into();
    state["Kvm"]["lapic"][0xf1] = 1.into();
    vcpu.restore(&serde_json::from_value(state).unwrap()).unwrap();
}
