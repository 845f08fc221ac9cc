//! The senses on this kernel: real programs, real cgroups, real sockets and disks. Needs root.
//!
//! The processes under observation are this test binary itself, started again as a helper in a cgroup of
//! its own.

use lifeboat::model::container::Container;
use lifeboat::model::edge::Learnt;
use lifeboat::model::telemetry::{Latencies, Snapshot};
use lifeboat::model::units::Bytes;
use lifeboat::telemetry::Telemetry;
use lifeboat_tests::scope::{Scope, container, now};
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

const REQUEST: usize = 1_000;
const RESPONSE: usize = 5_000;
const ROLE: &str = "LIFEBOAT_SENSES_ROLE";
const CGROUP: &str = "LIFEBOAT_SENSES_CGROUP";
const ADDRESS: &str = "LIFEBOAT_SENSES_ADDRESS";

/// A network namespace, removed when dropped.
struct Network(String);

impl Network {
    fn new(name: &str) -> Option<Self> {
        let name = format!("senses-{name}-{}", std::process::id());
        if !ip(&["netns", "add", &name]) {
            println!("not run: cannot make a network namespace");
            return None;
        }
        Some(Self(name))
    }

    fn set_up(&self, address: &str) {
        assert!(ip(&["-n", &self.0, "link", "set", "lo", "up"]));
        assert!(ip(&[
            "-n", &self.0, "addr", "add", address, "dev", "eth0", "nodad"
        ]));
        assert!(ip(&["-n", &self.0, "link", "set", "eth0", "up"]));
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        ip(&["netns", "del", &self.0]);
    }
}

fn ip(arguments: &[&str]) -> bool {
    let run = Command::new("ip").args(arguments).status();
    run.is_ok_and(|status| status.success())
}

/// A helper process; it ends when its standard input does.
struct Helper(Child);

impl Helper {
    fn start(role: &str, cgroup: &Path, address: &str) -> Self {
        let binary = std::env::current_exe().expect("this binary");
        Self::spawn(Command::new(binary), role, cgroup, address)
    }

    fn start_in(network: &Network, role: &str, cgroup: &Path, address: &str) -> Self {
        let mut enter = Command::new("nsenter");
        enter
            .arg(format!("--net=/run/netns/{}", network.0))
            .arg(std::env::current_exe().expect("this binary"));
        Self::spawn(enter, role, cgroup, address)
    }

    fn spawn(mut command: Command, role: &str, cgroup: &Path, address: &str) -> Self {
        let child = command
            .args(["--exact", "helper", "--nocapture"])
            .env(ROLE, role)
            .env(CGROUP, cgroup)
            .env(ADDRESS, address)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("this binary runs");
        Self(child)
    }

    fn pid(&self) -> i32 {
        self.0.id() as i32
    }

