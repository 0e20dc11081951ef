//! Disks that the backup works with itself. Mirrored ones, of which each side has its own image: copied while the guest
//! writes, alike when it rests, and good for going on whatever dies. And shared ones, if the backup is to read them itself.

use anyhow::{Context, Result, ensure};
use ft::FtStatus;
use ledger_client::load::{Load, Options};
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use pair_tests::disk::Disk;
use pair_tests::kills::progress;
use pair_tests::lab::{DISK_BYTES, Lab};
use pair_tests::mirrors::{alike, image_of, mirrored, receive};
use pair_tests::network::Side;
use pair_tests::pair::{CHANGE, Death, Pair, listen_url, wait_for_status};
use pair_tests::patience::eventually;
use pair_tests::requirements::{Need, met};
use serde_json::{Value, json};
use std::ffi::OsStr;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};
use tempfile::{NamedTempFile, TempDir};

const NEEDS: [Need; 2] = [Need::Root, Need::Tap];
const NEEDS_LOOP: [Need; 3] = [Need::Root, Need::Tap, Need::LoopDevice];
const PATIENCE: Duration = Duration::from_secs(60);

fn image_of_b(lab: &Lab) -> PathBuf {
    image_of(lab, Side::B)
}

fn for_good() -> Value {
    let standbys = [Side::A, Side::B].map(listen_url);
    json!({ "disk_mode": "mirrored", "standbys": standbys })
}

fn load(pair: &Pair, name: &str) -> Result<Load> {
    let mut options = Options::new(pair.lab.service()?, name);
    options.connections = 3;
    options.padding = 3000;
    pair.lab.load(options)
}

/// Ends the pair; `image` is the one that counts.
fn settle(mut pair: Pair, load: Load, image: &Path) -> Result<()> {
    pair.lab.disk = Disk::at(image);
    pair.balance(load)
}

/// Both images, and then that of the backup alone.
fn alike_and_good_for_going_on(pair: &mut Pair, load: &Load) -> Result<()> {
    alike(pair)?;
    pair.kill_primary(Death::Process)?;
    pair.wait_until_alone()?;
    progress(load, 20).map(drop)
}

/// Begins a copy over a narrow link, and returns in the middle of its disk.
fn begin_slow_copy(pair: &mut Pair, image: &Path, terms: &Value) -> Result<()> {
    pair.lab.network.limit(pair.side, Some("80mbit"))?;
    pair.begin_protection(&receive(image), terms)?;
    wait_for_status(&pair.primary, "blocks are copied", |status| {
        status.clone.is_some_and(|clone| clone.disk_copied_bytes > 1 << 20)
    })?;
    Ok(())
}

/// Why standbys hold no backup.
fn errors(status: &FtStatus) -> impl Iterator<Item = &str> {
    let errors = status.reprotection.iter().flat_map(|search| &search.errors);
    errors.map(|standby| standby.error.as_str())
}

#[test]
fn images_are_alike_and_after_a_kill_only_what_changed_is_copied() -> Result<()> {
    if !met("mirrored disks and a kill", &NEEDS) {
        return Ok(());
    }
    let lab = Lab::new()?;
    let (image, command_line) = (image_of_b(&lab), lab.boot_options(""));
    let mut pair = Pair::boot(lab)?;
    // Something to copy: several megabytes that are not zeroes.
    let fill = "dd if=/dev/urandom of=/data/noise bs=1M count=24 2>/dev/null; sync";
    pair.primary.console.run(fill, PATIENCE)?;
    let load = load(&pair, "mirrored")?;
    protect_and_kill(&mut pair, &load, &image, &command_line).with_context(|| pair.describe())?;
    settle(pair, load, &image)
}

