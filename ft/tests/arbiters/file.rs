//! `file:DIR`.

use std::fs;
use std::path::{Path, PathBuf};

use ft::{Claim, Generation};

use super::suite::Place;
use super::{announced, arbiter, pair, text};

/// A directory that can be renamed away.
struct Shared {
    parent: tempfile::TempDir,
}

impl Shared {
    fn new() -> Self {
        let parent = tempfile::tempdir().expect("a directory");
        fs::create_dir(parent.path().join("shared")).expect("made");
        Self { parent }
    }

    fn path(&self) -> PathBuf {
        self.parent.path().join("shared")
    }

    fn away(&self) -> PathBuf {
        self.parent.path().join("away")
    }
}

impl Place for Shared {
    fn url(&self) -> String {
        format!("file:{}", self.path().display())
    }

    fn take_away(&mut self) {
        fs::rename(self.path(), self.away()).expect("moved");
    }

    fn bring_back(&mut self) {
        fs::rename(self.away(), self.path()).expect("moved");
    }
}

crate::arbiter_suite!(|_| Some(Shared::new()));

fn names(path: &Path) -> Vec<String> {
    let entries = fs::read_dir(path).expect("readable");
    let mut names: Vec<_> = entries
        .map(|entry| entry.expect("readable").file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

#[test]
fn nothing_but_announcement_and_claim_is_left() {
    let shared = Shared::new();
    let arbiter = announced(&shared.url(), 1);
    arbiter.verify(&pair(), Generation(1), "b").expect("seen");
    for who in ["a", "b", "a"] {
        arbiter.claim(&pair(), Generation(1), who).expect("reachable");
    }
    assert_eq!(names(&shared.path()), ["vm-1.1.claim", "vm-1.1.open"]);
}

#[test]
fn a_claimant_that_died_before_the_answer_has_won() {
    let shared = Shared::new();
    let arbiter = announced(&shared.url(), 1);
    // What a crash between the two leaves behind: the claim, and the file it was linked from.
    let own = shared.path().join(".vm-1.1.claim.123.0");
    fs::write(&own, "dead\n").expect("written");
    fs::hard_link(&own, shared.path().join("vm-1.1.claim")).expect("linked");
    let claim = |who| arbiter.claim(&pair(), Generation(1), who).expect("reachable");
    assert_eq!(claim("other"), Claim::Lost { by: "dead".into() });
    assert_eq!(claim("dead"), Claim::Won);
}

#[test]
fn a_claimant_that_died_before_the_link_has_not() {
    let shared = Shared::new();
    let arbiter = announced(&shared.url(), 1);
    for left in ["", "de", "dead\n"] {
        fs::write(shared.path().join(".vm-1.1.claim.123.0"), left).expect("written");
    }
    let claim = arbiter.claim(&pair(), Generation(1), "other").expect("reachable");
    assert_eq!(claim, Claim::Won);
}

#[test]
fn a_claim_that_lost_its_contents_decides_nothing() {
    let shared = Shared::new();
    let arbiter = announced(&shared.url(), 1);
    let claim = shared.path().join("vm-1.1.claim");
    // "host-a" may have been "host-ab".
    for torn in ["", "host-a", "\n"] {
        fs::write(&claim, torn).expect("written");
        for who in ["host-a", "host-ab"] {
            let error = arbiter.claim(&pair(), Generation(1), who).expect_err("nobody knows");
            assert!(text(error).contains("vm-1.1.claim"));
        }
    }
    fs::write(&claim, "host-ab\n").expect("repaired by hand");
    let answer = arbiter.claim(&pair(), Generation(1), "host-ab").expect("readable");
    assert_eq!(answer, Claim::Won);
}

#[test]
fn the_directory_under_a_file_system_that_is_not_mounted_decides_nothing() {
    let mut shared = Shared::new();
    let arbiter = announced(&shared.url(), 1);
    shared.take_away();
    fs::create_dir(shared.path()).expect("made");
    let error = arbiter.claim(&pair(), Generation(1), "a").expect_err("another directory");
    assert!(text(error).contains("was not announced"));
    arbiter.verify(&pair(), Generation(1), "a").expect_err("another directory");
    assert!(names(&shared.path()).is_empty(), "nothing was written to it");
    fs::remove_dir(shared.path()).expect("empty");
    shared.bring_back();
    assert_eq!(arbiter.claim(&pair(), Generation(1), "b").expect("back"), Claim::Won);
    assert_eq!(
        arbiter.claim(&pair(), Generation(1), "a").expect("back"),
        Claim::Lost { by: "b".into() }
    );
}

#[test]
fn what_is_no_directory_or_cannot_be_written_says_so() {
    let shared = Shared::new();
    let file = shared.path().join("file");
    fs::write(&file, "").expect("written");
    for path in [Path::new("/no/such/dir"), &file] {
        let arbiter = arbiter(&format!("file:{}", path.display()));
        let error = arbiter.announce(&pair(), Generation(1), "a").expect_err("no directory");
        assert!(text(error).contains(&path.display().to_string()));
    }
    // Takes no files from anybody, root included.
    let error = arbiter("file:/proc").announce(&pair(), Generation(1), "a").expect_err("refused");
    assert!(text(error).contains("cannot create"));
}
