//! The agent: senses, judgement, the three roles of a migration, and the interfaces to them.

use super::automatic::Automatic;
use super::config::{AgentConfig, FleetConfig};
use super::host;
use super::privileges;
use super::senses::Senses;
use crate::api::control::Roles;
use crate::api::{control, local};
use crate::containers::{Runtimes, Scope};
use crate::fleet;
use crate::fleet::agent::PairedState;
use crate::fleet::client::ControlClient;
use crate::fleet::compare::Compared;
use crate::fleet::identity::Identity;
use crate::fleet::registry::Heartbeat;
use crate::fleet::server::{ControlServer, ServeError};
use crate::health::Policy;
use crate::migration::Forwards;
use crate::migration::access::Access;
use crate::migration::delegator::{Delegator, FleetContext, Parts};
use crate::migration::paired::Paired;
use crate::migration::pause::Pauses;
use crate::migration::provide::Provider;
use crate::migration::refusal::Refusal;
use crate::migration::target::Target;
use crate::model::ids::DeviceId;
use crate::telemetry::{ConnectionLimits, Telemetry, TelemetryConfig};
use crate::transfer::{self, BindError, DataServer, EngineChoice};
use crate::volume::BlockMap;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use std::fs::{File, TryLockError};
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// Why the agent cannot run.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// State directory.
    #[error("cannot use state directory {path}: {error}; create it or set `state`")]
    State {
        /// Directory.
        path: PathBuf,
        /// Cause.
        error: std::io::Error,
    },
    /// The identity does not fit.
    #[error(transparent)]
    Identity(#[from] fleet::identity::IdentityError),
    /// Another agent uses the same state directory.
    #[error(
        "another agent uses state directory {0}; stop it, or give this one a `state` and a `socket` of its own"
    )]
    Second(PathBuf),
    /// Another agent answers on the socket.
    #[error("another agent answers on {0}; stop it, or set `socket`")]
    Answers(PathBuf),
    /// The control channel.
    #[error(transparent)]
    Control(#[from] ServeError),
    /// The data plane.
    #[error(transparent)]
    Data(#[from] BindError),
    /// The identity is of another device.
    #[error(
        "the identity in {path} is of device {found}, the configuration says {wanted}; set `device: {found}` or enrol again"
    )]
    OtherDevice {
        /// Identity directory.
        path: PathBuf,
        /// Its device.
        found: DeviceId,
        /// Configured.
        wanted: DeviceId,
    },
    /// The sweep cannot be started.
    #[error("{0}")]
    Senses(String),
    /// A listener.
    #[error("cannot listen for {what}: {error}")]
    Listen {
        /// What.
        what: String,
        /// Cause.
        error: String,
    },
    /// A network in the configuration.
    #[error("trusted_networks: {0}")]
    Network(crate::migration::trusted::NotANetwork),
    /// Pairings.
    #[error("cannot read the pairings in the state directory: {0}")]
    Pairings(String),
    /// The sweep's thread panicked.
    #[error(
        "nothing is swept any more, so no verdict would ever change; the panic above is a bug to report"
    )]
    Blind,
    /// Signals.
    #[error("cannot handle signals: {0}")]
    Signals(std::io::Error),
}

/// Starts the senses, and then drops the capabilities that only this took. Must be called while the process
/// has one thread: those that are started later inherit what is left.
#[must_use]
pub fn sense(config: &AgentConfig) -> Telemetry {
    allow_open_files();
    let telemetry = Telemetry::start(TelemetryConfig {
        root: config.root.clone(),
        cgroup: cgroup(config),
        edge_age: config.relations.age,
        remembered: super::senses::remembered(config),
        limits: ConnectionLimits {
            open: config.relations.max_connections,
            kinds: config.relations.max_kinds,
        },
    });
    if let Err(error) = privileges::drop_others() {
        tracing::warn!("{error}");
    }
    telemetry
}

