//! The kinds of connections: who serves, who calls, and the edge that must come of it.

use std::collections::BTreeSet;

use super::Edge;

pub(super) const OLDER: &str = "older than the agent";
pub(super) const POD: &str = "two containers in one pod";
pub(super) const BRIEF: &str = "connections of 1 ms";
/// Where a server is told for the clients of another subnet: nobody has this address.
pub(super) const TRANSLATED: &str = "10.99.99.99:8099";
/// The directory that containers share, on the host and in the containers.
pub(super) const SHARE: &str = "/srv/share";

/// A kind: the client's words for the talker, and the edge that must come of it. The options are Docker's.
pub(super) struct Case {
    pub(super) kind: &'static str,
    pub(super) server: Vec<String>,
    pub(super) serves: String,
    pub(super) client: Vec<String>,
    pub(super) calls: Call,
    pub(super) transport: &'static str,
    pub(super) port: u64,
    pub(super) learnt: &'static str,
}

pub(super) enum Call {
    To(String),
    /// Way, then the server's address and the port behind it.
    ServerAt(&'static str, u16),
}

pub(super) fn words(text: &str) -> Vec<String> {
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

/// All kinds on a host with this address.
pub(super) fn all(host: &str) -> Vec<Case> {
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
            server: words("--pod pair"),
            client: words("--pod pair"),
            calls: to("tcp=127.0.0.1:8000".into()),
            ..case(POD, "tcp", 8000)
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
        case(BRIEF, "brief", 80),
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
            calls: to(format!("tcp={TRANSLATED}")),
            ..case("NAT between subnets, both addresses translated", "tcp", 80)
        },
        both(
            Case {
                transport: "unix",
                port: 0,
                learnt: "inferred",
                serves: format!("unix={SHARE}/s"),
                calls: to(format!("unix={SHARE}/s")),
                ..case("unix socket on a shared volume", "unix", 0)
            },
            &format!("--volume {SHARE}:{SHARE}"),
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
    pub(super) fn server_name(&self) -> String {
        format!("{}-server", slug(self.kind))
    }

    pub(super) fn client_name(&self) -> String {
        format!("{}-client", slug(self.kind))
    }

    /// The edges that must be there; `shown` tells by which name the agent knows a container.
    pub(super) fn truth(&self, shown: &dyn Fn(&str) -> String) -> BTreeSet<Edge> {
        [(
            shown(&self.client_name()),
            shown(&self.server_name()),
            self.transport.into(),
            self.port,
            self.learnt.into(),
        )]
        .into()
    }
}
