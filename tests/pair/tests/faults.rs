//! What hosts and networks do to a protected guest: one named story for each fault.
//!
//! Every story ends with the same account: one side goes on, the client's one connection has stayed open, each
//! answer it got is on the disk, in order, and the file system is sound.

use anyhow::{Context, Result, ensure};
use ft::FtStatus;
use ledger_client::load::{Load, Options};
use ledger_client::verdict::Verdict;
use nix::sys::signal::Signal;
use pair_tests::kills::progress;
use pair_tests::lab::Lab;
use pair_tests::network::Side;
use pair_tests::pair::{CHANGE, Death, LOGGING_PORT, Pair, wait_for_status};
use pair_tests::patience::eventually;
use pair_tests::proxy::{Proxy, Weather};
use pair_tests::requirements::{Need, met};
use pair_tests::vmm::Vmm;
use serde_json::json;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

const NEEDS: [Need; 2] = [Need::Root, Need::Tap];

/// Boots a guest, puts a client on it, lets `plot` happen and balances the account.
fn story(name: &str, plot: impl FnOnce(&mut Pair, &Load) -> Result<()>) -> Result<()> {
    if !met(name, &NEEDS) {
        return Ok(());
    }
    let mut pair = Pair::boot(Lab::new()?)?;
    let load = pair.lab.load(Options::new(pair.lab.service()?, "fault"))?;
    progress(&load, 5)?;
    plot(&mut pair, &load).with_context(|| pair.describe())?;
    progress(&load, 20)?;
    let answers = load.stop()?;
    let lab = pair.power_off()?;
    let verdict = Verdict::of(&answers, &lab.disk.ledger()?);
    ensure!(verdict.is_clean(), "{verdict:?}");
    Ok(())
}

/// Protects `pair` with all logging through the proxy.
fn protect_through_proxy(pair: &mut Pair, seed: u64) -> Result<Proxy> {
    let other = pair.side.other();
    let target = SocketAddr::new(other.address().parse()?, LOGGING_PORT);
    let proxy = Proxy::start(pair.lab.network.host(other), other.address(), target, seed)?;
    pair.protect_with(&json!({}), &through(&proxy))?;
    Ok(proxy)
}

fn through(proxy: &Proxy) -> serde_json::Value {
    json!({ "backup_url": format!("tcp:{}", proxy.address()) })
}

/// After a fault between the hosts: waits until one side runs alone and the other has given up for good, and
/// makes the live one the pair's primary. Returns the other.
fn settle(pair: &mut Pair) -> Result<Vmm> {
    let lives = |status: &FtStatus| status.role == "alone" || status.state == "alone";
    let gave_up =
        |status: &FtStatus| matches!(status.state.as_str(), "halted" | "listening" | "discarded");
    let backup = pair.backup.as_ref().context("there is no backup")?;
    let backup_lives = eventually(CHANGE, "one side lives, the other does not", || {
        let (one, other) = (pair.primary.ft_status()?, backup.ft_status()?);
        ensure!(!(lives(&one) && lives(&other)), "both live: {one:?} and {other:?}");
        Ok(match (lives(&one) && gave_up(&other), gave_up(&one) && lives(&other)) {
            (true, _) => Some(false),
            (_, true) => Some(true),
            _ => None,
        })
    })?;
    if backup_lives { pair.change_sides() } else { pair.backup.take().context("no backup") }
}

#[test]
fn a_backup_that_was_only_asleep_gives_up() -> Result<()> {
    story("backup stopped and continued", |pair, load| {
        pair.protect()?;
        progress(load, 20)?;
        let backup = pair.backup.take().context("no backup")?;
        backup.signal(Signal::SIGSTOP)?;
        pair.wait_until_alone()?;
        progress(load, 20)?;
        backup.signal(Signal::SIGCONT)?;
        let status = wait_for_status(&backup, "gives up", |status| {
            matches!(status.state.as_str(), "listening" | "discarded")
        })?;
        ensure!(status.last_failover.is_none(), "it went live: {status:?}");
        progress(load, 20)?;
        drop(backup);
        pair.protect().map(drop)
    })
}

