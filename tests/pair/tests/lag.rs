//! A backup that cannot keep up: the primary waits for it, no more than it must, and shows that it does.

use anyhow::{Context, Result, ensure};
use ledger_client::load::Options;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;
use pair_tests::faults::{proxy, through};
use pair_tests::kills::progress;
use pair_tests::lab::Lab;
use pair_tests::pair::{CHANGE, Pair, wait_for_status};
use pair_tests::patience::eventually;
use pair_tests::proxy::Weather;
use pair_tests::requirements::{Need, met};
use serde_json::json;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const NEEDS: [Need; 2] = [Need::Root, Need::Tap];
const MAX_LAG_MS: u64 = 100;
/// Longer than this the lag must not stay above its bound.
const MOMENT: Duration = Duration::from_millis(500);

/// Between two looks at the lag.
const SAMPLE: Duration = Duration::from_millis(5);

/// Threads that leave a processor little time for anybody else.
struct Hogs {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Hogs {
    fn start(count: usize, cpu: usize) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let spin = |_| {
            let stop = Arc::clone(&stop);
            std::thread::spawn(move || {
                pin_thread(0, cpu).expect("a thread may choose its processor");
                while !stop.load(Ordering::Relaxed) {
                    std::hint::spin_loop();
                }
            })
        };
        Self { threads: (0..count).map(spin).collect(), stop }
    }
}

impl Drop for Hogs {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn pin_thread(thread: i32, cpu: usize) -> nix::Result<()> {
    let mut cpus = CpuSet::new();
    cpus.set(cpu)?;
    sched_setaffinity(Pid::from_raw(thread), &cpus)
}

fn pin_process(pid: u32, cpu: usize) -> Result<()> {
    for task in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        let name = task?.file_name();
        pin_thread(name.to_string_lossy().parse()?, cpu)?;
    }
    Ok(())
}

#[test]
fn a_backup_with_a_busy_processor_slows_the_primary_only_while_it_is_busy() -> Result<()> {
    if !met("backup with a busy processor", &NEEDS) {
        return Ok(());
    }
    let processors = std::thread::available_parallelism()?.get();
    if processors < 2 {
        eprintln!("SKIPPED backup with a busy processor: this machine has one");
        return Ok(());
    }
    let mut pair = Pair::boot(Lab::new()?)?;
    pair.protect_with(&json!({}), &json!({ "max_lag_ms": MAX_LAG_MS }))?;
    // The guest computes without an end, so that a backup with less time falls behind at once.
    pair.primary.console.run("(while :; do :; done) & true", CHANGE)?;
    let backup = pair.backup.as_ref().context("there is no backup")?;
    pin_process(pair.primary.pid(), 0)?;
    pin_process(backup.pid(), 1)?;
    let hogs = Hogs::start(1, 1);
    wait_for_status(&pair.primary, "slowed down", |status| status.throttle > 0.2)?;

    let until = Instant::now() + Duration::from_secs(8);
    let (mut above_since, mut longest, mut most_ms) = (None, Duration::ZERO, 0);
    while Instant::now() < until {
        let status = pair.status()?;
        ensure!(status.state == "protected", "{}", pair.describe());
        std::thread::sleep(SAMPLE);
        most_ms = most_ms.max(status.lag_us / 1000);
        if status.lag_us <= MAX_LAG_MS * 1000 {
            above_since = None;
        } else {
            let since: Instant = *above_since.get_or_insert_with(Instant::now);
            longest = longest.max(since.elapsed());
        }
    }
    println!("at most {most_ms} ms behind, above {MAX_LAG_MS} ms for {longest:?} at a time");
    ensure!(longest < MOMENT, "{longest:?} above {MAX_LAG_MS} ms, up to {most_ms} ms");

    drop(hogs);
    eventually(CHANGE, "the primary has its time back", || {
        let before = pair.status()?.throttled_us;
        std::thread::sleep(Duration::from_secs(1));
        let taken = pair.status()?.throttled_us - before;
        Ok((taken < 100_000).then_some(()))
    })?;
    // Under a load that takes its time it stays so.
    let load = pair.lab.load(Options::new(pair.lab.service()?, "lag"))?;
    progress(&load, 20)?;
    pair.balance(load)
}

#[test]
fn a_full_log_buffer_stops_the_primary_visibly_until_there_is_room() -> Result<()> {
    if !met("full log buffer", &NEEDS) {
        return Ok(());
    }
    let mut pair = Pair::boot(Lab::new()?)?;
    let proxy = proxy(&pair, 1)?;
    // The lag is not to stop it first, nor silence to end it.
    let terms = json!({
        "log_buffer_bytes": 64 << 10,
        "max_lag_ms": 60_000,
        "failure_timeout_ms": 60_000,
    });
    pair.protect_with(&json!({}), &through(&proxy, terms))?;
    let load = pair.lab.load(Options::new(pair.lab.service()?, "full"))?;
    progress(&load, 20)?;
    // What the backup has executed is not heard of any more.
    proxy.set(Weather { mute: true, ..Weather::default() });
    pair.primary.console.type_in("while :; do :; done &\n")?;
    let full = wait_for_status(&pair.primary, "stalled", |status| status.stalled)?;
    ensure!(full.stalls > 0 && full.state == "protected", "{full:?}");
    let point = full.log.recorded_point;
    let behind = full.log.recorded_bytes - full.log.executed_bytes;
    ensure!(behind < 4 * (64 << 10), "{behind} bytes wait in a buffer of 65536: {full:?}");
    // It stands: its log does not grow any more.
    let later = pair.status()?;
    ensure!(later.log.recorded_point - point < 100_000_000, "{later:?}");
    proxy.set(Weather::default());
    wait_for_status(&pair.primary, "goes on", |status| {
        !status.stalled && status.log.recorded_point > point + 100_000_000
    })?;
    eventually(CHANGE, "the client is answered", || Ok(progress(&load, 20).ok()))?;
    pair.balance(load)
}
