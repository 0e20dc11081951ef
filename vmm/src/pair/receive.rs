//! Waiting for a primary: listens, and serves one connection after the other until one becomes a VM.

use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use ft::BackupConfig;
use ft::backup::Input;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vmm_sys_util::eventfd::EventFd;

use super::backup::{BackupControl, BackupHost, BackupSide};
use super::tls::Security;
use super::wire::Wire;

/// Makes a host for each connection.
pub type MakeHost = Box<dyn Fn() -> Box<dyn BackupHost> + Send>;

/// A VMM that waits for a primary, or holds a backup.
pub struct Receiver {
    address: SocketAddr,
    current: Arc<Mutex<Option<BackupControl>>>,
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
        let current = Arc::new(Mutex::new(None));
        let stop = Arc::new(EventFd::new(libc::EFD_NONBLOCK)?);
        let serving = Serving {
            listener,
            security,
            config,
            make_host,
            current: Arc::clone(&current),
            stop: Arc::clone(&stop),
        };
        let handle =
            std::thread::Builder::new().name("ft-backup".into()).spawn(move || serving.run())?;
        Ok(Self { address, current, stop, handle: Some(handle) })
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The backup being served, if any.
    #[must_use]
    pub fn current(&self) -> Option<BackupControl> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner).clone()
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
        if let Some(backup) = self.current() {
            let reason = "the backup's VMM was told to shut down".into();
            let _ = backup.command(Input::Discard { reason });
        }
        if let Some(handle) = self.handle.take() {
            let _ = handle.join();
        }
    }
}

struct Serving {
    listener: TcpListener,
    security: Security,
    config: BackupConfig,
    make_host: MakeHost,
    current: Arc<Mutex<Option<BackupControl>>>,
    stop: Arc<EventFd>,
}

impl Serving {
    fn run(self) {
        while self.wait_for_connection() {
            let (stream, peer) = match self.listener.accept() {
                Ok(connection) => connection,
                Err(error) => {
                    log::warn!("cannot accept a connection: {error}");
                    continue;
                }
            };
            log::info!("connection from {peer}");
            let host = (self.make_host)();
            let side = Wire::accepting(stream, &self.security)
                .and_then(|wire| BackupSide::new(wire, self.config.clone(), host));
            match side {
                Ok((side, control)) => {
                    self.set_current(Some(control));
                    let live = side.serve();
                    self.set_current(None);
                    if live {
                        return;
                    }
                }
                Err(error) => log::warn!("cannot serve {peer}: {error}"),
            }
        }
    }

    fn set_current(&self, control: Option<BackupControl>) {
        *self.current.lock().unwrap_or_else(PoisonError::into_inner) = control;
    }

    /// False when told to stop.
    fn wait_for_connection(&self) -> bool {
        // SAFETY: `self` keeps both descriptors open.
        let (stop, listener) = unsafe {
            (
                BorrowedFd::borrow_raw(self.stop.as_raw_fd()),
                BorrowedFd::borrow_raw(self.listener.as_raw_fd()),
            )
        };
        let mut fds =
            [PollFd::new(stop, PollFlags::POLLIN), PollFd::new(listener, PollFlags::POLLIN)];
        loop {
            if poll(&mut fds, PollTimeout::NONE).is_ok() {
                return !fds[0].any().unwrap_or(false);
            }
        }
    }
}
