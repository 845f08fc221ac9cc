//! Random changes of a tree that is served by an agent which is killed meanwhile, done to a model of it too.
//!
//! Invariant: the model is what the tree must be: what was answered is in it, with the times that the tree told; a
//! change that was interrupted is in it as far as the tree says that it was done, and nothing else may differ.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, FallocateFlags, OFlag, RenameFlags, fallocate, renameat2};
use nix::sys::stat::{Mode, UtimensatFlags, utimensat};
use nix::sys::statfs::{FUSE_SUPER_MAGIC, fstatfs};
use nix::sys::time::TimeSpec;

use super::Chance;
use crate::lab::Host;
use crate::process::output;

/// One change. Paths are those below the tree.
#[derive(Debug)]
enum Change {
    /// Bytes at an offset, of a file that is made when there is none.
    Write {
        offset: u64,
        length: u64,
        sync: bool,
    },
    /// The same through a mapping, synced; what it was not synced for dies with the agent.
    Map {
        offset: u64,
        length: u64,
    },
    /// A hole, or room beyond the end.
    Allocate {
        offset: u64,
        length: u64,
        flags: FallocateFlags,
    },
    /// A new size.
    Cut(u64),
    Rename {
        to: String,
        exchange: bool,
    },
    Link(String),
    Remove,
    MakeDirectory,
    RemoveDirectory,
    Symlink,
    Fifo,
    Permit(u32),
    Own(u32),
    Time(i64),
    Attribute(u64),
}

/// A change that was interrupted.
#[derive(Debug)]
struct Doubt {
    path: String,
    change: Change,
    /// Whether it is in the model already, where it was done: only its times may not be.
    decided: bool,
}

/// What changes a tree.
pub(super) struct Work {
    /// Where the tree is served, and its path there.
    host: Host,
    tree: String,
    /// As the host names it, and as this process does.
    model: (String, PathBuf),
    chance: Chance,
    doubt: Option<Doubt>,
}

/// How far the work is, for who kills meanwhile.
#[derive(Debug, Default)]
pub(super) struct Progress {
    /// Changes that were answered.
    pub(super) made: AtomicU32,
    /// Changes that were interrupted.
    pub(super) interrupted: AtomicU32,
    /// No more are wanted.
    pub(super) over: AtomicBool,
}

impl Work {
    pub(super) fn new(host: &Host, tree: &str, model: (String, PathBuf), chance: Chance) -> Self {
        Self {
            host: host.clone(),
            tree: tree.to_owned(),
            model,
            chance,
            doubt: None,
        }
    }

    /// Changes the tree while it is served, until it is said to be over.
    pub(super) fn run(&mut self, progress: &Progress) -> Result<()> {
        while !progress.over.load(Ordering::Relaxed) {
            let pause = self.chance.millis_below(10);
            // Nobody may write below a mount that is not there.
            let Some(mount) = self.mounted() else {
                sleep(Duration::from_millis(10));
                continue;
            };
            let root = seen(&mount);
            if self.doubt.is_some() {
                let (host, model) = (self.host.clone(), self.model.0.clone());
                let differs = || host.run(names(model.as_ref(), &root));
                self.resolve(&root, differs, || is_served(&mount))?;
                continue;
            }
            let (path, change) = self.choose();
            let done = change.apply(&root, &path);
            if done.as_ref().is_err_and(is_interrupted) {
                progress.interrupted.fetch_add(1, Ordering::Relaxed);
                self.doubt = Some(Doubt {
                    path,
                    change,
                    decided: false,
                });
                continue;
            }
            let modelled = change.apply(&self.model.1, &path);
            let number = |done: &io::Result<()>| done.as_ref().err().map(io::Error::raw_os_error);
            ensure!(
                number(&done) == number(&modelled),
                "{change:?} of {path:?}: {done:?} where it is served, {modelled:?} on a plain disk"
            );
            progress
                .made
                .fetch_add(u32::from(done.is_ok()), Ordering::Relaxed);
            if self.take_times(&root, &path, &change).is_err() {
                self.doubt = Some(Doubt {
                    path,
                    change,
                    decided: true,
                });
            }
            sleep(pause);
        }
        Ok(())
    }

