//! What changed between the last epoch and now, told from `stat` alone.
//!
//! Rule: an entry is unchanged when device, inode, change time and size are those of the last epoch
//! and its change time was then safely older than the moment all dirty pages had been written back.
//! The change time moves on every write, also through a mapping: the write-back made the pages
//! read-only, so the next store faults and is noticed. Where there is no write-back (tmpfs), every
//! file is read again.

use super::confined::Confined;
use super::state::{Placed, TreeState};
use super::tree::{Entry, Kind, Timestamp};
use super::walk::{Found, WalkError, kind_of, timestamp};
use nix::sys::stat::{FileStat, SFlag};
use nix::sys::statfs::{FsType, TMPFS_MAGIC, fstatfs};
use std::collections::{HashMap, HashSet};
use std::iter::Peekable;
use std::time::{SystemTime, UNIX_EPOCH};

/// Distance from the baseline below which a change time proves nothing: coarse kernel time moves
/// once a tick (10 ms at the lowest usual HZ), doubled.
const GRANULARITY_NS: i128 = 20_000_000;
/// The same for file systems that keep whole (FAT: even) seconds.
const COARSE_GRANULARITY_NS: i128 = 2_000_000_000;

/// `RAMFS_MAGIC` of linux/magic.h, which the nix crate lacks.
const RAMFS_MAGIC: FsType = FsType(0x8584_58f6);

/// The moment from which changes must be told apart by their change time.
#[derive(Clone, Copy, Debug)]
pub struct Baseline {
    at: Timestamp,
    /// No change time can prove that a file is unchanged.
    unproven: bool,
}

impl Baseline {
    /// Writes all dirty pages of the file system back and notes when that began. With `frozen`
    /// containers nothing follows that would have to be told apart, and the pause should be short: then
    /// nothing is written back, and every file that is read now counts as changed afterwards.
    ///
    /// # Errors
    /// The write-back failed: then what is read may not be what is stored.
    pub fn establish(root: &Confined, frozen: bool) -> Result<Self, WalkError> {
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let at = timestamp(
            i64::try_from(now.as_secs()).unwrap_or(i64::MAX),
            i64::from(now.subsec_nanos()),
        );
        let kind = fstatfs(root.fd())
            .map_err(|e| WalkError::new(root, "examine the file system of", b"", e))?
            .filesystem_type();
        let unproven = frozen || [TMPFS_MAGIC, RAMFS_MAGIC].contains(&kind);
        if !unproven {
            nix::unistd::syncfs(root.fd())
                .map_err(|e| WalkError::new(root, "write back the file system of", b"", e))?;
        }
        Ok(Self { at, unproven })
    }

    /// Whether a change after the baseline could hide behind this change time.
    #[must_use]
    pub fn is_racy(&self, stat: &FileStat) -> bool {
        let nanos =
            |t: Timestamp| i128::from(t.seconds) * 1_000_000_000 + i128::from(t.nanoseconds);
        let changed = timestamp(stat.st_ctime, stat.st_ctime_nsec);
        let granularity = if changed.nanoseconds == 0 {
            COARSE_GRANULARITY_NS
        } else {
            GRANULARITY_NS
        };
        (self.unproven && kind_of(stat) == SFlag::S_IFREG)
            || nanos(changed) + granularity >= nanos(self.at)
    }
}

/// What to do with one found entry.
#[derive(Debug)]
pub enum Step {
    /// Unchanged since the last epoch.
    Keep(Placed),
    /// A regular file to read.
    File(Found),
    /// Another name of what is at this path.
    Link(Found, Box<[u8]>),
    /// Anything else to look at.
    Special(Found),
}

/// A part of the work of one epoch.
#[derive(Debug, Default)]
pub struct Window {
    /// In path order.
    pub steps: Vec<Step>,
    /// Paths of the last epoch that are gone; those below one of them are not named.
    pub removed: Vec<Box<[u8]>>,
}

/// What a walk finds, compared with the last epoch, one window after the other.
pub struct Changes<'a, W> {
    walk: W,
    before: Peekable<Box<dyn Iterator<Item = Placed> + 'a>>,
    primaries: HashMap<(u64, u64), Box<[u8]>>,
    /// Directories of the last epoch that are gone.
    gone: HashSet<Box<[u8]>>,
}

