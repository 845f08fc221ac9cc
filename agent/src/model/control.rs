//! What agents say to each other about a plan over the control channel. Requests and answers only.

use super::action::Actions;
use super::ids::{DeviceId, Epoch, PlanId, Signature, VolumeId};
use super::plan::{Plan, SignedRelease, TwinState, VolumeRelease};
use super::secret_hex;
use super::units::Bytes;
use super::volume::TimesKept;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;
use zeroize::{Zeroize, ZeroizeOnDrop};

/// 32 secret bytes on their way over mutual TLS; wiped when dropped.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, Zeroize, ZeroizeOnDrop)]
#[serde(transparent)]
pub struct Secret(#[serde(with = "secret_hex")] pub [u8; 32]);

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
    /// Why it cannot start the twins before the data is here; none when it can.
    #[serde(default = "too_old")]
    pub cannot_serve: Option<String>,
    /// Which times the file system of each volume's place keeps, where it does not keep all.
    #[serde(default)]
    pub times: BTreeMap<VolumeId, TimesKept>,
}

#[expect(
    clippy::unnecessary_wraps,
    reason = "serde wants the type of the field"
)]
fn too_old() -> Option<String> {
    Some("the target's agent is of a version that does not do it".to_owned())
}

/// Source → target, the workload is frozen: take the list of every tree, durably, in these epochs; answered with the
/// list of each as the target has it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Open {
    /// The epoch that will be released, volume by volume.
    pub epochs: BTreeMap<VolumeId, Epoch>,
}

/// Source → target: everything is there, as the source computed these roots anew over its frozen data.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Whole {
    /// Root of each tree.
    pub roots: BTreeMap<VolumeId, Signature>,
}

/// The target's word that it gives the volumes of a plan back that was switched first: its twins have ended for good, and
/// every change that they made is in the source's mirror. It travels signed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GivenBack {
    /// Plan.
    pub plan: PlanId,
    /// Who gives it back.
    pub target: DeviceId,
    /// Changes of each tree.
    pub changes: BTreeMap<VolumeId, u64>,
}

/// How far the data of a plan is that was switched first.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Arrival {
    /// Bytes of all files as the source listed them.
    pub bytes: Bytes,
    /// Bytes that are not here yet.
    pub absent: Bytes,
    /// Bytes that were copied before the switch and found to be the same; of this life of the target's agent.
    #[serde(default)]
    pub held: Bytes,
    /// Root of each tree over what arrived; empty while something is absent.
    pub roots: BTreeMap<VolumeId, Signature>,
    /// Whether the source is not needed any more.
    pub whole: bool,
    /// What is in the way.
    pub trouble: Option<String>,
    /// Why what the twins write is on the target alone for now; none while it is mirrored here.
    #[serde(default)]
    pub unmirrored: Option<String>,
}

impl Arrival {
    /// How much has arrived, for people.
    #[must_use]
    pub fn share(&self) -> String {
        let Self {
            bytes,
            absent,
            held,
            ..
        } = self;
        let arrived = bytes.0.saturating_sub(absent.0);
        let percent = (arrived * 100).checked_div(bytes.0).unwrap_or(100);
        let alone = self.unmirrored.iter();
        let alone = alone.map(|why| format!(", writes NOT mirrored: {why}"));
        let held = Some(held).filter(|held| held.0 > 0);
        let held = held.map(|held| format!(", {held} copied before"));
        format!(
            "{percent} % ({} of {bytes}{}){}",
            Bytes(arrived),
            held.unwrap_or_default(),
            alone.collect::<String>()
        )
    }
}

/// Source → target or paired device, and paired device → target: blocks of the plan's volumes are given out on demand.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Provided {
    /// Where.
    pub data: SocketAddr,
    /// Proves that a data connection is of who was answered so.
    pub link_key: Secret,
    /// Blocks are sealed under this key; none for a paired device, to which they go plain over a trusted link.
    pub data_key: Option<Secret>,
}

/// Target → paired device: answer in the source's stead what is asked for of this volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StandIn {
    /// Volume.
    pub volume: VolumeId,
    /// Number of the target's copy, drawn for it: nothing that was fetched for another one answers it.
    pub copy: u64,
    /// Whether what the target does not ask for is fetched too.
    pub fill: bool,
}

/// What a paired device answered in the source's stead, since its agent was last started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoodIn {
    /// Bytes given to the target.
    pub answered: Bytes,
    /// Bytes fetched from the source for that.
    pub fetched: Bytes,
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
    /// Whom it answers, and for which volumes, when `serve` is delegated.
    #[serde(default)]
    pub serve: Option<ServeFor>,
    /// The most data to expect.
    pub quantity: Bytes,
}

/// For whom and what a paired device stands in for the source.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServeFor {
    /// The plan's target, which alone is let in.
    pub target: DeviceId,
    /// The volumes that it may ask for.
    pub volumes: Vec<VolumeId>,
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
    /// Each volume with the epoch it is owned from and what arrived.
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
    /// `receiving`, `starting`, `filling`, `running`, `failed`.
    pub phase: String,
    /// Ownership, once taken.
    pub owns: Option<Owns>,
    /// Last whole epoch of each volume and its root, or its list and the list's root, as the target computed it.
    pub arrived: Vec<VolumeRelease>,
    /// Twins in start order.
    pub twins: Vec<TwinState>,
    /// Time from ownership to the last twin's readiness, once all are ready.
    pub start_up: Option<Duration>,
    /// How far the data is of a plan that was switched first.
    #[serde(default)]
    pub arrival: Option<Arrival>,
}

/// Source → target: the plan was rolled back.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Dismiss {
    /// Why.
    pub reason: String,
}
