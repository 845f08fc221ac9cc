//! What a failing disk does not give up at once: read last, in small pieces, and named when it is lost.
//!
//! Invariants: nothing is retried while there is anything good left to read; bytes that are lost are zeros on
//! the target and stand in the state of the epoch; their file is read again in the next one.

use super::link::LinkError;
use super::payload::SmallFiles;
use super::queue::lock;
use super::reading::{Reading, Unit, size_of};
use super::source::{SourceError, add};
use crate::volume::Unreadable;
use crate::volume::salvage;
use crate::volume::scan;
use crate::volume::tree::shown;
use crate::volume::walk::{Found, WalkError};
use std::fs::File;
use std::io;
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

    /// Reads in small pieces what is left of a file, and notes what is not.
    pub(super) fn salvage(
        &self,
        path: &[u8],
        file: &File,
        into: &mut [u8],
        offset: u64,
    ) -> io::Result<usize> {
        let (done, lost) = salvage::read(file, into, offset)?;
        let lost = lost.into_iter().map(|range| Unreadable {
            path: shown(path).into_owned(),
            offset: range.start,
            length: range.end - range.start,
            entry: None,
        });
        lock(&self.tally.unreadable).extend(lost);
        Ok(done)
    }

    fn salvage_small(&self, step: usize, found: &Found) -> Result<(), SourceError> {
        let (file, stat) = match scan::open_file(self.root, &found.path) {
            Err(error) if error.vanished() => return self.vanish(step, &found.path),
            Err(error) => return self.lose(step, found, error),
            Ok(opened) => opened,
        };
        let size = size_of(&stat).min(size_of(&found.stat));
        let mut bytes = vec![0; usize::try_from(size).unwrap_or(0)];
        let read = self
            .salvage(&found.path, &file, &mut bytes, 0)
            .map_err(|e| WalkError::new(self.root, "read", &found.path, e))?;
        bytes.truncate(read);
        self.source.progress.read(size);
        add(&self.tally.bytes_read, size);
        let entry = self.small_entry(&found.path, &file, &stat, &bytes)?;
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
