//! Which parts of a file are holes: said by the source for what is absent, so that nobody fetches zeros to find out.
//!
//! Invariant: a hole that somebody was told of is here from then on, so that it reads as it was told. What the source
//! does not say in time counts as data, which is always true enough. Non-goal: zeros that take space.

use super::{Store, locked, signed};
use crate::serve::origins::{Origin, mask};
use crate::serve::presence::PAGE;
use crate::transfer::fetch::wire::MAP_CAP;
use crate::transfer::fetch::{BLOCK, Place};
use crate::volume::scan::{next_data, next_hole};
use nix::fcntl::{FallocateFlags, fallocate};
use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Instant;

/// Questions for holes.
#[derive(Default)]
pub(super) struct Maps {
    /// Those that are open, each by its first block.
    open: Mutex<HashSet<Place>>,
    changed: Condvar,
    /// Blocks of files that were answered for: what of them is absent is data.
    answered: Mutex<HashMap<u32, Vec<Range<u64>>>>,
}

impl Maps {
    /// Nobody will answer any more.
    pub(super) fn end(&self) {
        locked(&self.open).clear();
        self.changed.notify_all();
    }

    fn is_answered(&self, number: u32, block: u64) -> bool {
        let answered = locked(&self.answered);
        let ranges = answered.get(&number);
        ranges.is_some_and(|ranges| ranges.iter().any(|range| range.contains(&block)))
    }

    fn note_answered(&self, number: u32, blocks: Range<u64>) {
        let mut answered = locked(&self.answered);
        let ranges = answered.entry(number).or_default();
        let touches =
            |range: &&mut Range<u64>| range.start <= blocks.end && blocks.start <= range.end;
        match ranges.iter_mut().find(touches) {
            Some(range) => *range = range.start.min(blocks.start)..range.end.max(blocks.end),
            None => ranges.push(blocks),
        }
    }
}

/// A part of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Bytes.
    pub length: u64,
    /// Whether it takes no space and reads as zeros.
    pub is_hole: bool,
}

