//! What changed between the last epoch and now, told from `stat` alone.
//!
//! Rule: an entry is unchanged when device, inode, change time and size are those of the last epoch
//! and its change time was then safely older than the moment all dirty pages had been written back.
//! The change time moves on every write, also through a mapping: the write-back made the pages
//! read-only, so the next store faults and is noticed. Where there is no write-back (tmpfs), every
//! file is read again.

use super::confined::Confined;
use super::tree::{Entry, Exception, Kind, Timestamp, TreeState};
use super::walk::{Found, Walk, WalkError, kind_of, timestamp};
use nix::sys::stat::{FileStat, SFlag};
use nix::sys::statfs::{FsType, TMPFS_MAGIC, fstatfs};
use std::collections::HashMap;
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
    /// Unchanged since the last epoch: its index there.
    Keep(usize),
    /// A regular file to read.
    File(Found),
    /// Another name of the file at this path.
    Link(Found, Box<[u8]>),
    /// Anything else to look at.
    Special(Found),
}

/// The work of one epoch.
#[derive(Debug, Default)]
pub struct WorkPlan {
    /// In path order.
    pub steps: Vec<Step>,
    /// Paths of the last epoch that are gone, deepest first.
    pub removed: Vec<Box<[u8]>>,
    /// What is left out.
    pub skipped: Vec<Exception>,
}

/// Compares what was found with the last epoch.
#[must_use]
pub fn compare(walk: Walk, previous: Option<&TreeState>) -> WorkPlan {
    let before: &[Entry] = previous.map_or(&[], |state| &state.entries);
    let mut plan = WorkPlan {
        skipped: walk.skipped,
        ..WorkPlan::default()
    };
    let mut primaries: HashMap<(u64, u64), Box<[u8]>> = HashMap::new();
    let mut at = 0;
    for found in walk.found {
        while at < before.len() && before[at].path < found.path {
            plan.removed.push(before[at].path.clone());
            at += 1;
        }
        let old = before.get(at).filter(|entry| entry.path == found.path);
        let index = at;
        at += usize::from(old.is_some());
        let kind = kind_of(&found.stat);
        let identity = (found.stat.st_dev, found.stat.st_ino);
        if found.stat.st_nlink > 1 && kind == SFlag::S_IFREG {
            if let Some(primary) = primaries.get(&identity) {
                let kept = old.is_some_and(|entry| entry.kind == Kind::HardLink(primary.clone()));
                plan.steps.push(if kept {
                    Step::Keep(index)
                } else {
                    Step::Link(found, primary.clone())
                });
                continue;
            }
            primaries.insert(identity, found.path.clone());
        }
        plan.steps.push(match old {
            Some(entry) if unchanged(entry, &found.stat) => Step::Keep(index),
            _ if kind == SFlag::S_IFREG => Step::File(found),
            _ => Step::Special(found),
        });
    }
    plan.removed
        .extend(before[at..].iter().map(|entry| entry.path.clone()));
    plan.removed.reverse();
    plan
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
