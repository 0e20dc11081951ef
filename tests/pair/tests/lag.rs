//! A log that the backup does not take: the primary waits for it, and shows that it does.

use anyhow::{Result, ensure};
use ledger_client::load::{Load, Options};
use ledger_client::verdict::Verdict;
use pair_tests::faults::{proxy, through};
use pair_tests::kills::progress;
use pair_tests::lab::Lab;
use pair_tests::pair::{CHANGE, Pair, wait_for_status};
use pair_tests::patience::eventually;
use pair_tests::proxy::Weather;
use pair_tests::requirements::{Need, met};
use serde_json::json;

const NEEDS: [Need; 2] = [Need::Root, Need::Tap];

fn finish(pair: Pair, load: Load) -> Result<()> {
    let answers = load.stop()?;
    let lab = pair.power_off()?;
    let verdict = Verdict::of(&answers, &lab.disk.ledger()?);
    ensure!(verdict.is_clean(), "{verdict:?}");
    Ok(())
}

#[test]
fn a_full_log_buffer_stops_the_primary_visibly_until_there_is_room() -> Result<()> {
    if !met("full log buffer", &NEEDS) {
        return Ok(());
    }
    let mut pair = Pair::boot(Lab::new()?)?;
    let proxy = proxy(&pair, 1)?;
    // The lag is not to stop it first, nor silence to end it.
    let terms = json!({
        "log_buffer_bytes": 64 << 10,
        "max_lag_ms": 60_000,
        "failure_timeout_ms": 60_000,
    });
    pair.protect_with(&json!({}), &through(&proxy, terms))?;
    let load = pair.lab.load(Options::new(pair.lab.service()?, "full"))?;
    progress(&load, 20)?;
    // What the backup has executed is not heard of any more.
    proxy.set(Weather { mute: true, ..Weather::default() });
    pair.primary.console.type_in("while :; do :; done &\n")?;
    let full = wait_for_status(&pair.primary, "stalled", |status| status.stalled)?;
    ensure!(full.stalls > 0 && full.state == "protected", "{full:?}");
    let point = full.log.recorded_point;
    let behind = full.log.recorded_bytes - full.log.executed_bytes;
    ensure!(behind < 4 * (64 << 10), "{behind} bytes wait in a buffer of 65536: {full:?}");
    // It stands: its log does not grow any more.
    let later = pair.status()?;
    ensure!(later.log.recorded_point - point < 100_000_000, "{later:?}");
    proxy.set(Weather::default());
    wait_for_status(&pair.primary, "goes on", |status| {
        !status.stalled && status.log.recorded_point > point + 100_000_000
    })?;
    eventually(CHANGE, "the client is answered", || Ok(progress(&load, 20).ok()))?;
    finish(pair, load)
}