    /// The root of the tree while an agent serves it.
    fn mounted(&self) -> Option<File> {
        let root = File::open(self.host.path(&self.tree)).ok()?;
        is_served(&root).then_some(root)
    }

    /// Decides by the tree in its final place what became of a change that was interrupted.
    pub(super) fn settle(&mut self, root: &Path) -> Result<()> {
        let model = self.model.1.clone();
        let differs = || {
            let words = names(&model, root);
            output(Command::new(&words[0]).args(&words[1..]))
        };
        self.resolve(root, differs, || true)?;
        ensure!(
            self.doubt.is_none(),
            "it cannot be looked at: {:?}",
            self.doubt
        );
        Ok(())
    }

    /// Brings the model to what became of a change that was interrupted, unless it is interrupted too.
    fn resolve(
        &mut self,
        root: &Path,
        differs: impl Fn() -> Result<String>,
        alive: impl Fn() -> bool,
    ) -> Result<()> {
        let Some(mut doubt) = self.doubt.take() else {
            return Ok(());
        };
        if !doubt.decided {
            match self.decide(&doubt, root, differs, &alive) {
                Ok(decided) => doubt.decided = decided,
                Err(error) if alive() => return Err(error.context(format!("{doubt:?}"))),
                Err(_) => {}
            }
        }
        if !doubt.decided {
            self.doubt = Some(doubt);
        } else if let Err(error) = self.take_times(root, &doubt.path, &doubt.change) {
            ensure!(!alive(), "{doubt:?}: {error:#}");
            self.doubt = Some(doubt);
        }
        Ok(())
    }

    /// Does an interrupted change to the model where the tree has it; false where the tree cannot be looked at.
    fn decide(
        &self,
        doubt: &Doubt,
        root: &Path,
        differs: impl Fn() -> Result<String>,
        alive: impl Fn() -> bool,
    ) -> Result<bool> {
        let Doubt { path, change, .. } = doubt;
        let model = &self.model.1;
        if let Some(range) = change.range() {
            // Any part of it may have been done.
            adopt(&root.join(path), &model.join(path), change, range)?;
            return Ok(true);
        }
        let before = differs();
        if !alive() {
            return Ok(false);
        }
        if !before?.is_empty() {
            change.apply(model, path)?;
            let after = differs();
            ensure!(
                !alive() || after.as_ref().is_ok_and(String::is_empty),
                "neither done nor undone: {after:?}"
            );
        }
        Ok(true)
    }

    /// Gives what a change touched in the model the times that it has in the tree.
    fn take_times(&self, root: &Path, path: &str, change: &Change) -> io::Result<()> {
        let mut paths = vec![path];
        if let Change::Rename { to, .. } | Change::Link(to) = change {
            paths.push(to);
        }
        for path in paths {
            let parent = path.rsplit_once('/').map_or("", |(parent, _)| parent);
            for path in [path, parent] {
                let found = match root.join(path).symlink_metadata() {
                    Err(error) if is_interrupted(&error) => return Err(error),
                    Err(_) => continue,
                    Ok(found) => found,
                };
                let time = TimeSpec::new(found.mtime(), found.mtime_nsec());
                set_time(&self.model.1.join(path), &time)?;
            }
        }
        Ok(())
    }

    fn name(&mut self) -> String {
        let directory = ["", "small/", "d0/", "d0/d1/", "d2/"][self.chance.below(5) as usize];
        format!("{directory}{}", self.chance.below(24))
    }

    fn directory(&mut self) -> String {
        ["d0", "d0/d1", "d2", "d2/d1", "d0/d3", "small/d0"][self.chance.below(6) as usize].into()
    }

