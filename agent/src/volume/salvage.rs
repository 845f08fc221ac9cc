//! Reading what a failing disk still gives up.
//!
//! Rule: large reads first; what fails is read again last, in pieces of 4 KiB, the sector of today's disks,
//! each tried twice. What cannot be read becomes zeros and is named, never silent. What leads to contents (names,
//! `stat`, attributes) is tried twice at once, and what it hides is named too.

use super::aligned::{ALIGNMENT, Aligned};
use super::tree::shown;
use nix::errno::Errno;
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};

/// Tries for each piece in one epoch: a sector that fails twice in a row rarely comes back at the third.
const TRIES: u32 = 2;

/// What a disk does not give up: bytes of a file, or what leads to them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unreadable {
    /// Path in the volume, made printable.
    pub path: String,
    /// Where they begin, in bytes.
    pub offset: u64,
    /// How many.
    pub length: u64,
    /// Where it is not bytes: what cannot be read, why, and what that means for the target.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub entry: Option<String>,
    /// The target keeps the blocks around the bytes as they came before; else the bytes are zeros there.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub kept: bool,
}

impl Unreadable {
    /// The bytes.
    #[must_use]
    pub fn range(&self) -> Range<u64> {
        self.offset..self.offset.saturating_add(self.length)
    }
}

/// What is lost of one file, of a list in the order of path and offset.
#[must_use]
pub fn of_file<'a>(lost: &'a [Unreadable], path: &[u8]) -> &'a [Unreadable] {
    let path = shown(path);
    let from = &lost[lost.partition_point(|one| *one.path < *path)..];
    &from[..from.partition_point(|one| one.path == path)]
}

impl std::fmt::Display for Unreadable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            path,
            offset,
            length,
            entry,
            kept,
        } = self;
        let there = if *kept {
            "around which the target keeps what came before"
        } else {
            "zeros on the target"
        };
        match entry {
            Some(entry) => write!(f, "{path}: {entry}"),
            None => write!(f, "{path}: {length} bytes at offset {offset}, {there}"),
        }
    }
}

/// Whether the disk failed, as the block layer tells it: `BLK_STS_IOERR`, `MEDIUM`, `TARGET`, `PROTECTION` and
/// `TIMEOUT` (block/blk-core.c); a file system with checksums says the first, or of what it keeps for itself that
/// its checksum is wrong (EBADMSG) or that it makes no sense (EUCLEAN): ext4, xfs and f2fs.
#[must_use]
pub fn is_media_error(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error().map(Errno::from_raw),
        Some(
            Errno::EIO
                | Errno::ENODATA
                | Errno::EREMOTEIO
                | Errno::EILSEQ
                | Errno::ETIMEDOUT
                | Errno::EBADMSG
                | Errno::EUCLEAN
        )
    )
}

/// Tries again what the disk failed at.
///
/// # Errors
/// Those of the last try.
pub fn insist<T>(mut attempt: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    let mut tries = TRIES;
    loop {
        match attempt() {
            Err(error) if tries > 1 && is_media_error(&error) => tries -= 1,
            other => return other,
        }
    }
}

/// Reads from `offset`, a multiple of 4096, in small pieces; what lies past the end of the file or cannot be
/// read is zeros. Returns how much lies before the end, and the ranges of the file that could not be read.
///
/// # Errors
/// Any error but the disk's.
pub fn read(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<(usize, Vec<Range<u64>>)> {
    // Reading ahead would go for what lies behind a bad piece, and fail as a whole. It is only advice.
    let _ = posix_fadvise(file, 0, 0, PosixFadviseAdvice::POSIX_FADV_RANDOM);
    // Past the page cache, whose units can be larger and fail as a whole.
    let direct = File::options()
        .read(true)
        .custom_flags(libc::O_DIRECT)
        .open(format!("/proc/self/fd/{}", file.as_raw_fd()))
        .ok();
    let mut memory = Aligned::default();
    let mut lost: Vec<Range<u64>> = Vec::new();
    let mut done = 0;
    for (piece, at) in buffer
        .chunks_mut(ALIGNMENT)
        .zip((offset..).step_by(ALIGNMENT))
    {
        let space = memory.space(ALIGNMENT);
        let read = match direct.as_ref().map(|direct| try_read(direct, space, at)) {
            Some(Err(error)) if error.kind() == io::ErrorKind::InvalidInput => {
                try_read(file, space, at)
            }
            Some(read) => read,
            None => try_read(file, space, at),
        };
        match read.map(|length| length.min(piece.len())) {
            Ok(length) => {
                piece[..length].copy_from_slice(&space[..length]);
                piece[length..].fill(0);
                done += length;
            }
            Err(error) if is_media_error(&error) => {
                piece.fill(0);
                done += piece.len();
                let end = at + piece.len() as u64;
                match lost.last_mut() {
                    Some(last) if last.end == at => last.end = end,
                    _ => lost.push(at..end),
                }
            }
            Err(error) => return Err(error),
        }
    }
    Ok((done, lost))
}

fn try_read(file: &File, into: &mut [u8], offset: u64) -> io::Result<usize> {
    insist(|| {
        loop {
            match file.read_at(into, offset) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                other => return other,
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_is_lost_of_a_file_is_found_among_that_of_others(
            paths in prop::collection::vec("[a-c]{1,2}", 0..20), wanted in "[a-c]{1,2}",
        ) {
            let lost = |(path, offset): (&String, u64)| Unreadable {
                path: path.clone(), offset, length: 1, entry: None, kept: false,
            };
            let mut all: Vec<Unreadable> = paths.iter().zip(0..).map(lost).collect();
            all.sort_by_key(|one| (one.path.clone(), one.offset));
            let found: Vec<&Unreadable> = all.iter().filter(|one| one.path == wanted).collect();
            prop_assert_eq!(of_file(&all, wanted.as_bytes()).iter().collect::<Vec<_>>(), found);
        }
    }
}
