//! A plan: which containers leave, in which order they start again, what moves and who does the work.

use super::action::Actions;
use super::choice::{Choice, Way};
use super::container::Container;
use super::edge::Edge;
use super::ids::{ContainerName, DeviceId, Epoch, PairingId, PlanId, Signature, VolumeId};
use super::trace::FetchOrder;
use super::units::{Bytes, UnixMillis};
use super::volume::VolumeSpec;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// What started a migration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "kind")]
pub enum MigrationEvent {
    /// An operator asked for it.
    Operator,
    /// The policy's verdict; each line is one piece of its evidence.
    Degraded {
        /// Evidence, as a person reads it.
        evidence: Vec<String>,
    },
}

/// One container of a plan with all that its twin needs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PlannedContainer {
    /// As discovered on the source.
    pub container: Container,
    /// Ports on which it serves: the twin is ready when they listen.
    pub service_ports: BTreeSet<u16>,
    /// The runtime's full description.
    pub inspect: serde_json::Value,
    /// Descriptions of its networks.
    pub networks: Vec<serde_json::Value>,
    /// Descriptions of its named volumes.
    pub volumes: Vec<serde_json::Value>,
    /// Size of its image.
    pub image_size: Bytes,
}

/// One step of the start order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlannedStep {
    /// Containers that may start together, or, for a cycle, one after another in this order.
    pub containers: Vec<ContainerName>,
    /// Whether it is a cycle.
    pub sequential: bool,
}

/// A device that the duplicator chose, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Chosen {
    /// The device.
    pub device: DeviceId,
    /// Its control address.
    pub address: String,
    /// Pairing, for a paired device.
    pub pairing: Option<PairingId>,
    /// The choice, candidate by candidate.
    pub explanation: Vec<String>,
}

/// Something that stops a plan from running.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Blocker {
    /// The container, volume or device.
    pub what: String,
    /// The parameter that failed, and what to do.
    pub why: String,
}

/// How long the move should take.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Estimate {
    /// Data to move.
    pub bytes: Bytes,
    /// Bytes a second it is based on.
    pub rate: Bytes,
    /// Where the rate comes from.
    pub basis: String,
    /// Bytes divided by rate.
    pub duration: Duration,
}

/// What a plan must have before it may evacuate; nothing by default.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct PlanGuards {
    /// Roles of which each must approve it.
    pub approvals: Vec<String>,
    /// How long they are waited for.
    pub approval_timeout: Duration,
    /// Whether it goes on then all the same.
    pub proceed_on_timeout: bool,
    /// Share of the fleet's live devices, in percent, that may evacuate at a time; none: no limit.
    pub max_evacuating: Option<f64>,
    /// Most bytes a second that the copy may read; none: no limit.
    pub limit: Option<Bytes>,
    /// Volumes by name that may leave although their disk does not give up everything.
    pub accepted_losses: Vec<String>,
    /// Whether it copies or switches first; none: it is chosen.
    pub way: Option<Way>,
}

/// The whole plan.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// Id.
    pub id: PlanId,
    /// When it was made.
    pub created: UnixMillis,
    /// Why.
    pub event: MigrationEvent,
    /// What it must have before it may evacuate.
    #[serde(default)]
    pub guards: PlanGuards,
    /// The device that is left.
    pub source: DeviceId,
    /// Containers that leave, by name.
    pub containers: Vec<PlannedContainer>,
    /// Start order of the twins.
    pub order: Vec<PlannedStep>,
    /// Groups that stay together.
    pub groups: Vec<Vec<ContainerName>>,
    /// The relations the order rests on.
    pub edges: Vec<Edge>,
    /// Volumes that move.
    pub volumes: Vec<VolumeSpec>,
    /// What of them is fetched first when the twins start before their data is there, by recorded access traces.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub fetch_orders: BTreeMap<VolumeId, FetchOrder>,
    /// The epoch from which the source owns each volume; 0 for one that never moved.
    pub epochs: BTreeMap<VolumeId, Epoch>,
    /// Actions that the paired device does.
    pub delegated: Actions,
    /// What the operator should know: widened requests, actions that stayed with the source.
    pub notes: Vec<String>,
    /// What blocks it; empty when it can run.
    pub blockers: Vec<Blocker>,
    /// Estimate.
    pub estimate: Estimate,
    /// Whether it copies or switches first, as of when it was made; asked again after every round.
    #[serde(default)]
    pub choice: Option<Choice>,
    /// Target, once allocated.
    pub target: Option<Chosen>,
    /// Paired device, once allocated.
    pub paired: Option<Chosen>,
}

