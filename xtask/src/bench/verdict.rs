//! From a fault to the verdict, beyond the time that the policy itself asks for.

use std::fs;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::{goal, machine, median};
use crate::crew::{Crew, Device};
use crate::lab::{Host, Lab, LabSpec};
use crate::process::wait_for;
use crate::setup;

const DEVICE: &str = "judged";

/// What the thresholds with `for` wait for by themselves; a count waits for nothing.
const POLICY_TIME: Duration = Duration::from_secs(2);
const POLICY: &str = "version: 1
name: bench
thresholds:
  crowd:
    metric: sched.waiting
    above: 6
    clear: 4
    for: 2s
  errors:
    metric: block.errors
    count: { at_least: 1, within: 3s }
  read-only:
    metric: filesystem.read_only
    above: 0.5
    clear: 0.2
    for: 2s
    optional: true   # a lab host may have no file system on a disk of its own
degraded:
  - any: [crowd, errors, read-only]
guards:
  hold: 1s
";

/// Two processes that wake each other: so often that the agent only samples the scheduler.
const SWITCHING: [&str; 6] = ["perf", "bench", "sched", "pipe", "-l", "1000000000"];

/// Something that can go wrong with a host, and be mended.
trait Fault {
    fn cause(&mut self, host: &Host) -> Result<()>;
    fn mend(&mut self, host: &Host) -> Result<()>;
}

/// Many more tasks that want a CPU than there are CPUs.
struct Crowd(Option<Child>);

impl Fault for Crowd {
    fn cause(&mut self, host: &Host) -> Result<()> {
        let crowd = "for n in $(seq 24); do busybox yes >/dev/null & done; wait";
        self.0 = Some(host.spawn_logged("fault", ["sh", "-c", crowd])?);
        Ok(())
    }

    fn mend(&mut self, host: &Host) -> Result<()> {
        fs::write(host.cgroup().join("fault/cgroup.kill"), "1").context("cannot end the fault")?;
        if let Some(mut crowd) = self.0.take() {
            crowd.wait().context("the fault was lost")?;
        }
        Ok(())
    }
}

/// A disk that has lost most of itself: a loop device over a file that was cut off.
struct Errors(String);

/// Where its file is, on the host.
const CUT_OFF: &str = "/srv/cut-off";

impl Errors {
    fn prepared(host: &Host) -> Result<Self> {
        let script = "truncate -s 16M \"$0\" && losetup --find --show --direct-io=off \"$0\"";
        let device = host.run(["sh", "-c", script, CUT_OFF])?;
        Ok(Self(device.trim().to_owned()))
    }
}

impl Fault for Errors {
    fn cause(&mut self, host: &Host) -> Result<()> {
        let script = "truncate -s 4k \"$0\"; ! dd if=\"$1\" of=/dev/null bs=4k skip=1000 count=1 iflag=direct 2>&1";
        host.run(["sh", "-c", script, CUT_OFF, &self.0]).map(drop)
    }

    fn mend(&mut self, host: &Host) -> Result<()> {
        host.run(["truncate", "-s", "16M", CUT_OFF]).map(drop)
    }
}

impl Drop for Errors {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["--detach", &self.0]).status();
    }
}

/// An ext4 that finds an error and takes no more writes.
struct ReadOnly(String);

impl ReadOnly {
    /// None where this kernel makes no error of ext4 on purpose.
    fn prepared(host: &Host) -> Result<Option<Self>> {
        let mut read_only = Self(String::new());
        read_only.mend(host)?;
        let here = host.run(["test", "-e", &read_only.0]).is_ok();
        Ok(here.then_some(read_only))
    }
}

impl Fault for ReadOnly {
    fn cause(&mut self, host: &Host) -> Result<()> {
        host.run(["sh", "-c", "echo bench >\"$0\"", &self.0])
            .map(drop)
    }

    fn mend(&mut self, host: &Host) -> Result<()> {
        let script = "cd /srv; mkdir -p at; ! mountpoint -q at || umount at; rm -f ext4; truncate -s 16M ext4
            mkfs.ext4 -q ext4 && mount -o loop,errors=remount-ro ext4 at && findmnt -n -o SOURCE at";
        let device = host.run(["sh", "-c", script])?;
        let device = device.trim().trim_start_matches("/dev/");
        self.0 = format!("/sys/fs/ext4/{device}/trigger_fs_error");
        Ok(())
    }
}

/// The judged host, and what it is asked through.
struct Bench<'l> {
    crew: &'l Crew,
    host: &'l Host,
    runs: usize,
}

impl Bench<'_> {
    /// Median and worst of the runs, s.
    fn delays(
        &self,
        fault: &mut dyn Fault,
        policy_time: Duration,
        sampled: bool,
    ) -> Result<(f64, f64)> {
        let mut beyond = Vec::new();
        for _ in 0..self.runs {
            wait_for("a healthy device", Duration::from_secs(30), || {
                let (_, status) = self.crew.ask(DEVICE, &["status"])?;
                let is_sampled = status["view"]["snapshot"]["watched_percent"].is_number();
                let healthy = status["view"]["verdict"]["kind"] == "healthy";
                Ok((healthy && is_sampled == sampled).then_some(()))
            })
            .with_context(|| self.crew.log(DEVICE))?;
            let start = Instant::now();
            fault.cause(self.host)?;
            wait_for("the verdict", Duration::from_secs(30), || {
                let (_, status) = self.crew.ask(DEVICE, &["status"])?;
                Ok((status["view"]["verdict"]["kind"] == "degraded").then_some(()))
            })?;
            beyond.push(start.elapsed().saturating_sub(policy_time).as_secs_f64());
            fault.mend(self.host)?;
        }
        Ok((median(&beyond), beyond.iter().copied().fold(0.0, f64::max)))
    }
}

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
    let crew = &crew;
    let bench = Bench { crew, host, runs };
    let errors = bench.delays(&mut Errors::prepared(host)?, Duration::ZERO, false)?;
    let read_only = ReadOnly::prepared(host)?
        .map(|mut fault| bench.delays(&mut fault, POLICY_TIME, false))
        .transpose()?;
    let calm = bench.delays(&mut Crowd(None), POLICY_TIME, false)?;
    let mut switching = host.spawn_logged("switching", SWITCHING)?;
    let sampled = bench.delays(&mut Crowd(None), POLICY_TIME, true)?;
    fs::write(host.cgroup().join("switching/cgroup.kill"), "1")?;
    switching.wait().context("the load was lost")?;
    lab.down()?;
    let row = |host: &str, (median, worst): (f64, f64)| {
        let goal = goal("at most 1 s", worst <= 1.0);
        format!("| {host} | {median:.2} s | {worst:.2} s | {goal} |\n")
    };
    let by_ext4 = "a file system finds an error and goes read-only";
    Ok(format!(
        "## From fault to verdict\n\nThresholds on waiting tasks and on file systems that went read-only with `for: 2s`, and on one failed \
         request; from the start of the fault until `lifeboat status` says degraded, without those 2 s; {runs} runs each.\n\n\
         | fault | median | worst | goal |\n|---|---|---|---|\n{}{}{}{}",
        row("tasks wait for a CPU, on a calm host", calm),
        row(
            "the same where two processes wake each other, so that the scheduler is only sampled",
            sampled
        ),
        row("a request to a disk fails", errors),
        read_only.map_or_else(
            || format!(
                "| {by_ext4} | not measured: this kernel makes no error of ext4 on purpose | | |\n"
            ),
            |delays| row(by_ext4, delays)
        ),
    ))
}
