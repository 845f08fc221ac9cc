//! User-mode network stacks, which carry the connections of rootless containers (slirp4netns, pasta).
//!
//! Such a process ends a container's connection to the host and makes another one in its own name. The
//! container's edge is told by the address that it connected to; the stack's own is a hop and no dependence.
//! Non-goal: naming whose connection a stack carries.

use super::cgroups;
use crate::model::edge::{Edge, Protocol};
use crate::model::ids::ContainerName;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

/// Device number of `/dev/net/tun` (Linux `Documentation/admin-guide/devices.txt`: 10, 200).
const TUN: u64 = nix::sys::stat::makedev(10, 200);

/// How long an answer about a cgroup counts.
const AGAIN: Duration = Duration::from_secs(60);

/// Which cgroups hold a stack, as far as that was asked.
#[derive(Debug, Default)]
pub struct Stacks {
    known: BTreeMap<ContainerName, (Instant, bool)>,
}

impl Stacks {
    /// The edges without those of a stack to a service on which a container is known to depend.
    pub fn without_hops(&mut self, root: &Path, scope: &Path, mut edges: Vec<Edge>) -> Vec<Edge> {
        self.known.retain(|_, (asked, _)| asked.elapsed() < AGAIN);
        let hops: BTreeSet<ContainerName> = doubtful(&edges)
            .into_iter()
            .filter(|name| {
                let asked = self.known.entry(name.clone());
                asked
                    .or_insert_with(|| (Instant::now(), holds_stack(root, scope, name)))
                    .1
            })
            .collect();
        if !hops.is_empty() {
            let services = services(&edges);
            edges.retain(|edge| !(hops.contains(&edge.child) && services.contains(&service(edge))));
        }
        edges
    }
}

type Service = (ContainerName, Protocol, u16);

fn service(edge: &Edge) -> Service {
    (edge.parent.clone(), edge.protocol, edge.port)
}

/// A cgroup that no runtime owns goes by its path.
fn is_bare(name: &ContainerName) -> bool {
    name.as_str().starts_with('/')
}

/// Services on which a container depends.
fn services(edges: &[Edge]) -> BTreeSet<Service> {
    let of_containers = edges.iter().filter(|edge| !is_bare(&edge.child));
    of_containers.map(service).collect()
}

/// Bare cgroups that depend on a service on which a container depends, too.
fn doubtful(edges: &[Edge]) -> BTreeSet<ContainerName> {
    let mut bare = edges.iter().filter(|edge| is_bare(&edge.child)).peekable();
    if bare.peek().is_none() {
        return BTreeSet::new();
    }
    let services = services(edges);
    bare.filter(|edge| services.contains(&service(edge)))
        .map(|edge| edge.child.clone())
        .collect()
}

/// Whether a process of a cgroup holds a tun or tap device.
fn holds_stack(root: &Path, scope: &Path, name: &ContainerName) -> bool {
    cgroups::processes(scope, name.as_str())
        .iter()
        .filter_map(|pid| fs::read_dir(root.join(format!("proc/{pid}/fd"))).ok())
        .flatten()
        .flatten()
        // Followed to the open file itself: a stack's sandbox hides its path.
        .any(|descriptor| fs::metadata(descriptor.path()).is_ok_and(|file| file.rdev() == TUN))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn edge(child: &str, port: u16) -> Edge {
        serde_json::from_value(serde_json::json!({ "child": child, "parent": "db", "port": port }))
            .expect("an edge")
    }

    #[test]
    fn only_a_stack_that_repeats_a_containers_edge_is_a_hop() {
        let edges = vec![
            edge("web", 5432),
            edge("/session", 5432),
            edge("/session", 80),
            edge("/own", 5432),
        ];
        let mut stacks = Stacks::default();
        for (name, is_stack) in [("/session", true), ("/own", false)] {
            stacks.known.insert(name.into(), (Instant::now(), is_stack));
        }
        let left = stacks.without_hops(Path::new("/"), Path::new("/nonexistent"), edges);
        let left: Vec<(&str, u16)> = left
            .iter()
            .map(|edge| (edge.child.as_str(), edge.port))
            .collect();
        assert_eq!(left, [("web", 5432), ("/session", 80), ("/own", 5432)]);
    }

    #[test]
    fn a_cgroup_without_processes_holds_no_stack() {
        assert!(!holds_stack(
            Path::new("/"),
            Path::new("/nonexistent"),
            &"/gone".into()
        ));
    }
}
