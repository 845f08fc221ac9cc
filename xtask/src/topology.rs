//! Scripted topologies of real containers whose relations are known, and what the agent makes of them.
//!
//! Every kind has containers of its own (`KIND-server`, `KIND-client`), so that an edge that is missing or
//! wrong belongs to exactly one kind. The answer comes from the built agent through its command line.

use std::collections::BTreeSet;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::images;
use crate::lab::{Host, HostSpec, Lab, LabSpec, PODMAN_SOCKET};
use crate::process::{log_tail, wait_for};
use crate::workspace;

/// child, parent, transport, port, `observed` or `inferred`.
pub type Edge = (String, String, String, u64, String);

/// What came of one kind of connection under one runtime.
#[derive(Debug)]
pub struct Outcome {
    /// Runtime.
    pub runtime: &'static str,
    /// Kind of connection.
    pub kind: &'static str,
    /// The truth.
    pub expected: BTreeSet<Edge>,
    /// What of the truth was found.
    pub found: usize,
    /// Edges with a container of this kind that are not true.
    pub wrong: Vec<Edge>,
    /// What the found edges' figures get wrong; empty when nothing.
    pub figures: Vec<String>,
}

impl Outcome {
    /// Whether everything was found, and nothing else.
    #[must_use]
    pub fn is_exact(&self) -> bool {
        self.found == self.expected.len() && self.wrong.is_empty() && self.figures.is_empty()
    }
}

const TALKER: &str = "localhost/talker:demo";
/// The program at the same place in an image and on a lab host.
const OLDER: &str = "older than the agent";
const LEAST_MOVED: u64 = 1 << 20;

/// A kind: the client's words for the talker, and the edge that must come of it.
struct Case {
    kind: &'static str,
    server: Vec<String>,
    serves: String,
    client: Vec<String>,
    calls: Call,
    transport: &'static str,
    port: u64,
    learnt: &'static str,
}

enum Call {
    To(String),
    /// Way, then the server's address and the port behind it.
    ServerAt(&'static str, u16),
}

fn words(text: &str) -> Vec<String> {
    text.split_whitespace().map(str::to_owned).collect()
}

fn case(kind: &'static str, how: &'static str, port: u16) -> Case {
    Case {
        kind,
        server: words("--network front"),
        serves: format!("tcp=[::]:{port}"),
        client: words("--network front"),
        calls: Call::ServerAt(how, port),
        transport: "tcp",
        port: port.into(),
        learnt: "observed",
    }
}

/// The kinds that every runtime with the Docker API can have.
fn cases(host: &str) -> Vec<Case> {
    let to = |text: String| Call::To(text);
    let both = |mut case: Case, options: &str| {
        case.server.extend(words(options));
        case.client.extend(words(options));
        case
    };
    let fast_open = "--sysctl net.ipv4.tcp_fastopen=1027";
    vec![
        Case {
            learnt: "inferred",
            ..case(OLDER, "tcp", 80)
        },
        case("bridge network", "tcp", 80),
        Case {
            server: words("--network front --publish 18080:80"),
            client: words("--network back"),
            calls: to(format!("tcp={host}:18080")),
            ..case("published port", "tcp", 80)
        },
        Case {
            server: words("--network front --publish 18081:80"),
            client: words("--network host"),
            calls: to("tcp=127.0.0.1:18081".into()),
            ..case("published port from the host's loopback", "tcp", 80)
        },
        Case {
            server: words("--network host"),
            calls: to(format!("tcp={host}:18090")),
            ..case("host network", "tcp", 18_090)
        },
        Case {
            server: words("--network host"),
            client: words("--network host"),
            calls: to("tcp=127.0.0.1:18091".into()),
            ..case("host network, loopback", "tcp", 18_091)
        },
        Case {
            client: words("--network container:SERVER"),
            calls: to("tcp=127.0.0.1:6379".into()),
            ..case("loopback in a shared network namespace", "tcp", 6379)
        },
        Case {
            server: words("--network six"),
            client: words("--network six"),
            ..case("IPv6", "tcp6", 80)
        },
        Case {
            transport: "udp",
            serves: "udp=[::]:5353".into(),
            ..case("UDP", "udp", 5353)
        },
        Case {
            transport: "udp",
            serves: "udp=0.0.0.0:5354".into(),
            ..case("UDP, connected socket", "udp-connected", 5354)
        },
        Case {
            transport: "udp",
            serves: "udp=0.0.0.0:5355".into(),
            server: words("--network front --publish 18053:5355/udp"),
            client: words("--network back"),
            calls: to(format!("udp={host}:18053")),
            ..case("UDP, published port", "udp", 5355)
        },
        case("connections of 1 ms", "brief", 80),
        case("service on port 40000", "tcp", 40_000),
        case("sendfile", "sendfile", 80),
        case("splice", "splice", 80),
        both(
            case("io_uring", "uring", 80),
            "--security-opt seccomp=unconfined",
        ),
        both(case("TCP fast open", "fastopen", 80), fast_open),
        Case {
            server: words("--network back"),
            calls: to("tcp=10.99.99.99:8099".into()),
            ..case("NAT between subnets, both addresses translated", "tcp", 80)
        },
        both(
            Case {
                transport: "unix",
                port: 0,
                learnt: "inferred",
                serves: "unix=/share/s".into(),
                calls: to("unix=/share/s".into()),
                ..case("unix socket on a shared volume", "unix", 0)
            },
            "--volume /srv/share:/share",
        ),
    ]
}

fn slug(kind: &str) -> String {
    let letters = kind.chars().map(|c| {
        if c.is_ascii_alphanumeric() {
            c.to_ascii_lowercase()
        } else {
            '-'
        }
    });
    letters.collect::<String>().replace("--", "-")
}

impl Case {
    fn server_name(&self) -> String {
        format!("{}-server", slug(self.kind))
    }

