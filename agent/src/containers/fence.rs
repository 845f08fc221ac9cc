//! Keeps a source's container from ever starting again, and takes that back on abort.
//!
//! Docker, and Podman from 5.1, can change the restart policy of a container that exists. Older Podman
//! cannot; there an OCI hook refuses every start of exactly this container, by its restart policy, by
//! `podman start --all` after a reboot, or by hand. Podman reads hooks anew for each start, so a running
//! API service and the clean-up process of a dying container both obey.
//!
//! Invariants: the fence is durable when [`Runtime::forbid_start`] returns; lifting it restores the
//! policy that was there before; other containers start as ever.
//! Non-goals: stopping an operator who removes the hook or gives the policy back by hand.

use super::client::{Engine, Runtime, RuntimeError, Version, escape};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

/// Where Podman looks for OCI hooks unless containers.conf says otherwise (containers-common 0.50,
/// `DefaultHooksDirs`; Podman 4.3 does not read the one under /etc that its manual names as well).
const HOOKS_DIR: &str = "/usr/share/containers/oci/hooks.d";
/// First Podman whose update call changes the restart policy.
const PODMAN_UPDATES_POLICY: Version = Version(5, 1, 0);

/// What was done to keep one container from starting; goes into the journal, so that it can be undone
/// by another run of the agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fence {
    /// Id of the container.
    pub container: String,
    /// Socket of its runtime.
    pub runtime: String,
    /// How.
    pub how: Means,
}

/// How a container is kept from starting.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Means {
    /// Its restart policy was set to `no`.
    RestartPolicy {
        /// The policy before, as the API writes it.
        previous: Value,
    },
    /// An OCI hook refuses it.
    Hook {
        /// The hook's file, as the runtime sees it.
        file: PathBuf,
    },
}

/// A container could not be fenced or unfenced.
#[derive(Debug, thiserror::Error)]
pub enum FenceError {
    /// The runtime failed.
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    /// The runtime took the change and does not show it.
    #[error(
        "the runtime at {} accepted restart policy {wanted} for container {container} but shows {shown}; \
         the container is not safely fenced: set the policy by hand",
        socket.display()
    )]
    NotTaken {
        /// The runtime's socket.
        socket: PathBuf,
        /// The container.
        container: String,
        /// What was asked for.
        wanted: String,
        /// What it shows.
        shown: String,
    },
    /// The hook cannot be written or removed.
    #[error(
        "cannot {what} the hook {} that keeps container {container} from starting: {source}; \
         the agent needs write access to the runtime's hooks directory",
        file.display()
    )]
    Hook {
        /// `write` or `remove`.
        what: &'static str,
        /// The container.
        container: String,
        /// The hook's file.
        file: PathBuf,
        /// The file system's answer.
        source: io::Error,
    },
}

impl Runtime {
    /// Keeps a container from being started again, whoever asks. It may run, be paused or have ended;
    /// a running one goes on. `why` is shown to whoever tries (name the plan).
    ///
    /// # Errors
    /// When the runtime or the file system refuses; the container is then not fenced.
    pub async fn forbid_start(&self, container: &str, why: &str) -> Result<Fence, FenceError> {
        let inspect = self.inspect(container).await?;
        let id = inspect["Id"].as_str().unwrap_or(container).to_owned();
        let how = match self.engine().await? {
            Engine::Podman(version) if version < PODMAN_UPDATES_POLICY => {
                let root = self.root("find the hooks directory").await?;
                let file = hooks_dir(&root).join(format!("lifeboat-{id}.json"));
                write_hook(&below(&root, &file), &id, why).map_err(|source| FenceError::Hook {
                    what: "write",
                    container: container.to_owned(),
                    file: file.clone(),
                    source,
                })?;
                Means::Hook { file }
            }
            Engine::Podman(_) | Engine::Docker(_) => {
                let previous = inspect["HostConfig"]["RestartPolicy"].clone();
                self.set_policy(&id, &json!({ "Name": "no", "MaximumRetryCount": 0 }))
                    .await?;
                Means::RestartPolicy { previous }
            }
        };
        Ok(Fence {
            container: id,
            runtime: self.socket().display().to_string(),
            how,
        })
    }

