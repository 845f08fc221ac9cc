//! cgroup2 ids to paths below the scope, and paths to containers.

use crate::model::container::Container;
use crate::model::ids::ContainerName;
use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::DirEntryExt;
use std::path::{Path, PathBuf};

/// The directories of the scope.
#[derive(Debug, Default)]
pub struct Cgroups {
    scope: PathBuf,
    /// Path below the scope by id, with a leading slash.
    paths: HashMap<u64, String>,
}

impl Cgroups {
    /// Nothing known yet of a scope directory.
    #[must_use]
    pub fn new(scope: PathBuf) -> Self {
        Self {
            scope,
            paths: HashMap::new(),
        }
    }

    /// Reads the tree anew if an id is unknown. An id that is unknown afterwards is a cgroup that is gone.
    pub fn know(&mut self, ids: impl IntoIterator<Item = u64>) {
        if ids.into_iter().any(|id| !self.paths.contains_key(&id)) {
            self.read();
        }
    }

    /// Reads the tree anew.
    pub fn read(&mut self) {
        self.paths.clear();
        if let Ok(id) = super::scope::cgroup_id(&self.scope) {
            self.paths.insert(id, "/".to_owned());
        }
        let mut open = vec![(self.scope.clone(), String::new())];
        while let Some((directory, below)) = open.pop() {
            let entries = fs::read_dir(&directory).into_iter().flatten().flatten();
            for entry in entries {
                if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                    let path = format!("{below}/{}", entry.file_name().to_string_lossy());
                    self.paths.insert(entry.ino(), path.clone());
                    open.push((entry.path(), path));
                }
            }
        }
    }

    /// Whether a cgroup is in the tree, as last read.
    #[must_use]
    pub fn has(&self, id: u64) -> bool {
        self.paths.contains_key(&id)
    }

    /// Path below the scope of a cgroup in the tree, as last read.
    #[must_use]
    pub fn path(&self, id: u64) -> Option<&str> {
        self.paths.get(&id).map(String::as_str)
    }

    /// The container of every cgroup.
    #[must_use]
    pub fn owners(&self, containers: &[Container]) -> HashMap<u64, ContainerName> {
        self.paths
            .iter()
            .filter_map(|(&id, path)| Some((id, owner(path, containers)?.clone())))
            .collect()
    }
}

/// The container with the longest cgroup path that is `path` or above it.
#[must_use]
pub fn owner<'a>(path: &str, containers: &'a [Container]) -> Option<&'a ContainerName> {
    containers
        .iter()
        .filter(|container| is_below(path, &container.cgroup_path))
        .max_by_key(|container| container.cgroup_path.len())
        .map(|container| &container.name)
}

fn is_below(path: &str, above: &str) -> bool {
    // A container at the root of the scope would own everything, the agent too.
    above.len() > 1
        && path
            .strip_prefix(above)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// Processes of a container: those of its cgroup and of all below.
#[must_use]
pub fn processes(scope: &Path, cgroup_path: &str) -> Vec<i32> {
    let mut processes = Vec::new();
    let mut open = vec![scope.join(cgroup_path.trim_start_matches('/'))];
    while let Some(directory) = open.pop() {
        let listed = fs::read_to_string(directory.join("cgroup.procs")).unwrap_or_default();
        processes.extend(listed.lines().filter_map(|line| line.parse::<i32>().ok()));
        let entries = fs::read_dir(&directory).into_iter().flatten().flatten();
        open.extend(
            entries
                .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
                .map(|entry| entry.path()),
        );
    }
    processes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_belongs_to_what_it_is_below_by_whole_components() {
        assert!(is_below("/pod/web", "/pod/web"));
        assert!(is_below("/pod/web/init", "/pod/web"));
        assert!(!is_below("/pod/web2", "/pod/web"));
        assert!(!is_below("/pod", "/pod/web"));
        assert!(!is_below("/pod", "/"));
    }
}
