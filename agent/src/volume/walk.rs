//! Walking a tree: names and `stat` of everything beneath a directory, without reading contents.
//!
//! Invariants: entries come sorted by raw path bytes; what vanishes during the walk is simply not among
//! them; what the disk does not give up is an error of its own each, and the walk goes on behind it; nothing is
//! followed, nothing but directories is opened; memory is bounded by the names of the directories that lie above
//! each other, not by the tree.

use super::confined::{Confined, proc_path};
use super::one::{self, One, stat_of};
use super::salvage::{Unreadable, insist, is_media_error};
use super::times;
use super::tree::{Entry, Exception, Kind, NAME_CAP, PATH_CAP, Seen, Timestamp, XATTRS_CAP, shown};
use super::warm::{self, Warmer};
use super::xattrs;
use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag};
use nix::sys::stat::{FileStat, Mode, SFlag, fstat, fstatat};
use std::cmp::{Ordering, Reverse};
use std::collections::BinaryHeap;
use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;
use std::time::Instant;

/// Reading a tree failed.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} `{}` in {}: {source}{}", shown(.path), .root.display(), self.remedy())]
pub struct WalkError {
    /// What was being done.
    pub action: &'static str,
    /// To which path below the root.
    pub path: Box<[u8]>,
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
            path: path.into(),
            root: root.path().to_owned(),
            source: source.into(),
        }
    }

    /// What helps, where that is known: root is refused by file systems, not by modes.
    fn remedy(&self) -> &'static str {
        match self.source.raw_os_error().map(Errno::from_raw) {
            Some(Errno::EACCES | Errno::EPERM) => {
                "; its file system refuses it even to root (a FUSE mount of another user, or a file of the kernel): \
                 unmount it, or take it out of the volume"
            }
            Some(Errno::ENOTCONN) => {
                "; the program behind this FUSE mount is gone: unmount it or start it again"
            }
            Some(Errno::E2BIG) => {
                "; more than 512 KiB of attributes of one file do not travel: remove some, or copy first and accept their loss"
            }
            Some(Errno::EFBIG) => {
                "; files of more than 64 TiB are not moved, also where most of them is a hole: shorten or remove it"
            }
            _ => "",
        }
    }

    /// Whether the disk does not give this up, or it is more than travels, and everything else can go on: anything but
    /// the root.
    #[must_use]
    pub fn is_loss(&self) -> bool {
        (is_media_error(&self.source) || self.is_too_much()) && !self.path.is_empty()
    }

    /// Whether there are more attributes than travel, or than the kernel lists.
    fn is_too_much(&self) -> bool {
        self.source.raw_os_error() == Some(Errno::E2BIG as i32)
    }

    /// The same for an operator, who must accept it; `meaning` says what the target is to lack.
    #[must_use]
    pub fn loss(&self, meaning: &str) -> Unreadable {
        let why = if self.is_too_much() {
            format!("there are more than {} KiB of attributes", XATTRS_CAP >> 10)
        } else {
            self.source.to_string()
        };
        Unreadable {
            path: shown(&self.path).into_owned(),
            offset: 0,
            length: 0,
            entry: Some(format!("{meaning} ({why})")),
            kept: false,
        }
    }

    /// What a loss that a walk met means.
    #[must_use]
    pub fn loss_of_names(&self) -> Unreadable {
        let meaning = match self.action {
            "stat" => {
                "it cannot be looked at; it and everything below it is missing on the target, or as an earlier epoch brought it"
            }
            _ => {
                "it cannot be listed; everything below it that is not in what was listed is missing on the target, or as an earlier epoch brought it"
            }
        };
        self.loss(meaning)
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

/// What the loss of an entry that was found means.
pub const LOST: &str =
    "it cannot be read; it is missing on the target, or as an earlier epoch brought it";
/// What the loss of attributes means.
pub const LOST_ATTRIBUTES: &str = "its attributes, with them ACLs and capabilities, are not taken; it has none on the target, or those that an earlier epoch brought";

/// One thing found.
#[derive(Clone, Debug)]
pub struct Found {
    /// Path below the root; empty for the root.
    pub path: Box<[u8]>,
    /// Its `stat`.
    pub stat: FileStat,
}

/// Kind bits of a mode.
#[must_use]
pub fn kind_of(stat: &FileStat) -> SFlag {
    SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT
}

/// Walks everything beneath `root` in path order, crossing mount points as the containers do. A directory
/// that exists but cannot be read is an error; the walk can be asked for what comes behind an error.
pub fn walk(root: &Confined) -> Walk<'_> {
    let first = Next::Root;
    Walk {
        root,
        next: BinaryHeap::from([Reverse((Vec::new(), first))]),
        skipped: Vec::new(),
        times: times::Changed::default(),
        warmer: None,
    }
}

