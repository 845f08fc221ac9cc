//! Edges from kinds, as both ends and old agents tell of them.

use super::super::edges::{Listener, Look};
use super::*;
use crate::model::container::{Container, PublishedPort, State};
use proptest::prelude::*;
use std::collections::BTreeSet;

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
        mounts: Vec::new(),
        registration_ids: BTreeSet::new(),
    }
}

fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

const HOST: u64 = 1;
const POD: u64 = 2;
const HOUR: u64 = 3_600_000;

fn listener(name: &str, at: Option<&str>) -> Listener {
    Listener {
        name: name.into(),
        at: at.map(ip),
    }
}

fn world(containers: &[Container]) -> World<'_> {
    let tcp = Protocol::Tcp;
    let listeners = [
        ((tcp, POD, 6379), "redis"),
        ((tcp, HOST, 9090), "metrics"),
        ((tcp, HOST, 5433), "/docker"),
    ];
    World {
        containers,
        netns: [("app", POD), ("redis", POD), ("db", 3), ("web", 4)]
            .map(|(name, netns)| (name.into(), netns))
            .into(),
        addresses: [(3, [ip("fd00::3")].into())].into(),
        host_netns: HOST,
        host_addresses: [ip("192.0.2.1"), ip("10.88.0.1")].into(),
        listeners: listeners
            .map(|(at, name)| (at, vec![listener(name, None)]))
            .into(),
    }
}

fn containers() -> Vec<Container> {
    vec![
        container("web", &["10.88.0.4", "fd00::4"], &[(8080, 80)]),
        container("app", &["10.88.0.2"], &[]),
        container("redis", &["10.88.0.2"], &[]),
        container("db", &["10.88.0.3"], &[(5433, 5432)]),
        container("metrics", &[], &[]),
    ]
}

fn client(owner: &str, netns: u64, peer: &str, port: u16) -> Kind {
    Kind {
        owner: owner.into(),
        netns,
        protocol: Protocol::Tcp,
        role: Role::Client,
        port,
        peer: Some(ip(peer)),
        other: None,
        learnt: Learnt::Observed,
    }
}

fn udp(owner: &str, netns: u64, peer: &str, port: u16) -> Kind {
    Kind {
        protocol: Protocol::Udp,
        ..client(owner, netns, peer, port)
    }
}

fn server(owner: &str, netns: u64, port: u16, peer: &str) -> Kind {
    Kind {
        role: Role::Server,
        ..client(owner, netns, peer, port)
    }
}

fn met(kind: Kind, other: &str, port: u16) -> Kind {
    Kind {
        other: Some((other.into(), port)),
        ..kind
    }
}

fn totals(connections: u64, sent: u64, received: u64) -> Totals {
    Totals {
        connections,
        moved: Some(Moved {
            sent,
            received,
            retransmits: 1,
        }),
        round_trips: None,
        first_seen: UnixMillis(10),
        last_seen: UnixMillis(20),
    }
}

/// Somebody is there wherever it may be told.
fn resolve(book: &mut EdgeBook, world: &World<'_>, now: UnixMillis) {
    let ears = Ears {
        looks: BTreeMap::new(),
        released: &|_, _| UnixMillis(u64::MAX / 2),
    };
    assert_eq!(book.resolve(world, &ears, now), BTreeSet::new());
}

fn book(kinds: &[(Kind, Totals)]) -> EdgeBook {
    let containers = containers();
    let mut book = EdgeBook::default();
    for (kind, totals) in kinds {
        book.add(kind.clone(), *totals);
    }
    resolve(&mut book, &world(&containers), UnixMillis(20));
    book
}

fn edges(book: &EdgeBook) -> Vec<Edge> {
    book.edges(UnixMillis(20))
}

fn one_edge(kind: Kind) -> Option<(String, String, u16)> {
    let edges = edges(&book(&[(kind, totals(1, 0, 0))]));
    assert!(edges.len() <= 1);
    let edge = edges.into_iter().next()?;
    Some((edge.child.0, edge.parent.0, edge.port))
}

fn edge(child: &str, parent: &str, port: u16) -> Option<(String, String, u16)> {
    Some((child.to_owned(), parent.to_owned(), port))
}

