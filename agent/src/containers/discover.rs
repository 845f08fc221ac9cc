//! Which containers this host has, from all its runtimes and from its cgroups.
//!
//! Invariants: a runtime that does not answer is a problem in the result, never a failure; the same
//! cgroup is never shown twice; a container is inspected again only when its state or its first process
//! changed; looking every second does not ask a runtime that has nothing new ([`super::follow`]).

use super::cgroups::Scope;
use super::client::{Runtime, RuntimeError};
use super::containerd::Containerd;
use super::devices::keep_block_devices;
use super::follow::Follow;
use super::inspect;
use crate::model::container::Container;
use crate::model::ids::ContainerName;
use futures_util::future::join_all;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// What is there, and what could not be looked at.
#[derive(Clone, Debug, Default)]
pub struct Discovery {
    /// Containers of all runtimes in any state, then cgroups nobody claims; by name.
    pub containers: Vec<Container>,
    /// What went wrong, for people; empty when everything was seen.
    pub problems: Vec<String>,
    /// Containers that runtimes told of lately, by id; they may be gone before anybody could look.
    pub heard: BTreeMap<String, ContainerName>,
}

/// All runtimes of this host, joined with its cgroups.
#[derive(Debug)]
pub struct Runtimes {
    runtimes: Vec<Runtime>,
    containerd: Vec<Containerd>,
    scope: Scope,
    registration_env: Option<String>,
    /// One for each runtime, in the same order.
    followed: Vec<tokio::sync::Mutex<Follow>>,
    /// Ids of cgroups that no runtime claims, as [`Runtimes::follow`] last saw them.
    bare: Mutex<BTreeSet<u64>>,
    /// By runtime socket and container id.
    known: Mutex<HashMap<(String, String), Known>>,
}

/// What one runtime showed.
#[derive(Clone, Debug, Default)]
pub(super) struct Look {
    pub(super) containers: Vec<Container>,
    pub(super) problems: Vec<String>,
}

#[derive(Clone, Debug)]
struct Known {
    container: Container,
    /// The list's word for its state when it was inspected.
    listed: String,
    /// The first process, which a number that is used again does not stand for.
    process: Option<Arc<OwnedFd>>,
}

impl Runtimes {
    /// The runtimes at these sockets, seen through a cgroup scope; one called `containerd.sock` is
    /// containerd's. Does no I/O.
    #[must_use]
    pub fn new(sockets: &[String], scope: Scope) -> Self {
        let all = sockets.iter().map(|socket| Runtime::new(socket));
        let (containerd, runtimes): (Vec<Runtime>, Vec<Runtime>) =
            all.partition(|runtime| runtime.socket().ends_with("containerd.sock"));
        Self {
            followed: runtimes.iter().map(|_| Default::default()).collect(),
            runtimes,
            containerd: containerd
                .iter()
                .map(|runtime| Containerd::at(runtime.socket()))
                .collect(),
            scope,
            registration_env: None,
            bare: Mutex::default(),
            known: Mutex::default(),
        }
    }

    /// Has containers' environment looked at for a registration id, too.
    #[must_use]
    pub fn registered_by(mut self, variable: Option<String>) -> Self {
        self.registration_env = variable;
        self
    }

    /// Every runtime that can be asked, in the order of the configuration.
    #[must_use]
    pub fn all(&self) -> &[Runtime] {
        &self.runtimes
    }

    /// The runtime with this socket, as [`Container::runtime`] names it.
    #[must_use]
    pub fn get(&self, socket: &str) -> Option<&Runtime> {
        let wanted = Runtime::new(socket);
        self.runtimes
            .iter()
            .find(|runtime| runtime.socket() == wanted.socket())
    }

    /// The runtime that owns a container; `None` for a bare cgroup.
    #[must_use]
    pub fn of(&self, container: &Container) -> Option<&Runtime> {
        self.get(container.runtime.as_deref()?)
    }

    /// The scope.
    #[must_use]
    pub fn scope(&self) -> &Scope {
        &self.scope
    }

