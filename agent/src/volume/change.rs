//! What changed between the last epoch and now, told from `stat` alone.
//!
//! Rule: an entry is unchanged when device, inode, change time and size are those of the last epoch
//! and its change time was then safely older than the moment all dirty pages had been written back.
//! The change time moves on every write, also through a mapping: the write-back made the pages
//! read-only, so the next store faults and is noticed. It moves when a write begins, so of a file that was written
//! to just before, a part may be still to come: it is read again next time; of large files whose device is watched,
//! whenever a write to it has ended. So is every file where there is no write-back (tmpfs), or where it failed, and all
//! that are looked at after the clock was set back meanwhile.

use super::confined::{Confined, split};
use super::one::One;
use super::salvage::Unreadable;
use super::state::{Placed, TreeState};
use super::tree::{Entry, Kind, Timestamp};
use super::walk::{Found, WalkError, kind_of, timestamp};
use nix::errno::Errno;
use nix::sys::stat::{FileStat, SFlag, fstat};
use nix::sys::statfs::{FsType, TMPFS_MAGIC, fstatfs};
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_gettime};
use procfs::process::Process;
use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::iter::Peekable;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

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
    /// How far wall time was ahead of the time since the boot.
    ahead: i128,
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
        let now = clock(ClockId::CLOCK_REALTIME);
        let at = timestamp(now.tv_sec(), now.tv_nsec());
        let ahead = nanos(at) - since_boot();
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
            ahead,
            longest_write,
            proven,
        }
    }

    /// Whether a change after the baseline could hide behind this change time.
    #[must_use]
    pub fn is_racy(&self, stat: &FileStat) -> bool {
        // Read in this order, a halt between two readings never looks like a step back.
        let boot = since_boot();
        let now = clock(ClockId::CLOCK_REALTIME);
        let ahead = nanos(timestamp(now.tv_sec(), now.tv_nsec())) - boot;
        if ahead + GRANULARITY_NS < self.ahead {
            return true;
        }
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

fn nanos(time: Timestamp) -> i128 {
    i128::from(time.seconds) * 1_000_000_000 + i128::from(time.nanoseconds)
}

/// Nanoseconds since the boot: a clock that nobody sets, and that is slewed as wall time is.
fn since_boot() -> i128 {
    let now = clock(ClockId::CLOCK_BOOTTIME);
    nanos(timestamp(now.tv_sec(), now.tv_nsec()))
}

/// Zero, which makes every file a changed one, should the kernel lack the clock.
fn clock(id: ClockId) -> TimeSpec {
    clock_gettime(id).unwrap_or(TimeSpec::new(0, 0))
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
    /// Unchanged since the last epoch; or, `racy`, not to be looked at now.
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
    /// What the disk did not give up; what the last epoch had of it is kept.
    pub lost: Vec<Unreadable>,
}

/// What a walk finds, compared with the last epoch, one window after the other.
pub struct Changes<'a, W> {
    walk: W,
    before: Peekable<Box<dyn Iterator<Item = Placed> + 'a>>,
    primaries: HashMap<(u64, u64), Box<[u8]>>,
    /// Directories of the last epoch that are gone.
    gone: HashSet<Box<[u8]>>,
    /// What could not be looked at or listed, and what is kept therefore.
    lost: HashSet<Box<[u8]>>,
    /// Large files to which the device was written, whatever their change time says.
    touched: HashSet<Box<[u8]>>,
}

/// A walk that may be slower than whoever takes from it.
pub trait Ahead {
    /// Whether the next entry is there already.
    fn is_ready(&mut self) -> bool;
}

