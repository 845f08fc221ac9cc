//! Writes a log over the tree that it is the mirror of.
//!
//! The tree's names are cloned by hard links beside it and the log is replayed there, so that a replay that was
//! interrupted begins again from the names as they were. Its writes go to the files themselves: what of a file no
//! change touched stays, and what changes touched they write again, so that these too end as they should. When all
//! is durable the names take the places of the old ones. Nobody may use the tree meanwhile.

use super::super::apply::{Access, ApplyError, Destination, Parent};
use super::super::codec::Reader;
use super::super::confined::{Confined, split};
use super::super::tree::{Entry, Kind, Timestamp};
use super::super::walk::{self, WalkError, bare_entry, read_xattrs};
use super::super::xattrs;
use super::log::{Log, Record};
use super::{Act, Change};
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, RenameFlags, renameat2};
use nix::sys::stat::{Mode, SFlag, UtimensatFlags, fstat, fstatat, futimens, mkdirat, utimensat};
use nix::sys::time::TimeSpec;
use nix::unistd::linkat;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Directory in the tree in which it is worked, and what is in it: the new names, and then the old ones.
const STAGE: &[u8] = b".lifeboat-return";
const NEW: &[u8] = b".lifeboat-return/new";
const OLD: &[u8] = b".lifeboat-return/old";

/// Bytes of a log that are read at a time.
const BATCH: usize = 4 << 20;