/// A served tree has every open file of its users open too, and one more for each that was removed.
fn allow_open_files() {
    let files = Resource::RLIMIT_NOFILE;
    let raised = getrlimit(files).and_then(|(_, most)| setrlimit(files, most, most));
    if let Err(error) = raised {
        tracing::warn!(
            "cannot raise the number of files that may be open at a time: {error}; set LimitNOFILE"
        );
    }
}

fn cgroup(config: &AgentConfig) -> PathBuf {
    let configured = config.cgroup.clone();
    configured.unwrap_or_else(|| Scope::default().cgroup_root)
}

/// Runs the agent until SIGTERM or SIGINT.
///
/// # Errors
/// See [`AgentError`]; a missing kernel feature or runtime is none.
pub async fn run(config: AgentConfig, telemetry: Telemetry) -> Result<(), AgentError> {
    let stop = CancellationToken::new();
    let state_error = |error| AgentError::State {
        path: config.state.clone(),
        error,
    };
    std::fs::create_dir_all(&config.state).map_err(state_error)?;
    // Journals hold containers' environments, which hold passwords.
    std::fs::set_permissions(&config.state, std::fs::Permissions::from_mode(0o700))
        .map_err(state_error)?;
    // Held until the end: two agents would write the same journals.
    let _alone = alone(&config.state).await?;
    if std::os::unix::net::UnixStream::connect(&config.socket).is_ok() {
        return Err(AgentError::Answers(config.socket.clone()));
    }
    let scope = Scope {
        cgroup_root: cgroup(&config),
    };
    let runtimes = Runtimes::new(&config.runtimes, scope)
        .registered_by(config.relations.registration_env.clone());
    let runtimes = Arc::new(runtimes);
    let senses = Senses::start(&config, telemetry, runtimes.clone()).map_err(AgentError::Senses)?;
    let view = senses.view();
    let transfer = transfer::Options {
        engine: if config.migration.disable_io_uring {
            EngineChoice::Threads
        } else {
            EngineChoice::Auto
        },
        device_nodes: config.migration.device_nodes,
        ..transfer::Options::default()
    };
    let pauses = Arc::new(Pauses::load(&config.state));
    let refusal = Arc::new(Refusal::load(&config.state));
    let mut parts = Parts {
        device: DeviceId(config.device.clone()),
        state: config.state.clone(),
        settings: config.migration.clone(),
        transfer,
        proc_root: config.root.join("proc"),
        runtimes,
        data: None,
        fleet: None,
        view: view.clone(),
        pauses: pauses.clone(),
        refusal: refusal.clone(),
        forwards: Forwards::load(&config.state),
        beat: Arc::default(),
        troubles: Mutex::default(),
        unheard: Mutex::default(),
    };
    let (delegator, access) = match &config.fleet {
        None => (Arc::new(Delegator::new(Arc::new(parts))), None),
        Some(fleet_config) => {
            let fleet = join_fleet(&config, fleet_config)?;
            let data = SocketAddr::from(([0, 0, 0, 0], fleet_config.data_port));
            let map = match BlockMap::open(&config.state) {
                Ok(map) => Some(Arc::new(map)),
                Err(error) => {
                    tracing::warn!("{error}; blocks that are here already will be sent again");
                    None
                }
            };
            let server = DataServer::bind(data, parts.transfer.clone(), map)?;
            parts.data = Some(Arc::new(server));
            parts.fleet = Some(fleet);
            serve_fleet(&config, fleet_config, Arc::new(parts), &senses, &stop).await?
        }
    };
    let automatic = (config.migration.automatic && config.fleet.is_some()).then(|| {
        let automatic = Automatic::new(delegator.clone(), pauses.clone(), senses.policy(), refusal);
        let acting = automatic.acting();
        tokio::spawn(automatic.run(view.clone()));
        acting
    });
    let driver = delegator.clone();
    let context = local::Context {
        device: config.device.clone(),
        view,
        recent: senses.recent(),
        delegator,
        reload: senses.reloader(),
        policy: senses.policy(),
        pauses,
        automatic,
        access: access.clone(),
    };
    let socket = config.socket.clone();
    let api = tokio::spawn(local::serve(socket.clone(), context));
    tracing::info!(device = config.device, socket = %socket.display(), "agent runs");
    let ended = wait(&socket, &senses, api).await;
    if let Some(access) = access {
        access.stop().await;
    }
    driver.stop(STOP_TIME).await;
    stop.cancel();
    let _ = tokio::fs::remove_file(&socket).await;
    ended
}

