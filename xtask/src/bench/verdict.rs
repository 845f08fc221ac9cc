//! From a fault to the verdict, beyond the time that the policy itself asks for.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::{goal, machine, median};
use crate::crew::{Crew, Device};
use crate::lab::{Lab, LabSpec};
use crate::process::wait_for;
use crate::setup;

const DEVICE: &str = "judged";

/// What the policy waits for by itself.
const POLICY_TIME: Duration = Duration::from_secs(2);
const POLICY: &str = "version: 1
name: bench
thresholds:
  crowd:
    metric: sched.waiting
    above: 6
    clear: 4
    for: 2s
degraded:
  - any: [crowd]
guards:
  hold: 1s
";

/// Many more tasks that want a CPU than there are CPUs.
const FAULT: &str = "for n in $(seq 24); do busybox yes >/dev/null & done; wait";

/// Two processes that wake each other: so often that the agent only samples the scheduler.
const SWITCHING: [&str; 6] = ["perf", "bench", "sched", "pipe", "-l", "1000000000"];

pub(super) fn measure(short: bool) -> Result<String> {
    let runs = if short { 1 } else { 15 };
    setup::provide("perf", "linux-perf", "`perf bench sched pipe`")?;
    let lab = Lab::up(&LabSpec {
        name: format!("verdict-{}", std::process::id()),
        hosts: vec![machine::bare("duplicator"), machine::bare(DEVICE)],
    })?;
    let device = Device {
        policy: Some(POLICY.to_owned()),
        ..Device::new(DEVICE)
    };
    let crew = Crew::start(&lab, "duplicator", &[device])?;
    let host = lab.host(DEVICE)?;
    let delays = |sampled: bool| -> Result<(f64, f64)> {
        let mut beyond = Vec::new();
        for _ in 0..runs {
            wait_for("a healthy device", Duration::from_secs(30), || {
                let (_, status) = crew.ask(DEVICE, &["status"])?;
                let is_sampled = status["view"]["snapshot"]["watched_percent"].is_number();
                let healthy = status["view"]["verdict"]["kind"] == "healthy";
                Ok((healthy && is_sampled == sampled).then_some(()))
            })?;
            let mut fault = host.spawn_logged("fault", ["sh", "-c", FAULT])?;
            let start = Instant::now();
            wait_for("the verdict", Duration::from_secs(30), || {
                let (_, status) = crew.ask(DEVICE, &["status"])?;
                Ok((status["view"]["verdict"]["kind"] == "degraded").then_some(()))
            })?;
            beyond.push(start.elapsed().saturating_sub(POLICY_TIME).as_secs_f64());
            fs::write(host.cgroup().join("fault/cgroup.kill"), "1")
                .context("cannot end the fault")?;
            fault.wait().context("the fault was lost")?;
        }
        Ok((median(&beyond), beyond.iter().copied().fold(0.0, f64::max)))
    };
    let calm = delays(false)?;
    let mut switching = host.spawn_logged("switching", SWITCHING)?;
    let sampled = delays(true)?;
    fs::write(host.cgroup().join("switching/cgroup.kill"), "1")?;
    switching.wait().context("the load was lost")?;
    lab.down()?;
    let row = |host: &str, (median, worst): (f64, f64)| {
        let goal = goal("at most 1 s", worst <= 1.0);
        format!("| {host} | {median:.2} s | {worst:.2} s | {goal} |\n")
    };
    Ok(format!(
        "## From fault to verdict\n\nA threshold on waiting tasks with `for: 2s`; from the start of the fault until `lifeboat status` \
         says degraded, without those 2 s; {runs} runs each.\n\n\
         | before the fault | median | worst | goal |\n|---|---|---|---|\n{}{}",
        row("a calm host", calm),
        row(
            "two processes wake each other, so that the scheduler is only sampled",
            sampled
        ),
    ))
}
