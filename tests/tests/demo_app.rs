//! The demo application, its load and the proof, without a migration: if these lie, every later proof does.

use std::time::Duration;

use anyhow::{Context, Result};
use xtask::demo_app;
use xtask::lab::{Lab, LabSpec};
use xtask::load::Load;
use xtask::process::wait_for;

#[test]
fn the_proof_holds_across_restarts_of_the_databases_and_fails_for_one_lost_write() -> Result<()> {
    let lab = Lab::up(&LabSpec::of("app", &["source", "client"]))?;
    let (source, client) = (lab.host("source")?, lab.host("client")?);
    demo_app::deploy(source)?;

    let load = Load::start(client, "http://source:8080", 4)?;
    let grows = |by: usize| {
        let target = load.ledger()?.entries().len() + by;
        wait_for("acknowledged writes", Duration::from_secs(90), || {
            Ok((load.ledger()?.entries().len() >= target).then_some(()))
        })
        .with_context(|| demo_app::state(source))
    };
    grows(50)?;
    // By their processes, for which the restart policy is there. Podman applies it to nothing that it killed itself, and
    // its `restart` gives another address, after which the name server of Debian 12 may answer nobody for a while.
    for (container, signal) in [("db", "-KILL"), ("cache", "-TERM")] {
        let pid = source.podman(["inspect", "--format", "{{.State.Pid}}", container])?;
        source.run(["kill", signal, &pid])?;
        grows(50)?;
    }
    let ledger = load.stop()?;
    let proof = ledger.check(source)?;
    assert!(proof.holds(), "{proof:?}");
    assert_eq!(proof.acknowledged, ledger.entries().len());

    let lost = &ledger.entries()[7].id;
    source.podman([
        "exec",
        "cache",
        "redis-cli",
        "DEL",
        &format!("write:{lost}"),
    ])?;
    let proof = ledger.check(source)?;
    assert_eq!(proof.missing_in_redis, [lost.as_str()]);
    assert!(proof.missing_in_postgres.is_empty() && !proof.holds());
    lab.down()
}
