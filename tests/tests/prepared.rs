//! Stage `prepare`: the data is on the target in advance, the containers run on untouched; at `evacuate` only
//! the changeset is left to move; at recovery, and after a death, nothing stays behind.

use anyhow::{Context as _, Result, ensure};
use lifeboat_tests::shop::says;
use lifeboat_tests::stage::{
    Fault, PATIENCE, SOURCE, Service, Stage, TARGET, device, policy, runs,
};
use serde_json::Value;
use std::fs;
use xtask::crew::{Device, wait_for_end};
use xtask::images;
use xtask::lab::Host;
use xtask::process::wait_for;

const CACHE: Service = Service {
    name: "cache",
    port: 6379,
};

const OTHER: &str = "other";

/// More than every changeset of this test together.
const BULK: u64 = 20 << 20;

#[test]
fn what_was_prepared_is_freed_at_recovery_and_saves_the_evacuation_the_copy() -> Result<()> {
    let source = Device {
        policy: Some(policy(Fault::None, "")),
        migration: vec![
            "prepare_pause_seconds: 1".into(),
            // Slower than the link, so that the limit shows.
            "prepare_rate_bytes: 16777216".into(),
        ],
        ..Device::new(SOURCE)
    };
    let Some(mut stage) = Stage::up("prepared", &[source, device(TARGET, None)], &[CACHE])? else {
        return Ok(());
    };
    let (source, target) = (stage.source()?.clone(), stage.target()?.clone());
    let big = format!("{}/big", CACHE.notes());
    source.run(["sh", "-c", &format!("head -c {BULK} /dev/urandom >{big}")])?;
    // A pause is as long as nine of its rounds.
    images::load_some(&target, &["redis"])?;
    let untouched = state(&source)?;
    let id = source.podman(["inspect", "--format", "{{.Id}}", CACHE.name])?;

    stage.find(Fault::Busy, "")?;
    let plan = prepared(&stage, "")?;
    says(
        &stage.crew.tell(SOURCE, &["explain"])?,
        &["stage prepare", "kept up to date on target"],
    )?;
    ensure!(
        fs::read(source.path(&big))? == fs::read(target.path(&big))?,
        "the target does not hold the data"
    );
    let rounds = |plan: &str| -> Result<Vec<(Value, u64)>> { Ok(moved(&source, plan)?.0) };
    wait_for("a second round", PATIENCE * 3, || {
        Ok((rounds(&plan)?.len() >= 2).then_some(()))
    })?;
    let copied = rounds(&plan)?;
    ensure!(copied[0].1 >= BULK && copied[1].1 < BULK / 4, "{copied:?}");
    let took = copied[0].0["secs"].as_u64();
    ensure!(took >= Some(1), "20 MiB at 16 MiB/s took {took:?} s");
    // Of a large file a round reads what was written to it, and no more.
    let page = format!("dd if=/dev/urandom of={big} bs=4096 seek=1000 count=1 conv=notrunc");
    source.run(["sh", "-c", &page])?;
    let before = rounds(&plan)?.len();
    wait_for("the page on the target", PATIENCE * 3, || {
        let same = fs::read(source.path(&big))? == fs::read(target.path(&big))?;
        Ok(same.then_some(()))
    })?;
    let read = read_since(&source, &plan, before)?;
    ensure!(read < BULK / 4, "{read} bytes were read for a page");
    ensure!(
        state(&source)? == untouched && runs(&source, &id)?,
        "the container was touched"
    );
    stage.writes_go_on(&CACHE)?;
    let twins = target.podman(["ps", "--all", "--quiet"])?;
    ensure!(twins.is_empty(), "the target has containers: {twins}");

    stage.find(Fault::None, "")?;
    let report = wait_for_end(&stage.crew, SOURCE, &plan, PATIENCE)?;
    says(
        report["reason"].as_str().unwrap_or_default(),
        &["the verdict does not ask for it any more"],
    )?;
    freed(&stage)?;
    ensure!(state(&source)? == untouched, "the container was touched");

    stage.find(Fault::Busy, "")?;
    let plan = prepared(&stage, &plan)?;
    stage.crew.kill_agent(SOURCE)?;
    stage.crew.start_agent(SOURCE)?;
    ensure!(prepared(&stage, "")? == plan, "another plan");
    let copied = rounds(&plan)?;
    let again: u64 = copied[1..].iter().map(|round| round.1).sum();
    ensure!(
        again < BULK / 4,
        "{again} bytes after the first round: {copied:?}"
    );
    ensure!(state(&source)? == untouched, "the container was touched");

    // The target dies too; a later round finds it again, and what it holds.
    stage.crew.kill_agent(TARGET)?;
    let before = rounds(&plan)?.len();
    stage.crew.start_agent(TARGET)?;
    goes_on(&stage, &plan, before)?;
    ensure!(state(&source)? == untouched, "the container was touched");

    stage.find(Fault::Starved, "")?;
    wait_for("the word to evacuate", PATIENCE, || {
        Ok(moved(&source, &plan)?.1.map(drop))
    })
    .with_context(|| stage.crew.log(SOURCE))?;
    // What was begun goes on.
    stage.find(Fault::None, "")?;
    let report = wait_for_end(&stage.crew, SOURCE, &plan, PATIENCE)?;
    ensure!(report["state"] == "completed", "{report:#}");
    let (rounds, after) = moved(&source, &plan)?;
    println!("in advance and then: {rounds:?}; after the word: {after:?} bytes");
    ensure!(
        after.is_some_and(|bytes| bytes < BULK / 4) && rounds[0].1 >= BULK,
        "after the word to evacuate {after:?} bytes moved: {rounds:?}"
    );
    stage.writes_go_on(&CACHE)?;
    stage.check_data(&CACHE)?;
    println!("{}", stage.crew.tell(SOURCE, &["verify", &plan])?);
    Ok(())
}

