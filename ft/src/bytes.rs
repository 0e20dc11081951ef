//! How byte strings travel: as one length and the raw bytes, not as a sequence of numbers (which
//! would cost a call per byte), and in bounded numbers, since the decoder reads what a peer sent.

use std::fmt;

use serde::de::{Error as _, SeqAccess, Visitor};
use serde::ser::SerializeSeq;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// The most byte strings or named parts one record may hold. An empty string costs one byte on the
/// wire and 24 in memory; the bound keeps a hostile peer from using that.
pub const MAX_PARTS: usize = 4096;

struct Raw<'a>(&'a [u8]);

impl Serialize for Raw<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(self.0)
    }
}

struct Owned(Vec<u8>);

impl<'de> Deserialize<'de> for Owned {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Bytes;
        impl Visitor<'_> for Bytes {
            type Value = Owned;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("bytes")
            }
            fn visit_bytes<E>(self, bytes: &[u8]) -> Result<Owned, E> {
                Ok(Owned(bytes.to_vec()))
            }
            fn visit_byte_buf<E>(self, bytes: Vec<u8>) -> Result<Owned, E> {
                Ok(Owned(bytes))
            }
        }
        deserializer.deserialize_byte_buf(Bytes)
    }
}

/// `#[serde(with = "bytes::one")]` for a `Vec<u8>`.
pub mod one {
    use super::*;

    /// Writes the bytes whole.
    pub fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(bytes)
    }

    /// Reads the bytes whole.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
        Ok(Owned::deserialize(deserializer)?.0)
    }
}

/// `#[serde(with = "bytes::many")]` for a `Vec<Vec<u8>>` of at most [`MAX_PARTS`].
pub mod many {
    use super::*;

    /// Writes each byte string whole.
    pub fn serialize<S: Serializer>(parts: &[Vec<u8>], serializer: S) -> Result<S::Ok, S::Error> {
        let mut sequence = serializer.serialize_seq(Some(parts.len()))?;
        for part in parts {
            sequence.serialize_element(&Raw(part))?;
        }
        sequence.end()
    }

    /// Reads at most [`MAX_PARTS`] byte strings.
    pub fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Vec<Vec<u8>>, D::Error> {
        let parts: Vec<Owned> = bounded::deserialize(deserializer)?;
        Ok(parts.into_iter().map(|part| part.0).collect())
    }
}

/// `#[serde(deserialize_with = "bytes::bounded::deserialize")]` for a `Vec` of at most [`MAX_PARTS`].
pub mod bounded {
    use super::*;

    /// Reads at most [`MAX_PARTS`] elements.
    pub fn deserialize<'de, D, T>(deserializer: D) -> Result<Vec<T>, D::Error>
    where
        D: Deserializer<'de>,
        T: Deserialize<'de>,
    {
        at_most::<MAX_PARTS, D, T>(deserializer)
    }

    /// Reads at most `MAX` elements.
    pub fn at_most<'de, const MAX: usize, D, T>(deserializer: D) -> Result<Vec<T>, D::Error>
    where
        D: Deserializer<'de>,
        T: Deserialize<'de>,
    {
        struct Parts<const MAX: usize, T>(std::marker::PhantomData<T>);
        impl<'de, const MAX: usize, T: Deserialize<'de>> Visitor<'de> for Parts<MAX, T> {
            type Value = Vec<T>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "at most {MAX} parts")
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut sequence: A) -> Result<Vec<T>, A::Error> {
                let mut parts = Vec::new();
                while let Some(part) = sequence.next_element()? {
                    if parts.len() == MAX {
                        return Err(A::Error::custom("too many parts"));
                    }
                    parts.push(part);
                }
                Ok(parts)
            }
        }
        deserializer.deserialize_seq(Parts::<MAX, T>(std::marker::PhantomData))
    }
}
