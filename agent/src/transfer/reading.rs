//! Reading files side by side: small ones in batches ([`super::small`]), large ones in pieces ([`super::pieces`]).
//!
//! Invariants: a signature describes exactly the bytes that went into the record; a file that vanishes
//! or changes while it is read is told apart from one that did not; what a disk does not give up waits for
//! the end ([`super::deferred`]). Blocks may be offered to the target
//! before they are sent; a thread then goes on with other work until the answer is there.

use super::engine::engine;
use super::frame::DATA_CAP;
use super::link::LinkError;
use super::message::Held;
use super::payload::Block;
use super::pieces::{self, Large, Piece, Span, spans};
use super::queue::{OnPanic, Queue, lock};
use super::record::SLOT;
use super::small::OfferedFiles;
use super::source::{EXTENTS_CAP, Source, SourceError, Tally, add};
use crate::model::extent::Extent;
use crate::model::ids::Signature;
use crate::model::volume::ChangesBy;
use crate::telemetry::extents;
use crate::volume::aligned::{ALIGNMENT, open_direct};
use crate::volume::change::{Baseline, Step};
use crate::volume::one::{One, stat_of};
use crate::volume::pages::{FileMarks, Pages};
use crate::volume::rewritten::meet;
use crate::volume::scan::{self, Holes};
use crate::volume::sign::ZERO;
use crate::volume::state::Now;
use crate::volume::unused;
use crate::volume::walk::{self, Found, WalkError, bare_entry};
use crate::volume::{Confined, Entry, Kind};
use nix::errno::Errno;
use nix::sys::stat::FileStat;
use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::io;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, OnceLock};

/// A file up to this size travels whole in one record, with others.
const SMALL_CAP: u64 = DATA_CAP as u64;
/// Most blocks of a file, which take 2 GiB of memory: programs make longer ones of nothing but holes, and no agent can
/// keep account of these.
const BLOCKS_CAP: u64 = 64 << 20;
/// Small files read in one batch.
const BATCH_FILES: usize = 256;
/// Records, at most [`SLOT`] each, that a thread keeps while their offers are not answered: with four
/// threads enough to fill 1 GB/s over a round trip of 30 ms.
const UNANSWERED_CAP: usize = 8;
/// Threads that read, for each worker: while one waits for the disk, another signs and seals.
const READERS: usize = 2;

/// Bytes of records that the threads of an epoch hold at most before a link has them.
pub(super) fn held_by_readers(workers: usize) -> usize {
    let records = pieces::TOGETHER + UNANSWERED_CAP;
    workers.max(1) * READERS * records * SLOT
}

/// What became of each file, by its step: none when it vanished.
pub(super) type Outcomes = HashMap<usize, Option<Entry>>;

/// Reads all files of an epoch and sends what differs.
pub(super) fn send_files(
    source: &Source<'_>,
    root: &Confined,
    baseline: &Baseline,
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
    Pieces(Arc<Large>, Vec<Span>),
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

    /// Whether the target had something of what was offered. Of a piece it answers for all blocks; of small files none
    /// is there unless it is whole.
    fn pays(&self, answer: &Held) -> bool {
        match self {
            Self::Files(..) => answer.bits.iter().any(|&bits| bits != 0),
            Self::Piece(_, piece) => piece.finds(answer),
        }
    }
}

/// How a block travels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    /// As it was, which is known without reading it.
    Kept,
    Same,
    Zero,
    Data,
    /// Only those pages.
    Pages(Pages),
}

