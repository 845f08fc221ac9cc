//! What a failing disk does not give up at once: read last, in small pieces, and named when it is lost.
//!
//! Invariants: nothing is retried while there is anything good left to read; a block of which bytes are lost stays
//! as it came before, where that was the same file's and not zeros already, else those bytes are zeros on the target;
//! all of them stand in the state of the epoch, and their file is read again in the next one.

use super::link::LinkError;
use super::payload::SmallFiles;
use super::queue::lock;
use super::reading::{Reading, Unit, size_of};
use super::source::{Held, SourceError, add};
use crate::model::ids::Signature;
use crate::model::units::UnixMillis;
use crate::volume::one::One;
use crate::volume::rewritten::{meet, merged};
use crate::volume::salvage;
use crate::volume::scan;
use crate::volume::sign::{self, ZERO};
use crate::volume::tree::{Seen, shown};
use crate::volume::walk::{Found, WalkError};
use crate::volume::{Kind, Unreadable};
use nix::sys::stat::FileStat;
use std::collections::HashMap;
use std::fs::File;
use std::ops::Range;
use std::time::{Duration, UNIX_EPOCH};

/// What came of a file before, and may stay on the target.
pub(super) struct Before {
    /// Its length then; 0 when that was another file, or nobody can tell.
    size: u64,
    /// Where the last complete epoch brought zeros for want of better.
    zeros: Vec<Range<u64>>,
}

/// What was read of a file of which bytes are lost: whole blocks from `offset` on.
pub(super) struct Salvaged<'a> {
    pub(super) path: &'a [u8],
    /// Length of the file.
    pub(super) size: u64,
    /// Blocks that the target has of it.
    pub(super) held: &'a [Signature],
    pub(super) before: &'a Before,
    pub(super) offset: u64,
    pub(super) bytes: &'a [u8],
}

impl<'s> Reading<'_, 's> {
    /// The bytes of a file that were lost in the last complete epoch, those that are `wanted`.
    pub(super) fn lost_before(
        &self,
        path: &[u8],
        wanted: impl Fn(&Unreadable) -> bool,
    ) -> Vec<Range<u64>> {
        let lost = salvage::of_file(self.source.lost, path).iter();
        let lost = lost.filter(|lost| lost.entry.is_none() && wanted(lost));
        merged(lost.map(Unreadable::range).collect())
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
                Unit::Pieces(file, spans) => {
                    steps.push(file.step);
                    for span in spans {
                        let offered = self.salvage_piece(&file, &span)?;
                        self.settle(&mut offered.into_iter().collect(), 0)?;
                    }
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

    /// What came of a file before.
    pub(super) fn before(&self, path: &[u8], file: &File, stat: &FileStat) -> Before {
        let same = |seen: &Seen| {
            (seen.device, seen.inode) == (stat.st_dev, stat.st_ino) && self.was_there(file, seen)
        };
        let known = self.source.earlier.map(|state| {
            let entry = state.get(path);
            entry.filter(|entry| same(&entry.seen)).map(|e| e.size())
        });
        let size = match &self.source.held {
            Held::Previous(_) => known.flatten(),
            held @ Held::Listed(..) => held.listed_size(path).filter(|_| match known {
                Some(known) => known.is_some(),
                None => self.is_older(file),
            }),
        };
        Before {
            size: size.unwrap_or(0),
            zeros: self.lost_before(path, |lost| !lost.kept),
        }
    }

    /// Whether a file is older than the plan, so that what came under its name was its own.
    fn is_older(&self, file: &File) -> bool {
        let since = self.source.since;
        let before = |born: Option<Duration>, since: UnixMillis| {
            born.is_some_and(|born| born.as_millis() < u128::from(since.0))
        };
        since.is_some_and(|since| self.is_born(file, |born| before(born, since)))
    }

    /// Whether a file was there when its inode was `seen`, which another file may have had: the disk gives numbers again.
    fn was_there(&self, file: &File, seen: &Seen) -> bool {
        let changed = (seen.changed.seconds, seen.changed.nanoseconds);
        self.is_born(file, |born| {
            // Where nobody can tell, its number has to do.
            born.is_none_or(|born| {
                i64::try_from(born.as_secs()).is_ok_and(|s| (s, born.subsec_nanos()) <= changed)
            })
        })
    }

    /// Whether a file was born at such a time; none where nobody can tell. A device is always there.
    fn is_born(&self, file: &File, at: impl Fn(Option<Duration>) -> bool) -> bool {
        if self.root.one().is_some_and(One::is_device) {
            return true;
        }
        let born = file.metadata().and_then(|data| data.created()).ok();
        let born = born.and_then(|born| born.duration_since(UNIX_EPOCH).ok());
        at(born)
    }

    /// Names what is lost of a file; the blocks around it that stay as they came before, which are nearer to what was
    /// there than zeros.
    pub(super) fn name_lost(
        &self,
        of: &Salvaged<'_>,
        lost: &[Range<u64>],
    ) -> HashMap<u64, Signature> {
        let block_size = self.source.block_size;
        let stays = |index: u64| {
            let signature = *of.held.get(usize::try_from(index).ok()?)?;
            let length = block_size.length_of(of.size, index);
            let start = index * block_size.bytes();
            let block = start..start + length as u64;
            if block_size.length_of(of.before.size, index) != length
                || meet(&of.before.zeros, &block)
            {
                return None;
            }
            if self.source.held.previous().is_none() {
                // An attempt that did not come to its end may have brought zeros for want of better too.
                let at = usize::try_from(start - of.offset).ok()?;
                let now = sign::signature(self.source.key, of.bytes.get(at..at + length)?);
                return (signature != ZERO && signature != now).then_some(signature);
            }
            Some(signature)
        };
        let mut named: Vec<Unreadable> = Vec::new();
        let mut blocks: HashMap<u64, Option<Signature>> = HashMap::new();
        for range in lost {
            let mut offset = range.start;
            while offset < range.end {
                let index = offset / block_size.bytes();
                let length = range.end.min((index + 1) * block_size.bytes()) - offset;
                let kept = blocks
                    .entry(index)
                    .or_insert_with(|| stays(index))
                    .is_some();
                match named.last_mut() {
                    Some(last) if last.range().end == offset && last.kept == kept => {
                        last.length += length;
                    }
                    _ => named.push(Unreadable {
                        path: shown(of.path).into_owned(),
                        offset,
                        length,
                        entry: None,
                        kept,
                    }),
                }
                offset += length;
            }
        }
        lock(&self.tally.unreadable).extend(named);
        let kept = blocks.into_iter();
        kept.filter_map(|(index, kept)| Some((index, kept?)))
            .collect()
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
        let salvaged = Salvaged {
            path: &found.path,
            size: read as u64,
            held: &self.source.held.blocks(&found.path),
            before: &self.before(&found.path, &file, &stat),
            offset: 0,
            bytes: &bytes,
        };
        let kept = self.name_lost(&salvaged, &lost);
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
