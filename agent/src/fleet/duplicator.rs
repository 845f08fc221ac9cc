//! The duplicator's side of the control channel: enrols devices, keeps their heartbeats, lends them.
//!
//! Invariants: a device is heard only with the certificate it was given last; it speaks for itself only;
//! a pairing is answered to the source only after the lent device took notice of it.
//! Non-goals: judging devices (they send their verdict), storing (`registry`), choosing (`allocate`).

pub use super::allocate::Admission;
use super::allocate::{Need, Rules};
use super::ca::Ca;
use super::client::ControlClient;
use super::compare::{Board, FleetFigures};
use super::enrol::{JoinAnswer, JoinRequest, secret_hash};
use super::identity::{Fingerprint, Identity, check_id};
use super::now;
use super::pairing::{Notice, PairingAnswer, PairingAsk, ReleaseRequest};
use super::registry::{Ask, Enrolment, Heartbeat, Lending, Registry, RegistryError};
use super::secret::Secret;
use super::server::{ErrorAnswer, PeerIdentity};
use crate::model::fleet::{Device, DutyOutcome, PairingRecord, PeerAddress};
use crate::model::ids::{DeviceId, PairingId, PlanId};
use crate::model::units::UnixMillis;
use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Extension, Json, Router};
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::time::Duration;

/// A pairing that nobody ends is over after this time.
const PAIRING_LIFETIME_MS: u64 = 24 * 3600 * 1000;
/// Heartbeats that may be missing before a device is not live (DESIGN §6: liveness is a lease).
const LIVE_INTERVALS: u32 = 3;
/// Time for a lent device to take notice.
const NOTICE_TIMEOUT: Duration = Duration::from_secs(5);

/// Settings of a duplicator.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// How often devices report.
    pub heartbeat: Duration,
    /// See [`Rules::horizon`].
    pub horizon: Duration,
    /// See [`Rules::max_pairings`].
    pub max_pairings: u32,
}

impl Default for Settings {
    /// 5 s, so that a dead device is noticed in 15; an hour; four pairings a device.
    fn default() -> Self {
        Self {
            heartbeat: Duration::from_secs(5),
            horizon: Duration::from_secs(3600),
            max_pairings: 4,
        }
    }
}

/// Answer to a heartbeat.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct HeartbeatAnswer {
    /// When the next one is due, in milliseconds.
    pub interval_ms: u64,
    /// What the fleet says of the metrics that are compared with it.
    #[serde(default)]
    pub figures: FleetFigures,
}

/// A device's question whether it may evacuate now.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct EvacuationAsk {
    /// Plan.
    pub plan: PlanId,
    /// Share of the live devices, in percent, that may evacuate at a time; none: it only tells.
    pub max_percent: Option<f64>,
}

/// A device and whether it is live.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DeviceStatus {
    /// The device.
    #[serde(flatten)]
    pub device: Device,
    /// Whether its last heartbeat is young enough.
    pub live: bool,
    /// Milliseconds since its last heartbeat, by the duplicator's clock.
    pub seen_ms_ago: Option<u64>,
}

/// The duplicator, over any registry.
pub struct Duplicator<R> {
    identity: Arc<Identity>,
    ca: Ca,
    client: ControlClient,
    registry: R,
    settings: Settings,
    board: Board,
}

impl<R: Registry> Duplicator<R> {
    /// A duplicator with the CA and identity of its directory.
    ///
    /// # Errors
    /// When the identity cannot be used for TLS.
    pub fn new(
        identity: Arc<Identity>,
        ca: Ca,
        registry: R,
        settings: Settings,
    ) -> Result<Self, rustls::Error> {
        Ok(Self {
            client: ControlClient::new(&identity)?.with_timeout(NOTICE_TIMEOUT),
            identity,
            ca,
            registry,
            settings,
            board: Board::default(),
        })
    }

    /// What fleet members may call.
    pub fn members(self: &Arc<Self>) -> Router {
        Router::new()
            .route("/v1/heartbeat", post(heartbeat::<R>))
            .route("/v1/devices", get(list::<R>))
            .route("/v1/certificate", post(certificate::<R>))
            .route("/v1/evacuations", post(admit::<R>))
            .route("/v1/pairings/request", post(pair::<R>))
            .route("/v1/pairings/consider", post(consider::<R>))
            .route("/v1/pairings/release", post(release::<R>))
            .layer(from_fn_with_state(self.clone(), current_certificate::<R>))
            .with_state(self.clone())
    }

