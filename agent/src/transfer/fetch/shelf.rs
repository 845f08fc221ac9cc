//! A volume as it lies on the source's disk: its list, and its blocks as they are read.
//!
//! Non-goal: who may ask (the desk's).

use super::wire::{BLOCK, RUNS_CAP};
use crate::model::ids::Signature;
use crate::model::volume::TimesKept;
use crate::transfer::queue::lock;
use crate::volume::scan::{next_data, next_hole, open_file, read_full};
use crate::volume::tree::RootHasher;
use crate::volume::walk::{self, Found, WalkError, bare_entry, hard_link, kind_of};
use crate::volume::{BlockSize, Confined, Entry, Exception, FleetKey, Kind};
use nix::sys::stat::{SFlag, fstat};
use std::collections::HashMap;
use std::fs::File;
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Mutex};

/// Files kept open.
const OPEN_CAP: usize = 128;

/// A volume's files, opened as they are asked for.
pub(super) struct Shelf {
    root: Confined,
    open: Mutex<HashMap<Box<[u8]>, Arc<File>>>,
}

impl Shelf {
    pub(super) fn open(path: &Path, times: TimesKept) -> Result<Self, WalkError> {
        Ok(Self {
            root: walk::open_root(path)?.keeping(times),
            open: Mutex::default(),
        })
    }

    fn file(&self, path: &[u8]) -> Result<Arc<File>, WalkError> {
        let known = lock(&self.open).get(path).cloned();
        // A file that was replaced or removed since is looked up anew.
        let known = known.filter(|file| fstat(file).is_ok_and(|stat| stat.st_nlink > 0));
        if let Some(file) = known {
            return Ok(file);
        }
        let file = Arc::new(open_file(&self.root, path)?.0);
        let mut open = lock(&self.open);
        if open.len() >= OPEN_CAP {
            open.clear();
        }
        open.insert(path.into(), Arc::clone(&file));
        Ok(file)
    }

    /// Reads a block and returns its length.
    pub(super) fn read(
        &self,
        path: &[u8],
        offset: u64,
        buffer: &mut [u8],
    ) -> Result<usize, WalkError> {
        let file = self.file(path)?;
        read_full(&file, buffer, offset)
            .map_err(|error| WalkError::new(&self.root, "read", path, error))
    }

    /// Which of `count` blocks from `first` on are nothing but hole, in runs counted from there; what is beyond the
    /// file's end is.
    pub(super) fn holes(
        &self,
        path: &[u8],
        first: u64,
        count: u32,
    ) -> Result<Vec<Range<u32>>, WalkError> {
        let file = self.file(path)?;
        let failed = |error| WalkError::new(&self.root, "find holes of", path, error);
        let (mut runs, mut at) = (Vec::new(), 0);
        while at < count && runs.len() < RUNS_CAP {
            let from = (first + u64::from(at)) * BLOCK;
            let data = next_data(&file, from).map_err(failed)?;
            // The block in which data begins, as it is counted.
            let until = data.map_or(u64::MAX, |data| data / BLOCK) - first;
            let until = u32::try_from(until).unwrap_or(u32::MAX).min(count);
            if at < until {
                runs.push(at..until);
            }
            let Some(data) = data.filter(|_| until < count) else {
                break;
            };
            let hole = next_hole(&file, data).map_err(failed)?.div_ceil(BLOCK) - first;
            // A file system without holes names its end, and one that is written meanwhile anything.
            at = u32::try_from(hole).unwrap_or(u32::MAX).max(until + 1);
        }
        Ok(runs)
    }

    /// Every entry of the volume in path order, files without their blocks.
    pub(super) fn entries(&self) -> impl Iterator<Item = Result<Entry, WalkError>> {
        entries(&self.root, walk::walk(&self.root))
    }
}

fn entries<W: Iterator<Item = Result<Found, WalkError>>>(
    root: &Confined,
    walk: W,
) -> impl Iterator<Item = Result<Entry, WalkError>> {
    let mut primaries = HashMap::new();
    walk.filter_map(move |found| {
        let found = match found {
            Ok(found) => found,
            Err(error) => return Some(Err(error)),
        };
        match entry_of(root, &found, &mut primaries) {
            Err(error) if error.vanished() => None,
            entry => Some(entry),
        }
    })
}

fn entry_of(
    root: &Confined,
    found: &Found,
    primaries: &mut HashMap<(u64, u64), Box<[u8]>>,
) -> Result<Entry, WalkError> {
    let kind = kind_of(&found.stat);
    let identity = (found.stat.st_dev, found.stat.st_ino);
    if let Some(primary) = primaries.get(&identity) {
        return Ok(hard_link(&found.path, &found.stat, primary, false));
    }
    let entry = if kind == SFlag::S_IFREG {
        file_entry(root, &found.path)?
    } else {
        walk::special_entry(root, found, false)?
    };
    if found.stat.st_nlink > 1 && kind != SFlag::S_IFDIR {
        primaries.insert(identity, found.path.clone());
    }
    Ok(entry)
}

/// Root of the list that [`super::Fetcher::list`] gives of a tree, and what is not in it or not as it is.
///
/// # Errors
/// Anything that exists but cannot be looked at.
pub fn list_root(
    tree: &Confined,
    key: &FleetKey,
) -> Result<(Signature, Vec<Exception>), WalkError> {
    let mut root = RootHasher::new(key, BlockSize::for_volume(0));
    let mut walk = walk::walk(tree);
    for entry in entries(tree, &mut walk) {
        root.add(&entry?);
    }
    Ok((root.finish(), walk.skipped()))
}

/// Root over a volume's entries, files without their blocks.
#[must_use]
pub fn root_of_list(entries: &[Entry], key: &FleetKey) -> Signature {
    let mut root = RootHasher::new(key, BlockSize::for_volume(0));
    for entry in entries {
        root.add(entry);
    }
    root.finish()
}

fn file_entry(root: &Confined, path: &[u8]) -> Result<Entry, WalkError> {
    let (file, stat) = open_file(root, path)?;
    let kind = Kind::File {
        size: u64::try_from(stat.st_size).unwrap_or(0),
        blocks: Vec::new(),
    };
    let mut entry = bare_entry(path, &stat, kind, false);
    entry.xattrs = walk::read_xattrs(root, path, &file)?;
    Ok(entry)
}