/// What the reading threads share.
pub(super) struct Reading<'a, 's> {
    pub(super) source: &'a Source<'a>,
    pub(super) root: &'a Confined,
    baseline: &'a Baseline,
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
            // Each is read to an aligned place of the batch's record.
            let size = size_of(&found.stat).next_multiple_of(ALIGNMENT as u64);
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
            Err(error) => {
                self.lose(step, found, error)?;
                return Ok(true);
            }
            Ok(opened) => opened,
        };
        let holes = Holes::of(&file, &stat)
            .map_err(|e| WalkError::new(self.root, "find the holes of", &found.path, e))?;
        let block_size = self.source.block_size;
        let size = size_of(&stat);
        let is_device = self.root.one().is_some_and(One::is_device);
        let total = block_size.blocks_of(size);
        if total > BLOCKS_CAP && !is_device {
            return Err(WalkError::new(self.root, "read", &found.path, Errno::EFBIG).into());
        }
        let each = DATA_CAP as u64 / block_size.bytes();
        let unused = self.unused(&file, size);
        let extents = self.extents(&file);
        let now = Now {
            inode: (stat.st_dev, stat.st_ino),
            size,
            extents: extents.as_deref(),
            unused: unused.as_deref(),
        };
        let previous = self.source.held.previous();
        let changed = previous.and_then(|state| state.changed_blocks(&found.path, &now));
        let held = self.source.held.blocks(&found.path).into_owned();
        let mut blocks = match &changed {
            // What did not change is as it was sent last.
            Some(_) => held.clone(),
            None => Vec::new(),
        };
        blocks.resize(usize::try_from(total).unwrap_or(0), ZERO);
        let before = previous
            .and_then(|state| state.marks.get(&found.path))
            .cloned();
        let mut marks = match &before {
            Some(before) if changed.is_some() => FileMarks::clone(before),
            _ => FileMarks::default(),
        };
        marks.truncate(total);
        let runs = changed.unwrap_or_else(|| std::iter::once(0..total).collect());
        let left = spans(&runs, each).count() as u64;
        let large = Arc::new(Large {
            step,
            path: found.path.clone(),
            direct: open_direct(&file),
            file,
            stat,
            size,
            device: is_device,
            holes,
            unused,
            held,
            extents,
            blocks: Mutex::new(blocks),
            marks_before: before,
            marks: Mutex::new(marks),
            before: OnceLock::new(),
            left: AtomicU64::new(left),
        });
        if left == 0 {
            self.complete(&large)?;
        }
        let bad = self.lost_before(&found.path, |_| true);
        let is_bad = |span: &Span| {
            let bytes =
                span.blocks.start * block_size.bytes()..span.blocks.end * block_size.bytes();
            meet(&bad, &bytes)
        };
        let mut spans = spans(&runs, each);
        loop {
            let some = spans.by_ref().take(pieces::TOGETHER);
            let (bad, good): (Vec<Span>, Vec<Span>) = some.partition(is_bad);
            if bad.is_empty() && good.is_empty() {
                return Ok(true);
            }
            for span in bad {
                self.defer(Unit::Pieces(Arc::clone(&large), vec![span]));
            }
            if !good.is_empty()
                && self
                    .queue
                    .push(Unit::Pieces(Arc::clone(&large), good))
                    .is_err()
            {
                return Ok(false);
            }
        }
    }

    /// Where a large file lies, if the next epoch can tell by that what was written to it.
    fn extents(&self, file: &File) -> Option<Arc<[Extent]>> {
        if self.source.volume.changes != ChangesBy::WrittenExtents {
            return None;
        }
        // Where that fails the file is read whole, which says what is wrong with it.
        extents::of_file(file, EXTENTS_CAP).ok()?.map(Arc::from)
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
        *lock(&self.tally.unused) = Some(map.clone());
        map
    }

    fn work(&self) {
        let _end = OnPanic(|| self.queue.abandon());
        let mut engine = match engine(self.source.options.engine) {
            Ok(engine) => engine,
            Err(error) => return self.fail(LinkError::Local(error.to_string()).into()),
        };
        let mut waiting = VecDeque::new();
        while let Some(unit) = self.queue.take() {
            let result = match unit {
                Unit::Small(files) => self.read_small(engine.as_mut(), &files).map(Vec::from_iter),
                Unit::Pieces(file, spans) => self.read_pieces(engine.as_mut(), &file, spans),
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
            if let Some(first) = waiting.front() {
                outlet.offers.learn(first.pays(&answer));
            }
            match waiting.pop_front() {
                Some(Waiting::Files(_, offered)) => self.send_lacking(&offered, &answer)?,
                Some(Waiting::Piece(_, piece)) => self.send_piece(piece, &answer)?,
                None => {}
            }
        }
        Ok(())
    }

    pub(super) fn vanish(&self, step: usize, path: &[u8]) -> Result<(), SourceError> {
        self.source.frozen_change(path)?;
        lock(&self.outcomes).insert(step, None);
        Ok(())
    }

    /// A file that cannot be opened because of the disk; any other error ends the epoch.
    pub(super) fn lose(
        &self,
        step: usize,
        found: &Found,
        error: WalkError,
    ) -> Result<(), SourceError> {
        // Of a volume of one piece nothing would be left.
        if !error.is_loss() || self.root.one().is_some() {
            return Err(error.into());
        }
        let kept = self.source.lose(found, &error, self.tally);
        lock(&self.outcomes).insert(step, kept);
        Ok(())
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
        let (xattrs, lost) = match walk::read_xattrs(self.root, path, file) {
            Err(error) if error.is_loss() => {
                (self.source.lose_attributes(path, &error, self.tally), true)
            }
            other => (other?, false),
        };
        let after = stat_of(self.root, file).map_err(|e| failed("stat", e.into()))?;
        let changed = size_of(&after) != size
            || (after.st_ctime, after.st_ctime_nsec) != (before.st_ctime, before.st_ctime_nsec);
        if changed {
            self.source.frozen_change(path)?;
        }
        let racy = changed || lost || self.baseline.is_racy(&after);
        let mut entry = bare_entry(path, before, Kind::File { size, blocks }, racy);
        entry.xattrs = xattrs;
        Ok(entry)
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

    /// Counts how a block travelled; `found` when the target took it from elsewhere.
    pub(super) fn count(&self, block: Block<'_>, found: bool) {
        match block {
            Block::Same => add(&self.tally.unchanged_blocks, 1),
            Block::Zero => add(&self.tally.zero_blocks, 1),
            Block::Data(..) if found => add(&self.tally.held_blocks, 1),
            Block::Data(_, bytes) | Block::Pages(_, _, bytes) => {
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
            Self::Kept | Self::Same => Block::Same,
            Self::Zero => Block::Zero,
            Self::Data => Block::Data(signature, bytes),
            Self::Pages(pages) => Block::Pages(signature, pages, bytes),
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
