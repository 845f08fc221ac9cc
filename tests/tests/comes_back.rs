//! What left a device comes back to it: the ports that it forwarded meanwhile are its containers' again, and are
//! forwarded again when the return is aborted.

use anyhow::{Context as _, Result, bail, ensure};
use lifeboat_tests::stage::{PATIENCE, SOURCE, Service, Stage, TARGET, device, dies_at, running};
use serde_json::Value;
use xtask::crew::wait_for_end;
use xtask::lab::Fault;
use xtask::process::wait_for;

const CACHE: Service = Service {
    name: "cache",
    port: 6379,
};

/// Bytes that come behind the twin: over this link, for longer than the test.
const LATER: u64 = 128 << 20;
const SLOW: Fault = Fault::Net {
    mbit: 20,
    loss_percent: 0,
};

#[test]
fn what_left_comes_back_to_the_device_that_forwards_its_port() -> Result<()> {
    let Some((mut stage, left)) = moved_away("comes-back")? else {
        return Ok(());
    };
    let (source, target) = (stage.source()?.clone(), stage.target()?.clone());
    // A person stops it there, which is nobody's plan.
    target.podman(["stop", CACHE.name])?;
    let (code, proof) = stage.crew.ask(SOURCE, &["verify", &left])?;
    let stopped = "it was ready, and does not run now";
    ensure!(
        code == 5 && proof.to_string().contains(stopped),
        "{proof:#}"
    );
    target.podman(["start", CACHE.name])?;
    stage.writes_go_on(&CACHE)?;

    // Its agent dies as soon as it owns the data again.
    stage.crew.kill_agent(SOURCE)?;
    stage
        .crew
        .start_agent_with(SOURCE, &dies_at("start twins"))?;
    stage.writes_go_on(&CACHE)?;
    let back = come_back(&stage, "--copy-first")?;
    stage.await_death(SOURCE)?;
    stage.crew.start_agent(SOURCE)?;
    let report = wait_for_end(&stage.crew, TARGET, &back, PATIENCE * 2)
        .with_context(|| format!("{}\n{}", stage.crew.log(SOURCE), stage.crew.log(TARGET)))?;
    ensure!(report["state"] == "completed", "{report:#}");
    ensure!(running(&source)?.len() == 1 && running(&target)?.is_empty());
    stage.writes_go_on(&CACHE)?;
    answers_at(&stage, &target)?;

    for device in [SOURCE, TARGET] {
        stage.crew.kill_agent(device)?;
        stage.crew.start_agent(device)?;
    }
    stage.writes_go_on(&CACHE)?;
    answers_at(&stage, &target)?;
    // The next life does not take the port from a twin that is started anew.
    source.podman(["restart", CACHE.name])?;
    stage.writes_go_on(&CACHE)?;
    let (code, proof) = stage.crew.ask(SOURCE, &["verify", &left])?;
    let gone = &proof["twins_left"][CACHE.name];
    ensure!(
        code == 0 && gone["device"] == SOURCE && gone["plan"] == back.as_str(),
        "{proof:#}"
    );
    stage.crew.tell(TARGET, &["verify", &back])?;
    // As it came here, and what was kept there.
    stage.check_data(&CACHE)?;
    stage.lab.down()
}

