//! Rebuilding a tree on the target.
//!
//! Invariants: nothing outside the destination is ever touched; a file's times are set after its
//! last write and a directory's after its last child; nothing is durable before [`Destination::sync`].

use super::confined::{Confined, open_beneath, proc_path, split};
use super::one::{CONTENT, One};
use super::tree::{Entry, Kind, Timestamp, shown};
use super::xattrs;
use crate::model::units::Bytes;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, FallocateFlags, OFlag, fallocate};
use nix::sys::stat::{
    Mode, SFlag, UtimensatFlags, fchmod, fstat, futimens, mkdirat, mknodat, utimensat,
};
use nix::sys::time::TimeSpec;
use nix::unistd::{
    Gid, Uid, UnlinkatFlags, fchown, fchownat, ftruncate, getegid, geteuid, linkat, symlinkat,
    unlinkat,
};
use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// The target could not take an entry. Says which volume and path, what failed and what helps.
#[derive(Debug, thiserror::Error)]
#[error("volume {volume}: cannot {action} `{path}`: {}", self.explain())]
pub struct ApplyError {
    /// The volume's name.
    pub volume: String,
    /// Path in the volume.
    pub path: String,
    /// What was being done.
    pub action: String,
    /// Why it failed.
    pub source: io::Error,
    /// Bytes that the entry needs.
    pub needed: Bytes,
    /// Bytes that were free on the target's file system.
    pub free: Option<Bytes>,
    /// The target's file system has no inode left.
    pub no_inodes: bool,
    /// It is more than the target's file system keeps of attributes, however much is free.
    pub too_many_attributes: bool,
    /// It is written back to the source, which goes on by itself.
    pub back: bool,
}

impl ApplyError {
    fn errno(&self) -> Option<Errno> {
        self.source.raw_os_error().map(Errno::from_raw)
    }

    /// Whether the target has no room for it.
    #[must_use]
    pub fn is_full(&self) -> bool {
        matches!(self.errno(), Some(Errno::ENOSPC | Errno::EDQUOT)) && !self.too_many_attributes
    }

    /// Whether direct I/O was refused for its alignment.
    #[must_use]
    pub fn is_alignment(&self) -> bool {
        self.errno() == Some(Errno::EINVAL)
    }

    /// The same error, about something that needs this many bytes.
    #[must_use]
    pub fn needing(mut self, bytes: u64) -> Self {
        self.needed = Bytes(bytes);
        self
    }

    fn explain(&self) -> String {
        let free = self
            .free
            .map_or_else(|| "unknown".to_owned(), |bytes| bytes.to_string());
        let (side, other) = if self.back {
            ("source", ", and it goes on")
        } else {
            ("target", " or choose another target")
        };
        let which = if self.back {
            String::new()
        } else {
            ", or choose a target whose file system does".to_owned()
        };
        match self.errno() {
            _ if self.too_many_attributes => format!(
                "the {side}'s file system does not keep so much of attributes for one file (ext4: one block of 4 KiB, \
                 unless it was made with `mkfs.ext4 -O ea_inode`; XFS takes any); remove some{which}"
            ),
            Some(Errno::ENOSPC) if self.no_inodes => {
                format!("no inodes left on the {side}; remove files there{other}")
            }
            Some(Errno::ENOSPC) => format!(
                "no space left on the {side} ({} needed, {free} free); free space there{other}",
                self.needed
            ),
            Some(Errno::EDQUOT) => format!(
                "the {side}'s disk quota is used up ({} needed, {free} free on the disk); raise it{other}",
                self.needed
            ),
            Some(Errno::EROFS) => {
                format!("the {side}'s file system is read-only; look for disk errors there{other}")
            }
            Some(Errno::EPERM) if geteuid().is_root() => format!(
                "{}; where `lsattr` shows it or its directory as immutable (i) or append-only (a) there, \
                 `chattr -i -a` allows it{}",
                self.source,
                if self.back {
                    other
                } else {
                    "; else choose a target whose file system does"
                }
            ),
            Some(Errno::EACCES | Errno::EPERM) => format!(
                "{}; the {side}'s agent must run as root on a file system that allows it",
                self.source
            ),
            Some(Errno::ENAMETOOLONG) => format!(
                "the {side}'s file system does not take a name or path this long; shorten it{which}"
            ),
            Some(Errno::EOPNOTSUPP) => format!(
                "{}; the {side}'s file system lacks a feature that the {} uses",
                self.source,
                if self.back { "twin" } else { "source" }
            ),
            Some(Errno::EIO) => {
                format!("{}; look for disk errors on the {side}{other}", self.source)
            }
            _ => self.source.to_string(),
        }
    }
}

