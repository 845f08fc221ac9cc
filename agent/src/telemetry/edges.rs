//! What a kind of connection means: which container depends on which. Pure.
//!
//! Invariants: both ends decide when both were seen, addresses only otherwise; what cannot be told makes
//! no edge; a proxy that holds a published port is no party.

use crate::model::container::{Container, State};
use crate::model::edge::{How, Learnt, Protocol};
use crate::model::ids::ContainerName;
use crate::model::units::UnixMillis;
use std::collections::{BTreeMap, BTreeSet, HashMap};
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
    /// Transport.
    pub protocol: Protocol,
    /// Side of the owner.
    pub role: Role,
    /// The service's port as the owner has it: its own when it listened, else the peer's.
    pub port: u16,
    /// The peer's address, where it is needed to tell who that is.
    pub peer: Option<IpAddr>,
    /// The container at the other end, when both ends were seen, and the service's port there.
    pub other: Option<(ContainerName, u16)>,
    /// How it was learnt.
    pub learnt: Learnt,
}

/// What a kind turned out to be.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Meaning {
    /// A container depends on another.
    Edge {
        /// Who sends requests.
        child: ContainerName,
        /// Who receives them.
        parent: ContainerName,
        /// Transport.
        protocol: Protocol,
        /// The parent's service port.
        port: u16,
    },
    /// The peer is no container of this host.
    External,
    /// A container that calls itself, or a proxy's own hop: nobody depends on anybody.
    Nothing,
}

/// What peers are resolved by.
#[derive(Debug, Default)]
pub struct World<'a> {
    /// The host's containers.
    pub containers: &'a [Container],
    /// Network namespace of each running container.
    pub netns: BTreeMap<ContainerName, u64>,
    /// Addresses of network namespaces other than the host's.
    pub addresses: BTreeMap<u64, BTreeSet<IpAddr>>,
    /// Network namespace of the host.
    pub host_netns: u64,
    /// Addresses of the host.
    pub host_addresses: BTreeSet<IpAddr>,
    /// Who listens where: (transport, network namespace, port).
    pub listeners: BTreeMap<(Protocol, u64, u16), Vec<Listener>>,
}

/// Whether somebody was there to hear a datagram: nothing tells its sender.
pub struct Ears<'a> {
    /// What the network namespaces that were looked at in this sweep say.
    pub looks: BTreeMap<u64, Look>,
    /// When a UDP port of a network namespace was let go of last, at the latest; known from the look on at least.
    pub released: &'a dyn Fn(u64, u16) -> UnixMillis,
}

/// A look at the UDP sockets of a network namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Look {
    /// Where they are.
    pub ends: BTreeSet<SocketAddr>,
    /// Since when no datagram came for a port without a socket.
    pub quiet_since: UnixMillis,
}

/// What there is to show that somebody heard a datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Proof {
    /// Somebody did, or may have.
    Heard,
    /// Nobody was there.
    Unheard,
    /// This network namespace must be looked at.
    Wanted(u64),
}

/// A port may be let go of so long before what it heard is noted.
const RELEASED_BEFORE: u64 = 1_000;

/// Who listens at a port, and at which address.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Listener {
    /// Who.
    pub name: ContainerName,
    /// The only address at which it listens; none for all of them, and where that is not known.
    pub at: Option<IpAddr>,
}

/// A [`World`] in which addresses can be looked up.
pub struct Map<'a> {
    world: &'a World<'a>,
    inside: HashMap<IpAddr, Vec<&'a Container>>,
}

impl<'a> Map<'a> {
    /// Draws it.
    #[must_use]
    pub fn of(world: &'a World<'a>) -> Self {
        let mut inside: HashMap<IpAddr, Vec<&Container>> = HashMap::new();
        for container in world.containers {
            let netns = world.netns.get(&container.name);
            let of_netns = netns.and_then(|netns| world.addresses.get(netns));
            let mut addresses: BTreeSet<IpAddr> = container.addresses.iter().copied().collect();
            addresses.extend(of_netns.into_iter().flatten().copied());
            for address in addresses {
                inside.entry(address).or_default().push(container);
            }
        }
        Self { world, inside }
    }