    fn client_name(&self) -> String {
        format!("{}-client", slug(self.kind))
    }

    fn truth(&self) -> BTreeSet<Edge> {
        [(
            self.client_name(),
            self.server_name(),
            self.transport.into(),
            self.port,
            self.learnt.into(),
        )]
        .into()
    }
}

/// A runtime's command line within the host.
struct Runtime<'a> {
    name: &'static str,
    host: &'a Host,
    program: &'static [&'static str],
    image: &'static str,
}

impl Runtime<'_> {
    fn run(&self, words: &[String]) -> Result<String> {
        let all = self
            .program
            .iter()
            .map(|word| (*word).to_owned())
            .chain(words.iter().cloned());
        Ok(self.host.run(all)?.trim().to_owned())
    }

    fn say(&self, text: &str) -> Result<String> {
        self.run(&words(text))
    }

    fn start(&self, name: &str, options: &[String], talker: &[String]) -> Result<()> {
        let mut all = words(&format!("run --detach --name {name}"));
        all.extend_from_slice(options);
        all.push(self.image.into());
        all.extend_from_slice(talker);
        self.run(&all).map(drop)
    }

    fn start_server(&self, case: &Case) -> Result<()> {
        self.start(
            &case.server_name(),
            &case.server,
            &["serve".into(), case.serves.clone()],
        )
    }

    fn start_client(&self, case: &Case) -> Result<()> {
        let server = case.server_name();
        let options: Vec<String> = case
            .client
            .iter()
            .map(|word| word.replace("SERVER", &server))
            .collect();
        let call = match &case.calls {
            Call::To(call) => call.clone(),
            Call::ServerAt("tcp6", port) => {
                let address = self.address(&server, "GlobalIPv6Address")?;
                format!("tcp=[{address}]:{port}")
            }
            Call::ServerAt(how, port) => {
                format!("{how}={}:{port}", self.address(&server, "IPAddress")?)
            }
        };
        self.start(&case.client_name(), &options, &["call".into(), call])
    }

    fn address(&self, name: &str, field: &str) -> Result<String> {
        let format = format!("{{{{range .NetworkSettings.Networks}}}}{{{{.{field}}}}}{{{{end}}}}");
        let address = self.run(&["inspect".into(), "--format".into(), format, name.into()])?;
        ensure!(!address.is_empty(), "{name} has no {field}");
        Ok(address)
    }

    /// Waits until a client's talker has done everything.
    fn await_ready(&self, name: &str) -> Result<()> {
        wait_for(
            &format!("{name} to be ready"),
            Duration::from_secs(20),
            || {
                Ok(self
                    .say(&format!("logs {name}"))?
                    .contains("ready")
                    .then_some(()))
            },
        )
        .with_context(|| self.say(&format!("logs {name}")).unwrap_or_default())
    }
}

