//! When a twin counts as started: its health check if it has one, else its service ports are listening,
//! else it has run for the settle time.
//!
//! Invariants: a container that ends while it is waited for is reported at once, with its exit code and
//! its last words; every wait is bounded.

use super::client::{Runtime, RuntimeError, escape};
use crate::model::container::State;
use crate::model::units::human_duration;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeSet;
use std::fs;
use std::time::{Duration, Instant};

/// Between two looks at a container.
const LOOK: Duration = Duration::from_millis(50);
/// Between two runs of a health check that nobody else runs.
const CHECK: Duration = Duration::from_millis(500);
/// How many of the last log lines an error carries.
const LOG_LINES: u32 = 10;

/// What to wait for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReadyRules {
    /// TCP ports others were seen to use; empty when none are known.
    pub service_ports: BTreeSet<u16>,
    /// How long to run counts as started when nothing else can be asked.
    pub settle: Duration,
    /// When to give up.
    pub timeout: Duration,
}

/// How it is known that a container has started.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum How {
    /// Its own health check says so.
    HealthCheck,
    /// These ports are listening.
    PortsListening(Vec<u16>),
    /// It has run for the settle time.
    Settled,
}

/// A container has started.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Readiness {
    /// How it is known.
    pub how: How,
    /// Time since the wait began.
    pub after: Duration,
}

/// A container has not started.
#[derive(Debug, thiserror::Error)]
pub enum NotReady {
    /// The runtime failed.
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    /// It ended.
    #[error(
        "container {container} ended with exit code {exit_code} before it was ready; its last words:\n{logs}"
    )]
    Ended {
        /// The container.
        container: String,
        /// Exit code of its first process.
        exit_code: i64,
        /// Its last log lines.
        logs: String,
    },
    /// It runs and is not ready.
    #[error("container {container} runs but {missing} after {}; its last words:\n{logs}", human_duration(*after))]
    Timeout {
        /// The container.
        container: String,
        /// What was still missing.
        missing: String,
        /// The bound that passed.
        after: Duration,
        /// Its last log lines.
        logs: String,
    },
}