/// The lock of a state directory.
async fn alone(state: &Path) -> Result<File, AgentError> {
    let path = state.join("lock");
    let error = |error| AgentError::State {
        path: path.clone(),
        error,
    };
    let file = File::create(&path).map_err(error)?;
    let begun = Instant::now();
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::Error(cause)) => return Err(error(cause)),
            // One that was killed may still be ending.
            Err(TryLockError::WouldBlock) if begun.elapsed() < ENDING_TIME => {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            Err(TryLockError::WouldBlock) => return Err(AgentError::Second(state.to_owned())),
        }
    }
}

/// Until a signal ends the agent.
async fn wait(
    socket: &Path,
    senses: &Senses,
    mut api: tokio::task::JoinHandle<std::io::Result<()>>,
) -> Result<(), AgentError> {
    let on = |kind| signal(kind).map_err(AgentError::Signals);
    let (mut terminate, mut interrupt, mut hangup) = (
        on(SignalKind::terminate())?,
        on(SignalKind::interrupt())?,
        on(SignalKind::hangup())?,
    );
    loop {
        tokio::select! {
            _ = terminate.recv() => return Ok(()),
            _ = interrupt.recv() => return Ok(()),
            _ = hangup.recv() => match (senses.reloader())() {
                Ok(policy) => tracing::info!(policy = policy.name, "policy reloaded"),
                Err(error) => {
                    let left = match (senses.policy())() {
                        Some(_) => "the old one stays",
                        None => "there is none in force",
                    };
                    tracing::error!("policy not reloaded, {left}: {error}");
                }
            },
            () = senses.ended() => return Err(AgentError::Blind),
            ended = &mut api => {
                let error = match ended {
                    Ok(Err(error)) => error.to_string(),
                    Ok(Ok(())) => "it ended".into(),
                    Err(error) => error.to_string(),
                };
                return Err(AgentError::Listen { what: format!("commands on {}", socket.display()), error });
            }
        }
    }
}

fn join_fleet(
    config: &AgentConfig,
    fleet_config: &FleetConfig,
) -> Result<FleetContext, AgentError> {
    let identity = Identity::load(&config.state)?;
    if identity.device().as_str() != config.device {
        return Err(AgentError::OtherDevice {
            path: config.state.clone(),
            found: identity.device().clone(),
            wanted: DeviceId(config.device.clone()),
        });
    }
    let client = ControlClient::new(&identity).map_err(|error| AgentError::Listen {
        what: "the control channel".into(),
        error: error.to_string(),
    })?;
    let trusted = fleet_config
        .trusted_networks
        .iter()
        .map(|text| text.parse())
        .collect::<Result<_, _>>()
        .map_err(AgentError::Network)?;
    let configuration = host::configuration(&config.root, &config.state);
    Ok(FleetContext {
        identity: Arc::new(identity),
        client,
        configuration,
        trusted,
    })
}

