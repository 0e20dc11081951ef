//! A protected guest watched over time: lag, log rate, digests.

use crate::lab::Lab;
use crate::pair::Pair;
use anyhow::{Result, ensure};
use ft::FtStatus;
use ledger_client::load::Options;
use ledger_client::stats::Distribution;
use ledger_client::verdict::Verdict;
use std::time::{Duration, Instant};

/// How often the status is read.
const SAMPLE: Duration = Duration::from_secs(1);

/// Most an idle protected guest may log.
pub const IDLE_LOG_MBIT: f64 = 0.1;

/// What was seen over one stretch of time.
#[derive(Clone, Debug)]
pub struct Stretch {
    /// Lag at each sample.
    pub lag: Option<Distribution>,
    /// Log written, in Mbit/s, over the whole stretch.
    pub log_mbit_per_second: f64,
    /// Requests answered per second.
    pub answers_per_second: f64,
    /// `ft.status` at the end.
    pub status: FtStatus,
}

/// Watches `pair` for `duration`; `answered` counts requests answered so far.
///
/// # Errors
///
/// If protection is lost, digests differ or the status cannot be read.
pub fn watch(
    pair: &Pair,
    duration: Duration,
    answered: impl Fn() -> usize,
    mut tell: impl FnMut(Duration, &FtStatus, usize),
) -> Result<Stretch> {
    let start = Instant::now();
    let answers = answered();
    let mut status = pair.status()?;
    let log_bytes = status.log.recorded_bytes;
    let mut lags = Vec::new();
    while start.elapsed() < duration {
        std::thread::sleep(SAMPLE);
        pair.digests_are_equal()?;
        status = pair.status()?;
        ensure!(status.state == "protected", "protection was lost: {status:?}");
        lags.push(Duration::from_micros(status.lag_us));
        tell(start.elapsed(), &status, answered() - answers);
    }
    let seconds = start.elapsed().as_secs_f64();
    Ok(Stretch {
        lag: Distribution::of(lags),
        log_mbit_per_second: (status.log.recorded_bytes - log_bytes) as f64 * 8e-6 / seconds,
        answers_per_second: (answered() - answers) as f64 / seconds,
        status,
    })
}

/// Idle for `idle`, under load for `loaded`, both protected; then power off and balance the account.
///
/// # Errors
///
/// As [`watch`]; also if the idle guest logs too much or the account does not balance.
pub fn run(
    lab: Lab,
    idle: Duration,
    loaded: Duration,
    mut tell: impl FnMut(&str, Duration, &FtStatus, usize),
) -> Result<(Stretch, Stretch, Verdict)> {
    let mut pair = Pair::boot(lab)?;
    pair.protect()?;
    let quiet = watch(&pair, idle, || 0, |at, status, count| tell("idle", at, status, count))?;
    ensure!(
        quiet.log_mbit_per_second < IDLE_LOG_MBIT,
        "an idle guest logs {:.3} Mbit/s",
        quiet.log_mbit_per_second
    );
    let load = pair.lab.load(Options::new(pair.lab.service()?, "soak"))?;
    let busy = watch(
        &pair,
        loaded,
        || load.answered(),
        |at, status, count| tell("load", at, status, count),
    )?;
    let answers = load.stop()?;
    let lab = pair.power_off()?;
    let verdict = Verdict::of(&answers, &lab.disk.ledger()?);
    ensure!(verdict.is_clean(), "the account does not balance: {verdict:?}");
    Ok((quiet, busy, verdict))
}
