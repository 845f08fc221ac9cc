//! From kinds of connections to edges between containers. Pure.
//!
//! Invariants: a kind is resolved when its peers exist and stays resolved after they are gone; the same
//! connections seen from both sides count once; what cannot be told makes no edge.

use crate::model::container::Container;
use crate::model::edge::{Edge, Learnt, Protocol};
use crate::model::ids::ContainerName;
use crate::model::telemetry::External;
use crate::model::units::{Bytes, UnixMillis};
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

/// Side of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// It connected.
    Client,
    /// It listened.
    Server,
}

/// A kind of connection, as one side saw it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Kind {
    /// The container whose socket it is.
    pub owner: ContainerName,
    /// Network namespace of the socket, its inode number.
    pub netns: u64,
    /// Side of the owner.
    pub role: Role,
    /// The owner's port when it listened, else 0.
    pub local_port: u16,
    /// The peer's address.
    pub peer: IpAddr,
    /// The peer's port when the owner connected, else 0.
    pub peer_port: u16,
    /// How it was learnt.
    pub learnt: Learnt,
}

/// What the connections of one kind did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Totals {
    /// Connections.
    pub connections: u64,
    /// Bytes the owner sent.
    pub sent: u64,
    /// Bytes the owner received.
    pub received: u64,
    /// First time seen.
    pub first_seen: UnixMillis,
    /// Last time seen.
    pub last_seen: UnixMillis,
}

impl Totals {
    fn merge(&mut self, other: &Self) {
        self.connections += other.connections;
        self.sent += other.sent;
        self.received += other.received;
        self.first_seen = self.first_seen.min(other.first_seen);
        self.last_seen = self.last_seen.max(other.last_seen);
    }
}

/// What peers are resolved by.
#[derive(Debug, Default)]
pub struct World<'a> {
    /// The host's containers.
    pub containers: &'a [Container],
    /// Network namespace of each running container.
    pub netns: BTreeMap<ContainerName, u64>,
    /// Network namespace of the host.
    pub host_netns: u64,
    /// Addresses of the host.
    pub host_addresses: BTreeSet<IpAddr>,
    /// Who listens where: (network namespace, port).
    pub listeners: BTreeMap<(u64, u16), ContainerName>,
}

/// What a kind turned out to be.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Meaning {
    Edge {
        child: ContainerName,
        parent: ContainerName,
        port: u16,
    },
    External,
    /// A container that calls itself depends on nobody.
    Itself,
}

impl World<'_> {
    fn meaning(&self, kind: &Kind) -> Option<Meaning> {
        let (child, parent, port) = match kind.role {
            Role::Client => match self.service(kind)? {
                Service::Container(parent, port) => (kind.owner.clone(), parent, port),
                Service::Outside => return Some(Meaning::External),
            },
            Role::Server => {
                if kind.peer.is_loopback() || self.is_host(kind.peer) {
                    // Whoever connected knows better: a neighbour, or the host's own proxy hop.
                    return None;
                }
                match self.only_at(kind.peer) {
                    Some(child) => (child.clone(), kind.owner.clone(), kind.local_port),
                    None if self.is_inside(kind.peer) => return None,
                    None => return Some(Meaning::External),
                }
            }
        };
        if child == parent {
            return Some(Meaning::Itself);
        }
        Some(Meaning::Edge {
            child,
            parent,
            port,
        })
    }

    /// Where a client's connection ended.
    fn service(&self, kind: &Kind) -> Option<Service> {
        let port = kind.peer_port;
        if kind.peer.is_loopback() {
            return self
                .listener(kind.netns, port)
                .or_else(|| self.published(kind, port));
        }
        if self.is_inside(kind.peer) {
            // Containers that share a network namespace share its addresses.
            let at = self
                .containers
                .iter()
                .filter(|container| container.addresses.contains(&kind.peer))
                .filter_map(|container| self.netns.get(&container.name))
                .find_map(|&netns| self.listener(netns, port));
            return at.or_else(|| {
                let only = self.only_at(kind.peer)?;
                Some(Service::Container(only.clone(), port))
            });
        }
        if self.is_host(kind.peer) {
            return self
                .published(kind, port)
                .or_else(|| self.listener(self.host_netns, port));
        }
        Some(Service::Outside)
    }

    fn listener(&self, netns: u64, port: u16) -> Option<Service> {
        let container = self.listeners.get(&(netns, port))?;
        Some(Service::Container(container.clone(), port))
    }

    fn published(&self, kind: &Kind, port: u16) -> Option<Service> {
        if kind.peer.is_loopback() && kind.netns != self.host_netns {
            return None;
        }
        self.containers.iter().find_map(|container| {
            let published = container.published.iter().find(|published| {
                !published.udp
                    && published.host_port == port
                    && (published.host_ip.is_unspecified() || published.host_ip == kind.peer)
            })?;
            Some(Service::Container(
                container.name.clone(),
                published.container_port,
            ))
        })
    }

    fn only_at(&self, address: IpAddr) -> Option<&ContainerName> {
        let mut at = self
            .containers
            .iter()
            .filter(|container| container.addresses.contains(&address));
        let first = at.next()?;
        at.next().is_none().then_some(&first.name)
    }

    fn is_inside(&self, address: IpAddr) -> bool {
        self.containers
            .iter()
            .any(|container| container.addresses.contains(&address))
    }

    fn is_host(&self, address: IpAddr) -> bool {
        self.host_addresses.contains(&address)
    }
}