/// The directory of a volume on the target.
#[derive(Debug)]
pub struct Destination {
    volume: String,
    root: Confined,
    devices: bool,
    back: bool,
    /// Whose new files are.
    owner: (u32, u32),
}

/// How a file is opened for writing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// A new file with these permissions in the place of whatever is there.
    New(u32),
    /// The file that is there.
    InPlace,
    /// The file that is there, past the page cache where the file system allows it: every offset,
    /// length and address must be a multiple of 4096.
    Direct,
}

impl Access {
    /// A new, private file.
    #[must_use]
    pub fn private() -> Self {
        Self::New(PRIVATE)
    }
}

/// Bytes that attributes of one file take at most, with what the file system needs beside them.
const LARGEST_XATTRS: u64 = 4 * super::tree::XATTRS_CAP as u64;

/// Nobody but the owner reads or writes.
const PRIVATE: u32 = 0o600;

/// The directory opened last, so that a run of siblings resolves it once.
#[derive(Debug, Default)]
pub struct Parent {
    open: Option<(Box<[u8]>, OwnedFd)>,
}

impl Parent {
    /// Forgets it; needed after directories were removed or replaced.
    pub fn forget(&mut self) {
        self.open = None;
    }
}

impl Destination {
    /// Opens the directory of a volume, making it (and its parents) if it is missing; of a volume of `one`
    /// piece, the file or device at `path`, with the directory around it.
    ///
    /// # Errors
    /// It cannot be made or opened.
    pub fn open(volume: &str, path: &Path, one: bool) -> Result<Self, ApplyError> {
        let failed = |action: &str, source: io::Error| ApplyError {
            volume: volume.to_owned(),
            path: path.display().to_string(),
            action: action.to_owned(),
            source,
            needed: Bytes(0),
            free: None,
            no_inodes: false,
            too_many_attributes: false,
            back: false,
        };
        let directory = path.parent().filter(|_| one).unwrap_or(path);
        std::fs::create_dir_all(directory).map_err(|e| failed("make the directory", e))?;
        let root = if one {
            Confined::open_one(path)
        } else {
            Confined::open(path).map_err(io::Error::from)
        };
        Ok(Self {
            volume: volume.to_owned(),
            root: root.map_err(|e| failed("open the place of the volume", e))?,
            devices: false,
            back: false,
            owner: (geteuid().as_raw(), getegid().as_raw()),
        })
    }

    /// Whether device nodes are made here; at first they are refused, for whoever may open one has the device.
    #[must_use]
    pub fn taking_devices(self, devices: bool) -> Self {
        Self { devices, ..self }
    }

    /// The source's own tree, to which it is written back: errors say so.
    #[must_use]
    pub fn of_source(self) -> Self {
        Self { back: true, ..self }
    }

    /// A new file for a small file's entry: with its own permissions at once if it is ours, else private until
    /// it has its owner.
    #[must_use]
    pub fn access_to_new(&self, entry: &Entry) -> Access {
        let ours = self.owner == (entry.uid, entry.gid);
        Access::New(if ours { entry.mode & 0o777 } else { PRIVATE })
    }

