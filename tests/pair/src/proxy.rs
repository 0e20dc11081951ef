//! Weather between two hosts: a TCP proxy that delays, narrows, loses, stops and cuts.
//!
//! It stands in one host's namespace, in front of that host's logging port. It never changes a byte: what
//! a real network does to TCP is to make it late, and in the end to break it.

use crate::namespace::Namespace;
use anyhow::{Context, Result};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Bytes passed on at a time: about what a network sends in one piece.
const PIECE: usize = 16 << 10;
/// Pieces under way in one direction; beyond, the sender's TCP has to wait.
const UNDER_WAY: usize = 256;
/// What a lost piece costs: the least time after which Linux sends it again.
const RETRANSMISSION: Duration = Duration::from_millis(200);

/// What the network does. The default: nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Weather {
    /// Time under way.
    pub delay: Duration,
    /// Up to this much more, at random.
    pub jitter: Duration,
    /// Part of the pieces that are lost and sent again, 0 to 1.
    pub loss: f64,
    /// Bytes a second, if it is narrow.
    pub rate: Option<u64>,
    /// Nothing passes from the client (the primary).
    pub deaf: bool,
    /// Nothing passes to the client.
    pub mute: bool,
}

#[derive(Default)]
struct Shared {
    weather: Mutex<Weather>,
    changed: Condvar,
    /// Streams to be shut down by a cut.
    open: Mutex<Vec<TcpStream>>,
    ended: AtomicBool,
    connections: AtomicUsize,
}

impl Shared {
    fn weather(&self) -> MutexGuard<'_, Weather> {
        self.weather.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn open(&self) -> MutexGuard<'_, Vec<TcpStream>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn cut(&self) {
        for stream in self.open().drain(..) {
            // It may have ended by itself.
            let _ = stream.shutdown(Shutdown::Both);
        }
        self.changed.notify_all();
    }
}

/// A running proxy. Dropping it cuts what passes through it.
pub struct Proxy {
    shared: Arc<Shared>,
    address: SocketAddr,
}

impl Proxy {
    /// Listens on a free port of `host` in `namespace` and connects to `target` from there. `seed` decides
    /// what is lost and how much is late.
    ///
    /// # Errors
    ///
    /// If it cannot listen.
    pub fn start(namespace: &Namespace, host: &str, target: SocketAddr, seed: u64) -> Result<Self> {
        let local = SocketAddr::new(host.parse()?, 0);
        let shared = Arc::new(Shared::default());
        let listener = namespace.run(move || TcpListener::bind(local))?.context("a proxy")?;
        let address = listener.local_addr()?;
        let of_thread = Arc::clone(&shared);
        // Sockets stay in the namespace of the thread that makes them.
        namespace.run(move || {
            std::thread::spawn(move || serve(&listener, target, &of_thread, seed));
        })?;
        Ok(Self { shared, address })
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Changes the weather, also for what is under way.
    pub fn set(&self, weather: Weather) {
        *self.shared.weather() = weather;
        self.shared.changed.notify_all();
    }

    /// Connections made through it so far.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.shared.connections.load(Ordering::Acquire)
    }

    /// Breaks the connections that stand.
    pub fn cut(&self) {
        self.shared.cut();
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::Release);
        self.shared.cut();
        // Wakes the thread that accepts; it sits in another namespace's loopback or is gone.
        let _ = TcpStream::connect_timeout(&self.address, Duration::from_millis(1));
    }
}

