//! Metrics that a policy may name: what they are called, their unit and what they are measured on.

mod catalogue;

pub use catalogue::METRICS;

use super::ids::visible::visible;
use super::units::UnixMillis;
use serde::{Deserialize, Serialize};
use std::fmt;

/// Unit of a metric's values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Unit {
    /// Nanoseconds; written `40ms`, `2s`, `24h`.
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
    /// How many times something else; written `3x`.
    Times,
}

impl Unit {
    /// The word for it in tables.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Nanoseconds => "time",
            Self::Bytes => "size",
            Self::Percent => "%",
            Self::Celsius => "°C",
            Self::Count => "number",
            Self::Events => "events",
            Self::PerSecond => "a second",
            Self::Times => "times",
        }
    }
}

/// What a metric is measured on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Per {
    /// The whole device.
    Device,
    /// A processor (logical CPU) of it.
    Cpu,
    /// A block device of it.
    Disk,
    /// A RAID array (md, or a logical volume of LVM).
    Array,
    /// A network interface.
    Interface,
    /// A mounted file system.
    Mount,
    /// A thermal sensor.
    Sensor,
    /// A memory controller.
    Controller,
    /// Another device that this agent talks to.
    Peer,
    /// A container.
    Container,
    /// The median of the fleet's other devices; comes with the answer to a heartbeat.
    Fleet,
}

impl Per {
    /// Its name in policies.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Device => "device",
            Self::Cpu => "cpu",
            Self::Disk => "disk",
            Self::Array => "array",
            Self::Interface => "interface",
            Self::Mount => "mount",
            Self::Sensor => "sensor",
            Self::Controller => "controller",
            Self::Peer => "peer",
            Self::Container => "container",
            Self::Fleet => "fleet",
        }
    }
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
    /// What it is.
    pub about: &'static str,
    /// Where it comes from.
    pub source: &'static str,
}

impl Metric {
    /// The metric of that name.
    #[must_use]
    pub fn named(name: &str) -> Option<&'static Self> {
        METRICS.iter().find(|metric| metric.name == name)
    }

    /// Whether it is a share of something that may be used up and go on.
    #[must_use]
    pub fn passes_whole(&self) -> bool {
        self.name == "disk.wear"
    }

    /// Whether it is 0 or 1 of such a part; of the device it is their sum.
    #[must_use]
    pub fn is_flag(&self, per: Per) -> bool {
        let flags = [
            "disk.offline",
            "disk.smart_failed",
            "raid.failed",
            "raid.rebuilding",
            "filesystem.read_only",
            "filesystem.mounted",
            "network.link_down",
        ];
        per != Per::Device && flags.contains(&self.name)
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

    /// A thing by kind and name.
    #[must_use]
    pub fn new(per: Per, name: impl Into<String>) -> Self {
        Self {
            per,
            name: name.into(),
        }
    }
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.per {
            Per::Device => f.write_str("device"),
            _ => f.write_str(&visible(&self.name)),
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

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: &str = include_str!("../../../docs/metrics.md");

    fn row(metric: &Metric) -> String {
        let per: Vec<&str> = metric.per.iter().map(|per| per.word()).collect();
        format!(
            "| `{}` | {} | {} | {} | {} |",
            metric.name,
            metric.unit.word(),
            per.join(", "),
            metric.about,
            metric.source
        )
    }

    #[test]
    fn the_page_lists_exactly_the_catalogue_in_its_order() {
        let rows: Vec<String> = METRICS.iter().map(row).collect();
        let listed: Vec<&str> = PAGE
            .lines()
            .filter(|line| line.starts_with("| `"))
            .collect();
        assert_eq!(
            listed,
            rows,
            "the table of docs/metrics.md must be:\n{}",
            rows.join("\n")
        );
    }

    #[test]
    fn names_are_unique_and_each_metric_is_measured_on_something() {
        for (place, metric) in METRICS.iter().enumerate() {
            assert!(!metric.per.is_empty(), "{}", metric.name);
            let again = METRICS[..place].iter().any(|one| one.name == metric.name);
            assert!(!again, "{} stands twice", metric.name);
        }
    }
}
