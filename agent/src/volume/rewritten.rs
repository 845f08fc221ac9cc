//! Which bytes of a file may have changed, told from where they lie and from what its device was written to.
//!
//! Rule: bytes are unchanged when they lie where they lay before and nothing was written there since. It holds
//! where a file system writes the data of files to their extents and nowhere else first, and where everything
//! that is in memory was written back before its extents were looked at.

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

/// Bytes up to `size` of a file that may differ, ascending, told to `unit` bytes. Extents are ascending.
#[must_use]
pub fn rewritten(
    before: &[Extent],
    now: &[Extent],
    size: u64,
    unit: u64,
    written: &dyn Written,
) -> Vec<Range<u64>> {
    let mut changed: Vec<Range<u64>> = Vec::new();
    let mut mark = |bytes: Range<u64>| match changed.last_mut() {
        Some(last) if last.end == bytes.start => last.end = bytes.end,
        _ => changed.push(bytes),
    };
    let (mut before, mut now) = (Cursor::of(before), Cursor::of(now));
    let mut at = 0;
    while at < size {
        let (old, old_end) = before.at(at);
        let (new, new_end) = now.at(at);
        let end = size.min(old_end).min(new_end);
        match (old, new) {
            (None, None) => {}
            (Some(old), Some(new)) if lies(old, at) == lies(new, at) => {
                while at < end {
                    let next = end.min((at / unit + 1) * unit);
                    let (place, _) = lies(new, at);
                    if written.within(&(place..place + (next - at))) {
                        mark(at..next);
                    }
                    at = next;
                }
            }
            _ => mark(at..end),
        }
        at = end;
    }
    changed
}

/// Where a byte of an extent lies, and whether it counts.
fn lies(extent: &Extent, at: u64) -> (u64, bool) {
    (extent.physical + (at - extent.logical), extent.unwritten)
}

/// A place in extents, which only moves on.
struct Cursor<'a>(&'a [Extent]);

impl<'a> Cursor<'a> {
    fn of(extents: &'a [Extent]) -> Self {
        Self(extents)
    }

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

    /// Extents of a file: gaps, lengths, places, whether unwritten.
    fn extents() -> impl Strategy<Value = Vec<Extent>> {
        let one = (0..6_u64, 0..20_u64, 0..80_u64, any::<bool>());
        prop::collection::vec(one, 0..8).prop_map(|pieces| {
            let mut at = 0;
            let mut extents = Vec::new();
            for (gap, length, physical, unwritten) in pieces {
                let logical = at + gap;
                at = logical + length;
                extents.push(Extent {
                    logical,
                    physical,
                    length,
                    unwritten,
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
            before in extents(), now in extents(), keep in any::<bool>(), size in 0..120_u64,
            writes in prop::collection::vec(0..100_usize, 0..4),
        ) {
            // Mostly alike, or every byte would differ.
            let now = if keep { before.iter().copied().chain(now.into_iter().filter(|_| false)).collect() } else { now };
            let mut device = Device(vec![false; 128]);
            for at in writes {
                device.0[at] = true;
            }
            let changed = rewritten(&before, &now, size, UNIT, &device);
            for pair in changed.windows(2) {
                prop_assert!(pair[0].end < pair[1].start);
            }
            prop_assert!(changed.iter().all(|range| range.start < range.end && range.end <= size));
            for at in 0..size {
                let (was, is) = (source(&before, at), source(&now, at));
                let differs = was != is || is.is_some_and(|place| device.0[place as usize]);
                let named = changed.iter().any(|range| range.contains(&at));
                prop_assert!(named || !differs, "byte {at}");
                let near = is.is_some_and(|place| device.within(&(place.saturating_sub(UNIT)..(place + UNIT).min(128))));
                let alike = was == is && was.is_some();
                prop_assert!(!(named && alike && !near), "byte {at} for nothing");
            }
        }
    }
}
