//! What is written to the device below the file systems of large files, so that of these only that is read again.
//!
//! Invariant: what is told for a volume is everything that was written since it was last told for that volume, and
//! while it is looked at. Non-goals: file systems that write data elsewhere first (a journal) or anew each time.

use super::queue::lock;
use crate::model::ids::VolumeId;
use crate::telemetry::dirty::{Watch, WatchError};
use crate::volume::Written;
use crate::volume::rewritten::merged;
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
    watch: Arc<Mutex<Watch>>,
    /// What was written since each volume was last told.
    since: BTreeMap<VolumeId, Vec<Range<u64>>>,
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
            watch: Arc::new(Mutex::new(watch)),
            since: BTreeMap::new(),
        })
    }

    /// What was written since the last call for this volume; nothing is known at the first.
    pub fn take(&mut self, volume: VolumeId) -> Option<Arc<dyn Written>> {
        let written = lock(&self.watch).swap().ranges;
        for since in self.since.values_mut() {
            *since = merged(since.drain(..).chain(written.iter().cloned()).collect());
        }
        let ranges = self.since.insert(volume, Vec::new())?;
        let (device, watch) = (self.device, Arc::clone(&self.watch));
        Some(Arc::new(Since {
            device,
            watch,
            ranges,
        }))
    }
}

/// What a device was written to since an epoch of a volume.
struct Since {
    device: u64,
    watch: Arc<Mutex<Watch>>,
    /// Up to the last swap: ascending, with gaps between them.
    ranges: Vec<Range<u64>>,
}

impl Written for Since {
    fn device(&self) -> u64 {
        self.device
    }

    fn anywhere(&self) -> bool {
        lock(&self.watch).is_anywhere()
    }

    fn within(&self, bytes: &Range<u64>) -> bool {
        let first = self
            .ranges
            .partition_point(|range| range.end <= bytes.start);
        let noted = self.ranges.get(first);
        noted.is_some_and(|range| range.start < bytes.end) || lock(&self.watch).has_changed(bytes)
    }
}

impl std::fmt::Debug for Since {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (count, device) = (self.ranges.len(), self.device);
        write!(f, "{count} ranges of device {device:#x}")
    }
}
