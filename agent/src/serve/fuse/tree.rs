//! What the kernel's calls do to the store's tree.
//!
//! Invariant: a name is used while no rename or removal is under way, so that a call never meets another file
//! than it was made for.

mod names;

use super::convert::{encoded, kind, spec, system_time};
use super::handles::{Handle, Handles, Listing};
use super::nodes::{Nodes, Opened, ROOT};
use crate::serve::mirror::{Intent, joined};
use crate::serve::store::{Held, Store};
use crate::volume::confined::{open_beneath, proc_path};
use crate::volume::walk::walk;
use fuser::{FileAttr, FileHandle, FileType, INodeNo, Request, TimeOrNow};
use nix::errno::Errno;
use nix::fcntl::{AtFlags, FallocateFlags, OFlag, fallocate};
use nix::sys::stat::{
    FchmodatFlags, FileStat, Mode, UtimensatFlags, fchmod, fchmodat, fstat, fstatat, futimens,
    utimensat,
};
use nix::unistd::{Gid, Uid, UnlinkatFlags, Whence, fchown, fchownat, lseek, unlinkat};
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::DirEntryExt;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::UNIX_EPOCH;

/// The tree behind one mount.
pub(super) struct Tree {
    pub(super) store: Arc<Store>,
    read_only: bool,
    nodes: RwLock<Nodes>,
    handles: Mutex<Handles>,
    /// Held for reading by who frees what a removed file took.
    freeing: RwLock<()>,
    /// Path that [`Tree::other_name`] found last.
    other: Mutex<Option<Vec<u8>>>,
}

/// What `setattr` sets.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Changes {
    pub(super) mode: Option<u32>,
    pub(super) uid: Option<u32>,
    pub(super) gid: Option<u32>,
    pub(super) size: Option<u64>,
    pub(super) atime: Option<TimeOrNow>,
    pub(super) mtime: Option<TimeOrNow>,
}

/// The error number of a call that gave `error`.
pub(super) fn errno(error: &io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or(Errno::EIO as i32))
}

impl Tree {
    pub(super) fn new(store: Arc<Store>, read_only: bool) -> Self {
        Self {
            store,
            read_only,
            nodes: RwLock::default(),
            handles: Mutex::default(),
            freeing: RwLock::default(),
            other: Mutex::default(),
        }
    }

    // Both are whole after every statement.
    fn nodes(&self) -> RwLockReadGuard<'_, Nodes> {
        self.nodes.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn change_nodes(&self) -> RwLockWriteGuard<'_, Nodes> {
        self.nodes.write().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn handles(&self) -> MutexGuard<'_, Handles> {
        self.handles.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn directory_in(&self, nodes: &Nodes, inode: u64) -> Result<OwnedFd, Errno> {
        let path = nodes.path(inode)?;
        let flags = OFlag::O_DIRECTORY | OFlag::O_RDONLY;
        self.store.data().open_beneath(&path, flags, Mode::empty())
    }

