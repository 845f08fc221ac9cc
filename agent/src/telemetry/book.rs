//! Every kind of connection seen, and the edges they make. Pure.
//!
//! Invariants: a kind is resolved when its peers exist and stays resolved after they are gone; the same
//! connections seen from both sides count once; memory is bounded; what is older than its age is gone.

use super::edges::{Ears, Kind, Map, Meaning, Proof, Role, World};
use crate::model::edge::{Edge, How, Learnt, Protocol};
use crate::model::ids::ContainerName;
use crate::model::telemetry::External;
use crate::model::units::{Bytes, UnixMillis};
use std::collections::{BTreeMap, BTreeSet, btree_map};
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::time::Duration;

/// Nothing open and nothing new for so long makes an edge stale.
const STALE_AFTER: Duration = Duration::from_secs(600);

/// A socket that sends on and on is told of once a second: what came so long ago may be the last but one that came, and
/// is looked up again.
const FRESH_MS: u64 = 2_000;

/// Most kinds kept; every client of a public service is one. The oldest that make no edge go first.
const MOST_KINDS: usize = 16_384;

/// What the connections of one kind did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Connections.
    pub connections: u64,
    /// What they moved; none where it is not counted.
    pub moved: Option<Moved>,
    /// Round-trip times at the last sweep in which something was moved; none before the first measurement.
    pub round_trips: Option<RoundTrips>,
    /// First time seen.
    pub first_seen: UnixMillis,
    /// Last time seen.
    pub last_seen: UnixMillis,
}

/// Smoothed round-trip times of connections that had moved something when they were looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RoundTrips {
    /// Their sum, µs.
    pub sum_us: u64,
    /// How many; at least 1.
    pub count: u64,
}

impl RoundTrips {
    fn mean_us(self) -> u32 {
        u32::try_from(self.sum_us / self.count.max(1)).unwrap_or(u32::MAX)
    }
}

/// What connections moved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Moved {
    /// Bytes the owner sent.
    pub sent: u64,
    /// Bytes the owner received.
    pub received: u64,
    /// Segments the owner sent again.
    pub retransmits: u64,
}

impl Totals {
    /// Adds what came later.
    fn go_on(&mut self, later: &Self) {
        let round_trips = later.round_trips.or(self.round_trips);
        self.merge(later);
        self.round_trips = round_trips;
    }

    /// Adds what other connections did.
    fn merge(&mut self, other: &Self) {
        self.connections += other.connections;
        if let Some(more) = other.moved {
            let moved = self.moved.get_or_insert_default();
            moved.sent += more.sent;
            moved.received += more.received;
            moved.retransmits += more.retransmits;
        }
        self.round_trips = match (self.round_trips, other.round_trips) {
            (Some(one), Some(other)) => Some(RoundTrips {
                sum_us: one.sum_us + other.sum_us,
                count: one.count + other.count,
            }),
            (one, other) => one.or(other),
        };
        self.first_seen = self.first_seen.min(other.first_seen);
        self.last_seen = self.last_seen.max(other.last_seen);
    }
}

#[derive(Debug)]
struct Entry {
    totals: Totals,
    meaning: Option<(Meaning, How)>,
    /// Of a kind whose other end is told by its address alone: what came since its meaning was looked up, because
    /// addresses get other owners.
    newer: Option<Totals>,
    /// When it was found last that nobody had been there to hear it.
    unheard: Option<UnixMillis>,
}

impl Entry {
    fn new(totals: Totals) -> Self {
        Self {
            totals,
            meaning: None,
            newer: None,
            unheard: None,
        }
    }

    /// Whether there is something to look up.
    fn is_open(&self, now: UnixMillis) -> bool {
        match self.meaning {
            Some(_) => self.newer.is_some(),
            None if is_stale(self.totals.last_seen, now) => false,
            // After a step of the clock it is not known which was first.
            None => self
                .unheard
                .is_none_or(|at| at > now || is_fresh(&self.totals, at)),
        }
    }

    /// When the first, at the earliest, and the last came of what is not looked up yet.
    fn came(&self, now: UnixMillis) -> [UnixMillis; 2] {
        let (first, last) = match &self.newer {
            Some(newer) => {
                let first = newer.last_seen.0.saturating_sub(FRESH_MS);
                (UnixMillis(first), newer.last_seen)
            }
            None => (self.totals.first_seen, self.totals.last_seen),
        };
        let unheard = self.unheard.filter(|at| *at <= now);
        [unheard.map_or(first, |at| at.max(first)), last]
    }

