//! Runtimes with Docker's command line: Podman as root and rootless, and Docker.

use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::cases::{self, POD, words};
use super::{Outcome, Runtime, run_cases};
use crate::images;
use crate::lab::{Host, HostSpec, Lab, LabSpec, PODMAN_SOCKET};
use crate::process::{log_tail, wait_for};

const TALKER: &str = "localhost/talker:demo";
const DOCKER_SOCKET: &str = "/run/docker.sock";

/// A runtime's command line within the host.
struct CommandLine<'a> {
    name: &'static str,
    host: &'a Host,
    program: Vec<String>,
    image: &'static str,
    socket: String,
}

impl CommandLine<'_> {
    fn run(&self, words: &[String]) -> Result<String> {
        let all = self.program.iter().chain(words);
        Ok(self.host.run(all)?.trim().to_owned())
    }

    fn say(&self, text: &str) -> Result<String> {
        self.run(&words(text))
    }

    fn is_docker(&self) -> bool {
        self.socket == DOCKER_SOCKET
    }

    fn import(&self) -> Result<()> {
        let (archive, changes) = images::build("talker")?;
        let mut import = vec!["import".to_owned()];
        for change in changes {
            import.extend(["--change".to_owned(), (*change).to_owned()]);
        }
        import.extend([archive.display().to_string(), self.image.to_owned()]);
        self.run(&import).map(drop)
    }
}

impl Runtime for CommandLine<'_> {
    fn name(&self) -> &'static str {
        self.name
    }

    fn host(&self) -> &Host {
        self.host
    }

    fn socket(&self) -> String {
        self.socket.clone()
    }

    fn prepare(&self) -> Result<()> {
        self.import()?;
        self.say("network create --subnet 10.126.0.0/24 front")?;
        self.say("network create --subnet 10.127.0.0/24 back")?;
        self.say("network create --ipv6 --subnet fd00:126::/64 --subnet 10.128.0.0/24 six")?;
        if !self.is_docker() {
            // A parent cgroup for the pod would want controllers, which cgroup2 on a hybrid machine lacks.
            self.say("pod create --share-parent=false --name pair")?;
        }
        Ok(())
    }

    fn start(&self, name: &str, options: &[String], talker: &[String]) -> Result<()> {
        let mut all = words(&format!("run --detach --name {name}"));
        all.extend_from_slice(options);
        all.push(self.image.into());
        all.extend_from_slice(talker);
        self.run(&all).map(drop)
    }

    fn address(&self, name: &str, six: bool) -> Result<String> {
        let field = if six {
            "GlobalIPv6Address"
        } else {
            "IPAddress"
        };
        let format = format!("{{{{range .NetworkSettings.Networks}}}}{{{{.{field}}}}}{{{{end}}}}");
        let address = self.run(&["inspect".into(), "--format".into(), format, name.into()])?;
        ensure!(!address.is_empty(), "{name} has no {field}");
        Ok(address)
    }

    fn said(&self, name: &str) -> Result<String> {
        self.say(&format!("logs {name}"))
    }

    fn iptables(&self, rule: &str) -> Result<()> {
        let mut all = Vec::new();
        if self.name == ROOTLESS {
            all.extend_from_slice(&self.program);
            all.extend(words("unshare --rootless-netns"));
        }
        // Docker isolates its networks from each other before any other rule.
        let rule = if self.is_docker() {
            rule.replace("FORWARD", "DOCKER-USER")
        } else {
            rule.to_owned()
        };
        all.extend(words(&format!("iptables {rule}")));
        self.host.run(all).map(drop)
    }
}

/// All kinds under Podman as root.
///
/// # Errors
/// The lab, Podman or the agent did not do what it must.
pub fn podman() -> Result<Vec<Outcome>> {
    let lab = Lab::up(&LabSpec::of("topo", &["a"]))?;
    let host = lab.host("a")?;
    let runtime = CommandLine {
        name: "Podman, root",
        host,
        program: words("podman --log-level error"),
        image: TALKER,
        socket: PODMAN_SOCKET.to_owned(),
    };
    run_cases(&runtime, &cases::all(&host.address().to_string()))
}

