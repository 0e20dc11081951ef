//! Faults of hosts, links and the arbiter, done to a protected pair, and what must be true afterwards.
//!
//! Each [`Fault`] begins with a protected pair whose logging goes through a [`Proxy`], and ends when exactly one
//! side lives and the client has been answered by it. `tests/faults.rs` tells each as a story of its own;
//! [`Storm`] strikes with one after the other at random.

use crate::disk::Disk;
use crate::kills::progress;
use crate::lab::Lab;
use crate::mirrors;
use crate::network::Side;
use crate::pair::{CHANGE, Death, LOGGING_PORT, Pair, listen_url, wait_for_status};
use crate::patience::eventually;
use crate::proxy::{Proxy, Weather};
use crate::vmm::Vmm;
use anyhow::{Context, Result, ensure};
use ft::{DiskMode, FtStatus};
use ledger_client::load::{Load, Options};
use ledger_client::verdict::Verdict;
use nix::sys::signal::Signal;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

/// Answers that show that the live side is at work.
const SOME: usize = 10;

/// What can happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// SIGKILL; the host's kernel closes the connections.
    PrimaryKilled,
    /// All cables of the primary's host dead, then SIGKILL.
    PrimaryHostDead,
    /// SIGKILL.
    BackupKilled,
    /// SIGSTOP until its successor lives, then SIGCONT.
    PrimaryAsleep,
    /// SIGSTOP until the primary runs alone, then SIGCONT.
    BackupAsleep,
    /// The cable between the hosts, both ways.
    LinkDead,
    /// Nothing the primary sends arrives.
    LinkDeadToBackup,
    /// Nothing the backup sends arrives.
    LinkDeadToPrimary,
    /// The connection breaks; hosts and cables are well.
    ConnectionCut,
    /// The link is slow, narrow and lossy, and then the primary dies.
    SlowLinkThenKilled,
    /// The arbiter's directory is away while the primary dies, and comes back.
    ArbiterGone,
    /// The operator moves the VM.
    HandOver,
    /// The operator has the backup take over.
    TakeOver,
}

/// Every fault.
pub const FAULTS: [Fault; 13] = [
    Fault::PrimaryKilled,
    Fault::PrimaryHostDead,
    Fault::BackupKilled,
    Fault::PrimaryAsleep,
    Fault::BackupAsleep,
    Fault::LinkDead,
    Fault::LinkDeadToBackup,
    Fault::LinkDeadToPrimary,
    Fault::ConnectionCut,
    Fault::SlowLinkThenKilled,
    Fault::ArbiterGone,
    Fault::HandOver,
    Fault::TakeOver,
];

impl Fault {
    /// Lets it happen to a protected `pair`. Afterwards the pair has a live primary and no backup.
    ///
    /// # Errors
    ///
    /// If two sides live, none does, or the client waits in vain.
    pub fn strike(self, pair: &mut Pair, proxy: &Proxy, load: &Load) -> Result<()> {
        let before = pair.status()?.generation;
        match self {
            Self::PrimaryKilled => killed(pair, load, Death::Process)?,
            Self::PrimaryHostDead => killed(pair, load, Death::Host)?,
            Self::BackupKilled => {
                pair.kill_backup()?;
                pair.wait_until_alone()?;
            }
            Self::PrimaryAsleep => primary_asleep(pair, load)?,
            Self::BackupAsleep => backup_asleep(pair, load, before)?,
            Self::LinkDead => {
                pair.lab.network.set_link_between_hosts(false)?;
                let _loser = settle(pair, before)?;
                progress(load, SOME)?;
                pair.lab.network.set_link_between_hosts(true)?;
                progress(load, SOME)?;
            }
            Self::LinkDeadToBackup => one_way(pair, load, pair.side.other(), before)?,
            Self::LinkDeadToPrimary => one_way(pair, load, pair.side, before)?,
            Self::ConnectionCut => {
                proxy.cut();
                let _loser = settle(pair, before)?;
            }
            Self::SlowLinkThenKilled => {
                proxy.set(slow());
                progress(load, SOME)?;
                killed(pair, load, Death::Process)?;
            }
            Self::ArbiterGone => arbiter_gone(pair, load)?,
            Self::HandOver => {
                let asked = Instant::now();
                pair.primary.api().put("ft.failover")?;
                let _old = pair.change_sides()?;
                load.first_answer_after(asked)?;
                pair.wait_until_alone()?;
            }
            Self::TakeOver => {
                pair.backup.as_ref().context("there is no backup")?.api().put("ft.failover")?;
                let _old = settle(pair, before)?;
            }
        }
        progress(load, SOME)?;
        Ok(())
    }

