//! A volume on the target before its data is there: what is absent is fetched when it is read, what is written
//! here wins over what arrives later.
//!
//! Layout of its directory: `data`, the tree with sparse files; `origins`, one more name of each file that
//! still lacks pages, so that it is found wherever it was renamed to; `index`, which origin is which file of
//! the source; `live` and `durable`, the presence; `arriving`, files that are being written to. Invariants: bytes go to disk before their mark; an arrival
//! touches only pages that are absent; nobody waits longer than the patience. Non-goals: who owns the volume.

mod arrivals;
mod doubt;
mod durable;
mod holes;
mod looks;

use self::arrivals::{Inlet, Withheld};
use self::doubt::Doubt;
pub use self::holes::Extent;
use self::holes::Maps;
use self::looks::Notes;
use super::ahead::Streams;
use super::draft::listed;
use super::mirror::{Mirror, Mirrored};
use super::origins::{Origin, StoreError, failed, make, mask, numbers, read_index, read_list};
use super::presence::{PAGE, Presence};
use super::proof::{ASKED_CAP, Proof};
use super::reuse::{end_copies, private, reuses};
use crate::model::ids::Signature;
use crate::transfer::Options;
use crate::transfer::fetch::{
    Arrivals, BLOCK, Class, FetchPlan, Fetcher, Place, Refusal, root_of_list,
};
use crate::volume::scan::read_full;
use crate::volume::walk::kind_of;
use crate::volume::{Confined, FleetKey};
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::stat::{FileStat, SFlag, fstat};
use std::collections::{HashMap, HashSet, VecDeque};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, RwLock};
use std::time::{Duration, Instant};

const SHARDS: usize = 64;
/// Origins kept open for what arrives.
const OPEN_CAP: usize = 256;

/// What is known of a block that was asked for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Asked {
    For(Class),
    Refused(Refusal),
}

#[derive(Default)]
struct Shard {
    asked: Mutex<HashMap<Place, Asked>>,
    changed: Condvar,
}

/// What a store has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Figures {
    /// Bytes of the volume's files on the source.
    pub bytes: u64,
    /// Bytes that are not here yet.
    pub absent: u64,
    /// Blocks fetched because somebody waited for them.
    pub on_demand: u64,
    /// Blocks fetched before anybody asked.
    pub ahead: u64,
    /// Bytes of blocks that came from the source itself since this store was opened.
    #[serde(default)]
    pub from_source: u64,
    /// Bytes of blocks that came from the paired device in its stead since then.
    #[serde(default)]
    pub from_paired: u64,
    /// Bytes that an earlier copy had brought here already, as far as was asked since this store was opened.
    #[serde(default)]
    pub held: u64,
    /// Blocks that the source did not give, gone there or unreadable, or that could not be kept here.
    pub refused: u64,
    /// Whether it has let go of the source: all that is wanted is here.
    pub detached: bool,
}

/// The volume.
pub struct Store {
    directory: PathBuf,
    /// The volume's, for messages.
    name: String,
    data: Confined,
    pub(super) origins: Vec<Origin>,
    numbers: RwLock<HashMap<u64, u32>>,
    /// How often an origin was let go of, or is one again.
    turnover: AtomicU64,
    /// How often each origin is open.
    held: Mutex<HashMap<u32, u32>>,
    pub(super) presence: Presence,
    proof: Option<Proof>,
    /// Blocks whose signatures were asked for.
    signing: Mutex<HashSet<Place>>,
    doubt: Mutex<Doubt>,
    maps: Maps,
    shards: [Shard; SHARDS],
    /// Held for reading by who changes a file here, for writing by who cuts it and by what arrives in it.
    cuts: [RwLock<()>; SHARDS],
    open: Mutex<HashMap<u32, Arc<File>>>,
    notes: Notes,
    fetcher: Mutex<Option<Arc<Fetcher>>>,
    mirror: OnceLock<Mirror>,
    plan: Arc<FetchPlan>,
    options: Options,
    patience: Duration,
    pub(super) recent: Mutex<VecDeque<u32>>,
    streams: Mutex<Streams>,
    pub(super) window: Window,
    on_demand: AtomicU64,
    ahead: AtomicU64,
    held_before: AtomicU64,
    refused: AtomicU64,
    /// Why what arrived last could not be kept.
    unkept: Mutex<Option<String>>,
    withheld: Mutex<Withheld>,
    /// Why nothing more counts as durable in this life of the host.
    unsafe_here: Mutex<Option<String>>,
    unsafe_note: File,
    /// Its directory, open for as long as what fails on that file system is to be heard of.
    disk: File,
    is_written_back: AtomicBool,
    /// It was said that origins cannot be let go of.
    is_apart: AtomicBool,
    /// Its files may hold what an earlier copy left.
    reuses: bool,
}

