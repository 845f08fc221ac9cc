//! What an aborted plan made on its target and cannot be removed there: told of, and removed once that can be. Needs root.

use anyhow::{Result, ensure};
use lifeboat_tests::shop::says;
use lifeboat_tests::stage::{
    Fault, PATIENCE, SOURCE, Service, Stage, TARGET, device, lines, policy,
};
use xtask::crew::{Device, wait_for_end};
use xtask::images;
use xtask::process::wait_for;

const CACHE: Service = Service {
    name: "cache",
    port: 6379,
};

#[test]
fn what_a_target_cannot_remove_is_in_the_report_and_goes_as_soon_as_it_can_and_nothing_else_does()
-> Result<()> {
    let source = Device {
        policy: Some(policy(Fault::None, "")),
        migration: vec!["prepare_pause_seconds: 1".into()],
        ..Device::new(SOURCE)
    };
    let Some(mut stage) = Stage::up("left", &[source, device(TARGET, None)], &[CACHE])? else {
        return Ok(());
    };
    let target = stage.target()?.clone();
    target.run(["mount", "-t", "tmpfs", "tmpfs", "/srv"])?;
    images::load_some(&target, &["redis"])?;
    stage.find(Fault::Busy, "")?;
    let plan = stage.prepared_plan()?;
    let volumes = || target.podman(["volume", "ls", "--quiet"]);
    ensure!(volumes()?.contains("cache-data"), "{}", volumes()?);
    // Not while a round writes there.
    wait_for("a file system that takes no writes", PATIENCE, || {
        Ok(target.run(["mount", "-o", "remount,ro", "/srv"]).ok())
    })?;
    let (code, answer) = stage.crew.ask(SOURCE, &["abort", &plan])?;
    ensure!(code == 0, "{answer}");
    let report = wait_for_end(&stage.crew, SOURCE, &plan, PATIENCE)?;
    let told = lines(&report, "could not remove");
    ensure!(told.len() == 1, "{report:#}");
    says(
        &told[0],
        &[&CACHE.notes(), "Read-only file system", "tried again"],
    )?;
    ensure!(volumes()?.is_empty(), "{}", volumes()?);

    // The next life goes on with it, and has nothing to do with what has a name of the plan by now.
    target.podman(["volume", "create", "cache-data"])?;
    stage.crew.kill_agent(TARGET)?;
    stage.crew.start_agent(TARGET)?;
    target.run(["mount", "-o", "remount,rw", "/srv"])?;
    wait_for("the end of what was left", PATIENCE * 3, || {
        let left = target.run(["ls", "/srv"])?;
        Ok((!left.contains("cache-notes")).then_some(()))
    })?;
    ensure!(volumes()?.contains("cache-data"), "somebody else's is gone");
    target.run(["umount", "/srv"])?;
    stage.lab.down()
}
