//! Lab hosts on one machine: each with its own mount, network, UTS and cgroup namespaces and Podman
//! storage, joined by a bridge.
//!
//! Invariants: a lab's processes are all in one cgroup2 subtree and its files all under `target/lab/NAME`,
//! so that ending the one and removing the other leaves nothing behind; namespaces, mounts and links end
//! with their last process. A lab ends when its [`Lab`] is dropped, on Ctrl-C, on SIGTERM and in a panic.
//! Non-goal: isolation. The hosts share one kernel, one process table and one set of CPUs.

mod cgroup;
pub mod command;
mod fabric;
pub(crate) mod far;
mod fault;
mod host;
pub mod kernels;

use std::fs;
use std::io::ErrorKind;
use std::net::Ipv4Addr;
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::process::{self, Child};
use std::sync::{LazyLock, Mutex, Once, PoisonError};
use std::thread::{self, ScopedJoinHandle};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use self::cgroup::Cgroup;
use self::fabric::Fabric;
pub use self::fault::Fault;
pub use self::host::{Host, HostSpec, PODMAN_SOCKET};
use crate::workspace;

/// What a lab is asked to be.
#[derive(Debug, Clone)]
pub struct LabSpec {
    /// Name of the lab: lower-case letters, digits and `-`. Two labs of different names do not meet.
    pub name: String,
    /// Its hosts, in the order of their addresses.
    pub hosts: Vec<HostSpec>,
}

impl LabSpec {
    /// A lab of hosts with containers and all CPUs, for a test or a command of this process alone.
    #[must_use]
    pub fn of(name: &str, hosts: &[&str]) -> Self {
        Self {
            name: format!("{name}-{}", process::id()),
            hosts: hosts.iter().map(|host| HostSpec::from(*host)).collect(),
        }
    }
}

/// A lab that is up. Dropping it ends it, unless it was opened or left running.
#[derive(Debug)]
pub struct Lab {
    name: String,
    fabric: Fabric,
    hosts: Vec<Host>,
    children: Vec<Child>,
    owned: bool,
}

/// What `target/lab/NAME/lab.json` remembers.
#[derive(Debug, Serialize, Deserialize)]
struct State {
    /// The process whose end should end the lab; `None` when a person left it running.
    owner: Option<u32>,
    fabric: u32,
    hosts: Vec<Host>,
}

/// Labs this process must end when it is interrupted.
static LIVE: LazyLock<Mutex<Vec<String>>> = LazyLock::new(Mutex::default);

fn live() -> std::sync::MutexGuard<'static, Vec<String>> {
    LIVE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn end_on_signal() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let installed = ctrlc::set_handler(|| {
            for name in live().drain(..) {
                if let Err(error) = remove(&name) {
                    eprintln!("lab {name} could not be ended: {error:#}; end it with `cargo xtask lab --lab {name} down`");
                }
            }
            process::exit(130);
        });
        if let Err(error) = installed {
            eprintln!("Ctrl-C will not end the lab ({error}): use `cargo xtask lab down`");
        }
    });
}

fn directory(name: &str) -> PathBuf {
    workspace::target().join("lab").join(name)
}

fn valid(name: &str, limit: usize) -> bool {
    !name.is_empty()
        && name.len() <= limit
        && name
            .bytes()
            .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-')
}

/// Ends the lab `name`, whatever is left of it: processes, cgroups, files.
fn remove(name: &str) -> Result<()> {
    Cgroup::of_lab(name)?.kill_and_remove()?;
    let dir = directory(name);
    match fs::remove_dir_all(&dir) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("cannot remove {}", dir.display()));
        }
        _ => {}
    }
    Ok(())
}

/// Ends labs whose owner was killed before it could.
fn remove_orphans() -> Result<()> {
    for name in names()? {
        let owner = state(&name).ok().and_then(|state| state.owner);
        if owner.is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists()) {
            remove(&name)?;
        }
    }
    Ok(())
}

