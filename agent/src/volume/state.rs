//! Trees in little memory: about sixty bytes for an entry with a block, half of them its signature, so that a
//! million files fit.
//!
//! Invariants: a [`TreeState`] never changes; one that follows another shares the memory of all that was
//! kept; what was put in comes out. Non-goal: bytes from outside (see [`super::tree`]).

use super::codec::{Malformed, Reader, put_number, put_short};
use super::pages::VolumeMarks;
use super::rewritten::{FileExtents, Written, merged, rewritten};
use super::salvage::{Unreadable, of_file};
use super::sign::ZERO;
use super::sign::{BlockSize, FleetKey};
use super::tree::{Entry, Kind, RootHasher, Seen, Timestamp, Xattr};
use super::unused::Map;
use crate::model::extent::Extent;
use crate::model::ids::Signature;
use std::borrow::Borrow;
use std::cmp::Ordering;
use std::collections::{BTreeSet, HashSet};
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
    /// What the source's disk did not give up: bytes are zeros here, entries missing or as they were before. In the
    /// order of path and offset.
    pub unreadable: Vec<Unreadable>,
    /// Byte ranges of a volume of one piece outside of which nothing has changed since; none: not known.
    pub changed: Option<Vec<Range<u64>>>,
    /// Blocks of a volume of one piece that were taken for zeros because its file system did not use them.
    pub unused: Option<Arc<Map>>,
    /// Where large files lay just before they were read, by path.
    pub extents: FileExtents,
    /// Marks of the pages of large files as they were read.
    pub marks: VolumeMarks,
    /// What the device of those files was written to since; none: not known.
    pub written: Option<Arc<dyn Written>>,
    chunks: Vec<Arc<Chunk>>,
    entries: u64,
}

