//! A whole tree read and signed in one go: what a target already holds, or what a proof compares.

use super::aligned::Aligned;
use super::change::Baseline;
use super::confined::Confined;
use super::one::{One, stat_of};
use super::rewritten::merged;
use super::salvage::{self, Unreadable, insist, is_media_error};
use super::sign::{self, BlockSize, FleetKey};
use super::state::{Builder, TreeState};
use super::tree::{Entry, Exception, Kind, Xattr, shown};
use super::unused;
use super::walk::{self, Found, WalkError, bare_entry, hard_link, kind_of};
use nix::fcntl::OFlag;
use nix::sys::stat::{FileStat, Mode, SFlag};
use nix::unistd::{Whence, lseek};
use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

/// Reading a tree failed; names the path and the cause.
pub type ScanError = WalkError;

/// Reads and signs everything beneath `path`.
///
/// # Errors
/// Anything that exists but cannot be read.
pub fn scan(
    path: &Path,
    key: &FleetKey,
    block_size: BlockSize,
) -> Result<(TreeState, Vec<Exception>), ScanError> {
    scan_root(&walk::open_root(path)?, key, block_size)
}

/// The same of a volume that is open.
///
/// # Errors
/// As [`scan`].
pub fn scan_root(
    root: &Confined,
    key: &FleetKey,
    block_size: BlockSize,
) -> Result<(TreeState, Vec<Exception>), ScanError> {
    scan_all(root, key, block_size, false)
}

/// The same without what a file system on a volume of one piece does not use, and without what a disk does not give
/// up, which is named: the root of the result is that of a sender's first epoch over the same tree.
///
/// # Errors
/// As [`scan`].
pub fn scan_as_sent(
    root: &Confined,
    key: &FleetKey,
    block_size: BlockSize,
) -> Result<(TreeState, Vec<Exception>), ScanError> {
    scan_all(root, key, block_size, true)
}

fn scan_all(
    root: &Confined,
    key: &FleetKey,
    block_size: BlockSize,
    as_sent: bool,
) -> Result<(TreeState, Vec<Exception>), ScanError> {
    let baseline = Baseline::establish(root, true, Duration::ZERO);
    let mut walk = walk::walk(root);
    // A target's tree must be known whole.
    let mut lost = (as_sent && root.one().is_none()).then(Vec::new);
    let mut bytes = Vec::new();
    let mut primaries: HashMap<(u64, u64), Box<[u8]>> = HashMap::new();
    let mut state = Builder::new(key, block_size, None);
    let mut memory = Aligned::default();
    let buffer = memory.space(usize::try_from(block_size.bytes()).unwrap_or(1 << 20));
    for found in &mut walk {
        let found = match (found, &mut lost) {
            (Err(error), Some(lost)) if error.is_loss() => {
                lost.push(error.loss_of_names());
                continue;
            }
            (found, _) => found?,
        };
        let racy = baseline.is_racy(&found.stat);
        let kind = kind_of(&found.stat);
        if found.stat.st_nlink > 1 && kind != SFlag::S_IFDIR {
            let identity = (found.stat.st_dev, found.stat.st_ino);
            if let Some(primary) = primaries.get(&identity) {
                state.push(&hard_link(&found.path, &found.stat, primary, racy));
                continue;
            }
            primaries.insert(identity, found.path.clone());
        }
        if kind != SFlag::S_IFREG {
            match (walk::special_entry(root, &found, racy), &mut lost) {
                (Err(error), Some(lost)) if error.is_loss() => {
                    lost.push(error.loss(walk::LOST));
                    if kind == SFlag::S_IFDIR {
                        let kind = Kind::Directory;
                        state.push(&bare_entry(&found.path, &found.stat, kind, racy));
                    }
                }
                (entry, _) => state.push(&entry?),
            }
            continue;
        }
        match scan_file(root, &found, key, block_size, buffer, racy, as_sent) {
            Ok((mut entry, xattrs, zeros)) => {
                bytes.extend(zeros.into_iter().map(|bytes| unread(&found.path, &bytes)));
                entry.xattrs = match (xattrs, &mut lost) {
                    (Err(error), Some(lost)) if error.is_loss() => {
                        lost.push(error.loss(walk::LOST_ATTRIBUTES));
                        Vec::new()
                    }
                    (xattrs, _) => xattrs?,
                };
                state.push(&entry);
            }
            Err(error) => match &mut lost {
                Some(lost) if error.is_loss() => lost.push(error.loss(walk::LOST)),
                _ => return Err(error),
            },
        }
    }
    let mut state = state.finish();
    state.unreadable = lost.unwrap_or_default();
    state.unreadable.extend(bytes);
    let place = |lost: &Unreadable| (lost.path.clone(), lost.offset);
    state.unreadable.sort_by_cached_key(place);
    Ok((state, walk.skipped()))
}

