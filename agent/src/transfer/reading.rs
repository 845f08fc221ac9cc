//! Reading files side by side: small ones in batches, large ones in pieces, straight into records.
//!
//! Invariants: a signature describes exactly the bytes that went into the record; a file that vanishes
//! or changes while it is read is told apart from one that did not; what a disk does not give up waits for
//! the end ([`super::deferred`]). Blocks may be offered to the target
//! before they are sent; a thread then goes on with other work until the answer is there.

use super::engine::{Engine, Read, engine};
use super::frame::{DATA_CAP, HEADER_LEN};
use super::link::LinkError;
use super::message::Held;
use super::payload::{self, Block, PayloadKind};
use super::pieces::{self, Large, Piece};
use super::queue::{Queue, lock};
use super::source::{Source, SourceError, Tally, add};
use super::uring::is_cached;
use crate::model::ids::Signature;
use crate::volume::aligned::{ALIGNMENT, Aligned, open_direct, set_direct};
use crate::volume::block_map;
use crate::volume::change::{Baseline, Step};
use crate::volume::one::{One, stat_of};
use crate::volume::salvage::is_media_error;
use crate::volume::scan::{self, Holes};
use crate::volume::sign::{self, ZERO};
use crate::volume::unused;
use crate::volume::walk::{self, Found, WalkError, bare_entry, kind_of};
use crate::volume::{Confined, Entry, Kind};
use nix::sys::stat::{FileStat, SFlag};
use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex};

/// A file up to this size travels whole in one record, with others.
const SMALL_CAP: u64 = DATA_CAP as u64;
/// Small files read in one batch.
const BATCH_FILES: usize = 256;
/// Records, at most a megabyte each, that a thread keeps while their offers are not answered: with four
/// threads enough to fill 1 GB/s over a round trip of 30 ms.
const UNANSWERED_CAP: usize = 8;
/// Threads that read, for each worker: while one waits for the disk, another signs and seals.
const READERS: usize = 2;
/// Attributes up to this size, all together, do not keep a file from being offered.
const OFFERED_ATTRIBUTES: usize = 1024;