    /// What a kind means, and what that was learnt from; none when it cannot be told (yet).
    #[must_use]
    pub fn meaning(&self, kind: &Kind) -> Option<(Meaning, How)> {
        let learnt_from = match (kind.learnt, &kind.other) {
            (Learnt::Inferred, _) => How::SocketTable,
            (_, Some(_)) => How::BothEnds,
            (_, None) => How::OneEnd,
        };
        let owner = || kind.owner.clone();
        let (child, parent, port) = match (kind.role, &kind.other) {
            (Role::Client, Some((other, port))) => (owner(), other.clone(), *port),
            (Role::Server, Some((other, _))) => (other.clone(), owner(), kind.port),
            (Role::Client, None) => match self.service(kind)? {
                Service::Container(parent, port) => (owner(), parent, port),
                Service::Outside => return Some((Meaning::External, learnt_from)),
            },
            (Role::Server, None) => {
                let peer = kind.peer?;
                if peer.is_loopback() || self.is_host(peer) {
                    // Whoever connected knows better: a neighbour, or the host's own proxy hop.
                    return None;
                }
                match self.only_at(peer) {
                    Some(child) => (child.clone(), owner(), kind.port),
                    None if self.inside.contains_key(&peer) => return None,
                    None => return Some((Meaning::External, learnt_from)),
                }
            }
        };
        let (parent, port, how) = if self.holds(&parent, kind.protocol, port) {
            match self.behind(kind, port)? {
                Behind::Only(parent, port) => (parent, port, How::Proxy),
                Behind::Nobody => (parent, port, learnt_from),
            }
        } else {
            (parent, port, learnt_from)
        };
        if child == parent || self.is_proxy_of(&child, &parent, kind.protocol, port) {
            return Some((Meaning::Nothing, how));
        }
        let protocol = kind.protocol;
        let edge = Meaning::Edge {
            child,
            parent,
            protocol,
            port,
        };
        Some((edge, how))
    }

    /// Whether somebody was there to hear what makes this edge and came from a first time to a last. Wherever that cannot
    /// be told somebody was: a socket that is there, or was, and also none where the network namespace has not missed
    /// the last (it may hand datagrams on).
    #[must_use]
    pub fn proof(
        &self,
        kind: &Kind,
        edge: &Meaning,
        [first, last]: [UnixMillis; 2],
        ears: &Ears<'_>,
    ) -> Proof {
        let Meaning::Edge { parent, port, .. } = edge else {
            return Proof::Heard;
        };
        let by_address = kind.role == Role::Client && kind.other.is_none();
        let observed = kind.learnt == Learnt::Observed && kind.protocol == Protocol::Udp;
        let Some(&netns) = self
            .world
            .netns
            .get(parent)
            .filter(|_| by_address && observed)
        else {
            return Proof::Heard;
        };
        if (ears.released)(netns, *port).0 + RELEASED_BEFORE >= first.0 {
            return Proof::Heard;
        }
        let Some(look) = ears.looks.get(&netns) else {
            return Proof::Wanted(netns);
        };
        // An address that is not the parent's own was translated, who knows to which of its.
        let own = kind.peer.filter(|&peer| {
            let mut there = self.inside.get(&peer).into_iter().flatten();
            let loopback = peer.is_loopback() && kind.netns == netns;
            loopback || there.any(|one| one.name == *parent)
        });
        let hears = |end: &SocketAddr| {
            let ip = end.ip();
            end.port() == *port && (ip.is_unspecified() || own.is_none_or(|own| own == ip))
        };
        if look.quiet_since < last || look.ends.iter().any(hears) {
            Proof::Heard
        } else {
            Proof::Unheard
        }
    }

    /// Where a client's connection ended.
    fn service(&self, kind: &Kind) -> Option<Service> {
        let (peer, port) = (kind.peer?, kind.port);
        if peer.is_loopback() {
            return self
                .published(kind, peer)
                .or_else(|| self.listener(kind.protocol, kind.netns, port, peer));
        }
        if let Some(inside) = self.inside.get(&peer) {
            // Containers that share a network namespace share its addresses.
            let at = inside
                .iter()
                .filter_map(|container| self.world.netns.get(&container.name))
                .find_map(|&netns| self.listener(kind.protocol, netns, port, peer));
            return at.or_else(|| {
                let only = self.only_at(peer)?;
                Some(Service::Container(only.clone(), port))
            });
        }
        if self.is_host(peer) {
            return self
                .published(kind, peer)
                .or_else(|| self.listener(kind.protocol, self.world.host_netns, port, peer));
        }
        Some(Service::Outside)
    }

