//! Array maps in this process's memory: reading them takes no system call.

use aya::maps::Map;
use lifeboat_ebpf::Latency;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

/// An array map with `BPF_F_MMAPABLE`, of which the values are whole 64-bit words.
pub struct Mapped {
    start: NonNull<AtomicU64>,
    bytes: NonZeroUsize,
}

/// An array map of rows that are given out from the first on, of which only so many are in this process's memory as
/// were ever used: the kernel maps all of what it is asked for at once.
pub struct Rows {
    map: OwnedFd,
    row_bytes: usize,
    count: usize,
    mapped: Mapped,
}

/// Words of a histogram of latencies.
pub const LATENCY_WORDS: usize = size_of::<Latency>() / 8;

/// The 32-bit values of which there are two in each word.
pub fn halves(words: &[AtomicU64]) -> impl Iterator<Item = u32> {
    words.iter().flat_map(|word| {
        let bytes = word.load(Ordering::Relaxed).to_ne_bytes();
        let [a, b, c, d, e, f, g, h] = bytes;
        [[a, b, c, d], [e, f, g, h]].map(u32::from_ne_bytes)
    })
}

/// Rows that are in memory beyond those that were used.
const SPARE_ROWS: usize = 64;

// SAFETY: the memory stays mapped as long as this value lives, and is used by atomic operations only.
unsafe impl Send for Mapped {}

impl Mapped {
    /// Maps it to read from.
    ///
    /// # Errors
    /// It is no array, or the kernel refuses (before Linux 5.5).
    pub fn new(map: &Map) -> Result<Self, String> {
        Self::with(map, ProtFlags::PROT_READ)
    }

    /// Maps it to read from and write to, by atomic operations.
    ///
    /// # Errors
    /// As for [`Mapped::new`].
    pub fn writable(map: &Map) -> Result<Self, String> {
        Self::with(map, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE)
    }

    fn with(map: &Map, access: ProtFlags) -> Result<Self, String> {
        let Map::Array(data) = map else {
            return Err("it is no array".to_owned());
        };
        let info = data.info().map_err(|error| error.to_string())?;
        let bytes = info.max_entries() as usize * info.value_size() as usize;
        Self::first(data.fd(), bytes, access)
    }

    /// Its first bytes.
    fn first(map: impl AsFd, bytes: usize, access: ProtFlags) -> Result<Self, String> {
        let bytes = NonZeroUsize::new(bytes).ok_or("it is empty")?;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let start = unsafe { mmap(None, bytes, access, MapFlags::MAP_SHARED, map.as_fd(), 0) };
        let start = start.map_err(|errno| format!("it cannot be mapped: {errno}"))?;
        Ok(Self {
            start: start.cast(),
            bytes,
        })
    }

    /// Its values, one after the other.
    #[must_use]
    pub fn words(&self) -> &[AtomicU64] {
        // SAFETY: mapped by `new` with this length; the kernel programs write to it too, by whole words.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.bytes.get() / 8) }
    }
}

impl Rows {
    /// Maps the first rows, each of `shards` values, to read from.
    ///
    /// # Errors
    /// As for [`Mapped::new`].
    pub fn new(map: &Map, shards: u32) -> Result<Self, String> {
        let Map::Array(data) = map else {
            return Err("it is no array".to_owned());
        };
        let info = data.info().map_err(|error| error.to_string())?;
        let count = (info.max_entries() / shards) as usize;
        let row_bytes = (info.value_size() * shards) as usize;
        let map = data.fd().as_fd().try_clone_to_owned();
        let map = map.map_err(|error| error.to_string())?;
        let bytes = count.min(SPARE_ROWS) * row_bytes;
        Ok(Self {
            mapped: Mapped::first(&map, bytes, ProtFlags::PROT_READ)?,
            map,
            row_bytes,
            count,
        })
    }

    /// How many there are, in memory or not.
    #[must_use]
    pub fn count(&self) -> u32 {
        u32::try_from(self.count).unwrap_or(u32::MAX)
    }

    /// Those in memory: all up to the last that was in use when they were last looked at, and more.
    #[must_use]
    pub fn words(&self) -> &[AtomicU64] {
        self.mapped.words()
    }

    /// Has this row in memory, and some that come after it.
    pub fn reach(&mut self, row: usize) {
        let bytes = (row + 1 + SPARE_ROWS / 2).min(self.count) * self.row_bytes;
        if bytes > self.mapped.bytes.get() {
            let bytes = (row + 1 + SPARE_ROWS).min(self.count) * self.row_bytes;
            // Refused, the rows are missing until the next time.
            if let Ok(mapped) = Mapped::first(&self.map, bytes, ProtFlags::PROT_READ) {
                self.mapped = mapped;
            }
        }
    }

    /// Has all rows in memory that are in use, by a word of each that is not 0 then.
    pub fn reach_used(&mut self, word: usize) {
        loop {
            let before = self.mapped.bytes;
            let mut rows = self.words().chunks_exact(self.row_bytes / 8);
            let last = rows.rposition(|row| row[word].load(Ordering::Relaxed) != 0);
            self.reach(last.unwrap_or(0));
            if self.mapped.bytes == before {
                return;
            }
        }
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: mapped by `new` with this length, and no reference into it outlives this value.
        let _ = unsafe { munmap(self.start.cast(), self.bytes.get()) };
    }
}