impl Store {
    /// Asks the source which of a range's absent blocks are holes, and takes these as they are. Waits for the answer
    /// as long as a read would, and never asks twice. Not for stores that prove: a hole that was told has no signature.
    pub fn learn_holes(&self, number: Option<u32>, offset: u64, length: u64) {
        let Some((number, origin)) = self.origin(number) else {
            return;
        };
        let mut absent = self.absent_blocks(origin, offset, length);
        absent.retain(|&block| !self.maps.is_answered(number, block));
        let (Some(&first), Some(&last)) = (absent.first(), absent.last()) else {
            return;
        };
        let until = Instant::now() + self.patience;
        let path = &origin.path;
        let mut from = first;
        while from <= last {
            let count = u32::try_from(last - from + 1).map_or(MAP_CAP, |all| all.min(MAP_CAP));
            let place = Place {
                file: number,
                block: from,
            };
            let mut open = locked(&self.maps.open);
            if open.insert(place) {
                drop(open);
                // Not kept while this waits, or the store could not let go of its source.
                let Some(fetcher) = locked(&self.fetcher).clone() else {
                    self.maps.end();
                    return;
                };
                fetcher.ask_holes(place, count, path);
                drop(fetcher);
                open = locked(&self.maps.open);
            }
            while open.contains(&place) {
                let left = until.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    return;
                }
                let waited = self.maps.changed.wait_timeout(open, left);
                open = waited.unwrap_or_else(PoisonError::into_inner).0;
            }
            drop(open);
            let next = from + u64::from(count);
            self.maps.note_answered(number, from..next);
            from = next;
        }
    }

    /// The source has said which blocks from `first` on are holes.
    pub(super) fn mapped(&self, first: Place, holes: &[Range<u32>]) {
        if let Some(origin) = self.origins.get(first.file as usize) {
            for run in holes {
                let end = (first.block + u64::from(run.end)).min(origin.blocks());
                let blocks = first.block + u64::from(run.start)..end;
                let kept = self.keep_holes(first.file, origin, blocks);
                // Otherwise they are still absent, and read as such: on a file system without holes, or when the file
                // was let go of meanwhile.
                if let Err(error) = kept
                    && !matches!(
                        error.kind(),
                        io::ErrorKind::Unsupported | io::ErrorKind::NotFound
                    )
                {
                    tracing::error!(directory = %self.directory.display(), "cannot keep holes: {error}");
                }
            }
        }
        locked(&self.maps.open).remove(&first);
        self.maps.changed.notify_all();
    }

    fn keep_holes(&self, number: u32, origin: &Origin, blocks: Range<u64>) -> io::Result<()> {
        let whole = |block: u64| {
            let missing = self.missing(origin, block);
            missing != 0 && missing == mask(0, BLOCK / PAGE)
        };
        let mut at = blocks.start;
        while at < blocks.end {
            let mut end = at;
            {
                let cut = self.cut(number);
                // Nobody writes what is absent meanwhile.
                let _cut = cut.write().unwrap_or_else(PoisonError::into_inner);
                while end < blocks.end && whole(end) {
                    end += 1;
                }
                if at < end {
                    let file = self.origin_file(number)?;
                    let flags =
                        FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
                    let (from, length) = (signed(at * BLOCK), signed((end - at) * BLOCK));
                    // On a file system without holes they are not taken, but fetched as zeros.
                    self.unseen(number, &file, || {
                        Ok(fallocate(&*file, flags, from, length)?)
                    })?;
                    self.presence
                        .mark_whole(origin.first + at..origin.first + end)?;
                }
            }
            at = end;
            if at < blocks.end {
                if self.missing(origin, at) != 0 {
                    let place = Place {
                        file: number,
                        block: at,
                    };
                    self.keep(place, Some(&[]))?;
                }
                at += 1;
            }
        }
        Ok(())
    }

    /// What a range of a file consists of, as far as it is known here, in `cap` parts at most: absent pages are data.
    ///
    /// # Errors
    /// The disk's error.
    pub fn extents(
        &self,
        file: &File,
        number: Option<u32>,
        range: Range<u64>,
        cap: usize,
    ) -> io::Result<Vec<Extent>> {
        let mut extents: Vec<Extent> = Vec::new();
        let mut add = |length: u64, is_hole: bool| {
            let is_full = extents.len() == cap;
            match extents.last_mut() {
                Some(last) if last.is_hole == is_hole => last.length += length,
                _ if is_full => return false,
                _ => extents.push(Extent { length, is_hole }),
            }
            true
        };
        let mut at = range.start;
        while at < range.end {
            // This first: what arrives is written before it is marked, and would else be a hole that is here.
            let (until, is_here) = self.run(number, at..range.end);
            if !is_here {
                if !add(until - at, false) {
                    return Ok(extents);
                }
                at = until;
            }
            while is_here && at < until {
                let data = next_data(file, at)?.map_or(until, |data| data.min(until));
                if data > at && !add(data - at, true) {
                    return Ok(extents);
                }
                at = data;
                if at < until {
                    // Written meanwhile, it may be data no more.
                    let hole = next_hole(file, at)?.clamp(at + 1, until);
                    if !add(hole - at, false) {
                        return Ok(extents);
                    }
                    at = hole;
                }
            }
        }
        Ok(extents)
    }

    /// How far pages from the beginning of a range on are all here, or all absent.
    fn run(&self, number: Option<u32>, range: Range<u64>) -> (u64, bool) {
        let Some((_, origin)) = self.origin(number) else {
            return (range.end, true);
        };
        let is_here = |at: u64| {
            let page = at / PAGE;
            let (block, bit) = (page * PAGE / BLOCK, page % (BLOCK / PAGE));
            let missing = if at < origin.size {
                self.missing(origin, block)
            } else {
                0
            };
            (missing >> bit & 1 == 0, missing)
        };
        let (first, _) = is_here(range.start);
        let mut at = range.start;
        while at < range.end {
            let (here, missing) = is_here(at);
            if here != first {
                return (at, first);
            }
            // A block of which all is alike is one step.
            let step = if missing == 0 || missing == u16::MAX {
                BLOCK
            } else {
                PAGE
            };
            at = (at / step + 1) * step;
        }
        (range.end, first)
    }
}
