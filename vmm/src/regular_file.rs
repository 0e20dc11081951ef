//! Opening files that are to be read to their end.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Opens a regular file for reading; `None` if `path` is a directory, a device or a pipe. A pipe would keep the caller
/// waiting for somebody who writes to it.
pub(crate) fn open(path: &Path) -> io::Result<Option<File>> {
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    let regular = file.metadata()?.is_file();
    Ok(regular.then_some(file))
}
