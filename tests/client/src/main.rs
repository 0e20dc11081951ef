//! `ledger-client ADDRESS`: puts load on a ledger service and prints one JSON line a second and one at
//! the end.

use anyhow::Result;
use clap::Parser;
use ledger_client::load::{Load, Options};
use ledger_client::stats::Distribution;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

/// Sends numbered requests to a ledger service, one after another on each connection, and checks that
/// each is answered exactly once and in order. Exits with status 1 if a connection breaks.
#[derive(Parser)]
#[command(name = "ledger-client")]
struct Arguments {
    /// Address of the service, such as 10.77.0.10:7000
    address: SocketAddr,
    /// Connections to keep open
    #[arg(long, default_value_t = 1)]
    connections: usize,
    /// How long to go on
    #[arg(long, default_value_t = 10)]
    seconds: u64,
    /// Pause between an answer and the next request
    #[arg(long, default_value_t = 0)]
    pause_ms: u64,
    /// Padding of each line, in bytes
    #[arg(long, default_value_t = 0)]
    padding: usize,
    /// First word of each line
    #[arg(long, default_value = "client")]
    id: String,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let load = Load::start(&Options {
        connections: arguments.connections,
        pause: Duration::from_millis(arguments.pause_ms),
        padding: arguments.padding,
        ..Options::new(arguments.address, &arguments.id)
    })?;
    let start = Instant::now();
    for second in 1..=arguments.seconds {
        let until = start + Duration::from_secs(second);
        std::thread::sleep(until.saturating_duration_since(Instant::now()));
        println!("{}", serde_json::json!({ "second": second, "answered": load.answered() }));
    }
    let answers = load.stop()?;
    let gaps = answers.windows(2).map(|pair| pair[1].answered - pair[0].answered);
    let times = answers.iter().map(|answer| answer.answered - answer.sent);
    let summary = serde_json::json!({
        "answered": answers.len(),
        "answer_time": Distribution::of(times),
        "gap": Distribution::of(gaps),
    });
    println!("{summary}");
    Ok(())
}