/// A file as it is now.
#[derive(Clone, Copy, Debug, Default)]
pub struct Now<'a> {
    /// Its device and inode, as stat(2) has them.
    pub inode: (u64, u64),
    /// Length, bytes.
    pub size: u64,
    /// Where it lies, everything written back; none: not known.
    pub extents: Option<&'a [Extent]>,
    /// What the file system on it does not use.
    pub unused: Option<&'a Map>,
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

    /// Runs of blocks of a file that may differ from this state: those that changed, those that could not be read,
    /// and those that its file system does not use, now or then. None: all of them.
    #[must_use]
    pub fn changed_blocks(&self, path: &[u8], now: &Now<'_>) -> Option<Vec<Range<u64>>> {
        let (bytes, size) = (self.block_size.bytes(), now.size);
        let changed = match &self.changed {
            Some(changed) if self.get(path)?.size() == size => changed.clone(),
            Some(_) => return None,
            None => self.rewritten(path, now)?,
        };
        let lost = of_file(&self.unreadable, path).iter();
        let lost = lost.map(Unreadable::range);
        let mut blocks: Vec<Range<u64>> = changed
            .into_iter()
            .chain(lost)
            .filter(|range| range.start < size)
            .map(|range| range.start / bytes..range.end.min(size).div_ceil(bytes))
            .filter(|range| !range.is_empty())
            .collect();
        let maps = self.unused.as_deref().into_iter().chain(now.unused);
        // A map of before may reach further than what is a shorter file by now.
        let total = self.block_size.blocks_of(size);
        let runs = maps.flat_map(Map::runs);
        let runs = runs.map(|run| run.start..run.end.min(total));
        blocks.extend(runs.filter(|run| !run.is_empty()));
        Some(merged(blocks))
    }

    /// Large files to which their device was written since, as far as that can be located.
    pub(super) fn touched(&self) -> HashSet<Box<[u8]>> {
        let Some(written) = self.written.as_deref().filter(|all| !all.anywhere()) else {
            return HashSet::new();
        };
        let files = self.extents.iter().filter(|(_, extents)| {
            let place = |one: &Extent| one.physical..one.physical.saturating_add(one.length);
            extents.iter().any(|one| written.within(&place(one)))
        });
        files.map(|(path, _)| path.clone()).collect()
    }

    /// Bytes of a file that may differ, by where it lies and what was written there.
    fn rewritten(&self, path: &[u8], now: &Now<'_>) -> Option<Vec<Range<u64>>> {
        let (written, before) = (self.written.as_deref()?, self.extents.get(path)?);
        let old = self.get(path)?;
        let is_same = (old.seen.device, old.seen.inode) == now.inode;
        if !is_same || written.device() != now.inode.0 || written.anywhere() {
            return None;
        }
        let unit = self.block_size.bytes();
        let Kind::File { blocks, .. } = &old.kind else {
            return None;
        };
        let block = |unit: u64| usize::try_from(unit).ok().and_then(|unit| blocks.get(unit));
        let zeros = |unit: u64| block(unit) == Some(&ZERO);
        let mut changed = rewritten(before, now.extents?, now.size, unit, zeros, written);
        // The last block has another length now, or is new.
        match old.size() {
            size if size < now.size => changed.push(size..now.size),
            size if size > now.size => changed.push(now.size.saturating_sub(1)..now.size),
            _ => {}
        }
        Some(changed)
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
        let (mut path, mut near) = (Vec::new(), Near::default());
        (0..self.count).map(move |_| {
            let mut next = || {
                path.truncate(reader.number()? as usize);
                let length = reader.number()?;
                path.extend_from_slice(reader.bytes(length as usize)?);
                unpack(path.as_slice().into(), &mut reader, &mut near)
            };
            next().expect("the bytes are those that `Builder::append` wrote")
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
    /// Path of the last entry in `open`, and what the next one is written by.
    last: Vec<u8>,
    near: Near,
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
            near: Near::default(),
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
            extents: FileExtents::new(),
            marks: VolumeMarks::new(),
            written: None,
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
            self.near = Near::default();
        }
        let pairs = self.last.iter().zip(&entry.path);
        let shared = pairs.take_while(|(a, b)| a == b).count();
        let rest = &entry.path[shared..];
        let bytes = &mut self.open.bytes;
        put_number(bytes, shared as u64);
        put_number(bytes, rest.len() as u64);
        bytes.extend_from_slice(rest);
        pack(bytes, entry, &mut self.near);
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
pub struct EntryMap(BTreeSet<Packed>);

/// An entry in one piece of memory: the length of its path, the path, the rest. Ordered by path.
#[derive(Debug)]
struct Packed(Box<[u8]>);

impl Packed {
    fn new(entry: &Entry) -> Self {
        let mut bytes = Vec::new();
        put_short(&mut bytes, &entry.path);
        let seen = Seen::default();
        let entry = Entry {
            seen,
            ..entry.clone()
        };
        pack(&mut bytes, &entry, &mut Near::default());
        Self(bytes.into())
    }

    fn split(&self) -> (&[u8], &[u8]) {
        let (length, rest) = self.0.split_at(2);
        rest.split_at(usize::from(u16::from_le_bytes([length[0], length[1]])))
    }

    fn path(&self) -> &[u8] {
        self.split().0
    }

    fn entry(&self) -> Entry {
        let (path, rest) = self.split();
        unpack(path.into(), &mut Reader::new(rest), &mut Near::default())
            .expect("the bytes are those that `Packed::new` wrote")
    }
}

impl Borrow<[u8]> for Packed {
    fn borrow(&self) -> &[u8] {
        self.path()
    }
}

impl Ord for Packed {
    fn cmp(&self, other: &Self) -> Ordering {
        self.path().cmp(other.path())
    }
}
impl PartialOrd for Packed {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}
impl PartialEq for Packed {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}
impl Eq for Packed {}

impl EntryMap {
    /// The entry at `path`.
    #[must_use]
    pub fn get(&self, path: &[u8]) -> Option<Entry> {
        self.0.get(path).map(Packed::entry)
    }

    /// How many there are.
    #[must_use]
    pub fn entries(&self) -> u64 {
        self.0.len() as u64
    }

    /// Puts an entry at its path.
    pub fn insert(&mut self, entry: &Entry) {
        self.0.replace(Packed::new(entry));
    }

    /// Takes away what is at `path`.
    pub fn remove(&mut self, path: &[u8]) {
        self.0.remove(path);
    }

    /// All paths, in order.
    pub fn paths(&self) -> impl Iterator<Item = &[u8]> {
        self.0.iter().map(Packed::path)
    }

    /// All paths from `first` on, in order.
    pub fn paths_from(&self, first: &[u8]) -> impl Iterator<Item = &[u8]> {
        let range = (Bound::Included(first), Bound::Unbounded);
        self.0.range::<[u8], _>(range).map(Packed::path)
    }

    /// All entries, in order.
    pub fn iter(&self) -> impl Iterator<Item = Entry> + use<'_> {
        self.0.iter().map(Packed::entry)
    }
}

impl FromIterator<Entry> for EntryMap {
    fn from_iter<I: IntoIterator<Item = Entry>>(entries: I) -> Self {
        Self(
            entries
                .into_iter()
                .map(|entry| Packed::new(&entry))
                .collect(),
        )
    }
}

/// What an entry mostly has in common with the one before it, or differs in by little.
#[derive(Clone, Copy)]
struct Near {
    /// Mode, owner and group.
    access: [u32; 3],
    seconds: i64,
    device: u64,
    inode: u64,
    changed: i64,
}

impl Default for Near {
    /// What is most frequent.
    fn default() -> Self {
        Self {
            access: [0o644, 0, 0],
            seconds: 0,
            device: 0,
            inode: 0,
            changed: 0,
        }
    }
}

impl Near {
    fn to(entry: &Entry) -> Self {
        Self {
            access: [entry.mode, entry.uid, entry.gid],
            seconds: entry.mtime.seconds,
            device: entry.seen.device,
            inode: entry.seen.inode,
            changed: entry.seen.changed.seconds,
        }
    }
}

/// Beside the number of the kind in the first byte of what [`pack`] writes.
const RACY: u8 = 1 << 3;
const SEEN: u8 = 1 << 4;
const OTHER_ACCESS: u8 = 1 << 5;
const XATTRS: u8 = 1 << 6;

/// Appends everything but the path, as it differs from what came before.
fn pack(out: &mut Vec<u8>, entry: &Entry, near: &mut Near) {
    let before = std::mem::replace(near, Near::to(entry));
    let flag = |set: bool, flag: u8| if set { flag } else { 0 };
    let seen = &entry.seen;
    let is_seen = *seen != Seen::default();
    let other_access = before.access != near.access;
    out.push(
        entry.kind.number()
            | flag(seen.racy, RACY)
            | flag(is_seen, SEEN)
            | flag(other_access, OTHER_ACCESS)
            | flag(!entry.xattrs.is_empty(), XATTRS),
    );
    if other_access {
        for number in near.access {
            put_number(out, number.into());
        }
    }
    put_difference(out, near.seconds.wrapping_sub(before.seconds));
    out.extend_from_slice(&entry.mtime.nanoseconds.to_le_bytes());
    if is_seen {
        put_difference(out, seen.device.wrapping_sub(before.device).cast_signed());
        put_difference(out, seen.inode.wrapping_sub(before.inode).cast_signed());
        put_difference(out, near.changed.wrapping_sub(before.changed));
        out.extend_from_slice(&seen.changed.nanoseconds.to_le_bytes());
    }
    if !entry.xattrs.is_empty() {
        put_number(out, entry.xattrs.len() as u64);
        for xattr in &entry.xattrs {
            for bytes in [&xattr.name, &xattr.value] {
                put_number(out, bytes.len() as u64);
                out.extend_from_slice(bytes);
            }
        }
    }
    match &entry.kind {
        Kind::Directory | Kind::Fifo => {}
        Kind::File { size, blocks } => {
            put_number(out, *size);
            put_number(out, blocks.len() as u64);
            for block in blocks {
                out.extend_from_slice(&block.0);
            }
        }
        Kind::CharDevice(number) | Kind::BlockDevice(number) => put_number(out, *number),
        Kind::Symlink(path) | Kind::HardLink(path) => put_short(out, path),
    }
}

fn unpack(path: Box<[u8]>, reader: &mut Reader<'_>, near: &mut Near) -> Result<Entry, Malformed> {
    let flags = reader.u8()?;
    if flags & OTHER_ACCESS != 0 {
        for number in &mut near.access {
            // They were written from numbers of this size.
            *number = reader.number()? as u32;
        }
    }
    near.seconds = near.seconds.wrapping_add(difference(reader)?);
    let [mode, uid, gid] = near.access;
    let mtime = Timestamp {
        seconds: near.seconds,
        nanoseconds: reader.u32()?,
    };
    let mut seen = Seen::default();
    if flags & SEEN != 0 {
        seen = Seen {
            device: near.device.wrapping_add_signed(difference(reader)?),
            inode: near.inode.wrapping_add_signed(difference(reader)?),
            changed: Timestamp {
                seconds: near.changed.wrapping_add(difference(reader)?),
                nanoseconds: reader.u32()?,
            },
            racy: flags & RACY != 0,
        };
    }
    let mut xattrs = Vec::new();
    if flags & XATTRS != 0 {
        for _ in 0..reader.number()? {
            let mut bytes = || {
                let length = reader.number()?;
                Ok(reader.bytes(length as usize)?.into())
            };
            xattrs.push(Xattr {
                name: bytes()?,
                value: bytes()?,
            });
        }
    }
    let kind = match flags & (RACY - 1) {
        0 => Kind::Directory,
        1 => Kind::File {
            size: reader.number()?,
            blocks: (0..reader.number()?)
                .map(|_| reader.array().map(Signature))
                .collect::<Result<_, _>>()?,
        },
        2 => Kind::Symlink(reader.short()?.into()),
        3 => Kind::HardLink(reader.short()?.into()),
        4 => Kind::Fifo,
        5 => Kind::CharDevice(reader.number()?),
        _ => Kind::BlockDevice(reader.number()?),
    };
    let entry = Entry {
        path,
        mode,
        uid,
        gid,
        mtime,
        xattrs,
        kind,
        seen,
    };
    *near = Near::to(&entry);
    Ok(entry)
}

fn put_difference(out: &mut Vec<u8>, difference: i64) {
    // Small ones of either sign become small numbers.
    put_number(
        out,
        ((difference << 1) ^ (difference >> 63)).cast_unsigned(),
    );
}

fn difference(reader: &mut Reader<'_>) -> Result<i64, Malformed> {
    let number = reader.number()?;
    Ok((number >> 1).cast_signed() ^ -((number & 1).cast_signed()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// An entry that differs from others in everything, and a file with everything as usual for most numbers.
    fn entry(path: &str, number: u64) -> Entry {
        let odd = number.is_multiple_of(5);
        let pieces = (0..number % 3)
            .map(|at| Signature([at as u8; 32]))
            .collect();
        let kinds = [
            Kind::Directory,
            Kind::Symlink(b"over/there".as_slice().into()),
            Kind::HardLink(b"first".as_slice().into()),
            Kind::Fifo,
            Kind::CharDevice(number),
            Kind::BlockDevice(u64::MAX),
        ];
        let which = usize::try_from(number / 5).unwrap();
        Entry {
            path: path.as_bytes().into(),
            mode: if odd { 0o4755 } else { 0o644 },
            uid: if odd { u32::MAX } else { 0 },
            gid: number as u32 % 2,
            mtime: Timestamp {
                seconds: if odd { i64::MIN + number as i64 } else { -5 },
                nanoseconds: 999_999_999,
            },
            xattrs: (0..number % 4)
                .map(|at| Xattr {
                    name: format!("user.{at}").into_bytes().into(),
                    value: vec![7; 100 * at as usize].into(),
                })
                .collect(),
            kind: match kinds.get(which).filter(|_| odd) {
                Some(kind) => kind.clone(),
                None => Kind::File {
                    size: number << 20,
                    blocks: pieces,
                },
            },
            seen: Seen {
                device: 7,
                inode: if odd { u64::MAX } else { number },
                changed: Timestamp {
                    seconds: if odd { i64::MAX } else { 9 },
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
