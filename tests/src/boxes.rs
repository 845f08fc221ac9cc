//! Containers of busybox in lab hosts, for the tests of container runtimes.

use anyhow::{Context as _, Result, ensure};
use lifeboat::containers::{Runtime, Runtimes, Scope};
use lifeboat::model::container::{Container, State};
use std::fs;
use std::time::{Duration, Instant};
use xtask::lab::{Host, Lab, LabSpec, PODMAN_SOCKET};
use xtask::process::{is_root, wait_for};

/// One second.
pub const SECOND: Duration = Duration::from_secs(1);

/// A lab with these hosts, each with the image `localhost/box:1`; `None`, and said, where there can be
/// none.
///
/// # Errors
/// When the lab does not come up.
pub fn lab(name: &str, hosts: &[&str]) -> Result<Option<Lab>> {
    if !is_root() {
        eprintln!("skipped: lab hosts need root");
        return Ok(None);
    }
    let lab = Lab::up(&LabSpec::of(name, hosts))?;
    for host in lab.hosts() {
        let import = "tar -c -C /tmp/image . | podman import - localhost/box:1 2>&1";
        host.run(["sh", "-c", &format!("{ROOT}{import}")])?;
    }
    Ok(Some(lab))
}

/// Shell commands that make a root file system of nothing but busybox in `/tmp/image`.
pub const ROOT: &str = "mkdir -p /tmp/image/bin /tmp/image/etc /tmp/image/tmp
cp \"$(command -v busybox)\" /tmp/image/bin/busybox
for applet in sh sleep nc httpd echo cat touch test; do ln -sf busybox /tmp/image/bin/$applet; done
echo root:x:0:0::/:/bin/sh >/tmp/image/etc/passwd
";

/// Socket of the host's Podman, as seen from outside.
pub fn socket(host: &Host) -> String {
    host.path(PODMAN_SOCKET).display().to_string()
}

/// The host's Podman within the host's cgroups.
pub fn runtimes(host: &Host) -> Runtimes {
    let scope = Scope {
        cgroup_root: host.cgroup().to_owned(),
    };
    Runtimes::new(&[socket(host)], scope)
}

/// The host's Podman.
pub fn runtime(host: &Host) -> Runtime {
    Runtime::new(&socket(host))
}

/// `podman run -d --name NAME ARGS… localhost/box:1 COMMAND…`; returns the id.
///
/// # Errors
/// What Podman says.
pub fn start(host: &Host, name: &str, args: &[&str], command: &[&str]) -> Result<String> {
    let mut all = vec!["run", "--detach", "--name", name];
    all.extend(args);
    all.push("localhost/box:1");
    all.extend(command);
    Ok(host.podman(all)?.trim().to_owned())
}

/// Kills the container's process as a crash would, and returns its pid.
///
/// # Errors
/// It does not run.
pub async fn crash(host: &Host, api: &Runtime, name: &str) -> Result<i64> {
    let pid = pid(api, name).await?;
    host.run(["kill", "-9", &pid.to_string()])?;
    Ok(pid)
}

/// Waits until the container runs again after the process `before`.
///
/// # Errors
/// It does not.
pub async fn comes_back(api: &Runtime, name: &str, before: i64) -> Result<()> {
    let until = Instant::now() + 20 * SECOND;
    loop {
        let running = api.state(name).await? == State::Running;
        if running && pid(api, name).await? != before {
            return Ok(());
        }
        ensure!(Instant::now() < until, "{name} was not started again");
        tokio::time::sleep(SECOND / 20).await;
    }
}

async fn pid(api: &Runtime, name: &str) -> Result<i64> {
    let pid = api.inspect(name).await?["State"]["Pid"].as_i64();
    pid.context("a container without a process")
}

/// Processes in the cgroup `/plain` that no runtime knows.
///
/// # Errors
/// When they do not start.
pub fn start_bare(host: &Host) -> Result<()> {
    host.spawn_logged("plain", ["sleep", "1000"])?;
    let procs = host.cgroup().join("plain/cgroup.procs");
    wait_for("the bare cgroup", 10 * SECOND, || {
        Ok((!fs::read_to_string(&procs)?.is_empty()).then_some(()))
    })
}

/// The discovered container of this name.
///
/// # Errors
/// When there is none; the message shows what there is.
pub fn by_name<'a>(containers: &'a [Container], name: &str) -> Result<&'a Container> {
    containers
        .iter()
        .find(|container| container.name.as_str() == name)
        .with_context(|| format!("{name} was not discovered among {containers:#?}"))
}
