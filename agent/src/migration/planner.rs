//! From what the host shows to a plan: which containers go together, what moves, what blocks it.
//!
//! Pure composition: the delegator gathers, this file decides.

use crate::model::action::{Action, Actions};
use crate::model::choice::{Bounds, Deadline, Next, Outlook, Rate};
use crate::model::container::{Container, Mount, State};
use crate::model::edge::{Correlated, Edge};
use crate::model::ids::{ContainerName, DeviceId, Epoch, PlanId, VolumeId};
use crate::model::plan::{
    Blocker, Estimate, MigrationEvent, Plan, PlanGuards, PlannedContainer, PlannedStep,
};
use crate::model::trace::FetchOrder;
use crate::model::units::{Bytes, UnixMillis};
use crate::model::volume::{VolumeKind, VolumeSpec};
use crate::relations::Graph;
use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// What an operator or the policy asks for.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Request {
    /// Containers by name; empty means all.
    pub containers: Vec<ContainerName>,
    /// Actions to delegate.
    pub delegate: Actions,
    /// Why.
    pub event: MigrationEvent,
    /// What the plan must have before it may evacuate.
    #[serde(default)]
    pub guards: PlanGuards,
    /// Files of recorded access traces: what these found hottest is fetched first when the twins start first.
    #[serde(default)]
    pub traces: Vec<PathBuf>,
}

/// A request that cannot become a plan at all.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum PlanError {
    /// A name that no container has.
    #[error("no container is called `{name}`; this host has: {known}")]
    UnknownContainer {
        /// Name.
        name: ContainerName,
        /// Names that exist.
        known: String,
    },
    /// A container that stays where it is.
    #[error(
        "container `{name}` does not run ({state:?}), and only what runs is moved; start it first"
    )]
    NotRunning {
        /// Name.
        name: ContainerName,
        /// State.
        state: State,
    },
    /// A container that was moved.
    #[error(
        "container `{0}` was moved from here by an earlier plan, and its twin runs on that plan's target; `lifeboat status` lists plans"
    )]
    Moved(ContainerName),
    /// There is nothing to move.
    #[error(
        "this host has no container that a runtime manages; start one, or check `runtimes` in the agent's configuration"
    )]
    Nothing,
}

/// The containers that must move together with those requested, and what to tell the operator.
///
/// A child is always with its parents (design §4): the request is widened to whole groups. Containers
/// that do not run stay, and so do those that an earlier plan `released` (by id): they are not ours.
///
/// # Errors
/// A name is unknown, or nothing is left to move.
pub fn select(
    request: &Request,
    containers: &[Container],
    edges: &[Edge],
    correlated: &[Correlated],
    released: &BTreeSet<String>,
) -> Result<(Vec<Container>, Vec<String>), PlanError> {
    let managed: BTreeMap<&ContainerName, &Container> = containers
        .iter()
        .filter(|container| container.runtime.is_some())
        .filter(|container| matches!(container.state, State::Running | State::Paused))
        .filter(|container| !released.contains(&container.id))
        .map(|container| (&container.name, container))
        .collect();
    let mut notes = Vec::new();
    let mut chosen: BTreeSet<&ContainerName> = BTreeSet::new();
    if request.containers.is_empty() {
        chosen.extend(managed.keys());
        let bare: Vec<&str> = containers
            .iter()
            .filter(|container| container.runtime.is_none())
            .map(|container| container.name.as_str())
            .collect();
        if !bare.is_empty() {
            notes.push(format!(
                "stay here, no runtime with the Docker API manages them: {}",
                bare.join(", ")
            ));
        }
    }
    for name in &request.containers {
        let Some((name, _)) = managed.get_key_value(name) else {
            let it = containers.iter().find(|container| &container.name == name);
            if let Some(it) = it.filter(|it| it.runtime.is_some()) {
                let name = name.clone();
                return Err(if released.contains(&it.id) {
                    PlanError::Moved(name)
                } else {
                    PlanError::NotRunning {
                        name,
                        state: it.state,
                    }
                });
            }
            let known: Vec<&str> = managed.keys().map(|name| name.as_str()).collect();
            let known = if known.is_empty() {
                "none".into()
            } else {
                known.join(", ")
            };
            return Err(PlanError::UnknownContainer {
                name: name.clone(),
                known,
            });
        };
        chosen.insert(name);
    }
    // Widen along edges and correlations until nothing is added.
    let mut frontier: Vec<&ContainerName> = chosen.iter().copied().collect();
    while let Some(name) = frontier.pop() {
        let over_edges = edges
            .iter()
            .filter_map(|edge| other_end(name, &edge.child, &edge.parent));
        let over_ids = correlated
            .iter()
            .filter_map(|Correlated(a, b)| other_end(name, a, b));
        let over_volumes = managed
            .values()
            .filter(|other| share_data(managed.get(name), other));
        let over_volumes = over_volumes.map(|other| &other.name);
        let others: Vec<&ContainerName> = over_edges.chain(over_ids).chain(over_volumes).collect();
        for other in others {
            if let Some((other, _)) = managed.get_key_value(other)
                && chosen.insert(other)
            {
                notes.push(format!("{other} goes too: it is related to {name}"));
                frontier.push(other);
            }
        }
    }
    if chosen.is_empty() {
        return Err(PlanError::Nothing);
    }
    Ok((
        chosen
            .iter()
            .filter_map(|name| managed.get(*name))
            .map(|c| (*c).clone())
            .collect(),
        notes,
    ))
}