fn start_agent(host: &Host, socket: &str) -> Result<()> {
    host.write(
        "/etc/lifeboat/agent.yaml",
        format!("device: {}\nruntimes: [{socket}]\n", host.name()),
    )?;
    let lifeboat = workspace::binary("lifeboat");
    ensure!(lifeboat.exists(), "lifeboat is not built: `cargo build`");
    host.spawn_logged("agent", [lifeboat.as_os_str(), "agent".as_ref()])?;
    wait_for("the agent's first view", Duration::from_secs(20), || {
        Ok(edges(host).ok())
    })
    .with_context(|| log_tail(&host.log("agent"), 2000))
    .map(drop)
}

/// What `lifeboat relations` says.
fn edges(host: &Host) -> Result<Vec<Value>> {
    let lifeboat = workspace::binary("lifeboat");
    let text = host.run([
        lifeboat.as_os_str(),
        "--json".as_ref(),
        "relations".as_ref(),
    ])?;
    let answer: Value = serde_json::from_str(&text)?;
    Ok(answer["edges"].as_array().cloned().unwrap_or_default())
}

fn as_edge(edge: &Value) -> Edge {
    let text = |field: &str| edge[field].as_str().unwrap_or_default().to_owned();
    let port = edge["port"].as_u64().unwrap_or(0);
    (
        text("child"),
        text("parent"),
        text("protocol"),
        port,
        text("learnt"),
    )
}

/// Runs all kinds under a runtime and compares what the agent says with the truth.
fn run_cases(runtime: &Runtime<'_>, cases: &[Case], socket: &str) -> Result<Vec<Outcome>> {
    runtime.host.run(["mkdir", "-p", "/srv/share"])?;
    runtime.say("network create --subnet 10.126.0.0/24 front")?;
    runtime.say("network create --subnet 10.127.0.0/24 back")?;
    runtime.say("network create --ipv6 --subnet fd00:126::/64 --subnet 10.128.0.0/24 six")?;
    for case in cases {
        runtime.start_server(case).with_context(|| case.kind)?;
    }
    if let Some(nat) = cases.iter().find(|case| case.kind.starts_with("NAT")) {
        let server = runtime.address(&nat.server_name(), "IPAddress")?;
        for rule in [
            format!(
                "-t nat -I PREROUTING -d 10.99.99.99 -p tcp --dport 8099 -j DNAT --to-destination {server}:80"
            ),
            format!("-t nat -I POSTROUTING -s 10.126.0.0/24 -d {server} -j MASQUERADE"),
            "-I FORWARD -j ACCEPT".to_owned(),
        ] {
            runtime.host.run(words(&format!("iptables {rule}")))?;
        }
        // Docker isolates its networks from each other before any other rule.
        let isolation = words("iptables -I DOCKER-USER -j ACCEPT");
        if runtime.name.starts_with("Docker") {
            runtime.host.run(isolation)?;
        }
    }
    let (older, rest): (Vec<&Case>, Vec<&Case>) = cases.iter().partition(|case| case.kind == OLDER);
    for case in &older {
        runtime.start_client(case)?;
        runtime.await_ready(&case.client_name())?;
    }
    start_agent(runtime.host, socket)?;
    for case in &rest {
        runtime.start_client(case).with_context(|| case.kind)?;
    }
    for case in &rest {
        runtime.await_ready(&case.client_name())?;
    }
    let truth: BTreeSet<Edge> = cases.iter().flat_map(Case::truth).collect();
    // What is still missing after this long is missing.
    let _ = wait_for("all edges", Duration::from_secs(25), || {
        let seen: BTreeSet<Edge> = edges(runtime.host)?.iter().map(as_edge).collect();
        Ok(truth.is_subset(&seen).then_some(()))
    });
    // One more sweep, for figures and for edges that are not true.
    std::thread::sleep(Duration::from_secs(3));
    let seen = edges(runtime.host)?;
    Ok(cases
        .iter()
        .map(|case| judge(runtime.name, case, &seen))
        .collect())
}

