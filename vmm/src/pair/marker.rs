//! A file beside each image of a mirrored disk, which says that the image alone does not tell what the VM has done.
//!
//! With shared disks the lock on the image keeps a dead primary's command line from starting the VM a second time. A mirrored
//! image on a dead host is locked by nobody, and may be older than what the other side has made of the VM since; and one
//! that is being made a copy is nobody's disk at all. So an image with this file beside it is not booted from.
//!
//! What must hold: it is there, for good, before the other side can go live without this one, and goes only when this side
//! has become the one that lives.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use ft::{Generation, PairId};

use crate::config::VmConfig;

/// What the image is to its VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// The VM ran here, protected.
    Primary,
    /// The image is, or was being made, a copy.
    Backup,
}

/// Why a VM is not booted.
#[derive(Debug, thiserror::Error)]
#[error(
    "disk image {} is one of a mirrored pair, and the VM may be live, or newer, on the other host; {text}. If it is not, \
     and this image is to count, remove {} and boot again", image.display(), marker.display()
)]
pub struct Marked {
    image: PathBuf,
    marker: PathBuf,
    text: String,
}

/// The file beside `image`, which is the same by whatever path or symbolic link the image is named.
fn path(image: &Path) -> PathBuf {
    let mut name = fs::canonicalize(image).unwrap_or_else(|_| absent(image)).into_os_string();
    name.push(".dyad-mirror");
    name.into()
}

/// Where an image that is not there would be.
fn absent(image: &Path) -> PathBuf {
    match (fs::canonicalize(directory(image)), image.file_name()) {
        (Ok(parent), Some(name)) => parent.join(name),
        // Nothing can be there, and nothing beside it.
        (Err(_), _) | (_, None) => image.to_owned(),
    }
}

/// Where a file is.
fn directory(file: &Path) -> &Path {
    let parent = file.parent().filter(|parent| !parent.as_os_str().is_empty());
    parent.unwrap_or(Path::new("."))
}

/// The images of `config` that a guest writes to.
fn images(config: &VmConfig) -> impl Iterator<Item = &Path> {
    config.disks().iter().filter(|disk| !disk.readonly).filter_map(|disk| disk.path.as_deref())
}

/// Whether the images of `config`, those that are there, can be a mirrored pair's. What lies beside a device node says
/// nothing of the device: it has other nodes, and the directory is gone with the host's next start.
///
/// # Errors
/// With the first disk whose image is no regular file.
pub fn check_kinds(config: &VmConfig) -> Result<(), String> {
    for image in images(config) {
        let found = match fs::metadata(image) {
            Ok(found) => found,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(format!("disk image {}: {error}", image.display())),
        };
        if !found.is_file() {
            return Err(format!(
                "disk_mode=mirrored needs images that are regular files, and disk image {} is none",
                image.display()
            ));
        }
    }
    Ok(())
}

/// Marks the images of `config`.
///
/// # Errors
/// If a file cannot be written for good.
pub fn set(
    config: &VmConfig,
    part: Part,
    pair: &PairId,
    generation: Generation,
) -> Result<(), String> {
    let text = match part {
        Part::Primary => "it was the primary's",
        Part::Backup => "it was the backup's, and is only complete if the VM was protected then",
    };
    for image in images(config) {
        let marker = path(image);
        let text = format!("{text}; pair {pair}, generation {}\n", generation.0);
        let write = || -> io::Result<()> {
            let mut file = File::create(&marker)?;
            file.write_all(text.as_bytes())?;
            file.sync_all()?;
            sync_directory(&marker)
        };
        write().map_err(|error| format!("cannot write {}: {error}", marker.display()))?;
    }
    Ok(())
}

/// This side's VM is the one that lives: its images tell all.
pub fn clear(config: &VmConfig) {
    for image in images(config) {
        let marker = path(image);
        match fs::remove_file(&marker) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => log::warn!("cannot remove {}: {error}", marker.display()),
        }
    }
}

