//! Applying opened payloads to a destination and keeping the tree that results.
//!
//! Invariants: every block's signature is computed here, from the bytes that are written or, of a block that came in
//! pages, from all that it has then; the tree
//! holds only what was applied; several threads may apply parallel payloads at once, the session sees
//! to the barriers.

use super::building::{Blocks, Building};
use super::engine::{Engine, Write};
use super::payload::{Block, EntryItem, Payload, Segment};
use super::placing::{Memories, runs};
use super::queue::lock;
use crate::model::ids::Signature;
use crate::volume::aligned::{ALIGNMENT, Aligned};
use crate::volume::apply::{Access, ApplyError, Destination, Parent};
use crate::volume::block_map::{self, Holder};
use crate::volume::confined::split;
use crate::volume::sign::{self, ZERO};
use crate::volume::state::EntryMap;
use crate::volume::tree::{RootHasher, shown};
use crate::volume::{BlockMap, BlockSize, Entry, FleetKey, Kind};
use std::collections::{BTreeSet, HashMap};
use std::os::fd::AsFd;
use std::panic::resume_unwind;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

/// Why a payload was not applied.
#[derive(Debug, thiserror::Error)]
pub(super) enum RebuildError {
    #[error(
        "volume {volume}: the block of `{path}` at offset {offset} does not have its signature: it was changed on the way"
    )]
    WrongSignature {
        volume: String,
        path: String,
        offset: u64,
    },
    #[error(
        "volume {volume}: the block of `{path}` at offset {offset} is not what the source expects there: it was changed on the target's disk"
    )]
    Altered {
        volume: String,
        path: String,
        offset: u64,
    },
    #[error("volume {volume}: {what} `{path}`; source and target disagree, send the epoch again")]
    Disagree {
        volume: String,
        path: String,
        what: &'static str,
    },
    #[error(transparent)]
    Apply(#[from] ApplyError),
}

/// A tree under reconstruction.
pub(super) struct Rebuild {
    pub(super) destination: Destination,
    pub(super) block_size: BlockSize,
    pub(super) key: FleetKey,
    /// What this device holds of any volume; what is written here is noted there.
    pub(super) map: Option<Arc<BlockMap>>,
    root: Arc<Path>,
    state: Mutex<State>,
    pub(super) bytes_written: AtomicU64,
    /// Of those, bytes that were here already.
    pub(super) bytes_again: AtomicU64,
    /// Bytes written through the page cache since the last write-back.
    cached: AtomicU64,
    refuses_direct: AtomicBool,
}

#[derive(Default)]
struct State {
    tree: EntryMap,
    /// Paths found here that the source has not named yet; empty when it builds upon this tree.
    unnamed: BTreeSet<Box<[u8]>>,
    /// Large files whose pieces are arriving.
    building: HashMap<Box<[u8]>, Building>,
    /// Directories whose metadata must be set at the end.
    touched: BTreeSet<Box<[u8]>>,
}

impl State {
    fn name(&mut self, path: &[u8]) {
        self.unnamed.remove(path);
    }

    fn touch_parent(&mut self, path: &[u8]) {
        let (parent, _) = split(path);
        if !self.touched.contains(parent) {
            self.touched.insert(parent.into());
        }
    }

    /// Forgets `path` and everything below it.
    fn forget(&mut self, path: &[u8]) {
        let mut below = path.to_vec();
        below.push(b'/');
        let mut gone = vec![Box::from(path)];
        let paths = self.tree.paths_from(&below);
        gone.extend(
            paths
                .take_while(|path| path.starts_with(&below))
                .map(Box::from),
        );
        for path in gone {
            self.tree.remove(&path);
            self.unnamed.remove(&path);
            self.building.remove(&path);
        }
    }
}

