//! Metrics that a policy may name: what they are called, their unit and what they are measured on.

use super::units::UnixMillis;
use serde::{Deserialize, Serialize};
use std::fmt;

/// Unit of a metric's values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Unit {
    /// Nanoseconds; written `40ms`, `2s`.
    Nanoseconds,
    /// Bytes; written `3GiB`.
    Bytes,
    /// Percent, 0–100; written `85%`.
    Percent,
    /// Degrees Celsius; written `85C`.
    Celsius,
    /// A plain number.
    Count,
    /// Events since the sample before; summed by `count … within`.
    Events,
    /// A plain number a second.
    PerSecond,
}

/// What a metric is measured on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Per {
    /// The whole device.
    Device,
    /// A block device of it.
    Disk,
    /// A network interface.
    Interface,
    /// A mounted file system.
    Mount,
    /// A thermal sensor.
    Sensor,
    /// A container.
    Container,
}

/// One metric's description.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Metric {
    /// Name in policies.
    pub name: &'static str,
    /// Unit.
    pub unit: Unit,
    /// What it can be measured on.
    pub per: &'static [Per],
    /// What it is and where it comes from.
    pub about: &'static str,
}

/// Every metric this version measures.
pub const METRICS: &[Metric] = &[
    metric(
        "sched.run_queue_latency_p50",
        Unit::Nanoseconds,
        &[Per::Device, Per::Container],
        "median wait between wake-up and running; sched_wakeup, sched_switch",
    ),
    metric(
        "sched.run_queue_latency_p99",
        Unit::Nanoseconds,
        &[Per::Device, Per::Container],
        "99th percentile of the wait between wake-up and running; sched_wakeup, sched_switch",
    ),
    metric(
        "sched.waiting",
        Unit::Count,
        &[Per::Device, Per::Container],
        "runnable tasks that wait for a CPU now",
    ),
    metric(
        "block.latency_p50",
        Unit::Nanoseconds,
        &[Per::Device, Per::Disk, Per::Container],
        "median time from issue to completion; block_rq_issue, block_rq_complete",
    ),
    metric(
        "block.latency_p99",
        Unit::Nanoseconds,
        &[Per::Device, Per::Disk, Per::Container],
        "99th percentile of the time from issue to completion; block_rq_issue, block_rq_complete",
    ),
    metric(
        "block.iops",
        Unit::PerSecond,
        &[Per::Device, Per::Disk, Per::Container],
        "completed requests a second",
    ),
    metric(
        "block.bytes_per_second",
        Unit::PerSecond,
        &[Per::Device, Per::Disk, Per::Container],
        "completed bytes a second",
    ),
    metric(
        "block.errors",
        Unit::Events,
        &[Per::Device, Per::Disk, Per::Container],
        "requests that completed with an error",
    ),
    metric(
        "cpu.load1",
        Unit::Count,
        &[Per::Device],
        "1-minute load average; /proc/loadavg",
    ),
    metric(
        "cpu.load_per_core",
        Unit::Count,
        &[Per::Device],
        "1-minute load average divided by online CPUs",
    ),
    metric(
        "cpu.used",
        Unit::Percent,
        &[Per::Device],
        "share of CPU time not idle; /proc/stat",
    ),
    metric(
        "cpu.temperature",
        Unit::Celsius,
        &[Per::Device, Per::Sensor],
        "hottest sensor; hwmon and thermal zones",
    ),
    metric(
        "pressure.cpu_some",
        Unit::Percent,
        &[Per::Device],
        "share of the last 10 s in which some task waited for CPU; /proc/pressure/cpu",
    ),
    metric(
        "pressure.memory_some",
        Unit::Percent,
        &[Per::Device],
        "share of the last 10 s in which some task waited for memory; /proc/pressure/memory",
    ),
    metric(
        "pressure.memory_full",
        Unit::Percent,
        &[Per::Device],
        "share of the last 10 s in which all tasks waited for memory; /proc/pressure/memory",
    ),
    metric(
        "pressure.io_some",
        Unit::Percent,
        &[Per::Device],
        "share of the last 10 s in which some task waited for I/O; /proc/pressure/io",
    ),
    metric(
        "pressure.io_full",
        Unit::Percent,
        &[Per::Device],
        "share of the last 10 s in which all tasks waited for I/O; /proc/pressure/io",
    ),
    metric(
        "memory.used",
        Unit::Percent,
        &[Per::Device],
        "1 - MemAvailable / MemTotal; /proc/meminfo",
    ),
    metric(
        "memory.available",
        Unit::Bytes,
        &[Per::Device],
        "MemAvailable; /proc/meminfo",
    ),
    metric(
        "disk.used",
        Unit::Percent,
        &[Per::Device, Per::Mount],
        "used share of the fullest, or of each, file system; statvfs",
    ),
    metric(
        "network.errors",
        Unit::Events,
        &[Per::Device, Per::Interface],
        "receive and transmit errors; /proc/net/dev",
    ),
    metric(
        "network.drops",
        Unit::Events,
        &[Per::Device, Per::Interface],
        "receive and transmit drops; /proc/net/dev",
    ),
    metric(
        "network.bytes_per_second",
        Unit::PerSecond,
        &[Per::Device, Per::Interface],
        "bytes both ways a second; /proc/net/dev",
    ),
    metric(
        "network.retransmits",
        Unit::Events,
        &[Per::Device],
        "TCP segments sent again; /proc/net/snmp",
    ),
    metric(
        "network.link_down",
        Unit::Count,
        &[Per::Device, Per::Interface],
        "1 for an interface that is administratively up without carrier; /sys/class/net",
    ),
];

const fn metric(
    name: &'static str,
    unit: Unit,
    per: &'static [Per],
    about: &'static str,
) -> Metric {
    Metric {
        name,
        unit,
        per,
        about,
    }
}

/// What one sample was measured on.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Subject {
    /// Kind of thing.
    pub per: Per,
    /// Its name (`vda`, `eth0`, `/srv`, container name); empty for the device.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub name: String,
}

impl Subject {
    /// The whole device.
    #[must_use]
    pub fn device() -> Self {
        Self {
            per: Per::Device,
            name: String::new(),
        }
    }
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.per {
            Per::Device => f.write_str("device"),
            _ => f.write_str(&self.name),
        }
    }
}

/// One value of one metric at one time, in the metric's unit.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// Name in [`METRICS`].
    pub metric: String,
    /// What it was measured on.
    pub subject: Subject,
    /// Value in the metric's unit.
    pub value: f64,
    /// When.
    pub at: UnixMillis,
}
