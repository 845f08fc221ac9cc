//! What the source's own workload loses beside a copy of its data: with the share that an operator allows, and with
//! nobody who slows the copy.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::{goal, median};
use crate::crew::{Crew, Device};
use crate::images;
use crate::lab::{Host, Lab, LabSpec};
use crate::process::wait_for;

const RUNS: usize = 3;
const DEVICES: [&str; 2] = ["source", "target"];
/// Percent of its reads that the workload may lose: `migration.workload_loss_max_percent` as it comes.
const ALLOWED: u32 = 30;
/// The workload alone, before the copy begins.
const ALONE: Duration = Duration::from_secs(10);
/// The longest that it is watched beside the copy.
const BESIDE: Duration = Duration::from_secs(40);
const PATIENCE: Duration = Duration::from_secs(60);

/// Reads a second of the workload, and bytes a second of the copy.
struct Run {
    alone: f64,
    beside: f64,
    copied: f64,
}

impl Run {
    fn lost(&self) -> f64 {
        (1.0 - self.beside / self.alone) * 100.0
    }
}

pub(super) fn measure(short: bool) -> Result<String> {
    let runs = if short { 1 } else { RUNS };
    let mut text = format!(
        "## A workload beside a copy\n\nRandom reads of 4 KiB past the page cache in a container's cgroup, one at a time, while the \
         container's 4 GiB of data are copied to another lab host on the same disk; median of {runs}, each over at most {} s.\n\n\
         | the copy | reads a second alone | beside it | lost | the copy's rate | goal |\n|---|---|---|---|---|---|\n",
        BESIDE.as_secs()
    );
    for (what, most) in [("spares the workload", ALLOWED), ("spares nobody", 100)] {
        let mut all = Vec::new();
        for _ in 0..runs {
            let run = once(most, if short { 1 } else { 4 })?;
            eprintln!(
                "bench: {what}: {:.0} reads a second alone, {:.0} beside {:.1} MB/s",
                run.alone,
                run.beside,
                run.copied / 1e6
            );
            all.push(run);
        }
        let of = |figure: fn(&Run) -> f64| median(&all.iter().map(figure).collect::<Vec<_>>());
        let lost = of(Run::lost);
        let asked = if most == ALLOWED {
            goal(&format!("at most {ALLOWED} %"), lost <= f64::from(ALLOWED))
        } else {
            String::new()
        };
        text.push_str(&format!(
            "| {what} | {:.0} | {:.0} | {lost:.0} % | {:.0} MB/s | {asked} |\n",
            of(|run| run.alone),
            of(|run| run.beside),
            of(|run| run.copied) / 1e6,
        ));
    }
    Ok(text)
}

