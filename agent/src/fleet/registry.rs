//! The registry: what the duplicator remembers, as one trait with several engines.
//!
//! Invariants: every method is one transaction; `allocate` decides and lends in the same one, so that a
//! device is never lent beyond its capacity, also when several duplicators use one registry.
//! Non-goals: deciding (`allocate` does, purely), telling anybody (`duplicator` does).

use super::allocate::{Admission, Choice, Need, Rules};
use super::compare::Compared;
use super::identity::Fingerprint;
use super::secret::Secret;
use crate::model::action::Action;
use crate::model::fleet::{
    CandidateExplanation, Configuration, Device, DutyOutcome, PairingRecord, Utilisation,
};
use crate::model::ids::{DeviceId, PairingId, PlanId, VolumeId};
use crate::model::units::{Bytes, UnixMillis};
use serde::{Deserialize, Serialize};
use std::future::Future;
use std::net::SocketAddr;

/// A join token that was handed out; the secret itself is not kept.
#[derive(Clone, Debug)]
pub struct Invitation {
    /// Hash of its secret.
    pub secret_hash: [u8; 32],
    /// The one device it is for; any new device if none.
    pub device: Option<DeviceId>,
    /// When it ends.
    pub expires: UnixMillis,
}

/// A device that shows a join token.
#[derive(Clone, Debug)]
pub struct Enrolment {
    /// Its id.
    pub device: DeviceId,
    /// Its control address.
    pub address: SocketAddr,
    /// Fingerprint of the certificate it gets.
    pub fingerprint: Fingerprint,
}

/// What an agent says of its device, again and again.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Heartbeat {
    /// Its control address.
    pub address: SocketAddr,
    /// Lifeboat's version.
    pub version: String,
    /// Seconds since the agent started.
    pub uptime_seconds: u64,
    /// Configuration.
    pub configuration: Configuration,
    /// Utilisation.
    pub utilisation: Utilisation,
    /// Plans that this device drives as source: pairings of others are given back after a while.
    pub plans: Vec<PlanId>,
    /// What it compares with the fleet.
    #[serde(default)]
    pub compared: Compared,
}

/// What is asked of `allocate` besides the [`Need`].
#[derive(Clone, Debug)]
pub struct Ask {
    /// Plan.
    pub plan: PlanId,
    /// Volumes concerned.
    pub volumes: Vec<VolumeId>,
    /// What is needed.
    pub need: Need,
    /// When the pairing ends by itself.
    pub expires: UnixMillis,
}

/// A device lent.
#[derive(Clone, Debug)]
pub struct Lending {
    /// The pairing.
    pub pairing: PairingRecord,
    /// Volumes concerned.
    pub volumes: Vec<VolumeId>,
    /// When it ends by itself.
    pub expires: UnixMillis,
    /// The secret drawn for it.
    pub secret: Secret,
    /// The lent device's control address.
    pub address: SocketAddr,
    /// Fingerprint of the lent device's certificate.
    pub fingerprint: Fingerprint,
}

/// The answer of `allocate`.
#[derive(Clone, Debug)]
pub struct Allocation {
    /// What was lent; none if nobody fits.
    pub lending: Option<Lending>,
    /// The choice, candidate by candidate.
    pub explanation: Vec<CandidateExplanation>,
}

/// What doing one action cost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ActionCost {
    /// Action.
    pub action: Action,
    /// Data it was done on.
    pub bytes: Bytes,
    /// CPU time it took, in nanoseconds of one core.
    pub core_nanos: u64,
}

/// The registry refused or failed.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// The engine failed.
    #[error("registry {place}: {reason}")]
    Engine {
        /// Which database.
        place: String,
        /// Cause.
        reason: String,
    },
    /// The join token is not known here.
    #[error(
        "this join token is not known here; ask the operator for a new one (`lifeboat fleet invite`)"
    )]
    InvitationUnknown,
    /// The join token was used.
    #[error("this join token was used before, by {0}; ask for a new one (`lifeboat fleet invite`)")]
    InvitationUsed(DeviceId),
    /// The join token is over.
    #[error("this join token has expired; ask for a new one (`lifeboat fleet invite`)")]
    InvitationExpired,
    /// The join token is for another device.
    #[error("this join token is for {0}; join with that id or ask for another token")]
    InvitationForAnother(DeviceId),
    /// The device exists, and the token does not say that it may be replaced.
    #[error(
        "there is a device {0} already; to enrol it anew, invite it by name (`lifeboat fleet invite --for {0}`)"
    )]
    DeviceExists(DeviceId),
    /// The device is not enrolled here.
    #[error("device {0} is not enrolled here; enrol it with `lifeboat fleet join`")]
    DeviceUnknown(DeviceId),
    /// No such pairing.
    #[error("there is no pairing {0}")]
    PairingUnknown(PairingId),
}

/// What every engine does.
pub trait Registry: Clone + Send + Sync + 'static {
    /// Remembers a join token.
    fn invite(
        &self,
        invitation: Invitation,
    ) -> impl Future<Output = Result<(), RegistryError>> + Send;

    /// Uses up a join token and enters its device, both or neither.
    fn enrol(
        &self,
        secret_hash: [u8; 32],
        enrolment: Enrolment,
        now: UnixMillis,
    ) -> impl Future<Output = Result<(), RegistryError>> + Send;

    /// The certificate that `device` was given last.
    fn fingerprint(
        &self,
        device: DeviceId,
    ) -> impl Future<Output = Result<Fingerprint, RegistryError>> + Send;

    /// Enters what a device says of itself. Returns the pairings this ended: those that the device, as
    /// source, had not given back although it does not drive their plan since `abandoned_before`.
    fn heartbeat(
        &self,
        device: DeviceId,
        heartbeat: Heartbeat,
        abandoned_before: UnixMillis,
        now: UnixMillis,
    ) -> impl Future<Output = Result<Vec<PairingId>, RegistryError>> + Send;

    /// All devices, by id.
    fn devices(&self) -> impl Future<Output = Result<Vec<Device>, RegistryError>> + Send;

    /// Chooses a device and lends it. The same source asking again for the same plan and role gets the
    /// pairing it has.
    fn allocate(
        &self,
        ask: Ask,
        rules: Rules,
        now: UnixMillis,
    ) -> impl Future<Output = Result<Allocation, RegistryError>> + Send;

    /// Chooses as [`Registry::allocate`] would now, and lends nothing.
    fn consider(
        &self,
        need: Need,
        rules: Rules,
        now: UnixMillis,
    ) -> impl Future<Output = Result<Choice, RegistryError>> + Send;

    /// Lets `source` evacuate with `plan`, unless more than `max_percent` of the live devices would then
    /// evacuate; one always may. It counts until the source's heartbeats do not name the plan any more.
    fn admit(
        &self,
        source: DeviceId,
        plan: PlanId,
        max_percent: Option<f64>,
        rules: Rules,
        now: UnixMillis,
    ) -> impl Future<Output = Result<Admission, RegistryError>> + Send;

    /// A pairing, open or not.
    fn pairing(
        &self,
        id: PairingId,
    ) -> impl Future<Output = Result<PairingRecord, RegistryError>> + Send;

    /// Ends a pairing, frees its capacity and books what it cost. Ending it again changes nothing.
    fn release(
        &self,
        id: PairingId,
        outcome: DutyOutcome,
        costs: Vec<ActionCost>,
        now: UnixMillis,
    ) -> impl Future<Output = Result<PairingRecord, RegistryError>> + Send;
}
