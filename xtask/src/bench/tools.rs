//! Two containers with the machine's own programs in them: servers, and a client of theirs.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::lab::Host;
use crate::process::wait_for;

/// An image of busybox; the host's programs are mounted over it.
pub(super) const IMAGE: &str = "localhost/tools:1";

/// CPUs of the servers and of the client: left to the scheduler, where they are moves a rate by more than a tenth.
const SERVER_CPU: &str = "0";
pub(super) const CLIENT_CPU: &str = "1";

/// By its path: busybox's shell would take its own, which knows no lists.
const TASKSET: &str = "/usr/bin/taskset";

/// Makes it.
const MAKE_IMAGE: &str = r#"mkdir -p /tmp/image/bin && cp "$(command -v busybox)" /tmp/image/bin/busybox &&
ln -s busybox /tmp/image/bin/sleep && tar -c -C /tmp/image . | podman --log-level error import --quiet - localhost/tools:1"#;

/// Servers and the client's container: the host's own programs over an image of busybox.
pub(super) fn furnish(host: &Host) -> Result<()> {
    host.run(["sh", "-c", MAKE_IMAGE])?;
    let servers = format!(
        "{TASKSET} --cpu-list {SERVER_CPU} redis-server --save '' --protected-mode no --port 6379 --maxclients 12000 & \
         exec {TASKSET} --cpu-list {SERVER_CPU} iperf3 -s"
    );
    for (name, command) in [
        ("server", servers.as_str()),
        ("client", "exec sleep 100000"),
    ] {
        let mut arguments: Vec<String> = ["run", "--detach", "--name", name].map(Into::into).into();
        for directory in ["/usr", "/lib", "/lib64", "/etc/alternatives"] {
            if Path::new(directory).exists() {
                arguments.push(format!("--volume={directory}:{directory}:ro"));
            }
        }
        // A closed connection keeps its port for a minute, and there are more in that time than ports.
        arguments.extend(
            [
                "--sysctl=net.ipv4.tcp_tw_reuse=1",
                "--sysctl=net.ipv4.ip_local_port_range=1024 65535",
            ]
            .map(Into::into),
        );
        // iperf3 keeps its buffer in a file.
        arguments.extend(["--volume=/srv:/srv", "--tmpfs=/tmp"].map(Into::into));
        arguments.extend([IMAGE, "/bin/busybox", "sh", "-c", command].map(Into::into));
        host.podman(arguments)?;
    }
    wait_for("the servers", Duration::from_secs(10), || {
        let address = server(host)?;
        let ping = inside(host, &format!("redis-cli -h {address} ping"));
        Ok(ping
            .is_ok_and(|answer| answer.trim() == "PONG")
            .then_some(()))
    })
}

/// Address of the servers' container.
pub(super) fn server(host: &Host) -> Result<String> {
    let format = "{{.NetworkSettings.IPAddress}}";
    host.podman(["inspect", "--format", format, "server"])
}

/// Runs a script in the client's container.
pub(super) fn inside(host: &Host, script: &str) -> Result<String> {
    let shell = ["exec", "client", TASKSET, "--cpu-list", CLIENT_CPU];
    host.podman(shell.iter().chain(&["/bin/busybox", "sh", "-c", script]))
}

/// Requests a second of a `redis-benchmark` from container to container.
pub(super) fn redis(host: &Host, requests: u32, options: &str) -> Result<f64> {
    let address = server(host)?;
    let script = format!("redis-benchmark -h {address} --csv -n {requests} {options}");
    let csv = inside(host, &script)?;
    let last = csv.lines().last().unwrap_or_default();
    let rate = last.split(',').nth(1).map(|field| field.trim_matches('"'));
    rate.and_then(|rate| rate.parse().ok())
        .with_context(|| format!("redis-benchmark printed {csv}"))
}