/// Bytes that were read as zeros, whatever a target has of them.
fn unread(path: &[u8], bytes: &Range<u64>) -> Unreadable {
    let length = bytes.end - bytes.start;
    Unreadable {
        path: shown(path).into_owned(),
        offset: bytes.start,
        length,
        entry: Some(format!("{length} bytes at offset {}", bytes.start)),
        kept: false,
    }
}

/// A file without its attributes, those, which a disk can refuse alone, and what is zeros because a disk refused it.
type Scanned = (Entry, Result<Vec<Xattr>, ScanError>, Vec<Range<u64>>);

fn scan_file(
    root: &Confined,
    found: &Found,
    key: &FleetKey,
    block_size: BlockSize,
    buffer: &mut [u8],
    racy: bool,
    as_sent: bool,
) -> Result<Scanned, ScanError> {
    let failed = |action, source: io::Error| WalkError::new(root, action, &found.path, source);
    let (file, stat) = open_file(root, &found.path)?;
    let size = u64::try_from(stat.st_size).unwrap_or(0);
    let holes = Holes::of(&file, &stat).map_err(|e| failed("find the holes of", e))?;
    let unused = if as_sent && root.one().is_some() {
        // A map that is doubted is not used by a sender either.
        unused::of_file(root.path(), &file, size, block_size, true).unwrap_or_default()
    } else {
        None
    };
    let is_unused = |index| unused.as_ref().is_some_and(|map| map.has(index));
    let (mut blocks, mut zeros) = (Vec::new(), Vec::new());
    for index in 0..block_size.blocks_of(size) {
        let length = block_size.length_of(size, index);
        let offset = index * block_size.bytes();
        blocks.push(if is_unused(index) || holes.covers(offset, length as u64) {
            sign::ZERO
        } else {
            let block = &mut buffer[..length];
            match read_full(&file, block, offset) {
                // What a disk does not give up is zeros, as when it was sent.
                Err(error) if is_media_error(&error) => {
                    let read = salvage::read(&file, block, offset);
                    zeros.extend(read.map_err(|e| failed("read", e))?.1);
                }
                other => {
                    other.map_err(|e| failed("read", e))?;
                }
            }
            sign::signature(key, block)
        });
    }
    let entry = bare_entry(&found.path, &stat, Kind::File { size, blocks }, racy);
    let xattrs = walk::read_xattrs(root, &found.path, &file);
    Ok((entry, xattrs, merged(zeros)))
}

/// Opens a regular file for reading, without touching its access time where that is allowed; a device for
/// direct reads.
///
/// # Errors
/// It cannot be opened, or is no longer a regular file (then [`WalkError::vanished`] holds).
pub fn open_file(root: &Confined, path: &[u8]) -> Result<(File, FileStat), ScanError> {
    let failed = |action, source: io::Error| WalkError::new(root, action, path, source);
    // O_NONBLOCK: should a FIFO have taken the place, opening must not wait for a writer.
    let mut flags = OFlag::O_RDONLY | OFlag::O_NONBLOCK;
    if root.one().is_some_and(One::is_device) {
        flags |= OFlag::O_DIRECT;
    }
    let open = || match root.open_beneath(path, flags | OFlag::O_NOATIME, Mode::empty()) {
        Err(nix::errno::Errno::EPERM) => root.open_beneath(path, flags, Mode::empty()),
        other => other,
    };
    let fd = insist(|| open().map_err(Into::into)).map_err(|e| failed("open", e))?;
    let stat = stat_of(root, &fd).map_err(|e| failed("stat", e.into()))?;
    if kind_of(&stat) != SFlag::S_IFREG {
        return Err(failed("read", nix::errno::Errno::ENXIO.into()));
    }
    Ok((File::from(fd), stat))
}

