//! What other devices may ask over the control channel about plans.

use crate::fleet::server::{ErrorAnswer, PeerIdentity};
use crate::migration::paired::{Paired, RelayError};
use crate::migration::target::{Target, TargetError};
use crate::model::control::{
    Dismiss, Offer, OfferAccepted, Owns, RelayAccepted, RelayRequest, TakeOver, TargetStatus,
};
use crate::model::ids::PlanId;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::routing::{get, post};
use axum::{Extension, Json, Router};
use std::sync::Arc;

/// The two roles that answer.
#[derive(Clone)]
pub struct Roles {
    /// As target.
    pub target: Arc<Target>,
    /// As paired device.
    pub paired: Arc<Paired>,
}

/// Routes of the target and paired roles.
pub fn router(roles: Roles) -> Router {
    Router::new()
        .route("/v1/plans/{plan}/offer", post(offer))
        .route("/v1/plans/{plan}/images", post(images))
        .route("/v1/plans/{plan}/release", post(release))
        .route("/v1/plans/{plan}/dismiss", post(dismiss))
        .route("/v1/plans/{plan}", get(status))
        .route("/v1/plans/{plan}/relay", post(relay))
        .route("/v1/plans/{plan}/relay/end", post(relay_end))
        .with_state(roles)
}

type Answer<T> = Result<Json<T>, ErrorAnswer>;
type Peer = Extension<PeerIdentity>;

fn refused(error: TargetError) -> ErrorAnswer {
    let status = match error {
        TargetError::Unknown(_) => StatusCode::NOT_FOUND,
        TargetError::NotOurs { .. } | TargetError::BadRelease { .. } => StatusCode::FORBIDDEN,
        TargetError::InTheWay { .. } | TargetError::Owned(_) => StatusCode::CONFLICT,
        TargetError::NoSpace { .. } | TargetError::NoInodes { .. } => {
            StatusCode::INSUFFICIENT_STORAGE
        }
        _ => StatusCode::INTERNAL_SERVER_ERROR,
    };
    tracing::warn!("refused: {error}");
    ErrorAnswer::new(status, error)
}

fn not_relayed(error: RelayError) -> ErrorAnswer {
    tracing::warn!("refused: {error}");
    ErrorAnswer::new(StatusCode::FORBIDDEN, error)
}

async fn offer(
    State(roles): State<Roles>,
    Extension(peer): Peer,
    Json(offer): Json<Offer>,
) -> Answer<OfferAccepted> {
    roles
        .target
        .offer(&peer.device, offer.plan)
        .await
        .map(Json)
        .map_err(refused)
}

async fn images(
    State(roles): State<Roles>,
    Extension(peer): Peer,
    Path(plan): Path<PlanId>,
) -> Answer<()> {
    roles
        .target
        .load_images(&peer.device, &plan)
        .await
        .map(Json)
        .map_err(refused)
}

async fn release(
    State(roles): State<Roles>,
    Extension(peer): Peer,
    Path(plan): Path<PlanId>,
    Json(request): Json<TakeOver>,
) -> Answer<Owns> {
    let taken = roles
        .target
        .take_over(&peer.device, &plan, request.release)
        .await;
    taken.map(Json).map_err(refused)
}

async fn dismiss(
    State(roles): State<Roles>,
    Extension(peer): Peer,
    Path(plan): Path<PlanId>,
    Json(request): Json<Dismiss>,
) -> Answer<()> {
    roles
        .target
        .dismiss(&peer.device, &plan, &request.reason)
        .await
        .map(Json)
        .map_err(refused)
}

async fn status(
    State(roles): State<Roles>,
    Extension(peer): Peer,
    Path(plan): Path<PlanId>,
) -> Answer<TargetStatus> {
    roles
        .target
        .status(&peer.device, &plan)
        .map(Json)
        .map_err(refused)
}

async fn relay(
    State(roles): State<Roles>,
    Extension(peer): Peer,
    Json(request): Json<RelayRequest>,
) -> Answer<RelayAccepted> {
    roles
        .paired
        .relay(&peer.device, request)
        .map(Json)
        .map_err(not_relayed)
}

async fn relay_end(
    State(roles): State<Roles>,
    Extension(peer): Peer,
    Path(plan): Path<PlanId>,
) -> Answer<()> {
    roles
        .paired
        .end(&peer.device, &plan)
        .map(Json)
        .map_err(not_relayed)
}
