//! A container as the host shows it, whatever runtime made it.

use super::ids::ContainerName;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::PathBuf;

/// Life-cycle state, in the Docker-compatible API's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Made, never started.
    Created,
    /// Running.
    Running,
    /// Frozen by its cgroup.
    Paused,
    /// Ended.
    Exited,
    /// Anything else the runtime says (removing, dead, …).
    Other,
}

/// A port published on the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PublishedPort {
    /// Address on the host; unspecified for all.
    pub host_ip: IpAddr,
    /// Port on the host.
    pub host_port: u16,
    /// Port in the container.
    pub container_port: u16,
    /// Whether it is UDP rather than TCP.
    pub udp: bool,
}

/// A directory, file or block device of the host that the container sees.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mount {
    /// Name of the runtime's volume; none for a bind mount.
    pub volume: Option<String>,
    /// Path on the host.
    pub source: PathBuf,
    /// Where the container sees it.
    pub destination: PathBuf,
    /// Whether the container may write.
    pub writable: bool,
    /// It is a block device that the container was given.
    #[serde(default)]
    pub device: bool,
}

/// One container, or one cgroup that holds processes without a runtime.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Container {
    /// Name, or the cgroup's path below the agent's scope.
    pub name: ContainerName,
    /// The runtime's id; empty for a bare cgroup.
    pub id: String,
    /// Socket of the runtime that can be asked to hold, move and make it; none for a cgroup without one, and
    /// for a task of containerd.
    pub runtime: Option<String>,
    /// cgroup2 path below the agent's scope, with a leading slash.
    pub cgroup_path: String,
    /// cgroup2 id: the inode number of the directory (kernel: cgroup_id()).
    pub cgroup_id: u64,
    /// First process, in the agent's PID namespace; 0 when not running.
    pub pid: i32,
    /// State.
    pub state: State,
    /// Image reference.
    pub image: String,
    /// Image id.
    pub image_id: String,
    /// Addresses in its networks.
    pub addresses: Vec<IpAddr>,
    /// Ports published on the host.
    pub published: Vec<PublishedPort>,
    /// Mounted volumes.
    pub mounts: Vec<Mount>,
    /// Registration ids: containers that share one are correlated.
    pub registration_ids: BTreeSet<String>,
}

impl Container {
    /// A cgroup that holds processes, as it goes by when nobody tells more of it: by its path.
    #[must_use]
    pub fn of_cgroup(path: &str, cgroup_id: u64, pid: i32) -> Self {
        Self {
            name: path.into(),
            id: String::new(),
            runtime: None,
            cgroup_path: path.to_owned(),
            cgroup_id,
            pid,
            state: State::Running,
            image: String::new(),
            image_id: String::new(),
            addresses: Vec::new(),
            published: Vec::new(),
            mounts: Vec::new(),
            registration_ids: BTreeSet::new(),
        }
    }
}
