//! Where the test guest is, and how it is booted.

use crate::network::{GUEST, PREFIX};
use anyhow::{Context, Result, ensure};
use std::path::{Path, PathBuf};
use std::process::Command;

/// The guest's MAC address.
pub const MAC: &str = "2e:64:79:61:64:01";
/// Port of the ledger service.
pub const PORT: u16 = 7000;

/// Kernel and initramfs made by `scripts/build-guest`.
#[derive(Clone, Debug)]
pub struct Guest {
    /// Debian's kernel.
    pub kernel: PathBuf,
    /// Busybox, modules and the ledger service.
    pub initramfs: PathBuf,
}

impl Guest {
    /// Builds the guest, which does nothing when it is up to date.
    ///
    /// # Errors
    ///
    /// If `scripts/build-guest` fails.
    pub fn build() -> Result<Self> {
        let built = build("scripts/build-guest")?;
        Ok(Self { kernel: built.join("vmlinuz"), initramfs: built.join("initramfs") })
    }

    /// Builds the root file system with real programs and returns its image.
    ///
    /// # Errors
    ///
    /// If `scripts/build-rootfs` fails.
    pub fn programs() -> Result<PathBuf> {
        Ok(build("scripts/build-rootfs")?.join("rootfs.img"))
    }
}

/// Runs one of the scripts that build; where they put things.
fn build(script: &str) -> Result<PathBuf> {
    let root = root();
    let output =
        Command::new(root.join(script)).output().with_context(|| format!("cannot run {script}"))?;
    ensure!(
        output.status.success(),
        "{script} failed: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(root.join("build/guest"))
}

/// The kernel command line that boots the guest; `extra` selects a mode, see `tests/guest/root/init`.
///
/// The kernel's own crypto tests and its work against speculation cost seconds on a software CPU, which
/// does not speculate.
#[must_use]
pub fn command_line(extra: &str) -> String {
    let address = format!("dyad.ip={GUEST}/{PREFIX}");
    let quick = "quiet ipv6.disable=1 mitigations=off cryptomgr.notests";
    format!("console=ttyS0 {quick} {address} {extra}").trim_end().to_owned()
}

/// The top folder of the sources.
#[must_use]
pub fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.ancestors().nth(2).unwrap_or(here).to_path_buf()
}

/// A program built beside the running one.
///
/// # Errors
///
/// If it has not been built.
pub fn program(name: &str) -> Result<PathBuf> {
    let own = std::env::current_exe()?;
    // A program is in target/release, a test in target/release/deps.
    let found = own.ancestors().skip(1).take(2).map(|folder| folder.join(name));
    found
        .into_iter()
        .find(|path| path.is_file())
        .with_context(|| format!("{name} is not built: cargo build --release --workspace"))
}
