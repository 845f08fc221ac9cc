//! Large files in pieces of at most a megabyte, several read at a time and past the page cache: a disk is only
//! fast with requests waiting, and what is read once should not push out what the workload needs.

use super::deferred::{Before, Salvaged};
use super::engine::{Engine, Read};
use super::frame::DATA_CAP;
use super::message::Held;
use super::payload::{self, Block, DESCRIPTOR_LEN, PayloadKind};
use super::queue::lock;
use super::reading::{Fate, Reading, Unit, Waiting, fate};
use super::record::Record;
use super::source::{EXTENTS_CAP, SourceError, add};
use super::uring::is_cached;
use crate::model::extent::Extent;
use crate::model::ids::Signature;
use crate::telemetry::extents;
use crate::volume::aligned::ALIGNMENT;
use crate::volume::rewritten::common;
use crate::volume::salvage::{self, is_media_error};
use crate::volume::scan::Holes;
use crate::volume::sign::{self, ZERO};
use crate::volume::unused;
use crate::volume::walk::WalkError;
use nix::sys::stat::FileStat;
use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

/// A large file while its pieces are read.
pub(super) struct Large {
    pub(super) step: usize,
    pub(super) path: Box<[u8]>,
    pub(super) file: File,
    /// The same file past the page cache, where its file system allows that.
    pub(super) direct: Option<File>,
    pub(super) stat: FileStat,
    pub(super) size: u64,
    /// A device: what lies in its page cache is older than what a file system or a device above it has written.
    pub(super) device: bool,
    pub(super) holes: Holes,
    /// Blocks that the file system on it does not use.
    pub(super) unused: Option<Arc<unused::Map>>,
    /// Blocks that the target holds of it.
    pub(super) held: Vec<Signature>,
    /// Where it lay before it was read.
    pub(super) extents: Option<Arc<[Extent]>>,
    pub(super) blocks: Mutex<Vec<Signature>>,
    /// What came of it before, once something of it cannot be read.
    pub(super) before: OnceLock<Before>,
    /// Pieces not yet read.
    pub(super) left: AtomicU64,
}

impl Large {
    /// Whether a block is taken for zeros without being read.
    fn skips(&self, block: u64) -> bool {
        self.unused.as_ref().is_some_and(|map| map.has(block))
    }
}

/// Pieces read at a time by each thread.
pub(super) const TOGETHER: u64 = 4;

/// A run of blocks that is read straight into its record.
pub(super) struct Piece {
    file: Arc<Large>,
    first: u64,
    offset: u64,
    /// Bytes of its blocks.
    length: usize,
    hollow: bool,
    /// A record with room for the descriptors, followed by the bytes of the blocks unless they are a hole.
    record: Record,
    descriptors: usize,
    data: usize,
    blocks: Vec<(Signature, Fate)>,
    /// Blocks that stay as they came before, because the disk does not give up all of them now.
    kept: HashMap<u64, Signature>,
}

impl Piece {
    fn bytes(&self) -> &[u8] {
        &self.record[self.data..self.data + self.length]
    }
}

impl Reading<'_, '_> {
    /// Reads some pieces of a file at once, each at most a record full, and sends or offers what differs.
    pub(super) fn read_pieces(
        &self,
        engine: &mut dyn Engine,
        large: &Arc<Large>,
        blocks: Range<u64>,
    ) -> Result<Vec<Waiting>, SourceError> {
        let each = DATA_CAP as u64 / self.source.block_size.bytes();
        let mut pieces = Vec::new();
        let mut first = blocks.start;
        while first < blocks.end {
            let count = each.min(blocks.end - first);
            pieces.push(self.begin_piece(large, first, count));
            first += count;
        }
        let bad = self.fill(engine, large, &mut pieces)?;
        let mut waiting = Vec::new();
        for piece in pieces {
            if bad.contains(&piece.first) {
                let count = piece.blocks.len() as u64;
                let blocks = piece.first..piece.first + count;
                self.defer(Unit::Pieces(Arc::clone(large), blocks));
            } else {
                waiting.extend(self.finish_piece(piece)?);
            }
        }
        Ok(waiting)
    }