/// Names of the labs that have files.
fn names() -> Result<Vec<String>> {
    let dir = workspace::target().join("lab");
    if !dir.exists() {
        return Ok(Vec::new());
    }
    let mut names = Vec::new();
    for entry in fs::read_dir(dir)? {
        names.extend(entry?.file_name().into_string());
    }
    names.sort();
    Ok(names)
}

fn state(name: &str) -> Result<State> {
    let path = directory(name).join("lab.json");
    let text = fs::read(&path).with_context(|| {
        format!(
            "no lab {name:?} is up ({} is missing): `cargo xtask lab up`",
            path.display()
        )
    })?;
    serde_json::from_slice(&text).with_context(|| {
        format!(
            "{} is damaged: `cargo xtask lab --lab {name} down`",
            path.display()
        )
    })
}

/// Builds one host, plugs it in and starts Podman in it.
fn start(
    spec: &HostSpec,
    address: Ipv4Addr,
    dir: &Path,
    cgroup: &Cgroup,
    names: &str,
    fabric: &Fabric,
) -> Result<(Host, Vec<Child>)> {
    let (host, child) = Host::start(spec, address, dir, cgroup, names)?;
    let mut children = vec![child];
    fabric.plug(&host)?;
    if spec.containers {
        children.push(host.start_podman()?);
    }
    Ok((host, children))
}

impl Lab {
    /// Builds the hosts, joins them and starts Podman in them.
    ///
    /// # Errors
    /// Not root, a bad name, a lab of that name is up, or a step failed: then nothing of it is left.
    pub fn up(spec: &LabSpec) -> Result<Self> {
        ensure!(
            crate::process::is_root(),
            "lab hosts need root: run it with sudo"
        );
        ensure!(
            valid(&spec.name, 40),
            "lab name {:?}: use lower-case letters, digits and `-`",
            spec.name
        );
        ensure!(spec.hosts.len() <= 200, "a lab has at most 200 hosts");
        for host in &spec.hosts {
            ensure!(
                valid(&host.name, 12),
                "host name {:?}: use at most 12 lower-case letters, digits and `-`",
                host.name
            );
        }
        remove_orphans()?;
        let cgroup = Cgroup::of_lab(&spec.name)?;
        if cgroup.populated() {
            bail!(
                "lab {:?} is up already: end it with `cargo xtask lab --lab {} down`",
                spec.name,
                spec.name
            );
        }
        remove(&spec.name)?;

        end_on_signal();
        live().push(spec.name.clone());
        // From here on dropping `lab` removes whatever the failed step left.
        let mut lab = Self {
            name: spec.name.clone(),
            fabric: Fabric { pid: 0 },
            hosts: Vec::new(),
            children: Vec::new(),
            owned: true,
        };
        let dir = directory(&spec.name);
        fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        lab.save()?;
        cgroup.create()?;
        let (fabric, child) = Fabric::start(&cgroup)?;
        lab.children.push(child);
        lab.fabric = fabric;

        let mut known = String::from("127.0.0.1 localhost\n::1 localhost\n");
        for (index, host) in (0u8..).zip(&spec.hosts) {
            known.push_str(&format!("{} {}\n", fabric::host_address(index), host.name));
        }
        // Side by side: a host's start is mostly waiting.
        let (dir, cgroup, known) = (&dir, &cgroup, &known);
        let starts: Vec<Result<_>> = thread::scope(|scope| {
            let starts = (0u8..).zip(&spec.hosts).map(|(index, host)| {
                let address = fabric::host_address(index);
                let fabric = &lab.fabric;
                scope.spawn(move || start(host, address, dir, cgroup, known, fabric))
            });
            let starts: Vec<_> = starts.collect();
            let join = |start: ScopedJoinHandle<_>| {
                start.join().unwrap_or_else(|panic| resume_unwind(panic))
            };
            starts.into_iter().map(join).collect()
        });
        for start in starts {
            let (host, children) = start?;
            lab.children.extend(children);
            lab.hosts.push(host);
        }
        lab.save()?;
        Ok(lab)
    }

