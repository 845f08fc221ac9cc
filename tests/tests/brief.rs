//! Containers born and gone between two sweeps are told of by name. Needs root.

use anyhow::{Context as _, Result};
use lifeboat::model::metric::Per;
use lifeboat::telemetry::{Telemetry, TelemetryConfig};
use lifeboat_tests::boxes::{SECOND, lab, runtimes, start};
use lifeboat_tests::scope::now;
use std::path::PathBuf;
use std::thread::sleep;
use std::time::{Duration, Instant};
use xtask::process::wait_for;

#[test]
fn a_container_that_no_sweep_saw_alive_has_its_delay_and_its_edge_by_name() -> Result<()> {
    let Some(lab) = lab("brief", &["host"])? else {
        return Ok(());
    };
    let host = lab.host("host")?;
    start(host, "server", &[], &["httpd", "-f", "-p", "8080"])?;
    let format = "{{.NetworkSettings.IPAddress}}";
    let address = host.podman(["inspect", "--format", format, "server"])?;
    let runtimes = runtimes(host);
    let runtime = tokio::runtime::Runtime::new()?;
    let mut senses = Telemetry::start(TelemetryConfig {
        root: PathBuf::from("/"),
        cgroup: host.cgroup().to_owned(),
        edge_age: Duration::from_secs(3600),
        remembered: Vec::new(),
        limits: Default::default(),
    });
    let mut sweep = || {
        let discovery = runtime.block_on(runtimes.follow());
        senses.hear(discovery.heard);
        senses.sweep(&discovery.containers, now())
    };
    // Its events are followed from a while after the first look.
    let settled = Instant::now() + 4 * SECOND;
    while Instant::now() < settled {
        sweep();
        sleep(Duration::from_millis(300));
    }
    // No sweep while it lives.
    let script = format!("echo | nc -w 1 {} 8080; echo x > /x; :", address.trim());
    let podman = [
        "run",
        "--rm",
        "--name",
        "brief",
        "localhost/box:1",
        "sh",
        "-c",
    ];
    host.podman(podman.iter().copied().chain([script.as_str()]))?;
    let (delay, edge) = wait_for("what it did", 20 * SECOND, || {
        let snapshot = sweep();
        let mut ended = snapshot.ended.iter();
        let delay = ended.find(|sample| {
            let subject = &sample.subject;
            (sample.metric == "sched.run_queue_latency_p99" && subject.per == Per::Container)
                && subject.name == "brief"
        });
        let mut edges = snapshot.edges.iter();
        let edge = edges.find(|edge| edge.child.as_str() == "brief");
        sleep(Duration::from_millis(300));
        Ok(delay.cloned().zip(edge.cloned()))
    })?;
    assert!(delay.value > 0.0, "{delay:?}");
    assert_eq!((edge.parent.as_str(), edge.port), ("server", 8080));
    let snapshot = sweep();
    let judged = |name: &str| {
        let mut samples = snapshot.samples.iter();
        samples.any(|sample| sample.subject.name == name)
    };
    assert!(
        judged("server") && !judged("brief"),
        "nobody judges the dead"
    );
    drop(senses);
    lab.down().context("the lab stays")
}
