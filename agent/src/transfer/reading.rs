//! Reading files side by side: small ones in batches, large ones in pieces, straight into records.
//!
//! Invariants: a signature describes exactly the bytes that went into the record; a file that vanishes
//! or changes while it is read is told apart from one that did not.

use super::engine::{Engine, Read, engine};
use super::frame::{DATA_CAP, HEADER_LEN};
use super::link::LinkError;
use super::payload::{self, Block, DESCRIPTOR_LEN, PayloadKind};
use super::queue::{Queue, lock};
use super::source::{Source, SourceError, Tally, add};
use crate::model::ids::Signature;
use crate::volume::change::{Baseline, Step};
use crate::volume::scan::{self, Holes};
use crate::volume::sign::{self, ZERO};
use crate::volume::walk::{self, Found, WalkError, bare_entry, kind_of};
use crate::volume::{Confined, Entry, Kind};
use nix::sys::stat::{FileStat, SFlag, fstat};
use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

/// A file up to this size travels whole in one record, with others.
const SMALL_CAP: u64 = DATA_CAP as u64;
/// Small files read in one batch.
const BATCH_FILES: usize = 256;

/// What became of each file, by its step: none when it vanished.
pub(super) type Outcomes = HashMap<usize, Option<Entry>>;

/// Reads all files of an epoch and sends what differs.
pub(super) fn send_files(
    source: &Source<'_>,
    root: &Confined,
    baseline: Baseline,
    steps: &[Step],
    tally: &Tally,
) -> Result<Outcomes, SourceError> {
    let reading = Reading {
        source,
        root,
        baseline,
        queue: Queue::new(8),
        outcomes: Mutex::default(),
        tally,
        failed: Mutex::default(),
    };
    std::thread::scope(|scope| {
        for _ in 0..source.options.workers.max(1) {
            scope.spawn(|| reading.work());
        }
        if let Err(error) = reading.hand_out(steps) {
            reading.fail(error);
        }
        reading.queue.close();
    });
    if let Some(error) = lock(&reading.failed).take() {
        return Err(error);
    }
    let outcomes = std::mem::take(&mut *lock(&reading.outcomes));
    Ok(outcomes)
}

