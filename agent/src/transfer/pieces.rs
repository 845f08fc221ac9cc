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
use crate::volume::pages::{self, FileMarks, Marks, Pages};
use crate::volume::rewritten::common;
use crate::volume::salvage::{self, is_media_error};
use crate::volume::scan::Holes;
use crate::volume::sign::{self, BlockSize, ZERO};
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
    /// Marks of the pages of the blocks that the target holds; none: not known.
    pub(super) marks_before: Option<Arc<FileMarks>>,
    pub(super) marks: Mutex<FileMarks>,
    /// What came of it before, once something of it cannot be read.
    pub(super) before: OnceLock<Before>,
    /// Spans not yet read.
    pub(super) left: AtomicU64,
}

impl Large {
    /// Whether a block is taken for zeros without being read.
    fn skips(&self, block: u64) -> bool {
        self.unused.as_ref().is_some_and(|map| map.has(block))
    }
}

/// Pieces read at a time by each thread.
pub(super) const TOGETHER: usize = 4;

/// Most pages that travel instead of their block, which the target then has to read: half of them.
const PAGES_CAP: u32 = pages::PAGES as u32 / 2;

/// Blocks of a large file that travel in one record, and runs of them that may have changed.
pub(super) struct Span {
    pub(super) blocks: Range<u64>,
    changed: Vec<Range<u64>>,
}

/// Cuts runs of blocks, which follow each other, into spans of at most `each`.
pub(super) fn spans(runs: &[Range<u64>], each: u64) -> impl Iterator<Item = Span> {
    let mut runs = runs
        .iter()
        .filter(|run| !run.is_empty())
        .cloned()
        .peekable();
    std::iter::from_fn(move || {
        let first = runs.peek()?.start;
        let (mut past, mut changed) = (first, Vec::new());
        while let Some(run) = runs.peek_mut()
            && run.start < first + each
        {
            past = run.end.min(first + each);
            changed.push(run.start..past);
            run.start = past;
            if run.is_empty() {
                runs.next();
            }
        }
        let blocks = first..past;
        Some(Span { blocks, changed })
    })
}

/// A span whose changed blocks are read straight into its record.
pub(super) struct Piece {
    file: Arc<Large>,
    first: u64,
    offset: u64,
    /// Bytes of its blocks.
    length: usize,
    /// Runs of blocks that are read.
    reads: Vec<Range<u64>>,
    /// A record with room for the descriptors, followed by room for the bytes of the blocks if any are read.
    record: Record,
    descriptors: usize,
    data: usize,
    blocks: Vec<(Signature, Fate)>,
    /// Blocks that stay as they came before, because the disk does not give up all of them now.
    kept: HashMap<u64, Signature>,
}

impl Piece {
    /// Where the bytes of a run of blocks belong, counted from the first block's.
    fn place(&self, block_size: BlockSize, run: &Range<u64>) -> Range<usize> {
        // At most 1 MiB by construction.
        let at = |block: u64| {
            usize::try_from((block - self.first) * block_size.bytes()).unwrap_or(DATA_CAP)
        };
        at(run.start)..at(run.end).min(self.length)
    }

    /// Whether an answer names a block that was offered as one that the target has.
    pub(super) fn finds(&self, answer: &Held) -> bool {
        let mut places = self.blocks.iter().zip(0..);
        places.any(|((_, fate), place)| *fate == Fate::Data && answer.has(place))
    }
}

