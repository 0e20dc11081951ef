//! A protected guest watched over time: lag, log rate, digests.

use crate::lab::Lab;
use crate::pair::Pair;
use anyhow::{Context, Result, ensure};
use ledger_client::load::Options;
use ledger_client::stats::Distribution;
use ledger_client::verdict::Verdict;
use serde_json::Value;
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
    pub status: Value,
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
    mut tell: impl FnMut(Duration, &Value, usize),
) -> Result<Stretch> {
    let start = Instant::now();
    let answers = answered();
    let mut status = pair.status()?;
    let log_bytes = bytes(&status)?;
    let mut lags = Vec::new();
    while start.elapsed() < duration {
        std::thread::sleep(SAMPLE);
        pair.digests_are_equal()?;
        status = pair.status()?;
        ensure!(status["state"] == "protected", "protection was lost: {status}");
        let lag = status["lag_us"]["last"].as_u64().context("ft.status has no lag")?;
        lags.push(Duration::from_micros(lag));
        tell(start.elapsed(), &status, answered() - answers);
    }
    let seconds = start.elapsed().as_secs_f64();
    Ok(Stretch {
        lag: Distribution::of(lags),
        log_mbit_per_second: (bytes(&status)? - log_bytes) as f64 * 8e-6 / seconds,
        answers_per_second: (answered() - answers) as f64 / seconds,
        status,
    })
}

fn bytes(status: &Value) -> Result<u64> {
    status["log_bytes"].as_u64().context("ft.status has no log_bytes")
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
    mut tell: impl FnMut(&str, Duration, &Value, usize),
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