    fn is_device(&self) -> bool {
        self.root.one().is_some_and(One::is_device)
    }

    /// A volume of one piece has nothing else to make, and a device cannot be removed.
    fn changes_names(&self, path: &[u8]) -> Result<(), ApplyError> {
        if self.root.one().is_some() {
            return Err(self.failed("make or remove", path, 0, Errno::EPERM));
        }
        Ok(())
    }

    /// The volume's name.
    #[must_use]
    pub fn volume(&self) -> &str {
        &self.volume
    }

    /// The directory.
    #[must_use]
    pub fn root(&self) -> &Confined {
        &self.root
    }

    /// The directory's path; of a volume of one piece, that of the directory around it.
    #[must_use]
    pub fn directory_path(&self) -> &Path {
        let path = self.root.path();
        path.parent()
            .filter(|_| self.root.one().is_some())
            .unwrap_or(path)
    }

    /// Where `path` of the volume lies below that; none on a device.
    #[must_use]
    pub fn file_path<'p>(&'p self, path: &'p [u8]) -> Option<&'p [u8]> {
        self.root.local(path).ok().filter(|_| !self.is_device())
    }

    /// Whether nothing lies in the directory.
    ///
    /// # Errors
    /// It cannot be listed.
    pub fn is_empty(&self) -> Result<bool, ApplyError> {
        if self.root.one().is_some() {
            return match self
                .root
                .open_beneath(CONTENT, OFlag::O_PATH, Mode::empty())
            {
                Ok(_) => Ok(false),
                Err(Errno::ENOENT) => Ok(true),
                Err(error) => Err(self.failed("open", CONTENT, 0, error)),
            };
        }
        let mut names = std::fs::read_dir(fd_path(self.root.fd()))
            .map_err(|e| self.failed("list", b"", 0, e))?;
        Ok(names.next().is_none())
    }

    /// An error about `path`, with the free space of the file system.
    pub fn failed(
        &self,
        action: &str,
        path: &[u8],
        needed: u64,
        source: impl Into<io::Error>,
    ) -> ApplyError {
        let fs = nix::sys::statvfs::fstatvfs(self.root.fd()).ok();
        ApplyError {
            volume: self.volume.clone(),
            path: shown(path).into_owned(),
            action: action.to_owned(),
            source: source.into(),
            needed: Bytes(needed),
            free: fs.map(|fs| Bytes(fs.blocks_available() * fs.fragment_size())),
            // A file system that counts no inodes (btrfs) reports none at all.
            no_inodes: fs.is_some_and(|fs| fs.files() > 0 && fs.files_available() == 0),
            too_many_attributes: false,
            back: self.back,
        }
    }