#[test]
fn a_link_that_is_dead_both_ways_leaves_one_side() -> Result<()> {
    story("link between the hosts down", |pair, load| {
        pair.protect()?;
        progress(load, 20)?;
        pair.lab.network.set_logging_link(Side::A, false)?;
        let loser = settle(pair)?;
        progress(load, 20)?;
        pair.lab.network.set_logging_link(Side::A, true)?;
        progress(load, 20)?;
        drop(loser);
        pair.protect().map(drop)
    })
}

#[test]
fn a_link_that_is_dead_one_way_leaves_one_side() -> Result<()> {
    story("link between the hosts down one way", |pair, load| {
        for to in [Side::B, Side::A] {
            pair.protect()?;
            progress(load, 20)?;
            pair.lab.network.lose_frames_to(to, true)?;
            let loser = settle(pair)?;
            progress(load, 20)?;
            pair.lab.network.lose_frames_to(to, false)?;
            progress(load, 20)?;
            drop(loser);
        }
        Ok(())
    })
}

#[test]
fn a_cut_connection_between_healthy_hosts_leaves_one_side() -> Result<()> {
    story("logging connection cut", |pair, load| {
        let proxy = protect_through_proxy(pair, 1)?;
        progress(load, 20)?;
        proxy.cut();
        let loser = settle(pair)?;
        progress(load, 20)?;
        drop(loser);
        pair.protect().map(drop)
    })
}

#[test]
fn a_slow_and_lossy_link_costs_time_and_nothing_else() -> Result<()> {
    story("slow and lossy link", |pair, load| {
        let target = SocketAddr::new(Side::B.address().parse()?, LOGGING_PORT);
        let network = &pair.lab.network;
        let proxy = Proxy::start(network.host(Side::B), Side::B.address(), target, 2)?;
        // Room for the stalls of a lossy link in the failure timeout: what is tested is not detection.
        let mut patient = through(&proxy);
        patient["failure_timeout_ms"] = json!(5_000);
        pair.protect_with(&json!({}), &patient)?;
        proxy.set(Weather {
            delay: Duration::from_millis(5),
            jitter: Duration::from_millis(10),
            loss: 0.01,
            rate: Some(2 << 20),
            ..Weather::default()
        });
        progress(load, 50)?;
        let status = pair.status()?;
        ensure!(status.state == "protected", "{status:?}");
        ensure!(status.output_delay.max_us >= 10_000, "outputs wait for a slow link: {status:?}");
        let dead = pair.kill_primary(Death::Process)?;
        load.first_answer_after(dead)?;
        Ok(())
    })
}