    /// Takes in that up to now nobody was there to hear what came since the meaning was looked up. Returns whether that is
    /// all there was to look up.
    fn nobody_heard(&mut self, now: UnixMillis) -> bool {
        self.unheard = Some(now);
        if self.meaning.is_none() {
            self.totals.connections = 0;
            self.totals.first_seen = self.totals.last_seen;
        }
        !is_fresh(self.newer.as_ref().unwrap_or(&self.totals), now)
    }

    /// Takes in the meaning of what was not resolved yet.
    fn is(&mut self, told: Option<(Meaning, How)>) {
        if told.is_some() && self.unheard.is_some() {
            // A socket that went on as if nothing had happened is one more pair.
            self.totals.connections = self.totals.connections.max(1);
        }
        self.meaning = told;
    }

    /// Takes in what came since the meaning was looked up, and what that means. Returns the edge of what came before,
    /// when the address is another container's by now.
    fn look_again(&mut self, kind: &Kind, now: Option<(Meaning, How)>) -> Option<Edge> {
        let newer = self.newer.take()?;
        let edge = |meaning: &Option<(Meaning, How)>| edge_of(meaning.as_ref()).cloned();
        match (edge(&self.meaning), edge(&now)) {
            (Some(before), Some(after)) if before != after => {
                let before = self.edge(kind);
                self.totals = Totals {
                    // A socket that went on as if nothing had happened is one more pair.
                    connections: newer.connections.max(1),
                    first_seen: newer.last_seen,
                    ..newer
                };
                self.meaning = now;
                return before;
            }
            (None, Some(_)) => self.meaning = now,
            // Whoever is not found any more was there all the same.
            _ => {}
        }
        self.totals.go_on(&newer);
        None
    }

    /// The edge that this kind alone makes.
    fn edge(&self, kind: &Kind) -> Option<Edge> {
        let (
            Meaning::Edge {
                child,
                parent,
                protocol,
                port,
            },
            how,
        ) = self.meaning.as_ref()?
        else {
            return None;
        };
        let mut edge = new_edge((child, parent, *protocol, *port), &self.totals);
        view(&mut edge, kind.learnt, *how, kind.role, &self.totals);
        Some(edge)
    }
}

/// Everything seen, and what it turned out to be.
#[derive(Debug, Default)]
pub struct EdgeBook {
    kinds: BTreeMap<Kind, Entry>,
    /// Edges from before the agent's start.
    remembered: Vec<Edge>,
}

impl EdgeBook {
    /// A book that goes on from the edges of an earlier life.
    #[must_use]
    pub fn remembering(edges: Vec<Edge>) -> Self {
        Self {
            kinds: BTreeMap::new(),
            remembered: edges,
        }
    }

    /// Adds what connections of a kind did since they were last added.
    pub fn add(&mut self, kind: Kind, more: Totals) {
        // TCP's other end is known but for losses; of UDP there is no more than the address.
        let by_address = kind.protocol == Protocol::Udp && kind.other.is_none();
        match self.kinds.entry(kind) {
            btree_map::Entry::Vacant(place) => {
                place.insert(Entry::new(more));
            }
            btree_map::Entry::Occupied(mut known) => {
                let entry = known.get_mut();
                match &mut entry.newer {
                    Some(newer) => newer.go_on(&more),
                    None if by_address && entry.meaning.is_some() => entry.newer = Some(more),
                    None => entry.totals.go_on(&more),
                }
            }
        }
    }

    /// Notes that so many connections of each kind were found open; nothing of those that were seen being made. `again`:
    /// not for the first time where these are, so that one which another container is known to have made has come to
    /// its holder by a move between cgroups.
    pub fn found(&mut self, kinds: BTreeMap<Kind, u64>, again: bool, now: UnixMillis) {
        // A server of which the client was seen has no peer, and a port has one server.
        let place = |kind: &Kind| {
            let peer = kind.peer.filter(|_| kind.role == Role::Client);
            (kind.netns, kind.protocol, kind.role, kind.port, peer)
        };
        let mut made = BTreeSet::new();
        if again {
            let seen = self.kinds.keys();
            let seen = seen.filter(|kind| kind.learnt == Learnt::Observed);
            made.extend(seen.map(place));
        }
        for (kind, connections) in kinds {
            if self.kinds.contains_key(&kind) || !made.contains(&place(&kind)) {
                self.found_one(kind, connections, now);
            }
        }
    }