    /// What anyone may call.
    pub fn strangers(self: &Arc<Self>) -> Router {
        Router::new()
            .route("/v1/join", post(join::<R>))
            .fallback(async || {
                ErrorAnswer::new(
                    StatusCode::UNAUTHORIZED,
                    "this needs a device certificate; enrol with `lifeboat fleet join`",
                )
            })
            .with_state(self.clone())
    }

    fn live_within(&self) -> Duration {
        self.settings.heartbeat * LIVE_INTERVALS
    }

    fn rules(&self) -> Rules {
        Rules {
            live_within: self.live_within(),
            horizon: self.settings.horizon,
            max_pairings: self.settings.max_pairings,
        }
    }

    async fn address_of(&self, device: &DeviceId) -> Result<PeerAddress, ErrorAnswer> {
        let devices = self.registry.devices().await?;
        let device = devices
            .into_iter()
            .find(|known| known.id == *device)
            .ok_or_else(|| RegistryError::DeviceUnknown(device.clone()))?;
        Ok(PeerAddress {
            addr: device.address,
            device: device.id,
        })
    }

    async fn tell_end(&self, pairing: &PairingRecord) {
        let told = async {
            let to = self
                .address_of(&pairing.device)
                .await
                .map_err(|_| "its address is not known".to_owned())?;
            self.client
                .post::<PairingId, ()>(&to, "/v1/pairings/end", &pairing.id)
                .await
                .map_err(|error| error.to_string())
        };
        // The lent device forgets the pairing by itself when it expires.
        if let Err(reason) = told.await {
            tracing::warn!(pairing = %pairing.id, device = %pairing.device, %reason, "cannot tell the end of a pairing");
        }
    }
}

impl From<RegistryError> for ErrorAnswer {
    fn from(error: RegistryError) -> Self {
        let (status, code) = match &error {
            RegistryError::Engine { .. } => (StatusCode::INTERNAL_SERVER_ERROR, "registry"),
            RegistryError::InvitationUnknown => (StatusCode::FORBIDDEN, "join-token-unknown"),
            RegistryError::InvitationUsed(_) => (StatusCode::FORBIDDEN, "join-token-used"),
            RegistryError::InvitationExpired => (StatusCode::FORBIDDEN, "join-token-expired"),
            RegistryError::InvitationForAnother(_) => {
                (StatusCode::FORBIDDEN, "join-token-for-another")
            }
            RegistryError::DeviceExists(_) => (StatusCode::CONFLICT, "device-exists"),
            RegistryError::DeviceUnknown(_) => (StatusCode::FORBIDDEN, "device-unknown"),
            RegistryError::PairingUnknown(_) => (StatusCode::NOT_FOUND, "pairing-unknown"),
        };
        Self::new(status, error).code(code)
    }
}

type Shared<R> = State<Arc<Duplicator<R>>>;
type Answer<T> = Result<Json<T>, ErrorAnswer>;

async fn current_certificate<R: Registry>(
    State(duplicator): Shared<R>,
    Extension(peer): Extension<PeerIdentity>,
    request: Request,
    next: Next,
) -> Response {
    if !peer.is_duplicator {
        match duplicator.registry.fingerprint(peer.device.clone()).await {
            Ok(current) if current == peer.certificate_fingerprint => {}
            Ok(_) => {
                return ErrorAnswer::new(
                    StatusCode::FORBIDDEN,
                    format!(
                        "{} was enrolled anew and this certificate replaced",
                        peer.device
                    ),
                )
                .code("certificate-replaced")
                .into_response();
            }
            Err(error) => return ErrorAnswer::from(error).into_response(),
        }
    }
    next.run(request).await
}

async fn join<R: Registry>(
    State(duplicator): Shared<R>,
    Json(ask): Json<JoinRequest>,
) -> Answer<JoinAnswer> {
    let refuse = |error| ErrorAnswer::new(StatusCode::BAD_REQUEST, error);
    check_id(&ask.device).map_err(refuse)?;
    let certificate = duplicator.ca.issue(&ask.csr, &ask.device).map_err(refuse)?;
    let fingerprint = Fingerprint::of_pem(&certificate)
        .map_err(|reason| ErrorAnswer::new(StatusCode::INTERNAL_SERVER_ERROR, reason))?;
    let enrolment = Enrolment {
        device: ask.device.clone(),
        address: ask.advertise,
        fingerprint,
    };
    let entered = duplicator
        .registry
        .enrol(secret_hash(&ask.secret), enrolment, now())
        .await;
    if let Err(error) = &entered {
        tracing::warn!(device = %ask.device, %error, "enrolment refused");
    }
    entered?;
    tracing::info!(device = %ask.device, address = %ask.advertise, "device enrolled");
    Ok(Json(JoinAnswer {
        certificate,
        ca: duplicator.ca.certificate.clone(),
        fleet_key: Secret::from_bytes(*duplicator.identity.fleet_key()),
    }))
}

