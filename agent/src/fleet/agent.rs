//! The agent's side of the fleet: heartbeats, and being lent.
//!
//! Invariants: only the duplicator can make or end a pairing here; a token is accepted once, unexpired,
//! from the peer it was issued for, for its plan and its actions; pairings, issued and accepted tokens
//! are durable before they are answered, so that a restart forgets neither a consent nor a use.
//! Non-goals: what an authorised peer may then make this device do (the daemon asks `authorised`).

use super::client::ControlClient;
use super::duplicator::HeartbeatAnswer;
use super::files::write_private;
use super::now;
use super::pairing::{AuthoriseRequest, IssueRequest, Notice};
use super::registry::Heartbeat;
use super::server::{ErrorAnswer, PeerIdentity};
use super::token::{Claims, SealedToken, TokenError, TokenNonce, open, seal};
use crate::model::action::Actions;
use crate::model::fleet::{PeerAddress, Role};
use crate::model::ids::{DeviceId, PairingId, PlanId, VolumeId};
use crate::model::units::UnixMillis;
use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::post;
use axum::{Extension, Json, Router};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

/// A token must be used within this time: the source returns it at once.
const TOKEN_LIFETIME_MS: u64 = 5 * 60 * 1000;
/// Tokens a source may ask for in one pairing: it needs one, and one more after each lost answer.
const TOKENS_PER_PAIRING: usize = 64;
/// Until the duplicator says otherwise.
const FIRST_HEARTBEAT_INTERVAL: Duration = Duration::from_secs(5);

/// What a peer may make this device do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Authorisation {
    /// Pairing.
    pub pairing: PairingId,
    /// Plan.
    pub plan: PlanId,
    /// Who may.
    pub source: DeviceId,
    /// As what this device is lent.
    pub role: Role,
    /// What it does.
    pub actions: Actions,
    /// On what.
    pub volumes: Vec<VolumeId>,
    /// Until when.
    pub expires: UnixMillis,
    /// The control address of the source.
    pub peer: PeerAddress,
}

/// A token was refused, or could not be issued.
#[derive(Debug, thiserror::Error)]
pub enum TokenRefused {
    /// No such pairing.
    #[error("there is no pairing {0} here; it ended, or the duplicator never announced it")]
    PairingUnknown(PairingId),
    /// Another device asks, or under another certificate.
    #[error(
        "pairing {pairing} is for {expected}, and this is {peer} under certificate {fingerprint}"
    )]
    OtherPeer {
        /// Pairing.
        pairing: PairingId,
        /// Whom it is for.
        expected: DeviceId,
        /// Who asks.
        peer: DeviceId,
        /// Under which certificate.
        fingerprint: super::identity::Fingerprint,
    },
    /// The token is of another plan.
    #[error("the token is for plan {token}, not for plan {asked}")]
    OtherPlan {
        /// In the token.
        token: PlanId,
        /// In the request.
        asked: PlanId,
    },
    /// The token does not cover the actions.
    #[error("the token is for {token}, not for {asked}")]
    OtherActions {
        /// In the token.
        token: Actions,
        /// In the request.
        asked: Actions,
    },
    /// Used before.
    #[error("the token was used before; ask for a new one")]
    Replayed,
    /// Right secret, but this device did not make it.
    #[error("this device did not issue the token")]
    NotIssuedHere,
    /// Too many.
    #[error("{TOKENS_PER_PAIRING} tokens were issued for pairing {0}; end it and pair again")]
    TooMany(PairingId),
    /// It does not open, is over, or differs from the pairing.
    #[error(transparent)]
    Token(#[from] TokenError),
    /// The state cannot be kept.
    #[error("{path}: {error}; the token was not accepted")]
    Storage {
        /// File.
        path: PathBuf,
        /// Cause.
        error: std::io::Error,
    },
}

