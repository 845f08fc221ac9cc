//! What containerd runs, from the bundles that it keeps for its running tasks.
//!
//! Purpose: name the containers of `ctr`, nerdctl and the CRI, which no Docker-compatible API tells of.
//! Invariants: nothing is asked, only files are read; a bundle is parsed once for each first process.
//! Non-goals: containers without a task, images, and changing anything.

use super::discover::start_time;
use super::inspect;
use crate::model::container::Container;
use crate::model::ids::ContainerName;
use serde_json::Value;
use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

/// Below the state directory: a directory for each namespace, in it one for each task (containerd 1.2 to 2).
const TASKS: &str = "io.containerd.runtime.v2.task";

/// The namespace of a client that names none; its containers go by their bare names.
const DEFAULT_NAMESPACE: &str = "default";

/// The tasks of a containerd cannot be listed.
#[derive(Debug, thiserror::Error)]
#[error(
    "cannot list the tasks of containerd in {}: {source}; start it, or correct `runtimes` in the agent's configuration",
    directory.display()
)]
pub(super) struct TasksError {
    directory: PathBuf,
    source: io::Error,
}

/// One containerd, by its state directory.
#[derive(Debug)]
pub(super) struct Containerd {
    state: PathBuf,
    /// By bundle: start time of the first process, and what the bundle says.
    known: Mutex<HashMap<PathBuf, (u64, Container)>>,
}

impl Containerd {
    /// The one that listens at this socket: containerd and k3s have it in the state directory.
    pub(super) fn at(socket: &Path) -> Self {
        let state = socket.parent().unwrap_or(socket);
        Self {
            state: state.to_owned(),
            known: Mutex::default(),
        }
    }

    /// Every task without its cgroup; one that is just being started has no process yet.
    pub(super) fn tasks(
        &self,
        registration_env: Option<&str>,
    ) -> Result<Vec<Container>, TasksError> {
        let failed = |source| TasksError {
            directory: self.state.clone(),
            source,
        };
        // No tasks yet is no failure; no state directory is.
        fs::metadata(&self.state).map_err(failed)?;
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let mut seen = HashMap::new();
        for namespace in below(&self.state.join(TASKS)).map_err(failed)? {
            // A namespace or a task that vanished meanwhile has none.
            for bundle in below(&namespace).unwrap_or_default() {
                let (pid, started) = match first_process(&bundle) {
                    First::Runs(pid, started) => (pid, started),
                    First::NotYet => (0, 0),
                    First::Ended => continue,
                };
                let task = match known.remove(&bundle) {
                    Some((then, task)) if then == started && task.pid == pid => Some(task),
                    _ => read(&namespace, &bundle, pid, registration_env),
                };
                if let Some(task) = task {
                    seen.insert(bundle, (started, task));
                }
            }
        }
        *known = seen;
        Ok(known.values().map(|(_, task)| task.clone()).collect())
    }
}

fn below(directory: &Path) -> io::Result<Vec<PathBuf>> {
    match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        entries => entries?.map(|entry| Ok(entry?.path())).collect(),
    }
}

/// The first process of a task.
enum First {
    /// Its number, and its start time in clock ticks since boot.
    Runs(i32, u64),
    /// The cgroup may have it already; the bundle does not tell it yet.
    NotYet,
    Ended,
}

fn first_process(bundle: &Path) -> First {
    let Ok(pid) = fs::read_to_string(bundle.join("init.pid")) else {
        return First::NotYet;
    };
    let Ok(pid) = pid.trim().parse() else {
        return First::NotYet;
    };
    start_time(pid).map_or(First::Ended, |started| First::Runs(pid, started))
}

fn read(
    namespace: &Path,
    bundle: &Path,
    pid: i32,
    registration_env: Option<&str>,
) -> Option<Container> {
    let config = fs::read(bundle.join("config.json")).ok()?;
    let config: Value = serde_json::from_slice(&config).ok()?;
    let name = |path: &Path| Some(path.file_name()?.to_str()?.to_owned());
    let (namespace, id) = (name(namespace)?, name(bundle)?);
    Some(task(&config, &namespace, id, pid, registration_env))
}