/// Bytes of records that the threads of an epoch hold at most before a link has them.
pub(super) fn held_by_readers(workers: usize) -> usize {
    let records = pieces::TOGETHER as usize + UNANSWERED_CAP;
    workers.max(1) * READERS * records * DATA_CAP
}

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
        deferred: Mutex::default(),
    };
    std::thread::scope(|scope| {
        for _ in 0..source.options.workers.max(1) * READERS {
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
    reading.read_deferred()?;
    let outcomes = std::mem::take(&mut *lock(&reading.outcomes));
    Ok(outcomes)
}

/// One piece of reading work.
pub(super) enum Unit<'s> {
    /// Small files: their steps' indices.
    Small(Vec<(usize, &'s Found)>),
    /// Blocks of a large file.
    Pieces(Arc<Large>, Range<u64>),
}

/// What was offered and waits for the target's answer.
pub(super) enum Waiting {
    Files(u64, OfferedFiles),
    Piece(u64, Piece),
}

impl Waiting {
    fn number(&self) -> u64 {
        let (Self::Files(number, _) | Self::Piece(number, _)) = self;
        *number
    }
}

/// Small files as they were offered, with their bytes.
#[derive(Default)]
pub(super) struct OfferedFiles {
    files: Vec<(Entry, Vec<Fate>, Range<usize>)>,
    bytes: Vec<u8>,
}

/// How a block travels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    Same,
    Zero,
    Data,
}

/// What the reading threads share.
pub(super) struct Reading<'a, 's> {
    pub(super) source: &'a Source<'a>,
    pub(super) root: &'a Confined,
    baseline: Baseline,
    queue: Queue<Unit<'s>>,
    pub(super) outcomes: Mutex<Outcomes>,
    pub(super) tally: &'a Tally,
    failed: Mutex<Option<SourceError>>,
    /// What the disk did not give up at once.
    pub(super) deferred: Mutex<Vec<Unit<'s>>>,
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
        let mut small: Vec<(usize, &Found)> = files(steps)
            .filter(|(_, found)| !is_large(&found.stat))
            .collect();
        // In the order in which they were made most lie side by side on the disk, which then is asked for less
        // often.
        small.sort_unstable_by_key(|(_, found)| (found.stat.st_dev, found.stat.st_ino));
        for (step, found) in small {
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
        let unused = self.unused(&file, size);
        let previous = self.source.held.previous();
        let changed =
            previous.and_then(|state| state.changed_blocks(&found.path, size, unused.as_deref()));
        let held = self.source.held.blocks(&found.path).into_owned();
        let mut blocks = match &changed {
            // What did not change is as it was sent last.
            Some(_) => held.clone(),
            None => Vec::new(),
        };
        blocks.resize(usize::try_from(total).unwrap_or(0), ZERO);
        let runs = changed.unwrap_or_else(|| std::iter::once(0..total).collect());
        let pieces = runs.iter().map(|run| (run.end - run.start).div_ceil(each));
        let left = pieces.sum();
        let large = Arc::new(Large {
            step,
            path: found.path.clone(),
            direct: open_direct(&file),
            file,
            stat,
            size,
            device: self.root.one().is_some_and(One::is_device),
            holes,
            unused,
            held,
            blocks: Mutex::new(blocks),
            left: AtomicU64::new(left),
        });
        if left == 0 {
            self.complete(&large)?;
        }
        let bad = self.known_bad(&found.path);
        for run in runs {
            let mut first = run.start;
            while first < run.end {
                let past = run.end.min(first + each * pieces::TOGETHER);
                let is_bad = |blocks: &Range<u64>| {
                    let bytes = blocks.start * block_size.bytes()..blocks.end * block_size.bytes();
                    bad.iter()
                        .any(|bad| bad.start < bytes.end && bytes.start < bad.end)
                };
                let together = first..past;
                let units: Vec<Range<u64>> = if is_bad(&together) {
                    let firsts = together.step_by(usize::try_from(each).unwrap_or(1));
                    firsts.map(|at| at..past.min(at + each)).collect()
                } else {
                    vec![together]
                };
                for blocks in units {
                    let bad = is_bad(&blocks);
                    let unit = Unit::Pieces(Arc::clone(&large), blocks);
                    if bad {
                        self.defer(unit);
                    } else if self.queue.push(unit).is_err() {
                        return Ok(false);
                    }
                }
                first = past;
            }
        }
        Ok(true)
    }

    /// What the file system of a volume of one piece does not use.
    fn unused(&self, file: &File, size: u64) -> Option<Arc<unused::Map>> {
        self.root.one()?;
        let (root, frozen) = (self.root.path(), self.source.frozen);
        let found = unused::of_file(root, file, size, self.source.block_size, frozen);
        let map = found.unwrap_or_else(|(file_system, doubt)| {
            let volume = &self.source.volume.name;
            tracing::info!(
                volume,
                "what its {file_system} does not use is sent too: {doubt}"
            );
            None
        });
        let map = map.map(Arc::new);
        lock(&self.tally.unused).clone_from(&map);
        map
    }

    fn work(&self) {
        let mut engine = match engine(self.source.options.engine) {
            Ok(engine) => engine,
            Err(error) => return self.fail(LinkError::Local(error.to_string()).into()),
        };
        let mut plain = Aligned::default();
        let mut waiting = VecDeque::new();
        while let Some(unit) = self.queue.take() {
            let result = match unit {
                Unit::Small(files) => self
                    .read_small(engine.as_mut(), &files, &mut plain)
                    .map(Vec::from_iter),
                Unit::Pieces(file, blocks) => self.read_pieces(engine.as_mut(), &file, blocks),
            };
            self.queue.done();
            let settled = result.and_then(|offered| {
                waiting.extend(offered);
                self.settle(&mut waiting, UNANSWERED_CAP)
            });
            if let Err(error) = settled {
                self.fail(error);
            }
            if lock(&self.failed).is_some() {
                return;
            }
        }
        if let Err(error) = self.settle(&mut waiting, 0) {
            self.fail(error);
        }
    }

    /// Sends what the target lacks of that which was offered and answered; waits for answers until at most
    /// `cap` are missing.
    pub(super) fn settle(
        &self,
        waiting: &mut VecDeque<Waiting>,
        cap: usize,
    ) -> Result<(), SourceError> {
        let outlet = self.source.outlet;
        while let Some(first) = waiting.front() {
            let number = first.number();
            if waiting.len() <= cap && !outlet.is_answered(number) {
                break;
            }
            let answer = outlet.answer(number)?;
            match waiting.pop_front() {
                Some(Waiting::Files(_, offered)) => self.send_lacking(&offered, &answer)?,
                Some(Waiting::Piece(_, piece)) => self.send_piece(piece, &answer)?,
                None => {}
            }
        }
        Ok(())
    }

    /// Reads a batch of small files and sends those that differ in one record, or offers them first.
    fn read_small(
        &self,
        engine: &mut dyn Engine,
        files: &[(usize, &'s Found)],
        plain: &mut Aligned,
    ) -> Result<Option<Waiting>, SourceError> {
        let local = |path| self.root.local(path).unwrap_or(path);
        let paths: Vec<&[u8]> = files.iter().map(|(_, found)| local(&*found.path)).collect();
        let opened = engine.open_files(self.root.fd(), &paths);
        let mut ready = Vec::with_capacity(files.len());
        let mut total = 0;
        for ((step, found), fd) in files.iter().zip(opened) {
            let stat = fd.and_then(|fd| stat_of(self.root, &fd).map(|stat| (fd, stat)));
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
        let padded: usize = ready
            .iter()
            .map(|one| one.4.next_multiple_of(ALIGNMENT))
            .sum();
        let scratch = plain.space(padded);
        let mut rest = &mut *scratch;
        let mut reads: Vec<Read<'_>> = Vec::with_capacity(ready.len());
        for (_, _, file, _, length) in &ready {
            let size = length.next_multiple_of(ALIGNMENT);
            let (buffer, tail) = std::mem::take(&mut rest).split_at_mut(size);
            rest = tail;
            // What is not in the page cache need not go through it.
            let direct = *length > 0
                && self.root.one().is_none()
                && !is_cached(file.as_fd(), 0, *length as u64)
                && set_direct(file, true);
            reads.push(Read {
                file: file.as_fd(),
                offset: 0,
                buffer: if direct {
                    buffer
                } else {
                    &mut buffer[..*length]
                },
                length: *length,
                once: false,
                done: Ok(0),
            });
        }
        engine.read(&mut reads);
        for (read, (_, _, file, ..)) in reads.iter_mut().zip(&ready) {
            let refused = |error: &io::Error| error.raw_os_error() == Some(libc::EINVAL);
            // A disk with larger sectors than 4096 bytes, or a file system that says no only now.
            if read.done.as_ref().is_err_and(refused) && set_direct(file, false) {
                engine.read(std::slice::from_mut(read));
            }
        }
        let mut lengths = Vec::with_capacity(ready.len());
        for (read, (step, found, ..)) in reads.into_iter().zip(&ready) {
            lengths.push(match read.done {
                Err(error) if is_media_error(&error) => {
                    self.defer(Unit::Small(vec![(*step, *found)]));
                    None
                }
                done => {
                    let done =
                        done.map_err(|e| WalkError::new(self.root, "read", &found.path, e))?;
                    Some(done.min(read.length))
                }
            });
        }
        self.source.progress.read(total as u64);
        add(&self.tally.bytes_read, total as u64);
        let mut record = payload::start(self.source.outlet.buffer(), PayloadKind::Files);
        // What a batch may come to, so that nothing is moved while the record grows.
        record.reserve(total + ready.len() * 256);
        let mut outcomes = Vec::with_capacity(ready.len());
        let empty = record.len();
        let offering = self.source.outlet.offers.is_due();
        let mut offered = OfferedFiles::default();
        let mut at = 0;
        for ((step, found, file, stat, length), read) in ready.into_iter().zip(lengths) {
            let start = at;
            at += length.next_multiple_of(ALIGNMENT);
            let Some(read) = read else {
                continue;
            };
            let bytes = &scratch[start..start + read];
            let entry = self.small_entry(&found.path, &file, &stat, bytes)?;
            if self.source.differs(&entry) {
                add(&self.tally.changed_entries, 1);
                let fates = self.fates(&entry);
                if self.is_offerable(&entry, &fates) && (self.repeats(&entry, &fates) || offering) {
                    let start = offered.bytes.len();
                    offered.bytes.extend_from_slice(bytes);
                    let range = start..offered.bytes.len();
                    offered.files.push((entry.clone(), fates, range));
                } else {
                    self.put_small(&mut record, &entry, &fates, bytes)?;
                }
            }
            outcomes.push((step, Some(entry)));
        }
        lock(&self.outcomes).extend(outcomes);
        if record.len() > empty {
            self.source.outlet.emit(record, false, 0)?;
        }
        if offered.files.is_empty() {
            return Ok(None);
        }
        let number = self.offer_files(&offered)?;
        Ok(Some(Waiting::Files(number, offered)))
    }

    /// Offers small files: blocks that are worth a question by signature, shorter ones as they are.
    fn offer_files(&self, offered: &OfferedFiles) -> Result<u64, SourceError> {
        let mut record = payload::start(self.source.outlet.buffer(), PayloadKind::Files);
        for (entry, fates, range) in &offered.files {
            let blocks = self.blocks(entry, fates, &offered.bytes[range.clone()]);
            let named: Vec<Block<'_>> = blocks
                .map(|block| match block {
                    Block::Data(signature, bytes) if bytes.len() >= block_map::LEAST => {
                        Block::Offered(signature)
                    }
                    other => other,
                })
                .collect();
            payload::put_file(&mut record, entry, &named);
        }
        Ok(self.source.outlet.offer(record, 0)?)
    }

    /// Sends those of the offered files that the target could not make of what it holds.
    fn send_lacking(&self, offered: &OfferedFiles, answer: &Held) -> Result<(), SourceError> {
        let mut record = payload::start(self.source.outlet.buffer(), PayloadKind::Files);
        let empty = record.len();
        let mut first = 0;
        for (entry, fates, range) in &offered.files {
            let blocks = first..first + fates.len();
            first = blocks.end;
            let bytes = &offered.bytes[range.clone()];
            if blocks.into_iter().all(|position| answer.has(position)) {
                for block in self.blocks(entry, fates, bytes) {
                    self.count(block, true);
                }
            } else {
                self.put_small(&mut record, entry, fates, bytes)?;
            }
        }
        if record.len() > empty {
            self.source.outlet.emit(record, false, 0)?;
        }
        Ok(())
    }

    fn repeats(&self, entry: &Entry, fates: &[Fate]) -> bool {
        let Kind::File { blocks, .. } = &entry.kind else {
            return false;
        };
        let pairs = blocks.iter().zip(fates);
        let data = pairs.filter(|(_, fate)| **fate == Fate::Data);
        let offers = &self.source.outlet.offers;
        offers.repeat(data.map(|(signature, _)| signature))
    }

    /// Whether a small file is worth a question.
    fn is_offerable(&self, entry: &Entry, fates: &[Fate]) -> bool {
        let lengths = (0..).map(|index| self.source.block_size.length_of(entry.size(), index));
        let attributes: usize = entry.xattrs.iter().map(|one| one.value.len()).sum();
        attributes <= OFFERED_ATTRIBUTES
            && fates
                .iter()
                .zip(lengths)
                .any(|(fate, length)| *fate == Fate::Data && length >= block_map::LEAST)
    }

    pub(super) fn vanish(&self, step: usize, path: &[u8]) -> Result<(), SourceError> {
        self.source.frozen_change(path)?;
        lock(&self.outcomes).insert(step, None);
        Ok(())
    }

    pub(super) fn small_entry(
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
    pub(super) fn entry(
        &self,
        path: &[u8],
        file: &File,
        before: &FileStat,
        size: u64,
        blocks: Vec<Signature>,
    ) -> Result<Entry, SourceError> {
        let failed = |action, source: io::Error| WalkError::new(self.root, action, path, source);
        let xattrs = walk::read_xattrs(self.root, path, file)?;
        let after = stat_of(self.root, file).map_err(|e| failed("stat", e.into()))?;
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

    /// Appends a small file with the blocks that travel.
    pub(super) fn put_small(
        &self,
        record: &mut Vec<u8>,
        entry: &Entry,
        fates: &[Fate],
        bytes: &[u8],
    ) -> Result<(), SourceError> {
        let blocks: Vec<Block<'_>> = self.blocks(entry, fates, bytes).collect();
        for block in &blocks {
            self.count(*block, false);
        }
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

    /// How each block of a file travels.
    pub(super) fn fates(&self, entry: &Entry) -> Vec<Fate> {
        let Kind::File { blocks, .. } = &entry.kind else {
            return Vec::new();
        };
        let held = self.source.held.blocks(&entry.path);
        let held = held.iter().map(Some).chain(std::iter::repeat(None));
        let pairs = blocks.iter().zip(held);
        pairs.map(|(block, held)| fate(block, held)).collect()
    }

    /// The blocks of a small file.
    fn blocks<'b>(
        &self,
        entry: &'b Entry,
        fates: &'b [Fate],
        bytes: &'b [u8],
    ) -> impl Iterator<Item = Block<'b>> + use<'b> {
        let size = usize::try_from(self.source.block_size.bytes()).unwrap_or(DATA_CAP);
        let signatures: &[Signature] = match &entry.kind {
            Kind::File { blocks, .. } => blocks,
            _ => &[],
        };
        let parts = fates.iter().zip(signatures).zip(bytes.chunks(size));
        parts.map(|((fate, signature), bytes)| fate.block(*signature, bytes))
    }

    /// Counts how a block travelled; `found` when the target took it from elsewhere.
    pub(super) fn count(&self, block: Block<'_>, found: bool) {
        match block {
            Block::Same => add(&self.tally.unchanged_blocks, 1),
            Block::Zero => add(&self.tally.zero_blocks, 1),
            Block::Data(..) if found => add(&self.tally.held_blocks, 1),
            Block::Data(_, bytes) => {
                add(&self.tally.blocks_sent, 1);
                add(&self.tally.changeset, bytes.len() as u64);
            }
            Block::Offered(_) | Block::Found(..) => {}
        }
    }
}

impl Fate {
    pub(super) fn block(self, signature: Signature, bytes: &[u8]) -> Block<'_> {
        match self {
            Self::Same => Block::Same,
            Self::Zero => Block::Zero,
            Self::Data => Block::Data(signature, bytes),
        }
    }
}

/// How a block travels to a target that has `held` in its place.
pub(super) fn fate(signature: &Signature, held: Option<&Signature>) -> Fate {
    if held == Some(signature) {
        Fate::Same
    } else if *signature == ZERO {
        Fate::Zero
    } else {
        Fate::Data
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
