//! What agents say to each other about a plan over the control channel. Requests and answers only.

use super::action::Actions;
use super::ids::{DeviceId, PlanId, VolumeId};
use super::plan::{Plan, SignedRelease, TwinState, VolumeRelease};
use super::units::Bytes;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

/// 32 secret bytes on their way over mutual TLS.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Secret(#[serde(with = "hex::serde")] pub [u8; 32]);

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret(…)")
    }
}

/// Source → target: please take this plan.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Offer {
    /// The plan with everything the twins need.
    pub plan: Plan,
    /// Diff ids of the layers of each image volume, the lowest first.
    pub layers: BTreeMap<VolumeId, Vec<String>>,
}

/// Target → source: ready to receive.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct OfferAccepted {
    /// Where the data goes.
    pub data: SocketAddr,
    /// Proves to the target that a data connection belongs to this plan.
    pub link_key: Secret,
    /// Blocks are sealed under this key; only source (or the device that encrypts) and target have it.
    pub data_key: Secret,
    /// Image volumes that the target holds already.
    pub images_present: Vec<VolumeId>,
    /// How many of the lowest layers of each other image volume it holds.
    pub layers_present: BTreeMap<VolumeId, usize>,
}

/// Source → target: blocks of the plan's volumes are given out on demand.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Provided {
    /// Where.
    pub data: SocketAddr,
    /// Proves to the source that a data connection is the target's.
    pub link_key: Secret,
    /// Blocks are sealed under this key.
    pub data_key: Secret,
}

/// Source → paired device, after authorisation: do these actions.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RelayRequest {
    /// Plan.
    pub plan: PlanId,
    /// Actions; the token must cover them.
    pub actions: Actions,
    /// The target's data address and link key, when `transfer` is delegated.
    pub forward: Option<(SocketAddr, Secret)>,
    /// The target's data key, when `encrypt` is delegated.
    pub seal_key: Option<Secret>,
    /// The most data to expect.
    pub quantity: Bytes,
}

/// Paired device → source: ready.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RelayAccepted {
    /// Where the data goes.
    pub data: SocketAddr,
    /// Proves that a data connection belongs to this plan.
    pub link_key: Secret,
}

/// Target → source: the target owns every volume from its next epoch on, durably.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owns {
    /// Plan.
    pub plan: PlanId,
    /// Owner.
    pub target: DeviceId,
    /// Each volume with the epoch it is owned from and the root that arrived.
    pub volumes: Vec<VolumeRelease>,
}

/// Source → target: the release.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct TakeOver {
    /// Signed release.
    pub release: SignedRelease,
}

/// Target's state of a plan.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct TargetStatus {
    /// `receiving`, `starting`, `running`, `failed`.
    pub phase: String,
    /// Ownership, once taken.
    pub owns: Option<Owns>,
    /// Last whole epoch of each volume and its root, as the target computed it.
    pub arrived: Vec<VolumeRelease>,
    /// Twins in start order.
    pub twins: Vec<TwinState>,
    /// Time from ownership to the last twin's readiness, once all are ready.
    pub start_up: Option<Duration>,
}

/// Source → target: the plan was rolled back.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Dismiss {
    /// Why.
    pub reason: String,
}
