//! Trees in little memory: about a hundred bytes for an entry with a block, so that a million files fit.
//!
//! Invariants: a [`TreeState`] never changes; one that follows another shares the memory of all that was
//! kept; what was put in comes out. Non-goal: bytes from outside (see [`super::tree`]).

use super::codec::{Malformed, Reader, put_short};
use super::salvage::Unreadable;
use super::sign::{BlockSize, FleetKey};
use super::tree::{Entry, Kind, RootHasher, Seen, Timestamp};
use super::unused::Map;
use crate::model::ids::Signature;
use std::collections::BTreeMap;
use std::ops::{Bound, Range};
use std::sync::Arc;

/// Entries in one piece of memory: few, for one is found by going through them.
const CHUNK: usize = 64;

/// A tree at one epoch.
#[derive(Clone, Debug)]
pub struct TreeState {
    /// Size of its blocks.
    pub block_size: BlockSize,
    /// Root over all entries.
    pub root: Signature,
    /// What the source's disk did not give up: those bytes are zeros here.
    pub unreadable: Vec<Unreadable>,
    /// Byte ranges of a volume of one piece outside of which nothing has changed since; none: not known.
    pub changed: Option<Vec<Range<u64>>>,
    /// Blocks of a volume of one piece that were taken for zeros because its file system did not use them.
    pub unused: Option<Arc<Map>>,
    chunks: Vec<Arc<Chunk>>,
    entries: u64,
}

/// Entries that follow each other, each with as much of its path as differs from the one before.
#[derive(Debug, Default)]
struct Chunk {
    first: Box<[u8]>,
    count: usize,
    bytes: Vec<u8>,
}

/// An entry and where it stands in its state.
#[derive(Debug)]
pub struct Placed {
    /// The entry.
    pub entry: Entry,
    chunk: usize,
    at: usize,
}

impl TreeState {
    /// A state from sorted entries.
    #[must_use]
    pub fn new(
        key: &FleetKey,
        block_size: BlockSize,
        entries: impl IntoIterator<Item = Entry>,
    ) -> Self {
        let mut builder = Builder::new(key, block_size, None);
        for entry in entries {
            builder.push(&entry);
        }
        builder.finish()
    }

    /// How many entries it has.
    #[must_use]
    pub fn entries(&self) -> u64 {
        self.entries
    }

    /// All entries in order, each with its place.
    pub fn placed(&self) -> impl Iterator<Item = Placed> + use<'_> {
        let chunks = self.chunks.iter().enumerate();
        chunks.flat_map(|(chunk, entries)| {
            let placed = move |(at, entry)| Placed { entry, chunk, at };
            entries.iter().enumerate().map(placed)
        })
    }

    /// All entries in order.
    pub fn iter(&self) -> impl Iterator<Item = Entry> + use<'_> {
        self.placed().map(|placed| placed.entry)
    }

    /// Runs of blocks of the one file, of `size` bytes, that may differ from this state: those that changed, those
    /// that could not be read, and those that its file system does not use, now or then. None: all of them.
    #[must_use]
    pub fn changed_blocks(
        &self,
        path: &[u8],
        size: u64,
        unused: Option<&Map>,
    ) -> Option<Vec<Range<u64>>> {
        let changed = self.changed.as_ref()?;
        if self.get(path).map(|entry| entry.size()) != Some(size) {
            return None;
        }
        let lost = self.unreadable.iter();
        let lost = lost.map(|lost| lost.offset..lost.offset + lost.length);
        let bytes = self.block_size.bytes();
        let mut blocks: Vec<Range<u64>> = changed
            .iter()
            .cloned()
            .chain(lost)
            .filter(|range| range.start < size)
            .map(|range| range.start / bytes..range.end.min(size).div_ceil(bytes))
            .filter(|range| !range.is_empty())
            .collect();
        let maps = self.unused.as_deref().into_iter().chain(unused);
        blocks.extend(maps.flat_map(Map::runs));
        blocks.sort_unstable_by_key(|range| range.start);
        let mut runs: Vec<Range<u64>> = Vec::with_capacity(blocks.len());
        for range in blocks {
            match runs.last_mut() {
                Some(last) if last.end >= range.start => last.end = last.end.max(range.end),
                _ => runs.push(range),
            }
        }
        Some(runs)
    }

    /// The entry at `path`.
    #[must_use]
    pub fn get(&self, path: &[u8]) -> Option<Entry> {
        let past = self.chunks.partition_point(|chunk| *chunk.first <= *path);
        let chunk = self.chunks.get(past.checked_sub(1)?)?;
        chunk.iter().find(|entry| *entry.path == *path)
    }
}

