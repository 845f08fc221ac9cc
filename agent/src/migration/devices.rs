//! Block devices and images as volumes: which of the source's may move, and what stands for them on the target.
//!
//! On the target a device's counterpart is the device of the same path when the operator allows it, and it is
//! blank; else an image file, over which a loop device is attached when a twin needs it. Invariants: a device
//! that holds anything, or that somebody uses, is never written; a loop device is found again by its file, so
//! that none is left behind whenever the agent dies.

use super::events::{Place, TargetEvent};
use super::freezing::{mounted_from, unfreezable};
use super::planner::Found;
use super::settings::Settings;
use super::target::{Target, TargetError};
use crate::model::ids::PlanId;
use crate::model::plan::Plan;
use crate::model::units::Bytes;
use crate::model::volume::{VolumeKind, VolumeSpec};
use crate::volume::one::device_size;
use crate::volume::sign::is_zero;
use crate::volume::users::{loops_over, losetup};
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A smaller device is none that holds data.
const SMALLEST_DEVICE: u64 = (1 << 20) + 1;

/// What a device begins and ends with tells whether anything is on it: every partition table, file system,
/// RAID and LVM label lies there (libblkid probes no further).
const LABELS: u64 = 1 << 20;

/// What `path` is on this host, for a plan; `state` is the agent's own directory.
pub(super) fn look(settings: &Settings, state: &Path, path: &Path) -> Found {
    let Ok(kind) = std::fs::metadata(path).map(|found| found.file_type()) else {
        return Found::Other;
    };
    if kind.is_dir() {
        Found::Directory
    } else if kind.is_file() {
        Found::File
    } else if kind.is_block_device() {
        match refused(settings, state, path) {
            Some(why) => Found::Refused(why),
            None => Found::Device,
        }
    } else {
        Found::Other
    }
}

fn refused(settings: &Settings, state: &Path, path: &Path) -> Option<String> {
    if !settings.gives_device(path) {
        return Some("it is not in `block_roots` of this agent's configuration; add it to let it move, or recreate the container without it".into());
    }
    match exclusive(path, false) {
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => match mounted_from(path) {
            Err(error) => return Some(error.to_string()),
            Ok(Some(mounted)) => {
                if let Some(why) = unfreezable(path, &mounted, state) {
                    return Some(why);
                }
            }
            Ok(None) => {
                return Some("another device or a swap area is built on it; take that apart, or move what lies on it".into());
            }
        },
        Err(error) => return Some(error.to_string()),
        Ok(_) => {}
    }
    match device_size(path) {
        Ok(size) if size >= SMALLEST_DEVICE => None,
        Ok(size) => Some(format!("it holds only {}", Bytes(size))),
        Err(error) => Some(error.to_string()),
    }
}

/// Opens a device that nothing else has claimed.
fn exclusive(path: &Path, write: bool) -> io::Result<File> {
    let mut tries = 5;
    loop {
        let opened = OpenOptions::new()
            .read(true)
            .write(write)
            .custom_flags(libc::O_EXCL)
            .open(path);
        match opened {
            // A program that this process is starting holds its descriptors until it runs.
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) && tries > 1 => {
                tries -= 1;
                std::thread::sleep(Duration::from_millis(20));
            }
            other => return other,
        }
    }
}

/// Where a device of `volume` goes on a target with these settings.
///
/// # Errors
/// Why its counterpart here cannot take it.
pub(super) fn find_counterpart(
    settings: &Settings,
    plan: &PlanId,
    volume: &VolumeSpec,
) -> Result<Place, String> {
    let path = &volume.source_path;
    if !settings.takes_device(path) || !path.exists() {
        return Ok(Place {
            volume: volume.id,
            path: settings
                .image_root
                .join(format!("{plan}-{}.img", volume.id)),
            made: true,
        });
    }
    let shown = path.display();
    let failed = |error: io::Error| format!("{shown} cannot be used here: {error}");
    let device = exclusive(path, false).map_err(failed)?;
    let size = device_size(path).map_err(failed)?;
    if size < volume.size.0 {
        return Err(format!(
            "{shown} holds {} here, {} are needed; enlarge it, or take it out of `block_roots`",
            Bytes(size),
            volume.size
        ));
    }
    let mut label = vec![0; LABELS as usize];
    for offset in [0, size.saturating_sub(LABELS)] {
        let length = label.len().min(size as usize);
        device
            .read_exact_at(&mut label[..length], offset)
            .map_err(failed)?;
        if !is_zero(&label[..length]) {
            return Err(format!(
                "{shown} is not blank here; if it holds nothing of worth, clear it with `blkdiscard --zeroout {shown}`"
            ));
        }
    }
    Ok(Place {
        volume: volume.id,
        path: path.clone(),
        made: false,
    })
}

