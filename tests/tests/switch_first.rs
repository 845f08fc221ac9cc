//! Copying first or switching first: what is chosen, with which figures, and an operator's word on it.

use anyhow::{Context as _, Result, ensure};
use lifeboat_tests::shop::says;
use lifeboat_tests::stage::{Load, PATIENCE, SOURCE, Service, Stage, TARGET, device};
use serde_json::Value;
use xtask::crew::{Device, wait_for_end};
use xtask::lab::Host;

const CACHE: Service = Service {
    name: "cache",
    port: 6379,
};

/// Enough for the copy's rate to be measured.
const BULK: u64 = 48 << 20;
/// What is written anew again and again.
const BUSY: u64 = 4 << 20;

#[test]
fn the_choice_is_told_with_its_figures_after_every_round_and_an_operator_has_a_word() -> Result<()>
{
    let source = Device {
        // So that the changeset of what is written all the time is not small by itself.
        migration: vec![format!("changeset_threshold_bytes: {}", BUSY / 4)],
        ..device(SOURCE, None)
    };
    let Some(stage) = Stage::up("switch", &[source, device(TARGET, None)], &[CACHE])? else {
        return Ok(());
    };
    let source = stage.source()?.clone();
    let big = format!("{}/big", CACHE.notes());
    source.run(["sh", "-c", &format!("head -c {BULK} /dev/urandom >{big}")])?;

    let (_, plan) = stage.crew.ask(SOURCE, &["plan", CACHE.name])?;
    let choice = &plan["choice"];
    ensure!(choice["next"] == "copy", "{choice:#}");
    ensure!(
        choice["outlook"]["size"].as_u64() >= Some(BULK),
        "{choice:#}"
    );
    ensure!(
        choice["outlook"]["dirty"]["bytes"].is_u64(),
        "what a container writes is counted by the kernel: {choice:#}"
    );
    let told = stage
        .crew
        .tell(SOURCE, &["plan", CACHE.name, "--switch-first"])?;
    says(
        &told,
        &["an operator said to switch first, which cannot be done:"],
    )?;

    let busy = busy(&source)?;
    let told = stage
        .crew
        .tell(SOURCE, &["evacuate", CACHE.name, "--yes", "--copy-first"])
        .with_context(|| stage.crew.log(SOURCE))?;
    drop(busy);
    let id = stage.plan()?;
    let report = wait_for_end(&stage.crew, SOURCE, &id, PATIENCE)?;
    ensure!(report["state"] == "completed", "{report:#}");
    let choices = lines(&report, "copied (");
    // Before the copy, after it, and after at least one changeset.
    ensure!(choices.len() >= 3, "{choices:#?}");
    says(&choices[0], &["copy first:"])?;
    says(&choices[1], &["go on copying:"])?;
    for choice in &choices {
        says(choice, &["as an operator said"])?;
    }
    let last = choices.last().context("no choice")?;
    says(
        last,
        &[
            "pause now:",
            "copied (measured)",
            "measured in round",
            "a pause of about",
        ],
    )?;
    let rounds = lines(&report, "round ").len();
    ensure!(rounds >= 2, "{report:#}");
    says(&told, &["copy first:", "pause now:"])?;
    stage.writes_go_on(&CACHE)?;
    stage.lab.down()
}

/// Lines of the report's timeline that hold `text`.
fn lines(report: &Value, text: &str) -> Vec<String> {
    let timeline = report["timeline"].as_array().into_iter().flatten();
    let lines = timeline.filter_map(|moment| moment["text"].as_str());
    lines
        .filter(|line| line.contains(text))
        .map(str::to_owned)
        .collect()
}

/// Writes one file anew, again and again, until the container is frozen: as a process of its cgroup.
fn busy(host: &Host) -> Result<Load> {
    let write = format!("head -c {BUSY} /dev/urandom >{}/busy", CACHE.notes());
    Load::start(host, &CACHE, &write)
}
