//! Large files in pieces of at most a megabyte, several read at a time and past the page cache: a disk is only
//! fast with requests waiting, and what is read once should not push out what the workload needs.

use super::engine::{Engine, Read};
use super::frame::DATA_CAP;
use super::message::Held;
use super::payload::{self, Block, DESCRIPTOR_LEN, PayloadKind};
use super::queue::lock;
use super::reading::{Fate, Reading, Unit, Waiting, fate};
use super::source::{SourceError, add};
use super::uring::is_cached;
use crate::model::ids::Signature;
use crate::volume::aligned::{ALIGNMENT, Aligned};
use crate::volume::salvage::is_media_error;
use crate::volume::scan::Holes;
use crate::volume::sign::{self, ZERO};
use crate::volume::unused;
use crate::volume::walk::WalkError;
use nix::sys::stat::FileStat;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

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
    pub(super) blocks: Mutex<Vec<Signature>>,
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
pub(super) const TOGETHER: u64 = 8;

/// Opens a file a second time, past the page cache; none where its file system refuses that.
pub(super) fn open_direct(file: &File) -> Option<File> {
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let flags = libc::O_DIRECT | libc::O_NOATIME;
    File::options()
        .read(true)
        .custom_flags(flags)
        .open(path)
        .ok()
}

/// A run of blocks that was read.
pub(super) struct Piece {
    file: Arc<Large>,
    first: u64,
    /// A record with room for the descriptors, followed by the bytes of the blocks that travel.
    record: Vec<u8>,
    descriptors: usize,
    data: usize,
    blocks: Vec<(Signature, Fate)>,
}

/// Where a piece lies in its file.
struct Place {
    first: u64,
    count: u32,
    offset: u64,
    length: usize,
    hollow: bool,
}