    /// Looks at everything once, now.
    pub async fn discover(&self) -> Discovery {
        let seen = join_all(self.runtimes.iter().map(|runtime| self.look(runtime))).await;
        self.join(seen)
    }

    /// As [`Runtimes::discover`] for a caller that looks again and again: a runtime is asked only when it
    /// told of a change, when a first process ended or a cgroup appeared, and now and then to be sure.
    /// Meant for one caller.
    pub async fn follow(&self) -> Discovery {
        let mut discovery = self.join(self.look_where_needed(false).await);
        if !self.are_known(&discovery) {
            // A cgroup can be seen before its runtime has told of it.
            discovery = self.join(self.look_where_needed(true).await);
            self.know(&discovery);
        }
        for followed in &self.followed {
            for (id, name) in followed.lock().await.heard() {
                let name = ContainerName(name.clone());
                discovery.heard.insert(id.clone(), name);
            }
        }
        discovery
    }

    async fn look_where_needed(&self, everywhere: bool) -> Vec<Result<Look, RuntimeError>> {
        let each = self.runtimes.iter().zip(&self.followed);
        join_all(each.map(|(runtime, followed)| async move {
            let mut followed = followed.lock().await;
            let ask = followed.may_have_changed(runtime).await || everywhere;
            if let Some(last) = followed.last()
                && !ask
                && self.all_alive(&last.containers)
            {
                return Ok(last.clone());
            }
            let seen = match followed.last() {
                // The first look inspects every container.
                None => self.look(runtime).await,
                Some(_) => tokio::time::timeout(PATIENCE, self.look(runtime))
                    .await
                    .unwrap_or_else(|_| Err(silent(runtime))),
            };
            let answered = seen.is_ok();
            let mut look = followed.remember(seen)?;
            if !answered {
                let alive = |one: &Container| self.all_alive(std::slice::from_ref(one));
                look.containers.retain(alive);
            }
            Ok(look)
        }))
        .await
    }

    fn join(&self, seen: Vec<Result<Look, RuntimeError>>) -> Discovery {
        let mut discovery = Discovery::default();
        for seen in seen {
            match seen {
                Ok(look) => {
                    discovery.containers.extend(look.containers);
                    discovery.problems.extend(look.problems);
                }
                Err(error) => discovery.problems.push(error.to_string()),
            }
        }
        self.forget_gone(&discovery.containers);
        let starting = self.add_tasks(&mut discovery);
        self.add_unclaimed(&mut discovery, starting);
        discovery.containers.sort_by(|a, b| a.name.cmp(&b.name));
        discovery
    }

    /// Whether every first process is still the one that was seen.
    fn all_alive(&self, containers: &[Container]) -> bool {
        let known = self.known();
        let running = containers.iter().filter(|container| container.pid != 0);
        let processes: Option<Vec<&OwnedFd>> = running
            .map(|container| {
                let key = (container.runtime.clone()?, container.id.clone());
                known.get(&key)?.process.as_deref()
            })
            .collect();
        processes.is_some_and(|processes| run(&processes))
    }

    /// Whether no bare cgroup is there that was not there after the last look by [`Runtimes::know`].
    fn are_known(&self, discovery: &Discovery) -> bool {
        let known = self.bare.lock().unwrap_or_else(PoisonError::into_inner);
        bare_cgroups(discovery).all(|cgroup| known.contains(&cgroup))
    }

    fn know(&self, discovery: &Discovery) {
        let mut known = self.bare.lock().unwrap_or_else(PoisonError::into_inner);
        *known = bare_cgroups(discovery).collect();
    }