impl Chunk {
    fn iter(&self) -> impl Iterator<Item = Entry> + use<'_> {
        let mut reader = Reader::new(&self.bytes);
        let mut path = Vec::new();
        (0..self.count).map(move |_| {
            let next = |reader: &mut Reader<'_>, path: &mut Vec<u8>| {
                path.truncate(usize::from(reader.u16()?));
                path.extend_from_slice(reader.short()?);
                unpack(path.as_slice().into(), reader)
            };
            next(&mut reader, &mut path).expect("the bytes are those that `Builder::append` wrote")
        })
    }
}

/// Puts a state together, in order.
pub struct Builder<'a> {
    root: RootHasher,
    block_size: BlockSize,
    previous: Option<&'a TreeState>,
    chunks: Vec<Arc<Chunk>>,
    entries: u64,
    open: Chunk,
    /// Path of the last entry in `open`.
    last: Vec<u8>,
    /// Kept entries of one chunk of the state before, from its first on.
    kept: Vec<Placed>,
}

impl<'a> Builder<'a> {
    /// Over nothing, or over the state before.
    #[must_use]
    pub fn new(key: &FleetKey, block_size: BlockSize, previous: Option<&'a TreeState>) -> Self {
        Self {
            root: RootHasher::new(key, block_size),
            block_size,
            previous,
            chunks: Vec::new(),
            entries: 0,
            open: Chunk::default(),
            last: Vec::new(),
            kept: Vec::new(),
        }
    }

    /// The next entry.
    pub fn push(&mut self, entry: &Entry) {
        self.copy_kept();
        self.root.add(entry);
        self.append(entry);
    }

    /// The next entry, which is as it was in the state before.
    pub fn keep(&mut self, placed: Placed) {
        self.root.add(&placed.entry);
        let follows = match self.kept.last() {
            Some(last) => (last.chunk, last.at + 1) == (placed.chunk, placed.at),
            None => placed.at == 0,
        };
        if !follows {
            self.copy_kept();
            if placed.at > 0 {
                return self.append(&placed.entry);
            }
        }
        let chunk = self
            .previous
            .and_then(|state| state.chunks.get(placed.chunk));
        self.kept.push(placed);
        if let Some(chunk) = chunk
            && chunk.count == self.kept.len()
        {
            self.close();
            self.chunks.push(Arc::clone(chunk));
            self.entries += chunk.count as u64;
            self.kept.clear();
        }
    }

    /// The state.
    #[must_use]
    pub fn finish(mut self) -> TreeState {
        self.copy_kept();
        self.close();
        TreeState {
            block_size: self.block_size,
            root: self.root.finish(),
            unreadable: Vec::new(),
            changed: None,
            unused: None,
            chunks: self.chunks,
            entries: self.entries,
        }
    }

    fn copy_kept(&mut self) {
        for placed in std::mem::take(&mut self.kept) {
            self.append(&placed.entry);
        }
    }

    fn append(&mut self, entry: &Entry) {
        if self.open.count == CHUNK {
            self.close();
        }
        if self.open.count == 0 {
            self.open.first = entry.path.clone();
            self.last.clear();
        }
        let shared = self
            .last
            .iter()
            .zip(&entry.path)
            .take_while(|(a, b)| a == b);
        // A path is at most 4095 bytes long.
        let shared = shared.count() as u16;
        self.open.bytes.extend_from_slice(&shared.to_le_bytes());
        put_short(&mut self.open.bytes, &entry.path[usize::from(shared)..]);
        pack(&mut self.open.bytes, entry);
        self.last.clear();
        self.last.extend_from_slice(&entry.path);
        self.open.count += 1;
        self.entries += 1;
    }