fn once(most: u32, gib: u64) -> Result<Run> {
    let hosts = DEVICES.into_iter().chain(["duplicator"]);
    let lab = Lab::up(&LabSpec {
        name: format!("guard-{}", std::process::id()),
        hosts: hosts.map(Into::into).collect(),
    })?;
    let source = lab.host("source")?;
    images::load_some(source, &["redis"])?;
    let fill = format!(
        "mkdir -p /srv/busy-notes && head -c {gib}G /dev/urandom >/srv/busy-notes/data && head -c 512M /dev/urandom >/srv/load && sync"
    );
    source.run(["sh", "-c", &fill])?;
    let run = ["run", "--detach", "--name", "busy", "--volume"];
    source.podman(
        run.iter()
            .chain(&["/srv/busy-notes:/notes", "localhost/redis:demo"]),
    )?;
    let devices = DEVICES.map(|name| {
        let mut device = Device::new(name);
        device
            .migration
            .push(format!("workload_loss_max_percent: {most}"));
        device
    });
    let crew = Crew::start(&lab, "duplicator", &devices)?;

    let begin = Instant::now();
    load(source)?;
    wait_for("the load in the agent's eyes", PATIENCE, || {
        let (_, status) = crew.ask("source", &["status"])?;
        let containers = status["view"]["snapshot"]["containers"].as_array();
        let busy = |stats: &Value| {
            stats["name"] == "busy" && stats["block"]["reads"]["iops"].as_f64() > Some(20.0)
        };
        Ok(containers.into_iter().flatten().any(busy).then_some(()))
    })?;
    std::thread::sleep(ALONE);
    let alone = begin.elapsed();
    let mut evacuate = crew.begin(
        "source",
        "evacuate",
        &["evacuate", "busy", "--yes", "--copy-first"],
    )?;
    let copy = || -> Result<Option<(String, f64)>> {
        let (_, status) = crew.ask("source", &["status"])?;
        let plan = &status["plans"][0];
        let copies = plan["phase"] == "replicate";
        Ok(copies.then(|| {
            let id = plan["plan"].as_str().unwrap_or_default().to_owned();
            (id, plan["bytes_read"].as_f64().unwrap_or_default())
        }))
    };
    let (plan, done) = wait_for("the copy", PATIENCE, copy).with_context(|| crew.log("source"))?;
    let from = (begin.elapsed(), Instant::now());
    let (mut until, mut bytes) = (from.0, 0.0);
    while from.1.elapsed() < BESIDE {
        std::thread::sleep(Duration::from_millis(500));
        let Some((_, now)) = copy()? else { break };
        (until, bytes) = (begin.elapsed(), now - done);
    }
    let took = (until - from.0).as_secs_f64();
    ensure!(
        took > 2.0,
        "the copy was over in {took:.1} s: too short to tell"
    );
    crew.tell("source", &["abort", &plan])?;
    evacuate.wait()?;
    let file = source.path("/run/load_iops.1.log");
    // fio writes it when it ends.
    source.run(["sh", "-c", "kill -INT $(cat /run/load.pid)"])?;
    let log = wait_for("fio's log", PATIENCE, || {
        Ok(fs::read_to_string(&file).ok().filter(|log| !log.is_empty()))
    })?;
    lab.down()?;
    Ok(Run {
        alone: reads(&log, alone.saturating_sub(ALONE), alone)?,
        beside: reads(&log, from.0, until)?,
        copied: bytes / took,
    })
}

/// Reads of a file as a process of the container's cgroup, with a line in a log for each second.
fn load(host: &Host) -> Result<()> {
    let id = host.podman(["inspect", "--format", "{{.Id}}", "busy"])?;
    let find = format!("find /sys/fs/cgroup -type d -name 'libpod-{id}*' | head -1");
    let script = format!(
        "echo $$ >\"$({find})/cgroup.procs\" && cd /run && echo $$ >load.pid && exec fio --name=load --filename=/srv/load --rw=randread --bs=4k \
         --direct=1 --ioengine=psync --time_based --runtime=600 --write_iops_log=load --log_avg_msec=1000"
    );
    host.spawn_logged("load", ["sh", "-c", &script]).map(drop)
}

/// The mean of a log of fio between two times since it was started.
fn reads(log: &str, from: Duration, until: Duration) -> Result<f64> {
    let line = |line: &str| -> Option<(u128, f64)> {
        let mut words = line.split(',').map(str::trim);
        Some((words.next()?.parse().ok()?, words.next()?.parse().ok()?))
    };
    let within = log
        .lines()
        .filter_map(line)
        .filter(|(at, _)| (from.as_millis()..until.as_millis()).contains(at));
    let figures: Vec<f64> = within.map(|(_, reads)| reads).collect();
    ensure!(
        !figures.is_empty(),
        "fio logged nothing between {from:?} and {until:?}"
    );
    Ok(figures.iter().sum::<f64>() / figures.len() as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mean_of_a_log_is_that_of_its_lines_within_the_time() {
        let log = "1000, 100, 0, 0, 0\n2000, 200, 0, 0, 0\n3000, 400, 0, 0, 0\n";
        let seconds = Duration::from_secs;
        assert_eq!(reads(log, seconds(1), seconds(3)).expect("lines"), 150.0);
        assert!(reads(log, seconds(4), seconds(9)).is_err());
    }
}
