//! Walking a tree: names and `stat` of everything beneath a directory, without reading contents.
//!
//! Invariants: the result is sorted by raw path bytes; what vanishes during the walk is simply not
//! in it; nothing is followed, nothing but directories is opened.

use super::confined::{Confined, proc_path};
use super::one::{self, One};
use super::tree::{Entry, Exception, Kind, PATH_CAP, Seen, Timestamp, XATTRS_CAP, shown};
use super::xattrs;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag};
use nix::sys::stat::{FileStat, Mode, SFlag, fstat, fstatat};
use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;
use std::sync::{Condvar, Mutex, PoisonError};

/// Reading a tree failed.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} `{path}` in {}: {source}", .root.display())]
pub struct WalkError {
    /// What was being done.
    pub action: &'static str,
    /// To which path below the root.
    pub path: String,
    /// The tree's root.
    pub root: std::path::PathBuf,
    /// Why it failed.
    pub source: io::Error,
}

impl WalkError {
    pub(crate) fn new(
        root: &Confined,
        action: &'static str,
        path: &[u8],
        source: impl Into<io::Error>,
    ) -> Self {
        Self {
            action,
            path: shown(path).into_owned(),
            root: root.path().to_owned(),
            source: source.into(),
        }
    }

    /// Whether the entry was simply gone.
    #[must_use]
    pub fn vanished(&self) -> bool {
        self.source.raw_os_error().is_some_and(|code| {
            matches!(
                Errno::from_raw(code),
                Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP | Errno::ENXIO | Errno::ESTALE
            )
        })
    }
}

/// One thing found.
#[derive(Clone, Debug)]
pub struct Found {
    /// Path below the root; empty for the root.
    pub path: Box<[u8]>,
    /// Its `stat`.
    pub stat: FileStat,
}

/// Everything found.
#[derive(Debug, Default)]
pub struct Walk {
    /// In path order.
    pub found: Vec<Found>,
    /// What was left out.
    pub skipped: Vec<Exception>,
}

/// Kind bits of a mode.
#[must_use]
pub fn kind_of(stat: &FileStat) -> SFlag {
    SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT
}

/// Threads that walk: the second one's work fills the first one's waits for the disk.
const THREADS: usize = 2;

/// Directories that are still to be walked.
#[derive(Default)]
struct Pending {
    paths: Vec<Box<[u8]>>,
    /// Being walked, which may add to `paths`.
    busy: usize,
    failed: Option<WalkError>,
}

/// Walks everything beneath `root`, crossing mount points as the containers do.
///
/// # Errors
/// A directory that exists but cannot be read.
pub fn walk(root: &Confined) -> Result<Walk, WalkError> {
    let mut walk = Walk::default();
    if let Some(one) = root.one() {
        walk.found =
            one::found(root, one).map_err(|e| WalkError::new(root, "open", one::CONTENT, e))?;
        return Ok(walk);
    }
    let stat = fstat(root.fd()).map_err(|e| WalkError::new(root, "stat", b"", e))?;
    walk.found.push(Found {
        path: Box::default(),
        stat,
    });
    let pending = Mutex::new(Pending {
        paths: vec![Box::default()],
        ..Pending::default()
    });
    let changed = Condvar::new();
    std::thread::scope(|scope| {
        let walking = || walk_some(root, &pending, &changed);
        let others: Vec<_> = (1..THREADS).map(|_| scope.spawn(walking)).collect();
        let mut parts = vec![walking()];
        // A panic of a thread is passed on by the scope.
        parts.extend(others.into_iter().filter_map(|other| other.join().ok()));
        for part in parts {
            walk.found.extend(part.found);
            walk.skipped.extend(part.skipped);
        }
    });
    let failed = pending
        .into_inner()
        .unwrap_or_else(PoisonError::into_inner)
        .failed;
    if let Some(error) = failed {
        return Err(error);
    }
    walk.found.sort_unstable_by(|a, b| a.path.cmp(&b.path));
    Ok(walk)
}

