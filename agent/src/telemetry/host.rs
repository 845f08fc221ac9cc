//! Facts of the host from procfs, sysfs and devices under a configurable root: one file a family.
//!
//! Invariants: an absent source yields no value, never a zero, and a reason instead; counters yield
//! events and rates over the time since they were last read; nothing here may block a sweep (what can,
//! asks drives, runs in a thread of its own).

mod announced;
mod bandwidth;
mod cgroup;
mod counters;
mod cpu;
mod drives;
mod ecc;
mod files;
mod filesystems;
mod kernel_log;
mod memory;
mod network;
mod perf_event;
mod performance;
mod queues;
mod raid;
mod rare;
mod sensors;

pub use drives::understands;
pub(super) use files::{entries, text};
pub use kernel_log::Heard;

use crate::model::container::Container;
use crate::model::metric::{Per, Subject};
use crate::model::telemetry::Loss;
use crate::model::units::Bytes;
use announced::Announced;
use rare::Rare;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A metric's value and what it was measured on.
pub type Value = (&'static str, Subject, f64);

/// What is read of the host at one time.
#[derive(Debug, Default)]
pub struct HostReading {
    /// Values of metrics.
    pub values: Vec<Value>,
    /// Why metrics have no value.
    pub absent: BTreeMap<&'static str, String>,
    /// What could not be read in time.
    pub losses: Vec<Loss>,
    /// 1-minute load average.
    pub load1: Option<f64>,
    /// Online CPUs.
    pub cpus: Option<u32>,
    /// Installed memory.
    pub memory_total: Option<Bytes>,
    /// Memory that can be had without swapping.
    pub memory_available: Option<Bytes>,
}

impl HostReading {
    fn push(&mut self, metric: &'static str, subject: Subject, value: f64) {
        self.values.push((metric, subject, value));
    }

    fn device(&mut self, metric: &'static str, value: f64) {
        self.push(metric, Subject::device(), value);
    }

    pub(super) fn of(&mut self, metric: &'static str, per: Per, name: &str, value: f64) {
        self.push(metric, Subject::new(per, name), value);
    }

    /// Says why these metrics have no value; counts only for those that get none in this reading.
    pub(super) fn absent(&mut self, metrics: &[&'static str], why: &str) {
        for metric in metrics {
            self.absent.entry(metric).or_insert_with(|| why.to_owned());
        }
    }

    /// Values of `metric` that were read so far.
    pub(super) fn values_of(&self, metric: &str) -> impl Iterator<Item = f64> {
        self.values
            .iter()
            .filter(move |(name, _, _)| *name == metric)
            .map(|(_, _, value)| *value)
    }

    /// The device's value as the worst of its parts; none when no part has one.
    pub(super) fn device_from_parts(&mut self, metric: &'static str, worst: fn(f64, f64) -> f64) {
        let found = self.values_of(metric).reduce(worst);
        if let Some(value) = found {
            self.device(metric, value);
        }
    }
}

fn sum(a: f64, b: f64) -> f64 {
    a + b
}

/// Where a family looks, and how long ago it looked last.
#[derive(Clone, Copy)]
struct Look<'a> {
    root: &'a Path,
    elapsed: Duration,
}

impl Look<'_> {
    fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.root.join(name)
    }

    /// `count` of the elapsed time, a second; none at the first look.
    fn a_second(&self, count: u64) -> Option<f64> {
        (!self.elapsed.is_zero()).then(|| count as f64 / self.elapsed.as_secs_f64())
    }
}

/// Reading a counter interrupts its CPU.
const COUNTERS: Duration = Duration::from_secs(5);
/// The same, of several counters of each processor.
const BANDWIDTH: Duration = Duration::from_secs(10);
/// Most between two readings of what is read as often as its cost allows.
const SELDOM: Duration = Duration::from_secs(10);
/// `drivetemp` sends a command to the drive for each reading.
const OF_DRIVES: Duration = Duration::from_secs(30);

/// What the kernel's log tells of disks and file systems, whose state may then be another one.
const OF_STORAGE: [&str; 4] = [
    "kernel.io_errors",
    "kernel.disk_resets",
    "kernel.filesystem_errors",
    "kernel.read_only_remounts",
];

