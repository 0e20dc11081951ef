//! Descriptors that the options name by number (`fd=N`).
//!
//! What must hold: they are taken before anything is opened. A number that stands for nothing yet would later be that of
//! a descriptor of the program's own.

use std::fs::File;
use std::io;
use std::os::fd::{FromRawFd, RawFd};

use anyhow::{Context, bail};
use nix::libc;
use vmm::api::ApiSocket;

use crate::options::{ApiSocketOption, EventMonitorOption, Options};

/// What the options name.
#[derive(Debug, Default)]
pub struct Inherited {
    /// Where the API listens.
    pub api_socket: Option<ApiSocket>,
    /// Where events are written.
    pub event_monitor: Option<File>,
}

impl Inherited {
    /// Takes them over. [`Options::check`] has made sure that no two are the same.
    pub fn take(options: &Options) -> anyhow::Result<Self> {
        let mut inherited = Self::default();
        if let Some(ApiSocketOption::Descriptor(fd)) = options.api_socket {
            inherited.api_socket = Some(ApiSocket::from_descriptor(fd)?);
        }
        if let Some(EventMonitorOption::Descriptor(fd)) = options.event_monitor {
            let file = writable(fd).with_context(|| format!("cannot write events to fd={fd}"))?;
            inherited.event_monitor = Some(file);
        }
        Ok(inherited)
    }
}

fn writable(fd: RawFd) -> anyhow::Result<File> {
    // SAFETY: reads the flags of whatever the number stands for, if anything; no memory is involved.
    let flags = unsafe { libc::fcntl(fd, libc::F_GETFL) };
    if flags < 0 {
        let error = io::Error::last_os_error();
        return Err(error).context("no such descriptor was open when dyad started: open it in the program that starts dyad");
    }
    if flags & libc::O_PATH != 0
        || !matches!(flags & libc::O_ACCMODE, libc::O_WRONLY | libc::O_RDWR)
    {
        bail!("the descriptor is not open for writing");
    }
    // SAFETY: the descriptor is open, and since this program has opened none yet, it was given: with fd=N its user
    // says that it is ours. Nothing else here refers to that number.
    Ok(unsafe { File::from_raw_fd(fd) })
}
