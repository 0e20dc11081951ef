//! Nothing acknowledged is lost: what a client has an answer for is on the disk and counted, for ever.

use super::Verdict;

/// A client that waits for the answer to `awaited` got one for `request`, with the running total.
pub fn answered(t: u64, awaited: u64, request: u64, total: u64, disk: u64) -> Verdict {
    if total + 1 < awaited.min(request) {
        return Err(format!(
            "at {t} us a client learns that {total} of its requests are done, but it had answers for {}",
            awaited - 1
        ));
    }
    if total >= request && disk < request {
        return Err(format!("at {t} us request {request} is answered, but the disk holds {disk}"));
    }
    Ok(())
}
