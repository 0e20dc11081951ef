//! Snapshots: a paused VM written to a directory, and read back.
//!
//! A directory holds `config.json` (the VM's configuration), `state.json` (processor and devices) and
//! `memory-ranges` (RAM, lowest address first; zero pages are holes). `state.json` is written last, under
//! its final name only when complete, so that a directory without it is no snapshot.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use hypervisor::GuestMemory;
use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::config::VmConfig;
use crate::guest::GuestState;
use crate::machine::HostFacts;

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

/// Writes a snapshot of a VM that is not running.
pub fn write(
    directory: &Path,
    config: &VmConfig,
    saved: &SavedVm,
    memory: &GuestMemory,
) -> Result<(), SnapshotError> {
    // An older snapshot in the same place stops being one before its memory is overwritten.
    let state = directory.join("state.json");
    match fs::remove_file(&state) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            return Err(SnapshotError::File { action: "replace", path: state, source });
        }
        _ => {}
    }
    write_json(&directory.join("config.json"), config)?;
    let path = directory.join("memory-ranges");
    write_memory(&path, memory).map_err(|source| SnapshotError::File {
        action: "write",
        path,
        source,
    })?;
    write_json(&state, saved)
}

/// Reads what is needed to build the VM that memory is then read into.
pub fn read(directory: &Path) -> Result<(VmConfig, SavedVm), SnapshotError> {
    let config = read_json(&directory.join("config.json"))?;
    let saved: SavedVm = read_json(&directory.join("state.json"))?;
    if saved.version != VERSION {
        return Err(SnapshotError::Version { found: saved.version });
    }
    Ok((config, saved))
}

/// Fills `memory` from a snapshot.
pub fn read_memory(directory: &Path, memory: &GuestMemory) -> Result<(), SnapshotError> {
    let path = directory.join("memory-ranges");
    let fail = |source| SnapshotError::File { action: "read", path: path.clone(), source };
    let mut file = File::open(&path).map_err(fail)?;
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

fn write_memory(path: &Path, memory: &GuestMemory) -> io::Result<()> {
    let mut file = File::create(path)?;
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
    file.set_len(memory.iter().map(GuestMemoryRegion::len).sum())?;
    file.sync_all()
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

fn write_json<T: Serialize>(path: &Path, value: &T) -> Result<(), SnapshotError> {
    let bytes = serde_json::to_vec_pretty(value)
        .map_err(|source| SnapshotError::Format { path: path.to_owned(), source })?;
    let unfinished = path.with_extension("json.unfinished");
    let write = || -> io::Result<()> {
        let mut file = File::create(&unfinished)?;
        file.write_all(&bytes)?;
        file.sync_all()?;
        fs::rename(&unfinished, path)
    };
    write().map_err(|source| {
        let _ = fs::remove_file(&unfinished);
        SnapshotError::File { action: "write", path: path.to_owned(), source }
    })
}

fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T, SnapshotError> {
    let bytes = fs::read(path).map_err(|source| SnapshotError::File {
        action: "read",
        path: path.to_owned(),
        source,
    })?;
    serde_json::from_slice(&bytes)
        .map_err(|source| SnapshotError::Format { path: path.to_owned(), source })
}