impl Rebuild {
    /// Over `tree`, which describes the destination exactly. When the source does not build upon it,
    /// what it does not name is removed at the end.
    pub(super) fn new(
        destination: Destination,
        block_size: BlockSize,
        key: FleetKey,
        map: Option<Arc<BlockMap>>,
        tree: EntryMap,
        remove_unnamed: bool,
    ) -> Self {
        let unnamed = if remove_unnamed {
            tree.paths().map(Box::from).collect()
        } else {
            BTreeSet::new()
        };
        let state = State {
            tree,
            unnamed,
            ..State::default()
        };
        Self {
            root: destination.directory_path().into(),
            destination,
            block_size,
            key,
            map,
            state: Mutex::new(state),
            bytes_written: AtomicU64::new(0),
            bytes_again: AtomicU64::new(0),
            cached: AtomicU64::new(0),
            refuses_direct: AtomicBool::new(false),
        }
    }

    /// The length and the signatures of every file here, each under a name that `name` makes of its path.
    pub(super) fn held(
        &self,
        name: impl Fn(&[u8]) -> [u8; 32],
    ) -> Vec<([u8; 32], u64, Vec<Signature>)> {
        let state = lock(&self.state);
        let files = state.tree.iter().filter_map(|entry| match entry.kind {
            Kind::File { size, blocks } => Some((name(&entry.path), size, blocks)),
            _ => None,
        });
        files.collect()
    }

    fn disagree(&self, what: &'static str, path: &[u8]) -> RebuildError {
        RebuildError::Disagree {
            volume: self.destination.volume().to_owned(),
            path: shown(path).into_owned(),
            what,
        }
    }

    /// Applies a payload that is not the end. `memories` is where the bytes of its blocks lie, `space` has room for
    /// blocks of which pages came. Tells of each block of files and segments whether it is in its place; only one that was offered and not
    /// found can be missing, and with it its whole file, if that is a small one.
    pub(super) fn apply(
        &self,
        engine: &mut dyn Engine,
        parent: &mut Parent,
        memories: Memories<'_>,
        space: &mut Aligned,
        payload: &Payload<'_>,
    ) -> Result<Vec<bool>, RebuildError> {
        match payload {
            Payload::Removals(paths) => self.removals(parent, paths)?,
            Payload::Entries(items) => self.entries(parent, items)?,
            Payload::Files(files) => {
                let whole = |(_, blocks): &&File<'_>| !blocks.iter().any(Block::is_lacking);
                let here: Vec<&File<'_>> = files.iter().filter(whole).collect();
                self.files(engine, parent, memories, &here)?;
                let held = files
                    .iter()
                    .flat_map(|file| std::iter::repeat_n(whole(&file), file.1.len()));
                return Ok(held.collect());
            }
            Payload::Segment(segment) => {
                self.segment(engine, parent, memories, space, segment)?;
                let held = segment.blocks.iter().map(|block| !block.is_lacking());
                return Ok(held.collect());
            }
            Payload::Finish(entries) => self.finish(parent, entries)?,
            Payload::End { .. } => {}
        }
        Ok(Vec::new())
    }

