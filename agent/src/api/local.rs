//! The local API: what the command line asks of the agent, over a unix socket.

use super::recent::Recent;
use crate::health::{Policy, Stage};
use crate::migration::access::{Access, AccessError, ServeRequest, Served};
use crate::migration::delegator::{Delegator, DelegatorError};
use crate::migration::events::Approval;
use crate::migration::pause::{Pause, Pauses};
use crate::migration::planner::Request;
use crate::migration::report::Report;
use crate::migration::verify::Verification;
use crate::migration::view::HostView;
use crate::migration::{Arriving, PlanStatus};
use crate::model::ids::{PlanId, VolumeId};
use crate::model::metric::Sample;
use crate::model::plan::Plan;
use crate::model::units::{Bytes, UnixMillis};
use axum::extract::connect_info::{ConnectInfo, Connected};
use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::serve::IncomingStream;
use axum::{Extension, Json, Router};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::UnixListener;
use tokio::sync::watch;

/// What the API answers from.
#[derive(Clone)]
pub struct Context {
    /// Name of this device.
    pub device: String,
    /// Latest view of the host.
    pub view: watch::Receiver<Arc<HostView>>,
    /// The last views.
    pub recent: Arc<Recent>,
    /// Delegator.
    pub delegator: Arc<Delegator>,
    /// Reloads the policy file; the error keeps the policy that is loaded.
    pub reload: Arc<dyn Fn() -> Result<Policy, String> + Send + Sync>,
    /// The policy in force.
    pub policy: Arc<dyn Fn() -> Option<Policy> + Send + Sync>,
    /// The operator's pause.
    pub pauses: Arc<Pauses>,
    /// What the driver that starts plans by the verdict thinks; none when nothing does.
    pub automatic: Option<watch::Receiver<Acting>>,
    /// What is served of plans of which this device is the target; none outside of a fleet.
    pub access: Option<Arc<Access>>,
}

/// Everything `lifeboat status` shows.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Status {
    /// Device.
    pub device: String,
    /// When this was told: the time of the view's sweep and what has passed since.
    #[serde(default)]
    pub now: UnixMillis,
    /// View without its bulk is not worth a second type: the whole view. Its verdict is that of now.
    pub view: HostView,
    /// Plans of this agent's life.
    pub plans: Vec<PlanStatus>,
    /// Plans of other devices whose twins run here before their data is here.
    #[serde(default)]
    pub arriving: Vec<Arriving>,
    /// What the verdict rests on and leads to; none without a policy in force.
    pub judgement: Option<Judgement>,
}

/// The policy in force, and whether it acts.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Judgement {
    /// Its name.
    pub policy: String,
    /// How many thresholds it has.
    pub thresholds: usize,
    /// The entries of `degraded` with their stages.
    pub degraded: Vec<(String, Stage)>,
    /// Whether a degraded verdict starts a plan by itself.
    pub automatic: bool,
    /// The pause in force.
    pub paused: Option<Pause>,
    /// What else keeps it from acting.
    #[serde(default)]
    pub acting: Acting,
}

/// What keeps a degraded verdict from starting a plan by itself.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Acting {
    /// The stage at which a person said no.
    pub refused: Option<Stage>,
    /// The last try, when it failed.
    pub failed: Option<FailedTry>,
}

/// A plan that could not start, or was rolled back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FailedTry {
    /// Why.
    pub why: String,
    /// When it is tried again, at the earliest.
    pub again: UnixMillis,
}

/// The samples of one sweep.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Sweep {
    /// Device.
    pub device: String,
    /// When it was swept.
    pub at: UnixMillis,
    /// In which life of the agent: when that began.
    pub life: UnixMillis,
    /// Which sweep of that life.
    pub number: u64,
    /// Every metric that had a value.
    pub samples: Vec<Sample>,
}

/// Which sweep is asked for: the first after this number of this life, or the oldest there is of another life;
/// without a life the latest.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct After {
    #[serde(default)]
    number: u64,
    life: Option<UnixMillis>,
}

