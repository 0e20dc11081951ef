//! `file:DIR`: claims are files in a directory that both hosts share, on a cluster file system or NFS.
//!
//! A generation has two files, `PAIR.GENERATION.open`, its announcement, and `PAIR.GENERATION.claim`.
//! Each is made by writing a name to a file of its own, flushing it, and linking it to the name that
//! counts, then flushing the directory. link(2) is atomic on every such file system and fails if the name
//! exists. Its answer is not trusted, since over NFS it can be lost with the link made: what counts is
//! what the claim's file holds afterwards. For the same reason a claimant that died between link and
//! answer resolves: its name is in the file, so it has won, and the other loses.
//!
//! What must hold:
//! - Whatever belongs to one claim happens in one directory, opened once: a file system that is unmounted
//!   meanwhile cannot give way to the directory under it, which holds no announcement.
//! - A file that ends in the middle of a name decides nothing: a file system that lost what was flushed
//!   is an arbiter out of reach until somebody has looked at it.
//! - Nothing is ever removed but a file's first name: a claim that is gone could be won again. A
//!   generation costs two files of some bytes.
//! - Each question looks the directory up anew: a server that restarted (`ESTALE`) is found again by
//!   asking again.
//!
//! An NFS export must be `sync`, as is the default: with `async` a server that crashes forgets a claim.

use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, open, openat};
use nix::sys::stat::Mode;
use nix::unistd::{UnlinkatFlags, linkat, unlinkat};

use super::{Arbiter, Claim, MAX_WHO_BYTES, Unreachable, check_who, ended, not_announced};
use crate::{Generation, PairId};

/// Distinguishes the files of concurrent claims of one process.
static ATTEMPT: AtomicU64 = AtomicU64::new(0);

/// Claims as files in a shared directory.
#[derive(Clone, Debug)]
pub struct FileArbiter {
    path: PathBuf,
}

impl FileArbiter {
    /// Uses the directory at `path`.
    #[must_use]
    pub fn new(path: impl AsRef<Path>) -> Self {
        Self { path: path.as_ref().to_path_buf() }
    }

    /// The directory as it is now.
    fn open(&self) -> Result<Directory<'_>, Unreachable> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        match open(&self.path, flags, Mode::empty()) {
            Ok(fd) => Ok(Directory { path: &self.path, fd }),
            Err(error) => Err(failed(&self.path, "open the directory", error)),
        }
    }
}

fn failed(path: &Path, step: impl Into<String>, source: impl Into<io::Error>) -> Unreachable {
    Unreachable {
        arbiter: format!("file:{}", path.display()),
        step: step.into(),
        source: source.into(),
    }
}

fn announcement(pair: &PairId, generation: Generation) -> String {
    format!("{pair}.{generation}.open")
}

fn claim_name(pair: &PairId, generation: Generation) -> String {
    format!("{pair}.{generation}.claim")
}

/// The arbiter's directory for the length of one question.
struct Directory<'a> {
    path: &'a Path,
    fd: OwnedFd,
}

