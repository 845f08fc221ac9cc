//! Block devices that containers were given, by their names on this host.
//!
//! Podman shows the first node with a device's number in `/dev`, of whatever kind: a terminal in place of a
//! loop device. So what counts is the node that the container has.

use crate::model::container::Mount;
use serde_json::Value;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// Keeps of the devices among `mounts` the block devices, each by its name on the host; `pid` is the
/// container's first process, 0 when it does not run.
pub(super) fn keep_block_devices(mounts: &mut Vec<Mount>, pid: i32) {
    mounts.retain_mut(|mount| {
        if !mount.device {
            return true;
        }
        let inside = match mount.destination.strip_prefix("/") {
            Ok(inside) if pid != 0 => PathBuf::from(format!("/proc/{pid}/root")).join(inside),
            _ => mount.source.clone(),
        };
        let Some(number) = block_number(&inside) else {
            return false;
        };
        let shown = fs::canonicalize(&mount.source).ok();
        if shown.and_then(|shown| block_number(&shown)) != Some(number) {
            let Some(name) = name_of(number) else {
                return false;
            };
            mount.source = name;
        }
        true
    });
}

/// The number of a block device's own node; a link is not followed, which a container may have laid out.
fn block_number(node: &Path) -> Option<u64> {
    let found = fs::symlink_metadata(node).ok()?;
    found.file_type().is_block_device().then(|| found.rdev())
}

/// The node of a block device, as the kernel names it.
fn name_of(number: u64) -> Option<PathBuf> {
    let (major, minor) = (nix::sys::stat::major(number), nix::sys::stat::minor(number));
    let text = fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/uevent")).ok()?;
    let name = text
        .lines()
        .find_map(|line| line.strip_prefix("DEVNAME="))?;
    Some(Path::new("/dev").join(name))
}

/// Writes the names of a container's block devices into its description.
pub fn name_devices(inspect: &mut Value, mounts: &[Mount]) {
    let given = inspect["HostConfig"]["Devices"].as_array_mut();
    for device in given.into_iter().flatten() {
        let inside = device["PathInContainer"].as_str().map(Path::new);
        let found = mounts
            .iter()
            .find(|mount| mount.device && Some(&*mount.destination) == inside);
        if let Some(mount) = found {
            device["PathOnHost"] = mount.source.to_string_lossy().into();
        }
    }
}