async fn heartbeat<R: Registry>(
    State(duplicator): Shared<R>,
    Extension(peer): Extension<PeerIdentity>,
    Json(mut heartbeat): Json<Heartbeat>,
) -> Answer<HeartbeatAnswer> {
    let now = now();
    let grace = u64::try_from(duplicator.live_within().as_millis()).unwrap_or(u64::MAX);
    let live_since = UnixMillis(now.0.saturating_sub(grace));
    let compared = std::mem::take(&mut heartbeat.compared);
    let abandoned = duplicator
        .registry
        .heartbeat(peer.device.clone(), heartbeat, live_since, now)
        .await?;
    let figures = duplicator
        .board
        .exchange(&peer.device, compared, live_since, now);
    for id in abandoned {
        tracing::info!(pairing = %id, source = %peer.device, "pairing ended: its source does not drive the plan any more");
        let duplicator = duplicator.clone();
        tokio::spawn(async move {
            if let Ok(pairing) = duplicator.registry.pairing(id).await {
                duplicator.tell_end(&pairing).await;
            }
        });
    }
    let interval = duplicator.settings.heartbeat.as_millis();
    Ok(Json(HeartbeatAnswer {
        interval_ms: u64::try_from(interval).unwrap_or(u64::MAX),
        figures,
    }))
}

async fn admit<R: Registry>(
    State(duplicator): Shared<R>,
    Extension(peer): Extension<PeerIdentity>,
    Json(ask): Json<EvacuationAsk>,
) -> Answer<Admission> {
    let (source, plan, rules) = (peer.device, ask.plan, duplicator.rules());
    let admission = duplicator
        .registry
        .admit(source.clone(), plan.clone(), ask.max_percent, rules, now())
        .await?;
    tracing::info!(%source, %plan, %admission, "wants to evacuate");
    Ok(Json(admission))
}

async fn list<R: Registry>(State(duplicator): Shared<R>) -> Answer<Vec<DeviceStatus>> {
    let devices = duplicator.registry.devices().await?;
    Ok(Json(statuses(devices, duplicator.live_within(), now())))
}

async fn certificate<R: Registry>(
    State(duplicator): Shared<R>,
    Json(device): Json<DeviceId>,
) -> Answer<Fingerprint> {
    Ok(Json(duplicator.registry.fingerprint(device).await?))
}

/// Says of each device whether it is live at `now`.
#[must_use]
pub fn statuses(devices: Vec<Device>, live_within: Duration, now: UnixMillis) -> Vec<DeviceStatus> {
    let status = |device: Device| {
        let ago = device.last_seen.map(|seen| now.since(seen));
        DeviceStatus {
            live: ago.is_some_and(|ago| ago <= live_within),
            seen_ms_ago: ago.map(|ago| u64::try_from(ago.as_millis()).unwrap_or(u64::MAX)),
            device,
        }
    };
    devices.into_iter().map(status).collect()
}

/// What is needed and by whom; none when the source's configuration is not known.
async fn need<R: Registry>(
    duplicator: &Duplicator<R>,
    peer: &PeerIdentity,
    ask: PairingAsk,
) -> Result<Option<(Need, (PeerAddress, Fingerprint))>, ErrorAnswer> {
    let devices = duplicator.registry.devices().await?;
    let source = devices
        .into_iter()
        .find(|device| device.id == peer.device)
        .ok_or_else(|| RegistryError::DeviceUnknown(peer.device.clone()))?;
    let Some(configuration) = ask.configuration.or(source.configuration) else {
        return Ok(None);
    };
    let address = PeerAddress {
        device: peer.device.clone(),
        addr: source.address,
    };
    let need = Need {
        source: peer.device.clone(),
        configuration,
        role: ask.role,
        actions: ask.actions,
        quantity: ask.quantity,
        twins: ask.twins,
        exclude: ask
            .exclude
            .into_iter()
            .map(|device| (device, "the source excludes it".to_owned()))
            .collect(),
    };
    Ok(Some((need, (address, peer.certificate_fingerprint))))
}

