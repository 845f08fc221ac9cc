//! Pairing as the source does it: ask the duplicator, authenticate the lent device, authorise it.
//!
//! Invariants: each step is a type that the next one consumes, so that a device is never authorised
//! before its token was compared; a lent device is talked to only under the certificate that the
//! duplicator named; one that fails is given back and another one asked for.

use super::client::{CallError, ControlClient};
use super::identity::Fingerprint;
use super::registry::ActionCost;
use super::secret::Secret;
use super::server::PeerIdentity;
use super::token::{Claims, SealedToken, TokenError, TokenNonce, open};
use crate::model::action::Actions;
use crate::model::fleet::{
    CandidateExplanation, Configuration, DutyOutcome, PairingRecord, PeerAddress, Role, TwinNeeds,
};
use crate::model::ids::{DeviceId, PairingId, PlanId, VolumeId};
use crate::model::units::{Bytes, UnixMillis};
use serde::{Deserialize, Serialize};
use std::collections::HashSet;
use std::fmt::Write;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// What the duplicator tells each side of a pairing.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Notice {
    /// Pairing.
    pub pairing: PairingId,
    /// Plan.
    pub plan: PlanId,
    /// As what `device` is lent.
    pub role: Role,
    /// Who asked.
    pub source: DeviceId,
    /// Who is lent.
    pub device: DeviceId,
    /// Delegated actions.
    pub actions: Actions,
    /// Volumes.
    pub volumes: Vec<VolumeId>,
    /// Data expected.
    pub quantity: Bytes,
    /// When the pairing ends by itself.
    pub expires: UnixMillis,
    /// The other side.
    pub peer: PeerAddress,
    /// Its certificate.
    pub peer_fingerprint: Fingerprint,
    /// Drawn for this pairing alone.
    pub secret: Secret,
}

impl Notice {
    /// What a token of this pairing must say, with the pairing's own end as the latest expiry.
    pub(super) fn claims(&self) -> Claims {
        Claims {
            pairing: self.pairing.clone(),
            plan: self.plan.clone(),
            source: self.source.clone(),
            device: self.device.clone(),
            role: self.role,
            actions: self.actions.clone(),
            volumes: self.volumes.clone(),
            expires: self.expires,
            nonce: TokenNonce::random(),
        }
    }
}

/// Source → duplicator. The configuration may be left out: the duplicator asks if it does not know it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct PairingAsk {
    pub(super) plan: PlanId,
    pub(super) role: Role,
    pub(super) actions: Actions,
    pub(super) quantity: Bytes,
    pub(super) volumes: Vec<VolumeId>,
    pub(super) twins: TwinNeeds,
    pub(super) exclude: Vec<DeviceId>,
    pub(super) configuration: Option<Configuration>,
}

/// Duplicator → source.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "answer")]
pub(super) enum PairingAnswer {
    ConfigurationNeeded,
    NobodyFits {
        explanation: Vec<CandidateExplanation>,
    },
    /// To the question who would be lent; the first of the explanation is the one.
    Fits {
        explanation: Vec<CandidateExplanation>,
    },
    Paired {
        notice: Box<Notice>,
        explanation: Vec<CandidateExplanation>,
    },
}

/// Source → duplicator: the pairing is over.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct ReleaseRequest {
    pub(super) pairing: PairingId,
    pub(super) outcome: DutyOutcome,
    pub(super) costs: Vec<ActionCost>,
}

/// Source → lent device: a token, please.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct IssueRequest {
    pub(super) pairing: PairingId,
}

/// Source → lent device: do this, here is your token.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct AuthoriseRequest {
    /// The plan it is wanted for.
    pub plan: PlanId,
    /// The actions it is wanted for.
    pub actions: Actions,
    /// Its own token.
    pub token: SealedToken,
}

/// What the source needs.
#[derive(Clone, Debug)]
pub struct PairingRequest {
    /// Plan.
    pub plan: PlanId,
    /// As what the device is needed.
    pub role: Role,
    /// Actions to delegate; empty for a target.
    pub actions: Actions,
    /// Data expected.
    pub quantity: Bytes,
    /// Volumes.
    pub volumes: Vec<VolumeId>,
    /// For a target: what the twins need.
    pub twins: TwinNeeds,
    /// Devices that must not be chosen (for a paired device: the target).
    pub exclude: Vec<DeviceId>,
    /// What the source is made of; sent when the duplicator asks for it.
    pub configuration: Configuration,
}

/// A device lent, authenticated and authorised.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pairing {
    /// Id.
    pub id: PairingId,
    /// Plan.
    pub plan: PlanId,
    /// As what it is lent.
    pub role: Role,
    /// Who and where.
    pub peer: PeerAddress,
    /// Its certificate: use [`ControlClient::expecting`] with it.
    pub peer_fingerprint: Fingerprint,
    /// What it is authorised to do.
    pub actions: Actions,
    /// On what.
    pub volumes: Vec<VolumeId>,
    /// When the pairing ends by itself.
    pub expires: UnixMillis,
    /// The choice, candidate by candidate.
    pub explanation: Vec<CandidateExplanation>,
}

