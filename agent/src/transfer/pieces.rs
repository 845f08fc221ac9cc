//! Large files in pieces of at most a megabyte, read straight into the record that carries them.

use super::engine::{Engine, Read};
use super::message::Held;
use super::payload::{self, Block, DESCRIPTOR_LEN, PayloadKind};
use super::queue::lock;
use super::reading::{Fate, Reading, Waiting, fate};
use super::source::{SourceError, add};
use crate::model::ids::Signature;
use crate::volume::aligned::Aligned;
use crate::volume::scan::Holes;
use crate::volume::sign::{self, ZERO};
use crate::volume::walk::WalkError;
use nix::sys::stat::FileStat;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

/// A large file while its pieces are read.
pub(super) struct Large {
    pub(super) step: usize,
    pub(super) path: Box<[u8]>,
    pub(super) file: File,
    pub(super) stat: FileStat,
    pub(super) size: u64,
    /// Opened for direct reads.
    pub(super) direct: bool,
    pub(super) holes: Holes,
    pub(super) blocks: Mutex<Vec<Signature>>,
    /// Pieces not yet read.
    pub(super) left: AtomicU64,
}

/// A run of blocks that was read.
pub(super) struct Piece {
    file: Arc<Large>,
    first: u64,
    /// A record with room for the descriptors, followed by the bytes of all blocks.
    record: Vec<u8>,
    descriptors: usize,
    data: usize,
    blocks: Vec<(Signature, Fate)>,
}

impl Reading<'_, '_> {
    /// Reads a run of blocks straight into a record and sends what differs, or offers it first.
    pub(super) fn read_piece(
        &self,
        engine: &mut dyn Engine,
        large: &Arc<Large>,
        first: u64,
        count: u32,
    ) -> Result<Option<Waiting>, SourceError> {
        let block_size = self.source.block_size;
        let past = first + u64::from(count);
        let lengths = (first..past).map(|index| block_size.length_of(large.size, index));
        let total: usize = lengths.clone().sum();
        let (head, descriptors) = head(large, first, count);
        let data = head.len();
        let mut record = self.source.outlet.buffer();
        record.resize(data + total, 0);
        record[..data].copy_from_slice(&head);

        let offset = first * block_size.bytes();
        let hollow = large.holes.covers(offset, total as u64);
        if hollow {
            record[data..].fill(0);
        } else {
            let read = read_large(engine, large, offset, &mut record[data..]);
            let done = read.map_err(|e| {
                let action = "read a block of";
                WalkError::new(self.root, action, &large.path, at_offset(&e, offset))
            })?;
            // The file shrank: the rest reads as zeros now and again in the next epoch.
            record[data + done..].fill(0);
            self.source.progress.read(done as u64);
            add(&self.tally.bytes_read, done as u64);
        }

        let held = self.source.held.blocks(&large.path);
        let mut blocks = Vec::with_capacity(count as usize);
        let mut from = data;
        for (index, length) in (first..).zip(lengths) {
            let signature = if hollow {
                ZERO
            } else {
                sign::signature(self.source.key, &record[from..from + length])
            };
            let held = usize::try_from(index)
                .ok()
                .and_then(|index| held.get(index));
            blocks.push((signature, fate(&signature, held)));
            from += length;
        }
        let piece = Piece {
            file: Arc::clone(large),
            first,
            record,
            descriptors,
            data,
            blocks,
        };
        let data = piece
            .blocks
            .iter()
            .filter(|(_, fate)| *fate == Fate::Data)
            .map(|(signature, _)| signature);
        let offers = &self.source.outlet.offers;
        if data.clone().next().is_some() && (offers.repeat(data) || offers.is_due()) {
            let number = self.offer_piece(&piece)?;
            return Ok(Some(Waiting::Piece(number, piece)));
        }
        self.send_piece(piece, &Held::default())?;
        Ok(None)
    }

