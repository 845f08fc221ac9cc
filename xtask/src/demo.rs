//! `cargo xtask demo`: a host goes bad, its containers and their data leave, and it is proven.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::crew::{Crew, Device, wait_for_end};
use crate::demo_app;
use crate::lab::{Fault, HostSpec, Lab, LabSpec};
use crate::ledger::Ledger;
use crate::load::Load;
use crate::process::{as_root, is_root, wait_for};
use crate::{setup, test};

/// Hosts of the demo.
const SOURCE: &str = "source";
const OTHERS: [&str; 3] = ["helper", "spare", "haven"];
const DUPLICATOR: &str = "duplicator";
const CLIENT: &str = "client";

/// Clients of the load; each waits for its acknowledgement before it writes again.
const CLIENTS: u16 = 8;

/// The fault: more busy loops than this machine has CPUs.
const FAULT: Fault = Fault::Cpu { workers: 6 };

/// What the demo's operator wrote: a host whose tasks wait for a CPU is given up after two seconds.
const POLICY: &str = include_str!("demo-policy.yaml");

/// `cargo xtask demo`.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Set-up and build are done (how the task calls itself as root).
    #[arg(long, hide = true)]
    built: bool,
}

/// Sets up, builds, and runs the chain once as root.
///
/// # Errors
/// As [`run`], or set-up or build failed.
pub fn demo(arguments: &Arguments) -> Result<()> {
    if !arguments.built {
        setup::setup()?;
        test::build()?;
    }
    if !is_root() {
        return Err(as_root(["demo", "--built"]));
    }
    run(CLIENTS)
}

/// Runs the whole chain once, with `clients` clients writing, and prints it as a timeline.
///
/// # Errors
/// A step failed, an acknowledged write is missing, a root differs, or the source is not fenced.
pub fn run(clients: u16) -> Result<()> {
    let started = Instant::now();
    let say = |text: &str| println!("[{:6.2} s] {text}", started.elapsed().as_secs_f64());
    // The source has a CPU of its own, so that the fault starves it and nobody else.
    let cpus = |host: &str| if host == SOURCE { "0" } else { "1" };
    let names = [SOURCE]
        .into_iter()
        .chain(OTHERS)
        .chain([DUPLICATOR, CLIENT]);
    let hosts: Vec<HostSpec> = names
        .map(|host| HostSpec {
            cpus: several_cpus().then(|| cpus(host).to_owned()),
            ..host.into()
        })
        .collect();
    let spec = LabSpec {
        name: format!("demo-{}", std::process::id()),
        hosts,
    };
    let lab = Lab::up(&spec)?;
    let names: Vec<&str> = spec.hosts.iter().map(|host| host.name.as_str()).collect();
    say(&format!("lab is up: {}", names.join(", ")));

    let mut devices = vec![Device {
        policy: Some(POLICY.to_owned()),
        migration: vec!["automatic: true".into()],
        ..Device::new(SOURCE)
    }];
    devices.extend(OTHERS.iter().map(|name| Device::new(name)));
    let crew = Crew::start(&lab, DUPLICATOR, &devices)?;
    say(&format!(
        "fleet of {} devices enrolled, agents run",
        devices.len()
    ));

    let source = lab.host(SOURCE)?;
    demo_app::deploy(source)?;
    let url = format!("http://{}:{}", source.address(), demo_app::PORT);
    let load = Load::start(lab.host(CLIENT)?, &url, clients)?;
    say(&format!(
        "nginx → service → PostgreSQL + Redis answer at {url}; {clients} clients write"
    ));

    let edges = wait_for(
        "the relations, as the kernel shows them",
        Duration::from_secs(20),
        || {
            let (_, relations) = crew.ask(SOURCE, &["relations"])?;
            let found = ["web", "app", "app"]
                .into_iter()
                .zip(["app", "db", "cache"]);
            let known = |child: &str, parent: &str| {
                relations["edges"]
                    .as_array()
                    .into_iter()
                    .flatten()
                    .any(|edge| {
                        edge["child"] == child
                            && edge["parent"] == parent
                            && edge["learnt"] == "observed"
                    })
            };
            Ok(found
                .clone()
                .all(|(child, parent)| known(child, parent))
                .then(|| relations.clone()))
        },
    )?;
    say("relations found by the kernel programs:");
    print!("{}", crew.tell(SOURCE, &["relations"])?);
    println!();
    ensure!(edges["edges"].is_array(), "relations printed no edges");

    lab.fault(source, FAULT, Duration::from_secs(120))?;
    say("fault injected: every CPU of the source is kept busy");
    let fault_at = Instant::now();
    let status = wait_for("a plan by the policy", Duration::from_secs(40), || {
        let (_, status) = crew.ask(SOURCE, &["status"])?;
        Ok(status["plans"][0]["target"]
            .is_string()
            .then(|| status["plans"][0].clone()))
    })?;
    let name = |field: &str| status[field].as_str().unwrap_or_default().to_owned();
    let (plan, target) = (name("plan"), name("target"));
    say(&format!(
        "degraded {:.1} s after the fault; the agent evacuates with plan {plan}",
        fault_at.elapsed().as_secs_f64()
    ));
    let report = wait_for_end(&crew, SOURCE, &plan, Duration::from_secs(120))?;
    if report["state"] != "completed" {
        bail!(
            "the plan was rolled back: {}\n{}",
            report["reason"],
            crew.log(SOURCE)
        );
    }
    say("the plan is completed; its own timeline:");
    print_timeline(&report);

    // Writes go on over the source's address, now forwarded to the twins.
    std::thread::sleep(Duration::from_secs(2));
    let ledger = load.stop()?;
    lab.clear_fault(source, FAULT)?;
    prove(&lab, &crew, &plan, &target, &ledger)?;
    say("everything holds");
    let text = "a host went bad, its containers and their data left, and it is proven";
    println!("demo: {text} ({:.1} s)", started.elapsed().as_secs_f64());
    lab.down()
}