/// One piece of reading work.
enum Unit<'s> {
    /// Small files: their steps' indices.
    Small(Vec<(usize, &'s Found)>),
    /// Blocks of a large file, from `first`.
    Piece {
        file: Arc<Large>,
        first: u64,
        count: u32,
    },
}

/// A large file while its pieces are read.
struct Large {
    step: usize,
    path: Box<[u8]>,
    file: File,
    stat: FileStat,
    size: u64,
    holes: Holes,
    blocks: Mutex<Vec<Signature>>,
    /// Pieces not yet read.
    left: AtomicU64,
}

/// What the reading threads share.
struct Reading<'a, 's> {
    source: &'a Source<'a>,
    root: &'a Confined,
    baseline: Baseline,
    queue: Queue<Unit<'s>>,
    outcomes: Mutex<Outcomes>,
    tally: &'a Tally,
    failed: Mutex<Option<SourceError>>,
}

impl<'s> Reading<'_, 's> {
    fn fail(&self, error: SourceError) {
        lock(&self.failed).get_or_insert(error);
        self.queue.close();
    }

    fn hand_out(&self, steps: &'s [Step]) -> Result<(), SourceError> {
        let mut batch = Vec::new();
        let mut bytes = 0;
        // Large files first, so that the threads do not end on one long file.
        for (step, found) in files(steps).filter(|(_, found)| is_large(&found.stat)) {
            if !self.hand_out_large(step, found)? {
                return Ok(());
            }
        }
        for (step, found) in files(steps).filter(|(_, found)| !is_large(&found.stat)) {
            let size = size_of(&found.stat);
            if !batch.is_empty() && (bytes + size > SMALL_CAP || batch.len() == BATCH_FILES) {
                bytes = 0;
                if self
                    .queue
                    .push(Unit::Small(std::mem::take(&mut batch)))
                    .is_err()
                {
                    return Ok(());
                }
            }
            bytes += size;
            batch.push((step, found));
        }
        if !batch.is_empty() {
            // A closed queue means that another thread failed and said why.
            let _ = self.queue.push(Unit::Small(batch));
        }
        Ok(())
    }

    /// Cuts a large file into pieces; false when another thread failed.
    fn hand_out_large(&self, step: usize, found: &Found) -> Result<bool, SourceError> {
        let opened = scan::open_file(self.root, &found.path);
        let (file, stat) = match opened {
            Err(error) if error.vanished() => {
                self.source.frozen_change(&found.path)?;
                lock(&self.outcomes).insert(step, None);
                return Ok(true);
            }
            other => other?,
        };
        let holes = Holes::of(&file, &stat)
            .map_err(|e| WalkError::new(self.root, "find the holes of", &found.path, e))?;
        let block_size = self.source.block_size;
        let size = size_of(&stat);
        let total = block_size.blocks_of(size);
        let each = DATA_CAP as u64 / block_size.bytes();
        let large = Arc::new(Large {
            step,
            path: found.path.clone(),
            file,
            stat,
            size,
            holes,
            blocks: Mutex::new(vec![ZERO; usize::try_from(total).unwrap_or(0)]),
            left: AtomicU64::new(total.div_ceil(each)),
        });
        if total == 0 {
            self.complete(&large)?;
        }
        let mut first = 0;
        while first < total {
            let count = each.min(total - first);
            let unit = Unit::Piece {
                file: Arc::clone(&large),
                first,
                count: u32::try_from(count).unwrap_or(1),
            };
            if self.queue.push(unit).is_err() {
                return Ok(false);
            }
            first += count;
        }
        Ok(true)
    }

    fn work(&self) {
        let mut engine = match engine(self.source.options.engine) {
            Ok(engine) => engine,
            Err(error) => return self.fail(LinkError::Local(error.to_string()).into()),
        };
        let mut scratch = Vec::new();
        while let Some(unit) = self.queue.take() {
            let result = match unit {
                Unit::Small(files) => self.read_small(engine.as_mut(), &files, &mut scratch),
                Unit::Piece { file, first, count } => {
                    self.read_piece(engine.as_mut(), &file, first, count)
                }
            };
            self.queue.done();
            if let Err(error) = result {
                self.fail(error);
            }
            if lock(&self.failed).is_some() {
                return;
            }
        }
    }

    /// Reads a batch of small files and sends those that differ in one record.
    fn read_small(
        &self,
        engine: &mut dyn Engine,
        files: &[(usize, &Found)],
        scratch: &mut Vec<u8>,
    ) -> Result<(), SourceError> {
        let paths: Vec<&[u8]> = files.iter().map(|(_, found)| &*found.path).collect();
        let opened = engine.open_files(self.root.fd(), &paths);
        let mut ready = Vec::with_capacity(files.len());
        let mut total = 0;
        for ((step, found), fd) in files.iter().zip(opened) {
            let stat = fd.and_then(|fd| fstat(fd.as_fd()).map(|stat| (fd, stat)));
            match stat {
                Ok((fd, stat)) if kind_of(&stat) == SFlag::S_IFREG => {
                    // A file that outgrew its batch is read up to the size it was found with, and
                    // again in the next epoch.
                    let size = size_of(&stat).min(size_of(&found.stat));
                    let length = usize::try_from(size).unwrap_or(0);
                    ready.push((*step, *found, File::from(fd), stat, length));
                    total += length;
                }
                Ok(_) => self.vanish(*step, &found.path)?,
                Err(errno) => {
                    let error = WalkError::new(self.root, "open", &found.path, errno);
                    if !error.vanished() {
                        return Err(error.into());
                    }
                    self.vanish(*step, &found.path)?;
                }
            }
        }
        if scratch.len() < total {
            scratch.resize(total, 0);
        }
        let mut rest = &mut scratch[..total];
        let mut reads: Vec<Read<'_>> = Vec::with_capacity(ready.len());
        for (_, _, file, _, length) in &ready {
            let (buffer, tail) = std::mem::take(&mut rest).split_at_mut(*length);
            rest = tail;
            reads.push(Read {
                file: file.as_fd(),
                offset: 0,
                buffer,
                once: false,
                done: Ok(0),
            });
        }
        engine.read(&mut reads);
        let mut lengths = Vec::with_capacity(ready.len());
        for (read, (_, found, ..)) in reads.into_iter().zip(&ready) {
            let length = read
                .done
                .map_err(|e| WalkError::new(self.root, "read", &found.path, e))?;
            lengths.push(length);
        }
        self.source.progress.read(total as u64);
        add(&self.tally.bytes_read, total as u64);
        let mut record = payload::start(self.source.outlet.buffer(), PayloadKind::Files);
        let empty = record.len();
        let mut at = 0;
        for ((step, found, file, stat, length), read) in ready.into_iter().zip(lengths) {
            let bytes = &scratch[at..at + read];
            at += length;
            let entry = self.small_entry(&found.path, &file, &stat, bytes)?;
            if self.source.differs(&entry) {
                self.put_small(&mut record, &entry, bytes)?;
            }
            lock(&self.outcomes).insert(step, Some(entry));
        }
        if record.len() > empty {
            self.source.outlet.emit(record, false, 0)?;
        }
        Ok(())
    }

    fn vanish(&self, step: usize, path: &[u8]) -> Result<(), SourceError> {
        self.source.frozen_change(path)?;
        lock(&self.outcomes).insert(step, None);
        Ok(())
    }

    fn small_entry(
        &self,
        path: &[u8],
        file: &File,
        stat: &FileStat,
        bytes: &[u8],
    ) -> Result<Entry, SourceError> {
        let block = usize::try_from(self.source.block_size.bytes()).unwrap_or(DATA_CAP);
        let blocks = bytes
            .chunks(block)
            .map(|block| sign::signature(self.source.key, block))
            .collect();
        let size = bytes.len() as u64;
        self.entry(path, file, stat, size, blocks)
    }

    /// The entry of a file that was read; also finds out whether it changed meanwhile.
    fn entry(
        &self,
        path: &[u8],
        file: &File,
        before: &FileStat,
        size: u64,
        blocks: Vec<Signature>,
    ) -> Result<Entry, SourceError> {
        let failed = |action, source: io::Error| WalkError::new(self.root, action, path, source);
        let xattrs = walk::read_xattrs(self.root, path, file)?;
        let after = fstat(file.as_fd()).map_err(|e| failed("stat", e.into()))?;
        let changed = size_of(&after) != size
            || (after.st_ctime, after.st_ctime_nsec) != (before.st_ctime, before.st_ctime_nsec);
        if changed {
            self.source.frozen_change(path)?;
        }
        let racy = changed || self.baseline.is_racy(&after);
        let mut entry = bare_entry(path, before, Kind::File { size, blocks }, racy);
        entry.xattrs = xattrs;
        Ok(entry)
    }

    fn put_small(
        &self,
        record: &mut Vec<u8>,
        entry: &Entry,
        bytes: &[u8],
    ) -> Result<(), SourceError> {
        let Kind::File {
            blocks: signatures, ..
        } = &entry.kind
        else {
            return Ok(());
        };
        let block = usize::try_from(self.source.block_size.bytes()).unwrap_or(DATA_CAP);
        let held = self.source.held.blocks(&entry.path);
        let blocks: Vec<Block<'_>> = signatures
            .iter()
            .zip(bytes.chunks(block))
            .enumerate()
            .map(|(index, (signature, bytes))| self.choose(*signature, held.get(index), bytes))
            .collect();
        add(&self.tally.changed_entries, 1);
        // Large attributes can fill a record early; what is there goes first.
        if record.len() > HEADER_LEN + 1 && record.len() + bytes.len() > DATA_CAP + (64 << 10) {
            let full = std::mem::replace(
                record,
                payload::start(self.source.outlet.buffer(), PayloadKind::Files),
            );
            self.source.outlet.emit(full, false, 0)?;
        }
        payload::put_file(record, entry, &blocks);
        Ok(())
    }

    /// How a block travels.
    fn choose<'b>(
        &self,
        signature: Signature,
        held: Option<&Signature>,
        bytes: &'b [u8],
    ) -> Block<'b> {
        if held == Some(&signature) {
            add(&self.tally.unchanged_blocks, 1);
            Block::Same
        } else if signature == ZERO {
            add(&self.tally.zero_blocks, 1);
            Block::Zero
        } else {
            add(&self.tally.blocks_sent, 1);
            add(&self.tally.changeset, bytes.len() as u64);
            Block::Data(signature, bytes)
        }
    }

    /// Reads a run of blocks straight into a record and sends what differs.
    fn read_piece(
        &self,
        engine: &mut dyn Engine,
        large: &Arc<Large>,
        first: u64,
        count: u32,
    ) -> Result<(), SourceError> {
        let block_size = self.source.block_size;
        let lengths: Vec<usize> = (first..first + u64::from(count))
            .map(|index| block_size.length_of(large.size, index))
            .collect();
        let total: usize = lengths.iter().sum();
        let mut head = payload::start(Vec::new(), PayloadKind::Segment);
        let descriptors = payload::put_segment(&mut head, &large.path, large.size, first, count);
        let data = head.len();
        let mut record = self.source.outlet.buffer();
        record.resize(data + total, 0);
        record[..data].copy_from_slice(&head);

        let offset = first * block_size.bytes();
        let hollow = large.holes.covers(offset, total as u64);
        if hollow {
            record[data..].fill(0);
        } else {
            let mut reads = [Read {
                file: large.file.as_fd(),
                offset,
                buffer: &mut record[data..],
                once: true,
                done: Ok(0),
            }];
            engine.read(&mut reads);
            let [read] = reads;
            let done = read.done.map_err(|e| {
                let action = "read a block of";
                WalkError::new(self.root, action, &large.path, at_offset(&e, offset))
            })?;
            // The file shrank: the rest reads as zeros now and again in the next epoch.
            record[data + done..].fill(0);
            self.source.progress.read(done as u64);
            add(&self.tally.bytes_read, done as u64);
        }

        let held = self.source.held.blocks(&large.path);
        let mut signatures = Vec::with_capacity(lengths.len());
        let (mut from, mut to) = (data, data);
        let mut differs = false;
        for ((index, length), place) in (first..).zip(&lengths).zip(0..) {
            let signature = if hollow {
                ZERO
            } else {
                sign::signature(self.source.key, &record[from..from + length])
            };
            let held = usize::try_from(index)
                .ok()
                .and_then(|index| held.get(index));
            let block = self.choose(signature, held, &record[from..from + length]);
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
            signatures.push(signature);
        }
        record.truncate(to);
        if differs {
            self.source.outlet.emit(record, false, first)?;
        }
        let start = usize::try_from(first).unwrap_or(0);
        lock(&large.blocks)[start..start + signatures.len()].copy_from_slice(&signatures);
        if large.left.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.complete(large)?;
        }
        Ok(())
    }

    /// The last piece of a large file is done.
    fn complete(&self, large: &Large) -> Result<(), SourceError> {
        let blocks = std::mem::take(&mut *lock(&large.blocks));
        let entry = self.entry(&large.path, &large.file, &large.stat, large.size, blocks)?;
        if self.source.differs(&entry) {
            add(&self.tally.changed_entries, 1);
        }
        lock(&self.outcomes).insert(large.step, Some(entry));
        Ok(())
    }
}

fn files(steps: &[Step]) -> impl Iterator<Item = (usize, &Found)> {
    steps
        .iter()
        .enumerate()
        .filter_map(|(index, step)| match step {
            Step::File(found) => Some((index, found)),
            _ => None,
        })
}

/// Apparent size in bytes.
pub(super) fn size_of(stat: &FileStat) -> u64 {
    u64::try_from(stat.st_size).unwrap_or(0)
}

/// Whether a file has no holes.
pub(super) fn is_dense(stat: &FileStat) -> bool {
    stat.st_blocks.saturating_mul(512) >= stat.st_size
}

/// Whether a file is sent in pieces.
pub(super) fn is_large(stat: &FileStat) -> bool {
    size_of(stat) > SMALL_CAP
}

fn at_offset(error: &io::Error, offset: u64) -> io::Error {
    io::Error::new(error.kind(), format!("at offset {offset}: {error}"))
}
