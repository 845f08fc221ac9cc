//! One regular file of a served volume as a client of blocks sees it: the ground of NBD and ublk.
//!
//! Non-goal: growing; whoever speaks of bytes beyond its end is refused by the front-end.

use super::store::{Extent, Store};
use crate::transfer::fetch::BLOCK;
use crate::volume::scan::read_full;
use crate::volume::walk;
use nix::fcntl::OFlag;
use nix::sys::stat::{Mode, SFlag, fstat};
use std::fs::File;
use std::io;
use std::sync::Arc;

/// Longest name of an export that NBD allows; no path of a file is longer (`PATH_MAX`).
pub(super) const NAME_CAP: usize = 4096;
/// Parts of one read; what is in more is sent as it is.
const PARTS_CAP: usize = 64;
/// Files in a list.
const LIST_CAP: usize = 4096;

/// The file, open.
pub(super) struct Piece {
    store: Arc<Store>,
    file: File,
    number: Option<u32>,
    pub(super) size: u64,
}

/// Paths of the volume's regular files that are not empty.
pub(super) fn names(store: &Store) -> Vec<Box<[u8]>> {
    let found = walk::walk(store.data()).flatten();
    let files = found.filter(|found| {
        walk::kind_of(&found.stat) == SFlag::S_IFREG
            && found.stat.st_size > 0
            && found.path.len() <= NAME_CAP
    });
    files.take(LIST_CAP).map(|found| found.path).collect()
}

/// Why there is no piece of this name.
pub(super) fn unknown(store: &Store, name: &[u8]) -> String {
    if name.is_empty() {
        let count = names(store).len();
        format!("the volume has {count} files that are not empty: name one of them")
    } else {
        "the volume has no such regular file".to_owned()
    }
}

impl Piece {
    /// Opens the file with this path; the empty name is the only file of a volume that has but one.
    pub(super) fn find(store: &Arc<Store>, name: &[u8], read_only: bool) -> Option<Self> {
        let only;
        let path = if name.is_empty() {
            let [one] = names(store).try_into().ok()?;
            only = one;
            &*only
        } else {
            name
        };
        let path = crate::volume::tree::checked_path(path).ok()?;
        let flags = if read_only {
            OFlag::O_RDONLY
        } else {
            OFlag::O_RDWR
        };
        let fd = store
            .data()
            .open_beneath(&path, flags | OFlag::O_NONBLOCK, Mode::empty());
        let file = File::from(fd.ok()?);
        let stat = fstat(&file).ok()?;
        let regular = walk::kind_of(&stat) == SFlag::S_IFREG;
        regular.then(|| Self {
            number: store.number(stat.st_ino),
            size: stat.st_size.unsigned_abs(),
            file,
            store: Arc::clone(store),
        })
    }

    /// Fills the buffer.
    ///
    /// # Errors
    /// As [`Store::read`].
    pub(super) fn read(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let read = self.store.read(&self.file, self.number, buffer, offset)?;
        // A file that was cut short by somebody else reads as zeros beyond its end.
        buffer[read..].fill(0);
        Ok(())
    }

    /// Fills the buffer, which holds zeros, with what is no hole, and says which parts are.
    ///
    /// # Errors
    /// As [`Store::read`].
    pub(super) fn read_parts(&self, buffer: &mut [u8], offset: u64) -> io::Result<Vec<Extent>> {
        let length = buffer.len() as u64;
        let all = Extent {
            length,
            is_hole: false,
        };
        // To find where the data around it ends costs more than a few zeros.
        if length < BLOCK {
            self.read(buffer, offset)?;
            return Ok(vec![all]);
        }
        if let Some(wanted) = self.store.want(self.number, offset, length) {
            self.store.wait(&wanted)?;
        }
        let mut parts = self.extents(offset, length, PARTS_CAP)?;
        if parts.iter().map(|part| part.length).sum::<u64>() < length {
            parts = vec![all];
        }
        let mut at = 0;
        for part in &parts {
            let end = at + part.length as usize;
            if !part.is_hole {
                read_full(&self.file, &mut buffer[at..end], offset + at as u64)?;
            }
            at = end;
        }
        Ok(parts)
    }

    /// What a range consists of, in `cap` parts at most, after the source was asked about what is absent.
    ///
    /// # Errors
    /// The disk's error.
    pub(super) fn map(&self, offset: u64, length: u64, cap: usize) -> io::Result<Vec<Extent>> {
        self.store.learn_holes(self.number, offset, length);
        self.extents(offset, length, cap)
    }

    fn extents(&self, offset: u64, length: u64, cap: usize) -> io::Result<Vec<Extent>> {
        let range = offset..offset + length;
        self.store.extents(&self.file, self.number, range, cap)
    }

    /// Writes all of it.
    ///
    /// # Errors
    /// As [`Store::write`].
    pub(super) fn write(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.store.write(&self.file, self.number, bytes, offset)
    }

    /// Makes a range read as zeros: as a hole, or allocated.
    ///
    /// # Errors
    /// As [`Store::zero`].
    pub(super) fn zero(&self, offset: u64, length: u64, hole: bool) -> io::Result<()> {
        self.store
            .zero(&self.file, self.number, offset, length, hole)
    }

    /// Makes all that was written durable.
    ///
    /// # Errors
    /// The disk's error.
    pub(super) fn sync(&self) -> io::Result<()> {
        self.store.sync(&self.file, self.number)
    }
}
