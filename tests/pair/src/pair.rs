//! Boot, protect, kill, protect again.

use crate::lab::Lab;
use crate::network::Side;
use crate::patience::eventually;
use crate::vmm::Vmm;
use anyhow::{Context, Result, ensure};
use ft::FtStatus;
use ledger_client::load::Load;
use ledger_client::verdict::Verdict;
use serde_json::{Value, json};
use std::time::{Duration, Instant};

/// Time the guest may take from start to its shell.
pub const BOOT: Duration = Duration::from_secs(30);
/// Time any change of the pair's state may take.
pub const CHANGE: Duration = Duration::from_secs(60);
/// States of a primary that has no backup and wants none.
const UNPROTECTED: [&str; 3] = ["unprotected", "abandoned", "alone"];
/// Port of the logging channel.
pub const LOGGING_PORT: u16 = 7700;

/// How a host dies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Death {
    /// Its VMM is killed with SIGKILL; the host's kernel closes its connections.
    Process,
    /// Its cables are dead first, so that nobody hears the connections close.
    Host,
}

/// What protecting took.
#[derive(Clone, Debug)]
pub struct Protected {
    /// From the call until both sides say they are protected.
    pub took: Duration,
    /// The guest stood still this long.
    pub pause: Duration,
}

/// Times asked for when protecting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timing {
    /// How often each side says that it is there.
    pub heartbeat_ms: u64,
    /// Silence after which a side suspects the other.
    pub failure_timeout_ms: u64,
}

/// A VM on one host and, when it is protected, its backup on the other.
pub struct Pair {
    /// Hosts, disk, guest.
    pub lab: Lab,
    /// The live side.
    pub primary: Vmm,
    /// The other side while there is one.
    pub backup: Option<Vmm>,
    /// Where the live side is.
    pub side: Side,
    /// Times to protect with; `None` for Dyad's own.
    pub timing: Option<Timing>,
}

impl Pair {
    /// Boots the guest on host a until its service and its shell are there.
    ///
    /// # Errors
    ///
    /// With what the console shows, if it does not get there in [`BOOT`].
    pub fn boot(lab: Lab) -> Result<Self> {
        Self::boot_with(lab, "")
    }

    /// As [`Self::boot`], with `mode` on the kernel command line; see `tests/guest/root/init`.
    ///
    /// # Errors
    ///
    /// As [`Self::boot`].
    pub fn boot_with(lab: Lab, mode: &str) -> Result<Self> {
        let options = lab.boot_options(mode);
        Self::boot_from(lab, &options)
    }

    /// As [`Self::boot`], from a command line.
    ///
    /// # Errors
    ///
    /// As [`Self::boot`].
    pub fn boot_from(lab: Lab, options: &[String]) -> Result<Self> {
        let primary = lab.start(Side::A, options)?;
        let mut pair = Self { lab, primary, backup: None, side: Side::A, timing: None };
        pair.primary.console.wait_for("# ", BOOT).with_context(|| pair.primary.log())?;
        Ok(pair)
    }

    /// Starts a fresh `dyad` on the other host and makes it the backup.
    ///
    /// # Errors
    ///
    /// If either side refuses or both are not protected within [`CHANGE`].
    pub fn protect(&mut self) -> Result<Protected> {
        self.protect_with(&json!({}), &json!({}))
    }

    /// As [`Self::protect`], for good: both hosts are standbys, so that whoever survives makes the next
    /// backup by itself.
    ///
    /// # Errors
    ///
    /// As [`Self::protect`].
    pub fn protect_for_good(&mut self) -> Result<Protected> {
        let standbys = [Side::A, Side::B].map(listen_url);
        self.protect_with(&json!({}), &json!({ "standbys": standbys }))
    }

    /// As [`Self::protect`], with more to say in `ft.receive` and `ft.enable`.
    ///
    /// # Errors
    ///
    /// As [`Self::protect`].
    pub fn protect_with(&mut self, receive: &Value, more: &Value) -> Result<Protected> {
        let started = self.begin_protection(receive, more)?;
        self.wait_until_protected(started)
    }