#[test]
fn a_client_and_a_server_find_each_other_by_address() {
    assert_eq!(
        one_edge(client("app", POD, "10.88.0.3", 5432)),
        edge("app", "db", 5432)
    );
    // An address that only the network namespace knows.
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
fn the_round_trip_time_is_the_mean_of_the_connections_that_moved_something_last() {
    let trips = |sum_us, count| Totals {
        round_trips: Some(RoundTrips { sum_us, count }),
        ..totals(count, 1, 1)
    };
    let kinds = [
        (client("app", POD, "10.88.0.3", 5432), trips(90_000, 1)),
        (client("app", POD, "10.88.0.3", 5432), trips(3_000, 3)),
        // Of an idle moment nothing is told, and of a server its client knows better.
        (client("app", POD, "10.88.0.3", 5432), totals(0, 0, 0)),
        (
            met(client("app", POD, "10.88.0.9", 5432), "db", 5432),
            trips(9_000, 1),
        ),
        (server("db", 3, 5432, "10.88.0.2"), trips(70_000, 1)),
    ];
    let edges = edges(&book(&kinds));
    assert_eq!(edges.len(), 1, "{edges:?}");
    assert_eq!(edges[0].srtt_us, Some(3_000));
}

#[test]
fn both_ends_decide_whatever_their_addresses_say() {
    assert_eq!(
        one_edge(met(client("app", POD, "198.51.100.7", 443), "db", 5432)),
        edge("app", "db", 5432)
    );
    let server = Kind {
        peer: None,
        ..met(server("db", 3, 5432, "10.88.0.4"), "app", 0)
    };
    assert_eq!(one_edge(server), edge("app", "db", 5432));
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
fn the_hop_of_a_proxy_is_left_out() {
    let kinds = [
        met(client("web", 4, "192.0.2.1", 5433), "/docker", 5433),
        met(client("/docker", HOST, "10.88.0.3", 5432), "db", 5432),
    ];
    let edges = edges(&book(&kinds.map(|kind| (kind, totals(1, 2, 3)))));
    assert_eq!(edges.len(), 1, "{edges:?}");
    assert_eq!(
        (edges[0].child.as_str(), edges[0].parent.as_str()),
        ("web", "db")
    );
    assert_eq!((edges[0].port, edges[0].how), (5432, How::Proxy));
    // The same cgroup calling another port is a caller like any other.
    assert_eq!(
        one_edge(met(client("/docker", HOST, "10.88.0.3", 99), "db", 99)),
        edge("/docker", "db", 99)
    );
}

#[test]
fn of_two_that_publish_a_port_at_addresses_of_their_own_the_one_that_was_asked_is_meant() {
    let mut all = containers();
    for (name, address, port) in [("db", "192.0.2.1", 5432), ("web", "192.0.2.2", 80)] {
        let one = all.iter_mut().find(|one| one.name.as_str() == name);
        one.expect("it is there").published = vec![PublishedPort {
            host_ip: ip(address),
            host_port: 5433,
            container_port: port,
            udp: false,
        }];
    }
    let edge_of = |kind: Kind| {
        let mut book = EdgeBook::default();
        book.add(kind, totals(1, 2, 3));
        resolve(&mut book, &world(&all), UnixMillis(20));
        let mut edges = edges(&book);
        assert!(edges.len() < 2, "{edges:?}");
        edges.pop().map(|edge| (edge.parent.to_string(), edge.port))
    };
    let asks = |peer| met(client("app", POD, peer, 5433), "/docker", 5433);
    let one = |name: &str, port| Some((name.to_owned(), port));
    assert_eq!(edge_of(asks("192.0.2.1")), one("db", 5432));
    assert_eq!(edge_of(asks("192.0.2.2")), one("web", 80));
    // The proxy's own end does not tell at which address it was asked, and it may be another's.
    let served = Kind {
        role: Role::Server,
        ..met(client("/docker", HOST, "10.88.0.2", 5433), "app", 0)
    };
    assert_eq!(edge_of(served), None);
}

#[test]
fn one_that_does_not_run_and_neighbours_in_one_namespace_do_not_hide_who_publishes_a_port() {
    // The proxy's own end: it does not tell at which address it was asked.
    let served = || Kind {
        role: Role::Server,
        ..met(client("/docker", HOST, "10.88.0.4", 5433), "web", 0)
    };
    let parent = |containers: &[Container]| {
        let mut book = EdgeBook::default();
        book.add(served(), totals(1, 2, 3));
        resolve(&mut book, &world(containers), UnixMillis(20));
        edges(&book).pop().map(|edge| edge.parent.to_string())
    };
    let mut all = containers();
    all.insert(0, container("once", &[], &[(5433, 1)]));
    assert_eq!(parent(&all), None, "of two that run it may be either");
    all[0].state = State::Exited;
    assert_eq!(parent(&all).as_deref(), Some("db"));
    all.retain(|one| one.name.as_str() != "db");
    assert_eq!(parent(&all).as_deref(), Some("once"));
    for one in &mut all {
        if ["app", "redis"].contains(&one.name.as_str()) {
            one.published = container("any", &[], &[(5433, 6379)]).published;
        }
    }
    let neighbours = parent(&all);
    assert!(neighbours.is_some(), "they share what they publish");
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
fn of_several_at_one_port_the_one_at_that_address_is_meant() {
    let containers = containers();
    let mut world = world(&containers);
    let at = (Protocol::Udp, HOST, 53);
    let resolver = listener("/resolver", Some("127.0.0.53"));
    let names = listener("/names", Some("10.88.0.1"));
    let asked = |peer, world: &World<'_>| {
        let mut book = EdgeBook::default();
        book.add(udp("metrics", HOST, peer, 53), totals(1, 0, 0));
        resolve(&mut book, world, UnixMillis(20));
        edges(&book).pop().map(|edge| edge.parent.to_string())
    };
    world
        .listeners
        .insert(at, vec![resolver.clone(), names.clone()]);
    assert_eq!(asked("127.0.0.53", &world).as_deref(), Some("/resolver"));
    assert_eq!(asked("10.88.0.1", &world).as_deref(), Some("/names"));
    assert_eq!(asked("127.0.0.1", &world), None);
    world
        .listeners
        .insert(at, vec![resolver, listener("/any", None), names]);
    assert_eq!(asked("127.0.0.53", &world).as_deref(), Some("/resolver"));
    assert_eq!(asked("127.0.0.1", &world).as_deref(), Some("/any"));
}

#[test]
fn what_nobody_served_is_not_laid_to_who_listens_there_much_later() {
    let containers = containers();
    let mut world = world(&containers);
    let mut book = EdgeBook::default();
    book.add(client("app", POD, "127.0.0.1", 7113), totals(1, 5, 6));
    let later = UnixMillis(20 + STALE_AFTER.as_millis() as u64);
    resolve(&mut book, &world, UnixMillis(20));
    let at = (Protocol::Tcp, POD, 7113);
    world.listeners.insert(at, vec![listener("redis", None)]);
    resolve(&mut book, &world, UnixMillis(later.0 + 1));
    assert_eq!(book.edges(later), []);
    resolve(&mut book, &world, later);
    assert_eq!(book.edges(later).len(), 1);
}

#[test]
fn a_client_by_udp_that_was_there_before_its_server_depends_on_it() {
    let containers = containers();
    let mut book = EdgeBook::default();
    let asks = || udp("web", 4, "10.88.0.3", 53);
    book.add(asks(), totals(1, 0, 0));
    let without_db: Vec<Container> = containers[..3].to_vec();
    resolve(&mut book, &world(&without_db), UnixMillis(20));
    assert_eq!(
        (book.edges(UnixMillis(20)), book.external().len()),
        (vec![], 1)
    );
    book.add(asks(), totals(0, 0, 0));
    resolve(&mut book, &world(&containers), UnixMillis(20));
    let edges = edges(&book);
    assert_eq!(
        (edges.len(), edges[0].parent.as_str(), edges[0].connections),
        (1, "db", 1)
    );
    assert_eq!(book.external(), []);
}

#[test]
fn an_address_that_another_container_got_makes_an_edge_to_each() {
    let mut all = containers();
    let mut book = EdgeBook::default();
    let asks = || udp("web", 4, "10.88.0.3", 53);
    let parents = |book: &EdgeBook| -> Vec<(String, u64)> {
        let edges = edges(book).into_iter();
        edges
            .map(|edge| (edge.parent.to_string(), edge.connections))
            .collect()
    };
    let one = |name: &str, connections| (name.to_owned(), connections);
    book.add(asks(), totals(3, 0, 0));
    resolve(&mut book, &world(&all), UnixMillis(20));
    all[3] = container("newer", &["10.88.0.3"], &[]);
    resolve(&mut book, &world(&all), UnixMillis(20));
    assert_eq!(parents(&book), [one("db", 3)], "nothing new came");
    book.add(asks(), totals(0, 0, 0));
    resolve(&mut book, &world(&all), UnixMillis(20));
    assert_eq!(parents(&book), [one("db", 3), one("newer", 1)]);
    // Whoever is gone was there all the same, and changing to and fro adds up.
    book.add(asks(), totals(1, 0, 0));
    resolve(&mut book, &world(&all[..3]), UnixMillis(20));
    assert_eq!(parents(&book), [one("db", 3), one("newer", 2)]);
    for _ in 0..2 {
        book.add(asks(), totals(1, 0, 0));
        resolve(&mut book, &world(&containers()), UnixMillis(20));
        book.add(asks(), totals(1, 0, 0));
        resolve(&mut book, &world(&all), UnixMillis(20));
    }
    assert_eq!(parents(&book), [one("db", 5), one("newer", 4)]);
    assert_eq!(book.remembered.len(), 2);
}

/// What a sweep learns of whoever is at `ends` in the database's network namespace, in which nothing was missed since
/// `quiet_since`, and where the port asked was let go of at `released`. Returns the parents with their connections.
fn heard(book: &mut EdgeBook, at: u64, (ends, quiet_since, released): Heard<'_>) -> Parents {
    let (all, now) = (containers(), UnixMillis(at));
    let released = |netns, port| {
        UnixMillis(if (netns, port) == (3, 53) {
            released
        } else {
            0
        })
    };
    let mut ears = Ears {
        looks: BTreeMap::new(),
        released: &released,
    };
    let wanted = book.resolve(&world(&all), &ears, now);
    if wanted == [3].into() {
        let look = Look {
            ends: ends
                .iter()
                .map(|end| end.parse().expect("an end"))
                .collect(),
            quiet_since: UnixMillis(quiet_since),
        };
        ears.looks.insert(3, look);
        book.resolve(&world(&all), &ears, now);
    } else {
        assert_eq!(wanted, BTreeSet::new());
    }
    let edges = book.edges(now).into_iter();
    edges
        .map(|edge| (edge.parent.to_string(), edge.connections))
        .collect()
}

type Heard<'a> = (&'a [&'a str], u64, u64);
type Parents = Vec<(String, u64)>;

fn asked_at(connections: u64, first: u64, last: u64) -> Totals {
    Totals {
        moved: None,
        first_seen: UnixMillis(first),
        last_seen: UnixMillis(last),
        ..totals(connections, 0, 0)
    }
}

#[test]
fn a_datagram_that_nobody_was_there_to_hear_makes_no_edge_before_somebody_is() {
    let mut book = EdgeBook::default();
    let asks = || udp("web", 4, "10.88.0.3", 53);
    let nobody: Heard<'_> = (
        &["0.0.0.0:54", "127.0.0.1:53", "[fd00::3]:53"],
        10_030,
        5_000,
    );
    let somebody: Heard<'_> = (&["0.0.0.0:53"], 15_030, 5_000);
    book.add(asks(), asked_at(3, 10_010, 10_020));
    assert_eq!(heard(&mut book, 10_030, nobody), []);
    // Of what was sent within a second of that nothing is told.
    assert_eq!(heard(&mut book, 12_030, nobody), []);
    assert_eq!(heard(&mut book, 13_000, somebody), [], "it came later");
    assert_eq!(book.external(), []);
    book.add(asks(), asked_at(0, 10_010, 15_000));
    assert_eq!(heard(&mut book, 15_030, somebody), [("db".to_owned(), 1)]);
    book.add(asks(), asked_at(2, 10_010, 16_000));
    assert_eq!(heard(&mut book, 16_030, nobody), [("db".to_owned(), 3)]);
}

#[test]
fn whoever_may_have_heard_a_datagram_keeps_its_edge() {
    fn asks(how: Heard<'_>) -> Option<String> {
        let mut book = EdgeBook::default();
        book.add(udp("web", 4, "10.88.0.3", 53), asked_at(1, 10_010, 10_020));
        let mut parents = heard(&mut book, 10_030, how);
        parents.pop().map(|(parent, _)| parent)
    }
    let db = Some("db".to_owned());
    assert_eq!(asks((&[], 10_030, 5_000)), None);
    // At its address, at any, and by the other family.
    for end in ["10.88.0.3:53", "0.0.0.0:53", "[::]:53"] {
        assert_eq!(asks((&[end], 10_030, 5_000)), db, "{end}");
    }
    // There for a moment only, which may be noted as a moment before it heard.
    assert_eq!(asks((&[], 10_030, 10_025)), db);
    assert_eq!(asks((&[], 10_030, 9_500)), db);
    // The namespace missed nothing of it or not the last, so that somebody had it, or hands it on.
    assert_eq!(asks((&[], 10_000, 5_000)), db);
    assert_eq!(asks((&[], 10_015, 5_000)), db);
    // Of a process that is gone nothing can be read any more.
    assert_eq!(asks((&[], 0, 0)), db);
}

#[test]
fn whoever_sends_on_and_on_to_nobody_stays_without_an_edge_whatever_else_was_let_go_of_before() {
    let mut book = EdgeBook::default();
    for second in 10..20 {
        let (last, now) = (second * 1_000, second * 1_000 + 30);
        book.add(udp("web", 4, "10.88.0.3", 53), asked_at(1, 10_000, last));
        // Among those that made room for others may be what was let go of three seconds ago.
        assert_eq!(heard(&mut book, now, (&[], now, now - 3_000)), []);
    }
}

#[test]
fn what_went_on_to_be_sent_is_heard_by_whoever_was_there_for_a_moment_meanwhile() {
    let mut book = EdgeBook::default();
    book.add(udp("web", 4, "10.88.0.3", 53), asked_at(1, 10_010, 10_020));
    assert_eq!(heard(&mut book, 10_030, (&[], 10_030, 0)), []);
    // Nothing new is told, as the second is not over.
    let then = heard(&mut book, 10_930, (&[], 10_930, 10_800));
    assert_eq!(then, [("db".to_owned(), 1)]);
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
    assert_eq!(edges(&book), []);
    let external = book.external();
    assert_eq!(external.len(), 2);
    assert_eq!(external[0].peer.to_string(), "198.51.100.7:443");
    assert_eq!(
        (external[1].port, external[1].received),
        (80, Some(Bytes(8)))
    );
}

#[test]
fn an_edge_stays_after_its_containers_are_gone_until_its_age_is_over() {
    let mut book = book(&[(client("app", POD, "10.88.0.3", 5432), totals(1, 5, 6))]);
    resolve(&mut book, &World::default(), UnixMillis(20));
    assert!(!edges(&book)[0].stale);
    let later = UnixMillis(HOUR);
    book.forget(Duration::from_millis(HOUR), later);
    assert!(book.edges(later)[0].stale);
    book.forget(Duration::from_secs(60), later);
    assert_eq!(book.edges(later), []);
}

#[test]
fn the_edges_of_an_earlier_life_go_on() {
    let before = edges(&book(&[(
        client("app", POD, "10.88.0.3", 5432),
        totals(2, 5, 6),
    )]));
    let mut next = EdgeBook::remembering(before.clone());
    assert_eq!(edges(&next), before);
    next.add(client("app", POD, "10.88.0.3", 5432), totals(3, 1, 1));
    resolve(&mut next, &world(&containers()), UnixMillis(20));
    let after = edges(&next);
    assert_eq!(after.len(), 1);
    assert_eq!(
        (after[0].connections, after[0].bytes_to_parent),
        (5, Some(Bytes(6)))
    );
}

#[test]
fn an_observed_connection_outweighs_one_that_was_found() {
    let observed = client("app", POD, "10.88.0.3", 5432);
    let inferred = Kind {
        learnt: Learnt::Inferred,
        ..observed.clone()
    };
    let mut book = EdgeBook::default();
    book.found([(inferred.clone(), 1)].into(), false, UnixMillis(10));
    resolve(&mut book, &world(&containers()), UnixMillis(20));
    let only = edges(&book);
    assert_eq!(
        (only[0].learnt, only[0].how, only[0].bytes_to_child),
        (Learnt::Inferred, How::SocketTable, None)
    );
    book.add(observed, totals(2, 3, 4));
    book.found([(inferred, 1)].into(), false, UnixMillis(15));
    resolve(&mut book, &world(&containers()), UnixMillis(20));
    let both = edges(&book);
    assert_eq!(
        (both.len(), both[0].learnt, both[0].connections),
        (1, Learnt::Observed, 2)
    );
}

#[test]
fn a_connection_whose_holder_moved_to_another_cgroup_stays_that_of_its_socket() {
    let made = client("app", POD, "10.88.0.3", 5432);
    let served = met(server("db", POD, 5432, "10.88.0.2"), "app", 5432);
    let found = |kind: &Kind, owner: &str| Kind {
        owner: owner.into(),
        learnt: Learnt::Inferred,
        other: None,
        peer: Some(ip("10.88.0.3")),
        ..kind.clone()
    };
    let mut book = book(&[
        (made.clone(), totals(1, 1, 1)),
        (served.clone(), totals(1, 1, 1)),
    ]);
    let moved = [(found(&made, "metrics"), 1), (found(&served, "metrics"), 1)];
    let before = edges(&book);
    book.found(moved.into(), true, UnixMillis(15));
    resolve(&mut book, &world(&containers()), UnixMillis(20));
    assert_eq!(edges(&book), before);
    // One that is older than the agent, beside one of a neighbour that was seen: found with the first look.
    let other = [(found(&made, "metrics"), 1)];
    book.found(other.clone().into(), false, UnixMillis(15));
    book.found(other.into(), true, UnixMillis(18));
    resolve(&mut book, &world(&containers()), UnixMillis(20));
    let edges = edges(&book);
    let old = edges.iter().find(|edge| edge.child == "metrics".into());
    assert_eq!(old.map(|edge| edge.last_seen), Some(UnixMillis(18)));
}

#[test]
fn a_container_seen_before_its_runtime_told_of_it_gets_its_name_everywhere() {
    let path = "/libpod-1";
    let mut book = book(&[
        (client("app", POD, "10.88.0.3", 5432), totals(2, 1, 1)),
        (client(path, POD, "10.88.0.3", 5432), totals(3, 1, 1)),
        (
            met(server("metrics", HOST, 9090, "10.88.0.2"), path, 9090),
            totals(1, 1, 1),
        ),
    ]);
    book.remembered = vec![Edge {
        child: path.into(),
        parent: "redis".into(),
        ..edges(&book)[0].clone()
    }];
    book.name(|_| None);
    assert_eq!(edges(&book).len(), 4);
    book.name(|name| (name.as_str() == path).then(|| "app".into()));
    let edges = edges(&book);
    let told = |edge: &Edge| {
        (
            edge.child.to_string(),
            edge.parent.to_string(),
            edge.connections,
        )
    };
    let told: Vec<_> = edges.iter().map(told).collect();
    let to = |parent: &str, connections| ("app".to_owned(), parent.to_owned(), connections);
    assert_eq!(told, [to("db", 5), to("metrics", 1), to("redis", 3)]);
}

#[test]
fn clients_of_a_public_service_do_not_fill_the_memory_nor_drive_out_edges() {
    let mut book = book(&[(client("app", POD, "10.88.0.3", 5432), totals(1, 5, 6))]);
    for number in 0..20_000u32 {
        let peer = format!("2001:db8::{:x}:{:x}", number >> 16, number & 0xffff);
        let mut seen = totals(1, 0, 0);
        seen.last_seen = UnixMillis(u64::from(number) + 100);
        book.add(server("web", 4, 80, &peer), seen);
    }
    resolve(&mut book, &world(&containers()), UnixMillis(20));
    book.forget(Duration::from_millis(HOUR), UnixMillis(30_000));
    assert!(book.kinds.len() <= MOST_KINDS, "{}", book.kinds.len());
    assert_eq!(edges(&book).len(), 1);
    assert!(book.external().len() > MOST_KINDS / 2);
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
        let edges = edges(&both);
        prop_assert_eq!(edges.len(), 1);
        prop_assert_eq!(edges[0].connections, connections);
        prop_assert_eq!(edges[0].bytes_to_parent, Some(Bytes(sent)));
        prop_assert_eq!(edges[0].bytes_to_child, Some(Bytes(received)));
        prop_assert_eq!(edges[0].retransmits, Some(2));
    }
}
