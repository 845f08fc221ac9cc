//! Where a plan's volumes go on the target: made, checked for room, and removed again.
//!
//! Invariant: only what the plan made is removed.

use super::delegator::plan_ids;
use super::devices::find_counterpart;
use super::events::{Place, SourceEvent, TargetEvent};
use super::journal::{self, plan_directory};
use super::target::{Target, TargetError};
use crate::containers::Runtime;
use crate::model::ids::{Epoch, PlanId, VolumeId};
use crate::model::plan::Plan;
use crate::model::units::{Bytes, UnixMillis};
use crate::model::volume::{TimesKept, VolumeKind, VolumeSpec};
use crate::volume::times::kept_in;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

impl Target {
    pub(super) async fn check_names(
        &self,
        plan: &Plan,
        runtime: &Runtime,
    ) -> Result<(), TargetError> {
        for planned in &plan.containers {
            let name = planned.container.name.as_str();
            match runtime.inspect(name).await {
                Ok(_) => {
                    return Err(TargetError::InTheWay {
                        what: name.to_owned(),
                        why: "a container of that name exists here; rename or remove it".into(),
                    });
                }
                Err(error) if error.not_found() => {}
                Err(error) => return Err(error.into()),
            }
            for port in planned.container.published.iter().filter(|port| !port.udp) {
                let address = SocketAddr::from((port.host_ip, port.host_port));
                let Err(error) = std::net::TcpListener::bind(address) else {
                    continue;
                };
                let why = match self.parts.forwards.holder(address, &plan.source).await {
                    // It comes back: the port is let go of when this device takes it over.
                    Some((_, device)) if device == plan.source => continue,
                    Some((left, device)) => format!(
                        "its published port {address} is forwarded from here to {device}, since plan {left}; move back \
                         from there what that moved, or choose another target"
                    ),
                    None => {
                        format!("its published port {address} cannot be had here: {error}; free it")
                    }
                };
                return Err(TargetError::InTheWay {
                    what: name.to_owned(),
                    why,
                });
            }
        }
        Ok(())
    }

    /// Where one volume will go, when nothing is in the way; none for an image that is here already.
    pub(super) async fn find_place(
        &self,
        plan: &Plan,
        volume: &VolumeSpec,
        runtime: &Runtime,
        directory: &Path,
    ) -> Result<Option<Place>, TargetError> {
        let in_the_way = |what: String, why: String| TargetError::InTheWay { what, why };
        let (path, made) = match &volume.kind {
            VolumeKind::Image(_) => {
                if runtime.image_present(&image_id(plan, volume)).await? {
                    return Ok(None);
                }
                (directory.join(format!("image-{}", volume.id)), true)
            }
            VolumeKind::Named(name) => match runtime.volume(name).await {
                Err(error) if error.not_found() => (PathBuf::new(), true),
                Err(error) => return Err(error.into()),
                Ok(_) => {
                    let why = "a volume of that name exists here; rename or remove it".to_owned();
                    return Err(in_the_way(format!("volume {name}"), why));
                }
            },
            VolumeKind::Device => {
                return find_counterpart(&self.parts.settings, &plan.id, volume)
                    .map(Some)
                    .map_err(|why| in_the_way(format!("volume {}", volume.name), why));
            }
            VolumeKind::File => {
                let path = &volume.source_path;
                if path.symlink_metadata().is_ok() {
                    let why = format!("{} exists here; move it away", path.display());
                    return Err(in_the_way(format!("volume {}", volume.name), why));
                }
                (path.clone(), true)
            }
            VolumeKind::Bind => {
                let path = &volume.source_path;
                match std::fs::read_dir(path).map(Iterator::count) {
                    Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                        (path.clone(), true)
                    }
                    Ok(0) => (path.clone(), false),
                    _ => {
                        let why = format!(
                            "{} exists here and is not an empty directory; move it away",
                            path.display()
                        );
                        return Err(in_the_way(format!("volume {}", volume.name), why));
                    }
                }
            }
        };
        Ok(Some(Place {
            volume: volume.id,
            path,
            made,
        }))
    }

    /// Makes a place that [`Self::find_place`] found.
    pub(super) async fn make_place(
        plan: &Plan,
        place: &mut Place,
        runtime: &Runtime,
    ) -> Result<(), TargetError> {
        if let Some(VolumeKind::Named(name)) = kind_of(plan, place) {
            let mut definitions = plan.containers.iter().flat_map(|planned| &planned.volumes);
            let Some(definition) = definitions.find(|one| one["Name"].as_str() == Some(name))
            else {
                return Err(TargetError::InTheWay {
                    what: format!("volume {name}"),
                    why: "the plan does not describe it; make a new plan".into(),
                });
            };
            place.path = runtime.ensure_volume(definition).await?;
            return Ok(());
        }
        let directory = directory_of(plan, place);
        std::fs::create_dir_all(directory).map_err(|error| TargetError::File {
            doing: format!("create {}", directory.display()),
            error,
        })
    }
}