    async fn look(&self, runtime: &Runtime) -> Result<Look, RuntimeError> {
        let list: Vec<Value> = runtime
            .get("/containers/json?all=true", "list containers")
            .await?;
        let mut containers = Vec::with_capacity(list.len());
        let mut problems = Vec::new();
        let pods = pods(runtime).await.unwrap_or_else(|error| {
            problems.push(error.to_string());
            HashMap::new()
        });
        for entry in &list {
            let id = entry["Id"].as_str().unwrap_or_default();
            let listed = &listed(entry);
            let mut container = match self.unchanged(runtime, id, listed) {
                Some(container) => container,
                None => match self.look_closer(runtime, id, listed, &mut problems).await {
                    Ok(Some(container)) => container,
                    Ok(None) => continue,
                    // Removed since the list was made.
                    Err(error) if error.not_found() => continue,
                    Err(error) => {
                        problems.push(error.to_string());
                        continue;
                    }
                },
            };
            let pod = pods.get(id).map(|pod| format!("pod {pod}"));
            container.registration_ids.extend(pod);
            containers.push(container);
        }
        Ok(Look {
            containers,
            problems,
        })
    }

    fn unchanged(&self, runtime: &Runtime, id: &str, listed: &str) -> Option<Container> {
        let key = (runtime.socket().display().to_string(), id.to_owned());
        let known = self.known().get(&key)?.clone();
        let same_process = known.container.pid == 0
            || known
                .process
                .as_deref()
                .is_some_and(|process| run(&[process]));
        (known.listed == listed && same_process).then_some(known.container)
    }

    /// Inspects one container; `None` when its cgroup lies outside the scope.
    async fn look_closer(
        &self,
        runtime: &Runtime,
        id: &str,
        listed: &str,
        problems: &mut Vec<String>,
    ) -> Result<Option<Container>, RuntimeError> {
        let inspect = runtime.inspect(id).await?;
        let socket = runtime.socket().display().to_string();
        let Some(mut container) =
            inspect::container(&inspect, &socket, self.registration_env.as_deref())
        else {
            problems.push(format!(
                "the runtime at {socket} describes a container without id or name"
            ));
            return Ok(None);
        };
        keep_block_devices(&mut container.mounts, container.pid);
        if container.pid != 0 {
            match self.place(&mut container, problems) {
                Ok(true) => {}
                Ok(false) => return Ok(None),
                // Ended since it was inspected, of which its list's word may say nothing if it began anew: not kept, so
                // that it is inspected the next time.
                Err(_) => {
                    container.pid = 0;
                    self.known().remove(&(socket, id.to_owned()));
                    return Ok(Some(container));
                }
            }
        }
        let known = Known {
            listed: listed.to_owned(),
            process: pidfd(container.pid),
            container: container.clone(),
        };
        self.known().insert((socket, id.to_owned()), known);
        Ok(Some(container))
    }

    /// Fills in the cgroup of a container that runs; false when it lies outside the scope.
    fn place(&self, container: &mut Container, problems: &mut Vec<String>) -> io::Result<bool> {
        let Some(cgroup) = self.scope.cgroup_of(container.pid, &container.id)? else {
            return Ok(false);
        };
        if cgroup.path == "/" {
            problems.push(format!(
                "container {} has no cgroup2 of its own: what the kernel sees of it counts as the host's; \
                 on hybrid cgroups choose the OCI runtime runc",
                container.name
            ));
        }
        (container.cgroup_path, container.cgroup_id) = (cgroup.path, cgroup.id);
        Ok(true)
    }

    /// Adds what containerd runs, but for what runs there for a runtime that was asked. Returns what it is
    /// about to run.
    fn add_tasks(&self, discovery: &mut Discovery) -> Vec<Container> {
        let mut starting = Vec::new();
        let claimed = claimed(&discovery.containers);
        for containerd in &self.containerd {
            let tasks = match containerd.tasks(self.registration_env.as_deref()) {
                Ok(tasks) => tasks,
                Err(error) => {
                    discovery.problems.push(error.to_string());
                    continue;
                }
            };
            for mut task in tasks {
                if task.pid == 0 {
                    starting.push(task);
                    continue;
                }
                let placed = self.place(&mut task, &mut discovery.problems);
                // One that ended meanwhile is gone with the next look.
                if placed.unwrap_or(false) && !claimed.contains(&task.cgroup_path) {
                    discovery.containers.push(task);
                }
            }
        }
        starting
    }

