//! Recorded access traces: read from their files, and as the order in which the volumes of a plan are fetched.
//!
//! Invariant: what a plan carries of traces stays far below what the control channel takes.

use crate::model::ids::VolumeId;
use crate::model::trace::{FetchOrder, MAX_TRACE, Of, Trace};
use crate::model::units::Bytes;
use crate::model::volume::{VolumeKind, VolumeSpec};
use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::OpenOptions;
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// Bytes of JSON that all fetch orders of a plan may take, about: 64 Ki ranges, of 4 GiB when no two are neighbours.
const ROOM: usize = 2 << 20;

/// An access trace cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("cannot use the access trace {path}: {why}; record one with `lifeboat record --trace`")]
pub struct TraceUnusable {
    path: PathBuf,
    why: String,
}

impl TraceUnusable {
    fn new(path: &Path, why: &impl ToString) -> Self {
        Self {
            path: path.to_owned(),
            why: why.to_string(),
        }
    }
}

/// Reads the trace in a file.
pub(super) fn read(path: &Path) -> Result<Trace, TraceUnusable> {
    let mut bytes = Vec::new();
    // A FIFO would be waited for.
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .map_err(|error| TraceUnusable::new(path, &error))?;
    if !file.metadata().is_ok_and(|data| data.is_file()) {
        return Err(TraceUnusable::new(path, &"it is no regular file"));
    }
    file.take(MAX_TRACE as u64 + 1)
        .read_to_end(&mut bytes)
        .map_err(|error| TraceUnusable::new(path, &error))?;
    Trace::decode(&bytes).map_err(|error| TraceUnusable::new(path, &format!("it {error}")))
}

/// In which order traces let volumes be fetched, and what to tell of it.
///
/// # Errors
/// One cannot be read, or is of nothing that lies in these volumes.
pub(super) fn orders(
    files: &[PathBuf],
    volumes: &[VolumeSpec],
) -> Result<(BTreeMap<VolumeId, FetchOrder>, Vec<String>), TraceUnusable> {
    let (mut orders, mut notes, mut room) = (BTreeMap::new(), Vec::new(), ROOM);
    for file in files {
        let trace = read(file)?;
        let Of::Directory(directory) = &trace.of else {
            let why = "it is of a device, and only of directories something can come after the twins start";
            return Err(TraceUnusable::new(file, &why));
        };
        let (before, hottest) = (notes.len(), trace.hottest(|_| true));
        let trees = volumes
            .iter()
            .filter(|volume| matches!(volume.kind, VolumeKind::Named(_) | VolumeKind::Bind));
        for volume in trees {
            // As the recorder names it.
            let root = std::fs::canonicalize(&volume.source_path);
            let root = root.unwrap_or_else(|_| volume.source_path.clone());
            let order: &mut FetchOrder = orders.entry(volume.id).or_default();
            let known = order.bytes();
            let place = |path: &[u8]| {
                let path = Path::new(directory).join(OsStr::from_bytes(path));
                let below = path.strip_prefix(&root).ok()?;
                Some(below.as_os_str().as_bytes().to_vec())
            };
            order.append(&trace, &hottest, place, &mut room);
            let more = Bytes(order.bytes().0 - known.0);
            if more > Bytes(0) {
                notes.push(format!(
                    "should the twins start first, {more} of {} come before the rest, as {} has them",
                    volume.name,
                    file.display()
                ));
            }
        }
        if notes.len() == before {
            let why = format!("nothing that was read in {directory} is in a directory that moves");
            return Err(TraceUnusable::new(file, &why));
        }
    }
    orders.retain(|_, order| !order.is_empty());
    Ok((orders, notes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::trace::{Cause, Touch, TracedFile};
    use crate::model::units::UnixMillis;
    use std::time::Duration;

    fn volume(id: u32, path: PathBuf) -> VolumeSpec {
        VolumeSpec {
            id: VolumeId(id),
            name: format!("volume {id}"),
            kind: VolumeKind::Bind,
            source_path: path,
            containers: Vec::new(),
            size: Bytes(0),
            holes: Bytes(0),
            entries: 0,
            device_nodes: 0,
            unreadable: 0,
            changes: Default::default(),
            unused: Default::default(),
        }
    }

    fn written(file: &Path, of: Of, paths: &[&str]) {
        let touch = |file| Touch {
            file,
            extent: 1,
            cause: 0,
            write: false,
            at_ms: 0,
            heat: 1,
        };
        let trace = Trace {
            of,
            started: UnixMillis(0),
            lasted: Duration::ZERO,
            extent: Bytes(64 << 10),
            lost: 0,
            elsewhere: 0,
            causes: vec![Cause {
                container: None,
                cgroup: String::new(),
            }],
            files: paths
                .iter()
                .map(|path| TracedFile {
                    path: path.as_bytes().to_vec(),
                    length: Bytes(1 << 20),
                })
                .collect(),
            touches: (0..paths.len() as u32).map(touch).collect(),
        };
        std::fs::write(file, trace.encode()).unwrap();
    }

    #[test]
    fn a_trace_orders_the_volumes_in_whose_directories_its_files_lie_and_another_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let base = directory.path().canonicalize().unwrap();
        for name in ["one", "two"] {
            std::fs::create_dir(base.join(name)).unwrap();
        }
        std::os::unix::fs::symlink(base.join("two"), base.join("link")).unwrap();
        let volumes = [volume(1, base.join("one")), volume(2, base.join("link"))];
        let file = base.join("trace");
        let of = |path: &Path| Of::Directory(path.display().to_string());

        written(&file, of(&base), &["one/a/b", "two/c", "oneself/d", "e"]);
        let (orders, notes) = orders(std::slice::from_ref(&file), &volumes).unwrap();
        let ranges = |id| {
            let ranges = orders[&VolumeId(id)].ranges();
            let ranges = ranges.map(|(path, bytes)| (path.to_vec(), bytes.start));
            ranges.collect::<Vec<_>>()
        };
        assert_eq!(ranges(1), [(b"a/b".to_vec(), 65_536)]);
        assert_eq!(ranges(2), [(b"c".to_vec(), 65_536)]);
        assert_eq!(notes.len(), 2, "{notes:?}");

        let refused = || {
            let refused = super::orders(std::slice::from_ref(&file), &volumes);
            refused.unwrap_err().to_string()
        };
        written(&file, of(&base.join("three")), &["one/a"]);
        assert!(refused().contains("is in a directory that moves"));
        written(&file, Of::Device("/dev/sda".to_owned()), &[""]);
        assert!(refused().contains("it is of a device"));
        std::fs::write(&file, b"nothing of the kind").unwrap();
        assert!(refused().contains("is no trace"));
        std::fs::remove_file(&file).unwrap();
        assert!(refused().contains("No such file"));
    }
}
