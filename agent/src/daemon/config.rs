//! The agent's configuration file (YAML).

use crate::migration::Settings;
use crate::migration::settings::some;
use crate::model::locate;
use crate::telemetry::ConnectionLimits;
use serde::Deserialize;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Everything an operator may set; every field but `device` has a default.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AgentConfig {
    /// This device's id, as it was enrolled.
    pub device: String,
    /// Identity, journals and spool.
    #[serde(default = "default_state")]
    pub state: PathBuf,
    /// Unix socket of the local API.
    #[serde(default = "default_socket")]
    pub socket: PathBuf,
    /// Root under which `/proc` and `/sys` are read.
    #[serde(default = "default_root")]
    pub root: PathBuf,
    /// The cgroup2 directory that this agent owns; found by itself when absent.
    #[serde(default)]
    pub cgroup: Option<PathBuf>,
    /// Sockets of Docker-compatible runtimes and of containerd; those that do not exist are skipped.
    #[serde(default = "default_runtimes")]
    pub runtimes: Vec<String>,
    /// Degradation policy; none: no verdict but `unknown`.
    #[serde(default)]
    pub policy: Option<PathBuf>,
    /// What makes containers belong together.
    #[serde(default)]
    pub relations: RelationsConfig,
    /// Fleet; none: observe only.
    #[serde(default, deserialize_with = "named")]
    pub fleet: Option<FleetConfig>,
    /// Moving data.
    #[serde(default)]
    pub migration: Settings,
}

/// What makes containers belong together.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RelationsConfig {
    /// How long an edge counts after it was last seen (`7d`, `12h`).
    #[serde(deserialize_with = "span")]
    pub age: Duration,
    /// Environment variable of containers that holds a registration id.
    pub registration_env: Option<String>,
    /// Connections open at once that the kernel programs can follow.
    #[serde(deserialize_with = "some")]
    pub max_connections: u32,
    /// Kinds of connections that they can count between two sweeps.
    #[serde(deserialize_with = "some")]
    pub max_kinds: u32,
}

impl Default for RelationsConfig {
    fn default() -> Self {
        let limits = ConnectionLimits::default();
        Self {
            age: Duration::from_secs(7 * 86_400),
            registration_env: None,
            max_connections: limits.open,
            max_kinds: limits.kinds,
        }
    }
}

fn span<'de, D: serde::Deserializer<'de>>(from: D) -> Result<Duration, D::Error> {
    let text = String::deserialize(from)?;
    let span = crate::health::span(&text).map_err(serde::de::Error::custom)?;
    if span.is_zero() {
        return Err(serde::de::Error::custom(
            "0 would forget every edge at once: write for instance 7d",
        ));
    }
    Ok(span)
}

/// How this device takes part in the fleet; who it is lies in the state directory since it joined.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct FleetConfig {
    /// Port of the data plane.
    #[serde(deserialize_with = "some")]
    pub data_port: u16,
    /// The data address told to peers, where it is not the control address with `data_port` (a tunnel, a proxy).
    pub advertise_data: Option<SocketAddr>,
    /// Networks (`10.0.0.0/8`) over which unsealed blocks may travel to a paired device.
    pub trusted_networks: Vec<String>,
}

impl Default for FleetConfig {
    fn default() -> Self {
        Self {
            data_port: 7402,
            advertise_data: None,
            trusted_networks: Vec::new(),
        }
    }
}

/// A key without a value means what is behind it by default: whoever writes it takes part.
fn named<'de, T: Default + Deserialize<'de>, D: serde::Deserializer<'de>>(
    from: D,
) -> Result<Option<T>, D::Error> {
    Ok(Some(Option::deserialize(from)?.unwrap_or_default()))
}

fn default_state() -> PathBuf {
    "/var/lib/lifeboat".into()
}
fn default_socket() -> PathBuf {
    DEFAULT_SOCKET.into()
}
fn default_root() -> PathBuf {
    "/".into()
}
fn default_runtimes() -> Vec<String> {
    [
        "/run/podman/podman.sock",
        "/run/docker.sock",
        "/run/containerd/containerd.sock",
    ]
    .map(str::to_owned)
    .into()
}

/// Where the command line looks for the agent.
pub const DEFAULT_SOCKET: &str = "/run/lifeboat/agent.sock";

/// Why the configuration could not be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error(
        "cannot read configuration {path}: {error}; write one (docs/configuration.md), or name another file with --config"
    )]
    Read {
        /// File.
        path: PathBuf,
        /// Cause.
        error: std::io::Error,
    },
    /// The file is not a configuration: file, line, column, field and what is wrong.
    #[error("{0}")]
    Parse(String),
}

/// Reads a YAML configuration file; the error names the field, line and column.
///
/// # Errors
/// The file cannot be read, or a field is unknown, missing or of the wrong type.
pub fn load<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T, ConfigError> {
    let text = std::fs::read_to_string(path).map_err(|error| ConfigError::Read {
        path: path.to_owned(),
        error,
    })?;
    locate::parse(&text)
        .map_err(|fault| ConfigError::Parse(fault.in_file(&path.display().to_string())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_field_is_named_with_its_line() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "device: a\nfleet:\n  data_prot: 1\n").unwrap();
        let error = load::<AgentConfig>(file.path()).unwrap_err().to_string();
        assert!(error.contains(":3:3: fleet.data_prot: "), "{error}");
    }

    #[test]
    fn a_setting_out_of_range_is_refused_at_its_place() {
        for (text, place) in [
            ("migration: {\n  rounds_max: 0 }", ":3:"),
            ("migration: {\n  rate_min_bytes: 0 }", ":3:"),
            ("migration: {\n  prepare_rate_bytes: 0 }", ":3:"),
            ("migration: {\n  ready_timeout_seconds: 0 }", ":3:"),
            ("migration: {\n  workload_loss_max_percent: 101 }", ":3:"),
            ("migration: {\n  workload_loss_max_percent: -1 }", ":3:"),
            ("migration: {\n  workload_loss_max_percent: .nan }", ":3:"),
            ("relations: {\n  age: 0s }", ":3:"),
            ("relations: {\n  max_connections: 0 }", ":3:"),
            ("relations: {\n  max_kinds: 0 }", ":3:"),
            ("fleet: {\n  data_port: 0 }", ":3:"),
        ] {
            let file = tempfile::NamedTempFile::new().unwrap();
            std::fs::write(file.path(), format!("device: a\n{text}\n")).unwrap();
            let error = load::<AgentConfig>(file.path()).unwrap_err().to_string();
            assert!(error.contains(place) && error.contains("write "), "{error}");
        }
        let file = tempfile::NamedTempFile::new().unwrap();
        let text = "device: a\nmigration: { workload_loss_max_percent: 0, rounds_max: 1, settle_seconds: 0 }\n";
        std::fs::write(file.path(), text).unwrap();
        assert_eq!(
            load::<AgentConfig>(file.path())
                .unwrap()
                .migration
                .rounds_max,
            1
        );
    }

    #[test]
    fn a_fleet_without_settings_is_a_fleet() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "device: a\nfleet:\n").unwrap();
        let config = load::<AgentConfig>(file.path()).unwrap();
        assert_eq!(config.fleet.map(|fleet| fleet.data_port), Some(7402));
        std::fs::write(file.path(), "device: a\n").unwrap();
        assert!(load::<AgentConfig>(file.path()).unwrap().fleet.is_none());
    }
}