    /// Reads a piece that the disk did not give up at once, and sends or offers what differs.
    pub(super) fn salvage_piece(
        &self,
        large: &Arc<Large>,
        blocks: Range<u64>,
    ) -> Result<Option<Waiting>, SourceError> {
        let mut piece = self.begin_piece(large, blocks.start, blocks.end - blocks.start);
        if !piece.hollow {
            let memory = &mut piece.record[piece.data..piece.data + piece.length];
            memory.fill(0);
            // At most 1 MiB by construction.
            let size = usize::try_from(self.source.block_size.bytes()).unwrap_or(DATA_CAP);
            let mut at = 0;
            let blocks: Vec<u64> = blocks.collect();
            for run in blocks.chunk_by(|a, b| large.skips(*a) == large.skips(*b)) {
                let part = at..memory.len().min(at + run.len() * size);
                at = part.end;
                if large.skips(run[0]) {
                    continue;
                }
                let offset = piece.offset + part.start as u64;
                let bytes = &mut memory[part];
                let (done, lost) = salvage::read(&large.file, bytes, offset)
                    .map_err(|e| self.unread(large, offset, &e))?;
                if !lost.is_empty() {
                    let before = || self.before(&large.path, &large.file, &large.stat);
                    let salvaged = Salvaged {
                        path: &large.path,
                        size: large.size,
                        held: &large.held,
                        before: large.before.get_or_init(before),
                        offset,
                        bytes,
                    };
                    piece.kept.extend(self.name_lost(&salvaged, &lost));
                }
                self.source.progress.read(done as u64);
                add(&self.tally.bytes_read, done as u64);
            }
        }
        self.finish_piece(piece)
    }

    /// A piece without its bytes.
    fn begin_piece(&self, large: &Arc<Large>, first: u64, count: u64) -> Piece {
        let block_size = self.source.block_size;
        let lengths = (first..first + count).map(|at| block_size.length_of(large.size, at));
        let (offset, length) = (first * block_size.bytes(), lengths.sum::<usize>());
        let hollow = large.holes.covers(offset, length as u64)
            || (first..first + count).all(|block| large.skips(block));
        let (head, descriptors) = head(large, first, count);
        // Direct reads are of whole sectors.
        let room = if hollow {
            0
        } else {
            length.next_multiple_of(ALIGNMENT)
        };
        Piece {
            file: Arc::clone(large),
            first,
            offset,
            length,
            hollow,
            record: Record::with_room(&self.source.outlet.slots, &head, room),
            descriptors,
            data: head.len(),
            // Filled in when the bytes are there.
            blocks: vec![(ZERO, Fate::Same); usize::try_from(count).unwrap_or(0)],
            kept: HashMap::new(),
        }
    }

    fn unread(&self, large: &Large, offset: u64, error: &io::Error) -> WalkError {
        let action = "read a block of";
        WalkError::new(self.root, action, &large.path, at_offset(error, offset))
    }

    /// Reads the bytes of pieces; what lies past the end of the file reads as zeros. Returns the first blocks
    /// of those that the disk did not give up.
    fn fill(
        &self,
        engine: &mut dyn Engine,
        large: &Large,
        pieces: &mut [Piece],
    ) -> Result<Vec<u64>, SourceError> {
        let mut reads: Vec<Read<'_>> = Vec::with_capacity(pieces.len());
        let mut places = Vec::with_capacity(pieces.len());
        for piece in pieces.iter_mut().filter(|piece| !piece.hollow) {
            let cached = || is_cached(large.file.as_fd(), piece.offset, piece.length as u64);
            let past = large.direct.as_ref().filter(|_| large.device || !cached());
            // The file's end cuts the last sector of a direct read short.
            let length = if past.is_some() {
                piece.length.next_multiple_of(ALIGNMENT)
            } else {
                piece.length
            };
            places.push((piece.first, piece.length, past.is_some()));
            reads.push(Read {
                file: past.unwrap_or(&large.file).as_fd(),
                offset: piece.offset,
                buffer: &mut piece.record[piece.data..piece.data + length],
                length: piece.length,
                once: past.is_none(),
                done: Ok(0),
            });
        }
        engine.read(&mut reads);
        let mut bad = Vec::new();
        for (mut read, (first, length, direct)) in reads.into_iter().zip(places) {
            let refused = read
                .done
                .as_ref()
                .is_err_and(|e| e.raw_os_error() == Some(libc::EINVAL));
            if direct && refused {
                // A disk with larger sectors than 4096 bytes.
                let mut again = [Read {
                    file: large.file.as_fd(),
                    offset: read.offset,
                    buffer: &mut *read.buffer,
                    length,
                    once: true,
                    done: Ok(0),
                }];
                engine.read(&mut again);
                let [again] = again;
                read.done = again.done;
            }
            let done = match read.done {
                Err(error) if is_media_error(&error) => {
                    bad.push(first);
                    continue;
                }
                done => done
                    .map_err(|e| self.unread(large, read.offset, &e))?
                    .min(length),
            };
            // The file shrank: the rest reads as zeros now and again in the next epoch.
            read.buffer[done..length].fill(0);
            self.source.progress.read(done as u64);
            add(&self.tally.bytes_read, done as u64);
        }
        Ok(bad)
    }

