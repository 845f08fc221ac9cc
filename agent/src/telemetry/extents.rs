//! Which files of a directory lie where on their device (FIEMAP).
//!
//! Non-goals: other file systems mounted below it; those whose device is not the one that stat(2) names.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// A piece of a file on its device, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Where it is in the file.
    pub logical: u64,
    /// Where it is on the device.
    pub physical: u64,
    /// Length.
    pub length: u64,
}

/// A regular file.
pub struct Found {
    /// Path below the directory.
    pub path: Vec<u8>,
    /// Length, bytes.
    pub length: u64,
    /// Where it lies.
    pub pieces: Vec<Piece>,
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
                pieces: pieces(&file)?,
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

fn pieces(file: &File) -> io::Result<Vec<Piece>> {
    let mut pieces = Vec::new();
    let mut start = 0;
    loop {
        let mut map = Fiemap {
            start,
            length: u64::MAX - start,
            flags: 0,
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
        for extent in mapped.iter().filter(|extent| extent.flags & NOWHERE == 0) {
            pieces.push(Piece {
                logical: extent.logical,
                physical: extent.physical,
                length: extent.length,
            });
        }
        let Some(last) = mapped.last().filter(|extent| extent.flags & LAST == 0) else {
            return Ok(pieces);
        };
        start = last.logical.saturating_add(last.length.max(1));
    }
}
