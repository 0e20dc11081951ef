//! How fast the software CPU is: the test guest's kernel boot and fixed load, in guest instructions per second,
//! next to what the host takes for the same programs natively.
//!
//! `cargo bench --bench soft_cpu`, after `scripts/build-guest`. Another guest directory can be given in
//! `DYAD_GUEST`. There is no input and no host I/O, and guest time jumps over what the guest sleeps: each run
//! executes the same instructions. Seconds are CPU seconds of the thread, so that other load on the host counts little.

use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use hypervisor::soft::SoftHypervisor;
use hypervisor::{Anchor, Exit, Hypervisor, Vcpu};
use nix::time::{ClockId, clock_gettime};
use vmm::boot::Payload;
use vmm::config::{ConsoleMode, VmConfig};
use vmm::machine::{HostFacts, Machine, MachineEffect, layout};

/// Guest memory in bytes.
const MEMORY: u64 = 512 << 20;
/// Instructions between two looks at the serial port.
const QUANTUM: u64 = 1_000_000;

/// The parts of `tests/guest/root/bin/bench` as the host can run them, with `$BUSYBOX` for the same program and
/// `$FILE` for the file the guest writes.
const NATIVE: [(&str, &str); 4] = [
    ("shell-loop", "i=0; while [ $i -lt 300000 ]; do i=$((i + 1)); done"),
    ("sha256sum", "$BUSYBOX sha256sum $FILE"),
    ("gzip", "$BUSYBOX gzip -1 -c $FILE"),
    ("fork-exec", "i=0; while [ $i -lt 300 ]; do $BUSYBOX true; i=$((i + 1)); done"),
];

/// What a part of the load took.
struct Part {
    name: String,
    instructions: u64,
    seconds: f64,
}

fn main() -> Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let directory =
        std::env::var_os("DYAD_GUEST").map_or_else(|| root.join("build/guest"), PathBuf::from);
    let (kernel, initramfs) = (directory.join("vmlinuz"), directory.join("initramfs"));
    if !kernel.exists() || !initramfs.exists() {
        println!("skipped: there is no guest in {}; run scripts/build-guest", directory.display());
        return Ok(());
    }
    let payload =
        Payload::read(&kernel, Some(&initramfs), "console=ttyS0 quiet dyad.run=bench", MEMORY)?;
    let busybox = initramfs_file(&std::fs::read(&initramfs)?, "bin/busybox")
        .with_context(|| format!("{} has no bin/busybox", initramfs.display()))?;
    let native = native(&busybox)?;

    let parts = run(&payload)?;
    println!(
        "{:<12} {:>16} {:>9} {:>14} {:>9} {:>7}",
        "part", "instructions", "seconds", "million/s", "native s", "times"
    );
    for part in &parts {
        let speed = part.instructions as f64 / part.seconds / 1e6;
        print!("{:<12} {:>16} {:>9.2} {speed:>14.1}", part.name, part.instructions, part.seconds);
        match native.iter().find(|(name, _)| *name == part.name) {
            Some((_, seconds)) => println!(" {seconds:>9.3} {:>7.1}", part.seconds / seconds),
            None => println!(" {:>9} {:>7}", "-", "-"),
        }
    }
    let instructions: u64 = parts.iter().map(|part| part.instructions).sum();
    let seconds: f64 = parts.iter().map(|part| part.seconds).sum();
    let speed = instructions as f64 / seconds / 1e6;
    println!("{:<12} {instructions:>16} {seconds:>9.2} {speed:>14.1}", "all");
    Ok(())
}