/// Undoes what a plan did to the place of a file or device.
///
/// # Errors
/// It cannot be removed.
pub(super) fn remove(place: &Place) -> io::Result<()> {
    if place.made {
        detach(&place.path)?;
        return match std::fs::remove_file(&place.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other,
        };
    }
    // Blank again as far as anybody looks, and the next plan.
    let device = exclusive(&place.path, true)?;
    let size = device_size(&place.path)?;
    let zeros = vec![0; LABELS.min(size) as usize];
    for offset in [0, size - zeros.len() as u64] {
        device.write_all_at(&zeros, offset)?;
    }
    device.sync_all()
}

impl Target {
    /// The devices here of the plan's block volumes, by their paths on the source; a loop device is attached
    /// over each image that has none, and written down before a twin knows it.
    pub(super) async fn attach(
        &self,
        plan: &Plan,
        places: &[Place],
    ) -> Result<BTreeMap<PathBuf, PathBuf>, TargetError> {
        let devices = plan
            .volumes
            .iter()
            .filter(|one| one.kind == VolumeKind::Device);
        let mut here = BTreeMap::new();
        for volume in devices {
            let Some(place) = places.iter().find(|place| place.volume == volume.id) else {
                continue;
            };
            let device = if place.made {
                let image = place.path.clone();
                let attached = tokio::task::spawn_blocking(move || attach(&image)).await;
                attached
                    .map_err(io::Error::other)
                    .flatten()
                    .map_err(|error| TargetError::File {
                        doing: format!("attach a loop device to {}", place.path.display()),
                        error,
                    })?
            } else {
                place.path.clone()
            };
            here.insert(volume.source_path.clone(), device);
        }
        if !here.is_empty()
            && let Some(known) = self.plans().get_mut(&plan.id)
            && known.devices != here
        {
            let devices = here.clone();
            let event = TargetEvent::Attached { devices };
            known.journal.append(crate::fleet::now(), event)?;
            known.devices.clone_from(&here);
        }
        Ok(here)
    }

    /// Attaches the loop devices of an owned plan again under the numbers that its twins know, as after a
    /// restart of the host.
    pub(super) fn attach_again(&self, id: &PlanId) {
        let (plan, places, devices) = match self.plans().get(id) {
            Some(known) => (
                known.plan.clone(),
                known.places.clone(),
                known.devices.clone(),
            ),
            None => return,
        };
        for volume in &plan.volumes {
            let place = places.iter().find(|place| place.volume == volume.id);
            let (Some(device), Some(place)) = (devices.get(&volume.source_path), place) else {
                continue;
            };
            if !place.made {
                continue;
            }
            let trouble = match loops_over(&place.path) {
                Ok(there) if there.contains(device) => continue,
                Ok(_) => losetup(&[device.as_ref(), place.path.as_ref()]).map(drop),
                Err(error) => Err(error),
            };
            if let Err(error) = trouble {
                tracing::error!(plan = %id, "volume {} cannot be attached to {} again: {error}; its twins cannot start", volume.name, device.display());
            }
        }
    }
}

/// Detaches the loop devices of the plan's images.
pub(super) fn detach_all(plan: &Plan, places: &[Place]) {
    let devices = plan
        .volumes
        .iter()
        .filter(|one| one.kind == VolumeKind::Device);
    for volume in devices {
        let place = places.iter().find(|place| place.volume == volume.id);
        if let Some(place) = place.filter(|place| place.made)
            && let Err(error) = detach(&place.path)
        {
            tracing::warn!(plan = %plan.id, "left attached: {error}");
        }
    }
}

fn attach(image: &Path) -> io::Result<PathBuf> {
    if let Some(device) = loops_over(image)?.pop() {
        return Ok(device);
    }
    let device = losetup(&["--find".as_ref(), "--show".as_ref(), image])?;
    Ok(PathBuf::from(device.trim()))
}

