//! `streams [--megabytes N] [--net KEY=VALUE,...]`: how fast a TCP stream goes into and out of the guest, alone and
//! protected, and what that costs in frames and log.

use anyhow::{Context, Result};
use clap::Parser;
use pair_tests::lab::Lab;
use pair_tests::network::TAP;
use pair_tests::pair::Pair;
use pair_tests::stream::{Rate, SERVE, measure_receive, measure_transmit};
use serde_json::Value;

#[derive(Parser)]
struct Options {
    /// Megabytes in each direction.
    #[arg(long, default_value_t = 32)]
    megabytes: u64,
    /// More options of `--net`, as in offload_tso=off,offload_ufo=off.
    #[arg(long)]
    net: Option<String>,
}

fn main() -> Result<()> {
    let options = Options::parse();
    let bytes = options.megabytes * 1_000_000;
    let lab = Lab::new()?;
    let mut arguments = lab.boot_options(SERVE);
    if let Some(net) = &options.net {
        for argument in &mut arguments {
            if argument.starts_with(&format!("tap={TAP},")) {
                argument.push_str(&format!(",{net}"));
            }
        }
    }
    let mut pair = Pair::boot_from(lab, &arguments)?;
    measure(&pair, "alone", bytes)?;
    pair.protect()?;
    measure(&pair, "protected", bytes)?;
    pair.digests_are_equal()?;
    pair.power_off()?;
    Ok(())
}

fn measure(pair: &Pair, how: &str, bytes: u64) -> Result<()> {
    type Measure = fn(&Lab, u64) -> Result<Rate>;
    let directions: [(&str, Measure); 2] =
        [("receive", measure_receive), ("transmit", measure_transmit)];
    for (direction, run) in directions {
        let before = (frames(pair)?, log_bytes(pair)?);
        let rate = run(&pair.lab, bytes)?;
        let after = (frames(pair)?, log_bytes(pair)?);
        let megabytes = rate.bytes as f64 / 1e6;
        println!(
            "{how:9} {direction:8} {:7.2} MB/s {:6.0} frames/MB {:9.0} log bytes/MB",
            rate.megabytes_per_second(),
            (after.0 - before.0) as f64 / megabytes,
            (after.1 - before.1) as f64 / megabytes,
        );
    }
    Ok(())
}

/// Frames of both directions so far.
fn frames(pair: &Pair) -> Result<u64> {
    let counters: Value = pair.primary.api().get("vm.counters")?;
    let nets = counters.as_object().context("counters are an object")?;
    let net = nets.iter().find(|(name, _)| name.starts_with("_net")).context("no network card")?.1;
    let count = |name: &str| net[name].as_u64().unwrap_or(0);
    Ok(count("rx_frames") + count("tx_frames"))
}

fn log_bytes(pair: &Pair) -> Result<u64> {
    Ok(pair.status()?.log.recorded_bytes)
}