    fn found_one(&mut self, kind: Kind, connections: u64, now: UnixMillis) {
        debug_assert_eq!(kind.learnt, Learnt::Inferred);
        let first = Kind {
            other: None,
            learnt: Learnt::Observed,
            ..kind.clone()
        };
        // Whoever is at the other end: that is told by who was seen.
        let alike = |known: &Kind| {
            let known = (
                &known.owner,
                known.netns,
                known.protocol,
                known.role,
                known.port,
                known.peer,
            );
            known
                == (
                    &kind.owner,
                    kind.netns,
                    kind.protocol,
                    kind.role,
                    kind.port,
                    kind.peer,
                )
        };
        let mut seen = self.kinds.range(first..).map(|(known, _)| known);
        let seen = seen.by_ref().take_while(|known| alike(known));
        if seen
            .into_iter()
            .any(|known| known.learnt == Learnt::Observed)
        {
            return;
        }
        let entry = self.kinds.entry(kind).or_insert_with(|| {
            Entry::new(Totals {
                first_seen: now,
                ..Totals::default()
            })
        });
        entry.totals.connections = entry.totals.connections.max(connections);
        entry.totals.last_seen = now;
    }

    /// Calls by their name containers that went by the path of their cgroup, because they were seen before
    /// their runtime told of them; `name_of` knows the names there are by now.
    pub fn name(&mut self, name_of: impl Fn(&ContainerName) -> Option<ContainerName>) {
        let kinds = self.kinds.iter();
        let in_kinds = kinds.flat_map(|(kind, entry)| {
            let other = kind.other.as_ref().map(|(other, _)| other);
            let (child, parent) = match &entry.meaning {
                Some((Meaning::Edge { child, parent, .. }, _)) => (Some(child), Some(parent)),
                _ => (None, None),
            };
            [Some(&kind.owner), other, child, parent]
        });
        let remembered = self.remembered.iter();
        let all = remembered.flat_map(|edge| [Some(&edge.child), Some(&edge.parent)]);
        let named: BTreeMap<ContainerName, ContainerName> = in_kinds
            .chain(all)
            .flatten()
            .filter(|name| name.as_str().starts_with('/'))
            .filter_map(|path| Some((path.clone(), name_of(path)?)))
            .collect();
        self.rename(&named);
    }

    /// Calls containers otherwise from now on, and in all that is known of them; all at once, as two may have changed
    /// their names with each other.
    pub fn rename(&mut self, named: &BTreeMap<ContainerName, ContainerName>) {
        if named.is_empty() {
            return;
        }
        let rename = |name: &mut ContainerName| {
            if let Some(known) = named.get(name) {
                *name = known.clone();
            }
        };
        for (mut kind, mut entry) in std::mem::take(&mut self.kinds) {
            rename(&mut kind.owner);
            if let Some((other, _)) = &mut kind.other {
                rename(other);
            }
            if let Some((meaning, _)) = &mut entry.meaning
                && let Meaning::Edge { child, parent, .. } = meaning
            {
                rename(child);
                rename(parent);
                if child == parent {
                    *meaning = Meaning::Nothing;
                }
            }
            match self.kinds.entry(kind) {
                btree_map::Entry::Vacant(place) => {
                    place.insert(entry);
                }
                btree_map::Entry::Occupied(mut before) => {
                    before.get_mut().totals.merge(&entry.totals);
                }
            }
        }
        for edge in &mut self.remembered {
            rename(&mut edge.child);
            rename(&mut edge.parent);
        }
    }

