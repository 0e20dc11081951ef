//! Streams to and from the guest, and bytes sent back one request at a time.

use anyhow::{Result, ensure};
use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};

/// Port of `start-streams` that takes everything.
pub const SINK: u16 = 7201;
/// Port that sends without end.
pub const SOURCE: u16 = 7202;
/// Port that sends back what it gets.
pub const ECHO: u16 = 7203;

/// Sends `bytes` and waits until the guest has taken them all.
///
/// # Errors
///
/// If the connection breaks.
pub fn send(mut stream: TcpStream, bytes: u64) -> Result<()> {
    let piece = vec![0x5a; 1 << 16];
    let mut left = bytes;
    while left > 0 {
        let length = left.min(piece.len() as u64);
        stream.write_all(&piece[..usize::try_from(length)?])?;
        left -= length;
    }
    stream.shutdown(Shutdown::Write)?;
    // The other end closes when it has read to the end.
    ensure!(stream.read(&mut [0])? == 0, "the sink speaks");
    Ok(())
}

/// Reads `bytes`.
///
/// # Errors
///
/// If the connection breaks before.
pub fn receive(stream: &mut TcpStream, bytes: u64) -> Result<()> {
    let got = std::io::copy(&mut stream.take(bytes), &mut std::io::sink())?;
    ensure!(got == bytes, "the connection ended after {got} bytes of {bytes}");
    Ok(())
}

/// Sends `count` requests of 64 bytes, each when the one before has come back.
///
/// # Errors
///
/// If the connection breaks or something else comes back.
pub fn echo(stream: &mut TcpStream, count: u64) -> Result<()> {
    for number in 0..count {
        let mut request = [0x2e; 64];
        request[..8].copy_from_slice(&number.to_be_bytes());
        stream.write_all(&request)?;
        let mut answer = [0; 64];
        stream.read_exact(&mut answer)?;
        ensure!(answer == request, "request {number} came back as another");
    }
    Ok(())
}