    /// Takes a fence away: the container can be started as before. Doing so twice is no error.
    ///
    /// # Errors
    /// When the runtime or the file system refuses.
    pub async fn lift_fence(&self, fence: &Fence) -> Result<(), FenceError> {
        match &fence.how {
            Means::RestartPolicy { previous } => {
                match self.set_policy(&fence.container, previous).await {
                    Err(FenceError::Runtime(error)) if error.not_found() => Ok(()),
                    result => result,
                }
            }
            Means::Hook { file } => {
                let file = below(&self.root("find the hooks directory").await?, file);
                match fs::remove_file(&file).and_then(|()| sync_parent(&file)) {
                    Err(source) if source.kind() != io::ErrorKind::NotFound => {
                        Err(FenceError::Hook {
                            what: "remove",
                            container: fence.container.clone(),
                            file,
                            source,
                        })
                    }
                    _ => Ok(()),
                }
            }
        }
    }

    /// Whether a fence still keeps its container from starting; a container that is gone cannot start.
    ///
    /// # Errors
    /// When the runtime fails.
    pub async fn fence_holds(&self, fence: &Fence) -> Result<bool, RuntimeError> {
        let inspect = match self.inspect(&fence.container).await {
            Err(error) if error.not_found() => return Ok(true),
            inspect => inspect?,
        };
        match &fence.how {
            Means::RestartPolicy { .. } => {
                let policy = &inspect["HostConfig"]["RestartPolicy"]["Name"];
                Ok(matches!(policy.as_str(), None | Some("" | "no")))
            }
            Means::Hook { file } => {
                Ok(below(&self.root("find the hooks directory").await?, file).exists())
            }
        }
    }

    async fn set_policy(&self, id: &str, policy: &Value) -> Result<(), FenceError> {
        let path = format!("/containers/{}/update", escape(id));
        let operation = format!("set the restart policy of container {id}");
        self.post(&path, Some(&json!({ "RestartPolicy": policy })), &operation)
            .await?;
        let inspect = self.inspect(id).await?;
        let shown = &inspect["HostConfig"]["RestartPolicy"]["Name"];
        // An empty name means `no`.
        let name = |value: &Value| match value.as_str() {
            None | Some("") => "no".to_owned(),
            Some(name) => name.to_owned(),
        };
        let (wanted, shown) = (name(&policy["Name"]), name(shown));
        if wanted == shown {
            return Ok(());
        }
        Err(FenceError::NotTaken {
            socket: self.socket().to_owned(),
            container: id.to_owned(),
            wanted,
            shown,
        })
    }
}

/// The directory Podman reads hooks from, as Podman sees it: the last one that containers.conf(5) names
/// in its files below `root`, else the default.
fn hooks_dir(root: &Path) -> PathBuf {
    let mut files = vec![
        root.join("usr/share/containers/containers.conf"),
        root.join("etc/containers/containers.conf"),
    ];
    let drop_ins = fs::read_dir(root.join("etc/containers/containers.conf.d"));
    let mut drop_ins: Vec<PathBuf> = drop_ins
        .into_iter()
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|kind| kind == "conf"))
        .collect();
    drop_ins.sort();
    files.append(&mut drop_ins);
    let configured = files
        .iter()
        .filter_map(|file| fs::read_to_string(file).ok())
        .filter_map(|text| configured_hooks_dir(&text))
        .next_back();
    PathBuf::from(configured.unwrap_or_else(|| HOOKS_DIR.to_owned()))
}

/// An absolute path of another mount namespace, as we see it.
fn below(root: &Path, path: &Path) -> PathBuf {
    root.join(path.strip_prefix("/").unwrap_or(path))
}

/// The last string of the array `hooks_dir`; Podman reads its directories in order and lets later ones
/// win.
fn configured_hooks_dir(containers_conf: &str) -> Option<String> {
    let text: String = containers_conf
        .lines()
        .filter(|line| !line.trim_start().starts_with('#'))
        .flat_map(|line| [line, "\n"])
        .collect();
    let (_, rest) = text.split_once("hooks_dir")?;
    let (_, array) = rest.split_once('[')?;
    let (array, _) = array.split_once(']')?;
    array
        .rsplit(',')
        .map(|item| item.trim().trim_matches(['"', '\'']))
        .find(|item| item.starts_with('/'))
        .map(str::to_owned)
}