/// Walks pending directories until there are no more.
fn walk_some(root: &Confined, pending: &Mutex<Pending>, changed: &Condvar) -> Walk {
    let mut walk = Walk::default();
    let mut state = pending.lock().unwrap_or_else(PoisonError::into_inner);
    loop {
        if state.failed.is_some() || (state.paths.is_empty() && state.busy == 0) {
            return walk;
        }
        let Some(path) = state.paths.pop() else {
            state = changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            continue;
        };
        state.busy += 1;
        drop(state);
        let mut below = Vec::new();
        let result = walk_directory(root, &path, &mut walk, &mut below);
        state = pending.lock().unwrap_or_else(PoisonError::into_inner);
        state.busy -= 1;
        state.paths.append(&mut below);
        match result {
            Err(error) if !error.vanished() || path.is_empty() => state.failed = Some(error),
            _ => {}
        }
        changed.notify_all();
    }
}

fn walk_directory(
    root: &Confined,
    path: &[u8],
    walk: &mut Walk,
    pending: &mut Vec<Box<[u8]>>,
) -> Result<(), WalkError> {
    let failed = |action, source: io::Error| WalkError::new(root, action, path, source);
    let dir = root
        .open_beneath(path, OFlag::O_DIRECTORY | OFlag::O_RDONLY, Mode::empty())
        .map_err(|e| failed("open", e.into()))?;
    let names = std::fs::read_dir(format!("/proc/self/fd/{}", dir.as_raw_fd()))
        .map_err(|e| failed("list", e))?;
    for name in names {
        let name = name.map_err(|e| failed("list", e))?.file_name().into_vec();
        let mut child = Vec::with_capacity(path.len() + 1 + name.len());
        child.extend_from_slice(path);
        if !path.is_empty() {
            child.push(b'/');
        }
        child.extend_from_slice(&name);
        if child.len() > PATH_CAP {
            walk.skipped.push(Exception {
                path: shown(&child).into_owned(),
                reason: format!("its path is longer than {PATH_CAP} bytes"),
            });
            continue;
        }
        let stat = match fstatat(
            dir.as_fd(),
            OsStr::from_bytes(&name),
            AtFlags::AT_SYMLINK_NOFOLLOW,
        ) {
            Ok(stat) => stat,
            Err(Errno::ENOENT) => continue,
            Err(error) => return Err(WalkError::new(root, "stat", &child, error)),
        };
        let kind = kind_of(&stat);
        if kind == SFlag::S_IFSOCK {
            walk.skipped.push(Exception {
                path: shown(&child).into_owned(),
                reason: "a socket exists only while its process runs".to_owned(),
            });
            continue;
        }
        let child: Box<[u8]> = child.into();
        if kind == SFlag::S_IFDIR {
            pending.push(child.clone());
        }
        walk.found.push(Found { path: child, stat });
    }
    Ok(())
}

/// Identity and metadata of `found` as an entry of `kind`, without attributes.
#[must_use]
pub fn bare_entry(path: &[u8], stat: &FileStat, kind: Kind, racy: bool) -> Entry {
    Entry {
        path: path.into(),
        mode: stat.st_mode & 0o7777,
        uid: stat.st_uid,
        gid: stat.st_gid,
        mtime: timestamp(stat.st_mtime, stat.st_mtime_nsec),
        xattrs: Vec::new(),
        kind,
        seen: Seen {
            device: stat.st_dev,
            inode: stat.st_ino,
            changed: timestamp(stat.st_ctime, stat.st_ctime_nsec),
            racy,
        },
    }
}

/// A time from `stat`; nanoseconds out of range count as zero.
#[must_use]
pub fn timestamp(seconds: i64, nanoseconds: i64) -> Timestamp {
    Timestamp {
        seconds,
        nanoseconds: u32::try_from(nanoseconds).unwrap_or(0),
    }
}

