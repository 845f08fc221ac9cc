//! The duplicator as a daemon: its configuration, and from start to a clean stop.

use crate::fleet::ca::Ca;
use crate::fleet::duplicator::{Duplicator, Settings};
use crate::fleet::identity::{DUPLICATOR, Identity, IdentityError};
use crate::fleet::registry::RegistryError;
use crate::fleet::server::{ControlServer, ServeError};
use crate::fleet::sqlite::SqliteRegistry;
use crate::health::span;
use crate::model::ids::DeviceId;
use crate::model::locate;
use serde::{Deserialize, Deserializer};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// The duplicator's configuration file (YAML).
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DuplicatorConfig {
    /// Address to listen on; devices reach it at the one `fleet init --advertise` named.
    pub listen: SocketAddr,
    /// The directory that `fleet init` made.
    pub state: PathBuf,
    /// How often devices report; a device is live while its last report is younger than three times it.
    #[serde(default = "default_heartbeat", deserialize_with = "spanned")]
    pub heartbeat: Duration,
    /// A migration should be over by then: how far ahead a device's CPU time is lent.
    #[serde(default = "default_horizon", deserialize_with = "spanned")]
    pub horizon: Duration,
    /// Pairings a device may have at a time.
    #[serde(default = "default_pairings")]
    pub max_pairings: u32,
}

fn default_heartbeat() -> Duration {
    Settings::default().heartbeat
}
fn default_horizon() -> Duration {
    Settings::default().horizon
}
fn default_pairings() -> u32 {
    Settings::default().max_pairings
}

fn spanned<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    let text = String::deserialize(deserializer)?;
    match span(&text).map_err(serde::de::Error::custom)? {
        Duration::ZERO => Err(serde::de::Error::custom("must be more than nothing")),
        span => Ok(span),
    }
}

/// The duplicator could not start.
#[derive(Debug, thiserror::Error)]
pub enum DuplicatorError {
    /// The configuration cannot be read.
    #[error("{path}: {error}")]
    Read {
        /// File.
        path: PathBuf,
        /// Cause.
        error: std::io::Error,
    },
    /// The configuration has a mistake; the text says file, line, column and field.
    #[error("{0}")]
    Config(String),
    /// The directory is a device's.
    #[error(
        "{path}: this is device {device}'s identity; `state` must be the directory that `lifeboat fleet init` made"
    )]
    NotADuplicator {
        /// Directory.
        path: PathBuf,
        /// Whose.
        device: DeviceId,
    },
    /// Identity or CA.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// Registry.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// Control channel.
    #[error(transparent)]
    Serve(#[from] ServeError),
    /// TLS.
    #[error("TLS: {0}")]
    Tls(#[from] rustls::Error),
    /// Signals.
    #[error("cannot wait for signals: {0}")]
    Signals(std::io::Error),
}

impl DuplicatorConfig {
    /// Reads the configuration at `path`.
    ///
    /// # Errors
    /// [`DuplicatorError::Read`] or [`DuplicatorError::Config`].
    pub fn load(path: &Path) -> Result<Self, DuplicatorError> {
        let text = std::fs::read_to_string(path).map_err(|error| DuplicatorError::Read {
            path: path.to_owned(),
            error,
        })?;
        locate::parse(&text)
            .map_err(|fault| DuplicatorError::Config(fault.in_file(&path.display().to_string())))
    }
}

/// Runs the duplicator until SIGTERM or SIGINT.
///
/// # Errors
/// [`DuplicatorError`].
pub async fn run(config: &DuplicatorConfig) -> Result<(), DuplicatorError> {
    let mut terminate = signal(SignalKind::terminate()).map_err(DuplicatorError::Signals)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(DuplicatorError::Signals)?;
    let identity = Identity::load(&config.state)?;
    if identity.device().as_str() != DUPLICATOR {
        return Err(DuplicatorError::NotADuplicator {
            path: config.state.clone(),
            device: identity.device().clone(),
        });
    }
    let registry = SqliteRegistry::open(&SqliteRegistry::path(&config.state))?;
    let server = ControlServer::bind(&identity, config.listen).await?;
    let duplicator = Arc::new(Duplicator::new(
        Arc::new(identity),
        Ca::load(&config.state)?,
        registry,
        Settings {
            heartbeat: config.heartbeat,
            horizon: config.horizon,
            max_pairings: config.max_pairings,
        },
    )?);
    tracing::info!(listen = %server.local_addr(), state = %config.state.display(), "duplicator runs");
    let stop = CancellationToken::new();
    let served = tokio::spawn(server.serve_enrolling(
        duplicator.members(),
        duplicator.strangers(),
        stop.clone(),
    ));
    tokio::select! {
        _ = terminate.recv() => tracing::info!("SIGTERM: stopping"),
        _ = interrupt.recv() => tracing::info!("SIGINT: stopping"),
    }
    stop.cancel();
    if let Err(error) = served.await {
        tracing::error!(%error, "the control channel ended badly");
    }
    Ok(())
}