fn kind_of<'a>(plan: &'a Plan, place: &Place) -> Option<&'a VolumeKind> {
    let mut volumes = plan.volumes.iter();
    let volume = volumes.find(|volume| volume.id == place.volume)?;
    Some(&volume.kind)
}

/// The name by which its runtime knows a place.
pub(super) fn name_in_runtime<'a>(plan: &'a Plan, place: &Place) -> Option<&'a str> {
    match kind_of(plan, place)? {
        VolumeKind::Named(name) => Some(name),
        _ => None,
    }
}

/// Whether a volume is one file or block device.
pub(super) fn is_one(plan: &Plan, id: VolumeId) -> bool {
    let volume = plan.volumes.iter().find(|volume| volume.id == id);
    volume.is_some_and(|volume| volume.kind.is_one())
}

/// The place when it is a directory, else the one around it.
fn directory_of<'p>(plan: &Plan, place: &'p Place) -> &'p Path {
    let around = place.path.parent();
    around
        .filter(|_| is_one(plan, place.volume))
        .unwrap_or(&place.path)
}

/// Which times the file systems of the places keep, where those are not all.
pub(super) fn times_kept(plan: &Plan, places: &[Place]) -> BTreeMap<VolumeId, TimesKept> {
    let mut times = BTreeMap::new();
    for place in places {
        // Those of devices and of an image's export are nobody's.
        if let None | Some(VolumeKind::Device | VolumeKind::Image(_)) = kind_of(plan, place) {
            continue;
        }
        let directory = directory_of(plan, place);
        match kept_in(directory) {
            Ok(kept) if kept == TimesKept::default() => {}
            Ok(kept) => {
                times.insert(place.volume, kept);
            }
            Err(error) => tracing::warn!(
                plan = %plan.id,
                path = %directory.display(),
                "which times are kept there is not known: {error}"
            ),
        }
    }
    times
}