impl TokenRefused {
    /// The word by which a program can tell this refusal.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::PairingUnknown(_) => "pairing-unknown",
            Self::OtherPeer { .. } => "other-peer",
            Self::OtherPlan { .. } => "other-plan",
            Self::OtherActions { .. } => "other-actions",
            Self::Replayed => "replayed",
            Self::NotIssuedHere => "not-issued-here",
            Self::TooMany(_) => "too-many-tokens",
            Self::Token(TokenError::Expired) => "expired",
            Self::Token(TokenError::WrongSecret) => "wrong-secret",
            Self::Token(TokenError::Altered) => "altered",
            Self::Token(TokenError::Version(_)) => "version",
            Self::Token(TokenError::Differs { .. }) => "differs",
            Self::Storage { .. } => "storage",
        }
    }
}

impl From<TokenRefused> for ErrorAnswer {
    fn from(error: TokenRefused) -> Self {
        let status = match &error {
            TokenRefused::PairingUnknown(_) => StatusCode::NOT_FOUND,
            TokenRefused::Storage { .. } => StatusCode::INTERNAL_SERVER_ERROR,
            _ => StatusCode::FORBIDDEN,
        };
        tracing::warn!(%error, "token refused");
        let code = error.code();
        Self::new(status, error).code(code)
    }
}

#[derive(Clone, Serialize, Deserialize)]
struct Lent {
    notice: Notice,
    /// Each issued token, and whether it was accepted.
    tokens: BTreeMap<String, bool>,
    authorised: bool,
}

/// The pairings in which this device is lent.
pub struct PairedState {
    path: PathBuf,
    device: DeviceId,
    lent: Mutex<BTreeMap<PairingId, Lent>>,
}

impl PairedState {
    /// Opens the state kept in `dir`, empty if there is none.
    ///
    /// # Errors
    /// [`TokenRefused::Storage`] when it is there but cannot be read.
    pub fn open(dir: &Path, device: DeviceId) -> Result<Self, TokenRefused> {
        let path = dir.join("lent.json");
        let storage = |error| TokenRefused::Storage {
            path: path.clone(),
            error,
        };
        let lent = match std::fs::read(&path) {
            Ok(text) => serde_json::from_slice(&text).map_err(|error| storage(error.into()))?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => BTreeMap::new(),
            Err(error) => return Err(storage(error)),
        };
        Ok(Self {
            path,
            device,
            lent: Mutex::new(lent),
        })
    }

    /// Changes a copy, stores it, and only then puts it in place.
    fn change<T>(
        &self,
        work: impl FnOnce(&mut BTreeMap<PairingId, Lent>) -> Result<T, TokenRefused>,
    ) -> Result<T, TokenRefused> {
        let mut lent = self.lent.lock().unwrap_or_else(PoisonError::into_inner);
        let mut changed = lent.clone();
        let now = now();
        changed.retain(|_, one| one.notice.expires > now);
        let done = work(&mut changed)?;
        let storage = |error| TokenRefused::Storage {
            path: self.path.clone(),
            error,
        };
        let text = serde_json::to_vec(&changed).map_err(|error| storage(error.into()))?;
        write_private(&self.path, &text).map_err(storage)?;
        *lent = changed;
        Ok(done)
    }

    /// Enters a pairing the duplicator announced. Announced again, it keeps what it has.
    ///
    /// # Errors
    /// [`TokenRefused::NotIssuedHere`] when it lends another device; [`TokenRefused::Storage`].
    pub fn announce(&self, notice: Notice) -> Result<(), TokenRefused> {
        if notice.device != self.device {
            return Err(TokenRefused::PairingUnknown(notice.pairing));
        }
        self.change(|lent| {
            // A device has one duty in a plan: of an earlier one the end was not heard.
            lent.retain(|id, one| {
                *id == notice.pairing
                    || one.notice.plan != notice.plan
                    || one.notice.source != notice.source
            });
            match lent.get_mut(&notice.pairing) {
                Some(known) => known.notice = notice,
                None => {
                    let one = Lent {
                        tokens: BTreeMap::new(),
                        authorised: false,
                        notice,
                    };
                    lent.insert(one.notice.pairing.clone(), one);
                }
            }
            Ok(())
        })
    }

    /// Ends a pairing; what it authorised is not any more.
    ///
    /// # Errors
    /// [`TokenRefused::Storage`].
    pub fn end(&self, pairing: &PairingId) -> Result<(), TokenRefused> {
        self.change(|lent| {
            lent.remove(pairing);
            Ok(())
        })
    }

