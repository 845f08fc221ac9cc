//! Switching first: twins run before their data is there, and nothing is lost or sent again whoever dies.

use anyhow::{Context as _, Result, ensure};
use lifeboat_tests::shop::says;
use lifeboat_tests::stage::{
    self, PATIENCE, SOURCE, Service, Stage, TARGET, device, dies_at, lines, policy, running,
};
use nix::sys::signal::Signal;
use std::process::Command;
use xtask::crew::{Device, wait_for_end};
use xtask::images;
use xtask::lab::{Fault, Host};
use xtask::process::{output, wait_for};

const CACHE: Service = Service {
    name: "cache",
    port: 6379,
};

/// What is copied before the switch.
const BULK: u64 = 48 << 20;

#[test]
fn twins_run_before_their_data_is_there_and_no_death_of_an_agent_loses_any() -> Result<()> {
    let devices = [device(SOURCE, None), device(TARGET, None)];
    let Some(mut stage) = Stage::up("switched", &devices, &[CACHE])? else {
        return Ok(());
    };
    let (source, target) = (stage.source()?.clone(), stage.target()?.clone());
    let big = format!("{}/big", CACHE.notes());
    source.run(["sh", "-c", &format!("head -c {LATER} /dev/urandom >{big}")])?;
    stage.lab.fault(&source, SLOW, PATIENCE * 5)?;
    let arguments = ["evacuate", CACHE.name, "--yes", "--switch-first"];
    stage.crew.begin(SOURCE, "evacuate", &arguments)?;
    let plan = stage.plan()?;

    arrives(&stage, 1)?;
    ensure!(running(&target)?.len() == 1, "the twin does not run");
    ensure!(running(&source)?.is_empty(), "the source's container runs");
    let told = stage.crew.tell(SOURCE, &["status"])?;
    says(&told, &["fill: switched first:", "MiB) there"])?;
    stage.writes_go_on(&CACHE)?;
    println!("{told}");

    stage.crew.kill_agent(TARGET)?;
    stage.crew.start_agent(TARGET)?;
    stage.writes_go_on(&CACHE)?;
    arrives(&stage, 2)?;
    // What came of the first block, and the twin has read, is not what the source has any more; nothing there says so.
    let begins = |path: &str| format!("head -c 7 {path} | sha256sum");
    let read = || target.podman(["exec", CACHE.name, "sh", "-c", &begins("/notes/big")]);
    read()?;
    let flip = format!(
        "cd {} && touch -r big /run/was && printf flipped | dd of=big conv=notrunc status=none && touch -r /run/was big",
        CACHE.notes()
    );
    source.run(["sh", "-c", &flip])?;
    stage.crew.kill_agent(SOURCE)?;
    stage.crew.start_agent(SOURCE)?;
    stage.writes_go_on(&CACHE)?;

    let report = wait_for_end(&stage.crew, SOURCE, &plan, PATIENCE * 3)
        .with_context(|| format!("{}\n{}", stage.crew.log(SOURCE), stage.crew.log(TARGET)))?;
    ensure!(report["state"] == "completed", "{report:#}");
    ensure!(lines(&report, "roots agree").len() == 1, "{report:#}");
    // What it cost the source is told as of any plan: giving out, and the reading that proves it.
    let cost = lines(&report, "given out and proven here");
    ensure!(cost.len() == 1, "{report:#}");
    says(
        &cost[0],
        &["on the wire; CPU of this device", "per GiB read"],
    )?;
    ensure!(report["source_cpu_per_gib"].is_object(), "{report:#}");
    ensure!(report["wire"].as_u64() > Some(LATER / 4), "{report:#}");
    let log = stage.crew.log(TARGET);
    let named = log.lines().find(|line| line.contains("fetched again"));
    says(
        named.context("the flipped bytes were not found")?,
        &["path=big", "offset=0"],
    )?;
    ensure!(
        read()? == source.run(["sh", "-c", &begins(&big)])?,
        "the twin goes on reading what was wrong"
    );
    let sum = |host: &Host| host.run(["sha256sum", &big]);
    ensure!(sum(&source)? == sum(&target)?, "`big` differs");
    stage.crew.tell(SOURCE, &["verify", &plan])?;
    stage.writes_go_on(&CACHE)?;
    stage.check_data(&CACHE)?;
    // The twin's next start is on the plain place, whatever becomes of the agent.
    let plain = |id: &str| -> Result<bool> {
        let mounts = target.podman(["exec", id, "cat", "/proc/mounts"])?;
        Ok(!mounts.contains("fuse.lifeboat"))
    };
    ensure!(
        !plain(CACHE.name)?,
        "the twin was started anew without need"
    );
    stage.crew.signal_agent(TARGET, Signal::SIGTERM)?;
    stage.crew.await_agent_end(TARGET, PATIENCE)?;
    ensure!(
        plain(CACHE.name)?,
        "the twin is still on a mount of the agent"
    );
    stage.writes_go_on(&CACHE)?;
    stage.check_data(&CACHE)?;
    let look =
        "ls -A /srv /var/lib/containers/storage/volumes/*; grep fuse.lifeboat /proc/mounts || true";
    let left = target.run(["sh", "-c", look])?;
    ensure!(!left.contains("lifeboat"), "{left}");
    stage.lab.down()
}