async fn consider<R: Registry>(
    State(duplicator): Shared<R>,
    Extension(peer): Extension<PeerIdentity>,
    Json(ask): Json<PairingAsk>,
) -> Answer<PairingAnswer> {
    let Some((need, _)) = need(&duplicator, &peer, ask).await? else {
        return Ok(Json(PairingAnswer::ConfigurationNeeded));
    };
    let rules = duplicator.rules();
    let choice = duplicator.registry.consider(need, rules, now()).await?;
    let explanation = choice.explanation;
    Ok(Json(match choice.chosen {
        Some(_) => PairingAnswer::Fits { explanation },
        None => PairingAnswer::NobodyFits { explanation },
    }))
}

async fn pair<R: Registry>(
    State(duplicator): Shared<R>,
    Extension(peer): Extension<PeerIdentity>,
    Json(ask): Json<PairingAsk>,
) -> Answer<PairingAnswer> {
    let (plan, volumes) = (ask.plan.clone(), ask.volumes.clone());
    let Some((mut need, source)) = need(&duplicator, &peer, ask).await? else {
        return Ok(Json(PairingAnswer::ConfigurationNeeded));
    };
    loop {
        let now = now();
        let allocation = duplicator
            .registry
            .allocate(
                Ask {
                    plan: plan.clone(),
                    volumes: volumes.clone(),
                    need: need.clone(),
                    expires: UnixMillis(now.0.saturating_add(PAIRING_LIFETIME_MS)),
                },
                duplicator.rules(),
                now,
            )
            .await?;
        let Some(lending) = allocation.lending else {
            tracing::warn!(source = %need.source, %plan, role = %need.role, "nobody to lend");
            return Ok(Json(PairingAnswer::NobodyFits {
                explanation: allocation.explanation,
            }));
        };
        let (to_lent, to_source) = notices(&lending, &source);
        // With the secret in it, for nobody who answers there under a certificate that was replaced.
        let told = duplicator
            .client
            .expecting(to_source.peer_fingerprint)
            .post::<Notice, ()>(&to_source.peer, "/v1/pairings", &to_lent)
            .await;
        let Err(error) = told else {
            tracing::info!(
                pairing = %lending.pairing.id, source = %need.source, device = %lending.pairing.device,
                role = %need.role, %plan, "paired"
            );
            return Ok(Json(PairingAnswer::Paired {
                notice: Box::new(to_source),
                explanation: allocation.explanation,
            }));
        };
        tracing::warn!(device = %lending.pairing.device, %error, "cannot notify the device; looking for another");
        let device = lending.pairing.device.clone();
        duplicator
            .registry
            .release(lending.pairing.id, DutyOutcome::Abandoned, Vec::new(), now)
            .await?;
        need.exclude
            .insert(device, format!("could not be notified: {}", error.failure));
    }
}

/// The notices for the lent device and for the source: the same pairing, each with the other as peer.
fn notices(lending: &Lending, source: &(PeerAddress, Fingerprint)) -> (Notice, Notice) {
    let to_source = Notice {
        pairing: lending.pairing.id.clone(),
        plan: lending.pairing.plan.clone(),
        role: lending.pairing.role,
        source: lending.pairing.source.clone(),
        device: lending.pairing.device.clone(),
        actions: lending.pairing.actions.clone(),
        volumes: lending.volumes.clone(),
        quantity: lending.pairing.quantity,
        expires: lending.expires,
        peer: PeerAddress {
            device: lending.pairing.device.clone(),
            addr: lending.address,
        },
        peer_fingerprint: lending.fingerprint,
        secret: lending.secret.clone(),
    };
    let to_lent = Notice {
        peer: source.0.clone(),
        peer_fingerprint: source.1,
        ..to_source.clone()
    };
    (to_lent, to_source)
}

async fn release<R: Registry>(
    State(duplicator): Shared<R>,
    Extension(peer): Extension<PeerIdentity>,
    Json(ask): Json<ReleaseRequest>,
) -> Answer<PairingRecord> {
    let pairing = duplicator.registry.pairing(ask.pairing.clone()).await?;
    if pairing.source != peer.device {
        return Err(ErrorAnswer::new(
            StatusCode::FORBIDDEN,
            format!("pairing {} is not {}'s", pairing.id, peer.device),
        ));
    }
    let was_open = pairing.outcome.is_none();
    let released = duplicator
        .registry
        .release(ask.pairing, ask.outcome, ask.costs, now())
        .await?;
    if was_open {
        tracing::info!(pairing = %released.id, device = %released.device, outcome = ?ask.outcome, "pairing released");
        duplicator.tell_end(&released).await;
    }
    Ok(Json(released))
}
