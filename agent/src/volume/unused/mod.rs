//! Blocks of a volume of one piece that the file system on it does not use: they need not move.
//!
//! Invariants: what is not surely free counts as used; bytes of the image are hostile: sizes are checked before
//! anything is allocated for them, and no loop is longer than the image has blocks. A map on a disk lags behind a
//! mounted file system: it is a hint until that is frozen, and where nothing is mounted it counts only when the
//! journal is empty. Non-goals: repairing, sizes of groups below 256 blocks, clusters.

mod ext4;
mod xfs;

use super::aligned::{ALIGNMENT, Aligned};
use super::scan::read_full;
use super::sign::BlockSize;
use super::users::{self, User};
use crate::model::units::Bytes;
use crate::model::volume::Unused;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::Path;

/// How far the maps on the disk are to be believed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trust {
    /// It is mounted and changes: what they say must be looked at again.
    Hint,
    /// Nobody has it mounted: they are right when the journal is empty.
    Unmounted,
    /// It is mounted and frozen: everything is in its place.
    Frozen,
}

/// Why the unused blocks of a file system are not known.
#[derive(Debug, thiserror::Error)]
pub enum Doubt {
    /// Changes are not in their places yet.
    #[error("its journal is not empty; mount and unmount it once")]
    Journal,
    /// The journal lies elsewhere.
    #[error("its journal lies on another device")]
    ExternalJournal,
    /// Something that changes where maps lie or what they mean.
    #[error("it has {0}, which is not read here")]
    Feature(String),
    /// Numbers or checksums that cannot be.
    #[error("{0} cannot be right; look at it with fsck")]
    Damaged(&'static str),
    /// A partition table or boot loader lies before it, so the file system may be an old one.
    #[error("a boot sector lies on the same device")]
    BootSector,
    /// An image file is in use as a device.
    #[error("it is attached to {0}")]
    Attached(String),
    /// The disk does not give it up.
    #[error("its map cannot be read: {0}")]
    Read(#[from] io::Error),
}

/// Largest image that is looked at, in blocks: 32 MiB of map.
const BLOCKS_CAP: u64 = 1 << 28;

/// The blocks of a volume that its file system does not use.
#[derive(Clone, Debug)]
pub struct Map {
    /// Name of the file system.
    pub file_system: &'static str,
    block_size: BlockSize,
    size: u64,
    /// One bit a block.
    free: Vec<u64>,
}

impl Map {
    /// Of an image of `size` bytes in which everything is used.
    fn new(block_size: BlockSize, size: u64) -> Option<Self> {
        let blocks = block_size.blocks_of(size);
        let words = usize::try_from(blocks.div_ceil(64)).ok()?;
        (blocks <= BLOCKS_CAP).then(|| Self {
            file_system: "",
            block_size,
            size,
            free: vec![0; words],
        })
    }

    /// Whether every byte of the block is unused.
    #[must_use]
    pub fn has(&self, block: u64) -> bool {
        let word = usize::try_from(block / 64).ok();
        let word = word.and_then(|word| self.free.get(word));
        word.is_some_and(|word| word >> (block % 64) & 1 == 1)
    }

    /// Unused bytes in whole blocks.
    #[must_use]
    pub fn bytes(&self) -> Bytes {
        let blocks: u64 = self
            .free
            .iter()
            .map(|word| u64::from(word.count_ones()))
            .sum();
        let last = self.block_size.blocks_of(self.size).saturating_sub(1);
        let short = self.block_size.bytes() - self.block_size.length_of(self.size, last) as u64;
        Bytes(blocks * self.block_size.bytes() - if self.has(last) { short } else { 0 })
    }

    /// Runs of unused blocks, in order.
    pub fn runs(&self) -> impl Iterator<Item = Range<u64>> + use<'_> {
        let count = self.block_size.blocks_of(self.size);
        let mut next = 0;
        std::iter::from_fn(move || {
            let start = (next..count).find(|&block| self.has(block))?;
            let end = (start..count).find(|&block| !self.has(block));
            next = end.unwrap_or(count);
            Some(start..next)
        })
    }

    /// Marks the blocks that lie wholly within these bytes as unused.
    fn release(&mut self, bytes: &Range<u64>) {
        let size = self.block_size.bytes();
        let end = if bytes.end >= self.size {
            self.block_size.blocks_of(self.size)
        } else {
            bytes.end / size
        };
        for block in bytes.start.div_ceil(size)..end {
            if let Some(word) = self.free.get_mut((block / 64) as usize) {
                *word |= 1 << (block % 64);
            }
        }
    }

    /// Marks the blocks that have any of these bytes as used.
    fn keep(&mut self, bytes: &Range<u64>) {
        let size = self.block_size.bytes();
        let end = bytes
            .end
            .div_ceil(size)
            .min(self.block_size.blocks_of(self.size));
        for block in bytes.start / size..end {
            if let Some(word) = self.free.get_mut((block / 64) as usize) {
                *word &= !(1 << (block % 64));
            }
        }
    }
}

/// Bytes of an image by their offset.
pub trait Image {
    /// How many there are.
    fn size(&self) -> u64;
    /// Fills `into` from `offset`.
    ///
    /// # Errors
    /// They cannot be read, or lie past the end.
    fn read(&mut self, into: &mut [u8], offset: u64) -> io::Result<()>;
}

/// A file or device, read in larger pieces than asked for: bitmaps of several groups lie side by side.
struct OpenFile<'f> {
    file: &'f File,
    size: u64,
    memory: Aligned,
    window: Range<u64>,
}