    /// What keeps away from a file what arrives in it, if something can; taken before the nodes.
    fn quiet(&self, inode: u64) -> Option<RwLockReadGuard<'_, ()>> {
        self.store.quiet(self.store.number(inode))
    }

    /// The directory `inode`, open.
    pub(super) fn directory(&self, inode: u64) -> Result<OwnedFd, Errno> {
        self.directory_in(&self.nodes(), inode)
    }

    /// Does `act` with the directory of `inode` and its name there.
    pub(super) fn named<T>(
        &self,
        inode: u64,
        act: impl FnOnce(BorrowedFd<'_>, &OsStr) -> Result<T, Errno>,
    ) -> Result<T, Errno> {
        let nodes = self.nodes();
        if inode == ROOT {
            return act(self.store.data().fd(), OsStr::new("."));
        }
        let (parent, name) = nodes.name(inode)?;
        let directory = self.directory_in(&nodes, parent)?;
        act(directory.as_fd(), name)
    }

    /// Does `act` with a path through which path-only calls reach the inode.
    pub(super) fn at_path<T>(
        &self,
        inode: u64,
        act: impl FnOnce(&Path) -> io::Result<T>,
    ) -> Result<T, Errno> {
        let _quiet = self.quiet(inode);
        self.named(inode, |parent, name| {
            act(&proc_path(parent, name)).map_err(|error| errno(&error))
        })
    }

    pub(super) fn handle(&self, handle: FileHandle) -> Result<Arc<Handle>, Errno> {
        self.handles().file(handle.0).ok_or(Errno::EBADF)
    }

    /// Does `act`, which changes what `intent` says, and mirrors it where the tree is mirrored. `bytes` are those of
    /// a write; with an intent of none nothing is mirrored.
    pub(super) fn mirrored<T, E: From<Errno>>(
        &self,
        intent: impl FnOnce() -> Result<Option<Intent>, Errno>,
        bytes: Option<&[u8]>,
        act: impl FnOnce() -> Result<T, E>,
    ) -> Result<T, E> {
        let Some(mirror) = self.store.logs_to() else {
            return act();
        };
        let _turn = mirror.turn();
        let Some(intent) = intent()? else {
            return act();
        };
        let reserved = mirror.reserve(bytes.map_or(0, <[u8]>::len));
        // What writes nothing may make space; there is some for it.
        if let Err(error) = reserved
            && bytes.is_some_and(|bytes| !bytes.is_empty())
        {
            return Err(errno(&error).into());
        }
        mirror.intend(&intent);
        let done = act();
        let bytes = bytes.filter(|_| done.is_ok());
        mirror.log(&self.store, &intent, bytes);
        done
    }

    /// Path of `name` in the directory `parent`.
    pub(super) fn path_in(&self, parent: u64, name: &OsStr) -> Result<Vec<u8>, Errno> {
        Ok(joined(&self.nodes().path(parent)?, name))
    }

    /// Path of an inode; none when it has no name any more and nobody will miss what is done to it. Called in turn, so
    /// that the path stays what it is.
    pub(super) fn path_of(
        &self,
        inode: u64,
        file: Option<&File>,
    ) -> Result<Option<Vec<u8>>, Errno> {
        match self.nodes().path(inode) {
            Err(Errno::ESTALE) => {}
            path => return path.map(Some),
        }
        let known = self.handles().of(inode);
        let file = file.or(known.as_ref().map(|handle| &handle.file));
        let found = file.map(|file| self.store.links(|| fstat(file)));
        let Some((stat, links)) = found.transpose()? else {
            return Ok(None);
        };
        if links == 0 {
            return Ok(None);
        }
        self.other_name(stat.st_ino).map(Some)
    }

    /// A name of a file that is open by one that was removed, and has others that the kernel never looked up.
    fn other_name(&self, inode: u64) -> Result<Vec<u8>, Errno> {
        let data = self.store.data();
        let is_it = |path: &[u8]| {
            let (parent, name) = data.parent(path)?;
            let stat = fstatat(&parent, name, AtFlags::AT_SYMLINK_NOFOLLOW)?;
            Ok::<_, Errno>(stat.st_ino == inode)
        };
        let mut last = self.other.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(path) = last.as_deref().filter(|path| is_it(path) == Ok(true)) {
            return Ok(path.to_vec());
        }
        for found in walk(data) {
            let found = found.map_err(|error| errno(&error.source))?;
            if found.stat.st_ino == inode {
                *last = Some(found.path.to_vec());
                return Ok(found.path.into());
            }
        }
        Err(Errno::ESTALE)
    }

    pub(super) fn forget(&self, inode: u64, lookups: u64) {
        let _freeing = self.freeing.read().unwrap_or_else(PoisonError::into_inner);
        // Apart from the nodes: it may be long.
        let kept = self.change_nodes().forget(inode, lookups);
        drop(kept);
    }

    /// Does `act`, once more after removed files were let go of where there was no space for it: who removes a file has
    /// its space when that is answered.
    pub(super) fn with_space<T>(
        &self,
        mut act: impl FnMut() -> Result<T, Errno>,
    ) -> Result<T, Errno> {
        let done = act();
        if !matches!(done, Err(Errno::ENOSPC | Errno::EDQUOT)) {
            return done;
        }
        {
            let _freeing = self.freeing.write().unwrap_or_else(PoisonError::into_inner);
            let kept = self.change_nodes().take_kept();
            drop(kept);
        }
        act()
    }

    pub(super) fn attributes(&self, inode: u64) -> Result<FileAttr, Errno> {
        let _quiet = self.quiet(inode);
        let named = self.named(inode, |parent, name| self.look(parent, name));
        let found = match named {
            Err(Errno::ESTALE) => {
                let file = self.unnamed(inode)?;
                self.store.links(|| fstat(&file))?
            }
            named => named?,
        };
        Ok(described(&found, inode))
    }

    /// What a name is, with its links.
    fn look(&self, directory: impl AsFd, name: &OsStr) -> Result<(FileStat, u64), Errno> {
        let look = || fstatat(&directory, name, AtFlags::AT_SYMLINK_NOFOLLOW);
        self.store.links(look)
    }

    /// The entry `name` of `parent`, which the kernel then knows, and its generation.
    pub(super) fn entry(&self, parent: u64, name: &OsStr) -> Result<(FileAttr, u64), Errno> {
        let directory = self.directory(parent)?;
        self.entry_in(&directory, parent, name)
    }

    fn entry_in(
        &self,
        directory: &OwnedFd,
        parent: u64,
        name: &OsStr,
    ) -> Result<(FileAttr, u64), Errno> {
        let mut found = self.look(directory, name)?;
        if let Some(_quiet) = self.quiet(found.0.st_ino) {
            found = self.look(directory, name)?;
        }
        let inode = found.0.st_ino;
        let generation = self.change_nodes().found(parent, name, inode);
        Ok((described(&found, inode), generation))
    }

    /// Makes the entry `name` in `parent` by `make`, which is given the mode to make it with, and gives it to
    /// who asked.
    pub(super) fn made(
        &self,
        asker: &Request,
        (parent, name): (u64, &OsStr),
        mode: Option<(u32, u32)>,
        make: impl FnOnce(&OwnedFd, Mode) -> Result<(), Errno>,
    ) -> Result<(FileAttr, u64), Errno> {
        let directory = self.directory(parent)?;
        let plain = Mode::from_bits_truncate(mode.map_or(0, |(mode, _)| mode) & 0o7777);
        let made = || {
            make(&directory, plain)?;
            self.give(asker, &directory, name, mode).or_else(|error| {
                // Who tries again must not meet it; where it cannot be removed nobody tries.
                let removed = unlinkat(&directory, name, UnlinkatFlags::NoRemoveDir);
                let removed = match removed {
                    Err(Errno::EISDIR) => unlinkat(&directory, name, UnlinkatFlags::RemoveDir),
                    removed => removed,
                };
                removed.map_err(|_| Errno::EIO)?;
                Err(error)
            })
        };
        let intent = || Ok(Some(Intent::Made(self.path_in(parent, name)?)));
        self.mirrored(intent, None, made)?;
        self.entry_in(&directory, parent, name)
    }

    /// Gives what was just made to who asked for it, with the mode that was asked for: as the kernel does where
    /// the disk is its own.
    fn give(
        &self,
        asker: &Request,
        directory: &OwnedFd,
        name: &OsStr,
        mode: Option<(u32, u32)>,
    ) -> Result<(), Errno> {
        let inherits = fstat(directory)?.st_mode & Mode::S_ISGID.bits() != 0;
        let gid = (!inherits).then(|| Gid::from_raw(asker.gid()));
        let uid = Some(Uid::from_raw(asker.uid()));
        fchownat(directory, name, uid, gid, AtFlags::AT_SYMLINK_NOFOLLOW)?;
        let Some((mode, umask)) = mode else {
            return Ok(());
        };
        let made = fstatat(directory, name, AtFlags::AT_SYMLINK_NOFOLLOW)?;
        // With a default ACL it has inherited the mode that the ACL leaves, and the umask counts for nothing; set-id bits
        // went with the old owner.
        let inherited = xattr::get(
            proc_path(directory.as_fd(), OsStr::new(".")),
            "system.posix_acl_default",
        );
        let bits = match inherited {
            Ok(Some(_)) => made.st_mode & 0o777 | mode & 0o7000,
            _ => mode & 0o7777 & !umask,
        };
        let mut mode = Mode::from_bits_truncate(bits);
        if inherits && kind(made.st_mode) == FileType::Directory {
            mode |= Mode::S_ISGID;
        }
        fchmodat(directory, name, mode, FchmodatFlags::FollowSymlink)
    }

    /// Opens for reading, and for writing unless nobody may write.
    fn open_in(&self, directory: BorrowedFd<'_>, name: &OsStr) -> Result<File, Errno> {
        let open = |access| {
            let flags = access | OFlag::O_NONBLOCK;
            open_beneath(directory, name.as_bytes(), flags, Mode::empty()).map(File::from)
        };
        if self.read_only {
            return open(OFlag::O_RDONLY);
        }
        open(OFlag::O_RDWR).or_else(|error| match error {
            // An immutable or append-only file can still be read.
            Errno::EPERM => open(OFlag::O_RDONLY),
            error => Err(error),
        })
    }

    /// A file with its origin, which has a name or is held: without either it may have been let go of before it was whole.
    fn held(&self, file: File) -> Result<Opened, Errno> {
        let held = self.store.hold(fstat(&file)?.st_ino);
        Ok((file, held))
    }

    /// Opens a file; also one that just lost its last name, as the kernel does where the disk is its own.
    pub(super) fn open(&self, inode: u64) -> Result<Opened, Errno> {
        let named = self.named(inode, |directory, name| {
            self.held(self.open_in(directory, name)?)
        });
        match named {
            Err(Errno::ESTALE) => {
                let nodes = self.nodes();
                let kept = nodes.kept(inode).ok_or(Errno::ESTALE)?;
                let anew = format!("/proc/self/fd/{}", kept.as_raw_fd());
                let file = File::options().read(true).write(true).open(anew);
                self.held(file.map_err(|error| errno(&error))?)
            }
            named => named,
        }
    }

    /// The file of an inode that has no name any more.
    fn unnamed(&self, inode: u64) -> Result<File, Errno> {
        let open = self.handles().of(inode);
        let file = match &open {
            Some(open) => open.file.try_clone(),
            None => {
                let nodes = self.nodes();
                nodes.kept(inode).ok_or(Errno::ESTALE)?.try_clone()
            }
        };
        file.map_err(|error| errno(&error))
    }

    /// A file of which one name is removed now, if that is its last.
    fn last_of(
        &self,
        directory: &OwnedFd,
        name: &OsStr,
        found: &(FileStat, u64),
    ) -> Option<Opened> {
        let is_file = kind(found.0.st_mode) == FileType::RegularFile && is_last(found);
        let opened = is_file.then(|| self.open_in(directory.as_fd(), name).ok())?;
        self.held(opened?).ok()
    }

    pub(super) fn create(
        &self,
        asker: &Request,
        (parent, name): (u64, &OsStr),
        mode: (u32, u32),
        exclusive: bool,
    ) -> Result<(Opened, (FileAttr, u64)), Errno> {
        let mut file = None;
        let make = |directory: &OwnedFd, mode| {
            let flags = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_RDWR;
            let made = open_beneath(directory.as_fd(), name.as_bytes(), flags, mode)?;
            file = Some(File::from(made));
            Ok(())
        };
        match self.made(asker, (parent, name), Some(mode), make) {
            // The kernel lets nobody change the directory meanwhile.
            Err(Errno::EEXIST) if !exclusive && file.is_none() => {
                let entry = self.entry(parent, name)?;
                let inode = entry.0.ino.0;
                // The kernel never forgets what it was not told of.
                let opened = self.open(inode).inspect_err(|_| self.forget(inode, 1));
                Ok((opened?, entry))
            }
            made => {
                let entry = made?;
                let file = file.ok_or(Errno::EIO)?;
                Ok(((file, None), entry))
            }
        }
    }

    /// Sets what `setattr` asks for; `asker` is the user's number.
    pub(super) fn change(
        &self,
        inode: u64,
        changes: Changes,
        handle: Option<FileHandle>,
        asker: u32,
    ) -> Result<FileAttr, Errno> {
        let intent = || {
            let path = self.path_of(inode, None)?;
            Ok(path.map(Intent::State))
        };
        if let Some(size) = changes.size
            && self.store.logs_to().is_some()
        {
            self.await_edges(inode, size)?;
        }
        self.mirrored(intent, None, || self.set(inode, changes, handle, asker))?;
        self.attributes(inode)
    }

    /// Waits for the rest of the page at which a file will be cut, so that nobody else waits for it too.
    fn await_edges(&self, inode: u64, size: u64) -> Result<(), Errno> {
        let (number, _held) = match self.handles().of(inode) {
            Some(open) => (open.number, None),
            None => {
                let held = self.open(inode)?.1;
                (held.as_ref().map(Held::number), held)
            }
        };
        let wanted = self.store.want_edges(number, size, 0);
        let waited = wanted.map_or(Ok(()), |wanted| self.store.wait(&wanted));
        waited.map_err(|error| errno(&error))
    }

    fn set(
        &self,
        inode: u64,
        changes: Changes,
        handle: Option<FileHandle>,
        asker: u32,
    ) -> Result<(), Errno> {
        let Changes {
            mode,
            uid,
            gid,
            size,
            atime,
            mtime,
        } = changes;
        if let Some(size) = size {
            let open = handle.map(|handle| self.handle(handle)).transpose()?;
            let open = open.or_else(|| self.handles().of(inode));
            let cut = match open {
                Some(open) => self.truncate(&open.file, open.number, size, asker),
                None => {
                    let (file, held) = self.open(inode)?;
                    self.truncate(&file, held.as_ref().map(Held::number), size, asker)
                }
            };
            cut.map_err(|error| errno(&error))?;
        }
        if changes
            != (Changes {
                size,
                ..Changes::default()
            })
        {
            let _quiet = self.quiet(inode);
            let set = |parent: BorrowedFd<'_>, name: &OsStr| {
                if uid.is_some() || gid.is_some() {
                    let (uid, gid) = (uid.map(Uid::from_raw), gid.map(Gid::from_raw));
                    fchownat(parent, name, uid, gid, AtFlags::AT_SYMLINK_NOFOLLOW)?;
                }
                if let Some(mode) = mode {
                    let mode = Mode::from_bits_truncate(mode & 0o7777);
                    fchmodat(parent, name, mode, FchmodatFlags::FollowSymlink)?;
                }
                if atime.is_some() || mtime.is_some() {
                    let flag = UtimensatFlags::NoFollowSymlink;
                    utimensat(parent, name, &spec(atime), &spec(mtime), flag)?;
                }
                Ok(())
            };
            match self.named(inode, set) {
                Err(Errno::ESTALE) => {
                    let file = self.unnamed(inode)?;
                    if uid.is_some() || gid.is_some() {
                        let (uid, gid) = (uid.map(Uid::from_raw), gid.map(Gid::from_raw));
                        fchown(&file, uid, gid)?;
                    }
                    if let Some(mode) = mode {
                        fchmod(&file, Mode::from_bits_truncate(mode & 0o7777))?;
                    }
                    if atime.is_some() || mtime.is_some() {
                        futimens(&file, &spec(atime), &spec(mtime))?;
                    }
                }
                set => set?,
            }
        }
        Ok(())
    }

    /// Who cuts a program of another user takes its set-user-id bit away, as on any disk.
    fn truncate(&self, file: &File, number: Option<u32>, size: u64, asker: u32) -> io::Result<()> {
        self.store.truncate(file, number, size)?;
        if asker != 0 {
            self.strip(file)?;
        }
        Ok(())
    }

    /// Writes to an open file; `strip` when the bits that give rights away go with it.
    pub(super) fn write(
        &self,
        handle: &Handle,
        bytes: &[u8],
        offset: u64,
        strip: bool,
    ) -> io::Result<()> {
        let Handle {
            inode,
            file,
            number,
            ..
        } = handle;
        let intent = || {
            let path = self.path_of(*inode, Some(file))?;
            Ok(path.map(|path| Intent::Written {
                path,
                offset,
                length: bytes.len() as u64,
            }))
        };
        self.mirrored(intent, Some(bytes), || {
            self.store.write(file, *number, bytes, offset)
        })?;
        if strip && fstat(file)?.st_mode & 0o6000 != 0 {
            let intent = || Ok(self.path_of(*inode, Some(file))?.map(Intent::State));
            return self.mirrored(intent, None, || self.strip(file));
        }
        Ok(())
    }

    /// Sets or removes an extended attribute by `act`, which gets a path of the inode.
    pub(super) fn change_attribute(
        &self,
        inode: u64,
        act: impl FnOnce(&Path) -> io::Result<()>,
    ) -> Result<(), Errno> {
        let intent = || Ok(self.path_of(inode, None)?.map(Intent::State));
        self.mirrored(intent, None, || self.at_path(inode, act))
    }

    /// Takes the set-user-id and set-group-id bits away.
    fn strip(&self, file: &File) -> io::Result<()> {
        let mode = fstat(file)?.st_mode;
        let mut left = mode & !Mode::S_ISUID.bits();
        // Without the right to execute it is no set-group-id bit (chmod(2): it was mandatory locking).
        if mode & Mode::S_IXGRP.bits() != 0 {
            left &= !Mode::S_ISGID.bits();
        }
        if left != mode {
            fchmod(file, Mode::from_bits_truncate(left & 0o7777))?;
        }
        Ok(())
    }

    pub(super) fn list(&self, inode: u64) -> Result<Listing, Errno> {
        let directory = self.directory(inode)?;
        let mut listing = vec![
            (inode, FileType::Directory, OsString::from(".")),
            (ROOT, FileType::Directory, OsString::from("..")),
        ];
        let names = std::fs::read_dir(proc_path(directory.as_fd(), OsStr::new(".")));
        for name in names.map_err(|error| errno(&error))? {
            let name = name.map_err(|error| errno(&error))?;
            let kind = name.file_type().map_err(|error| errno(&error))?;
            let kind = FileType::from_std(kind).unwrap_or(FileType::RegularFile);
            listing.push((name.ino(), kind, name.file_name()));
        }
        Ok(listing)
    }

    pub(super) fn allocate(
        &self,
        handle: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
    ) -> Result<(), Errno> {
        let handle = self.handle(handle)?;
        let Handle { file, number, .. } = &*handle;
        let flags = FallocateFlags::from_bits(mode).ok_or(Errno::EOPNOTSUPP)?;
        let plain = (flags - FallocateFlags::FALLOC_FL_KEEP_SIZE).is_empty();
        if !plain && let Some(wanted) = self.store.want_edges(*number, offset, length) {
            let waited = self.store.wait(&wanted);
            waited.map_err(|error| errno(&error))?;
        }
        let intent = || {
            let path = self.path_of(handle.inode, Some(file))?;
            Ok(path.map(|path| {
                if plain {
                    Intent::State(path)
                } else {
                    Intent::Zeroed {
                        path,
                        offset,
                        length,
                    }
                }
            }))
        };
        self.mirrored(intent, Some(&[]), || {
            self.allocate_in(file, *number, (offset, length), flags)
        })
    }

    fn allocate_in(
        &self,
        file: &File,
        number: Option<u32>,
        (offset, length): (u64, u64),
        flags: FallocateFlags,
    ) -> Result<(), Errno> {
        let keeps = flags.contains(FallocateFlags::FALLOC_FL_KEEP_SIZE);
        let zeros = |hole| {
            let zeroed = self.store.zero(file, number, offset, length, hole);
            zeroed.map_err(|error| errno(&error))
        };
        match flags - FallocateFlags::FALLOC_FL_KEEP_SIZE {
            plain if plain.is_empty() => {
                let signed = |bytes: u64| i64::try_from(bytes).map_err(|_| Errno::EFBIG);
                let _quiet = self.store.quiet(number);
                fallocate(file, flags, signed(offset)?, signed(length)?)
            }
            FallocateFlags::FALLOC_FL_PUNCH_HOLE => zeros(true),
            FallocateFlags::FALLOC_FL_ZERO_RANGE => {
                zeros(false)?;
                let end = offset.saturating_add(length);
                if !keeps && fstat(file)?.st_size.unsigned_abs() < end {
                    let _quiet = self.store.quiet(number);
                    file.set_len(end).map_err(|error| errno(&error))?;
                }
                Ok(())
            }
            _ => Err(Errno::EOPNOTSUPP),
        }
    }

    pub(super) fn seek(&self, handle: FileHandle, offset: i64, whence: i32) -> Result<i64, Errno> {
        let Handle { file, number, .. } = &*self.handle(handle)?;
        let whence = match whence {
            libc::SEEK_DATA => Whence::SeekData,
            libc::SEEK_HOLE => Whence::SeekHole,
            _ => return Err(Errno::EINVAL),
        };
        if self.is_whole(*number) {
            return lseek(file, offset, whence);
        }
        // Holes may be absent pages: all of it counts as data.
        let size = fstat(file)?.st_size;
        if offset >= size {
            return Err(Errno::ENXIO);
        }
        Ok(match whence {
            Whence::SeekData => offset,
            _ => size,
        })
    }

    /// Whether nothing of a file is absent.
    pub(super) fn is_whole(&self, number: Option<u32>) -> bool {
        number.is_none_or(|number| self.store.is_whole(number))
    }
}

fn described((stat, links): &(FileStat, u64), inode: u64) -> FileAttr {
    FileAttr {
        ino: INodeNo(inode),
        size: stat.st_size.unsigned_abs(),
        blocks: stat.st_blocks.unsigned_abs(),
        atime: system_time(stat.st_atime, stat.st_atime_nsec),
        mtime: system_time(stat.st_mtime, stat.st_mtime_nsec),
        ctime: system_time(stat.st_ctime, stat.st_ctime_nsec),
        crtime: UNIX_EPOCH,
        kind: kind(stat.st_mode),
        perm: (stat.st_mode & 0o7777) as u16,
        nlink: u32::try_from(*links).unwrap_or(u32::MAX),
        uid: stat.st_uid,
        gid: stat.st_gid,
        rdev: encoded(stat.st_rdev),
        blksize: 4096,
        flags: 0,
    }
}

/// Whether an inode is gone with one of its names.
fn is_last((stat, links): &(FileStat, u64)) -> bool {
    kind(stat.st_mode) == FileType::Directory || *links <= 1
}