/// Whether both mount the same directory, or one inside the other's: they must have one owner.
fn share_data(one: Option<&&Container>, other: &Container) -> bool {
    one.is_some_and(|one| {
        one.mounts.iter().any(|a| {
            let meets =
                |b: &Mount| a.source.starts_with(&b.source) || b.source.starts_with(&a.source);
            (a.writable || other.mounts.iter().any(|b| b.writable))
                && other.mounts.iter().any(meets)
        })
    })
}

fn other_end<'a>(
    name: &ContainerName,
    a: &'a ContainerName,
    b: &'a ContainerName,
) -> Option<&'a ContainerName> {
    if a == name {
        Some(b)
    } else if b == name {
        Some(a)
    } else {
        None
    }
}

/// What must move, before it was measured.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Origin {
    /// What it is to the runtime.
    pub kind: VolumeKind,
    /// Where it is.
    pub path: PathBuf,
    /// Who mounts it.
    pub containers: Vec<ContainerName>,
}

/// What a path is on this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    /// A directory.
    Directory,
    /// A regular file.
    File,
    /// A block device that may move.
    Device,
    /// A block device that may not, and why.
    Refused(String),
    /// Anything else, or nothing.
    Other,
}

/// What lies behind the containers' mounts and devices, each once, and what cannot move.
///
/// `look` tells what a path is on this host.
pub fn origins(
    containers: &[Container],
    look: impl Fn(&Path) -> Found,
) -> (Vec<Origin>, Vec<Blocker>) {
    let mut found: BTreeMap<PathBuf, Origin> = BTreeMap::new();
    let mut blockers = Vec::new();
    for container in containers {
        for mount in &container.mounts {
            if let Some(origin) = found.get_mut(&mount.source) {
                origin.containers.push(container.name.clone());
                continue;
            }
            match kind_of(mount, &look) {
                Ok(kind) => {
                    let origin = Origin {
                        kind,
                        path: mount.source.clone(),
                        containers: vec![container.name.clone()],
                    };
                    found.insert(mount.source.clone(), origin);
                }
                Err(why) => blockers.push(Blocker {
                    what: container.name.to_string(),
                    why,
                }),
            }
        }
    }
    // What lies below a directory travels with it; its containers are told.
    let paths: Vec<PathBuf> = found.keys().cloned().collect();
    for path in &paths {
        let above = paths
            .iter()
            .find(|other| *other != path && path.starts_with(other));
        if let Some(above) = above
            && let Some(nested) = found.remove(path)
            && let Some(outer) = found.get_mut(above)
        {
            outer.containers.extend(nested.containers);
        }
    }
    (found.into_values().collect(), blockers)
}

fn kind_of(mount: &Mount, look: impl Fn(&Path) -> Found) -> Result<VolumeKind, String> {
    let path = &mount.source;
    if mount.device {
        return match look(path) {
            Found::Device => Ok(VolumeKind::Device),
            Found::Refused(why) => Err(format!("its device {}: {why}", path.display())),
            _ => Err(format!("its device {} is gone", path.display())),
        };
    }
    let of_the_host = ["/proc", "/sys", "/dev", "/run", "/var/run"]
        .iter()
        .any(|host| path.starts_with(host));
    match (of_the_host, look(path), &mount.volume) {
        (false, Found::Directory, None) => Ok(VolumeKind::Bind),
        (false, Found::Directory, Some(name)) => Ok(VolumeKind::Named(name.clone())),
        (false, Found::File, None) => Ok(VolumeKind::File),
        _ => Err(format!(
            "its bind mount {} is neither a directory nor a file of data; recreate the container without it, or hand it a block device as a device",
            path.display()
        )),
    }
}

