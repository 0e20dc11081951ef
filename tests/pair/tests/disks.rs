//! The shared image: whose it is, and who may write to it.

use anyhow::{Context, Result, ensure};
use ledger_client::load::Options;
use ledger_client::verdict::Verdict;
use nix::sys::signal::Signal;
use pair_tests::kills::progress;
use pair_tests::lab::Lab;
use pair_tests::pair::{CHANGE, Death, Pair, wait_for_status};
use pair_tests::patience::eventually;
use pair_tests::requirements::{Need, met};
use std::time::Instant;

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
        ensure!(pair.primary.log().contains("in use by another VM"), "{}", pair.primary.log());
        old.signal(Signal::SIGCONT)?;
        wait_for_status(&old, "halted", |status| status.state == "halted")?;
        eventually(CHANGE, "the successor takes the lock", || {
            Ok(pair.primary.log().contains("is locked for this VM now").then_some(()))
        })
        .with_context(|| format!("round {round}: {}", pair.primary.log()))?;
        progress(&load, 40)?;
        old.kill()?;
    }
    let answers = load.stop()?;
    let lab = pair.power_off()?;
    lab.disk.check()?;
    let verdict = Verdict::of(&answers, &lab.disk.ledger()?);
    ensure!(verdict.is_clean(), "{verdict:?}");
    Ok(())
}