    fn close(&mut self) {
        let mut chunk = std::mem::take(&mut self.open);
        if chunk.count > 0 {
            chunk.bytes.shrink_to_fit();
            self.chunks.push(Arc::new(chunk));
        }
    }
}

/// Entries by path, to be changed one by one. What makes an entry recognisable on its host is not kept.
#[derive(Debug, Default)]
pub struct EntryMap(BTreeMap<Box<[u8]>, Box<[u8]>>);

impl EntryMap {
    /// The entry at `path`.
    #[must_use]
    pub fn get(&self, path: &[u8]) -> Option<Entry> {
        let (path, bytes) = self.0.get_key_value(path)?;
        Some(Self::entry(path, bytes))
    }

    /// How many there are.
    #[must_use]
    pub fn entries(&self) -> u64 {
        self.0.len() as u64
    }

    /// Puts an entry at its path.
    pub fn insert(&mut self, entry: &Entry) {
        let mut bytes = Vec::new();
        pack(
            &mut bytes,
            &Entry {
                seen: Seen::default(),
                ..entry.clone()
            },
        );
        self.0.insert(entry.path.clone(), bytes.into());
    }

    /// Takes away what is at `path`.
    pub fn remove(&mut self, path: &[u8]) {
        self.0.remove(path);
    }

    /// All paths, in order.
    pub fn paths(&self) -> impl Iterator<Item = &[u8]> {
        self.0.keys().map(|path| &**path)
    }

    /// All paths from `first` on, in order.
    pub fn paths_from(&self, first: &[u8]) -> impl Iterator<Item = &[u8]> {
        let range = (Bound::Included(first), Bound::Unbounded);
        self.0.range::<[u8], _>(range).map(|(path, _)| &**path)
    }

    /// All entries, in order.
    pub fn iter(&self) -> impl Iterator<Item = Entry> + use<'_> {
        self.0.iter().map(|(path, bytes)| Self::entry(path, bytes))
    }

    fn entry(path: &[u8], bytes: &[u8]) -> Entry {
        unpack(path.into(), &mut Reader::new(bytes))
            .expect("the bytes are those that `insert` wrote")
    }
}

impl FromIterator<Entry> for EntryMap {
    fn from_iter<I: IntoIterator<Item = Entry>>(entries: I) -> Self {
        let mut map = Self::default();
        for entry in entries {
            map.insert(&entry);
        }
        map
    }
}

/// Everything but the path.
fn pack(out: &mut Vec<u8>, entry: &Entry) {
    entry.encode_rest(out);
    let Seen {
        device,
        inode,
        changed,
        racy,
    } = entry.seen;
    out.push(u8::from(racy) | u8::from(entry.seen != Seen::default()) << 1);
    if entry.seen != Seen::default() {
        out.extend_from_slice(&device.to_le_bytes());
        out.extend_from_slice(&inode.to_le_bytes());
        out.extend_from_slice(&changed.seconds.to_le_bytes());
        out.extend_from_slice(&changed.nanoseconds.to_le_bytes());
    }
    if let Kind::File { blocks, .. } = &entry.kind {
        out.extend_from_slice(&(blocks.len() as u64).to_le_bytes());
        for block in blocks {
            out.extend_from_slice(&block.0);
        }
    }
}

