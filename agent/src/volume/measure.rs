//! How much a tree holds, before it is read.

use super::scan::ScanError;
use super::walk::{kind_of, open_root, walk};
use crate::model::units::Bytes;
use nix::sys::stat::SFlag;
use std::path::Path;

/// Size and number of entries of a tree.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Measure {
    /// Apparent size of its regular files.
    pub size: Bytes,
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
    for found in walk(&open_root(path)?) {
        let stat = match found {
            Err(error) if error.is_loss() => {
                measure.unreadable += 1;
                continue;
            }
            other => other?.stat,
        };
        measure.entries += 1;
        match kind_of(&stat) {
            SFlag::S_IFREG => {
                let size = Bytes(stat.st_size.unsigned_abs());
                measure.size += size;
                measure.largest = measure.largest.max(size);
            }
            SFlag::S_IFBLK => measure.device_nodes += 1,
            SFlag::S_IFCHR if stat.st_rdev != 0 => measure.device_nodes += 1,
            _ => {}
        }
    }
    Ok(measure)
}