    /// The word the helper says once it is ready.
    fn said(&mut self) -> String {
        let output = self.0.stdout.as_mut().expect("piped");
        BufReader::new(output)
            .lines()
            .map_while(Result::ok)
            .find_map(|line| Some(line.split_once("ready: ")?.1.to_owned()))
            .expect("the helper says that it is ready")
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Not a test by itself: what a helper process does.
#[test]
fn helper() {
    let Ok(role) = std::env::var(ROLE) else {
        return;
    };
    let cgroup = std::env::var_os(CGROUP).expect("a cgroup");
    let address = std::env::var(ADDRESS).expect("an address");
    fs::write(Path::new(&cgroup).join("cgroup.procs"), "0").expect("moved into the cgroup");
    match role.as_str() {
        "server" => serve(&address),
        "client" => call(&address),
        "spin" => spin(),
        other => panic!("no role {other}"),
    }
}

fn serve(address: &str) {
    let listener = TcpListener::bind(address).expect("a free port");
    println!("ready: {}", listener.local_addr().expect("bound"));
    for connection in listener.incoming() {
        let mut connection = connection.expect("accepted");
        std::thread::spawn(move || {
            let mut request = [0; REQUEST];
            while connection.read_exact(&mut request).is_ok() {
                connection.write_all(&[7; RESPONSE]).expect("answered");
            }
        });
    }
}

fn call(address: &str) {
    let mut connection = TcpStream::connect(address).expect("it listens");
    connection.write_all(&[7; REQUEST]).expect("asked");
    let mut response = [0; RESPONSE];
    connection.read_exact(&mut response).expect("answered");
    println!("ready: {}", connection.local_addr().expect("connected"));
    let _ = std::io::stdin().read_to_end(&mut Vec::new());
}

fn spin() {
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    for _ in 0..cpus * 3 {
        std::thread::spawn(|| {
            loop {
                std::hint::spin_loop();
            }
        });
    }
    println!("ready: spinning");
    let _ = std::io::stdin().read_to_end(&mut Vec::new());
}

/// The first snapshot for which `holds`; fails with what was there last after 10 s.
fn sweep_until(
    senses: &mut Telemetry,
    containers: &[Container],
    mut holds: impl FnMut(&Snapshot) -> bool,
) -> Snapshot {
    let end = Instant::now() + Duration::from_secs(30);
    loop {
        let snapshot = senses.sweep(containers, now());
        if holds(&snapshot) {
            return snapshot;
        }
        assert!(Instant::now() < end, "not within 10 s: {snapshot:#?}");
        sleep(Duration::from_millis(50));
    }
}

fn connection_makes_an_edge(name: &str, listen: &str) {
    let Some(scope) = Scope::new(name) else {
        return;
    };
    let (web, db) = (scope.cgroup("web"), scope.cgroup("db"));
    let mut senses = scope.senses();
    let mut server = Helper::start("server", &db, listen);
    let address = server.said();
    let mut client = Helper::start("client", &web, &address);
    client.said();
    let containers = [
        container("web", client.pid()),
        container("db", server.pid()),
    ];
    // The connection is still open: its bytes must show all the same.
    let snapshot = sweep_until(&mut senses, &containers, |snapshot| {
        snapshot
            .edges
            .first()
            .is_some_and(|edge| edge.bytes_to_child > Some(Bytes(0)))
    });
    let port: u16 = address
        .rsplit(':')
        .next()
        .and_then(|port| port.parse().ok())
        .expect("a port");
    assert_eq!(snapshot.edges.len(), 1, "{:?}", snapshot.edges);
    let edge = &snapshot.edges[0];
    assert_eq!((edge.child.as_str(), edge.parent.as_str()), ("web", "db"));
    assert_eq!(
        (edge.port, edge.connections, edge.learnt),
        (port, 1, Learnt::Observed)
    );
    assert_eq!(edge.bytes_to_parent, Some(Bytes(REQUEST as u64)));
    assert_eq!(edge.bytes_to_child, Some(Bytes(RESPONSE as u64)));
    assert!(snapshot.listening[&"db".into()].contains(&port));
    assert!(!snapshot.listening.contains_key(&"web".into()));

    // Closing it neither loses nor repeats anything, nor does the end of the client's first process.
    drop(client);
    let mut second = Helper::start("client", &web, &address);
    second.said();
    drop(second);
    let containers = [container("web", 0), container("db", server.pid())];
    let snapshot = sweep_until(&mut senses, &containers, |snapshot| {
        snapshot.edges[0].connections == 2
    });
    assert_eq!(snapshot.edges.len(), 1);
    let sent = snapshot.edges[0].bytes_to_parent.expect("TCP counts").0;
    // The sequence number of a FIN counts as a received byte in the kernel.
    assert!((2_000..=2_002).contains(&sent), "{sent}");
    assert!(
        snapshot.losses.iter().all(|loss| loss.lost == 0),
        "{:?}",
        snapshot.losses
    );
}

#[test]
fn an_ipv4_connection_between_two_cgroups_makes_one_edge() {
    connection_makes_an_edge("v4", "127.0.0.1:0");
}

#[test]
fn an_ipv6_connection_between_two_cgroups_makes_one_edge() {
    connection_makes_an_edge("v6", "[::1]:0");
}

#[test]
fn containers_in_networks_of_their_own_are_found_by_address() {
    let Some(scope) = Scope::new("net") else {
        return;
    };
    let (Some(here), Some(there)) = (Network::new("here"), Network::new("there")) else {
        return;
    };
    let veth = [
        "link", "add", "eth0", "netns", &here.0, "type", "veth", "peer", "name", "eth0",
    ];
    assert!(ip(&[&veth[..], &["netns", &there.0]].concat()));
    here.set_up("fd00:5e::1/64");
    there.set_up("fd00:5e::2/64");
    let (web, db) = (scope.cgroup("web"), scope.cgroup("db"));
    let mut senses = scope.senses();
    // A high port is a port like any other.
    let mut server = Helper::start_in(&there, "server", &db, "[::]:50001");
    server.said();
    let mut client = Helper::start_in(&here, "client", &web, "[fd00:5e::2]:50001");
    client.said();
    let mut containers = [
        container("web", client.pid()),
        container("db", server.pid()),
    ];
    containers[0].addresses = vec!["fd00:5e::1".parse().expect("an address")];
    containers[1].addresses = vec!["fd00:5e::2".parse().expect("an address")];
    let snapshot = sweep_until(&mut senses, &containers, |snapshot| {
        snapshot
            .edges
            .first()
            .is_some_and(|edge| edge.bytes_to_child > Some(Bytes(0)))
    });
    // Both ends were seen; it is one edge and one connection.
    assert_eq!(snapshot.edges.len(), 1, "{:?}", snapshot.edges);
    let edge = &snapshot.edges[0];
    assert_eq!((edge.child.as_str(), edge.parent.as_str()), ("web", "db"));
    assert_eq!((edge.port, edge.connections), (50_001, 1));
    assert_eq!(snapshot.external, []);

    // The same peers, were they no containers of this host, are external and no edge.
    let mut stranger = scope.senses();
    drop(client);
    let mut client = Helper::start_in(&here, "client", &web, "[fd00:5e::2]:50001");
    client.said();
    let alone = [container("web", client.pid())];
    let snapshot = sweep_until(&mut stranger, &alone, |snapshot| {
        !snapshot.external.is_empty()
    });
    assert_eq!(snapshot.edges, []);
    assert_eq!(snapshot.external[0].peer.to_string(), "[fd00:5e::2]:50001");
}

#[test]
fn a_connection_older_than_the_agent_makes_an_inferred_edge() {
    let Some(scope) = Scope::new("old") else {
        return;
    };
    let (web, db) = (scope.cgroup("web"), scope.cgroup("db"));
    let mut server = Helper::start("server", &db, "127.0.0.1:0");
    let address = server.said();
    let mut client = Helper::start("client", &web, &address);
    client.said();
    let mut senses = scope.senses();
    let containers = [
        container("web", client.pid()),
        container("db", server.pid()),
    ];
    let snapshot = sweep_until(&mut senses, &containers, |snapshot| {
        !snapshot.edges.is_empty()
    });
    let edge = &snapshot.edges[0];
    assert_eq!((edge.child.as_str(), edge.parent.as_str()), ("web", "db"));
    assert_eq!((edge.learnt, edge.connections), (Learnt::Inferred, 1));
    assert_eq!(address, format!("127.0.0.1:{}", edge.port));
}

#[test]
fn what_happens_beyond_the_scope_is_not_reported() {
    let Some(scope) = Scope::new("in") else {
        return;
    };
    let Some(other) = Scope::new("out") else {
        return;
    };
    let (web, db) = (other.cgroup("web"), other.cgroup("db"));
    scope.cgroup("web");
    let mut senses = scope.senses();
    let mut server = Helper::start("server", &db, "127.0.0.1:0");
    let mut client = Helper::start("client", &web, &server.said());
    client.said();
    sleep(Duration::from_millis(200));
    // The same names, in our scope, where nothing runs.
    let snapshot = senses.sweep(&[container("web", 0), container("db", 0)], now());
    assert_eq!(snapshot.edges, []);
    assert_eq!(snapshot.external, []);
    let host = snapshot.host.run_queue.expect("the programs run");
    assert_eq!((host.latency.count(), host.waiting), (0, 0));
}

#[test]
fn run_queue_delay_lands_on_the_cgroup_that_waits() {
    let Some(scope) = Scope::new("sched") else {
        return;
    };
    let busy = scope.cgroup("busy");
    scope.cgroup("idle");
    let mut senses = scope.senses();
    let mut spinner = Helper::start("spin", &busy, "");
    spinner.said();
    let containers = [container("busy", spinner.pid()), container("idle", 0)];
    let slow = |latency: &Latencies| latency.percentile(99.0).is_some_and(|p99| p99 > 500_000.0);
    let snapshot = sweep_until(&mut senses, &containers, |snapshot| {
        let run_queue = snapshot.containers[0].run_queue.as_ref();
        run_queue.is_some_and(|stats| slow(&stats.latency) && stats.waiting > 0)
    });
    assert_eq!(snapshot.containers[0].name.as_str(), "busy");
    let idle = snapshot.containers[1]
        .run_queue
        .as_ref()
        .expect("the programs run");
    assert_eq!(idle.latency.count(), 0);
    let p99 = snapshot.samples.iter().find(|sample| {
        sample.metric == "sched.run_queue_latency_p99" && sample.subject.name == "busy"
    });
    assert!(p99.is_some_and(|sample| sample.value > 500_000.0));
}