/// The hook of one container (oci-hooks(5), schema 1.0.0). It runs for every start of every container,
/// reads the state the OCI runtime hands it (OCI runtime spec, "State") and refuses only this id.
fn hook(id: &str, why: &str) -> Value {
    json!({
        "version": "1.0.0",
        "hook": {
            "path": "/bin/sh",
            "args": [
                "sh", "-c",
                "case \"$(cat)\" in *\"$1\"*) echo \"$2\" >&2; exit 1;; esac",
                "lifeboat-fence", id,
                format!("lifeboat: container {id} must not start on this device: {why}"),
            ],
            "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"],
            "timeout": 10,
        },
        "when": { "always": true },
        "stages": ["createRuntime"],
    })
}

fn write_hook(file: &Path, id: &str, why: &str) -> io::Result<()> {
    let directory = file.parent().unwrap_or(Path::new("/"));
    fs::create_dir_all(directory)?;
    // Podman reads only names that end in .json, so it never sees the half-written file.
    let draft = file.with_extension("draft");
    let mut out = File::create(&draft)?;
    out.write_all(hook(id, why).to_string().as_bytes())?;
    out.sync_all()?;
    fs::rename(&draft, file)?;
    sync_parent(file)
}

fn sync_parent(file: &Path) -> io::Result<()> {
    File::open(file.parent().unwrap_or(Path::new("/")))?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    fn run_hook(hook: &Value, state: &str) -> (bool, String) {
        let args = hook["hook"]["args"].as_array().unwrap();
        let mut child = Command::new(hook["hook"]["path"].as_str().unwrap())
            .args(args[1..].iter().map(|arg| arg.as_str().unwrap()))
            .stdin(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdin = child.stdin.take().unwrap();
        stdin.write_all(state.as_bytes()).unwrap();
        drop(stdin);
        let output = child.wait_with_output().unwrap();
        (
            output.status.success(),
            String::from_utf8(output.stderr).unwrap(),
        )
    }

    #[test]
    fn the_hook_refuses_its_container_and_no_other_and_says_why() {
        let hook = hook("ab12", "it was released by plan `p1` \"$(id)\"");
        let (started, words) = run_hook(&hook, r#"{"ociVersion":"1.0.2","id":"ab12"}"#);
        assert!(!started);
        assert!(words.contains("released by plan `p1` \"$(id)\""), "{words}");
        let (started, words) = run_hook(&hook, r#"{"ociVersion":"1.0.2","id":"cd34"}"#);
        assert!(started && words.is_empty());
    }

    #[test]
    fn the_hooks_directory_is_the_one_containers_conf_names() {
        let conf = "[engine]\n# hooks_dir = [\"/no\"]\nhooks_dir = [\n  \"/a/hooks.d\",\n  \"/b/hooks.d\",\n]\n";
        assert_eq!(configured_hooks_dir(conf).as_deref(), Some("/b/hooks.d"));
        assert_eq!(configured_hooks_dir("[engine]\n"), None);
        let root = tempfile::tempdir().unwrap();
        let etc = root.path().join("etc/containers");
        assert_eq!(hooks_dir(root.path()), Path::new(HOOKS_DIR));
        fs::create_dir_all(etc.join("containers.conf.d")).unwrap();
        fs::write(etc.join("containers.conf"), conf).unwrap();
        assert_eq!(hooks_dir(root.path()), Path::new("/b/hooks.d"));
        let last = etc.join("containers.conf.d/90-x.conf");
        fs::write(last, "hooks_dir = ['/c']\n").unwrap();
        assert_eq!(hooks_dir(root.path()), Path::new("/c"));
    }

    #[test]
    fn a_hook_file_appears_whole_and_under_its_final_name_only() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("hooks.d/lifeboat-ab12.json");
        write_hook(&file, "ab12", "plan p1").unwrap();
        let written: Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
        assert_eq!(written["stages"], json!(["createRuntime"]));
        assert_eq!(fs::read_dir(file.parent().unwrap()).unwrap().count(), 1);
    }
}
