//! What the agent sees of its host now: one value, replaced at every sweep.

use crate::health::Verdict;
use crate::model::container::Container;
use crate::model::edge::{Correlated, Protocol};
use crate::model::ids::ContainerName;
use crate::model::telemetry::Snapshot;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// The latest view.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct HostView {
    /// Containers and bare cgroups.
    pub containers: Vec<Container>,
    /// Runtimes that do not answer, and the like.
    pub problems: Vec<String>,
    /// Telemetry.
    pub snapshot: Snapshot,
    /// Verdict; none without a policy.
    pub verdict: Option<Verdict>,
}

impl HostView {
    /// Pairs of containers with the same registration id.
    #[must_use]
    pub fn correlated(&self) -> Vec<Correlated> {
        let mut by_id: BTreeMap<&str, Vec<&ContainerName>> = BTreeMap::new();
        for container in &self.containers {
            for id in &container.registration_ids {
                by_id.entry(id).or_default().push(&container.name);
            }
        }
        let chains = by_id.values().flat_map(|names| names.windows(2));
        let pairs: BTreeSet<Correlated> = chains
            .map(|pair| Correlated(pair[0].clone(), pair[1].clone()))
            .collect();
        pairs.into_iter().collect()
    }

    /// Ports on which a container serves: seen in traffic, listened on, or published.
    #[must_use]
    pub fn service_ports(&self, name: &ContainerName) -> BTreeSet<u16> {
        let mut ports = self
            .snapshot
            .listening
            .get(name)
            .cloned()
            .unwrap_or_default();
        // A listener in the range the kernel hands out at random is no service (ip_local_port_range).
        ports.retain(|port| *port < 32_768);
        for edge in self
            .snapshot
            .edges
            .iter()
            .filter(|edge| &edge.parent == name && edge.protocol == Protocol::Tcp)
        {
            ports.insert(edge.port);
        }
        for container in self
            .containers
            .iter()
            .filter(|container| &container.name == name)
        {
            ports.extend(
                container
                    .published
                    .iter()
                    .filter(|p| !p.udp)
                    .map(|p| p.container_port),
            );
        }
        ports.remove(&0);
        ports
    }
}