fn unpack(path: Box<[u8]>, reader: &mut Reader<'_>) -> Result<Entry, Malformed> {
    let mut entry = Entry::decode_rest(path, reader)?;
    let flags = reader.u8()?;
    if flags & 2 != 0 {
        entry.seen = Seen {
            device: reader.u64()?,
            inode: reader.u64()?,
            changed: Timestamp {
                seconds: reader.i64()?,
                nanoseconds: reader.u32()?,
            },
            racy: flags & 1 != 0,
        };
    }
    if let Kind::File { blocks, .. } = &mut entry.kind {
        let count = reader.u64()?;
        *blocks = (0..count)
            .map(|_| reader.array().map(Signature))
            .collect::<Result<_, _>>()?;
    }
    Ok(entry)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn entry(path: &str, number: u64) -> Entry {
        let blocks = (0..number % 3)
            .map(|at| Signature([at as u8; 32]))
            .collect();
        Entry {
            path: path.as_bytes().into(),
            mode: 0o644,
            uid: 1,
            gid: 2,
            mtime: Timestamp {
                seconds: -5,
                nanoseconds: 6,
            },
            xattrs: Vec::new(),
            kind: Kind::File {
                size: number,
                blocks,
            },
            seen: Seen {
                device: 7,
                inode: number,
                changed: Timestamp {
                    seconds: 9,
                    nanoseconds: 1,
                },
                racy: number % 2 == 1,
            },
        }
    }

    fn alike(a: &Entry, b: &Entry) -> bool {
        a.same(b) && a.seen == b.seen
    }

    const KEY: FleetKey = FleetKey([3; 32]);

    fn state(entries: &[Entry]) -> TreeState {
        TreeState::new(&KEY, BlockSize::default(), entries.iter().cloned())
    }

    proptest! {
        #[test]
        fn what_was_put_in_comes_out_and_is_found(
            paths in proptest::collection::btree_set("[a-c]{1,3}(/[a-c]{1,2}){0,2}", 0..300), missing in "[a-d]{1,3}",
        ) {
            let entries: Vec<Entry> = paths.iter().zip(0..).map(|(path, at)| entry(path, at)).collect();
            let state = state(&entries);
            prop_assert_eq!(state.entries(), entries.len() as u64);
            prop_assert!(state.iter().zip(&entries).all(|(a, b)| alike(&a, b)));
            prop_assert_eq!(state.iter().count(), entries.len());
            for entry in &entries {
                prop_assert!(alike(&state.get(&entry.path).unwrap(), entry));
            }
            prop_assert_eq!(state.get(missing.as_bytes()).is_some(), paths.contains(&missing));
            let map: EntryMap = entries.iter().cloned().collect();
            prop_assert!(map.iter().zip(&entries).all(|(a, b)| a.same(b)));
        }

        #[test]
        fn a_state_after_another_is_what_a_new_one_would_be(
            count in 0..400_u64,
            changed in proptest::collection::btree_set(0..400_u64, 0..6),
            removed in proptest::collection::btree_set(0..400_u64, 0..6),
        ) {
            let path = |number: u64| format!("d/{number:04}");
            let entries: Vec<Entry> = (0..count).map(|number| entry(&path(number), number)).collect();
            let before = state(&entries);
            let mut builder = Builder::new(&KEY, BlockSize::default(), Some(&before));
            let mut wanted = Vec::new();
            for placed in before.placed() {
                let at: u64 = String::from_utf8_lossy(&placed.entry.path)[2..].parse().unwrap();
                if removed.contains(&at) {
                    continue;
                }
                if changed.contains(&at) {
                    let new = entry(&path(at), at + 1000);
                    builder.push(&new);
                    wanted.push(new);
                } else {
                    wanted.push(placed.entry.clone());
                    builder.keep(placed);
                }
            }
            let after = builder.finish();
            prop_assert_eq!(after.root, state(&wanted).root);
            prop_assert_eq!(after.entries(), wanted.len() as u64);
            prop_assert!(after.iter().zip(&wanted).all(|(a, b)| alike(&a, b)));
            let old: BTreeSet<_> = before.chunks.iter().map(Arc::as_ptr).collect();
            let new = after.chunks.iter().filter(|chunk| !old.contains(&Arc::as_ptr(chunk))).count();
            prop_assert!(new <= 2 * (changed.len() + removed.len()), "{new} chunks are new");
        }
    }
}