    /// What more `ft.enable` should say, so that this fault is what is felt.
    #[must_use]
    pub fn terms(self) -> Value {
        match self {
            // What is tested is not detection: a lossy link has pauses.
            Self::SlowLinkThenKilled => json!({ "failure_timeout_ms": 3_000 }),
            _ => json!({}),
        }
    }
}

/// Slow, narrow and lossy.
fn slow() -> Weather {
    Weather {
        delay: Duration::from_millis(5),
        jitter: Duration::from_millis(10),
        loss: 0.01,
        rate: Some(2 << 20),
        ..Weather::default()
    }
}

fn killed(pair: &mut Pair, load: &Load, death: Death) -> Result<()> {
    let dead = pair.kill_primary(death)?;
    load.first_answer_after(dead)?;
    pair.wait_until_alone().map(drop)
}

fn primary_asleep(pair: &mut Pair, load: &Load) -> Result<()> {
    pair.primary.signal(Signal::SIGSTOP)?;
    let stopped = Instant::now();
    let old = pair.change_sides()?;
    load.first_answer_after(stopped)?;
    progress(load, SOME)?;
    old.signal(Signal::SIGCONT)?;
    wait_for_status(&old, "halted", |status| status.state == "halted").map(drop)
}

fn backup_asleep(pair: &mut Pair, load: &Load, before: u64) -> Result<()> {
    let backup = pair.backup.take().context("there is no backup")?;
    backup.signal(Signal::SIGSTOP)?;
    pair.wait_until_alone()?;
    progress(load, SOME)?;
    backup.signal(Signal::SIGCONT)?;
    let status = wait_for_status(&backup, "gives up", |status| gave_up(status, before))?;
    ensure!(status.last_failover.is_none(), "it went live: {status:?}");
    Ok(())
}

fn one_way(pair: &mut Pair, load: &Load, to: Side, before: u64) -> Result<()> {
    pair.lab.network.lose_frames_to(to, true)?;
    let _loser = settle(pair, before)?;
    progress(load, SOME)?;
    pair.lab.network.lose_frames_to(to, false)
}

fn arbiter_gone(pair: &mut Pair, load: &Load) -> Result<()> {
    let (claims, away) = (pair.lab.claims(), pair.lab.claims().with_extension("away"));
    std::fs::rename(&claims, &away)?;
    pair.kill_primary(Death::Process)?;
    let waiting =
        wait_for_status(&pair.primary, "waits", |status| status.state == "waiting for arbiter")?;
    ensure!(waiting.role == "backup", "{waiting:?}");
    std::fs::rename(&away, &claims)?;
    let back = Instant::now();
    load.first_answer_after(back)?;
    pair.wait_until_alone().map(drop)
}

/// Whether this side lives in a generation after `before`.
fn lives(status: &FtStatus, before: u64) -> bool {
    status.generation > before && matches!(status.role.as_str(), "alone" | "primary")
}

/// Whether this side will not go live in the generation `before`; it may be a new backup already, or the one of
/// a survivor that found it again.
fn gave_up(status: &FtStatus, before: u64) -> bool {
    matches!(status.state.as_str(), "halted" | "listening" | "discarded")
        || (status.role == "backup" && status.generation != before)
}

/// After a fault between the hosts: waits until one side lives on in the next generation and the other has
/// given up for good, and makes the live one the pair's primary. Returns the other.
///
/// # Errors
///
/// If both live, or it does not come to that within [`CHANGE`].
pub fn settle(pair: &mut Pair, before: u64) -> Result<Vmm> {
    let backup = pair.backup.as_ref().context("there is no backup")?;
    let backup_lives = eventually(CHANGE, "one side lives, the other has given up", || {
        let (one, other) = (pair.primary.ft_status()?, backup.ft_status()?);
        let both = lives(&one, before) && lives(&other, before);
        ensure!(!both, "both live: {one:?} and {other:?}");
        let primary_lives = lives(&one, before) && gave_up(&other, before);
        let backup_lives = lives(&other, before) && gave_up(&one, before);
        Ok((primary_lives || backup_lives).then_some(backup_lives))
    })?;
    if backup_lives {
        pair.change_sides()
    } else {
        pair.backup.take().context("there is no backup")
    }
}

