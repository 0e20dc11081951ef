//! Terminals: raw mode that is always undone, pseudo-terminals, standard input and output without
//! blocking.

use std::fs::{File, OpenOptions};
use std::io::{self, IsTerminal};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::PathBuf;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::pty::{PtyMaster, grantpt, posix_openpt, ptsname_r, unlockpt};
use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};

/// The terminal of standard input in raw mode: every key goes to the guest. Dropping it restores the
/// mode from before.
pub(super) struct RawMode {
    /// As the system has it: the wrapper's own form may not be shared by threads.
    before: libc::termios,
}

impl RawMode {
    /// `None` if standard input is no terminal, or not this process's to change: one in the background
    /// would be stopped by the attempt.
    pub(super) fn enter() -> io::Result<Option<Self>> {
        let stdin = io::stdin();
        if !stdin.is_terminal() || !in_foreground() {
            return Ok(None);
        }
        let before = tcgetattr(&stdin)?;
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        tcsetattr(&stdin, SetArg::TCSANOW, &raw)?;
        Ok(Some(Self { before: before.into() }))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        if let Err(error) = tcsetattr(io::stdin(), SetArg::TCSANOW, &Termios::from(self.before)) {
            log::warn!("the terminal stays in raw mode, 'reset' restores it: {error}");
        }
    }
}

impl std::fmt::Debug for RawMode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("RawMode")
    }
}

fn in_foreground() -> bool {
    nix::unistd::tcgetpgrp(io::stdin()).is_ok_and(|group| group == nix::unistd::getpgrp())
}

/// Standard input for the console's thread.
pub(super) fn standard_input() -> io::Result<File> {
    reopen(
        io::stdin().as_fd().try_clone_to_owned()?,
        "/proc/self/fd/0",
        OpenOptions::new().read(true),
    )
}

/// Standard output for the console's thread.
pub(super) fn standard_output() -> io::Result<File> {
    reopen(
        io::stdout().as_fd().try_clone_to_owned()?,
        "/proc/self/fd/1",
        OpenOptions::new().write(true),
    )
}

/// A terminal or pipe is opened anew: "do not block" set on the descriptor itself would hold for
/// every process that shares it, the user's shell among them. A file never blocks, and opening it
/// anew would lose its position.
fn reopen(shared: OwnedFd, name: &str, options: &mut OpenOptions) -> io::Result<File> {
    let shared = File::from(shared);
    let pipe = shared.metadata()?.file_type().is_fifo();
    if !pipe && !shared.is_terminal() {
        return Ok(shared);
    }
    options.custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(name)
}

/// A pseudo-terminal in raw mode.
pub(super) struct Pty {
    /// Where its user finds it.
    pub path: PathBuf,
    /// What the user types.
    pub input: File,
    /// What the user sees.
    pub output: File,
    /// The user's side, kept open.
    pub user: File,
}

pub(super) fn open_pty() -> io::Result<Pty> {
    let master: PtyMaster = posix_openpt(OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC)?;
    grantpt(&master)?;
    unlockpt(&master)?;
    let path = PathBuf::from(ptsname_r(&master)?);
    let user =
        OpenOptions::new().read(true).write(true).custom_flags(libc::O_NOCTTY).open(&path)?;
    let mut mode = tcgetattr(&user)?;
    cfmakeraw(&mut mode);
    tcsetattr(&user, SetArg::TCSANOW, &mode)?;
    fcntl(&master, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    let output = File::from(master.as_fd().try_clone_to_owned()?);
    let input = output.try_clone()?;
    Ok(Pty { path, input, output, user })
}
