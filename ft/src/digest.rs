//! Digests: hashes of a guest's state at an agreed point, compared between the two sides.
//!
//! A digest has named components (groups of registers, each device, the memory written since the last
//! digest) so that a difference is reported with the part that differs. A backup whose digest differs
//! must never go live.
//!
//! Memory is one component, for the log must stay small. Each side remembers the hash of each page for a
//! while ([`PageHashes`]); when memory differs, the backup's list comes with its report, and the primary finds
//! the first page that is not the same.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use crate::bytes;

/// The component of the pages written since the last digest.
pub const MEMORY: &str = "memory";

/// The most pages that are listed of one digest: 256 MiB, more than a guest writes from one to the next. A
/// difference behind the last is found, but not its page.
pub const MAX_LISTED_PAGES: usize = 1 << 16;

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
    /// What it is, as shown to an operator: `cpu.rip`, `disk0`, [`MEMORY`].
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
    /// Where it is memory: the first page that differs, or that only one side has written. Known to the
    /// primary.
    pub page: Option<PageNumber>,
}

impl fmt::Display for Unequal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.component)?;
        match self.page {
            Some(page) => write!(f, " (page {page})"),
            None => Ok(()),
        }
    }
}

/// The number of a guest page: its guest-physical address divided by its size. Shown in hexadecimal, as
/// addresses are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PageNumber(pub u64);

impl fmt::Display for PageNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl Serialize for PageNumber {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match serializer.is_human_readable() {
            true => serializer.collect_str(self),
            false => self.0.serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for PageNumber {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        if !deserializer.is_human_readable() {
            return u64::deserialize(deserializer).map(Self);
        }
        let text = String::deserialize(deserializer)?;
        let number = text.strip_prefix("0x").and_then(|hex| u64::from_str_radix(hex, 16).ok());
        number.map(Self).ok_or_else(|| serde::de::Error::custom("a page number is not 0x..."))
    }
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
                        page: None,
                    });
                }
                _ => {
                    return Some(Unequal {
                        component: ours.name.clone(),
                        primary: Some(ours.hash),
                        backup: None,
                        page: None,
                    });
                }
            }
        }
        theirs.next().map(|extra| Unequal {
            component: extra.name.clone(),
            primary: None,
            backup: Some(extra.hash),
            page: None,
        })
    }
}

/// The pages of one digest, each with a hash; see [`MAX_LISTED_PAGES`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PageHashes {
    /// Page number and hash, in the order in which they were added.
    #[serde(deserialize_with = "listed_pages")]
    pages: Vec<(u64, u32)>,
}

fn listed_pages<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<(u64, u32)>, D::Error> {
    bytes::bounded::at_most::<MAX_LISTED_PAGES, D, _>(deserializer)
}

impl PageHashes {
    /// How many are listed.
    pub fn len(&self) -> usize {
        self.pages.len()
    }

    /// Whether none is.
    pub fn is_empty(&self) -> bool {
        self.pages.is_empty()
    }

    /// The first page that is not the same in both, or that only one has. Any list may be given for
    /// `other`: it comes from a peer.
    pub fn first_unequal(&self, other: &PageHashes) -> Option<PageNumber> {
        let (mut ours, mut theirs) = (self.pages.iter(), other.pages.iter());
        loop {
            return match (ours.next(), theirs.next()) {
                (Some(our), Some(their)) if our == their => continue,
                (Some(our), Some(their)) => Some(PageNumber(our.0.min(their.0))),
                (Some(only), None) | (None, Some(only)) => Some(PageNumber(only.0)),
                (None, None) => None,
            };
        }
    }
}

/// Hashes memory pages as a stream of (page number, contents). Both sides must add the same pages in
/// the same order: ascending.
pub struct PageHasher {
    hasher: Xxh3,
    pages: u64,
    listed: PageHashes,
}

impl PageHasher {
    /// No pages yet.
    pub fn new() -> Self {
        Self { hasher: Xxh3::new(), pages: 0, listed: PageHashes::default() }
    }

    /// Adds a page. `number` is its guest-physical address divided by its size.
    pub fn add(&mut self, number: u64, contents: &[u8]) {
        let hash = xxh3_64(contents);
        self.hasher.update(&number.to_le_bytes());
        self.hasher.update(&hash.to_le_bytes());
        self.pages += 1;
        if self.listed.len() < MAX_LISTED_PAGES {
            self.listed.pages.push((number, hash as u32));
        }
    }

    /// Pages added.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// The hash over all pages added.
    pub fn finish(&self) -> u64 {
        self.hasher.digest()
    }

    /// The pages one by one.
    pub fn into_list(self) -> PageHashes {
        self.listed
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

    #[test]
    fn the_first_page_that_differs_is_found() {
        let list = |pages: &[(u64, u8)]| {
            let mut hasher = PageHasher::new();
            for (number, fill) in pages {
                hasher.add(*number, &[*fill; 4096]);
            }
            hasher.into_list()
        };
        let ours = list(&[(1, 7), (5, 8), (9, 8)]);
        for (theirs, page) in [
            (list(&[(1, 7), (5, 8), (9, 8)]), None),
            (list(&[(1, 7), (5, 9), (9, 9)]), Some(5)),
            (list(&[(1, 7), (3, 8), (5, 8), (9, 8)]), Some(3)),
            (list(&[(1, 7), (9, 8)]), Some(5)),
            (list(&[(1, 7), (5, 8)]), Some(9)),
            (list(&[]), Some(1)),
        ] {
            assert_eq!(ours.first_unequal(&theirs), page.map(PageNumber));
            assert_eq!(theirs.first_unequal(&ours), page.map(PageNumber));
        }
    }

    #[test]
    fn no_list_grows_without_bound() {
        let mut hasher = PageHasher::new();
        for number in 0..MAX_LISTED_PAGES as u64 + 10 {
            hasher.add(number, &[]);
        }
        let list = hasher.into_list();
        assert_eq!(list.len(), MAX_LISTED_PAGES);
        let bytes = postcard::to_stdvec(&list).expect("encodes");
        assert!(bytes.len() < crate::message::MAX_CHUNK_BYTES);
        assert_eq!(postcard::from_bytes(&bytes), Ok(list.clone()));
        let longer = PageHashes { pages: vec![(0, 0); MAX_LISTED_PAGES + 1] };
        let bytes = postcard::to_stdvec(&longer).expect("encodes");
        assert!(postcard::from_bytes::<PageHashes>(&bytes).is_err());
    }

    #[test]
    fn pages_are_shown_as_addresses_are() {
        let mut unequal = digest(&[(MEMORY, b"1")]).first_unequal(&digest(&[(MEMORY, b"2")]));
        unequal.as_mut().expect("they differ").page = Some(PageNumber(0x1a2b));
        let unequal = unequal.expect("they differ");
        assert_eq!(unequal.to_string(), "memory (page 0x1a2b)");
        let bytes = postcard::to_stdvec(&unequal).expect("encodes");
        assert_eq!(postcard::from_bytes(&bytes), Ok(unequal));
    }
}
