//! Lifeboat on lab hosts: a duplicator, enrolled devices, their agents, and the command line inside them.
//!
//! Invariant: what runs is the binary that was built, started as an operator would start it.

use std::collections::BTreeMap;
use std::process::{Child, ExitStatus, Output};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::lab::{Host, Lab};
use crate::process::{shown, wait_for};
use crate::workspace;

/// Port of the control channel on every host.
const CONTROL_PORT: u16 = 7400;

/// How one device is to be configured.
#[derive(Debug, Clone, Default)]
pub struct Device {
    /// Name of its lab host and its id in the fleet.
    pub name: String,
    /// Text of its policy; none: no verdict.
    pub policy: Option<String>,
    /// Lines of YAML below `migration:`.
    pub migration: Vec<String>,
    /// Lines of YAML below `fleet:` beside the lab's own.
    pub fleet: Vec<String>,
    /// Environment of its agent's first life, as `NAME=VALUE`.
    pub environment: Vec<String>,
}

impl Device {
    /// A device without policy that migrates only on request.
    #[must_use]
    pub fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            migration: vec!["automatic: false".into()],
            ..Self::default()
        }
    }
}

/// A fleet that runs on a lab.
#[derive(Debug)]
pub struct Crew {
    duplicator: Host,
    devices: BTreeMap<String, Host>,
    running: BTreeMap<String, Child>,
}

impl Crew {
    /// Makes a fleet on `lab` with its duplicator on host `duplicator`, enrols the devices, starts their
    /// agents and waits until the duplicator has heard from all.
    ///
    /// # Errors
    /// A step of the enrolment failed or an agent did not come up; the message holds the end of its log.
    pub fn start(lab: &Lab, duplicator: &str, devices: &[Device]) -> Result<Self> {
        let duplicator = lab.host(duplicator)?.clone();
        let mut crew = Self {
            duplicator,
            devices: BTreeMap::new(),
            running: BTreeMap::new(),
        };
        let address = format!("{}:{CONTROL_PORT}", crew.duplicator.address());
        lifeboat(
            &crew.duplicator,
            &["fleet", "init", "--dir", STATE, "--advertise", &address],
        )?;
        crew.duplicator.write(
            "/etc/lifeboat/duplicator.yaml",
            format!("listen: 0.0.0.0:{CONTROL_PORT}\nstate: {STATE}\nheartbeat: 1s\n"),
        )?;
        crew.start_duplicator()?;
        for device in devices {
            let host = lab.host(&device.name)?.clone();
            crew.enrol(&host, &device.name)?;
            configure(&host, device)?;
            crew.devices.insert(device.name.clone(), host);
            crew.launch_agent(&device.name, &device.environment)?;
        }
        for device in devices {
            crew.await_view(&device.name)?;
        }
        wait_for("heartbeats of all devices", Duration::from_secs(30), || {
            let live = crew.live_devices()?;
            Ok((live >= devices.len()).then_some(()))
        })?;
        Ok(crew)
    }

    fn enrol(&self, host: &Host, name: &str) -> Result<()> {
        let token = lifeboat(
            &self.duplicator,
            &["fleet", "invite", "--dir", STATE, "--for", name],
        )?;
        host.write("/run/lifeboat-token", token)?;
        let address = format!("{}:{CONTROL_PORT}", host.address());
        let join = [
            "fleet",
            "join",
            "--dir",
            STATE,
            "--device",
            name,
            "--advertise",
            &address,
            "--token-file",
            "/run/lifeboat-token",
        ];
        lifeboat(host, &join).map(drop)
    }

    fn start_duplicator(&mut self) -> Result<()> {
        let argv = argv(&["duplicator", "--config", "/etc/lifeboat/duplicator.yaml"]);
        let child = self.duplicator.spawn_logged("duplicator", argv)?;
        self.running.insert(DUPLICATOR.into(), child);
        let port = CONTROL_PORT.to_string();
        wait_for("the duplicator's port", Duration::from_secs(10), || {
            let listening =
                self.duplicator
                    .run(["ss", "-Hltn", "sport", "=", &format!(":{port}")])?;
            Ok((!listening.is_empty()).then_some(()))
        })
        .with_context(|| self.duplicator_log())
    }

