//! What an operator does to a protected guest is done on both sides together, at one point of the guest's life:
//! pause, resume, reset, reboot from inside, the end of protection. The power button is in `failover.rs`.

use anyhow::{Context, Result, ensure};
use ft::FtStatus;
use ledger_client::load::{Load, Options};
use ledger_client::verdict::Verdict;
use pair_tests::kills::progress;
use pair_tests::lab::Lab;
use pair_tests::pair::{BOOT, CHANGE, Death, Pair, wait_for_status};
use pair_tests::patience::eventually;
use pair_tests::requirements::{Need, met};
use std::time::Duration;

const NEEDS: [Need; 2] = [Need::Root, Need::Tap];
/// Three times the failure timeout: a side that wanted to suspect the other would have done so.
const LONG_SILENCE: Duration = Duration::from_secs(1);

/// Digests compared from now on are equal, and some are compared.
fn digests_go_on(pair: &Pair) -> Result<()> {
    let before = pair.digests_are_equal()?;
    eventually(CHANGE, "digests are compared", || {
        let status = pair.status()?;
        ensure!(status.state == "protected", "{status:?}");
        Ok((pair.digests_are_equal()? > before + 2).then_some(()))
    })
}

/// Pauses, and waits until the backup stands where the primary does, with nothing under way.
fn pause(pair: &Pair) -> Result<FtStatus> {
    pair.primary.api().put("vm.pause")?;
    ensure!(pair.primary.state()? == "Paused", "vm.info says {}", pair.primary.state()?);
    wait_for_status(&pair.primary, "the backup has executed everything", |status| {
        let log = status.log;
        log.executed_bytes == log.recorded_bytes && status.held_outputs == 0
    })
}

#[test]
fn a_pause_stops_both_sides_and_survives_the_primary() -> Result<()> {
    if !met("pause, resume, failover while paused", &NEEDS) {
        return Ok(());
    }
    let mut pair = Pair::boot(Lab::new()?)?;
    let load = pair.lab.load(Options::new(pair.lab.service()?, "pause"))?;
    pauses(&mut pair, &load).with_context(|| pair.describe())?;
    pair.balance(load)
}

fn pauses(pair: &mut Pair, load: &Load) -> Result<()> {
    pair.protect()?;
    progress(load, 20)?;
    let (stands, answered) = (pause(pair)?, load.answered());
    std::thread::sleep(LONG_SILENCE);
    let still = pair.status()?;
    ensure!(still.state == "protected", "{still:?}");
    ensure!(still.log.recorded_point == stands.log.recorded_point, "the guest moved: {still:?}");
    ensure!(still.log.executed_point == stands.log.executed_point, "the backup moved: {still:?}");
    // One answer can have been on its way.
    ensure!(load.answered() <= answered + 1, "a paused guest answers");
    pair.primary.api().put("vm.resume")?;
    progress(load, 20)?;
    digests_go_on(pair)?;

    // Whoever goes on, goes on standing still until the operator says otherwise.
    pause(pair)?;
    let answered = load.answered();
    pair.kill_primary(Death::Process)?;
    pair.wait_until_alone()?;
    ensure!(pair.primary.state()? == "Paused", "vm.info says {}", pair.primary.state()?);
    ensure!(load.answered() <= answered + 1, "a paused guest answers");
    pair.primary.api().put("vm.resume")?;
    progress(load, 20)?;
    Ok(())
}

#[test]
fn a_guest_that_reboots_does_so_on_both_sides() -> Result<()> {
    if !met("reboot from inside, reset, failover after each", &NEEDS) {
        return Ok(());
    }
    let mut pair = Pair::boot(Lab::new()?)?;
    let load = reboots(&mut pair).with_context(|| pair.describe())?;
    pair.balance(load)
}

fn reboots(pair: &mut Pair) -> Result<Load> {
    pair.protect()?;
    pair.primary.console.type_in("reboot\n")?;
    has_rebooted(pair, "inside").context("rebooted from inside")?;
    // The operator's reset takes the guest where it stands.
    pair.primary.api().put("vm.reboot")?;
    has_rebooted(pair, "reset").context("reset by the operator")?;
    // What the backup has made of all that is a guest to go on with.
    let load = pair.lab.load(Options::new(pair.lab.service()?, "survivor"))?;
    progress(&load, 20)?;
    pair.kill_primary(Death::Process)?;
    pair.wait_until_alone()?;
    progress(&load, 20)?;
    Ok(load)
}

/// The guest comes up again, protected all the time, and serves; the backup's is the same, bit for bit.
fn has_rebooted(pair: &mut Pair, name: &str) -> Result<()> {
    pair.primary.console.wait_for("guest: shell after", BOOT)?;
    pair.primary.console.wait_for("# ", BOOT)?;
    let load = pair.lab.load(Options::new(pair.lab.service()?, name))?;
    progress(&load, 20)?;
    load.stop()?;
    let status = pair.status()?;
    ensure!(status.state == "protected" && status.last_failover.is_none(), "{status:?}");
    digests_go_on(pair)
}

#[test]
fn a_discarded_backup_stays_silent_when_its_primary_dies() -> Result<()> {
    if !met("disable, then the primary dies", &NEEDS) {
        return Ok(());
    }
    let mut pair = Pair::boot(Lab::new()?)?;
    let load = pair.lab.load(Options::new(pair.lab.service()?, "disable"))?;
    pair.protect()?;
    progress(&load, 20)?;
    pair.primary.api().put("ft.disable")?;
    pair.wait_until_alone()?;
    progress(&load, 20)?;
    let backup = pair.backup.take().context("there was a backup")?;
    let listening = |status: &FtStatus| status.state == "listening";
    wait_for_status(&backup, "waits for the next", listening)?;
    pair.primary.kill()?;
    std::thread::sleep(LONG_SILENCE);
    let status = backup.ft_status()?;
    ensure!(listening(&status) && status.last_failover.is_none(), "{status:?}");
    ensure!(backup.state().is_err(), "it still has a VM");
    let answers = load.abandon();
    pair.lab.disk.check()?;
    let verdict = Verdict::of(&answers, &pair.lab.disk.ledger()?);
    ensure!(verdict.lost == 0, "{verdict:?}");
    Ok(())
}
