//! The kernel's calls, each handed to the tree and answered.

use super::convert::decoded;
use super::tree::{Changes, Tree, errno};
use crate::serve::pool::Pool;
use crate::serve::store::Held;
use fuser::{
    BackingId, BsdFileFlags, Errno as Refusal, FileAttr, FileHandle, Filesystem, FopenFlags,
    Generation, INodeNo, InitFlags, KernelConfig, LockOwner, OpenFlags, RenameFlags, ReplyAttr,
    ReplyCreate, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyLseek, ReplyOpen,
    ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};
use nix::errno::Errno;
use nix::fcntl::{OFlag, readlinkat};
use nix::sys::stat::{SFlag, fstat, mkdirat, mknodat};
use nix::sys::statvfs::fstatvfs;
use nix::unistd::{UnlinkatFlags, symlinkat};
use std::ffi::OsStr;
use std::fs::File;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

/// How long the kernel may believe an entry or attribute: nobody else changes the tree, but what arrives takes
/// space.
const TTL: Duration = Duration::from_secs(10);
/// Longest write that the kernel sends at once.
const WRITE_CAP: u32 = 1 << 20;
/// Calls that the kernel may have open which no thread waits for: read-ahead, asynchronous direct I/O.
const BACKGROUND_CAP: u16 = 512;
/// File systems below each other: the store's own may lie on an overlay.
const STACK_DEPTH: u32 = 2;

/// What the kernel calls.
pub(super) struct Calls {
    tree: Arc<Tree>,
    passthrough: AtomicBool,
    /// For what may wait for the source or the disk.
    pool: Pool,
}

fn refusal(error: Errno) -> Refusal {
    Refusal::from_i32(error as i32)
}

/// Answers a call: with what it gave, or with its error.
macro_rules! answer {
    ($reply:expr, $result:expr, $value:pat => $say:expr) => {
        match $result {
            Ok($value) => $say,
            Err(error) => $reply.error(refusal(error)),
        }
    };
}

fn enter(reply: ReplyEntry, entry: Result<(FileAttr, u64), Errno>) {
    answer!(reply, entry, (attributes, generation) => {
        reply.entry(&TTL, &attributes, Generation(generation));
    });
}

impl Calls {
    pub(super) fn new(tree: Tree) -> Self {
        Self {
            tree: Arc::new(tree),
            passthrough: AtomicBool::new(false),
            pool: Pool::default(),
        }
    }

    /// A handle for an open file, with its backing when the kernel serves it by itself.
    fn add(
        &self,
        inode: u64,
        (file, held): (File, Option<Held>),
        back: impl FnOnce(&File) -> std::io::Result<BackingId>,
    ) -> (FileHandle, Option<Arc<BackingId>>, FopenFlags) {
        let passes = self.passthrough.load(Ordering::Acquire)
            // What goes past this process is not mirrored.
            && self.tree.store.logs_to().is_none()
            && self.tree.is_whole(held.as_ref().map(Held::number))
            // The kernel would not take these bits away at a write.
            && fstat(&file).is_ok_and(|stat| stat.st_mode & 0o6000 == 0);
        let mut handles = self.tree.handles();
        let backing = handles.backing(inode, || {
            if !passes {
                return None;
            }
            let opened = back(&file);
            if let Err(error) = &opened
                && self.passthrough.swap(false, Ordering::AcqRel)
            {
                tracing::warn!(
                    "the kernel does not serve whole files by itself: {error}; the agent does"
                );
            }
            opened.ok()
        });
        let handle = FileHandle(handles.add(inode, (file, held), backing.clone()));
        // What the kernel has read of a file stays true, unless it was written past the kernel's own cache: of a file that it
        // serves by itself it takes no other word.
        let flags = if passes || backing.is_some() {
            FopenFlags::empty()
        } else {
            FopenFlags::FOPEN_KEEP_CACHE
        };
        (handle, backing, flags)
    }
}