    /// Resolves what is not resolved yet, and what an address means that was used again. What could not be told while
    /// it was there is not told by who listens there later. Returns the network namespaces that must be looked at to
    /// tell whether somebody was there to hear; those that are not are wanted again.
    pub fn resolve(
        &mut self,
        world: &World<'_>,
        ears: &Ears<'_>,
        now: UnixMillis,
    ) -> BTreeSet<u64> {
        let mut wanted = BTreeSet::new();
        let open = self.kinds.iter_mut();
        let mut open = open.filter(|(_, entry)| entry.is_open(now)).peekable();
        if open.peek().is_none() {
            return wanted;
        }
        let map = Map::of(world);
        for (kind, entry) in open {
            let told = map.meaning(kind);
            let known = edge_of(entry.meaning.as_ref());
            let new = edge_of(told.as_ref()).filter(|edge| Some(*edge) != known);
            let proof = new.map(|edge| map.proof(kind, edge, entry.came(now), ears));
            let told = match proof {
                None | Some(Proof::Heard) => told,
                Some(Proof::Unheard) if entry.nobody_heard(now) => None,
                Some(Proof::Unheard) => continue,
                Some(Proof::Wanted(netns)) => {
                    wanted.insert(netns);
                    continue;
                }
            };
            if entry.meaning.is_none() {
                entry.is(told);
            } else if let Some(edge) = entry.look_again(kind, told) {
                remember(&mut self.remembered, edge);
            }
        }
        wanted
    }

    /// Forgets what was last seen longer ago than `age`, and the oldest where there is too much.
    pub fn forget(&mut self, age: Duration, now: UnixMillis) {
        let age_ms = u64::try_from(age.as_millis()).unwrap_or(u64::MAX);
        let young = |seen: UnixMillis| now.0.saturating_sub(seen.0) <= age_ms;
        self.kinds.retain(|_, entry| young(entry.totals.last_seen));
        self.remembered.retain(|edge| young(edge.last_seen));
        if self.kinds.len() > MOST_KINDS {
            let is_edge = |entry: &Entry| matches!(entry.meaning, Some((Meaning::Edge { .. }, _)));
            let mut seen: Vec<(bool, UnixMillis)> = self
                .kinds
                .values()
                .map(|entry| (is_edge(entry), entry.totals.last_seen))
                .collect();
            seen.sort_unstable();
            // A quarter at once, so that this is not the work of every sweep.
            let least = seen[self.kinds.len() - MOST_KINDS * 3 / 4];
            self.kinds
                .retain(|_, entry| (is_edge(entry), entry.totals.last_seen) >= least);
        }
    }

    /// Edges between containers, by child, parent, transport and port.
    #[must_use]
    pub fn edges(&self, now: UnixMillis) -> Vec<Edge> {
        // One sum for each side and way of learning; they are views of the same connections.
        let mut views: BTreeMap<(&Meaning, Learnt, Role), (Totals, How)> = BTreeMap::new();
        for (kind, entry) in &self.kinds {
            if let Some((meaning @ Meaning::Edge { .. }, how)) = &entry.meaning {
                views
                    .entry((meaning, kind.learnt, kind.role))
                    .and_modify(|(sum, best)| {
                        sum.merge(&entry.totals);
                        *best = (*best).min(*how);
                    })
                    .or_insert((entry.totals, *how));
            }
        }
        let mut edges: BTreeMap<EdgeKey<'_>, Edge> = BTreeMap::new();
        for ((meaning, learnt, role), (totals, how)) in views {
            let Meaning::Edge {
                child,
                parent,
                protocol,
                port,
            } = meaning
            else {
                continue;
            };
            let key = (child, parent, *protocol, *port);
            let edge = edges.entry(key).or_insert_with(|| new_edge(key, &totals));
            view(edge, learnt, how, role, &totals);
        }
        for before in &self.remembered {
            let key = (&before.child, &before.parent, before.protocol, before.port);
            edges
                .entry(key)
                .and_modify(|edge| go_on(edge, before))
                .or_insert_with(|| before.clone());
        }
        let mut edges: Vec<Edge> = edges.into_values().collect();
        for edge in &mut edges {
            edge.stale = is_stale(edge.last_seen, now);
        }
        edges
    }

    /// Connections with peers that are no container of this host.
    #[must_use]
    pub fn external(&self) -> Vec<External> {
        let outside = self
            .kinds
            .iter()
            .filter(|(_, entry)| matches!(entry.meaning, Some((Meaning::External, _))));
        outside
            .map(|(kind, Entry { totals, .. })| {
                let (peer_port, port) = match kind.role {
                    Role::Client => (kind.port, 0),
                    Role::Server => (0, kind.port),
                };
                let peer = kind.peer.unwrap_or(IpAddr::V6(Ipv6Addr::UNSPECIFIED));
                External {
                    container: kind.owner.clone(),
                    peer: SocketAddr::new(peer, peer_port),
                    protocol: kind.protocol,
                    port,
                    connections: totals.connections,
                    sent: totals.moved.map(|moved| Bytes(moved.sent)),
                    received: totals.moved.map(|moved| Bytes(moved.received)),
                    last_seen: totals.last_seen,
                }
            })
            .collect()
    }
}

