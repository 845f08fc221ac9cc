//! Signatures of the blocks of a large file while its pieces arrive, in any order.

use crate::model::ids::Signature;
use std::collections::BTreeMap;

/// A large file whose pieces arrive.
pub(super) struct Building {
    pub(super) blocks: Blocks,
    /// Made in this epoch: everything not written is a hole already.
    pub(super) fresh: bool,
}

/// Signatures of the blocks of a file that arrived, by chunks: they take memory by how many these are (half a KiB each
/// at most), and not by where in the file a peer says that they belong.
#[derive(Default)]
pub(super) struct Blocks(BTreeMap<u64, Box<[Option<Signature>]>>);

/// Blocks of a chunk.
const CHUNK: u64 = 16;

impl Blocks {
    pub(super) fn get(&self, index: u64) -> Option<Signature> {
        *self
            .0
            .get(&(index / CHUNK))?
            .get((index % CHUNK) as usize)?
    }

    pub(super) fn set(&mut self, index: u64, signature: Signature) {
        let empty = || vec![None; CHUNK as usize].into();
        let chunk = self.0.entry(index / CHUNK).or_insert_with(empty);
        chunk[(index % CHUNK) as usize] = Some(signature);
    }

    /// The first `count` of them; none when one is missing.
    pub(super) fn whole(mut self, count: u64) -> Option<Vec<Signature>> {
        let mut whole = Vec::new();
        for first in (0..count).step_by(CHUNK as usize) {
            let chunk = self.0.remove(&(first / CHUNK))?;
            let blocks = chunk.iter().take((count - first).min(CHUNK) as usize);
            for block in blocks {
                whole.push((*block)?);
            }
        }
        Some(whole)
    }
}

impl FromIterator<Signature> for Blocks {
    fn from_iter<T: IntoIterator<Item = Signature>>(signatures: T) -> Self {
        let mut blocks = Self::default();
        for (index, signature) in (0..).zip(signatures) {
            blocks.set(index, signature);
        }
        blocks
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_of_a_file_are_whole_when_each_is_there() {
        let named = |index: u64| Signature([index as u8; 32]);
        for count in [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK] {
            let all = || (0..count).map(named).collect::<Blocks>();
            let whole: Vec<Signature> = (0..count).map(named).collect();
            assert_eq!(all().whole(count), Some(whole.clone()));
            assert_eq!(all().whole(count + 1), None);
            for shorter in [count / 2, count.saturating_sub(1)] {
                let first = whole[..shorter as usize].to_vec();
                assert_eq!(all().whole(shorter), Some(first));
            }
        }
        let mut blocks = Blocks::default();
        blocks.set(1, named(1));
        assert_eq!((blocks.get(1), blocks.get(0)), (Some(named(1)), None));
        assert_eq!(blocks.whole(2), None);
    }
}
