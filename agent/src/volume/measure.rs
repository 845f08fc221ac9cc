//! How much a tree holds, before it is read.

use super::scan::ScanError;
use super::walk::{open_root, walk};
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
}

/// Measures everything beneath `path`.
///
/// # Errors
/// Anything that exists but cannot be looked at.
pub fn measure(path: &Path) -> Result<Measure, ScanError> {
    let found = walk(&open_root(path)?)?.found;
    let is = |mode, kind: SFlag| mode & SFlag::S_IFMT.bits() == kind.bits();
    let sizes = found
        .iter()
        .filter(|found| is(found.stat.st_mode, SFlag::S_IFREG));
    let nodes = found.iter().map(|found| &found.stat).filter(|stat| {
        is(stat.st_mode, SFlag::S_IFBLK) || is(stat.st_mode, SFlag::S_IFCHR) && stat.st_rdev != 0
    });
    Ok(Measure {
        size: Bytes(sizes.map(|found| found.stat.st_size.unsigned_abs()).sum()),
        entries: found.len() as u64,
        device_nodes: nodes.count() as u64,
    })
}
