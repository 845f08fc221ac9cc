//! What is written to the device below the file systems of large files, so that of these only that is read again.
//!
//! Invariant: what is told for a volume is everything that was written since it was last told for that volume, and
//! while it is looked at: until the next call, for whichever volume. Non-goals: file systems that write data elsewhere first (a journal) or anew each time.

use super::queue::lock;
use crate::model::ids::VolumeId;
use crate::telemetry::device::{self, Place};
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
    incarnation: Option<(u64, String)>,
    watch: Arc<Mutex<Watch>>,
    /// What was written since each volume was last told.
    since: BTreeMap<VolumeId, Noted>,
}

/// What the kernel noted.
#[derive(Default)]
struct Noted {
    /// The mount of the volume.
    mount: Option<u64>,
    /// Something that it could not locate.
    anywhere: bool,
    /// Ascending, with gaps between them.
    ranges: Vec<Range<u64>>,
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
        for Noted {
            anywhere, ranges, ..
        } in self.since.values_mut()
        {
            *anywhere |= written.everything;
            *ranges = merged(ranges.drain(..).chain(written.ranges.clone()).collect());
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
        let ranges = &self.noted.ranges;
        let first = ranges.partition_point(|range| range.end <= bytes.start);
        let noted = ranges.get(first);
        noted.is_some_and(|range| range.start < bytes.end) || lock(&self.watch).has_changed(bytes)
    }
}

impl std::fmt::Debug for Since {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (count, device) = (self.noted.ranges.len(), self.device);
        write!(f, "{count} ranges of device {device:#x}")
    }
}
