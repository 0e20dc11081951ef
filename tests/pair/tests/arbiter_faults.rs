//! What happens to a protected guest when its arbiter is out of reach: nothing, while all is well; and when
//! a side is lost, no side goes live, the guest's answers wait, both sides say why, and it ends by itself
//! when the arbiter is back.

use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use etcd_cluster::{Cluster, installed};
use ledger_client::load::{Load, Options};
use pair_tests::kills::progress;
use pair_tests::lab::Lab;
use pair_tests::network::{CLIENT, Side};
use pair_tests::pair::{CHANGE, Death, Pair, listen_url, wait_for_status};
use pair_tests::patience::eventually;
use pair_tests::requirements::{Need, met};
use pair_tests::vmm::Vmm;
use serde_json::json;

const NEEDS: [Need; 2] = [Need::Root, Need::Tap];

fn start(lab: Lab, name: &str) -> Result<(Pair, Load)> {
    let pair = Pair::boot(lab)?;
    let load = pair.lab.load(Options::new(pair.lab.service()?, name))?;
    Ok((pair, load))
}

/// Waits until `vmm` says that it waits for its arbiter, and for which.
fn waits_for_arbiter(vmm: &Vmm, arbiter: &str) -> Result<()> {
    let status = wait_for_status(vmm, "waiting for arbiter", |status| {
        status.state == "waiting for arbiter"
    })?;
    let reason = status.reason.unwrap_or_default();
    ensure!(reason.contains(arbiter), "the reason does not name {arbiter}: {reason}");
    ensure!(status.role != "alone" && status.last_failover.is_none(), "it went live: {reason}");
    Ok(())
}

/// The primary dies while the arbiter is out of reach: nobody goes live until `back` has been called.
fn the_backup_waits(
    pair: &mut Pair,
    load: &Load,
    arbiter: &str,
    back: impl FnOnce() -> Result<()>,
) -> Result<()> {
    let dead = pair.kill_primary(Death::Process)?;
    waits_for_arbiter(&pair.primary, arbiter)?;
    let answered = load.answered();
    let returned = Instant::now();
    back()?;
    let first = load.first_answer_after(dead)?;
    ensure!(first > returned, "a request was answered while nobody had a claim");
    ensure!(load.answered() > answered);
    let status = pair.wait_until_alone()?;
    ensure!(status.last_failover.is_some(), "{status:?}");
    progress(load, 20)?;
    Ok(())
}

/// The arbiter's directory, renamed.
struct Away {
    here: PathBuf,
    away: PathBuf,
}

impl Away {
    fn take(pair: &Pair) -> Result<Self> {
        let here = pair.lab.claims();
        let away = here.with_extension("away");
        std::fs::rename(&here, &away)?;
        Ok(Self { here, away })
    }

    fn bring_back(self) -> Result<()> {
        Ok(std::fs::rename(self.away, self.here)?)
    }
}

#[test]
fn without_its_directory_a_healthy_pair_goes_on_and_a_backup_waits() -> Result<()> {
    if !met("arbiter directory gone", &NEEDS) {
        return Ok(());
    }
    let (mut pair, load) = start(Lab::new()?, "directory-gone")?;
    pair.protect()?;
    let away = Away::take(&pair)?;
    progress(&load, 100)?;
    ensure!(pair.status()?.state == "protected", "{:?}", pair.status()?);
    let backup = pair.backup.as_ref().context("there is a backup")?.ft_status()?;
    ensure!(backup.state == "replaying", "{backup:?}");
    let claims = pair.lab.claims().display().to_string();
    the_backup_waits(&mut pair, &load, &claims, || away.bring_back())
        .with_context(|| pair.describe())?;
    pair.balance(load)
}

#[test]
fn a_file_system_that_is_not_mounted_any_more_lets_nobody_go_live() -> Result<()> {
    if !met("empty directory in the arbiter's place", &NEEDS) {
        return Ok(());
    }
    let (mut pair, load) = start(Lab::new()?, "unmounted")?;
    pair.protect()?;
    progress(&load, 20)?;
    let away = Away::take(&pair)?;
    // What is left of a mount point: a directory that takes files from anybody.
    let claims = pair.lab.claims();
    std::fs::create_dir(&claims)?;
    the_backup_waits(&mut pair, &load, "was not announced", || {
        std::fs::remove_dir(&claims).context("somebody has written to it")?;
        away.bring_back()
    })
    .with_context(|| pair.describe())?;
    pair.balance(load)
}

#[test]
fn a_forced_take_over_waits_for_the_arbiter_and_costs_nothing() -> Result<()> {
    if !met("arbiter directory gone, take-over", &NEEDS) {
        return Ok(());
    }
    let (mut pair, load) = start(Lab::new()?, "forced")?;
    pair.protect()?;
    force_in_vain(&mut pair, &load).with_context(|| pair.describe())?;
    pair.balance(load)
}

fn force_in_vain(pair: &mut Pair, load: &Load) -> Result<()> {
    let away = Away::take(pair)?;
    let backup = pair.backup.as_ref().context("there is a backup")?;
    backup.api().put("ft.failover")?;
    waits_for_arbiter(backup, &pair.lab.claims().display().to_string())?;
    progress(load, 200)?;
    ensure!(pair.status()?.state == "protected", "{:?}", pair.status()?);
    away.bring_back()?;
    let old = pair.change_sides()?;
    wait_for_status(&old, "halted", |status| status.state == "halted")?;
    pair.wait_until_alone()?;
    progress(load, 50)?;
    Ok(())
}

