//! Records that wait on the paired device's disk, between a source that is done with them and a
//! target that may be slow or away.
//!
//! Invariants: a record is reported durable only after a data sync that began after its write; the
//! file is private, gives its space back as the target acknowledges, and is there again with every whole
//! record after the paired device was started anew.

use super::feed::Arrived;
use super::frame::{HEADER_LEN, Header};
use super::queue::lock;
use nix::errno::Errno;
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

/// Records begin at multiples of this, so that a hole punched for one touches no other.
const SLOT: u64 = 4096;
/// Length of the checksum behind each record.
const SUM_LEN: usize = 32;

/// Where the next data of a file is, if any.
fn data_from(file: &File, offset: u64) -> io::Result<Option<u64>> {
    let start = i64::try_from(offset).unwrap_or(i64::MAX);
    match nix::unistd::lseek(file, start, nix::unistd::Whence::SeekData) {
        Ok(found) => Ok(u64::try_from(found).ok()),
        Err(Errno::ENXIO) => Ok(None),
        // A file system without the call has no holes.
        Err(Errno::EINVAL) => Ok((offset < file.metadata()?.len()).then_some(offset)),
        Err(error) => Err(error.into()),
    }
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
    path: PathBuf,
    file: File,
    state: Mutex<State>,
    changed: Condvar,
}

impl Spool {
    /// The spool of that name in `dir`, which is made if missing: with what an earlier life left in it, and
    /// instead of every other one there.
    pub(super) fn open(dir: &Path, name: &str) -> Result<Self, SpoolError> {
        let failed = |action| {
            move |source| SpoolError {
                action,
                dir: dir.to_owned(),
                source,
            }
        };
        std::fs::create_dir_all(dir).map_err(failed("make"))?;
        for other in std::fs::read_dir(dir).map_err(failed("list"))? {
            let other = other.map_err(failed("list"))?;
            if other.file_name() != name {
                std::fs::remove_file(other.path()).map_err(failed("empty"))?;
            }
        }
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(dir.join(name))
            .map_err(failed("open a file of"))?;
        let spool = Self {
            dir: dir.to_owned(),
            path: dir.join(name),
            file,
            state: Mutex::default(),
            changed: Condvar::new(),
        };
        spool.load().map_err(failed("read"))?;
        Ok(spool)
    }

    /// Finds the whole records in the file.
    fn load(&self) -> io::Result<()> {
        let size = self.file.metadata()?.len();
        let mut state = lock(&self.state);
        let mut record = Vec::new();
        while let Some(offset) = data_from(&self.file, state.end)? {
            // Space is given back in whole slots; a file system that cannot do it keeps the records.
            let offset = offset.next_multiple_of(SLOT);
            let mut head = [0; HEADER_LEN];
            if offset + HEADER_LEN as u64 > size {
                break;
            }
            self.file.read_exact_at(&mut head, offset)?;
            if head == [0; HEADER_LEN] {
                state.end = offset + SLOT;
                continue;
            }
            let Ok(header) = Header::decode(&head) else {
                break;
            };
            let length = HEADER_LEN + header.length as usize;
            if offset + (length + SUM_LEN) as u64 > size {
                break;
            }
            record.resize(length + SUM_LEN, 0);
            self.file.read_exact_at(&mut record, offset)?;
            // The last one may be cut short by the death of the process, or never written by that of the host.
            if *blake3::hash(&record[..length]).as_bytes() != record[length..] {
                break;
            }
            state.waiting.push_back(Place {
                number: header.number,
                offset,
                length,
            });
            state.end = (offset + record.len() as u64).next_multiple_of(SLOT);
        }
        self.file.set_len(state.end)
    }

    /// Starts with what the target has: all below `watermark`. Returns what is here beyond that, durably.
    pub(super) fn go_on_at(&self, watermark: u64) -> Result<Arrived, SpoolError> {
        self.file.sync_data().map_err(|e| self.failed("sync", e))?;
        let mut state = lock(&self.state);
        state.waiting.retain(|place| place.number >= watermark);
        state.written = Arrived::below(watermark);
        let numbers: Vec<u64> = state.waiting.iter().map(|place| place.number).collect();
        for number in numbers {
            state.written.add(number);
        }
        state.durable = state.written.watermark();
        Ok(state.written.clone())
    }

