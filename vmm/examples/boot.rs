//! Boots a Linux kernel on the software CPU, in guest time that runs as fast as it can, with the
//! serial port on standard output, and says how fast that was.
//!
//! `cargo run --release -p vmm --example boot -- KERNEL INITRAMFS [CMDLINE]`
//!
//! There is no input and no host I/O: each run executes the same instructions. It ends when the guest
//! powers off.

use std::error::Error;
use std::io::Write;
use std::path::Path;
use std::time::Instant;

use ft::Event;
use hypervisor::{AccessContext, Anchor, Exit, Hypervisor, InterruptSink, Msi, Vcpu};
use vmm::boot::Payload;
use vmm::config::{ConsoleMode, VmConfig};
use vmm::machine::{HostFacts, Machine, MachineEffect, layout};

/// Guest memory in bytes.
const MEMORY: u64 = 512 << 20;
/// Instructions between two looks at the serial port.
const QUANTUM: u64 = 1_000_000;

/// Collects interrupts that events raise, for the processor to take afterwards.
#[derive(Default)]
struct Raised {
    messages: Vec<Msi>,
    lines: Vec<(u32, bool)>,
}

impl InterruptSink for Raised {
    fn signal_msi(&mut self, msi: Msi) {
        self.messages.push(msi);
    }

    fn set_line(&mut self, gsi: u32, high: bool) {
        self.lines.push((gsi, high));
    }
}

fn apply(machine: &mut Machine, vcpu: &mut dyn Vcpu, event: &Event) -> Result<(), Box<dyn Error>> {
    let mut raised = Raised::default();
    let mut cx = AccessContext {
        retired: vcpu.retired(),
        tsc: vcpu.tsc(),
        interrupts: &mut raised,
        stop: false,
    };
    machine.apply(event, &mut cx)?;
    for msi in raised.messages {
        vcpu.interrupts().signal_msi(msi);
    }
    for (gsi, high) in raised.lines {
        vcpu.interrupts().set_line(gsi, high);
    }
    Ok(())
}

/// The guest waits for its timer: lets guest time jump there. False if it waits for ever.
fn skip_to_timer(vcpu: &mut dyn Vcpu) -> bool {
    let Some(tsc) = vcpu.next_timer_tsc() else { return false };
    let rate = vcpu.anchor().rate;
    vcpu.set_anchor(Anchor { point: vcpu.retired(), tsc: tsc.max(vcpu.tsc()), rate });
    true
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [kernel, initramfs, rest @ ..] = &arguments[..] else {
        return Err("usage: boot KERNEL INITRAMFS [CMDLINE]".into());
    };
    let cmdline = rest.first().map_or("console=ttyS0", String::as_str);

    let mut config = VmConfig::default();
    config.serial.mode = ConsoleMode::Null;
    config.complete(|| [0; 5]);
    let memory = hypervisor::memory::allocate(&layout::ram_ranges(MEMORY))?;
    let host = HostFacts { boot_wall_ns: 1_700_000_000_000_000_000, disk_sectors: Vec::new() };
    let mut machine = Machine::new(&config, memory.clone(), &host)?;
    let initramfs = Some(Path::new(initramfs)).filter(|path| path.exists());
    let entry = machine.load(&Payload::read(Path::new(kernel), initramfs, cmdline, MEMORY)?)?;
    let mut vm = hypervisor::soft::SoftHypervisor.create_vm(memory)?;
    let mut vcpu = vm.create_vcpu(0)?;
    vcpu.reset(&entry)?;

    let started = Instant::now();
    let mut entropy = 0u8;
    'run: loop {
        let exit = vcpu.run(Some(vcpu.retired() + QUANTUM), &mut machine)?;
        for effect in std::mem::take(machine.effects()) {
            match effect {
                MachineEffect::Serial { bytes } | MachineEffect::Console { bytes, .. } => {
                    std::io::stdout().write_all(&bytes)?;
                    std::io::stdout().flush()?;
                }
                MachineEffect::EntropyWanted { device, len } => {
                    entropy = entropy.wrapping_add(1);
                    let bytes = (0..len).map(|i| entropy.wrapping_mul(i as u8)).collect();
                    apply(&mut machine, &mut *vcpu, &Event::Entropy { device, bytes })?;
                }
                MachineEffect::PowerOff | MachineEffect::Reset => break 'run,
                MachineEffect::Block { .. } | MachineEffect::Frames { .. } => {}
            }
        }
        match exit {
            Exit::Until | Exit::Kicked | Exit::Stopped => {}
            Exit::Halted if skip_to_timer(&mut *vcpu) => {}
            Exit::Halted => {
                eprintln!("the guest waits for ever");
                break;
            }
            Exit::Shutdown => {
                eprintln!("triple fault");
                break;
            }
        }
    }
    let seconds = started.elapsed().as_secs_f64();
    let retired = vcpu.retired();
    eprintln!(
        "{retired} instructions in {seconds:.2} s: {:.1} million per second",
        retired as f64 / seconds / 1e6
    );
    Ok(())
}