#[test]
fn a_death_before_the_release_lists_anew_and_one_after_the_proof_moves_the_data_to_its_place()
-> Result<()> {
    let devices = [
        device(SOURCE, Some("release")),
        device(TARGET, Some("proven")),
    ];
    let Some(mut stage) = Stage::up("switched-deaths", &devices, &[CACHE])? else {
        return Ok(());
    };
    let target = stage.target()?.clone();
    let notes = target.path(&CACHE.notes());
    let arguments = ["evacuate", CACHE.name, "--yes", "--switch-first"];
    stage.crew.begin(SOURCE, "evacuate", &arguments)?;
    stage.await_death(SOURCE)?;
    ensure!(
        running(&target)?.is_empty(),
        "a twin runs without a release"
    );
    let later = format!("{}/later", CACHE.notes());
    stage
        .source()?
        .run(["sh", "-c", &format!("echo known >{later}")])?;
    stage.crew.start_agent(SOURCE)?;
    stage.await_death(TARGET)?;
    stage.crew.start_agent(TARGET)?;
    let plan = stage.plan()?;
    let report = wait_for_end(&stage.crew, SOURCE, &plan, PATIENCE * 2)
        .with_context(|| format!("{}\n{}", stage.crew.log(SOURCE), stage.crew.log(TARGET)))?;
    ensure!(report["state"] == "completed", "{report:#}");
    ensure!(
        lines(&report, "agree on the lists").len() == 2,
        "{report:#}"
    );
    ensure!(
        notes.join("later").exists(),
        "the list is of before the death"
    );
    stage.crew.tell(SOURCE, &["verify", &plan])?;
    stage.writes_go_on(&CACHE)?;
    stage.check_data(&CACHE)?;
    let mounts = target.podman(["exec", CACHE.name, "cat", "/proc/mounts"])?;
    ensure!(!mounts.contains("fuse.lifeboat"), "{mounts}");
    stage.lab.down()
}

#[test]
fn a_plan_is_completed_when_its_twins_run_again_whichever_life_of_the_agent_starts_them()
-> Result<()> {
    let devices = [device(SOURCE, None), device(TARGET, Some("proven"))];
    let Some(mut stage) = Stage::up("switched-ended", &devices, &[CACHE])? else {
        return Ok(());
    };
    let target = stage.target()?.clone();
    let arguments = ["evacuate", CACHE.name, "--yes", "--switch-first"];
    stage.crew.begin(SOURCE, "evacuate", &arguments)?;
    stage.await_death(TARGET)?;
    // It ends the twin, brings the data to its place, and dies before it starts the twin.
    stage.crew.launch_agent(TARGET, &dies_at("start twins"))?;
    stage.await_death(TARGET)?;
    ensure!(running(&target)?.is_empty(), "the twin runs already");
    // No twin starts without its bind mount.
    let (notes, away) = (CACHE.notes(), format!("{}-away", CACHE.notes()));
    target.run(["mv", &notes, &away])?;
    stage.crew.start_agent(TARGET)?;
    let plan = stage.plan()?;
    wait_for("a source that waits for the twin", PATIENCE, || {
        let (_, status) = stage.crew.ask(SOURCE, &["status"])?;
        let text = status["plans"].to_string();
        Ok(text.contains("twin cache: ").then_some(()))
    })
    .with_context(|| stage.crew.log(SOURCE))?;
    target.run(["mv", &away, &notes])?;
    let report = wait_for_end(&stage.crew, SOURCE, &plan, PATIENCE * 2)
        .with_context(|| format!("{}\n{}", stage.crew.log(SOURCE), stage.crew.log(TARGET)))?;
    ensure!(report["state"] == "completed", "{report:#}");
    ensure!(running(&target)?.len() == 1, "completed without its twin");
    stage.crew.tell(SOURCE, &["verify", &plan])?;
    stage.writes_go_on(&CACHE)?;
    stage.check_data(&CACHE)?;
    // A twin that does not run proves nothing.
    target.podman(["stop", CACHE.name])?;
    let error = stage.crew.tell(SOURCE, &["verify", &plan]);
    let error = error.unwrap_or_else(|error| format!("{error:#}"));
    says(&error, &["0 of 1 twins are ready", "does not run"])?;
    stage.lab.down()
}

