//! From the kernel's kinds of connections and listening ports to edges and service ports.

use super::book::{EdgeBook, Moved, RoundTrips, Totals};
use super::cgroups::container_id;
use super::edges::{Ears, Kind, Listener, Role, World};
use super::kernel::Kernel;
use super::listeners::Listeners;
use super::names::Names;
use super::unix::UnixSockets;
use super::{Listening, sockets};
use crate::model::container::Container;
use crate::model::edge::{Edge, Learnt, Protocol};
use crate::model::ids::ContainerName;
use crate::model::telemetry::External;
use crate::model::units::UnixMillis;
use lifeboat_ebpf::{Address, ListenKey, PortKey, PortStats, ROUND_TRIP_BITS, protocol, role};
use nix::ifaddrs::getifaddrs;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::{IpAddr, Ipv6Addr};
use std::path::Path;
use std::time::Duration;

/// A kind without traffic for so long is idle.
const IDLE_NS: u64 = 60_000_000_000;

/// The kernel's monotonic clock beside the wall clock.
#[derive(Clone, Copy)]
pub struct Clock {
    /// Now, of the monotonic clock.
    pub monotonic_ns: u64,
    now: UnixMillis,
}

impl Clock {
    /// The monotonic clock at wall time `now`.
    #[must_use]
    pub fn new(now: UnixMillis) -> Self {
        Self {
            monotonic_ns: monotonic_ns(),
            now,
        }
    }

    /// The wall clock's time now, which is later.
    fn later(&self) -> UnixMillis {
        let since = monotonic_ns().saturating_sub(self.monotonic_ns);
        UnixMillis(self.now.0 + since.div_ceil(1_000_000))
    }

    fn wall(&self, monotonic_ns: u64) -> UnixMillis {
        let ago = self.monotonic_ns.saturating_sub(monotonic_ns) / 1_000_000;
        UnixMillis(self.now.0.saturating_sub(ago))
    }
}

/// Now, ns of the monotonic clock, as the kernel programs read it.
#[must_use]
pub fn monotonic_ns() -> u64 {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `time` is a timespec that lives for the call; CLOCK_MONOTONIC always exists.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// What one sweep saw.
pub struct Seen<'a> {
    /// The host's containers.
    pub containers: &'a [Container],
    /// The container of every cgroup.
    pub owners: &'a HashMap<u64, ContainerName>,
    /// The agent's own cgroup, whose connections are its own business.
    pub own_cgroup: Option<u64>,
    /// The kernel's kinds of connections.
    pub connections: &'a [(PortKey, PortStats)],
    /// The kernel's listening ports.
    pub listening: &'a [(ListenKey, u64)],
    /// When the kernel saw a UDP port of a network namespace let go of last, at the latest, ns of the monotonic clock.
    pub released: &'a dyn Fn(u64, u16) -> u64,
    /// When.
    pub clock: Clock,
}

impl Seen<'_> {
    fn owner(&self, cgroup: u64) -> Option<&ContainerName> {
        let owner = self.owners.get(&cgroup)?;
        let agent = self.own_cgroup.and_then(|own| self.owners.get(&own));
        (agent != Some(owner)).then_some(owner)
    }
}

/// Everything learnt about connections since the start.
#[derive(Default)]
pub struct Ports {
    book: EdgeBook,
    /// What of the kernel's counters is in the book.
    counted: HashMap<PortKey, PortStats>,
    listeners: Listeners,
    unix: UnixSockets,
    names: Names,
    listening: BTreeMap<(Protocol, u64, u16), Vec<Listener>>,
    host_addresses: BTreeSet<IpAddr>,
}

impl Ports {
    /// Goes on from the edges of an earlier life.
    #[must_use]
    pub fn remembering(edges: Vec<Edge>) -> Self {
        Self {
            book: EdgeBook::remembering(edges),
            ..Self::default()
        }
    }

