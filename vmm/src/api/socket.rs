//! The Unix socket the API listens on: owner-only, with a stale one replaced and a live one respected.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use nix::sys::socket::{AddressFamily, SockaddrLike, SockaddrStorage, getsockname, sockopt};

/// Why the API cannot listen.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// The lock file beside the socket.
    #[error("cannot open the lock file '{}' of the API socket", path.display())]
    Lock {
        /// The lock file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Another process serves this socket.
    #[error("another process serves the API socket '{}': choose another path or end that process", .0.display())]
    InUse(PathBuf),
    /// Something is there that is no socket.
    #[error("'{}' exists and is no socket: remove it or choose another path", .0.display())]
    NotASocket(PathBuf),
    /// The old socket.
    #[error("cannot remove the stale API socket '{}'", path.display())]
    Stale {
        /// The socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Binding.
    #[error("cannot listen on the API socket '{}'", path.display())]
    Bind {
        /// The socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A descriptor that is no listening Unix socket.
    #[error("descriptor {0} is no listening Unix socket")]
    Descriptor(RawFd),
}

/// A listening socket. A path it was bound to goes away with it; the lock file beside it stays.
#[derive(Debug)]
pub struct ApiSocket {
    listener: UnixListener,
    bound: Option<Bound>,
}

#[derive(Debug)]
struct Bound {
    path: PathBuf,
    /// Held as long as the socket is, so that nobody takes it for stale.
    _lock: Flock<File>,
}

impl Drop for Bound {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.path) {
            log::warn!("cannot remove the API socket '{}': {error}", self.path.display());
        }
    }
}

impl ApiSocket {
    /// Listens on `path`, with mode 0700. `PATH.lock` tells a stale socket from a live one: a process that
    /// was killed leaves the socket behind but not the lock.
    pub fn bind(path: &Path) -> Result<Self, SocketError> {
        let lock = lock(path)?;
        match fs::symlink_metadata(path) {
            Ok(metadata) if !metadata.file_type().is_socket() => {
                return Err(SocketError::NotASocket(path.to_owned()));
            }
            Ok(_) => fs::remove_file(path)
                .map_err(|source| SocketError::Stale { path: path.to_owned(), source })?,
            Err(_) => {} // Nothing there, or not for us to see: binding tells.
        }
        let bind = |source| SocketError::Bind { path: path.to_owned(), source };
        let listener = UnixListener::bind(path).map_err(bind)?;
        let bound = Bound { path: path.to_owned(), _lock: lock };
        fs::set_permissions(path, fs::Permissions::from_mode(0o700)).map_err(bind)?;
        Ok(Self { listener, bound: Some(bound) })
    }

    /// Takes over a socket that listens already, passed by the parent process.
    pub fn from_descriptor(fd: RawFd) -> Result<Self, SocketError> {
        let error = || SocketError::Descriptor(fd);
        if fd < 3 {
            return Err(error());
        }
        let is_unix = getsockname::<SockaddrStorage>(fd)
            .is_ok_and(|address| address.family() == Some(AddressFamily::Unix));
        if !is_unix {
            return Err(error());
        }
        // SAFETY: `fd` is an open descriptor (getsockname succeeded), and this process got it to serve the
        // API with: nothing else in it refers to that number. It is closed with the listener.
        let owned = unsafe { OwnedFd::from_raw_fd(fd) };
        match nix::sys::socket::getsockopt(&owned, sockopt::AcceptConn) {
            Ok(true) => Ok(Self { listener: owned.into(), bound: None }),
            _ => Err(error()),
        }
    }

    /// The listener.
    pub fn listener(&self) -> &UnixListener {
        &self.listener
    }

    /// Where clients connect, if it is a path.
    pub fn path(&self) -> Option<&Path> {
        self.bound.as_ref().map(|bound| bound.path.as_path())
    }
}

fn lock(path: &Path) -> Result<Flock<File>, SocketError> {
    let mut name = path.as_os_str().to_owned();
    name.push(".lock");
    let lock_path = PathBuf::from(name);
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&lock_path)
        .map_err(|source| SocketError::Lock { path: lock_path.clone(), source })?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| match errno {
        nix::errno::Errno::EWOULDBLOCK => SocketError::InUse(path.to_owned()),
        errno => SocketError::Lock { path: lock_path, source: errno.into() },
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::{AsRawFd, IntoRawFd};
    use std::os::unix::net::UnixStream;

    #[test]
    fn is_owner_only_and_goes_away() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("api.sock");
        let socket = ApiSocket::bind(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o700);
        assert!(UnixStream::connect(&path).is_ok());
        drop(socket);
        assert!(!path.exists());
    }

    #[test]
    fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("api.sock");
        // What a killed process leaves: a socket nobody listens on.
        drop(UnixListener::bind(&path).unwrap());
        let socket = ApiSocket::bind(&path).unwrap();
        assert!(matches!(ApiSocket::bind(&path), Err(SocketError::InUse(_))));
        assert!(UnixStream::connect(&path).is_ok());
        drop(socket);
        assert!(ApiSocket::bind(&path).is_ok());
    }

    #[test]
    fn a_file_in_the_way_is_not_removed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("api.sock");
        fs::write(&path, "precious").unwrap();
        assert!(matches!(ApiSocket::bind(&path), Err(SocketError::NotASocket(_))));
        assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
        let nowhere = directory.path().join("missing/api.sock");
        assert!(matches!(ApiSocket::bind(&nowhere), Err(SocketError::Lock { .. })));
    }

    #[test]
    fn only_listening_unix_sockets_are_taken_over() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("api.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let socket = ApiSocket::from_descriptor(listener.into_raw_fd()).unwrap();
        assert!(UnixStream::connect(&path).is_ok());
        drop(socket);
        assert!(path.exists(), "the path belongs to the parent process");
        let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        assert!(ApiSocket::from_descriptor(tcp.as_raw_fd()).is_err());
        assert!(ApiSocket::from_descriptor(1 << 20).is_err());
        assert!(ApiSocket::from_descriptor(0).is_err());
    }
}