/// An origin that is open for as long as this lives.
pub struct Held(Arc<Store>, u32);

impl Held {
    /// Its number.
    #[must_use]
    pub fn number(&self) -> u32 {
        self.1
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let mut held = locked(&self.0.held);
        if let Some(count) = held.get_mut(&self.1) {
            *count -= 1;
            if *count == 0 {
                held.remove(&self.1);
            }
        }
    }
}

/// Blocks that were asked for because somebody waits for them.
pub struct Wanted {
    number: u32,
    blocks: Vec<u64>,
    until: Instant,
}

/// Questions of the background that are open.
#[derive(Default)]
pub(super) struct Window {
    pub(super) open: Mutex<u64>,
    pub(super) changed: Condvar,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Plain values, whole after every statement.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Store {
    /// Opens the store in `directory`, or makes it from the source's list of the volume. Reads of what is
    /// absent wait for `patience`; device nodes are made only where they are taken. One that `proves` keeps the
    /// signatures of what arrives, for [`Self::root`].
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn open(
        directory: &Path,
        volume: &str,
        plan: FetchPlan,
        options: &Options,
        patience: Duration,
        devices: bool,
        proves: bool,
    ) -> Result<Arc<Self>, StoreError> {
        let plan = Arc::new(plan);
        let failed = |doing| failed(doing, directory);
        private(directory).map_err(failed("make the directory"))?;
        let origins = match read_index(directory).map_err(failed("read the index"))? {
            Some(origins) => origins,
            None => make(directory, volume, &listed(&plan, options, &[])?, devices)?,
        };
        end_copies(directory).map_err(failed("remove an earlier copy"))?;
        let blocks = origins.last().map_or(0, |last| last.first + last.blocks());
        let real = origins
            .iter()
            .flat_map(|origin| (0..origin.blocks()).map(|block| origin.real(block)));
        // Nobody can have cut a file of one that was never open, and looking at each takes time.
        let is_new = !directory.join("durable").exists();
        let presence =
            Presence::open(directory, blocks, real).map_err(failed("keep the presence"))?;
        if is_new {
            let kept = File::open(directory).and_then(|directory| directory.sync_all());
            kept.map_err(failed("keep the presence"))?;
        }
        let numbers = numbers(directory).map_err(failed("list the origins"))?;
        let (unsafe_here, unsafe_note) =
            durable::noted(directory).map_err(failed("note what fails"))?;
        let disk = File::open(directory).map_err(failed("open the directory"))?;
        let notes = Notes::open(directory).map_err(failed("restore what arrived last"))?;
        let data = Confined::open(&directory.join("data"))
            .map_err(|error| failed("open the data")(error.into()))?;
        let proof = proves
            .then(|| Proof::open(directory, plan.fleet_key.clone(), &origins, &presence))
            .transpose()
            .map_err(failed("keep the signatures"))?;
        let store = Arc::new(Self {
            directory: directory.to_owned(),
            name: volume.to_owned(),
            data,
            origins,
            numbers: RwLock::new(numbers),
            turnover: AtomicU64::new(0),
            held: Mutex::default(),
            presence,
            proof,
            signing: Mutex::default(),
            doubt: Mutex::default(),
            maps: Maps::default(),
            shards: std::array::from_fn(|_| Shard::default()),
            cuts: std::array::from_fn(|_| RwLock::new(())),
            open: Mutex::default(),
            notes,
            fetcher: Mutex::default(),
            mirror: OnceLock::new(),
            plan,
            options: options.clone(),
            patience,
            recent: Mutex::default(),
            streams: Mutex::default(),
            window: Window::default(),
            on_demand: AtomicU64::new(0),
            ahead: AtomicU64::new(0),
            held_before: AtomicU64::new(0),
            refused: AtomicU64::new(0),
            unkept: Mutex::default(),
            withheld: Mutex::default(),
            unsafe_here: Mutex::new(unsafe_here),
            unsafe_note,
            disk,
            is_written_back: AtomicBool::new(false),
            is_apart: AtomicBool::new(false),
            reuses: reuses(directory),
        });
        if !is_new {
            let marked = store.mark_cut();
            marked.map_err(failed("look at the ends of files"))?;
        }
        if store.presence.absent() > 0 || proves {
            let inlet: Arc<dyn Arrivals> = Arc::new(Inlet(Arc::downgrade(&store)));
            let fetcher = Fetcher::start(Arc::clone(&store.plan), options.clone(), &inlet)
                .map_err(failed("start threads for the store"))?;
            *locked(&store.fetcher) = Some(Arc::new(fetcher));
        }
        Ok(store)
    }

    /// Root of the list that the store in `directory` was made from, as [`crate::transfer::fetch::list_root`] gives it
    /// on the source.
    ///
    /// # Errors
    /// The list cannot be read.
    pub fn list_root(directory: &Path, key: &FleetKey) -> io::Result<Signature> {
        Ok(root_of_list(&read_list(directory)?, key))
    }

    /// The tree.
    #[must_use]
    pub fn data(&self) -> &Confined {
        &self.data
    }

    /// What it has done so far.
    #[must_use]
    pub fn figures(&self) -> Figures {
        Figures {
            bytes: self.origins.iter().map(|origin| origin.size).sum(),
            absent: self.presence.absent() * PAGE,
            on_demand: self.on_demand.load(Ordering::Relaxed),
            ahead: self.ahead.load(Ordering::Relaxed),
            from_source: self.plan.tally.source(),
            from_paired: self.plan.tally.stand_in(),
            held: self.held_before.load(Ordering::Relaxed),
            refused: self.refused.load(Ordering::Relaxed),
            detached: locked(&self.fetcher).is_none(),
        }
    }

    /// Why what arrives cannot be kept here, for people; none while it can.
    #[must_use]
    pub fn unkept(&self) -> Option<String> {
        locked(&self.unkept).clone()
    }

    /// Whether it is to be proven before the source is let go of.
    #[must_use]
    pub fn proves(&self) -> bool {
        self.proof.is_some()
    }

    /// Root over the list with what arrived, as a scan of the source's tree gives it in blocks of 64 KiB; none while
    /// something is absent, or the signature of something that was written over or removed before it came. Asks the
    /// source for such signatures: to be called again.
    ///
    /// # Errors
    /// The disk here refuses what is kept for it.
    pub fn root(&self) -> Result<Option<Signature>, StoreError> {
        self.prove()
            .map_err(failed("prove what arrived", &self.directory))
    }

    fn prove(&self) -> io::Result<Option<Signature>> {
        let Some(proof) = &self.proof else {
            return Ok(None);
        };
        if let Some(why) = self.unsafe_here() {
            return Err(io::Error::other(why));
        }
        // One that was is whole and durable, or was removed.
        if !self.is_settled() {
            return Ok(None);
        }
        let lacking = proof.lacking(&self.origins)?;
        if lacking.is_empty() {
            if !self.is_mended(proof)? {
                return Ok(None);
            }
            *locked(&self.withheld) = Withheld::default();
            self.write_back()?;
            return proof.root(&self.directory, &self.origins);
        }
        let fetcher = locked(&self.fetcher).clone();
        let Some(fetcher) = fetcher else {
            return Ok(None);
        };
        for place in lacking {
            if self.is_put_off(place) {
                continue;
            }
            {
                let mut signing = locked(&self.signing);
                if signing.len() >= ASKED_CAP || !signing.insert(place) {
                    continue;
                }
            }
            fetcher.ask_signature(place, &self.origins[place.file as usize].path);
        }
        Ok(None)
    }

    /// Mirrors every change of the tree to the source from now on, or again; a sync waits for so long for a source
    /// that is away. To be called before the tree is mounted.
    ///
    /// # Errors
    /// The log cannot be kept.
    pub fn mirror(&self, patience: Duration) -> Result<(), StoreError> {
        let directory = self.directory.join("mirror");
        let (plan, options) = (Arc::clone(&self.plan), self.options.clone());
        let mirror = Mirror::open(&directory, self, plan, options, patience)?;
        // A second one would be of the same log; it is never asked for.
        let _ = self.mirror.set(mirror);
        Ok(())
    }

    /// Mirrors no further: the source is not needed any more.
    pub fn end_mirror(&self) {
        if let Some(mirror) = self.mirror.get() {
            mirror.end();
        }
    }

    /// How far the mirror is, where there is one.
    #[must_use]
    pub fn mirrored(&self) -> Option<Mirrored> {
        self.mirror.get().map(Mirror::figures)
    }

    /// Waits until the source has every change durably, for as long as `patience`.
    ///
    /// # Errors
    /// Why it has not.
    pub fn settle_mirror(&self, patience: Duration) -> Result<(), String> {
        let mirror = self.mirror.get();
        mirror.map_or(Ok(()), |mirror| mirror.settle(patience))
    }

    /// The mirror, while changes are to be logged.
    pub(super) fn logs_to(&self) -> Option<&Mirror> {
        self.mirror.get().filter(|mirror| !mirror.is_lost())
    }

    /// Waits until what was changed is safe on both sides, as far as it is mirrored.
    ///
    /// # Errors
    /// The note that it is not cannot be kept.
    pub fn sync_mirror(&self) -> io::Result<()> {
        self.logs_to().map_or(Ok(()), Mirror::sync)
    }

    /// Ends its connections to the source; what is absent then stays so, and who waits for it gets an error.
    pub fn detach(&self) {
        // Dropped outside of the lock: it waits for threads that may want it.
        let fetcher = locked(&self.fetcher).take();
        drop(fetcher);
        self.maps.end();
        for shard in &self.shards {
            let mut asked = locked(&shard.asked);
            for known in asked.values_mut() {
                if let Asked::For(_) = known {
                    *known = Asked::Refused(Refusal::Gone);
                }
            }
            shard.changed.notify_all();
        }
    }

    /// Number of the origin that the file with this inode number is, while pages of it may be absent.
    #[must_use]
    pub fn number(&self, inode: u64) -> Option<u32> {
        let numbers = self.numbers.read().unwrap_or_else(PoisonError::into_inner);
        numbers.get(&inode).copied()
    }

    /// What `look` finds, and how many names that has beside the store's own, which is nobody's business; it looks again
    /// where an origin was let go of in between.
    ///
    /// # Errors
    /// As `look`.
    pub(super) fn links<E>(
        &self,
        look: impl Fn() -> Result<FileStat, E>,
    ) -> Result<(FileStat, u64), E> {
        loop {
            let before = self.turnover.load(Ordering::Acquire);
            // Nobody waits for that: a look may take long.
            let stat = look()?;
            let numbers = self.numbers.read().unwrap_or_else(PoisonError::into_inner);
            if self.turnover.load(Ordering::Acquire) != before {
                continue;
            }
            let is_file = kind_of(&stat) == SFlag::S_IFREG;
            let own = is_file && numbers.contains_key(&stat.st_ino);
            return Ok((stat, stat.st_nlink.saturating_sub(u64::from(own))));
        }
    }

    /// Changes which origins there are; in the course of it their names are made or removed.
    pub(super) fn turn_over<T>(&self, change: impl FnOnce(&mut HashMap<u64, u32>) -> T) -> T {
        let mut numbers = self.numbers.write().unwrap_or_else(PoisonError::into_inner);
        let changed = change(&mut numbers);
        // Last, so that who looked before sees that.
        self.turnover.fetch_add(1, Ordering::Release);
        changed
    }

    /// Whether every page of an origin is here.
    #[must_use]
    pub fn is_whole(&self, number: u32) -> bool {
        self.origins
            .get(number as usize)
            .is_none_or(|origin| (0..origin.blocks()).all(|block| self.missing(origin, block) == 0))
    }

    fn missing(&self, origin: &Origin, block: u64) -> u16 {
        origin.real(block) & !self.presence.of(origin.first + block)
    }

    /// Reads; fewer bytes than asked only at the end of the file.
    ///
    /// # Errors
    /// What is absent did not come in time (`EIO`), or the disk's error.
    pub fn read(
        &self,
        file: &File,
        number: Option<u32>,
        buffer: &mut [u8],
        offset: u64,
    ) -> io::Result<usize> {
        if let Some(wanted) = self.want(number, offset, buffer.len() as u64) {
            self.wait(&wanted)?;
        }
        read_full(file, buffer, offset)
    }

    /// Asks for what a read of this range lacks, and for what follows it when the file is read in order; none
    /// when the read need not wait.
    #[must_use]
    pub fn want(&self, number: Option<u32>, offset: u64, length: u64) -> Option<Wanted> {
        let (number, origin) = self.origin(number)?;
        let lacking = self.absent_blocks(origin, offset, length);
        let end = offset.saturating_add(length).min(origin.size);
        if offset < end {
            let blocks = offset / BLOCK..end.div_ceil(BLOCK);
            let ahead = locked(&self.streams).read(number, blocks, !lacking.is_empty());
            let wanted = self.ask_for(number, lacking);
            for block in ahead.start..ahead.end.min(origin.blocks()) {
                self.ask_first(number, block);
            }
            return wanted;
        }
        None
    }

    /// As [`Self::want`], for what a write of this range lacks: the rest of pages that it writes in part.
    #[must_use]
    pub fn want_edges(&self, number: Option<u32>, offset: u64, length: u64) -> Option<Wanted> {
        let (number, origin) = self.origin(number)?;
        let end = offset.saturating_add(length);
        let mut lacking = Vec::new();
        if !offset.is_multiple_of(PAGE) {
            lacking.extend(self.absent_blocks(origin, offset, 1));
        }
        if !end.is_multiple_of(PAGE) && end < origin.size {
            lacking.extend(self.absent_blocks(origin, end - 1, 1));
        }
        self.ask_for(number, lacking)
    }

    fn origin(&self, number: Option<u32>) -> Option<(u32, &Origin)> {
        if self.presence.absent() == 0 {
            return None;
        }
        let number = number?;
        Some((number, self.origins.get(number as usize)?))
    }

    /// Whether a read would wait for the source.
    #[must_use]
    pub fn waits(&self, number: Option<u32>, offset: u64, length: u64) -> bool {
        let origin = number.and_then(|number| self.origins.get(number as usize));
        origin.is_some_and(|origin| !self.absent_blocks(origin, offset, length).is_empty())
    }

    /// Writes all of it.
    ///
    /// # Errors
    /// As [`Self::read`]: the rest of a page that is written in part must be here.
    pub fn write(
        &self,
        file: &File,
        number: Option<u32>,
        bytes: &[u8],
        offset: u64,
    ) -> io::Result<()> {
        self.change(number, offset, bytes.len() as u64, |from, length| {
            let start = (from - offset) as usize;
            file.write_all_at(&bytes[start..start + length as usize], from)
        })
    }

    /// Makes a range read as zeros: as a hole, or allocated; never changes the file's size.
    ///
    /// # Errors
    /// As [`Self::write`].
    pub fn zero(
        &self,
        file: &File,
        number: Option<u32>,
        offset: u64,
        length: u64,
        hole: bool,
    ) -> io::Result<()> {
        let mode = if hole {
            FallocateFlags::FALLOC_FL_PUNCH_HOLE
        } else {
            FallocateFlags::FALLOC_FL_ZERO_RANGE
        };
        self.change(number, offset, length, |from, length| {
            let flags = mode | FallocateFlags::FALLOC_FL_KEEP_SIZE;
            match fallocate(file, flags, signed(from), signed(length)) {
                // A file system without holes.
                Err(nix::errno::Errno::EOPNOTSUPP) => {
                    let end = fstat(file)?.st_size.unsigned_abs().min(from + length);
                    let zeros = vec![0; end.saturating_sub(from) as usize];
                    file.write_all_at(&zeros, from)
                }
                other => Ok(other?),
            }
        })
    }

    /// Does `act` to a range block by block, each guarded against what arrives, and marks its pages.
    fn change(
        &self,
        number: Option<u32>,
        offset: u64,
        length: u64,
        act: impl Fn(u64, u64) -> io::Result<()>,
    ) -> io::Result<()> {
        let end = offset.saturating_add(length);
        let known = number.and_then(|number| {
            let origin = self.origins.get(number as usize)?;
            Some((number, origin))
        });
        let Some((number, origin)) = known else {
            return act(offset, length);
        };
        let is_here = self.absent_blocks(origin, offset, length).is_empty();
        if !is_here && let Some(wanted) = self.want_edges(Some(number), offset, length) {
            self.wait(&wanted)?;
        }
        let _quiet = self.quiet(Some(number));
        self.notes.forgive(number)?;
        if is_here {
            return act(offset, length);
        }
        let mut from = offset;
        while from < end {
            let block = from / BLOCK;
            if block >= origin.blocks() {
                return act(from, end - from);
            }
            let to = end.min((block + 1) * BLOCK);
            let place = Place {
                file: number,
                block,
            };
            let _turn = locked(&self.shard(place).asked);
            act(from, to - from)?;
            let start = block * BLOCK;
            let pages = mask((from - start) / PAGE, (to - start).div_ceil(PAGE));
            let new = pages & self.missing(origin, block);
            if new != 0 {
                self.presence.mark(origin.first + block, new)?;
            }
            from = to;
        }
        Ok(())
    }

    /// Sets the size of a file.
    ///
    /// # Errors
    /// As [`Self::write`].
    pub fn truncate(&self, file: &File, number: Option<u32>, size: u64) -> io::Result<()> {
        let known = number.and_then(|number| {
            let origin = self.origins.get(number as usize)?;
            Some((number, origin))
        });
        let Some((number, origin)) = known.filter(|(_, origin)| size < origin.size) else {
            let _quiet = self.quiet(number);
            number.map_or(Ok(()), |number| self.notes.forgive(number))?;
            return file.set_len(size);
        };
        if let Some(wanted) = self.want_edges(Some(number), size, 0) {
            self.wait(&wanted)?;
        }
        // Dead with the host in between, the page of the new end would else arrive again, whole.
        let edge = origin.first + size / BLOCK;
        if !size.is_multiple_of(PAGE) && !self.presence.soft(edge..edge + 1).is_empty() {
            self.sync(file, Some(number))?;
        }
        let _cut = self
            .cut(number)
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        self.notes.forgive(number)?;
        // Dead in between, the next opening marks the rest; marked first, it would read as whatever is there.
        file.set_len(size)?;
        self.mark_beyond(origin, size)
    }

    /// Marks what is beyond the end of a file that was cut: nothing must arrive there.
    fn mark_beyond(&self, origin: &Origin, size: u64) -> io::Result<()> {
        for block in size / BLOCK..origin.blocks() {
            let start = block * BLOCK;
            let kept = size.saturating_sub(start).div_ceil(PAGE);
            let new = self.missing(origin, block) & !mask(0, kept);
            if new != 0 {
                self.presence.mark(origin.first + block, new)?;
            }
        }
        Ok(())
    }

    /// Marks what is beyond the ends of files that were cut just before this host or process died.
    fn mark_cut(&self) -> io::Result<()> {
        let numbers = self.numbers.read().unwrap_or_else(PoisonError::into_inner);
        for &number in numbers.values().filter(|number| !self.is_whole(**number)) {
            if let Some(origin) = self.origins.get(number as usize) {
                let size = std::fs::metadata(self.origin_path(number))?.len();
                if size < origin.size {
                    self.mark_beyond(origin, size)?;
                }
            }
        }
        Ok(())
    }

    fn cut(&self, number: u32) -> &RwLock<()> {
        &self.cuts[number as usize % SHARDS]
    }

    fn shard(&self, place: Place) -> &Shard {
        let mixed = u64::from(place.file)
            .wrapping_mul(31)
            .wrapping_add(place.block);
        &self.shards[(mixed % SHARDS as u64) as usize]
    }

    /// The file of an origin, wherever it is named now.
    pub(super) fn origin_file(&self, number: u32) -> io::Result<Arc<File>> {
        if let Some(file) = locked(&self.open).get(&number) {
            return Ok(Arc::clone(file));
        }
        let path = self.origin_path(number);
        let file = Arc::new(OpenOptions::new().read(true).write(true).open(path)?);
        let mut open = locked(&self.open);
        if open.len() >= OPEN_CAP {
            open.clear();
        }
        open.insert(number, Arc::clone(&file));
        Ok(file)
    }

    fn origin_path(&self, number: u32) -> PathBuf {
        self.directory.join("origins").join(number.to_string())
    }

    /// Holds the origin that the open file with this inode number is, while pages of it may be absent: these are wanted
    /// also when its last name is removed.
    #[must_use]
    pub fn hold(self: &Arc<Self>, inode: u64) -> Option<Held> {
        // Nobody lets go of it in between.
        let numbers = self.numbers.read().unwrap_or_else(PoisonError::into_inner);
        let number = numbers.get(&inode).copied()?;
        *locked(&self.held).entry(number).or_default() += 1;
        Some(Held(Arc::clone(self), number))
    }

    /// Whether an origin was removed here and is not open: nobody needs its pages.
    pub(super) fn is_removed(&self, number: u32) -> bool {
        if locked(&self.held).contains_key(&number) {
            return false;
        }
        let stat = self.origin_file(number).and_then(|file| Ok(fstat(&*file)?));
        match stat {
            Ok(stat) => stat.st_nlink == 1,
            // It was let go of, perhaps in an earlier life of the process.
            Err(error) => error.kind() == io::ErrorKind::NotFound,
        }
    }
}

fn signed(bytes: u64) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}
