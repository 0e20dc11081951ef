//! Waiting for a primary: listens, and serves each connection on a thread of its own until one becomes a VM.
//!
//! What must hold: one of them at a time has the place where a VM is held, from when it asks for it until its VM
//! is gone; a connection that says nothing has none, keeps nobody waiting and is soon given up. Once a VM has
//! gone live here, nobody is served any more.

use std::collections::BTreeMap;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use ft::backup::Input;
use ft::{BackupConfig, FtStatus};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vmm_sys_util::eventfd::EventFd;

use super::backup::{BackupControl, BackupHost, BackupSide};
use super::tls::Security;
use super::wire::Wire;

/// So many connections are served at once; more wait until one has ended.
const MAX_CONNECTIONS: usize = 8;
/// How long a primary waits for a VM that is being discarded; a standby that is taken says so then.
const PLACE_TIMEOUT: Duration = Duration::from_secs(2);

/// Makes a host for each VM.
pub type MakeHost = Box<dyn Fn() -> Box<dyn BackupHost> + Send + Sync>;

/// A VMM that waits for a primary, or holds a backup.
pub struct Receiver {
    address: SocketAddr,
    connections: Arc<Connections>,
    stop: Arc<EventFd>,
    handle: Option<JoinHandle<()>>,
}

impl Receiver {
    /// Listens on `listener` in a thread of its own.
    pub fn start(
        listener: TcpListener,
        security: Security,
        config: BackupConfig,
        make_host: MakeHost,
    ) -> std::io::Result<Self> {
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let stop = Arc::new(EventFd::new(libc::EFD_NONBLOCK)?);
        let connections = Arc::new(Connections {
            security,
            config,
            make_host,
            places: Mutex::default(),
            ended: EventFd::new(libc::EFD_NONBLOCK)?,
            freed: Condvar::new(),
        });
        let serving =
            Serving { listener, stop: Arc::clone(&stop), connections: Arc::clone(&connections) };
        let handle =
            std::thread::Builder::new().name("ft-listen".into()).spawn(move || serving.run())?;
        Ok(Self { address, connections, stop, handle: Some(handle) })
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The backup being held, if any.
    #[must_use]
    pub fn current(&self) -> Option<BackupControl> {
        let places = self.connections.places();
        places.served.get(&places.holder?).cloned()
    }

    /// Whether the thread has ended: a VM went live.
    #[must_use]
    pub fn ended(&self) -> bool {
        self.handle.as_ref().is_none_or(JoinHandle::is_finished)
    }
}

impl Drop for Receiver {
    /// Ends listening, and discards a backup that is not live.
    fn drop(&mut self) {
        let _ = self.stop.write(1);
        if let Some(handle) = self.handle.take() {
            let _ = handle.join();
        }
    }
}

/// All connections, and who among them has the place.
struct Connections {
    security: Security,
    config: BackupConfig,
    make_host: MakeHost,
    places: Mutex<Places>,
    /// Written when a connection has ended.
    ended: EventFd,
    /// The place may be free.
    freed: Condvar,
}

#[derive(Default)]
struct Places {
    served: BTreeMap<u64, BackupControl>,
    /// Has the place; for ever, if its VM went live.
    holder: Option<u64>,
    live: bool,
}

impl Connections {
    fn places(&self) -> MutexGuard<'_, Places> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives the place to a connection, as soon as its holder has let go.
    fn admit(&self, number: u64) -> Result<Box<dyn BackupHost>, String> {
        let taken = |places: &mut Places| places.holder.is_some() && !places.live;
        let waited = self.freed.wait_timeout_while(self.places(), PLACE_TIMEOUT, taken);
        let (mut places, _) = waited.unwrap_or_else(PoisonError::into_inner);
        let Some(holder) = places.holder else {
            places.holder = Some(number);
            return Ok((self.make_host)());
        };
        let holder = places.served.get(&holder).cloned();
        drop(places);
        match holder.map(|backup| backup.status()) {
            Some(FtStatus { state, reason: Some(reason), .. }) if state == "discarded" => {
                Err(format!("it still has the copy before: {reason}"))
            }
            _ => Err("it has a VM already".into()),
        }
    }

    /// Begins to serve a connection.
    fn serve(self: &Arc<Self>, number: u64, stream: TcpStream) -> std::io::Result<JoinHandle<()>> {
        let admission = Arc::clone(self);
        let admit = Box::new(move || admission.admit(number));
        let wire = Wire::accepting(stream, &self.security)?;
        let (side, control) = BackupSide::new(wire, self.config.clone(), admit)?;
        self.places().served.insert(number, control);
        let this = Arc::clone(self);
        let serve = move || this.end(number, side.serve());
        let spawned = std::thread::Builder::new().name("ft-backup".into()).spawn(serve);
        spawned.inspect_err(|_| self.end(number, false))
    }

