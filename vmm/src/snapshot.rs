//! Snapshots: a paused VM written to a directory, and read back.
//!
//! A directory holds `config.json` (the VM's configuration), `state.json` (processor and devices) and
//! `memory-ranges` (RAM, lowest address first; zero pages are holes).
//!
//! What must hold: the three belong together, and a snapshot that cannot be written costs neither the one that was there
//! before nor leaves a part of itself. So all three are written beside their places and are stable before the first one
//! is put there. While they are, `state.json` is missing, and a directory without it is no snapshot: should the
//! host lose power in just these moments, nothing is restored that never was.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use hypervisor::GuestMemory;
use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::config::VmConfig;
use crate::guest::GuestState;
use crate::machine::HostFacts;
use crate::regular_file;

const CONFIG: &str = "config.json";
const STATE: &str = "state.json";
const MEMORY: &str = "memory-ranges";

/// Changes whenever a saved state struct does.
const VERSION: u32 = 1;
/// RAM is read and written in pieces of this size.
const CHUNK: usize = 1 << 16;

/// Why a snapshot could not be written or read.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// The URL names no directory.
    #[error("{url:?} is no snapshot location: give file:// and the path of an existing directory")]
    Url {
        /// What was given.
        url: String,
    },
    /// A file could not be read or written.
    #[error("cannot {action} {}", path.display())]
    File {
        /// read or write
        action: &'static str,
        /// Which.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A file is a directory, a device or a pipe.
    #[error("{} is not a regular file, and so not part of a snapshot", path.display())]
    Kind {
        /// Which.
        path: PathBuf,
    },
    /// A file does not hold what it should.
    #[error("{} is damaged or not part of a snapshot", path.display())]
    Format {
        /// Which.
        path: PathBuf,
        /// The cause.
        #[source]
        source: serde_json::Error,
    },
    /// Written by another version.
    #[error("the snapshot has format {found}, this program reads format {VERSION}")]
    Version {
        /// Its format.
        found: u32,
    },
    /// Memory of another size.
    #[error("the snapshot holds {found} bytes of memory, its configuration says {expected}")]
    MemorySize {
        /// Bytes in the file.
        found: u64,
        /// Bytes of the configuration.
        expected: u64,
    },
}

/// What `state.json` holds.
#[derive(Debug, Serialize, Deserialize)]
pub struct SavedVm {
    version: u32,
    /// What the machine took from the host it was first started on.
    pub host: HostFacts,
    /// Processor and devices.
    pub guest: GuestState,
}

impl SavedVm {
    /// State of a VM.
    #[must_use]
    pub fn new(host: HostFacts, guest: GuestState) -> Self {
        Self { version: VERSION, host, guest }
    }
}

/// The directory that `url` names.
pub fn directory(url: &str) -> Result<PathBuf, SnapshotError> {
    let no_directory = || SnapshotError::Url { url: url.to_owned() };
    let path = Path::new(url.strip_prefix("file://").ok_or_else(no_directory)?);
    if path.is_dir() { Ok(path.to_owned()) } else { Err(no_directory()) }
}

/// Writes a snapshot of a VM that is not running. It takes the place of one that is there, which stays as it is if this
/// fails; until the end there must be room for both.
pub fn write(
    directory: &Path,
    config: &VmConfig,
    saved: &SavedVm,
    memory: &GuestMemory,
) -> Result<(), SnapshotError> {
    let config = Unfinished::write_json(directory.join(CONFIG), config)?;
    let memory = Unfinished::write(directory.join(MEMORY), |file| write_memory(file, memory))?;
    let state = directory.join(STATE);
    let saved = Unfinished::write_json(state.clone(), saved)?;
    remove(&state).map_err(|source| failed("replace", &state, source))?;
    config.put_in_place()?;
    memory.put_in_place()?;
    saved.put_in_place()?;
    let stable = File::open(directory).and_then(|directory| directory.sync_all());
    stable.map_err(|source| failed("write", directory, source))
}

/// A stable file beside the place it is to take. Goes away if it never does.
struct Unfinished {
    path: PathBuf,
    place: PathBuf,
}

