//! What the machine itself takes for that which a pair waits for, with no pair there.

use super::results::{Bare, median};
use crate::network::{Network, Side};
use anyhow::{Context, Result, anyhow};
use std::fs::File;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

const PORT: u16 = 7701;
const EXCHANGES: usize = 10_000;
/// Bytes of a message like a piece of log with an output.
const MESSAGE: usize = 200;
/// Bytes of an answer like an acknowledgement.
const ANSWER: usize = 50;
const PATIENCE: Duration = Duration::from_secs(10);
const SYNCS: usize = 3_000;
const BLOCK: usize = 4096;
/// Blocks of the file that is written.
const BLOCKS: usize = 4096;

/// Measures between the hosts of `network`, and files in `directory`.
///
/// # Errors
///
/// If the connection fails, or a file cannot be written.
pub fn bare(network: &Network, directory: &Path) -> Result<Bare> {
    let files = [directory.join("sync-a"), directory.join("sync-b")];
    let alone = syncs(&files[..1])?;
    let beside = syncs(&files)?;
    for file in files {
        std::fs::remove_file(file)?;
    }
    let us = |time: Duration| time.as_secs_f64() * 1e6;
    let exchange = round_trip(network)?;
    Ok(Bare { exchange_us: us(exchange), sync_us: us(alone), sync_beside_us: us(beside) })
}

/// The middle time of a write of one block, made stable, while all files are written like that.
fn syncs(files: &[impl AsRef<Path> + Sync]) -> Result<Duration> {
    let times = std::thread::scope(|scope| {
        let start = |file| scope.spawn(move || sync_one(file));
        let threads: Vec<_> = files.iter().map(AsRef::as_ref).map(start).collect();
        let join = |thread: std::thread::ScopedJoinHandle<'_, Result<Vec<f64>>>| {
            thread.join().map_err(|_| anyhow!("a writing thread panicked"))?
        };
        threads.into_iter().map(join).collect::<Result<Vec<_>>>()
    })?;
    median(times.concat()).map(Duration::from_secs_f64).context("nothing was written")
}

fn sync_one(path: &Path) -> Result<Vec<f64>> {
    let file = File::create(path)?;
    // Later writes change nothing but data.
    file.write_all_at(&vec![1; BLOCK * BLOCKS], 0)?;
    file.sync_all()?;
    let block = [2; BLOCK];
    let mut times = Vec::with_capacity(SYNCS);
    for number in 0..SYNCS {
        let start = Instant::now();
        file.write_all_at(&block, (number % BLOCKS * BLOCK) as u64)?;
        file.sync_data()?;
        times.push(start.elapsed().as_secs_f64());
    }
    Ok(times)
}

/// The middle time of a message and its answer over plain TCP on the cable of the logging channel, between two threads
/// that do nothing else and wait in blocking calls.
fn round_trip(network: &Network) -> Result<Duration> {
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
        let (mut message, answer) = ([0; MESSAGE], [0; ANSWER]);
        for _ in 0..EXCHANGES {
            answering.read_exact(&mut message)?;
            answering.write_all(&answer)?;
        }
        Ok(())
    });
    let (message, mut answer) = ([0; MESSAGE], [0; ANSWER]);
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
    fn everything_takes_time() -> Result<()> {
        if !met("an exchange between hosts", &[Need::Root]) {
            return Ok(());
        }
        let directory = tempfile::tempdir()?;
        let Bare { exchange_us, sync_us, sync_beside_us } =
            bare(&Network::new()?, directory.path())?;
        assert!(exchange_us > 0.0 && sync_us > 0.0 && sync_beside_us > 0.0);
        assert_eq!(directory.path().read_dir()?.count(), 0);
        Ok(())
    }
}
