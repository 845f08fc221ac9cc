//! What the machine itself can do, so that the figures can be read: nothing moves faster than its disk
//! and its link.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::lab::{Host, HostSpec, Lab, LabSpec};
use crate::process::{output, wait_for};

/// Hosts of a measurement that needs no containers.
pub(super) fn bare(name: &str) -> HostSpec {
    HostSpec {
        containers: false,
        ..name.into()
    }
}

/// Cores, kernel, memory, disk and link as a Markdown section.
pub(super) fn limits() -> Result<String> {
    let lab = Lab::up(&LabSpec {
        name: format!("limits-{}", std::process::id()),
        hosts: vec![bare("a"), bare("b")],
    })?;
    let (a, b) = (lab.host("a")?, lab.host("b")?);
    let mut rows = vec![
        ("processor", processor()),
        ("memory", memory()),
        ("kernel", kernel()),
        (
            "load before the run (1 min)",
            first_word("/proc/loadavg").unwrap_or_else(|| "unknown".into()),
        ),
    ];
    for (name, speed) in measured(a, b)?.0 {
        rows.push((name, format!("{:.2} GB/s", speed / 1e9)));
    }
    lab.down()?;

    let mut text = String::from("## Machine\n\n| what | |\n|---|---|\n");
    for (what, value) in rows {
        text.push_str(&format!("| {what} | {value} |\n"));
    }
    Ok(text)
}

/// The machine in a few words.
pub(super) fn named() -> String {
    format!("{}, {}, Linux {}", processor(), memory(), kernel())
}

fn processor() -> String {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = text
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(": "))
        .map_or(std::env::consts::ARCH, |(_, name)| name);
    let cores = std::thread::available_parallelism().map_or(0, std::num::NonZero::get);
    format!("{name}, {cores} cores")
}

fn memory() -> String {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let total = text
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))
        .and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
    total.map_or_else(
        || "unknown".into(),
        |kib| format!("{} GiB", (kib + (1 << 19)) >> 20),
    )
}

fn kernel() -> String {
    fs::read_to_string("/proc/sys/kernel/osrelease")
        .unwrap_or_default()
        .trim()
        .to_owned()
}

fn first_word(file: &str) -> Option<String> {
    let text = fs::read_to_string(file).ok()?;
    text.split_whitespace().next().map(str::to_owned)
}

/// Speeds that nothing which moves data can exceed, in bytes a second.
#[derive(Debug, Clone)]
pub(super) struct Limits(Vec<(&'static str, f64)>);

impl Limits {
    /// These and some more.
    pub(super) fn with(&self, more: impl IntoIterator<Item = (&'static str, f64)>) -> Self {
        Self(self.0.iter().copied().chain(more).collect())
    }

    /// The lowest of them.
    pub(super) fn slowest(&self) -> (&'static str, f64) {
        let all = self.0.iter().copied();
        all.min_by(|a, b| a.1.total_cmp(&b.1))
            .unwrap_or(("none", f64::INFINITY))
    }

    pub(super) fn listed(&self) -> String {
        let each = self
            .0
            .iter()
            .map(|(name, speed)| format!("{name} {:.2} GB/s", speed / 1e9));
        each.collect::<Vec<_>>().join("; ")
    }
}

/// Measures disk and link.
pub(super) fn measured(from: &Host, to: &Host) -> Result<Limits> {
    let limits = vec![
        (
            "disk, writing (fio, O_DIRECT, 1 MiB, 32 in flight)",
            disk(from, "write")?,
        ),
        ("disk, reading (the same)", disk(from, "read")?),
        // What a copy from the disk to itself cannot exceed: as much is read as is written.
        (
            "disk, read and written at once (the same, each way)",
            disk(from, "rw")?,
        ),
        (
            "link between two lab hosts (iperf3, one stream)",
            link(from, to)?,
        ),
    ];
    from.run(["rm", "/srv/fio"])?;
    Ok(Limits(limits))
}

fn disk(host: &Host, mode: &str) -> Result<f64> {
    let mode_option = format!("--rw={mode}");
    let text = host.run([
        "fio",
        "--name=disk",
        "--filename=/srv/fio",
        &mode_option,
        "--direct=1",
        "--bs=1M",
        "--iodepth=32",
        "--ioengine=libaio",
        "--size=1G",
        "--runtime=4",
        "--time_based",
        "--output-format=json",
    ])?;
    let report: Value = serde_json::from_str(&text).context("fio printed no JSON")?;
    let done = ["read", "write"]
        .into_iter()
        .filter(|way| mode == "rw" || *way == mode);
    let speeds = done.map(|way| report["jobs"][0][way]["bw_bytes"].as_f64());
    let slower = |speeds: Vec<f64>| speeds.into_iter().reduce(f64::min);
    speeds
        .collect::<Option<Vec<f64>>>()
        .and_then(slower)
        .context("fio reports no bandwidth")
}

fn link(from: &Host, to: &Host) -> Result<f64> {
    let address = to.address().to_string();
    let mut server = to.spawn_logged("iperf3", ["iperf3", "--server"])?;
    wait_for("iperf3's port", Duration::from_secs(5), || {
        let listening = to.run(["ss", "-Hltn", "sport", "=", ":5201"])?;
        Ok((!listening.is_empty()).then_some(()))
    })?;
    let text = output(&mut from.command(["iperf3", "--client", &address, "--time", "3", "--json"]));
    server.kill().context("cannot end iperf3")?;
    server.wait().context("iperf3 was lost")?;
    let report: Value = serde_json::from_str(&text?).context("iperf3 printed no JSON")?;
    let bits = report["end"]["sum_received"]["bits_per_second"]
        .as_f64()
        .context("iperf3 reports no rate")?;
    Ok(bits / 8.0)
}