/// A proxy in front of the logging port of the host where the next backup will be.
///
/// # Errors
///
/// If it cannot listen there.
pub fn proxy(pair: &Pair, seed: u64) -> Result<Proxy> {
    let other = pair.side.other();
    let target = SocketAddr::new(other.address().parse()?, LOGGING_PORT);
    Proxy::start(pair.lab.network.host(other), other.address(), target, seed)
}

/// `terms`, with the backup to be reached through `proxy`.
#[must_use]
pub fn through(proxy: &Proxy, mut terms: Value) -> Value {
    terms["backup_url"] = json!(format!("tcp:{}", proxy.address()));
    terms
}

/// Faults at random, one after the other, on one pair under one load.
#[derive(Clone, Copy, Debug)]
pub struct Storm {
    /// How many.
    pub count: u32,
    /// Chooses faults and moments.
    pub seed: u64,
    /// How the pair has its disks.
    pub disk_mode: DiskMode,
}

impl Storm {
    /// Boots a guest in `lab`, lets the faults happen and balances the account. `tell` hears of each fault,
    /// and how long the client waited for its next answer. Mirrored images must be alike in the end, and either must
    /// hold everything.
    ///
    /// # Errors
    ///
    /// The first thing that went wrong.
    pub fn run(&self, lab: Lab, mut tell: impl FnMut(u32, Fault, Duration)) -> Result<Verdict> {
        let mut random = StdRng::seed_from_u64(self.seed);
        let mut pair = Pair::boot(lab)?;
        let id = format!("storm{}", self.seed);
        let load = pair.lab.load(Options::new(pair.lab.service()?, &id))?;
        for number in 1..=self.count {
            let fault = *FAULTS.choose(&mut random).context("there are faults")?;
            let proxy = proxy(&pair, random.random())?;
            let strike = |pair: &mut Pair, random: &mut StdRng| -> Result<Duration> {
                self.protect(pair, &through(&proxy, fault.terms()))?;
                progress(&load, 1)?;
                // A random moment.
                std::thread::sleep(Duration::from_micros(random.random_range(0..1_000_000)));
                pair.digests_are_equal()?;
                let begin = Instant::now();
                fault.strike(pair, &proxy, &load)?;
                Ok(begin.elapsed())
            };
            let took = strike(&mut pair, &mut random)
                .with_context(|| pair.describe())
                .with_context(|| format!("fault {number}, {fault:?}, seed {}", self.seed))?;
            tell(number, fault, took);
        }
        self.settle(pair, load)
    }

    fn protect(&self, pair: &mut Pair, terms: &Value) -> Result<()> {
        let (mut terms, mut receive) = (terms.clone(), json!({}));
        terms["disk_mode"] = json!(self.disk_mode);
        // The configuration names the image of the host on which the guest was booted.
        if self.disk_mode == DiskMode::Mirrored && pair.side.other() == Side::B {
            receive = mirrors::receive(&mirrors::image_of(&pair.lab, Side::B));
        }
        pair.protect_with(&receive, &terms).map(drop)
    }

    /// Balances the account, on each image there is.
    fn settle(&self, mut pair: Pair, load: Load) -> Result<Verdict> {
        if self.disk_mode == DiskMode::Mirrored {
            // A survivor would look for a backup behind the proxy of the last fault.
            let direct = json!({ "backup_url": listen_url(pair.side.other()) });
            self.protect(&mut pair, &direct).with_context(|| pair.describe())?;
            progress(&load, SOME)?;
            mirrors::alike(&pair).with_context(|| pair.describe())?;
        }
        let answers = load.stop()?;
        let lab = pair.power_off()?;
        let disks: Vec<Disk> = match self.disk_mode {
            DiskMode::Shared => vec![lab.disk.clone()],
            DiskMode::Mirrored => mirrors::disks(&lab),
        };
        let mut last = None;
        for disk in disks {
            disk.check()?;
            let verdict = Verdict::of(&answers, &disk.ledger()?);
            let image = disk.path().display();
            ensure!(verdict.is_clean(), "the account does not balance on {image}: {verdict:?}");
            last = Some(verdict);
        }
        last.context("there is a disk")
    }
}