const ROOTLESS: &str = "Podman, rootless";
const USER: &str = "boater";

/// What an administrator does for a user who runs containers: an account with subordinate ids, a runtime
/// directory, a cgroup of its own, and devices that everybody may open. The machine's own stay as they are.
const ADMIT: &str = r#"
useradd --create-home --home-dir /srv/boater boater
uid=$(id -u boater)
mkdir -p /run/user/$uid/podman /srv/boater/.config/containers
printf '[storage]\ndriver = "overlay"\n' >/srv/boater/.config/containers/storage.conf
chown -R boater: /run/user/$uid /srv/boater
chmod 700 /run/user/$uid
mkdir -p /sys/fs/cgroup/user/session
chown boater: /sys/fs/cgroup/user /sys/fs/cgroup/user/cgroup.procs /sys/fs/cgroup/user/session /sys/fs/cgroup/user/session/cgroup.procs
mknod /run/tun c 10 200
chmod 666 /run/tun
mount --bind /run/tun /dev/net/tun
mount --make-rshared /
echo $uid"#;

/// Runs its arguments as the user `$1` with the id `$2`, in the user's session.
const AS_USER: &str = r#"echo $$ >/sys/fs/cgroup/user/session/cgroup.procs
user=$1 uid=$2
shift 2
cd /
exec setpriv --reuid "$user" --regid "$user" --init-groups env HOME=/srv/boater XDG_RUNTIME_DIR=/run/user/$uid "$@""#;

/// All kinds under Podman of an ordinary user.
///
/// # Errors
/// As [`podman`].
pub fn rootless() -> Result<Vec<Outcome>> {
    let lab = Lab::up(&bare("topo-rootless"))?;
    let host = lab.host("a")?;
    let uid = host.run(["sh", "-euc", ADMIT])?.trim().to_owned();
    let socket = format!("/run/user/{uid}/podman/podman.sock");
    let mut program: Vec<String> = ["sh", "-euc", AS_USER, "sh", USER, &uid]
        .map(str::to_owned)
        .into();
    program.extend(words("podman --log-level error"));
    let service = format!("system service --time 0 unix://{socket}");
    let service: Vec<String> = program.iter().cloned().chain(words(&service)).collect();
    host.spawn_logged("podman", service)?;
    wait_for("the user's API socket", Duration::from_secs(20), || {
        Ok(host.path(&socket).exists().then_some(()))
    })
    .with_context(|| log_tail(&host.log("podman"), 2000))?;
    let runtime = CommandLine {
        name: ROOTLESS,
        host,
        program,
        image: TALKER,
        socket,
    };
    run_cases(&runtime, &cases::all(&host.address().to_string()))
}

/// All kinds under Docker, with its proxy for published ports or without.
///
/// # Errors
/// The lab, Docker or the agent did not do what it must.
pub fn docker(proxy: bool) -> Result<Vec<Outcome>> {
    let lab = Lab::up(&bare("topo-docker"))?;
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
    let program = words(&format!("docker --host unix://{DOCKER_SOCKET}"));
    wait_for("dockerd", Duration::from_secs(30), || {
        Ok(host
            .run(program.iter().map(String::as_str).chain(["version"]))
            .ok())
    })
    .with_context(|| log_tail(&host.log("dockerd"), 2000))?;
    let runtime = CommandLine {
        name: if proxy {
            "Docker"
        } else {
            "Docker, no userland proxy"
        },
        host,
        program,
        image: "talker:demo",
        socket: DOCKER_SOCKET.to_owned(),
    };
    let mut cases = cases::all(&host.address().to_string());
    cases.retain(|case| case.kind != POD);
    if !proxy {
        // The host's own loopback cannot be translated: that is what the proxy is for.
        cases.retain(|case| !case.kind.contains("host's loopback"));
    }
    run_cases(&runtime, &cases)
}

/// A host on which no runtime is started.
pub(super) fn bare(name: &str) -> LabSpec {
    LabSpec {
        name: format!("{name}-{}", std::process::id()),
        hosts: vec![HostSpec {
            containers: false,
            ..HostSpec::from("a")
        }],
    }
}