    /// Starts a fresh `dyad` on the other host and has the guest copied to it. Returns when the copy began.
    ///
    /// # Errors
    ///
    /// If either side refuses.
    pub fn begin_protection(&mut self, receive: &Value, more: &Value) -> Result<Instant> {
        let (backup, listen) = self.start_standby(receive)?;
        self.backup = Some(backup);
        let started = Instant::now();
        // A live side that looks for a backup finds it without being asked, unless it is to be elsewhere now.
        let search = self.status()?.reprotection;
        let searches = search.is_some_and(|search| search.state != "no standby");
        let elsewhere = more.get("backup_url").is_some();
        if searches && elsewhere {
            self.primary.api().put("ft.disable")?;
        }
        if !searches || elsewhere {
            let mut enable = self.lab.enable(&listen);
            if let Some(timing) = self.timing {
                enable["heartbeat_ms"] = timing.heartbeat_ms.into();
                enable["failure_timeout_ms"] = timing.failure_timeout_ms.into();
            }
            merge(&mut enable, more);
            self.primary.api().put_json("ft.enable", &enable)?;
        }
        Ok(started)
    }

    /// Starts a fresh `dyad` on the other host, where the live side finds it by itself.
    ///
    /// # Errors
    ///
    /// If both are not protected within [`CHANGE`].
    pub fn reprotect(&mut self) -> Result<Protected> {
        let (backup, _) = self.start_standby(&json!({}))?;
        self.backup = Some(backup);
        self.wait_until_protected(Instant::now())
    }

    fn start_standby(&self, more: &Value) -> Result<(Vmm, String)> {
        let other = self.side.other();
        let (standby, listen) = (self.lab.start(other, &[])?, listen_url(other));
        let mut receive = json!({ "listen_url": listen });
        merge(&mut receive, more);
        standby.api().put_json("ft.receive", &receive)?;
        Ok((standby, listen))
    }

    /// Waits until the copy that `started` then protects the guest.
    ///
    /// # Errors
    ///
    /// If both sides are not protected within [`CHANGE`].
    pub fn wait_until_protected(&self, started: Instant) -> Result<Protected> {
        let status = wait_for_status(&self.primary, "protected", |status| {
            status.role == "primary" && status.state == "protected"
        })?;
        let backup = self.backup.as_ref().context("there is no backup")?;
        wait_for_status(backup, "replaying", |status| {
            status.role == "backup" && status.state == "replaying"
        })?;
        let took = started.elapsed();
        let pause =
            status.clone.and_then(|clone| clone.pause_us).context("no pause in ft.status")?;
        Ok(Protected { took, pause: Duration::from_micros(pause) })
    }

    /// Kills the primary; the backup is what this pair's primary is from now on.
    ///
    /// # Errors
    ///
    /// If there is no backup, or the primary had ended before.
    pub fn kill_primary(&mut self, death: Death) -> Result<Instant> {
        ensure!(self.backup.is_some(), "there is no backup to survive on");
        if death == Death::Host {
            self.lab.network.set_links(self.side, false)?;
        }
        let dead = self.primary.kill()?;
        if death == Death::Host {
            // Nothing of it is left that could speak.
            self.lab.network.set_links(self.side, true)?;
        }
        self.change_sides()?;
        Ok(dead)
    }

    /// The backup counts as the live side from now on; returns the other.
    ///
    /// # Errors
    ///
    /// If there is no backup.
    pub fn change_sides(&mut self) -> Result<Vmm> {
        let backup = self.backup.take().context("there is no backup")?;
        self.side = self.side.other();
        Ok(std::mem::replace(&mut self.primary, backup))
    }

    /// Kills the backup.
    ///
    /// # Errors
    ///
    /// If there is none.
    pub fn kill_backup(&mut self) -> Result<Instant> {
        self.backup.take().context("there is no backup")?.kill()
    }

    /// Ends protection in an orderly way; the backup's process ends.
    ///
    /// # Errors
    ///
    /// If the primary refuses or does not get there.
    pub fn unprotect(&mut self) -> Result<FtStatus> {
        self.primary.api().put("ft.disable")?;
        let status = self.wait_until_alone()?;
        drop(self.backup.take());
        Ok(status)
    }

