//! What other devices may ask over the control channel about plans.

use crate::fleet::agent::PairedState;
use crate::fleet::server::{ErrorAnswer, PeerIdentity};
use crate::migration::paired::{Paired, RelayError};
use crate::migration::provide::{ProvideError, Provider};
use crate::migration::target::{Target, TargetError};
use crate::model::control::{
    Dismiss, Offer, OfferAccepted, Open, Owns, Provided, RelayAccepted, RelayRequest, StandIn,
    StoodIn, TakeOver, TargetStatus, Whole,
};
use crate::model::ids::PlanId;
use crate::model::plan::{SignedRelease, VolumeRelease};
use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use axum::routing::{get, post};
use axum::{Extension, Json, Router};
use serde::Deserialize;
use std::sync::Arc;

/// The roles that answer.
#[derive(Clone)]
pub struct Roles {
    /// The pairings in which this device is lent.
    pub pairings: Arc<PairedState>,
    /// As target.
    pub target: Arc<Target>,
    /// As paired device.
    pub paired: Arc<Paired>,
    /// As source of a plan that asks for data on demand.
    pub provider: Arc<Provider>,
}

/// Routes of all roles.
pub fn router(roles: Roles) -> Router {
    Router::new()
        .route("/v1/plans/{plan}/offer", post(offer))
        .route("/v1/plans/{plan}/revise", post(revise))
        .route("/v1/plans/{plan}/rehearse", post(rehearse))
        .route("/v1/plans/{plan}/end-copy", post(end_copy))
        .route("/v1/plans/{plan}/open", post(open))
        .route("/v1/plans/{plan}/release", post(release))
        .route("/v1/plans/{plan}/whole", post(arrived))
        .route("/v1/plans/{plan}/give-back", post(give_back))
        .route("/v1/plans/{plan}/dismiss", post(dismiss))
        .route("/v1/plans/{plan}", get(status))
        .route("/v1/plans/{plan}/relay", post(relay))
        .route("/v1/plans/{plan}/relay/end", post(relay_end))
        .route("/v1/plans/{plan}/provide", post(provide))
        .route("/v1/plans/{plan}/paired", get(is_lent))
        .route("/v1/plans/{plan}/stand-in", post(stand_in))
        .with_state(roles)
}

type Answer<T> = Result<Json<T>, ErrorAnswer>;
type Peer = Extension<PeerIdentity>;

fn refused(error: TargetError) -> ErrorAnswer {
    let status = match error {
        TargetError::Unknown(_) => StatusCode::NOT_FOUND,
        TargetError::NotOurs { .. } | TargetError::BadRelease { .. } => StatusCode::FORBIDDEN,
        TargetError::InTheWay { .. } | TargetError::Owned(_) | TargetError::Twin(_) => {
            StatusCode::CONFLICT
        }
        TargetError::NoSpace { .. } | TargetError::NoInodes { .. } => {
            StatusCode::INSUFFICIENT_STORAGE
        }
        _ => StatusCode::INTERNAL_SERVER_ERROR,
    };
    tracing::warn!("refused: {error}");
    ErrorAnswer::new(status, error)
}

fn not_provided(error: ProvideError) -> ErrorAnswer {
    tracing::warn!("refused: {error}");
    ErrorAnswer::new(StatusCode::FORBIDDEN, error)
}

fn not_relayed(error: RelayError) -> ErrorAnswer {
    tracing::warn!("refused: {error}");
    ErrorAnswer::new(StatusCode::FORBIDDEN, error)
}

/// Does `work` to its end, also when the caller hangs up in the middle: a step that makes or removes
/// something must not stop half-way.
async fn whole<T: Send + 'static>(
    work: impl Future<Output = Result<T, TargetError>> + Send + 'static,
) -> Answer<T> {
    match tokio::spawn(work).await {
        Ok(done) => done.map(Json).map_err(refused),
        Err(error) => Err(ErrorAnswer::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            format!("internal task failed: {error}; see the agent's log there"),
        )),
    }
}

async fn offer(
    State(Roles {
        target, pairings, ..
    }): State<Roles>,
    Extension(peer): Peer,
    Json(offer): Json<Offer>,
) -> Answer<OfferAccepted> {
    pairings.check_certificate(&offer.plan.id, &peer)?;
    whole(async move { target.offer(&peer.device, offer).await }).await
}

async fn revise(
    State(Roles {
        target, pairings, ..
    }): State<Roles>,
    Extension(peer): Peer,
    Json(offer): Json<Offer>,
) -> Answer<()> {
    pairings.check_certificate(&offer.plan.id, &peer)?;
    whole(async move { target.revise(&peer.device, offer.plan).await }).await
}