/// Everything gathered for [`compose`].
#[derive(Debug)]
pub struct Gathered {
    /// Id.
    pub id: PlanId,
    /// Now.
    pub now: UnixMillis,
    /// This device.
    pub source: DeviceId,
    /// Containers with what their runtimes say.
    pub containers: Vec<PlannedContainer>,
    /// Relations among all containers.
    pub edges: Vec<Edge>,
    /// Correlated pairs.
    pub correlated: Vec<Correlated>,
    /// Volumes with their measures; image volumes included.
    pub volumes: Vec<VolumeSpec>,
    /// What of them is fetched first.
    pub fetch_orders: BTreeMap<VolumeId, FetchOrder>,
    /// The epoch from which this device owns a volume that moved here once.
    pub epochs: BTreeMap<VolumeId, Epoch>,
    /// What blocks it so far.
    pub blockers: Vec<Blocker>,
    /// Notes so far.
    pub notes: Vec<String>,
    /// Rate of an earlier move and its plan.
    pub measured_rate: Option<(PlanId, Bytes)>,
    /// How fast the workload changes its data now, as far as can be told.
    pub dirty: Option<Rate>,
    /// Evidence that a disk fails.
    pub failing: Option<String>,
    /// When the policy expects the worst.
    pub deadline: Option<Deadline>,
    /// Bounds of replication.
    pub bounds: Bounds,
}

/// Rate assumed before any move was measured: a 1 Gbit/s link, the slowest common on such hosts.
const ASSUMED_RATE: Bytes = Bytes(110 << 20);

/// What a paired device does that serves.
const SERVES: &str = "serve: over a link in `trusted_networks` the paired device answers what the target asks for while \
     the data moves, and fetches what it lacks from here, each block once";