#[test]
fn both_sides_wait_when_they_hear_neither_each_other_nor_the_arbiter() -> Result<()> {
    if !met("link cut, arbiter directory gone", &NEEDS) {
        return Ok(());
    }
    let (mut pair, load) = start(Lab::new()?, "cut")?;
    pair.protect()?;
    progress(&load, 20)?;
    both_wait(&mut pair, &load).with_context(|| pair.describe())?;
    progress(&load, 50)?;
    // Protected again, whoever has won, once the hosts hear each other.
    pair.protect()?;
    progress(&load, 50)?;
    pair.balance(load)
}

fn both_wait(pair: &mut Pair, load: &Load) -> Result<()> {
    let away = Away::take(pair)?;
    pair.lab.network.set_link_between_hosts(false)?;
    let claims = pair.lab.claims().display().to_string();
    let backup = pair.backup.as_ref().context("there is a backup")?;
    waits_for_arbiter(&pair.primary, &claims)?;
    waits_for_arbiter(backup, &claims)?;
    // From here on no answer leaves either side: the primary's guest runs, its answers are held.
    let waiting = Instant::now();
    let held = wait_for_status(&pair.primary, "held outputs", |status| status.held_outputs > 0)?;
    ensure!(held.throttle == 0.0, "nobody is behind, and the guest is slowed down: {held:?}");
    // Protection cannot be ended now, and a call that was refused has changed nothing: the next backup is still wanted.
    let refused = pair.primary.api().put("ft.disable").is_err();
    let wanted = pair.primary.ft_status()?.reprotection.is_some();
    ensure!(refused && wanted, "refused: {refused}, wanted: {wanted}");
    let returned = Instant::now();
    away.bring_back()?;
    // One of them wins, whichever asks first; the other is silent for good.
    let won_by_backup = eventually(CHANGE, "one side alone", || {
        let sides = [pair.primary.ft_status()?, backup.ft_status()?];
        Ok(sides.iter().position(|status| status.role == "alone").map(|side| side == 1))
    })?;
    if won_by_backup {
        let old = pair.change_sides()?;
        wait_for_status(&old, "halted", |status| status.state == "halted")?;
    } else {
        let backup = pair.backup.take().context("there is a backup")?;
        wait_for_status(&backup, "listening", |status| status.state == "listening")?;
        ensure!(backup.state().is_err(), "the backup still has a VM");
    }
    let first = load.first_answer_after(waiting)?;
    ensure!(first > returned, "a request was answered while nobody had a claim");
    pair.lab.network.set_link_between_hosts(true)
}

/// etcd at the switch. The hosts reach it once they are connected to the switch.
fn etcd(lab: &mut Lab, members: u16) -> Result<Cluster> {
    let address: Ipv4Addr = CLIENT.parse()?;
    let ports: Vec<u16> = (2379..2379 + 2 * members).collect();
    let cluster = Cluster::start_at(address.into(), &ports, Some(lab.network.switch.path()))?;
    lab.arbiter_url = cluster.url();
    Ok(cluster)
}

#[test]
fn etcd_decides_also_with_one_member_dead() -> Result<()> {
    if !met("etcd as arbiter", &NEEDS) || !installed("etcd as arbiter") {
        return Ok(());
    }
    let mut lab = Lab::new()?;
    let mut cluster = etcd(&mut lab, 3)?;
    lab.network.connect_to_switch(Side::A)?;
    let (mut pair, load) = start(lab, "etcd")?;
    refused_for_the_backups_sake(&pair)?;
    progress(&load, 20)?;
    pair.lab.network.connect_to_switch(Side::B)?;
    pair.protect()?;
    progress(&load, 20)?;
    cluster.kill(0)?;
    let dead = pair.kill_primary(Death::Process)?;
    load.first_answer_after(dead).with_context(|| pair.describe())?;
    pair.wait_until_alone()?;
    // The next generation, with the whole host of the primary cut off from etcd too.
    pair.protect()?;
    progress(&load, 20)?;
    cluster.launch(0)?;
    let dead = pair.kill_primary(Death::Host)?;
    load.first_answer_after(dead).with_context(|| pair.describe())?;
    pair.balance(load)
}

/// The backup does not reach the arbiter: protection is refused by name, the VM has not noticed.
fn refused_for_the_backups_sake(pair: &Pair) -> Result<()> {
    let other = pair.side.other();
    let backup = pair.lab.start(other, &[])?;
    let listen = listen_url(other);
    backup.api().put_json("ft.receive", &json!({ "listen_url": listen }))?;
    let enable = pair.lab.enable(&listen);
    let error = match pair.primary.api().put_json("ft.enable", &enable) {
        Ok(_) => anyhow::bail!("protected with an arbiter that the backup does not reach"),
        Err(error) => format!("{:#}", anyhow::Error::from(error)),
    };
    ensure!(error.contains("cannot use the arbiter"), "{error}");
    ensure!(pair.primary.state()? == "Running");
    Ok(())
}

#[test]
fn without_etcd_a_backup_waits() -> Result<()> {
    if !met("etcd gone", &NEEDS) || !installed("etcd gone") {
        return Ok(());
    }
    let mut lab = Lab::new()?;
    let mut cluster = etcd(&mut lab, 1)?;
    for side in [Side::A, Side::B] {
        lab.network.connect_to_switch(side)?;
    }
    let (mut pair, load) = start(lab, "etcd-gone")?;
    pair.protect()?;
    cluster.kill(0)?;
    progress(&load, 100)?;
    ensure!(pair.status()?.state == "protected", "{:?}", pair.status()?);
    let url = pair.lab.arbiter_url.clone();
    the_backup_waits(&mut pair, &load, &url, || cluster.launch(0))
        .with_context(|| pair.describe())?;
    pair.balance(load)
}
