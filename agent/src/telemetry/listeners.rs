//! Who listens where, and what was connected before the agent looked.

use super::book::EdgeBook;
use super::cgroups;
use super::edges::{Kind, Listener, Role};
use super::sockets;
use crate::model::container::{Container, State};
use crate::model::edge::{Learnt, Protocol};
use crate::model::ids::ContainerName;
use crate::model::units::UnixMillis;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::Path;
use std::time::{Duration, Instant};

/// How often a network namespace's tables are read again, for listeners that closed since. Reading
/// them walks the whole host's socket table, so one namespace is read in a sweep at most.
const AGAIN: Duration = Duration::from_secs(60);

/// How often it is looked which network namespace a process is in: few ever change it.
const NETNS_AGAIN: Duration = Duration::from_secs(5);

/// What the socket tables of the containers' network namespaces say.
#[derive(Default)]
pub struct Listeners {
    /// Containers whose namespace has been read, with the process it was read through.
    known: BTreeMap<ContainerName, i32>,
    namespaces: BTreeMap<u64, Namespace>,
    /// By first process: its network namespace, and when it was looked at.
    netns: BTreeMap<i32, (u64, Instant)>,
}

struct Namespace {
    read: Instant,
    addresses: BTreeSet<IpAddr>,
    listening: BTreeSet<(Protocol, u16, Listener)>,
}

impl Listeners {
    /// The network namespace of each running container.
    pub fn netns(&mut self, root: &Path, containers: &[Container]) -> BTreeMap<ContainerName, u64> {
        let mut looked = std::mem::take(&mut self.netns);
        looked.retain(|_, (_, at)| at.elapsed() < NETNS_AGAIN);
        let netns = running(containers).filter_map(|container| {
            let known = match looked.get(&container.pid) {
                Some(known) => *known,
                None => {
                    let netns = sockets::netns(root, &container.pid.to_string())?;
                    (netns, Instant::now())
                }
            };
            self.netns.insert(container.pid, known);
            Some((container.name.clone(), known.0))
        });
        netns.collect()
    }

    /// Reads the namespaces of containers that are new, and one that was read long ago. Connections that
    /// nobody saw being made go into the book as inferred.
    pub fn read(
        &mut self,
        root: &Path,
        scope: &Path,
        containers: &[Container],
        netns: &BTreeMap<ContainerName, u64>,
        now: UnixMillis,
        book: &mut EdgeBook,
    ) {
        self.known.retain(|name, _| netns.contains_key(name));
        let present: BTreeSet<u64> = netns.values().copied().collect();
        self.namespaces
            .retain(|namespace, _| present.contains(namespace));
        let mut due: BTreeSet<u64> = BTreeSet::new();
        for container in running(containers) {
            let before = self.known.insert(container.name.clone(), container.pid);
            if before != Some(container.pid) {
                due.extend(netns.get(&container.name));
            }
        }
        if due.is_empty() {
            let old = self.namespaces.iter().min_by_key(|(_, known)| known.read);
            due.extend(
                old.filter(|(_, known)| known.read.elapsed() > AGAIN)
                    .map(|(namespace, _)| *namespace),
            );
        }
        for namespace in due {
            let inside = inside(containers, netns, namespace);
            let again = self.namespaces.contains_key(&namespace);
            if let Some(known) = read_namespace(root, scope, namespace, &inside, |kinds| {
                book.found(kinds, again, now);
            }) {
                self.namespaces.insert(namespace, known);
            }
        }
    }

    /// Every listening port found: (transport, network namespace, port) and who listens.
    pub fn iter(&self) -> impl Iterator<Item = ((Protocol, u64, u16), &Listener)> {
        self.namespaces.iter().flat_map(|(namespace, known)| {
            known
                .listening
                .iter()
                .map(|(protocol, port, listener)| ((*protocol, *namespace, *port), listener))
        })
    }

    /// Addresses of every network namespace but the host's.
    #[must_use]
    pub fn addresses(&self, host_netns: u64) -> BTreeMap<u64, BTreeSet<IpAddr>> {
        self.namespaces
            .iter()
            .filter(|(namespace, _)| **namespace != host_netns)
            .map(|(namespace, known)| (*namespace, known.addresses.clone()))
            .collect()
    }
}

/// A process in each network namespace.
pub fn entrances(
    containers: &[Container],
    netns: &BTreeMap<ContainerName, u64>,
) -> BTreeMap<u64, i32> {
    let entrance = |container: &Container| {
        netns
            .get(&container.name)
            .map(|found| (*found, container.pid))
    };
    running(containers).filter_map(entrance).collect()
}

/// Running containers of a network namespace.
fn inside<'a>(
    containers: &'a [Container],
    netns: &BTreeMap<ContainerName, u64>,
    namespace: u64,
) -> Vec<&'a Container> {
    running(containers)
        .filter(|container| netns.get(&container.name) == Some(&namespace))
        .collect()
}

/// The processes of each container, to find out who holds a socket.
#[must_use]
pub fn processes(scope: &Path, containers: &[&Container]) -> Vec<(ContainerName, Vec<i32>)> {
    containers
        .iter()
        .map(|container| {
            let mut processes = cgroups::processes(scope, &container.cgroup_path);
            processes.push(container.pid);
            (container.name.clone(), processes)
        })
        .collect()
}

fn running(containers: &[Container]) -> impl Iterator<Item = &Container> {
    containers
        .iter()
        .filter(|container| container.pid > 0 && container.state != State::Exited)
}

fn read_namespace(
    root: &Path,
    scope: &Path,
    namespace: u64,
    inside: &[&Container],
    found: impl FnOnce(BTreeMap<Kind, u64>),
) -> Option<Namespace> {
    let through = inside.first()?;
    let sockets = sockets::read(root, through.pid);
    let processes = processes(scope, inside);
    let holders = sockets::holders(root, &processes);
    let mut kinds: BTreeMap<Kind, u64> = BTreeMap::new();
    for socket in &sockets.established {
        let Some(owner) = holders.get(&socket.inode) else {
            continue;
        };
        let kind = Kind {
            owner: (*owner).clone(),
            netns: namespace,
            protocol: socket.protocol,
            role: socket.role,
            port: match socket.role {
                Role::Client => socket.peer.port(),
                Role::Server => socket.local.port(),
            },
            peer: Some(socket.peer.ip()),
            other: None,
            learnt: Learnt::Inferred,
        };
        *kinds.entry(kind).or_default() += 1;
    }
    found(kinds);
    let ports = sockets.listening.iter();
    let listening = ports
        .filter_map(|(protocol, local, inode)| {
            let listener = Listener {
                name: (*holders.get(inode)?).clone(),
                at: (!local.ip().is_unspecified()).then_some(local.ip()),
            };
            Some((*protocol, local.port(), listener))
        })
        .collect();
    Some(Namespace {
        read: Instant::now(),
        addresses: sockets::addresses(root, through.pid),
        listening,
    })
}