/// Reads the host, and remembers counters between readings.
pub struct Host {
    root: PathBuf,
    clock: Duration,
    cpu: cpu::Cpu,
    throttling: Rare<cpu::Throttling>,
    memory: memory::Memory,
    bandwidth: Rare<bandwidth::Bandwidth>,
    ecc: Rare<ecc::Ecc>,
    queues: queues::Queues,
    filesystems: Rare<filesystems::Filesystems>,
    mounts: Announced,
    network: network::Network,
    raid: Rare<()>,
    arrays: Announced,
    mapped: Announced,
    kernel_log: kernel_log::KernelLog,
    performance: Rare<performance::Performance>,
    of_containers: performance::OfContainers,
    sensors: Rare<()>,
    drives: Rare<drives::Drives>,
    containers: Rare<cgroup::Containers>,
}

impl Host {
    /// A host whose procfs and sysfs are below `root`. CPU use and pressure are those of the cgroup2
    /// directory `scope` where the kernel counts them there: an agent does not report beyond its scope.
    #[must_use]
    pub fn new(root: PathBuf, scope: PathBuf) -> Self {
        Self {
            kernel_log: kernel_log::KernelLog::open(&root),
            bandwidth: Rare::of(bandwidth::Bandwidth::open(&root), BANDWIDTH),
            performance: Rare::of(performance::Performance::open(&root), COUNTERS),
            of_containers: performance::OfContainers::new(scope.clone()),
            root,
            clock: Duration::ZERO,
            cpu: cpu::Cpu::new(scope.clone()),
            throttling: Rare::by_cost(SELDOM),
            memory: memory::Memory::default(),
            ecc: Rare::by_cost(SELDOM),
            queues: queues::Queues::default(),
            filesystems: Rare::by_cost(SELDOM),
            mounts: Announced::mounts(),
            network: network::Network::default(),
            raid: Rare::by_cost(SELDOM),
            arrays: Announced::arrays(),
            mapped: Announced::mapped(),
            sensors: Rare::by_cost(SELDOM),
            drives: Rare::every(OF_DRIVES),
            containers: Rare::of(cgroup::Containers::new(scope), Duration::ZERO),
        }
    }

    /// Lets the drives be asked for their health, in a thread of its own that the first reading starts.
    pub fn watch_drives(&mut self) {
        let root = self.root.clone();
        self.drives.family().watch(&root);
    }

