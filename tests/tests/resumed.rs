//! Devices that are killed in the middle of the copy: the plan goes on from what arrived, at the rate it was
//! limited to.

use anyhow::{Context as _, Result, ensure};
use lifeboat_tests::stage::{PATIENCE, SOURCE, Service, Stage, TARGET, device};
use serde_json::Value;
use xtask::crew::wait_for_end;
use xtask::process::wait_for;

const CACHE: Service = Service {
    name: "cache",
    port: 6379,
};
const OTHER: &str = "other";

/// Random bytes to move beside the image, most of what moves.
const BULK: u64 = 64 << 20;
const MIB: u64 = 1 << 20;

#[test]
fn source_and_target_are_killed_in_the_copy_and_the_plan_goes_on_from_what_arrived() -> Result<()> {
    goes_on("resumed-direct", &[], &["source", "target"])
}

#[test]
fn all_three_devices_are_killed_in_the_copy_over_a_spool_and_the_plan_goes_on() -> Result<()> {
    let delegate = ["--delegate", "transfer"];
    goes_on("resumed-spool", &delegate, &["paired", "source", "target"])
}

/// Evacuates with a limit, kills the device of each role in `killed` at another point of the copy, and counts what the target's
/// interface took.
fn goes_on(name: &str, delegate: &[&str], killed: &[&str]) -> Result<()> {
    let mut devices = vec![device(SOURCE, None), device(TARGET, None)];
    if !delegate.is_empty() {
        devices.push(device(OTHER, None));
    }
    let Some(mut stage) = Stage::up(name, &devices, &[CACHE])? else {
        return Ok(());
    };
    let source = stage.source()?.clone();
    let big = format!("head -c {BULK} /dev/urandom >{}/big", CACHE.notes());
    source.run(["sh", "-c", &big])?;
    let mut evacuate = vec!["evacuate", CACHE.name, "--yes", "--limit", "16MiB"];
    evacuate.extend(delegate);
    stage.crew.begin(SOURCE, "evacuate", &evacuate)?;
    let plan = stage.plan()?;

    let total = copied(&stage, &plan)?;
    // The duplicator says which of the two others is the target.
    let roles = status(&stage, &plan)?;
    let named = |role: &str| match role {
        "source" => SOURCE.to_owned(),
        role => roles[role].as_str().unwrap_or_default().to_owned(),
    };
    let target = stage.lab.host(&named("target"))?.clone();
    let before = target.received()?;
    let share = BULK / (killed.len() as u64 + 1);
    for (place, role) in killed.iter().enumerate() {
        let device = named(role);
        let wanted = before + share * (place as u64 + 1);
        wait_for("a part of the copy", PATIENCE, || {
            Ok((target.received()? >= wanted).then_some(()))
        })
        .with_context(|| stage.crew.log(SOURCE))?;
        stage.crew.kill_agent(&device)?;
        stage.crew.start_agent(&device)?;
        stage.writes_go_on(&CACHE)?;
    }
    let limits = limits(&stage, &plan)?;
    ensure!(limits["cap"] == 16 * MIB, "{limits}");
    stage.crew.tell(SOURCE, &["limit", &plan, "none"])?;

    let report = wait_for_end(&stage.crew, SOURCE, &plan, PATIENCE * 2)?;
    let timeline = report["timeline"].to_string();
    ensure!(
        report["state"] == "completed" && timeline.contains("no longer limited"),
        "{report:#}"
    );
    let took = target.received()? - before;
    println!("the target took {took} bytes for {total}");
    stage.writes_go_on(&CACHE)?;
    stage.check_data_on(&target, &CACHE)?;
    // Records that were cut, the client's writes, and words of the control channel come on top.
    ensure!(took < total + total / 8, "{took} bytes for {total}");
    stage.lab.down()
}

/// Waits until the volumes are being copied; the bytes of all of them.
fn copied(stage: &Stage, plan: &str) -> Result<u64> {
    wait_for("the copy", PATIENCE, || {
        let status = status(stage, plan)?;
        let read = status["bytes_read"].as_u64().unwrap_or_default();
        let copies = status["phase"] == "replicate" && read > 0;
        Ok(status["bytes_total"].as_u64().filter(|_| copies))
    })
    .with_context(|| stage.crew.log(SOURCE))
}

fn limits(stage: &Stage, plan: &str) -> Result<Value> {
    Ok(status(stage, plan)?["limits"].clone())
}

fn status(stage: &Stage, plan: &str) -> Result<Value> {
    let (_, status) = stage.crew.ask(SOURCE, &["status"])?;
    let plans = status["plans"].as_array().cloned().unwrap_or_default();
    Ok(plans
        .into_iter()
        .find(|known| known["plan"] == plan)
        .unwrap_or_default())
}
