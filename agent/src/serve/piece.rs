//! One regular file of a served volume as a client of blocks sees it: the ground of NBD and ublk.
//!
//! Non-goal: growing; whoever speaks of bytes beyond its end is refused by the front-end.

use super::store::Store;
use crate::volume::walk;
use nix::fcntl::OFlag;
use nix::sys::stat::{Mode, SFlag, fstat};
use std::fs::File;
use std::io;
use std::sync::Arc;

/// Longest name of an export that NBD allows; no path of a file is longer (`PATH_MAX`).
pub(super) const NAME_CAP: usize = 4096;
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
