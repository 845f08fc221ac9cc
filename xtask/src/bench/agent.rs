//! What an agent with 50 containers costs while nothing happens: its memory, its CPU, and the CPU it
//! makes the container runtime use.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::unistd::{SysconfVar, sysconf};

use super::{goal, machine};
use crate::crew::{Crew, Device};
use crate::lab::{Host, Lab, LabSpec};
use crate::process::wait_for;
use crate::workspace;

const CONTAINERS: usize = 50;
const DEVICE: &str = "many";

/// An image of nothing but busybox, made and imported inside the host.
const IMAGE: &str = r#"mkdir -p /tmp/image/bin && cp "$(command -v busybox)" /tmp/image/bin/busybox &&
ln -s busybox /tmp/image/bin/sleep && tar -c -C /tmp/image . | podman --log-level error import --quiet - localhost/idle:1"#;

pub(super) fn measure(short: bool) -> Result<String> {
    let idle = Duration::from_secs(if short { 10 } else { 30 });
    let lab = Lab::up(&LabSpec {
        name: format!("agent-{}", std::process::id()),
        hosts: vec![machine::bare("duplicator"), DEVICE.into()],
    })?;
    let host = lab.host(DEVICE)?;
    host.run(["sh", "-c", IMAGE])?;
    for number in 0..CONTAINERS {
        let name = format!("idle-{number}");
        let options = ["run", "--detach", "--network", "none", "--name", &name];
        let command = ["localhost/idle:1", "/bin/sleep", "100000"];
        host.podman(options.iter().chain(&command))?;
    }
    // Idle without an agent, to tell what the agent makes it do.
    let runtime = first_process(host, "podman")?;
    let alone = cpu_share(&[runtime], Duration::from_secs(5))?[0];

    let policy = fs::read_to_string(workspace::root().join("policies/default.yaml"))?;
    let device = Device {
        policy: Some(policy),
        ..Device::new(DEVICE)
    };
    let crew = Crew::start(&lab, "duplicator", &[device])?;
    wait_for("50 containers in view", Duration::from_secs(30), || {
        let (_, status) = crew.ask(DEVICE, &["status"])?;
        let containers = status["view"]["containers"].as_array();
        let running = containers.into_iter().flatten();
        let running = running.filter(|container| container["state"] == "running");
        Ok((running.count() >= CONTAINERS).then_some(()))
    })?;
    // Starting is not idling.
    thread::sleep(Duration::from_secs(5));
    let agent = first_process(host, "agent")?;
    let cpu = cpu_share(&[agent, runtime], idle)?;
    let status = fs::read_to_string(format!("/proc/{agent}/status"))?;
    let rollup = fs::read_to_string(format!("/proc/{agent}/smaps_rollup"))?;
    let (resident, proportional) = (mib(&status, "VmRSS:")?, mib(&rollup, "Pss:")?);
    let peak = mib(&status, "VmHWM:")?;
    lab.down()?;

    Ok(format!(
        "## Agent at rest\n\n{CONTAINERS} running containers that do nothing, policy `default.yaml`, {} s.\n\n\
         | what | | goal |\n|---|---|---|\n\
         | resident memory (VmRSS) | {resident:.1} MiB | {} |\n\
         | proportional share (Pss) | {proportional:.1} MiB | |\n\
         | highest since its start (VmHWM) | {peak:.1} MiB | |\n\
         | CPU of the agent | {:.2} % of a core | {} |\n\
         | CPU of Podman's service, with the agent | {:.2} % of a core | |\n\
         | CPU of Podman's service, before | {:.2} % of a core | |\n",
        idle.as_secs(),
        goal("at most 40 MiB", resident <= 40.0),
        cpu[0] * 100.0,
        goal("at most 1 %", cpu[0] <= 0.01),
        cpu[1] * 100.0,
        alone * 100.0,
    ))
}

/// The first process of a program that [`Host::spawn_logged`] started.
pub(super) fn first_process(host: &Host, name: &str) -> Result<u32> {
    let path = host.cgroup().join(name).join("cgroup.procs");
    let text =
        fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let first = text.lines().next().and_then(|line| line.parse().ok());
    first.with_context(|| format!("{name} does not run in lab host {}", host.name()))
}

/// Share of one core that each process used while `time` passed.
pub(super) fn cpu_share(processes: &[u32], time: Duration) -> Result<Vec<f64>> {
    let ticks_per_second = sysconf(SysconfVar::CLK_TCK)?.context("no clock tick")? as f64;
    let now = || -> Result<Vec<u64>> { processes.iter().map(|pid| ticks(*pid)).collect() };
    let (before, start) = (now()?, Instant::now());
    thread::sleep(time);
    let (after, passed) = (now()?, start.elapsed().as_secs_f64());
    let used = before
        .iter()
        .zip(after)
        .map(|(before, after)| after - before);
    Ok(used
        .map(|ticks| ticks as f64 / ticks_per_second / passed)
        .collect())
}

/// VmRSS of a process.
pub(super) fn resident_mib(pid: u32) -> Result<f64> {
    mib(
        &fs::read_to_string(format!("/proc/{pid}/status"))?,
        "VmRSS:",
    )
}

/// User and system time of a process with all its threads: fields 14 and 15 of /proc/PID/stat (proc(5)).
pub(super) fn ticks(pid: u32) -> Result<u64> {
    let path = format!("/proc/{pid}/stat");
    let text = fs::read_to_string(Path::new(&path)).with_context(|| format!("{path} is gone"))?;
    stat_ticks(&text).with_context(|| format!("cannot understand {path}"))
}

fn stat_ticks(stat: &str) -> Option<u64> {
    // The name in field 2 may hold spaces and parentheses.
    let mut fields = stat[stat.rfind(')')? + 2..].split(' ').skip(11);
    let user: u64 = fields.next()?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    Some(user + system)
}

fn mib(text: &str, field: &str) -> Result<f64> {
    let line = text.lines().find_map(|line| line.strip_prefix(field));
    let kib: Option<f64> = line.and_then(|rest| rest.split_whitespace().next()?.parse().ok());
    Ok(kib.with_context(|| format!("no {field} in /proc"))? / 1024.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_time_is_found_behind_a_name_with_spaces() {
        let stat = "7 (a b) c) S 1 7 7 0 -1 4194304 100 0 0 0 12 30 0 0 20 0 5 0 1234 1 2";
        assert_eq!(stat_ticks(stat), Some(42));
        assert_eq!(stat_ticks("7 (a"), None);
    }
}