impl<'a, W: Iterator<Item = Result<Found, WalkError>>> Changes<'a, W> {
    /// Compares what a walk finds with the last epoch; the baseline is established.
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
            lost: HashSet::new(),
            touched: previous.map(TreeState::touched).unwrap_or_default(),
        }
    }

    /// The next window, of `cap` steps or removals at most, fewer when the walk has nothing more at once and there
    /// are `least`; none at the end.
    ///
    /// # Errors
    /// Those of the walk, except losses.
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
                    self.miss(old, &mut window);
                }
                break;
            };
            let found = match found {
                Err(error) if error.is_loss() => {
                    window.lost.push(error.loss_of_names());
                    self.lost.insert(error.path);
                    continue;
                }
                other => other?,
            };
            while let Some(old) = self.before.next_if(|old| old.entry.path < found.path) {
                self.miss(old, &mut window);
            }
            let old = self.before.next_if(|old| old.entry.path == found.path);
            window.steps.push(self.step(found, old));
        }
        let is_over =
            window.steps.is_empty() && window.removed.is_empty() && window.lost.is_empty();
        Ok((!is_over).then_some(window))
    }

    /// An entry of the last epoch that the walk did not find: gone, or lost.
    fn miss(&mut self, old: Placed, window: &mut Window) {
        let path = &old.entry.path;
        let slashes = path.iter().enumerate().filter(|(_, byte)| **byte == b'/');
        let mut above = slashes.map(|(at, _)| &path[..at]);
        if !self.gone.is_empty() && above.any(|above| self.gone.contains(above)) {
            return;
        }
        if self.is_lost(&old.entry) {
            self.lost.insert(path.clone());
            // Nobody knows whether it is what it was.
            let mut old = old;
            old.entry.seen.racy = true;
            window.steps.push(Step::Keep(old));
            return;
        }
        if old.entry.kind == Kind::Directory {
            self.gone.insert(path.clone());
        }
        window.removed.push(old.entry.path);
    }

    /// Whether nobody can tell if this entry is gone, and the target can keep it.
    fn is_lost(&self, old: &Entry) -> bool {
        let lost = |path: &[u8]| self.lost.contains(path);
        if self.lost.is_empty() || !(lost(&old.path) || lost(split(&old.path).0)) {
            return false;
        }
        match &old.kind {
            // The first name must be what it was.
            Kind::HardLink(primary) => {
                let identity = (old.seen.device, old.seen.inode);
                lost(primary) || self.primaries.get(&identity) == Some(primary)
            }
            _ => true,
        }
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
            Some(old)
                if unchanged(&old.entry, &found.stat) && !self.touched.contains(&found.path) =>
            {
                Step::Keep(old)
            }
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
    use crate::model::extent::Extent;
    use crate::volume::walk::{open_root, walk};
    use crate::volume::{BlockSize, FleetKey, Written, scan};
    use std::fs;
    use std::ops::Range;
    use std::sync::Arc;

    #[test]
    fn a_file_is_read_again_while_a_write_to_it_may_be_under_way() {
        let target = concat!(env!("CARGO_MANIFEST_DIR"), "/../target");
        let dir = tempfile::tempdir_in(target).unwrap();
        fs::write(dir.path().join("file"), b"x").unwrap();
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
        let mut stepped = known.clone();
        stepped.ahead += 1_000_000_000;
        assert!(stepped.is_racy(&file), "the clock was set back by a second");
        stepped.ahead -= 2_000_000_000;
        assert!(!stepped.is_racy(&file), "it was set ahead");
        file.st_dev += 1;
        assert!(
            known.is_racy(&file),
            "of a file system that nobody wrote back"
        );
    }

    /// A walk that is over.
    struct Whole(std::vec::IntoIter<Result<Found, WalkError>>);

    impl Iterator for Whole {
        type Item = Result<Found, WalkError>;
        fn next(&mut self) -> Option<Self::Item> {
            self.0.next()
        }
    }

    impl Ahead for Whole {
        fn is_ready(&mut self) -> bool {
            true
        }
    }

    #[test]
    fn what_the_disk_hides_of_the_last_epoch_is_kept_and_what_is_gone_is_not() {
        let base = tempfile::tempdir().unwrap();
        let at = |path: &str| base.path().join(path);
        for directory in ["d/sub/deep", "d/hidden", "f"] {
            fs::create_dir_all(at(directory)).unwrap();
        }
        let files = [
            "d/a",
            "d/hidden/x",
            "d/sub/deep/y",
            "d/sub/z",
            "e",
            "f/gone",
        ];
        for file in files {
            fs::write(at(file), file).unwrap();
        }
        fs::hard_link(at("d/a"), at("d/b")).unwrap();
        fs::hard_link(at("d/a"), at("f/other")).unwrap();
        let key = FleetKey([3; 32]);
        let (before, _) = scan(base.path(), &key, BlockSize::for_volume(0)).unwrap();
        fs::remove_file(at("f/gone")).unwrap();
        fs::remove_file(at("d/sub/z")).unwrap();

        let root = open_root(base.path()).unwrap();
        let lost = |action, path: &[u8]| Err(WalkError::new(&root, action, path, Errno::EUCLEAN));
        let mut found = Vec::new();
        for one in walk(&root) {
            let one = one.unwrap();
            match &*one.path {
                // Its list broke off before these.
                b"d/a" | b"d/b" | b"d/hidden" | b"d/hidden/x" => {}
                b"d" => found.extend([Ok(one), lost("list", b"d")]),
                b"e" => found.push(lost("stat", b"e")),
                _ => found.push(Ok(one)),
            }
        }
        let mut changes = Changes::new(Whole(found.into_iter()), Some(&before));
        let window = changes.window(1, 1000).unwrap().unwrap();
        let lost: Vec<&str> = window.lost.iter().map(|lost| &*lost.path).collect();
        assert_eq!(lost, ["d", "e"]);
        assert_eq!(
            window.removed,
            [b"d/sub/z"[..].into(), b"f/gone"[..].into()]
        );
        let path = |step: &Step| -> Box<[u8]> {
            match step {
                Step::Keep(placed) => placed.entry.path.clone(),
                Step::File(found) | Step::Link(found, _) | Step::Special(found) => {
                    found.path.clone()
                }
            }
        };
        let paths: Vec<Box<[u8]>> = window.steps.iter().map(path).collect();
        assert!(paths.is_sorted(), "{paths:?}");
        let has = |kept: &[u8]| {
            let steps = window.steps.iter().zip(&paths);
            steps
                .filter(|(_, path)| ***path == *kept)
                .map(|(step, _)| step)
                .collect::<Vec<_>>()
        };
        for kept in [&b"d/a"[..], b"d/b", b"d/hidden", b"d/hidden/x", b"e"] {
            assert!(
                matches!(*has(kept), [Step::Keep(placed)] if placed.entry.seen.racy),
                "{}",
                String::from_utf8_lossy(kept)
            );
        }
        // Its first name is hidden: it travels as a file of its own.
        assert!(matches!(*has(b"f/other"), [Step::File(_)]));
        assert!(changes.window(1, 1000).unwrap().is_none());
    }

    /// A device that was written to within these bytes; nobody can say where when there are none.
    #[derive(Debug)]
    struct Noted(Range<u64>);

    impl Written for Noted {
        fn device(&self) -> u64 {
            1
        }

        fn anywhere(&self) -> bool {
            self.0.is_empty()
        }

        fn within(&self, bytes: &Range<u64>) -> bool {
            self.0.is_empty() || self.0.start < bytes.end && bytes.start < self.0.end
        }
    }

    /// Of a write that lasts, the change time is that of its beginning.
    #[test]
    fn a_file_whose_extents_were_written_to_is_looked_at_again_whatever_its_change_time() {
        let base = tempfile::tempdir().unwrap();
        for file in ["one", "other"] {
            fs::write(base.path().join(file), b"x").unwrap();
        }
        let key = FleetKey([3; 32]);
        let (scanned, _) = scan(base.path(), &key, BlockSize::for_volume(0)).unwrap();
        // As if they had been made long ago.
        let old = scanned.iter().map(|mut entry| {
            entry.seen.racy = false;
            entry
        });
        let mut before = TreeState::new(&key, BlockSize::for_volume(0), old);
        for (file, physical) in [(&b"one"[..], 0), (b"other", 1 << 20)] {
            let extent = Extent {
                logical: 0,
                physical,
                length: 1 << 20,
                unwritten: false,
                shared: false,
            };
            before.extents.insert(file.into(), Arc::new([extent]));
        }
        for (noted, again) in [
            (0..4096, vec!["one"]),
            (0..0, vec![]),
            (2 << 20..3 << 20, vec![]),
        ] {
            before.written = Some(Arc::new(Noted(noted.clone())));
            let found: Vec<_> = walk(&open_root(base.path()).unwrap()).collect();
            let mut changes = Changes::new(Whole(found.into_iter()), Some(&before));
            let steps = changes.window(1, 1000).unwrap().unwrap().steps;
            let read = steps.iter().filter_map(|step| match step {
                Step::File(found) => Some(String::from_utf8_lossy(&found.path)),
                _ => None,
            });
            assert_eq!(read.collect::<Vec<_>>(), again, "{noted:?}");
        }
    }

    #[test]
    fn a_root_that_cannot_be_listed_is_an_error() {
        let base = tempfile::tempdir().unwrap();
        let root = open_root(base.path()).unwrap();
        let found = vec![Err(WalkError::new(&root, "list", b"", Errno::EIO))];
        let mut changes = Changes::new(Whole(found.into_iter()), None);
        assert!(changes.window(1, 1000).is_err());
    }
}
