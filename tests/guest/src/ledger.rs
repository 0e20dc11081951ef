//! The file behind the service, and the reader that checks one.
//!
//! Holds at all times: `Ledger::total` is the number of the last line whose `fsync` has returned.

use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::path::Path;

/// Longest text of one line, in bytes. Keeps what a client can make the service hold bounded.
pub const MAX_TEXT: usize = 4096;

/// Running 64-bit FNV-1a over the bytes of a ledger: cheap to extend line by line, and the same
/// wherever it is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Digest(u64);

impl Digest {
    /// The digest of an empty ledger.
    pub const EMPTY: Self = Self(0xcbf2_9ce4_8422_2325);

    /// The digest after `bytes` have been appended.
    #[must_use]
    pub fn extended(self, bytes: &[u8]) -> Self {
        let step = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3);
        Self(bytes.iter().fold(self.0, step))
    }
}

impl std::fmt::Display for Digest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// Why a file is not a ledger.
#[derive(Debug)]
pub enum LedgerError {
    /// The file could not be read, written or synced.
    Io(io::Error),
    /// Line `expected` carries another number or none: lines were lost, repeated or damaged.
    Numbering {
        /// The number the line at this place must have.
        expected: u64,
        /// The line as found, cut to 80 characters.
        found: String,
    },
}

impl std::fmt::Display for LedgerError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Io(error) => write!(f, "the ledger cannot be read or written: {error}"),
            Self::Numbering { expected, found } => {
                write!(f, "line {expected} of the ledger is not numbered {expected}: {found:?}")
            }
        }
    }
}

impl std::error::Error for LedgerError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Io(error) => Some(error),
            Self::Numbering { .. } => None,
        }
    }
}

impl From<io::Error> for LedgerError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

/// What a whole ledger holds, as found by [`scan`].
#[derive(Debug, PartialEq, Eq)]
pub struct Contents {
    /// Texts of lines 1, 2, 3 and so on, without their numbers.
    pub texts: Vec<String>,
    /// Digest over all complete lines.
    pub digest: Digest,
    /// Length of all complete lines, in bytes.
    pub bytes: u64,
    /// Bytes after the last newline: an append that did not finish.
    pub torn: u64,
}

/// Reads a ledger from its beginning and checks the numbering.
///
/// # Errors
///
/// [`LedgerError::Numbering`] for the first line out of sequence, [`LedgerError::Io`] if `from` fails.
pub fn scan(from: impl Read) -> Result<Contents, LedgerError> {
    let mut found = Contents { texts: Vec::new(), digest: Digest::EMPTY, bytes: 0, torn: 0 };
    let mut from = BufReader::new(from);
    let mut line = Vec::new();
    loop {
        line.clear();
        if from.read_until(b'\n', &mut line)? == 0 {
            return Ok(found);
        }
        if line.last() != Some(&b'\n') {
            found.torn = line.len() as u64;
            return Ok(found);
        }
        let expected = found.texts.len() as u64 + 1;
        let text = String::from_utf8_lossy(&line[..line.len() - 1]);
        match text.split_once(' ') {
            Some((number, rest)) if number == expected.to_string() => {
                found.texts.push(rest.to_owned());
            }
            _ => {
                let found = text.chars().take(80).collect();
                return Err(LedgerError::Numbering { expected, found });
            }
        }
        found.digest = found.digest.extended(&line);
        found.bytes += line.len() as u64;
    }
}

/// An open ledger, ready to append to.
#[derive(Debug)]
pub struct Ledger {
    file: File,
    total: u64,
    bytes: u64,
    digest: Digest,
}

impl Ledger {
    /// Opens or creates the ledger at `path`, checks all of it and cuts off an unfinished append.
    ///
    /// # Errors
    ///
    /// As [`scan`]; an existing file with wrong numbering is left untouched.
    pub fn open(path: &Path) -> Result<Self, LedgerError> {
        let mut file =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
        let found = scan(&mut file)?;
        if found.torn > 0 {
            file.set_len(found.bytes)?;
        }
        file.seek(SeekFrom::Start(found.bytes))?;
        // The directory entry too must survive a crash, or the first lines could vanish with it.
        file.sync_all()?;
        if let Some(parent) = path.parent().filter(|parent| !parent.as_os_str().is_empty()) {
            File::open(parent)?.sync_all()?;
        }
        let total = found.texts.len() as u64;
        Ok(Self { file, total, bytes: found.bytes, digest: found.digest })
    }

    /// Appends one line and returns its number once it is on stable storage.
    ///
    /// # Errors
    ///
    /// [`LedgerError::Io`]. The line does not count then: its bytes are cut off again as far as the
    /// disk lets us, and its number is given to the next append.
    pub fn append(&mut self, text: &str) -> Result<u64, LedgerError> {
        let line = format!("{} {text}\n", self.total + 1);
        if let Err(error) =
            self.file.write_all(line.as_bytes()).and_then(|()| self.file.sync_data())
        {
            self.file.set_len(self.bytes)?;
            self.file.seek(SeekFrom::Start(self.bytes))?;
            return Err(error.into());
        }
        self.total += 1;
        self.bytes += line.len() as u64;
        self.digest = self.digest.extended(line.as_bytes());
        Ok(self.total)
    }

    /// Lines on stable storage.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.total
    }

    /// Digest over the lines on stable storage.
    #[must_use]
    pub fn digest(&self) -> Digest {
        self.digest
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbering_goes_on_after_reopening() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ledger");
        let mut ledger = Ledger::open(&path).unwrap();
        assert_eq!(ledger.append("first").unwrap(), 1);
        assert_eq!(ledger.append("").unwrap(), 2);
        let digest = ledger.digest();
        drop(ledger);
        let mut ledger = Ledger::open(&path).unwrap();
        assert_eq!(ledger.total(), 2);
        assert_eq!(ledger.digest(), digest);
        assert_eq!(ledger.append("third one").unwrap(), 3);
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "1 first\n2 \n3 third one\n");
    }

    #[test]
    fn an_unfinished_append_is_cut_off() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ledger");
        std::fs::write(&path, "1 a\n2 b\n3 unfinis").unwrap();
        let mut ledger = Ledger::open(&path).unwrap();
        assert_eq!(ledger.total(), 2);
        ledger.append("c").unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "1 a\n2 b\n3 c\n");
    }

    #[test]
    fn a_gap_a_repeat_and_garbage_are_found() {
        for (bytes, expected) in
            [("1 a\n3 c\n", 2), ("1 a\n1 a\n", 2), ("\0\0\0\0\n", 1), ("01 a\n", 1)]
        {
            match scan(bytes.as_bytes()) {
                Err(LedgerError::Numbering { expected: at, .. }) => assert_eq!(at, expected),
                other => panic!("{bytes:?} gave {other:?}"),
            }
        }
    }

    #[test]
    fn the_digest_depends_on_every_byte() {
        let one = scan("1 a\n2 b\n".as_bytes()).unwrap();
        let other = scan("1 a\n2 c\n".as_bytes()).unwrap();
        assert_ne!(one.digest, other.digest);
        assert_eq!(one.digest, Digest::EMPTY.extended(b"1 a\n").extended(b"2 b\n"));
    }
}