impl Directory<'_> {
    fn failed(&self, step: &str, name: &str, source: impl Into<io::Error>) -> Unreachable {
        failed(self.path, format!("{step} {name}"), source)
    }

    /// Whose name the file holds; `None` if there is no such file.
    fn read(&self, name: &str) -> Result<Option<String>, Unreachable> {
        let file = match openat(&self.fd, name, OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty()) {
            Ok(fd) => File::from(fd),
            Err(Errno::ENOENT) => return Ok(None),
            Err(error) => return Err(self.failed("open", name, error)),
        };
        let mut line = Vec::new();
        file.take(MAX_WHO_BYTES as u64 + 1)
            .read_to_end(&mut line)
            .map_err(|error| self.failed("read", name, error))?;
        match line.split_last() {
            Some((b'\n', who)) if !who.is_empty() => {
                Ok(Some(String::from_utf8_lossy(who).into_owned()))
            }
            _ => {
                let text = "it does not hold a whole line with a name: its file system has lost what was written";
                Err(self.failed("use", name, io::Error::new(ErrorKind::InvalidData, text)))
            }
        }
    }

    /// A new file with `who` in it, flushed; returns its name.
    fn write(&self, name: &str, who: &str) -> Result<String, Unreachable> {
        let hash = xxhash_rust::xxh3::xxh3_64(who.as_bytes());
        let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_CLOEXEC;
        let mode = Mode::from_bits_truncate(0o644);
        let (own, file) = loop {
            let attempt = ATTEMPT.fetch_add(1, Ordering::Relaxed);
            let own = format!(".{name}.{hash:x}.{attempt}");
            match openat(&self.fd, own.as_str(), flags, mode) {
                Ok(fd) => break (own, File::from(fd)),
                // Over NFS also a file of our own whose making was answered late.
                Err(Errno::EEXIST) => {}
                Err(error) => return Err(self.failed("create", &own, error)),
            }
        };
        let written =
            (&file).write_all(format!("{who}\n").as_bytes()).and_then(|()| file.sync_all());
        if let Err(error) = written {
            self.remove(&own);
            return Err(self.failed("write", &own, error));
        }
        Ok(own)
    }

    /// Makes the file `name` with `who` in it, whole or not at all, unless there is one.
    fn make(&self, name: &str, who: &str) -> Result<(), Unreachable> {
        let own = self.write(name, who)?;
        let linked = linkat(self.fd.as_fd(), own.as_str(), self.fd.as_fd(), name, AtFlags::empty());
        self.remove(&own);
        match linked {
            Ok(()) | Err(Errno::EEXIST) => Ok(()),
            Err(error) => Err(self.failed("link", name, error)),
        }
    }

    /// Left behind it does no harm: it is not a name that counts.
    fn remove(&self, own: &str) {
        let _ = unlinkat(self.fd.as_fd(), own, UnlinkatFlags::NoRemoveDir);
    }

    /// What is in the directory must outlive a crash of its server before anybody acts on it.
    fn flush(&self) -> Result<(), Unreachable> {
        let flushed = self.fd.try_clone().and_then(|fd| File::from(fd).sync_all());
        flushed.map_err(|error| failed(self.path, "flush the directory", error))
    }
}

impl Arbiter for FileArbiter {
    fn announce(
        &self,
        pair: &PairId,
        generation: Generation,
        who: &str,
    ) -> Result<(), Unreachable> {
        check_who(who).map_err(|error| failed(&self.path, "use the name given", error))?;
        let directory = self.open()?;
        let (name, claim) = (announcement(pair, generation), claim_name(pair, generation));
        if let Some(by) = directory.read(&claim)? {
            return Err(directory.failed("announce", &name, ended(pair, generation, &by)));
        }
        directory.make(&name, who)?;
        directory.flush()?;
        match directory.read(&name)? {
            Some(_) => Ok(()),
            None => Err(directory.failed("find", &name, ErrorKind::NotFound)),
        }
    }

    fn verify(&self, pair: &PairId, generation: Generation, who: &str) -> Result<(), Unreachable> {
        check_who(who).map_err(|error| failed(&self.path, "use the name given", error))?;
        let directory = self.open()?;
        let name = announcement(pair, generation);
        if directory.read(&name)?.is_none() {
            return Err(directory.failed("find", &name, not_announced(pair, generation)));
        }
        let own = directory.write(&name, who)?;
        directory.remove(&own);
        Ok(())
    }

    fn claim(
        &self,
        pair: &PairId,
        generation: Generation,
        who: &str,
    ) -> Result<Claim, Unreachable> {
        check_who(who).map_err(|error| failed(&self.path, "use the name given", error))?;
        let directory = self.open()?;
        let (name, claim) = (announcement(pair, generation), claim_name(pair, generation));
        if directory.read(&name)?.is_none() {
            return Err(directory.failed("find", &name, not_announced(pair, generation)));
        }
        if directory.read(&claim)?.is_none() {
            // Its end was agreed upon without a claim.
            if let Some(by) = directory.read(&announcement(pair, generation.next()))? {
                return Ok(Claim::Lost { by });
            }
            directory.make(&claim, who)?;
        }
        directory.flush()?;
        match directory.read(&claim)? {
            Some(holder) if holder == who => Ok(Claim::Won),
            Some(holder) => Ok(Claim::Lost { by: holder }),
            None => Err(directory.failed("find", &claim, ErrorKind::NotFound)),
        }
    }
}