/// The other name of an inode that comes at `primary`. Mode, owner and attributes belong to the
/// inode and stay with the primary name.
#[must_use]
pub fn hard_link(path: &[u8], stat: &FileStat, primary: &[u8], racy: bool) -> Entry {
    let mut entry = bare_entry(path, stat, Kind::HardLink(primary.into()), racy);
    entry.mode = 0;
    entry.uid = 0;
    entry.gid = 0;
    entry.mtime = Timestamp::default();
    entry
}

/// The whole entry of anything but a regular file.
///
/// # Errors
/// The entry cannot be read, or is something that no file system tree holds.
pub fn special_entry(root: &Confined, found: &Found, racy: bool) -> Result<Entry, WalkError> {
    let failed = |action, source: io::Error| WalkError::new(root, action, &found.path, source);
    let kind_bits = kind_of(&found.stat);
    if root.one().is_some() {
        return Ok(bare_entry(&found.path, &found.stat, Kind::Directory, racy));
    }
    if kind_bits == SFlag::S_IFDIR {
        let dir = root
            .open_beneath(
                &found.path,
                OFlag::O_DIRECTORY | OFlag::O_RDONLY,
                Mode::empty(),
            )
            .map_err(|e| failed("open", e.into()))?;
        let stat = fstat(dir.as_fd()).map_err(|e| failed("stat", e.into()))?;
        let mut entry = bare_entry(&found.path, &stat, Kind::Directory, racy);
        entry.xattrs = read_xattrs(root, &found.path, &File::from(dir))?;
        return Ok(entry);
    }
    let (parent, name) = root
        .parent(&found.path)
        .map_err(|e| failed("open the directory of", e.into()))?;
    let kind = match kind_bits {
        SFlag::S_IFLNK => Kind::Symlink(
            nix::fcntl::readlinkat(parent.as_fd(), name)
                .map_err(|e| failed("read the link", e.into()))?
                .into_vec()
                .into(),
        ),
        SFlag::S_IFIFO => Kind::Fifo,
        SFlag::S_IFCHR => Kind::CharDevice(found.stat.st_rdev),
        SFlag::S_IFBLK => Kind::BlockDevice(found.stat.st_rdev),
        _ => {
            let unknown = io::Error::new(io::ErrorKind::InvalidData, "unknown kind of entry");
            return Err(failed("classify", unknown));
        }
    };
    let mut entry = bare_entry(&found.path, &found.stat, kind, racy);
    entry.xattrs = read_xattrs(root, &found.path, proc_path(parent.as_fd(), name).as_path())?;
    Ok(entry)
}

/// Attributes of one entry, within what a record carries.
///
/// # Errors
/// Reading failed or there are more than [`XATTRS_CAP`] bytes of them.
pub fn read_xattrs<C: xattrs::Carrier + ?Sized>(
    root: &Confined,
    path: &[u8],
    carrier: &C,
) -> Result<Vec<super::tree::Xattr>, WalkError> {
    let failed = |source| WalkError::new(root, "read the attributes of", path, source);
    if root.one().is_some_and(One::is_device) {
        return Ok(Vec::new());
    }
    let xattrs = xattrs::read(carrier).map_err(failed)?;
    let bytes: usize = xattrs
        .iter()
        .map(|xattr| xattr.name.len() + xattr.value.len() + 6)
        .sum();
    if bytes > XATTRS_CAP {
        let reason = format!("{bytes} bytes of attributes are more than {XATTRS_CAP}");
        return Err(failed(io::Error::new(io::ErrorKind::InvalidData, reason)));
    }
    Ok(xattrs)
}

/// Opens a volume for walking: a directory, or one file or block device.
///
/// # Errors
/// It cannot be opened as such.
pub fn open_root(path: &Path) -> Result<Confined, WalkError> {
    let opened = match Confined::open(path) {
        Err(Errno::ENOTDIR) => Confined::open_one(path),
        other => other.map_err(io::Error::from),
    };
    opened.map_err(|source| WalkError {
        action: "open",
        path: ".".to_owned(),
        root: path.to_owned(),
        source,
    })
}