/// The plan for what was gathered.
#[must_use]
pub fn compose(request: &Request, gathered: Gathered) -> Plan {
    let Gathered {
        id,
        now,
        source,
        containers,
        edges,
        correlated,
        volumes,
        ..
    } = gathered;
    let (mut notes, mut blockers) = (gathered.notes, gathered.blockers);
    let names: Vec<ContainerName> = containers
        .iter()
        .map(|planned| planned.container.name.clone())
        .collect();
    let inside: BTreeSet<&ContainerName> = names.iter().collect();
    let edges: Vec<Edge> = edges
        .into_iter()
        .filter(|edge| inside.contains(&edge.child) && inside.contains(&edge.parent))
        .collect();
    let correlated: Vec<Correlated> = correlated
        .into_iter()
        .filter(|Correlated(a, b)| inside.contains(a) && inside.contains(b))
        .collect();
    let graph = Graph::new(names.iter().cloned(), &edges, &correlated);
    let order = graph
        .order()
        .0
        .into_iter()
        .map(|step| PlannedStep {
            containers: step.containers,
            sequential: step.sequential,
        })
        .collect();
    // As many targets as containers: each family of related containers by itself.
    let targets = NonZeroUsize::new(names.len()).unwrap_or(NonZeroUsize::MIN);
    let groups = graph
        .groups(targets, |_| 1)
        .into_iter()
        .map(|group| group.containers)
        .collect();
    let delegated = request.delegate.clone();
    if delegated.contains(Action::Serve) {
        notes.push(SERVES.into());
    }
    for planned in &containers {
        let udp = planned
            .container
            .published
            .iter()
            .filter(|port| port.udp)
            .count();
        if udp > 0 {
            notes.push(format!(
                "{}: {udp} published UDP port(s) are not forwarded after the switch; point clients at the target",
                planned.container.name
            ));
        }
    }
    for planned in &containers {
        let name = &planned.container.name;
        let network = planned.inspect["HostConfig"]["NetworkMode"]
            .as_str()
            .unwrap_or_default();
        if network.starts_with("container:") {
            blockers.push(Blocker {
                what: name.to_string(),
                why: "it shares another container's network, which this version does not rebuild; give it a network of its own".into(),
            });
        }
        for volume in &planned.volumes {
            let local = matches!(volume["Driver"].as_str(), None | Some("local"));
            let plain = volume["Options"]
                .as_object()
                .is_none_or(serde_json::Map::is_empty);
            if !local || !plain {
                blockers.push(Blocker {
                    what: name.to_string(),
                    why: format!(
                        "its volume {} has a driver or driver options, so its data lies elsewhere; move that by its own means",
                        volume["Name"]
                    ),
                });
            }
        }
    }
    let bytes: Bytes = volumes.iter().map(VolumeSpec::to_move).sum();
    let (rate, basis) = match gathered.measured_rate {
        Some((plan, rate)) => (rate, format!("measured in plan {plan}")),
        None => (
            ASSUMED_RATE,
            "assumed 1 Gbit/s link; no move was measured yet".into(),
        ),
    };
    let duration = Duration::from_secs_f64(bytes.0 as f64 / rate.0.max(1) as f64);
    let capped = request.guards.limit.filter(|limit| *limit < rate);
    let outlook = Outlook {
        size: bytes,
        copied: Bytes(0),
        rounds: 0,
        last: None,
        before: None,
        whole: None,
        copy: Rate {
            bytes: capped.unwrap_or(rate),
            from: capped.map_or_else(|| basis.clone(), |_| "its limit".into()),
        },
        dirty: gathered.dirty,
        overhead: Duration::ZERO,
        deadline: gathered.deadline,
        obstacle: super::switch_first::obstacle(&containers, &volumes, gathered.failing.as_deref()),
        word: request.guards.way,
        bounds: gathered.bounds,
    };
    let choice = outlook.choose();
    if choice.next == Next::SwitchFirst {
        notes.push(super::switch_first::RISK.to_owned());
        if delegated.contains(Action::Transfer) {
            let then = if delegated.contains(Action::Serve) {
                "then serve alone: the paired device answers with what comes behind the twins"
            } else {
                "what comes behind the twins goes straight to the target"
            };
            notes.push(format!(
                "delegated until the switch only: {delegated}; {then}"
            ));
        }
    }
    Plan {
        id,
        created: now,
        event: request.event.clone(),
        guards: request.guards.clone(),
        source,
        containers,
        order,
        groups,
        edges,
        volumes,
        fetch_orders: gathered.fetch_orders,
        epochs: gathered.epochs,
        delegated,
        notes,
        blockers,
        estimate: Estimate {
            bytes,
            rate,
            basis,
            duration,
        },
        choice: Some(choice),
        target: None,
        paired: None,
    }
}

/// The volumes of `prepared`, when they are those of `containers` over `origins` as they are now.
#[must_use]
pub fn volumes_as_prepared(
    prepared: &Plan,
    containers: &[PlannedContainer],
    origins: &[Origin],
) -> Option<Vec<VolumeSpec>> {
    let data: Vec<&VolumeSpec> = prepared
        .volumes
        .iter()
        .filter(|volume| !matches!(volume.kind, VolumeKind::Image(_)))
        .collect();
    let known = |origin: &Origin| {
        data.iter().any(|volume| {
            volume.source_path == origin.path
                && volume.kind == origin.kind
                && volume.containers == origin.containers
        })
    };
    let same = ids(containers) == ids(&prepared.containers)
        && data.len() == origins.len()
        && origins.iter().all(known);
    same.then(|| prepared.volumes.clone())
}

fn ids(containers: &[PlannedContainer]) -> BTreeSet<&str> {
    containers
        .iter()
        .map(|planned| planned.container.id.as_str())
        .collect()
}

