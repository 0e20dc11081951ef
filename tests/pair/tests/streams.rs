//! Streams of many megabytes through a protected guest: batches, uncut packets, and a kill in the middle.

use anyhow::{Context, Result, ensure};
use pair_tests::lab::Lab;
use pair_tests::pair::{Death, Pair};
use pair_tests::requirements::{Need, met};
use pair_tests::stream::{Echo, SERVE};

const NEEDS: [Need; 2] = [Need::Root, Need::Tap];
const MIB: u64 = 1 << 20;

#[test]
fn a_stream_each_way_survives_a_kill_byte_for_byte() -> Result<()> {
    if !met("stream each way through a kill", &NEEDS) {
        return Ok(());
    }
    let mut pair = Pair::boot_with(Lab::new()?, SERVE)?;
    let echo = Echo::start(&pair.lab)?;
    let told = |pair: &Pair, what: &str| format!("{what}\n{}", pair.describe());
    echo.progress(2 * MIB).with_context(|| told(&pair, "before protection"))?;
    for death in [Death::Process, Death::Host] {
        pair.protect()?;
        echo.progress(4 * MIB).with_context(|| told(&pair, "protected"))?;
        pair.digests_are_equal()?;
        pair.kill_primary(death)?;
        echo.progress(4 * MIB).with_context(|| told(&pair, "after a kill"))?;
        pair.wait_until_alone()?;
    }
    let big = big_frames(&pair)?;
    let bytes = echo.finish().with_context(|| told(&pair, "at the end"))?;
    println!("{bytes} bytes each way; {big:.0} bytes to a frame sent");
    ensure!(big > 3000.0, "frames sent have {big} bytes: nothing was offloaded");
    pair.power_off()?;
    Ok(())
}

/// Bytes to a frame that the guest sent, over its life.
fn big_frames(pair: &Pair) -> Result<f64> {
    let counters: serde_json::Value = pair.primary.api().get("vm.counters")?;
    let nets = counters.as_object().context("counters are an object")?;
    let net = nets.iter().find(|(name, _)| name.starts_with("_net")).context("no network card")?.1;
    let value = |name: &str| net[name].as_u64().with_context(|| format!("no {name} in {net}"));
    Ok(value("tx_bytes")? as f64 / value("tx_frames")? as f64)
}