    /// Removes the file: the target has everything.
    pub(super) fn discard(&self) {
        // The plan's end removes the directory anyway.
        let _ = std::fs::remove_file(&self.path);
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
        let sum = blake3::hash(record);
        self.file
            .write_all_at(record, offset)
            .and_then(|()| {
                let end = offset + record.len() as u64;
                self.file.write_all_at(sum.as_bytes(), end)
            })
            .map_err(|e| self.failed("write", e))?;
        let mut state = lock(&self.state);
        state.end = (offset + (record.len() + SUM_LEN) as u64).next_multiple_of(SLOT);
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
            let end = (place.offset + (place.length + SUM_LEN) as u64).next_multiple_of(SLOT);
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
    use super::super::frame::FrameKind;
    use super::*;
    use crate::model::ids::{Epoch, VolumeId};

    fn record(number: u64, length: u32) -> Vec<u8> {
        let header = Header {
            kind: FrameKind::Sealed,
            barrier: false,
            length,
            volume: VolumeId(1),
            epoch: Epoch(1),
            number,
            first_block: 0,
        };
        let mut record = header.encode().to_vec();
        record.resize(HEADER_LEN + length as usize, number as u8);
        record
    }

    #[test]
    fn records_come_back_in_order_and_are_durable_before_they_are_reported() {
        let dir = tempfile::tempdir().unwrap();
        let spool = Spool::open(dir.path(), "s").unwrap();
        for number in 0..5_u64 {
            spool.put(number, &record(number, 9000)).unwrap();
        }
        assert_eq!(spool.flush().unwrap(), Some(5));
        for number in 0..5_u64 {
            let taken = spool.take(Vec::new()).unwrap().unwrap();
            assert_eq!(taken, (number, record(number, 9000)));
        }
        spool.acknowledged(3);
        spool.close();
        assert!(spool.take(Vec::new()).unwrap().is_none());
        assert_eq!(spool.flush().unwrap(), None);
        spool.discard();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_gap_is_not_reported_as_durable() {
        let dir = tempfile::tempdir().unwrap();
        let spool = Spool::open(dir.path(), "s").unwrap();
        spool.put(0, &record(0, 1)).unwrap();
        spool.put(2, &record(2, 1)).unwrap();
        assert_eq!(spool.flush().unwrap(), Some(1));
        spool.put(1, &record(1, 1)).unwrap();
        assert_eq!(spool.flush().unwrap(), Some(3));
    }

    #[test]
    fn what_was_whole_is_there_after_a_restart_and_what_was_torn_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let spool = Spool::open(dir.path(), "s").unwrap();
        for number in [0, 1, 3, 2, 5, 6] {
            spool.put(number, &record(number, 5000)).unwrap();
        }
        for _ in 0..2 {
            spool.take(Vec::new()).unwrap();
        }
        spool.acknowledged(2);
        let torn = spool.state.lock().unwrap().end - SLOT;
        spool.file.write_all_at(b"torn", torn + 10).unwrap();
        drop(spool);

        let spool = Spool::open(dir.path(), "s").unwrap();
        let arrived = spool.go_on_at(2).unwrap();
        assert_eq!(arrived.watermark(), 4);
        assert!(arrived.contains(5) && !arrived.contains(6));
        for number in [3, 2, 5] {
            let taken = spool.take(Vec::new()).unwrap().unwrap();
            assert_eq!(taken, (number, record(number, 5000)));
        }
        // Goes on behind what is there.
        spool.put(4, &record(4, 70_000)).unwrap();
        assert_eq!(spool.flush().unwrap(), Some(6));
        assert_eq!(
            spool.take(Vec::new()).unwrap(),
            Some((4, record(4, 70_000)))
        );
        // Another session of the volume has no use for it.
        let other = Spool::open(dir.path(), "t").unwrap();
        assert_eq!(other.go_on_at(0).unwrap().watermark(), 0);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
