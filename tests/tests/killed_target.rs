//! The target's agent is killed with SIGKILL, before it owns the data and after.

use anyhow::{Context as _, Result, ensure};
use lifeboat_tests::stage::{PATIENCE, SOURCE, Service, Stage, TARGET, device, running};
use std::fs;
use xtask::process::wait_for;

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
    stage.await_death(TARGET)?;
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

#[test]
fn a_target_killed_before_it_owns_is_gone_on_with_in_its_next_life() -> Result<()> {
    let devices = [device(SOURCE, None), device(TARGET, Some("rehearse"))];
    let Some(mut stage) = Stage::up("target-returns", &devices, &[CACHE])? else {
        return Ok(());
    };
    let arguments = ["evacuate", CACHE.name, "--yes"];
    let mut evacuation = stage.crew.begin(SOURCE, "evacuate", &arguments)?;
    stage.await_death(TARGET)?;
    stage.writes_go_on(&CACHE)?;
    stage.crew.start_agent(TARGET)?;
    let status = evacuation.wait()?;
    let log = fs::read_to_string(stage.source()?.log("evacuate"))?;
    ensure!(status.success(), "{status}: {log}");
    ensure!(running(stage.source()?)?.is_empty());
    stage.writes_go_on(&CACHE)?;
    stage.check_data(&CACHE)?;
    stage.lab.down()
}

#[test]
fn a_target_that_was_away_at_a_roll_back_frees_everything_when_it_is_back() -> Result<()> {
    let devices = [device(SOURCE, None), device(TARGET, Some("rehearse"))];
    let Some(mut stage) = Stage::up("target-away", &devices, &[CACHE])? else {
        return Ok(());
    };
    let arguments = ["evacuate", CACHE.name, "--yes"];
    let mut evacuation = stage.crew.begin(SOURCE, "evacuate", &arguments)?;
    stage.await_death(TARGET)?;
    let plan = stage.plan()?;
    wait_for("a source that waits for its target", PATIENCE, || {
        let (_, status) = stage.crew.ask(SOURCE, &["status"])?;
        let trouble = status["plans"].to_string();
        Ok(trouble.contains("cannot connect").then_some(()))
    })?;
    stage.crew.tell(SOURCE, &["abort", &plan])?;
    ensure!(!evacuation.wait()?.success());
    let log = fs::read_to_string(stage.source()?.log("evacuate"))?;
    ensure!(log.contains("rolled back"), "{log}");
    stage.writes_go_on(&CACHE)?;
    let target = stage.target()?.clone();
    let left = || -> Result<String> {
        let (volumes, notes) = (["volume", "ls", "--quiet"], target.path(&CACHE.notes()));
        let volumes = target.podman(volumes)?;
        let notes = if notes.exists() { "its notes" } else { "" };
        Ok(format!("{volumes}{notes}"))
    };
    ensure!(
        !left()?.is_empty(),
        "nothing had been made, so nothing is shown"
    );
    // What a broken disk left of another plan must not keep the agent from starting.
    let damaged = "/var/lib/lifeboat/plans/p0-damaged.target/journal.jsonl";
    target.write(damaged, "not a journal\n{}\n")?;
    stage.crew.start_agent(TARGET)?;
    wait_for("an empty target", PATIENCE, || {
        Ok(left()?.is_empty().then_some(()))
    })
    .with_context(|| stage.crew.log(TARGET))?;
    let (_, status) = stage.crew.ask(TARGET, &["status"])?;
    let problems = status["view"]["problems"].to_string();
    ensure!(problems.contains("p0-damaged.target"), "{problems}");
    stage
        .crew
        .tell(SOURCE, &["evacuate", CACHE.name, "--yes"])?;
    stage.writes_go_on(&CACHE)?;
    stage.check_data(&CACHE)?;
    stage.lab.down()
}
