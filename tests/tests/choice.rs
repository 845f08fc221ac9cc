//! Copying first or switching first: what is chosen, with which figures, and an operator's word on it.

use anyhow::{Context as _, Result, ensure};
use lifeboat_tests::shop::says;
use lifeboat_tests::stage::{Load, PATIENCE, SOURCE, Service, Stage, TARGET, device, lines};
use std::time::{Duration, Instant};
use xtask::crew::{Device, wait_for_end};
use xtask::images;
use xtask::lab::Host;
use xtask::process::wait_for;

const CACHE: Service = Service {
    name: "cache",
    port: 6379,
};

/// Enough for the copy's rate to be measured.
const BULK: u64 = 48 << 20;
/// Enough for a copy at a low pace to take longer than a pause may.
const FEW: u64 = 14 << 20;
/// What is written anew again and again.
const BUSY: u64 = 4 << 20;
/// Some sweeps of an agent, also on a busy machine.
const CALM: Duration = Duration::from_secs(5);

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
        &[
            "switch first:",
            "as an operator said",
            "losing the target what the twins wrote without `fsync`",
        ],
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

#[test]
fn a_plan_switches_first_by_itself_once_changesets_will_not_get_small_and_keeps_what_it_copied()
-> Result<()> {
    let devices = [device(SOURCE, None), device(TARGET, None)];
    let Some(stage) = Stage::up("switched-itself", &devices, &[CACHE])? else {
        return Ok(());
    };
    let source = stage.source()?.clone();
    let (big, place) = (
        format!("{}/big", CACHE.notes()),
        format!("{}/busy", CACHE.notes()),
    );
    let write = format!("head -c {BUSY} /dev/urandom >{place}; sync {place}");
    let fill = format!("head -c {FEW} /dev/urandom >{big}; {write}");
    source.run(["sh", "-c", &fill])?;
    let mut calm = None;
    wait_for("the filling to be long ago", PATIENCE, || {
        let (_, plan) = stage.crew.ask(SOURCE, &["plan", CACHE.name])?;
        let dirty = plan["choice"]["outlook"]["dirty"]["bytes"].as_u64();
        if dirty.is_none_or(|bytes| bytes >= BUSY / 16) {
            calm = None;
        }
        // Just after it, no sweep has seen it yet.
        let since = *calm.get_or_insert_with(Instant::now);
        Ok((since.elapsed() > CALM).then_some(()))
    })?;
    // So that the image need not go at this pace too.
    images::load_some(stage.target()?, &["redis"])?;
    // Copied at this pace, all of it is written anew meanwhile, and a pause would be longer than any may be.
    let arguments = ["evacuate", CACHE.name, "--yes", "--limit", "512KiB"];
    stage.crew.begin(SOURCE, "evacuate", &arguments)?;
    let plan = stage.plan()?;
    wait_for("a copy under way", PATIENCE, || {
        let (_, status) = stage.crew.ask(SOURCE, &["status"])?;
        let copying = status["plans"][0]["phase"] == "replicate";
        Ok((copying && status["plans"][0]["bytes_read"].as_u64() > Some(0)).then_some(()))
    })
    .with_context(|| stage.crew.log(SOURCE))?;
    let busy = Load::start(&source, &CACHE, &write)?;
    let report = wait_for_end(&stage.crew, SOURCE, &plan, PATIENCE * 2)
        .with_context(|| stage.crew.log(SOURCE))?;
    drop(busy);
    ensure!(report["state"] == "completed", "{report:#}");
    let choices = lines(&report, "copied (");
    says(&choices[0], &["copy first:"])?;
    says(
        choices.last().context("no choice")?,
        &[
            "switch first, with what was copied so far:",
            "the changesets do not get small",
        ],
    )?;
    let whole = lines(&report, "of it since before the switch; roots agree");
    ensure!(whole.len() == 1, "{report:#}");
    ensure!(stage.held(&plan)? >= FEW - (FEW >> 4), "{whole:?}");
    stage.writes_go_on(&CACHE)?;
    stage.check_data(&CACHE)?;
    stage.lab.down()
}