    fn with_parent<'p, T>(
        &'p self,
        cache: &mut Parent,
        path: &'p [u8],
        act: impl FnOnce(BorrowedFd<'_>, &'p OsStr) -> Result<T, Errno>,
    ) -> Result<T, Errno> {
        let (parent, name) = split(self.root.local(path)?);
        let known = cache
            .open
            .as_ref()
            .is_some_and(|(open, _)| **open == *parent);
        if !known {
            let flags = OFlag::O_DIRECTORY | OFlag::O_RDONLY;
            let fd = open_beneath(self.root.fd(), parent, flags, Mode::empty())?;
            cache.open = Some((parent.into(), fd));
        }
        match &cache.open {
            Some((_, fd)) => act(fd.as_fd(), OsStr::from_bytes(name)),
            None => Err(Errno::ENOENT),
        }
    }

    /// Removes whatever is at `path`, with everything below it; nothing there is fine.
    ///
    /// # Errors
    /// It exists and cannot be removed.
    pub fn remove(&self, cache: &mut Parent, path: &[u8]) -> Result<(), ApplyError> {
        self.changes_names(path)?;
        match self.with_parent(cache, path, remove_all) {
            Ok(()) | Err(Errno::ENOENT | Errno::ENOTDIR) => Ok(()),
            Err(error) => Err(self.failed("remove", path, 0, error)),
        }
    }

    /// Makes an empty, private directory, or keeps the one that is there. Its metadata comes last.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn directory(&self, cache: &mut Parent, path: &[u8]) -> Result<(), ApplyError> {
        if path.is_empty() {
            return Ok(());
        }
        self.changes_names(path)?;
        let is_directory = |dir: BorrowedFd<'_>, name: &OsStr| {
            let flags = OFlag::O_DIRECTORY | OFlag::O_RDONLY;
            open_beneath(dir, name.as_bytes(), flags, Mode::empty()).is_ok()
        };
        self.with_parent(cache, path, |dir, name| {
            match mkdirat(dir, name, Mode::S_IRWXU) {
                Err(Errno::EEXIST) if is_directory(dir, name) => Ok(()),
                Err(Errno::EEXIST) => {
                    remove_all(dir, name)?;
                    mkdirat(dir, name, Mode::S_IRWXU)
                }
                other => other,
            }
        })
        .map_err(|e| self.failed("make the directory", path, 0, e))
    }

    /// Makes a symbolic link, FIFO or device with its metadata, replacing what is there.
    ///
    /// # Errors
    /// It cannot be made; an entry of another kind is an error too.
    pub fn special(&self, cache: &mut Parent, entry: &Entry) -> Result<(), ApplyError> {
        self.changes_names(&entry.path)?;
        let permissions = Mode::from_bits_truncate(entry.mode);
        let is_device = match entry.kind {
            // Device 0:0 is the whiteout of overlay file systems and nobody's.
            Kind::CharDevice(number) => number != 0,
            Kind::BlockDevice(_) => true,
            _ => false,
        };
        if is_device && !self.devices {
            let refused = "device nodes are not taken here; set `device_nodes: true` under `migration` in the \
                           target's configuration, or remove it from the volume";
            return Err(self.failed(
                "make the device node",
                &entry.path,
                0,
                io::Error::other(refused),
            ));
        }
        self.with_parent(cache, &entry.path, |dir, name| {
            match remove_all(dir, name) {
                Ok(()) | Err(Errno::ENOENT) => {}
                Err(error) => return Err(error),
            }
            match &entry.kind {
                Kind::Symlink(target) => symlinkat(OsStr::from_bytes(target), dir, name)?,
                Kind::Fifo => mknodat(dir, name, SFlag::S_IFIFO, permissions, 0)?,
                Kind::CharDevice(number) => {
                    mknodat(dir, name, SFlag::S_IFCHR, permissions, *number)?;
                }
                Kind::BlockDevice(number) => {
                    mknodat(dir, name, SFlag::S_IFBLK, permissions, *number)?;
                }
                Kind::Directory | Kind::File { .. } | Kind::HardLink(_) => {
                    return Err(Errno::EINVAL);
                }
            }
            Ok(())
        })
        .map_err(|e| self.failed("make", &entry.path, 0, e))?;
        self.finish_special(cache, entry)
    }

    /// Gives a symbolic link, FIFO or device that is there its metadata.
    ///
    /// # Errors
    /// One of them could not be set.
    pub fn finish_special(&self, cache: &mut Parent, entry: &Entry) -> Result<(), ApplyError> {
        let permissions = Mode::from_bits_truncate(entry.mode);
        self.with_parent(cache, &entry.path, |dir, name| {
            let (uid, gid) = owner(entry);
            fchownat(dir, name, uid, gid, AtFlags::AT_SYMLINK_NOFOLLOW)?;
            if !matches!(entry.kind, Kind::Symlink(_)) {
                // Owner first: changing it clears set-id bits. The entry is ours and no symlink.
                let flag = nix::sys::stat::FchmodatFlags::FollowSymlink;
                nix::sys::stat::fchmodat(dir, name, permissions, flag)?;
            }
            Ok(())
        })
        .map_err(|e| self.failed("set the owner of", &entry.path, 0, e))?;
        let attributes = |dir: BorrowedFd<'_>, name: &OsStr| {
            xattrs::write(proc_path(dir, name).as_path(), &entry.xattrs)
        };
        let mut written = Ok(());
        self.with_parent(cache, &entry.path, |dir, name| {
            written = attributes(dir, name);
            let time = time_spec(entry.mtime);
            let flag = UtimensatFlags::NoFollowSymlink;
            utimensat(dir, name, &TimeSpec::UTIME_OMIT, &time, flag)
        })
        .map_err(|e| self.failed("set the time of", &entry.path, 0, e))?;
        written.map_err(|(name, e)| self.attribute_failed(&entry.path, &name, e))
    }

    /// Gives the file at `primary` the further name `path`, replacing what is there.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn link(&self, cache: &mut Parent, path: &[u8], primary: &[u8]) -> Result<(), ApplyError> {
        self.changes_names(path)?;
        let failed = |e: Errno| self.failed("link", path, 0, e);
        let (from, from_name) = self.root.parent(primary).map_err(failed)?;
        self.with_parent(cache, path, |dir, name| {
            match remove_all(dir, name) {
                Ok(()) | Err(Errno::ENOENT) => {}
                Err(error) => return Err(error),
            }
            linkat(from.as_fd(), from_name, dir, name, AtFlags::empty())
        })
        .map_err(failed)
    }

    /// Opens a file for writing.
    ///
    /// # Errors
    /// It cannot be opened or made.
    pub fn file(
        &self,
        cache: &mut Parent,
        path: &[u8],
        access: Access,
    ) -> Result<File, ApplyError> {
        let device = self.is_device();
        self.with_parent(cache, path, |dir, name| match access {
            Access::New(mode) if !device => make_file(dir, name, mode),
            Access::Direct => match open_existing(dir, name, OFlag::O_DIRECT, device) {
                Err(Errno::EINVAL) => open_existing(dir, name, OFlag::empty(), device),
                other => other,
            },
            _ => open_existing(dir, name, OFlag::empty(), device),
        })
        .map(File::from)
        .map_err(|e| self.failed("open", path, 0, e))
    }

    /// Reserves space for a new file of `size` bytes, where the file system can: a disk that is too
    /// small is noticed before the bytes travel.
    ///
    /// # Errors
    /// There is no room.
    pub fn reserve(&self, file: &File, path: &[u8], size: u64) -> Result<(), ApplyError> {
        let length = i64::try_from(size).unwrap_or(i64::MAX);
        match fallocate(file, FallocateFlags::empty(), 0, length) {
            Ok(()) | Err(Errno::EOPNOTSUPP | Errno::ENOSYS) => Ok(()),
            Err(error) => Err(self.failed("reserve space for", path, size, error)),
        }
    }

    /// Makes a range of a file read as zeros without keeping bytes for it.
    ///
    /// # Errors
    /// The range could not be cleared.
    pub fn punch(
        &self,
        file: &File,
        path: &[u8],
        offset: u64,
        len: usize,
    ) -> Result<(), ApplyError> {
        let failed = |e: io::Error| self.failed("clear a block of", path, 0, e);
        let past = || failed(Errno::EFBIG.into());
        let start = i64::try_from(offset).map_err(|_| past())?;
        let length = i64::try_from(len).map_err(|_| past())?;
        let (hole, keep) = (
            FallocateFlags::FALLOC_FL_PUNCH_HOLE,
            FallocateFlags::FALLOC_FL_KEEP_SIZE,
        );
        let missing = |e| matches!(e, Errno::EOPNOTSUPP | Errno::ENOSYS);
        // A device that cannot unmap can be told to write zeros, or told so by the kernel.
        for how in [hole | keep, FallocateFlags::FALLOC_FL_ZERO_RANGE | keep] {
            match fallocate(file, how, start, length) {
                Err(error) if missing(error) => {}
                other => return other.map_err(|e| failed(e.into())),
            }
        }
        file.write_all_at(&vec![0; len], offset).map_err(failed)
    }

    /// Gives an open, written file its metadata, and its size unless it has it (`whole`).
    ///
    /// # Errors
    /// One of them could not be set.
    pub fn finish_file(&self, file: &File, entry: &Entry, whole: bool) -> Result<(), ApplyError> {
        if self.is_device() {
            return Ok(());
        }
        if !whole {
            let size = i64::try_from(entry.size()).unwrap_or(i64::MAX);
            ftruncate(file, size).map_err(|e| self.failed("set the size of", &entry.path, 0, e))?;
        }
        self.finish(file, entry)
    }

    /// Gives a directory its metadata.
    ///
    /// # Errors
    /// It is missing, or something could not be set.
    pub fn finish_directory(&self, entry: &Entry) -> Result<(), ApplyError> {
        if self.root.one().is_some() {
            return Ok(());
        }
        let flags = OFlag::O_DIRECTORY | OFlag::O_RDONLY;
        let dir = self
            .root
            .open_beneath(&entry.path, flags, Mode::empty())
            .map_err(|e| self.failed("open", &entry.path, 0, e))?;
        self.finish(&File::from(dir), entry)
    }

    fn finish(&self, file: &File, entry: &Entry) -> Result<(), ApplyError> {
        let failed = |action: &str, e: Errno| self.failed(action, &entry.path, 0, e);
        // What a new file has already is not written to the file system's journal once more.
        let now = fstat(file).map_err(|e| failed("look at", e))?;
        let is_owned = (now.st_uid, now.st_gid) == (entry.uid, entry.gid);
        // Owner before mode and attributes: changing it clears set-id bits and capabilities.
        if !is_owned {
            let (uid, gid) = owner(entry);
            fchown(file, uid, gid).map_err(|e| failed("set the owner of", e))?;
        }
        if !is_owned || now.st_mode & 0o7777 != entry.mode {
            fchmod(file, Mode::from_bits_truncate(entry.mode))
                .map_err(|e| failed("set the mode of", e))?;
        }
        xattrs::write(file, &entry.xattrs)
            .map_err(|(name, e)| self.attribute_failed(&entry.path, &name, e))?;
        futimens(file, &TimeSpec::UTIME_OMIT, &time_spec(entry.mtime))
            .map_err(|e| failed("set the time of", e))
    }

    fn attribute_failed(&self, path: &[u8], name: &OsStr, error: io::Error) -> ApplyError {
        let action = format!("set the attribute {} of", name.to_string_lossy());
        let failed = self.failed(&action, path, 0, error);
        // Where there is room, the same error of ext4 and btrfs means that one file has all it may.
        let room = failed.free.is_some_and(|free| free.0 > LARGEST_XATTRS);
        ApplyError {
            too_many_attributes: match failed.errno() {
                Some(Errno::E2BIG | Errno::ERANGE) => true,
                error => error == Some(Errno::ENOSPC) && room && !failed.no_inodes,
            },
            ..failed
        }
    }

    /// Makes everything applied so far durable.
    ///
    /// # Errors
    /// The write-back failed: what was acknowledged may not be on the disk.
    pub fn sync(&self) -> Result<(), ApplyError> {
        if self.is_device() {
            return self
                .file(&mut Parent::default(), CONTENT, Access::InPlace)?
                .sync_all()
                .map_err(|e| self.failed("write back", CONTENT, 0, e));
        }
        nix::unistd::syncfs(self.root.fd()).map_err(|e| self.failed("write back", b"", 0, e))
    }
}

