//! Open files and directories, and whom of them the kernel serves by itself.
//!
//! The kernel wants all open handles of a file that it passes through to share one backing, and none of them to
//! go through its page cache at the same time. So a file is passed through only when it is whole and no handle
//! from before it was whole is open.

use crate::serve::store::Held;
use fuser::{BackingId, FileType};
use std::collections::HashMap;
use std::ffi::OsString;
use std::fs::File;
use std::sync::{Arc, Weak};

/// An open file.
pub(super) struct Handle {
    pub(super) inode: u64,
    pub(super) file: File,
    pub(super) number: Option<u32>,
    /// Its origin, so that what is absent still comes when its name is removed.
    _held: Option<Held>,
    /// Kept for as long as the kernel may use it.
    backing: Option<Arc<BackingId>>,
}

/// A listed directory.
pub(super) type Listing = Vec<(u64, FileType, OsString)>;

#[derive(Default)]
struct Mode {
    /// Handles that go through this process.
    cached: u32,
    backing: Weak<BackingId>,
}

/// Everything that is open.
#[derive(Default)]
pub(super) struct Handles {
    next: u64,
    files: HashMap<u64, Arc<Handle>>,
    directories: HashMap<u64, Arc<Listing>>,
    modes: HashMap<u64, Mode>,
}

impl Handles {
    /// The backing for a new handle of `inode`: the one that other handles have, or what `make` makes unless
    /// handles go through this process.
    pub(super) fn backing(
        &mut self,
        inode: u64,
        make: impl FnOnce() -> Option<BackingId>,
    ) -> Option<Arc<BackingId>> {
        let mode = self.modes.entry(inode).or_default();
        if let Some(backing) = mode.backing.upgrade() {
            return Some(backing);
        }
        if mode.cached > 0 {
            return None;
        }
        let backing = Arc::new(make()?);
        mode.backing = Arc::downgrade(&backing);
        Some(backing)
    }

    pub(super) fn add(
        &mut self,
        inode: u64,
        (file, held): (File, Option<Held>),
        backing: Option<Arc<BackingId>>,
    ) -> u64 {
        self.next += 1;
        if backing.is_none() {
            self.modes.entry(inode).or_default().cached += 1;
        }
        let handle = Handle {
            inode,
            file,
            number: held.as_ref().map(Held::number),
            _held: held,
            backing,
        };
        self.files.insert(self.next, Arc::new(handle));
        self.next
    }

    pub(super) fn file(&self, handle: u64) -> Option<Arc<Handle>> {
        self.files.get(&handle).cloned()
    }

    /// Any open handle of an inode: how one is reached that has no name any more.
    pub(super) fn of(&self, inode: u64) -> Option<Arc<Handle>> {
        let mut files = self.files.values();
        files.find(|handle| handle.inode == inode).cloned()
    }

    pub(super) fn close(&mut self, handle: u64) {
        let Some(closed) = self.files.remove(&handle) else {
            return;
        };
        let inode = closed.inode;
        if let Some(mode) = self.modes.get_mut(&inode) {
            if closed.backing.is_none() {
                mode.cached = mode.cached.saturating_sub(1);
            }
            drop(closed);
            if mode.cached == 0 && mode.backing.strong_count() == 0 {
                self.modes.remove(&inode);
            }
        }
    }

    /// Keeps a directory open, with what it lists.
    pub(super) fn add_listing(&mut self, listing: Listing) -> u64 {
        self.next += 1;
        self.directories.insert(self.next, Arc::new(listing));
        self.next
    }

    /// A directory is read from its beginning again.
    pub(super) fn set_listing(&mut self, handle: u64, listing: Arc<Listing>) {
        self.directories.insert(handle, listing);
    }

    pub(super) fn listing(&self, handle: u64) -> Option<Arc<Listing>> {
        self.directories.get(&handle).cloned()
    }

    pub(super) fn close_listing(&mut self, handle: u64) {
        self.directories.remove(&handle);
    }
}
