//! What changed between the last epoch and now, told from `stat` alone.
//!
//! Rule: an entry is unchanged when device, inode, change time and size are those of the last epoch
//! and its change time was then safely older than the moment all dirty pages had been written back.
//! The change time moves on every write, also through a mapping: the write-back made the pages
//! read-only, so the next store faults and is noticed. It moves when a write begins, so of a file that was written
//! to just before, a part may be still to come: it is read again next time. So is every file where there is no
//! write-back (tmpfs), or where it failed.

use super::confined::Confined;
use super::one::One;
use super::state::{Placed, TreeState};
use super::tree::{Entry, Kind, Timestamp};
use super::walk::{Found, WalkError, kind_of, timestamp};
use nix::errno::Errno;
use nix::sys::stat::{FileStat, SFlag, fstat};
use nix::sys::statfs::{FsType, TMPFS_MAGIC, fstatfs};
use procfs::process::Process;
use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::iter::Peekable;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Distance from the baseline below which a change time proves nothing: coarse kernel time moves
/// once a tick (10 ms at the lowest usual HZ), doubled.
const GRANULARITY_NS: i128 = 20_000_000;
/// The same for file systems that keep whole (FAT: even) seconds.
const COARSE_GRANULARITY_NS: i128 = 2_000_000_000;

/// `RAMFS_MAGIC` of linux/magic.h, which the nix crate lacks.
const RAMFS_MAGIC: FsType = FsType(0x8584_58f6);

/// The moment from which changes must be told apart by their change time.
#[derive(Clone, Debug)]
pub struct Baseline {
    at: Timestamp,
    longest_write: Duration,
    /// File systems on which change times prove that a file is unchanged.
    proven: Vec<u64>,
}

impl Baseline {
    /// Writes all dirty pages of the tree's file systems back and notes when that began. With `frozen`
    /// containers nothing follows that would have to be told apart, and the pause should be short: then
    /// nothing is written back, and every file that is read now counts as changed afterwards. A write is taken to
    /// last `longest_write` at most.
    #[must_use]
    pub fn establish(root: &Confined, frozen: bool, longest_write: Duration) -> Self {
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let at = timestamp(
            i64::try_from(now.as_secs()).unwrap_or(i64::MAX),
            i64::from(now.subsec_nanos()),
        );
        let mut proven = Vec::new();
        // A device has no change time of its own.
        if !frozen && !root.one().is_some_and(One::is_device) {
            proven.extend(write_back(root.fd(), root.path()));
            for place in mounted_below(root) {
                // One that is gone by now has no files here either.
                proven.extend(
                    File::open(&place)
                        .ok()
                        .and_then(|dir| write_back(dir.as_fd(), &place)),
                );
            }
        }
        Self {
            at,
            longest_write,
            proven,
        }
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
        let mut margin = granularity;
        if kind_of(stat) == SFlag::S_IFREG {
            if !self.proven.contains(&stat.st_dev) {
                return true;
            }
            margin = margin.max(i128::try_from(self.longest_write.as_nanos()).unwrap_or(i128::MAX));
        }
        nanos(changed) + margin >= nanos(self.at)
    }
}

/// Writes the dirty pages of a file system back; its number, if change times prove something there from now on.
fn write_back(directory: BorrowedFd<'_>, path: &Path) -> Option<u64> {
    let device = fstat(directory).ok()?.st_dev;
    if [TMPFS_MAGIC, RAMFS_MAGIC].contains(&fstatfs(directory).ok()?.filesystem_type()) {
        return None;
    }
    match nix::unistd::syncfs(directory) {
        // One that went read-only takes no write any more; what is still stored to its pages can never be acknowledged.
        Ok(()) | Err(Errno::EROFS) => Some(device),
        Err(error) => {
            tracing::warn!(
                path = %path.display(),
                "the file system cannot be written back ({error}); all its files are read again in every round"
            );
            None
        }
    }
}

/// Where other file systems lie in the tree. When the kernel does not tell, their files are read again each time.
fn mounted_below(root: &Confined) -> Vec<PathBuf> {
    let Ok(path) = root.path().canonicalize() else {
        return Vec::new();
    };
    let mounts = Process::myself().and_then(|process| process.mountinfo());
    let places = mounts.into_iter().flatten().map(|mount| mount.mount_point);
    places
        .filter(|place| *place != path && place.starts_with(&path))
        .collect()
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_read_again_while_a_write_to_it_may_be_under_way() {
        let target = concat!(env!("CARGO_MANIFEST_DIR"), "/../target");
        let dir = tempfile::tempdir_in(target).unwrap();
        std::fs::write(dir.path().join("file"), b"x").unwrap();
        let root = Confined::open(dir.path()).unwrap();
        let mut file = fstat(File::open(dir.path().join("file")).unwrap()).unwrap();
        let mut directory = fstat(root.fd()).unwrap();
        let baseline =
            |frozen, seconds| Baseline::establish(&root, frozen, Duration::from_secs(seconds));
        let known = baseline(false, 10);
        for (age, racy) in [(5, true), (15, false)] {
            file.st_ctime = known.at.seconds - age;
            directory.st_ctime = file.st_ctime;
            assert_eq!(known.is_racy(&file), racy, "{age} s");
            assert!(!known.is_racy(&directory), "{age} s");
            assert!(!baseline(false, 0).is_racy(&file), "{age} s");
            assert!(baseline(true, 0).is_racy(&file), "frozen, {age} s");
        }
        file.st_dev += 1;
        assert!(
            known.is_racy(&file),
            "of a file system that nobody wrote back"
        );
    }
}
