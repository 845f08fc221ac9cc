//! What is written to the device below the file systems of large files, so that of these only that is read again.
//!
//! Invariant: what is told for a volume is everything that was written since it was last told for that volume, and
//! while it is looked at: until the next call, for whichever volume. Non-goals: file systems that write data elsewhere first (a journal) or anew each time.

use super::queue::lock;
use crate::model::ids::VolumeId;
use crate::telemetry::device::{self, Place};
use crate::telemetry::dirty::{Changes, Watch, WatchError};
use crate::volume::Written;
use nix::sys::stat::{major, minor};
use procfs::process::Process;
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Mutex};

/// Whether the file system on a device, as stat(2) numbers it, writes the data of files to their extents there and
/// nowhere else first.
#[must_use]
pub fn is_written_in_place(device: u64) -> bool {
    let device = format!("{}:{}", major(device), minor(device));
    let mounts = Process::myself().and_then(|process| process.mountinfo());
    mounts.into_iter().flatten().any(|mount| {
        let journalled = mount.super_options.get("data");
        mount.majmin == device
            && matches!(mount.fs_type.as_str(), "ext4" | "xfs")
            && journalled != Some(&Some("journal".to_owned()))
    })
}

/// A watched device below the file systems of volumes.
pub struct Below {
    device: u64,
    incarnation: Option<(u64, String)>,
    watch: Arc<Mutex<Watch>>,
    /// What was written since each volume was last told.
    since: BTreeMap<VolumeId, Noted>,
}

/// What the kernel noted: in bits as there, at most 1 MiB, where a list of ranges could take 64.
#[derive(Default)]
struct Noted {
    /// The mount of the volume.
    mount: Option<u64>,
    /// Something that it could not locate.
    anywhere: bool,
    /// Bytes of the device that a bit stands for; 0 before anything was noted.
    granule: u64,
    bits: Vec<u64>,
}

impl Noted {
    fn note(&mut self, changes: &Changes) {
        self.anywhere |= changes.everything;
        if self.anywhere {
            self.bits = Vec::new();
            return;
        }
        self.granule = changes.granule.0;
        for range in &changes.ranges {
            let granules = range.start / self.granule..range.end.div_ceil(self.granule);
            let words = usize::try_from(granules.end.div_ceil(64)).unwrap_or(0);
            self.bits.resize(self.bits.len().max(words), 0);
            for granule in granules {
                if let Some(word) = self.bits.get_mut((granule / 64) as usize) {
                    *word |= 1 << (granule % 64);
                }
            }
        }
    }

    /// Whether something of these bytes was noted.
    fn has(&self, bytes: &Range<u64>) -> bool {
        let Some(first) = bytes.start.checked_div(self.granule) else {
            return false;
        };
        let end = bytes.end.div_ceil(self.granule);
        let is_set = |granule: u64| {
            let word = self.bits.get((granule / 64) as usize);
            word.is_some_and(|word| word >> (granule % 64) & 1 == 1)
        };
        (first..end.min(self.bits.len() as u64 * 64)).any(is_set)
    }
}

impl Below {
    /// Watches a device from now on. Blocking, up to 2 s.
    ///
    /// # Errors
    /// Any [`WatchError`].
    pub fn watch(device: u64) -> Result<Self, WatchError> {
        let name = format!("/dev/block/{}:{}", major(device), minor(device));
        let watch = Watch::of_number(Path::new("/"), device, Path::new(&name))?;
        Ok(Self {
            device,
            incarnation: incarnation(device),
            watch: Arc::new(Mutex::new(watch)),
            since: BTreeMap::new(),
        })
    }

    /// What was written since the last call for this volume, which lies at `path`. Nothing is known at the first, nor
    /// when another file system is mounted there since, or the device is another one.
    pub fn take(&mut self, volume: VolumeId, path: &Path) -> Option<Arc<dyn Written>> {
        let written = lock(&self.watch).swap();
        for noted in self.since.values_mut() {
            noted.note(&written);
        }
        let mount = device::mount_id(path);
        let anew = Noted {
            mount,
            ..Noted::default()
        };
        let noted = self.since.insert(volume, anew)?;
        if noted.mount != mount || self.incarnation != incarnation(self.device) {
            return None;
        }
        let (device, watch) = (self.device, Arc::clone(&self.watch));
        Some(Arc::new(Since {
            device,
            watch,
            noted,
        }))
    }
}

fn incarnation(device: u64) -> Option<(u64, String)> {
    let place = Place::find(Path::new("/"), device).ok()?;
    Some(place.incarnation())
}

/// What a device was written to since an epoch of a volume.
struct Since {
    device: u64,
    watch: Arc<Mutex<Watch>>,
    /// Up to the last swap.
    noted: Noted,
}

impl Written for Since {
    fn device(&self) -> u64 {
        self.device
    }

    fn anywhere(&self) -> bool {
        self.noted.anywhere || lock(&self.watch).is_anywhere()
    }

    fn within(&self, bytes: &Range<u64>) -> bool {
        self.noted.has(bytes) || lock(&self.watch).has_changed(bytes)
    }
}

impl std::fmt::Debug for Since {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let granules: u32 = self.noted.bits.iter().map(|word| word.count_ones()).sum();
        write!(f, "{granules} granules of device {:#x}", self.device)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::units::Bytes;
    use proptest::prelude::*;

    const GRANULE: u64 = 8;

    proptest! {
        #[test]
        fn every_byte_that_was_noted_is_known_and_nothing_beyond_its_granule(
            epochs in prop::collection::vec(prop::collection::vec((0..90_u64, 1..40_u64), 0..5), 0..4),
            start in 0..1200_u64, length in 1..300_u64,
        ) {
            let mut noted = Noted::default();
            let mut all = Vec::new();
            for (ranges, epoch) in epochs.into_iter().zip(1..) {
                let ranges: Vec<Range<u64>> =
                    ranges.into_iter().map(|(from, count)| from * GRANULE..(from + count) * GRANULE).collect();
                all.extend(ranges.clone());
                noted.note(&Changes { epoch, granule: Bytes(GRANULE), everything: false, ranges });
            }
            let bytes = start / GRANULE * GRANULE..(start + length).next_multiple_of(GRANULE);
            let met = all.iter().any(|one| one.start < bytes.end && bytes.start < one.end);
            prop_assert_eq!(noted.has(&(start..start + length)), met);
            noted.note(&Changes { epoch: 9, granule: Bytes(GRANULE), everything: true, ranges: Vec::new() });
            prop_assert!(noted.anywhere);
        }
    }
}
