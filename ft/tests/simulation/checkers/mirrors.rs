//! Mirrored disks hold the same wherever no request is under way, and the survivor's holds all that clients were told.

use super::Verdict;
use crate::disks::Image;
use crate::guest::Request;

/// The backup has executed all that is recorded; `under_way` are the requests that its guest has not seen completed.
pub fn equal(t: u64, (primary, backup): (&Image, &Image), under_way: &[Request]) -> Verdict {
    for (block, (theirs, ours)) in primary.iter().zip(backup).enumerate() {
        if theirs != ours && !under_way.iter().any(|request| request.block == block) {
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