/// A volume for each image, exported below `directory`.
#[must_use]
pub fn image_volumes(
    containers: &[PlannedContainer],
    first: u32,
    directory: &Path,
) -> Vec<VolumeSpec> {
    let mut images: BTreeMap<&str, VolumeSpec> = BTreeMap::new();
    for planned in containers {
        let container = &planned.container;
        let id = VolumeId(first + images.len() as u32);
        images
            .entry(container.image_id.as_str())
            .or_insert_with(|| VolumeSpec {
                id,
                name: format!("image {}", container.image),
                kind: VolumeKind::Image(container.image.clone()),
                source_path: directory.join(format!("image-{id}")),
                containers: Vec::new(),
                size: planned.image_size,
                holes: Bytes(0),
                entries: 1,
                device_nodes: 0,
                unreadable: 0,
                changes: Default::default(),
                unused: Default::default(),
            })
            .containers
            .push(container.name.clone());
    }
    images.into_values().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::edge::{Learnt, Protocol};

    fn container(name: &str, mounts: &[&str]) -> Container {
        Container {
            name: name.into(),
            id: name.into(),
            runtime: Some("/run/podman/podman.sock".into()),
            cgroup_path: format!("/{name}"),
            cgroup_id: 1,
            pid: 1,
            state: State::Running,
            image: format!("{name}:1"),
            image_id: format!("sha256:{name}"),
            addresses: Vec::new(),
            published: Vec::new(),
            mounts: mounts
                .iter()
                .map(|path| Mount {
                    volume: None,
                    source: path.into(),
                    destination: "/data".into(),
                    writable: true,
                    device: path.starts_with("/dev/"),
                })
                .collect(),
            registration_ids: Default::default(),
        }
    }

    fn edge(child: &str, parent: &str) -> Edge {
        Edge {
            child: child.into(),
            parent: parent.into(),
            port: 80,
            protocol: Protocol::Tcp,
            learnt: Learnt::Observed,
            connections: 1,
            bytes_to_parent: Some(Bytes(1)),
            bytes_to_child: Some(Bytes(1)),
            how: Default::default(),
            stale: false,
            retransmits: None,
            srtt_us: None,
            first_seen: UnixMillis(1),
            last_seen: UnixMillis(2),
        }
    }

    fn request(names: &[&str]) -> Request {
        Request {
            containers: names.iter().map(|name| (*name).into()).collect(),
            delegate: Actions::default(),
            event: MigrationEvent::Operator,
            guards: PlanGuards::default(),
            traces: Vec::new(),
        }
    }

    #[test]
    fn a_request_for_one_container_is_widened_to_its_group_and_no_further() {
        let all = [
            container("web", &[]),
            container("app", &[]),
            container("db", &[]),
            container("other", &[]),
        ];
        let edges = [edge("web", "app"), edge("app", "db")];
        let (chosen, notes) =
            select(&request(&["db"]), &all, &edges, &[], &BTreeSet::new()).unwrap();
        let names: Vec<&str> = chosen.iter().map(|c| c.name.as_str()).collect();
        assert_eq!(names, ["app", "db", "web"]);
        assert_eq!(notes.len(), 2);
    }

    #[test]
    fn an_unknown_container_is_named_with_those_that_exist() {
        let error = select(
            &request(&["dbb"]),
            &[container("db", &[])],
            &[],
            &[],
            &BTreeSet::new(),
        )
        .unwrap_err();
        assert!(error.to_string().contains("`dbb`") && error.to_string().contains("db"));
    }

    #[test]
    fn a_shared_directory_moves_once_and_one_inside_another_travels_with_it() {
        let all = [
            container("a", &["/srv/x"]),
            container("b", &["/srv/x"]),
            container("c", &["/srv/x/y"]),
        ];
        let (found, blockers) = origins(&all, |_| Found::Directory);
        assert!(blockers.is_empty());
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].containers.len(), 3);
    }

    #[test]
    fn a_socket_of_the_host_blocks_the_plan() {
        let socket = container("a", &["/run/podman/podman.sock"]);
        let (found, blockers) = origins(&[socket], |_| Found::Other);
        assert!(found.is_empty());
        assert!(blockers[0].why.contains("podman.sock"));
    }

    #[test]
    fn an_image_and_a_device_move_once_each_and_a_refused_device_blocks_the_plan_with_the_reason() {
        let all = [
            container("a", &["/srv/disk.img", "/dev/loop7"]),
            container("b", &["/dev/loop7", "/dev/sda"]),
        ];
        let (found, blockers) = origins(&all, |path| match path.to_str() {
            Some("/srv/disk.img") => Found::File,
            Some("/dev/loop7") => Found::Device,
            _ => Found::Refused("it is not in `block_roots`".into()),
        });
        let kinds: Vec<&VolumeKind> = found.iter().map(|origin| &origin.kind).collect();
        assert_eq!(kinds, [&VolumeKind::Device, &VolumeKind::File]);
        assert_eq!(found[0].containers.len(), 2);
        assert_eq!(blockers.len(), 1);
        assert!(blockers[0].why.contains("/dev/sda") && blockers[0].why.contains("block_roots"));
    }
}
