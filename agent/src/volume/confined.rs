//! A directory that no path can leave: every open goes through `openat2` with `RESOLVE_BENEATH`
//! and `RESOLVE_NO_SYMLINKS`, so neither `..` nor a link planted meanwhile leads outside.

use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::stat::Mode;
use std::ffi::OsStr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// An open directory beneath which paths are resolved.
#[derive(Debug)]
pub struct Confined {
    fd: OwnedFd,
    path: PathBuf,
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
        })
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
        open_beneath(self.fd.as_fd(), path, flags, mode)
    }

    /// Opens the directory that holds `path` and returns it with the last component.
    ///
    /// # Errors
    /// As [`Confined::open_beneath`].
    pub fn parent<'p>(&self, path: &'p [u8]) -> Result<(OwnedFd, &'p OsStr), Errno> {
        let (parent, name) = split(path);
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