    fn choose(&mut self) -> (String, Change) {
        let large = self.chance.below(3) == 0;
        let mut path = if large {
            ["large", "sparse", "small/hard"][self.chance.below(3) as usize].into()
        } else {
            self.name()
        };
        let size = |path: &str| {
            let found = self.model.1.join(path).symlink_metadata();
            found.map_or(0, |found| if found.is_file() { found.len() } else { 0 })
        };
        let size = size(&path);
        let offset = self.chance.below(size + 10_000);
        let length = 1 + self.chance.below(60_000);
        let change = match self.chance.below(if large { 12 } else { 28 }) {
            0..6 => Change::Write {
                offset,
                length,
                sync: self.chance.below(4) == 0,
            },
            6 | 7 if size > 0 => {
                let offset = offset % size;
                let length = length.min(size - offset);
                Change::Map { offset, length }
            }
            8..10 => {
                let hole =
                    FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
                let flags = match self.chance.below(4) {
                    0 => FallocateFlags::empty(),
                    1 => FallocateFlags::FALLOC_FL_ZERO_RANGE,
                    _ => hole,
                };
                Change::Allocate {
                    offset,
                    length,
                    flags,
                }
            }
            // What is left of a large file still takes its time.
            10 if large => Change::Cut(size - size.min(offset / 16)),
            10 => Change::Cut(offset),
            11 if size > 0 => Change::Permit(0o600 + u32::from(self.chance.below(64) as u8)),
            12..16 => {
                let to = self.name();
                let exchange = self.chance.below(4) == 0;
                let other = self.model.1.join(&to).symlink_metadata();
                // Where both look alike, nothing would tell whether they were exchanged.
                let tells = other.is_ok_and(|other| other.is_file() && other.len() != size);
                let exchange = exchange && size > 0 && tells;
                Change::Rename { to, exchange }
            }
            16 => {
                path = self.directory();
                let (to, exchange) = (self.directory(), false);
                Change::Rename { to, exchange }
            }
            17 | 18 => Change::Link(self.name()),
            19 => Change::Remove,
            20 | 21 => {
                path = self.directory();
                Change::MakeDirectory
            }
            22 => {
                path = self.directory();
                Change::RemoveDirectory
            }
            23 => Change::Symlink,
            24 => Change::Fifo,
            25 => Change::Own(self.chance.below(9) as u32),
            26 => Change::Time(self.chance.below(1 << 30) as i64),
            _ if size > 0 => Change::Attribute(self.chance.below(1000)),
            _ => Change::Remove,
        };
        (path, change)
    }
}

impl Change {
    /// The bytes that it changes, where any part of them may have changed when it was interrupted.
    fn range(&self) -> Option<(u64, u64)> {
        match *self {
            Self::Write { offset, length, .. }
            | Self::Map { offset, length }
            | Self::Allocate { offset, length, .. } => Some((offset, length)),
            Self::Cut(_) => Some((0, 0)),
            _ => None,
        }
    }

