//! Clients of the programs in the guest, each on one connection that must never break.
//!
//! Connections are made in the namespace where clients are ([`Lab::connect`]) and used from anywhere. Every wait has
//! an end, far beyond any failover, so that a broken connection is an error and no standstill.

pub mod redis;
pub mod sqlite;
pub mod streams;
pub mod web;

use crate::lab::Lab;
use crate::network::GUEST;
use crate::patience::eventually;
use anyhow::{Context, Result};
use std::io::ErrorKind;
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

/// Longest wait for a connection, or for anything on it.
const PATIENCE: Duration = Duration::from_secs(60);

impl Lab {
    /// A connection to a port of the guest from where clients are, as soon as its service listens.
    ///
    /// # Errors
    ///
    /// If nobody listens there within a minute.
    pub fn connect(&self, port: u16) -> Result<TcpStream> {
        let address = SocketAddr::new(GUEST.parse()?, port);
        let stream = eventually(PATIENCE, &format!("a connection to {address}"), || {
            let connect = move || TcpStream::connect_timeout(&address, PATIENCE);
            match self.network.switch.run(connect)? {
                Err(error) if error.kind() == ErrorKind::ConnectionRefused => Ok(None),
                result => result.map(Some).with_context(|| format!("no connection to {address}")),
            }
        })?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        Ok(stream)
    }
}

/// Runs `work` on each connection, all at the same time.
///
/// # Errors
///
/// The first error of any.
pub fn at_once<C: Send, R: Send>(
    connections: Vec<C>,
    work: impl Fn(usize, C) -> Result<R> + Sync,
) -> Result<Vec<R>> {
    let work = &work;
    std::thread::scope(|scope| {
        let start = |(number, connection)| scope.spawn(move || work(number, connection));
        let threads: Vec<_> = connections.into_iter().enumerate().map(start).collect();
        let joined = threads.into_iter().map(|thread| match thread.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        });
        joined.collect()
    })
}
