//! A set of interrupt vectors: the shape of IRR, ISR and TMR.

use serde::{Deserialize, Serialize};

/// 256 bits, laid out as the eight 32-bit registers in which the LAPIC shows them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VectorSet([u32; 8]);

impl VectorSet {
    /// Adds `vector`.
    pub fn insert(&mut self, vector: u8) {
        self.0[usize::from(vector >> 5)] |= 1 << (vector & 31);
    }

    /// Removes `vector`.
    pub fn remove(&mut self, vector: u8) {
        self.0[usize::from(vector >> 5)] &= !(1 << (vector & 31));
    }

    /// Whether `vector` is in the set.
    #[must_use]
    pub fn contains(&self, vector: u8) -> bool {
        self.0[usize::from(vector >> 5)] & (1 << (vector & 31)) != 0
    }

    /// The highest vector, which is the one of highest priority.
    #[must_use]
    pub fn highest(&self) -> Option<u8> {
        (0u8..8).rev().zip(self.0.iter().rev()).find(|(_, word)| **word != 0).map(
            |(index, word)| {
                // A non-zero word has a highest bit below 32, so the sum stays below 256.
                index * 32 + word.ilog2() as u8
            },
        )
    }

    /// The register holding vectors `32 * index` to `32 * index + 31`; `index` is taken modulo 8.
    #[must_use]
    pub fn word(&self, index: usize) -> u32 {
        self.0[index & 7]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_highest_vector_is_found_in_every_word() {
        let mut set = VectorSet::default();
        assert_eq!(set.highest(), None);
        for vector in [0u8, 31, 32, 95, 128, 254, 255] {
            set.insert(vector);
            assert_eq!(set.highest(), Some(vector));
            assert!(set.contains(vector));
        }
        set.remove(255);
        assert_eq!(set.highest(), Some(254));
        assert_eq!(set.word(7), 1 << 30);
    }
}