    fn apply(&self, root: &Path, path: &str) -> io::Result<()> {
        let at = root.join(path);
        let open = |create| {
            let flags = OFlag::O_NOFOLLOW.bits();
            let mut options = OpenOptions::new();
            options
                .read(true)
                .write(true)
                .create(create)
                .custom_flags(flags);
            options.open(&at)
        };
        match self {
            Self::Write {
                offset,
                length,
                sync,
            } => {
                let file = open(true)?;
                let bytes: Vec<u8> = (0..*length)
                    .map(|n| (n * 7 + offset + length) as u8)
                    .collect();
                file.write_all_at(&bytes, *offset)?;
                if *sync { file.sync_all() } else { Ok(()) }
            }
            Self::Map { offset, length } => {
                let size = open(false)?.metadata()?.len();
                let said = Command::new("xfs_io")
                    .arg("-c")
                    .arg(format!("mmap -rw 0 {size}"))
                    .arg("-c")
                    .arg(format!("mwrite -S {} {offset} {length}", length % 251))
                    .args(["-c", "msync -s"])
                    .arg(&at)
                    .stdin(Stdio::null())
                    .output()?;
                if said.status.success() && said.stderr.is_empty() {
                    return Ok(());
                }
                // By SIGBUS, or with what it was told.
                Err(Errno::ENOTCONN.into())
            }
            Self::Allocate {
                offset,
                length,
                flags,
            } => Ok(fallocate(
                open(false)?,
                *flags,
                *offset as i64,
                *length as i64,
            )?),
            Self::Cut(size) => open(false)?.set_len(*size),
            Self::Rename { to, exchange } => {
                let flags = if *exchange {
                    RenameFlags::RENAME_EXCHANGE
                } else {
                    RenameFlags::empty()
                };
                Ok(renameat2(AT_FDCWD, &at, AT_FDCWD, &root.join(to), flags)?)
            }
            Self::Link(to) => fs::hard_link(&at, root.join(to)),
            Self::Remove => fs::remove_file(&at),
            Self::MakeDirectory => fs::create_dir(&at),
            Self::RemoveDirectory => fs::remove_dir(&at),
            Self::Symlink => std::os::unix::fs::symlink("small/1", &at),
            Self::Fifo => Ok(nix::unistd::mkfifo(&at, Mode::from_bits_truncate(0o640))?),
            Self::Permit(mode) => open(false)?.set_permissions(Permissions::from_mode(*mode)),
            Self::Own(uid) => std::os::unix::fs::lchown(&at, Some(*uid), None),
            Self::Time(seconds) => set_time(&at, &TimeSpec::new(*seconds, 7)),
            Self::Attribute(value) => {
                let set = Command::new("setfattr")
                    .args(["-h", "-n", "user.soak", "-v", &value.to_string()])
                    .arg(&at)
                    .stderr(Stdio::null())
                    .status()?;
                set.success().then_some(()).ok_or(Errno::ENOTCONN.into())
            }
        }
    }
}

/// A path that leads to an open directory, for other processes too.
fn seen(directory: &File) -> PathBuf {
    PathBuf::from(format!(
        "/proc/{}/fd/{}",
        std::process::id(),
        directory.as_raw_fd()
    ))
}

fn is_served(root: &File) -> bool {
    fstatfs(root).is_ok_and(|found| found.filesystem_type() == FUSE_SUPER_MAGIC)
}

/// Whether an error says that nobody served a call to its end.
fn is_interrupted(error: &io::Error) -> bool {
    let number = error.raw_os_error().map(Errno::from_raw);
    matches!(
        number,
        Some(Errno::ENOTCONN | Errno::ECONNABORTED | Errno::EIO | Errno::ENODEV)
    )
}

fn set_time(path: &Path, time: &TimeSpec) -> io::Result<()> {
    let flag = UtimensatFlags::NoFollowSymlink;
    Ok(utimensat(
        AT_FDCWD,
        path,
        &TimeSpec::UTIME_OMIT,
        time,
        flag,
    )?)
}

/// What rsync says of names, and of all of what they name but bytes and times.
fn names(model: &Path, tree: &Path) -> Vec<OsString> {
    let how = [
        "rsync",
        "-rlpgoDHAX",
        "--size-only",
        "--dry-run",
        "--itemize-changes",
        "--delete",
    ];
    let trees = [model.join(""), tree.join("")].map(PathBuf::into_os_string);
    how.map(OsString::from).into_iter().chain(trees).collect()
}

/// Makes a range of the model's file what it is in the tree, with its size, which is the old one, the new one or between.
fn adopt(tree: &Path, model: &Path, change: &Change, (offset, length): (u64, u64)) -> Result<()> {
    let found = match tree.symlink_metadata() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        found => found.context("cannot look at what was changed")?,
    };
    if !found.is_file() {
        return Ok(());
    }
    let from = File::open(tree)?;
    let (size, end) = (from.metadata()?.len(), offset + length);
    let to = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(model)?;
    let old = to.metadata()?.len();
    let new = if let Change::Cut(size) = change {
        *size
    } else {
        old.max(end)
    };
    ensure!(
        (old.min(new)..=old.max(new)).contains(&size),
        "its size is {size} and not from {old} to {new}"
    );
    to.set_len(size)?;
    let end = end.min(size);
    if end > offset {
        let mut bytes = vec![0; usize::try_from(end - offset)?];
        from.read_exact_at(&mut bytes, offset)?;
        to.write_all_at(&bytes, offset)?;
    }
    Ok(())
}