/// An operator's request to evacuate.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct EvacuateRequest {
    /// What.
    #[serde(flatten)]
    pub request: Request,
    /// Go on also when too many devices of the fleet evacuate already.
    #[serde(default)]
    pub ignore_storm_guard: bool,
}

/// A role's approval of a plan.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ApproveRequest {
    /// Role.
    pub role: String,
}

/// A new limit for a plan under way.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LimitRequest {
    /// Most bytes a second that its copy may read; none: no limit.
    pub limit: Option<Bytes>,
}

/// A request to let nothing move by itself for a while.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PauseRequest {
    /// How long.
    pub lasting: Duration,
    /// Why.
    pub why: String,
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

impl Refused {
    fn new(status: StatusCode, because: Because, error: &impl ToString) -> Self {
        let error = error.to_string();
        Self(status, Refusal { error, because })
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
            | DelegatorError::NotAwaited { .. }
            | DelegatorError::Over(..) => (StatusCode::CONFLICT, Because::Plan),
            DelegatorError::Peer(_) => (StatusCode::BAD_GATEWAY, Because::Device),
            _ => (StatusCode::INTERNAL_SERVER_ERROR, Because::Other),
        };
        Self::new(status, because, &error)
    }
}

impl From<AccessError> for Refused {
    fn from(error: AccessError) -> Self {
        let (status, because) = match &error {
            AccessError::Unknown(_) | AccessError::NoVolume { .. } | AccessError::NotServed(_) => {
                (StatusCode::NOT_FOUND, Because::Other)
            }
            AccessError::Served(_) | AccessError::Owned(_) => (StatusCode::CONFLICT, Because::Plan),
            AccessError::Source(_) => (StatusCode::BAD_GATEWAY, Because::Device),
            _ => (StatusCode::INTERNAL_SERVER_ERROR, Because::Other),
        };
        Self::new(status, because, &error)
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
    let service = router(context).into_make_service_with_connect_info::<Caller>();
    axum::serve(listener, service).await
}

fn router(context: Context) -> Router {
    Router::new()
        .route("/v1/alive", get(alive))
        .route("/v1/status", get(status))
        .route("/v1/plan", post(plan))
        .route("/v1/evacuate", post(evacuate))
        .route("/v1/plans/{plan}/abort", post(abort))
        .route("/v1/plans/{plan}/approve", post(approve))
        .route("/v1/plans/{plan}/limit", post(limit))
        .route("/v1/plans/{plan}/report", get(report))
        .route("/v1/plans/{plan}/verify", post(verify))
        .route("/v1/plans/{plan}/serve", post(serve_volume))
        .route("/v1/plans/{plan}/volumes/{volume}/end", post(end_serving))
        .route("/v1/served", get(served))
        .route("/v1/samples", get(samples))
        .route("/v1/policy/reload", post(reload))
        .route("/v1/policy/pause", post(pause))
        .route("/v1/policy/resume", post(resume))
        .with_state(context)
}

/// Says that the agent lives, whatever it works on.
async fn alive() -> Json<()> {
    Json(())
}

async fn status(State(context): State<Context>) -> Json<Status> {
    let mut view = (**context.view.borrow()).clone();
    let policy = (context.policy)();
    view.verdict = view.verdict_now(
        policy
            .as_ref()
            .map_or(Duration::ZERO, |policy| policy.stale_after),
    );
    view.problems.extend(context.delegator.troubles());
    let age = view.age().map_or(0, |age| age.as_millis() as u64);
    Json(Status {
        device: context.device,
        now: UnixMillis(view.snapshot.at.0 + age),
        view,
        plans: context.delegator.status(),
        arriving: context
            .access
            .map_or_else(Vec::new, |access| access.arriving()),
        judgement: policy.map(|policy| Judgement {
            policy: policy.name,
            thresholds: policy.thresholds.len(),
            degraded: policy
                .degraded
                .iter()
                .map(|entry| (entry.when.to_string(), entry.stage))
                .collect(),
            automatic: context.automatic.is_some(),
            acting: (context.automatic.as_ref())
                .map_or_else(Acting::default, |acting| acting.borrow().clone()),
            paused: context.pauses.now(context.delegator.now()),
        }),
    })
}

async fn samples(
    State(context): State<Context>,
    Query(After { number, life }): Query<After>,
) -> Result<Json<Sweep>, Refused> {
    let (mut view, recent) = (context.view, context.recent);
    let swept = loop {
        let latest = view.borrow_and_update().clone();
        let after = match life {
            Some(life) if life == recent.life => number,
            Some(_) => 0,
            None => latest.number.saturating_sub(1),
        };
        if let Some(swept) = recent.after(after, &latest) {
            break swept;
        }
        view.changed()
            .await
            .map_err(|_| refused("the agent is stopping".to_owned()))?;
    };
    Ok(Json(Sweep {
        device: context.device,
        at: swept.snapshot.at,
        life: recent.life,
        number: swept.number,
        samples: swept.snapshot.samples.clone(),
    }))
}

async fn pause(
    State(context): State<Context>,
    Json(request): Json<PauseRequest>,
) -> Result<Json<Pause>, Refused> {
    let pause = asked(request, context.delegator.now())?;
    let kept = context.pauses.set(pause.clone());
    kept.map_err(|error| {
        refused(format!(
            "the pause cannot be kept, so it is not in force: {error}"
        ))
    })?;
    tracing::warn!(why = pause.why, "policy paused by an operator");
    Ok(Json(pause))
}

/// The pause that is asked for.
fn asked(request: PauseRequest, since: UnixMillis) -> Result<Pause, Refused> {
    let wrong = if request.lasting < Duration::from_millis(1) {
        "a pause for no time at all; `lifeboat policy resume` ends one"
    } else if request.why.trim().is_empty() {
        "a pause without a reason: say why, it is shown by status and explain"
    } else {
        let lasting = u64::try_from(request.lasting.as_millis()).unwrap_or(u64::MAX);
        return Ok(Pause {
            since,
            until: UnixMillis(since.0.saturating_add(lasting)),
            why: request.why,
        });
    };
    Err(Refused::new(
        StatusCode::BAD_REQUEST,
        Because::Other,
        &wrong,
    ))
}

async fn resume(State(context): State<Context>) -> Result<Json<Option<Pause>>, Refused> {
    let ended = context
        .pauses
        .end(context.delegator.now())
        .map_err(|error| refused(format!("the pause cannot be ended: {error}")))?;
    match &ended {
        Some(pause) => tracing::warn!(why = pause.why, "policy resumed by an operator"),
        None => tracing::info!("an operator resumed the policy, which was not paused"),
    }
    Ok(Json(ended))
}

fn refused(error: String) -> Refused {
    Refused(
        StatusCode::INTERNAL_SERVER_ERROR,
        Refusal {
            error,
            because: Because::Other,
        },
    )
}

async fn plan(
    State(context): State<Context>,
    Json(request): Json<Request>,
) -> Result<Json<Plan>, Refused> {
    Ok(Json(context.delegator.plan(&request).await?))
}

async fn evacuate(
    State(context): State<Context>,
    Json(ask): Json<EvacuateRequest>,
) -> Result<Json<PlanId>, Refused> {
    let mut request = ask.request;
    if let Some(policy) = (context.policy)() {
        let max_evacuating = policy.guards.fleet_max_evacuating;
        request.guards.max_evacuating = max_evacuating.filter(|_| !ask.ignore_storm_guard);
        request.guards.limit = request.guards.limit.or(policy.guards.limit);
    }
    Ok(Json(context.delegator.evacuate(&request).await?))
}

async fn approve(
    State(context): State<Context>,
    Extension(ConnectInfo(caller)): Extension<ConnectInfo<Caller>>,
    Path(plan): Path<PlanId>,
    Json(request): Json<ApproveRequest>,
) -> Result<Json<Approval>, Refused> {
    let approval = Approval {
        role: request.role,
        by: caller.0,
    };
    context.delegator.approve(&plan, approval.clone())?;
    Ok(Json(approval))
}

async fn limit(
    State(context): State<Context>,
    Path(plan): Path<PlanId>,
    Json(LimitRequest { limit }): Json<LimitRequest>,
) -> Result<Json<()>, Refused> {
    Ok(Json(context.delegator.limit(&plan, limit)?))
}

/// Who is at the other end of the socket, by the kernel's word.
#[derive(Clone, Debug)]
struct Caller(String);

impl Connected<IncomingStream<'_, UnixListener>> for Caller {
    fn connect_info(stream: IncomingStream<'_, UnixListener>) -> Self {
        let Ok(peer) = stream.io().peer_cred() else {
            return Self("an unknown user".into());
        };
        // The user who logged in, which `sudo` does not change; set once by the log-in (pam_loginuid).
        let login = peer.pid().and_then(|pid| {
            let text = std::fs::read_to_string(format!("/proc/{pid}/loginuid")).ok()?;
            text.trim()
                .parse::<u32>()
                .ok()
                .filter(|uid| *uid != u32::MAX)
        });
        Self(match login {
            Some(login) => format!("user {} (logged in as {})", named(peer.uid()), named(login)),
            None => format!("user {}", named(peer.uid())),
        })
    }
}

