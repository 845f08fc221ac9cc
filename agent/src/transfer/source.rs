//! Reading a tree into records: what changed, block by block, side by side on several threads.
//!
//! Invariants: the resulting state describes exactly the bytes that were sent or already held by the
//! target; what vanishes while being read is removed in this epoch; what changes while being read is
//! marked to be read again in the next, or is an error when the containers are frozen.

use super::engine::{Engine, Read, engine};
use super::frame::{DATA_CAP, HEADER_LEN};
use super::link::LinkError;
use super::message::Have;
use super::payload::{self, Block, DESCRIPTOR_LEN, PayloadKind};
use super::queue::{Queue, lock};
use super::sender::{Outlet, SendError, path_hash};
use super::{Options, Progress};
use crate::model::ids::{Epoch, Signature};
use crate::model::volume::VolumeSpec;
use crate::volume::change::{Baseline, Step, compare};
use crate::volume::scan::Holes;
use crate::volume::sign::{self, ZERO};
use crate::volume::tree::shown;
use crate::volume::walk::{self, Found, WalkError, bare_entry, hard_link, kind_of};
use crate::volume::{
    BlockSize, Confined, Entry, Exception, FleetKey, Kind, ScanError, TreeState, scan,
};
use nix::sys::stat::{FileStat, SFlag, fstat};
use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

/// A file up to this size travels whole in one record, with others.
const SMALL_CAP: u64 = DATA_CAP as u64;
/// Small files read in one batch.
const BATCH_FILES: usize = 256;
/// Payload from which a record of entries is sent.
const ENTRIES_FULL: usize = 192 << 10;

/// Blocks that the target already has, by path.
pub(super) enum Held<'a> {
    /// The tree of the epoch before.
    Previous(&'a TreeState),
    /// What the target found in its directory.
    Listed(HashMap<[u8; 32], Vec<Signature>>, &'a FleetKey),
}

impl<'a> Held<'a> {
    pub(super) fn list(key: &'a FleetKey, have: Vec<Have>) -> Self {
        let mut listed: HashMap<[u8; 32], Vec<Signature>> = HashMap::new();
        for piece in have {
            let blocks = listed.entry(piece.path_hash).or_default();
            // Pieces of one file follow each other; any other order only means sending more.
            if blocks.len() as u64 == piece.first {
                blocks.extend(piece.blocks);
            }
        }
        Self::Listed(listed, key)
    }

    fn previous(&self) -> Option<&'a TreeState> {
        match self {
            Self::Previous(state) => Some(state),
            Self::Listed(..) => None,
        }
    }

    fn blocks(&self, path: &[u8]) -> &[Signature] {
        match self {
            Self::Previous(state) => match state.get(path).map(|entry| &entry.kind) {
                Some(Kind::File { blocks, .. }) => blocks,
                _ => &[],
            },
            Self::Listed(listed, key) => {
                listed.get(&path_hash(key, path)).map_or(&[], Vec::as_slice)
            }
        }
    }
}

/// Counts of one epoch.
#[derive(Debug, Default)]
pub(super) struct Tally {
    pub(super) changed_entries: AtomicU64,
    pub(super) removed: AtomicU64,
    pub(super) blocks_sent: AtomicU64,
    pub(super) zero_blocks: AtomicU64,
    pub(super) unchanged_blocks: AtomicU64,
    pub(super) changeset: AtomicU64,
    pub(super) bytes_read: AtomicU64,
    pub(super) skipped: Vec<Exception>,
}

fn add(counter: &AtomicU64, count: u64) {
    counter.fetch_add(count, Ordering::Relaxed);
}

/// Why reading and sending stopped.
#[derive(Debug)]
pub(super) enum SourceError {
    Scan(ScanError),
    Link(LinkError),
    Changed(Box<[u8]>),
}

impl SourceError {
    pub(super) fn at(self, volume: &VolumeSpec, epoch: Epoch) -> SendError {
        let volume = volume.name.clone();
        match self {
            Self::Scan(source) => SendError::Read { volume, source },
            Self::Link(source) => SendError::Link {
                volume,
                epoch,
                source,
            },
            Self::Changed(path) => SendError::ChangedWhileFrozen {
                volume,
                path: shown(&path).into_owned(),
            },
        }
    }
}

impl From<LinkError> for SourceError {
    fn from(error: LinkError) -> Self {
        Self::Link(error)
    }
}

impl From<ScanError> for SourceError {
    fn from(error: ScanError) -> Self {
        Self::Scan(error)
    }
}

