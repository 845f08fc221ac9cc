//! The file of a log: numbered, checksummed records behind a head.
//!
//! Invariants: a record that is not whole, and all after it, are cut off when the log is opened; numbers have no
//! gaps; what is trimmed gives its space back and is never read again.

use super::super::codec::{Malformed, Reader};
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, PosixFadviseAdvice, fallocate, posix_fadvise};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt as _};
use std::path::Path;

/// Names one log: the two ends of a mirror keep the same one.
pub type LogId = [u8; 16];

const MAGIC: &[u8; 8] = b"LBmirro1";
/// Where the records begin in a fresh log.
const HEAD: u64 = 4096;
/// Bytes before the content of a record: its length, its number, its check.
const FRAME: usize = 4 + 8 + 8;
/// Most bytes of records that a log ever takes, also of those that were trimmed: 64 GiB are written back in minutes at
/// 500 MB/s. Beyond it the mirror ends rather than filling the disk of the source.
const LOG_CAP: u64 = 64 << 30;
/// Space that is had for the log ahead, and how much of it is left when more is asked for: what makes space on a full
/// disk is logged too.
const AHEAD: u64 = 8 << 20;
const SPARE: u64 = 1 << 20;
/// Longest content: a write with its path, or an entry with all its attributes.
const CONTENT_CAP: usize = super::WRITE_CAP + (32 << 10);

/// One record.
#[derive(Clone, Copy, Debug)]
pub struct Record<'a> {
    /// Its number, from 1.
    pub number: u64,
    /// Its content.
    pub content: &'a [u8],
}

impl<'a> Record<'a> {
    /// Appends its layout.
    pub fn encode(&self, out: &mut Vec<u8>) {
        // Contents are capped far below 4 GiB.
        out.extend_from_slice(&(self.content.len() as u32).to_le_bytes());
        out.extend_from_slice(&self.number.to_le_bytes());
        out.extend_from_slice(&check(self.number, self.content));
        out.extend_from_slice(self.content);
    }

    /// From its layout.
    ///
    /// # Errors
    /// It is not whole, or too long.
    pub fn decode(reader: &mut Reader<'a>) -> Result<Self, Malformed> {
        let length = reader.u32()? as usize;
        if length > CONTENT_CAP {
            return Err(Malformed("a mirrored record is longer than its cap"));
        }
        let number = reader.u64()?;
        let told: [u8; 8] = reader.array()?;
        let content = reader.bytes(length)?;
        if check(number, content) != told {
            return Err(Malformed("a mirrored record is not what was written"));
        }
        Ok(Self { number, content })
    }
}

fn check(number: u64, content: &[u8]) -> [u8; 8] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&number.to_le_bytes()).update(content);
    let mut check = [0; 8];
    check.copy_from_slice(&hasher.finalize().as_bytes()[..8]);
    check
}

/// Records are read from here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mark {
    /// Number of the next record.
    number: u64,
    offset: u64,
}

impl Mark {
    /// Number of the record that comes next.
    #[must_use]
    pub fn next(&self) -> u64 {
        self.number
    }
}

/// A log.
pub struct Log {
    file: File,
    id: LogId,
    start: Mark,
    end: Mark,
    /// Up to where it is known to be durable.
    durable: Mark,
    /// Up to where there is space.
    reserved: u64,
    frame: Vec<u8>,
    /// Not all of it had come to the disk when it was opened.
    is_torn: bool,
}