enum Service {
    Container(ContainerName, u16),
    Outside,
}

/// Every kind seen since the agent started, and what it turned out to be.
#[derive(Debug, Default)]
pub struct EdgeBook {
    kinds: BTreeMap<Kind, (Totals, Option<Meaning>)>,
}

impl EdgeBook {
    /// Adds what connections of a kind did since they were last added.
    pub fn add(&mut self, kind: Kind, more: Totals) {
        self.kinds
            .entry(kind)
            .and_modify(|(totals, _)| totals.merge(&more))
            .or_insert((more, None));
    }

    /// Whether anything was added for a kind.
    #[must_use]
    pub fn has(&self, kind: &Kind) -> bool {
        self.kinds.contains_key(kind)
    }

    /// Resolves what is not resolved yet.
    pub fn resolve(&mut self, world: &World<'_>) {
        for (kind, (_, meaning)) in &mut self.kinds {
            if meaning.is_none() {
                *meaning = world.meaning(kind);
            }
        }
    }

    /// Edges between containers, by child, parent and port.
    #[must_use]
    pub fn edges(&self) -> Vec<Edge> {
        // One sum for each side and way of learning; they are views of the same connections.
        let mut views: BTreeMap<(&Meaning, Learnt, Role), Totals> = BTreeMap::new();
        for (kind, (totals, meaning)) in &self.kinds {
            if let Some(meaning @ Meaning::Edge { .. }) = meaning {
                views
                    .entry((meaning, kind.learnt, kind.role))
                    .and_modify(|sum| sum.merge(totals))
                    .or_insert(*totals);
            }
        }
        let mut edges: BTreeMap<&Meaning, Edge> = BTreeMap::new();
        for ((meaning, learnt, role), totals) in views {
            let Meaning::Edge {
                child,
                parent,
                port,
            } = meaning
            else {
                continue;
            };
            let (to_parent, to_child) = match role {
                Role::Client => (totals.sent, totals.received),
                Role::Server => (totals.received, totals.sent),
            };
            let edge = edges.entry(meaning).or_insert_with(|| Edge {
                child: child.clone(),
                parent: parent.clone(),
                port: *port,
                protocol: Protocol::Tcp,
                learnt,
                connections: 0,
                bytes_to_parent: Bytes(0),
                bytes_to_child: Bytes(0),
                first_seen: totals.first_seen,
                last_seen: totals.last_seen,
            });
            // `Observed` sorts before `Inferred`: what was observed is certain and stays so.
            edge.learnt = edge.learnt.min(learnt);
            edge.connections = edge.connections.max(totals.connections);
            edge.bytes_to_parent = edge.bytes_to_parent.max(Bytes(to_parent));
            edge.bytes_to_child = edge.bytes_to_child.max(Bytes(to_child));
            edge.first_seen = edge.first_seen.min(totals.first_seen);
            edge.last_seen = edge.last_seen.max(totals.last_seen);
        }
        edges.into_values().collect()
    }