fn named(uid: u32) -> String {
    match nix::unistd::User::from_uid(uid.into()) {
        Ok(Some(user)) => user.name,
        _ => uid.to_string(),
    }
}

async fn abort(
    State(context): State<Context>,
    Path(plan): Path<PlanId>,
) -> Result<Json<()>, Refused> {
    Ok(Json(context.delegator.refuse(&plan)?))
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

async fn served(State(context): State<Context>) -> Json<Vec<Served>> {
    Json(
        context
            .access
            .map_or_else(Vec::new, |access| access.served()),
    )
}

async fn serve_volume(
    State(context): State<Context>,
    Path(plan): Path<PlanId>,
    Json(request): Json<ServeRequest>,
) -> Result<Json<Served>, Refused> {
    let access = context.access.ok_or(DelegatorError::NoFleet)?;
    // The store is made to its end, also when the caller hangs up in the middle.
    let served = tokio::spawn(async move { access.serve(&plan, request).await });
    let served = served.await.map_err(AccessError::Task)?;
    Ok(Json(served?))
}

async fn end_serving(
    State(context): State<Context>,
    Path((plan, volume)): Path<(PlanId, VolumeId)>,
) -> Result<Json<()>, Refused> {
    let access = context.access.ok_or(DelegatorError::NoFleet)?;
    Ok(Json(access.end(&plan, volume).await?))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pause_for_no_time_or_without_a_reason_is_refused() {
        let now = UnixMillis(7_000);
        let ask = |lasting, why: &str| {
            let why = why.to_owned();
            let asked = asked(PauseRequest { lasting, why }, now);
            asked.map_err(|Refused(status, refusal)| (status, refusal.error))
        };
        let hour = Duration::from_hours(1);
        for (lasting, why, told) in [
            (Duration::ZERO, "fans", "no time at all"),
            (Duration::from_micros(1), "fans", "no time at all"),
            (hour, "", "without a reason"),
            (hour, " \t", "without a reason"),
        ] {
            let (status, error) = ask(lasting, why).unwrap_err();
            assert_eq!(status, StatusCode::BAD_REQUEST);
            assert!(error.contains(told), "{error}");
        }
        let pause = ask(hour, "fans").unwrap();
        assert_eq!(
            (pause.until, pause.why.as_str()),
            (UnixMillis(3_607_000), "fans")
        );
    }
}
