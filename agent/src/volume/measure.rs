//! How much a tree holds, before it is read.

use super::confined::Confined;
use super::scan::{Holes, ScanError};
use super::walk::{Found, kind_of, open_root, walk};
use crate::model::units::Bytes;
use nix::fcntl::OFlag;
use nix::sys::stat::{Mode, SFlag};
use std::path::Path;

/// Size and number of entries of a tree.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Measure {
    /// Apparent size of its regular files.
    pub size: Bytes,
    /// What of that is holes that hold whole blocks.
    pub holes: Bytes,
    /// Files, directories, links, ….
    pub entries: u64,
    /// Device nodes among them; the whiteouts of overlay file systems give access to nothing and do not count.
    pub device_nodes: u64,
    /// What the disk did not give up, which is not counted.
    pub unreadable: u64,
    /// Apparent size of the largest file.
    pub largest: Bytes,
}

/// Measures everything beneath `path`.
///
/// # Errors
/// Anything that exists but cannot be looked at, unless it is the disk that fails.
pub fn measure(path: &Path) -> Result<Measure, ScanError> {
    let mut measure = Measure::default();
    let root = open_root(path)?;
    for found in walk(&root) {
        let found = match found {
            Err(error) if error.is_loss() => {
                measure.unreadable += 1;
                continue;
            }
            other => other?,
        };
        let stat = found.stat;
        measure.entries += 1;
        match kind_of(&stat) {
            SFlag::S_IFREG => {
                let size = Bytes(stat.st_size.unsigned_abs());
                measure.size += size;
                measure.holes += holes(&root, &found);
                measure.largest = measure.largest.max(size);
            }
            SFlag::S_IFBLK => measure.device_nodes += 1,
            SFlag::S_IFCHR if stat.st_rdev != 0 => measure.device_nodes += 1,
            _ => {}
        }
    }
    Ok(measure)
}

/// Holes of a file; none where it cannot be looked at, which whoever reads it finds, too.
fn holes(root: &Confined, found: &Found) -> Bytes {
    let stat = &found.stat;
    // Most files have none, and their blocks tell so.
    if stat.st_blocks.saturating_mul(512) >= stat.st_size {
        return Bytes(0);
    }
    let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    let file = root.open_beneath(&found.path, flags, Mode::empty());
    let holes = file
        .ok()
        .and_then(|file| Holes::of(&file.into(), stat).ok());
    Bytes(holes.map_or(0, |holes| holes.bytes(stat.st_size.unsigned_abs())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{self, File};
    use std::os::unix::fs::FileExt;

    #[test]
    fn holes_of_files_are_told_apart_from_what_moves() {
        // `/tmp` may be a file system that knows no holes.
        let place = concat!(env!("CARGO_MANIFEST_DIR"), "/../target");
        let directory = tempfile::tempdir_in(place).unwrap();
        fs::write(directory.path().join("full"), [1; 5000]).unwrap();
        let sparse = File::create(directory.path().join("sparse")).unwrap();
        sparse.write_all_at(&[1; 100], 0).unwrap();
        sparse.set_len(1 << 40).unwrap();
        let measured = measure(directory.path()).unwrap();
        assert_eq!(measured.size, Bytes((1 << 40) + 5000));
        let data = measured.size.0 - measured.holes.0;
        assert!((5100..2 << 20).contains(&data), "{data} bytes of data");
        // A byte in each block: all of them move.
        for block in 0..8 {
            sparse.write_all_at(&[1], (block << 20) + 7).unwrap();
        }
        sparse.set_len(8 << 20).unwrap();
        assert_eq!(measure(directory.path()).unwrap().holes, Bytes(0));
    }
}