    /// Reads every source that is due; `elapsed` since the reading before, for rates.
    pub fn read(&mut self, containers: &[Container], elapsed: Duration) -> HostReading {
        self.clock += elapsed;
        let now = self.clock;
        let mut reading = HostReading::default();
        let root = self.root.as_path();
        let look = Look { root, elapsed };
        self.cpu.read(look, &mut reading);
        self.memory.read(look, &mut reading);
        self.queues.read(look, &mut reading);
        self.network.read(look, &mut reading);
        self.kernel_log.read(look, &mut reading);
        reading.losses.extend(self.kernel_log.loss());
        let read = &mut reading;
        let counters = performance::Performance::read;
        self.performance.read(root, now, read, counters);
        self.throttling.read(root, now, read, cpu::Throttling::read);
        if self.performance.family().counts() {
            self.of_containers.read(containers, root, read);
        }
        self.bandwidth
            .read(root, now, read, bandwidth::Bandwidth::read);
        self.ecc.read(root, now, read, ecc::Ecc::read);
        for (metric, subject, count) in &read.values {
            if *metric == "kernel.read_only_remounts" && subject.per == Per::Disk {
                self.filesystems.family().went_read_only(&subject.name);
            }
            if OF_STORAGE.contains(metric) && *count > 0.0 {
                self.filesystems.announce();
            }
        }
        if self.mounts.changed(root) {
            self.filesystems.announce();
        }
        let filesystems = filesystems::Filesystems::read;
        self.filesystems.read(root, now, read, filesystems);
        // Its device is there once the module is, which opening it would load.
        let mapper = look.path("sys/class/misc/device-mapper");
        let mapped = mapper.exists() && self.mapped.changed(root);
        if self.arrays.changed(root) || mapped {
            self.raid.announce();
        }
        let raid = |(): &mut (), look: Look, read: &mut HostReading| raid::read(look, read);
        self.raid.read(root, now, read, raid);
        let sensors = |(): &mut (), look: Look, read: &mut HostReading| sensors::parts(look, read);
        self.sensors.read(root, now, read, sensors);
        let drives = drives::Drives::read;
        self.drives.read(root, now, read, drives);
        // Files of each container: all of them every second would be dear with hundreds.
        let seconds = (containers.len() as u64 / 25).clamp(1, 10);
        self.containers.set_every(Duration::from_secs(seconds));
        let of_each = |all: &mut cgroup::Containers, look: Look, read: &mut HostReading| {
            all.read(containers, look, read);
        };
        self.containers.read(root, now, read, of_each);
        reading
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::metric::METRICS;
    use std::fs;

    /// A host as recorded files.
    pub(super) fn recorded(files: &[(&str, &str)]) -> (tempfile::TempDir, Host) {
        let root = tempfile::tempdir().expect("a directory");
        write(root.path(), files);
        let host = Host::new(root.path().to_owned(), root.path().join("no-cgroup"));
        (root, host)
    }

    pub(super) fn write(root: &Path, files: &[(&str, &str)]) {
        for (name, content) in files {
            let path = root.join(name);
            fs::create_dir_all(path.parent().expect("below the root")).expect("made");
            fs::write(path, content).expect("written");
        }
    }

    pub(super) fn value(reading: &HostReading, metric: &str, name: &str) -> Option<f64> {
        assert!(METRICS.iter().any(|known| known.name == metric), "{metric}");
        reading
            .values
            .iter()
            .find(|(found, subject, _)| *found == metric && subject.name == name)
            .map(|(_, _, value)| *value)
    }

    /// Of two values of one metric and subject only one would ever be judged.
    pub(super) fn none_twice(reading: &HostReading) {
        let mut seen = std::collections::BTreeSet::new();
        for (metric, subject, _) in &reading.values {
            assert!(seen.insert((metric, subject)), "{metric} of {subject:?}");
        }
    }

    /// Longer than any source is left unread.
    pub(super) const LATER: Duration = Duration::from_secs(100);

    #[test]
    fn an_empty_host_has_no_values_rather_than_zeros_and_says_why_of_each() {
        let (_root, mut host) = recorded(&[]);
        let reading = host.read(&[], Duration::from_secs(1));
        assert_eq!(reading.values, []);
        assert_eq!(reading.memory_total, None);
        for metric in METRICS {
            let told = reading.absent.contains_key(metric.name);
            let elsewhere =
                metric.source.starts_with("kernel programs") || metric.name.starts_with("peer.");
            assert!(
                told != elsewhere,
                "{}: {:?}",
                metric.name,
                reading.absent.get(metric.name)
            );
        }
    }

    #[test]
    fn every_value_of_this_host_is_in_the_catalogue_with_its_kind_of_subject() {
        let mut host = Host::new(PathBuf::from("/"), PathBuf::from("/no-cgroup"));
        host.read(&[], Duration::ZERO);
        std::thread::sleep(Duration::from_millis(30));
        let reading = host.read(&[], Duration::from_millis(30));
        for (name, subject, value) in &reading.values {
            let metric = METRICS.iter().find(|metric| metric.name == *name);
            let metric = metric.unwrap_or_else(|| panic!("{name} is not in the catalogue"));
            assert!(metric.per.contains(&subject.per), "{name} per {subject:?}");
            assert!(value.is_finite(), "{name} of {subject} is {value}");
        }
        none_twice(&reading);
        assert!(reading.load1.is_some_and(|load| load >= 0.0));
        assert!(reading.memory_total > reading.memory_available);
        let used = value(&reading, "memory.used", "").expect("this host has memory");
        assert!((0.0..=100.0).contains(&used));
        assert!(value(&reading, "disk.capacity", "/").is_some_and(|bytes| bytes > 1e6));
        assert!(value(&reading, "cpu.used", "cpu0").is_some());
    }
}