impl Log {
    /// Opens the log at `path`, cut back to its last whole record, or makes it with the name that `id` gives.
    ///
    /// # Errors
    /// The file cannot be used, or is no log.
    pub fn open(path: &Path, id: impl FnOnce() -> io::Result<LogId>) -> io::Result<Self> {
        let mut options = OpenOptions::new();
        options.read(true).write(true);
        let file = match options.open(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Self::make(path, &id()?);
            }
            opened => opened?,
        };
        // What could not be written back is clean memory from then on, and the kernel tells of it once: perhaps now, perhaps
        // it told who died before. So nothing is believed but what the disk gives.
        let synced = file.sync_all();
        if let Err(error) = &synced {
            tracing::warn!(log = %path.display(), "not all of it is on the disk: {error}; it goes on with what is");
        }
        posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?;
        let mut head = [0; 40];
        file.read_exact_at(&mut head, 0)?;
        let broken = || io::Error::new(io::ErrorKind::InvalidData, "it is no log of a mirror");
        let rest = head.strip_prefix(MAGIC).ok_or_else(broken)?;
        let mut reader = Reader::new(rest);
        let (Ok(id), Ok(number), Ok(offset)) = (reader.array(), reader.u64(), reader.u64()) else {
            return Err(broken());
        };
        if !(1..=LOG_CAP).contains(&number) || !(HEAD..=LOG_CAP).contains(&offset) {
            return Err(broken());
        }
        let start = Mark { number, offset };
        let mut log = Self {
            file,
            id,
            start,
            end: start,
            durable: start,
            reserved: 0,
            frame: Vec::new(),
            is_torn: synced.is_err(),
        };
        let length = log.file.metadata()?.len();
        let mut batch = Vec::new();
        let mut at = start;
        while let Ok(next) = log.batch(at, length, 0, &mut batch)
            && next != at
        {
            at = next;
        }
        log.end = at;
        log.file.set_len(at.offset)?;
        log.file.sync_all()?;
        log.durable = at;
        Ok(log)
    }

    /// Whether the disk had not taken all of it when it was opened: records may be gone.
    #[must_use]
    pub fn is_torn(&self) -> bool {
        self.is_torn
    }

    fn make(path: &Path, id: &LogId) -> io::Result<Self> {
        let new = path.with_extension("new");
        let file = OpenOptions::new()
            .create(true)
            .truncate(true)
            .read(true)
            .write(true)
            .mode(0o600)
            .open(&new)?;
        let start = Mark {
            number: 1,
            offset: HEAD,
        };
        let log = Self {
            file,
            id: *id,
            start,
            end: start,
            durable: start,
            reserved: 0,
            frame: Vec::new(),
            is_torn: false,
        };
        log.head()?;
        log.file.set_len(HEAD)?;
        log.file.sync_all()?;
        std::fs::rename(&new, path)?;
        if let Some(directory) = path.parent() {
            File::open(directory)?.sync_all()?;
        }
        Ok(log)
    }

    fn head(&self) -> io::Result<()> {
        let mut head = MAGIC.to_vec();
        head.extend_from_slice(&self.id);
        head.extend_from_slice(&self.start.number.to_le_bytes());
        head.extend_from_slice(&self.start.offset.to_le_bytes());
        self.file.write_all_at(&head, 0)
    }

    /// Its name.
    #[must_use]
    pub fn id(&self) -> LogId {
        self.id
    }

    /// Number of its last record; 0 for none.
    #[must_use]
    pub fn last(&self) -> u64 {
        self.end.number - 1
    }

    /// Where its records begin.
    #[must_use]
    pub fn start(&self) -> Mark {
        self.start
    }

    /// Where the next record will be.
    #[must_use]
    pub fn end(&self) -> Mark {
        self.end
    }

    /// Bytes of its records.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.end.offset - self.start.offset
    }

    /// Makes it durable and gives the number of its last record. Where that fails only those records are in it that were
    /// durable before: the kernel tells a failure once, and then takes what it lost for written.
    ///
    /// # Errors
    /// The disk's.
    pub fn sync(&mut self) -> io::Result<u64> {
        let synced = self.file.sync_data();
        self.synced(synced)?;
        Ok(self.last())
    }

    fn synced(&mut self, synced: io::Result<()>) -> io::Result<()> {
        if synced.is_ok() {
            self.durable = self.end;
        } else if self.durable != self.end {
            self.end = self.durable;
            self.reserved = 0;
            self.file.set_len(self.end.offset)?;
        }
        synced
    }

    /// Sees to it that there is space for so many bytes of content.
    ///
    /// # Errors
    /// The disk is full.
    pub fn reserve(&mut self, bytes: u64) -> io::Result<()> {
        let needed = self.end.offset + bytes + SPARE;
        if needed <= self.reserved {
            return Ok(());
        }
        let signed = |bytes: u64| i64::try_from(bytes).unwrap_or(i64::MAX);
        let mut refused = Errno::ENOSPC;
        for to in [needed + AHEAD, needed] {
            let (mode, from) = (FallocateFlags::FALLOC_FL_KEEP_SIZE, self.end.offset);
            let reserve = || fallocate(&self.file, mode, signed(from), signed(to - from));
            let mut reserved = reserve();
            while reserved == Err(Errno::EINTR) {
                reserved = reserve();
            }
            match reserved {
                Err(error @ (Errno::ENOSPC | Errno::EDQUOT)) => refused = error,
                // A file system that gives no space ahead has none to run out of before the data does.
                _ => {
                    self.reserved = to;
                    return Ok(());
                }
            }
        }
        Err(refused.into())
    }

    /// Appends a record and gives its number.
    ///
    /// # Errors
    /// It cannot be written; the log is as it was.
    pub fn append(&mut self, content: &[u8]) -> io::Result<u64> {
        let number = self.end.number;
        if self.end.offset + (FRAME + content.len()) as u64 > LOG_CAP {
            return Err(io::Error::other(
                "the log of the mirror is at its cap of 64 GiB",
            ));
        }
        let mut frame = std::mem::take(&mut self.frame);
        frame.clear();
        Record { number, content }.encode(&mut frame);
        let written = self.file.write_all_at(&frame, self.end.offset);
        let length = frame.len() as u64;
        self.frame = frame;
        written?;
        self.end.offset += length;
        self.end.number += 1;
        Ok(number)
    }

    /// Forgets all records before `mark`.
    ///
    /// # Errors
    /// The head cannot be written.
    pub fn trim(&mut self, mark: Mark) -> io::Result<()> {
        let (from, to) = (self.start.offset, mark.offset);
        if mark.number <= self.start.number {
            return Ok(());
        }
        self.start = mark;
        self.head()?;
        let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let signed = |bytes: u64| i64::try_from(bytes).unwrap_or(i64::MAX);
        // A file system without holes keeps them until the log is removed.
        let _ = fallocate(&self.file, mode, signed(from), signed(to - from));
        Ok(())
    }

    /// Puts whole records from `from` on into `batch`, at least one and then up to `cap` bytes, and gives where the
    /// next begins; `from` itself when there are no more.
    ///
    /// # Errors
    /// They cannot be read, or are not whole.
    pub fn read(&self, from: Mark, cap: usize, batch: &mut Vec<u8>) -> io::Result<Mark> {
        self.batch(from, self.end.offset, cap, batch)
    }

    fn batch(&self, from: Mark, end: u64, cap: usize, batch: &mut Vec<u8>) -> io::Result<Mark> {
        batch.clear();
        let mut at = from;
        while at.offset < end {
            let mut length = [0; 4];
            self.file.read_exact_at(&mut length, at.offset)?;
            let length = FRAME + u32::from_le_bytes(length) as usize;
            if length > FRAME + CONTENT_CAP || length as u64 > end - at.offset {
                return Err(torn());
            }
            if !batch.is_empty() && batch.len() + length > cap {
                break;
            }
            let start = batch.len();
            batch.resize(start + length, 0);
            self.file.read_exact_at(&mut batch[start..], at.offset)?;
            let record = Record::decode(&mut Reader::new(&batch[start..]));
            if !record.is_ok_and(|record| record.number == at.number) {
                batch.truncate(start);
                return Err(torn());
            }
            at.offset += length as u64;
            at.number += 1;
            if cap == 0 {
                break;
            }
        }
        Ok(at)
    }
}