    /// Issues a token for a pairing to its source.
    ///
    /// # Errors
    /// [`TokenRefused`].
    pub fn issue(
        &self,
        pairing: &PairingId,
        peer: &PeerIdentity,
    ) -> Result<SealedToken, TokenRefused> {
        self.change(|lent| {
            let one = of_peer(lent, pairing, peer)?;
            if one.tokens.len() >= TOKENS_PER_PAIRING {
                return Err(TokenRefused::TooMany(pairing.clone()));
            }
            let expires = now().0.saturating_add(TOKEN_LIFETIME_MS);
            let claims = Claims {
                expires: UnixMillis(expires.min(one.notice.expires.0)),
                ..one.notice.claims()
            };
            let token = seal(&one.notice.secret, &claims)?;
            one.tokens.insert(key(claims.nonce), false);
            Ok(token)
        })
    }

    /// Accepts this device's own token from the source, once.
    ///
    /// # Errors
    /// [`TokenRefused`].
    pub fn authorise(
        &self,
        ask: &AuthoriseRequest,
        peer: &PeerIdentity,
        now: UnixMillis,
    ) -> Result<(), TokenRefused> {
        self.change(|lent| {
            let one = of_peer(lent, &ask.token.pairing, peer)?;
            let claims = open(&one.notice.secret, &ask.token)?;
            match one.tokens.get(&key(claims.nonce)) {
                None => return Err(TokenRefused::NotIssuedHere),
                Some(true) => return Err(TokenRefused::Replayed),
                Some(false) => {}
            }
            claims.check(&one.notice.claims(), now)?;
            if claims.plan != ask.plan {
                return Err(TokenRefused::OtherPlan {
                    token: claims.plan,
                    asked: ask.plan.clone(),
                });
            }
            if claims.actions != ask.actions {
                return Err(TokenRefused::OtherActions {
                    token: claims.actions,
                    asked: ask.actions.clone(),
                });
            }
            one.tokens.insert(key(claims.nonce), true);
            one.authorised = true;
            Ok(())
        })
    }

    /// Refuses a peer under another certificate than its pairing for `plan` is with.
    ///
    /// # Errors
    /// [`TokenRefused::OtherPeer`].
    pub fn check_certificate(
        &self,
        plan: &PlanId,
        peer: &PeerIdentity,
    ) -> Result<(), TokenRefused> {
        let lent = self.lent.lock().unwrap_or_else(PoisonError::into_inner);
        let mut notices = lent.values().map(|one| &one.notice);
        let paired = notices.find(|one| one.plan == *plan && one.source == peer.device);
        paired.map_or(Ok(()), |notice| is_peer(notice, peer))
    }

    /// What `peer` may make this device do for `plan`; none if it did not authorise, or no longer.
    #[must_use]
    pub fn authorised(&self, plan: &PlanId, peer: &DeviceId) -> Option<Authorisation> {
        let now = now();
        let lent = self.lent.lock().unwrap_or_else(PoisonError::into_inner);
        lent.values()
            .filter(|one| one.authorised && one.notice.expires > now)
            .map(|one| &one.notice)
            .find(|notice| notice.plan == *plan && notice.source == *peer)
            .map(|notice| Authorisation {
                pairing: notice.pairing.clone(),
                plan: notice.plan.clone(),
                source: notice.source.clone(),
                role: notice.role,
                actions: notice.actions.clone(),
                volumes: notice.volumes.clone(),
                expires: notice.expires,
                peer: notice.peer.clone(),
            })
    }
}

fn key(nonce: TokenNonce) -> String {
    hex::encode(nonce.0)
}

fn of_peer<'a>(
    lent: &'a mut BTreeMap<PairingId, Lent>,
    pairing: &PairingId,
    peer: &PeerIdentity,
) -> Result<&'a mut Lent, TokenRefused> {
    let one = lent
        .get_mut(pairing)
        .ok_or_else(|| TokenRefused::PairingUnknown(pairing.clone()))?;
    is_peer(&one.notice, peer)?;
    Ok(one)
}

