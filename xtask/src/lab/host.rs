//! One lab host: its own mount, network, UTS and cgroup namespaces over the machine's root file system.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use super::cgroup::Cgroup;
use crate::process::{log_tail, output, wait_for};
use crate::workspace;

/// Builds the host's view; see there for what is private and why.
const BODY: &str = include_str!("host.sh");

/// Joins a cgroup before it becomes the command, so that no instant of it runs outside.
const PLACED: &str = r#"echo $$ >"$0/cgroup.procs" && exec "$@""#;

/// Podman's API socket inside a lab host.
pub const PODMAN_SOCKET: &str = "/run/podman/podman.sock";

/// What a lab host is asked to be.
#[derive(Debug, Clone)]
pub struct HostSpec {
    /// Host name, also its name for the other hosts: lower-case letters, digits and `-`, at most 12.
    pub name: String,
    /// CPUs its processes may use, as `taskset` writes them; all when `None`. A host that shares no CPU
    /// with the others can be starved without starving them.
    pub cpus: Option<String>,
    /// Whether Podman's API is started in it.
    pub containers: bool,
}

impl From<&str> for HostSpec {
    fn from(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            cpus: None,
            containers: true,
        }
    }
}

/// A lab host that is up.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Host {
    pub(super) name: String,
    pub(super) address: Ipv4Addr,
    pub(super) cpus: Option<String>,
    /// The process that keeps the namespaces alive.
    pub(super) pid: u32,
    dir: PathBuf,
    cgroup: PathBuf,
}

impl Host {
    /// Starts the host's first process and waits until its view is built. The network has no link yet.
    pub(super) fn start(
        spec: &HostSpec,
        address: Ipv4Addr,
        lab_dir: &Path,
        lab_cgroup: &Cgroup,
        names: &str,
    ) -> Result<(Self, Child)> {
        let dir = lab_dir.join(&spec.name);
        fs::create_dir_all(dir.join("logs"))
            .with_context(|| format!("cannot make {}", dir.display()))?;
        fs::write(dir.join("hosts"), names)?;
        fs::write(dir.join("containers.conf"), include_str!("containers.conf"))?;
        let cgroup = lab_cgroup.child(&spec.name);
        cgroup.create()?;
        let log = dir.join("logs/host.log");
        let mut child = Command::new("setsid")
            .args(["sh", "-c", PLACED])
            .arg(cgroup.path())
            .args(["unshare", "--mount", "--net", "--uts", "--cgroup"])
            .args(["--propagation", "private", "sh", "-c", BODY])
            .env("HOST_NAME", &spec.name)
            .env("HOST_DIR", &dir)
            .env("WORKSPACE", workspace::root())
            .stdin(Stdio::null())
            .stdout(File::create(&log)?)
            .stderr(File::options().append(true).open(&log)?)
            .spawn()
            .context("cannot start `setsid` (package util-linux)")?;
        let host = Self {
            name: spec.name.clone(),
            address,
            cpus: spec.cpus.clone(),
            pid: child.id(),
            dir,
            cgroup: cgroup.path().to_owned(),
        };
        let ready = host.path("/run/lab-ready");
        let up = wait_for("the host's view", Duration::from_secs(15), || {
            if ready.exists() {
                return Ok(Some(()));
            }
            match child.try_wait()? {
                Some(status) => bail!("its first process ended with {status}"),
                None => Ok(None),
            }
        });
        if let Err(error) = up {
            // Ended and reaped here, because the caller never gets to know it.
            child.kill()?;
            child.wait()?;
            let log = log_tail(&log, 2000);
            return Err(error.context(format!("lab host {} did not come up: {log}", host.name)));
        }
        Ok((host, child))
    }

    /// Starts Podman's API, as a lab host's operator would with systemd's socket.
    pub(super) fn start_podman(&self) -> Result<Child> {
        let url = format!("unix://{PODMAN_SOCKET}");
        let child = self.spawn_logged(
            "podman",
            [
                "podman",
                "--log-level",
                "error",
                "system",
                "service",
                "--time",
                "0",
                &url,
            ],
        )?;
        let socket = self.path(PODMAN_SOCKET);
        wait_for("Podman's API socket", Duration::from_secs(20), || {
            Ok(socket.exists().then_some(()))
        })
        .with_context(|| {
            let log = log_tail(&self.log("podman"), 2000);
            format!("Podman did not start in lab host {}: {log}", self.name)
        })?;
        Ok(child)
    }