/// A log cannot be written back. Trying again goes on from a safe state.
#[derive(Debug, thiserror::Error)]
pub enum WriteBackError {
    /// The log.
    #[error("cannot read the mirrored changes in {path}: {error}; the tree is as it was")]
    Log {
        /// Its file.
        path: PathBuf,
        /// Cause.
        error: io::Error,
    },
    /// A change does not fit the tree.
    #[error("mirrored change {number} cannot be written back: {error}")]
    Apply {
        /// Its number.
        number: u64,
        /// Cause.
        error: ApplyError,
    },
    /// The tree.
    #[error("{0}")]
    Tree(#[from] ApplyError),
    /// The tree.
    #[error("{0}")]
    Walk(#[from] WalkError),
    /// How far it is cannot be kept.
    #[error("cannot keep in {path} how far the mirrored changes are written back: {error}")]
    Phase {
        /// The file.
        path: PathBuf,
        /// Cause.
        error: io::Error,
    },
}

/// How far it is, kept beside the log.
enum Phase {
    /// The log is replayed on the clone.
    Replaying,
    /// That is durable; the old names are moved away.
    Emptying(Entry),
    /// The new names are moved in.
    Filling(Entry),
    /// All is done.
    Done,
}

/// Writes the log in `directory` over the tree at `tree`, durably, and gives the number of its changes. Called
/// again after a crash it goes on; called again after it was done it does nothing.
///
/// # Errors
/// [`WriteBackError`].
pub fn write_back(directory: &Path, tree: &Path) -> Result<u64, WriteBackError> {
    let path = directory.join("log");
    let failed = |error| WriteBackError::Log {
        path: path.clone(),
        error,
    };
    let none = || Err(io::ErrorKind::NotFound.into());
    let log = Log::open(&path, none).map_err(failed)?;
    let notes = directory.join("returned");
    let root = Destination::open("mirrored", tree, false)?.of_source();
    loop {
        let next = match read_phase(&notes)? {
            Phase::Replaying => {
                let new = clone(&root)?;
                replay(&log, &path, &new)?;
                new.sync()?;
                let stat = fstat(new.root().fd()).map_err(|e| new.failed("look at", b"", 0, e))?;
                let mut entry = bare_entry(b"", &stat, Kind::Directory, false);
                let open = File::from(directory_of(&new, b"")?);
                entry.xattrs = read_xattrs(new.root(), b"", &open)?;
                Phase::Emptying(entry)
            }
            Phase::Emptying(entry) => {
                move_names(&root, b"", OLD)?;
                root.sync()?;
                Phase::Filling(entry)
            }
            Phase::Filling(entry) => {
                if directory_of(&root, NEW).is_ok() {
                    move_names(&root, NEW, b"")?;
                }
                root.sync()?;
                root.remove(&mut Parent::default(), STAGE)?;
                root.finish_directory(&entry)?;
                root.sync()?;
                Phase::Done
            }
            Phase::Done => return Ok(log.last()),
        };
        write_phase(&notes, &next).map_err(|error| WriteBackError::Phase {
            path: notes.clone(),
            error,
        })?;
    }
}

fn read_phase(path: &Path) -> Result<Phase, WriteBackError> {
    let failed = |error| WriteBackError::Phase {
        path: path.to_owned(),
        error,
    };
    let bytes = match std::fs::read(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Phase::Replaying),
        read => read.map_err(failed)?,
    };
    let torn = || failed(io::Error::other("it is not whole"));
    let mut reader = Reader::new(&bytes);
    let phase = reader.u8().map_err(|_| torn())?;
    let mut entry = || Entry::decode(&mut reader).map_err(|_| torn());
    Ok(match phase {
        1 => Phase::Emptying(entry()?),
        2 => Phase::Filling(entry()?),
        3 => Phase::Done,
        _ => return Err(torn()),
    })
}

fn write_phase(path: &Path, phase: &Phase) -> io::Result<()> {
    let mut bytes = Vec::new();
    match phase {
        Phase::Replaying => return Ok(()),
        Phase::Emptying(entry) => {
            bytes.push(1);
            entry.encode(&mut bytes);
        }
        Phase::Filling(entry) => {
            bytes.push(2);
            entry.encode(&mut bytes);
        }
        Phase::Done => bytes.push(3),
    }
    let new = path.with_extension("new");
    std::fs::write(&new, bytes)?;
    File::open(&new)?.sync_all()?;
    std::fs::rename(&new, path)?;
    let directory = path.parent().unwrap_or(path);
    File::open(directory)?.sync_all()
}

fn directory_of(place: &Destination, path: &[u8]) -> Result<OwnedFd, ApplyError> {
    let flags = OFlag::O_DIRECTORY | OFlag::O_RDONLY;
    let opened = place.root().open_beneath(path, flags, Mode::empty());
    opened.map_err(|error| place.failed("open", path, 0, error))
}

fn names(
    place: &Destination,
    path: &[u8],
    fd: BorrowedFd<'_>,
) -> Result<Vec<OsString>, ApplyError> {
    let listed = std::fs::read_dir(super::super::apply::fd_path(fd))
        .and_then(|names| names.map(|name| Ok(name?.file_name())).collect());
    listed.map_err(|error: io::Error| place.failed("list", path, 0, error))
}

/// A clone of the tree below [`NEW`]: its directories made anew, everything else by hard links.
fn clone(root: &Destination) -> Result<Destination, WriteBackError> {
    let mut parent = Parent::default();
    root.remove(&mut parent, STAGE)?;
    parent.forget();
    let top = fstat(root.root().fd()).map_err(|e| root.failed("look at", b"", 0, e))?;
    for path in [STAGE, NEW, OLD] {
        root.directory(&mut parent, path)?;
    }
    let place = root.root().path().join(OsStr::from_bytes(NEW));
    let new = Destination::open(root.volume(), &place, false)?
        .taking_devices(true)
        .of_source();
    let mut directories: Vec<Entry> = vec![bare_entry(b"", &top, Kind::Directory, false)];
    let mut at = 0;
    while at < directories.len() {
        let path = directories[at].path.clone();
        let from = File::from(directory_of(root, &path)?);
        directories[at].xattrs = read_xattrs(root.root(), &path, &from)?;
        let into = File::from(directory_of(&new, &path)?);
        xattrs::copy_label(&from, &into)
            .map_err(|e| root.failed("keep the label of", &path, 0, e))?;
        for name in names(root, &path, from.as_fd())? {
            if path.is_empty() && name.as_bytes() == STAGE {
                continue;
            }
            let below = if path.is_empty() {
                name.as_bytes().to_vec()
            } else {
                [&path, b"/".as_slice(), name.as_bytes()].concat()
            };
            let failed = |action, error: Errno| root.failed(action, &below, 0, error);
            let flag = AtFlags::AT_SYMLINK_NOFOLLOW;
            let stat = fstatat(&from, name.as_os_str(), flag).map_err(|e| failed("look at", e))?;
            if stat.st_dev != top.st_dev {
                // What is mounted there cannot be moved.
                return Err(failed("write back around the mount point", Errno::EXDEV).into());
            }
            if walk::kind_of(&stat) == SFlag::S_IFDIR {
                let made = mkdirat(&into, name.as_os_str(), Mode::S_IRWXU);
                made.map_err(|e| failed("make the directory", e))?;
                directories.push(bare_entry(&below, &stat, Kind::Directory, false));
            } else {
                let linked = linkat(
                    &from,
                    name.as_os_str(),
                    &into,
                    name.as_os_str(),
                    AtFlags::empty(),
                );
                linked.map_err(|e| failed("link", e))?;
            }
        }
        at += 1;
    }
    for entry in directories.iter().rev() {
        new.finish_directory(entry)?;
    }
    Ok(new)
}

/// Moves every name of the directory `from` into the directory `into`.
fn move_names(root: &Destination, from: &[u8], into: &[u8]) -> Result<(), ApplyError> {
    let (old, new) = (directory_of(root, from)?, directory_of(root, into)?);
    for name in names(root, from, old.as_fd())? {
        if name.as_bytes() == STAGE {
            continue;
        }
        let name = name.as_os_str();
        let moved = renameat2(&old, name, &new, name, RenameFlags::RENAME_NOREPLACE);
        moved.map_err(|error| root.failed("move", name.as_bytes(), 0, error))?;
    }
    Ok(())
}

fn replay(log: &Log, path: &Path, new: &Destination) -> Result<(), WriteBackError> {
    let failed = |error| WriteBackError::Log {
        path: path.to_owned(),
        error,
    };
    let malformed =
        |error: super::Malformed| failed(io::Error::new(io::ErrorKind::InvalidData, error));
    let mut replay = Replay {
        place: new,
        parent: Parent::default(),
        open: None,
    };
    let (mut at, mut batch) = (log.start(), Vec::new());
    loop {
        let next = log.read(at, BATCH, &mut batch).map_err(failed)?;
        if next == at {
            return Ok(());
        }
        at = next;
        let mut reader = Reader::new(&batch);
        while !reader.is_empty() {
            let record = Record::decode(&mut reader).map_err(malformed)?;
            let change = Change::decode(record.content).map_err(malformed)?;
            let applied = replay.apply(&change);
            applied.map_err(|error| WriteBackError::Apply {
                number: record.number,
                error,
            })?;
        }
    }
}

struct Replay<'a> {
    place: &'a Destination,
    parent: Parent,
    /// The file that was written last.
    open: Option<(Box<[u8]>, File)>,
}

