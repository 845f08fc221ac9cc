//! cgroup2 ids to paths below the scope, and paths to containers.

use crate::model::container::Container;
use crate::model::ids::ContainerName;
use std::collections::{HashMap, HashSet};
use std::fs;
use std::os::unix::fs::DirEntryExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// What the kernel counted for a cgroup that is gone waits so long for its container's name: a runtime tells
/// of a container's end after it.
const NAMED_WITHIN: Duration = Duration::from_secs(3);

/// The directories of the scope.
#[derive(Debug, Default)]
pub struct Cgroups {
    scope: PathBuf,
    /// Path below the scope by id, with a leading slash.
    paths: HashMap<u64, String>,
    /// Those that are gone, or were made since the tree was read.
    gone: HashMap<u64, Gone>,
}

/// A cgroup without a directory.
#[derive(Debug)]
struct Gone {
    path: String,
    since: Instant,
    /// It was seen alive, and what the kernel counted for it told of.
    seen: bool,
}

impl Gone {
    fn is_of_use(&self) -> bool {
        self.since.elapsed() < NAMED_WITHIN * 2
    }
}

impl Cgroups {
    /// Nothing known yet of a scope directory.
    #[must_use]
    pub fn new(scope: PathBuf) -> Self {
        Self {
            scope,
            paths: HashMap::new(),
            gone: HashMap::new(),
        }
    }

    /// Notes cgroups that were made, with their path below the scope: they may be gone before the tree is read.
    pub fn born(&mut self, born: impl IntoIterator<Item = (u64, String)>) {
        let since = Instant::now();
        self.gone.retain(|_, gone| gone.is_of_use());
        for (id, path) in born {
            if !self.paths.contains_key(&id) {
                let seen = false;
                self.gone.insert(id, Gone { path, since, seen });
            }
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
        let before = std::mem::take(&mut self.paths);
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
        let since = Instant::now();
        let gone = before.into_iter();
        self.gone.extend(gone.map(|(id, path)| {
            (
                id,
                Gone {
                    path,
                    since,
                    seen: true,
                },
            )
        }));
        let paths = &self.paths;
        self.gone
            .retain(|id, gone| !paths.contains_key(id) && gone.is_of_use());
    }

    /// The containers of cgroups that are gone, by the runtime's `names` of container ids; second, those that
    /// may still be named by a later call. A cgroup that no runtime made is named by its path.
    #[must_use]
    pub fn owners_of_gone(
        &self,
        ids: &HashSet<u64>,
        names: &HashMap<&str, &ContainerName>,
    ) -> (HashMap<u64, ContainerName>, HashSet<u64>) {
        let (mut owners, mut unnamed) = (HashMap::new(), HashSet::new());
        let gone = ids.iter().filter(|id| !self.has(**id));
        for (&id, gone) in gone.filter_map(|id| Some((id, self.gone.get(id)?))) {
            match container_id(&gone.path) {
                Some(container) => {
                    if let Some(&name) = names.get(container) {
                        owners.insert(id, name.clone());
                    } else if !gone.seen && gone.since.elapsed() < NAMED_WITHIN {
                        unnamed.insert(id);
                    } else {
                        owners.insert(id, ContainerName(gone.path.clone()));
                    }
                }
                None if gone.path.contains("conmon") => {}
                None => {
                    owners.insert(id, ContainerName(gone.path.clone()));
                }
            }
        }
        (owners, unnamed)
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

/// The container's id in the path of its cgroup: `…/libpod-ID`, `…/docker-ID.scope`, `…/ID`, or below such a
/// one. Monitors of containers have it in their path too, and are none.
pub(super) fn container_id(path: &str) -> Option<&str> {
    path.split('/').find_map(|part| {
        let part = part.strip_suffix(".scope").unwrap_or(part);
        let (kind, id) = part.rsplit_once('-').unwrap_or(("", part));
        let is_id = id.len() == 64 && id.bytes().all(|byte| byte.is_ascii_hexdigit());
        (is_id && !kind.ends_with("conmon")).then_some(id)
    })
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
    fn the_id_of_a_container_is_found_in_the_path_of_its_cgroup_and_not_in_its_monitors() {
        let id = "0123456789abcdef".repeat(4);
        for path in [
            format!("/libpod_parent/libpod-{id}"),
            format!("/machine.slice/libpod-{id}.scope/container"),
            format!("/docker/{id}"),
            format!("/kubepods.slice/pod7/cri-containerd-{id}.scope"),
        ] {
            assert_eq!(container_id(&path), Some(id.as_str()), "{path}");
        }
        let conmon = format!("/libpod_parent/libpod-conmon-{id}");
        for path in [conmon.as_str(), "/system.slice/ssh.service", "/"] {
            assert_eq!(container_id(path), None, "{path}");
        }
    }

    #[test]
    fn a_cgroup_that_was_never_seen_is_named_by_what_its_runtime_told_and_until_then_waits() {
        let id = "ab".repeat(32);
        let scope = tempfile::tempdir().expect("a directory");
        let mut cgroups = Cgroups::new(scope.path().to_owned());
        cgroups.born([(7, format!("/libpod-{id}")), (8, "/job-3".to_owned())]);
        let ids = HashSet::from([7, 8, 9]);
        cgroups.know(ids.iter().copied());
        let (owners, unnamed) = cgroups.owners_of_gone(&ids, &HashMap::new());
        assert_eq!(owners, HashMap::from([(8, "/job-3".into())]));
        assert_eq!(unnamed, HashSet::from([7]), "and of 9 nothing is known");
        let name: ContainerName = "brief".into();
        let names = HashMap::from([(id.as_str(), &name)]);
        let (owners, unnamed) = cgroups.owners_of_gone(&ids, &names);
        assert_eq!(owners.get(&7), Some(&name));
        assert!(unnamed.is_empty());
    }

    #[test]
    fn a_path_belongs_to_what_it_is_below_by_whole_components() {
        assert!(is_below("/pod/web", "/pod/web"));
        assert!(is_below("/pod/web/init", "/pod/web"));
        assert!(!is_below("/pod/web2", "/pod/web"));
        assert!(!is_below("/pod", "/pod/web"));
        assert!(!is_below("/pod", "/"));
    }
}