    fn forget_gone(&self, containers: &[Container]) {
        let ids: BTreeSet<&str> = containers.iter().map(|c| c.id.as_str()).collect();
        self.known().retain(|(_, id), _| ids.contains(id.as_str()));
    }

    fn add_unclaimed(&self, discovery: &mut Discovery, mut starting: Vec<Container>) {
        match self.scope.unclaimed(&claimed(&discovery.containers)) {
            Ok(cgroups) => {
                let bare = cgroups.into_iter().map(|(cgroup, pid)| {
                    let of_cgroup = Container::of_cgroup(&cgroup.path, cgroup.id, pid);
                    let last = cgroup.path.rsplit('/').next().unwrap_or_default();
                    let task = starting.iter().position(|task| is_of(last, &task.id));
                    // Already in its cgroup: what it does now must not be somebody else's.
                    task.map_or(of_cgroup.clone(), |task| Container {
                        cgroup_path: of_cgroup.cgroup_path,
                        cgroup_id: of_cgroup.cgroup_id,
                        pid,
                        ..starting.swap_remove(task)
                    })
                });
                discovery.containers.extend(bare);
            }
            Err(error) => discovery.problems.push(format!(
                "cannot walk the cgroups below {}: {error}",
                self.scope.cgroup_root.display()
            )),
        }
    }

