//! A copy beside a workload that uses the same disk: it is slowed for the workload's sake, and no longer than that.

use anyhow::{Context as _, Result, ensure};
use lifeboat_tests::stage::{Load, PATIENCE, SOURCE, Service, Stage, TARGET, device};
use serde_json::Value;
use xtask::crew::{Device, wait_for_end};
use xtask::lab::Host;
use xtask::process::wait_for;

const CACHE: Service = Service {
    name: "cache",
    port: 6379,
};

/// Random bytes to move beside the image.
const BULK: u64 = 96 << 20;
const MINIMUM: u64 = 4 << 20;

#[test]
fn a_workload_on_the_disk_slows_the_copy_and_its_end_lets_it_go() -> Result<()> {
    let source = Device {
        migration: vec![
            "workload_loss_max_percent: 0".into(),
            format!("rate_min_bytes: {MINIMUM}"),
        ],
        ..device(SOURCE, None)
    };
    let Some(stage) = Stage::up("rates", &[source, device(TARGET, None)], &[CACHE])? else {
        return Ok(());
    };
    let source = stage.source()?.clone();
    let big = format!("{}/big", CACHE.notes());
    let fill = format!("head -c {BULK} /dev/urandom >{big} && cp {big} /srv/load && sync");
    source.run(["sh", "-c", &fill])?;
    let load = load(&source)?;
    wait_for("the load in the agent's eyes", PATIENCE, || {
        let (_, status) = stage.crew.ask(SOURCE, &["status"])?;
        let containers = &status["view"]["snapshot"]["containers"];
        let busy = |stats: &Value| {
            stats["name"] == CACHE.name && stats["block"]["reads"]["iops"].as_f64() > Some(20.0)
        };
        Ok(containers
            .as_array()
            .is_some_and(|all| all.iter().any(busy))
            .then_some(()))
    })
    .with_context(|| stage.crew.log(SOURCE))?;

    let evacuate = ["evacuate", CACHE.name, "--yes", "--limit", "64MiB"];
    stage.crew.begin(SOURCE, "evacuate", &evacuate)?;
    let plan = stage.plan()?;
    let limits = || -> Result<Option<Value>> {
        let (_, status) = stage.crew.ask(SOURCE, &["status"])?;
        let plans = status["plans"].as_array().cloned().unwrap_or_default();
        let known = plans
            .into_iter()
            .find(|known| known["plan"] == plan.as_str());
        Ok(known
            .filter(|known| known["phase"] == "replicate")
            .map(|known| known["limits"].clone()))
    };
    let slowed = wait_for("a copy that is slowed", PATIENCE, || {
        Ok(limits()?.filter(|limits| {
            let rate = limits["workload"].as_u64();
            rate.is_some_and(|rate| rate == MINIMUM)
        }))
    })
    .with_context(|| stage.crew.log(SOURCE))?;
    println!("{slowed}");
    ensure!(slowed["workload_loss_percent"].is_number(), "{slowed}");
    ensure!(slowed["cap"] == 64 << 20, "{slowed}");
    let status = stage.crew.tell(SOURCE, &["status"])?;
    ensure!(status.contains("(spares the workload"), "{status}");

    drop(load);
    wait_for("a copy that is let go", PATIENCE, || {
        let limits = limits()?;
        Ok(limits
            .is_none_or(|limits| limits["workload"].is_null())
            .then_some(()))
    })?;
    let report = wait_for_end(&stage.crew, SOURCE, &plan, PATIENCE)?;
    ensure!(report["state"] == "completed", "{report:#}");
    stage.writes_go_on(&CACHE)?;
    stage.check_data(&CACHE)?;
    stage.lab.down()
}

/// Reads a file past the page cache, again and again, as a process of the container's cgroup.
fn load(host: &Host) -> Result<Load> {
    let read = "dd if=/srv/load of=/dev/null bs=16k iflag=direct status=none";
    Load::start(host, &CACHE, read)
}
