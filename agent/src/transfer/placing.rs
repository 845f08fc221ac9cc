//! Where the bytes of a record's blocks go, and blocks of which only some pages came.
//!
//! Invariant: of a block that comes in pages nothing is written before the signature of the whole was found right.

use super::engine::{Engine, Read};
use super::payload::{Block, Segment};
use super::rebuild::{Rebuild, RebuildError};
use crate::volume::BlockSize;
use crate::volume::aligned::Aligned;
use crate::volume::pages;
use crate::volume::sign;
use crate::volume::tree::shown;
use std::fs::File;
use std::os::fd::AsFd;

impl Rebuild {
    /// Puts the blocks of which pages came together, with those that are here, and checks their signatures. Nothing is
    /// written.
    pub(super) fn put_together(
        &self,
        engine: &mut dyn Engine,
        file: &File,
        segment: &Segment<'_>,
        space: &mut Aligned,
    ) -> Result<(), RebuildError> {
        let blocks = segment.blocks.iter().zip(segment.first..);
        let in_pages: Vec<_> = blocks
            .filter_map(|(block, index)| match block {
                Block::Pages(signature, pages, bytes) => Some((index, signature, *pages, *bytes)),
                _ => None,
            })
            .collect();
        // At most 1 MiB by construction.
        let size = usize::try_from(self.block_size.bytes()).unwrap_or(0);
        let memory = space.space(in_pages.len() * size);
        let blocks = memory.chunks_exact_mut(size).zip(&in_pages);
        let mut reads: Vec<Read<'_>> = blocks
            .map(|(buffer, (index, ..))| Read {
                file: file.as_fd(),
                offset: index * self.block_size.bytes(),
                buffer,
                length: size,
                once: true,
                done: Ok(0),
            })
            .collect();
        engine.read(&mut reads);
        for (read, (_, expected, pages, bytes)) in reads.into_iter().zip(in_pages) {
            let failed = |e| self.destination.failed("read", &segment.path, 0, e);
            let done = read.done.map_err(failed)?;
            let mut bytes = bytes;
            for range in pages::ranges(pages, size) {
                let (page, rest) = bytes.split_at(range.len());
                read.buffer[range].copy_from_slice(page);
                bytes = rest;
            }
            if done < size || sign::signature(&self.key, read.buffer) != *expected {
                return Err(RebuildError::Altered {
                    volume: self.destination.volume().to_owned(),
                    path: shown(&segment.path).into_owned(),
                    offset: read.offset,
                });
            }
        }
        Ok(())
    }
}

/// Where bytes of blocks lie: the opened record, and what was found on this device.
pub(super) type Memories<'b> = [&'b [u8]; 2];

/// Runs of blocks with bytes that lie next to each other both in memory and in the file.
pub(super) fn runs<'b>(
    block_size: BlockSize,
    memories: Memories<'b>,
    first: u64,
    blocks: &[Block<'b>],
) -> impl Iterator<Item = (u64, &'b [u8])> {
    let mut joined: Vec<(u64, usize, std::ops::Range<usize>)> = Vec::new();
    let mut join = |offset: u64, memory: usize, bytes: &[u8]| {
        let start = bytes.as_ptr().addr() - memories[memory].as_ptr().addr();
        match joined.last_mut() {
            Some((at, same, range))
                if *same == memory
                    && range.end == start
                    && *at + (range.len() as u64) == offset =>
            {
                range.end = start + bytes.len();
            }
            _ => joined.push((offset, memory, start..start + bytes.len())),
        }
    };
    for (block, index) in blocks.iter().zip(first..) {
        let offset = index * block_size.bytes();
        match block {
            Block::Data(_, bytes) => join(offset, 0, bytes),
            Block::Found(_, bytes) => join(offset, 1, bytes),
            Block::Pages(_, changed, bytes) => {
                let mut bytes = *bytes;
                // At most 1 MiB by construction.
                let size = usize::try_from(block_size.bytes()).unwrap_or(0);
                for range in pages::ranges(*changed, size) {
                    let (page, rest) = bytes.split_at(range.len());
                    join(offset + range.start as u64, 0, page);
                    bytes = rest;
                }
            }
            Block::Zero | Block::Same | Block::Offered(_) => {}
        }
    }
    joined
        .into_iter()
        .map(move |(offset, memory, range)| (offset, &memories[memory][range]))
}