async fn rehearse(
    State(Roles { target, .. }): State<Roles>,
    Extension(peer): Peer,
    Path(plan): Path<PlanId>,
) -> Answer<()> {
    whole(async move { target.rehearse(&peer.device, &plan).await }).await
}

async fn end_copy(
    State(Roles {
        target, pairings, ..
    }): State<Roles>,
    Extension(peer): Peer,
    Path(plan): Path<PlanId>,
) -> Answer<()> {
    pairings.check_certificate(&plan, &peer)?;
    whole(async move { target.end_copy(&peer.device, &plan).await }).await
}

async fn open(
    State(Roles {
        target, pairings, ..
    }): State<Roles>,
    Extension(peer): Peer,
    Path(plan): Path<PlanId>,
    Json(request): Json<Open>,
) -> Answer<Vec<VolumeRelease>> {
    pairings.check_certificate(&plan, &peer)?;
    whole(async move { target.open(&peer.device, &plan, request).await }).await
}

async fn arrived(
    State(Roles { target, .. }): State<Roles>,
    Extension(peer): Peer,
    Path(plan): Path<PlanId>,
    Json(request): Json<Whole>,
) -> Answer<()> {
    whole(async move { target.whole(&peer.device, &plan, request).await }).await
}

async fn give_back(
    State(Roles { target, .. }): State<Roles>,
    Extension(peer): Peer,
    Path(plan): Path<PlanId>,
) -> Answer<SignedRelease> {
    whole(async move { target.give_back(&peer.device, &plan).await }).await
}

async fn release(
    State(Roles { target, .. }): State<Roles>,
    Extension(peer): Peer,
    Path(plan): Path<PlanId>,
    Json(request): Json<TakeOver>,
) -> Answer<Owns> {
    whole(async move {
        let release = request.release;
        target.take_over(&peer.device, &plan, release).await
    })
    .await
}

async fn dismiss(
    State(Roles { target, .. }): State<Roles>,
    Extension(peer): Peer,
    Path(plan): Path<PlanId>,
    Json(request): Json<Dismiss>,
) -> Answer<Option<String>> {
    whole(async move { target.dismiss(&peer.device, &plan, &request.reason).await }).await
}

#[derive(Deserialize)]
struct Ask {
    /// Whether the runtime is asked for the twins.
    #[serde(default)]
    look: bool,
}

async fn status(
    State(Roles { target, .. }): State<Roles>,
    Extension(peer): Peer,
    Path(plan): Path<PlanId>,
    Query(Ask { look }): Query<Ask>,
) -> Answer<TargetStatus> {
    let status = if look {
        target.look(&peer.device, &plan).await
    } else {
        target.status(&peer.device, &plan)
    };
    status.map(Json).map_err(refused)
}

async fn relay(
    State(Roles {
        paired, pairings, ..
    }): State<Roles>,
    Extension(peer): Peer,
    Json(request): Json<RelayRequest>,
) -> Answer<RelayAccepted> {
    pairings.check_certificate(&request.plan, &peer)?;
    let relayed = paired.relay(&peer.device, request);
    relayed.map(Json).map_err(not_relayed)
}

async fn relay_end(
    State(Roles {
        paired, pairings, ..
    }): State<Roles>,
    Extension(peer): Peer,
    Path(plan): Path<PlanId>,
) -> Answer<Option<StoodIn>> {
    pairings.check_certificate(&plan, &peer)?;
    let ended = paired.end(&peer.device, &plan);
    ended.map(Json).map_err(not_relayed)
}

async fn provide(
    State(Roles { provider, .. }): State<Roles>,
    Extension(peer): Peer,
    Path(plan): Path<PlanId>,
) -> Answer<Provided> {
    let provided = provider.provide(&peer, &plan).await;
    provided.map(Json).map_err(not_provided)
}

async fn is_lent(
    State(Roles { provider, .. }): State<Roles>,
    Extension(peer): Peer,
    Path(plan): Path<PlanId>,
) -> Json<bool> {
    Json(provider.is_lent(&peer.device, &plan))
}

async fn stand_in(
    State(Roles { paired, .. }): State<Roles>,
    Extension(peer): Peer,
    Path(plan): Path<PlanId>,
    Json(asked): Json<StandIn>,
) -> Answer<Provided> {
    let provided = paired.stand_in(&peer, &plan, asked).await;
    provided.map(Json).map_err(not_relayed)
}
