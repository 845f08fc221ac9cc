//! An image upon a base that the target holds: only what is new of it goes over the wire.

use anyhow::{Context as _, Result, ensure};
use lifeboat_tests::stage::{PATIENCE, SOURCE, Stage, TARGET, device};
use serde_json::Value;
use std::fs;
use xtask::images;
use xtask::process::wait_for;

/// Random bytes upon the base.
const GROWN: u64 = 2_000_000;

#[test]
fn a_base_image_that_the_target_has_costs_nothing() -> Result<()> {
    let devices = [device(SOURCE, None), device(TARGET, None)];
    let Some(stage) = Stage::up("layers", &devices, &[])? else {
        return Ok(());
    };
    let (source, target) = (stage.source()?, stage.target()?);
    images::load_some(target, &["redis"])?;
    let base = "localhost/redis:demo";
    let grow = format!("head -c {GROWN} /dev/urandom >/grown");
    source.podman([
        "run",
        "--name",
        "grower",
        "--entrypoint",
        "sh",
        base,
        "-c",
        &grow,
    ])?;
    source.podman(["commit", "--quiet", "grower", "localhost/grown:1"])?;
    source.podman(["rm", "grower"])?;
    let entry = "--entrypoint=[\"sleep\", \"1000\"]";
    let run = [
        "run",
        "--detach",
        "--name",
        "grown",
        entry,
        "localhost/grown:1",
    ];
    source.podman(run)?;
    let sum = ["exec", "grown", "sh", "-c", "md5sum /grown /bin/sh"];
    let before = source.podman(sum)?;
    let size = source.podman(["image", "inspect", "--format", "{{.Size}}", base])?;
    let size: u64 = size.trim().parse()?;

    wait_for("the container in the agent's eyes", PATIENCE, || {
        let (_, status) = stage.crew.ask(SOURCE, &["status"])?;
        let seen = status["view"]["containers"]
            .to_string()
            .contains("\"grown\"");
        Ok(seen.then_some(()))
    })?;
    stage.crew.tell(SOURCE, &["evacuate", "grown", "--yes"])?;
    ensure!(target.podman(sum)? == before, "the twin's image differs");
    let plan = stage.plan()?;
    let journal = format!("/var/lib/lifeboat/plans/{plan}.source/journal.jsonl");
    let text = fs::read_to_string(source.path(&journal)).context(journal)?;
    let mut wire = 0;
    for line in text.lines() {
        let event = &serde_json::from_str::<Value>(line)?["event"];
        let volumes = event["volumes"].as_array().into_iter().flatten();
        wire += volumes
            .filter_map(|volume| volume["wire"].as_u64())
            .sum::<u64>();
    }
    println!("{wire} bytes on the wire; the base has {size}");
    ensure!(
        (GROWN..GROWN + size / 20).contains(&wire),
        "{wire} bytes on the wire for {GROWN} new ones upon {size}"
    );
    stage.lab.down()
}
