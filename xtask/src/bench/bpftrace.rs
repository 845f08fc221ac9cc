//! bpftrace: the agent's peer in the figures, and the way to a kernel program that does nothing, which shows what the
//! kernel's measuring of programs takes itself.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::process::{output, run};
use crate::setup;

const TRACEFS: &str = "/sys/kernel/tracing";

/// Starts it with a program, and waits until that is attached.
pub(super) fn start(program: &str) -> Result<Child> {
    setup::provide("bpftrace", "bpftrace", "the agent's peer in the figures")?;
    let mut child = Command::new("bpftrace")
        .args(["-e", program])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .context("cannot start bpftrace")?;
    thread::sleep(Duration::from_secs(4));
    ensure!(
        child.try_wait()?.is_none(),
        "bpftrace ended by itself: run its script by hand to see why"
    );
    Ok(child)
}

/// A program at a tracepoint that does nothing.
pub(super) struct Idle {
    bpftrace: Child,
    _tracing: Tracing,
}

impl Idle {
    pub(super) fn at(tracepoint: &str) -> Result<Self> {
        let tracing = Tracing::mounted()?;
        Ok(Self {
            bpftrace: start(&format!("tracepoint:{tracepoint} {{ $nothing = 1; }}"))?,
            _tracing: tracing,
        })
    }

    /// Its runs, and the nanoseconds that the kernel counted for them.
    pub(super) fn cost(&self) -> Result<(u64, u64)> {
        let directory = format!("/proc/{}/fdinfo", self.bpftrace.id());
        for entry in fs::read_dir(&directory)? {
            let text = fs::read_to_string(entry?.path())?;
            let value = |name: &str| {
                let line = text.lines().find_map(|line| line.strip_prefix(name))?;
                line.trim().parse().ok()
            };
            if let (Some(runs), Some(time)) = (value("run_cnt:"), value("run_time_ns:")) {
                return Ok((runs, time));
            }
        }
        anyhow::bail!("bpftrace holds no program in {directory}")
    }
}

impl Drop for Idle {
    fn drop(&mut self) {
        let _ = self.bpftrace.kill();
        let _ = self.bpftrace.wait();
    }
}

/// tracefs, which bpftrace reads; unmounted again where it was not mounted.
pub(super) struct Tracing {
    ours: bool,
}

impl Tracing {
    pub(super) fn mounted() -> Result<Self> {
        let ours = !Path::new(TRACEFS).join("events").exists();
        if ours {
            run(Command::new("mount").args(["-t", "tracefs", "tracefs", TRACEFS]))?;
        }
        Ok(Self { ours })
    }
}

impl Drop for Tracing {
    fn drop(&mut self) {
        if self.ours {
            let _ = output(Command::new("umount").arg(TRACEFS));
        }
    }
}
