//! A directory that no path can leave: every open goes through `openat2` with `RESOLVE_BENEATH`
//! and `RESOLVE_NO_SYMLINKS`, so neither `..` nor a link planted meanwhile leads outside.

use super::one::One;
use super::times;
use crate::model::volume::TimesKept;
use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::stat::{FileStat, Mode};
use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// An open directory beneath which paths are resolved; of a volume of one piece, the directory that holds it.
#[derive(Debug)]
pub struct Confined {
    fd: OwnedFd,
    path: PathBuf,
    one: Option<One>,
    times: TimesKept,
}

impl Confined {
    /// Opens `path`, following links in it: the operator named it.
    ///
    /// # Errors
    /// The error number of `open`.
    pub fn open(path: &Path) -> Result<Self, Errno> {
        let fd = nix::fcntl::open(
            path,
            OFlag::O_DIRECTORY | OFlag::O_RDONLY | OFlag::O_CLOEXEC,
            Mode::empty(),
        )?;
        Ok(Self {
            fd,
            path: path.to_owned(),
            one: None,
            times: TimesKept::default(),
        })
    }

    /// The same volume with all times of modification as a target keeps them.
    #[must_use]
    pub fn keeping(self, times: TimesKept) -> Self {
        Self { times, ..self }
    }

    /// Which times are shown.
    #[must_use]
    pub fn times(&self) -> &TimesKept {
        &self.times
    }

    /// `stat` of what lies in the volume, as the volume shows it.
    #[must_use]
    pub fn shown(&self, stat: FileStat) -> FileStat {
        let mut stat = self.one().map_or(stat, |one| one.shown(stat));
        times::set_kept(&self.times, &mut stat);
        stat
    }

    /// Opens the directory of a volume of one piece, which lies at `path` or will; no other name there can
    /// be reached.
    ///
    /// # Errors
    /// As [`One::find`] and [`Confined::open`].
    pub fn open_one(path: &Path) -> io::Result<Self> {
        let (parent, one) = One::find(path)?;
        Ok(Self {
            path: path.to_owned(),
            one: Some(one),
            ..Self::open(&parent)?
        })
    }

    /// The same volume, of a device only its first `bytes`: those that came to a larger one.
    #[must_use]
    pub fn holding(self, bytes: u64) -> Self {
        let one = self.one.map(|one| one.holding(bytes));
        Self { one, ..self }
    }

    /// The piece, when the volume is of one.
    #[must_use]
    pub fn one(&self) -> Option<&One> {
        self.one.as_ref()
    }

    /// The name beneath the directory by which `path` of the volume is opened.
    ///
    /// # Errors
    /// `ENOENT` for what a volume of one piece does not have.
    pub fn local<'p>(&'p self, path: &'p [u8]) -> Result<&'p [u8], Errno> {
        match &self.one {
            Some(one) if !path.is_empty() => Ok(one.local(path).ok_or(Errno::ENOENT)?.as_bytes()),
            _ => Ok(path),
        }
    }

    /// The directory's own path, for messages.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The directory itself.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Opens `path` (relative; empty for the directory itself) beneath the directory.
    ///
    /// # Errors
    /// The error number of `openat2`; `EXDEV` or `ELOOP` for a path that would leave.
    pub fn open_beneath(&self, path: &[u8], flags: OFlag, mode: Mode) -> Result<OwnedFd, Errno> {
        open_beneath(self.fd.as_fd(), self.local(path)?, flags, mode)
    }

    /// Opens the directory that holds `path` and returns it with the last component.
    ///
    /// # Errors
    /// As [`Confined::open_beneath`].
    pub fn parent<'p>(&'p self, path: &'p [u8]) -> Result<(OwnedFd, &'p OsStr), Errno> {
        let (parent, name) = split(self.local(path)?);
        let fd = self.open_beneath(parent, OFlag::O_DIRECTORY | OFlag::O_RDONLY, Mode::empty())?;
        Ok((fd, OsStr::from_bytes(name)))
    }
}

/// The open flags that confine, for engines that issue `openat2` themselves.
#[must_use]
pub fn confining() -> ResolveFlag {
    ResolveFlag::RESOLVE_BENEATH
        | ResolveFlag::RESOLVE_NO_SYMLINKS
        | ResolveFlag::RESOLVE_NO_MAGICLINKS
}

/// As [`Confined::open_beneath`], for a directory already open.
///
/// # Errors
/// The error number of `openat2`.
pub fn open_beneath(
    dir: BorrowedFd<'_>,
    path: &[u8],
    flags: OFlag,
    mode: Mode,
) -> Result<OwnedFd, Errno> {
    let path = OsStr::from_bytes(if path.is_empty() { b"." } else { path });
    let how = OpenHow::new()
        .flags(flags | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC)
        .mode(mode)
        .resolve(confining());
    // A rename elsewhere in the tree can make the kernel ask for a retry (openat2(2), EAGAIN).
    for _ in 0..16 {
        match openat2(dir, path, how) {
            Err(Errno::EAGAIN | Errno::EINTR) => {}
            other => return other,
        }
    }
    Err(Errno::EAGAIN)
}

/// Parent and last component of a relative path.
#[must_use]
pub fn split(path: &[u8]) -> (&[u8], &[u8]) {
    path.iter()
        .rposition(|&byte| byte == b'/')
        .map_or((b"".as_slice(), path), |slash| {
            (&path[..slash], &path[slash + 1..])
        })
}

/// A path through which path-only calls reach `name` in an open directory; confined, because the
/// directory is already resolved and `name` has no slash.
#[must_use]
pub fn proc_path(dir: BorrowedFd<'_>, name: &OsStr) -> PathBuf {
    let mut path = PathBuf::from(format!("/proc/self/fd/{}", dir.as_raw_fd()));
    path.push(name);
    path
}