fn protect_and_kill(
    pair: &mut Pair,
    load: &Load,
    image: &Path,
    command_line: &[String],
) -> Result<()> {
    progress(load, 20)?;
    let protected = pair.protect_with(&receive(image), &for_good())?;
    let status = pair.status()?;
    let clone = status.clone.context("the copy is shown")?;
    println!("first copy: {protected:?} {clone:?} {:?}", status.clone_disks);
    let total = DISK_BYTES;
    ensure!(clone.disk_total_bytes == total && clone.disk_compared_bytes == total, "{clone:?}");
    ensure!(clone.disk_copied_bytes >= 24 << 20 && clone.disk_copied_bytes < total, "{clone:?}");
    ensure!(status.clone_disks.len() == 1 && status.clone_disks[0].id == "_disk0", "{status:?}");
    progress(load, 40)?;
    alike(pair).context("after the first copy")?;
    progress(load, 40)?;

    pair.kill_primary(Death::Process)?;
    pair.wait_until_alone()?;
    progress(load, 40)?;
    // The dead primary's image is older than the VM: its command line must not bring the VM up again.
    let text = match pair.lab.start(Side::A, command_line) {
        Ok(mut second) => {
            let status = second.wait(CHANGE).context("a second VM runs")?;
            ensure!(!status.success(), "{}", second.log());
            second.log()
        }
        Err(error) => format!("{error:#}"),
    };
    ensure!(text.contains("mirrored pair") && text.contains("other host"), "{text}");

    let protected = pair.reprotect()?;
    let clone = pair.status()?.clone.context("the copy is shown")?;
    println!("after the kill: {protected:?} {clone:?}");
    ensure!(clone.disk_copied_bytes > 0 && clone.disk_copied_bytes < 16 << 20, "{clone:?}");
    progress(load, 40)?;
    alike(pair).context("after the second copy")?;
    eventually(CHANGE, "digests are compared", || {
        Ok((pair.digests_are_equal()? > 0).then_some(()))
    })?;
    progress(load, 20)?;
    Ok(())
}

#[test]
fn hand_over_and_repeated_kills_on_alternating_hosts() -> Result<()> {
    if !met("mirrored disks, hand-over and kills", &NEEDS) {
        return Ok(());
    }
    let lab = Lab::new()?;
    let image = image_of_b(&lab);
    let mut pair = Pair::boot(lab)?;
    let load = load(&pair, "alternating")?;
    alternate(&mut pair, &load, &image).with_context(|| pair.describe())?;
    settle(pair, load, &image)
}

fn alternate(pair: &mut Pair, load: &Load, image: &Path) -> Result<()> {
    pair.protect_with(&receive(image), &mirrored())?;
    progress(load, 20)?;
    pair.primary.api().put("ft.failover")?;
    let old = pair.change_sides()?;
    wait_for_status(&old, "halted", |status| status.state == "halted")?;
    pair.wait_until_alone()?;
    drop(old);
    progress(load, 20)?;
    // Now host a holds the copy, under the path the VM was booted with.
    pair.protect_with(&json!({}), &mirrored())?;
    progress(load, 20)?;
    pair.kill_primary(Death::Host)?;
    pair.wait_until_alone()?;
    progress(load, 20)?;
    pair.protect_with(&receive(image), &mirrored())?;
    progress(load, 20)?;
    alike_and_good_for_going_on(pair, load)
}

#[test]
fn images_that_do_not_fit_are_refused_and_a_copy_can_be_cancelled() -> Result<()> {
    if !met("mirrored disks that do not fit, and a cancelled copy", &NEEDS) {
        return Ok(());
    }
    let lab = Lab::new()?;
    let image = image_of_b(&lab);
    let mut pair = Pair::boot(lab)?;
    let load = load(&pair, "refused")?;
    refuse_and_cancel(&mut pair, &load, &image).with_context(|| pair.describe())?;
    let image = pair.lab.disk.path().to_owned();
    settle(pair, load, &image)
}

