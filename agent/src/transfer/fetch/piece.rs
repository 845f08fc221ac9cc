//! Pieces of a list: both sides cut theirs alike, so that what the target has already is only named.
//!
//! Invariant: where a piece ends depends on nothing but the paths since the last end, so that lists which differ
//! somewhere are cut in the same places again soon after.

use crate::model::ids::Signature;
use crate::volume::sign::signature;
use crate::volume::{Entry, FleetKey};
use std::collections::HashMap;
use std::ops::Range;

/// Pieces that the target names at most.
pub(super) const PIECES_CAP: usize = 8192;
/// Entries of a piece on average, as a power of two, at least.
const BITS_MIN: u8 = 5;
/// The same, at most: a billion entries.
pub(super) const BITS_MAX: u8 = 30;
/// A piece ends after so many times the average at last.
const LONGEST: usize = 16;

/// Cuts a list into pieces of `1 << bits` entries on average.
pub(super) struct Cut<'a> {
    key: &'a FleetKey,
    bits: u8,
    entries: usize,
    layout: Vec<u8>,
}

impl<'a> Cut<'a> {
    pub(super) fn new(key: &'a FleetKey, bits: u8) -> Self {
        Self {
            key,
            bits,
            entries: 0,
            layout: Vec::new(),
        }
    }

    /// The next entry; the signature of the piece that ends with it.
    pub(super) fn add(&mut self, entry: &Entry) -> Option<Signature> {
        entry.encode(&mut self.layout);
        self.entries += 1;
        let [a, b, c, d, ..] = *blake3::hash(&entry.path).as_bytes();
        let ends = u32::from_le_bytes([a, b, c, d]).trailing_zeros() >= u32::from(self.bits);
        let ends = ends || self.entries >= LONGEST << self.bits;
        ends.then(|| {
            let piece = signature(self.key, &self.layout);
            self.layout.clear();
            self.entries = 0;
            piece
        })
    }
}

/// The pieces of the list that the target has; what follows the last end is in none.
pub(super) struct Pieces {
    pub(super) bits: u8,
    pub(super) signatures: Vec<Signature>,
    ranges: HashMap<Signature, Range<usize>>,
}

impl Pieces {
    pub(super) fn of(list: &[Entry], key: &FleetKey) -> Self {
        let mut bits = BITS_MIN;
        while list.len() >> bits > PIECES_CAP / 2 && bits < BITS_MAX {
            bits += 1;
        }
        let mut pieces = Self {
            bits,
            signatures: Vec::new(),
            ranges: HashMap::new(),
        };
        let (mut cut, mut start) = (Cut::new(key, bits), 0);
        for (entry, at) in list.iter().zip(1..) {
            if let Some(piece) = cut.add(entry) {
                if pieces.signatures.len() < PIECES_CAP {
                    pieces.signatures.push(piece);
                    pieces.ranges.insert(piece, start..at);
                }
                start = at;
            }
        }
        pieces
    }

    /// Where in the list a piece lies.
    pub(super) fn range(&self, piece: &Signature) -> Option<Range<usize>> {
        self.ranges.get(piece).cloned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::volume::Kind;
    use crate::volume::tree::{Seen, Timestamp};

    fn list(numbers: impl Iterator<Item = u32>) -> Vec<Entry> {
        let entries = numbers.map(|number| Entry {
            path: format!("{number:08}").into_bytes().into(),
            mode: 0o644,
            uid: 0,
            gid: 0,
            mtime: Timestamp::default(),
            xattrs: Vec::new(),
            kind: Kind::Fifo,
            seen: Seen::default(),
        });
        entries.collect()
    }

    #[test]
    fn lists_that_differ_somewhere_have_all_other_pieces_in_common() {
        let key = FleetKey([3; 32]);
        let (one, mut other) = (list(0..100_000), list(1..100_000));
        other.remove(50_000);
        other[70_000].mode = 0o600;
        let (one, other) = (Pieces::of(&one, &key), Pieces::of(&other, &key));
        assert!(one.signatures.len() > 1000);
        let unknown = other
            .signatures
            .iter()
            .filter(|piece| one.range(piece).is_none());
        assert_eq!(unknown.count(), 3);
        let mut covered = 0;
        for piece in &one.signatures {
            let range = one.range(piece).unwrap();
            assert_eq!(range.start, covered);
            covered = range.end;
        }
    }

    #[test]
    fn no_list_has_more_pieces_than_the_cap() {
        let key = FleetKey([3; 32]);
        let pieces = Pieces::of(&list(0..1_000_000), &key);
        assert!((1000..=PIECES_CAP).contains(&pieces.signatures.len()));
    }
}