#[test]
fn a_paired_device_that_dies_while_prepared_is_found_again_or_done_without() -> Result<()> {
    let source = Device {
        policy: Some(policy(Fault::None, DELEGATE)),
        migration: vec!["prepare_pause_seconds: 1".into()],
        ..Device::new(SOURCE)
    };
    let devices = [source, device(TARGET, None), device(OTHER, None)];
    let Some(mut stage) = Stage::up("prepared-paired", &devices, &[CACHE])? else {
        return Ok(());
    };
    let source = stage.source()?.clone();
    let bulk = format!("head -c {BULK} /dev/urandom >{}/big", CACHE.notes());
    source.run(["sh", "-c", &bulk])?;
    for other in [TARGET, OTHER] {
        images::load_some(stage.lab.host(other)?, &["redis"])?;
    }
    let untouched = state(&source)?;

    stage.find(Fault::Busy, DELEGATE)?;
    let plan = prepared(&stage, "")?;
    // The duplicator says which of the two others is lent for what.
    let (_, status) = stage.crew.ask(SOURCE, &["status"])?;
    let role = |role: &str| status["plans"][0][role].as_str().map(str::to_owned);
    let paired = role("paired").context("no paired device")?;
    let target = role("target").context("no target")?;
    let target = stage.lab.host(&target)?.clone();

    stage.crew.kill_agent(&paired)?;
    let before = moved(&source, &plan)?.0.len();
    stage.crew.start_agent(&paired)?;
    goes_on(&stage, &plan, before)?;
    ensure!(state(&source)? == untouched, "the container was touched");

    // For good this time.
    stage.crew.kill_agent(&paired)?;
    stage.find(Fault::Starved, DELEGATE)?;
    wait_for("the word to evacuate", PATIENCE, || {
        Ok(moved(&source, &plan)?.1.map(drop))
    })
    .with_context(|| stage.crew.log(SOURCE))?;
    stage.find(Fault::None, DELEGATE)?;
    let report = wait_for_end(&stage.crew, SOURCE, &plan, PATIENCE * 2)?;
    ensure!(report["state"] == "completed", "{report:#}");
    stage.writes_go_on(&CACHE)?;
    stage.check_data_on(&target, &CACHE)?;
    stage.lab.down()
}