/// Bytes read at a time.
const WINDOW: u64 = 64 << 10;

impl Image for OpenFile<'_> {
    fn size(&self) -> u64 {
        self.size
    }

    fn read(&mut self, into: &mut [u8], offset: u64) -> io::Result<()> {
        let end = offset.saturating_add(into.len() as u64);
        if end > self.size {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if offset < self.window.start || end > self.window.end {
            let alignment = ALIGNMENT as u64;
            let start = offset - offset % alignment;
            let length = (end - start).next_multiple_of(alignment).max(WINDOW);
            // At most 128 KiB: nothing that is asked for is larger than a block of 64 KiB.
            let space = self.memory.space(length as usize);
            let done = read_full(self.file, space, start)?;
            self.window = start..start + done as u64;
            if end > self.window.end {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        let at = (offset - self.window.start) as usize;
        let space = self
            .memory
            .space((self.window.end - self.window.start) as usize);
        into.copy_from_slice(&space[at..at + into.len()]);
        Ok(())
    }
}

/// Looks for a file system in an image and for the blocks that it does not use; none where it is no file system
/// that is known here.
///
/// # Errors
/// The file system's name, and why its maps are not believed.
pub fn find(
    image: &mut dyn Image,
    block_size: BlockSize,
    trust: Trust,
) -> Result<Option<Map>, (&'static str, Doubt)> {
    let Some(mut map) = Map::new(block_size, image.size()) else {
        return Ok(None);
    };
    type Reader = fn(&mut dyn Image, &mut Map, Trust) -> Result<bool, Doubt>;
    let readers: [(&'static str, Reader); 2] = [("xfs", xfs::read), ("ext4", ext4::read)];
    for (name, read) in readers {
        match read(image, &mut map, trust) {
            Ok(false) => {}
            Ok(true) => {
                map.file_system = name;
                return Ok(Some(map));
            }
            Err(doubt) => return Err((name, doubt)),
        }
    }
    Ok(None)
}

/// The same of an open file or block device of `size` bytes that lies at `path`. `frozen` says that a file system
/// that is mounted from it is frozen.
///
/// # Errors
/// As [`find`].
pub fn of_file(
    path: &Path,
    file: &File,
    size: u64,
    block_size: BlockSize,
    frozen: bool,
) -> Result<Option<Map>, (&'static str, Doubt)> {
    let mut image = OpenFile {
        file,
        size,
        memory: Aligned::default(),
        window: 0..0,
    };
    // Nearly everything is no file system: who has it mounted is only asked of one.
    match find(&mut image, block_size, Trust::Hint) {
        Ok(None) => Ok(None),
        Err(doubt) => Err(doubt),
        Ok(Some(map)) => {
            let doubt = |error| (map.file_system, Doubt::Read(error));
            let trust = match users::of(path, file).map_err(doubt)? {
                User::Nobody => Trust::Unmounted,
                User::Mounted(_) if frozen => Trust::Frozen,
                User::Mounted(_) => return Ok(Some(map)),
                User::Attached(device) => {
                    let device = device.display().to_string();
                    return Err((map.file_system, Doubt::Attached(device)));
                }
            };
            image.window = 0..0;
            find(&mut image, block_size, trust)
        }
    }
}

/// What of a volume of one piece is left out, for a plan.
#[must_use]
pub fn of_volume(path: &Path) -> Unused {
    let look = || -> io::Result<_> {
        let root = super::walk::open_root(path).map_err(io::Error::other)?;
        let opened = super::scan::open_file(&root, super::one::CONTENT);
        let (file, stat) = opened.map_err(io::Error::other)?;
        let size = stat.st_size.unsigned_abs();
        Ok(of_file(
            path,
            &file,
            size,
            BlockSize::for_volume(size),
            false,
        ))
    };
    match look() {
        Ok(Ok(Some(map))) => Unused::LeftOut {
            file_system: map.file_system.to_owned(),
            bytes: map.bytes(),
        },
        Ok(Err((file_system, doubt))) => Unused::Sent {
            file_system: file_system.to_owned(),
            why: doubt.to_string(),
        },
        // What cannot be read at all the copy itself says.
        Ok(Ok(None)) | Err(_) => Unused::Unknown,
    }
}

/// Bytes as numbers of either order.
fn number<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let field = bytes.get(at..at + N);
    field
        .and_then(|field| field.try_into().ok())
        .unwrap_or([0; N])
}

/// CRC-32C (Castagnoli), without inversion before or after.
fn crc32c(mut crc: u32, bytes: &[u8]) -> u32 {
    const TABLE: [u32; 256] = {
        let mut table = [0; 256];
        let mut at = 0;
        while at < 256 {
            let (mut value, mut bit) = (at as u32, 0);
            while bit < 8 {
                value = value >> 1 ^ if value & 1 == 1 { 0x82f6_3b78 } else { 0 };
                bit += 1;
            }
            table[at] = value;
            at += 1;
        }
        table
    };
    for byte in bytes {
        crc = crc >> 8 ^ TABLE[(crc as u8 ^ byte) as usize];
    }
    crc
}

#[cfg(test)]
mod tests;
