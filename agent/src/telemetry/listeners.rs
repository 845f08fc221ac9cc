//! Who listens where, and what was connected before the agent looked.

use super::book::EdgeBook;
use super::cgroups;
use super::edges::{Kind, Listener, Look, Role};
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

/// How often it is looked which network namespace a process is in: few ever change it but those that have just begun,
/// which are looked at each time.
const NETNS_AGAIN: Duration = Duration::from_secs(5);

/// Most namespaces that are looked at in a sweep for who may have heard a datagram; the others have their turn in the next
/// ones. Each look is a walk over all UDP sockets of the host.
const MOST_LOOKS: usize = 16;

/// What the socket tables of the containers' network namespaces say.
#[derive(Default)]
pub struct Listeners {
    /// Containers whose namespace has been read, with the process it was read through.
    known: BTreeMap<ContainerName, i32>,
    namespaces: BTreeMap<u64, Namespace>,
    netns: BTreeMap<i32, Place>,
    /// By network namespace that was looked at: datagrams that nobody heard, since when none more, and the last look.
    unheard: BTreeMap<u64, (u64, UnixMillis, UnixMillis)>,
}

/// Where a container's first process is.
#[derive(Clone, Copy)]
struct Place {
    netns: u64,
    known: Instant,
    looked: Instant,
}

struct Namespace {
    read: Instant,
    addresses: BTreeSet<IpAddr>,
    listening: BTreeSet<(Protocol, u16, Listener)>,
}

impl Listeners {
    /// The network namespace of each running container.
    pub fn netns(&mut self, root: &Path, containers: &[Container]) -> BTreeMap<ContainerName, u64> {
        let before = std::mem::take(&mut self.netns);
        let lately = |at: Instant| at.elapsed() < NETNS_AGAIN;
        let netns = running(containers).filter_map(|container| {
            let place = match before.get(&container.pid) {
                Some(place) if lately(place.looked) && !lately(place.known) => *place,
                before => {
                    let looked = Instant::now();
                    Place {
                        netns: sockets::netns(root, &container.pid.to_string())?,
                        known: before.map_or(looked, |place| place.known),
                        looked,
                    }
                }
            };
            self.netns.insert(container.pid, place);
            Some((container.name.clone(), place.netns))
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
            // It may have entered its namespace after it was first looked at.
            let at = netns.get(&container.name);
            let unread = at.is_some_and(|namespace| !self.namespaces.contains_key(namespace));
            if before != Some(container.pid) || unread {
                due.extend(at);
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
            // What it counted before is not counted as of later.
            let through = entrances(containers, netns).get(&namespace).copied();
            if !again && let Some(unheard) = through.and_then(|pid| sockets::udp_unheard(root, pid))
            {
                self.unheard.insert(namespace, (unheard, now, now));
            }
        }
    }

    /// Looks at UDP sockets; `now` is read at each look. Nothing that cannot be read goes for unheard.
    pub fn look(
        &mut self,
        root: &Path,
        containers: &[Container],
        netns: &BTreeMap<ContainerName, u64>,
        wanted: &BTreeSet<u64>,
        now: impl Fn() -> UnixMillis,
    ) -> BTreeMap<u64, Look> {
        let entrances = entrances(containers, netns);
        self.unheard
            .retain(|namespace, _| entrances.contains_key(namespace));
        let mut wanted: Vec<u64> = wanted.iter().copied().collect();
        wanted.sort_by_key(|namespace| self.unheard.get(namespace).map(|(.., looked)| *looked));
        let looks = wanted.into_iter().take(MOST_LOOKS).map(|namespace| {
            let through = entrances.get(&namespace);
            let seen = through.and_then(|&pid| {
                let ends = sockets::udp_ends(root, pid)?;
                Some((ends, sockets::udp_unheard(root, pid)?))
            });
            let (ends, unheard) = seen.unwrap_or_default();
            let now = now();
            let quiet_since = match self.unheard.get(&namespace) {
                Some(&(before, since, _)) if before == unheard => since,
                _ if unheard == 0 => UnixMillis(0),
                _ => now,
            };
            self.unheard.insert(namespace, (unheard, quiet_since, now));
            (namespace, Look { ends, quiet_since })
        });
        looks.collect()
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    #[test]
    fn whoever_enters_its_network_namespace_after_the_first_look_is_read_there() {
        let root = tempfile::tempdir().expect("a directory");
        let process = root.path().join("proc/7");
        for directory in ["ns", "net", "fd"] {
            fs::create_dir_all(process.join(directory)).expect("a directory");
        }
        let listens = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n   \
                       0: 00000000:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4711 1 \
                       0000000000000000 100 0 0 10 0\n";
        fs::write(process.join("net/tcp"), listens).expect("a table");
        fs::write(process.join("ns/net"), "").expect("the host's");
        fs::write(process.join("ns/own"), "").expect("its own");
        let containers = [Container {
            name: "web".into(),
            ..Container::of_cgroup("/web", 0, 7)
        }];
        let mut listeners = Listeners::default();
        let mut book = EdgeBook::default();
        let mut read = |listeners: &mut Listeners| {
            let netns = listeners.netns(root.path(), &containers);
            let now = UnixMillis(1);
            listeners.read(
                root.path(),
                root.path(),
                &containers,
                &netns,
                now,
                &mut book,
            );
            let known = listeners.iter().map(|((_, netns, port), _)| (netns, port));
            (netns[&"web".into()], known.collect::<Vec<_>>())
        };
        let (host, none) = read(&mut listeners);
        assert_eq!(none, []);
        symlink("socket:[4711]", process.join("fd/3")).expect("a descriptor");
        fs::rename(process.join("ns/own"), process.join("ns/net")).expect("it enters");
        let (own, found) = read(&mut listeners);
        assert_ne!(host, own);
        assert_eq!(found, [(own, 8080)]);
    }
}
