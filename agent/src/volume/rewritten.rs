//! Which bytes of a file may have changed, told from where they lie and from what its device was written to.
//!
//! Rule: bytes are unchanged when they lie where they lay before, alone, and nothing was written there since; where
//! they lie nowhere, or are reserved only, when they were read as zeros. It holds where a file system writes the data
//! of files to their extents and nowhere else first, and where everything that is in memory was written back before
//! its extents were looked at. Before and after the bytes were read, the extents were the same.

use crate::model::extent::Extent;
use std::collections::HashMap;
use std::fmt::Debug;
use std::ops::Range;
use std::sync::Arc;

/// Where files lie, by path.
pub type FileExtents = HashMap<Box<[u8]>, Arc<[Extent]>>;

/// What a device was written to since before the last epoch was read.
pub trait Written: Debug + Send + Sync {
    /// The device, as stat(2) numbers it.
    fn device(&self) -> u64;
    /// Whether a write may be anywhere.
    fn anywhere(&self) -> bool;
    /// Whether a write may be within these bytes of the device.
    fn within(&self, bytes: &Range<u64>) -> bool;
}

/// Bytes up to `size` of a file that may differ, ascending, told to `unit` bytes. Extents are ascending; `zeros` tells
/// of a unit whether all of it was read as zeros.
#[must_use]
pub fn rewritten(
    before: &[Extent],
    now: &[Extent],
    size: u64,
    unit: u64,
    zeros: impl Fn(u64) -> bool,
    written: &dyn Written,
) -> Vec<Range<u64>> {
    let mut changed: Vec<Range<u64>> = Vec::new();
    for (piece, old, new) in pieces(before, now, size) {
        let is_same = |part: &Range<u64>| match (old, new) {
            (None, None) => zeros(part.start / unit),
            (Some(old), Some(new)) => {
                let place = lies(new, part.start);
                place == lies(old, part.start)
                    && !(old.shared || new.shared)
                    && !written.within(&(place.0..place.0 + (part.end - part.start)))
                    && (!new.unwritten || zeros(part.start / unit))
            }
            _ => false,
        };
        let mut at = piece.start;
        while at < piece.end {
            let part = at..piece.end.min((at / unit + 1) * unit);
            at = part.end;
            if is_same(&part) {
                continue;
            }
            match changed.last_mut() {
                Some(last) if last.end == part.start => last.end = part.end,
                _ => changed.push(part),
            }
        }
    }
    changed
}

/// What both have in common.
#[must_use]
pub fn common(before: &[Extent], after: &[Extent]) -> Vec<Extent> {
    let end = before
        .last()
        .map_or(0, |last| last.logical.saturating_add(last.length));
    let both = pieces(before, after, end).filter_map(|(piece, old, new)| {
        let (old, new) = (old?, new?);
        let place = lies(old, piece.start);
        (place == lies(new, piece.start)).then_some(Extent {
            logical: piece.start,
            physical: place.0,
            length: piece.end - piece.start,
            unwritten: old.unwritten,
            shared: old.shared || new.shared,
        })
    });
    both.collect()
}

/// A file up to `size` in pieces of which each lies in one extent, or in none, of both.
fn pieces<'a>(
    before: &'a [Extent],
    now: &'a [Extent],
    size: u64,
) -> impl Iterator<Item = (Range<u64>, Option<&'a Extent>, Option<&'a Extent>)> {
    let (mut before, mut now) = (Cursor(before), Cursor(now));
    let mut at = 0;
    std::iter::from_fn(move || {
        if at >= size {
            return None;
        }
        let (old, old_end) = before.at(at);
        let (new, new_end) = now.at(at);
        let piece = at..size.min(old_end).min(new_end);
        at = piece.end;
        Some((piece, old, new))
    })
}

/// Where a byte of an extent lies, and whether it counts.
fn lies(extent: &Extent, at: u64) -> (u64, bool) {
    (extent.physical + (at - extent.logical), extent.unwritten)
}

/// A place in extents, which only moves on.
struct Cursor<'a>(&'a [Extent]);

impl<'a> Cursor<'a> {
    /// The extent over a byte, and where it or the gap there ends.
    fn at(&mut self, at: u64) -> (Option<&'a Extent>, u64) {
        while let Some((first, rest)) = self.0.split_first() {
            let end = first.logical.saturating_add(first.length);
            if end > at {
                return if first.logical <= at {
                    (Some(first), end)
                } else {
                    (None, first.logical)
                };
            }
            self.0 = rest;
        }
        (None, u64::MAX)
    }
}

/// Sorted, and what touches together.
#[must_use]
pub fn merged(mut ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    ranges.sort_unstable_by_key(|range| range.start);
    let mut merged: Vec<Range<u64>> = Vec::with_capacity(ranges.len());
    for range in ranges {
        match merged.last_mut() {
            Some(last) if last.end >= range.start => last.end = last.end.max(range.end),
            _ => merged.push(range),
        }
    }
    merged
}