    /// Notes in the block map what was just written to `path`.
    fn note(&self, path: &[u8], first: u64, blocks: &[Block<'_>]) {
        let (Some(map), Some(local)) = (&self.map, self.destination.file_path(path)) else {
            return;
        };
        let written: Vec<(Signature, u64)> = blocks
            .iter()
            .zip(first..)
            .filter_map(|(block, index)| match block {
                Block::Data(signature, bytes) | Block::Found(signature, bytes)
                    if bytes.len() >= block_map::LEAST =>
                {
                    Some((*signature, index * self.block_size.bytes()))
                }
                Block::Pages(signature, ..) => Some((*signature, index * self.block_size.bytes())),
                _ => None,
            })
            .collect();
        if !written.is_empty() {
            let holder = Holder {
                root: Arc::clone(&self.root),
                path: local.into(),
            };
            map.add(holder, written);
        }
    }

    fn removals(&self, parent: &mut Parent, paths: &[Box<[u8]>]) -> Result<(), RebuildError> {
        for path in paths {
            parent.forget();
            self.destination.remove(parent, path)?;
            let mut state = lock(&self.state);
            // What a peer makes up takes no memory.
            if state.tree.get(path).is_some() {
                state.touch_parent(path);
            }
            state.forget(path);
        }
        parent.forget();
        Ok(())
    }

    fn entries(&self, parent: &mut Parent, items: &[EntryItem]) -> Result<(), RebuildError> {
        for item in items {
            match item {
                EntryItem::Entry(entry) => self.entry(parent, entry)?,
                EntryItem::Start { path, size, dense } => {
                    self.start(parent, path, *size, *dense)?;
                }
            }
        }
        Ok(())
    }

    fn entry(&self, parent: &mut Parent, entry: &Entry) -> Result<(), RebuildError> {
        let path = &entry.path;
        let mut state = lock(&self.state);
        let is_directory = entry.kind == Kind::Directory;
        let was_directory = state
            .tree
            .get(path)
            .is_some_and(|old| old.kind == Kind::Directory);
        if is_directory {
            if !was_directory {
                parent.forget();
                self.destination.directory(parent, path)?;
                state.touch_parent(path);
            }
            state.touched.insert(path.clone());
        } else {
            if was_directory {
                parent.forget();
                state.forget(path);
            }
            self.destination.special(parent, entry)?;
            state.touch_parent(path);
        }
        state.name(path);
        state.tree.insert(entry);
        Ok(())
    }

    fn start(
        &self,
        parent: &mut Parent,
        path: &[u8],
        size: u64,
        dense: bool,
    ) -> Result<(), RebuildError> {
        let mut state = lock(&self.state);
        let building = match state.tree.get(path).map(|old| old.kind) {
            Some(Kind::File { blocks, .. }) => Building {
                blocks: blocks.into_iter().collect(),
                fresh: false,
            },
            old => {
                if old == Some(Kind::Directory) {
                    parent.forget();
                    state.forget(path);
                }
                let file = self
                    .destination
                    .file(parent, path, Access::private())
                    .map_err(|error| error.needing(size))?;
                if dense {
                    self.destination.reserve(&file, path, size)?;
                }
                state.touch_parent(path);
                Building {
                    blocks: Blocks::default(),
                    fresh: true,
                }
            }
        };
        state.tree.remove(path);
        state.name(path);
        state.building.insert(path.into(), building);
        Ok(())
    }

    /// Checks the blocks' signatures and returns the signature of each, none for one that was offered in
    /// vain; `held` are those here.
    fn verify(
        &self,
        path: &[u8],
        first: u64,
        blocks: &[Block<'_>],
        held: impl Fn(usize) -> Option<Signature>,
    ) -> Result<Vec<Option<Signature>>, RebuildError> {
        let signatures = blocks.iter().enumerate().map(|(at, block)| match block {
            Block::Zero => Ok(Some(ZERO)),
            Block::Same => held(at)
                .map(Some)
                .ok_or_else(|| self.disagree("a block is missing here of", path)),
            Block::Found(signature, _) => Ok(Some(*signature)),
            // Its bytes are put together and checked before any is written.
            Block::Pages(signature, ..) => held(at)
                .map(|_| Some(*signature))
                .ok_or_else(|| self.disagree("a block is missing here of", path)),
            Block::Offered(_) => Ok(None),
            Block::Data(expected, bytes) => {
                let signature = sign::signature(&self.key, bytes);
                if signature == *expected {
                    if held(at) == Some(signature) {
                        let again = bytes.len() as u64;
                        self.bytes_again.fetch_add(again, Ordering::Relaxed);
                    }
                    return Ok(Some(signature));
                }
                Err(RebuildError::WrongSignature {
                    volume: self.destination.volume().to_owned(),
                    path: shown(path).into_owned(),
                    offset: (first + at as u64) * self.block_size.bytes(),
                })
            }
        });
        signatures.collect()
    }

    fn files(
        &self,
        engine: &mut dyn Engine,
        parent: &mut Parent,
        memories: Memories<'_>,
        files: &[&File<'_>],
    ) -> Result<(), RebuildError> {
        let held: Vec<Option<Vec<Signature>>> = {
            let mut state = lock(&self.state);
            files
                .iter()
                .map(
                    |(entry, _)| match state.tree.get(&entry.path).map(|e| e.kind) {
                        Some(Kind::File { blocks, .. }) => Some(blocks),
                        Some(Kind::Directory) => {
                            state.forget(&entry.path);
                            None
                        }
                        _ => None,
                    },
                )
                .collect()
        };
        let mut finished = Vec::with_capacity(files.len());
        let mut open = Vec::with_capacity(files.len());
        for ((entry, blocks), held) in files.iter().zip(&held) {
            let path = &entry.path;
            let here = |at: usize| held.as_ref().and_then(|held| held.get(at).copied());
            let signatures = self.verify(path, 0, blocks, here)?;
            let access = if held.is_some() {
                Access::InPlace
            } else {
                self.destination.access_to_new(entry)
            };
            let file = self
                .destination
                .file(parent, path, access)
                .map_err(|error| error.needing(entry.size()))?;
            let mut entry = entry.clone();
            if let Kind::File { blocks, .. } = &mut entry.kind {
                // Files with a block that is not there were left out.
                *blocks = signatures.into_iter().flatten().collect();
            }
            finished.push(entry);
            open.push(file);
        }
        let mut writes = Vec::with_capacity(files.len());
        for (((entry, blocks), held), file) in files.iter().zip(&held).zip(&open) {
            if held.is_some() {
                self.punch(file, &entry.path, entry.size(), 0, blocks)?;
            }
            let runs = runs(self.block_size, memories, 0, blocks);
            writes.extend(runs.map(|(offset, bytes)| (&*entry.path, file, offset, bytes)));
        }
        self.write(engine, &writes, false)?;
        for ((file, entry), ((_, blocks), held)) in
            open.iter().zip(&finished).zip(files.iter().zip(&held))
        {
            let whole = held.is_none() && !matches!(blocks.last(), Some(Block::Zero));
            self.destination.finish_file(file, entry, whole)?;
            self.note(&entry.path, 0, blocks);
        }
        let mut state = lock(&self.state);
        for (entry, held) in finished.into_iter().zip(held) {
            if held.is_none() {
                state.touch_parent(&entry.path);
            }
            state.name(&entry.path);
            state.tree.insert(&entry);
        }
        Ok(())
    }

    fn segment(
        &self,
        engine: &mut dyn Engine,
        parent: &mut Parent,
        memories: Memories<'_>,
        space: &mut Aligned,
        segment: &Segment<'_>,
    ) -> Result<(), RebuildError> {
        let path = &segment.path;
        let (held, fresh) = {
            let state = lock(&self.state);
            let building = state.building.get(path).ok_or_else(|| {
                self.disagree("a piece came for a file that was not begun:", path)
            })?;
            let places = (segment.first..).take(segment.blocks.len());
            let held: Vec<Option<Signature>> =
                places.map(|index| building.blocks.get(index)).collect();
            (held, building.fresh)
        };
        let here = |at: usize| held.get(at).copied().flatten();
        let signatures = self.verify(path, segment.first, &segment.blocks, here)?;
        let runs: Vec<(u64, &[u8])> =
            runs(self.block_size, memories, segment.first, &segment.blocks).collect();
        let aligned = runs.iter().all(|(offset, bytes)| {
            // The end of most files is not aligned; that one piece goes through the page cache.
            bytes.as_ptr().addr() % ALIGNMENT == 0
                && bytes.len() % ALIGNMENT == 0
                && offset % ALIGNMENT as u64 == 0
        });
        let access = if aligned && !self.refuses_direct.load(Ordering::Relaxed) {
            Access::Direct
        } else {
            Access::InPlace
        };
        let mut write = |access| {
            let file = self.destination.file(parent, path, access)?;
            self.put_together(engine, &file, segment, space)?;
            if !fresh {
                self.punch(&file, path, segment.size, segment.first, &segment.blocks)?;
            }
            let places: Vec<Place<'_>> = runs
                .iter()
                .map(|&(offset, bytes)| (&**path, &file, offset, bytes))
                .collect();
            self.write(engine, &places, access == Access::Direct)
        };
        match write(access) {
            Err(RebuildError::Apply(error)) if access == Access::Direct && error.is_alignment() => {
                // A disk with larger sectors than 4096 bytes.
                self.refuses_direct.store(true, Ordering::Relaxed);
                write(Access::InPlace)?;
            }
            other => other?,
        }
        self.note(path, segment.first, &segment.blocks);
        let mut state = lock(&self.state);
        if let Some(building) = state.building.get_mut(path) {
            for (index, signature) in (segment.first..).zip(signatures) {
                if let Some(signature) = signature {
                    building.blocks.set(index, signature);
                }
            }
        }
        Ok(())
    }

    fn punch(
        &self,
        file: &std::fs::File,
        path: &[u8],
        size: u64,
        first: u64,
        blocks: &[Block<'_>],
    ) -> Result<(), RebuildError> {
        for (block, index) in blocks.iter().zip(first..) {
            if *block == Block::Zero {
                let length = self.block_size.length_of(size, index);
                let offset = index * self.block_size.bytes();
                self.destination.punch(file, path, offset, length)?;
            }
        }
        Ok(())
    }

    fn write(
        &self,
        engine: &mut dyn Engine,
        writes: &[Place<'_>],
        direct: bool,
    ) -> Result<(), RebuildError> {
        let mut pending: Vec<Write<'_>> = writes
            .iter()
            .map(|(_, file, offset, bytes)| Write {
                file: file.as_fd(),
                offset: *offset,
                bytes,
                direct,
                done: Ok(()),
            })
            .collect();
        engine.write(&mut pending);
        let mut total = 0;
        for (write, (path, ..)) in pending.into_iter().zip(writes) {
            let needed = write.bytes.len() as u64;
            write
                .done
                .map_err(|e| self.destination.failed("write", path, needed, e))?;
            total += needed;
        }
        self.bytes_written.fetch_add(total, Ordering::Relaxed);
        if !direct {
            self.cached.fetch_add(total, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Writes back what lies in the page cache, if it is much: so the end of the epoch has less to wait for,
    /// and the disk holds the network back before the memory is full.
    pub(super) fn write_back(&self) -> Result<(), RebuildError> {
        if self.cached.load(Ordering::Relaxed) >= WRITE_BACK {
            self.cached.store(0, Ordering::Relaxed);
            self.destination.sync()?;
        }
        Ok(())
    }

    fn finish(&self, parent: &mut Parent, entries: &[Entry]) -> Result<(), RebuildError> {
        for entry in entries {
            let path = &entry.path;
            let mut state = lock(&self.state);
            let mut entry = entry.clone();
            match &mut entry.kind {
                Kind::HardLink(primary) => {
                    let old = state.tree.get(path).map(|old| old.kind);
                    if old == Some(Kind::Directory) {
                        parent.forget();
                        state.forget(path);
                    }
                    let known = state.tree.get(primary).map(|first| first.kind);
                    if matches!(known, None | Some(Kind::Directory | Kind::HardLink(_))) {
                        return Err(self.disagree("there is no first name for the link", path));
                    }
                    self.destination.link(parent, path, primary)?;
                    state.touch_parent(path);
                }
                Kind::File { size, blocks } => {
                    let building = state.building.remove(path).ok_or_else(|| {
                        self.disagree("the end came for a file never begun:", path)
                    })?;
                    *blocks = building
                        .blocks
                        .whole(self.block_size.blocks_of(*size))
                        .ok_or_else(|| self.disagree("blocks are missing of", path))?;
                    let file = self.destination.file(parent, path, Access::InPlace)?;
                    self.destination.finish_file(&file, &entry, false)?;
                }
                _ => {}
            }
            state.name(path);
            state.tree.insert(&entry);
        }
        Ok(())
    }

    /// Removes what the source did not name, sets the directories' metadata, makes everything durable
    /// and returns the root of what is here now.
    pub(super) fn end(&self) -> Result<(Signature, EntryMap), RebuildError> {
        let mut state = lock(&self.state);
        if let Some(path) = state.building.keys().next() {
            return Err(self.disagree("the end of the epoch came before the end of", path));
        }
        let mut parent = Parent::default();
        let unnamed = std::mem::take(&mut state.unnamed);
        for path in unnamed.iter().rev().filter(|path| !path.is_empty()) {
            parent.forget();
            self.destination.remove(&mut parent, path)?;
            state.forget(path);
            state.touch_parent(path);
        }
        let touched = std::mem::take(&mut state.touched);
        let tree = std::mem::take(&mut state.tree);
        let root = std::thread::scope(|scope| {
            let root = scope.spawn(|| {
                let mut root = RootHasher::new(&self.key, self.block_size);
                tree.iter().for_each(|entry| root.add(&entry));
                root.finish()
            });
            for path in touched.iter().rev() {
                if let Some(entry) = tree.get(path)
                    && entry.kind == Kind::Directory
                {
                    self.destination.finish_directory(&entry)?;
                }
            }
            self.destination.sync()?;
            if let Some(map) = &self.map {
                map.flush();
            }
            // A panic of the thread is passed on.
            Ok::<_, RebuildError>(root.join().unwrap_or_else(|panic| resume_unwind(panic)))
        })?;
        Ok((root, tree))
    }
}

/// Bytes in the page cache that are written back before the end of an epoch.
const WRITE_BACK: u64 = 32 << 20;

/// Bytes for a place in a file.
type Place<'a> = (&'a [u8], &'a std::fs::File, u64, &'a [u8]);

/// A small file in a record.
type File<'b> = (Entry, Vec<Block<'b>>);

#[cfg(test)]
mod tests {
    use super::super::engine::{EngineChoice, engine};
    use super::*;

    #[test]
    fn a_block_at_the_end_of_the_longest_file_there_can_be_takes_no_memory_for_those_before_it() {
        let directory = tempfile::tempdir().unwrap();
        let destination = Destination::open("data", directory.path(), false).unwrap();
        let (block_size, key) = (BlockSize::default(), FleetKey([5; 32]));
        let tree = EntryMap::default();
        let rebuild = Rebuild::new(destination, block_size, key, None, tree, false);
        let mut engine = engine(EngineChoice::Threads).unwrap();
        let (mut parent, mut space) = (Parent::default(), Aligned::default());
        let mut apply = |payload: &Payload<'_>| {
            let applied = rebuild.apply(
                engine.as_mut(),
                &mut parent,
                [&[], &[]],
                &mut space,
                payload,
            );
            applied.map_err(|error| error.to_string())
        };
        let (path, size): (Box<[u8]>, _) = (b"endless".as_slice().into(), i64::MAX as u64);
        let start = EntryItem::Start {
            path: path.clone(),
            size,
            dense: false,
        };
        apply(&Payload::Entries(vec![start])).unwrap();
        let piece = Segment {
            path: path.clone(),
            size,
            first: block_size.blocks_of(size) - 1,
            blocks: vec![Block::Zero],
        };
        apply(&Payload::Segment(piece)).unwrap();
        let entry = Entry {
            path,
            mode: 0o600,
            uid: 0,
            gid: 0,
            mtime: crate::volume::Timestamp::default(),
            xattrs: Vec::new(),
            kind: Kind::File {
                size,
                blocks: Vec::new(),
            },
            seen: crate::volume::tree::Seen::default(),
        };
        let refused = apply(&Payload::Finish(vec![entry])).unwrap_err();
        assert!(refused.contains("blocks are missing"), "{refused}");
    }
}
