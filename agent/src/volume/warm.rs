//! Directories of a cold tree read ahead of the walk, by threads of their own: a walk alone waits for the disk
//! once in each of them.
//!
//! Invariants: only hints, nothing that is found here is used; a tree that lies in the page cache costs nothing
//! more; memory and the distance from the walk are bounded.

use super::confined::Confined;
use nix::dir::{Dir, Entry, Type};
use nix::fcntl::{AtFlags, OFlag};
use nix::sys::stat::{Mode, fstatat};
use std::collections::{BTreeSet, HashSet};
use std::os::fd::AsFd;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// A directory that takes longer to list was not in the page cache.
const COLD: Duration = Duration::from_micros(60);
/// Inodes that lie in one block of the disk: 256 bytes each is what file systems make today.
const NEIGHBOURS: u64 = 16;
/// Most directories that wait to be read.
const WAITING_CAP: usize = 4096;
/// Most directories that are read and that the walk has not come to.
const AHEAD_CAP: usize = 512;

/// What is read ahead of one walk.
#[derive(Debug)]
pub struct Warmer<'a> {
    root: &'a Confined,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// In the order of the walk.
    waiting: BTreeSet<Vec<u8>>,
    /// Read and not reached yet.
    ahead: BTreeSet<Vec<u8>>,
    over: bool,
}

impl<'a> Warmer<'a> {
    /// For a walk beneath `root`.
    #[must_use]
    pub fn new(root: &'a Confined) -> Self {
        Self {
            root,
            state: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The walk comes to a directory; there is no use for what lies before it.
    pub(super) fn reached(&self, path: &[u8]) {
        let state = &mut *self.lock();
        let key = key_of(path);
        for passed in [&mut state.waiting, &mut state.ahead] {
            while passed.first().is_some_and(|first| key >= *first) {
                passed.pop_first();
            }
        }
        self.changed.notify_all();
    }

    /// A directory that took so long to list holds these directories: if it was cold, so are they.
    pub(super) fn listed(&self, took: Duration, inner: &[Vec<u8>]) {
        if took < COLD || inner.is_empty() {
            return;
        }
        let mut state = self.lock();
        state.waiting.extend(inner.iter().map(|path| key_of(path)));
        while state.waiting.len() > WAITING_CAP {
            state.waiting.pop_last();
        }
        self.changed.notify_all();
    }

    /// Reads ahead until the walk is over.
    pub fn run(&self) {
        let mut state = self.lock();
        while !state.over {
            let next = if state.ahead.len() < AHEAD_CAP {
                state.waiting.pop_first()
            } else {
                None
            };
            let Some(mut path) = next else {
                state = self
                    .changed
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            state.ahead.insert(path.clone());
            drop(state);
            path.pop();
            self.read(&path);
            state = self.lock();
        }
    }

    /// Ends the reading ahead when it is dropped, with the walk.
    #[must_use]
    pub fn until_dropped(&self) -> Lease<'_, 'a> {
        Lease(self)
    }

    /// Brings a directory and what is known of everything in it into memory. What fails here
    /// is the walk's to find.
    fn read(&self, path: &[u8]) {
        let began = Instant::now();
        let flags = OFlag::O_DIRECTORY | OFlag::O_RDONLY;
        let Ok(dir) = self.root.open_beneath(path, flags, Mode::empty()) else {
            return;
        };
        let Ok(mut dir) = Dir::from_fd(dir) else {
            return;
        };
        // What a disk does not give up it refuses for ever.
        let names: Vec<Entry> = dir.iter().map_while(Result::ok).collect();
        let took = began.elapsed();
        let mut seen = HashSet::new();
        // Only for its effect: what is known of neighbours comes with the first of them.
        for name in names
            .iter()
            .filter(|name| seen.insert(name.ino() / NEIGHBOURS))
        {
            let _ = fstatat(dir.as_fd(), name.file_name(), AtFlags::AT_SYMLINK_NOFOLLOW);
        }
        let inner = names.iter().filter(|name| is_directory(name));
        let inner = inner.map(|name| [path, b"/", name.file_name().to_bytes()].concat());
        self.listed(took, &inner.collect::<Vec<_>>());
    }
}

/// Whether the list says that it is a directory, without looking at it.
pub(super) fn is_directory(entry: &Entry) -> bool {
    let itself = matches!(entry.file_name().to_bytes(), b"." | b"..");
    entry.file_type() == Some(Type::Directory) && !itself
}

/// See [`Warmer::until_dropped`].
#[derive(Debug)]
pub struct Lease<'w, 'a>(&'w Warmer<'a>);

impl Drop for Lease<'_, '_> {
    fn drop(&mut self) {
        self.0.lock().over = true;
        self.0.changed.notify_all();
    }
}

/// Where a directory's contents come in the walk.
fn key_of(path: &[u8]) -> Vec<u8> {
    [path, b"/"].concat()
}
