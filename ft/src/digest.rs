//! Digests: hashes of a guest's state at an agreed point, compared between the two sides.
//!
//! A digest has named components (the registers, each device, the memory written since the last
//! digest) so that a difference is reported with the part that differs. A backup whose digest differs
//! must never go live.

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use crate::bytes;

/// Hashes of the parts of a machine, in an order that both sides share.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Digest {
    /// The parts.
    #[serde(deserialize_with = "bytes::bounded::deserialize")]
    pub components: Vec<Component>,
}

/// One part of a machine and its hash.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Component {
    /// What it is, as shown to an operator: `cpu`, `disk0`, `memory`.
    pub name: String,
    /// XXH3-64 of its bytes.
    pub hash: u64,
}

/// The first difference between two digests.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unequal {
    /// The component's name.
    pub component: String,
    /// The primary's hash; `None` if the primary has no such component.
    pub primary: Option<u64>,
    /// The backup's hash; `None` if the backup has no such component.
    pub backup: Option<u64>,
}

impl Digest {
    /// Adds a component by its bytes.
    pub fn add(&mut self, name: impl Into<String>, bytes: &[u8]) {
        self.add_hash(name, xxh3_64(bytes));
    }

    /// Adds a component that was hashed before.
    pub fn add_hash(&mut self, name: impl Into<String>, hash: u64) {
        self.components.push(Component { name: name.into(), hash });
    }

    /// Compares the primary's digest (`self`) with the backup's, in the primary's order.
    pub fn first_unequal(&self, backup: &Digest) -> Option<Unequal> {
        let mut theirs = backup.components.iter();
        for ours in &self.components {
            match theirs.next() {
                Some(other) if other == ours => {}
                Some(other) if other.name == ours.name => {
                    return Some(Unequal {
                        component: ours.name.clone(),
                        primary: Some(ours.hash),
                        backup: Some(other.hash),
                    });
                }
                _ => {
                    return Some(Unequal {
                        component: ours.name.clone(),
                        primary: Some(ours.hash),
                        backup: None,
                    });
                }
            }
        }
        theirs.next().map(|extra| Unequal {
            component: extra.name.clone(),
            primary: None,
            backup: Some(extra.hash),
        })
    }
}

/// Hashes memory pages as a stream of (page number, contents). Both sides must add the same pages in
/// the same order: ascending.
pub struct PageHasher {
    hasher: Xxh3,
    pages: u64,
}

impl PageHasher {
    /// No pages yet.
    pub fn new() -> Self {
        Self { hasher: Xxh3::new(), pages: 0 }
    }

    /// Adds a page. `number` is its guest-physical address divided by its size.
    pub fn add(&mut self, number: u64, contents: &[u8]) {
        self.hasher.update(&number.to_le_bytes());
        self.hasher.update(contents);
        self.pages += 1;
    }

    /// Pages added.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// The hash over all pages added.
    pub fn finish(&self) -> u64 {
        self.hasher.digest()
    }
}

impl Default for PageHasher {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest(parts: &[(&str, &[u8])]) -> Digest {
        let mut digest = Digest::default();
        for (name, bytes) in parts {
            digest.add(*name, bytes);
        }
        digest
    }

    #[test]
    fn the_first_difference_is_named() {
        let primary = digest(&[("cpu", b"1"), ("disk0", b"2"), ("memory", b"3")]);
        let backup = digest(&[("cpu", b"1"), ("disk0", b"x"), ("memory", b"y")]);
        let unequal = primary.first_unequal(&backup).expect("they differ");
        assert_eq!(unequal.component, "disk0");
        assert_ne!(unequal.primary, unequal.backup);
        assert_eq!(primary.first_unequal(&primary), None);
    }

    #[test]
    fn a_part_that_only_one_side_has_is_a_difference() {
        let more = digest(&[("cpu", b"1"), ("disk0", b"2")]);
        let less = digest(&[("cpu", b"1")]);
        let unequal = more.first_unequal(&less).expect("they differ");
        assert_eq!((unequal.component.as_str(), unequal.backup), ("disk0", None));
        let unequal = less.first_unequal(&more).expect("they differ");
        assert_eq!((unequal.component.as_str(), unequal.primary), ("disk0", None));
    }

    #[test]
    fn pages_count_with_their_numbers() {
        let hash = |pages: &[(u64, u8)]| {
            let mut hasher = PageHasher::new();
            for (number, fill) in pages {
                hasher.add(*number, &[*fill; 4096]);
            }
            assert_eq!(hasher.pages(), pages.len() as u64);
            hasher.finish()
        };
        assert_eq!(hash(&[(1, 7), (2, 8)]), hash(&[(1, 7), (2, 8)]));
        assert_ne!(hash(&[(1, 7), (2, 8)]), hash(&[(1, 7), (3, 8)]));
        assert_ne!(hash(&[(1, 7), (2, 8)]), hash(&[(1, 8), (2, 7)]));
        assert_ne!(hash(&[]), hash(&[(0, 0)]));
    }
}