/// A task from its OCI configuration. `ctr` and nerdctl repeat labels as annotations; the annotations of the
/// CRI are those of containerd's `pkg/cri/annotations`.
fn task(
    config: &Value,
    namespace: &str,
    id: String,
    pid: i32,
    registration_env: Option<&str>,
) -> Container {
    let annotations = &config["annotations"];
    let annotation = |name: &str| annotations[name].as_str();
    let cri = |name: &str| annotation(&format!("io.kubernetes.cri.{name}"));
    let name = match (cri("sandbox-namespace"), cri("sandbox-name")) {
        (Some(pod_namespace), Some(pod)) => match cri("container-name") {
            Some(container) => format!("{pod_namespace}/{pod}/{container}"),
            None => format!("{pod_namespace}/{pod}"),
        },
        _ => {
            let name = annotation("nerdctl/name").unwrap_or(&id);
            if namespace == DEFAULT_NAMESPACE {
                name.to_owned()
            } else {
                format!("{namespace}/{name}")
            }
        }
    };
    Container {
        name: ContainerName(name),
        id,
        image: cri("image-name").unwrap_or_default().to_owned(),
        registration_ids: inspect::registration_ids(
            annotations,
            &config["process"]["env"],
            registration_env,
        ),
        ..Container::of_cgroup("", 0, pid)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn named(namespace: &str, annotations: &Value) -> Container {
        let config =
            json!({ "annotations": annotations, "process": { "env": ["SERVICE_ID=till"] } });
        task(&config, namespace, "ab12".to_owned(), 7, Some("SERVICE_ID"))
    }

    #[test]
    fn a_task_goes_by_the_name_that_its_client_gave_it() {
        let nerdctl = json!({ "nerdctl/name": "web" });
        let pod = json!({
            "io.kubernetes.cri.sandbox-namespace": "shop",
            "io.kubernetes.cri.sandbox-name": "till-0",
            "io.kubernetes.cri.sandbox-id": "cd34"
        });
        let mut in_pod = pod.clone();
        in_pod["io.kubernetes.cri.container-name"] = "web".into();
        for (namespace, annotations, name) in [
            ("default", Value::Null, "ab12"),
            ("moby", Value::Null, "moby/ab12"),
            ("default", nerdctl.clone(), "web"),
            ("test", nerdctl, "test/web"),
            ("k8s.io", pod, "shop/till-0"),
            ("k8s.io", in_pod, "shop/till-0/web"),
        ] {
            assert_eq!(named(namespace, &annotations).name.as_str(), name);
        }
    }

    #[test]
    fn what_says_that_tasks_belong_together_is_heard() {
        let annotations = json!({
            "lifeboat.registration-id": "shop", "io.kubernetes.cri.sandbox-id": "cd34"
        });
        let ids = named("k8s.io", &annotations).registration_ids;
        assert_eq!(ids, ["pod cd34", "shop", "till"].map(str::to_owned).into());
    }

    #[test]
    fn live_tasks_are_found_by_their_bundles_and_ended_ones_are_not() {
        let state = tempfile::tempdir().unwrap();
        let containerd = Containerd::at(&state.path().join("containerd.sock"));
        assert!(containerd.tasks(None).unwrap().is_empty());
        let own = std::process::id().to_string();
        for (id, pid) in [
            ("live", own.as_str()),
            ("ended", "2147483647"),
            ("starting", ""),
        ] {
            let bundle = state.path().join(TASKS).join("default").join(id);
            fs::create_dir_all(&bundle).unwrap();
            fs::write(bundle.join("init.pid"), pid).unwrap();
            fs::write(bundle.join("config.json"), "{}").unwrap();
        }
        let mut tasks = containerd.tasks(None).unwrap();
        tasks.sort_by_key(|task| task.pid);
        let ids: Vec<&str> = tasks.iter().map(|task| task.id.as_str()).collect();
        assert_eq!((ids, tasks[0].pid), (vec!["starting", "live"], 0));
        assert!(tasks.iter().all(|task| task.runtime.is_none()));
        let absent = Containerd::at(Path::new("/nonexistent/containerd.sock"));
        let error = absent.tasks(None).unwrap_err().to_string();
        assert!(error.contains("/nonexistent"), "{error}");
    }
}