    /// Connections with peers that are no container of this host.
    #[must_use]
    pub fn external(&self) -> Vec<External> {
        let outside = self
            .kinds
            .iter()
            .filter(|(_, (_, meaning))| *meaning == Some(Meaning::External));
        outside
            .map(|(kind, (totals, _))| External {
                container: kind.owner.clone(),
                peer: SocketAddr::new(kind.peer, kind.peer_port),
                port: kind.local_port,
                connections: totals.connections,
                sent: Bytes(totals.sent),
                received: Bytes(totals.received),
                last_seen: totals.last_seen,
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::container::{PublishedPort, State};
    use proptest::prelude::*;
    use std::path::PathBuf;

    fn container(name: &str, addresses: &[&str], published: &[(u16, u16)]) -> Container {
        Container {
            name: name.into(),
            id: String::new(),
            runtime: Some("/run/podman.sock".to_owned()),
            cgroup_path: format!("/{name}"),
            cgroup_id: 0,
            pid: 1,
            state: State::Running,
            image: String::new(),
            image_id: String::new(),
            addresses: addresses.iter().map(|text| ip(text)).collect(),
            published: published
                .iter()
                .map(|&(host_port, container_port)| PublishedPort {
                    host_ip: ip("0.0.0.0"),
                    host_port,
                    container_port,
                    udp: false,
                })
                .collect(),
            mounts: vec![crate::model::container::Mount {
                volume: None,
                source: PathBuf::from("/srv"),
                destination: PathBuf::from("/data"),
                writable: true,
            }],
            registration_id: None,
        }
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().expect("an address")
    }

    const HOST: u64 = 1;
    const POD: u64 = 2;

    fn world(containers: &[Container]) -> World<'_> {
        let listeners = [((POD, 6379), "redis"), ((HOST, 9090), "metrics")];
        World {
            containers,
            netns: [("app", POD), ("redis", POD), ("db", 3), ("web", 4)]
                .map(|(name, netns)| (name.into(), netns))
                .into(),
            host_netns: HOST,
            host_addresses: [ip("192.0.2.1"), ip("10.88.0.1")].into(),
            listeners: listeners
                .map(|(at, name)| (at, ContainerName::from(name)))
                .into(),
        }
    }

    fn containers() -> Vec<Container> {
        vec![
            container("web", &["10.88.0.4", "fd00::4"], &[(8080, 80)]),
            container("app", &["10.88.0.2"], &[]),
            container("redis", &["10.88.0.2"], &[]),
            container("db", &["10.88.0.3", "fd00::3"], &[(5433, 5432)]),
            container("metrics", &[], &[]),
        ]
    }

    fn client(owner: &str, netns: u64, peer: &str, peer_port: u16) -> Kind {
        Kind {
            owner: owner.into(),
            netns,
            role: Role::Client,
            local_port: 0,
            peer: ip(peer),
            peer_port,
            learnt: Learnt::Observed,
        }
    }

    fn server(owner: &str, netns: u64, port: u16, peer: &str) -> Kind {
        Kind {
            role: Role::Server,
            local_port: port,
            peer_port: 0,
            ..client(owner, netns, peer, 0)
        }
    }

    fn totals(connections: u64, sent: u64, received: u64) -> Totals {
        Totals {
            connections,
            sent,
            received,
            first_seen: UnixMillis(10),
            last_seen: UnixMillis(20),
        }
    }

    fn book(kinds: &[(Kind, Totals)]) -> EdgeBook {
        let containers = containers();
        let mut book = EdgeBook::default();
        for (kind, totals) in kinds {
            book.add(kind.clone(), *totals);
        }
        book.resolve(&world(&containers));
        book
    }

    fn one_edge(kind: Kind) -> Option<(String, String, u16)> {
        let edges = book(&[(kind, totals(1, 0, 0))]).edges();
        assert!(edges.len() <= 1);
        let edge = edges.into_iter().next()?;
        Some((edge.child.0, edge.parent.0, edge.port))
    }

    fn edge(child: &str, parent: &str, port: u16) -> Option<(String, String, u16)> {
        Some((child.to_owned(), parent.to_owned(), port))
    }

    #[test]
    fn a_peer_is_found_by_its_address() {
        assert_eq!(
            one_edge(client("app", POD, "10.88.0.3", 5432)),
            edge("app", "db", 5432)
        );
        assert_eq!(
            one_edge(client("web", 4, "fd00::3", 5432)),
            edge("web", "db", 5432)
        );
        assert_eq!(
            one_edge(server("db", 3, 5432, "10.88.0.4")),
            edge("web", "db", 5432)
        );
    }

    #[test]
    fn a_published_port_leads_to_the_containers_own_port() {
        assert_eq!(
            one_edge(client("web", 4, "192.0.2.1", 5433)),
            edge("web", "db", 5432)
        );
        assert_eq!(
            one_edge(client("metrics", HOST, "127.0.0.1", 8080)),
            edge("metrics", "web", 80)
        );
    }

    #[test]
    fn loopback_in_a_shared_namespace_leads_to_who_listens_there() {
        assert_eq!(
            one_edge(client("app", POD, "127.0.0.1", 6379)),
            edge("app", "redis", 6379)
        );
        assert_eq!(one_edge(client("web", 4, "127.0.0.1", 6379)), None);
        assert_eq!(
            one_edge(client("web", 4, "10.88.0.2", 6379)),
            edge("web", "redis", 6379)
        );
    }

    #[test]
    fn a_container_on_the_hosts_network_is_found_by_its_listening_port() {
        assert_eq!(
            one_edge(client("app", POD, "10.88.0.1", 9090)),
            edge("app", "metrics", 9090)
        );
    }

    #[test]
    fn a_container_that_calls_itself_makes_no_edge() {
        assert_eq!(one_edge(client("db", 3, "10.88.0.3", 5432)), None);
    }

    #[test]
    fn a_peer_elsewhere_is_external_and_the_hosts_proxy_is_nobody() {
        let book = book(&[
            (client("app", POD, "198.51.100.7", 443), totals(2, 5, 6)),
            (server("web", 4, 80, "198.51.100.9"), totals(3, 7, 8)),
            (server("web", 4, 80, "10.88.0.1"), totals(3, 7, 8)),
        ]);
        assert_eq!(book.edges(), []);
        let external = book.external();
        assert_eq!(external.len(), 2);
        assert_eq!(external[0].peer.to_string(), "198.51.100.7:443");
        assert_eq!((external[1].port, external[1].received), (80, Bytes(8)));
    }

    #[test]
    fn an_edge_stays_after_its_containers_are_gone() {
        let mut book = book(&[(client("app", POD, "10.88.0.3", 5432), totals(1, 5, 6))]);
        book.resolve(&World::default());
        assert_eq!(book.edges().len(), 1);
    }

    #[test]
    fn an_observed_connection_outweighs_an_inferred_one() {
        let observed = client("app", POD, "10.88.0.3", 5432);
        let inferred = Kind {
            learnt: Learnt::Inferred,
            ..observed.clone()
        };
        let only = book(&[(inferred.clone(), totals(1, 0, 0))]).edges();
        assert_eq!(only[0].learnt, Learnt::Inferred);
        let both = book(&[(inferred, totals(1, 0, 0)), (observed, totals(2, 3, 4))]).edges();
        assert_eq!(
            (both.len(), both[0].learnt, both[0].connections),
            (1, Learnt::Observed, 2)
        );
    }

    proptest! {
        #[test]
        fn both_sides_of_the_same_connections_count_once(
            connections in 1u64..1000, sent in 0u64..1 << 40, received in 0u64..1 << 40,
        ) {
            let both = book(&[
                (client("web", 4, "10.88.0.3", 5432), totals(connections, sent, received)),
                (server("db", 3, 5432, "10.88.0.4"), totals(connections, received, sent)),
            ]);
            let edges = both.edges();
            prop_assert_eq!(edges.len(), 1);
            prop_assert_eq!(edges[0].connections, connections);
            prop_assert_eq!(edges[0].bytes_to_parent, Bytes(sent));
            prop_assert_eq!(edges[0].bytes_to_child, Bytes(received));
        }
    }
}