/// Whether some of these, which [`merged`] returned, have a part of `range`.
#[must_use]
pub fn meet(merged: &[Range<u64>], range: &Range<u64>) -> bool {
    let first = merged.partition_point(|one| one.end <= range.start);
    merged.get(first).is_some_and(|one| one.start < range.end)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const UNIT: u64 = 8;

    /// A device of which each byte has a version, and which is told as written where that grew.
    #[derive(Debug)]
    struct Device(Vec<bool>);

    impl Written for Device {
        fn device(&self) -> u64 {
            1
        }

        fn anywhere(&self) -> bool {
            false
        }

        fn within(&self, bytes: &Range<u64>) -> bool {
            self.0[bytes.start as usize..bytes.end as usize].contains(&true)
        }
    }

    /// Extents of a file: gaps, lengths, places, whether unwritten, whether shared.
    fn extents() -> impl Strategy<Value = Vec<Extent>> {
        let one = (0..6_u64, 0..20_u64, 0..80_u64, any::<(bool, bool)>());
        prop::collection::vec(one, 0..8).prop_map(|pieces| {
            let mut at = 0;
            let mut extents = Vec::new();
            for (gap, length, physical, (unwritten, shared)) in pieces {
                let logical = at + gap;
                at = logical + length;
                extents.push(Extent {
                    logical,
                    physical,
                    length,
                    unwritten,
                    shared,
                });
            }
            extents
        })
    }

    /// What a byte of a file reads as: where it lies, none for zeros.
    fn source(extents: &[Extent], at: u64) -> Option<u64> {
        let over = |one: &&Extent| (one.logical..one.logical + one.length).contains(&at);
        let one = extents.iter().find(over)?;
        (!one.unwritten).then(|| one.physical + (at - one.logical))
    }

    proptest! {
        #[test]
        fn every_byte_that_may_differ_is_named_and_what_lies_as_before_and_was_not_written_is_not(
            before in extents(), other in extents(), keep in any::<bool>(), size in 0..120_u64,
            writes in prop::collection::vec(0..100_usize, 0..4), data in prop::collection::vec(any::<bool>(), 16),
        ) {
            // Mostly alike, or every byte would differ.
            let now = if keep { before.clone() } else { other };
            let mut device = Device(vec![false; 128]);
            for at in writes {
                device.0[at] = true;
            }
            // In a unit that lay nowhere, data may have been read that is not there any more.
            let zeros = |unit: u64| {
                !data[unit as usize] && (unit * UNIT..(unit + 1) * UNIT).all(|at| source(&before, at).is_none())
            };
            let changed = rewritten(&before, &now, size, UNIT, zeros, &device);
            for pair in changed.windows(2) {
                prop_assert!(pair[0].end < pair[1].start);
            }
            prop_assert!(changed.iter().all(|range| range.start < range.end && range.end <= size));
            for at in 0..size {
                let (was, is) = (source(&before, at), source(&now, at));
                let written = is.is_some_and(|place| device.0[place as usize]);
                let differs = was != is || written || is.is_none() && !zeros(at / UNIT);
                let named = changed.iter().any(|range| range.contains(&at));
                prop_assert!(named || !differs, "byte {at}");
                let near = is.is_some_and(|place| device.within(&(place.saturating_sub(UNIT)..(place + UNIT).min(128))));
                let shared = before.iter().chain(&now).any(|one| one.shared);
                let alike = was == is && was.is_some();
                prop_assert!(!named || !alike || near || shared, "byte {at} for nothing");
            }
        }

        #[test]
        fn merged_ranges_meet_what_any_of_them_meets(
            ranges in prop::collection::vec((0..90_u64, 0..9_u64), 0..12), start in 0..90_u64, length in 1..9_u64,
        ) {
            let ranges: Vec<Range<u64>> = ranges.into_iter().map(|(from, length)| from..from + length).collect();
            let met = ranges.iter().any(|one| (start..start + length).any(|byte| one.contains(&byte)));
            let filled = ranges.into_iter().filter(|one| !one.is_empty()).collect();
            prop_assert_eq!(meet(&merged(filled), &(start..start + length)), met);
        }

        #[test]
        fn what_two_mappings_have_in_common_is_in_both(one in extents(), other in extents()) {
            let both = common(&one, &other);
            for at in 0..250 {
                let expected = source(&one, at).filter(|place| source(&other, at) == Some(*place));
                prop_assert_eq!(source(&both, at), expected);
            }
            prop_assert_eq!(both.windows(2).filter(|pair| pair[0].logical + pair[0].length > pair[1].logical).count(), 0);
        }
    }
}