/// Everything needed to send one epoch of one volume.
pub(super) struct Source<'a> {
    pub(super) volume: &'a VolumeSpec,
    pub(super) key: &'a FleetKey,
    pub(super) block_size: BlockSize,
    pub(super) held: Held<'a>,
    pub(super) frozen: bool,
    pub(super) progress: &'a Progress,
    pub(super) outlet: &'a Outlet,
    pub(super) options: &'a Options,
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

/// What became of a file: none when it vanished.
type Outcomes = Mutex<HashMap<usize, Option<Entry>>>;

/// What the reading threads share.
struct Shared<'a, 's> {
    source: &'a Source<'a>,
    root: &'a Confined,
    baseline: Baseline,
    queue: Queue<Unit<'s>>,
    outcomes: Outcomes,
    tally: &'a Tally,
    failed: Mutex<Option<SourceError>>,
}

impl Source<'_> {
    /// Sends everything but the end of the epoch.
    pub(super) fn send(&self) -> Result<(TreeState, Tally), SourceError> {
        let root = walk::open_root(&self.volume.source_path)?;
        let baseline = Baseline::establish(&root)?;
        let walk = walk::walk(&root)?;
        let mut plan = compare(walk, self.held.previous());
        let mut tally = Tally {
            skipped: std::mem::take(&mut plan.skipped),
            ..Tally::default()
        };
        add(&tally.removed, plan.removed.len() as u64);
        self.send_removals(&plan.removed)?;
        let mut done = self.send_entries(&root, baseline, &plan.steps, &tally)?;
        done.extend(self.send_files(&root, baseline, &plan.steps, &tally)?);
        let vanished = self.vanished(&plan.steps, &done);
        self.send_removals(&vanished)?;
        let entries = self.finish(&plan.steps, baseline, done, &tally)?;
        tally.skipped.sort_by(|a, b| a.path.cmp(&b.path));
        Ok((TreeState::new(self.key, self.block_size, entries), tally))
    }

    fn send_removals(&self, paths: &[Box<[u8]>]) -> Result<(), SourceError> {
        let mut batch = Batch::new(self.outlet, PayloadKind::Removals);
        for path in paths {
            batch.put(|record| payload::put_removal(record, path))?;
        }
        batch.flush()
    }

    /// Directories and special files, and the start of each large file.
    fn send_entries(
        &self,
        root: &Confined,
        baseline: Baseline,
        steps: &[Step],
        tally: &Tally,
    ) -> Result<HashMap<usize, Option<Entry>>, SourceError> {
        let mut done = HashMap::new();
        let mut batch = Batch::new(self.outlet, PayloadKind::Entries);
        for (index, step) in steps.iter().enumerate() {
            add(&self.progress.entries, 1);
            match step {
                Step::Special(found) => {
                    let racy = baseline.is_racy(&found.stat);
                    let entry = match walk::special_entry(root, found, racy) {
                        Err(error) if error.vanished() && !found.path.is_empty() => {
                            self.frozen_change(&found.path)?;
                            done.insert(index, None);
                            continue;
                        }
                        other => other?,
                    };
                    if self.differs(&entry) {
                        add(&tally.changed_entries, 1);
                        batch.put(|record| payload::put_entry(record, &entry))?;
                    }
                    done.insert(index, Some(entry));
                }
                Step::File(found) if is_large(&found.stat) => {
                    let size = size_of(&found.stat);
                    batch.put(|record| payload::put_start(record, &found.path, size))?;
                }
                Step::File(_) | Step::Keep(_) | Step::Link(..) => {}
            }
        }
        batch.flush()?;
        Ok(done)
    }

    fn send_files(
        &self,
        root: &Confined,
        baseline: Baseline,
        steps: &[Step],
        tally: &Tally,
    ) -> Result<HashMap<usize, Option<Entry>>, SourceError> {
        let shared = Shared {
            source: self,
            root,
            baseline,
            queue: Queue::new(8),
            outcomes: Mutex::default(),
            tally,
            failed: Mutex::default(),
        };
        std::thread::scope(|scope| {
            for _ in 0..self.options.workers.max(1) {
                scope.spawn(|| shared.work());
            }
            if let Err(error) = shared.hand_out(steps) {
                shared.fail(error);
            }
            shared.queue.close();
        });
        if let Some(error) = lock(&shared.failed).take() {
            return Err(error);
        }
        let outcomes = std::mem::take(&mut *lock(&shared.outcomes));
        Ok(outcomes)
    }

    /// Paths that vanished and of which the target may have something.
    fn vanished(&self, steps: &[Step], done: &HashMap<usize, Option<Entry>>) -> Vec<Box<[u8]>> {
        let mut paths: Vec<Box<[u8]>> = done
            .iter()
            .filter(|(_, entry)| entry.is_none())
            .filter_map(|(&index, _)| match &steps[index] {
                Step::File(found) | Step::Special(found) => Some(found.path.clone()),
                Step::Keep(_) | Step::Link(..) => None,
            })
            .collect();
        paths.sort_unstable_by(|a, b| b.cmp(a));
        paths
    }

    /// Finishes large files and hard links and puts the new state together.
    fn finish(
        &self,
        steps: &[Step],
        baseline: Baseline,
        mut done: HashMap<usize, Option<Entry>>,
        tally: &Tally,
    ) -> Result<Vec<Entry>, SourceError> {
        let mut entries: Vec<Entry> = Vec::with_capacity(steps.len());
        let mut gone: HashSet<&[u8]> = HashSet::new();
        let mut orphans = Vec::new();
        let mut batch = Batch::new(self.outlet, PayloadKind::Finish);
        let previous = self.held.previous();
        for (index, step) in steps.iter().enumerate() {
            match step {
                Step::Keep(at) => {
                    let Some(entry) = previous.and_then(|state| state.entries.get(*at)) else {
                        continue;
                    };
                    match &entry.kind {
                        Kind::HardLink(primary) if gone.contains(&**primary) => {
                            orphans.push(entry.path.clone());
                        }
                        _ => entries.push(entry.clone()),
                    }
                }
                Step::Link(found, primary) if gone.contains(&**primary) => {
                    orphans.push(found.path.clone());
                }
                Step::Link(found, primary) => {
                    let racy = baseline.is_racy(&found.stat);
                    let entry = hard_link(&found.path, &found.stat, primary, racy);
                    add(&tally.changed_entries, 1);
                    batch.put(|record| payload::put_finish(record, &entry))?;
                    entries.push(entry);
                }
                Step::File(found) | Step::Special(found) => match done.remove(&index).flatten() {
                    Some(entry) => {
                        if matches!(step, Step::File(_)) && is_large(&found.stat) {
                            batch.put(|record| payload::put_finish(record, &entry))?;
                        }
                        entries.push(entry);
                    }
                    None => {
                        gone.insert(&found.path);
                    }
                },
            }
        }
        batch.flush()?;
        // A name whose first name vanished meanwhile is sent as a file in the next epoch.
        orphans.reverse();
        for path in &orphans {
            self.frozen_change(path)?;
        }
        self.send_removals(&orphans)?;
        Ok(entries)
    }

    fn differs(&self, entry: &Entry) -> bool {
        !self
            .held
            .previous()
            .and_then(|state| state.get(&entry.path))
            .is_some_and(|old| old.same(entry))
    }

    fn frozen_change(&self, path: &[u8]) -> Result<(), SourceError> {
        if self.frozen {
            return Err(SourceError::Changed(path.into()));
        }
        Ok(())
    }
}

