//! Blocks that a paired device has fetched, in files without names: they are gone with the process, however it ends.
//!
//! Invariant: a block is here only with the signature that the source gave it, so that what this disk spoils is
//! noticed by who fetches it. Non-goal: what is fetched when (`stock`).

use super::plan::Place;
use super::wire::BLOCK;
use crate::model::ids::Signature;
use crate::transfer::queue::lock;
use crate::volume::sign::ZERO;
use nix::sys::statvfs::fstatvfs;
use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::Mutex;

/// Blocks whose places in the file lie together: what is not there of them is a hole.
const CHUNK: u64 = 16;
/// A signature and the length of its block.
const MARK: usize = 36;
/// Of its file system this device leaves one part in so many free.
const LEFT_FREE: u64 = 20;
/// How often the free space is looked at, in blocks.
const LOOK: u64 = 256;

/// Blocks of one volume.
pub(super) struct Hold {
    blocks: File,
    marks: File,
    index: Mutex<Index>,
}

#[derive(Default)]
struct Index {
    chunks: HashMap<(u32, u64), Chunk>,
    /// Blocks that were kept.
    kept: u64,
    full: bool,
}

#[derive(Clone, Copy)]
struct Chunk {
    slot: u64,
    here: u16,
}

impl Chunk {
    fn at(self, block: u64) -> u64 {
        self.slot * CHUNK + block % CHUNK
    }

    fn has(self, block: u64) -> bool {
        self.here & bit(block) != 0
    }
}

fn bit(block: u64) -> u16 {
    1 << (block % CHUNK)
}

impl Hold {
    /// Nothing is here at first; it takes the space of `directory`'s file system.
    pub(super) fn in_directory(directory: &Path) -> io::Result<Self> {
        Ok(Self {
            blocks: tempfile::tempfile_in(directory)?,
            marks: tempfile::tempfile_in(directory)?,
            index: Mutex::default(),
        })
    }

    fn find(&self, place: Place) -> Option<Chunk> {
        let index = lock(&self.index);
        let chunk = index.chunks.get(&(place.file, place.block / CHUNK))?;
        Some(*chunk).filter(|chunk| chunk.has(place.block))
    }

    pub(super) fn has(&self, place: Place) -> bool {
        self.find(place).is_some()
    }

    /// Signature and length of a block that is here, which is read into `buffer`.
    pub(super) fn read(
        &self,
        place: Place,
        buffer: &mut [u8],
    ) -> io::Result<Option<(Signature, usize)>> {
        let Some(chunk) = self.find(place) else {
            return Ok(None);
        };
        let at = chunk.at(place.block);
        let mut mark = [0; MARK];
        self.marks.read_exact_at(&mut mark, at * MARK as u64)?;
        let (mut signature, mut length) = ([0; 32], [0; 4]);
        signature.copy_from_slice(&mark[..32]);
        length.copy_from_slice(&mark[32..]);
        let length = u32::from_le_bytes(length) as usize;
        let bytes = buffer
            .get_mut(..length)
            .ok_or_else(|| io::Error::other("a block here is longer than a block"))?;
        self.blocks.read_exact_at(bytes, at * BLOCK)?;
        Ok(Some((Signature(signature), length)))
    }

    /// Keeps a block.
    ///
    /// # Errors
    /// The disk's error, or too little of it is free.
    pub(super) fn put(&self, place: Place, signature: Signature, bytes: &[u8]) -> io::Result<()> {
        let key = (place.file, place.block / CHUNK);
        let chunk = {
            let mut index = lock(&self.index);
            if index.kept.is_multiple_of(LOOK) || index.full {
                index.full = self.is_full()?;
            }
            if index.full {
                return Err(nix::errno::Errno::ENOSPC.into());
            }
            index.kept += 1;
            let slot = index.chunks.len() as u64;
            *index.chunks.entry(key).or_insert(Chunk { slot, here: 0 })
        };
        let at = chunk.at(place.block);
        let bytes = if signature == ZERO { &[] } else { bytes };
        self.blocks.write_all_at(bytes, at * BLOCK)?;
        let mut mark = [0; MARK];
        mark[..32].copy_from_slice(&signature.0);
        // No block is longer than 64 KiB.
        let length = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        mark[32..].copy_from_slice(&length.to_le_bytes());
        self.marks.write_all_at(&mark, at * MARK as u64)?;
        if let Some(chunk) = lock(&self.index).chunks.get_mut(&key) {
            chunk.here |= bit(place.block);
        }
        Ok(())
    }

    fn is_full(&self) -> io::Result<bool> {
        let space = fstatvfs(&self.blocks)?;
        Ok(space.blocks_available() < space.blocks() / LEFT_FREE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_put_is_read_and_nothing_else_is_here_nor_has_a_name() {
        let dir = tempfile::tempdir_in(concat!(env!("CARGO_MANIFEST_DIR"), "/../target")).unwrap();
        let hold = Hold::in_directory(dir.path()).unwrap();
        let place = |file, block| Place { file, block };
        let content = |n: u64| vec![n as u8 + 1; if n == 3 { 100 } else { BLOCK as usize }];
        let mut buffer = vec![0; BLOCK as usize];
        let places = [(0, 0), (0, 17), (1, 0), (1, 3 << 20), (0, 1)];
        for (n, (file, block)) in (0..).zip(places) {
            assert!(!hold.has(place(file, block)));
            assert!(
                hold.read(place(file, block), &mut buffer)
                    .unwrap()
                    .is_none()
            );
            let signature = Signature([n as u8; 32]);
            let signature = if n == 0 {
                Signature([9; 32])
            } else {
                signature
            };
            hold.put(place(file, block), signature, &content(n))
                .unwrap();
        }
        hold.put(place(2, 0), ZERO, &vec![0; BLOCK as usize])
            .unwrap();
        for (n, (file, block)) in (0..).zip(places) {
            let (signature, length) = hold.read(place(file, block), &mut buffer).unwrap().unwrap();
            assert_eq!(signature.0[0], if n == 0 { 9 } else { n as u8 });
            assert_eq!(buffer[..length], content(n));
        }
        let zeros = hold.read(place(2, 0), &mut buffer).unwrap().unwrap();
        assert_eq!(zeros, (ZERO, 0));
        assert!(!hold.has(place(0, 2)) && !hold.has(place(2, 1)));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