impl Reading<'_, '_> {
    /// Reads some pieces of a file at once, each at most a record full, and sends or offers what differs.
    pub(super) fn read_pieces(
        &self,
        engine: &mut dyn Engine,
        plain: &mut Aligned,
        large: &Arc<Large>,
        blocks: Range<u64>,
    ) -> Result<Vec<Waiting>, SourceError> {
        let block_size = self.source.block_size;
        let each = DATA_CAP as u64 / block_size.bytes();
        let mut places = Vec::new();
        let mut first = blocks.start;
        while first < blocks.end {
            let count = each.min(blocks.end - first);
            places.push(self.place(large, first, count));
            first += count;
        }
        let memory = plain.space(places.len() * DATA_CAP);
        let bad = self.read_places(engine, large, &places, memory)?;
        let mut waiting = Vec::new();
        for (place, bytes) in places.iter().zip(memory.chunks(DATA_CAP)) {
            if bad.contains(&place.first) {
                let blocks = place.first..place.first + u64::from(place.count);
                self.defer(Unit::Pieces(Arc::clone(large), blocks));
            } else {
                waiting.extend(self.piece(large, place, &bytes[..place.length])?);
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
        let place = self.place(large, blocks.start, blocks.end - blocks.start);
        let mut bytes = vec![0; place.length];
        // At most 1 MiB by construction.
        let size = usize::try_from(self.source.block_size.bytes()).unwrap_or(DATA_CAP);
        let mut at = 0;
        let blocks: Vec<u64> = blocks.collect();
        for run in blocks.chunk_by(|a, b| large.skips(*a) == large.skips(*b)) {
            let part = at..place.length.min(at + run.len() * size);
            at = part.end;
            if large.skips(run[0]) {
                continue;
            }
            let offset = place.offset + part.start as u64;
            let done = self
                .salvage(&large.path, &large.file, &mut bytes[part], offset)
                .map_err(|e| {
                    let action = "read a block of";
                    WalkError::new(self.root, action, &large.path, at_offset(&e, offset))
                })?;
            self.source.progress.read(done as u64);
            add(&self.tally.bytes_read, done as u64);
        }
        self.piece(large, &place, &bytes)
    }

    /// Where a record's worth of blocks lies.
    fn place(&self, large: &Large, first: u64, count: u64) -> Place {
        let block_size = self.source.block_size;
        let lengths = (first..first + count).map(|at| block_size.length_of(large.size, at));
        let (offset, length) = (first * block_size.bytes(), lengths.sum());
        Place {
            first,
            count: u32::try_from(count).unwrap_or(1),
            offset,
            length,
            hollow: large.holes.covers(offset, length as u64)
                || (first..first + count).all(|block| large.skips(block)),
        }
    }

    /// Fills a part of `memory` for each place; what lies past the end of the file reads as zeros. Returns the
    /// first blocks of those that the disk did not give up.
    fn read_places(
        &self,
        engine: &mut dyn Engine,
        large: &Large,
        places: &[Place],
        memory: &mut [u8],
    ) -> Result<Vec<u64>, SourceError> {
        let failed = |place: &Place, e: io::Error| {
            let (action, offset) = ("read a block of", place.offset);
            WalkError::new(self.root, action, &large.path, at_offset(&e, offset))
        };
        let parts = places.iter().zip(memory.chunks_mut(DATA_CAP));
        let (filled, parts): (Vec<_>, Vec<_>) = parts.partition(|(place, _)| !place.hollow);
        for (place, part) in parts {
            part[..place.length].fill(0);
        }
        let mut reads: Vec<Read<'_>> = Vec::with_capacity(filled.len());
        let mut direct = Vec::with_capacity(filled.len());
        for (place, part) in filled {
            let cached = || is_cached(large.file.as_fd(), place.offset, place.length as u64);
            let past = large.direct.as_ref().filter(|_| large.device || !cached());
            // Direct reads are of whole sectors; the file's end cuts the last one short.
            let length = if past.is_some() {
                place.length.next_multiple_of(ALIGNMENT)
            } else {
                place.length
            };
            reads.push(Read {
                file: past.unwrap_or(&large.file).as_fd(),
                offset: place.offset,
                buffer: &mut part[..length],
                once: past.is_none(),
                done: Ok(0),
            });
            direct.push((place, past.is_some()));
        }
        engine.read(&mut reads);
        let mut bad = Vec::new();
        for (mut read, (place, direct)) in reads.into_iter().zip(direct) {
            let refused = read
                .done
                .as_ref()
                .is_err_and(|e| e.raw_os_error() == Some(libc::EINVAL));
            if direct && refused {
                // A disk with larger sectors than 4096 bytes.
                let mut again = [Read {
                    file: large.file.as_fd(),
                    offset: place.offset,
                    buffer: &mut *read.buffer,
                    once: true,
                    done: Ok(0),
                }];
                engine.read(&mut again);
                let [again] = again;
                read.done = again.done;
            }
            let done = match read.done {
                Err(error) if is_media_error(&error) => {
                    bad.push(place.first);
                    continue;
                }
                done => done.map_err(|e| failed(place, e))?.min(place.length),
            };
            // The file shrank: the rest reads as zeros now and again in the next epoch.
            read.buffer[done..place.length].fill(0);
            self.source.progress.read(done as u64);
            add(&self.tally.bytes_read, done as u64);
        }
        Ok(bad)
    }

    /// Signs the blocks of a piece and sends what differs, or offers it first.
    fn piece(
        &self,
        large: &Arc<Large>,
        place: &Place,
        bytes: &[u8],
    ) -> Result<Option<Waiting>, SourceError> {
        let block_size = self.source.block_size;
        let (mut record, descriptors) =
            head(self.source.outlet.buffer(), large, place.first, place.count);
        let data = record.len();
        let mut blocks = Vec::with_capacity(place.count as usize);
        // At most 1 MiB by construction.
        let size = usize::try_from(block_size.bytes()).unwrap_or(DATA_CAP);
        for (bytes, index) in bytes.chunks(size).zip(place.first..) {
            let signature = if place.hollow || large.skips(index) {
                ZERO
            } else {
                sign::signature(self.source.key, bytes)
            };
            let held = usize::try_from(index)
                .ok()
                .and_then(|index| large.held.get(index));
            let fate = fate(&signature, held);
            if fate == Fate::Data {
                record.extend_from_slice(bytes);
            }
            blocks.push((signature, fate));
        }
        let piece = Piece {
            file: Arc::clone(large),
            first: place.first,
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
        let buffer = self.source.outlet.buffer();
        let (mut record, descriptors) = head(buffer, &piece.file, piece.first, count);
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
            let travels = *fate == Fate::Data;
            let length = self.source.block_size.length_of(file.size, index);
            let range = from..if travels { from + length } else { from };
            from = range.end;
            let found = answer.has(place);
            let block = fate.block(*signature, &record[range.clone()]);
            self.count(block, found);
            let block = if found { Block::Same } else { block };
            let at = descriptors + place * DESCRIPTOR_LEN;
            let descriptor = payload::descriptor(block);
            differs |= block != Block::Same;
            if travels && !found {
                let length = range.len();
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
        } else {
            self.source.outlet.give_back(record);
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

/// The beginning of a piece's record and where its descriptors go.
fn head(buffer: Vec<u8>, file: &Large, first: u64, count: u32) -> (Vec<u8>, usize) {
    let mut head = payload::start(buffer, PayloadKind::Segment);
    let descriptors = payload::put_segment(&mut head, &file.path, file.size, first, count);
    (head, descriptors)
}

fn at_offset(error: &io::Error, offset: u64) -> io::Error {
    io::Error::new(error.kind(), format!("at offset {offset}: {error}"))
}
