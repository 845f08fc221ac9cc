//! What keeps a degraded device from evacuating by itself: an operator's pause, missing approvals, the storm
//! guard; and a comparison with a fleet that grows too small.

use anyhow::{Context as _, Result, ensure};
use lifeboat::fleet::allocate::{Admission, Rules};
use lifeboat::fleet::registry::Registry as _;
use lifeboat::fleet::sqlite::SqliteRegistry;
use lifeboat::model::units::UnixMillis;
use lifeboat_tests::shop::says;
use lifeboat_tests::stage::{PATIENCE, SOURCE, Service, Stage, TARGET, device, runs};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::signal::Signal;
use serde_json::Value;
use std::fs::File;
use std::path::Path;
use std::time::Duration;
use xtask::crew::{Crew, Device, wait_for_end};
use xtask::lab::{Fault, Host, HostSpec, Lab, LabSpec};
use xtask::process::{is_root, wait_for};

const CACHE: Service = Service {
    name: "cache",
    port: 6379,
};
const POLICY_FILE: &str = "/etc/lifeboat/policy.yaml";

/// A policy by which every machine is degraded (no machine has a pebibyte free), or none is.
fn policy(failing: bool, approval_timeout: &str) -> String {
    let limit = if failing { "1024TiB" } else { "1KiB" };
    format!(
        "version: 1
name: guarded
thresholds:
  memory:
    metric: memory.available
    below: {limit}
degraded:
  - any: [memory]
guards:
  hold: 0s
  fleet_max_evacuating: 30%
  approvals: [oncall]
  approval_timeout: {approval_timeout}
"
    )
}

fn reload(crew: &Crew, text: &str, kind: &str) -> Result<()> {
    crew.host(SOURCE)?.write(POLICY_FILE, text)?;
    crew.signal_agent(SOURCE, Signal::SIGHUP)?;
    wait_for(&format!("the verdict {kind}"), PATIENCE, || {
        let (_, status) = crew.ask(SOURCE, &["status"])?;
        Ok((status["view"]["verdict"]["kind"] == kind).then_some(()))
    })
}

fn plans(crew: &Crew) -> Result<Vec<Value>> {
    let (_, status) = crew.ask(SOURCE, &["status"])?;
    Ok(status["plans"].as_array().cloned().unwrap_or_default())
}

/// Waits for a plan in `phase` and returns it.
fn waits_in(crew: &Crew, phase: &str) -> Result<Value> {
    wait_for(&format!("a plan in {phase:?}"), PATIENCE, || {
        Ok(plans(crew)?
            .into_iter()
            .find(|plan| plan["phase"] == phase && plan["over"] == false))
    })
    .with_context(|| crew.log(SOURCE))
}

/// Lets the agent judge three times more.
fn three_sweeps(crew: &Crew) -> Result<()> {
    let swept = || -> Result<Option<u64>> {
        let (_, status) = crew.ask(SOURCE, &["status"])?;
        Ok(status["view"]["snapshot"]["at"].as_u64())
    };
    for _ in 0..3 {
        let before = swept()?;
        wait_for(
            "a sweep",
            PATIENCE,
            || Ok((swept()? > before).then_some(())),
        )?;
    }
    Ok(())
}

