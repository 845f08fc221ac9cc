//! The source's agent is killed with SIGKILL in each phase: one device runs the containers, never two, and the
//! plan goes on.

use anyhow::{Context as _, Result, ensure};
use lifeboat_tests::stage::{
    PATIENCE, SOURCE, Service, Stage, TARGET, device, dies_at, running, runs,
};
use serde_json::Value;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use xtask::crew::wait_for_end;
use xtask::lab::Host;

const CACHE: Service = Service {
    name: "cache",
    port: 6379,
};
const QUEUE: Service = Service {
    name: "queue",
    port: 6380,
};

/// Phases up to the release, in their order; while the agent is dead in the last two, the workload is
/// frozen.
const BEFORE: [&str; 9] = [
    "allocate",
    "prepare",
    "export images",
    "replicate",
    "rehearse twins",
    "fence",
    "pause",
    "final changeset",
    "release",
];
const FROZEN: [&str; 2] = ["final changeset", "release"];

#[test]
fn killed_in_each_phase_before_the_release_the_plan_goes_on_and_completes() -> Result<()> {
    let devices = [device(SOURCE, Some(BEFORE[0])), device(TARGET, None)];
    let Some(mut stage) = Stage::up("killed-before", &devices, &[CACHE])? else {
        return Ok(());
    };
    let id = container_id(stage.source()?, &CACHE)?;
    for (index, phase) in BEFORE.iter().enumerate() {
        match index {
            0 => drop(stage.evacuate_until_killed(&CACHE)?),
            _ => stage.await_death(SOURCE).context(*phase)?,
        }
        let twins = running(stage.target()?)?;
        ensure!(twins.is_empty(), "{phase}: twins run: {twins:?}");
        if !FROZEN.contains(phase) {
            ensure!(runs(stage.source()?, &id)?, "{phase}: nothing runs");
            stage.writes_go_on(&CACHE).context(*phase)?;
        }
        match BEFORE.get(index + 1) {
            Some(next) => stage.crew.launch_agent(SOURCE, &dies_at(next))?,
            None => stage.crew.start_agent(SOURCE)?,
        }
    }
    let plan = stage.plan()?;
    let report = wait_for_end(&stage.crew, SOURCE, &plan, PATIENCE)?;
    let resumed = report["timeline"].to_string().matches("resumed:").count();
    ensure!(
        report["state"] == "completed" && resumed == BEFORE.len(),
        "{report:#}"
    );
    stage.writes_go_on(&CACHE)?;
    stage.check_data(&CACHE)?;
    ensure!(!runs(stage.source()?, &id)?);
    let keys = "find /var/lib/lifeboat/plans -name keys.json";
    let left = stage.target()?.run(["sh", "-c", keys])?;
    ensure!(left.is_empty(), "keys stay behind: {left}");
    stage.lab.down()
}

#[test]
fn killed_after_the_release_the_twins_run_on_the_target_and_the_source_never_again() -> Result<()> {
    let devices = [device(SOURCE, Some("switch")), device(TARGET, None)];
    let Some(mut stage) = Stage::up("killed-after", &devices, &[CACHE, QUEUE])? else {
        return Ok(());
    };
    moves_after_all(&mut stage, &CACHE).context("killed at switch")?;
    // A resumed plan passes the same phases: the next death is armed when this one is over.
    stage.crew.kill_agent(SOURCE)?;
    stage
        .crew
        .start_agent_with(SOURCE, &dies_at("start twins"))?;
    moves_after_all(&mut stage, &QUEUE).context("killed at start twins")?;
    stage.check_data(&CACHE)?;
    stage.lab.down()
}

/// Evacuates `service` until the agent dies, starts the agent again, and checks the rules.
fn moves_after_all(stage: &mut Stage, service: &Service) -> Result<()> {
    let (source, target) = (stage.source()?.clone(), stage.target()?.clone());
    let id = container_id(&source, service)?;
    let others = running(&target)?;
    let told = stage.evacuate_until_killed(service)?;
    println!("{told}");
    ensure!(!runs(&source, &id)?, "it runs on after the release");
    refused(&source, service, &id)?;

    let stop = AtomicBool::new(false);
    let report = thread::scope(|scope| {
        let watch = scope.spawn(|| -> Result<u32> {
            let mut looks = 0;
            while !stop.load(Ordering::Relaxed) {
                let twins = running(&target)?.difference(&others).count();
                ensure!(
                    !runs(&source, &id)?,
                    "it runs on the source; twins: {twins}"
                );
                looks += 1;
                thread::sleep(std::time::Duration::from_millis(10));
            }
            Ok(looks)
        });
        let report = (|| -> Result<Value> {
            stage.crew.start_agent(SOURCE)?;
            wait_for_end(&stage.crew, SOURCE, &stage.plan()?, PATIENCE)
        })();
        stop.store(true, Ordering::Relaxed);
        let looks = watch.join().expect("the watch does not panic")?;
        ensure!(looks > 0, "nobody looked");
        report
    })?;
    ensure!(report["state"] == "completed", "{report:#}");
    ensure!(running(&target)?.difference(&others).count() == 1);
    refused(&source, service, &id)?;
    let plan = report["plan"].as_str().unwrap_or_default();
    let proof = stage.crew.tell(SOURCE, &["verify", plan])?;
    println!("{proof}");
    stage.writes_go_on(service)?;
    stage.check_data(service)
}

/// Checks that the source's runtime does not start the container.
fn refused(source: &Host, service: &Service, id: &str) -> Result<()> {
    let start = source.podman(["start", service.name]);
    ensure!(start.is_err(), "the fenced source started {}", service.name);
    ensure!(!runs(source, id)?, "{} runs on the source", service.name);
    Ok(())
}

fn container_id(host: &Host, service: &Service) -> Result<String> {
    host.podman(["inspect", "--format", "{{.Id}}", service.name])
}