/// Waits for a round of the same plan beyond the first `before`, which were all when a device had died: it sends little
/// again.
fn goes_on(stage: &Stage, plan: &str, before: usize) -> Result<()> {
    let source = stage.source()?;
    let copied = wait_for("a round after the death", PATIENCE * 3, || {
        let copied = moved(source, plan)?.0;
        Ok((copied.len() > before).then_some(copied))
    })
    .with_context(|| stage.crew.log(SOURCE))?;
    let again: u64 = copied[before..].iter().map(|round| round.1).sum();
    ensure!(again < BULK / 4, "{again} bytes again: {copied:?}");
    ensure!(prepared(stage, "")? == plan, "another plan");
    Ok(())
}

/// Lends a device whatever the fault.
const DELEGATE: &str = "delegate:
  - when: { any: [busy, starved] }
    actions: [transfer]
";

/// Waits until another plan than `but` is prepared.
fn prepared(stage: &Stage, but: &str) -> Result<String> {
    wait_for("a prepared plan", PATIENCE, || {
        let (_, status) = stage.crew.ask(SOURCE, &["status"])?;
        let plans = status["plans"].as_array().cloned().unwrap_or_default();
        let held = plans.iter().find(|plan| {
            plan["held"] == true && plan["phase"] == "prepared" && plan["plan"] != but
        });
        Ok(held.and_then(|plan| plan["plan"].as_str().map(str::to_owned)))
    })
    .with_context(|| stage.crew.log(SOURCE))
}

/// How the container is as its runtime tells: touched, it would have another process or another policy.
fn state(host: &Host) -> Result<String> {
    let format = "{{.Id}} {{.State.Status}} {{.State.Pid}} {{.State.StartedAt}} {{.HostConfig.RestartPolicy.Name}}";
    host.podman(["inspect", "--format", format, CACHE.name])
}

/// Nothing of a plan is left on the target, which nobody has been lent.
fn freed(stage: &Stage) -> Result<()> {
    let target = stage.target()?;
    let notes = target.path(&CACHE.notes());
    wait_for("the target to be freed", PATIENCE, || {
        let volumes = target.podman(["volume", "ls", "--quiet"])?;
        Ok((!notes.exists() && volumes.is_empty()).then_some(()))
    })
    .with_context(|| stage.crew.log(TARGET))?;
    wait_for("the target to be given back", PATIENCE, || {
        let (_, status) = stage.crew.ask(SOURCE, &["status"])?;
        let over = |plan: &Value| plan["over"] == true;
        let plans = status["plans"].as_array().cloned().unwrap_or_default();
        Ok(plans.iter().all(over).then_some(()))
    })
}

/// Bytes that the rounds of a plan beyond the first `before` read.
fn read_since(source: &Host, plan: &str, before: usize) -> Result<u64> {
    let journal = format!("/var/lib/lifeboat/plans/{plan}.source/journal.jsonl");
    let text = fs::read_to_string(source.path(&journal)).context(journal)?;
    ensure!(
        text.contains("written-extents"),
        "nothing is watched below the volume"
    );
    let entries = text.lines().map(serde_json::from_str::<Value>);
    let entries: Vec<Value> = entries.collect::<Result<_, _>>()?;
    let rounds = entries
        .iter()
        .filter(|entry| entry["event"]["event"] == "round");
    let volumes = rounds
        .skip(before)
        .filter_map(|round| round["event"]["volumes"].as_array());
    Ok(volumes
        .flatten()
        .filter_map(|volume| volume["read"].as_u64())
        .sum())
}

/// Time and bytes on the wire of each round, and the bytes since the plan was told to evacuate.
type Moved = (Vec<(Value, u64)>, Option<u64>);

fn moved(source: &Host, plan: &str) -> Result<Moved> {
    let journal = format!("/var/lib/lifeboat/plans/{plan}.source/journal.jsonl");
    let text = fs::read_to_string(source.path(&journal)).context(journal)?;
    let (mut rounds, mut after) = (Vec::new(), None);
    for line in text.lines() {
        let entry: Value = serde_json::from_str(line)?;
        let event = &entry["event"];
        match event["event"].as_str() {
            Some("round" | "final") => {
                let volumes = event["volumes"].as_array().into_iter().flatten();
                let wire = volumes.filter_map(|volume| volume["wire"].as_u64()).sum();
                rounds.push((event["duration"].clone(), wire));
                after = after.map(|bytes: u64| bytes + wire);
            }
            Some("goes-on") => after = Some(0),
            _ => {}
        }
    }
    Ok((rounds, after))
}