impl Unfinished {
    fn write(
        place: PathBuf,
        fill: impl FnOnce(&mut File) -> io::Result<()>,
    ) -> Result<Self, SnapshotError> {
        let mut path = place.clone().into_os_string();
        path.push(".unfinished");
        let path = PathBuf::from(path);
        let fail = |source| failed("write", &place, source);
        if place.is_dir() {
            return Err(fail(io::ErrorKind::IsADirectory.into()));
        }
        // What a process that was killed has left, or something that is nobody's to be written to.
        remove(&path).map_err(fail)?;
        let mut file = File::create_new(&path).map_err(fail)?;
        let unfinished = Self { path, place: place.clone() };
        fill(&mut file).and_then(|()| file.sync_all()).map_err(fail)?;
        Ok(unfinished)
    }

    fn write_json<T: Serialize>(place: PathBuf, value: &T) -> Result<Self, SnapshotError> {
        let bytes = serde_json::to_vec_pretty(value)
            .map_err(|source| SnapshotError::Format { path: place.clone(), source })?;
        Self::write(place, |file| file.write_all(&bytes))
    }

    fn put_in_place(self) -> Result<(), SnapshotError> {
        fs::rename(&self.path, &self.place).map_err(|source| failed("replace", &self.place, source))
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        if let Err(error) = remove(&self.path) {
            log::warn!("cannot remove {}: {error}", self.path.display());
        }
    }
}

fn failed(action: &'static str, path: &Path, source: io::Error) -> SnapshotError {
    SnapshotError::File { action, path: path.to_owned(), source }
}

/// Removes a file, if it is there.
fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Reads what is needed to build the VM that memory is then read into.
pub fn read(directory: &Path) -> Result<(VmConfig, SavedVm), SnapshotError> {
    let config = read_json(&directory.join(CONFIG))?;
    let saved: SavedVm = read_json(&directory.join(STATE))?;
    if saved.version != VERSION {
        return Err(SnapshotError::Version { found: saved.version });
    }
    Ok((config, saved))
}

/// Fills `memory` from a snapshot.
pub fn read_memory(directory: &Path, memory: &GuestMemory) -> Result<(), SnapshotError> {
    let path = directory.join(MEMORY);
    let fail = |source| failed("read", &path, source);
    let mut file = open(&path)?;
    let found = file.metadata().map_err(fail)?.len();
    let expected = memory.iter().map(GuestMemoryRegion::len).sum();
    if found != expected {
        return Err(SnapshotError::MemorySize { found, expected });
    }
    let mut buffer = vec![0; CHUNK];
    for_each_chunk(memory, |address, len| {
        let chunk = &mut buffer[..len];
        file.read_exact(chunk)?;
        // The new memory is zero already; leaving zeros alone keeps it unallocated.
        if chunk.iter().any(|&byte| byte != 0) {
            memory.write_slice(chunk, address).map_err(io::Error::other)?;
        }
        Ok(())
    })
    .map_err(fail)
}

fn write_memory(file: &mut File, memory: &GuestMemory) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK];
    for_each_chunk(memory, |address, len| {
        let chunk = &mut buffer[..len];
        memory.read_slice(chunk, address).map_err(io::Error::other)?;
        if chunk.iter().all(|&byte| byte == 0) {
            file.seek(SeekFrom::Current(len as i64))?;
        } else {
            file.write_all(chunk)?;
        }
        Ok(())
    })?;
    file.set_len(memory.iter().map(GuestMemoryRegion::len).sum())
}

fn for_each_chunk(
    memory: &GuestMemory,
    mut f: impl FnMut(GuestAddress, usize) -> io::Result<()>,
) -> io::Result<()> {
    for region in memory.iter() {
        let mut offset = 0;
        while offset < region.len() {
            let len = (region.len() - offset).min(CHUNK as u64);
            f(GuestAddress(region.start_addr().0 + offset), len as usize)?;
            offset += len;
        }
    }
    Ok(())
}

fn open(path: &Path) -> Result<File, SnapshotError> {
    let file = regular_file::open(path).map_err(|source| failed("read", path, source))?;
    file.ok_or_else(|| SnapshotError::Kind { path: path.to_owned() })
}

fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T, SnapshotError> {
    let mut bytes = Vec::new();
    open(path)?.read_to_end(&mut bytes).map_err(|source| failed("read", path, source))?;
    serde_json::from_slice(&bytes)
        .map_err(|source| SnapshotError::Format { path: path.to_owned(), source })
}