    /// A lab that is up already. Dropping it does not end it.
    ///
    /// # Errors
    /// No such lab is up.
    pub fn open(name: &str) -> Result<Self> {
        let state = state(name)?;
        ensure!(
            Cgroup::of_lab(name)?.populated(),
            "lab {name:?} is not running any more: `cargo xtask lab --lab {name} down` clears its files"
        );
        Ok(Self {
            name: name.to_owned(),
            fabric: Fabric { pid: state.fabric },
            hosts: state.hosts,
            children: Vec::new(),
            owned: false,
        })
    }

    fn save(&self) -> Result<()> {
        let state = State {
            owner: self.owned.then(process::id),
            fabric: self.fabric.pid,
            hosts: self.hosts.clone(),
        };
        let path = directory(&self.name).join("lab.json");
        fs::write(&path, serde_json::to_vec_pretty(&state)?)
            .with_context(|| format!("cannot write {}", path.display()))
    }

    /// Lets the lab outlive this process, until `lab down`.
    ///
    /// # Errors
    /// The lab's state cannot be written.
    pub fn leave_running(mut self) -> Result<()> {
        self.owned = false;
        live().retain(|name| *name != self.name);
        self.save()
    }

    /// Ends the lab and says whether everything went.
    ///
    /// # Errors
    /// A process or a file did not go; the message names it.
    pub fn down(mut self) -> Result<()> {
        self.owned = false;
        self.end()
    }

    fn end(&mut self) -> Result<()> {
        let result = remove(&self.name);
        for child in &mut self.children {
            // Killed above; this only takes the exit status away.
            let _ = child.wait();
        }
        live().retain(|name| *name != self.name);
        result
    }

    /// Name of the lab.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The lab's files: a directory for each host, with `logs/` in it.
    #[must_use]
    pub fn dir(&self) -> PathBuf {
        directory(&self.name)
    }

    /// All hosts.
    #[must_use]
    pub fn hosts(&self) -> &[Host] {
        &self.hosts
    }

    /// The host of that name.
    ///
    /// # Errors
    /// There is none; the message lists those there are.
    pub fn host(&self, name: &str) -> Result<&Host> {
        self.hosts
            .iter()
            .find(|host| host.name == name)
            .with_context(|| {
                let names: Vec<_> = self.hosts.iter().map(Host::name).collect();
                format!(
                    "lab {:?} has no host {name:?}; it has {}",
                    self.name,
                    names.join(", ")
                )
            })
    }

    /// Caps both directions of the host's link, in Mbit/s; `None` lifts the cap.
    ///
    /// # Errors
    /// `tc` refused.
    pub fn shape(&self, host: &Host, mbit: Option<u32>) -> Result<()> {
        self.fabric.shape(host, mbit)
    }

    /// Drops `percent` of the packets from and to the host; 0 ends it.
    ///
    /// # Errors
    /// `nft` refused.
    pub fn loss(&self, host: &Host, percent: u8) -> Result<()> {
        self.fabric.loss(host, percent)
    }

    /// Cuts (or joins again) two hosts from each other; both still reach the rest.
    ///
    /// # Errors
    /// `nft` refused.
    pub fn partition(&self, a: &Host, b: &Host, cut: bool) -> Result<()> {
        self.fabric.partition(a, b, cut)
    }

    /// Pulls (`up` false) or plugs the host's cable.
    ///
    /// # Errors
    /// `ip` refused.
    pub fn link(&self, host: &Host, up: bool) -> Result<()> {
        self.fabric.link(host, up)
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if self.owned
            && let Err(error) = self.end()
        {
            eprintln!("lab {} could not be ended: {error:#}", self.name);
        }
    }
}