impl Plan {
    /// The planned container called `name`.
    #[must_use]
    pub fn container(&self, name: &ContainerName) -> Option<&PlannedContainer> {
        self.containers
            .iter()
            .find(|planned| &planned.container.name == name)
    }
}

/// One volume as the source gives it up: its last epoch and what it held.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeRelease {
    /// Number within the plan.
    pub volume: VolumeId,
    /// Name for people.
    pub name: String,
    /// The epoch that the source owned last.
    pub epoch: Epoch,
    /// What it held.
    #[serde(flatten)]
    pub content: Content,
}

/// What a released volume is known by. A target that knows only `root` cannot read a release of the other kind,
/// and refuses it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Content {
    /// Root over everything it held, all of which is on the target.
    #[serde(rename = "root")]
    Sealed(Signature),
    /// Root over the list of what it holds: names, sizes, modes, owners, times, attributes. The bytes come later.
    #[serde(rename = "list")]
    Later(Signature),
}

impl std::fmt::Display for Content {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Sealed(root) => write!(f, "root {root}"),
            Self::Later(root) => write!(f, "list {root}"),
        }
    }
}

/// The commit point of a switch: from here the source owns nothing of the plan.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Release {
    /// Plan.
    pub plan: PlanId,
    /// Who gives up.
    pub source: DeviceId,
    /// Who may take over.
    pub target: DeviceId,
    /// What.
    pub volumes: Vec<VolumeRelease>,
    /// Bytes of the blocks over which each root of data is; a build before this was told did not say.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub block_sizes: BTreeMap<VolumeId, Bytes>,
    /// Sizes of the devices among them as they were sent, which may have grown since the plan was made.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub device_sizes: BTreeMap<VolumeId, Bytes>,
    /// When it was written.
    pub at: UnixMillis,
}

/// A release and the source's signature over its exact bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SignedRelease {
    /// [`Release`] as JSON; these bytes are signed.
    pub body: String,
    /// The source's certificate, DER.
    #[serde(with = "hex::serde")]
    pub certificate: Vec<u8>,
    /// Signature by the certificate's key.
    #[serde(with = "hex::serde")]
    pub signature: Vec<u8>,
}

/// What became of one twin.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TwinState {
    /// Container.
    pub container: ContainerName,
    /// How it was found ready (`health check`, `ports 5432`, `settled`); none while it is not.
    pub ready: Option<String>,
    /// From its start to ready.
    pub after: Duration,
    /// What of the source's configuration the target's runtime could not take over.
    pub not_carried: Vec<String>,
    /// Why it is not ready, when it failed.
    pub error: Option<String>,
    /// Where it has gone since.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub left: Option<Left>,
}

/// Where a twin has gone from its target.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Left {
    /// The target of that plan.
    pub device: DeviceId,
    /// The plan.
    pub plan: PlanId,
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_target_that_knows_only_roots_cannot_read_a_release_that_comes_before_the_data() {
        let release = |content| VolumeRelease {
            volume: VolumeId(1),
            name: "data".into(),
            epoch: Epoch(7),
            content,
        };
        let root = Signature([0xab; 32]);
        let (sealed, later) = (
            release(Content::Sealed(root)),
            release(Content::Later(root)),
        );
        let written = serde_json::to_value(&sealed).unwrap();
        let text = root.to_string();
        assert_eq!(
            written,
            json!({ "volume": 1, "name": "data", "epoch": 7, "root": text })
        );
        let written = serde_json::to_value(&later).unwrap();
        assert!(written.get("root").is_none(), "{written}");
        for one in [sealed, later] {
            let text = serde_json::to_string(&one).unwrap();
            assert_eq!(serde_json::from_str::<VolumeRelease>(&text).unwrap(), one);
        }
        let neither = json!({ "volume": 1, "name": "data", "epoch": 7 });
        assert!(serde_json::from_value::<VolumeRelease>(neither).is_err());
    }
}