    /// Takes in the names that runtimes gave, by id of the container.
    pub fn name(&mut self, names: &HashMap<&str, &ContainerName>) {
        self.book.name(|path| {
            let name = names.get(container_id(path.as_str())?)?;
            Some((*name).clone())
        });
    }

    /// Takes in a sweep, and forgets what is older than `age`.
    pub fn sweep(&mut self, root: &Path, scope: &Path, age: Duration, seen: &Seen<'_>) {
        let renamed = self.names.renamed(seen.containers);
        self.book.rename(&renamed);
        self.unix.rename(&renamed);
        let netns = self.listeners.netns(root, seen.containers);
        self.count(seen);
        let (containers, now) = (seen.containers, seen.clock.now);
        self.listeners
            .read(root, scope, containers, &netns, now, &mut self.book);
        self.unix
            .read(root, scope, containers, &netns, now, &mut self.book);
        self.listening.clear();
        for (at, listener) in self.listeners.iter() {
            self.listening.entry(at).or_default().push(listener.clone());
        }
        for (key, _) in seen.listening {
            if let Some(owner) = seen.owner(key.cgroup) {
                let at = (Protocol::Tcp, u64::from(key.netns), key.port);
                self.listens(at, owner);
            }
        }
        for (key, _) in seen.connections {
            // A UDP socket that was sent to before it sent is one that listens.
            if (key.protocol, key.role) == (protocol::UDP, role::SERVER)
                && let Some(owner) = seen.owner(key.cgroup)
            {
                let at = (Protocol::Udp, u64::from(key.netns), key.port);
                self.listens(at, owner);
            }
        }
        self.host_addresses = host_addresses();
        let host_netns = sockets::netns(root, "self").unwrap_or_default();
        let world = World {
            containers: seen.containers,
            netns,
            addresses: self.listeners.addresses(host_netns),
            host_netns,
            host_addresses: self.host_addresses.clone(),
            listeners: self.listening.clone(),
        };
        let mut ears = Ears {
            looks: BTreeMap::new(),
            released: &|netns, port| seen.clock.wall((seen.released)(netns, port)),
        };
        let wanted = self.book.resolve(&world, &ears, now);
        if !wanted.is_empty() {
            // What is let go of between the look and the question has been noted by then.
            let listeners = &mut self.listeners;
            ears.looks = listeners.look(root, containers, &world.netns, &wanted, || {
                seen.clock.later()
            });
            self.book.resolve(&world, &ears, now);
        }
        self.book.forget(age, now);
    }

    /// Takes in that somebody listens, as the kernel programs saw it: they do not tell at which address.
    fn listens(&mut self, at: (Protocol, u64, u16), owner: &ContainerName) {
        let known = self.listening.entry(at).or_default();
        if !known
            .iter()
            .any(|one| one.name == *owner && one.at.is_some())
        {
            let name = owner.clone();
            known.push(Listener { name, at: None });
        }
    }

    fn count(&mut self, seen: &Seen<'_>) {
        for (key, stats) in seen.connections {
            // Not counted yet: the runtime may name the container by the next sweep.
            let Some(owner) = seen.owner(key.cgroup) else {
                continue;
            };
            let other = match seen.owner(key.peer_cgroup) {
                Some(other) => Some((other.clone(), key.service_port)),
                // Nobody's: the client is told by its address, but a server has none then.
                None if key.peer_cgroup != 0 && key.role == role::SERVER => continue,
                None => None,
            };
            let before = self.counted.insert(*key, *stats);
            let more = |field: fn(&PortStats) -> u64| {
                let counted = before.as_ref().map_or(0, field);
                field(stats).saturating_sub(counted)
            };
            let totals = Totals {
                connections: more(|stats| stats.connections),
                moved: (key.protocol == protocol::TCP).then(|| Moved {
                    sent: more(|stats| stats.sent),
                    received: more(|stats| stats.received),
                    retransmits: more(|stats| stats.retransmits),
                }),
                round_trips: round_trips(before.as_ref(), stats),
                first_seen: seen.clock.wall(stats.first_ns),
                last_seen: seen.clock.wall(stats.last_ns),
            };
            if before != Some(*stats) {
                self.book.add(kind(owner, other, key), totals);
            }
        }
    }

