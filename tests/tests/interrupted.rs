//! Moves that are interrupted by less than a death: agents that are told to end, and a source whose own disk is full.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use lifeboat_tests::shop::{self, FEW, Goods, SOURCE, TARGET, last_plan, says};
use nix::sys::signal::Signal;
use xtask::crew::{Crew, wait_for_end};
use xtask::process::wait_for;

const PATIENCE: Duration = Duration::from_secs(90);

/// Tells the agent of a device to end, as an init system does, and waits until it has.
fn end(crew: &mut Crew, device: &str) -> Result<()> {
    crew.signal_agent(device, Signal::SIGTERM)?;
    let status = crew.await_agent_end(device, PATIENCE)?;
    ensure!(status.success(), "{device}: {status}\n{}", crew.log(device));
    Ok(())
}

#[test]
fn a_move_whose_agents_are_told_to_end_goes_on_in_their_next_life() -> Result<()> {
    let Some(lab) = shop::lab("told-to-end", &[])? else {
        return Ok(());
    };
    let (source, target) = (lab.host(SOURCE)?, lab.host(TARGET)?);
    let mut crew = shop::fleet(&lab, |_| ())?;
    let goods = Goods {
        large_mib: 0,
        files: 80,
        file_kib: 512,
    };
    shop::open(&crew, goods)?;
    let before = shop::digest(source)?;
    // 40 MiB take more than fifteen seconds.
    lab.shape(target, Some(20))?;
    let evacuate = ["evacuate", "--all", "--yes"];
    let mut evacuation = crew.begin(SOURCE, "evacuate", &evacuate)?;
    let small = target.path(&format!("{}/kept/small", shop::DATA));
    let arrived = || std::fs::read_dir(&small).map_or(0, Iterator::count);
    let some = |least: usize| {
        wait_for("data on the target", PATIENCE, || {
            Ok((arrived() >= least).then_some(()))
        })
    };
    some(5)?;
    end(&mut crew, SOURCE)?;
    // Its client was told so.
    evacuation.wait()?;
    shop::runs_on(source)?;
    let there = arrived();
    ensure!(there < 80, "everything had arrived");
    crew.launch_agent(SOURCE, &[])?;
    some(there + 5)?;
    end(&mut crew, TARGET)?;
    shop::runs_on(source)?;
    ensure!(arrived() < 80, "everything had arrived");
    crew.start_agent(TARGET)?;
    lab.shape(target, None)?;
    let plan = last_plan(&crew)?["plan"]
        .as_str()
        .unwrap_or_default()
        .to_owned();
    let report = wait_for_end(&crew, SOURCE, &plan, PATIENCE)?;
    ensure!(report["state"] == "completed", "{report}");
    shop::runs_on(target)?;
    ensure!(shop::digest(target)? == before, "the target's data differs");
    lab.down()
}

#[test]
fn a_source_whose_own_disk_is_full_says_so_and_its_containers_run_on() -> Result<()> {
    let Some(lab) = shop::lab("full-source", &[])? else {
        return Ok(());
    };
    let source = lab.host(SOURCE)?;
    let state = "/var/lib/lifeboat";
    source.run(["mkdir", "-p", state])?;
    source.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", state])?;
    let crew = shop::fleet(&lab, |_| ())?;
    shop::open(&crew, FEW)?;
    let before = shop::digest(source)?;

    let fill = format!("cat /dev/zero >{state}/filler 2>/dev/null; true");
    source.run(["sh", "-c", &fill])?;
    let error = shop::refused(&crew)?;
    says(&error, &["journal", "No space left", "free space"])?;
    shop::runs_on(source)?;
    shop::nothing_left_on(lab.host(TARGET)?)?;

    source.run(["rm", &format!("{state}/filler")])?;
    shop::moved(&lab, &crew, &before).with_context(|| crew.log(SOURCE))?;
    lab.down()
}