/// Starts the roles of a device in a fleet: data plane, control channel, heartbeats.
async fn serve_fleet(
    config: &AgentConfig,
    fleet_config: &FleetConfig,
    parts: Arc<Parts>,
    senses: &Senses,
    stop: &CancellationToken,
) -> Result<(Arc<Delegator>, Option<Arc<Access>>), AgentError> {
    let Some(fleet) = &parts.fleet else {
        return Ok((Arc::new(Delegator::new(parts)), None));
    };
    let advertised = fleet.identity.advertise();
    let data = fleet_config
        .advertise_data
        .unwrap_or_else(|| SocketAddr::new(advertised.ip(), fleet_config.data_port));
    let pairings = PairedState::open(&config.state, DeviceId(config.device.clone()))
        .map_err(|error| AgentError::Pairings(error.to_string()))?;
    let pairings = Arc::new(pairings);
    let target = Arc::new(Target::new(parts.clone(), pairings.clone(), data));
    target.resume();
    let paired = Arc::new(Paired::new(parts.clone(), pairings.clone(), data));
    paired.resume();
    let listen = SocketAddr::from(([0, 0, 0, 0], advertised.port()));
    let server = ControlServer::bind(&fleet.identity, listen).await?;
    let delegator = Arc::new(Delegator::new(parts.clone()));
    let access = Arc::new(Access::new(target.clone(), pairings.clone()));
    let provider = Arc::new(Provider::new(delegator.clone(), data));
    let routes = fleet::agent::router(pairings.clone()).merge(control::router(Roles {
        pairings,
        target,
        paired,
        provider,
    }));
    // Before the first heartbeat, which names the plans that are under way, and before any offer, to which a port that is
    // forwarded from here is not free.
    delegator.resume().await;
    tokio::spawn(server.serve(routes, stop.clone()));
    let (client, duplicator) = (fleet.client.clone(), fleet.identity.duplicator().clone());
    let (started, beating) = (Instant::now(), delegator.clone());
    let beat = parts.beat.clone();
    let (policy, telling, hearing) = (senses.policy(), senses.comparison(), senses.comparison());
    let hearer = parts.clone();
    let sample = move || {
        let policy = policy();
        let view = parts.view.borrow().clone();
        let beat = Heartbeat {
            compared: telling.compared(policy.as_ref(), &view, fleet::now()),
            ..heartbeat(&parts, &beating, policy.as_ref(), started)
        };
        async move { beat }
    };
    tokio::spawn(fleet::agent::heartbeat_loop(
        client,
        duplicator,
        sample,
        move |answer| {
            let unheard = answer.map(|answer| hearing.hear(answer)).err();
            *hearer
                .unheard
                .lock()
                .unwrap_or_else(PoisonError::into_inner) = unheard;
        },
        beat,
        stop.clone(),
    ));
    Ok((delegator, Some(access)))
}

fn heartbeat(
    parts: &Parts,
    delegator: &Delegator,
    policy: Option<&Policy>,
    started: Instant,
) -> Heartbeat {
    let stale_after = policy.map_or(Duration::ZERO, |policy| policy.stale_after);
    let view = parts.view.borrow().clone();
    let plans: Vec<_> = delegator
        .status()
        .into_iter()
        .filter(|plan| !plan.over)
        .collect();
    let duties = u32::try_from(plans.len()).unwrap_or(u32::MAX);
    let fleet = parts.fleet.as_ref();
    Heartbeat {
        address: fleet.map_or_else(
            || SocketAddr::from(([0, 0, 0, 0], 0)),
            |fleet| fleet.identity.advertise(),
        ),
        version: env!("CARGO_PKG_VERSION").into(),
        uptime_seconds: started.elapsed().as_secs(),
        configuration: fleet.map_or_else(
            || host::configuration(Path::new("/"), &parts.state),
            |fleet| fleet.configuration.clone(),
        ),
        utilisation: host::utilisation(&view, stale_after, &parts.state, duties),
        plans: plans.into_iter().map(|plan| plan.plan).collect(),
        compared: Compared::default(),
    }
}

/// Longest wait for another agent with the same state to end.
const ENDING_TIME: Duration = Duration::from_secs(3);

/// Longest wait for plans to roll back before the agent ends; systemd waits 90 s.
const STOP_TIME: Duration = Duration::from_secs(45);