pub(super) fn empty(directory: &Path) -> std::io::Result<()> {
    for entry in std::fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            std::fs::remove_dir_all(entry.path())?;
        } else {
            std::fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// Whether the file systems of the places hold the volumes that go there.
pub(super) fn check_room(plan: &Plan, places: &[Place]) -> Result<(), TargetError> {
    let mut needed: BTreeMap<u64, (&Path, Bytes, u64)> = BTreeMap::new();
    for place in places.iter().filter(|place| {
        // A device of that path was measured when it was found.
        place.made || kind_of(plan, place) != Some(&VolumeKind::Device)
    }) {
        let path = directory_of(plan, place);
        let at = |error| TargetError::File {
            doing: format!("look at {}", path.display()),
            error,
        };
        let device = std::fs::metadata(path).map_err(at)?.dev();
        let volume = plan.volumes.iter().find(|volume| volume.id == place.volume);
        let (_, size, entries) = needed.entry(device).or_insert((path, Bytes(0), 0));
        *size += volume.map_or(Bytes(0), VolumeSpec::to_move);
        *entries += volume.map_or(0, |volume| volume.entries);
    }
    for (path, needed, entries) in needed.into_values() {
        let stat = nix::sys::statvfs::statvfs(path).map_err(|error| TargetError::File {
            doing: format!("read free space of {}", path.display()),
            error: error.into(),
        })?;
        let free = Bytes(stat.blocks_available() * stat.fragment_size());
        if free < needed {
            return Err(TargetError::NoSpace {
                path: path.to_owned(),
                free,
                needed,
            });
        }
        // File systems that make inodes as they go say that they have none at all.
        let free = stat.files_available();
        if stat.files() > 0 && free < entries {
            return Err(TargetError::NoInodes {
                path: path.to_owned(),
                free,
                needed: entries,
            });
        }
    }
    Ok(())
}

pub(super) fn name_of(plan: &Plan, id: VolumeId) -> String {
    let volume = plan.volumes.iter().find(|volume| volume.id == id);
    volume.map_or_else(|| id.to_string(), |volume| volume.name.clone())
}

pub(super) fn image_id(plan: &Plan, volume: &VolumeSpec) -> String {
    volume
        .containers
        .first()
        .and_then(|name| plan.container(name))
        .map(|planned| planned.container.image_id.clone())
        .unwrap_or_default()
}

/// Places on this device whose data is not all here yet, with the plan that brings it.
#[must_use]
pub(super) fn filling(state: &Path) -> BTreeMap<PathBuf, PlanId> {
    let mut filling = BTreeMap::new();
    for id in plan_ids(state, "target") {
        let entries = journal::read::<TargetEvent>(&plan_directory(state, "target", &id));
        let (mut here, mut later, mut owned) = (Vec::new(), false, false);
        for entry in entries.unwrap_or_default() {
            match entry.event {
                TargetEvent::Accepted { places, .. } => here = places,
                TargetEvent::Opened { .. } => later = true,
                TargetEvent::Owns { .. } => owned = true,
                TargetEvent::Whole | TargetEvent::NotOpened => later = false,
                TargetEvent::GivenBack { .. } => owned = false,
                _ => {}
            }
        }
        if owned && later {
            filling.extend(here.into_iter().map(|place| (place.path, id.clone())));
        }
    }
    filling
}

/// Places that plans have taken over here since a plan was released, at this time.
#[must_use]
pub(super) fn taken_since(state: &Path, left: &PlanId, at: UnixMillis) -> Vec<PathBuf> {
    let mut taken = Vec::new();
    for id in plan_ids(state, "target") {
        let entries = journal::read::<TargetEvent>(&plan_directory(state, "target", &id));
        let (mut here, mut since) = (Vec::new(), false);
        for entry in entries.unwrap_or_default() {
            match entry.event {
                TargetEvent::Accepted { places, .. } => here = places,
                TargetEvent::Owns { back, .. } => since = entry.at > at || back.contains_key(left),
                TargetEvent::Dismissed { .. } => since = false,
                _ => {}
            }
        }
        taken.extend(here.into_iter().filter(|_| since).map(|place| place.path));
    }
    taken
}

/// The epoch from which this device owns each of `volumes`, from the plans it took over.
#[must_use]
pub(super) fn owned_epochs(state: &Path, volumes: &[VolumeSpec]) -> BTreeMap<VolumeId, Epoch> {
    let mut owned: BTreeMap<PathBuf, Epoch> = BTreeMap::new();
    for id in plan_ids(state, "target") {
        let entries = journal::read::<TargetEvent>(&plan_directory(state, "target", &id));
        let mut here: Vec<Place> = Vec::new();
        for entry in entries.unwrap_or_default() {
            match entry.event {
                TargetEvent::Accepted { places, .. } => here = places,
                TargetEvent::Owns { owns, .. } => {
                    for volume in owns.volumes {
                        if let Some(place) = here.iter().find(|place| place.volume == volume.volume)
                        {
                            owned.insert(place.path.clone(), volume.epoch);
                        }
                    }
                }
                _ => {}
            }
        }
    }
    for id in plan_ids(state, "source") {
        let entries = journal::read::<SourceEvent>(&plan_directory(state, "source", &id));
        let entries = entries.unwrap_or_default();
        let plan = super::delegator::plan_of(&entries);
        for entry in &entries {
            if let (SourceEvent::Returned { epochs, .. }, Some(plan)) = (&entry.event, &plan) {
                let returned = plan.volumes.iter().filter_map(|volume| {
                    Some((volume.source_path.clone(), *epochs.get(&volume.id)?))
                });
                for (path, epoch) in returned {
                    let known = owned.entry(path).or_insert(epoch);
                    *known = epoch.max(*known);
                }
            }
        }
    }
    volumes
        .iter()
        .filter_map(|volume| Some((volume.id, *owned.get(&volume.source_path)?)))
        .collect()
}