/// A walk that may be slower than whoever takes from it.
pub trait Ahead {
    /// Whether the next entry is there already.
    fn is_ready(&mut self) -> bool;
}

impl<'a, W: Iterator<Item = Result<Found, WalkError>>> Changes<'a, W> {
    /// Compares what a walk finds with the last epoch.
    #[must_use]
    pub fn new(walk: W, previous: Option<&'a TreeState>) -> Self {
        let before: Box<dyn Iterator<Item = Placed>> = match previous {
            Some(state) => Box::new(state.placed()),
            None => Box::new(std::iter::empty()),
        };
        Self {
            walk,
            before: before.peekable(),
            primaries: HashMap::new(),
            gone: HashSet::new(),
        }
    }

    /// The next window, of `cap` steps or removals at most, fewer when the walk has nothing more at once and there
    /// are `least`; none at the end.
    ///
    /// # Errors
    /// Those of the walk.
    pub fn window(&mut self, least: usize, cap: usize) -> Result<Option<Window>, WalkError>
    where
        W: Ahead,
    {
        let mut window = Window::default();
        while window.steps.len() < cap && window.removed.len() < cap {
            if window.steps.len() >= least && !self.walk.is_ready() {
                break;
            }
            let Some(found) = self.walk.next() else {
                while let Some(old) = self.before.next() {
                    self.remove(&old.entry, &mut window);
                }
                break;
            };
            let found = found?;
            while let Some(old) = self.before.next_if(|old| old.entry.path < found.path) {
                self.remove(&old.entry, &mut window);
            }
            let old = self.before.next_if(|old| old.entry.path == found.path);
            window.steps.push(self.step(found, old));
        }
        let is_over = window.steps.is_empty() && window.removed.is_empty();
        Ok((!is_over).then_some(window))
    }

    fn remove(&mut self, old: &Entry, window: &mut Window) {
        let slashes = old
            .path
            .iter()
            .enumerate()
            .filter(|(_, byte)| **byte == b'/');
        let mut above = slashes.map(|(at, _)| &old.path[..at]);
        if !self.gone.is_empty() && above.any(|above| self.gone.contains(above)) {
            return;
        }
        if old.kind == Kind::Directory {
            self.gone.insert(old.path.clone());
        }
        window.removed.push(old.path.clone());
    }

    fn step(&mut self, found: Found, old: Option<Placed>) -> Step {
        let kind = kind_of(&found.stat);
        if kind != SFlag::S_IFDIR
            && let Some(old) = &old
            && old.entry.kind == Kind::Directory
        {
            self.gone.insert(found.path.clone());
        }
        if found.stat.st_nlink > 1 && kind != SFlag::S_IFDIR {
            let identity = (found.stat.st_dev, found.stat.st_ino);
            if let Some(primary) = self.primaries.get(&identity) {
                let is_same = |old: &Placed| old.entry.kind == Kind::HardLink(primary.clone());
                return match old.filter(is_same) {
                    Some(old) => Step::Keep(old),
                    None => Step::Link(found, primary.clone()),
                };
            }
            self.primaries.insert(identity, found.path.clone());
        }
        match old {
            Some(old) if unchanged(&old.entry, &found.stat) => Step::Keep(old),
            _ if kind == SFlag::S_IFREG => Step::File(found),
            _ => Step::Special(found),
        }
    }
}

fn unchanged(old: &Entry, stat: &FileStat) -> bool {
    let same_kind = match old.kind {
        Kind::File { size, .. } => {
            kind_of(stat) == SFlag::S_IFREG && u64::try_from(stat.st_size) == Ok(size)
        }
        Kind::HardLink(_) => false,
        // A new kind means a new inode.
        _ => true,
    };
    same_kind
        && !old.seen.racy
        && old.seen.device == stat.st_dev
        && old.seen.inode == stat.st_ino
        && old.seen.changed == timestamp(stat.st_ctime, stat.st_ctime_nsec)
}
