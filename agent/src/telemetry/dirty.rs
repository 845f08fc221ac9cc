//! Dirty extents of a watched block device: which granules were written, zeroed or discarded since when.
//!
//! Invariants: a change is in the set of the epoch in which it began or in a later one, and always in one
//! that is still to be read when it ends; what the kernel programs cannot tell makes everything dirty. The
//! set may be too large, never too small. Memory in the kernel is there only while a device is watched.
//! Non-goals: writes past the block layer (DAX), and to the file below a loop device.

use super::btf::KernelTypes;
use super::device::{self, Place};
use super::kernel::mapped::Mapped;
use super::kernel::{BTF_PATH, attach, chain, hooks};
use super::layout::{self, Family};
use crate::model::units::Bytes;
use aya::{Ebpf, EbpfLoader};
use lifeboat_ebpf::{SECTOR_SHIFT, Watched, watch_state};
use std::fs;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/lifeboat-watch.o"));

/// Program and its tracepoint.
const PROGRAMS: [(&str, &str); 5] = [
    ("block_bio_complete", "block_bio_complete"),
    ("watched_rq_complete", "block_rq_complete"),
    ("block_bio_queue", "block_bio_queue"),
    ("block_bio_remap", "block_bio_remap"),
    ("watched_rq_issue", "block_rq_issue"),
];

/// Smallest granule. The kernel programs rely on it.
const SMALLEST_GRANULE: u64 = 64 << 10;

/// Most bits of an epoch's bitmap: 1 MiB, so that a watched device takes some 3 MiB in the kernel.
const MOST_GRANULES: u64 = 8 << 20;

/// Longest wait for writes that are older than the watch.
const SETTLE: Duration = Duration::from_secs(2);

/// Why a device cannot be watched.
#[derive(Debug, thiserror::Error)]
pub enum WatchError {
    /// It is no block device, or sysfs does not know it.
    #[error("{device} cannot be watched: {why}; name a block device such as /dev/sda or /dev/sda1")]
    NoDevice {
        /// As named.
        device: PathBuf,
        /// What was missing.
        why: String,
    },
    /// Its writes cannot be told from the block layer's events.
    #[error("{device} cannot be watched: {why}; copy it while nothing writes to it")]
    Unseen {
        /// As named.
        device: PathBuf,
        /// Reason.
        why: &'static str,
    },
    /// The kernel cannot run the programs.
    #[error("dirty extents cannot be had here: {0}")]
    Kernel(String),
}

/// A device that is watched; dropping it ends the watch.
pub struct Watch {
    /// Keeps the programs attached.
    ebpf: Ebpf,
    state: Mapped,
    bitmaps: Mapped,
    size: u64,
    granule: u64,
    /// Runs of the programs that the kernel left out, up to the last swap.
    left_out: u64,
}

/// What changed in one epoch.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Changes {
    /// The epoch, from 1.
    pub epoch: u64,
    /// Granule: every range begins and, but for the device's end, ends at a multiple of it.
    pub granule: Bytes,
    /// Something happened that could not be located: the one range is the whole device.
    pub everything: bool,
    /// Byte ranges, ascending, with gaps between them.
    pub ranges: Vec<Range<u64>>,
}

impl Changes {
    /// Bytes in all ranges.
    #[must_use]
    pub fn bytes(&self) -> Bytes {
        Bytes(
            self.ranges
                .iter()
                .map(|range| range.end - range.start)
                .sum(),
        )
    }
}

impl Watch {
    /// Watches a disk or partition from now on; `root` is the root of procfs and sysfs. What is read from
    /// the device after this returns, and the changes of every later [`Watch::swap`] read anew, make a
    /// true copy once nothing writes any more. Blocking, up to 2 s.
    ///
    /// # Errors
    /// Any [`WatchError`].
    pub fn start(root: &Path, device: &Path) -> Result<Self, WatchError> {
        let number = device::number(device).map_err(|why| WatchError::NoDevice {
            device: device.to_owned(),
            why,
        })?;
        Self::of_number(root, number, device)
    }

