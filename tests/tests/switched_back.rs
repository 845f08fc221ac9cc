//! Abort after a switch that came first: what was written to the twins is on the source, whoever dies meanwhile.

use anyhow::{Context as _, Result, ensure};
use lifeboat_tests::stage::{PATIENCE, SOURCE, Service, Stage, TARGET, device, dies_at, running};
use serde_json::Value;
use xtask::crew::wait_for_end;
use xtask::lab::{Fault, Host};
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
fn an_abort_after_the_release_brings_every_acknowledged_write_back_to_the_source() -> Result<()> {
    let devices = [device(SOURCE, None), device(TARGET, None)];
    let Some(mut stage) = Stage::up("switched-back", &devices, &[CACHE])? else {
        return Ok(());
    };
    let (source, target) = (stage.source()?.clone(), stage.target()?.clone());
    let notes = CACHE.notes();
    let fill = format!("head -c {LATER} /dev/urandom >{notes}/big");
    source.run(["sh", "-c", &fill])?;
    // The image goes over the fast link.
    let arguments = ["evacuate", CACHE.name, "--yes", "--switch-first"];
    stage.crew.begin(SOURCE, "evacuate", &arguments)?;
    let plan = stage.plan()?;
    stage.lab.fault(&source, SLOW, PATIENCE * 5)?;
    twin_is_ready(&stage)?;
    stage.writes_go_on(&CACHE)?;
    let by_twin = "echo new >/notes/new; mv /notes/known /notes/renamed; rm /notes/deep/random; \
                   chmod 0600 /notes/renamed; mkdir -p /notes/made/here; sync";
    target.podman(["exec", CACHE.name, "sh", "-c", by_twin])?;

    // Asked for once; the target dies before it signs, the source before it asks and before it writes.
    stage.crew.kill_agent(TARGET)?;
    stage.crew.start_agent_with(TARGET, &dies_at("give back"))?;
    stage.crew.kill_agent(SOURCE)?;
    stage
        .crew
        .start_agent_with(SOURCE, &dies_at("asked back"))?;
    stage.writes_go_on(&CACHE)?;
    wait_for("an abort that is taken", PATIENCE, || {
        // It may die before it answers.
        let told = stage.crew.tell(SOURCE, &["abort", &plan]);
        let asked = was_asked(&source, &plan)?;
        Ok((told.is_ok() || asked).then_some(()))
    })?;
    stage.await_death(SOURCE)?;
    stage.crew.start_agent_with(SOURCE, &dies_at("take back"))?;
    stage.await_death(TARGET)?;
    stage.crew.start_agent(TARGET)?;
    stage.await_death(SOURCE)?;
    ensure!(
        running(&target)?.is_empty(),
        "a twin runs after it was given back"
    );
    ensure!(running(&source)?.is_empty(), "a container runs on old data");
    stage.crew.start_agent(SOURCE)?;

    let report = wait_for_end(&stage.crew, SOURCE, &plan, PATIENCE * 2)
        .with_context(|| format!("{}\n{}", stage.crew.log(SOURCE), stage.crew.log(TARGET)))?;
    ensure!(report["state"] == "aborted", "{report:#}");
    ensure!(running(&source)?.len() == 1, "its container does not run");
    stage.writes_go_on(&CACHE)?;
    stage.check_data_on(&source, &CACHE)?;
    let look = format!(
        "cat {notes}/new && stat -c %a {notes}/renamed && test -d {notes}/made/here && \
         test ! -e {notes}/deep/random && test ! -e {notes}/known && stat -c %s {notes}/big"
    );
    let found = source.run(["sh", "-c", &look])?;
    ensure!(found.trim() == format!("new\n600\n{LATER}"), "{found:?}");
    stage.lab.clear_fault(&source, SLOW)?;
    let arguments = ["evacuate", CACHE.name, "--yes", "--copy-first"];
    let again = stage.crew.tell(SOURCE, &arguments);
    again.with_context(|| format!("{}\n{}", stage.crew.log(SOURCE), stage.crew.log(TARGET)))?;
    let look =
        "ls -A /srv /var/lib/containers/storage/volumes/*; grep fuse.lifeboat /proc/mounts || true";
    let left = target.run(["sh", "-c", look])?;
    ensure!(!left.contains("lifeboat"), "{left}");
    stage.writes_go_on(&CACHE)?;
    stage.check_data(&CACHE)?;
    stage.lab.down()
}

/// Whether the source has written down that the target is asked to give everything back.
fn was_asked(source: &Host, plan: &str) -> Result<bool> {
    let journal = format!("/var/lib/lifeboat/plans/{plan}.source/journal.jsonl");
    let text = std::fs::read_to_string(source.path(&journal))?;
    Ok(text.contains("\"asked-back\""))
}

/// Waits until the twin is ready and its data is not there.
fn twin_is_ready(stage: &Stage) -> Result<()> {
    wait_for("a twin before its data", PATIENCE * 2, || {
        let (_, status) = stage.crew.ask(SOURCE, &["status"])?;
        let filling = status["plans"][0]["phase"] == "fill";
        let arrival: &Value = &status["plans"][0]["arrival"];
        Ok((filling && arrival["absent"].as_u64() > Some(0)).then_some(()))
    })
    .with_context(|| format!("{}\n{}", stage.crew.log(SOURCE), stage.crew.log(TARGET)))
}
