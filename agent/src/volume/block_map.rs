//! The block map of a device: where the blocks lie that arrived here, whatever volume they belong to.
//!
//! Invariants: an entry is a hint and never trusted: a block is read from its place and signed again
//! before anyone gets it, and a stale entry is forgotten; the map survives a crash at any instant
//! (SQLite in WAL mode) and one that is damaged is begun anew; memory and disk are bounded.
//! Non-goal: blocks that did not come through the data plane.

use super::aligned::{ALIGNMENT, open_direct};
use super::confined::Confined;
use super::scan::read_full;
use super::sign::{FleetKey, signature};
use crate::model::ids::Signature;
use nix::fcntl::OFlag;
use nix::sys::stat::{Mode, SFlag, fstat};
use rusqlite::{Connection, OptionalExtension, params};
use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::File;
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Blocks shorter than this are neither remembered nor asked for: naming one costs 35 bytes and looking
/// it up some microseconds, which is most of what sending it costs.
pub const LEAST: usize = 16 << 10;
/// Entries of one generation; the map keeps two, and drops the older when the younger is full.
const GENERATION: u64 = 1 << 20;
/// Entries that are written together.
const TOGETHER: usize = 4096;
/// Pages of the database kept in memory, in KiB.
const CACHE_KIB: i64 = 16 << 10;

const SCHEMA: &str = "
CREATE TABLE IF NOT EXISTS files (
  id INTEGER PRIMARY KEY, root BLOB NOT NULL, path BLOB NOT NULL, UNIQUE (root, path)) STRICT;
CREATE TABLE IF NOT EXISTS young (
  name BLOB PRIMARY KEY, file INTEGER NOT NULL, offset INTEGER NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS old (
  name BLOB PRIMARY KEY, file INTEGER NOT NULL, offset INTEGER NOT NULL) STRICT, WITHOUT ROWID;
";

/// The map cannot be used; the device then takes every block from the wire.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} the block map {}: {source}; free space there or move the file away", .path.display())]
pub struct BlockMapError {
    action: &'static str,
    path: PathBuf,
    source: rusqlite::Error,
}

/// A signature's first half: what is looked up. The whole of it is checked against the block itself.
type Name = [u8; 16];

fn name(signature: &Signature) -> Name {
    let mut name = [0; 16];
    name.copy_from_slice(&signature.0[..16]);
    name
}

/// A file that holds blocks: a volume's directory and a path beneath it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Holder {
    /// The directory.
    pub root: Arc<Path>,
    /// Path beneath it.
    pub path: Box<[u8]>,
}

/// Where a block was written.
#[derive(Clone, Debug)]
struct Place {
    holder: Arc<Holder>,
    offset: u64,
}

/// What a device holds, by signature.
#[derive(Debug)]
pub struct BlockMap {
    path: PathBuf,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    database: Connection,
    /// Not yet written.
    pending: HashMap<Name, Place>,
    young: u64,
    old: u64,
    generation: u64,
    /// Made when a block is first looked for.
    sieve: Option<Sieve>,
}

/// Names that may be in the map; one that is not here is not there. Most blocks that are offered to a device are held
/// nowhere on it, and asking the database costs a hundred times as much.
struct Sieve(Vec<u64>);

impl Sieve {
    /// Bits; 16 for each entry of two full generations, so that one of 200 other names passes.
    const BITS: usize = 1 << 25;

    fn new() -> Self {
        Self(vec![0; Self::BITS / 64])
    }

    /// Places of a name: signatures are random, so parts of it will do.
    fn places(name: &Name) -> impl Iterator<Item = (usize, u64)> {
        let (parts, _) = name.as_chunks::<4>();
        parts.iter().take(3).map(|part| {
            let bit = u32::from_le_bytes(*part) as usize % Self::BITS;
            (bit / 64, 1 << (bit % 64))
        })
    }

    fn add(&mut self, name: &Name) {
        for (word, bit) in Self::places(name) {
            self.0[word] |= bit;
        }
    }

    fn may_hold(&self, name: &Name) -> bool {
        Self::places(name).all(|(word, bit)| self.0[word] & bit != 0)
    }
}

impl std::fmt::Debug for Sieve {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Sieve(…)")
    }
}

impl BlockMap {
    /// Opens the map in `directory`, making it when it is not there and beginning anew when it is
    /// damaged. Blocks.
    ///
    /// # Errors
    /// The file cannot be made or read.
    pub fn open(directory: &Path) -> Result<Self, BlockMapError> {
        Self::bounded(directory, GENERATION)
    }