fn make_file(dir: BorrowedFd<'_>, name: &OsStr, mode: u32) -> Result<OwnedFd, Errno> {
    let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL;
    let mode = Mode::from_bits_truncate(mode);
    match open_beneath(dir, name.as_bytes(), flags, mode) {
        Err(Errno::EEXIST) => {
            remove_all(dir, name)?;
            open_beneath(dir, name.as_bytes(), flags, mode)
        }
        other => other,
    }
}

fn open_existing(
    dir: BorrowedFd<'_>,
    name: &OsStr,
    extra: OFlag,
    device: bool,
) -> Result<OwnedFd, Errno> {
    let flags = OFlag::O_RDWR | OFlag::O_NONBLOCK | extra;
    let fd = open_beneath(dir, name.as_bytes(), flags, Mode::empty())?;
    let kind = SFlag::from_bits_truncate(fstat(&fd)?.st_mode) & SFlag::S_IFMT;
    let wanted = if device {
        SFlag::S_IFBLK
    } else {
        SFlag::S_IFREG
    };
    // Someone else put a device or FIFO there meanwhile: never write into it.
    if kind != wanted {
        return Err(Errno::EEXIST);
    }
    Ok(fd)
}

fn owner(entry: &Entry) -> (Option<Uid>, Option<Gid>) {
    (
        Some(Uid::from_raw(entry.uid)),
        Some(Gid::from_raw(entry.gid)),
    )
}