/// Whether the images of `config` may be booted from.
///
/// # Errors
/// With the first that may not.
pub fn check(config: &VmConfig) -> Result<(), Marked> {
    for image in images(config) {
        let marker = path(image);
        match fs::read_to_string(&marker) {
            Ok(text) => {
                let (image, text) = (image.to_owned(), text.trim_end().to_owned());
                return Err(Marked { image, marker, text });
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => {
                let (image, text) = (image.to_owned(), format!("it cannot be read: {error}"));
                return Err(Marked { image, marker, text });
            }
        }
    }
    Ok(())
}

fn sync_directory(file: &Path) -> io::Result<()> {
    File::open(directory(file))?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::DiskConfig;

    fn config(paths: &[&Path]) -> VmConfig {
        let disk =
            |path: &&Path| DiskConfig { path: Some(path.to_path_buf()), ..DiskConfig::default() };
        VmConfig { disks: Some(paths.iter().map(disk).collect()), ..VmConfig::default() }
    }

    #[test]
    fn a_marked_image_is_known_by_each_of_its_names() {
        let directory = tempfile::tempdir().unwrap();
        let (images, links) = (directory.path().join("images"), directory.path().join("links"));
        fs::create_dir(&images).unwrap();
        fs::create_dir(&links).unwrap();
        let (image, link) = (images.join("a"), links.join("b"));
        fs::write(&image, b"").unwrap();
        std::os::unix::fs::symlink(&image, &link).unwrap();
        let by_directory = links.join("../images/a");
        let pair = PairId::new("vm-1").unwrap();
        for name in [&image, &link, &by_directory] {
            set(&config(&[name]), Part::Backup, &pair, Generation(7)).unwrap();
            for other in [&image, &link, &by_directory] {
                check(&config(&[other])).unwrap_err();
            }
            assert!(images.join("a.dyad-mirror").exists());
            assert!(!links.join("b.dyad-mirror").exists());
            clear(&config(&[&link]));
            check(&config(&[&image])).unwrap();
        }
        // One that is not there any more has its file all the same.
        set(&config(&[&image]), Part::Backup, &pair, Generation(7)).unwrap();
        fs::remove_file(&image).unwrap();
        check(&config(&[&by_directory])).unwrap_err();
    }

    #[test]
    fn what_is_no_file_is_no_image_of_a_pair() {
        let directory = tempfile::tempdir().unwrap();
        let image = directory.path().join("a");
        check_kinds(&config(&[&image])).unwrap();
        fs::write(&image, b"").unwrap();
        check_kinds(&config(&[&image])).unwrap();
        let refused = check_kinds(&config(&[&image, Path::new("/dev/null")])).unwrap_err();
        assert!(refused.contains("/dev/null") && refused.contains("regular"), "{refused}");
    }

    #[test]
    fn a_marked_image_is_not_booted_from_until_the_mark_is_gone() {
        let directory = tempfile::tempdir().unwrap();
        let disk = |name: &str, readonly| DiskConfig {
            path: Some(directory.path().join(name)),
            readonly,
            ..DiskConfig::default()
        };
        let disks = vec![disk("a", false), disk("b", true)];
        let config = VmConfig { disks: Some(disks), ..VmConfig::default() };
        let pair = PairId::new("vm-1").unwrap();
        check(&config).unwrap();
        set(&config, Part::Backup, &pair, Generation(7)).unwrap();
        set(&config, Part::Primary, &pair, Generation(8)).unwrap();
        let refused = check(&config).unwrap_err().to_string();
        for word in ["a.dyad-mirror", "primary", "vm-1", "generation 8"] {
            assert!(refused.contains(word), "{word}: {refused}");
        }
        assert!(!directory.path().join("b.dyad-mirror").exists());
        clear(&config);
        clear(&config);
        check(&config).unwrap();
        fs::create_dir(directory.path().join("a.dyad-mirror")).unwrap();
        check(&config).unwrap_err();
        set(&config, Part::Primary, &pair, Generation(8)).unwrap_err();
    }
}
