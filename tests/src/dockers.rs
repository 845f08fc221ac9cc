//! Lab hosts with Docker in place of Podman.

use anyhow::{Context as _, Result};
use std::process::Command;
use xtask::lab::{Host, HostSpec, Lab, LabSpec};
use xtask::process::{is_root, log_tail, wait_for};

use crate::boxes::{ROOT, SECOND};

const SOCKET: &str = "/run/docker.sock";

/// Storage on the real disk, and limits a machine without CAP_SYS_RESOURCE can set.
const CONFIG: &str = r#"{"data-root": "/srv/docker", "exec-root": "/run/docker",
"pidfile": "/run/docker.pid", "hosts": ["unix:///run/docker.sock"], "default-ulimits": {
"nofile": {"Name": "nofile", "Hard": 16384, "Soft": 16384},
"nproc": {"Name": "nproc", "Hard": 16384, "Soft": 16384}}}"#;

/// A lab of `hosts` with Docker, the image `box:1` in the first of them, and of `more` hosts without containers;
/// `None`, and said, where there can be none.
///
/// # Errors
/// When the lab or a dockerd does not come up.
pub fn lab(name: &str, hosts: &[&str], more: &[&str]) -> Result<Option<Lab>> {
    if !is_root() {
        eprintln!("skipped: lab hosts need root");
        return Ok(None);
    }
    if Command::new("dockerd").arg("--version").output().is_err() {
        eprintln!("skipped: there is no dockerd (Debian: docker.io)");
        return Ok(None);
    }
    let mut spec = LabSpec::of(name, &[]);
    spec.hosts = hosts
        .iter()
        .chain(more)
        .map(|host| HostSpec {
            containers: false,
            ..HostSpec::from(*host)
        })
        .collect();
    let lab = Lab::up(&spec)?;
    let dockers = hosts.iter().map(|host| lab.host(host));
    let dockers = dockers.collect::<Result<Vec<_>>>()?;
    for host in &dockers {
        host.write("/etc/docker/lab.json", CONFIG)?;
        host.spawn_logged(
            "docker",
            ["dockerd", "--config-file", "/etc/docker/lab.json"],
        )?;
    }
    for host in &dockers {
        wait_for("dockerd", 30 * SECOND, || {
            Ok(docker(host, &["version"]).ok())
        })
        .with_context(|| log_tail(&host.log("docker"), 3000))?;
    }
    let import = "tar -c -C /tmp/image . | docker --host unix:///run/docker.sock import - box:1";
    let script = format!("{ROOT}{import}");
    dockers[0].run(["sh", "-c", &script])?;
    Ok(Some(lab))
}

/// Runs Docker's command line inside the host.
///
/// # Errors
/// What Docker says.
pub fn docker(host: &Host, args: &[&str]) -> Result<String> {
    let mut all = vec!["docker", "--host", "unix:///run/docker.sock"];
    all.extend(args);
    Ok(host.run(all)?.trim().to_owned())
}

/// Socket of the host's Docker, as seen from outside.
pub fn socket(host: &Host) -> String {
    host.path(SOCKET).display().to_string()
}
