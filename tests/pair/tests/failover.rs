//! A protected guest and everything that can happen to its two sides.

use anyhow::{Context, Result, ensure};
use ft::FtStatus;
use ledger_client::load::{Load, Options};
use nix::sys::signal::Signal;
use pair_tests::kills::{Plan, progress};
use pair_tests::lab::Lab;
use pair_tests::pair::{CHANGE, Death, Pair, wait_for_status};
use pair_tests::requirements::{Need, met};
use std::time::Instant;

const NEEDS: [Need; 2] = [Need::Root, Need::Tap];

fn kills(kills: u32, death: Death, by_itself: bool) -> Result<()> {
    let plan = Plan { kills, death, connections: 2, by_itself, ..Plan::default() };
    let account = plan.run(Lab::new()?, |kill| {
        println!("kill {}: first answer after {:?}", kill.number, kill.failover);
    })?;
    println!("{}", account.to_json());
    ensure!(account.verdict.acknowledged > 0);
    Ok(())
}

#[test]
fn three_kills_go_unnoticed() -> Result<()> {
    if !met("three kills of the primary", &NEEDS) {
        return Ok(());
    }
    kills(3, Death::Process, false)
}

#[test]
fn hosts_that_die_without_a_word_go_unnoticed() -> Result<()> {
    if !met("kills with the cables pulled", &NEEDS) {
        return Ok(());
    }
    kills(2, Death::Host, false)
}

#[test]
fn repeated_kills_on_alternating_hosts_reprotect_by_themselves() -> Result<()> {
    if !met("kills on alternating hosts", &NEEDS) {
        return Ok(());
    }
    kills(4, Death::Process, true)
}

#[test]
fn a_lost_backup_is_replaced_until_protection_is_disabled() -> Result<()> {
    if !met("backups killed", &NEEDS) {
        return Ok(());
    }
    let mut pair = Pair::boot(Lab::new()?)?;
    let load = pair.lab.load(Options::new(pair.lab.service()?, "standby"))?;
    losses_of_backups(&mut pair, &load).with_context(|| pair.describe())?;
    pair.balance(load)
}

fn losses_of_backups(pair: &mut Pair, load: &Load) -> Result<()> {
    let searching = |status: &FtStatus| {
        status.reprotection.as_ref().is_some_and(|search| search.state == "searching")
    };
    pair.protect()?;
    for _ in 0..2 {
        progress(load, 20)?;
        pair.kill_backup()?;
        let status = wait_for_status(&pair.primary, "searching", searching)?;
        ensure!(status.role == "alone", "{status:?}");
        pair.reprotect().context("the backup's host is back")?;
    }
    progress(load, 20)?;
    pair.kill_primary(Death::Process)?;
    let status = pair.wait_until_alone().context("the last backup is as good as the first")?;
    let search = status.reprotection.context("it was to be protected")?;
    ensure!(search.state == "no standby", "nobody told it of another: {search:?}");
    progress(load, 20)?;

    pair.protect_for_good()?;
    pair.kill_backup()?;
    wait_for_status(&pair.primary, "searching", searching)?;
    pair.primary.api().put("ft.disable")?;
    let status = pair.wait_until_alone().context("after disable")?;
    ensure!(status.reprotection.is_none(), "{status:?}");
    ensure!(pair.primary.api().put("ft.disable").is_err(), "nothing is left to be disabled");
    Ok(())
}

#[test]
fn backup_loss_hand_over_take_over_and_disable_go_unnoticed() -> Result<()> {
    if !met("backup loss, hand-over, take-over, disable", &NEEDS) {
        return Ok(());
    }
    let mut pair = Pair::boot(Lab::new()?)?;
    let load = pair.lab.load(Options::new(pair.lab.service()?, "story"))?;
    changes_of_side(&mut pair, &load).with_context(|| pair.describe())?;
    pair.balance(load)
}

fn changes_of_side(pair: &mut Pair, load: &Load) -> Result<()> {
    progress(load, 20)?;
    pair.protect()?;
    progress(load, 20)?;
    pair.kill_backup()?;
    pair.wait_until_alone().context("after the loss of the backup")?;
    progress(load, 20)?;

    // Hand-over: asked of the primary.
    pair.protect()?;
    progress(load, 20)?;
    let asked = Instant::now();
    pair.primary.api().put("ft.failover").context("hand-over")?;
    let mut old = pair.change_sides()?;
    load.first_answer_after(asked)?;
    let status = pair.wait_until_alone().context("after the hand-over")?;
    ensure!(status.role == "alone" && status.last_failover.is_some(), "{status:?}");
    old.kill().or_else(|_| old.wait(CHANGE).map(|_| Instant::now()))?;
    progress(load, 20)?;

    // Take-over: asked of the backup while the primary lives. Only one may go on.
    pair.protect()?;
    progress(load, 20)?;
    let backup = pair.backup.as_ref().context("there is a backup")?;
    backup.api().put("ft.failover").context("take-over")?;
    let mut old = pair.change_sides()?;
    let status = pair.wait_until_alone().context("after the take-over")?;
    ensure!(status.role == "alone" && status.last_failover.is_some(), "{status:?}");
    progress(load, 20)?;
    old.kill().or_else(|_| old.wait(CHANGE).map(|_| Instant::now()))?;

    // Disable: the backup is discarded and must not go live when the primary dies later.
    pair.protect()?;
    progress(load, 20)?;
    pair.unprotect().context("disable")?;
    progress(load, 20)?;
    Ok(())
}

#[test]
fn a_primary_that_was_only_asleep_does_not_write_over_its_successor() -> Result<()> {
    if !met("primary stopped and continued", &NEEDS) {
        return Ok(());
    }
    let mut pair = Pair::boot(Lab::new()?)?;
    let load = pair.lab.load(Options::new(pair.lab.service()?, "asleep"))?;
    pair.protect()?;
    progress(&load, 20)?;
    pair.primary.signal(Signal::SIGSTOP)?;
    let stopped = Instant::now();
    let mut old = pair.change_sides()?;
    load.first_answer_after(stopped)?;
    progress(&load, 20)?;
    old.signal(Signal::SIGCONT)?;
    wait_for_status(&old, "halted", |status| status.state == "halted")?;
    progress(&load, 100)?;
    old.kill()?;
    pair.balance(load)
}

#[test]
fn powering_off_a_protected_guest_ends_it_on_both_sides() -> Result<()> {
    if !met("power off while protected", &NEEDS) {
        return Ok(());
    }
    let mut pair = Pair::boot(Lab::new()?)?;
    pair.protect()?;
    progress(&pair.lab.load(Options::new(pair.lab.service()?, "off"))?, 20)?;
    pair.power_off()?;
    Ok(())
}
