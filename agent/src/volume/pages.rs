//! Which pages of a block changed, so that a block of which a page was written anew does not travel whole.
//!
//! Each block has [`PAGES`] pages. Invariant: a mark is a hint and no proof. Who puts a block together from its pages
//! before and those that changed checks the signature of the whole. Non-goal: blocks that are shorter than others.

use super::sign::FleetKey;
use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use twox_hash::XxHash3_64;

/// Pages of a block, whatever its size.
pub const PAGES: usize = 16;
/// Blocks that are kept together.
const CHUNK: usize = 16;
/// Chunks of a KiB that are kept of a volume: those of all blocks of 512 GiB.
pub const CHUNKS_CAP: usize = 1 << 15;

/// A bit for each page of a block, the lowest for the first.
pub type Pages = u16;

/// Marks of the pages of one block.
pub type Marks = [u32; PAGES];

/// Stands for marks that nobody knows; that a block has these is as unlikely as that it has another's signature.
const UNKNOWN: Marks = [0; PAGES];

/// Makes marks. They depend on the fleet's key, so that nobody writes pages whose marks are the same on purpose.
#[derive(Clone, Copy)]
pub struct Marker {
    seed: u64,
}

impl std::fmt::Debug for Marker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Marker(…)")
    }
}

impl Marker {
    /// For the volumes of a fleet.
    #[must_use]
    pub fn new(key: &FleetKey) -> Self {
        let mut seed = [0; 8];
        let mut hasher = blake3::Hasher::new_keyed(&key.0);
        hasher.update(b"lifeboat marks of pages 1");
        hasher.finalize_xof().fill(&mut seed);
        Self {
            seed: u64::from_le_bytes(seed),
        }
    }

    /// Marks of the pages of a whole block.
    #[must_use]
    pub fn marks(self, block: &[u8]) -> Marks {
        let mut marks = UNKNOWN;
        let pages = block.chunks_exact(block.len().max(PAGES) / PAGES);
        for (mark, page) in marks.iter_mut().zip(pages) {
            // The lower half is as good as the upper.
            *mark = XxHash3_64::oneshot_with_seed(self.seed, page) as u32;
        }
        marks
    }
}

/// Marks of the blocks of one file. A copy shares what did not change since.
#[derive(Clone, Debug, Default)]
pub struct FileMarks {
    chunks: Vec<Option<Arc<[Marks; CHUNK]>>>,
    kept: usize,
}

/// The same of the large files of a volume, by path.
pub type VolumeMarks = HashMap<Box<[u8]>, Arc<FileMarks>>;

impl FileMarks {
    /// Those of a block; none: not known.
    #[must_use]
    pub fn get(&self, block: u64) -> Option<&Marks> {
        let block = usize::try_from(block).ok()?;
        let chunk = self.chunks.get(block / CHUNK)?.as_ref()?;
        Some(&chunk[block % CHUNK]).filter(|marks| **marks != UNKNOWN)
    }

    /// Notes those of a block, if there is room.
    pub fn set(&mut self, block: u64, marks: Option<Marks>) {
        let Ok(block) = usize::try_from(block) else {
            return;
        };
        let at = block / CHUNK;
        let known = self.chunks.get(at).is_some_and(Option::is_some);
        if !known && (marks.is_none() || self.kept == CHUNKS_CAP) {
            return;
        }
        if self.chunks.len() <= at {
            self.chunks.resize(at + 1, None);
        }
        if !known {
            self.kept += 1;
        }
        let chunk = self.chunks[at].get_or_insert_with(|| Arc::new([UNKNOWN; CHUNK]));
        Arc::make_mut(chunk)[block % CHUNK] = marks.unwrap_or(UNKNOWN);
    }

    /// Forgets those of all blocks from this one on, and perhaps of some before it.
    pub fn truncate(&mut self, blocks: u64) {
        let chunks = usize::try_from(blocks).unwrap_or(usize::MAX) / CHUNK;
        for cut in self.chunks.drain(chunks.min(self.chunks.len())..) {
            self.kept -= usize::from(cut.is_some());
        }
    }