fn is_peer(notice: &Notice, peer: &PeerIdentity) -> Result<(), TokenRefused> {
    if notice.source == peer.device && notice.peer_fingerprint == peer.certificate_fingerprint {
        return Ok(());
    }
    Err(TokenRefused::OtherPeer {
        pairing: notice.pairing.clone(),
        expected: notice.source.clone(),
        peer: peer.device.clone(),
        fingerprint: peer.certificate_fingerprint,
    })
}

type Shared = State<Arc<PairedState>>;
type Answer<T> = Result<Json<T>, ErrorAnswer>;

/// The routes of a device that can be lent; to be served by a [`super::server::ControlServer`].
pub fn router(state: Arc<PairedState>) -> Router {
    Router::new()
        .route("/v1/pairings", post(announce))
        .route("/v1/pairings/end", post(end))
        .route("/v1/tokens/issue", post(issue))
        .route("/v1/authorise", post(authorise))
        .with_state(state)
}

async fn announce(
    State(state): Shared,
    Extension(peer): Extension<PeerIdentity>,
    Json(notice): Json<Notice>,
) -> Answer<()> {
    peer.require_duplicator()?;
    tracing::info!(pairing = %notice.pairing, plan = %notice.plan, role = %notice.role, source = %notice.source, "lent");
    stored(move || state.announce(notice)).await
}

async fn end(
    State(state): Shared,
    Extension(peer): Extension<PeerIdentity>,
    Json(pairing): Json<PairingId>,
) -> Answer<()> {
    peer.require_duplicator()?;
    tracing::info!(%pairing, "pairing ended");
    stored(move || state.end(&pairing)).await
}

async fn issue(
    State(state): Shared,
    Extension(peer): Extension<PeerIdentity>,
    Json(ask): Json<IssueRequest>,
) -> Answer<SealedToken> {
    stored(move || state.issue(&ask.pairing, &peer)).await
}

async fn authorise(
    State(state): Shared,
    Extension(peer): Extension<PeerIdentity>,
    Json(ask): Json<AuthoriseRequest>,
) -> Answer<()> {
    stored(move || state.authorise(&ask, &peer, now())).await
}

/// Runs what ends in an fsync off the reactor.
async fn stored<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, TokenRefused> + Send + 'static,
) -> Answer<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => Ok(Json(done?)),
        Err(error) => Err(ErrorAnswer::new(StatusCode::INTERNAL_SERVER_ERROR, error)),
    }
}

/// Reports this device to the duplicator until `stop`: `sample` is asked each time, and `heard` told of
/// each answer, or why there is none. The duplicator says how often; `sooner` is told when that is too late. Failures are logged once, and again when they are over.
pub async fn heartbeat_loop<F: Future<Output = Heartbeat>>(
    client: ControlClient,
    duplicator: PeerAddress,
    mut sample: impl FnMut() -> F,
    heard: impl Fn(Result<&HeartbeatAnswer, String>),
    sooner: Arc<Notify>,
    stop: CancellationToken,
) {
    let mut interval = FIRST_HEARTBEAT_INTERVAL;
    let mut failing = false;
    loop {
        let beat = async {
            let heartbeat = sample().await;
            client
                .post::<_, HeartbeatAnswer>(&duplicator, "/v1/heartbeat", &heartbeat)
                .await
        };
        let answer = tokio::select! {
            () = stop.cancelled() => return,
            answer = beat => answer,
        };
        match answer {
            Ok(answer) => {
                if failing {
                    tracing::info!(%duplicator, "heartbeats are answered again");
                }
                failing = false;
                // A duplicator cannot make its devices spin, nor silence them.
                interval = Duration::from_millis(answer.interval_ms.clamp(200, 600_000));
                heard(Ok(&answer));
            }
            Err(error) => {
                if !failing {
                    tracing::warn!(%error, "heartbeat not answered; trying on every {interval:?}");
                }
                failing = true;
                heard(Err(format!(
                    "the duplicator {duplicator} took no heartbeat: {error}"
                )));
            }
        }
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(interval) => {}
            () = sooner.notified() => {}
        }
    }
}
