//! The shared image: whose it is, and who may write to it.

use anyhow::{Context, Result, ensure};
use ledger_client::load::{Load, Options};
use ledger_client::verdict::Verdict;
use nix::sys::signal::Signal;
use pair_tests::kills::progress;
use pair_tests::lab::Lab;
use pair_tests::pair::{CHANGE, Death, Pair, wait_for_status};
use pair_tests::patience::eventually;
use pair_tests::requirements::{Need, met};
use std::fs::File;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

const NEEDS: [Need; 2] = [Need::Root, Need::Tap];

/// A second VMM on the image must end with an error that names it.
fn refused(pair: &Pair, options: &[String]) -> Result<()> {
    let text = match pair.lab.start(pair.side.other(), options) {
        // It may answer before it boots.
        Ok(mut second) => {
            let status = second.wait(CHANGE).context("a second VM runs on the image")?;
            ensure!(!status.success(), "{}", second.log());
            second.log()
        }
        Err(error) => format!("{error:#}"),
    };
    let image = pair.lab.disk.path().display().to_string();
    ensure!(text.contains(&image) && text.contains("in use by another VM"), "{text}");
    Ok(())
}

#[test]
fn a_primary_restarted_from_its_command_line_is_refused() -> Result<()> {
    if !met("a restarted primary", &NEEDS) {
        return Ok(());
    }
    let lab = Lab::new()?;
    let command_line = lab.boot_options("");
    let mut pair = Pair::boot(lab)?;
    let load = pair.lab.load(Options::new(pair.lab.service()?, "restarted"))?;
    refused(&pair, &command_line).context("beside a live VM")?;
    pair.protect()?;
    progress(&load, 20)?;
    pair.kill_primary(Death::Process)?;
    pair.wait_until_alone()?;
    progress(&load, 20)?;
    refused(&pair, &command_line).context("after the failover")?;
    progress(&load, 20)?;

    // The lock goes with the process that held it, however it ended.
    let answers = load.stop()?;
    pair.primary.kill()?;
    pair.lab.disk.check()?;
    let verdict = Verdict::of(&answers, &pair.lab.disk.ledger()?);
    ensure!(verdict.is_clean(), "{verdict:?}");
    let mut again = pair.lab.start(pair.side, &command_line)?;
    again.console.wait_for("# ", CHANGE)?;
    again.kill()?;
    Ok(())
}

#[test]
fn a_primary_frozen_while_it_writes_writes_nothing_after_its_successor() -> Result<()> {
    if !met("a primary frozen while it writes", &NEEDS) {
        return Ok(());
    }
    let mut pair = Pair::boot(Lab::new()?)?;
    let mut options = Options::new(pair.lab.service()?, "frozen");
    // Each answer is a write and a flush; with several connections one is under way at any time.
    options.connections = 4;
    options.padding = 4000;
    let load = pair.lab.load(options)?;
    for round in 0..2 {
        pair.protect()?;
        progress(&load, 40)?;
        pair.primary.signal(Signal::SIGSTOP)?;
        let stopped = Instant::now();
        let mut old = pair.change_sides()?;
        load.first_answer_after(stopped)?;
        // It is alive and holds its lock: the successor neither fails nor waits for it.
        progress(&load, 40)?;
        pair.primary.wait_for_log("in use by another VM")?;
        old.signal(Signal::SIGCONT)?;
        wait_for_status(&old, "halted", |status| status.state == "halted")?;
        let locked = pair.primary.wait_for_log("is locked for this VM now");
        locked.with_context(|| format!("round {round}"))?;
        progress(&load, 40)?;
        old.kill()?;
    }
    pair.balance(load)
}

/// A small file system that both hosts reach, unmounted at the end.
struct Storage {
    directory: tempfile::TempDir,
}

impl Storage {
    fn new(bytes: u64) -> Result<Self> {
        let directory = tempfile::Builder::new().prefix("dyad-storage-").tempdir()?;
        let (kind, size) = (["-t", "tmpfs", "-o"], format!("size={bytes}"));
        let mount = Command::new("mount")
            .args(kind)
            .args([&size, "none"])
            .arg(directory.path())
            .status()?;
        ensure!(mount.success(), "no file system can be mounted: {mount}");
        Ok(Self { directory })
    }

    /// An image of which nothing is allocated.
    fn image(&self, bytes: u64) -> Result<PathBuf> {
        let path = self.directory.path().join("sparse.raw");
        File::create(&path)?.set_len(bytes)?;
        Ok(path)
    }

    fn filler(&self) -> PathBuf {
        self.directory.path().join("filler")
    }