fn several_cpus() -> bool {
    std::thread::available_parallelism().is_ok_and(|cpus| cpus.get() > 1)
}

fn print_timeline(report: &Value) {
    for moment in report["timeline"].as_array().into_iter().flatten() {
        let after = moment["after"]["secs"].as_f64().unwrap_or(0.0)
            + moment["after"]["nanos"].as_f64().unwrap_or(0.0) / 1e9;
        println!(
            "    {after:8.3} s  {}",
            moment["text"].as_str().unwrap_or_default()
        );
    }
}

/// Checks the ledger in full against the twins' databases, the roots, and the fence.
fn prove(lab: &Lab, crew: &Crew, plan: &str, target: &str, ledger: &Ledger) -> Result<()> {
    let proof = ledger.check(lab.host(target)?)?;
    let gap = ledger.longest_gap();
    println!(
        "    ledger: {} acknowledged writes, {} missing in PostgreSQL, {} missing in Redis, {} altered; longest gap without an acknowledgement {} ms",
        proof.acknowledged,
        proof.missing_in_postgres.len(),
        proof.missing_in_redis.len(),
        proof.mismatched.len(),
        gap.length_ms
    );
    ensure!(proof.acknowledged > 0, "the load got no write acknowledged");
    ensure!(
        proof.holds(),
        "acknowledged writes are missing on the target: {proof:?}"
    );
    let verified = crew
        .tell(SOURCE, &["verify", plan])
        .context("the plan is not proven")?;
    for line in verified.lines() {
        println!("    {line}");
    }
    let source = lab.host(SOURCE)?;
    for container in demo_app::CONTAINERS {
        let refused = source.podman(["start", container]);
        ensure!(
            refused.is_err(),
            "the fenced source started {container} again"
        );
    }
    println!(
        "    fence: the source's runtime refuses to start {}",
        demo_app::CONTAINERS.join(", ")
    );
    Ok(())
}
