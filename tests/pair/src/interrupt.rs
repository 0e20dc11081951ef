//! Leaves nothing behind on Ctrl-C.
//!
//! Processes and namespaces end with this process; directories do not.

use anyhow::Result;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

static DIRECTORIES: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// Removes `directory` when this process is interrupted or terminated.
///
/// # Errors
///
/// If the signal handlers cannot be installed.
pub fn remove_on_interrupt(directory: &Path) -> Result<()> {
    let mut directories = DIRECTORIES.lock().unwrap_or_else(PoisonError::into_inner);
    directories.push(directory.to_path_buf());
    if directories.len() > 1 {
        return Ok(());
    }
    let mut signals = Signals::new([SIGHUP, SIGINT, SIGTERM])?;
    std::thread::spawn(move || {
        if let Some(signal) = signals.forever().next() {
            let directories = DIRECTORIES.lock().unwrap_or_else(PoisonError::into_inner);
            for directory in directories.iter() {
                // One that is gone already is as good.
                let _ = std::fs::remove_dir_all(directory);
            }
            eprintln!("\ninterrupted; everything started here is ended and removed");
            std::process::exit(128 + signal);
        }
    });
    Ok(())
}
