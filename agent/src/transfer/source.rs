//! Sending a tree's changes in the order that the target can apply: removals, entries, files, the rest.
//!
//! Invariants: the resulting state describes exactly the bytes that were sent or already held by the
//! target; what vanishes while being read is removed in this epoch; what changes while being read is
//! marked to be read again in the next, or is an error when the containers are frozen.

use super::frame::HEADER_LEN;
use super::link::LinkError;
use super::message::Have;
use super::payload::{self, PayloadKind};
use super::reading::{Outcomes, is_dense, is_large, send_files, size_of};
use super::sender::{Outlet, SendError, path_hash};
use super::{Options, Progress};
use crate::model::ids::{Epoch, Signature};
use crate::model::volume::VolumeSpec;
use crate::volume::change::{Baseline, Step, compare};
use crate::volume::tree::shown;
use crate::volume::walk::{self, hard_link};
use crate::volume::{BlockSize, Confined, Entry, Exception, FleetKey, Kind, ScanError, TreeState};
use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicU64, Ordering};

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

    pub(super) fn previous(&self) -> Option<&'a TreeState> {
        match self {
            Self::Previous(state) => Some(state),
            Self::Listed(..) => None,
        }
    }

    pub(super) fn blocks(&self, path: &[u8]) -> &[Signature] {
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
    pub(super) held_blocks: AtomicU64,
    pub(super) unchanged_blocks: AtomicU64,
    pub(super) changeset: AtomicU64,
    pub(super) bytes_read: AtomicU64,
    pub(super) skipped: Vec<Exception>,
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
    pub(super) block_size: BlockSize,
    pub(super) held: Held<'a>,
    pub(super) frozen: bool,
    pub(super) progress: &'a Progress,
    pub(super) outlet: &'a Outlet,
    pub(super) options: &'a Options,
}

impl Source<'_> {
    /// Sends everything but the end of the epoch.
    pub(super) fn send(&self) -> Result<(TreeState, Tally), SourceError> {
        let root = walk::open_root(&self.volume.source_path)?;
        let baseline = Baseline::establish(&root, self.frozen)?;
        let walk = walk::walk(&root)?;
        let mut plan = compare(walk, self.held.previous());
        let mut tally = Tally {
            skipped: std::mem::take(&mut plan.skipped),
            ..Tally::default()
        };
        add(&tally.removed, plan.removed.len() as u64);
        self.send_removals(&plan.removed)?;
        let mut done = self.send_entries(&root, baseline, &plan.steps, &tally)?;
        done.extend(send_files(self, &root, baseline, &plan.steps, &tally)?);
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

    /// Finishes large files and hard links and puts the new state together.
    fn finish(
        &self,
        steps: &[Step],
        baseline: Baseline,
        mut done: Outcomes,
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

    pub(super) fn differs(&self, entry: &Entry) -> bool {
        !self
            .held
            .previous()
            .and_then(|state| state.get(&entry.path))
            .is_some_and(|old| old.same(entry))
    }

    pub(super) fn frozen_change(&self, path: &[u8]) -> Result<(), SourceError> {
        if self.frozen {
            return Err(SourceError::Changed(path.into()));
        }
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