/// No device could be lent.
#[derive(Debug, thiserror::Error)]
pub enum PairError {
    /// The duplicator cannot be reached or refuses.
    #[error("the duplicator cannot lend a device: {0}")]
    Duplicator(#[source] CallError),
    /// Every device has something against it.
    #[error("no {role} fits:{}", lines(explanation))]
    NobodyFits {
        /// What was asked for.
        role: Role,
        /// Candidate by candidate.
        explanation: Vec<CandidateExplanation>,
    },
    /// The duplicator answered something that was not asked.
    #[error("the duplicator's answer does not fit the request: {0}")]
    Answer(&'static str),
}

impl PairError {
    /// Whether the same request may succeed later.
    #[must_use]
    pub fn can_retry(&self) -> bool {
        match self {
            Self::Duplicator(error) => error.can_retry(),
            Self::NobodyFits { .. } => true,
            Self::Answer(_) => false,
        }
    }
}

fn lines(explanation: &[CandidateExplanation]) -> String {
    if explanation.is_empty() {
        return " the fleet has no other device".to_owned();
    }
    explanation.iter().fold(String::new(), |mut text, one| {
        let _ = write!(text, "\n  {one}");
        text
    })
}

/// A lent device did not prove itself.
#[derive(Debug, thiserror::Error)]
enum PeerError {
    #[error(transparent)]
    Call(#[from] CallError),
    #[error("it did not prove itself: {0}")]
    Token(#[from] TokenError),
}

/// First step done: the duplicator lent a device. Nothing is proven yet.
struct Allocated {
    notice: Notice,
}

/// Second step done: the device's token opened and said what the duplicator said.
struct Authenticated {
    notice: Notice,
    token: SealedToken,
}

impl Allocated {
    async fn authenticate(self, client: &ControlClient) -> Result<Authenticated, PeerError> {
        let ask = IssueRequest {
            pairing: self.notice.pairing.clone(),
        };
        let token: SealedToken = client
            .post(&self.notice.peer, "/v1/tokens/issue", &ask)
            .await?;
        // Asked for over this connection, it is fresh; whose clock is right is the lent device's business, which will accept
        // it by its own.
        open(&self.notice.secret, &token)?.compare(&self.notice.claims())?;
        Ok(Authenticated {
            notice: self.notice,
            token,
        })
    }
}

impl Authenticated {
    async fn authorise(self, client: &ControlClient) -> Result<Notice, PeerError> {
        let ask = AuthoriseRequest {
            plan: self.notice.plan.clone(),
            actions: self.notice.actions.clone(),
            token: self.token,
        };
        let () = client
            .post(&self.notice.peer, "/v1/authorise", &ask)
            .await?;
        Ok(self.notice)
    }
}

async fn allocate(
    client: &ControlClient,
    duplicator: &PeerAddress,
    request: &PairingRequest,
    exclude: &[DeviceId],
) -> Result<(Allocated, Vec<CandidateExplanation>), PairError> {
    match answer(client, duplicator, "/v1/pairings/request", request, exclude).await? {
        PairingAnswer::Paired {
            notice,
            explanation,
        } => {
            let asked = notice.plan == request.plan
                && notice.role == request.role
                && notice.actions == request.actions
                && notice.volumes == request.volumes
                && !exclude.contains(&notice.device)
                && notice.peer.device == notice.device;
            if !asked {
                return Err(PairError::Answer("it paired for something else"));
            }
            Ok((Allocated { notice: *notice }, explanation))
        }
        _ => Err(PairError::Answer("it paired nobody")),
    }
}

/// Asks the duplicator, with the configuration if it wants it.
async fn answer(
    client: &ControlClient,
    duplicator: &PeerAddress,
    path: &str,
    request: &PairingRequest,
    exclude: &[DeviceId],
) -> Result<PairingAnswer, PairError> {
    let mut ask = PairingAsk {
        plan: request.plan.clone(),
        role: request.role,
        actions: request.actions.clone(),
        quantity: request.quantity,
        volumes: request.volumes.clone(),
        twins: request.twins.clone(),
        exclude: exclude.to_vec(),
        configuration: None,
    };
    loop {
        let answer = client
            .post(duplicator, path, &ask)
            .await
            .map_err(PairError::Duplicator)?;
        match answer {
            PairingAnswer::ConfigurationNeeded if ask.configuration.is_none() => {
                ask.configuration = Some(request.configuration.clone());
            }
            PairingAnswer::ConfigurationNeeded => {
                return Err(PairError::Answer("it asks for a configuration it was sent"));
            }
            PairingAnswer::NobodyFits { explanation } => {
                return Err(PairError::NobodyFits {
                    role: request.role,
                    explanation,
                });
            }
            other => return Ok(other),
        }
    }
}

/// Asks who would be lent now, without lending anybody: the first one fits.
///
/// # Errors
/// [`PairError`].
pub async fn consider(
    client: &ControlClient,
    duplicator: &PeerAddress,
    request: &PairingRequest,
) -> Result<Vec<CandidateExplanation>, PairError> {
    let path = "/v1/pairings/consider";
    match answer(client, duplicator, path, request, &request.exclude).await? {
        PairingAnswer::Fits { explanation } if !explanation.is_empty() => Ok(explanation),
        _ => Err(PairError::Answer("it names nobody")),
    }
}

/// Gets a device lent, authenticates it by its token and authorises it (DESIGN §6, 1 to 5). A device
/// that cannot be reached or does not prove itself is given back as failed, and another asked for.
///
/// # Errors
/// [`PairError`].
pub async fn pair(
    client: &ControlClient,
    duplicator: &PeerAddress,
    request: &PairingRequest,
) -> Result<Pairing, PairError> {
    let mut exclude = request.exclude.clone();
    let mut failed: Vec<CandidateExplanation> = Vec::new();
    loop {
        let allocated = allocate(client, duplicator, request, &exclude).await;
        let (allocated, mut explanation) = match allocated {
            Err(PairError::NobodyFits { role, explanation }) => {
                return Err(PairError::NobodyFits {
                    role,
                    explanation: merged(explanation, failed),
                });
            }
            other => other?,
        };
        let (id, peer) = (
            allocated.notice.pairing.clone(),
            allocated.notice.peer.clone(),
        );
        let direct = client.expecting(allocated.notice.peer_fingerprint);
        let proven = async {
            allocated
                .authenticate(&direct)
                .await?
                .authorise(&direct)
                .await
        };
        match proven.await {
            Ok(notice) => {
                explanation = merged(explanation, failed);
                return Ok(Pairing {
                    id,
                    plan: notice.plan,
                    role: notice.role,
                    peer,
                    peer_fingerprint: notice.peer_fingerprint,
                    actions: notice.actions,
                    volumes: notice.volumes,
                    expires: notice.expires,
                    explanation,
                });
            }
            Err(error) => {
                tracing::warn!(%peer, pairing = %id, %error, "the lent device cannot be used; asking for another");
                release(client, duplicator, &id, DutyOutcome::Failed, Vec::new())
                    .await
                    .map_err(PairError::Duplicator)?;
                failed.push(CandidateExplanation {
                    device: peer.device.clone(),
                    accepted: false,
                    reasons: vec![error.to_string()],
                });
                exclude.push(peer.device);
            }
        }
    }
}

/// How long the duplicator is asked whether a certificate was replaced.
const CERTIFICATE_TIME: Duration = Duration::from_secs(3);

/// The certificates under which peers were let in, by plan. What they were told then cannot be taken back, so the
/// duplicator is not asked about them again, least of all while a workload stands still.
#[derive(Debug, Default)]
pub struct LetIn(Mutex<HashSet<(PlanId, Fingerprint)>>);

impl LetIn {
    /// Whether the peer's certificate was replaced before it was first let in for `plan`; it is let in otherwise.
    pub async fn refuses(
        &self,
        client: &ControlClient,
        duplicator: &PeerAddress,
        plan: &PlanId,
        peer: &PeerIdentity,
    ) -> bool {
        let one = (plan.clone(), peer.certificate_fingerprint);
        if self.known().contains(&one) {
            return false;
        }
        let refuses = is_replaced(client, duplicator, peer).await;
        if !refuses {
            self.known().insert(one);
        }
        refuses
    }

    /// The plan is over.
    pub fn forget(&self, plan: &PlanId) {
        self.known().retain(|(of, _)| of != plan);
    }

    fn known(&self) -> MutexGuard<'_, HashSet<(PlanId, Fingerprint)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether the duplicator has given the peer another certificate since. One that cannot be asked takes nobody's away: what
/// is under way goes on without it.
async fn is_replaced(
    client: &ControlClient,
    duplicator: &PeerAddress,
    peer: &PeerIdentity,
) -> bool {
    let client = client.clone().with_timeout(CERTIFICATE_TIME);
    let current = client.post::<_, Fingerprint>(duplicator, "/v1/certificate", &peer.device);
    match current.await {
        Ok(current) => current != peer.certificate_fingerprint,
        Err(error) => {
            tracing::info!(peer = %peer.device, "it is not known whether its certificate was replaced: {error}");
            false
        }
    }
}

/// What happened on the spot says more than that the source excludes the device.
fn merged(
    mut explanation: Vec<CandidateExplanation>,
    failed: Vec<CandidateExplanation>,
) -> Vec<CandidateExplanation> {
    explanation.retain(|one| failed.iter().all(|other| other.device != one.device));
    explanation.extend(failed);
    explanation
}

/// Gives a lent device back, and says what its actions cost (booked when `outcome` is done).
///
/// # Errors
/// [`CallError`]. Releasing again changes nothing, so a retry is safe.
pub async fn release(
    client: &ControlClient,
    duplicator: &PeerAddress,
    pairing: &PairingId,
    outcome: DutyOutcome,
    costs: Vec<ActionCost>,
) -> Result<PairingRecord, CallError> {
    let ask = ReleaseRequest {
        pairing: pairing.clone(),
        outcome,
        costs,
    };
    client.post(duplicator, "/v1/pairings/release", &ask).await
}