    /// Waits until the live side runs alone.
    ///
    /// # Errors
    ///
    /// If it does not within [`CHANGE`].
    pub fn wait_until_alone(&self) -> Result<FtStatus> {
        wait_for_status(&self.primary, "alone or unprotected", |status| {
            status.role == "alone" || UNPROTECTED.contains(&status.state.as_str())
        })
    }

    /// Where both sides stand, for the account of a failure.
    #[must_use]
    pub fn describe(&self) -> String {
        let one = |(role, vmm): (&str, &Vmm)| {
            let status = vmm.ft_status();
            format!("{role}: {status:?}\nits log ends with:\n{}\n", vmm.log_end())
        };
        let sides = std::iter::once(("live side", &self.primary));
        sides.chain(self.backup.iter().map(|backup| ("backup", backup))).map(one).collect()
    }

    /// `ft.status` of the live side.
    ///
    /// # Errors
    ///
    /// If it does not answer.
    pub fn status(&self) -> Result<FtStatus> {
        self.primary.ft_status()
    }

    /// Checks that digests have been compared and never differed, on every side there is.
    ///
    /// # Errors
    ///
    /// With the status that says otherwise.
    pub fn digests_are_equal(&self) -> Result<u64> {
        let mut compared = 0;
        for vmm in std::iter::once(&self.primary).chain(&self.backup) {
            let status = vmm.ft_status()?;
            ensure!(status.digests_unequal == 0, "digests differed: {status:?}");
            compared = compared.max(status.digests_compared);
        }
        Ok(compared)
    }

    /// As [`Self::power_off`]; then every answer that the client of `load` has must be on the disk, once and in order.
    ///
    /// # Errors
    ///
    /// With what is lost, repeated or out of order.
    pub fn balance(self, load: Load) -> Result<()> {
        let answers = load.stop()?;
        let lab = self.power_off()?;
        let verdict = Verdict::of(&answers, &lab.disk.ledger()?);
        ensure!(verdict.is_clean(), "{verdict:?}");
        Ok(())
    }

    /// Presses the power button, waits until the VM is gone on every side, then checks the disk.
    ///
    /// The VMM that booted the guest ends with it. A backup's VMM goes back to waiting for a VM; it must
    /// not have gone live.
    ///
    /// # Errors
    ///
    /// If the guest does not go down, a side keeps it, or the file system has errors.
    pub fn power_off(mut self) -> Result<Lab> {
        self.primary.api().put("vm.power-button")?;
        let ended = self.primary.wait(CHANGE);
        let status = ended.with_context(|| self.primary.log_end())?;
        ensure!(status.success(), "dyad ended with {status}: {}", self.primary.log());
        if let Some(mut backup) = self.backup.take() {
            let status =
                wait_for_status(&backup, "listening", |status| status.state == "listening")?;
            ensure!(status.last_failover.is_none(), "the backup went live: {status:?}");
            ensure!(backup.state().is_err(), "the backup still has a VM");
            backup.api().put("vmm.shutdown")?;
            ensure!(backup.wait(CHANGE)?.success(), "{}", backup.log());
        }
        self.lab.disk.check()?;
        Ok(self.lab)
    }
}

/// Adds the keys of `more` to `body`; they come first where both have one.
pub fn merge(body: &mut Value, more: &Value) {
    for (key, value) in more.as_object().into_iter().flatten() {
        body[key] = value.clone();
    }
}

/// Where a standby on this host waits.
#[must_use]
pub fn listen_url(side: Side) -> String {
    format!("tcp:{}:{LOGGING_PORT}", side.address())
}

/// Waits until `condition` holds for `ft.status` of `vmm`.
///
/// # Errors
///
/// With the last status and the end of the log, when [`CHANGE`] runs out or there is no answer.
pub fn wait_for_status(
    vmm: &Vmm,
    what: &str,
    condition: impl Fn(&FtStatus) -> bool,
) -> Result<FtStatus> {
    let mut last = FtStatus::default();
    let found = eventually(CHANGE, what, || {
        last = vmm.ft_status()?;
        Ok(condition(&last).then(|| last.clone()))
    });
    found.with_context(|| format!("{last:#?}\nthe log ends with:\n{}", vmm.log_end()))
}
