//! A policy that changes under a running agent, and a verdict that outlives the agent.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use lifeboat_tests::shop::{logged, says};
use nix::sys::signal::Signal;
use serde_json::Value;
use xtask::crew::{Crew, Device};
use xtask::lab::{HostSpec, Lab, LabSpec};
use xtask::process::{is_root, wait_for};
use xtask::workspace;

const DEVICE: &str = "device";
const POLICY: &str = "/etc/lifeboat/policy.yaml";

/// A policy by which every machine is degraded (no machine has a pebibyte free), or none is.
fn policy(name: &str, failing: bool, hold: &str) -> String {
    let limit = if failing { "1024TiB" } else { "1KiB" };
    format!(
        "version: 1
name: {name}
thresholds:
  {name}-memory:
    metric: memory.available
    below: {limit}
degraded:
  - any: [{name}-memory]
guards:
  hold: {hold}
"
    )
}

fn crew(name: &str, first: &str) -> Result<Option<(Lab, Crew)>> {
    if !is_root() {
        eprintln!("skipped: lab hosts need root");
        return Ok(None);
    }
    let mut spec = LabSpec::of(name, &[]);
    spec.hosts = [DEVICE, "duplicator"]
        .map(|host| HostSpec {
            containers: false,
            ..host.into()
        })
        .into();
    let lab = Lab::up(&spec)?;
    let device = Device {
        policy: Some(first.to_owned()),
        ..Device::new(DEVICE)
    };
    let crew = Crew::start(&lab, "duplicator", &[device])?;
    Ok(Some((lab, crew)))
}

fn verdict(crew: &Crew) -> Result<Value> {
    let (_, status) = crew.ask(DEVICE, &["status"])?;
    Ok(status["view"]["verdict"].clone())
}

/// Waits for a verdict of this kind that rests on a sample of `threshold`, or on none when it is empty.
fn wait_for_verdict(crew: &Crew, kind: &str, threshold: &str) -> Result<Value> {
    let what = format!("the verdict {kind} by {threshold:?}");
    wait_for(&what, Duration::from_secs(15), || {
        let verdict = verdict(crew)?;
        let because = verdict["evidence"][0]["threshold"].as_str();
        Ok(
            (verdict["kind"] == kind && because.unwrap_or_default() == threshold)
                .then_some(verdict),
        )
    })
}

fn reload(lab: &Lab, crew: &Crew, text: &str) -> Result<()> {
    lab.host(DEVICE)?.write(POLICY, text)?;
    crew.signal_agent(DEVICE, Signal::SIGHUP)
}

#[test]
fn a_broken_policy_never_replaces_a_good_one_and_a_good_one_is_applied() -> Result<()> {
    let Some((lab, crew)) = crew("reload", &policy("first", true, "0s"))? else {
        return Ok(());
    };
    let before = wait_for_verdict(&crew, "degraded", "first-memory")?;

    let broken = policy("second", false, "0s").replace("below:", "beneath:");
    reload(&lab, &crew, &broken)?;
    let line = logged(|| crew.log(DEVICE), &["the old one stays"])?;
    let place = format!("{POLICY}:6:5");
    says(&line, &[&place, "thresholds.second-memory", "beneath"])?;
    let problems = || -> Result<String> {
        let (_, status) = crew.ask(DEVICE, &["status"])?;
        Ok(status["view"]["problems"].to_string())
    };
    wait_for("the refusal in the status", Duration::from_secs(10), || {
        let told = problems()?;
        Ok((told.contains("from before is in force") && told.contains(&place)).then_some(()))
    })?;
    let sample = |verdict: &Value| verdict["evidence"][0]["last_sample"].as_u64();
    let later = wait_for("a later sample", Duration::from_secs(10), || {
        let later = verdict(&crew)?;
        Ok((sample(&later) > sample(&before)).then_some(later))
    })?;
    ensure!(
        later["kind"] == "degraded"
            && later["evidence"][0]["threshold"] == "first-memory"
            && later["since"] == before["since"],
        "the old policy did not go on: {later}"
    );

    reload(&lab, &crew, &policy("third", true, "0s"))?;
    wait_for_verdict(&crew, "degraded", "third-memory")?;
    let told = problems()?;
    ensure!(!told.contains("in force"), "{told}");
    reload(&lab, &crew, &policy("fourth", false, "0s"))?;
    wait_for_verdict(&crew, "healthy", "")?;
    Ok(())
}

#[test]
fn an_agent_starts_with_a_policy_that_cannot_be_used_and_judges_on_as_soon_as_it_can() -> Result<()>
{
    let good = policy("first", true, "0s");
    let Some((lab, mut crew)) = crew("upgraded", &good)? else {
        return Ok(());
    };
    let before = wait_for_verdict(&crew, "degraded", "first-memory")?;
    let host = lab.host(DEVICE)?;
    for (text, place) in [
        (good.replace("TiB", "TeB"), format!("{POLICY}:6:12")),
        (good.replace("name: first\n", ""), POLICY.to_owned()),
    ] {
        crew.kill_agent(DEVICE)?;
        host.write(POLICY, text)?;
        crew.start_agent(DEVICE)?;
        let unknown = wait_for_verdict(&crew, "unknown", "")?;
        says(
            &unknown["missing"].to_string(),
            &["the policy cannot be used", &place],
        )?;
        says(&crew.log(DEVICE), &["the policy cannot be used", &place])?;
        for command in ["status", "explain"] {
            let told = crew.tell(DEVICE, &[command])?;
            says(&told, &["the policy cannot be used", &place])?;
        }
        // It has not lost its memory by then.
        host.write(POLICY, &good)?;
        let after = wait_for_verdict(&crew, "degraded", "first-memory")?;
        ensure!(
            after["since"] == before["since"],
            "before: {before}\nafter: {after}"
        );
    }
    // From then on it is one that is in force.
    reload(&lab, &crew, &good.replace("below:", "beneath:"))?;
    logged(|| crew.log(DEVICE), &["the old one stays"])?;
    wait_for_verdict(&crew, "degraded", "first-memory")?;
    Ok(())
}