fn judge(runtime: &'static str, case: &Case, seen: &[Value]) -> Outcome {
    let expected = case.truth();
    let names = [case.client_name(), case.server_name()];
    let ours: Vec<&Value> = seen
        .iter()
        .filter(|edge| {
            names
                .iter()
                .any(|name| edge["child"] == **name || edge["parent"] == **name)
        })
        .collect();
    let (right, wrong): (Vec<&Value>, Vec<&Value>) = ours
        .into_iter()
        .partition(|edge| expected.contains(&as_edge(edge)));
    let mut figures = Vec::new();
    for edge in &right {
        let moved = edge["bytes_to_parent"].as_u64();
        let bulk = matches!(case.kind, "sendfile" | "splice");
        let least = if bulk { LEAST_MOVED } else { 1_000 };
        if case.transport == "tcp"
            && case.learnt == "observed"
            && moved.is_none_or(|moved| moved < least)
        {
            figures.push(format!("{moved:?} bytes instead of {least}"));
        }
        if case.kind == "connections of 1 ms" && edge["connections"] != 100 {
            figures.push(format!(
                "{} connections instead of 100",
                edge["connections"]
            ));
        }
    }
    Outcome {
        runtime,
        kind: case.kind,
        found: right.len(),
        wrong: wrong.into_iter().map(as_edge).collect(),
        figures,
        expected,
    }
}

/// All kinds under Podman as root.
///
/// # Errors
/// The lab, Podman or the agent did not do what it must.
pub fn podman() -> Result<Vec<Outcome>> {
    let lab = Lab::up(&LabSpec::of("topo", &["a"]))?;
    let host = lab.host("a")?;
    images::load_some(host, &["talker"])?;
    let runtime = Runtime {
        name: "Podman, root",
        host,
        program: &["podman", "--log-level", "error"],
        image: TALKER,
    };
    let cases = cases(&host.address().to_string());
    run_cases(&runtime, &cases, PODMAN_SOCKET)
}

const DOCKER_SOCKET: &str = "/run/docker.sock";

/// All kinds under Docker, with its proxy for published ports or without.
///
/// # Errors
/// The lab, Docker or the agent did not do what it must.
pub fn docker(proxy: bool) -> Result<Vec<Outcome>> {
    let lab = Lab::up(&LabSpec {
        name: format!("topo-docker-{}", std::process::id()),
        hosts: vec![HostSpec {
            containers: false,
            ..HostSpec::from("a")
        }],
    })?;
    let host = lab.host("a")?;
    // Without forwarding rules of Docker's own, a published port can only be reached through the proxy.
    let config = format!(
        r#"{{"data-root": "/srv/docker", "exec-root": "/run/docker", "pidfile": "/run/docker.pid",
        "hosts": ["unix://{DOCKER_SOCKET}"], "userland-proxy": {proxy}, "default-ulimits": {{
        "nofile": {{"Name": "nofile", "Hard": 16384, "Soft": 16384}},
        "nproc": {{"Name": "nproc", "Hard": 16384, "Soft": 16384}}}}}}"#
    );
    host.write("/etc/docker/lab.json", config)?;
    // Docker's containers are in the cgroup `docker`, which is not its daemon's.
    host.spawn_logged(
        "dockerd",
        ["dockerd", "--config-file", "/etc/docker/lab.json"],
    )?;
    let url = format!("unix://{DOCKER_SOCKET}");
    wait_for("dockerd", Duration::from_secs(30), || {
        Ok(host.run(["docker", "--host", &url, "version"]).ok())
    })
    .with_context(|| log_tail(&host.log("dockerd"), 2000))?;
    let (archive, changes) = images::build("talker")?;
    let mut import = words("docker --host unix:///run/docker.sock import");
    for change in changes {
        import.extend(["--change".to_owned(), (*change).to_owned()]);
    }
    import.extend([archive.display().to_string(), "talker:demo".to_owned()]);
    host.run(import)?;
    let runtime = Runtime {
        name: if proxy {
            "Docker"
        } else {
            "Docker, no userland proxy"
        },
        host,
        program: &["docker", "--host", "unix:///run/docker.sock"],
        image: "talker:demo",
    };
    let mut cases = cases(&host.address().to_string());
    if !proxy {
        // The host's own loopback cannot be translated: that is what the proxy is for.
        cases.retain(|case| !case.kind.contains("host's loopback"));
    }
    run_cases(&runtime, &cases, DOCKER_SOCKET)
}

