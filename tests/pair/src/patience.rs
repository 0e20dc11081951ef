//! Waiting for conditions, with an end.

use anyhow::{Result, bail};
use std::time::{Duration, Instant};

/// Asks `condition` again and again until it gives a value.
///
/// # Errors
///
/// The condition's own error at once, or `what` when `patience` runs out.
pub fn eventually<T>(
    patience: Duration,
    what: &str,
    mut condition: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let deadline = Instant::now() + patience;
    loop {
        if let Some(value) = condition()? {
            return Ok(value);
        }
        if Instant::now() >= deadline {
            bail!("not within {patience:?}: {what}");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}