    fn listener(
        &self,
        protocol: Protocol,
        netns: u64,
        port: u16,
        address: IpAddr,
    ) -> Option<Service> {
        let listeners = self.world.listeners.get(&(protocol, netns, port))?;
        let at = |wanted| listeners.iter().rfind(move |one| one.at == wanted);
        // Several may share a port, each at an address of its own, as name servers do.
        let found = at(Some(address)).or_else(|| at(None))?;
        Some(Service::Container(found.name.clone(), port))
    }

    fn published(&self, kind: &Kind, peer: IpAddr) -> Option<Service> {
        if peer.is_loopback() && kind.netns != self.world.host_netns {
            return None;
        }
        let published = self.publishers(kind.protocol, kind.port, Some(peer));
        let &(parent, port) = published.first()?;
        Some(Service::Container(parent.clone(), port))
    }

    /// Who publishes a port of the host, at one of its addresses or at any. One that does not run publishes nothing,
    /// though it is the only one that is known of a connection from when it did.
    fn publishers(
        &self,
        protocol: Protocol,
        host_port: u16,
        at: Option<IpAddr>,
    ) -> Vec<(&'a ContainerName, u16)> {
        let all = self.world.containers.iter().filter_map(|container| {
            let published = container.published.iter().find(|published| {
                published.udp == (protocol == Protocol::Udp)
                    && published.host_port == host_port
                    && (published.host_ip.is_unspecified()
                        || at.is_none_or(|address| published.host_ip == address))
            })?;
            let runs = matches!(container.state, State::Running | State::Paused);
            Some((runs, (&container.name, published.container_port)))
        });
        let (running, others): (Vec<_>, Vec<_>) = all.partition(|(runs, _)| *runs);
        let found = if running.is_empty() { others } else { running };
        found.into_iter().map(|(_, one)| one).collect()
    }

    /// The container behind a proxy's listening port. Several may publish it, each at an address of its own: which of
    /// them is only known of a client, which names the address; none when it is not. Containers that share a network
    /// namespace are one.
    fn behind(&self, kind: &Kind, port: u16) -> Option<Behind> {
        let only = |(name, port): (&ContainerName, u16)| Behind::Only(name.clone(), port);
        let asked = kind.peer.filter(|_| kind.role == Role::Client);
        let at = asked.map(|_| self.publishers(kind.protocol, port, asked));
        if let Some(&one) = at.as_ref().and_then(|at| at.first()) {
            return Some(only(one));
        }
        let all = self.publishers(kind.protocol, port, None);
        let Some(&one) = all.first() else {
            return Some(Behind::Nobody);
        };
        let place = |&(name, port): &(&'a ContainerName, u16)| {
            (self.world.netns.get(name).ok_or(name), port)
        };
        let alike = all.iter().all(|other| place(other) == place(&one));
        alike.then(|| only(one))
    }

    /// Whether `child` holds a port that `parent` publishes for this very service.
    fn is_proxy_of(
        &self,
        child: &ContainerName,
        parent: &ContainerName,
        protocol: Protocol,
        port: u16,
    ) -> bool {
        let parent = self
            .world
            .containers
            .iter()
            .find(|container| container.name == *parent);
        parent.is_some_and(|parent| {
            parent.published.iter().any(|published| {
                published.udp == (protocol == Protocol::Udp)
                    && published.container_port == port
                    && self.holds(child, protocol, published.host_port)
            })
        })
    }

    fn holds(&self, name: &ContainerName, protocol: Protocol, host_port: u16) -> bool {
        let at = (protocol, self.world.host_netns, host_port);
        // A cgroup that no runtime owns goes by its path.
        let mut there = self.world.listeners.get(&at).into_iter().flatten();
        name.as_str().starts_with('/') && there.any(|one| one.name == *name)
    }

    fn only_at(&self, address: IpAddr) -> Option<&ContainerName> {
        match self.inside.get(&address)?.as_slice() {
            [only] => Some(&only.name),
            _ => None,
        }
    }

    fn is_host(&self, address: IpAddr) -> bool {
        self.world.host_addresses.contains(&address)
    }
}

/// Who is behind a proxy.
enum Behind {
    Only(ContainerName, u16),
    /// It is no proxy: nobody publishes its port.
    Nobody,
}

enum Service {
    Container(ContainerName, u16),
    Outside,
}
