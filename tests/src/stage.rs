//! A stage for moves: a source, a target, and small Redis services whose writes a client counts.

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;
use std::collections::BTreeSet;
use std::fs;
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::{Child, Command};
use std::thread::sleep;
use std::time::Duration;
use xtask::crew::{Crew, Device};
use xtask::images;
use xtask::lab::{Host, Lab, LabSpec};
use xtask::process::{is_root, output_with_input, wait_for};

/// Device whose containers leave.
pub const SOURCE: &str = "source";
/// Device to which they go.
pub const TARGET: &str = "target";
/// Host of the duplicator and of the writing clients.
const OFFICE: &str = "office";

/// Longest wait for one step on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// What a policy of [`policy`] finds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Nothing.
    None,
    /// What makes the source prepare.
    Busy,
    /// What makes it evacuate.
    Starved,
}

/// A policy that finds this fault, in any machine: none has a pebibyte free, and each has a kibibyte. It costs the
/// machine nothing, which plans need. `more` is what else the policy says.
#[must_use]
pub fn policy(fault: Fault, more: &str) -> String {
    let below = |fails: bool| if fails { "1024TiB" } else { "1KiB" };
    let (busy, starved) = (below(fault != Fault::None), below(fault == Fault::Starved));
    format!(
        "version: 1
name: ladder
thresholds:
  busy:
    metric: memory.available
    below: {busy}
    for: 1s
  starved:
    metric: memory.available
    below: {starved}
    for: 1s
degraded:
  - any: [starved]
  - any: [busy]
    stage: prepare
guards:
  hold: 2s
{more}"
    )
}

/// `NAME=VALUE` that makes an agent kill itself with SIGKILL when it enters `phase`.
#[must_use]
pub fn dies_at(phase: &str) -> Vec<String> {
    vec![format!("LIFEBOAT_KILL_AT={phase}")]
}

/// A Redis with a named volume, a bind mount and a published port.
#[derive(Debug, Clone, Copy)]
pub struct Service {
    /// Name of its container.
    pub name: &'static str,
    /// Port of the host.
    pub port: u16,
}

impl Service {
    /// Directory of its bind mount.
    #[must_use]
    pub fn notes(&self) -> String {
        format!("/srv/{}-notes", self.name)
    }

    fn acknowledged(&self) -> String {
        format!("/run/{}-acknowledged", self.name)
    }
}

/// A command that is run again and again, as a process of a container's cgroup, until this is dropped.
#[derive(Debug)]
pub struct Load(Child);

