//! What an event costs in each kernel program, by the kernel's own counters, under disk, network and
//! scheduler load.

use std::collections::BTreeMap;
use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::bpftrace::Idle;
use super::machine;
use crate::crew::{Crew, Device};
use crate::lab::{Lab, LabSpec};
use crate::process::wait_for;
use crate::workspace;

const DEVICE: &str = "loaded";

/// Measures programs while it is on (kernel: `Documentation/admin-guide/sysctl/kernel.rst`).
const STATS: &str = "/proc/sys/kernel/bpf_stats_enabled";

/// Switches the measuring on, and back to what it was.
pub(super) struct Measuring(String);

impl Measuring {
    pub(super) fn on() -> Result<Self> {
        let before = fs::read_to_string(STATS).with_context(|| format!("no {STATS}"))?;
        fs::write(STATS, "1").with_context(|| format!("cannot write {STATS}"))?;
        Ok(Self(before))
    }
}

impl Drop for Measuring {
    fn drop(&mut self) {
        if let Err(error) = fs::write(STATS, self.0.trim()) {
            eprintln!("bench: {STATS} could not be put back: {error}");
        }
    }
}

/// Runs and their nanoseconds, by program.
pub(super) type Costs = BTreeMap<String, (u64, u64)>;

pub(super) fn measure(short: bool) -> Result<String> {
    let seconds = if short { 3_u64 } else { 10 };
    let lab = Lab::up(&LabSpec {
        name: format!("programs-{}", std::process::id()),
        hosts: vec![machine::bare("duplicator"), DEVICE.into()],
    })?;
    let host = lab.host(DEVICE)?;
    let crew = Crew::start(&lab, "duplicator", &[Device::new(DEVICE)])?;
    let mut server = host.spawn_logged(
        "httpd",
        ["busybox", "httpd", "-f", "-p", "8099", "-h", "/run"],
    )?;
    wait_for("httpd's port", Duration::from_secs(5), || {
        let listening = host.run(["ss", "-Hltn", "sport", "=", ":8099"])?;
        Ok((!listening.is_empty()).then_some(()))
    })?;

    let idle = Idle::at("sched:sched_switch")?;
    let measuring = Measuring::on()?;
    let (idle_runs, idle_time) = idle.cost()?;
    let before = costs(&crew, DEVICE, now_ms()?)?;
    let start = Instant::now();
    // Small direct reads and writes sleep for every request; every page of httpd is a connection; the talker
    // asks by UDP, from sockets with and without a peer.
    let talker = workspace::binary("talker");
    let talker = talker.to_str().context("a path of text")?;
    let places = ["udp=127.0.0.1:8098", "udp=[::1]:8098"];
    let mut answering = host.spawn_logged("talker", [&[talker, "serve"], &places[..]].concat())?;
    let load = format!(
        "fio --name=load --filename=/srv/load --size=256M --rw=randrw --bs=4k --direct=1 --ioengine=psync \
         --numjobs=2 --runtime={seconds} --time_based --output=/dev/null & \
         timeout {seconds} {talker} ask 1000000=127.0.0.1:8098 & \
         timeout {seconds} {talker} ask '1000000=[::1]:8098' & \
         timeout {seconds} curl --silent --output /dev/null 'http://127.0.0.1:8099/[1-1000000]'; wait"
    );
    host.run(["sh", "-c", &load])?;
    let passed = start.elapsed();
    // The next sweep has read the counters.
    let after = costs(&crew, DEVICE, now_ms()?)?;
    let (runs, time) = idle.cost()?;
    let measuring_ns = (time - idle_time) / (runs - idle_runs).max(1);
    drop((measuring, idle));
    for child in [&mut server, &mut answering] {
        child.kill().context("cannot end a server")?;
        child.wait().context("a server was lost")?;
    }
    lab.down()?;

    let mut text = format!(
        "## Kernel programs\n\nBy the kernel's own counters (`bpf_stats_enabled`) over {:.0} s of small direct I/O, short connections and \
         datagrams; events of the whole machine, within the scope or not. In the counters are their own two clock readings, which nobody \
         pays while nothing is measured: a program that does nothing, at `sched_switch` at the same time, shows {measuring_ns} ns. The goal \
         for `sched_switch` is at most 150 ns.\n\n\
         | program | events | ns per event as counted | of it the program's own | % of a core |\n|---|---|---|---|---|\n",
        passed.as_secs_f64()
    );
    let mut events = 0;
    for (name, (runs, time)) in &after {
        let (runs_before, time_before) = before.get(name).copied().unwrap_or_default();
        let (runs, time) = (runs - runs_before, time - time_before);
        events += runs;
        let Some(each) = time.checked_div(runs) else {
            text.push_str(&format!("| `{name}` | none came | | | |\n"));
            continue;
        };
        let own = each.saturating_sub(measuring_ns);
        let share = (own * runs) as f64 / passed.as_nanos() as f64 * 100.0;
        text.push_str(&format!(
            "| `{name}` | {runs} | {each} | {own} | {share:.2} |\n"
        ));
    }
    ensure!(events > 0, "the kernel counted no run of any program");
    Ok(text)
}

/// Milliseconds of Unix time.
pub(super) fn now_ms() -> Result<u64> {
    let since = std::time::SystemTime::UNIX_EPOCH.elapsed()?;
    Ok(u64::try_from(since.as_millis())?)
}

/// Counters of a sweep that began after `since` (milliseconds of Unix time).
pub(super) fn costs(crew: &Crew, device: &str, since: u64) -> Result<Costs> {
    wait_for("the programs' counters", Duration::from_secs(10), || {
        let (_, status) = crew.ask(device, &["status"])?;
        let snapshot = &status["view"]["snapshot"];
        if snapshot["at"].as_u64().is_none_or(|at| at <= since) {
            thread::sleep(Duration::from_millis(100));
            return Ok(None);
        }
        let programs: Vec<Value> = snapshot["programs"].as_array().cloned().unwrap_or_default();
        let cost = |program: &Value| {
            let name = program["name"].as_str()?.to_owned();
            let runs = program["runs"].as_u64()?;
            Some((name, (runs, program["run_time_ns"].as_u64()?)))
        };
        Ok(Some(programs.iter().filter_map(cost).collect()))
    })
}