/// A walk under way. Holds the names of the directories on the way to where it is.
pub struct Walk<'a> {
    root: &'a Confined,
    next: BinaryHeap<Reverse<(Vec<u8>, Next)>>,
    skipped: Vec<Exception>,
    times: times::Changed,
    warmer: Option<&'a Warmer<'a>>,
}

/// What comes at a path. A directory's contents come at its path with a slash behind it: after a sibling
/// whose name goes on with a byte below the slash.
enum Next {
    Root,
    Contents,
    Name(Box<Listing>),
    Found(Box<Found>),
}

/// Names of one directory that were not looked at yet, the next one last.
struct Listing {
    /// None when so many are open that this one is opened again for each name.
    dir: Option<Dir>,
    path: Box<[u8]>,
    names: Vec<u8>,
    spans: Vec<Range<u32>>,
}

/// Most directories that a walk holds open.
const OPEN_CAP: usize = 64;

impl<'a> Walk<'a> {
    /// The same walk, which finds in memory what `warmer` reads ahead.
    #[must_use]
    pub fn warmed_by(mut self, warmer: &'a Warmer<'a>) -> Self {
        self.warmer = Some(warmer);
        self
    }

    /// What was left out so far, and what arrives with another time.
    #[must_use]
    pub fn skipped(self) -> Vec<Exception> {
        let mut skipped = self.skipped;
        skipped.extend(self.times.exceptions(self.root.times()));
        skipped
    }

    fn shown(&mut self, mut found: Found) -> Found {
        self.times
            .keep(self.root.times(), &found.path, &mut found.stat);
        found
    }