fn torn() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "a record of it is not whole")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(log: &Log) -> Vec<(u64, Vec<u8>)> {
        let (mut at, mut batch, mut found) = (log.start(), Vec::new(), Vec::new());
        loop {
            let next = log.read(at, 64, &mut batch).unwrap();
            if next == at {
                return found;
            }
            at = next;
            let mut reader = Reader::new(&batch);
            while !reader.is_empty() {
                let record = Record::decode(&mut reader).unwrap();
                found.push((record.number, record.content.to_vec()));
            }
        }
    }

    #[test]
    fn a_log_cut_at_any_byte_keeps_its_whole_records_and_goes_on() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        let mut log = Log::open(&path, || Ok([7; 16])).unwrap();
        let mut ends = vec![log.end().offset];
        for n in 0..5_u8 {
            assert_eq!(
                log.append(&vec![n; usize::from(n) * 13]).unwrap(),
                u64::from(n) + 1
            );
            ends.push(log.end().offset);
        }
        let whole = all(&log);
        assert_eq!(whole.len(), 5);
        drop(log);
        let bytes = std::fs::read(&path).unwrap();
        for cut in HEAD as usize..=bytes.len() {
            std::fs::write(&path, &bytes[..cut]).unwrap();
            let mut log = Log::open(&path, || panic!("it is there")).unwrap();
            let kept = ends.iter().filter(|end| **end <= cut as u64).count() - 1;
            assert_eq!(all(&log), whole[..kept], "cut at {cut}");
            assert_eq!(log.append(b"more").unwrap(), kept as u64 + 1);
            assert_eq!(log.id(), [7; 16]);
        }
    }

    #[test]
    fn what_could_not_be_made_durable_is_not_in_a_log_any_more_and_is_appended_again() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        let mut log = Log::open(&path, || Ok([7; 16])).unwrap();
        log.append(b"one").unwrap();
        assert_eq!(log.sync().unwrap(), 1);
        for _ in 0..2 {
            log.append(b"lost").unwrap();
            log.append(b"too").unwrap();
            assert!(log.synced(Err(Errno::EIO.into())).is_err());
            assert_eq!((log.last(), all(&log).len()), (1, 1));
        }
        assert_eq!(log.append(b"two").unwrap(), 2);
        assert_eq!(log.sync().unwrap(), 2);
        drop(log);
        let log = Log::open(&path, || panic!("it is there")).unwrap();
        assert_eq!(all(&log), [(1, b"one".to_vec()), (2, b"two".to_vec())]);
    }

    #[test]
    fn a_flipped_bit_ends_a_log_and_what_is_trimmed_is_gone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        let mut log = Log::open(&path, || Ok([7; 16])).unwrap();
        let mut marks = vec![log.end()];
        for n in 0..4_u8 {
            log.append(&[n; 5000]).unwrap();
            marks.push(log.end());
        }
        log.trim(marks[2]).unwrap();
        assert_eq!(all(&log).first().unwrap().0, 3);
        drop(log);
        let log = Log::open(&path, || panic!("it is there")).unwrap();
        assert_eq!((all(&log).len(), log.last()), (2, 4));
        let at = marks[3].offset + 100;
        let file = log.file.try_clone().unwrap();
        drop(log);
        file.write_all_at(b"!", at).unwrap();
        assert_eq!(
            Log::open(&path, || panic!("it is there")).unwrap().last(),
            3
        );
    }
}