    /// Signs the blocks of a piece and sends what differs, or offers it first.
    fn finish_piece(&self, mut piece: Piece) -> Result<Option<Waiting>, SourceError> {
        let held = |index: u64| {
            let index = usize::try_from(index).ok();
            index.and_then(|index| piece.file.held.get(index))
        };
        let indices = piece.first..piece.first + piece.blocks.len() as u64;
        piece.blocks = if piece.hollow {
            let zeros = indices.map(|index| (ZERO, fate(&ZERO, held(index))));
            zeros.collect()
        } else {
            // At most 1 MiB by construction.
            let size = usize::try_from(self.source.block_size.bytes()).unwrap_or(DATA_CAP);
            let signed = piece.bytes().chunks(size).zip(indices);
            let signed = signed.map(|(bytes, index)| {
                let signature = if piece.file.skips(index) {
                    ZERO
                } else if let Some(kept) = piece.kept.get(&index) {
                    *kept
                } else {
                    sign::signature(self.source.key, bytes)
                };
                (signature, fate(&signature, held(index)))
            });
            signed.collect()
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
        let (mut record, descriptors) = head(&piece.file, piece.first, piece.blocks.len() as u64);
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
            hollow,
            mut record,
            descriptors,
            data,
            blocks,
            ..
        } = piece;
        let (mut from, mut to) = (data, data);
        let mut differs = false;
        for ((index, (signature, fate)), place) in (first..).zip(&blocks).zip(0..) {
            let length = self.source.block_size.length_of(file.size, index);
            let range = from..if hollow { from } else { from + length };
            from = range.end;
            let found = answer.has(place);
            let block = fate.block(*signature, &record[range.clone()]);
            self.count(block, found);
            let block = if found { Block::Same } else { block };
            let at = descriptors + place * DESCRIPTOR_LEN;
            let descriptor = payload::descriptor(block);
            differs |= block != Block::Same;
            if matches!(block, Block::Data(..)) {
                if to != range.start {
                    record.copy_within(range, to);
                }
                to += length;
            }
            record[at..at + DESCRIPTOR_LEN].copy_from_slice(&descriptor);
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
        // What moved while it was read may be either.
        if let Some(before) = &large.extents
            && let Ok(after) = extents::at_once(&large.file, EXTENTS_CAP)
        {
            let both = common(before, &after);
            self.tally.keep_extents(&large.path, &both.into());
        }
        lock(&self.outcomes).insert(large.step, Some(entry));
        Ok(())
    }
}

/// The beginning of a piece's record, up to its data, and where its descriptors go.
fn head(file: &Large, first: u64, count: u64) -> (Vec<u8>, usize) {
    let mut head = payload::start(Vec::new(), PayloadKind::Segment);
    let count = u32::try_from(count).unwrap_or(1);
    let descriptors = payload::put_segment(&mut head, &file.path, file.size, first, count);
    (head, descriptors)
}

fn at_offset(error: &io::Error, offset: u64) -> io::Error {
    io::Error::new(error.kind(), format!("at offset {offset}: {error}"))
}
