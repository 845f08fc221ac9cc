//! From a fault to the verdict, beyond the time that the policy itself asks for.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::{goal, machine, median};
use crate::crew::{Crew, Device};
use crate::lab::{Lab, LabSpec};
use crate::process::wait_for;

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

pub(super) fn measure(short: bool) -> Result<String> {
    let runs = if short { 1 } else { 15 };
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
    let is = |wanted: &str| -> Result<Option<()>> {
        let (_, status) = crew.ask(DEVICE, &["status"])?;
        Ok((status["view"]["verdict"]["kind"] == wanted).then_some(()))
    };
    let mut beyond = Vec::new();
    for _ in 0..runs {
        wait_for("a healthy device", Duration::from_secs(30), || {
            is("healthy")
        })?;
        let mut fault = host.spawn_logged("fault", ["sh", "-c", FAULT])?;
        let start = Instant::now();
        wait_for("the verdict", Duration::from_secs(30), || is("degraded"))?;
        beyond.push(start.elapsed().saturating_sub(POLICY_TIME).as_secs_f64());
        fs::write(host.cgroup().join("fault/cgroup.kill"), "1").context("cannot end the fault")?;
        fault.wait().context("the fault was lost")?;
    }
    lab.down()?;
    let worst = beyond.iter().copied().fold(0.0, f64::max);
    Ok(format!(
        "## From fault to verdict\n\nA threshold on waiting tasks with `for: 2s`; from the start of the fault until `lifeboat status` \
         says degraded, without those 2 s; {runs} runs.\n\n\
         | what | | goal |\n|---|---|---|\n\
         | median | {:.2} s | |\n| worst | {worst:.2} s | {} |\n",
        median(&beyond),
        goal("at most 1 s", worst <= 1.0),
    ))
}
