//! The local API: what the command line asks of the agent, over a unix socket.

use crate::health::Policy;
use crate::migration::PlanStatus;
use crate::migration::delegator::{Delegator, DelegatorError};
use crate::migration::planner::Request;
use crate::migration::report::Report;
use crate::migration::verify::Verification;
use crate::migration::view::HostView;
use crate::model::ids::PlanId;
use crate::model::plan::Plan;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::sync::Arc;
use tokio::net::UnixListener;
use tokio::sync::watch;

/// Reason of a plan that was aborted through this API.
pub const OPERATOR_ABORT: &str = "an operator asked for it";

/// What the API answers from.
#[derive(Clone)]
pub struct Context {
    /// Name of this device.
    pub device: String,
    /// Latest view of the host.
    pub view: watch::Receiver<Arc<HostView>>,
    /// Delegator.
    pub delegator: Arc<Delegator>,
    /// Reloads the policy file; the error keeps the policy that is loaded.
    pub reload: Arc<dyn Fn() -> Result<Policy, String> + Send + Sync>,
}

/// Everything `lifeboat status` shows.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Status {
    /// Device.
    pub device: String,
    /// View without its bulk is not worth a second type: the whole view.
    pub view: HostView,
    /// Plans of this agent's life.
    pub plans: Vec<PlanStatus>,
}

/// Why an answer is not the thing asked for.
#[derive(Debug, Serialize, Deserialize)]
pub struct Refusal {
    /// Message with the next step.
    pub error: String,
    /// What stands in the way.
    pub because: Because,
}

/// What stands in the way of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Because {
    /// The plan's state, or what blocks it.
    Plan,
    /// Another device, which cannot be reached.
    Device,
    /// Anything else.
    Other,
}

struct Refused(StatusCode, Refusal);

impl IntoResponse for Refused {
    fn into_response(self) -> Response {
        (self.0, Json(self.1)).into_response()
    }
}

impl From<DelegatorError> for Refused {
    fn from(error: DelegatorError) -> Self {
        let (status, because) = match &error {
            DelegatorError::Plan(_) | DelegatorError::UnknownPlan(_) => {
                (StatusCode::NOT_FOUND, Because::Other)
            }
            DelegatorError::Blocked(_)
            | DelegatorError::Busy(_)
            | DelegatorError::NoFleet
            | DelegatorError::Released(_)
            | DelegatorError::NotReleased(_)
            | DelegatorError::Over(..) => (StatusCode::CONFLICT, Because::Plan),
            DelegatorError::Peer(_) => (StatusCode::BAD_GATEWAY, Because::Device),
            _ => (StatusCode::INTERNAL_SERVER_ERROR, Because::Other),
        };
        Self(
            status,
            Refusal {
                error: error.to_string(),
                because,
            },
        )
    }
}

/// Serves the API until the listener's task is dropped. The socket is made anew with mode 0600.
///
/// # Errors
/// The socket cannot be made or its listener fails.
pub async fn serve(socket: PathBuf, context: Context) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    if let Some(directory) = socket.parent() {
        tokio::fs::create_dir_all(directory).await?;
    }
    match tokio::fs::remove_file(&socket).await {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(&socket)?;
    std::fs::set_permissions(&socket, std::fs::Permissions::from_mode(0o600))?;
    axum::serve(listener, router(context)).await
}

fn router(context: Context) -> Router {
    Router::new()
        .route("/v1/status", get(status))
        .route("/v1/plan", post(plan))
        .route("/v1/evacuate", post(evacuate))
        .route("/v1/plans/{plan}/abort", post(abort))
        .route("/v1/plans/{plan}/report", get(report))
        .route("/v1/plans/{plan}/verify", post(verify))
        .route("/v1/policy/reload", post(reload))
        .with_state(context)
}

async fn status(State(context): State<Context>) -> Json<Status> {
    let mut view = (**context.view.borrow()).clone();
    view.problems.extend(context.delegator.troubles());
    Json(Status {
        device: context.device,
        view,
        plans: context.delegator.status(),
    })
}

async fn plan(
    State(context): State<Context>,
    Json(request): Json<Request>,
) -> Result<Json<Plan>, Refused> {
    Ok(Json(context.delegator.plan(&request).await?))
}

async fn evacuate(
    State(context): State<Context>,
    Json(request): Json<Request>,
) -> Result<Json<PlanId>, Refused> {
    Ok(Json(context.delegator.evacuate(&request).await?))
}

async fn abort(
    State(context): State<Context>,
    Path(plan): Path<PlanId>,
) -> Result<Json<()>, Refused> {
    Ok(Json(context.delegator.abort(&plan, OPERATOR_ABORT)?))
}

async fn report(
    State(context): State<Context>,
    Path(plan): Path<PlanId>,
) -> Result<Json<Report>, Refused> {
    Ok(Json(context.delegator.report(&plan)?))
}

async fn verify(
    State(context): State<Context>,
    Path(plan): Path<PlanId>,
) -> Result<Json<Verification>, Refused> {
    Ok(Json(context.delegator.verify(&plan).await?))
}

async fn reload(State(context): State<Context>) -> Result<Json<String>, Refused> {
    (context.reload)()
        .map(|policy| Json(policy.name))
        .map_err(|error| {
            Refused(
                StatusCode::UNPROCESSABLE_ENTITY,
                Refusal {
                    error,
                    because: Because::Other,
                },
            )
        })
}