fn detach(image: &Path) -> io::Result<()> {
    for device in loops_over(image)? {
        losetup(&["--detach".as_ref(), &device])?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ids::VolumeId;

    /// A loop device over `file`; detached when dropped.
    struct Loop(PathBuf);

    impl Loop {
        /// None, and said, where there are no loop devices.
        fn over(file: &Path) -> Option<Self> {
            let made = attach(file);
            made.map(Self)
                .inspect_err(|error| println!("not run: {error}"))
                .ok()
        }
    }

    impl Drop for Loop {
        fn drop(&mut self) {
            let _ = losetup(&["--detach".as_ref(), &self.0]);
        }
    }

    fn allowing(device: &Path) -> Settings {
        Settings {
            block_roots: vec![device.to_owned()],
            ..Settings::default()
        }
    }

    fn volume(device: &Path, size: u64) -> VolumeSpec {
        VolumeSpec {
            id: VolumeId(3),
            name: "disk".into(),
            kind: VolumeKind::Device,
            source_path: device.to_owned(),
            containers: Vec::new(),
            size: Bytes(size),
            holes: Bytes(0),
            entries: 2,
            device_nodes: 0,
            unreadable: 0,
            changes: Default::default(),
            unused: Default::default(),
        }
    }

    fn look(settings: &Settings, path: &Path) -> Found {
        super::look(settings, Path::new("/var/lib/lifeboat"), path)
    }

    #[test]
    fn a_device_moves_only_when_it_is_allowed_and_nobody_else_has_claimed_it() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("disk");
        File::create(&file).unwrap().set_len(4 << 20).unwrap();
        assert_eq!(look(&Settings::default(), &file), Found::File);
        assert_eq!(
            look(&Settings::default(), directory.path()),
            Found::Directory
        );
        assert_eq!(
            look(&Settings::default(), Path::new("/dev/null")),
            Found::Other
        );
        let Some(disk) = Loop::over(&file) else {
            return;
        };
        let refused = look(&Settings::default(), &disk.0);
        assert!(matches!(&refused, Found::Refused(why) if why.contains("block_roots")));
        let settings = allowing(&disk.0);
        assert_eq!(look(&settings, &disk.0), Found::Device);
        // By another name of the same device too.
        let other = directory.path().join("data");
        std::os::unix::fs::symlink(&disk.0, &other).unwrap();
        assert_eq!(look(&settings, &other), Found::Device);
        assert_eq!(look(&allowing(directory.path()), &disk.0), Found::Device);
        let claimed = exclusive(&disk.0, false).unwrap();
        let refused = look(&settings, &disk.0);
        assert!(
            matches!(&refused, Found::Refused(why) if why.contains("is built on it")),
            "{refused:?}"
        );
        drop(claimed);
    }

    #[test]
    fn a_counterpart_is_used_when_it_is_allowed_blank_and_large_enough_and_else_an_image() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("disk");
        File::create(&file).unwrap().set_len(4 << 20).unwrap();
        let Some(disk) = Loop::over(&file) else {
            return;
        };
        let plan = PlanId::from("p1");
        let find =
            |settings: &Settings, size| find_counterpart(settings, &plan, &volume(&disk.0, size));
        let image = find(&Settings::default(), 4 << 20).unwrap();
        assert!(image.made && image.path.starts_with("/var/lib/lifeboat/images"));
        let settings = allowing(&disk.0);
        let place = find(&settings, 4 << 20).unwrap();
        assert_eq!((&place.path, place.made), (&disk.0, false));
        let error = find(&settings, 5 << 20).unwrap_err();
        assert!(
            error.contains("4.0 MiB") && error.contains("5.0 MiB"),
            "{error}"
        );
        // Where RAID of old keeps its label.
        let end = (4 << 20) - 65_536;
        let device = File::options().write(true).open(&disk.0).unwrap();
        device.write_all_at(b"label", end).unwrap();
        drop(device);
        let error = find(&settings, 4 << 20).unwrap_err();
        assert!(error.contains("not blank"), "{error}");
        remove(&place).unwrap();
        assert!(find(&settings, 4 << 20).is_ok(), "given back as it was");
    }
}