#[test]
fn what_was_prepared_is_not_sent_again_when_its_plan_switches_first_whoever_dies() -> Result<()> {
    let source = Device {
        policy: Some(policy(stage::Fault::None, "")),
        migration: vec!["prepare_pause_seconds: 1".into()],
        ..device(SOURCE, Some("release"))
    };
    let devices = [source, device(TARGET, Some("laid by"))];
    let Some(mut stage) = Stage::up("switched-prepared", &devices, &[CACHE])? else {
        return Ok(());
    };
    let (source, target) = (stage.source()?.clone(), stage.target()?.clone());
    let big = format!("{}/big", CACHE.notes());
    source.run(["sh", "-c", &format!("head -c {BULK} /dev/urandom >{big}")])?;
    // So that rounds are short, and the pauses between them.
    images::load_some(&target, &["redis"])?;
    stage.find(stage::Fault::Busy, "")?;
    let plan = stage.prepared_plan()?;
    wait_for("all of it on the target", PATIENCE, || {
        let there = std::fs::metadata(target.path(&big));
        let there = there.is_ok_and(|there| there.len() == BULK);
        Ok((there && stage.prepared_plan()? == plan).then_some(()))
    })?;
    let change = format!(
        "head -c {CHANGED} /dev/urandom | dd of={big} bs=1M seek=7 conv=notrunc status=none; sync {big}"
    );
    source.run(["sh", "-c", &change])?;
    let before = received(&target)?;
    let arguments = ["evacuate", CACHE.name, "--yes", "--switch-first"];
    stage.crew.begin(SOURCE, "evacuate", &arguments)?;
    stage.await_death(TARGET)?;
    stage.crew.start_agent(TARGET)?;
    stage.await_death(SOURCE)?;
    stage.crew.start_agent(SOURCE)?;
    let report = wait_for_end(&stage.crew, SOURCE, &plan, PATIENCE * 2)
        .with_context(|| format!("{}\n{}", stage.crew.log(SOURCE), stage.crew.log(TARGET)))?;
    ensure!(report["state"] == "completed", "{report:#}");
    let received = received(&target)? - before;
    println!("{received} bytes on the wire for a changeset of {CHANGED} in {BULK}");
    ensure!(received < BULK / 4, "{received} bytes were sent");
    ensure!(stage.held(&plan)? >= BULK - (BULK >> 4), "{report:#}");
    stage.crew.tell(SOURCE, &["verify", &plan])?;
    stage.writes_go_on(&CACHE)?;
    stage.check_data(&CACHE)?;
    stage.lab.down()
}

#[test]
fn what_changes_between_the_list_that_is_taken_ahead_and_the_last_one_is_as_it_was_at_last()
-> Result<()> {
    let devices = [device(SOURCE, None), device(TARGET, Some("listed ahead"))];
    let Some(mut stage) = Stage::up("switched-changes", &devices, &[CACHE])? else {
        return Ok(());
    };
    let source = stage.source()?.clone();
    let here = |script: &str| format!("cd {} && {script}", CACHE.notes());
    source.run(["sh", "-ec", &here(AHEAD)])?;
    let arguments = ["evacuate", CACHE.name, "--yes", "--switch-first"];
    stage.crew.begin(SOURCE, "evacuate", &arguments)?;
    stage.await_death(TARGET)?;
    stage.writes_go_on(&CACHE)?;
    source.run(["sh", "-ec", &here(AT_LAST)])?;
    stage.crew.start_agent(TARGET)?;
    proves_all(&stage)?;
    let log = stage.crew.log(TARGET);
    let brought = log.lines().filter(|line| line.contains("listed ahead"));
    let brought: Vec<&str> = brought.collect();
    ensure!(brought.len() == 2, "one for each volume: {brought:#?}");
    stage.lab.down()
}

#[test]
fn a_target_that_dies_while_it_brings_what_it_listed_ahead_to_the_last_list_does_so_again()
-> Result<()> {
    let devices = [device(SOURCE, None), device(TARGET, Some("revised"))];
    let Some(mut stage) = Stage::up("switched-revised", &devices, &[CACHE])? else {
        return Ok(());
    };
    let source = stage.source()?.clone();
    let here = |script: &str| format!("cd {} && {script}", CACHE.notes());
    source.run(["sh", "-ec", &here(AHEAD)])?;
    let arguments = ["evacuate", CACHE.name, "--yes", "--switch-first"];
    stage.crew.begin(SOURCE, "evacuate", &arguments)?;
    stage.await_death(TARGET)?;
    stage.crew.start_agent(TARGET)?;
    proves_all(&stage)?;
    stage.lab.down()
}

