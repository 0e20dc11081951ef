//! Mirrored disks: where each host of a lab has its image, and whether both hold the same.

use crate::disk::Disk;
use crate::lab::Lab;
use crate::network::Side;
use crate::pair::{Pair, wait_for_status};
use crate::patience::eventually;
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Where a host has its image, unless a story has it elsewhere. The guest is booted with that of host a.
#[must_use]
pub fn image_of(lab: &Lab, side: Side) -> PathBuf {
    match side {
        Side::A => lab.disk.path().to_owned(),
        Side::B => lab.directory().join("b.raw"),
    }
}

/// What `ft.enable` says.
#[must_use]
pub fn mirrored() -> Value {
    json!({ "disk_mode": "mirrored" })
}

/// What `ft.receive` says of an image that is not where the primary has its own.
#[must_use]
pub fn receive(image: &Path) -> Value {
    json!({ "disks": [{ "id": "_disk0", "path": image }] })
}

/// The first byte in which two files differ.
fn difference(a: &Path, b: &Path) -> Result<Option<u64>> {
    let (mut a, mut b) = (std::fs::File::open(a)?, std::fs::File::open(b)?);
    ensure!(a.metadata()?.len() == b.metadata()?.len(), "the images have different sizes");
    let (mut ours, mut theirs) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    let mut at = 0;
    loop {
        let count = a.read(&mut ours)?;
        b.read_exact(&mut theirs[..count])?;
        if count == 0 {
            return Ok(None);
        }
        if let Some(index) = ours[..count].iter().zip(&theirs).position(|(a, b)| a != b) {
            return Ok(Some(at + index as u64));
        }
        at += count as u64;
    }
}

/// Has the guest of a protected pair rest for a moment, and looks whether both images hold the same.
///
/// # Errors
///
/// With the first byte that differs, if they do not come to be alike.
pub fn alike(pair: &Pair) -> Result<()> {
    pair.primary.api().put("vm.pause")?;
    wait_for_status(&pair.primary, "everything is executed", |status| {
        status.log.executed_bytes == status.log.recorded_bytes
    })?;
    let [a, b] = [Side::A, Side::B].map(|side| image_of(&pair.lab, side));
    // What was under way when it paused is done by either host in its own time.
    let mut last = None;
    let found = eventually(Duration::from_secs(10), "both images are alike", || {
        last = difference(&a, &b)?;
        Ok(last.is_none().then_some(()))
    });
    found.with_context(|| format!("they differ at byte {last:?}"))?;
    pair.primary.api().put("vm.resume")?;
    Ok(())
}

/// The disks of both hosts.
#[must_use]
pub fn disks(lab: &Lab) -> Vec<Disk> {
    [Side::A, Side::B].iter().map(|side| Disk::at(&image_of(lab, *side))).collect()
}