    /// Starts the agent of a device and waits until it answers on its socket.
    ///
    /// # Errors
    /// It did not come up; the message holds the end of its log.
    pub fn start_agent(&mut self, device: &str) -> Result<()> {
        self.start_agent_with(device, &[])
    }

    /// As [`Crew::start_agent`], with `NAME=VALUE`s in its environment.
    ///
    /// # Errors
    /// As [`Crew::start_agent`].
    pub fn start_agent_with(&mut self, device: &str, environment: &[String]) -> Result<()> {
        self.launch_agent(device, environment)?;
        self.await_view(device)
    }

    fn await_view(&self, device: &str) -> Result<()> {
        wait_for(
            "the agent's first view of its host",
            Duration::from_secs(60),
            || {
                let status = self.ask(device, &["status"])?;
                Ok(status.1["view"]["snapshot"]["at"]
                    .as_u64()
                    .filter(|at| *at > 0))
            },
        )
        .map(drop)
        .with_context(|| {
            self.host(device)
                .map_or_else(|_| String::new(), |host| tail(host, "agent"))
        })
    }

    /// Starts the agent of a device, with `NAME=VALUE`s in its environment, and waits for nothing.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn launch_agent(&mut self, device: &str, environment: &[String]) -> Result<()> {
        let host = self.host(device)?.clone();
        // `env` becomes the agent: the process id is the agent's own.
        let environment = ["env".into()]
            .into_iter()
            .chain(environment.iter().map(Into::into));
        let child = host.spawn_logged("agent", environment.chain(argv(&["agent"])))?;
        self.running.insert(device.to_owned(), child);
        Ok(())
    }

    /// Kills the agent of a device with SIGKILL.
    ///
    /// # Errors
    /// It does not run.
    pub fn kill_agent(&mut self, device: &str) -> Result<()> {
        let mut child = self
            .running
            .remove(device)
            .with_context(|| format!("no agent runs on {device}"))?;
        child.kill().context("cannot kill the agent")?;
        child.wait().context("the killed agent was lost")?;
        Ok(())
    }

    /// Waits until the agent of a device has ended by itself.
    ///
    /// # Errors
    /// It does not run, or goes on running for longer than `patience`.
    pub fn await_agent_end(&mut self, device: &str, patience: Duration) -> Result<ExitStatus> {
        let mut child = self
            .running
            .remove(device)
            .with_context(|| format!("no agent runs on {device}"))?;
        wait_for("the agent's end", patience, || Ok(child.try_wait()?))
            .with_context(|| self.log(device))
    }

    /// Sends the agent of a device a signal.
    ///
    /// # Errors
    /// It does not run.
    pub fn signal_agent(&self, device: &str, signal: Signal) -> Result<()> {
        let child = self
            .running
            .get(device)
            .with_context(|| format!("no agent runs on {device}"))?;
        kill(Pid::from_raw(i32::try_from(child.id())?), signal).context("cannot signal the agent")
    }

    /// The lab host of a device.
    ///
    /// # Errors
    /// There is no such device.
    pub fn host(&self, device: &str) -> Result<&Host> {
        self.devices
            .get(device)
            .with_context(|| format!("no device {device} in this fleet"))
    }

    /// Runs `lifeboat --json ARGUMENTS` on a device; returns exit code and answer.
    ///
    /// # Errors
    /// It could not be run, or printed something that is no JSON.
    pub fn ask(&self, device: &str, arguments: &[&str]) -> Result<(i32, Value)> {
        let mut all = vec!["--json"];
        all.extend(arguments);
        let mut command = self.host(device)?.command(argv(&all));
        let Output {
            status,
            stdout,
            stderr,
        } = command
            .output()
            .with_context(|| format!("cannot run `{}`", shown(&command)))?;
        let code = status.code().unwrap_or(-1);
        let answer = serde_json::from_slice(&stdout).with_context(|| {
            format!(
                "`lifeboat {}` ended with {code} and printed no JSON: {}{}",
                arguments.join(" "),
                String::from_utf8_lossy(&stdout),
                String::from_utf8_lossy(&stderr)
            )
        })?;
        Ok((code, answer))
    }

    /// Runs `lifeboat ARGUMENTS` on a device and returns what it prints; fails when it fails.
    ///
    /// # Errors
    /// Its exit code is not 0; the message holds what it wrote to standard error.
    pub fn tell(&self, device: &str, arguments: &[&str]) -> Result<String> {
        lifeboat(self.host(device)?, arguments)
    }

    /// Starts `lifeboat ARGUMENTS` on a device, with its output in the host's log `name`.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn begin(&self, device: &str, name: &str, arguments: &[&str]) -> Result<Child> {
        self.host(device)?.spawn_logged(name, argv(arguments))
    }

    /// Devices whose heartbeat is fresh.
    fn live_devices(&self) -> Result<usize> {
        let text = lifeboat(
            &self.duplicator,
            &["--json", "fleet", "devices", "--dir", STATE],
        )?;
        let devices: Value =
            serde_json::from_str(&text).context("fleet devices printed no JSON")?;
        let live = |device: &&Value| device["live"].as_bool() == Some(true);
        Ok(devices
            .as_array()
            .map_or(0, |devices| devices.iter().filter(live).count()))
    }

    /// What the duplicator logged.
    #[must_use]
    pub fn duplicator_log(&self) -> String {
        tail(&self.duplicator, "duplicator")
    }

    /// What the agent of a device logged.
    #[must_use]
    pub fn log(&self, device: &str) -> String {
        self.devices.get(device).map_or_else(String::new, |host| {
            std::fs::read_to_string(host.log("agent")).unwrap_or_default()
        })
    }
}

