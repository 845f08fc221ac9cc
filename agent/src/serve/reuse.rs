//! What earlier copies of a volume left on this device: their files become those of a store that is made anew, and
//! a block of them counts once the source has said that it is the same.
//!
//! Invariant: what lies by is a guess and never trusted, so it needs no care at a death. Non-goal: the question to
//! the source (`store`).

use crate::volume::Confined;
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, RenameFlags, renameat, renameat2};
use nix::sys::stat::{SFlag, fstatat};
use nix::unistd::{getegid, geteuid};
use std::collections::HashSet;
use std::fs::{DirBuilder, File, Permissions};
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _, fchown};
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
    private(directory)?;
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

/// Makes the directory of a store, or takes the one that is there, for nobody else to come in: it lies beside a place
/// that others reach, with names of files that lie behind directories of their owner, and every byte that is mirrored.
pub(super) fn private(directory: &Path) -> io::Result<()> {
    let mode = 0o700;
    DirBuilder::new()
        .recursive(true)
        .mode(mode)
        .create(directory)?;
    // Neither through a link that lies there, nor for whoever made it before.
    let flags = libc::O_DIRECTORY | libc::O_NOFOLLOW;
    let open = File::options()
        .read(true)
        .custom_flags(flags)
        .open(directory)?;
    let (user, group) = (geteuid().as_raw(), getegid().as_raw());
    fchown(&open, Some(user), Some(group))?;
    open.set_permissions(Permissions::from_mode(mode))
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

/// Brings what was laid by, or taken up from there, back to an empty `place`, and removes the store in `directory`. Of a
/// store that was not made whole, what it took lies with the rest again.
///
/// # Errors
/// The file system's error; it may be tried again.
pub fn bring_back(directory: &Path, place: &Path) -> io::Result<()> {
    let (copies, data) = (directory.join(COPIES), directory.join("data"));
    let mut numbers = numbered(&copies)?;
    numbers.sort_unstable();
    let mut laid_by = numbers
        .into_iter()
        .map(|number| copies.join(number.to_string()));
    let from = match laid_by.next() {
        // Without its index the store was not made whole, and took only some of it.
        Some(first) if !directory.join("index").exists() => {
            for later in laid_by.chain([data]).filter(|later| later.exists()) {
                join(&later, &first)?;
            }
            first
        }
        _ => data,
    };
    if from.exists() && std::fs::read_dir(place)?.next().is_none() {
        exchange(&from, place)?;
    }
    match std::fs::remove_dir_all(directory) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Moves every file of one tree to where the other, which has the same directory, has none.
fn join(from: &Path, to: &Path) -> io::Result<()> {
    let (source, target) = (Confined::open(from)?, Confined::open(to)?);
    let mut directories = vec![PathBuf::new()];
    while let Some(directory) = directories.pop() {
        for entry in std::fs::read_dir(from.join(&directory))? {
            let entry = entry?;
            let path = directory.join(entry.file_name());
            if entry.file_type()?.is_dir() {
                directories.push(path);
                continue;
            }
            let path = path.as_os_str().as_bytes();
            let (here, name) = source.parent(path)?;
            let Ok((there, _)) = target.parent(path) else {
                continue;
            };
            match renameat2(&here, name, &there, name, RenameFlags::RENAME_NOREPLACE) {
                Ok(()) | Err(Errno::EEXIST) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
    Ok(())
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

/// Removes what was not taken of the copies for a store in `directory`, which is whole.
pub(super) fn end_copies(directory: &Path) -> io::Result<()> {
    match std::fs::remove_dir_all(directory.join(COPIES)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// The copies that lie by, the newest first.
#[derive(Default)]
pub(super) struct Copies {
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
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_stores_took_that_were_not_made_whole_lies_with_the_rest_again() {
        let directory = tempfile::tempdir().unwrap();
        let (store, place) = (
            directory.path().join("store"),
            directory.path().join("place"),
        );
        std::fs::create_dir_all(place.join("deep")).unwrap();
        for name in ["one", "deep/two", "three"] {
            std::fs::write(place.join(name), name).unwrap();
        }
        // Two deaths in the middle, each after another file.
        for taken in ["one", "deep/two"] {
            lay_by(&store, &place).unwrap();
            clear(&store).unwrap();
            std::fs::create_dir_all(store.join("data/deep")).unwrap();
            let data = Confined::open(&store.join("data")).unwrap();
            let mut copies = Copies::open(&store).unwrap();
            assert!(copies.take(taken.as_bytes(), &data).unwrap());
            std::fs::write(store.join("data/three"), "sparse").unwrap();
        }
        bring_back(&store, &place).unwrap();
        for name in ["one", "deep/two", "three"] {
            assert_eq!(std::fs::read(place.join(name)).unwrap(), name.as_bytes());
        }
        assert!(!store.exists());
    }
}