/// Weather in which the copy stays in one phase, and that phase's name.
fn phases() -> [(&'static str, Weather); 4] {
    let clear = Weather::default();
    [
        ("greeting", Weather { mute: true, ..clear }),
        ("copying", Weather { rate: Some(1 << 20), ..clear }),
        ("settling", clear),
        ("protected", clear),
    ]
}

/// Begins to protect through `proxy`, and returns once the primary is in `phase`; the call of `ft.enable`
/// goes on in a thread, since it may never be answered.
fn enter_phase(pair: &mut Pair, proxy: &Proxy, phase: &str, weather: Weather) -> Result<()> {
    proxy.set(weather);
    let other = pair.side.other();
    let backup = pair.lab.start(other, &[])?;
    let listen = format!("tcp:{}:{LOGGING_PORT}", other.address());
    backup.api().put_json("ft.receive", &json!({ "listen_url": listen }))?;
    pair.backup = Some(backup);
    let mut enable = through(proxy);
    enable["arbiter_url"] = json!(format!("file:{}", pair.lab.claims().display()));
    let api = pair.primary.api().clone();
    // Its answer is a refusal when the story kills the backup, and an error when it kills the primary.
    std::thread::spawn(move || api.put_json("ft.enable", &enable));
    if phase == "greeting" {
        // The API serves one call at a time, and this one waits for an answer that does not come.
        return eventually(CHANGE, "the primary connects", || {
            Ok(proxy.connections().ge(&1).then_some(()))
        });
    }
    if phase == "settling" {
        // What the backup says once it has loaded the copy does not arrive.
        wait_for_status(&pair.primary, "copying", |status| status.state != "unprotected")?;
        proxy.set(Weather { mute: true, ..weather });
    }
    wait_for_status(&pair.primary, phase, |status| status.state == phase)?;
    Ok(())
}

#[test]
fn a_backup_killed_in_any_phase_of_the_copy_costs_nothing() -> Result<()> {
    story("backup killed during ft.enable", |pair, load| {
        let target = SocketAddr::new(Side::B.address().parse()?, LOGGING_PORT);
        for (phase, weather) in phases() {
            let network = &pair.lab.network;
            let proxy = Proxy::start(network.host(Side::B), Side::B.address(), target, 3)?;
            enter_phase(pair, &proxy, phase, weather).with_context(|| phase.to_owned())?;
            pair.kill_backup()?;
            proxy.set(Weather::default());
            pair.wait_until_alone().with_context(|| format!("after a kill while {phase}"))?;
            progress(load, 10)?;
        }
        pair.protect().map(drop)
    })
}

#[test]
fn a_primary_killed_before_protection_takes_its_vm_along() -> Result<()> {
    for (phase, weather) in phases().into_iter().filter(|(phase, _)| *phase != "protected") {
        if !met("primary killed during ft.enable", &NEEDS) {
            return Ok(());
        }
        let mut pair = Pair::boot(Lab::new()?)?;
        let target = SocketAddr::new(Side::B.address().parse()?, LOGGING_PORT);
        let network = &pair.lab.network;
        let proxy = Proxy::start(network.host(Side::B), Side::B.address(), target, 4)?;
        enter_phase(&mut pair, &proxy, phase, weather).with_context(|| pair.describe())?;
        pair.primary.kill()?;
        proxy.set(Weather::default());
        let backup = pair.backup.take().context("no backup")?;
        let status = wait_for_status(&backup, "waits for the next", |status| {
            status.state == "listening"
        })
        .with_context(|| format!("killed while {phase}"))?;
        ensure!(status.last_failover.is_none(), "a copy that never counted went live: {status:?}");
        ensure!(backup.state().is_err(), "it still has a VM");
        pair.lab.disk.check()?;
    }
    Ok(())
}

#[test]
fn nothing_acknowledged_is_lost_when_both_sides_die() -> Result<()> {
    if !met("both sides killed", &NEEDS) {
        return Ok(());
    }
    let (at_once, going_live, live): ([&str; 0], _, _) =
        ([], ["draining", "claiming", "claimed", "live"], ["live"]);
    for moment in [&at_once[..], &going_live, &live] {
        let mut pair = Pair::boot(Lab::new()?)?;
        let load = pair.lab.load(Options::new(pair.lab.service()?, "both"))?;
        pair.protect()?;
        progress(&load, 20)?;
        let mut backup = pair.backup.take().context("no backup")?;
        let dead = pair.primary.kill()?;
        let state = match moment {
            [] => "replaying".to_owned(),
            moment => {
                let taking_over = |status: &FtStatus| moment.contains(&status.state.as_str());
                wait_for_status(&backup, "takes over", taking_over)?.state
            }
        };
        backup.kill()?;
        println!("the backup died {:?} after the primary, while {state}", dead.elapsed());
        let answers = load.abandon();
        ensure!(answers.len() >= 20);
        // The next mount replays the journal; what was acknowledged was synced before.
        pair.lab.disk.check()?;
        let verdict = Verdict::of(&answers, &pair.lab.disk.ledger()?);
        ensure!(verdict.lost == 0, "{verdict:?}");
    }
    Ok(())
}

#[test]
fn a_link_that_hangs_for_less_than_the_timeout_is_no_failure() -> Result<()> {
    story("link that hangs for a moment", |pair, load| {
        let target = SocketAddr::new(Side::B.address().parse()?, LOGGING_PORT);
        let network = &pair.lab.network;
        let proxy = Proxy::start(network.host(Side::B), Side::B.address(), target, 5)?;
        let mut patient = through(&proxy);
        patient["failure_timeout_ms"] = json!(30_000);
        pair.protect_with(&json!({}), &patient)?;
        progress(load, 20)?;
        proxy.set(Weather { mute: true, ..Weather::default() });
        let held = wait_for_status(&pair.primary, "outputs wait", |status| status.held_outputs > 0)?;
        ensure!(held.state == "protected", "{held:?}");
        let asked = Instant::now();
        proxy.set(Weather::default());
        load.first_answer_after(asked)?;
        let status = pair.status()?;
        ensure!(status.state == "protected" && status.last_failover.is_none(), "{status:?}");
        Ok(())
    })
}
