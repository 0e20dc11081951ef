//! The image both hosts reach, seen from outside the guest.

use anyhow::{Context, Result, bail, ensure};
use ledger_service::ledger::{Contents, scan};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// A raw image with an ext4 file system.
#[derive(Clone, Debug)]
pub struct Disk {
    path: PathBuf,
}

impl Disk {
    /// Makes an empty image of `size` bytes.
    ///
    /// # Errors
    ///
    /// If there is no room, or no mkfs.ext4.
    pub fn create(path: PathBuf, size: u64) -> Result<Self> {
        let image = std::fs::File::create(&path).context("cannot create the disk image")?;
        image.set_len(size)?;
        // Without the lazy options the guest would initialise tables in the background for minutes.
        let options = "lazy_itable_init=0,lazy_journal_init=0";
        run(Command::new("mkfs.ext4").args(["-q", "-E", options]).arg(&path))?;
        Ok(Self { path })
    }

    /// An image that is there.
    #[must_use]
    pub fn at(path: &Path) -> Self {
        Self { path: path.to_owned() }
    }

    /// Has the host's file system allocate every block, so that writes of the guest change nothing there but data, as
    /// on a disk that has been in use for long.
    ///
    /// Nobody may be using the image.
    ///
    /// # Errors
    ///
    /// If there is no room.
    pub fn allocate(&self) -> Result<()> {
        let image = std::fs::read(&self.path)?;
        std::fs::write(&self.path, image).context("cannot allocate the disk image")
    }

    /// Where the image is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Replays the journal, as the next mount would, then checks the whole file system.
    ///
    /// Nobody may be using the image.
    ///
    /// # Errors
    ///
    /// If `e2fsck` finds anything to correct after the replay.
    pub fn check(&self) -> Result<()> {
        // -p, not -y, which would go on to repair what this is to find. Status 1: the journal was replayed.
        let replay = sbin("e2fsck").args(["-p", "-E", "journal_only"]).arg(&self.path).output()?;
        if !matches!(replay.status.code(), Some(0 | 1)) {
            bail!("the journal does not replay: {}", text(&replay));
        }
        let check = sbin("e2fsck").args(["-f", "-n"]).arg(&self.path).output()?;
        ensure!(check.status.success(), "e2fsck -f finds errors: {}", text(&check));
        Ok(())
    }

    /// A file as it is in the image.
    ///
    /// # Errors
    ///
    /// If there is none.
    pub fn file(&self, path: &str) -> Result<Vec<u8>> {
        let copy = tempfile::NamedTempFile::new()?;
        let dump = format!("dump {path} {}", copy.path().display());
        let output = run(sbin("debugfs").args(["-R", &dump]).arg(&self.path))?;
        // debugfs ends with status 0 whatever happens; what went wrong is on standard error.
        let complaint = String::from_utf8_lossy(&output.stderr);
        ensure!(
            complaint.lines().all(|line| line.starts_with("debugfs ")),
            "{path} cannot be read from the image: {complaint}"
        );
        Ok(std::fs::read(copy.path())?)
    }

    /// The ledger as it is in the image.
    ///
    /// # Errors
    ///
    /// If there is none, or its lines are not numbered 1, 2, 3 and so on.
    pub fn ledger(&self) -> Result<Contents> {
        Ok(scan(self.file("/ledger")?.as_slice())?)
    }
}

/// e2fsprogs live where an ordinary user's PATH does not lead.
fn sbin(program: &str) -> Command {
    let path = Path::new("/usr/sbin").join(program);
    if path.exists() { Command::new(path) } else { Command::new(program) }
}

fn run(command: &mut Command) -> Result<Output> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command
        .output()
        .with_context(|| format!("cannot run {program}; scripts/setup installs what is needed"))?;
    ensure!(output.status.success(), "{program} failed: {}", text(&output));
    Ok(output)
}

fn text(output: &Output) -> String {
    let both = [output.stdout.as_slice(), output.stderr.as_slice()].concat();
    String::from_utf8_lossy(&both).trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::unix::fs::FileExt;

    fn with_ledger(content: &str) -> Result<(Disk, tempfile::TempDir)> {
        let dir = tempfile::tempdir()?;
        let disk = Disk::create(dir.path().join("disk"), 8 << 20)?;
        let mut file = tempfile::NamedTempFile::new()?;
        file.write_all(content.as_bytes())?;
        let write = format!("write {} ledger", file.path().display());
        run(sbin("debugfs").args(["-w", "-R", &write]).arg(disk.path()))?;
        Ok((disk, dir))
    }

    #[test]
    fn a_ledger_is_read_back() -> Result<()> {
        let (disk, _dir) = with_ledger("1 a\n2 b\n")?;
        disk.check()?;
        assert_eq!(disk.ledger()?.texts, ["a", "b"]);
        Ok(())
    }

    #[test]
    fn no_ledger_and_a_damaged_disk_are_errors() -> Result<()> {
        let dir = tempfile::tempdir()?;
        let disk = Disk::create(dir.path().join("disk"), 8 << 20)?;
        assert!(disk.ledger().is_err());
        // Garbage over bitmaps and inodes, beyond superblock and group descriptors.
        let image = std::fs::File::options().write(true).open(disk.path())?;
        image.write_all_at(&[0x5a; 256 << 10], 32 << 10)?;
        assert!(disk.check().is_err());
        Ok(())
    }
}