    /// The same of a device by its number, as stat(2) has it; `device` names it in errors.
    ///
    /// # Errors
    /// Any [`WatchError`].
    pub fn of_number(root: &Path, number: u64, device: &Path) -> Result<Self, WatchError> {
        let place = place(root, number, device)?;
        let size = place.sectors << SECTOR_SHIFT;
        let granule = granule(size);
        let words = u32::try_from(size.div_ceil(granule).div_ceil(64))
            .map_err(|_| WatchError::Kernel("the device is too large".to_owned()))?;
        let watched = Watched {
            first_sector: place.first_sector,
            sectors: place.sectors,
            device: place.disk,
            granule_shift: granule.trailing_zeros(),
            words,
            takes_requests: u32::from(place.takes_requests),
        };
        let ebpf = load(root, &watched).map_err(WatchError::Kernel)?;
        let mapped = |name| {
            let map = ebpf.map(name).ok_or("it is not in the embedded object")?;
            Mapped::writable(map)
        };
        let state = mapped("STATE").map_err(WatchError::Kernel)?;
        let bitmaps = mapped("DIRTY").map_err(WatchError::Kernel)?;
        let mut watch = Self {
            ebpf,
            state,
            bitmaps,
            size,
            granule,
            left_out: 0,
        };
        // A write that began before the programs did may be anywhere; it is over when none is under way.
        let end = Instant::now() + SETTLE;
        while place.writes_under_way() && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(1));
        }
        watch.swap();
        Ok(watch)
    }

    /// Begins the next epoch and tells what changed in the one before. No write is lost: one under way is
    /// in the new epoch, or in both.
    pub fn swap(&mut self) -> Changes {
        let state = self.state.words();
        let epoch = state[watch_state::EPOCH as usize].fetch_add(1, Ordering::SeqCst);
        let half = (epoch & 1) as usize;
        let everything = &state[watch_state::EVERYTHING as usize + half];
        let mut everything = everything.swap(0, Ordering::SeqCst) != 0;
        let words = self.bitmaps.words();
        let words = &words[half * (words.len() / 2)..][..words.len() / 2];
        let ranges = ranges(words, self.granule, self.size);
        let left_out = self.left_out();
        everything |= left_out != self.left_out;
        self.left_out = left_out;
        Changes {
            epoch,
            granule: Bytes(self.granule),
            everything,
            ranges: if everything {
                std::iter::once(0..self.size).collect()
            } else {
                ranges
            },
        }
    }

    /// Whether anything since the last swap could not be located.
    #[must_use]
    pub fn is_anywhere(&self) -> bool {
        let state = self.state.words();
        let everything = &state[watch_state::EVERYTHING as usize..][..2];
        let everything = everything
            .iter()
            .any(|half| half.load(Ordering::SeqCst) != 0);
        everything || self.left_out() != self.left_out
    }

    /// Whether these bytes of the device may have changed since the last swap.
    #[must_use]
    pub fn has_changed(&self, bytes: &Range<u64>) -> bool {
        let words = self.bitmaps.words();
        // A program that began before the swap may still mark in the epoch before.
        let (one, other) = words.split_at(words.len() / 2);
        let is_set = |half: &[AtomicU64], granule: u64| {
            let word = usize::try_from(granule / 64)
                .ok()
                .and_then(|at| half.get(at));
            // What lies past the device is no place of ours.
            word.is_none_or(|word| word.load(Ordering::SeqCst) >> (granule % 64) & 1 == 1)
        };
        // Nor does what a device that grew has more than when the watch began.
        if bytes.end > self.size {
            return true;
        }
        let mut granules = bytes.start / self.granule..bytes.end.div_ceil(self.granule);
        granules.any(|granule| is_set(one, granule) || is_set(other, granule))
    }

    /// How often the kernel left a program out because it was running already on that CPU.
    fn left_out(&self) -> u64 {
        let programs = PROGRAMS.iter().filter_map(|(name, _)| {
            let program = self.ebpf.program(name)?;
            let fd = program.fd().ok()?.as_fd().as_raw_fd();
            let info = fs::read_to_string(format!("/proc/self/fdinfo/{fd}")).ok()?;
            let misses = info
                .lines()
                .find_map(|line| line.strip_prefix("recursion_misses:"))?;
            misses.trim().parse::<u64>().ok()
        });
        programs.sum()
    }
}

