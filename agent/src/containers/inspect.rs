//! Reads the runtimes' inspect answers. Pure: JSON in, the design's words out.
//!
//! Invariants: a field a runtime leaves out or writes as null is absent, never an error; only a missing
//! id or name is one.

use crate::model::container::{Container, Mount, PublishedPort, State};
use crate::model::ids::ContainerName;
use serde_json::Value;
use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;

/// Label that names a container's registration: containers with the same value are correlated.
pub const REGISTRATION_LABEL: &str = "lifeboat.registration-id";

/// Label that compose tools put on every container of a project: its services belong together.
const COMPOSE_LABELS: [&str; 2] = ["com.docker.compose.project", "io.podman.compose.project"];

/// Labels of every container of a Kubernetes pod: the kubelet's, and what containerd's CRI tells the OCI runtime.
const POD_LABELS: [&str; 3] = [
    "io.kubernetes.pod.uid",
    "io.kubernetes.cri.sandbox-uid",
    "io.kubernetes.cri.sandbox-id",
];

/// A container's description without its cgroup, from `GET /containers/{id}/json`. `registration_env`
/// names the environment variable that may hold a registration id.
#[must_use]
pub fn container(
    inspect: &Value,
    socket: &str,
    registration_env: Option<&str>,
) -> Option<Container> {
    let id = inspect["Id"].as_str()?;
    let name = inspect["Name"].as_str()?.trim_start_matches('/');
    let state = state(inspect["State"]["Status"].as_str().unwrap_or_default());
    let alive = matches!(state, State::Running | State::Paused);
    let pid = inspect["State"]["Pid"].as_i64().unwrap_or(0);
    Some(Container {
        name: ContainerName::from(name),
        id: id.to_owned(),
        runtime: Some(socket.to_owned()),
        cgroup_path: String::new(),
        cgroup_id: 0,
        pid: if alive {
            i32::try_from(pid).unwrap_or(0)
        } else {
            0
        },
        state,
        image: text(&inspect["Config"]["Image"]),
        image_id: text(&inspect["Image"]),
        addresses: addresses(inspect),
        published: published(inspect),
        mounts: mounts(inspect),
        registration_ids: registration_ids(
            &inspect["Config"]["Labels"],
            &inspect["Config"]["Env"],
            registration_env,
        ),
    })
}

/// What says that a container belongs together with others; each source has a name space of its own but
/// the label and the variable, which are two ways to say the same.
pub(super) fn registration_ids(
    labels: &Value,
    environment: &Value,
    variable: Option<&str>,
) -> BTreeSet<String> {
    let label = |name: &str| {
        let value = labels[name].as_str()?;
        (!value.is_empty()).then_some(value)
    };
    let mut ids: BTreeSet<String> = label(REGISTRATION_LABEL)
        .map(str::to_owned)
        .into_iter()
        .collect();
    let project = COMPOSE_LABELS.iter().find_map(|name| label(name));
    ids.extend(project.map(|project| format!("compose project {project}")));
    let pod = POD_LABELS.iter().find_map(|name| label(name));
    ids.extend(pod.map(|pod| format!("pod {pod}")));
    let entries = environment.as_array().into_iter().flatten();
    ids.extend(entries.filter_map(|entry| {
        let (name, value) = entry.as_str()?.split_once('=')?;
        (Some(name) == variable && !value.is_empty()).then(|| value.to_owned())
    }));
    ids
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

/// Podman says `stopped` and `initialized` and `configured` where Docker has one word less.
pub(crate) fn state(word: &str) -> State {
    match word {
        "created" | "initialized" | "configured" => State::Created,
        "running" | "restarting" => State::Running,
        "paused" => State::Paused,
        "exited" | "stopped" => State::Exited,
        _ => State::Other,
    }
}

fn addresses(inspect: &Value) -> Vec<IpAddr> {
    let networks = inspect["NetworkSettings"]["Networks"].as_object();
    let found: BTreeSet<IpAddr> = networks
        .into_iter()
        .flat_map(serde_json::Map::values)
        .flat_map(|network| [&network["IPAddress"], &network["GlobalIPv6Address"]])
        .filter_map(|address| address.as_str()?.parse().ok())
        .collect();
    found.into_iter().collect()
}

/// Published ports as they are; as configured when the container does not run.
fn published(inspect: &Value) -> Vec<PublishedPort> {
    let live = &inspect["NetworkSettings"]["Ports"];
    let ports = if live.as_object().is_some_and(|ports| !ports.is_empty()) {
        live
    } else {
        &inspect["HostConfig"]["PortBindings"]
    };
    let mut found: Vec<PublishedPort> = Vec::new();
    for (key, bindings) in ports.as_object().into_iter().flatten() {
        let (port, protocol) = key.split_once('/').unwrap_or((key, "tcp"));
        let Ok(container_port) = port.parse() else {
            continue;
        };
        for binding in bindings.as_array().into_iter().flatten() {
            let host_port = binding["HostPort"].as_str().and_then(|p| p.parse().ok());
            let host_ip = binding["HostIp"].as_str().and_then(|ip| ip.parse().ok());
            let Some(host_port) = host_port else {
                continue;
            };
            let port = PublishedPort {
                host_ip: host_ip.unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED)),
                host_port,
                container_port,
                udp: protocol == "udp",
            };
            if !found.contains(&port) {
                found.push(port);
            }
        }
    }
    found
}