impl Replay<'_> {
    fn apply(&mut self, change: &Change) -> Result<(), ApplyError> {
        let place = self.place;
        if !matches!(
            change.act,
            Act::Written { .. } | Act::Zeroed { .. } | Act::State(_)
        ) {
            self.open = None;
        }
        match &change.act {
            Act::Made(entry) => self.made(entry)?,
            Act::Linked { from, to } => place.link(&mut self.parent, to, from)?,
            Act::Removed(path) => {
                place.remove(&mut self.parent, path)?;
                self.parent.forget();
            }
            Act::Renamed { from, to, exchange } => self.renamed(from, to, *exchange)?,
            Act::Written {
                path,
                offset,
                bytes,
            } => {
                let written = self.file(path)?.write_all_at(bytes, *offset);
                written.map_err(|error| place.failed("write", path, bytes.len() as u64, error))?;
            }
            Act::Zeroed {
                path,
                offset,
                length,
            } => {
                // Never beyond the file's end, as its size stays.
                let file = self.file(path)?;
                let size = file
                    .metadata()
                    .map_err(|e| place.failed("look at", path, 0, e))?;
                let length = size.len().saturating_sub(*offset).min(*length);
                if length > 0 {
                    let length = usize::try_from(length).unwrap_or(usize::MAX);
                    place.punch(file, path, *offset, length)?;
                }
            }
            Act::State(entry) => self.state(entry)?,
        }
        for (path, time) in &change.times {
            self.time(path, *time)?;
        }
        Ok(())
    }

    fn file(&mut self, path: &[u8]) -> Result<&File, ApplyError> {
        let known = self.open.take().filter(|(open, _)| **open == *path);
        let file = match known {
            Some((_, file)) => file,
            None => self.place.file(&mut self.parent, path, Access::InPlace)?,
        };
        Ok(&self.open.insert((path.into(), file)).1)
    }

    fn made(&mut self, entry: &Entry) -> Result<(), ApplyError> {
        let place = self.place;
        if self.is_there(&entry.path) {
            return self.state(entry);
        }
        match &entry.kind {
            Kind::Directory => {
                place.directory(&mut self.parent, &entry.path)?;
                place.finish_directory(entry)
            }
            Kind::HardLink(from) => place.link(&mut self.parent, &entry.path, from),
            Kind::File { .. } => {
                let file = place.file(&mut self.parent, &entry.path, Access::private())?;
                place.finish_file(&file, entry, false)
            }
            _ => place.special(&mut self.parent, entry),
        }
    }

    /// Whether something is there: then it was found and not made.
    fn is_there(&self, path: &[u8]) -> bool {
        let found = self
            .place
            .root()
            .parent(path)
            .and_then(|(parent, name)| fstatat(&parent, name, AtFlags::AT_SYMLINK_NOFOLLOW));
        found.is_ok()
    }

    fn state(&mut self, entry: &Entry) -> Result<(), ApplyError> {
        let place = self.place;
        match &entry.kind {
            Kind::Directory => place.finish_directory(entry),
            Kind::HardLink(_) | Kind::File { .. } => {
                let file = self.file(&entry.path)?;
                place.finish_file(file, entry, false)
            }
            _ => place.finish_special(&mut self.parent, entry),
        }
    }

    fn renamed(&mut self, from: &[u8], to: &[u8], exchange: bool) -> Result<(), ApplyError> {
        let place = self.place;
        self.parent.forget();
        let failed = |error: Errno| place.failed("rename", from, 0, error);
        let flags = if exchange {
            RenameFlags::RENAME_EXCHANGE
        } else {
            RenameFlags::empty()
        };
        let rename = || {
            let (old, old_name) = place.root().parent(from)?;
            let (new, new_name) = place.root().parent(to)?;
            renameat2(&old, old_name, &new, new_name, flags)
        };
        match rename() {
            // Sockets were never at the other end, and are in nobody's use.
            Err(Errno::ENOTEMPTY | Errno::EEXIST) if !exchange => {
                place.remove(&mut self.parent, to)?;
                self.parent.forget();
                rename().map_err(failed)
            }
            renamed => renamed.map_err(failed),
        }
    }

    fn time(&mut self, path: &[u8], time: Timestamp) -> Result<(), ApplyError> {
        let time = TimeSpec::new(time.seconds, i64::from(time.nanoseconds));
        let set = match &self.open {
            Some((open, file)) if **open == *path => futimens(file, &TimeSpec::UTIME_OMIT, &time),
            _ => set_time(self.place.root(), path, &time),
        };
        set.map_err(|error| self.place.failed("set the time of", path, 0, error))
    }
}

fn set_time(root: &Confined, path: &[u8], time: &TimeSpec) -> Result<(), Errno> {
    let (parent, name) = split(path);
    let flags = OFlag::O_DIRECTORY | OFlag::O_RDONLY;
    let parent = root.open_beneath(parent, flags, Mode::empty())?;
    let name = OsStr::from_bytes(if name.is_empty() { b"." } else { name });
    let flag = UtimensatFlags::NoFollowSymlink;
    utimensat(&parent, name, &TimeSpec::UTIME_OMIT, time, flag)
}
