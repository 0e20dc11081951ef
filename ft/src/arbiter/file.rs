//! `file:DIR`: claims are files in a directory that both hosts share, on a cluster file system or NFS.
//!
//! A claim is made by writing the claimant's name to a file of its own, flushing it, and linking it to
//! the claim's name. link(2) is atomic on every such file system and fails if the name exists. Its
//! answer is not trusted, since over NFS it can be lost with the link made: what counts is what the
//! claim's file holds afterwards. For the same reason a claimant that died between link and answer
//! resolves: its name is in the file, so it has won, and the other loses.
//!
//! Claims are never removed: one that is gone could be won again.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use super::{Arbiter, BadArbiter, Claim, Unreachable};
use crate::{Generation, PairId};

/// The longest name of a claimant that is read back.
const MAX_WHO_BYTES: u64 = 4096;

/// Distinguishes the files of concurrent claims of one process.
static ATTEMPT: AtomicU64 = AtomicU64::new(0);

/// Claims as files in a shared directory.
#[derive(Clone, Debug)]
pub struct FileArbiter {
    dir: PathBuf,
}

impl FileArbiter {
    /// Uses `dir`, an absolute path to a directory.
    pub fn open(dir: impl AsRef<Path>) -> Result<Self, BadArbiter> {
        let dir = dir.as_ref();
        if !dir.is_absolute() {
            return Err(BadArbiter::NotAbsolute { url: format!("file:{}", dir.display()) });
        }
        let bad = |source| BadArbiter::NoDirectory { dir: dir.to_path_buf(), source };
        if !fs::metadata(dir).map_err(bad)?.is_dir() {
            return Err(bad(ErrorKind::NotADirectory.into()));
        }
        Ok(Self { dir: dir.to_path_buf() })
    }

    fn claim_path(&self, pair: &PairId, generation: Generation) -> PathBuf {
        self.dir.join(format!("{pair}.{generation}.claim"))
    }

    fn failed(&self, step: &str, path: &Path, source: io::Error) -> Unreachable {
        Unreachable {
            arbiter: format!("file:{}", self.dir.display()),
            step: format!("{step} {}", path.display()),
            source,
        }
    }

    /// Who holds the claim; `None` if nobody does.
    fn holder(&self, path: &Path) -> Result<Option<String>, Unreachable> {
        let file = match File::open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(self.failed("open", path, error)),
        };
        let mut who = Vec::new();
        file.take(MAX_WHO_BYTES)
            .read_to_end(&mut who)
            .map_err(|error| self.failed("read", path, error))?;
        Ok(Some(String::from_utf8_lossy(&who).into_owned()))
    }

    fn flush_directory(&self) -> Result<(), Unreachable> {
        File::open(&self.dir)
            .and_then(|dir| dir.sync_all())
            .map_err(|error| self.failed("flush", &self.dir, error))
    }

    fn link(&self, path: &Path, who: &str) -> Result<(), Unreachable> {
        let own = self.dir.join(format!(
            ".{}.{}.{}",
            path.file_name().map(|name| name.to_string_lossy()).unwrap_or_default(),
            xxhash_rust::xxh3::xxh3_64(who.as_bytes()),
            ATTEMPT.fetch_add(1, Ordering::Relaxed),
        ));
        // A file of this name can only be left from this very claimant: a retry replaces it.
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .open(&own)
            .map_err(|error| self.failed("create", &own, error))?;
        let written = file.write_all(who.as_bytes()).and_then(|()| file.sync_all());
        let linked = match written {
            Ok(()) => fs::hard_link(&own, path).map_err(|error| ("link", path, error)),
            Err(error) => Err(("write", own.as_path(), error)),
        };
        let result = match linked {
            Ok(()) => Ok(()),
            Err(("link", _, error)) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
            Err((step, path, error)) => Err(self.failed(step, path, error)),
        };
        // Left behind it does no harm: it is not a claim's name.
        let _ = fs::remove_file(&own);
        result
    }
}

impl Arbiter for FileArbiter {
    fn claim(
        &self,
        pair: &PairId,
        generation: Generation,
        who: &str,
    ) -> Result<Claim, Unreachable> {
        let path = self.claim_path(pair, generation);
        if self.holder(&path)?.is_none() {
            self.link(&path, who)?;
        }
        // The claim must outlive a crash of the file server's client before anybody acts on it.
        self.flush_directory()?;
        match self.holder(&path)? {
            Some(holder) if holder == who => Ok(Claim::Won),
            Some(holder) => Ok(Claim::Lost { by: holder }),
            None => Err(self.failed("find", &path, ErrorKind::NotFound.into())),
        }
    }
}