    /// Forgets what the kernel need not hold any more, because it is in the book: kinds of cgroups that are
    /// gone, and idle ones when there are more than `crowded`.
    pub fn forget(
        &mut self,
        kernel: &mut Kernel,
        gone: &HashSet<u64>,
        crowded: usize,
        clock: Clock,
    ) {
        self.counted.retain(|key, _| !gone.contains(&key.cgroup));
        if self.counted.len() <= crowded {
            return;
        }
        let idle: HashSet<PortKey> = self
            .counted
            .iter()
            .filter(|(_, stats)| clock.monotonic_ns.saturating_sub(stats.last_ns) > IDLE_NS)
            .map(|(key, _)| *key)
            .collect();
        for key in kernel.forget_ports(&idle) {
            self.counted.remove(&key);
        }
    }

    /// Edges between containers.
    #[must_use]
    pub fn edges(&self, now: UnixMillis) -> Vec<Edge> {
        self.book.edges(now)
    }

    /// Connections with peers that are no container of this host.
    #[must_use]
    pub fn external(&self) -> Vec<External> {
        self.book.external()
    }

    /// TCP service ports by container.
    #[must_use]
    pub fn listening(&self) -> Listening {
        let mut ports = Listening::new();
        for ((protocol, _, port), listeners) in &self.listening {
            if *protocol == Protocol::Tcp {
                for listener in listeners {
                    let name = listener.name.clone();
                    ports.entry(name).or_default().insert(*port);
                }
            }
        }
        ports
    }

    /// Addresses of the host.
    #[must_use]
    pub fn host_addresses(&self) -> Vec<IpAddr> {
        self.host_addresses.iter().copied().collect()
    }
}

fn round_trips(before: Option<&PortStats>, now: &PortStats) -> Option<RoundTrips> {
    let before = before.map_or(0, |before| before.round_trips);
    let more = now.round_trips.wrapping_sub(before);
    (more != 0).then_some(RoundTrips {
        sum_us: more & ((1 << ROUND_TRIP_BITS) - 1),
        count: more >> ROUND_TRIP_BITS,
    })
}

/// An address as the kernel programs write it.
#[must_use]
pub fn address(words: Address) -> IpAddr {
    let mut bytes = [0; 16];
    let (first, last) = bytes.split_at_mut(8);
    first.copy_from_slice(&words[0].to_ne_bytes());
    last.copy_from_slice(&words[1].to_ne_bytes());
    IpAddr::V6(Ipv6Addr::from(bytes)).to_canonical()
}

fn kind(owner: &ContainerName, other: Option<(ContainerName, u16)>, key: &PortKey) -> Kind {
    let role = if key.role == role::SERVER {
        Role::Server
    } else {
        Role::Client
    };
    Kind {
        owner: owner.clone(),
        netns: u64::from(key.netns),
        protocol: if key.protocol == protocol::UDP {
            Protocol::Udp
        } else {
            Protocol::Tcp
        },
        role,
        port: key.port,
        peer: (other.is_none() || role == Role::Client).then(|| address(key.peer)),
        other,
        learnt: Learnt::Observed,
    }
}

fn host_addresses() -> BTreeSet<IpAddr> {
    let interfaces = getifaddrs().into_iter().flatten();
    interfaces
        .filter_map(|interface| {
            let storage = interface.address?;
            let v4 = storage.as_sockaddr_in().map(|v4| IpAddr::V4(v4.ip()));
            v4.or_else(|| storage.as_sockaddr_in6().map(|v6| IpAddr::V6(v6.ip())))
        })
        .filter(|address| !address.is_loopback())
        .collect()
}
