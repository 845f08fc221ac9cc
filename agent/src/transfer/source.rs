//! Sending a tree's changes, a window of paths after the other, each in the order that the target can apply:
//! removals, entries, files, the rest.
//!
//! Invariants: the resulting state describes exactly the bytes that were sent or already held by the
//! target; what vanishes while being read is removed in this epoch; what changes while being read is
//! marked to be read again in the next, or is an error when the containers are frozen.

use super::frame::HEADER_LEN;
use super::link::LinkError;
use super::message::Have;
use super::payload::{self, PayloadKind};
use super::queue::lock;
use super::reading::{Outcomes, is_dense, is_large, send_files, size_of};
use super::sender::{Outlet, SendError, path_hash};
use super::{Options, Progress};
use crate::model::extent::Extent;
use crate::model::ids::{Epoch, Signature};
use crate::model::units::UnixMillis;
use crate::model::volume::{TimesKept, VolumeSpec};
use crate::volume::change::{Ahead, Baseline, Changes, Step, Window};
use crate::volume::pages::{self, FileMarks, Marker, VolumeMarks};
use crate::volume::rewritten::FileExtents;
use crate::volume::salvage::of_file;
use crate::volume::state::Builder;
use crate::volume::tree::{Xattr, shown};
use crate::volume::unused;
use crate::volume::walk::{self, Found, WalkError, bare_entry, hard_link, kind_of};
use crate::volume::warm::Warmer;
use crate::volume::{
    BlockSize, Confined, Entry, Exception, FleetKey, Kind, ScanError, TreeState, Unreadable,
};
use nix::sys::stat::SFlag;
use std::borrow::Cow;
use std::collections::{HashMap, HashSet};
use std::panic::resume_unwind;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex};

/// Steps that are worked on at a time: few enough that a tree of any size takes little memory, many enough
/// that waiting for the last of them does not count.
const WINDOW: usize = 16_384;
/// Steps with which work begins while the walk goes on.
const BEGINNING: usize = 1024;
/// Entries that the walk hands over together: waking a thread costs more than looking at one.
const HANDED: usize = 64;
/// Threads that read directories ahead of the walk.
const WARMERS: usize = 2;
/// Extents that are remembered of the large files of a volume: 8 MiB. Files beyond are read whole.
pub(super) const EXTENTS_CAP: usize = 1 << 18;
/// Payload from which a record of entries is sent.
const ENTRIES_FULL: usize = 192 << 10;