    fn enter(&mut self, path: &[u8]) -> Result<(), WalkError> {
        match self.list(path) {
            Ok((listing, rest)) => {
                self.go_on(listing);
                rest.map_or(Ok(()), Err)
            }
            Err(error) if error.vanished() && !path.is_empty() => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// The entries of a volume that is one file or device.
    fn enter_one(&mut self, one: &One) -> Result<(), WalkError> {
        let found =
            one::found(self.root, one).map_err(|e| WalkError::new(self.root, "open", b"", e))?;
        for found in found {
            let path = found.path.to_vec();
            self.next
                .push(Reverse((path, Next::Found(Box::new(found)))));
        }
        Ok(())
    }

    fn go_on(&mut self, mut listing: Box<Listing>) {
        if listing.spans.is_empty() {
            return;
        }
        if self.next.len() >= OPEN_CAP {
            listing.dir = None;
        }
        self.next
            .push(Reverse((listing.child(), Next::Name(listing))));
    }

    /// The names in a directory, and why those are not all.
    fn list(&mut self, path: &[u8]) -> Result<(Box<Listing>, Option<WalkError>), WalkError> {
        let failed = |action, source: io::Error| WalkError::new(self.root, action, path, source);
        let began = Instant::now();
        if let Some(warmer) = self.warmer {
            warmer.reached(path);
        }
        let dir = open_directory(self.root, path)?;
        let mut dir = Dir::from_fd(dir).map_err(|e| failed("list", e.into()))?;
        let (mut names, mut spans, mut inner) = (Vec::new(), Vec::new(), Vec::new());
        let mut rest = None;
        let mut listed = dir.iter();
        while let Some(entry) = insist(|| listed.next().transpose().map_err(Into::into)).transpose()
        {
            let entry = match entry.map_err(|e| failed("list", e)) {
                // What was listed before is not lost with it.
                Err(error) if error.is_loss() => {
                    rest = Some(error);
                    break;
                }
                other => other?,
            };
            let name = entry.file_name().to_bytes();
            if matches!(name, b"." | b"..") {
                continue;
            }
            let length = path.len() + 1 + name.len();
            if length > PATH_CAP || name.len() > NAME_CAP {
                let child = [path, b"/", name].concat();
                self.skipped.push(Exception {
                    path: shown(&child).into_owned(),
                    reason: format!(
                        "its path is longer than {PATH_CAP} bytes or its name than {NAME_CAP}"
                    ),
                });
                continue;
            }
            let start = names.len();
            names.extend_from_slice(name);
            let past = u32::try_from(names.len())
                .map_err(|_| failed("list", io::Error::other("4 GiB of names in one directory")))?;
            spans.push(start as u32..past);
            if self.warmer.is_some() && warm::is_directory(&entry) {
                inner.push(below(path, &names[start..]));
            }
        }
        drop(listed);
        if let Some(warmer) = self.warmer {
            warmer.listed(began.elapsed(), &inner);
        }
        let name = |span: &Range<u32>| &names[span.start as usize..span.end as usize];
        spans.sort_unstable_by(|a, b| name(b).cmp(name(a)));
        spans.shrink_to_fit();
        names.shrink_to_fit();
        let listing = Listing {
            dir: Some(dir),
            path: path.into(),
            names,
            spans,
        };
        Ok((Box::new(listing), rest))
    }

    /// Looks at the name at `path`, the next of a listing; none when it is gone or left out.
    fn look(&mut self, path: Vec<u8>, listing: &Listing) -> Result<Option<Found>, WalkError> {
        let again;
        let dir = match &listing.dir {
            Some(dir) => dir.as_fd(),
            None => match open_directory(self.root, &listing.path) {
                Err(error) if error.vanished() => return Ok(None),
                Err(error) => return Err(WalkError::new(self.root, "stat", &path, error.source)),
                Ok(dir) => {
                    again = dir;
                    again.as_fd()
                }
            },
        };
        let name = OsStr::from_bytes(listing.name());
        let look = || fstatat(dir, name, AtFlags::AT_SYMLINK_NOFOLLOW).map_err(io::Error::from);
        let stat = match insist(look) {
            Ok(stat) => stat,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(WalkError::new(self.root, "stat", &path, error)),
        };
        let kind = kind_of(&stat);
        if kind == SFlag::S_IFSOCK {
            self.skipped.push(Exception {
                path: shown(&path).into_owned(),
                reason: "a socket exists only while its process runs".to_owned(),
            });
            return Ok(None);
        }
        if kind == SFlag::S_IFDIR {
            let mut contents = path.clone();
            contents.push(b'/');
            self.next.push(Reverse((contents, Next::Contents)));
        }
        Ok(Some(Found {
            path: path.into(),
            stat,
        }))
    }
}

impl Iterator for Walk<'_> {
    type Item = Result<Found, WalkError>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let Reverse((mut path, next)) = self.next.pop()?;
            let found = match next {
                Next::Found(found) => return Some(Ok(self.shown(*found))),
                Next::Root => match self.root.one() {
                    Some(one) => self.enter_one(one).map(|()| None),
                    None => {
                        let stat = fstat(self.root.fd());
                        let stat = stat.map_err(|e| WalkError::new(self.root, "stat", b"", e));
                        self.enter(b"").and(stat.map(|stat| {
                            let path = Box::default();
                            Some(Found { path, stat })
                        }))
                    }
                },
                Next::Contents => {
                    path.pop();
                    self.enter(&path).map(|()| None)
                }
                Next::Name(mut listing) => {
                    let found = self.look(path, &listing);
                    listing.spans.pop();
                    self.go_on(listing);
                    found
                }
            };
            if let Some(found) = found.transpose() {
                return Some(found.map(|found| self.shown(found)));
            }
        }
    }
}

impl Listing {
    fn name(&self) -> &[u8] {
        let span = self.spans.last().cloned().unwrap_or_default();
        &self.names[span.start as usize..span.end as usize]
    }

    /// Path of the next name.
    fn child(&self) -> Vec<u8> {
        below(&self.path, self.name())
    }
}

/// Path of a name in the directory at `path`.
fn below(path: &[u8], name: &[u8]) -> Vec<u8> {
    if path.is_empty() {
        return name.to_vec();
    }
    [path, b"/", name].concat()
}