fn is_stale(last_seen: UnixMillis, now: UnixMillis) -> bool {
    u128::from(now.0.saturating_sub(last_seen.0)) > STALE_AFTER.as_millis()
}

/// Whether more may have come since, that is not told yet.
fn is_fresh(totals: &Totals, now: UnixMillis) -> bool {
    totals.last_seen.0 + FRESH_MS >= now.0
}

fn edge_of(told: Option<&(Meaning, How)>) -> Option<&Meaning> {
    told.map(|(meaning, _)| meaning)
        .filter(|meaning| matches!(meaning, Meaning::Edge { .. }))
}

type EdgeKey<'a> = (&'a ContainerName, &'a ContainerName, Protocol, u16);

fn new_edge((child, parent, protocol, port): EdgeKey<'_>, totals: &Totals) -> Edge {
    Edge {
        child: child.clone(),
        parent: parent.clone(),
        port,
        protocol,
        learnt: Learnt::Inferred,
        how: How::Declared,
        stale: false,
        connections: 0,
        bytes_to_parent: None,
        bytes_to_child: None,
        retransmits: None,
        srtt_us: None,
        first_seen: totals.first_seen,
        last_seen: totals.last_seen,
    }
}

/// Takes one view of the connections into the edge: what both sides saw is the larger of the two.
fn view(edge: &mut Edge, learnt: Learnt, how: How, role: Role, totals: &Totals) {
    // `Observed` sorts before `Inferred`: what was observed is certain and stays so.
    edge.learnt = edge.learnt.min(learnt);
    edge.how = edge.how.min(how);
    edge.connections = edge.connections.max(totals.connections);
    if let Some(moved) = totals.moved {
        let (to_parent, to_child) = match role {
            Role::Client => (moved.sent, moved.received),
            Role::Server => (moved.received, moved.sent),
        };
        edge.bytes_to_parent = edge.bytes_to_parent.max(Some(Bytes(to_parent)));
        edge.bytes_to_child = edge.bytes_to_child.max(Some(Bytes(to_child)));
        // Each side sends its own segments again.
        edge.retransmits = Some(edge.retransmits.unwrap_or(0) + moved.retransmits);
    }
    if role == Role::Client || edge.srtt_us.is_none() {
        let mean = totals.round_trips.map(RoundTrips::mean_us);
        edge.srtt_us = mean.or(edge.srtt_us);
    }
    edge.first_seen = edge.first_seen.min(totals.first_seen);
    edge.last_seen = edge.last_seen.max(totals.last_seen);
}

/// Keeps an edge of which nothing more will come; one a pair, however often it changes.
fn remember(remembered: &mut Vec<Edge>, edge: Edge) {
    let key = |edge: &Edge| {
        (
            edge.child.clone(),
            edge.parent.clone(),
            edge.protocol,
            edge.port,
        )
    };
    match remembered.iter_mut().find(|known| key(known) == key(&edge)) {
        Some(known) => go_on(known, &edge),
        None => remembered.push(edge),
    }
}

/// Adds what was known of an edge before the agent's start.
fn go_on(edge: &mut Edge, before: &Edge) {
    let sum = |one: Option<Bytes>, other: Option<Bytes>| match (one, other) {
        (Some(Bytes(one)), Some(Bytes(other))) => Some(Bytes(one + other)),
        (one, other) => one.or(other),
    };
    // Those found open are among those that were counted then.
    edge.connections = match edge.learnt {
        Learnt::Inferred => edge.connections.max(before.connections),
        _ => edge.connections + before.connections,
    };
    edge.learnt = edge.learnt.min(before.learnt);
    edge.how = edge.how.min(before.how);
    edge.bytes_to_parent = sum(edge.bytes_to_parent, before.bytes_to_parent);
    edge.bytes_to_child = sum(edge.bytes_to_child, before.bytes_to_child);
    edge.retransmits = match (edge.retransmits, before.retransmits) {
        (Some(one), Some(other)) => Some(one + other),
        (one, other) => one.or(other),
    };
    edge.srtt_us = edge.srtt_us.or(before.srtt_us);
    edge.first_seen = edge.first_seen.min(before.first_seen);
    edge.last_seen = edge.last_seen.max(before.last_seen);
}

#[cfg(test)]
mod tests;