impl Runtime {
    /// Waits until a container that was started is ready.
    ///
    /// # Errors
    /// When it ends, is not ready in time, or the runtime fails.
    pub async fn wait_ready(
        &self,
        container: &str,
        rules: &ReadyRules,
    ) -> Result<Readiness, NotReady> {
        let since = Instant::now();
        let mut running_since = (String::new(), Instant::now());
        let mut checked: Option<Instant> = None;
        loop {
            let inspect = self.inspect(container).await?;
            let word = inspect["State"]["Status"].as_str().unwrap_or_default();
            if super::inspect::state(word) == State::Exited {
                return Err(NotReady::Ended {
                    container: container.to_owned(),
                    exit_code: inspect["State"]["ExitCode"].as_i64().unwrap_or(-1),
                    logs: self.last_words(container).await,
                });
            }
            let started = inspect["State"]["StartedAt"].as_str().unwrap_or_default();
            if running_since.0 != started {
                // Restarted by its policy: it has to settle anew.
                running_since = (started.to_owned(), Instant::now());
            }
            let missing = if has_health_check(&inspect) {
                let health = self.health(container, &inspect, &mut checked).await?;
                if health == "healthy" {
                    return Ok(ready(How::HealthCheck, since));
                }
                format!("its health check says `{health}`")
            } else if rules.service_ports.is_empty() {
                if word == "running" && running_since.1.elapsed() >= rules.settle {
                    return Ok(ready(How::Settled, since));
                }
                format!("has not run for {}", human_duration(rules.settle))
            } else {
                let pid = inspect["State"]["Pid"].as_i64().unwrap_or(0);
                let listening = listening_ports(pid);
                let silent: Vec<String> = rules
                    .service_ports
                    .difference(&listening)
                    .map(ToString::to_string)
                    .collect();
                if silent.is_empty() {
                    let ports = rules.service_ports.iter().copied().collect();
                    return Ok(ready(How::PortsListening(ports), since));
                }
                format!("does not listen on port {}", silent.join(", "))
            };
            if since.elapsed() >= rules.timeout {
                return Err(NotReady::Timeout {
                    container: container.to_owned(),
                    missing,
                    after: rules.timeout,
                    logs: self.last_words(container).await,
                });
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// The word of the health check. Docker runs the check by itself. Podman leaves that to systemd
    /// timers, which not every host has, so there it is run here.
    async fn health(
        &self,
        container: &str,
        inspect: &Value,
        checked: &mut Option<Instant>,
    ) -> Result<String, RuntimeError> {
        let shown = inspect["State"]["Health"]["Status"]
            .as_str()
            .unwrap_or_default();
        let due = checked.is_none_or(|at| at.elapsed() >= CHECK);
        if !self.engine().await?.is_podman() || !due {
            return Ok(shown.to_owned());
        }
        let path = format!("/containers/{}/healthcheck", escape(container));
        let operation = format!("run the health check of container {container}");
        let answer: Result<Value, _> = self.get_libpod(&path, &operation).await;
        *checked = Some(Instant::now());
        match answer {
            Ok(answer) => Ok(answer["Status"].as_str().unwrap_or_default().to_owned()),
            // It is not running right now; the next look says whether it ended.
            Err(RuntimeError::Refused { .. }) => Ok(shown.to_owned()),
            Err(error) => Err(error),
        }
    }

    async fn last_words(&self, container: &str) -> String {
        match self.logs(container, LOG_LINES).await {
            Ok(logs) if logs.trim().is_empty() => "(none)".to_owned(),
            Ok(logs) => logs.trim_end().to_owned(),
            Err(error) => format!("(not readable: {error})"),
        }
    }
}

fn ready(how: How, since: Instant) -> Readiness {
    Readiness {
        how,
        after: since.elapsed(),
    }
}

fn has_health_check(inspect: &Value) -> bool {
    inspect["Config"]["Healthcheck"]["Test"]
        .as_array()
        .and_then(|test| test.first())
        .and_then(Value::as_str)
        .is_some_and(|kind| !kind.is_empty() && kind != "NONE")
}

/// TCP ports with a listener in the network namespace of a process.
fn listening_ports(pid: i64) -> BTreeSet<u16> {
    ["tcp", "tcp6"]
        .iter()
        .filter_map(|table| fs::read_to_string(format!("/proc/{pid}/net/{table}")).ok())
        .flat_map(|table| listeners(&table))
        .collect()
}

/// Local ports of sockets in state 0A, LISTEN (proc(5), /proc/net/tcp).
fn listeners(table: &str) -> BTreeSet<u16> {
    table
        .lines()
        .skip(1)
        .filter_map(|line| {
            let mut fields = line.split_whitespace().skip(1);
            let local = fields.next()?;
            let state = fields.nth(1)?;
            let port = local.rsplit_once(':')?.1;
            (state == "0A").then(|| u16::from_str_radix(port, 16).ok())?
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn only_listening_sockets_count_as_service_ports() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue\n\
   0: 00000000:1538 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1 0 100 0 0 10 0\n\
   1: 0100007F:1539 0100007F:C000 01 00000000:00000000 00:00000000 00000000     0        0 2 1 0 20 4 0 10 -1\n";
        assert_eq!(listeners(table), BTreeSet::from([5432]));
    }

    #[tokio::test]
    async fn a_listener_of_this_very_process_is_seen_on_both_families() {
        let four = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let ports = listening_ports(i64::from(std::process::id()));
        assert!(ports.contains(&four.local_addr().unwrap().port()));
        if let Ok(six) = std::net::TcpListener::bind("[::1]:0") {
            let ports = listening_ports(i64::from(std::process::id()));
            assert!(ports.contains(&six.local_addr().unwrap().port()));
        } else {
            println!("IPv6 is off on this machine: the tcp6 table was not looked at");
        }
    }

    #[test]
    fn a_disabled_health_check_is_none() {
        let with = |test: Value| json!({ "Config": { "Healthcheck": { "Test": test } } });
        assert!(has_health_check(&with(json!(["CMD-SHELL", "true"]))));
        assert!(!has_health_check(&with(json!(["NONE"]))));
        assert!(!has_health_check(&with(Value::Null)));
        assert!(!has_health_check(&json!({})));
    }
}
