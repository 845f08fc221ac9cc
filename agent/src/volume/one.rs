//! A volume of one piece: a block device, a disk image or any other single file.
//!
//! It is shown as a tree of one file named [`CONTENT`], so that blocks, offers, roots and resumption are
//! those of trees. Invariants: of a device only its bytes count, everything else that `stat` tells of it is
//! constant; nothing but that one file is ever opened, made or removed. Non-goals: which devices may be
//! touched (the migration's settings say).

use super::confined::Confined;
use super::walk::Found;
use nix::errno::Errno;
use nix::sys::stat::{FileStat, SFlag, fstat};
use nix::unistd::{Whence, lseek};
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

/// Path of the one file within its volume.
pub const CONTENT: &[u8] = b"content";

/// Where the piece lies in the directory that holds it.
#[derive(Debug)]
pub struct One {
    pub(super) name: OsString,
    device: Option<u64>,
}

impl One {
    /// Directory and description of what `path` names, symbolic links resolved; the file itself may be
    /// missing.
    ///
    /// # Errors
    /// Its directory is missing, or it is neither a regular file nor a block device.
    pub(super) fn find(path: &Path) -> io::Result<(PathBuf, Self)> {
        let real = match path.canonicalize() {
            Ok(real) => real,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let (parent, name) = (path.parent(), path.file_name());
                let (Some(parent), Some(name)) = (parent, name) else {
                    return Err(error);
                };
                parent.canonicalize()?.join(name)
            }
            Err(error) => return Err(error),
        };
        let device = match fs::symlink_metadata(&real).map(|found| found.file_type()) {
            Ok(kind) if kind.is_block_device() => Some(device_size(&real)?),
            Ok(kind) if kind.is_file() => None,
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Ok(_) => {
                let what = "it is neither a regular file nor a block device";
                return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
            }
            Err(error) => return Err(error),
        };
        let (Some(parent), Some(name)) = (real.parent(), real.file_name()) else {
            return Err(Errno::EISDIR.into());
        };
        let name = name.to_owned();
        Ok((parent.to_owned(), Self { name, device }))
    }

    /// Its name in its directory, when `path` is that of the one file.
    #[must_use]
    pub fn local(&self, path: &[u8]) -> Option<&OsStr> {
        (path == CONTENT).then_some(&*self.name)
    }

    /// Whether it is a block device.
    #[must_use]
    pub fn is_device(&self) -> bool {
        self.device.is_some()
    }

    pub(super) fn holding(self, bytes: u64) -> Self {
        let device = self.device.map(|size| size.min(bytes));
        Self { device, ..self }
    }

    pub(super) fn shown(&self, mut stat: FileStat) -> FileStat {
        stat.st_nlink = 1;
        if let Some(size) = self.device {
            let file = SFlag::S_IFREG.bits() | 0o600;
            constant(&mut stat, file);
            stat.st_size = i64::try_from(size).unwrap_or(i64::MAX);
            stat.st_blocks = stat.st_size / 512;
        }
        stat
    }
}

/// Size in bytes of a block device.
///
/// # Errors
/// It cannot be opened.
pub fn device_size(path: &Path) -> io::Result<u64> {
    let end = lseek(File::open(path)?, 0, Whence::SeekEnd)?;
    Ok(u64::try_from(end).unwrap_or(0))
}

fn constant(stat: &mut FileStat, mode: u32) {
    stat.st_mode = mode;
    (stat.st_uid, stat.st_gid) = (0, 0);
    (stat.st_mtime, stat.st_mtime_nsec) = (0, 0);
    (stat.st_ctime, stat.st_ctime_nsec) = (0, 0);
}

/// `stat` of an open file of a volume, as the volume shows it.
///
/// # Errors
/// The error number of `fstat`.
pub fn stat_of(root: &Confined, file: impl AsFd) -> Result<FileStat, Errno> {
    Ok(root.shown(fstat(file)?))
}

/// What a walk of such a volume finds: a directory that is always the same, and the one file.
///
/// # Errors
/// The piece is not there.
pub(super) fn found(root: &Confined, one: &One) -> Result<Vec<Found>, Errno> {
    let flags = nix::fcntl::OFlag::O_RDONLY | nix::fcntl::OFlag::O_NONBLOCK;
    let file = root.open_beneath(CONTENT, flags, nix::sys::stat::Mode::empty())?;
    let file = one.shown(fstat(file)?);
    let mut directory = fstat(root.fd())?;
    constant(&mut directory, SFlag::S_IFDIR.bits() | 0o700);
    let found = |path: &[u8], stat| Found {
        path: path.into(),
        stat,
    };
    Ok(vec![found(b"", directory), found(CONTENT, file)])
}