impl Reading<'_, '_> {
    /// Reads some pieces of a file at once, each at most a record full, and sends or offers what differs.
    pub(super) fn read_pieces(
        &self,
        engine: &mut dyn Engine,
        large: &Arc<Large>,
        spans: Vec<Span>,
    ) -> Result<Vec<Waiting>, SourceError> {
        let mut pieces: Vec<Piece> = spans
            .iter()
            .map(|span| self.begin_piece(large, span))
            .collect();
        let bad = self.fill(engine, large, &mut pieces)?;
        let mut waiting = Vec::new();
        for (piece, span) in pieces.into_iter().zip(spans) {
            if bad.contains(&piece.first) {
                self.defer(Unit::Pieces(Arc::clone(large), vec![span]));
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
        span: &Span,
    ) -> Result<Option<Waiting>, SourceError> {
        let mut piece = self.begin_piece(large, span);
        for run in piece.reads.clone() {
            let part = piece.place(self.source.block_size, &run);
            let offset = piece.offset + part.start as u64;
            let bytes = &mut piece.record[piece.data..][part];
            bytes.fill(0);
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
        self.finish_piece(piece)
    }

    /// A piece without its bytes.
    fn begin_piece(&self, large: &Arc<Large>, span: &Span) -> Piece {
        let block_size = self.source.block_size;
        let (first, count) = (span.blocks.start, span.blocks.end - span.blocks.start);
        let length_of = |at: u64| block_size.length_of(large.size, at);
        let held = |index: u64| large.held.get(usize::try_from(index).ok()?);
        // What need not be read costs the disk nothing, and is no part of the estimate.
        let is_read = |block: &u64| {
            let (offset, length) = (block * block_size.bytes(), length_of(*block) as u64);
            !large.skips(*block) && !large.holes.covers(offset, length)
        };
        let wanted: Vec<u64> = span
            .changed
            .iter()
            .cloned()
            .flatten()
            .filter(is_read)
            .collect();
        let runs = wanted.chunk_by(|one, next| one + 1 == *next);
        let reads: Vec<Range<u64>> = runs.map(|run| run[0]..run[0] + run.len() as u64).collect();
        // Of blocks that are read this is not the last word.
        let mut blocks: Vec<(Signature, Fate)> = span
            .blocks
            .clone()
            .map(|index| (held(index).copied().unwrap_or(ZERO), Fate::Kept))
            .collect();
        let mut marks = lock(&large.marks);
        for index in span.changed.iter().cloned().flatten() {
            blocks[(index - first) as usize] = (ZERO, fate(&ZERO, held(index)));
            marks.set(index, None);
        }
        drop(marks);
        let (head, descriptors) = head(large, first, count);
        let length: usize = span.blocks.clone().map(length_of).sum();
        let offset = first * block_size.bytes();
        // Direct reads are of whole sectors.
        let room = if reads.is_empty() {
            0
        } else {
            length.next_multiple_of(ALIGNMENT)
        };
        Piece {
            file: Arc::clone(large),
            first,
            offset,
            length,
            reads,
            record: Record::with_room(&self.source.outlet.slots, &head, room),
            descriptors,
            data: head.len(),
            blocks,
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
        for piece in pieces {
            let runs: Vec<Range<usize>> = piece
                .reads
                .iter()
                .map(|run| piece.place(self.source.block_size, run))
                .collect();
            let mut memory = piece.record.get_mut(piece.data..).unwrap_or_default();
            let mut at = 0;
            for place in runs {
                let (offset, length) = (piece.offset + place.start as u64, place.len());
                let cached = || is_cached(large.file.as_fd(), offset, length as u64);
                let past = large.direct.as_ref().filter(|_| large.device || !cached());
                // The file's end cuts the last sector of a direct read short.
                let whole = length.next_multiple_of(ALIGNMENT);
                let (_, rest) = memory.split_at_mut(place.start - at);
                let (buffer, rest) = rest.split_at_mut(whole);
                (memory, at) = (rest, place.start + whole);
                places.push((piece.first, length, past.is_some()));
                reads.push(Read {
                    file: past.unwrap_or(&large.file).as_fd(),
                    offset,
                    buffer: if past.is_some() {
                        buffer
                    } else {
                        &mut buffer[..length]
                    },
                    length,
                    once: past.is_none(),
                    done: Ok(0),
                });
            }
        }
        engine.read(&mut reads);
        let (mut bad, mut good) = (Vec::new(), Vec::new());
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
            good.push((first, done as u64));
        }
        // What belongs to a bad one is read again.
        let good = good.iter().filter(|(first, _)| !bad.contains(first));
        let total = good.map(|(_, done)| done).sum();
        self.source.progress.read(total);
        add(&self.tally.bytes_read, total);
        Ok(bad)
    }

    /// Signs the blocks of a piece and sends what differs, or offers it first.
    fn finish_piece(&self, mut piece: Piece) -> Result<Option<Waiting>, SourceError> {
        let held = |index: u64| {
            let index = usize::try_from(index).ok();
            index.and_then(|index| piece.file.held.get(index))
        };
        for index in piece.reads.iter().cloned().flatten() {
            let place = piece.place(self.source.block_size, &(index..index + 1));
            let bytes = &piece.record[piece.data..][place];
            let signature = if let Some(kept) = piece.kept.get(&index) {
                *kept
            } else {
                sign::signature(self.source.key, bytes)
            };
            let mut fate = fate(&signature, held(index));
            let marks = self.mark(&piece, index, &signature, bytes);
            if let (Fate::Data, Some(now)) = (fate, &marks)
                && let Some(pages) = self.pages(&piece, index, held(index), now)
            {
                fate = Fate::Pages(pages);
            }
            lock(&piece.file.marks).set(index, marks);
            piece.blocks[(index - piece.first) as usize] = (signature, fate);
        }
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

    /// Marks of a block's pages, if it may come in pages next time.
    fn mark(
        &self,
        piece: &Piece,
        index: u64,
        signature: &Signature,
        bytes: &[u8],
    ) -> Option<Marks> {
        let is_whole = bytes.len() as u64 == self.source.block_size.bytes();
        let is_read = *signature != ZERO && !piece.kept.contains_key(&index);
        (is_whole && is_read).then(|| self.source.marker.marks(bytes))
    }

    /// Pages of a block that changed since the target got it, if sending these is less than sending all.
    fn pages(
        &self,
        piece: &Piece,
        index: u64,
        held: Option<&Signature>,
        now: &Marks,
    ) -> Option<Pages> {
        held.filter(|held| **held != ZERO)?;
        let before = piece.file.marks_before.as_ref()?.get(index)?;
        let changed = pages::changed(before, now);
        (1..=PAGES_CAP)
            .contains(&changed.count_ones())
            .then_some(changed)
    }

    fn offer_piece(&self, piece: &Piece) -> Result<u64, SourceError> {
        let (mut record, descriptors) = head(&piece.file, piece.first, piece.blocks.len() as u64);
        for (at, (signature, fate)) in (descriptors..).step_by(DESCRIPTOR_LEN).zip(&piece.blocks) {
            let block = match fate {
                Fate::Data => Block::Offered(*signature),
                Fate::Pages(_) => Block::Same,
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
            reads,
            mut record,
            descriptors,
            data,
            blocks,
            ..
        } = piece;
        let (mut from, mut to) = (data, data);
        let mut differs = false;
        let is_hollow = reads.is_empty();
        for ((index, (signature, fate)), place) in (first..).zip(&blocks).zip(0..) {
            let length = self.source.block_size.length_of(file.size, index);
            let start = from;
            from += if is_hollow { 0 } else { length };
            // Pages are not offered; their block is said to stay as it is until they come.
            let found = answer.has(place) && !matches!(fate, Fate::Pages(_));
            let parts: Vec<Range<usize>> = match fate {
                Fate::Data if !found => std::iter::once(0..length).collect(),
                Fate::Pages(changed) => pages::ranges(*changed, length).collect(),
                _ => Vec::new(),
            };
            let moved = to;
            for part in parts {
                let bytes = start + part.start..start + part.end;
                to += bytes.len();
                if to != bytes.end {
                    record.copy_within(bytes.clone(), to - bytes.len());
                }
            }
            let block = fate.block(*signature, &record[moved..to]);
            if *fate != Fate::Kept {
                self.count(block, found);
            }
            let block = if found { Block::Same } else { block };
            let at = descriptors + place * DESCRIPTOR_LEN;
            let descriptor = payload::descriptor(block);
            differs |= block != Block::Same;
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
        let marks = std::mem::take(&mut *lock(&large.marks));
        self.tally.keep_marks(&large.path, Arc::new(marks));
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