#[test]
fn a_copy_that_a_paired_device_carries_is_ended_when_a_forecast_says_that_it_comes_too_late()
-> Result<()> {
    let source = Device {
        policy: Some(FILLS.into()),
        migration: vec![
            "automatic: false".into(),
            // So that what is written all the time is worth rounds.
            format!("changeset_threshold_bytes: {}", 1 << 20),
        ],
        ..Device::new(SOURCE)
    };
    let devices = [source, device(TARGET, None), device(PAIRED, None)];
    let Some(stage) = Stage::up("switched-forecast", &devices, &[CACHE])? else {
        return Ok(());
    };
    let source = stage.source()?.clone();
    // It has no inode left in about five minutes: of those, unlike bytes, the machine's own disk has enough.
    let fills = "mkdir -p /srv/fills && mount -t tmpfs -o nr_inodes=1000 /dev/fills /srv/fills && \
                 cd /srv/fills && while i=$((i+1)) && : >$i; do sleep 0.33; done";
    source.spawn_logged("fills", ["sh", "-c", fills])?;
    let (big, place) = (
        format!("{}/big", CACHE.notes()),
        format!("{}/busy", CACHE.notes()),
    );
    source.run(["sh", "-c", &format!("head -c {LONG} /dev/urandom >{big}")])?;
    for device in [TARGET, PAIRED] {
        images::load_some(stage.lab.host(device)?, &["redis"])?;
    }
    let write = format!("head -c 64K /dev/urandom >{place}; sync {place}; sleep 0.15");
    let busy = Load::start(&source, &CACHE, &write)?;
    let mut arguments = vec!["evacuate", CACHE.name, "--yes"];
    arguments.extend(["--limit", "1MiB", "--delegate", "transfer"]);
    stage.crew.begin(SOURCE, "evacuate", &arguments)?;
    let plan = stage.plan()?;
    // The duplicator says which of the two others is the target.
    let target = wait_for("a target", PATIENCE, || {
        let (_, status) = stage.crew.ask(SOURCE, &["status"])?;
        Ok(status["plans"][0]["target"].as_str().map(str::to_owned))
    })?;
    let target = stage.lab.host(&target)?.clone();
    let report = wait_for_end(&stage.crew, SOURCE, &plan, PATIENCE * 2)
        .with_context(|| stage.crew.log(SOURCE))?;
    drop(busy);
    ensure!(report["state"] == "completed", "{report:#}");
    let choices = lines(&report, "copied (");
    says(&choices[0], &["copy first:"])?;
    says(
        choices.last().context("no choice")?,
        &[
            "switch first, with what was copied so far:",
            "copying would not be over in the",
            "that `fills` forecasts",
        ],
    )?;
    ensure!(
        lines(&report, "goes straight from here").len() == 1,
        "{report:#}"
    );
    ensure!(lines(&report, "roots agree").len() == 1, "{report:#}");
    let held = stage.held(&plan)?;
    println!("{held} of {LONG} bytes were there before the switch");
    ensure!(held > 1 << 20, "what was copied was sent again: {held}");
    stage.crew.tell(SOURCE, &["verify", &plan])?;
    stage.writes_go_on(&CACHE)?;
    stage.check_data_on(&target, &CACHE)?;
    stage.lab.down()
}

/// Lent to the source.
const PAIRED: &str = "paired";
/// Bytes whose copy takes four minutes at its limit, and with what changes meanwhile about seven.
const LONG: u64 = 240 << 20;
/// A policy that foretells when a file system is full, and moves nothing by itself.
const FILLS: &str = "version: 1
name: fills
thresholds:
  fills:
    metric: disk.inodes_used
    per: mount
    forecast: { reaches: 90%, within: 10m, over: 1m }
    optional: true
degraded:
  - any: [fills]
";

/// Writes one file anew, again and again, until the container is frozen: as a process of its cgroup.
fn busy(host: &Host) -> Result<Load> {
    let write = format!("head -c {BUSY} /dev/urandom >{}/busy", CACHE.notes());
    Load::start(host, &CACHE, &write)
}
