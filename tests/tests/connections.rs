//! Many connections: none is lost, and what the kernel's maps could not hold is counted. Needs root.

use lifeboat::model::container::Container;
use lifeboat::model::telemetry::Snapshot;
use lifeboat::model::units::Bytes;
use lifeboat::telemetry::{ConnectionLimits, Telemetry};
use lifeboat_tests::guest::in_guest;
use lifeboat_tests::scope::{Scope, container, now};
use serde_json::json;
use std::io::{BufRead as _, BufReader, Read as _};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

/// The talker in a cgroup of its own, ended when dropped.
struct Talker(Child);

impl Talker {
    fn start(cgroup: &Path, words: &[&str]) -> Self {
        Self::start_through(&[], cgroup, words)
    }

    fn start_through(through: &[&str], cgroup: &Path, words: &[&str]) -> Self {
        // The shell moves itself, and so what it becomes.
        let child = Command::new("sh")
            .args(["-c", r#"echo 0 > "$0/cgroup.procs"; exec "$@""#])
            .arg(cgroup)
            .args(through)
            .arg(env!("CARGO_BIN_EXE_talker"))
            .args(words)
            .stdout(Stdio::piped())
            .spawn()
            .expect("a shell");
        Self(child)
    }

    /// One that stays, once it is ready.
    fn ready(cgroup: &Path, words: &[&str]) -> Self {
        Self::start(cgroup, words).awaited()
    }

    fn awaited(mut self) -> Self {
        let talker = &mut self;
        let mut line = String::new();
        BufReader::new(talker.0.stdout.as_mut().expect("piped"))
            .read_line(&mut line)
            .expect("it speaks");
        assert_eq!(line.trim(), "ready");
        self
    }

    fn server(cgroup: &Path, what: &[&str]) -> Self {
        Self::ready(cgroup, &[&["serve"], what].concat())
    }

    fn pid(&self) -> i32 {
        self.0.id() as i32
    }

    /// What a storm made; waits for its end.
    fn made(&mut self) -> u64 {
        let mut text = String::new();
        let mut output = self.0.stdout.take().expect("piped");
        output.read_to_string(&mut text).expect("it speaks");
        text.trim().parse().expect("a number of connections")
    }
}

impl Drop for Talker {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn lost(snapshot: &Snapshot, map: &str) -> u64 {
    let mut losses = snapshot.losses.iter();
    losses.find(|loss| loss.map == map).expect("a map").lost
}

fn missed(snapshot: &Snapshot) -> u64 {
    let mut programs = snapshot.programs.iter();
    let changes = programs.find(|program| program.name == "inet_sock_set_state");
    changes.expect("the program of connections").missed
}

fn connections(snapshot: &Snapshot) -> u64 {
    snapshot.edges.iter().map(|edge| edge.connections).sum()
}

/// Child, parent and port of each edge.
fn named(snapshot: &Snapshot) -> Vec<(&str, &str, u16)> {
    let edges = snapshot.edges.iter();
    edges
        .map(|edge| (edge.child.as_str(), edge.parent.as_str(), edge.port))
        .collect()
}

/// Sweeps until as many connections are seen, or 15 s long.
fn sweep_until_seen(senses: &mut Telemetry, containers: &[Container], wanted: u64) -> Snapshot {
    let end = Instant::now() + Duration::from_secs(15);
    loop {
        let snapshot = senses.sweep(containers, now());
        if connections(&snapshot) >= wanted || Instant::now() > end {
            return snapshot;
        }
        sleep(Duration::from_millis(50));
    }
}

#[test]
fn no_connection_of_a_storm_is_lost() {
    let Some(scope) = Scope::new("storm") else {
        return;
    };
    let (web, db) = (scope.cgroup("web"), scope.cgroup("db"));
    let mut senses = scope.senses();
    let server = Talker::server(&db, &["sink=127.0.0.1:4501"]);
    let containers = [container("web", 0), container("db", server.pid())];
    senses.sweep(&containers, now());
    let wanted = if in_guest() { 5_000 } else { 100_000 };
    let begin = Instant::now();
    let storm = format!("{wanted}=127.0.0.1:4501");
    let made = Talker::start(&web, &["storm", &storm]).made();
    let took = begin.elapsed().as_secs_f64();
    println!("{:.0} connections a second", made as f64 / took);
    let snapshot = sweep_until_seen(&mut senses, &containers, made);
    assert_eq!(snapshot.edges.len(), 1, "{:?}", snapshot.edges);
    assert_eq!(made, wanted);
    assert_eq!((lost(&snapshot, "open"), lost(&snapshot, "ports")), (0, 0));
    // A program that is interrupted by its own event does not run for that: rare, and told.
    let (seen, missed) = (connections(&snapshot), missed(&snapshot));
    assert!(
        seen <= made && made - seen <= missed,
        "{seen}, {missed} missed"
    );
    assert!(missed < made / 1_000, "{missed} missed");
}

#[test]
fn the_bytes_of_connections_closed_in_order_are_exact() {
    let Some(scope) = Scope::new("bytes") else {
        return;
    };
    let (web, db) = (scope.cgroup("web"), scope.cgroup("db"));
    let mut senses = scope.senses();
    let server = Talker::server(&db, &["tcp=127.0.0.1:4501", "sink=127.0.0.1:4502"]);
    let containers = [container("web", 0), container("db", server.pid())];
    senses.sweep(&containers, now());
    // Here the client hangs up first, and there the server, with nothing said.
    let (calls, visits) = (1_000, 1_000);
    let call = vec!["brief=127.0.0.1:4501"; calls / 100];
    let _caller = Talker::ready(&web, &[&["call"], &call[..]].concat());
    let visited = Talker::start(&web, &["visit", &format!("{visits}=127.0.0.1:4502")]).made();
    let end = Instant::now() + Duration::from_secs(15);
    let mut told = Vec::new();
    while Instant::now() < end {
        let snapshot = senses.sweep(&containers, now());
        let edges = snapshot.edges.iter();
        told = edges
            .map(|edge| {
                let bytes = (edge.bytes_to_parent, edge.bytes_to_child);
                (edge.port, edge.connections, bytes)
            })
            .collect();
        let moved = (Some(Bytes(1_000_000)), Some(Bytes(5_000_000)));
        let nothing = (Some(Bytes(0)), Some(Bytes(0)));
        if told == [(4501, calls as u64, moved), (4502, visited, nothing)] {
            return;
        }
        sleep(Duration::from_millis(50));
    }
    panic!("{told:?}");
}

#[test]
fn kinds_that_do_not_fit_are_lost_and_counted_exactly() {
    let Some(scope) = Scope::new("kinds") else {
        return;
    };
    let (web, db) = (scope.cgroup("web"), scope.cgroup("db"));
    // A client's and a server's for each of two ports.
    let mut senses = scope.senses_within(ConnectionLimits {
        kinds: 4,
        ..ConnectionLimits::default()
    });
    let ports = 4501..4506;
    let places: Vec<String> = ports.map(|port| format!("127.0.0.1:{port}")).collect();
    let sinks: Vec<String> = places.iter().map(|at| format!("sink={at}")).collect();
    let sinks: Vec<&str> = sinks.iter().map(String::as_str).collect();
    let server = Talker::server(&db, &sinks);
    let containers = [container("web", 0), container("db", server.pid())];
    senses.sweep(&containers, now());
    let made: u64 = places
        .iter()
        // Visits: the client hangs up when the server has. Of a storm's clients now and then one is gone before its
        // server's end is seen, which is then of a kind of its own, and lost though the edge counts the connection.
        .map(|at| Talker::start(&web, &["visit", &format!("1000={at}")]).made())
        .sum();
    assert_eq!(made, 5_000);
    let mut snapshot = sweep_until_seen(&mut senses, &containers, 2_000);
    // Each connection has two ends, and one that is lost is counted when it closes.
    let ends = 2 * (made - 2_000);
    let end = Instant::now() + Duration::from_secs(15);
    while lost(&snapshot, "ports") < ends && Instant::now() < end {
        sleep(Duration::from_millis(50));
        snapshot = senses.sweep(&containers, now());
    }
    let (seen, lost) = (connections(&snapshot), lost(&snapshot, "ports"));
    assert_eq!((seen, snapshot.edges.len(), lost), (2_000, 2, ends));
}

#[test]
fn an_answer_by_udp_from_another_socket_does_not_make_a_client_of_the_server() {
    let Some(scope) = Scope::new("elsewhere") else {
        return;
    };
    let (web, db) = (scope.cgroup("web"), scope.cgroup("db"));
    let mut senses = scope.senses();
    let server = Talker::server(&db, &["udp-elsewhere=127.0.0.1:4531"]);
    let containers = |pid| [container("web", pid), container("db", server.pid())];
    senses.sweep(&containers(0), now());
    // From a port of the kernel's choice, and from one where services are.
    let client = Talker::ready(
        &web,
        &["call", "udp=127.0.0.1:4531", "udp-low=127.0.0.1:4531"],
    );
    let containers = containers(client.pid());
    let told = sweep_until_seen(&mut senses, &containers, 2);
    // The next one looks up what nobody knew in this one.
    let then = senses.sweep(&containers, now());
    for snapshot in [told, then] {
        assert_eq!(named(&snapshot), [("web", "db", 4531)]);
    }
}

/// Two network namespaces with a cable between them, removed when dropped.
struct Cable([String; 2]);

impl Cable {
    fn lay() -> Self {
        let pid = std::process::id();
        let cable = Self(["a", "b"].map(|end| format!("lifeboat-{pid}-{end}")));
        let [a, b] = &cable.0;
        for line in [
            format!("netns add {a}"),
            format!("netns add {b}"),
            format!("link add name cable netns {a} type veth peer name cable netns {b}"),
            format!("-n {a} address add 198.51.100.1/24 dev cable"),
            format!("-n {b} address add 198.51.100.2/24 dev cable"),
            format!("-n {a} link set cable up"),
            format!("-n {b} link set cable up"),
            format!("-n {a} route add 224.0.0.0/4 dev cable"),
            format!("-n {b} route add 224.0.0.0/4 dev cable"),
        ] {
            let done = Command::new("ip").args(line.split(' ')).status();
            assert!(done.expect("ip runs").success(), "ip {line}");
        }
        cable
    }
}

impl Drop for Cable {
    fn drop(&mut self) {
        for end in &self.0 {
            let _ = Command::new("ip").args(["netns", "delete", end]).status();
        }
    }
}

#[test]
fn what_was_asked_of_many_makes_a_child_of_the_asker_and_not_of_who_answers() {
    let Some(scope) = Scope::new("many") else {
        return;
    };
    let cable = Cable::lay();
    let (web, db) = (scope.cgroup("web"), scope.cgroup("db"));
    let mut senses = scope.senses();
    let at = "239.255.4.5:4541";
    let ends = cable
        .0
        .each_ref()
        .map(|end| format!("--net=/run/netns/{end}"));
    let inside = |end: usize| ["nsenter", &ends[end]];
    let serve = ["serve", &format!("udp-group={at}")];
    let server = Talker::start_through(&inside(1), &db, &serve).awaited();
    let containers = |pid| [container("web", pid), container("db", server.pid())];
    senses.sweep(&containers(0), now());
    let call = ["call", &format!("udp={at}")];
    let client = Talker::start_through(&inside(0), &web, &call).awaited();
    let containers = containers(client.pid());
    let told = sweep_until_seen(&mut senses, &containers, 1);
    let then = senses.sweep(&containers, now());
    for snapshot in [told, then] {
        assert_eq!(named(&snapshot), [("web", "db", 4541)]);
    }
}

#[test]
fn a_datagram_makes_an_edge_where_somebody_was_there_to_hear_it_be_it_for_a_moment_and_else_none() {
    let Some(scope) = Scope::new("heard") else {
        return;
    };
    let cable = Cable::lay();
    let (web, db) = (scope.cgroup("web"), scope.cgroup("db"));
    let mut senses = scope.senses();
    let ends = cable
        .0
        .each_ref()
        .map(|end| format!("--net=/run/netns/{end}"));
    let inside = |end: usize| ["nsenter", &ends[end]];
    let serve = |what| Talker::start_through(&inside(1), &db, &["serve", what]).awaited();
    let server = serve("udp=198.51.100.2:4543");
    let containers = [container("web", 0), container("db", server.pid())];
    senses.sweep(&containers, now());
    let ask = |port: u16| {
        let times = format!("3=198.51.100.2:{port}");
        let made = Talker::start_through(&inside(0), &web, &["ask", &times]).made();
        assert_eq!(made, 3);
    };
    // Whoever is seen with the second was seen with the first.
    ask(4542);
    ask(4543);
    let told = sweep_until_seen(&mut senses, &containers, 1);
    assert_eq!(named(&told), [("web", "db", 4543)]);
    let end = Instant::now() + Duration::from_secs(3);
    while Instant::now() < end {
        let snapshot = senses.sweep(&containers, now());
        assert_eq!(named(&snapshot), [("web", "db", 4543)]);
        sleep(Duration::from_millis(300));
    }
    let _gone = serve("udp-once=198.51.100.2:4542");
    ask(4542);
    let end = Instant::now() + Duration::from_secs(5);
    loop {
        let snapshot = senses.sweep(&containers, now());
        let told = named(&snapshot);
        if told == [("web", "db", 4542), ("web", "db", 4543)] {
            break;
        }
        assert!(Instant::now() < end, "{told:?}");
        sleep(Duration::from_millis(50));
    }
}

#[test]
fn open_connections_beyond_the_limit_are_seen_without_their_bytes() {
    let Some(scope) = Scope::new("open") else {
        return;
    };
    let (web, db) = (scope.cgroup("web"), scope.cgroup("db"));
    let mut senses = scope.senses_within(ConnectionLimits {
        open: 1,
        ..ConnectionLimits::default()
    });
    let server = Talker::server(&db, &["tcp=127.0.0.1:4501"]);
    let containers = [container("web", 0), container("db", server.pid())];
    senses.sweep(&containers, now());
    // The least that the kernel's map can hold (lifeboat_ebpf::OPEN_GROUP).
    let held = 16;
    let made = held + 3;
    let call = vec!["tcp=127.0.0.1:4501"; made as usize];
    let _open = Talker::ready(&web, &[&["call"], &call[..]].concat());
    let snapshot = sweep_until_seen(&mut senses, &containers, made);
    assert_eq!(snapshot.edges.len(), 1, "{:?}", snapshot.edges);
    let edge = &snapshot.edges[0];
    assert_eq!(edge.connections, made);
    assert_eq!(lost(&snapshot, "open"), 2 * (made - held));
    let bytes = (edge.bytes_to_parent, edge.bytes_to_child);
    let of = |each| Some(Bytes(each * held));
    assert_eq!(bytes, (of(1_000), of(5_000)));
}

/// TCP segments that the sockets of a network namespace have sent again, as the kernel counts them there.
fn sent_again(namespace: &str) -> u64 {
    let read = ["netns", "exec", namespace, "cat", "/proc/net/snmp"];
    let snmp = Command::new("ip").args(read).output().expect("ip runs");
    let snmp = String::from_utf8(snmp.stdout).expect("text");
    let mut lines = snmp.lines().filter_map(|line| line.strip_prefix("Tcp: "));
    let (names, values) = (lines.next().expect("names"), lines.next().expect("values"));
    let mut fields = names.split(' ').zip(values.split(' '));
    let (_, again) = fields
        .find(|(name, _)| *name == "RetransSegs")
        .expect("a count");
    again.parse().expect("a number")
}

#[test]
fn what_a_lossy_cable_makes_be_sent_again_and_how_long_it_takes_is_told_of_the_edge() {
    let Some(scope) = Scope::new("lossy") else {
        return;
    };
    let cable = Cable::lay();
    let drop = "iptables -A INPUT -p tcp -m statistic --mode random --probability 0.2 -j DROP";
    for end in &cable.0 {
        let inside = Command::new("ip")
            .args(["netns", "exec", end])
            .args(drop.split(' '))
            .status();
        if !inside.is_ok_and(|status| status.success()) {
            println!("not run: iptables with its `statistic` match is not here");
            return;
        }
    }
    let (web, db) = (scope.cgroup("web"), scope.cgroup("db"));
    let mut senses = scope.senses();
    let inside = |end: usize| ["ip", "netns", "exec", &cable.0[end]];
    let serve = ["serve", "tcp=198.51.100.2:4551"];
    let server = Talker::start_through(&inside(1), &db, &serve).awaited();
    let containers = |pid| [container("web", pid), container("db", server.pid())];
    senses.sweep(&containers(0), now());
    let call = [
        "call",
        "sendfile=198.51.100.2:4551",
        "tcp=198.51.100.2:4551",
    ];
    let client = Talker::start_through(&inside(0), &web, &call).awaited();
    let containers = containers(client.pid());
    let end = Instant::now() + Duration::from_secs(30);
    loop {
        let snapshot = senses.sweep(&containers, now());
        // Both ends: a client sends its requests again, and a server what it answers.
        let truth: u64 = cable.0.iter().map(|end| sent_again(end)).sum();
        let told: Vec<_> = snapshot
            .edges
            .iter()
            .map(|edge| (edge.connections, edge.retransmits))
            .collect();
        if told == [(2, Some(truth))] {
            assert!(truth > 0, "a fifth of all packets is lost");
            // A cable within the machine: more than nothing, and less than a lost packet takes to be missed.
            let round_trip = snapshot.edges[0].srtt_us.expect("measured");
            assert!((1..1_000_000).contains(&round_trip), "{round_trip} µs");
            return;
        }
        assert!(
            Instant::now() < end,
            "{told:?}, and the kernel says {truth}"
        );
        sleep(Duration::from_millis(200));
    }
}

#[test]
fn an_edge_of_the_past_is_stale_and_counts_until_its_age_is_over() {
    let Some(scope) = Scope::new("stale") else {
        return;
    };
    let edge = |parent: &str, minutes_ago: u64| {
        let last_seen = now().0 - minutes_ago * 60_000;
        let kept = json!({
            "child": "web", "parent": parent, "port": 5432, "learnt": "observed", "how": "both-ends",
            "connections": 3, "first_seen": last_seen, "last_seen": last_seen,
        });
        serde_json::from_value(kept).expect("an edge as it is saved")
    };
    let kept = vec![edge("db", 9), edge("cache", 11), edge("queue", 61)];
    let mut senses = scope.senses_remembering(kept);
    let names = ["web", "db", "cache", "queue"];
    let containers = names.map(|name| container(name, 0));
    let snapshot = senses.sweep(&containers, now());
    let mut told: Vec<_> = snapshot
        .edges
        .iter()
        .map(|edge| (edge.parent.as_str(), edge.stale))
        .collect();
    told.sort_unstable();
    assert_eq!(told, [("cache", true), ("db", false)], "an age of an hour");
}