    /// Host name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its address on the lab's bridge.
    #[must_use]
    pub fn address(&self) -> Ipv4Addr {
        self.address
    }

    /// A path inside the host, as seen from outside it.
    #[must_use]
    pub fn path(&self, inside: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root{inside}", self.pid))
    }

    /// Log file of [`Host::spawn_logged`].
    #[must_use]
    pub fn log(&self, name: &str) -> PathBuf {
        self.dir.join("logs").join(format!("{name}.log"))
    }

    /// The host's subtree in the machine's cgroup2 hierarchy.
    #[must_use]
    pub fn cgroup(&self) -> &Path {
        &self.cgroup
    }

    /// Bytes that its network interface has received.
    ///
    /// # Errors
    /// The kernel does not say.
    pub fn received(&self) -> Result<u64> {
        let path = format!("/proc/{}/net/dev", self.pid);
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
        text.lines()
            .find_map(|line| line.trim().strip_prefix("eth0:"))
            .and_then(|line| line.split_whitespace().next())
            .and_then(|bytes| bytes.parse().ok())
            .with_context(|| format!("{path} does not count the bytes of eth0"))
    }

    /// Writes a file inside the host, with its parent directories.
    ///
    /// # Errors
    /// The file cannot be written; the message names it.
    pub fn write(&self, inside: &str, contents: impl AsRef<[u8]>) -> Result<()> {
        let path = self.path(inside);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).with_context(|| {
                format!("cannot make the directory of {inside} in {}", self.name)
            })?;
        }
        fs::write(&path, contents)
            .with_context(|| format!("cannot write {inside} in lab host {}", self.name))
    }

    /// A command that will run inside the host. Its process id is the program's own: nothing stays
    /// between.
    #[must_use]
    pub fn command<I, S>(&self, argv: I) -> Command
    where
        I: IntoIterator<Item = S>,
        S: AsRef<OsStr>,
    {
        self.command_in("init", argv)
    }

    /// As [`Host::command`], in the host's cgroup `cgroup`, which must exist.
    fn command_in<I, S>(&self, cgroup: &str, argv: I) -> Command
    where
        I: IntoIterator<Item = S>,
        S: AsRef<OsStr>,
    {
        let mut command = Command::new("sh");
        command.args(["-c", PLACED]).arg(self.cgroup.join(cgroup));
        command.args(["nsenter", "--target", &self.pid.to_string()]);
        command.args(["--mount", "--net", "--uts", "--cgroup", "--"]);
        if let Some(cpus) = &self.cpus {
            command.args(["taskset", "--cpu-list", cpus]);
        }
        command.args(argv);
        command
    }

    /// Runs a command inside the host and returns its standard output.
    ///
    /// # Errors
    /// The command could not be started or failed; the message holds what it wrote to standard error.
    pub fn run<I, S>(&self, argv: I) -> Result<String>
    where
        I: IntoIterator<Item = S>,
        S: AsRef<OsStr>,
    {
        output(&mut self.command(argv)).with_context(|| format!("in lab host {}", self.name))
    }

    /// Runs Podman's command line inside the host.
    ///
    /// # Errors
    /// As [`Host::run`].
    pub fn podman<I, S>(&self, args: I) -> Result<String>
    where
        I: IntoIterator<Item = S>,
        S: AsRef<OsStr>,
    {
        let mut command = self.command(["podman", "--log-level", "error"]);
        command.args(args);
        output(&mut command).with_context(|| format!("in lab host {}", self.name))
    }

    /// Starts a long-running program inside the host, in a cgroup of its own, with its output in
    /// [`Host::log`]. It outlives the returned handle and ends with the lab.
    ///
    /// # Errors
    /// The log or the cgroup cannot be made, or the program cannot be started.
    pub fn spawn_logged<I, S>(&self, name: &str, argv: I) -> Result<Child>
    where
        I: IntoIterator<Item = S>,
        S: AsRef<OsStr>,
    {
        let cgroup = self.cgroup.join(name);
        fs::create_dir_all(&cgroup)
            .with_context(|| format!("cannot make the cgroup {}", cgroup.display()))?;
        let path = self.log(name);
        let log = File::options()
            .create(true)
            .append(true)
            .open(&path)
            .with_context(|| format!("cannot open the log {}", path.display()))?;
        let placed = self.command_in(name, argv);
        // A session of its own: Ctrl-C on the terminal is for the task, which then ends the lab in order.
        Command::new("setsid")
            .arg(placed.get_program())
            .args(placed.get_args())
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("cannot start {name} in lab host {}", self.name))
    }
}