fn serve(listener: &TcpListener, target: SocketAddr, shared: &Arc<Shared>, seed: u64) {
    for (number, client) in listener.incoming().enumerate() {
        if shared.ended.load(Ordering::Acquire) {
            return;
        }
        let Ok(client) = client else { continue };
        let Ok(server) = TcpStream::connect_timeout(&target, Duration::from_secs(5)) else {
            continue; // the client sees its connection closed
        };
        shared.connections.fetch_add(1, Ordering::AcqRel);
        for (direction, from, to) in
            [(Direction::In, &client, &server), (Direction::Out, &server, &client)]
        {
            let (Ok(from), Ok(to)) = (from.try_clone(), to.try_clone()) else { continue };
            shared.open().extend(from.try_clone());
            let random = StdRng::seed_from_u64(seed ^ ((number as u64) << 1) ^ direction as u64);
            Pipe { direction, shared: Arc::clone(shared), random }.start(from, to);
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    /// From the client.
    In,
    /// To the client.
    Out,
}

/// One direction of one connection.
struct Pipe {
    direction: Direction,
    shared: Arc<Shared>,
    random: StdRng,
}

/// What is under way in one direction.
#[derive(Default)]
struct Queue {
    pieces: Mutex<Pieces>,
    changed: Condvar,
}

#[derive(Default)]
struct Pieces {
    /// Each with the moment at which it arrives.
    waiting: VecDeque<(Instant, Vec<u8>)>,
    /// No more will come.
    ended: bool,
}

impl Pipe {
    fn start(mut self, from: TcpStream, to: TcpStream) {
        let queue = Arc::new(Queue::default());
        let of_writer = Arc::clone(&queue);
        let (direction, shared) = (self.direction, Arc::clone(&self.shared));
        std::thread::spawn({
            let from = from.try_clone();
            move || {
                write(to, &of_writer, direction, &shared);
                // Who sends to the dead hears of it.
                let _ = from.and_then(|from| from.shutdown(Shutdown::Read));
            }
        });
        std::thread::spawn(move || self.read(from, &queue));
    }

    fn read(&mut self, mut from: TcpStream, queue: &Queue) {
        let mut latest = Instant::now();
        loop {
            let mut piece = vec![0; PIECE];
            let count = match from.read(&mut piece) {
                Ok(count) => count,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(_) => 0,
            };
            piece.truncate(count);
            // TCP delivers in order: what follows a late piece waits for it.
            latest = latest.max(Instant::now() + self.lateness());
            let mut pieces = queue.pieces.lock().unwrap_or_else(PoisonError::into_inner);
            while pieces.waiting.len() >= UNDER_WAY {
                pieces = queue.changed.wait(pieces).unwrap_or_else(PoisonError::into_inner);
            }
            if count == 0 {
                pieces.ended = true;
            } else {
                pieces.waiting.push_back((latest, piece));
            }
            queue.changed.notify_all();
            if count == 0 {
                return;
            }
        }
    }

    fn lateness(&mut self) -> Duration {
        let weather = *self.shared.weather();
        let lost = self.random.random_bool(weather.loss.clamp(0.0, 1.0));
        let jitter = weather.jitter.mul_f64(self.random.random_range(0.0..1.0));
        weather.delay + jitter + if lost { RETRANSMISSION } else { Duration::ZERO }
    }
}

fn write(mut to: TcpStream, queue: &Queue, direction: Direction, shared: &Shared) {
    loop {
        let (due, piece) = {
            let mut pieces = queue.pieces.lock().unwrap_or_else(PoisonError::into_inner);
            loop {
                if let Some(next) = pieces.waiting.pop_front() {
                    queue.changed.notify_all();
                    break next;
                }
                if pieces.ended {
                    let _ = to.shutdown(Shutdown::Write);
                    return;
                }
                pieces = queue.changed.wait(pieces).unwrap_or_else(PoisonError::into_inner);
            }
        };
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
        let rate = wait_for_passage(direction, shared);
        if to.write_all(&piece).is_err() {
            // The reader must not wait for room that nobody makes.
            let mut pieces = queue.pieces.lock().unwrap_or_else(PoisonError::into_inner);
            pieces.waiting.clear();
            queue.changed.notify_all();
            return;
        }
        if let Some(rate) = rate {
            std::thread::sleep(Duration::from_secs_f64(piece.len() as f64 / rate.max(1) as f64));
        }
    }
}

/// Waits while nothing passes in this direction; the rate at which it then does.
fn wait_for_passage(direction: Direction, shared: &Shared) -> Option<u64> {
    let mut weather = shared.weather();
    loop {
        let stopped = match direction {
            Direction::In => weather.deaf,
            Direction::Out => weather.mute,
        };
        if !stopped || shared.ended.load(Ordering::Acquire) {
            return weather.rate;
        }
        weather = shared.changed.wait(weather).unwrap_or_else(PoisonError::into_inner);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::requirements::{Need, met};

    /// A client and a server with the proxy between them.
    fn connected(weather: Weather) -> Result<Option<(Proxy, TcpStream, TcpStream)>> {
        if !met("proxy", &[Need::Root]) {
            return Ok(None);
        }
        let namespace = Namespace::new("proxy")?;
        let listener = namespace.run(|| TcpListener::bind("127.0.0.1:0"))??;
        let proxy = Proxy::start(&namespace, "127.0.0.1", listener.local_addr()?, 7)?;
        proxy.set(weather);
        let address = proxy.address();
        let client = namespace.run(move || TcpStream::connect(address))??;
        let (server, _) = listener.accept()?;
        for stream in [&client, &server] {
            stream.set_read_timeout(Some(Duration::from_secs(20)))?;
        }
        Ok(Some((proxy, client, server)))
    }

    #[test]
    fn every_byte_arrives_in_order_through_the_worst_weather() -> Result<()> {
        let weather = Weather {
            delay: Duration::from_millis(1),
            jitter: Duration::from_millis(5),
            loss: 0.1,
            rate: Some(8 << 20),
            ..Weather::default()
        };
        let Some((_proxy, mut client, mut server)) = connected(weather)? else { return Ok(()) };
        let sent: Vec<u8> = (0..500_000u32).flat_map(u32::to_le_bytes).take(400_000).collect();
        let copy = sent.clone();
        let sending = std::thread::spawn(move || {
            client.write_all(&copy)?;
            client.shutdown(Shutdown::Write)
        });
        let mut received = Vec::new();
        server.read_to_end(&mut received)?;
        assert!(received == sent);
        assert!(sending.join().is_ok_and(|result| result.is_ok()));
        Ok(())
    }

    #[test]
    fn one_direction_stops_and_goes_on() -> Result<()> {
        let deaf = Weather { deaf: true, ..Weather::default() };
        let Some((proxy, mut client, mut server)) = connected(deaf)? else { return Ok(()) };
        client.write_all(b"held")?;
        server.write_all(b"back")?;
        let mut bytes = [0; 4];
        client.read_exact(&mut bytes)?;
        assert_eq!(&bytes, b"back");
        server.set_nonblocking(true)?;
        assert!(server.read(&mut bytes).is_err());
        server.set_nonblocking(false)?;
        proxy.set(Weather::default());
        server.read_exact(&mut bytes)?;
        assert_eq!(&bytes, b"held");
        Ok(())
    }

    #[test]
    fn a_cut_is_felt_on_both_sides() -> Result<()> {
        let Some((proxy, mut client, mut server)) = connected(Weather::default())? else {
            return Ok(());
        };
        client.write_all(b"x")?;
        server.read_exact(&mut [0])?;
        proxy.cut();
        for stream in [&mut client, &mut server] {
            assert!(matches!(stream.read(&mut [0]), Ok(0) | Err(_)));
        }
        Ok(())
    }
}