    fn end(&self, number: u64, live: bool) {
        let mut places = self.places();
        places.served.remove(&number);
        if places.holder == Some(number) {
            places.live = live;
            places.holder = live.then_some(number);
        }
        drop(places);
        self.freed.notify_all();
        let _ = self.ended.write(1);
    }
}

struct Serving {
    listener: TcpListener,
    stop: Arc<EventFd>,
    connections: Arc<Connections>,
}

impl Serving {
    fn run(self) {
        let mut threads: Vec<JoinHandle<()>> = Vec::new();
        let mut number = 0;
        while self.wait() {
            threads.retain(|thread| !thread.is_finished());
            let (stream, peer) = match self.listener.accept() {
                Ok(connection) => connection,
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => continue,
                Err(error) => {
                    log::warn!("cannot accept a connection: {error}");
                    continue;
                }
            };
            log::info!("connection from {peer}");
            number += 1;
            match self.connections.serve(number, stream) {
                Ok(thread) => threads.push(thread),
                Err(error) => log::warn!("cannot serve {peer}: {error}"),
            }
        }
        let Self { listener, connections, .. } = self;
        drop(listener);
        let served: Vec<BackupControl> = connections.places().served.values().cloned().collect();
        for backup in served {
            let reason = "this VMM waits for no primary any more".into();
            let _ = backup.command(Input::Discard { reason });
        }
        for thread in threads {
            let _ = thread.join();
        }
    }

    /// Sleeps until there may be a connection to accept, if there is room, or one has ended. False when told
    /// to stop, or when a VM went live.
    fn wait(&self) -> bool {
        let room = self.connections.places().served.len() < MAX_CONNECTIONS;
        // SAFETY: `self` keeps the descriptors open.
        let (stop, ended, listener) = unsafe {
            (
                BorrowedFd::borrow_raw(self.stop.as_raw_fd()),
                BorrowedFd::borrow_raw(self.connections.ended.as_raw_fd()),
                BorrowedFd::borrow_raw(self.listener.as_raw_fd()),
            )
        };
        let connecting = if room { PollFlags::POLLIN } else { PollFlags::empty() };
        let mut fds = [
            PollFd::new(stop, PollFlags::POLLIN),
            PollFd::new(ended, PollFlags::POLLIN),
            PollFd::new(listener, connecting),
        ];
        while poll(&mut fds, PollTimeout::NONE).is_err() {}
        let _ = self.connections.ended.read();
        !fds[0].any().unwrap_or(false) && !self.connections.places().live
    }
}

#[cfg(test)]
mod tests {
    use ft::message::{CloneStart, Hello};
    use ft::{Capabilities, Generation, Message, Terms};
    use hypervisor::GuestMemory;

    use super::*;
    use crate::boot::Payload;
    use crate::pair::channel::Channel;
    use crate::pair::clone::CloneState;
    use crate::run_loop::inbox::InboxSender;
    use crate::run_loop::outgoing::Outlet;
    use crate::run_loop::replay::Replay;

    /// Takes no VM.
    struct NoRoom;

    impl BackupHost for NoRoom {
        fn prepare(&mut self, _: &CloneStart) -> Result<GuestMemory, String> {
            Err("no room".into())
        }

        fn images(&mut self) -> Vec<crate::backends::DiskImage> {
            Vec::new()
        }

        fn load(
            &mut self,
            _: Payload,
            _: CloneState,
            _: Replay,
        ) -> Result<InboxSender<crate::run_loop::Message>, String> {
            Err("no room".into())
        }

        fn outlet(&self) -> Option<Arc<dyn Outlet>> {
            None
        }

        fn changed(&mut self, _: &'static str, _: Option<&str>) {}

        fn protected(&mut self) {}

        fn live(&mut self, _: &Terms, _: FtStatus, _: Generation) {}

        fn discarded(&mut self, _: &str) {}
    }

    fn receiver() -> Receiver {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let config = BackupConfig { who: "b".into(), capabilities: Capabilities::default() };
        let make_host = Box::new(|| Box::new(NoRoom) as Box<dyn BackupHost>);
        Receiver::start(listener, Security::Plain, config, make_host).unwrap()
    }

    /// The first message of whoever waits at the other end.
    fn first_message(channel: &mut Channel) -> Message {
        loop {
            if let Some(message) = channel.next_message().unwrap() {
                return message;
            }
            // SAFETY: the channel keeps it open.
            let fd = unsafe { BorrowedFd::borrow_raw(channel.as_raw_fd()) };
            poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], PollTimeout::NONE).unwrap();
            channel.fill().unwrap();
        }
    }

    #[test]
    fn silent_connections_keep_nobody_waiting() {
        let receiver = receiver();
        let silent: Vec<TcpStream> =
            (1..MAX_CONNECTIONS).map(|_| TcpStream::connect(receiver.address()).unwrap()).collect();
        let stream = TcpStream::connect(receiver.address()).unwrap();
        let mut channel = Channel::new(Wire::connecting(stream, &Security::Plain, "b").unwrap());
        channel.send(&Message::Hello(Hello::new("a", Capabilities::default()))).unwrap();
        channel.flush().unwrap();
        assert!(matches!(first_message(&mut channel), Message::Hello(_)));
        // They are still there: nobody had to give up for it.
        assert!(receiver.connections.places().served.len() > 1, "{silent:?}");
        assert!(receiver.current().is_none(), "nobody has asked for the place");
    }

    #[test]
    fn one_at_a_time_has_the_place_and_a_live_vm_has_it_for_good() {
        let receiver = receiver();
        let connections = &receiver.connections;
        connections.admit(1).unwrap();
        let refused = connections.admit(2).err().unwrap();
        assert!(refused.contains("has a VM"), "{refused}");
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| connections.admit(3).map(|_| ()));
            connections.end(1, false);
            waits.join().unwrap().unwrap();
        });
        connections.end(2, true);
        assert!(!receiver.ended(), "it never had the place");
        connections.end(3, true);
        assert!(connections.admit(4).is_err());
        while !receiver.ended() {
            std::thread::yield_now();
        }
        assert!(TcpStream::connect(receiver.address()).is_err(), "nobody listens any more");
    }
}
