//! Protecting a guest that runs: how long it stands still, that it is slowed down when it outruns the network
//! and only then, and that giving up half way leaves nothing behind.

use anyhow::{Context, Result, ensure};
use ledger_client::load::{Load, Options};
use pair_tests::kills::progress;
use pair_tests::lab::Lab;
use pair_tests::pair::{CHANGE, Pair, wait_for_status};
use pair_tests::patience::eventually;
use pair_tests::requirements::{Need, met};
use serde_json::json;
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(60);
/// What the logging channel is slowed down to. The guest copies memory several times as fast.
const SLOW: &str = "160mbit";

fn load(pair: &Pair, name: &str) -> Result<Load> {
    pair.lab.load(Options::new(pair.lab.service()?, name))
}

fn boot(memory: &'static str) -> Result<Pair> {
    let mut lab = Lab::new()?;
    lab.memory = memory;
    Pair::boot(lab)
}

#[test]
fn a_guest_of_a_gibibyte_hardly_pauses() -> Result<()> {
    if !met("protecting 1 GiB, idle and while memory changes", &[Need::Root, Need::Tap]) {
        return Ok(());
    }
    let mut pair = boot("1G")?;
    hardly_pauses(&mut pair).with_context(|| pair.describe())?;
    let load = load(&pair, "gibibyte")?;
    progress(&load, 20)?;
    pair.balance(load)
}

fn hardly_pauses(pair: &mut Pair) -> Result<()> {
    let idle = pair.protect()?;
    println!("idle: {idle:?} {:?}", pair.status()?.clone);
    ensure!(idle.pause < Duration::from_millis(100), "paused for {:?}", idle.pause);
    let shown = pair.status()?.clone.context("the copy is shown")?;
    ensure!(shown.total_bytes >= 1 << 30 && shown.throttle == 0.0, "{shown:?}");
    pair.primary.api().put("ft.disable")?;
    pair.wait_until_alone()?;
    drop(pair.backup.take());

    let dirtier = "while :; do dd if=/dev/urandom of=/dirt bs=1M count=64 conv=notrunc; done";
    pair.primary.console.run(&format!("({dirtier}) 2>/dev/null & sleep 2"), PATIENCE)?;
    let busy = pair.protect()?;
    println!("changing memory: {busy:?} {:?}", pair.status()?.clone);
    ensure!(busy.pause < Duration::from_millis(300), "paused for {:?}", busy.pause);
    pair.primary.console.run("kill %1; wait", PATIENCE)?;
    eventually(CHANGE, "digests are compared", || Ok((pair.digests_are_equal()? > 0).then_some(())))
}

#[test]
fn a_guest_that_outruns_the_network_is_slowed_down_and_given_its_time_back() -> Result<()> {
    let needs = [Need::Root, Need::Tap, Need::SlowNetwork];
    if !met("protecting a guest faster than the network, and giving up", &needs) {
        return Ok(());
    }
    let mut pair = boot("256M")?;
    let load = load(&pair, "outrun")?;
    outruns(&mut pair, &load).with_context(|| pair.describe())?;
    pair.balance(load)
}

/// How long the guest takes to write all over some memory a few times.
fn work(pair: &mut Pair) -> Result<Duration> {
    let started = Instant::now();
    let write = "dd if=/noise of=/copy bs=1M conv=notrunc";
    pair.primary.console.run(&format!("({write}; {write}; {write}) 2>/dev/null"), PATIENCE)?;
    Ok(started.elapsed())
}

fn outruns(pair: &mut Pair, load: &Load) -> Result<()> {
    pair.primary
        .console
        .run("dd if=/dev/urandom of=/noise bs=1M count=40 2>/dev/null", PATIENCE)?;
    work(pair)?;
    let at_ease = work(pair)?;
    println!("120 MiB at ease: {at_ease:?}");
    let at_full_speed = |pair: &mut Pair| -> Result<()> {
        // Other guests of this machine make it slower too, but not for ever.
        eventually(PATIENCE, "the guest is as fast as before", || {
            let took = work(pair)?;
            Ok((took < 3 * at_ease).then_some(()))
        })
    };
    let dirtier = "while :; do dd if=/noise of=/copy bs=1M conv=notrunc; done";
    let start = format!("({dirtier}) 2>/dev/null & true");
    pair.lab.network.limit(pair.side, Some(SLOW))?;

    // Given up by the operator, when the guest has been slowed down.
    pair.primary.console.run(&start, PATIENCE)?;
    pair.begin_protection(&json!({}), &json!({}))?;
    wait_until_slowed_down(pair)?;
    pair.primary.api().put("ft.disable")?;
    pair.wait_until_alone()?;
    progress(load, 20)?;
    pair.primary.console.run("kill %1; wait", PATIENCE)?;
    at_full_speed(pair).context("after ft.disable")?;
    let backup = pair.backup.take().context("there is a backup")?;
    wait_for_status(&backup, "listening", |status| status.state == "listening")?;
    drop(backup);

    // Given up with the backup.
    pair.primary.console.run(&start, PATIENCE)?;
    pair.begin_protection(&json!({}), &json!({}))?;
    wait_until_slowed_down(pair)?;
    pair.kill_backup()?;
    pair.wait_until_alone()?;
    progress(load, 20)?;
    pair.primary.console.run("kill %1; wait", PATIENCE)?;
    at_full_speed(pair).context("after the loss of the backup")?;

    // Carried through.
    pair.primary.console.run(&start, PATIENCE)?;
    let started = pair.begin_protection(&json!({}), &json!({}))?;
    wait_until_slowed_down(pair)?;
    let protected = pair.wait_until_protected(started)?;
    let shown = pair.status()?.clone.context("the copy is shown")?;
    println!("{protected:?} {shown:?}");
    ensure!(protected.pause < Duration::from_millis(300), "paused for {:?}", protected.pause);
    ensure!(shown.throttle == 0.0 && shown.rounds > 2, "{shown:?}");
    ensure!(shown.link_bytes_per_s < 40_000_000, "{shown:?}");
    pair.primary.console.run("kill %1; wait", PATIENCE)?;
    pair.lab.network.limit(pair.side, None)?;
    progress(load, 20)?;
    eventually(CHANGE, "digests are compared", || {
        Ok((pair.digests_are_equal()? > 0).then_some(()))
    })?;
    pair.primary.api().put("ft.disable")?;
    pair.wait_until_alone()?;
    drop(pair.backup.take());
    at_full_speed(pair).context("after protection")
}

fn wait_until_slowed_down(pair: &Pair) -> Result<()> {
    wait_for_status(&pair.primary, "the guest is slowed down", |status| {
        status.clone.is_some_and(|clone| clone.throttle > 0.0)
    })?;
    Ok(())
}