/// Boots the guest, which runs its load and powers off.
fn run(payload: &Payload) -> Result<Vec<Part>> {
    let mut config = VmConfig::default();
    config.serial.mode = ConsoleMode::Null;
    config.complete(|| [0; 5]);
    let memory = hypervisor::memory::allocate(&layout::ram_ranges(MEMORY))?;
    let host = HostFacts { boot_wall_ns: 1_700_000_000_000_000_000, disk_sectors: Vec::new() };
    let mut machine = Machine::new(&config, memory.clone(), &host)?;
    let entry = machine.load(payload)?;
    let mut vm = SoftHypervisor.create_vm(memory)?;
    let mut vcpu = vm.create_vcpu(0)?;
    vcpu.reset(&entry)?;

    let mut parts = Vec::new();
    let mut line = Vec::new();
    let (mut seconds, mut instructions) = (cpu_seconds()?, 0);
    let started = Instant::now();
    loop {
        let exit = vcpu.run(Some(vcpu.retired() + QUANTUM), &mut machine)?;
        let mut output = Vec::new();
        for effect in std::mem::take(machine.effects()) {
            match effect {
                MachineEffect::Serial { bytes } => output.extend(bytes),
                MachineEffect::PowerOff => return Ok(parts),
                MachineEffect::Reset => bail!("the guest reset itself"),
                _ => {}
            }
        }
        for byte in output {
            if byte != b'\n' {
                line.push(byte);
                continue;
            }
            let text = String::from_utf8_lossy(&std::mem::take(&mut line)).trim().to_owned();
            match text.split(' ').collect::<Vec<_>>()[..] {
                ["bench", "done"] => {}
                ["bench", name, ..] => {
                    let now = cpu_seconds()?;
                    let name = if name == "start" { "boot" } else { name }.to_owned();
                    let part_instructions = vcpu.retired() - instructions;
                    let part_seconds = now - seconds;
                    parts.push(Part {
                        name,
                        instructions: part_instructions,
                        seconds: part_seconds,
                    });
                    (seconds, instructions) = (now, vcpu.retired());
                }
                _ => {}
            }
        }
        match exit {
            Exit::Halted if !skip_to_timer(&mut *vcpu) => bail!("the guest waits for ever"),
            Exit::Shutdown => bail!("the guest ended in a triple fault"),
            _ => {}
        }
        if started.elapsed() > Duration::from_secs(1800) {
            bail!("the guest has not finished its load in half an hour");
        }
    }
}

/// The guest waits for its timer: lets guest time jump there. False if it waits for ever.
fn skip_to_timer(vcpu: &mut dyn Vcpu) -> bool {
    let Some(tsc) = vcpu.next_timer_tsc() else { return false };
    let rate = vcpu.anchor().rate;
    vcpu.set_anchor(Anchor { point: vcpu.retired(), tsc: tsc.max(vcpu.tsc()), rate });
    true
}

/// CPU time of this thread.
fn cpu_seconds() -> Result<f64> {
    let time = Duration::from(clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)?);
    Ok(time.as_secs_f64())
}

/// CPU time of ended children.
fn children_seconds() -> Result<f64> {
    let usage = nix::sys::resource::getrusage(nix::sys::resource::UsageWho::RUSAGE_CHILDREN)?;
    let seconds =
        |time: nix::sys::time::TimeVal| time.tv_sec() as f64 + time.tv_usec() as f64 / 1e6;
    Ok(seconds(usage.user_time()) + seconds(usage.system_time()))
}

/// Runs the parts of the load on the host, with the guest's own busybox: CPU seconds of each.
fn native(busybox: &[u8]) -> Result<Vec<(&'static str, f64)>> {
    let directory = tempfile::tempdir()?;
    let program = directory.path().join("busybox");
    std::fs::write(&program, busybox)?;
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755))?;
    let file = directory.path().join("zeros");
    std::fs::File::create(&file)?.write_all(&vec![0; 16 << 20])?;
    let mut times = Vec::new();
    for (name, script) in NATIVE {
        let before = children_seconds()?;
        let mut command = Command::new(&program);
        command.args(["sh", "-c", script]).env("BUSYBOX", &program).env("FILE", &file);
        let status = command.stdout(std::process::Stdio::null()).status()?;
        if !status.success() {
            bail!("{name} failed on the host");
        }
        times.push((name, children_seconds()? - before));
    }
    Ok(times)
}

/// A file of an initramfs (cpio archive in the "newc" format, not compressed).
fn initramfs_file(archive: &[u8], wanted: &str) -> Option<Vec<u8>> {
    let mut rest = archive;
    loop {
        let header = rest.get(..110)?;
        if !header.starts_with(b"070701") {
            return None;
        }
        let field = |number: usize| {
            let digits = header.get(6 + number * 8..14 + number * 8)?;
            usize::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()
        };
        let (size, name_size) = (field(6)?, field(11)?);
        let name = rest.get(110..110 + name_size.checked_sub(1)?)?;
        let content = (110 + name_size).next_multiple_of(4);
        if name == wanted.as_bytes() {
            return rest.get(content..content + size).map(<[u8]>::to_vec);
        }
        rest = rest.get((content + size).next_multiple_of(4)..)?;
    }
}
