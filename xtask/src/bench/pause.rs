//! The demo's application under its load, evacuated with both actions delegated: how long it stood still.

use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::Value;

use super::{goal, median};
use crate::crew::{Crew, Device};
use crate::demo_app;
use crate::lab::{HostSpec, Lab, LabSpec};
use crate::load::Load;
use crate::process::wait_for;

const RUNS: usize = 3;
const CLIENTS: u16 = 8;
const DEVICES: [&str; 3] = ["source", "helper", "haven"];

/// Seconds.
struct Run {
    interruption: f64,
    start_up: f64,
    gap: f64,
    writes: usize,
}

pub(super) fn measure(short: bool) -> Result<String> {
    let mut runs = Vec::new();
    for _ in 0..if short { 1 } else { RUNS } {
        runs.push(once()?);
    }
    let of = |figure: fn(&Run) -> f64| median(&runs.iter().map(figure).collect::<Vec<_>>());
    let pause = of(|run| run.interruption - run.start_up);
    let worst = runs
        .iter()
        .map(|run| run.interruption - run.start_up)
        .fold(0.0, f64::max);
    Ok(format!(
        "## Pause at the switch\n\nThe demo's application (nginx, a service, PostgreSQL, Redis) with {CLIENTS} writing clients, \
         evacuated with `encrypt` and `transfer` delegated; median of {}. No acknowledged write ({} in all) was missing.\n\n\
         | what | seconds | goal |\n|---|---|---|\n\
         | pause: interruption without the twins' own start-up | {pause:.2} (worst {worst:.2}) | {} |\n\
         | the twins' own start-up, four containers in order | {:.2} | |\n\
         | interruption: from the first freeze until the last twin was ready | {:.2} | |\n\
         | longest time a client had no write acknowledged | {:.2} | |\n",
        runs.len(),
        runs.iter().map(|run| run.writes).sum::<usize>(),
        goal("at most 1", pause <= 1.0),
        of(|run| run.start_up),
        of(|run| run.interruption),
        of(|run| run.gap),
    ))
}

fn once() -> Result<Run> {
    let hosts = DEVICES.into_iter().chain(["duplicator", "client"]);
    let lab = Lab::up(&LabSpec {
        name: format!("pause-{}", std::process::id()),
        hosts: hosts.map(HostSpec::from).collect(),
    })?;
    let crew = Crew::start(&lab, "duplicator", &DEVICES.map(Device::new))?;
    let source = lab.host("source")?;
    demo_app::deploy(source)?;
    let url = format!("http://{}:{}", source.address(), demo_app::PORT);
    let load = Load::start(lab.host("client")?, &url, CLIENTS)?;
    wait_for("the relations", Duration::from_secs(20), || {
        let (_, relations) = crew.ask("source", &["relations"])?;
        let edges = relations["edges"].as_array().map_or(0, Vec::len);
        Ok((edges >= 3).then_some(()))
    })?;
    let evacuate = ["evacuate", "--all", "--yes", "--delegate"];
    let (code, report) = crew.ask("source", &[&evacuate[..], &["encrypt,transfer"]].concat())?;
    ensure!(
        code == 0 && report["state"] == "completed",
        "the evacuation ended with {code}: {report}\n{}",
        crew.log("source")
    );
    // The first answers of the twins, over the source's address, end the clients' gap.
    let before = load.ledger()?.entries().len();
    wait_for("writes to the twins", Duration::from_secs(20), || {
        Ok((load.ledger()?.entries().len() > before).then_some(()))
    })?;
    let ledger = load.stop()?;
    let (_, status) = crew.ask("source", &["status"])?;
    let target = status["plans"][0]["target"].as_str().unwrap_or_default();
    let proof = ledger.check(lab.host(target)?)?;
    ensure!(
        proof.acknowledged > 0 && proof.holds(),
        "acknowledged writes are missing on {target}: {proof:?}"
    );
    lab.down()?;
    Ok(Run {
        interruption: seconds(&report["interruption"])?,
        start_up: seconds(&report["start_up"])?,
        gap: Duration::from_millis(ledger.longest_gap().length_ms).as_secs_f64(),
        writes: proof.acknowledged,
    })
}

/// A duration as serde writes it.
fn seconds(duration: &Value) -> Result<f64> {
    let (secs, nanos) = (duration["secs"].as_f64(), duration["nanos"].as_f64());
    match (secs, nanos) {
        (Some(secs), Some(nanos)) => Ok(secs + nanos / 1e9),
        _ => anyhow::bail!("the report names no such duration: {duration}"),
    }
}