    fn offer_piece(&self, piece: &Piece) -> Result<u64, SourceError> {
        let count = u32::try_from(piece.blocks.len()).unwrap_or(0);
        let (mut record, descriptors) = head(&piece.file, piece.first, count);
        for (at, (signature, fate)) in (descriptors..).step_by(DESCRIPTOR_LEN).zip(&piece.blocks) {
            let block = match fate {
                Fate::Data => Block::Offered(*signature),
                other => other.block(*signature, &[]),
            };
            record[at..at + DESCRIPTOR_LEN].copy_from_slice(&payload::descriptor(block));
        }
        Ok(self.source.outlet.offer(record, piece.first)?)
    }

    /// Sends what differs of a piece, except the blocks that are in their places according to `answer`.
    pub(super) fn send_piece(&self, piece: Piece, answer: &Held) -> Result<(), SourceError> {
        let Piece {
            file,
            first,
            mut record,
            descriptors,
            data,
            blocks,
        } = piece;
        let (mut from, mut to) = (data, data);
        let mut differs = false;
        for ((index, (signature, fate)), place) in (first..).zip(&blocks).zip(0..) {
            let length = self.source.block_size.length_of(file.size, index);
            let found = answer.has(place);
            let block = fate.block(*signature, &record[from..from + length]);
            self.count(block, found);
            let block = if found { Block::Same } else { block };
            let at = descriptors + place * DESCRIPTOR_LEN;
            let descriptor = payload::descriptor(block);
            let is_data = matches!(block, Block::Data(..));
            differs |= block != Block::Same;
            if is_data {
                if to != from {
                    record.copy_within(from..from + length, to);
                }
                to += length;
            }
            record[at..at + DESCRIPTOR_LEN].copy_from_slice(&descriptor);
            from += length;
        }
        record.truncate(to);
        if differs {
            self.source.outlet.emit(record, false, first)?;
        }
        let start = usize::try_from(first).unwrap_or(0);
        let signatures = blocks.iter().map(|(signature, _)| *signature);
        for (place, signature) in lock(&file.blocks)[start..].iter_mut().zip(signatures) {
            *place = signature;
        }
        if file.left.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.complete(&file)?;
        }
        Ok(())
    }

    /// The last piece of a large file is done.
    pub(super) fn complete(&self, large: &Large) -> Result<(), SourceError> {
        let blocks = std::mem::take(&mut *lock(&large.blocks));
        let entry = self.entry(&large.path, &large.file, &large.stat, large.size, blocks)?;
        if self.source.differs(&entry) {
            add(&self.tally.changed_entries, 1);
        }
        lock(&self.outcomes).insert(large.step, Some(entry));
        Ok(())
    }
}

/// Reads bytes of a large file, of a device past its page cache: what lies there is older than what a file
/// system or a device above this one has written.
fn read_large(
    engine: &mut dyn Engine,
    large: &Large,
    offset: u64,
    into: &mut [u8],
) -> io::Result<usize> {
    let mut read_into = |buffer: &mut [u8]| {
        let mut reads = [Read {
            file: large.file.as_fd(),
            offset,
            buffer,
            once: true,
            done: Ok(0),
        }];
        engine.read(&mut reads);
        let [read] = reads;
        read.done
    };
    if !large.direct {
        return read_into(into);
    }
    let mut memory = Aligned::default();
    let aligned = memory.space(into.len());
    let done = read_into(aligned)?;
    into[..done].copy_from_slice(&aligned[..done]);
    Ok(done)
}

/// The beginning of a piece's record and where its descriptors go.
fn head(file: &Large, first: u64, count: u32) -> (Vec<u8>, usize) {
    let mut head = payload::start(Vec::new(), PayloadKind::Segment);
    let descriptors = payload::put_segment(&mut head, &file.path, file.size, first, count);
    (head, descriptors)
}

fn at_offset(error: &io::Error, offset: u64) -> io::Error {
    io::Error::new(error.kind(), format!("at offset {offset}: {error}"))
}
