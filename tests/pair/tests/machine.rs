//! One guest on one host: it boots, keeps time, costs nothing when idle, and goes down when told.

use anyhow::{Context, Result, ensure};
use ledger_client::load::Options;
use ledger_client::verdict::Verdict;
use pair_tests::lab::Lab;
use pair_tests::network::Side;
use pair_tests::pair::{BOOT, CHANGE};
use pair_tests::requirements::{Need, met};
use pair_tests::vmm::Vmm;
use serde_json::json;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

const NEEDS: [Need; 2] = [Need::Root, Need::Tap];
const PATIENCE: Duration = Duration::from_secs(30);

/// Guest time minus host time, in seconds.
fn clock_error(vmm: &mut Vmm) -> Result<f64> {
    let before = SystemTime::now();
    let guest = vmm.console.run("cat /proc/uptime; date +%s", PATIENCE)?;
    let after = SystemTime::now();
    let date: f64 = guest.lines().last().context("no date")?.trim().parse()?;
    let seconds =
        |time: SystemTime| time.duration_since(UNIX_EPOCH).map(|since| since.as_secs_f64());
    let (before, after) = (seconds(before)?, seconds(after)?);
    // `date` gives whole seconds: right is anything from `before` cut to its second to `after`.
    Ok(if date < before.floor() { date - before.floor() } else { (date - after).max(0.0) })
}

#[test]
fn a_stock_kernel_boots_keeps_time_idles_reboots_and_powers_off() -> Result<()> {
    if !met("boot, time, idle, reboot, power button", &NEEDS) {
        return Ok(());
    }
    let lab = Lab::new()?;
    let start = Instant::now();
    let mut vmm = lab.start(Side::A, &lab.boot_options(""))?;
    vmm.console.wait_for("# ", BOOT)?;
    println!("shell prompt after {:.1} s", start.elapsed().as_secs_f64());
    ensure!(vmm.state()? == "Running", "vm.info says {}", vmm.state()?);

    let error = clock_error(&mut vmm)?;
    ensure!(error.abs() < 1.5, "the guest's date is off by {error} s");
    let start = Instant::now();
    vmm.console.run("sleep 5", PATIENCE)?;
    let slept = start.elapsed().as_secs_f64();
    ensure!((4.9..5.6).contains(&slept), "sleep 5 took {slept} s of host time");

    let write = "dd if=/dev/urandom of=/data/noise bs=64k count=128 2>/dev/null; sha256sum /data/noise; \
                 sync; echo 3 >/proc/sys/vm/drop_caches; sha256sum /data/noise; rm /data/noise";
    let sums = vmm.console.run(write, PATIENCE)?;
    let sums: Vec<&str> = sums.lines().collect();
    ensure!(sums.len() == 2 && sums[0] == sums[1], "written and read back differ: {sums:?}");

    let answers = {
        let options = Options { requests: Some(200), ..Options::new(lab.service()?, "machine") };
        lab.load(options)?.finish()?
    };

    let (time, cpu) = (Instant::now(), vmm.cpu_time()?);
    std::thread::sleep(Duration::from_secs(10));
    let idle = (vmm.cpu_time()? - cpu).as_secs_f64() / time.elapsed().as_secs_f64();
    println!("an idle guest takes {:.2} % of a host CPU", idle * 100.0);
    ensure!(idle < 0.03, "an idle guest takes {:.1} % of a host CPU", idle * 100.0);
    let error = clock_error(&mut vmm)?;
    ensure!(error.abs() < 1.5, "after idling, the guest's date is off by {error} s");

    vmm.console.type_in("reboot\n")?;
    vmm.console.wait_for("guest: shell after", BOOT).context("after reboot")?;
    vmm.console.wait_for("# ", PATIENCE)?;
    vmm.api().put("vm.power-button")?;
    let status = vmm.wait(CHANGE).context("after the power button")?;
    ensure!(status.success(), "dyad ended with {status}: {}", vmm.log());
    lab.disk.check()?;
    let verdict = Verdict::of(&answers, &lab.disk.ledger()?);
    ensure!(verdict.is_clean(), "{verdict:?}");
    Ok(())
}

/// Flags of the mappings of process `pid` that are large enough to be its guest's memory: 256 MiB.
fn flags_of_guest_memory(pid: u32) -> Result<Vec<String>> {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/smaps"))?;
    let (mut large, mut flags) = (false, Vec::new());
    for line in maps.lines() {
        if let Some(size) = line.strip_prefix("Size:") {
            large = size.trim().trim_end_matches(" kB").parse::<u64>()? >= 256 << 10;
        }
        flags.extend(line.strip_prefix("VmFlags:").filter(|_| large).map(str::to_owned));
    }
    Ok(flags)
}

#[test]
fn huge_pages_are_asked_for_unless_a_vm_is_not_to_have_them() -> Result<()> {
    if !met("huge pages", &NEEDS) {
        return Ok(());
    }
    if !std::fs::exists("/sys/kernel/mm/transparent_hugepage")? {
        println!("skipped: the kernel has no transparent huge pages");
        return Ok(());
    }
    for (memory, wanted) in [("size=256M", true), ("size=256M,thp=off", false)] {
        let lab = Lab::new()?;
        let mut options = lab.boot_options("");
        let given = options.iter_mut().find(|option| *option == "size=256M");
        *given.context("the lab's guests have other memory")? = memory.to_owned();
        let mut vmm = lab.start(Side::A, &options)?;
        vmm.console.wait_for("# ", BOOT)?;
        let flags = flags_of_guest_memory(vmm.pid())?;
        ensure!(!flags.is_empty(), "no mapping is as large as the guest's memory");
        let asked = flags.iter().any(|flags| flags.split_whitespace().any(|flag| flag == "hg"));
        ensure!(asked == wanted, "{memory}: {flags:?}");
    }
    Ok(())
}

#[test]
fn a_restored_guest_goes_on_on_the_same_connection() -> Result<()> {
    if !met("pause, snapshot, restore", &NEEDS) {
        return Ok(());
    }
    let lab = Lab::new()?;
    let mut vmm = lab.start(Side::A, &lab.boot_options(""))?;
    vmm.console.wait_for("# ", BOOT)?;
    let load = lab.load(Options::new(lab.service()?, "snapshot"))?;
    load.wait_for_answers(50)?;

    vmm.api().put("vm.pause")?;
    ensure!(vmm.state()? == "Paused", "vm.info says {}", vmm.state()?);
    vmm.api().put("vm.resume")?;
    load.wait_for_answers(load.answered() + 50)?;

    vmm.api().put("vm.pause")?;
    let snapshot = lab.directory().join("snapshot");
    std::fs::create_dir(&snapshot)?;
    let url = format!("file://{}", snapshot.display());
    vmm.api().put_json("vm.snapshot", &json!({ "destination_url": url }))?;
    vmm.kill()?;
    let paused = load.answered();

    let mut vmm = lab.start(Side::A, &[])?;
    vmm.api().put_json("vm.restore", &json!({ "source_url": url, "resume": true }))?;
    load.wait_for_answers(paused + 50)?;
    let answers = load.stop()?;
    vmm.api().put("vm.power-button")?;
    vmm.wait(CHANGE)?;
    lab.disk.check()?;
    let verdict = Verdict::of(&answers, &lab.disk.ledger()?);
    ensure!(verdict.is_clean() && verdict.acknowledged >= 150, "{verdict:?}");
    Ok(())
}