/// Waits for the end of the only plan, after which both sides have the same.
fn proves_all(stage: &Stage) -> Result<()> {
    let plan = stage.plan()?;
    let report = wait_for_end(&stage.crew, SOURCE, &plan, PATIENCE * 2)
        .with_context(|| format!("{}\n{}", stage.crew.log(SOURCE), stage.crew.log(TARGET)))?;
    ensure!(report["state"] == "completed", "{report:#}");
    ensure!(lines(&report, "roots agree").len() == 1, "{report:#}");
    stage.crew.tell(SOURCE, &["verify", &plan])?;
    // Where the lab keeps /srv: rsync does not go through /proc/PID/root.
    let notes = CACHE.notes();
    let side = |host: &Host| {
        let kept = stage.lab.dir().join(host.name());
        kept.join(notes.trim_start_matches('/')).join("")
    };
    let (one, other) = (side(stage.source()?), side(stage.target()?));
    for (from, to) in [(&one, &other), (&other, &one)] {
        let differs = output(
            Command::new("rsync")
                .args(["-aHAXSn", "--delete", "--checksum", "--itemize-changes"])
                .arg("--modify-window=-1")
                .args([from, to]),
        )?;
        ensure!(differs.is_empty(), "{differs}");
    }
    // Two FIFOs are never the same to `diff`.
    for host in [stage.source()?, stage.target()?] {
        host.run(["find", &CACHE.notes(), "-type", "p", "-delete"])?;
    }
    stage.writes_go_on(&CACHE)?;
    stage.check_data(&CACHE)
}

/// A tree with one of everything.
const AHEAD: &str = r"
    mkdir -p tree/moved/deep tree/directory/deep tree/gone/deep tree/many
    cd tree
    head -c 300000 /dev/urandom >moved/deep/file
    head -c 100000 /dev/urandom >grows
    head -c 200000 /dev/urandom >shrinks
    echo one >first; ln first second; ln first third
    echo file >file
    echo deep >directory/deep/file
    echo gone >gone/deep/file
    ln -s first link
    mkfifo fifo
    printf bytes >$(printf 'not-\377-utf8')
    echo mode >mode; echo emptied >emptied; : >filled
    for n in $(seq 200); do echo $n >many/$n; done";
/// What becomes of it.
const AT_LAST: &str = r"
    cd tree
    mv moved other
    head -c 50000 /dev/urandom >>grows
    truncate -s 777 shrinks
    rm first; echo another >new; mv new third
    rm file; mkdir file; echo inside >file/inside; ln second file/second
    rm -r directory; echo file >directory
    rm -r gone
    ln -sf second link
    rm fifo; mkfifo directory-no-more; echo file >fifo
    mv $(printf 'not-\377-utf8') $(printf 'nor-\376-this')
    chown 1000:1000 mode; chmod 2750 mode
    : >emptied; echo filled >filled
    rm many/7; echo more >many/201; touch -d 2001-02-03 many";

/// Bytes of a large file that change after it was copied.
const CHANGED: u64 = 200 << 10;

/// Bytes that a host received over its link.
fn received(host: &Host) -> Result<u64> {
    let counter = host.run(["cat", "/sys/class/net/eth0/statistics/rx_bytes"])?;
    Ok(counter.trim().parse()?)
}

/// Bytes that come behind the twin.
const LATER: u64 = 64 << 20;
/// A link over which they take a while.
const SLOW: Fault = Fault::Net {
    mbit: 40,
    loss_percent: 0,
};

/// Waits until so many MiB have arrived behind the twins, and not all.
fn arrives(stage: &Stage, mib: u64) -> Result<()> {
    wait_for("data behind the twins", PATIENCE, || {
        let (_, status) = stage.crew.ask(SOURCE, &["status"])?;
        let arrival = &status["plans"][0]["arrival"];
        let figure = |name: &str| arrival[name].as_u64();
        let (Some(bytes), Some(absent)) = (figure("bytes"), figure("absent")) else {
            return Ok(None);
        };
        ensure!(arrival["whole"] == false, "all was there before: {arrival}");
        Ok((bytes > 0 && bytes - absent >= mib << 20).then_some(()))
    })
    .with_context(|| format!("{}\n{}", stage.crew.log(SOURCE), stage.crew.log(TARGET)))
}
