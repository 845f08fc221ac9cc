//! What the agent sees of its host now: one value, replaced at every sweep.

use crate::health::Verdict;
use crate::model::container::Container;
use crate::model::edge::{Correlated, Protocol};
use crate::model::ids::ContainerName;
use crate::model::telemetry::Snapshot;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

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
    /// Which sweep of the agent's life it is, from 1; 0 before the first.
    #[serde(default)]
    pub number: u64,
    /// When it was swept; told to nobody else.
    #[serde(skip)]
    pub swept: Option<Instant>,
}

/// A sweep of a crowded host may take seconds: one that is younger is never called late.
const SWEPT_LATELY: Duration = Duration::from_secs(5);

impl HostView {
    /// How long ago this was swept; none before the first sweep.
    #[must_use]
    pub fn age(&self) -> Option<Duration> {
        self.swept.map(|at| at.elapsed())
    }

    /// The verdict of now: that of the sweep, or `unknown` when that is older than `stale_after`.
    #[must_use]
    pub fn verdict_now(&self, stale_after: Duration) -> Option<Verdict> {
        let silence = self
            .age()
            .filter(|age| *age > stale_after.max(SWEPT_LATELY));
        let verdict = self.verdict.as_ref()?;
        Some(match silence {
            None => verdict.clone(),
            Some(silence) => verdict.unseen(self.snapshot.at, silence),
        })
    }

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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::health::VerdictKind;

    #[test]
    fn a_verdict_of_a_sweep_that_is_too_old_is_unknown_and_says_what_it_was() {
        let stale = Duration::from_secs(10);
        let mut view = HostView {
            verdict: Some(Verdict {
                kind: VerdictKind::Healthy,
                ..Verdict::default()
            }),
            swept: Some(Instant::now()),
            ..HostView::default()
        };
        assert_eq!(view.verdict_now(stale), view.verdict);
        view.swept = Instant::now().checked_sub(Duration::from_secs(42));
        assert_eq!(view.verdict_now(Duration::from_mins(5)), view.verdict);
        let late = view.verdict_now(stale).unwrap();
        assert_eq!(late.kind, VerdictKind::Unknown);
        let text = &late.missing[0].text;
        assert!(text.starts_with("no sweep for 42"), "{text}");
        assert!(text.contains("healthy"), "{text}");
    }
}