// Paths alone decide the order; no two things come at the same path.
impl Ord for Next {
    fn cmp(&self, _: &Self) -> Ordering {
        Ordering::Equal
    }
}
impl PartialOrd for Next {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}
impl PartialEq for Next {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}
impl Eq for Next {}

fn open_directory(root: &Confined, path: &[u8]) -> Result<OwnedFd, WalkError> {
    let flags = OFlag::O_DIRECTORY | OFlag::O_RDONLY;
    let open = || root.open_beneath(path, flags, Mode::empty());
    insist(|| open().map_err(Into::into)).map_err(|e| WalkError::new(root, "open", path, e))
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
        nanoseconds: u32::try_from(nanoseconds)
            .ok()
            .filter(|&nanoseconds| nanoseconds < 1_000_000_000)
            .unwrap_or(0),
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
        let stat = stat_of(root, &dir).map_err(|e| failed("stat", e.into()))?;
        let mut entry = bare_entry(&found.path, &stat, Kind::Directory, racy);
        entry.xattrs = read_xattrs(root, &found.path, &File::from(dir))?;
        return Ok(entry);
    }
    let (parent, name) = root
        .parent(&found.path)
        .map_err(|e| failed("open the directory of", e.into()))?;
    let kind = match kind_bits {
        SFlag::S_IFLNK => {
            let read = || match nix::fcntl::readlinkat(parent.as_fd(), name) {
                // Something else has this name by now.
                Err(Errno::EINVAL) => Err(Errno::ENOENT.into()),
                read => read.map_err(Into::into),
            };
            let target = insist(read).map_err(|e| failed("read the link", e))?;
            if target.is_empty() {
                let nowhere = io::Error::new(io::ErrorKind::InvalidData, "it leads nowhere");
                return Err(failed("read the link", nowhere));
            }
            Kind::Symlink(target.into_vec().into())
        }
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
    let xattrs = insist(|| xattrs::read(carrier)).map_err(failed)?;
    let bytes: usize = xattrs
        .iter()
        .map(|xattr| xattr.name.len() + xattr.value.len() + 6)
        .sum();
    if bytes > XATTRS_CAP {
        return Err(failed(Errno::E2BIG.into()));
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
        path: Box::default(),
        root: path.to_owned(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn everything_is_found_once_and_in_path_order(
            paths in proptest::collection::btree_set("[a-c.\\-0]{1,3}(/[a-c.\\-0]{1,3}){0,4}", 0..40),
        ) {
            let base = tempfile::tempdir().unwrap();
            let plain = paths.iter().filter(|path| super::super::tree::checked_path(path.as_bytes()).is_ok());
            let mut there = BTreeSet::from([Vec::new()]);
            for path in plain {
                // A name of one path may be a directory of another: whichever comes first stays.
                let path = Path::new(path);
                let parent = path.parent().unwrap();
                if std::fs::create_dir_all(base.path().join(parent)).is_ok()
                    && std::fs::OpenOptions::new().create_new(true).write(true).open(base.path().join(path)).is_ok()
                {
                    there.insert(path.as_os_str().as_bytes().to_vec());
                }
                for above in parent.ancestors().filter(|above| base.path().join(above).is_dir()) {
                    there.insert(above.as_os_str().as_bytes().to_vec());
                }
            }
            let root = open_root(base.path()).unwrap();
            let found: Vec<Vec<u8>> = walk(&root).map(|found| found.unwrap().path.to_vec()).collect();
            prop_assert_eq!(found, there.into_iter().collect::<Vec<_>>());
        }
    }

    #[test]
    fn a_directory_is_walked_however_deep_it_lies() {
        let base = tempfile::tempdir().unwrap();
        let mut path = base.path().to_owned();
        for _ in 0..OPEN_CAP * 3 {
            path.push("a");
            std::fs::create_dir(&path).unwrap();
            std::fs::write(path.with_file_name("b"), b"").unwrap();
        }
        let root = open_root(base.path()).unwrap();
        assert_eq!(walk(&root).map(Result::unwrap).count(), 1 + OPEN_CAP * 6);
    }
}