/// Volumes, bind mounts and devices; file systems in memory have no data to move.
fn mounts(inspect: &Value) -> Vec<Mount> {
    let devices = inspect["HostConfig"]["Devices"].as_array();
    let devices = devices.into_iter().flatten().map(|device| Mount {
        volume: None,
        source: PathBuf::from(text(&device["PathOnHost"])),
        destination: PathBuf::from(text(&device["PathInContainer"])),
        // Podman leaves it empty for all permissions.
        writable: device["CgroupPermissions"]
            .as_str()
            .is_none_or(|allowed| allowed.is_empty() || allowed.contains('w')),
        device: true,
    });
    inspect["Mounts"]
        .as_array()
        .into_iter()
        .flatten()
        .filter(|mount| matches!(mount["Type"].as_str(), Some("volume" | "bind")))
        .map(|mount| Mount {
            volume: (mount["Type"] == "volume").then(|| text(&mount["Name"])),
            source: PathBuf::from(text(&mount["Source"])),
            destination: PathBuf::from(text(&mount["Destination"])),
            writable: mount["RW"].as_bool().unwrap_or(true),
            device: false,
        })
        .chain(devices)
        .collect()
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Recorded from Docker 20.10.24 and Podman 4.3.1: containers made with about thirty settings.
    pub(crate) fn recorded() -> [Value; 2] {
        [
            include_str!("fixtures/docker-20.10.json"),
            include_str!("fixtures/podman-4.3.json"),
        ]
        .map(|text| serde_json::from_str(text).unwrap())
    }

    #[test]
    fn both_runtimes_answers_become_the_same_description() {
        for inspect in recorded() {
            let container = container(&inspect, "/run/x.sock", None).unwrap();
            assert_eq!(container.state, State::Running);
            assert!(container.pid > 0 && container.image_id.starts_with("sha256:"));
            assert!(container.registration_ids.contains("shop"));
            let tcp = PublishedPort {
                host_ip: "127.0.0.1".parse().unwrap(),
                host_port: 8080,
                container_port: 80,
                udp: false,
            };
            assert!(
                container.published.contains(&tcp),
                "{:?}",
                container.published
            );
            let udp = container.published.iter().find(|port| port.udp).unwrap();
            assert!(udp.container_port == 53 && udp.host_ip.is_unspecified());
            let files = container
                .mounts
                .iter()
                .find(|m| m.volume.is_none() && !m.device)
                .unwrap();
            assert!(!files.writable && files.source == std::path::Path::new("/srv/files"));
            assert!(
                container
                    .mounts
                    .iter()
                    .filter(|m| m.volume.is_some())
                    .count()
                    >= 2
            );
            assert!(!container.addresses.is_empty());
        }
    }

    #[test]
    fn every_way_to_say_that_containers_belong_together_is_heard() {
        let inspect = serde_json::json!({ "Id": "ab", "Name": "x", "Config": {
            "Labels": {
                "lifeboat.registration-id": "shop", "com.docker.compose.project": "stack",
                "io.kubernetes.pod.uid": "12-34", "other": "shop2"
            },
            "Env": ["PATH=/bin", "SERVICE_ID=till", "SERVICE_ID_2=no"],
        }});
        let ids = |variable| container(&inspect, "s", variable).unwrap().registration_ids;
        let expected = ["compose project stack", "pod 12-34", "shop"];
        assert_eq!(ids(None), expected.map(str::to_owned).into());
        assert!(ids(Some("SERVICE_ID")).contains("till"));
        assert_eq!(ids(Some("SERVICE")).len(), 3);
    }

    #[test]
    fn an_answer_without_id_is_no_container_and_one_with_nothing_else_is() {
        assert_eq!(container(&serde_json::json!({}), "s", None), None);
        let bare = serde_json::json!({ "Id": "ab", "Name": "/x", "HostConfig": null });
        let container = container(&bare, "s", None).unwrap();
        assert!(container.published.is_empty() && container.mounts.is_empty());
        assert_eq!(container.state, State::Other);
    }
}