    fn known(&self) -> MutexGuard<'_, HashMap<(String, String), Known>> {
        // Every entry is whole by itself, so a panic elsewhere leaves nothing half-written.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Longest wait for a runtime that answered before: one that hangs must not make the view of all others old.
const PATIENCE: Duration = Duration::from_secs(3);

/// The pod of each container that is in one, by id. Podman's compatible API does not tell, and Docker has none.
async fn pods(runtime: &Runtime) -> Result<HashMap<String, String>, RuntimeError> {
    if !runtime.engine().await?.is_podman() {
        return Ok(HashMap::new());
    }
    let pods: Vec<Value> = runtime.get_libpod("/pods/json", "list pods").await?;
    let of = pods.iter().flat_map(|pod| {
        let containers = pod["Containers"].as_array().into_iter().flatten();
        containers.filter_map(|one| {
            Some((
                one["Id"].as_str()?.to_owned(),
                pod["Id"].as_str()?.to_owned(),
            ))
        })
    });
    Ok(of.collect())
}

fn silent(runtime: &Runtime) -> RuntimeError {
    RuntimeError::Timeout {
        socket: runtime.socket().to_owned(),
        operation: "list containers".to_owned(),
        after: PATIENCE,
    }
}

/// What of a list's entry says whether a container is as it was inspected last.
fn listed(entry: &Value) -> String {
    let (names, networks) = (&entry["Names"], &entry["NetworkSettings"]);
    format!("{} {names} {networks}", entry["State"])
}

/// Whether a cgroup's last component is a container's: a whole id (64 digits) may stand within a unit's name.
fn is_of(component: &str, id: &str) -> bool {
    component == id || (id.len() == 64 && component.contains(id))
}

/// The cgroups that are somebody's.
fn claimed(containers: &[Container]) -> BTreeSet<String> {
    let own = |container: &&Container| container.cgroup_path.len() > 1;
    let of = containers.iter().filter(own);
    of.map(|container| container.cgroup_path.clone()).collect()
}

fn bare_cgroups(discovery: &Discovery) -> impl Iterator<Item = u64> {
    let bare = |container: &&Container| container.runtime.is_none();
    let of = discovery.containers.iter().filter(bare);
    of.map(|container| container.cgroup_id)
}

fn pidfd(pid: i32) -> Option<Arc<OwnedFd>> {
    let process = pidfd_open(Pid::from_raw(pid)?, PidfdFlags::empty());
    process.ok().map(Arc::new)
}

/// Whether none of them has ended: then it could be read (pidfd_open(2)).
fn run(processes: &[&OwnedFd]) -> bool {
    let each = processes.iter();
    let mut waiting: Vec<PollFd<'_>> = each
        .map(|process| PollFd::new(process.as_fd(), PollFlags::POLLIN))
        .collect();
    poll(&mut waiting, PollTimeout::ZERO) == Ok(0)
}

/// Field 22 of /proc/PID/stat (proc(5)); the name in field 2 may hold spaces and parentheses.
pub(super) fn start_time(pid: i32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat[stat.rfind(')')? + 2..]
        .split(' ')
        .nth(19)?
        .parse()
        .ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[tokio::test]
    async fn a_runtime_that_is_not_there_is_a_problem_and_not_a_failure() {
        let scope = tempfile::tempdir().unwrap();
        std::fs::write(scope.path().join("cgroup.procs"), "").unwrap();
        let runtimes = Runtimes::new(
            &["/nonexistent/p.sock".to_owned()],
            Scope {
                cgroup_root: scope.path().to_owned(),
            },
        );
        let discovery = runtimes.discover().await;
        assert!(discovery.containers.is_empty());
        assert_eq!(discovery.problems.len(), 1);
        assert!(discovery.problems[0].contains("/nonexistent/p.sock"));
    }

    #[tokio::test]
    async fn who_ended_between_inspection_and_look_is_inspected_the_next_time() {
        // A number that no process has: more than the kernel gives (PID_MAX_LIMIT).
        let ended = 1 << 23;
        let inspected = Arc::new(Mutex::new(0));
        let count = inspected.clone();
        let answer = move |uri: axum::http::Uri| async move {
            let running = json!({ "Status": "running", "Pid": ended });
            axum::Json(match uri.path() {
                path if path.ends_with("/containers/json") => {
                    json!([{ "Id": "c1", "State": "running", "Names": ["/web"] }])
                }
                path if path.ends_with("/version") => json!({ "Version": "27.0.0" }),
                _ => {
                    *count.lock().unwrap() += 1;
                    json!({ "Id": "c1", "Name": "/web", "State": running })
                }
            })
        };
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("cgroup.procs"), "").unwrap();
        let socket = directory.path().join("d.sock");
        let listener = tokio::net::UnixListener::bind(&socket).unwrap();
        let router = axum::Router::new().fallback(answer);
        tokio::spawn(async { axum::serve(listener, router).await });
        let scope = Scope {
            cgroup_root: directory.path().to_owned(),
        };
        let runtimes = Runtimes::new(&[socket.display().to_string()], scope);
        for times in 1..=2 {
            let discovery = runtimes.discover().await;
            assert_eq!(discovery.problems, Vec::<String>::new());
            assert_eq!(discovery.containers[0].pid, 0);
            assert_eq!(*inspected.lock().unwrap(), times);
        }
    }

    #[test]
    fn processes_run_until_one_of_them_has_ended() {
        let mut sleepers = [1, 2].map(|_| {
            let mut sleep = std::process::Command::new("sleep");
            sleep.arg("100").spawn().unwrap()
        });
        let number = |sleeper: &std::process::Child| i32::try_from(sleeper.id()).unwrap();
        let processes = sleepers
            .each_ref()
            .map(|sleeper| pidfd(number(sleeper)).unwrap());
        let processes = processes.each_ref().map(|process| &**process);
        assert!(run(&processes) && run(&[]));
        sleepers[1].kill().unwrap();
        sleepers[1].wait().unwrap();
        assert!(!run(&processes) && run(&processes[..1]));
        sleepers[0].kill().unwrap();
        sleepers[0].wait().unwrap();
        assert!(pidfd(0).is_none());
    }

    #[test]
    fn the_start_time_of_a_live_process_is_read_and_of_a_dead_one_is_not() {
        assert!(start_time(i32::try_from(std::process::id()).unwrap()).is_some());
        assert_eq!(start_time(0), None);
    }
}
