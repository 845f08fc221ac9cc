//! The target's agent is killed with SIGKILL when it owns the data and before it started a twin.

use anyhow::{Result, ensure};
use lifeboat_tests::stage::{PATIENCE, SOURCE, Service, Stage, TARGET, device, running};
use std::fs;
use std::os::unix::process::ExitStatusExt as _;

const CACHE: Service = Service {
    name: "cache",
    port: 6379,
};

#[test]
fn a_target_killed_after_it_owns_starts_the_twins_in_its_next_life() -> Result<()> {
    let devices = [device(SOURCE, None), device(TARGET, Some("start twins"))];
    let Some(mut stage) = Stage::up("killed-target", &devices, &[CACHE])? else {
        return Ok(());
    };
    let arguments = ["evacuate", CACHE.name, "--yes"];
    let mut evacuation = stage.crew.begin(SOURCE, "evacuate", &arguments)?;
    let status = stage.crew.await_agent_end(TARGET, PATIENCE)?;
    ensure!(status.signal() == Some(9), "the agent ended with {status}");
    ensure!(running(stage.target()?)?.is_empty(), "a twin runs already");
    stage.crew.start_agent(TARGET)?;
    let status = evacuation.wait()?;
    let log = fs::read_to_string(stage.source()?.log("evacuate"))?;
    ensure!(status.success(), "{status}: {log}");
    ensure!(running(stage.target()?)?.len() == 1);
    ensure!(running(stage.source()?)?.is_empty());
    stage.crew.tell(SOURCE, &["verify", &stage.plan()?])?;
    stage.writes_go_on(&CACHE)?;
    stage.check_data(&CACHE)?;
    stage.lab.down()
}