fn refuse_and_cancel(pair: &mut Pair, load: &Load, image: &Path) -> Result<()> {
    let refused = |pair: &mut Pair, receive: &Value, words: &[&str]| -> Result<()> {
        let error = pair.begin_protection(receive, &mirrored()).expect_err("it is refused");
        let text = format!("{error:#}");
        ensure!(words.iter().all(|word| text.contains(word)), "{text}");
        drop(pair.backup.take());
        Ok(())
    };
    // Both hosts are one machine here, and the path leads to the primary's own image.
    refused(pair, &json!({}), &["images of its own", "in use by another VM"])?;
    File::create(image)?.set_len(1 << 20)?;
    refused(pair, &receive(image), &["_disk0", "sectors"])?;
    std::fs::remove_file(image)?;
    let nowhere = pair.lab.directory().join("nowhere/b.raw");
    refused(pair, &receive(&nowhere), &["cannot make disk image"])?;
    let unknown = json!({ "disks": [{ "id": "none", "path": image }] });
    refused(pair, &unknown, &["'none'"])?;
    progress(load, 20)?;

    let fill = "dd if=/dev/urandom of=/data/noise bs=1M count=48 2>/dev/null; sync";
    pair.primary.console.run(fill, PATIENCE)?;
    begin_slow_copy(pair, image, &mirrored())?;
    pair.primary.api().put("ft.disable")?;
    pair.wait_until_alone()?;
    progress(load, 20)?;
    drop(pair.backup.take());
    // Begun again, it finds what is there already.
    pair.lab.network.limit(pair.side, None)?;
    pair.protect_with(&receive(image), &mirrored())?;
    progress(load, 20)?;
    alike(pair)
}

/// A file system mounted on a directory that goes with it.
struct Mount(TempDir);

impl Mount {
    fn new(options: &[&str]) -> Result<Self> {
        let mount = Self(tempfile::Builder::new().prefix("dyad-disk-").tempdir()?);
        mount.mount(options)?;
        Ok(mount)
    }

    /// The file system that a file holds.
    fn of(device: &Path) -> Result<Self> {
        Self::new(&["-o", "loop", &device.to_string_lossy()])
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn mount(&self, options: &[&str]) -> Result<()> {
        let options = options.iter().map(OsStr::new);
        run("mount", &options.chain([self.path().as_os_str()]).collect::<Vec<_>>())
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.path()).status();
    }
}

fn run(program: &str, arguments: &[&OsStr]) -> Result<()> {
    let status = Command::new(program).args(arguments).status().context(program.to_owned())?;
    ensure!(status.success(), "{program} {arguments:?} failed");
    Ok(())
}

/// A small file system.
struct SmallDisk(Mount);

impl SmallDisk {
    fn new(size: &str) -> Result<Self> {
        Ok(Self(Mount::new(&["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs"])?))
    }

    fn resize(&self, size: &str) -> Result<()> {
        self.0.mount(&["-o", &format!("remount,size={size}")])
    }
}

/// A file system that can be frozen: while it is, a write to it does not return.
struct HangingDisk {
    mount: Mount,
    _device: NamedTempFile,
}

impl HangingDisk {
    fn new() -> Result<Self> {
        let device = NamedTempFile::new()?;
        device.as_file().set_len(400 << 20)?;
        run("mkfs.ext4", &["-q".as_ref(), device.path().as_os_str()])?;
        Ok(Self { mount: Mount::of(device.path())?, _device: device })
    }

    fn freeze(&self) -> Result<()> {
        run("fsfreeze", &["--freeze".as_ref(), self.mount.path().as_os_str()])
    }

    fn thaw(&self) -> Result<()> {
        run("fsfreeze", &["--unfreeze".as_ref(), self.mount.path().as_os_str()])
    }
}

/// A file system on a device with less room than it says. It takes what is written to the image that it holds, and loses
/// what finds no room when the page cache is written back.
struct OverbookedDisk {
    mount: Mount,
    small: SmallDisk,
}