#[test]
fn a_pause_missing_approvals_and_the_storm_guard_hold_an_automatic_evacuation_back() -> Result<()> {
    let source = Device {
        policy: Some(policy(false, "1s")),
        migration: Vec::new(),
        ..Device::new(SOURCE)
    };
    let Some(mut stage) = Stage::up("guards", &[source, device(TARGET, None)], &[CACHE])? else {
        return Ok(());
    };
    let crew = &stage.crew;
    let host = stage.source()?;
    let id = host.podman(["inspect", "--format", "{{.Id}}", CACHE.name])?;

    crew.tell(SOURCE, &["policy", "pause", "--for", "2h", "--why", "fans"])?;
    reload(crew, &policy(true, "1s"), "degraded")?;
    three_sweeps(crew)?;
    ensure!(plans(crew)?.is_empty(), "paused: {:?}", plans(crew)?);

    // Resumed, nobody approves: the plan is given up, and no other is made for this stage.
    crew.tell(SOURCE, &["policy", "resume"])?;
    let given_up = wait_for("a plan given up", PATIENCE, || {
        Ok(plans(crew)?.into_iter().find(|plan| plan["over"] == true))
    })?;
    let id_of = |plan: &Value| plan["plan"].as_str().unwrap_or_default().to_owned();
    let report = wait_for_end(crew, SOURCE, &id_of(&given_up), PATIENCE)?;
    says(
        report["reason"].as_str().unwrap_or_default(),
        &["not approved by oncall within 1.0 s"],
    )?;
    three_sweeps(crew)?;
    ensure!(plans(crew)?.len() == 1, "again: {:?}", plans(crew)?);

    // Nor in another life of the agent.
    stage.crew.kill_agent(SOURCE)?;
    stage.crew.start_agent(SOURCE)?;
    let crew = &stage.crew;
    wait_for("the verdict of before", PATIENCE, || {
        let (_, status) = crew.ask(SOURCE, &["status"])?;
        Ok((status["view"]["verdict"]["kind"] == "degraded").then_some(()))
    })?;
    three_sweeps(crew)?;
    ensure!(plans(crew)?.is_empty(), "again: {:?}", plans(crew)?);
    let told = crew.tell(SOURCE, &["explain"])?;
    says(&told, &["A person said no at stage `evacuate`"])?;

    // An abort outlives the agent's end from the moment on that it was answered.
    reload(crew, &policy(false, "5m"), "healthy")?;
    reload(crew, &policy(true, "5m"), "degraded")?;
    let aborted = id_of(&waits_in(crew, "await approval")?);
    crew.tell(SOURCE, &["abort", &aborted])?;
    stage.crew.kill_agent(SOURCE)?;
    stage.crew.start_agent(SOURCE)?;
    let (crew, host) = (&stage.crew, stage.source()?);
    three_sweeps(crew)?;
    let told = crew.tell(SOURCE, &["explain"])?;
    says(&told, &["A person said no at stage `evacuate`"])?;
    let report = wait_for_end(crew, SOURCE, &aborted, PATIENCE)?;
    says(
        report["reason"].as_str().unwrap_or_default(),
        &["an operator asked for it"],
    )?;
    let goes_on = plans(crew)?.into_iter().any(|plan| plan["over"] == false);
    ensure!(!goes_on, "again: {:?}", plans(crew)?);

    reload(crew, &policy(false, "5m"), "healthy")?;
    reload(crew, &policy(true, "5m"), "degraded")?;
    let waiting = waits_in(crew, "await approval")?;
    let plan = id_of(&waiting);
    ensure!(waiting["awaits"][0] == "oncall", "{waiting}");
    let wrong = crew.tell(SOURCE, &["approve", &plan, "--as", "passer-by"]);
    says(
        &format!("{:#}", wrong.err().context("anybody may approve")?),
        &["`passer-by`", "oncall"],
    )?;

    // Another device evacuates, by the duplicator's registry, and one of two is all that may.
    let office = stage.lab.host("office")?;
    evacuates(office, TARGET)?;
    crew.tell(SOURCE, &["policy", "pause", "--for", "2h", "--why", "fans"])?;
    let told = crew.tell(SOURCE, &["approve", &plan, "--as", "oncall"])?;
    says(&told, &["approved as oncall by user root"])?;
    waits_in(crew, "await the end of the pause")?;
    crew.tell(SOURCE, &["policy", "resume"])?;
    waits_in(crew, "await the storm guard")?;
    says(
        &crew.tell(SOURCE, &["explain"])?,
        &["storm guard: 1 of 2 live devices", TARGET],
    )?;
    ensure!(runs(host, &id)?, "the container does not run");
    stage.writes_go_on(&CACHE)?;

    // An operator makes the verdict's plan theirs, and then says no: that is one to the verdict, too.
    let theirs = ["evacuate", "--all", "--yes", "--limit", "20MiB"];
    crew.begin(SOURCE, "theirs", &theirs)?;
    wait_for("the operator's word", PATIENCE, || {
        let theirs = |plan: &Value| plan["over"] == false && plan["limits"]["cap"] == 20 << 20;
        Ok(plans(crew)?.iter().any(theirs).then_some(()))
    })?;
    crew.tell(SOURCE, &["abort", &plan])?;
    stage.crew.kill_agent(SOURCE)?;
    stage.crew.start_agent(SOURCE)?;
    let crew = &stage.crew;
    three_sweeps(crew)?;
    let told = crew.tell(SOURCE, &["explain"])?;
    says(&told, &["A person said no at stage `evacuate`"])?;
    wait_for_end(crew, SOURCE, &plan, PATIENCE)?;
    let goes_on = plans(crew)?.into_iter().any(|plan| plan["over"] == false);
    ensure!(!goes_on, "again: {:?}", plans(crew)?);
    reload(crew, &policy(false, "5m"), "healthy")?;
    reload(crew, &policy(true, "5m"), "degraded")?;
    let plan = id_of(&waits_in(crew, "await approval")?);
    crew.tell(SOURCE, &["approve", &plan, "--as", "oncall"])?;
    waits_in(crew, "await the storm guard")?;

    let go = ["evacuate", "--all", "--yes", "--ignore-storm-guard"];
    crew.tell(SOURCE, &go)?;
    let report = wait_for_end(crew, SOURCE, &plan, PATIENCE)?;
    ensure!(report["state"] == "completed", "{report:#}");
    says(
        &report.to_string(),
        &["approved as oncall by user root", "waits: storm guard"],
    )?;
    stage.check_data(&CACHE)
}