const STATE: &str = "/var/lib/lifeboat";
const DUPLICATOR: &str = "duplicator";

fn configure(host: &Host, device: &Device) -> Result<()> {
    let mut lines = vec![format!("device: {}", device.name)];
    if let Some(policy) = &device.policy {
        host.write("/etc/lifeboat/policy.yaml", policy)?;
        lines.push("policy: /etc/lifeboat/policy.yaml".into());
    }
    lines.push("fleet:".into());
    // The lab's bridge is a wire of this machine.
    lines.push("  trusted_networks: [10.77.0.0/24]".into());
    lines.extend(device.fleet.iter().map(|line| format!("  {line}")));
    lines.push("migration:".into());
    // Containers of the lab answer at once or never.
    lines.push("  settle_seconds: 2".into());
    lines.extend(device.migration.iter().map(|line| format!("  {line}")));
    host.write("/etc/lifeboat/agent.yaml", lines.join("\n") + "\n")
}

fn argv(arguments: &[&str]) -> Vec<std::ffi::OsString> {
    let mut all = vec![workspace::binary("lifeboat").into_os_string()];
    all.extend(arguments.iter().map(Into::into));
    all
}

fn lifeboat(host: &Host, arguments: &[&str]) -> Result<String> {
    ensure!(
        workspace::binary("lifeboat").exists(),
        "lifeboat is not built: `cargo build`"
    );
    host.run(argv(arguments))
}

fn tail(host: &Host, log: &str) -> String {
    let text = std::fs::read_to_string(host.log(log)).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    format!(
        "log of {log} on {}:\n{}",
        host.name(),
        lines[lines.len().saturating_sub(20)..].join("\n")
    )
}

/// Waits until a plan of `device` has ended and returns its report.
///
/// # Errors
/// The patience is over, or there is no such plan.
pub fn wait_for_end(crew: &Crew, device: &str, plan: &str, patience: Duration) -> Result<Value> {
    wait_for("the plan's end", patience, || {
        let (code, report) = crew.ask(device, &["report", plan])?;
        if code != 0 {
            bail!("no report of plan {plan}: {report}");
        }
        Ok(matches!(report["state"].as_str(), Some("completed" | "aborted")).then_some(report))
    })
}