    /// Chunks that it takes memory for.
    #[must_use]
    pub fn chunks(&self) -> usize {
        self.kept
    }
}

/// Pages of a block whose marks differ.
#[must_use]
pub fn changed(before: &Marks, now: &Marks) -> Pages {
    let pairs = before.iter().zip(now).zip(0..);
    pairs.fold(0, |pages, ((before, now), page)| {
        pages | Pages::from(before != now) << page
    })
}

/// Where pages lie in a block of `length` bytes, those that follow each other as one.
pub fn ranges(pages: Pages, length: usize) -> impl Iterator<Item = Range<usize>> {
    let (mut left, mut at, page) = (u32::from(pages), 0, length / PAGES);
    std::iter::from_fn(move || {
        if left == 0 {
            return None;
        }
        let skipped = left.trailing_zeros();
        let count = (left >> skipped).trailing_ones();
        let start = at + skipped as usize;
        at = start + count as usize;
        // At most by the bits of pages.
        left >>= skipped + count;
        Some(start * page..at * page)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const BLOCK: usize = 64 << 10;

    #[test]
    fn a_byte_anywhere_changes_the_mark_of_its_page_alone() {
        let marker = Marker::new(&FleetKey([1; 32]));
        let mut block = vec![7; BLOCK];
        let before = marker.marks(&block);
        for at in [0, 1, 4095, 4096, 30_000, BLOCK - 1] {
            block[at] ^= 1;
            let now = marker.marks(&block);
            assert_eq!(changed(&before, &now), 1 << (at / (BLOCK / PAGES)), "{at}");
            block[at] ^= 1;
        }
        let other = Marker::new(&FleetKey([2; 32]));
        assert_eq!(changed(&before, &other.marks(&block)), Pages::MAX);
    }

    #[test]
    fn a_copy_keeps_its_marks_when_the_other_changes() {
        let mut first = FileMarks::default();
        first.set(3, Some([1; PAGES]));
        first.set(40, Some([2; PAGES]));
        let mut second = first.clone();
        second.set(3, Some([3; PAGES]));
        second.set(40, None);
        second.set(1000, None);
        assert_eq!(
            (first.get(3), first.get(40)),
            (Some(&[1; PAGES]), Some(&[2; PAGES]))
        );
        assert_eq!((second.get(3), second.get(40)), (Some(&[3; PAGES]), None));
        assert_eq!(
            (first.get(4), first.get(1000), second.chunks()),
            (None, None, 2)
        );
    }

    #[test]
    fn marks_past_the_end_are_forgotten() {
        let mut marks = FileMarks::default();
        for block in 0..100 {
            marks.set(block, Some([1; PAGES]));
        }
        marks.truncate(50);
        assert!(marks.get(47).is_some() && (50..100).all(|block| marks.get(block).is_none()));
        assert_eq!(marks.chunks(), 50 / CHUNK);
        marks.truncate(1000);
        assert!(marks.get(47).is_some());
    }

    #[test]
    fn marks_take_memory_up_to_their_cap() {
        let mut marks = FileMarks::default();
        for block in (0..2 * CHUNKS_CAP * CHUNK).step_by(CHUNK) {
            marks.set(block as u64, Some([1; PAGES]));
        }
        assert_eq!(marks.chunks(), CHUNKS_CAP);
        let last = ((CHUNKS_CAP - 1) * CHUNK) as u64;
        assert!(marks.get(last).is_some() && marks.get(last + CHUNK as u64).is_none());
    }

    proptest! {
        #[test]
        fn the_ranges_of_pages_are_those_pages(pages: Pages) {
            let mut found = 0;
            let mut past = None;
            for range in ranges(pages, BLOCK) {
                prop_assert!(past.is_none_or(|past| past < range.start));
                past = Some(range.end);
                for page in range.step_by(BLOCK / PAGES) {
                    found |= 1 << (page / (BLOCK / PAGES));
                }
            }
            prop_assert_eq!(found, pages);
        }
    }
}
