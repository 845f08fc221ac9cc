//! A target whose file system keeps whole seconds until 2038: what becomes of times is said, and every proof holds.

use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use lifeboat_tests::disk::{Disk, output};
use lifeboat_tests::shop::says;
use lifeboat_tests::stage::{PATIENCE, SOURCE, Service, Stage, TARGET, device};
use serde_json::Value;
use xtask::crew::wait_for_end;

const CACHE: Service = Service {
    name: "cache",
    port: 6379,
};

/// Makes a file of 2040 on the source, and the place of its volume on the target one with small inodes.
fn prepare(stage: &Stage, disk: &Disk) -> Result<()> {
    let future = format!("{}/future", CACHE.notes());
    let touch = ["touch", "--date=2040-01-01 12:00:00.5", &future];
    stage.source()?.run(touch)?;
    output("mkfs.ext4", &["-q", "-I", "128", disk.device()]);
    let target = stage.target()?;
    target.run(["mkdir", "-p", "/srv"])?;
    target.run(["mount", disk.device(), "/srv"]).map(drop)
}

/// What the report of a plan that completed must say, and the proof.
fn check(stage: &Stage, plan: &str, report: &Value) -> Result<()> {
    ensure!(report["state"] == "completed", "{report:#}");
    let exceptions = report["exceptions"].as_array().context("no exceptions")?;
    let told = |word: &str| -> Vec<&str> {
        let all = exceptions.iter().filter_map(Value::as_str);
        all.filter(|line| line.contains(word)).collect()
    };
    let (cut, late) = (told("is cut to whole 1s"), told("the latest that"));
    ensure!(cut.len() == 1 && late.len() == 1, "{exceptions:#?}");
    says(late[0], &["future: ", "2038-01-19 03:14:07 UTC"])?;
    let future = format!("{}/future", CACHE.notes());
    let time = stage.target()?.run(["stat", "--format=%Y", &future])?;
    ensure!(time == i32::MAX.to_string(), "{time}");
    stage.crew.tell(SOURCE, &["verify", plan])?;
    stage.writes_go_on(&CACHE)?;
    stage.check_data(&CACHE)
}

#[test]
fn times_that_the_target_cuts_are_reported_and_a_target_that_was_started_anew_takes_over()
-> Result<()> {
    let devices = [device(SOURCE, Some("switch")), device(TARGET, None)];
    let Some(mut stage) = Stage::up("target-times", &devices, &[CACHE])? else {
        return Ok(());
    };
    let scratch = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let Some(disk) = Disk::new(scratch, "times", 128) else {
        return Ok(());
    };
    prepare(&stage, &disk)?;
    stage.evacuate_until_killed(&CACHE)?;
    // It has the release yet to hear, and then only what lies on its disk.
    stage.crew.kill_agent(TARGET)?;
    stage.crew.start_agent(TARGET)?;
    stage.crew.start_agent(SOURCE)?;
    let plan = stage.plan()?;
    let report = wait_for_end(&stage.crew, SOURCE, &plan, PATIENCE)
        .with_context(|| format!("{}\n{}", stage.crew.log(SOURCE), stage.crew.log(TARGET)))?;
    check(&stage, &plan, &report)?;
    stage.lab.down()
}

#[test]
fn a_plan_that_switches_first_reports_the_times_too_and_is_proven() -> Result<()> {
    let devices = [device(SOURCE, None), device(TARGET, None)];
    let Some(stage) = Stage::up("target-times-first", &devices, &[CACHE])? else {
        return Ok(());
    };
    let scratch = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let Some(disk) = Disk::new(scratch, "times-first", 128) else {
        return Ok(());
    };
    prepare(&stage, &disk)?;
    let arguments = ["evacuate", CACHE.name, "--yes", "--switch-first"];
    stage
        .crew
        .tell(SOURCE, &arguments)
        .with_context(|| format!("{}\n{}", stage.crew.log(SOURCE), stage.crew.log(TARGET)))?;
    let plan = stage.plan()?;
    let report = wait_for_end(&stage.crew, SOURCE, &plan, PATIENCE)?;
    let timeline = report["timeline"].to_string();
    says(&timeline, &["switched first:", "roots agree"])?;
    check(&stage, &plan, &report)?;
    stage.lab.down()
}
