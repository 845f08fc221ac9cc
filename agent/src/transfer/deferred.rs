//! What a failing disk does not give up at once: read last, in small pieces, and named when it is lost.
//!
//! Invariants: nothing is retried while there is anything good left to read; a block of which bytes are lost stays
//! as an earlier epoch brought it whole, else those bytes are zeros on the target; all of them stand in the state
//! of the epoch, and their file is read again in the next one.

use super::link::LinkError;
use super::payload::SmallFiles;
use super::queue::lock;
use super::reading::{Reading, Unit, size_of};
use super::source::{SourceError, add};
use crate::model::ids::Signature;
use crate::volume::salvage;
use crate::volume::scan;
use crate::volume::tree::shown;
use crate::volume::walk::{Found, WalkError};
use crate::volume::{Entry, Kind, Unreadable};
use nix::sys::stat::FileStat;
use std::collections::HashMap;
use std::ops::Range;

impl<'s> Reading<'_, 's> {
    /// What could not be read of a file in the epoch before.
    pub(super) fn known_bad(&self, path: &[u8]) -> Vec<Range<u64>> {
        let lost = self.source.held.previous().map(|state| &state.unreadable);
        let of_file = |lost: &&Unreadable| lost.path == shown(path);
        let lost = lost.into_iter().flatten().filter(of_file);
        lost.map(|lost| lost.offset..lost.offset + lost.length)
            .collect()
    }

    pub(super) fn defer(&self, unit: Unit<'s>) {
        lock(&self.deferred).push(unit);
    }

    /// Reads what was deferred, now that everything else is on its way: one read at a time.
    pub(super) fn read_deferred(&self) -> Result<(), SourceError> {
        let units = std::mem::take(&mut *lock(&self.deferred));
        if units.is_empty() {
            return Ok(());
        }
        let mut steps = Vec::new();
        for unit in units {
            if self.source.progress.is_cancelled() {
                return Err(LinkError::Cancelled.into());
            }
            match unit {
                Unit::Pieces(file, blocks) => {
                    steps.push(file.step);
                    let offered = self.salvage_piece(&file, blocks)?;
                    self.settle(&mut offered.into_iter().collect(), 0)?;
                }
                Unit::Small(files) => {
                    for (step, found) in files {
                        steps.push(step);
                        self.salvage_small(step, found)?;
                    }
                }
            }
        }
        let mut outcomes = lock(&self.outcomes);
        for step in steps {
            if let Some(Some(entry)) = outcomes.get_mut(&step) {
                entry.seen.racy = true;
            }
        }
        Ok(())
    }

    /// Names what is lost of a file that has `size` bytes; the blocks around it that an earlier epoch brought whole,
    /// which are nearer to what was there than zeros.
    pub(super) fn name_lost(
        &self,
        path: &[u8],
        stat: &FileStat,
        size: u64,
        lost: &[Range<u64>],
    ) -> HashMap<u64, Signature> {
        if lost.is_empty() {
            return HashMap::new();
        }
        let block_size = self.source.block_size;
        let previous = self.source.held.previous();
        let before = previous
            .and_then(|state| state.get(path))
            .filter(|entry| (entry.seen.device, entry.seen.inode) == (stat.st_dev, stat.st_ino));
        let blocks = match before.as_ref().map(|entry| &entry.kind) {
            Some(Kind::File { blocks, .. }) => &blocks[..],
            _ => &[],
        };
        let size_before = before.as_ref().map_or(0, Entry::size);
        let lost_before = previous.map_or(&[][..], |state| &state.unreadable);
        let zeros = |block: &Range<u64>| {
            lost_before.iter().any(|lost| {
                !lost.kept
                    && lost.path == shown(path)
                    && lost.offset < block.end
                    && block.start < lost.offset + lost.length
            })
        };
        let whole = |index: u64| {
            let block = index * block_size.bytes()..(index + 1) * block_size.bytes();
            let signature = *blocks.get(usize::try_from(index).ok()?)?;
            let as_long =
                block_size.length_of(size_before, index) == block_size.length_of(size, index);
            (as_long && !zeros(&block)).then_some(signature)
        };
        let mut named: Vec<Unreadable> = Vec::new();
        let mut kept = HashMap::new();
        for range in lost {
            let mut offset = range.start;
            while offset < range.end {
                let index = offset / block_size.bytes();
                let length = range.end.min((index + 1) * block_size.bytes()) - offset;
                let brought = whole(index);
                kept.extend(brought.map(|signature| (index, signature)));
                match named.last_mut() {
                    Some(last)
                        if last.offset + last.length == offset
                            && last.kept == brought.is_some() =>
                    {
                        last.length += length;
                    }
                    _ => named.push(Unreadable {
                        path: shown(path).into_owned(),
                        offset,
                        length,
                        entry: None,
                        kept: brought.is_some(),
                    }),
                }
                offset += length;
            }
        }
        lock(&self.tally.unreadable).extend(named);
        kept
    }

    fn salvage_small(&self, step: usize, found: &Found) -> Result<(), SourceError> {
        let (file, stat) = match scan::open_file(self.root, &found.path) {
            Err(error) if error.vanished() => return self.vanish(step, &found.path),
            Err(error) => return self.lose(step, found, error),
            Ok(opened) => opened,
        };
        let size = size_of(&stat).min(size_of(&found.stat));
        let mut bytes = vec![0; usize::try_from(size).unwrap_or(0)];
        let (read, lost) = salvage::read(&file, &mut bytes, 0)
            .map_err(|e| WalkError::new(self.root, "read", &found.path, e))?;
        bytes.truncate(read);
        let kept = self.name_lost(&found.path, &stat, read as u64, &lost);
        self.source.progress.read(size);
        add(&self.tally.bytes_read, size);
        let mut entry = self.small_entry(&found.path, &file, &stat, &bytes)?;
        if let Kind::File { blocks, .. } = &mut entry.kind {
            for (block, index) in blocks.iter_mut().zip(0..) {
                *block = kept.get(&index).copied().unwrap_or(*block);
            }
        }
        if self.source.differs(&entry) {
            add(&self.tally.changed_entries, 1);
            let mut files = SmallFiles::default();
            self.put_small(&mut files, &entry, &self.fates(&entry), &bytes)?;
            self.emit_small(&mut files)?;
        }
        lock(&self.outcomes).insert(step, Some(entry));
        Ok(())
    }
}