impl<'s> Shared<'_, 's> {
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
        add(&self.source.progress.bytes_read, total as u64);
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
            add(&self.source.progress.bytes_read, done as u64);
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

/// Records of one barrier phase, filled and sent one after the other.
struct Batch<'a> {
    outlet: &'a Outlet,
    kind: PayloadKind,
    record: Vec<u8>,
}

impl<'a> Batch<'a> {
    fn new(outlet: &'a Outlet, kind: PayloadKind) -> Self {
        Self {
            outlet,
            kind,
            record: payload::start(Vec::new(), kind),
        }
    }

    fn put(&mut self, append: impl FnOnce(&mut Vec<u8>)) -> Result<(), SourceError> {
        append(&mut self.record);
        if self.record.len() > ENTRIES_FULL {
            self.flush()?;
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<(), SourceError> {
        if self.record.len() > HEADER_LEN + 1 {
            let next = payload::start(Vec::new(), self.kind);
            let record = std::mem::replace(&mut self.record, next);
            self.outlet.emit(record, true, 0)?;
        }
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

fn size_of(stat: &FileStat) -> u64 {
    u64::try_from(stat.st_size).unwrap_or(0)
}

fn is_large(stat: &FileStat) -> bool {
    size_of(stat) > SMALL_CAP
}

fn at_offset(error: &io::Error, offset: u64) -> io::Error {
    io::Error::new(error.kind(), format!("at offset {offset}: {error}"))
}