/// Blocks that the target already has, by path.
pub(super) enum Held<'a> {
    /// The tree of the epoch before.
    Previous(&'a TreeState),
    /// What the target found in its directory.
    Listed(HashMap<[u8; 32], Listed>, &'a FleetKey),
}

/// A file as the target found it.
pub(super) struct Listed {
    size: u64,
    blocks: Vec<Signature>,
}

impl<'a> Held<'a> {
    pub(super) fn list(key: &'a FleetKey, have: Vec<Have>) -> Self {
        let mut listed: HashMap<[u8; 32], Listed> = HashMap::new();
        for piece in have {
            let file = listed.entry(piece.path_hash).or_insert(Listed {
                size: piece.size,
                blocks: Vec::new(),
            });
            // Pieces of one file follow each other; any other order only means sending more.
            if file.blocks.len() as u64 == piece.first {
                file.blocks.extend(piece.blocks);
            }
        }
        Self::Listed(listed, key)
    }

    pub(super) fn previous(&self) -> Option<&'a TreeState> {
        match self {
            Self::Previous(state) => Some(state),
            Self::Listed(..) => None,
        }
    }

    pub(super) fn blocks(&self, path: &[u8]) -> Cow<'_, [Signature]> {
        match self {
            Self::Previous(state) => match state.get(path).map(|entry| entry.kind) {
                Some(Kind::File { blocks, .. }) => blocks.into(),
                _ => Cow::default(),
            },
            Self::Listed(listed, key) => listed
                .get(&path_hash(key, path))
                .map_or_else(Cow::default, |file| Cow::from(&file.blocks)),
        }
    }

    /// The length of a file that the target found.
    pub(super) fn listed_size(&self, path: &[u8]) -> Option<u64> {
        match self {
            Self::Previous(_) => None,
            Self::Listed(listed, key) => Some(listed.get(&path_hash(key, path))?.size),
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
    pub(super) held_blocks: AtomicU64,
    pub(super) unchanged_blocks: AtomicU64,
    pub(super) changeset: AtomicU64,
    pub(super) bytes_read: AtomicU64,
    pub(super) skipped: Vec<Exception>,
    pub(super) unreadable: Mutex<Vec<Unreadable>>,
    /// What the file system of a volume of one piece does not use, as far as anybody asked.
    pub(super) unused: Mutex<Option<Option<Arc<unused::Map>>>>,
    /// Where large files lay, and how many extents these are.
    extents: Mutex<(FileExtents, usize)>,
    /// Marks of their pages, and how many chunks these are.
    marks: Mutex<(VolumeMarks, usize)>,
}

impl Tally {
    pub(super) fn keep_extents(&self, path: &[u8], extents: &Arc<[Extent]>) {
        let mut kept = lock(&self.extents);
        // A path takes memory too.
        if kept.1 + extents.len() < EXTENTS_CAP {
            kept.1 += extents.len() + 1;
            kept.0.insert(path.into(), Arc::clone(extents));
        }
    }

    pub(super) fn keep_marks(&self, path: &[u8], marks: Arc<FileMarks>) {
        let mut kept = lock(&self.marks);
        if marks.chunks() > 0 && kept.1 + marks.chunks() <= pages::CHUNKS_CAP {
            kept.1 += marks.chunks();
            kept.0.insert(path.into(), marks);
        }
    }

    /// Takes over what was known of an entry that is kept.
    fn keep(&self, entry: &Entry, previous: &TreeState) {
        if let Some(marks) = previous.marks.get(&entry.path) {
            self.keep_marks(&entry.path, Arc::clone(marks));
        }
        if entry.seen.racy {
            // It could not be looked at: what is lost of it still is, and what is written to it goes unseen.
            let lost = of_file(&previous.unreadable, &entry.path);
            lock(&self.unreadable).extend_from_slice(lost);
        } else if let Some(extents) = previous.extents.get(&entry.path) {
            self.keep_extents(&entry.path, extents);
        }
    }

    pub(super) fn lose(&self, lost: Unreadable) {
        lock(&self.unreadable).push(lost);
    }
}

pub(super) fn add(counter: &AtomicU64, count: u64) {
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
    pub(super) marker: Marker,
    pub(super) block_size: BlockSize,
    pub(super) held: Held<'a>,
    /// The tree of the epoch before, also where the target does not build upon it.
    pub(super) earlier: Option<&'a TreeState>,
    /// What was lost of the last complete epoch, in the order of path and offset.
    pub(super) lost: &'a [Unreadable],
    /// When the plan was made whose blocks the target may have; none: nobody knows.
    pub(super) since: Option<UnixMillis>,
    pub(super) frozen: bool,
    pub(super) progress: &'a Progress,
    pub(super) outlet: &'a Outlet,
    pub(super) options: &'a Options,
    /// Which times the target keeps.
    pub(super) times: TimesKept,
}

impl Source<'_> {
    /// Sends everything but the end of the epoch.
    pub(super) fn send(&self) -> Result<(TreeState, Tally), SourceError> {
        let root = walk::open_root(&self.volume.source_path)?.keeping(self.times);
        let baseline = Baseline::establish(&root, self.frozen, self.options.longest_write);
        let previous = self.held.previous();
        let mut state = Builder::new(self.key, self.block_size, previous);
        let mut tally = Tally::default();
        let warmer = Warmer::new(&root);
        let skipped = std::thread::scope(|scope| {
            // The walk goes on while what it found is read: its waits for the disk cost nothing then.
            let (found, walked) = std::sync::mpsc::sync_channel(WINDOW / HANDED);
            for _ in 0..WARMERS {
                scope.spawn(|| warmer.run());
            }
            let walker = scope.spawn(|| {
                let _warming = warmer.until_dropped();
                let mut walk = walk::walk(&root).warmed_by(&warmer);
                loop {
                    let some: Handed = walk.by_ref().take(HANDED).collect();
                    // Nobody takes more when reading failed.
                    if some.is_empty() || found.send(some).is_err() {
                        break;
                    }
                }
                drop(found);
                walk.skipped()
            });
            let next = Handed::default().into_iter();
            let changes = Changes::new(Walked { walked, next }, previous);
            self.send_windows(&root, &baseline, changes, &mut state, &tally)?;
            // A panic of the thread is passed on.
            Ok::<_, SourceError>(walker.join().unwrap_or_else(|panic| resume_unwind(panic)))
        })?;
        tally.skipped.extend(skipped);
        tally.skipped.sort_by(|a, b| a.path.cmp(&b.path));
        let mut state = state.finish();
        state.unreadable = std::mem::take(&mut *lock(&tally.unreadable));
        let place = |lost: &Unreadable| (lost.path.clone(), lost.offset);
        state.unreadable.sort_by_cached_key(place);
        // Of a file that is kept nothing was asked.
        let asked = lock(&tally.unused).take();
        state.unused = asked.unwrap_or_else(|| previous?.unused.clone());
        state.extents = std::mem::take(&mut lock(&tally.extents).0);
        state.marks = std::mem::take(&mut lock(&tally.marks).0);
        Ok((state, tally))
    }

    fn send_windows(
        &self,
        root: &Confined,
        baseline: &Baseline,
        mut changes: Changes<'_, Walked>,
        state: &mut Builder<'_>,
        tally: &Tally,
    ) -> Result<(), SourceError> {
        let mut moved = Moved::default();
        while let Some(Window {
            steps,
            removed,
            lost,
        }) = changes.window(BEGINNING, WINDOW)?
        {
            lock(&tally.unreadable).extend(lost);
            add(&tally.removed, removed.len() as u64);
            self.send_removals(&removed)?;
            let mut done = self.send_entries(root, baseline, &steps, tally)?;
            if steps.iter().any(|step| matches!(step, Step::File(_))) {
                done.extend(send_files(self, root, baseline, &steps, tally)?);
            }
            let vanished = self.vanished(&steps, &done);
            self.send_removals(&vanished)?;
            self.finish(steps, baseline, done, tally, state, &mut moved)?;
        }
        Ok(())
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
        baseline: &Baseline,
        steps: &[Step],
        tally: &Tally,
    ) -> Result<Outcomes, SourceError> {
        let mut done = Outcomes::new();
        let mut batch = Batch::new(self.outlet, PayloadKind::Entries);
        for (index, step) in steps.iter().enumerate() {
            add(&self.progress.entries, 1);
            match step {
                Step::Special(found) => {
                    let racy = baseline.is_racy(&found.stat);
                    let entry = match walk::special_entry(root, found, racy) {
                        Err(error) if error.vanished() && !found.path.is_empty() => {
                            self.frozen_change(&found.path)?;
                            if kind_of(&found.stat) != SFlag::S_IFDIR {
                                done.insert(index, None);
                                continue;
                            }
                            // What was found in it needs it; the next epoch removes both.
                            bare_entry(&found.path, &found.stat, Kind::Directory, true)
                        }
                        Err(error) if error.is_loss() => {
                            let Some(entry) = self.lose_special(found, &error, tally) else {
                                done.insert(index, None);
                                continue;
                            };
                            entry
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
                    let dense = is_dense(&found.stat);
                    batch.put(|record| payload::put_start(record, &found.path, size, dense))?;
                }
                Step::File(_) | Step::Keep(_) | Step::Link(..) => {}
            }
        }
        batch.flush()?;
        Ok(done)
    }

    /// Paths that vanished and of which the target may have something.
    fn vanished(&self, steps: &[Step], done: &Outcomes) -> Vec<Box<[u8]>> {
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

    /// Finishes large files and hard links of a window and adds it to the new state.
    fn finish(
        &self,
        steps: Vec<Step>,
        baseline: &Baseline,
        mut done: Outcomes,
        tally: &Tally,
        state: &mut Builder<'_>,
        moved: &mut Moved,
    ) -> Result<(), SourceError> {
        let mut orphans = Vec::new();
        let mut batch = Batch::new(self.outlet, PayloadKind::Finish);
        for (index, step) in steps.into_iter().enumerate() {
            let is_file = matches!(step, Step::File(_));
            if let (Step::Keep(placed), Some(previous)) = (&step, self.held.previous()) {
                tally.keep(&placed.entry, previous);
            }
            match step {
                Step::Keep(placed) => match &placed.entry.kind {
                    Kind::HardLink(primary) if moved.gone.contains(primary) => {
                        self.orphan(&placed.entry.path, primary, tally)?;
                        orphans.push(placed.entry.path);
                    }
                    Kind::HardLink(primary) if moved.anew.contains(primary) => {
                        add(&tally.changed_entries, 1);
                        batch.put(|record| payload::put_finish(record, &placed.entry))?;
                        state.keep(placed);
                    }
                    _ => state.keep(placed),
                },
                Step::Link(found, primary) if moved.gone.contains(&primary) => {
                    self.orphan(&found.path, &primary, tally)?;
                    orphans.push(found.path);
                }
                Step::Link(found, primary) => {
                    let racy = baseline.is_racy(&found.stat);
                    let entry = hard_link(&found.path, &found.stat, &primary, racy);
                    add(&tally.changed_entries, 1);
                    batch.put(|record| payload::put_finish(record, &entry))?;
                    state.push(&entry);
                }
                Step::File(found) | Step::Special(found) => match done.remove(&index).flatten() {
                    Some(entry) => {
                        if is_file && is_large(&found.stat) {
                            batch.put(|record| payload::put_finish(record, &entry))?;
                        }
                        state.push(&entry);
                        if found.stat.st_nlink > 1 && self.is_made_anew(&entry) {
                            moved.anew.insert(found.path);
                        }
                    }
                    None => {
                        moved.gone.insert(found.path);
                    }
                },
            }
        }
        batch.flush()?;
        orphans.reverse();
        self.send_removals(&orphans)
    }

    /// A name whose first name vanished meanwhile is sent as a file in the next epoch; one whose first name is lost is
    /// lost too.
    fn orphan(&self, path: &[u8], primary: &[u8], tally: &Tally) -> Result<(), SourceError> {
        let first = shown(primary);
        let mut lost = lock(&tally.unreadable);
        if !lost.iter().any(|l| l.entry.is_some() && l.path == first) {
            return self.frozen_change(path);
        }
        lost.push(Unreadable {
            path: shown(path).into_owned(),
            offset: 0,
            length: 0,
            entry: Some(format!(
                "it is another name of {first}, which cannot be read; it is missing on the target"
            )),
            kept: false,
        });
        Ok(())
    }

    /// What the target has of an entry that the disk does not give up: what an earlier epoch brought, if that was of
    /// its kind. It is looked at again in the next epoch.
    pub(super) fn lose(&self, found: &Found, error: &WalkError, tally: &Tally) -> Option<Entry> {
        tally.lose(error.loss(walk::LOST));
        let mut old = self.held.previous()?.get(&found.path)?;
        let kind = kind_of(&found.stat);
        let is_same = match old.kind {
            // A large file was begun anew on the target.
            Kind::File { .. } => kind == SFlag::S_IFREG && !is_large(&found.stat),
            Kind::Symlink(_) => kind == SFlag::S_IFLNK,
            _ => false,
        };
        old.seen.racy = true;
        is_same.then_some(old)
    }

    /// The same of anything but a file; of a directory only the attributes are lost, for what is in it needs it.
    fn lose_special(&self, found: &Found, error: &WalkError, tally: &Tally) -> Option<Entry> {
        if kind_of(&found.stat) != SFlag::S_IFDIR {
            return self.lose(found, error, tally);
        }
        let mut entry = bare_entry(&found.path, &found.stat, Kind::Directory, true);
        entry.xattrs = self.lose_attributes(&found.path, error, tally);
        Some(entry)
    }

    /// The attributes that the target has when the disk does not give them up.
    pub(super) fn lose_attributes(
        &self,
        path: &[u8],
        error: &WalkError,
        tally: &Tally,
    ) -> Vec<Xattr> {
        tally.lose(error.loss(walk::LOST_ATTRIBUTES));
        let old = self.held.previous().and_then(|state| state.get(path));
        old.map_or_else(Vec::new, |old| old.xattrs)
    }

    pub(super) fn differs(&self, entry: &Entry) -> bool {
        !self
            .held
            .previous()
            .and_then(|state| state.get(&entry.path))
            .is_some_and(|old| old.same(entry))
    }

    /// Whether the target replaces what it had at this path: only a file is written into.
    fn is_made_anew(&self, entry: &Entry) -> bool {
        match &entry.kind {
            Kind::Directory => false,
            Kind::File { .. } => {
                let before = self
                    .held
                    .previous()
                    .and_then(|state| state.get(&entry.path));
                !before.is_some_and(|old| matches!(old.kind, Kind::File { .. }))
            }
            _ => self.differs(entry),
        }
    }

    pub(super) fn frozen_change(&self, path: &[u8]) -> Result<(), SourceError> {
        if self.frozen {
            return Err(SourceError::Changed(path.into()));
        }
        Ok(())
    }
}

/// What happened in an epoch to paths of which others may be further names.
#[derive(Default)]
struct Moved {
    /// They vanished.
    gone: HashSet<Box<[u8]>>,
    /// The target made them anew, so that names that did not change lead to what was there before.
    anew: HashSet<Box<[u8]>>,
}

/// What the walk hands over.
type Handed = Vec<Result<Found, WalkError>>;

/// What the walk found so far.
struct Walked {
    walked: Receiver<Handed>,
    next: std::vec::IntoIter<Result<Found, WalkError>>,
}

impl Iterator for Walked {
    type Item = Result<Found, WalkError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.next.len() == 0 {
            self.next = self.walked.recv().ok()?.into_iter();
        }
        self.next.next()
    }
}

impl Ahead for Walked {
    fn is_ready(&mut self) -> bool {
        if self.next.len() == 0
            && let Ok(more) = self.walked.try_recv()
        {
            self.next = more.into_iter();
        }
        self.next.len() > 0
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