/// A device whose writes the block layer's events tell.
fn place(root: &Path, number: u64, device: &Path) -> Result<Place, WatchError> {
    let place = Place::find(root, number).map_err(|why| WatchError::NoDevice {
        device: device.to_owned(),
        why,
    })?;
    let unseen = |why| WatchError::Unseen {
        device: device.to_owned(),
        why,
    };
    if !matches!(place.of_disk("queue/zoned").as_str(), "" | "none") {
        return Err(unseen(
            "it is zoned, and where an append lands is only known to it",
        ));
    }
    if place.of_disk("queue/dax") == "1" {
        return Err(unseen(
            "memory mapped from it (DAX) is written past the block layer",
        ));
    }
    if !place.ends_its_writes() {
        return Err(unseen(
            "it hands its writes down as they are, so that their end is not told of it (an NVMe namespace with several paths, md raid0 and linear, bcache)",
        ));
    }
    Ok(place)
}

/// The smallest granule with which the device fits the bitmap.
fn granule(size: u64) -> u64 {
    size.div_ceil(MOST_GRANULES)
        .next_power_of_two()
        .max(SMALLEST_GRANULE)
}

fn load(root: &Path, watched: &Watched) -> Result<Ebpf, String> {
    let path = root.join(BTF_PATH);
    let data = fs::read(&path).map_err(|error| format!("{}: {error}", path.display()))?;
    let types = KernelTypes::parse(data).map_err(|error| error.to_string())?;
    let (layout, missing) = layout::find(&types);
    if let Some((_, reason)) = missing.iter().find(|(family, _)| *family == Family::Watch) {
        return Err(reason.why.clone());
    }
    let btf = hooks(&types)?;
    drop(types);
    let mut ebpf = EbpfLoader::new()
        .btf(None)
        .override_global("LAYOUT", &layout, true)
        .override_global("WATCHED", watched, true)
        .map_max_entries("DIRTY", watched.words * 2)
        .load(OBJECT)
        .map_err(|error| chain(&error))?;
    // Ends first: of a write that began before, they mark everything.
    for (program, tracepoint) in PROGRAMS {
        attach(&mut ebpf, &btf, program, tracepoint).map_err(|why| format!("{program}: {why}"))?;
    }
    Ok(ebpf)
}

/// Takes the bits of a bitmap as byte ranges of a device.
fn ranges(words: &[AtomicU64], granule: u64, size: u64) -> Vec<Range<u64>> {
    let mut ranges: Vec<Range<u64>> = Vec::new();
    for (index, word) in words.iter().enumerate() {
        if word.load(Ordering::Relaxed) == 0 {
            continue;
        }
        let mut bits = word.swap(0, Ordering::SeqCst);
        while bits != 0 {
            let first = u64::from(bits.trailing_zeros());
            let run = u64::from((!(bits >> first)).trailing_zeros());
            let start = (index as u64 * 64 + first) * granule;
            let end = (start + run * granule).min(size);
            match ranges.last_mut() {
                Some(last) if last.end == start => last.end = end,
                _ => ranges.push(start..end),
            }
            if first + run >= 64 {
                break;
            }
            bits &= u64::MAX << (first + run);
        }
    }
    ranges
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_granule_is_a_power_of_two_of_64_kib_or_more_and_fits_the_bitmap() {
        assert_eq!(granule(1 << 30), 64 << 10);
        assert_eq!(granule(512 << 30), 64 << 10);
        assert_eq!(granule((512 << 30) + 512), 128 << 10);
        assert_eq!(granule(8 << 40), 1 << 20);
    }

    proptest! {
        #[test]
        fn ranges_are_the_bits_merged_and_clipped(
            bits in prop::collection::vec(any::<u64>(), 1..5), cut in 0u64..100,
        ) {
            let words: Vec<AtomicU64> = bits.iter().copied().map(AtomicU64::new).collect();
            let size = bits.len() as u64 * 64 * 4096 - cut;
            let found = ranges(&words, 4096, size);
            for pair in found.windows(2) {
                prop_assert!(pair[0].end < pair[1].start);
            }
            for granule in 0..bits.len() as u64 * 64 {
                let set = bits[granule as usize / 64] >> (granule % 64) & 1 == 1;
                let at = granule * 4096;
                prop_assert_eq!(set, found.iter().any(|range| range.contains(&at)));
            }
            prop_assert!(found.iter().all(|range| range.end <= size));
            prop_assert!(words.iter().all(|word| word.load(Ordering::Relaxed) == 0));
        }
    }
}