/// Reads until `buffer` is full or the file ends; what lies past the end becomes zeros.
///
/// # Errors
/// The I/O error of `pread`.
pub fn read_full(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut done = 0;
    while done < buffer.len() {
        match file.read_at(&mut buffer[done..], offset + done as u64) {
            Ok(0) => break,
            Ok(n) => done += n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    buffer[done..].fill(0);
    Ok(done)
}

/// Where a file has data; the rest is holes.
#[derive(Clone, Debug, Default)]
pub struct Holes {
    /// Start and end of each extent with data, in order; none when the file is not sparse.
    data: Option<Vec<(u64, u64)>>,
}

/// Where data begins at or after `offset` of a file; none where there is only hole up to its end. All of a file is
/// data where the file system cannot tell.
///
/// # Errors
/// The error of `lseek`.
pub fn next_data(file: &File, offset: u64) -> io::Result<Option<u64>> {
    seek(file, offset, Whence::SeekData)
}

/// Where the data at `offset` of a file ends: at a hole, or at the file's end.
///
/// # Errors
/// The error of `lseek`.
pub fn next_hole(file: &File, offset: u64) -> io::Result<u64> {
    // It may have been cut short meanwhile.
    Ok(seek(file, offset, Whence::SeekHole)?.unwrap_or(offset))
}

fn seek(file: &File, offset: u64, whence: Whence) -> io::Result<Option<u64>> {
    let from = i64::try_from(offset).unwrap_or(i64::MAX);
    match lseek(file, from, whence) {
        Ok(at) => Ok(Some(at.unsigned_abs())),
        Err(nix::errno::Errno::ENXIO) => Ok(None),
        Err(nix::errno::Errno::EINVAL) => Ok(Some(match whence {
            Whence::SeekHole => i64::MAX as u64,
            _ => offset,
        })),
        Err(error) => Err(error.into()),
    }
}

const LARGEST_BLOCK: u64 = 1 << 20;

/// Most extents that are remembered; a file with more is read in full (zeros are still found).
const EXTENTS_CAP: usize = 100_000;

impl Holes {
    /// Finds the holes of an open file; none where the disk does not give them up, so that all of the file is read and
    /// what is lost of it found.
    ///
    /// # Errors
    /// The error of `lseek`.
    pub fn of(file: &File, stat: &FileStat) -> io::Result<Self> {
        match insist(|| Self::find(file, stat)) {
            Err(error) if is_media_error(&error) => Ok(Self::default()),
            other => other,
        }
    }

    /// How much of a file of so many bytes is holes that hold whole blocks, however large those are: a block with a byte
    /// of data in it moves.
    #[must_use]
    pub fn bytes(&self, size: u64) -> u64 {
        let Some(extents) = &self.data else {
            return 0;
        };
        let whole = |start: u64, end: u64| {
            let (from, to) = (
                start.next_multiple_of(LARGEST_BLOCK),
                end / LARGEST_BLOCK * LARGEST_BLOCK,
            );
            to.saturating_sub(from)
        };
        let mut holes = 0;
        let mut from = 0;
        for (start, end) in extents {
            holes += whole(from, *start);
            from = *end;
        }
        holes + whole(from, size)
    }

    fn find(file: &File, stat: &FileStat) -> io::Result<Self> {
        if stat.st_blocks.saturating_mul(512) >= stat.st_size {
            return Ok(Self::default());
        }
        let mut data = Vec::new();
        let mut offset = 0;
        while let Some(start) = next_data(file, offset)? {
            offset = next_hole(file, start)?;
            data.push((start, offset));
            if data.len() > EXTENTS_CAP {
                return Ok(Self::default());
            }
        }
        Ok(Self { data: Some(data) })
    }

    /// Whether `len` bytes from `offset` are nothing but hole.
    #[must_use]
    pub fn covers(&self, offset: u64, len: u64) -> bool {
        let Some(data) = &self.data else {
            return false;
        };
        let first = data.partition_point(|&(_, end)| end <= offset);
        data.get(first)
            .is_none_or(|&(start, _)| start >= offset + len)
    }
}
