//! What earlier copies of a volume left on this device: their files become those of a store that is made anew, and
//! a block of them counts once the source has said that it is the same.
//!
//! Invariant: what lies by is a guess and never trusted, so it needs no care at a death. Non-goal: the question to
//! the source (`store`).

use crate::volume::Confined;
use nix::fcntl::{AT_FDCWD, AtFlags, RenameFlags, renameat, renameat2};
use nix::sys::stat::{SFlag, fstatat};
use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

/// Where they lie in the store's directory, by number.
const COPIES: &str = "copies";
/// Says that files of the store hold what a copy left.
const REUSES: &str = "reuses";

/// Lays by what is at `place`, which is empty then, and what an earlier store in `directory` held, for the store
/// that is made there next. Both must be on one file system.
///
/// # Errors
/// The file system's error.
pub fn lay_by(directory: &Path, place: &Path) -> io::Result<()> {
    let copies = directory.join(COPIES);
    std::fs::create_dir_all(&copies)?;
    // Without it there is no store.
    match std::fs::remove_file(directory.join("index")) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let data = directory.join("data");
    if data.exists() {
        std::fs::rename(&data, copies.join(next(&copies)?))?;
    }
    if std::fs::read_dir(place)?.next().is_some() {
        let copy = copies.join(next(&copies)?);
        std::fs::create_dir(&copy)?;
        exchange(&copy, place)?;
    }
    Ok(())
}

/// Puts each of two directories of one file system in the other's place, at once.
///
/// # Errors
/// The system's.
pub fn exchange(one: &Path, other: &Path) -> io::Result<()> {
    let flags = RenameFlags::RENAME_EXCHANGE;
    renameat2(AT_FDCWD, one, AT_FDCWD, other, flags)?;
    Ok(())
}

/// Brings what was laid by, or taken up from there, back to an empty `place`, and removes the store in `directory`.
///
/// # Errors
/// The file system's error; it may be tried again.
pub fn bring_back(directory: &Path, place: &Path) -> io::Result<()> {
    let (copies, data) = (directory.join(COPIES), directory.join("data"));
    let newest = numbered(&copies)?.into_iter().max();
    // Without its index the store was not made whole, and took only some of it.
    let newest = newest.filter(|_| !directory.join("index").exists());
    let from = newest.map_or(data, |number| copies.join(number.to_string()));
    if from.exists() && std::fs::read_dir(place)?.next().is_none() {
        exchange(&from, place)?;
    }
    match std::fs::remove_dir_all(directory) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn numbered(copies: &Path) -> io::Result<Vec<u32>> {
    let names = match std::fs::read_dir(copies) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        names => names?,
    };
    let mut numbers = Vec::new();
    for name in names {
        let name = name?.file_name();
        numbers.extend(name.to_str().and_then(|name| name.parse::<u32>().ok()));
    }
    Ok(numbers)
}

fn next(copies: &Path) -> io::Result<String> {
    let last = numbered(copies)?.into_iter().max();
    Ok(last.map_or(0, |last: u32| last + 1).to_string())
}

/// Removes what an earlier store in `directory` left, but not what lies by.
pub(super) fn clear(directory: &Path) -> io::Result<()> {
    let names = match std::fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        names => names?,
    };
    for name in names {
        let name = name?;
        if name.file_name() == COPIES {
            continue;
        }
        if name.file_type()?.is_dir() {
            std::fs::remove_dir_all(name.path())?;
        } else {
            std::fs::remove_file(name.path())?;
        }
    }
    Ok(())
}

/// Whether files of the store in `directory` may hold what a copy left.
pub(super) fn reuses(directory: &Path) -> bool {
    directory.join(REUSES).exists()
}

/// The copies that lie by, the newest first.
pub(super) struct Copies {
    directory: PathBuf,
    open: Vec<Confined>,
    /// Taken files with further names.
    shared: HashSet<u64>,
}

impl Copies {
    pub(super) fn open(directory: &Path) -> io::Result<Self> {
        let copies = directory.join(COPIES);
        let mut numbers = numbered(&copies)?;
        numbers.sort_unstable_by(|a, b| b.cmp(a));
        let open = numbers
            .into_iter()
            .map(|number| Confined::open(&copies.join(number.to_string())))
            .collect::<Result<_, _>>()?;
        if !numbered(&copies)?.is_empty() {
            File::create(directory.join(REUSES))?;
        }
        Ok(Self {
            directory: copies,
            open,
            shared: HashSet::new(),
        })
    }

    /// Moves the regular file at `path` of the newest copy that has one to `path` of `data`, whose directory is
    /// there; false when there is none.
    pub(super) fn take(&mut self, path: &[u8], data: &Confined) -> io::Result<bool> {
        for copy in &self.open {
            let Ok((from, name)) = copy.parent(path) else {
                continue;
            };
            let Ok(stat) = fstatat(&from, name, AtFlags::AT_SYMLINK_NOFOLLOW) else {
                continue;
            };
            let kind = SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT;
            // Two names of one file may be two files by now.
            if kind != SFlag::S_IFREG || (stat.st_nlink > 1 && !self.shared.insert(stat.st_ino)) {
                continue;
            }
            let (to, name) = data.parent(path)?;
            renameat(&from, name, &to, name)?;
            return Ok(true);
        }
        Ok(false)
    }

    /// Removes what was not taken.
    pub(super) fn end(self) -> io::Result<()> {
        match std::fs::remove_dir_all(&self.directory) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }
}