impl OverbookedDisk {
    /// There is room for `size` once the image has been made.
    fn new(image_bytes: u64, size: &str) -> Result<Self> {
        let small = SmallDisk::new("400M")?;
        let device = small.0.path().join("device");
        File::create(&device)?.set_len(image_bytes + (64 << 20))?;
        // No block may be used later on that has no room, but for the image's: no journal, and the file beside the image
        // is to be part of its inode.
        let layout = ["-q", "-O", "^has_journal,inline_data", "-I", "512"].map(OsStr::new);
        run("mkfs.ext4", &[layout.as_slice(), &[device.as_os_str()]].concat())?;
        let disk = Self { mount: Mount::of(&device)?, small };
        // The file system allocates all of the image; on the device only what is not zero keeps its room.
        let image = File::create(disk.image())?;
        image.set_len(image_bytes)?;
        Disk::at(&disk.image()).allocate()?;
        run("sync", &["--file-system".as_ref(), disk.image().as_os_str()])?;
        run("fallocate", &["--dig-holes".as_ref(), device.as_os_str()])?;
        disk.small.resize(size)?;
        Ok(disk)
    }

    fn image(&self) -> PathBuf {
        image_in(self.mount.path())
    }

    /// Has the host forget what it has in its page cache: the image is what the device has.
    fn forget(&self) -> Result<()> {
        let image = File::open(self.image())?;
        image.sync_all()?;
        posix_fadvise(&image, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?;
        Ok(())
    }
}

/// More than a file system of 40 MB holds, written in the background.
const FILL: &str = "(dd if=/dev/urandom of=/data/noise bs=1M count=48; sync) 2>/dev/null & true";

/// A story in which host b has its image on a file system of `size`.
fn on_a_small_disk(
    size: &str,
    story: impl FnOnce(&mut Pair, &Load, &SmallDisk, &Path) -> Result<()>,
) -> Result<()> {
    let small = SmallDisk::new(size)?;
    with_image_on(small.0.path(), |pair, load, image| story(pair, load, &small, image))
}

fn image_in(directory: &Path) -> PathBuf {
    directory.join("b.raw")
}

/// A story in which host b has its image in `directory`.
fn with_image_on(
    directory: &Path,
    story: impl FnOnce(&mut Pair, &Load, &Path) -> Result<()>,
) -> Result<()> {
    let lab = Lab::new()?;
    let image = image_in(directory);
    std::os::unix::fs::symlink(&image, image_of_b(&lab))?;
    let mut pair = Pair::boot(lab)?;
    let load = load(&pair, "disk")?;
    story(&mut pair, &load, &image).with_context(|| pair.describe())?;
    settle(pair, load, &image)
}

#[test]
fn a_full_disk_of_the_backup_delays_it_and_is_told_until_there_is_room() -> Result<()> {
    if !met("a full disk under a mirrored backup", &NEEDS) {
        return Ok(());
    }
    on_a_small_disk("4M", fill_and_make_room)
}

fn fill_and_make_room(pair: &mut Pair, load: &Load, small: &SmallDisk, image: &Path) -> Result<()> {
    // No room even for the copy: it is given up, and the VM runs on.
    pair.primary.console.run("dd if=/dev/urandom of=/data/first bs=1M count=8; sync", PATIENCE)?;
    pair.begin_protection(&receive(image), &mirrored())?;
    let status = wait_for_status(&pair.primary, "the copy is given up", |status| {
        status.state == "abandoned"
    })?;
    let reason = status.reason.unwrap_or_default();
    ensure!(reason.contains("cannot write disk image"), "{reason}");
    progress(load, 20)?;
    drop(pair.backup.take());

    small.resize("40M")?;
    // It is not given up meanwhile.
    let patient = json!({ "disk_mode": "mirrored", "disk_timeout_ms": 600_000 });
    pair.protect_with(&receive(image), &patient)?;
    progress(load, 20)?;
    pair.primary.console.run(FILL, PATIENCE)?;
    let backup = pair.backup.as_ref().context("there is a backup")?;
    wait_for_status(backup, "the backup says why it falls behind", |status| {
        status.reason.as_ref().is_some_and(|reason| reason.contains("is tried again"))
    })?;
    ensure!(backup.ft_status()?.role == "backup");
    small.resize("400M")?;
    wait_for_status(backup, "the backup has caught up", |status| {
        status.reason.is_none() && status.state == "replaying"
    })?;
    pair.primary.console.run("wait", PATIENCE)?;
    progress(load, 20)?;
    alike_and_good_for_going_on(pair, load)
}

#[test]
fn a_backup_whose_disk_stays_full_is_given_up_and_made_again_when_there_is_room() -> Result<()> {
    if !met("a mirrored backup that is given up for its full disk", &NEEDS) {
        return Ok(());
    }
    on_a_small_disk("40M", |pair, load, small, image| {
        fill_until_given_up(pair, load, image, "No space left")?;
        come_back(pair, load, small)?;
        alike_and_good_for_going_on(pair, load)
    })
}

/// The backup is lost for its disk, and so is each copy after it, because of `trouble`.
fn fill_until_given_up(pair: &mut Pair, load: &Load, image: &Path, trouble: &str) -> Result<()> {
    let mut terms = for_good();
    terms["disk_timeout_ms"] = json!(1_500);
    pair.protect_with(&receive(image), &terms)?;
    let before = pair.status()?.generation;
    progress(load, 20)?;
    pair.primary.console.run(FILL, PATIENCE)?;
    let filled = Instant::now();
    wait_for_status(&pair.primary, "the backup is given up", |status| status.generation > before)?;
    println!("given up {:?} after the guest began to write", filled.elapsed());
    pair.primary.wait_for_log("the backup gave up: its disk in slot")?;
    // The standby is asked again and has no room. The guest writes all that it wanted to, and answers.
    wait_for_status(&pair.primary, "the standby has no room", |status| {
        errors(status).any(|error| error.contains(trouble))
    })?;
    pair.primary.console.run("wait", PATIENCE)?;
    println!("{:?} for the next 40 answers", progress(load, 40)?);
    ensure!(pair.status()?.state != "protected", "nobody has made room");
    Ok(())
}

fn come_back(pair: &Pair, load: &Load, small: &SmallDisk) -> Result<()> {
    small.resize("400M")?;
    let room = Instant::now();
    pair.wait_until_protected(room)?;
    println!("protected again {:?} after there was room", room.elapsed());
    progress(load, 20).map(drop)
}

#[test]
fn a_mirrored_backup_whose_sync_failed_is_given_up_and_its_image_made_anew() -> Result<()> {
    if !met("a sync that fails under a mirrored backup", &NEEDS_LOOP) {
        return Ok(());
    }
    let disk = OverbookedDisk::new(DISK_BYTES, "20M")?;
    with_image_on(disk.mount.path(), |pair, load, image| {
        fill_until_given_up(pair, load, image, "cannot sync disk image")?;
        // No write has failed: it was the host that had promised too much.
        let backup = pair.backup.as_ref().context("there is a standby")?;
        backup.wait_for_log("the host could not make durable what was written")?;
        come_back(pair, load, &disk.small)?;
        disk.forget()?;
        alike_and_good_for_going_on(pair, load)
    })
}

#[test]
fn a_disk_of_the_backup_that_hangs_costs_the_backup_and_no_more() -> Result<()> {
    if !met("a disk that hangs under a mirrored backup", &NEEDS_LOOP) {
        return Ok(());
    }
    let disk = HangingDisk::new()?;
    with_image_on(disk.mount.path(), |pair, load, image| {
        let told = hang_twice(pair, load, &disk, image);
        if told.is_err() {
            // Whoever is at it could not be killed. It fails where it is thawed already.
            let _ = disk.thaw();
        }
        told
    })
}

fn hang_twice(pair: &mut Pair, load: &Load, disk: &HangingDisk, image: &Path) -> Result<()> {
    let mut terms = for_good();
    terms["disk_timeout_ms"] = json!(1_500);
    pair.protect_with(&receive(image), &terms)?;
    progress(load, 20)?;
    let before = pair.status()?.generation;
    disk.freeze()?;
    wait_for_status(&pair.primary, "the backup is given up", |status| status.generation > before)?;
    pair.primary.wait_for_log("the backup gave up: its disk in slot")?;
    progress(load, 40)?;
    disk.thaw()?;
    pair.wait_until_protected(Instant::now())?;
    progress(load, 20)?;
    alike(pair)?;

    // A hand-over to such a backup comes back.
    let before = pair.status()?.generation;
    disk.freeze()?;
    pair.primary.api().put("ft.failover")?;
    wait_for_status(&pair.primary, "the VM is back", |status| status.generation > before)?;
    progress(load, 40)?;
    disk.thaw()?;
    pair.wait_until_protected(Instant::now())?;
    progress(load, 20)?;

    // While it is copied, too, and with the timeout that goes without saying.
    pair.unprotect()?;
    let fill = "dd if=/dev/urandom of=/data/noise bs=1M count=32 2>/dev/null; sync";
    pair.primary.console.run(fill, PATIENCE)?;
    begin_slow_copy(pair, image, &for_good())?;
    disk.freeze()?;
    wait_for_status(&pair.primary, "the copy is given up", |status| {
        errors(status).any(|error| error.contains("a disk of the backup has not answered for"))
    })?;
    wait_for_status(&pair.primary, "the standby says why it takes no other", |status| {
        errors(status).any(|error| error.contains("still has the copy before: a disk"))
    })?;
    progress(load, 40)?;
    pair.lab.network.limit(pair.side, None)?;
    disk.thaw()?;
    pair.wait_until_protected(Instant::now())?;
    progress(load, 20)?;
    alike_and_good_for_going_on(pair, load)
}

#[test]
fn a_backup_that_reads_the_shared_disk_itself_has_the_data_kept_out_of_the_log() -> Result<()> {
    if !met("reads on the backup", &NEEDS) {
        return Ok(());
    }
    let mut pair = Pair::boot(Lab::new()?)?;
    let load = load(&pair, "reads")?;
    read_on_the_backup(&mut pair, &load).with_context(|| pair.describe())?;
    let image = pair.lab.disk.path().to_owned();
    settle(pair, load, &image)
}

/// Bytes of log while the guest reads a file from its disk, past its page cache, and writes over it.
fn logged(pair: &mut Pair) -> Result<u64> {
    let before = pair.status()?.log.recorded_bytes;
    let read = "dd if=/data/noise iflag=direct of=/dev/null bs=1M 2>/dev/null";
    let write = "dd if=/dev/zero of=/data/noise bs=64k count=32 conv=notrunc,fsync 2>/dev/null";
    pair.primary.console.run(&format!("{read}; {write}; {read}"), PATIENCE)?;
    Ok(pair.status()?.log.recorded_bytes - before)
}

fn read_on_the_backup(pair: &mut Pair, load: &Load) -> Result<()> {
    let fill = "dd if=/dev/urandom of=/data/noise bs=1M count=16 2>/dev/null; sync";
    pair.primary.console.run(fill, PATIENCE)?;
    pair.protect()?;
    let with_data = logged(pair)?;
    pair.unprotect()?;
    pair.protect_with(&json!({}), &json!({ "disk_reads": "backup" }))?;
    let without = logged(pair)?;
    println!("two times 16 MiB read: {with_data} bytes of log with the data, {without} without");
    ensure!(with_data > 32 << 20 && without < with_data / 8, "{with_data} and {without} bytes");
    progress(load, 40)?;
    eventually(CHANGE, "digests are compared", || {
        Ok((pair.digests_are_equal()? > 3).then_some(()))
    })?;
    pair.kill_primary(Death::Process)?;
    pair.wait_until_alone()?;
    progress(load, 20)?;
    // The survivor reads what it has written, and has its image for itself.
    pair.primary
        .console
        .run("echo 3 >/proc/sys/vm/drop_caches; cat /data/noise >/dev/null", PATIENCE)?;
    pair.protect_with(&json!({}), &json!({ "disk_reads": "backup" }))?;
    progress(load, 20)?;
    Ok(())
}