#[test]
fn a_return_that_is_aborted_leaves_the_port_forwarded_as_before() -> Result<()> {
    let Some((mut stage, _)) = moved_away("not-back")? else {
        return Ok(());
    };
    let (source, target) = (stage.source()?.clone(), stage.target()?.clone());
    let fill = format!("head -c {LATER} /dev/urandom >{}/big", CACHE.notes());
    target.run(["sh", "-c", &fill])?;
    let back = come_back(&stage, "--switch-first")?;
    stage.lab.fault(&target, SLOW, PATIENCE * 5)?;
    wait_for("a twin before its data", PATIENCE * 2, || {
        let plan = newest(&stage)?;
        let absent = plan["arrival"]["absent"].as_u64();
        Ok((plan["phase"] == "fill" && absent > Some(0)).then_some(()))
    })
    .with_context(|| format!("{}\n{}", stage.crew.log(SOURCE), stage.crew.log(TARGET)))?;
    ensure!(running(&source)?.len() == 1 && running(&target)?.is_empty());
    stage.writes_go_on(&CACHE)?;
    answers_at(&stage, &target)?;

    // Its next life finds the port its twin's, and dies once more before it gives that back.
    stage.crew.kill_agent(SOURCE)?;
    stage.crew.start_agent_with(SOURCE, &dies_at("give back"))?;
    stage.writes_go_on(&CACHE)?;
    stage.crew.tell(TARGET, &["abort", &back])?;
    stage.await_death(SOURCE)?;
    stage.crew.start_agent(SOURCE)?;
    let report = wait_for_end(&stage.crew, TARGET, &back, PATIENCE * 2)
        .with_context(|| format!("{}\n{}", stage.crew.log(SOURCE), stage.crew.log(TARGET)))?;
    ensure!(report["state"] == "aborted", "{report:#}");
    ensure!(running(&source)?.is_empty() && running(&target)?.len() == 1);
    stage.writes_go_on(&CACHE)?;
    stage.crew.kill_agent(SOURCE)?;
    stage.crew.start_agent(SOURCE)?;
    stage.writes_go_on(&CACHE)?;

    // Nothing of it is in the way of the next.
    stage.lab.clear_fault(&target, SLOW)?;
    let back = come_back(&stage, "--copy-first")?;
    let report = wait_for_end(&stage.crew, TARGET, &back, PATIENCE * 2)?;
    ensure!(report["state"] == "completed", "{report:#}");
    ensure!(running(&source)?.len() == 1 && running(&target)?.is_empty());
    stage.writes_go_on(&CACHE)?;
    stage.check_data(&CACHE)?;
    stage.lab.down()
}

/// A stage of which the service has moved to the target, and with which plan. What a person removes before it can come
/// back is removed: the container that may not be started any more, and its data.
fn moved_away(name: &str) -> Result<Option<(Stage, String)>> {
    let devices = [device(SOURCE, None), device(TARGET, None)];
    let Some(stage) = Stage::up(name, &devices, &[CACHE])? else {
        return Ok(None);
    };
    stage
        .crew
        .tell(SOURCE, &["evacuate", CACHE.name, "--yes"])?;
    let plan = stage.plan()?;
    stage.writes_go_on(&CACHE)?;
    let source = stage.source()?;
    source.podman(["rm", CACHE.name])?;
    source.podman(["volume", "rm", "cache-data"])?;
    source.run(["rm", "-r", &CACHE.notes()])?;
    Ok(Some((stage, plan)))
}

/// Asks the target to evacuate the service as soon as the duplicator knows that the source has room for it; the plan.
fn come_back(stage: &Stage, way: &str) -> Result<String> {
    let plan = ["plan", CACHE.name, way];
    wait_for("a plan that nothing blocks", PATIENCE, || {
        let unblocked = stage.crew.tell(TARGET, &plan).is_ok();
        Ok(unblocked.then_some(()))
    })?;
    let before = newest(stage)?;
    let arguments = ["evacuate", CACHE.name, "--yes", way];
    stage.crew.begin(TARGET, "evacuate", &arguments)?;
    wait_for("its plan", PATIENCE, || {
        let plan = newest(stage)?;
        if plan["plan"] == before["plan"] {
            return Ok(None);
        }
        Ok(plan["plan"].as_str().map(str::to_owned))
    })
    .with_context(|| stage.crew.log(TARGET))
}

/// The newest plan of the target.
fn newest(stage: &Stage) -> Result<Value> {
    let (code, status) = stage.crew.ask(TARGET, &["status"])?;
    if code != 0 {
        bail!("no status: {status}");
    }
    let plans = status["plans"].as_array();
    Ok(plans
        .and_then(|plans| plans.last())
        .cloned()
        .unwrap_or_default())
}

/// Waits until the service answers at this host, of which it may have left.
fn answers_at(stage: &Stage, host: &xtask::lab::Host) -> Result<()> {
    let (address, port) = (host.address().to_string(), CACHE.port.to_string());
    let ask = [
        "timeout",
        "2",
        "redis-cli",
        "-h",
        &address,
        "-p",
        &port,
        "PING",
    ];
    wait_for("an answer at the device that it left", PATIENCE, || {
        let office = stage.lab.host("office")?;
        let answer = office.run(ask).unwrap_or_default();
        Ok((answer.trim() == "PONG").then_some(()))
    })
    .with_context(|| stage.crew.log(TARGET))
}