fn time_spec(time: Timestamp) -> TimeSpec {
    TimeSpec::new(time.seconds, i64::from(time.nanoseconds))
}

/// The path of an open descriptor, for calls that take only paths.
pub(super) fn fd_path(fd: BorrowedFd<'_>) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

/// Removes `name` from `dir` with everything below it.
fn remove_all(dir: BorrowedFd<'_>, name: &OsStr) -> Result<(), Errno> {
    match unlinkat(dir, name, UnlinkatFlags::NoRemoveDir) {
        // POSIX lets unlink(2) of a directory fail with either.
        Err(Errno::EISDIR | Errno::EPERM) => {}
        other => return other,
    }
    match unlinkat(dir, name, UnlinkatFlags::RemoveDir) {
        Err(Errno::ENOTEMPTY | Errno::EEXIST) => {}
        other => return other,
    }
    let flags = OFlag::O_DIRECTORY | OFlag::O_RDONLY;
    let inner = open_beneath(dir, name.as_bytes(), flags, Mode::empty())?;
    let names: Vec<std::ffi::OsString> = std::fs::read_dir(fd_path(inner.as_fd()))
        .and_then(|names| names.map(|name| Ok(name?.file_name())).collect())
        .map_err(|e: io::Error| e.raw_os_error().map_or(Errno::EIO, Errno::from_raw))?;
    for child in names {
        remove_all(inner.as_fd(), &child)?;
    }
    unlinkat(dir, name, UnlinkatFlags::RemoveDir)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_back_to_the_source_fails_there_and_not_on_the_target() {
        let directory = tempfile::tempdir().unwrap();
        let open = || Destination::open("data", directory.path(), false).unwrap();
        let (back, there) = (open().of_source(), open());
        let codes = [
            Errno::ENOSPC,
            Errno::EDQUOT,
            Errno::EROFS,
            Errno::EPERM,
            Errno::EACCES,
            Errno::ENAMETOOLONG,
            Errno::EOPNOTSUPP,
            Errno::EIO,
            Errno::E2BIG,
        ];
        for code in codes {
            let name = OsStr::new("user.a");
            for error in [
                back.failed("open", b"file", 1, code),
                back.attribute_failed(b"file", name, code.into()),
            ] {
                let said = error.to_string();
                assert!(!said.contains("target"), "{said}");
            }
        }
        for code in codes.into_iter().filter(|code| *code != Errno::E2BIG) {
            let said = there.failed("open", b"file", 1, code).to_string();
            assert!(said.contains("target"), "{said}");
        }
    }
}
