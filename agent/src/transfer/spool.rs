//! Records that wait on the paired device's disk, between a source that is done with them and a
//! target that may be slow or away.
//!
//! Invariants: a record is reported durable only after a data sync that began after its write; the
//! file is private, has no name any more once it is open, and gives its space back as the target
//! acknowledges. Non-goal: surviving the paired device's own restart (the source then sends again).

use super::feed::Arrived;
use super::queue::lock;
use nix::fcntl::{FallocateFlags, fallocate};
use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Condvar, Mutex, PoisonError};

/// The spool could not take or give a record.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} the spool in {}: {source}; free space there or choose another spool directory", .dir.display())]
pub(super) struct SpoolError {
    action: &'static str,
    dir: PathBuf,
    pub(super) source: io::Error,
}

#[derive(Debug, Clone, Copy)]
struct Place {
    number: u64,
    offset: u64,
    length: usize,
}

#[derive(Debug, Default)]
struct State {
    end: u64,
    /// Not yet taken for forwarding.
    waiting: VecDeque<Place>,
    /// Taken, not yet acknowledged by the target.
    taken: VecDeque<Place>,
    written: Arrived,
    durable: u64,
    closed: bool,
}

/// A spool of one session.
#[derive(Debug)]
pub(super) struct Spool {
    dir: PathBuf,
    file: File,
    state: Mutex<State>,
    changed: Condvar,
}

impl Spool {
    /// An empty spool in `dir`, which is made if missing.
    pub(super) fn new(dir: &Path, name: &str) -> Result<Self, SpoolError> {
        let failed = |action| {
            move |source| SpoolError {
                action,
                dir: dir.to_owned(),
                source,
            }
        };
        std::fs::create_dir_all(dir).map_err(failed("make"))?;
        let path = dir.join(name);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .map_err(failed("open a file of"))?;
        // Nothing is left behind, however this process ends.
        std::fs::remove_file(&path).map_err(failed("unlink a file of"))?;
        Ok(Self {
            dir: dir.to_owned(),
            file,
            state: Mutex::default(),
            changed: Condvar::new(),
        })
    }

    fn failed(&self, action: &'static str, source: io::Error) -> SpoolError {
        SpoolError {
            action,
            dir: self.dir.clone(),
            source,
        }
    }

    /// Writes a record; it is not durable yet.
    pub(super) fn put(&self, number: u64, record: &[u8]) -> Result<(), SpoolError> {
        let offset = lock(&self.state).end;
        self.file
            .write_all_at(record, offset)
            .map_err(|e| self.failed("write", e))?;
        let mut state = lock(&self.state);
        state.end = offset + record.len() as u64;
        state.waiting.push_back(Place {
            number,
            offset,
            length: record.len(),
        });
        state.written.add(number);
        self.changed.notify_all();
        Ok(())
    }

    /// The next record to forward, in the order of arrival; waits for one. None when closed.
    pub(super) fn take(&self, mut buffer: Vec<u8>) -> Result<Option<(u64, Vec<u8>)>, SpoolError> {
        let mut state = lock(&self.state);
        let place = loop {
            if state.closed {
                return Ok(None);
            }
            if let Some(place) = state.waiting.pop_front() {
                state.taken.push_back(place);
                break place;
            }
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        };
        drop(state);
        buffer.resize(place.length, 0);
        self.file
            .read_exact_at(&mut buffer, place.offset)
            .map_err(|e| self.failed("read", e))?;
        Ok(Some((place.number, buffer)))
    }

    /// Waits for records that are not durable, makes them so, and returns the number below which all
    /// are. None when closed.
    pub(super) fn flush(&self) -> Result<Option<u64>, SpoolError> {
        let mut state = lock(&self.state);
        let watermark = loop {
            if state.written.watermark() > state.durable {
                break state.written.watermark();
            }
            if state.closed {
                return Ok(None);
            }
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        };
        drop(state);
        self.file.sync_data().map_err(|e| self.failed("sync", e))?;
        lock(&self.state).durable = watermark;
        Ok(Some(watermark))
    }

    /// Gives back the space of records that the target has.
    pub(super) fn acknowledged(&self, watermark: u64) {
        let mut state = lock(&self.state);
        let mut freed: Option<(u64, u64)> = None;
        while let Some(place) = state.taken.front().copied() {
            if place.number >= watermark {
                break;
            }
            state.taken.pop_front();
            let end = place.offset + place.length as u64;
            freed = Some((freed.map_or(place.offset, |(start, _)| start), end));
        }
        drop(state);
        if let Some((start, end)) = freed {
            let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
            let range = (i64::try_from(start), i64::try_from(end - start));
            if let (Ok(start), Ok(length)) = range {
                // A file system that cannot punch keeps the bytes until the session ends.
                let _ = fallocate(&self.file, flags, start, length);
            }
        }
    }

    /// Wakes and ends everyone who waits.
    pub(super) fn close(&self) {
        lock(&self.state).closed = true;
        self.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_come_back_in_order_and_are_durable_before_they_are_reported() {
        let dir = tempfile::tempdir().unwrap();
        let spool = Spool::new(dir.path(), "s").unwrap();
        for number in 0..5_u64 {
            spool.put(number, &[number as u8; 9000]).unwrap();
        }
        assert_eq!(spool.flush().unwrap(), Some(5));
        for number in 0..5_u64 {
            let (taken, record) = spool.take(Vec::new()).unwrap().unwrap();
            assert_eq!(taken, number);
            assert_eq!(record, [number as u8; 9000]);
        }
        spool.acknowledged(3);
        spool.close();
        assert!(spool.take(Vec::new()).unwrap().is_none());
        assert_eq!(spool.flush().unwrap(), None);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_gap_is_not_reported_as_durable() {
        let dir = tempfile::tempdir().unwrap();
        let spool = Spool::new(dir.path(), "s").unwrap();
        spool.put(0, b"a").unwrap();
        spool.put(2, b"c").unwrap();
        assert_eq!(spool.flush().unwrap(), Some(1));
        spool.put(1, b"b").unwrap();
        assert_eq!(spool.flush().unwrap(), Some(3));
    }
}
