//! What the machine itself takes for a message between the hosts and its answer: no acknowledgement comes sooner.

use super::results::median;
use crate::network::{Network, Side};
use anyhow::{Context, Result, anyhow};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

const PORT: u16 = 7701;
const EXCHANGES: usize = 10_000;
/// A record of an output with its message around it; an acknowledgement.
const SIZES: [usize; 2] = [200, 50];
const PATIENCE: Duration = Duration::from_secs(10);

/// The middle time of a message and its answer over plain TCP on the cable of the logging channel, between two threads
/// that do nothing else and wait in blocking calls.
///
/// # Errors
///
/// If the connection fails.
pub fn round_trip(network: &Network) -> Result<Duration> {
    let here = SocketAddr::new(Side::B.address().parse()?, PORT);
    let listener = network.host(Side::B).run(move || TcpListener::bind(here))??;
    let mut asking =
        network.host(Side::A).run(move || TcpStream::connect_timeout(&here, PATIENCE))??;
    let (mut answering, _) = listener.accept()?;
    for stream in [&asking, &answering] {
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
    }
    let answers = std::thread::spawn(move || -> std::io::Result<()> {
        let (mut message, answer) = ([0; SIZES[0]], [0; SIZES[1]]);
        for _ in 0..EXCHANGES {
            answering.read_exact(&mut message)?;
            answering.write_all(&answer)?;
        }
        Ok(())
    });
    let (message, mut answer) = ([0; SIZES[0]], [0; SIZES[1]]);
    let mut times = Vec::with_capacity(EXCHANGES);
    for _ in 0..EXCHANGES {
        let start = Instant::now();
        asking.write_all(&message)?;
        asking.read_exact(&mut answer)?;
        times.push(start.elapsed().as_secs_f64());
    }
    answers.join().map_err(|_| anyhow!("the answering thread panicked"))??;
    median(times).map(Duration::from_secs_f64).context("nothing was exchanged")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::requirements::{Need, met};

    #[test]
    fn an_exchange_takes_time() -> Result<()> {
        if !met("an exchange", &[Need::Root]) {
            return Ok(());
        }
        assert!(round_trip(&Network::new()?)? > Duration::ZERO);
        Ok(())
    }
}