impl Load {
    /// Starts it in the cgroup of the service's container.
    ///
    /// # Errors
    /// There is no such container, or the command cannot be started.
    pub fn start(host: &Host, service: &Service, command: &str) -> Result<Self> {
        let id = host.podman(["inspect", "--format", "{{.Id}}", service.name])?;
        let find = format!("find /sys/fs/cgroup -type d -name 'libpod-{id}*' | head -1");
        let script = format!("echo $$ >\"$({find})/cgroup.procs\" && while :; do {command}; done");
        Ok(Self(host.spawn_logged("load", ["sh", "-c", &script])?))
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Source, target and office with a running fleet.
#[derive(Debug)]
pub struct Stage {
    /// The lab.
    pub lab: Lab,
    /// The fleet.
    pub crew: Crew,
}

impl Stage {
    /// Starts the fleet and the services on the source, each with a client that writes to it; `None`,
    /// and said, where there can be no lab.
    ///
    /// # Errors
    /// A step failed.
    pub fn up(name: &str, devices: &[Device], services: &[Service]) -> Result<Option<Self>> {
        if !is_root() {
            eprintln!("skipped: lab hosts need root");
            return Ok(None);
        }
        let mut hosts: Vec<&str> = devices.iter().map(|device| device.name.as_str()).collect();
        hosts.push(OFFICE);
        let lab = Lab::up(&LabSpec::of(name, &hosts))?;
        let source = lab.host(SOURCE)?;
        images::load_some(source, &["redis"])?;
        for service in services {
            deploy(source, service)?;
        }
        let crew = Crew::start(&lab, OFFICE, devices)?;
        let stage = Self { lab, crew };
        for service in services {
            stage.start_client(service)?;
            stage.writes_go_on(service)?;
        }
        wait_for("the source's view of its containers", PATIENCE, || {
            let (_, status) = stage.crew.ask(SOURCE, &["status"])?;
            let text = status["view"].to_string();
            let seen = |service: &Service| text.contains(&format!("\"{}\"", service.name));
            Ok(services.iter().all(seen).then_some(()))
        })?;
        Ok(Some(stage))
    }

    /// The source's host.
    ///
    /// # Errors
    /// Never for a stage that is up.
    pub fn source(&self) -> Result<&Host> {
        self.lab.host(SOURCE)
    }

    /// The target's host.
    ///
    /// # Errors
    /// Never for a stage that is up.
    pub fn target(&self) -> Result<&Host> {
        self.lab.host(TARGET)
    }

    fn start_client(&self, service: &Service) -> Result<()> {
        let source = self.source()?.address();
        let (port, file) = (service.port, service.acknowledged());
        let script = format!(
            "n=0; while :; do n=$((n+1))
             answer=$(timeout 1 redis-cli -h {source} -p {port} SET write:$n $n 2>&1)
             [ \"$answer\" = OK ] && echo $n >>{file}
             sleep 0.05; done"
        );
        let name = format!("client-{}", service.name);
        self.lab
            .host(OFFICE)?
            .spawn_logged(&name, ["sh", "-c", &script])?;
        Ok(())
    }

    /// Numbers of the acknowledged writes so far.
    fn acknowledged(&self, service: &Service) -> Vec<String> {
        let path = self
            .lab
            .host(OFFICE)
            .map(|host| host.path(&service.acknowledged()));
        let text = path.and_then(|path| Ok(fs::read_to_string(path)?));
        let text = text.unwrap_or_default();
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        whole.lines().map(str::to_owned).collect()
    }

    /// Waits until the client of `service` gets more writes acknowledged.
    ///
    /// # Errors
    /// None is.
    pub fn writes_go_on(&self, service: &Service) -> Result<()> {
        let before = self.acknowledged(service).len();
        wait_for("acknowledged writes", PATIENCE, || {
            Ok((self.acknowledged(service).len() > before + 2).then_some(()))
        })
        .with_context(|| format!("writes to {} ({before} before)", service.name))
    }

    /// Checks every acknowledged write and the notes of `service` on the target.
    ///
    /// # Errors
    /// One is missing or differs.
    pub fn check_data(&self, service: &Service) -> Result<()> {
        self.check_data_on(self.target()?, service)
    }

    /// As [`Stage::check_data`], where another device than [`TARGET`] may be the target.
    ///
    /// # Errors
    /// As [`Stage::check_data`].
    pub fn check_data_on(&self, target: &Host, service: &Service) -> Result<()> {
        let writes = self.acknowledged(service);
        ensure!(!writes.is_empty(), "no write was acknowledged");
        let questions: String = writes
            .iter()
            .map(|number| format!("GET write:{number}\n"))
            .collect();
        let port = service.port.to_string();
        let mut client = target.command(["redis-cli", "-p", &port]);
        let answers = output_with_input(&mut client, questions.as_bytes())?;
        let missing: Vec<_> = writes
            .iter()
            .zip(answers.lines())
            .filter(|(number, answer)| number != answer)
            .collect();
        ensure!(
            missing.is_empty() && answers.lines().count() == writes.len(),
            "of {} acknowledged writes these are missing on the target: {missing:?}",
            writes.len()
        );
        let notes = service.notes();
        let (from, to) = (self.source()?.path(&notes), target.path(&notes));
        xtask::process::output(
            Command::new("diff")
                .args(["--recursive", "--no-dereference"])
                .args([from, to]),
        )
        .map(drop)
    }

    /// Asks the source to evacuate `service`, which makes its agent die, and waits for that. Returns
    /// what the operator was told.
    ///
    /// # Errors
    /// The evacuation came through, or the agent ended otherwise than by SIGKILL.
    pub fn evacuate_until_killed(&mut self, service: &Service) -> Result<String> {
        let told = self
            .crew
            .tell(SOURCE, &["evacuate", service.name, "--yes"])
            .map_or_else(|error| Ok(format!("{error:#}")), |done| bail!("{done}"));
        let told = told.context("the agent lived on")?;
        self.await_death(SOURCE).with_context(|| told.clone())?;
        Ok(told)
    }

    /// Waits until the agent of `device` has killed itself.
    ///
    /// # Errors
    /// It lives on, or ended otherwise than by SIGKILL.
    pub fn await_death(&mut self, device: &str) -> Result<()> {
        let status = self.crew.await_agent_end(device, PATIENCE)?;
        ensure!(
            status.signal() == Some(9),
            "the agent ended with {status}\n{}",
            self.crew.log(device)
        );
        Ok(())
    }

    /// Lets the source's policy find this fault from now on; see [`policy`].
    ///
    /// # Errors
    /// Its agent does not run.
    pub fn find(&self, fault: Fault, more: &str) -> Result<()> {
        let text = policy(fault, more);
        self.source()?.write("/etc/lifeboat/policy.yaml", text)?;
        self.crew.signal_agent(SOURCE, Signal::SIGHUP)
    }

    /// The plan that the source has prepared, as [`Fault::Busy`] makes it do.
    ///
    /// # Errors
    /// There is none in time.
    pub fn prepared_plan(&self) -> Result<String> {
        wait_for("a prepared plan", PATIENCE, || {
            let (_, status) = self.crew.ask(SOURCE, &["status"])?;
            let plans = status["plans"].as_array().cloned().unwrap_or_default();
            let held = plans.iter().find(|plan| plan["phase"] == "prepared");
            Ok(held.and_then(|plan| plan["plan"].as_str().map(str::to_owned)))
        })
        .with_context(|| self.crew.log(SOURCE))
    }

    /// Name of the volume at `path` of the source, from the plan in its journal.
    ///
    /// # Errors
    /// The plan has no such volume.
    pub fn volume_at(&self, plan: &str, path: &str) -> Result<String> {
        let journal = format!("/var/lib/lifeboat/plans/{plan}.source/journal.jsonl");
        let text = fs::read_to_string(self.source()?.path(&journal)).context(journal)?;
        let first: Value = serde_json::from_str(text.lines().next().unwrap_or_default())?;
        let volumes = first["event"]["plan"]["volumes"].as_array().cloned();
        let volumes = volumes.unwrap_or_default();
        let found = volumes.iter().find(|volume| volume["source_path"] == path);
        let name = found.and_then(|volume| volume["name"].as_str());
        name.map(str::to_owned)
            .with_context(|| format!("{volumes:#?}"))
    }

    /// The release of a plan, from the source's journal.
    ///
    /// # Errors
    /// It is not released.
    pub fn release(&self, plan: &str) -> Result<Value> {
        let journal = format!("/var/lib/lifeboat/plans/{plan}.source/journal.jsonl");
        let text = fs::read_to_string(self.source()?.path(&journal)).context(journal)?;
        let entries = text.lines().map(serde_json::from_str::<Value>);
        let mut bodies = entries
            .filter_map(|entry| Some(entry.ok()?["event"]["release"]["body"].as_str()?.to_owned()));
        let body = bodies.next().context("it is not released")?;
        Ok(serde_json::from_str(&body)?)
    }

    /// Bytes that were copied before the switch and kept, by the source's journal.
    ///
    /// # Errors
    /// The plan did not switch first.
    pub fn held(&self, plan: &str) -> Result<u64> {
        let journal = format!("/var/lib/lifeboat/plans/{plan}.source/journal.jsonl");
        let text = fs::read_to_string(self.source()?.path(&journal)).context(journal)?;
        let entries = text
            .lines()
            .filter_map(|line| serde_json::from_str(line).ok());
        let mut held = entries.filter_map(|entry: Value| entry["event"]["held"].as_u64());
        held.next_back().context("it was not switched first")
    }

    /// The newest plan that the source's agent knows as under way or just over.
    ///
    /// # Errors
    /// There is none.
    pub fn plan(&self) -> Result<String> {
        wait_for("a resumed plan", PATIENCE, || {
            let (_, status) = self.crew.ask(SOURCE, &["status"])?;
            let plans = status["plans"].as_array().cloned().unwrap_or_default();
            let id = |plan: &Value| plan["plan"].as_str().map(str::to_owned);
            Ok(plans.last().and_then(id))
        })
        .with_context(|| self.crew.log(SOURCE))
    }
}

/// Lines of the report's timeline that hold `text`.
#[must_use]
pub fn lines(report: &Value, text: &str) -> Vec<String> {
    let timeline = report["timeline"].as_array().into_iter().flatten();
    let lines = timeline.filter_map(|moment| moment["text"].as_str());
    lines
        .filter(|line| line.contains(text))
        .map(str::to_owned)
        .collect()
}

/// A device that migrates on request, whose agent dies at `phase` in its first life.
#[must_use]
pub fn device(name: &str, phase: Option<&str>) -> Device {
    Device {
        environment: phase.map(dies_at).unwrap_or_default(),
        ..Device::new(name)
    }
}

fn deploy(host: &Host, service: &Service) -> Result<()> {
    let Service { name, port } = service;
    let notes = service.notes();
    let fill = format!(
        "mkdir -p {notes}/deep && cd {notes} && head -c 300000 /dev/urandom >deep/random &&
         echo known >known && ln -s known link && ln known second && chmod 0640 known &&
         truncate -s 1M hole"
    );
    host.run(["sh", "-c", &fill])?;
    let run = [
        "run",
        "--detach",
        "--name",
        name,
        "--restart",
        "always",
        "--volume",
        &format!("{name}-data:/data"),
        "--volume",
        &format!("{notes}:/notes"),
        "--publish",
        &format!("{port}:6379"),
        "localhost/redis:demo",
    ];
    host.podman(run).map(drop)
}

/// Ids of the containers whose processes run on `host`: frozen ones do not.
///
/// # Errors
/// The host's cgroups cannot be read.
pub fn running(host: &Host) -> Result<BTreeSet<String>> {
    let mut found = BTreeSet::new();
    collect(host.cgroup(), &mut found)?;
    Ok(found)
}

fn collect(directory: &Path, found: &mut BTreeSet<String>) -> Result<()> {
    // A cgroup may go away while it is looked at.
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            continue;
        }
        let name = entry.file_name().to_string_lossy().into_owned();
        match name.strip_prefix("libpod-") {
            Some(id) if !id.starts_with("conmon") => {
                let events = fs::read_to_string(entry.path().join("cgroup.events"));
                let events = events.unwrap_or_default();
                if events.contains("populated 1") && events.contains("frozen 0") {
                    found.insert(id.to_owned());
                }
            }
            _ => collect(&entry.path(), found)?,
        }
    }
    Ok(())
}

/// True when container `id` runs on `host`, not only for the instant between a signal and its death.
///
/// # Errors
/// As [`running`].
pub fn runs(host: &Host, id: &str) -> Result<bool> {
    for _ in 0..5 {
        if !running(host)?.contains(id) {
            return Ok(false);
        }
        sleep(Duration::from_millis(20));
    }
    Ok(true)
}
