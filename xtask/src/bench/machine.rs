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
    let cores = std::thread::available_parallelism().map_or(0, std::num::NonZero::get);
    let mut rows = vec![
        ("processor", format!("{}, {cores} cores", processor())),
        ("memory", memory()),
        ("kernel", kernel()),
        (
            "load before the run (1 min)",
            first_word("/proc/loadavg").unwrap_or_else(|| "unknown".into()),
        ),
    ];
    for (name, mode) in [("disk, writing", "write"), ("disk, reading", "read")] {
        let speed = disk(a, mode).unwrap_or_else(|error| format!("not measured: {error:#}"));
        rows.push((
            name,
            format!("{speed} (fio, O_DIRECT, 1 MiB, 32 in flight)"),
        ));
    }
    let link = link(a, b).unwrap_or_else(|error| format!("not measured: {error:#}"));
    rows.push((
        "link between two lab hosts",
        format!("{link} (iperf3, one stream)"),
    ));
    lab.down()?;

    let mut text = String::from("## Machine\n\n| what | |\n|---|---|\n");
    for (what, value) in rows {
        text.push_str(&format!("| {what} | {value} |\n"));
    }
    Ok(text)
}

fn processor() -> String {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    text.lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(": "))
        .map_or_else(|| std::env::consts::ARCH.into(), |(_, name)| name.into())
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

fn disk(host: &Host, mode: &str) -> Result<String> {
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
    let bytes = report["jobs"][0][mode]["bw_bytes"]
        .as_f64()
        .context("fio reports no bandwidth")?;
    Ok(format!("{:.2} GB/s", bytes / 1e9))
}

fn link(from: &Host, to: &Host) -> Result<String> {
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
    Ok(format!("{:.1} Gbit/s = {:.2} GB/s", bits / 1e9, bits / 8e9))
}
