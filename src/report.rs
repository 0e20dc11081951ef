//! How both programs tell errors: a heading, then the causes, numbered, the root cause last.

use std::io::Write;
use std::process::ExitCode;

/// Prints the chain on standard error.
pub fn failure(heading: &str, causes: impl IntoIterator<Item = String>) -> ExitCode {
    let mut text = format!("Error: {heading}\n");
    for (number, cause) in causes.into_iter().enumerate() {
        text += &format!("  {number}: {cause}\n");
    }
    // Nothing can be told to someone who has closed standard error.
    let _ = std::io::stderr().lock().write_all(text.as_bytes());
    ExitCode::FAILURE
}
