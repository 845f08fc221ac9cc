//! Where the agent's cgroup subtree lies in the kernel's cgroup2 hierarchy.
//!
//! Inside a cgroup namespace the visible root is not the real one, so the level of the scope comes from
//! the kernel: a probe tells the agent's own level and ancestors, and the paths tell the rest.

use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// The scope, as the kernel programs filter by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scope {
    /// cgroup2 id.
    pub id: u64,
    /// Level in the kernel's hierarchy; 0 is the real root.
    pub level: u32,
}

/// Why the scope cannot be placed.
#[derive(Debug, thiserror::Error)]
pub enum ScopeError {
    /// The directory cannot be read.
    #[error(
        "cannot read the scope {path}: {source}; set the agent's cgroup to a cgroup2 directory"
    )]
    Unreadable {
        /// The directory.
        path: PathBuf,
        /// Cause.
        source: io::Error,
    },
    /// It belongs to another kind of file system.
    #[error("the scope {0} is not a cgroup2 directory; set the agent's cgroup to one")]
    NotCgroup2(PathBuf),
    /// Its level could not be found.
    #[error("the scope {0} cannot be placed in the kernel's cgroup hierarchy")]
    Unplaced(PathBuf),
}

/// The cgroup2 id of a directory: its inode number.
///
/// # Errors
/// [`ScopeError::Unreadable`] and [`ScopeError::NotCgroup2`].
pub fn cgroup_id(directory: &Path) -> Result<u64, ScopeError> {
    let unreadable = |source: io::Error| ScopeError::Unreadable {
        path: directory.to_owned(),
        source,
    };
    let kind = statfs(directory).map_err(|errno| unreadable(errno.into()))?;
    if kind.filesystem_type() != CGROUP2_SUPER_MAGIC {
        return Err(ScopeError::NotCgroup2(directory.to_owned()));
    }
    Ok(fs::metadata(directory).map_err(unreadable)?.ino())
}

/// Places the scope. `ancestors` are the ids of the agent's own cgroup and those above it, root first.
///
/// # Errors
/// Any [`ScopeError`].
pub fn place(root: &Path, directory: &Path, ancestors: &[u64]) -> Result<Scope, ScopeError> {
    let id = cgroup_id(directory)?;
    if let Some(level) = ancestors.iter().position(|&ancestor| ancestor == id) {
        let level = level as u32;
        return Ok(Scope { id, level });
    }
    let unplaced = || ScopeError::Unplaced(directory.to_owned());
    let read = |name: &str| fs::read_to_string(root.join(name)).map_err(|_| unplaced());
    let own_level = ancestors.len().checked_sub(1).ok_or_else(unplaced)?;
    let absolute = fs::canonicalize(directory).map_err(|_| unplaced())?;
    let level = level_by_path(
        own_level as i64,
        &read("proc/self/cgroup")?,
        &read("proc/self/mountinfo")?,
        &absolute,
    );
    let level = level.ok_or_else(unplaced)?;
    Ok(Scope { id, level })
}

/// The agent's own cgroup2 path, from `/proc/self/cgroup`, relative to its cgroup namespace.
#[must_use]
pub fn own_path(proc_self_cgroup: &str) -> Option<&str> {
    proc_self_cgroup
        .lines()
        .find_map(|line| line.strip_prefix("0::"))
}

/// Level of a directory: the namespace root's level (the agent's own, less the depth of its path) plus
/// the depth of the mount within the namespace plus the depth of the directory within the mount.
fn level_by_path(own_level: i64, cgroup: &str, mountinfo: &str, directory: &Path) -> Option<u32> {
    let root_level = own_level - depth(own_path(cgroup)?);
    let directory = directory.to_str()?;
    let (mount_root, below) = mountinfo
        .lines()
        .filter_map(|line| {
            let (mount, rest) = line.split_once(" - ")?;
            if !rest.starts_with("cgroup2 ") {
                return None;
            }
            let mut fields = mount.split(' ').skip(3);
            let (mount_root, mount_point) = (fields.next()?, fields.next()?);
            let below = directory.strip_prefix(mount_point.trim_end_matches('/'))?;
            (below.is_empty() || below.starts_with('/')).then_some((mount_root, below))
        })
        .min_by_key(|(_, below)| below.len())?;
    u32::try_from(root_level + depth(mount_root) + depth(below)).ok()
}

/// Components of a path; `..`, which the kernel writes for what lies above the namespace, counts back.
fn depth(path: &str) -> i64 {
    path.split('/')
        .map(|part| match part {
            "" | "." => 0,
            ".." => -1,
            _ => 1,
        })
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTS: &str = "\
24 1 0:22 / / rw - ext4 /dev/vda rw
31 24 0:27 / /sys/fs/cgroup/unified rw,relatime shared:9 - cgroup2 cgroup2 rw
40 24 0:30 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu";

    #[test]
    fn on_the_bare_host_the_level_is_the_depth() {
        let level = |path: &str| level_by_path(0, "1:cpu:/x\n0::/\n", MOUNTS, Path::new(path));
        assert_eq!(level("/sys/fs/cgroup/unified"), Some(0));
        assert_eq!(level("/sys/fs/cgroup/unified/lab/host-a"), Some(2));
        assert_eq!(level("/srv"), None);
    }

    #[test]
    fn in_a_namespace_the_root_lies_deeper() {
        // The agent runs in /init of a namespace whose root is at level 2 of the kernel's hierarchy.
        let level = |path: &str| level_by_path(3, "0::/init\n", MOUNTS, Path::new(path));
        assert_eq!(level("/sys/fs/cgroup/unified"), Some(2));
        assert_eq!(level("/sys/fs/cgroup/unified/pod/web"), Some(4));
    }

    #[test]
    fn a_mount_from_outside_the_namespace_counts_back() {
        let outside = MOUNTS.replace("0:27 /", "0:27 /../..");
        let level = level_by_path(2, "0::/\n", &outside, Path::new("/sys/fs/cgroup/unified/a"));
        assert_eq!(level, Some(1));
    }
}