#[test]
fn what_nobody_approves_in_time_goes_on_where_the_policy_says_proceed() -> Result<()> {
    let source = Device {
        policy: Some(policy(false, "2s")),
        migration: Vec::new(),
        ..Device::new(SOURCE)
    };
    let Some(stage) = Stage::up("proceeds", &[source, device(TARGET, None)], &[CACHE])? else {
        return Ok(());
    };
    let crew = &stage.crew;
    let proceeds = policy(true, "2s\n  on_timeout: proceed");
    reload(crew, &proceeds, "degraded")?;
    let plan = wait_for("a plan", PATIENCE, || {
        let plans = plans(crew)?;
        let plan = plans.first().and_then(|plan| plan["plan"].as_str());
        Ok(plan.map(str::to_owned))
    })
    .with_context(|| crew.log(SOURCE))?;
    let report = wait_for_end(crew, SOURCE, &plan, PATIENCE)?;
    ensure!(report["state"] == "completed", "{report:#}");
    says(
        &report.to_string(),
        &["not approved in time by oncall: the policy says to proceed"],
    )?;
    stage.check_data(&CACHE)
}

/// Enters into the duplicator's registry that `device` evacuates, for good.
fn evacuates(office: &Host, device: &'static str) -> Result<()> {
    // `/proc/PID/root/`, as all paths of a lab host.
    let root = office.path("/");
    let process = root.parent().context("no process holds the host")?;
    let namespace = process.join("ns/mnt");
    // SQLite follows links by their names, so it must see the files where the host does.
    let enter = move || -> Result<()> {
        let namespace = File::open(namespace)?;
        unshare(CloneFlags::CLONE_FS)?;
        setns(namespace, CloneFlags::CLONE_NEWNS)?;
        let registry = SqliteRegistry::open(&SqliteRegistry::path(Path::new("/var/lib/lifeboat")))?;
        let rules = Rules {
            live_within: Duration::from_secs(15),
            horizon: Duration::from_secs(3600),
            max_pairings: 1,
        };
        let tomorrow = UnixMillis(lifeboat::fleet::now().0 + 86_400_000);
        let admit = registry.admit(device.into(), "p-other".into(), None, rules, tomorrow);
        let admitted = tokio::runtime::Runtime::new()?.block_on(admit)?;
        ensure!(admitted == Admission::Admitted, "{admitted}");
        Ok(())
    };
    std::thread::spawn(enter).join().expect("it does not panic")
}

/// A device that uses several times the processor time of its fleet is degraded.
const COMPARED: &str = "version: 1
name: compared
thresholds:
  busier:
    metric: cpu.used
    relative_to_peers: { among: fleet, at_least: 10% }
    above: 3x
    for: 2s
degraded:
  - any: [busier]
guards:
  hold: 0s
";

#[test]
fn a_device_is_compared_with_three_others_and_unknown_with_two() -> Result<()> {
    if !is_root() {
        eprintln!("skipped: lab hosts need root");
        return Ok(());
    }
    let names = ["device", "a", "b", "c"];
    let mut spec = LabSpec::of("compared", &[]);
    spec.hosts = names
        .into_iter()
        .chain(["duplicator"])
        .map(|host| HostSpec {
            containers: false,
            ..host.into()
        })
        .collect();
    let lab = Lab::up(&spec)?;
    let devices = names.map(|name| Device {
        policy: (name == "device").then(|| COMPARED.to_owned()),
        ..Device::new(name)
    });
    let mut crew = Crew::start(&lab, "duplicator", &devices)?;
    let verdict = |crew: &Crew| -> Result<Value> {
        let (_, status) = crew.ask("device", &["status"])?;
        Ok(status["view"]["verdict"].clone())
    };
    let becomes = |crew: &Crew, kind: &str| {
        wait_for(&format!("the verdict {kind}"), PATIENCE, || {
            let now = verdict(crew)?;
            Ok((now["kind"] == kind).then_some(now))
        })
    };
    becomes(&crew, "healthy")?;
    let host: &Host = lab.host("device")?;
    lab.fault(host, Fault::Cpu { workers: 3 }, Duration::from_secs(120))?;
    let degraded = becomes(&crew, "degraded")?;
    says(&degraded.to_string(), &["the median of the fleet"])?;
    crew.kill_agent("c")?;
    let unknown = becomes(&crew, "unknown")?;
    says(&unknown["missing"].to_string(), &["busier"])
}