impl Filesystem for Calls {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        // Kernels that lack one of these work without it.
        for wanted in [
            InitFlags::FUSE_POSIX_ACL,
            InitFlags::FUSE_DONT_MASK,
            InitFlags::FUSE_HANDLE_KILLPRIV_V2,
            InitFlags::FUSE_PARALLEL_DIROPS,
            InitFlags::FUSE_ASYNC_DIO,
            InitFlags::FUSE_CACHE_SYMLINKS,
        ] {
            if config.add_capabilities(wanted).is_err() {
                tracing::info!("this kernel's FUSE has no {wanted:?}");
            }
        }
        // Both are within what the crate takes.
        let _ = config.set_max_write(WRITE_CAP);
        let _ = config.set_max_background(BACKGROUND_CAP);
        let passthrough = config.add_capabilities(InitFlags::FUSE_PASSTHROUGH).is_ok()
            && config.set_max_stack_depth(STACK_DEPTH).is_ok();
        if !passthrough {
            tracing::info!(
                "this kernel's FUSE has no passthrough (Linux 6.9): the agent serves whole files too"
            );
        }
        self.passthrough.store(passthrough, Ordering::Release);
        Ok(())
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        enter(reply, self.tree.entry(parent.0, name));
    }

    fn forget(&self, _: &Request, inode: INodeNo, lookups: u64) {
        self.tree.forget(inode.0, lookups);
    }

    fn getattr(&self, _: &Request, inode: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        answer!(reply, self.tree.attributes(inode.0), attributes => reply.attr(&TTL, &attributes));
    }

    fn setattr(
        &self,
        asker: &Request,
        inode: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _: Option<SystemTime>,
        handle: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let changes = Changes {
            mode,
            uid,
            gid,
            size,
            atime,
            mtime,
        };
        let (tree, asker) = (Arc::clone(&self.tree), asker.uid());
        let change = move || {
            let changed = tree.change(inode.0, changes, handle, asker);
            answer!(reply, changed, attributes => reply.attr(&TTL, &attributes));
        };
        // The rest of the page at which a file is cut may be absent.
        if size.is_some() {
            self.pool.run(change);
        } else {
            change();
        }
    }

    fn readlink(&self, _: &Request, inode: INodeNo, reply: ReplyData) {
        let read = self
            .tree
            .named(inode.0, |parent, name| readlinkat(parent, name));
        answer!(reply, read, target => reply.data(target.as_bytes()));
    }

    fn mknod(
        &self,
        asker: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        device: u32,
        reply: ReplyEntry,
    ) {
        let kind = SFlag::from_bits_truncate(mode) & SFlag::S_IFMT;
        let place = (parent.0, name);
        enter(
            reply,
            self.tree
                .made(asker, place, Some((mode, umask)), |directory, mode| {
                    mknodat(directory, name, kind, mode, decoded(device))
                }),
        );
    }

    fn mkdir(
        &self,
        asker: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        reply: ReplyEntry,
    ) {
        let place = (parent.0, name);
        enter(
            reply,
            self.tree
                .made(asker, place, Some((mode, umask)), |directory, mode| {
                    mkdirat(directory, name, mode)
                }),
        );
    }

    fn symlink(
        &self,
        asker: &Request,
        parent: INodeNo,
        name: &OsStr,
        target: &Path,
        reply: ReplyEntry,
    ) {
        let place = (parent.0, name);
        enter(
            reply,
            self.tree.made(asker, place, None, |directory, _| {
                symlinkat(target, directory, name)
            }),
        );
    }

    fn link(&self, _: &Request, inode: INodeNo, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        enter(reply, self.tree.link(inode.0, parent.0, name));
    }

    fn unlink(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let removed = self.tree.remove(parent.0, name, UnlinkatFlags::NoRemoveDir);
        answer!(reply, removed, () => reply.ok());
    }

    fn rmdir(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let removed = self.tree.remove(parent.0, name, UnlinkatFlags::RemoveDir);
        answer!(reply, removed, () => reply.ok());
    }

    fn rename(
        &self,
        _: &Request,
        parent: INodeNo,
        name: &OsStr,
        new_parent: INodeNo,
        new_name: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let renamed = self
            .tree
            .rename((parent.0, name), (new_parent.0, new_name), flags);
        answer!(reply, renamed, () => reply.ok());
    }

    fn open(&self, _: &Request, inode: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        answer!(reply, self.tree.open(inode.0), opened => {
            let (handle, backing, flags) = self.add(inode.0, opened, |file| reply.open_backing(file));
            match backing {
                Some(backing) => reply.opened_passthrough(handle, flags, &backing),
                None => reply.opened(handle, flags),
            }
        });
    }

    fn create(
        &self,
        asker: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        let exclusive = OFlag::from_bits_retain(flags).contains(OFlag::O_EXCL);
        let create = || {
            let (place, mode) = ((parent.0, name), (mode, umask));
            self.tree.create(asker, place, mode, exclusive)
        };
        let created = self.tree.with_space(create);
        answer!(reply, created, (opened, (attributes, generation)) => {
            let generation = Generation(generation);
            let (handle, backing, flags) =
                self.add(attributes.ino.0, opened, |file| reply.open_backing(file));
            match backing {
                Some(backing) => {
                    reply.created_passthrough(&TTL, &attributes, generation, handle, flags, &backing);
                }
                None => reply.created(&TTL, &attributes, generation, handle, flags),
            }
        });
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        answer!(reply, self.tree.handle(handle), handle => {
            let tree = Arc::clone(&self.tree);
            let wanted = tree.store.want(handle.number, offset, u64::from(size));
            let waits = wanted.is_some();
            let read = move || {
                let mut bytes = vec![0; size as usize];
                let read = wanted
                    .map_or(Ok(()), |wanted| tree.store.wait(&wanted))
                    .and_then(|()| tree.store.read(&handle.file, handle.number, &mut bytes, offset));
                match read {
                    Ok(read) => reply.data(&bytes[..read]),
                    Err(error) => reply.error(error.into()),
                }
            };
            if waits {
                self.pool.run(read);
            } else {
                read();
            }
        });
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        offset: u64,
        data: &[u8],
        flags: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        answer!(reply, self.tree.handle(handle), handle => {
            // At most `WRITE_CAP`.
            let length = data.len() as u32;
            let tree = Arc::clone(&self.tree);
            let strip = flags.contains(WriteFlags::FUSE_WRITE_KILL_SUIDGID);
            let wanted = tree.store.want_edges(handle.number, offset, u64::from(length));
            let waits = wanted.is_some();
            let write = move |data: &[u8]| {
                let written = wanted
                    .map_or(Ok(()), |wanted| tree.store.wait(&wanted))
                    .map_err(|error| errno(&error))
                    .and_then(|()| tree.with_space(|| {
                        let written = tree.write(&handle, data, offset, strip);
                        written.map_err(|error| errno(&error))
                    }));
                answer!(reply, written, () => reply.written(length));
            };
            if waits {
                let data = data.to_vec();
                self.pool.run(move || write(&data));
            } else {
                write(data);
            }
        });
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        // Nothing is kept back; the kernel does not ask again.
        reply.error(Refusal::ENOSYS);
    }

    fn release(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        _: OpenFlags,
        _: Option<LockOwner>,
        _: bool,
        reply: ReplyEmpty,
    ) {
        self.tree.handles().close(handle.0);
        reply.ok();
    }

    fn fsync(&self, _: &Request, _: INodeNo, handle: FileHandle, _: bool, reply: ReplyEmpty) {
        let tree = Arc::clone(&self.tree);
        self.pool.run(move || {
            let synced = tree.handle(handle).and_then(|handle| {
                let synced = tree.store.sync(&handle.file, handle.number);
                let mirrored = synced.and_then(|()| tree.store.sync_mirror());
                mirrored.map_err(|error| errno(&error))
            });
            answer!(reply, synced, () => reply.ok());
        });
    }

    fn opendir(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        let handle = self.tree.handles().add_listing(Vec::new());
        // The kernel sees every change of it.
        let flags = FopenFlags::FOPEN_CACHE_DIR | FopenFlags::FOPEN_KEEP_CACHE;
        reply.opened(FileHandle(handle), flags);
    }

    fn readdir(
        &self,
        _: &Request,
        inode: INodeNo,
        handle: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let known = self.tree.handles().listing(handle.0);
        let listing = match known {
            None => Err(Errno::EBADF),
            Some(known) if offset > 0 => Ok(known),
            Some(_) => self.tree.list(inode.0).map(|listing| {
                let listing = Arc::new(listing);
                self.tree
                    .handles()
                    .set_listing(handle.0, Arc::clone(&listing));
                listing
            }),
        };
        answer!(reply, listing, listing => {
            let skipped = usize::try_from(offset).unwrap_or(usize::MAX);
            for (at, (inode, kind, name)) in listing.iter().enumerate().skip(skipped) {
                if reply.add(INodeNo(*inode), at as u64 + 1, *kind, name) {
                    break;
                }
            }
            reply.ok();
        });
    }

    fn releasedir(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        _: OpenFlags,
        reply: ReplyEmpty,
    ) {
        self.tree.handles().close_listing(handle.0);
        reply.ok();
    }

    fn fsyncdir(&self, _: &Request, inode: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        let tree = Arc::clone(&self.tree);
        self.pool.run(move || {
            let synced = tree.directory(inode.0).and_then(nix::unistd::fsync);
            let synced = synced.and_then(|()| {
                let mirrored = tree.store.sync_mirror();
                mirrored.map_err(|error| errno(&error))
            });
            answer!(reply, synced, () => reply.ok());
        });
    }

    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        answer!(reply, fstatvfs(self.tree.store.data().fd()), stat => reply.statfs(
            stat.blocks(),
            stat.blocks_free(),
            stat.blocks_available(),
            stat.files(),
            stat.files_free(),
            u32::try_from(stat.block_size()).unwrap_or(4096),
            u32::try_from(stat.name_max()).unwrap_or(255),
            u32::try_from(stat.fragment_size()).unwrap_or(4096),
        ));
    }

    fn setxattr(
        &self,
        _: &Request,
        inode: INodeNo,
        name: &OsStr,
        value: &[u8],
        flags: i32,
        _: u32,
        reply: ReplyEmpty,
    ) {
        let set = self.tree.change_attribute(inode.0, |path| {
            let known = xattr::get(path, name)?.is_some();
            match flags {
                libc::XATTR_CREATE if known => return Err(Errno::EEXIST.into()),
                libc::XATTR_REPLACE if !known => return Err(Errno::ENODATA.into()),
                _ => {}
            }
            xattr::set(path, name, value)
        });
        answer!(reply, set, () => reply.ok());
    }

    fn getxattr(&self, _: &Request, inode: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        let value = self.tree.at_path(inode.0, |path| xattr::get(path, name));
        let value = value.and_then(|value| value.ok_or(Errno::ENODATA));
        answer!(reply, value, value => sized(reply, size, &value));
    }

    fn listxattr(&self, asker: &Request, inode: INodeNo, size: u32, reply: ReplyXattr) {
        // xattr(7): nobody else sees that there are any. The kernel keeps their values, not their names.
        let hides = |name: &[u8]| asker.uid() != 0 && name.starts_with(b"trusted.");
        let names = self.tree.at_path(inode.0, |path| {
            let mut names = Vec::new();
            for name in xattr::list(path)?.filter(|name| !hides(name.as_bytes())) {
                names.extend_from_slice(name.as_bytes());
                names.push(0);
            }
            Ok(names)
        });
        answer!(reply, names, names => sized(reply, size, &names));
    }

    fn removexattr(&self, _: &Request, inode: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let removed = self
            .tree
            .change_attribute(inode.0, |path| xattr::remove(path, name));
        answer!(reply, removed, () => reply.ok());
    }

    fn fallocate(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let tree = Arc::clone(&self.tree);
        self.pool.run(move || {
            let allocate = || tree.allocate(handle, offset, length, mode);
            answer!(reply, tree.with_space(allocate), () => reply.ok());
        });
    }

    fn lseek(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        answer!(reply, self.tree.seek(handle, offset, whence), at => reply.offset(at));
    }
}

/// Answers with an attribute, or with its size when that is what is asked for.
fn sized(reply: ReplyXattr, size: u32, value: &[u8]) {
    let length = u32::try_from(value.len()).unwrap_or(u32::MAX);
    if size == 0 {
        reply.size(length);
    } else if length > size {
        reply.error(Refusal::ERANGE);
    } else {
        reply.data(value);
    }
}
