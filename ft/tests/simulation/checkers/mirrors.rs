//! Mirrored disks hold the same wherever no request is under way and no write has failed since one succeeded, and the survivor's holds all that clients were told.

use std::collections::BTreeSet;

use super::Verdict;
use crate::disks::Image;

/// The backup has executed all that is recorded; the blocks `unlike` may differ.
pub fn equal(t: u64, (primary, backup): (&Image, &Image), unlike: &BTreeSet<usize>) -> Verdict {
    for (block, (theirs, ours)) in primary.iter().zip(backup).enumerate() {
        if theirs != ours && !unlike.contains(&block) {
            return Err(format!(
                "at {t} us block {block} of the primary's disk has {theirs}, of the backup's {ours}"
            ));
        }
    }
    Ok(())
}

/// A side goes live with this disk, when clients wait for the answers to these requests.
pub fn survivor(t: u64, image: &Image, waiting: &Image) -> Verdict {
    for (client, (held, awaited)) in image.iter().zip(waiting).enumerate() {
        if held + 1 < *awaited {
            return Err(format!(
                "at {t} us the survivor's disk has request {held} of client {client}, who has an answer to {}",
                awaited - 1
            ));
        }
    }
    Ok(())
}