/// Cgroups without a runtime, as an init system makes them for its services.
///
/// # Errors
/// The lab or the agent did not do what it must.
pub fn plain() -> Result<Vec<Outcome>> {
    let lab = Lab::up(&LabSpec {
        name: format!("topo-plain-{}", std::process::id()),
        hosts: vec![HostSpec {
            containers: false,
            ..HostSpec::from("a")
        }],
    })?;
    let host = lab.host("a")?;
    host.run(["mkdir", "-p", "/run/share"])?;
    let address = host.address();
    let kinds: [(
        &'static str,
        String,
        String,
        &'static str,
        u64,
        &'static str,
    ); 5] = [
        (
            "host network",
            "tcp=0.0.0.0:8101".into(),
            format!("tcp={address}:8101"),
            "tcp",
            8101,
            "observed",
        ),
        (
            "IPv6",
            "tcp=[::1]:8102".into(),
            "tcp=[::1]:8102".into(),
            "tcp",
            8102,
            "observed",
        ),
        (
            "UDP",
            "udp=127.0.0.1:8103".into(),
            "udp=127.0.0.1:8103".into(),
            "udp",
            8103,
            "observed",
        ),
        (
            "connections of 1 ms",
            "tcp=127.0.0.1:8104".into(),
            "brief=127.0.0.1:8104".into(),
            "tcp",
            8104,
            "observed",
        ),
        (
            "unix socket",
            "unix=/run/share/s".into(),
            "unix=/run/share/s".into(),
            "unix",
            0,
            "inferred",
        ),
    ];
    let talker = workspace::binary("talker").display().to_string();
    let spawn = |name: &str, verb: &str, what: &str| {
        host.spawn_logged(name, [talker.as_str(), verb, what])
            .map(drop)
    };
    start_agent(host, "/nonexistent")?;
    let mut cases = Vec::new();
    for (kind, serves, calls, transport, port, learnt) in kinds {
        let case = Case {
            serves,
            calls: Call::To(calls.clone()),
            transport,
            port,
            learnt,
            ..case(kind, "tcp", 0)
        };
        spawn(&case.server_name(), "serve", &case.serves)?;
        spawn(&case.client_name(), "call", &calls)?;
        cases.push(case);
    }
    // A cgroup goes by its path.
    let pathed = |(child, parent, transport, port, learnt): Edge| {
        (
            format!("/{child}"),
            format!("/{parent}"),
            transport,
            port,
            learnt,
        )
    };
    let truth: BTreeSet<Edge> = cases.iter().flat_map(Case::truth).map(pathed).collect();
    let _ = wait_for("all edges", Duration::from_secs(25), || {
        let seen: BTreeSet<Edge> = edges(host)?.iter().map(as_edge).collect();
        Ok(truth.is_subset(&seen).then_some(()))
    });
    std::thread::sleep(Duration::from_secs(3));
    let mut seen = edges(host)?;
    for edge in &mut seen {
        for end in ["child", "parent"] {
            let bare = edge[end]
                .as_str()
                .unwrap_or_default()
                .trim_start_matches('/')
                .to_owned();
            edge[end] = bare.into();
        }
    }
    Ok(cases
        .iter()
        .map(|case| judge("plain cgroup", case, &seen))
        .collect())
}

/// Whether a program is on this machine.
#[must_use]
pub fn has(program: &str) -> bool {
    Command::new(program)
        .arg("--version")
        .output()
        .is_ok_and(|run| run.status.success())
}

/// The table of `docs/relations-accuracy.md`.
#[must_use]
pub fn table(outcomes: &[Outcome]) -> String {
    let mut text =
        String::from("| runtime | kind | recall | precision | figures |\n|---|---|---|---|---|\n");
    for outcome in outcomes {
        let all = outcome.expected.len();
        let said = outcome.found + outcome.wrong.len();
        let percent = |part: usize, whole: usize| match whole {
            0 => "–".to_owned(),
            _ => format!("{} %", part * 100 / whole),
        };
        let figures = if outcome.figures.is_empty() {
            "right".to_owned()
        } else {
            outcome.figures.join("; ")
        };
        text.push_str(&format!(
            "| {} | {} | {} | {} | {figures} |\n",
            outcome.runtime,
            outcome.kind,
            percent(outcome.found, all),
            percent(outcome.found, said)
        ));
    }
    text
}