#[test]
fn a_held_degraded_verdict_and_its_age_survive_kill_9() -> Result<()> {
    let Some((lab, mut crew)) = crew("survives", &policy("first", true, "10m"))? else {
        return Ok(());
    };
    let degraded = wait_for_verdict(&crew, "degraded", "first-memory")?;
    // Now nothing fails any more, and only the hold keeps the verdict.
    reload(&lab, &crew, &policy("second", false, "10m"))?;
    let held = wait_for_verdict(&crew, "degraded", "")?;
    ensure!(held["held_until"].is_u64(), "nothing holds it: {held}");
    crew.kill_agent(DEVICE)?;
    crew.start_agent(DEVICE)?;
    let after = wait_for_verdict(&crew, "degraded", "")?;
    ensure!(
        after["since"] == degraded["since"] && after["held_until"] == held["held_until"],
        "before: {degraded}\nheld: {held}\nafter the restart: {after}"
    );
    Ok(())
}

#[test]
fn a_pause_is_told_and_survives_kill_9_and_a_recording_is_judged_as_the_agent_did() -> Result<()> {
    let Some((lab, mut crew)) = crew("paused", &policy("first", true, "0s"))? else {
        return Ok(());
    };
    wait_for_verdict(&crew, "degraded", "first-memory")?;
    let host = lab.host(DEVICE)?;
    let lifeboat = workspace::binary("lifeboat");
    let run = |words: &[&str]| -> Result<String> {
        let argv = std::iter::once(lifeboat.as_os_str()).chain(words.iter().map(AsRef::as_ref));
        let output = host.command(argv).output()?;
        let told = String::from_utf8_lossy(&output.stdout).into_owned();
        let error = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{words:?}: {told}{error}");
        Ok(told)
    };

    run(&["policy", "pause", "--for", "2h", "--why", "new fans"])?;
    crew.kill_agent(DEVICE)?;
    crew.start_agent(DEVICE)?;
    wait_for_verdict(&crew, "degraded", "first-memory")?;
    says(&run(&["status"])?, &["paused until", "new fans"])?;
    says(
        &run(&["explain"])?,
        &[
            "device is degraded, stage evacuate since",
            "by any: [first-memory]",
            "The limit was passed first at",
            "An operator paused the policy (new fans)",
        ],
    )?;
    says(&run(&["policy", "resume"])?, &["resumed", "new fans"])?;
    ensure!(!run(&["status"])?.contains("paused"), "still paused");

    // Two recorders after each other: the second continues the file.
    let file = "/etc/lifeboat/day.rec";
    run(&["record", "-o", file, "--for", "4s"])?;
    run(&["record", "-o", file, "--for", "3s"])?;
    let replayed = run(&["policy", "replay", file, "--policy", POLICY, "--json"])?;
    let replay: Value = serde_json::from_str(&replayed)?;
    let events = replay["events"].as_array().context("no events")?;
    let starts = events.iter().filter(|event| event["event"] == "started");
    ensure!(starts.count() == 2, "{replayed}");
    let first = events
        .iter()
        .find(|event| event["event"] == "verdict")
        .context("no verdict")?;
    ensure!(
        first["verdict"]["kind"] == "degraded"
            && first["acts"] == true
            && first["verdict"]["evidence"][0]["threshold"] == "first-memory",
        "{first}"
    );
    let summary = &replay["summary"];
    ensure!(
        summary["sweeps"].as_u64() >= Some(5) && summary["torn"] == 0,
        "{summary}"
    );
    let again = run(&["policy", "replay", file, "--policy", POLICY, "--json"])?;
    ensure!(again == replayed, "not deterministic");
    // What follows an altered byte is not passed over in silence.
    let alter = format!("printf '\\377' | dd of={file} bs=1 seek=200 conv=notrunc status=none");
    let altered = host.command(["sh", "-c", &alter]).status()?;
    ensure!(altered.success(), "the recording was not altered");
    match run(&["policy", "replay", file, "--policy", POLICY]) {
        Ok(told) => bail!("an altered recording passed: {told}"),
        Err(error) => says(&format!("{error:#}"), &["altered at byte", "not judged"])?,
    }

    // A device of no fleet moves nothing, and says so also while it is well.
    reload(&lab, &crew, &policy("second", false, "0s"))?;
    wait_for_verdict(&crew, "healthy", "")?;
    says(
        &run(&["explain"])?,
        &["Nothing moves by itself", "in no fleet"],
    )?;
    Ok(())
}
