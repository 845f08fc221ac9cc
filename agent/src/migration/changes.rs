//! What changes on the block devices that a plan moves, and below the file systems of its large files, as the
//! kernel notes it.
//!
//! Invariants: a device is watched before its first epoch is read; what was written through its page cache is
//! on the device, and so noted, before an epoch is begun (of a file: before it is looked at); where anything of
//! this fails, everything counts as changed. A device below several volumes is watched once.

use crate::model::ids::VolumeId;
use crate::model::units::Bytes;
use crate::model::volume::{ChangesBy, VolumeSpec};
use crate::telemetry::dirty::{Changes, Watch, WatchError};
use crate::transfer::below::{self, Below};
use crate::volume::Written;
use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

/// How the changes of a block device can be found on this host.
pub(super) fn of_device(path: &Path) -> ChangesBy {
    match Watch::start(Path::new("/"), path) {
        Ok(_) => ChangesBy::DirtyExtents,
        Err(error) => ChangesBy::HashScan(error.to_string()),
    }
}

/// Files from this size on are worth a watch of their device: what is smaller is soon read whole.
const LARGE: Bytes = Bytes(16 << 20);

/// How the changes of trees and files can be found on this host.
#[derive(Default)]
pub(super) struct BelowFiles(BTreeMap<u64, bool>);

impl BelowFiles {
    /// Of a tree or file of which the largest file has so many bytes.
    pub(super) fn ask(&mut self, path: &Path, largest: Bytes) -> ChangesBy {
        let Some(number) = path.metadata().ok().map(|data| data.dev()) else {
            return ChangesBy::ChangeTimes;
        };
        let is_watched = || below::is_written_in_place(number) && Below::watch(number).is_ok();
        if largest >= LARGE && *self.0.entry(number).or_insert_with(is_watched) {
            ChangesBy::WrittenExtents
        } else {
            ChangesBy::ChangeTimes
        }
    }
}

/// The watched devices of a plan.
#[derive(Default)]
pub(super) struct Watches {
    /// By the number of the device.
    below: BTreeMap<u64, Arc<Mutex<Below>>>,
    watched: BTreeMap<VolumeId, Arc<Mutex<Watch>>>,
    /// Changes that were asked for and not yet sent.
    pending: BTreeMap<VolumeId, Vec<Range<u64>>>,
}

impl Watches {
    /// What changed since the last call, and what was pending; the first call, and one that fails, know nothing
    /// and begin to watch anew.
    pub(super) async fn take(&mut self, volume: &VolumeSpec) -> Option<Vec<Range<u64>>> {
        if volume.changes != ChangesBy::DirtyExtents {
            return None;
        }
        let pending = self.pending.remove(&volume.id).unwrap_or_default();
        if let Some(changed) = self.look(volume).await {
            return Some(pending.into_iter().chain(changed).collect());
        }
        let path = volume.source_path.clone();
        let started =
            tokio::task::spawn_blocking(move || Watch::start(Path::new("/"), &path)).await;
        match started {
            Ok(Ok(watch)) => {
                self.watched.insert(volume.id, Arc::new(Mutex::new(watch)));
            }
            Ok(Err(error)) => tracing::warn!("{error}; every block is read again"),
            Err(error) => tracing::warn!("{error}; every block is read again"),
        }
        None
    }

    /// What the device below the files of a volume was written to since the last call; the first call, and one that
    /// fails, know nothing.
    pub(super) async fn below(&mut self, volume: &VolumeSpec) -> Option<Arc<dyn Written>> {
        if volume.changes != ChangesBy::WrittenExtents {
            return None;
        }
        let device = volume.source_path.metadata().ok()?.dev();
        let (known, id) = (self.below.get(&device).cloned(), volume.id);
        let path = volume.source_path.clone();
        let taken = tokio::task::spawn_blocking(move || {
            let below = match known {
                Some(below) => below,
                None => Arc::new(Mutex::new(Below::watch(device)?)),
            };
            let written = below
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .take(id, &path);
            Ok::<_, WatchError>((below, written))
        });
        match taken.await {
            Ok(Ok((below, written))) => {
                self.below.insert(device, below);
                return written;
            }
            Ok(Err(error)) => tracing::warn!("{error}; large files are read whole"),
            Err(error) => tracing::warn!("{error}; large files are read whole"),
        }
        None
    }

    /// Whether a watched device has changed since it was asked; what has changed stays pending.
    pub(super) async fn has_changed(&mut self, volume: &VolumeSpec) -> bool {
        let Some(changed) = self.look(volume).await else {
            return false;
        };
        let any = !changed.is_empty();
        self.pending.entry(volume.id).or_default().extend(changed);
        any
    }

    /// None when the device is not watched, or could not be written back; then it is no longer.
    async fn look(&mut self, volume: &VolumeSpec) -> Option<Vec<Range<u64>>> {
        let watch = self.watched.get(&volume.id)?.clone();
        let path = volume.source_path.clone();
        let looked = tokio::task::spawn_blocking(move || -> io::Result<Changes> {
            File::open(path)?.sync_all()?;
            Ok(watch.lock().unwrap_or_else(PoisonError::into_inner).swap())
        });
        match looked.await.map_err(io::Error::other).flatten() {
            Ok(changes) => Some(changes.ranges),
            Err(error) => {
                let name = &volume.name;
                tracing::warn!("volume {name}: {error}; every block is read again");
                self.watched.remove(&volume.id);
                None
            }
        }
    }
}
