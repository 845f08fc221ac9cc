//! Which files of a directory lie where on their device (FIEMAP).
//!
//! Non-goals: other file systems mounted below it; those whose device is not the one that stat(2) names.

use crate::model::extent::Extent;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// A regular file.
pub struct Found {
    /// Path below the directory.
    pub path: Vec<u8>,
    /// Length, bytes.
    pub length: u64,
    /// Where it lies.
    pub pieces: Vec<Extent>,
}

/// Tells every regular file on the directory's own file system, each inode once; a file that vanishes or
/// cannot be opened is passed over.
///
/// # Errors
/// The directory cannot be read, or its file system does not tell where files lie.
pub fn walk(directory: &Path, mut found: impl FnMut(Found)) -> io::Result<()> {
    let device = fs::metadata(directory)?.dev();
    let mut linked = std::collections::HashSet::new();
    let mut open: Vec<PathBuf> = vec![directory.to_owned()];
    fs::read_dir(directory)?;
    while let Some(at) = open.pop() {
        for entry in fs::read_dir(&at).into_iter().flatten().flatten() {
            let path = entry.path();
            let Ok(metadata) = fs::symlink_metadata(&path) else {
                continue;
            };
            if metadata.dev() != device {
                continue;
            }
            if metadata.is_dir() {
                open.push(path);
                continue;
            }
            let is_first = metadata.nlink() < 2 || linked.insert(metadata.ino());
            if !metadata.is_file() || metadata.blocks() == 0 || !is_first {
                continue;
            }
            // Neither the time of access nor what a link was exchanged for in between is touched.
            let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_NOATIME;
            let Ok(file) = OpenOptions::new()
                .read(true)
                .custom_flags(flags)
                .open(&path)
            else {
                continue;
            };
            let below = path.strip_prefix(directory).unwrap_or(&path);
            found(Found {
                path: below.as_os_str().as_bytes().to_vec(),
                length: metadata.len(),
                pieces: extents(&file, 0, usize::MAX)?.0,
            });
        }
    }
    Ok(())
}

/// `struct fiemap_extent` of include/uapi/linux/fiemap.h.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct FiemapExtent {
    logical: u64,
    physical: u64,
    length: u64,
    reserved64: [u64; 2],
    flags: u32,
    reserved: [u32; 3],
}

/// Extents asked for at once.
const BATCH: usize = 128;

/// `struct fiemap` with room for extents.
#[repr(C)]
struct Fiemap {
    start: u64,
    length: u64,
    flags: u32,
    mapped_extents: u32,
    extent_count: u32,
    reserved: u32,
    extents: [FiemapExtent; BATCH],
}

/// `_IOWR('f', 11, struct fiemap)`, whose size is 32 without extents.
const FS_IOC_FIEMAP: libc::c_ulong = 0xc020_660b;

const LAST: u32 = 0x1;
/// Unknown, not written back yet, encoded, encrypted, not aligned, inline: nowhere, or not as it is read.
const NOWHERE: u32 = 0x2 | 0x4 | 0x8 | 0x80 | 0x100 | 0x200;

/// Write back what the file has in memory first.
const SYNC: u32 = 0x1;
/// Nothing was written there yet.
const UNWRITTEN: u32 = 0x800;
/// Other files lie there, too.
const SHARED: u32 = 0x2000;

/// Where a file's bytes lie, all of them written back. None where they lie, or are read, in another way than as
/// extents of the device, in more than `most` of them, or where their file system writes them elsewhere first.
///
/// # Errors
/// They cannot be written back, or the file system does not tell.
pub fn of_file(file: &File, most: usize) -> io::Result<Option<Vec<Extent>>> {
    if is_elsewhere(file) {
        return Ok(None);
    }
    let (extents, all) = extents(file, SYNC, most)?;
    Ok(all.then_some(extents))
}

/// Where a file's bytes lie now, as far as they lie anywhere yet.
///
/// # Errors
/// The file system does not tell.
pub fn at_once(file: &File, most: usize) -> io::Result<Vec<Extent>> {
    Ok(extents(file, 0, most)?.0)
}

/// `_IOR('f', 1, long)`, which gets an int, and of linux/fs.h: its data goes through the journal.
const FS_IOC_GETFLAGS: libc::c_ulong = 0x8008_6601;
const FS_JOURNAL_DATA_FL: libc::c_int = 0x4000;
/// `_IOR('X', 31, struct fsxattr)`, and of linux/fs.h: its data lies on another device.
const FS_IOC_FSGETXATTR: libc::c_ulong = 0x801c_581f;
const FS_XFLAG_REALTIME: u32 = 1;

/// Whether a file's data may go or lie anywhere but on its file system's device, at its extents.
fn is_elsewhere(file: &File) -> bool {
    let fd = file.as_raw_fd();
    let mut flags: libc::c_long = 0;
    // SAFETY: the kernel writes an int into `flags`, which has room for it.
    let known = unsafe { libc::ioctl(fd, FS_IOC_GETFLAGS as _, &raw mut flags) } == 0;
    let mut attributes = [0_u32; 7];
    // SAFETY: `struct fsxattr` is 28 bytes, of which the first four are the flags.
    let known =
        known && unsafe { libc::ioctl(fd, FS_IOC_FSGETXATTR as _, attributes.as_mut_ptr()) } == 0;
    !known
        || flags as libc::c_int & FS_JOURNAL_DATA_FL != 0
        || attributes[0] & FS_XFLAG_REALTIME != 0
}

/// The extents of a file that lie somewhere, and whether those are all; at least `most` of them where there are more.
fn extents(file: &File, mut flags: u32, most: usize) -> io::Result<(Vec<Extent>, bool)> {
    let (mut extents, mut all) = (Vec::new(), true);
    let mut start = 0;
    loop {
        let mut map = Fiemap {
            start,
            length: u64::MAX - start,
            flags,
            mapped_extents: 0,
            extent_count: BATCH as u32,
            reserved: 0,
            extents: [FiemapExtent::default(); BATCH],
        };
        // SAFETY: the kernel writes into `map` only, no more extents than `extent_count` says.
        if unsafe { libc::ioctl(file.as_raw_fd(), FS_IOC_FIEMAP as _, &raw mut map) } < 0 {
            return Err(io::Error::last_os_error());
        }
        let mapped = &map.extents[..BATCH.min(map.mapped_extents as usize)];
        for extent in mapped {
            if extent.flags & NOWHERE != 0 {
                all = false;
                continue;
            }
            extents.push(Extent {
                logical: extent.logical,
                physical: extent.physical,
                length: extent.length,
                unwritten: extent.flags & UNWRITTEN != 0,
                shared: extent.flags & SHARED != 0,
            });
        }
        let Some(last) = mapped.last().filter(|extent| extent.flags & LAST == 0) else {
            return Ok((extents, all));
        };
        if extents.len() > most {
            return Ok((extents, false));
        }
        start = last.logical.saturating_add(last.length.max(1));
        // Once has written all of it back.
        flags = 0;
    }
}