    fn bounded(directory: &Path, generation: u64) -> Result<Self, BlockMapError> {
        let path = directory.join("blocks.sqlite");
        let state = State::open(directory, &path, generation).or_else(|error| {
            tracing::warn!(path = %path.display(), "the block map is damaged ({error}) and begun anew");
            for suffix in ["", "-wal", "-shm"] {
                let mut file = path.clone().into_os_string();
                file.push(suffix);
                // What is not there need not be removed; anything else shows when it is opened.
                let _ = std::fs::remove_file(file);
            }
            State::open(directory, &path, generation)
        });
        match state {
            Ok(state) => Ok(Self {
                path,
                state: Mutex::new(state),
            }),
            Err(source) => Err(BlockMapError {
                action: "open",
                path,
                source,
            }),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Entries at most: some may be stale, some counted twice.
    #[must_use]
    pub fn entries(&self) -> u64 {
        let state = self.state();
        state.young + state.old + state.pending.len() as u64
    }

    /// Remembers blocks that were just written to `holder`: their signatures and offsets.
    pub fn add(&self, holder: Holder, blocks: impl IntoIterator<Item = (Signature, u64)>) {
        let holder = Arc::new(holder);
        let mut state = self.state();
        for (signature, offset) in blocks {
            let (name, holder) = (name(&signature), Arc::clone(&holder));
            if let Some(sieve) = &mut state.sieve {
                sieve.add(&name);
            }
            state.pending.insert(name, Place { holder, offset });
        }
        if state.pending.len() >= TOGETHER {
            self.write(&mut state);
        }
    }

    /// Writes down what was added.
    pub fn flush(&self) {
        self.write(&mut self.state());
    }

    /// A map that cannot be written loses hints and nothing else.
    fn write(&self, state: &mut State) {
        if let Err(error) = state.write() {
            tracing::warn!(path = %self.path.display(), "what arrived is not noted in the block map: {error}");
            state.pending.clear();
        }
    }

    /// Where blocks may lie.
    fn find(&self, wanted: &[Wanted]) -> Vec<Option<Place>> {
        let mut state = self.state();
        if let Err(error) = state.make_sieve() {
            tracing::warn!(path = %self.path.display(), "the block map cannot be read: {error}");
            return vec![None; wanted.len()];
        }
        let place = |(signature, _): &Wanted| {
            let name = name(signature);
            if !state
                .sieve
                .as_ref()
                .is_some_and(|sieve| sieve.may_hold(&name))
            {
                return None;
            }
            if let Some(place) = state.pending.get(&name) {
                return Some(place.clone());
            }
            state.find(&name).unwrap_or_else(|error| {
                tracing::warn!(path = %self.path.display(), "the block map cannot be read: {error}");
                None
            })
        };
        wanted.iter().map(place).collect()
    }

    fn forget(&self, stale: &Signature) {
        let mut state = self.state();
        let name = name(stale);
        // An entry that stays is found stale again.
        if state.pending.remove(&name).is_none() {
            for table in ["young", "old"] {
                let delete = format!("DELETE FROM {table} WHERE name = ?1");
                let _ = state.database.execute(&delete, params![name]);
            }
        }
    }
}

impl Drop for BlockMap {
    fn drop(&mut self) {
        self.flush();
    }
}

impl State {
    fn open(directory: &Path, path: &Path, generation: u64) -> rusqlite::Result<Self> {
        // A directory that cannot be made shows when the file in it is opened.
        let _ = std::fs::create_dir_all(directory);
        let database = Connection::open(path)?;
        database.pragma_update(None, "journal_mode", "WAL")?;
        // The last transactions may be lost with the power, the file may not.
        database.pragma_update(None, "synchronous", "NORMAL")?;
        database.pragma_update(None, "cache_size", -CACHE_KIB)?;
        database.execute_batch(SCHEMA)?;
        let count = |table: &str| {
            let query = format!("SELECT count(*) FROM {table}");
            database.query_row(&query, [], |row| row.get::<_, i64>(0))
        };
        let (young, old) = (count("young")?, count("old")?);
        Ok(Self {
            young: young.unsigned_abs(),
            old: old.unsigned_abs(),
            database,
            pending: HashMap::new(),
            generation,
            sieve: None,
        })
    }

    fn make_sieve(&mut self) -> rusqlite::Result<()> {
        if self.sieve.is_some() {
            return Ok(());
        }
        let mut sieve = Sieve::new();
        for name in self.pending.keys() {
            sieve.add(name);
        }
        let mut names = self
            .database
            .prepare("SELECT name FROM young UNION ALL SELECT name FROM old")?;
        for name in names.query_map([], |row| row.get::<_, Name>(0))? {
            sieve.add(&name?);
        }
        drop(names);
        self.sieve = Some(sieve);
        Ok(())
    }

    fn find(&self, name: &Name) -> rusqlite::Result<Option<Place>> {
        let mut query = self.database.prepare_cached(
            "SELECT root, path, offset FROM
               (SELECT file, offset FROM young WHERE name = ?1
                UNION ALL SELECT file, offset FROM old WHERE name = ?1 LIMIT 1)
             JOIN files ON id = file",
        )?;
        query
            .query_row(params![name], |row| {
                let (root, path): (Vec<u8>, Vec<u8>) = (row.get(0)?, row.get(1)?);
                let holder = Holder {
                    root: Path::new(OsStr::from_bytes(&root)).into(),
                    path: path.into(),
                };
                Ok(Place {
                    holder: Arc::new(holder),
                    offset: row.get::<_, i64>(2)?.unsigned_abs(),
                })
            })
            .optional()
    }

    fn write(&mut self) -> rusqlite::Result<()> {
        let transaction = self.database.transaction()?;
        {
            let mut known: HashMap<*const Holder, i64> = HashMap::new();
            let mut file = transaction.prepare_cached(
                "INSERT INTO files (root, path) VALUES (?1, ?2)
                 ON CONFLICT DO UPDATE SET root = root RETURNING id",
            )?;
            let mut block = transaction.prepare_cached(
                "INSERT OR REPLACE INTO young (name, file, offset) VALUES (?1, ?2, ?3)",
            )?;
            // In the order of the index, so that a page is changed once.
            let mut entries: Vec<(&Name, &Place)> = self.pending.iter().collect();
            entries.sort_unstable_by_key(|(name, _)| **name);
            for (name, place) in entries {
                let key = Arc::as_ptr(&place.holder);
                let id = match known.get(&key) {
                    Some(id) => *id,
                    None => {
                        let root = place.holder.root.as_os_str().as_bytes();
                        let id =
                            file.query_row(params![root, place.holder.path], |row| row.get(0))?;
                        known.insert(key, id);
                        id
                    }
                };
                let offset = i64::try_from(place.offset).unwrap_or(i64::MAX);
                block.execute(params![name, id, offset])?;
            }
        }
        self.young += self.pending.len() as u64;
        if self.young >= self.generation {
            transaction.execute_batch(
                "DROP TABLE old; ALTER TABLE young RENAME TO old;
                 CREATE TABLE young (name BLOB PRIMARY KEY, file INTEGER NOT NULL, offset INTEGER NOT NULL)
                   STRICT, WITHOUT ROWID;
                 DELETE FROM files WHERE id NOT IN (SELECT file FROM old);",
            )?;
            self.old = std::mem::take(&mut self.young);
            // It lets names pass that are gone.
            self.sieve = None;
        }
        transaction.commit()?;
        self.pending.clear();
        Ok(())
    }
}

/// A block that is looked for, and the place in memory where it goes.
pub type Wanted = (Signature, Range<usize>);

/// Runs of blocks from this size are read past the page cache, which does not hold them either when they
/// came as a large file.
const DIRECT_LEAST: usize = 256 << 10;

/// Reads blocks that the map knows; belongs to one thread, and keeps the file it read last open.
#[derive(Debug, Default)]
pub struct BlockReader {
    open: Option<(Arc<Holder>, File)>,
    /// The same file past the page cache.
    direct: Option<File>,
}

impl BlockReader {
    /// Fills the places in `memory` of those blocks that the device holds, read from where they lie and signed
    /// again, and tells which they are; what is in the places of others is worthless. Places in order.
    pub fn read(
        &mut self,
        map: &BlockMap,
        key: &FleetKey,
        wanted: &[Wanted],
        memory: &mut [u8],
    ) -> Vec<bool> {
        let places = map.find(wanted);
        let mut held = Vec::with_capacity(wanted.len());
        while let Some(first) = wanted.get(held.len()) {
            let Some(Some(place)) = places.get(held.len()) else {
                held.push(false);
                continue;
            };
            // What lies one after the other both here and there is read at once.
            let follows = |(next, at): (&Wanted, &Option<Place>)| {
                let distance = (next.1.start - first.1.start) as u64;
                at.as_ref().is_some_and(|at| {
                    at.holder == place.holder && at.offset == place.offset.saturating_add(distance)
                })
            };
            let rest = wanted[held.len()..].iter().zip(&places[held.len()..]);
            let run = &wanted[held.len()..][..rest.take_while(|one| follows(*one)).count()];
            let past = run.last().map_or(first.1.end, |last| last.1.end);
            let start = first.1.start;
            let done = start + self.read_run(&place.holder, &mut memory[start..past], place.offset);
            for (wanted, range) in run {
                let right = range.end <= done && signature(key, &memory[range.clone()]) == *wanted;
                if !right {
                    map.forget(wanted);
                }
                held.push(right);
            }
        }
        held
    }

    /// Reads from a file and returns how many bytes it had.
    fn read_run(&mut self, holder: &Arc<Holder>, buffer: &mut [u8], offset: u64) -> usize {
        if !self.turn_to(holder) {
            return 0;
        }
        let Some((_, file)) = &self.open else {
            return 0;
        };
        let mut done = 0;
        if buffer.len() >= DIRECT_LEAST && buffer.as_ptr().addr().is_multiple_of(ALIGNMENT) {
            if self.direct.is_none() {
                self.direct = open_direct(file);
            }
            let whole = buffer.len() / ALIGNMENT * ALIGNMENT;
            let direct = self.direct.as_ref();
            // What cannot be had so is read through the page cache.
            let read =
                direct.and_then(|direct| direct.read_exact_at(&mut buffer[..whole], offset).ok());
            done = read.map_or(0, |()| whole);
        }
        let rest = read_full(file, &mut buffer[done..], offset + done as u64);
        done + rest.unwrap_or(0)
    }

    /// Opens the file, unless it is open.
    fn turn_to(&mut self, holder: &Arc<Holder>) -> bool {
        if self.open.as_ref().is_some_and(|(open, _)| open == holder) {
            return true;
        }
        (self.open, self.direct) = (None, None);
        let file = open_held(holder);
        self.open = file.map(|file| (Arc::clone(holder), file));
        self.open.is_some()
    }
}

fn open_held(holder: &Holder) -> Option<File> {
    let root = Confined::open(&holder.root).ok()?;
    // O_NONBLOCK: should a FIFO have taken the place, opening must not wait for a writer.
    let flags = OFlag::O_RDONLY | OFlag::O_NONBLOCK;
    let fd = root.open_beneath(&holder.path, flags, Mode::empty()).ok()?;
    let mode = SFlag::from_bits_truncate(fstat(fd.as_fd()).ok()?.st_mode);
    (mode & SFlag::S_IFMT == SFlag::S_IFREG).then(|| File::from(fd))
}

#[cfg(test)]
mod tests {
    use super::super::aligned::Aligned;
    use super::*;

    const KEY: FleetKey = FleetKey([9; 32]);

    fn block(number: usize) -> Vec<u8> {
        let mut block = vec![7; LEAST];
        block[..8].copy_from_slice(&number.to_le_bytes());
        block
    }

    fn holder(root: &Path, path: &str) -> Holder {
        Holder {
            root: root.into(),
            path: path.as_bytes().into(),
        }
    }

    /// A file of `count` blocks in `root`, remembered in `map`.
    fn remembered(map: &BlockMap, root: &Path, path: &str, numbers: Range<usize>) {
        let bytes: Vec<u8> = numbers.clone().flat_map(block).collect();
        std::fs::write(root.join(path), bytes).unwrap();
        let first = numbers.start;
        let blocks = numbers.map(|number| {
            let offset = ((number - first) * LEAST) as u64;
            (signature(&KEY, &block(number)), offset)
        });
        map.add(holder(root, path), blocks);
    }

    fn holds(map: &BlockMap, number: usize) -> bool {
        let mut buffer = vec![0; LEAST];
        let wanted = signature(&KEY, &block(number));
        let wanted = [(wanted, 0..LEAST)];
        let held = BlockReader::default().read(map, &KEY, &wanted, &mut buffer);
        assert!(!held[0] || buffer == block(number));
        held[0]
    }

    #[test]
    fn a_block_is_found_again_after_the_process_died_and_never_when_it_changed() {
        let dir = tempfile::tempdir().unwrap();
        let map = BlockMap::open(&dir.path().join("map")).unwrap();
        remembered(&map, dir.path(), "f", 0..10);
        assert!(holds(&map, 3) && !holds(&map, 11));
        map.flush();
        // No Drop runs at kill -9.
        std::mem::forget(map);
        let map = BlockMap::open(&dir.path().join("map")).unwrap();
        assert!((0..10).all(|number| holds(&map, number)));
        let file = std::fs::OpenOptions::new()
            .write(true)
            .open(dir.path().join("f"))
            .unwrap();
        file.write_all_at(b"x", 4 * LEAST as u64 + 99).unwrap();
        assert!(!holds(&map, 4) && holds(&map, 5));
        file.set_len(9 * LEAST as u64).unwrap();
        assert!(!holds(&map, 9));
        std::fs::remove_file(dir.path().join("f")).unwrap();
        assert!(!holds(&map, 5));
        let forgotten = map.find(&[(signature(&KEY, &block(5)), 0..LEAST)]);
        assert!(forgotten[0].is_none());
    }

    #[test]
    fn what_is_not_held_is_known_without_asking_and_what_is_added_later_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let map = BlockMap::bounded(&dir.path().join("map"), 2000).unwrap();
        remembered(&map, dir.path(), "f", 0..1000);
        map.flush();
        assert!(holds(&map, 7) && !holds(&map, 20_000));
        let passes = |number| {
            let state = map.state();
            let sieve = state.sieve.as_ref().unwrap();
            sieve.may_hold(&name(&signature(&KEY, &block(number))))
        };
        assert!((0..1000).all(passes));
        assert!((20_000..30_000).filter(|&number| passes(number)).count() < 50);
        remembered(&map, dir.path(), "g", 1000..1900);
        assert!(holds(&map, 1899) && holds(&map, 7));
        // A generation ends, and the sieve is made anew, with what waits to be written.
        remembered(&map, dir.path(), "h", 1900..2100);
        map.flush();
        remembered(&map, dir.path(), "i", 2100..2105);
        assert!(map.state().sieve.is_none());
        assert!(holds(&map, 7) && holds(&map, 2099) && holds(&map, 2104) && !holds(&map, 20_000));
    }

    #[test]
    fn a_run_of_blocks_is_read_at_once_and_only_what_is_right_in_it_counts() {
        let dir = tempfile::tempdir().unwrap();
        let map = BlockMap::open(&dir.path().join("map")).unwrap();
        remembered(&map, dir.path(), "f", 0..40);
        remembered(&map, dir.path(), "g", 40..43);
        let file = std::fs::OpenOptions::new()
            .write(true)
            .open(dir.path().join("f"))
            .unwrap();
        file.write_all_at(b"x", 4 * LEAST as u64 + 99).unwrap();
        file.set_len(38 * LEAST as u64 + 5).unwrap();
        // A block that is not known, and one in between that lies elsewhere.
        let numbers: Vec<usize> = (0..20).chain([99, 41]).chain(20..40).collect();
        let wanted: Vec<Wanted> = numbers
            .iter()
            .zip(0..)
            .map(|(&number, at)| {
                (
                    signature(&KEY, &block(number)),
                    at * LEAST..(at + 1) * LEAST,
                )
            })
            .collect();
        let mut memory = Aligned::default();
        let memory = memory.space(numbers.len() * LEAST);
        let held = BlockReader::default().read(&map, &KEY, &wanted, memory);
        for ((number, held), (_, range)) in numbers.iter().zip(held).zip(wanted) {
            assert_eq!(held, ![4, 38, 39, 99].contains(number), "block {number}");
            assert!(!held || memory[range] == block(*number));
        }
    }

    #[test]
    fn a_damaged_map_is_begun_anew() {
        let dir = tempfile::tempdir().unwrap();
        let map = BlockMap::open(dir.path()).unwrap();
        remembered(&map, dir.path(), "f", 0..3);
        drop(map);
        let database = dir.path().join("blocks.sqlite");
        std::fs::write(&database, vec![0x5a; 8192]).unwrap();
        let map = BlockMap::open(dir.path()).unwrap();
        assert!(!holds(&map, 1));
        remembered(&map, dir.path(), "f", 0..3);
        assert!(holds(&map, 1));
    }

    #[test]
    fn the_oldest_entries_make_room() {
        let dir = tempfile::tempdir().unwrap();
        let map = BlockMap::bounded(dir.path(), 8).unwrap();
        for file in 0..5 {
            remembered(
                &map,
                dir.path(),
                &format!("f{file}"),
                file * 6..file * 6 + 6,
            );
            map.flush();
        }
        assert!(map.entries() <= 24);
        assert!(!holds(&map, 0) && holds(&map, 29));
        let files: i64 = map
            .state()
            .database
            .query_row("SELECT count(*) FROM files", [], |row| row.get(0))
            .unwrap();
        assert!(files < 5, "{files} files are remembered");
    }

    #[test]
    fn a_link_that_leads_out_of_the_volume_is_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let inside = dir.path().join("volume");
        std::fs::create_dir(&inside).unwrap();
        let map = BlockMap::open(dir.path()).unwrap();
        remembered(&map, dir.path(), "secret", 0..1);
        std::os::unix::fs::symlink("../secret", inside.join("f")).unwrap();
        map.add(holder(&inside, "f"), [(signature(&KEY, &block(0)), 0)]);
        assert!(!holds(&map, 0));
    }
}