    /// Leaves no more than `bytes` of room.
    fn fill(&self, bytes: u64) -> Result<()> {
        let stat = nix::sys::statvfs::statvfs(self.directory.path())?;
        let room = stat.blocks_available() * stat.fragment_size();
        let filler = File::create(self.filler())?;
        let length = i64::try_from(room.saturating_sub(bytes))?;
        let how = nix::fcntl::FallocateFlags::empty();
        Ok(nix::fcntl::fallocate(&filler, how, 0, length)?)
    }

    fn make_room(&self) -> Result<()> {
        Ok(std::fs::remove_file(self.filler())?)
    }
}

impl Drop for Storage {
    fn drop(&mut self) {
        // Lazily: a VMM that is being killed may hold the image a moment longer.
        let _ = Command::new("umount").arg("-l").arg(self.directory.path()).status();
    }
}

const SPARSE_BYTES: u64 = 32 << 20;
/// Less than what the guest writes.
const ROOM_BYTES: u64 = 2 << 20;
const PATIENCE: Duration = Duration::from_secs(60);
/// Writes six mebibytes to the sparse disk and says how that went. Written anew each time, since the guest
/// forgets what its disk did not take.
const WRITE: &str =
    "dd if=/data/noise of=/dev/vdb bs=64k conv=fsync >/dev/null 2>&1 && echo done || echo failed";
/// What the disk itself holds of that, and what it should.
const SUMS: &str = "echo 3 >/proc/sys/vm/drop_caches; \
    dd if=/dev/vdb bs=64k count=96 2>/dev/null | sha256sum; sha256sum </data/noise";

fn holds_what_was_written(pair: &mut Pair) -> Result<()> {
    let said = pair.primary.console.run(SUMS, PATIENCE)?;
    let sums: Vec<&str> = said.lines().filter(|line| line.ends_with(" -")).collect();
    ensure!(sums.len() == 2 && sums[0] == sums[1], "{said}");
    Ok(())
}

#[test]
fn a_shared_disk_that_is_full_fails_writes_on_both_sides_alike_until_there_is_room() -> Result<()> {
    if !met("full storage under a shared disk", &NEEDS) {
        return Ok(());
    }
    let storage = Storage::new(SPARSE_BYTES + (8 << 20))?;
    let mut lab = Lab::new()?;
    lab.more_disks.push(storage.image(SPARSE_BYTES)?);
    let mut pair = Pair::boot(lab)?;
    let load = pair.lab.load(Options::new(pair.lab.service()?, "full"))?;
    fills_up(&mut pair, &load, &storage).with_context(|| pair.describe())?;
    pair.balance(load)
}

fn fills_up(pair: &mut Pair, load: &Load, storage: &Storage) -> Result<()> {
    // The kernel has much to say of a disk that fails, on the same console.
    let noise = "echo 1 >/proc/sys/kernel/printk; \
                 dd if=/dev/urandom of=/data/noise bs=64k count=96 2>/dev/null; sync";
    pair.primary.console.run(noise, PATIENCE)?;
    pair.protect()?;
    storage.fill(ROOM_BYTES)?;
    let said = pair.primary.console.run(WRITE, PATIENCE)?;
    ensure!(said == "failed", "written to a full disk: {said}");
    // Both sides have heard the same of each request.
    let compared = pair.digests_are_equal()?;
    eventually(CHANGE, "digests are compared", || {
        ensure!(pair.status()?.state == "protected", "{:?}", pair.status()?);
        Ok((pair.digests_are_equal()? > compared + 2).then_some(()))
    })?;
    progress(load, 20)?;

    // The primary dies with writes under way that its successor cannot do either.
    pair.primary.console.type_in(&format!("while :; do {WRITE}; usleep 200000; done &\n"))?;
    pair.primary.console.wait_for("failed\n", PATIENCE)?;
    let dead = pair.kill_primary(Death::Process)?;
    load.first_answer_after(dead)?;
    pair.wait_until_alone()?;
    println!("live {:?} after the kill", dead.elapsed());
    pair.protect()?;
    println!("protected again {:?} after the kill", dead.elapsed());
    progress(load, 20)?;
    pair.primary.console.wait_for("failed", PATIENCE).context("it hears of it here too")?;

    storage.make_room()?;
    println!("room is made {:?} after the kill", dead.elapsed());
    pair.primary.console.wait_for("done", PATIENCE).context("there is room")?;
    pair.primary.console.type_in("kill %1\n")?;
    let said = pair.primary.console.run(WRITE, PATIENCE)?;
    ensure!(said.contains("done"), "{said}");
    holds_what_was_written(pair)?;
    let dead = pair.kill_primary(Death::Process)?;
    load.first_answer_after(dead)?;
    holds_what_was_written(pair).context("after another failover")?;
    progress(load, 20)?;
    Ok(())
}
