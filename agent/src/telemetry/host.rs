//! Facts of the host from procfs and sysfs under a configurable root.
//!
//! Invariants: an absent source yields no value, never a zero; counters yield events and rates over the
//! time since they were last read.

use crate::model::metric::{Per, Subject};
use crate::model::units::Bytes;
use nix::sys::statvfs::statvfs;
use procfs::net::{InterfaceDeviceStatus, Snmp};
use procfs::process::MountInfos;
use procfs::{
    CpuTime, FromRead, FromReadSI, KernelStats, LoadAverage, Meminfo, PressureRecord,
    current_system_info, parse_pressure_record,
};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A metric's value and what it was measured on.
pub type Value = (&'static str, Subject, f64);

/// What is read of the host at one time.
#[derive(Debug, Default)]
pub struct HostReading {
    /// Values of metrics.
    pub values: Vec<Value>,
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
}

#[derive(Clone, Copy, Default)]
struct Interface {
    bytes: u64,
    errors: u64,
    drops: u64,
}

/// Reads the host, and remembers counters between readings.
pub struct Host {
    root: PathBuf,
    scope: PathBuf,
    cpu: Option<(u64, u64)>,
    scope_cpu_us: Option<u64>,
    interfaces: BTreeMap<String, Interface>,
    retransmits: Option<u64>,
}

impl Host {
    /// A host whose procfs and sysfs are below `root`. CPU use and pressure are those of the cgroup2
    /// directory `scope` where the kernel counts them there: an agent does not report beyond its scope.
    #[must_use]
    pub fn new(root: PathBuf, scope: PathBuf) -> Self {
        Self {
            root,
            scope,
            cpu: None,
            scope_cpu_us: None,
            interfaces: BTreeMap::new(),
            retransmits: None,
        }
    }

    /// Reads every source; `elapsed` since the reading before, for rates.
    pub fn read(&mut self, elapsed: Duration) -> HostReading {
        let mut reading = HostReading::default();
        self.cpu(&mut reading, elapsed);
        self.pressure(&mut reading);
        self.memory(&mut reading);
        self.disks(&mut reading);
        self.network(&mut reading, elapsed);
        self.temperature(&mut reading);
        reading
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    fn cpu(&mut self, reading: &mut HostReading, elapsed: Duration) {
        let stats = KernelStats::from_file(self.path("proc/stat"), current_system_info()).ok();
        reading.cpus = stats
            .as_ref()
            .and_then(|stats| u32::try_from(stats.cpu_time.len()).ok())
            .filter(|&cpus| cpus > 0);
        if let Ok(load) = LoadAverage::from_file(self.path("proc/loadavg")) {
            let load1 = f64::from(load.one);
            reading.load1 = Some(load1);
            reading.device("cpu.load1", load1);
            if let Some(cpus) = reading.cpus {
                reading.device("cpu.load_per_core", load1 / f64::from(cpus));
            }
        }
        if let Some(used_us) = scope_cpu_us(&self.scope) {
            let before = self.scope_cpu_us.replace(used_us);
            if let (Some(before), Some(cpus)) = (before, reading.cpus)
                && !elapsed.is_zero()
            {
                let all = elapsed.as_micros() as f64 * f64::from(cpus);
                let used = 100.0 * used_us.saturating_sub(before) as f64 / all;
                reading.device("cpu.used", used.min(100.0));
            }
            return;
        }
        let now = stats.map(|stats| busy_and_all(&stats.total));
        if let (Some((busy, all)), Some((busy_before, all_before))) = (now, self.cpu)
            && all > all_before
        {
            let busy = busy.saturating_sub(busy_before) as f64;
            reading.device("cpu.used", 100.0 * busy / (all - all_before) as f64);
        }
        self.cpu = now;
    }

    fn pressure(&self, reading: &mut HostReading) {
        let mut record = |resource: &str, kind: &str, metric| {
            let of_scope = self.scope.join(format!("{resource}.pressure"));
            let of_host = self.path(&format!("proc/pressure/{resource}"));
            let record = pressure(&of_scope, kind).or_else(|| pressure(&of_host, kind));
            if let Some(record) = record {
                reading.device(metric, f64::from(record.avg10));
            }
        };
        record("cpu", "some", "pressure.cpu_some");
        record("memory", "some", "pressure.memory_some");
        record("memory", "full", "pressure.memory_full");
        record("io", "some", "pressure.io_some");
        record("io", "full", "pressure.io_full");
    }

    fn memory(&self, reading: &mut HostReading) {
        let Ok(memory) = Meminfo::from_file(self.path("proc/meminfo")) else {
            return;
        };
        reading.memory_total = Some(Bytes(memory.mem_total));
        reading.memory_available = memory.mem_available.map(Bytes);
        if let Some(available) = memory.mem_available.filter(|_| memory.mem_total > 0) {
            let free = available as f64 / memory.mem_total as f64;
            reading.device("memory.available", available as f64);
            reading.device("memory.used", 100.0 * (1.0 - free));
        }
    }

    fn disks(&self, reading: &mut HostReading) {
        let Ok(mounts) = MountInfos::from_file(self.path("proc/self/mountinfo")) else {
            return;
        };
        let mut seen = BTreeSet::new();
        let mut fullest: Option<f64> = None;
        for mount in mounts.0 {
            let backed = mount
                .mount_source
                .as_ref()
                .is_some_and(|source| source.starts_with("/dev/"));
            let keeps_data = backed
                || mount.fs_type == "zfs"
                || (mount.fs_type == "overlay" && mount.mount_point == Path::new("/"));
            if !keeps_data || mount.mount_options.contains_key("ro") || !seen.insert(mount.majmin) {
                continue;
            }
            let below = mount
                .mount_point
                .strip_prefix("/")
                .unwrap_or(&mount.mount_point);
            let Some(used) = used_percent(&self.root.join(below)) else {
                continue;
            };
            fullest = Some(fullest.map_or(used, |most: f64| most.max(used)));
            let subject = subject(Per::Mount, mount.mount_point.to_string_lossy());
            reading.push("disk.used", subject, used);
        }
        if let Some(fullest) = fullest {
            reading.device("disk.used", fullest);
        }
    }

    fn network(&mut self, reading: &mut HostReading, elapsed: Duration) {
        if let Ok(status) = InterfaceDeviceStatus::from_file(self.path("proc/net/dev")) {
            let now: BTreeMap<String, Interface> = status
                .0
                .into_iter()
                .filter(|(name, _)| name != "lo")
                .map(|(name, status)| {
                    let interface = Interface {
                        bytes: status.recv_bytes + status.sent_bytes,
                        errors: status.recv_errs + status.sent_errs,
                        drops: status.recv_drop + status.sent_drop,
                    };
                    (name, interface)
                })
                .collect();
            self.interfaces(reading, &now, elapsed);
            self.interfaces = now;
        }
        let retransmits = Snmp::from_file(self.path("proc/net/snmp"))
            .ok()
            .map(|snmp| snmp.tcp_retrans_segs);
        if let (Some(now), Some(before)) = (retransmits, self.retransmits) {
            reading.device("network.retransmits", now.saturating_sub(before) as f64);
        }
        self.retransmits = retransmits;
    }

    fn interfaces(
        &self,
        reading: &mut HostReading,
        now: &BTreeMap<String, Interface>,
        elapsed: Duration,
    ) {
        let mut sum = Interface::default();
        let mut counted = false;
        let mut down: Option<f64> = None;
        for (name, interface) in now {
            if let Some(before) = self.interfaces.get(name) {
                counted = true;
                let more = Interface {
                    bytes: interface.bytes.saturating_sub(before.bytes),
                    errors: interface.errors.saturating_sub(before.errors),
                    drops: interface.drops.saturating_sub(before.drops),
                };
                sum.bytes += more.bytes;
                sum.errors += more.errors;
                sum.drops += more.drops;
                push_interface(reading, &subject(Per::Interface, name), more, elapsed);
            }
            if let Some(without_carrier) = self.link_down(name) {
                let value = f64::from(u8::from(without_carrier));
                reading.push("network.link_down", subject(Per::Interface, name), value);
                down = Some(down.unwrap_or(0.0) + value);
            }
        }
        if counted {
            push_interface(reading, &Subject::device(), sum, elapsed);
        }
        if let Some(down) = down {
            reading.device("network.link_down", down);
        }
    }

    /// Whether an interface that is administratively up has no carrier. A bridge has none while nothing
    /// is plugged in, which is no fault.
    fn link_down(&self, name: &str) -> Option<bool> {
        let directory = self.path("sys/class/net").join(name);
        if directory.join("bridge").exists() {
            return None;
        }
        let flags = text(&directory.join("flags"))?;
        let flags = u32::from_str_radix(flags.strip_prefix("0x")?, 16).ok()?;
        // IFF_UP; reading the carrier of an interface that is down is refused.
        (flags & 1 == 1).then_some(())?;
        Some(text(&directory.join("carrier"))? == "0")
    }

    fn temperature(&self, reading: &mut HostReading) {
        let mut sensors = hwmon(&self.path("sys/class/hwmon"));
        sensors.extend(thermal_zones(&self.path("sys/class/thermal")));
        let hottest = sensors.iter().map(|(_, celsius)| *celsius).reduce(f64::max);
        for (name, celsius) in sensors {
            reading.push("cpu.temperature", subject(Per::Sensor, name), celsius);
        }
        if let Some(hottest) = hottest {
            reading.device("cpu.temperature", hottest);
        }
    }
}

fn push_interface(
    reading: &mut HostReading,
    subject: &Subject,
    more: Interface,
    elapsed: Duration,
) {
    reading.push("network.errors", subject.clone(), more.errors as f64);
    reading.push("network.drops", subject.clone(), more.drops as f64);
    if !elapsed.is_zero() {
        let rate = more.bytes as f64 / elapsed.as_secs_f64();
        reading.push("network.bytes_per_second", subject.clone(), rate);
    }
}

fn busy_and_all(time: &CpuTime) -> (u64, u64) {
    let busy = time.user
        + time.nice
        + time.system
        + time.irq.unwrap_or(0)
        + time.softirq.unwrap_or(0)
        + time.steal.unwrap_or(0);
    (busy, busy + time.idle + time.iowait.unwrap_or(0))
}

/// CPU time that a cgroup has used, microseconds (cgroup-v2.rst, `cpu.stat`).
fn scope_cpu_us(scope: &Path) -> Option<u64> {
    let text = fs::read_to_string(scope.join("cpu.stat")).ok()?;
    text.lines()
        .find_map(|line| line.strip_prefix("usage_usec ")?.trim().parse().ok())
}

fn pressure(path: &Path, kind: &str) -> Option<PressureRecord> {
    let text = fs::read_to_string(path).ok()?;
    let line = text.lines().find(|line| line.starts_with(kind))?;
    parse_pressure_record(line).ok()
}

/// Used share as `df` counts it: what is reserved for root is neither used nor free.
fn used_percent(path: &Path) -> Option<f64> {
    let stat = statvfs(path).ok()?;
    let used = stat.blocks().saturating_sub(stat.blocks_free()) as f64;
    let available = stat.blocks_available() as f64;
    (used + available > 0.0).then(|| 100.0 * used / (used + available))
}

fn hwmon(class: &Path) -> Vec<(String, f64)> {
    let mut sensors = Vec::new();
    for chip in directories(class) {
        let name = text(&chip.join("name")).unwrap_or_else(|| file_name(&chip));
        for input in directories(&chip) {
            let file = file_name(&input);
            let Some(index) = file
                .strip_prefix("temp")
                .and_then(|rest| rest.strip_suffix("_input"))
            else {
                continue;
            };
            let label = text(&chip.join(format!("temp{index}_label")));
            let label = label.unwrap_or_else(|| format!("temp{index}"));
            if let Some(celsius) = millidegrees(&input) {
                sensors.push((format!("{name}/{label}"), celsius));
            }
        }
    }
    sensors
}

fn thermal_zones(class: &Path) -> Vec<(String, f64)> {
    let mut sensors = Vec::new();
    for zone in directories(class) {
        let file = file_name(&zone);
        if !file.starts_with("thermal_zone") {
            continue;
        }
        if let Some(celsius) = millidegrees(&zone.join("temp")) {
            let kind = text(&zone.join("type"));
            sensors.push((
                kind.map_or(file.clone(), |kind| format!("{file}/{kind}")),
                celsius,
            ));
        }
    }
    sensors
}

fn millidegrees(path: &Path) -> Option<f64> {
    Some(text(path)?.parse::<f64>().ok()? / 1000.0)
}

/// Entries of a directory by name; none of an absent one.
fn directories(path: &Path) -> Vec<PathBuf> {
    let mut entries: Vec<PathBuf> = fs::read_dir(path)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path())
        .collect();
    entries.sort();
    entries
}

fn file_name(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default();
    name.to_string_lossy().into_owned()
}

fn text(path: &Path) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    Some(text.trim().to_owned())
}

fn subject(per: Per, name: impl Into<String>) -> Subject {
    Subject {
        per,
        name: name.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A host as recorded files.
    fn recorded(files: &[(&str, &str)]) -> (tempfile::TempDir, Host) {
        let root = tempfile::tempdir().expect("a directory");
        write(root.path(), files);
        let host = Host::new(root.path().to_owned(), root.path().join("no-cgroup"));
        (root, host)
    }

    fn write(root: &Path, files: &[(&str, &str)]) {
        for (name, content) in files {
            let path = root.join(name);
            fs::create_dir_all(path.parent().expect("below the root")).expect("made");
            fs::write(path, content).expect("written");
        }
    }

    fn value(reading: &HostReading, metric: &str, name: &str) -> Option<f64> {
        reading
            .values
            .iter()
            .find(|(found, subject, _)| *found == metric && subject.name == name)
            .map(|(_, _, value)| *value)
    }

    #[test]
    fn an_empty_host_has_no_values_rather_than_zeros() {
        let (_root, mut host) = recorded(&[]);
        let reading = host.read(Duration::from_secs(1));
        assert_eq!(reading.values, []);
        assert_eq!(reading.memory_total, None);
    }

    #[test]
    fn sensors_are_read_from_hwmon_and_thermal_zones_and_the_hottest_is_the_devices() {
        let (_root, mut host) = recorded(&[
            ("sys/class/hwmon/hwmon0/name", "coretemp\n"),
            ("sys/class/hwmon/hwmon0/temp1_input", "61000\n"),
            ("sys/class/hwmon/hwmon0/temp1_label", "Package id 0\n"),
            ("sys/class/hwmon/hwmon0/temp1_max", "100000\n"),
            ("sys/class/hwmon/hwmon1/name", "nvme\n"),
            ("sys/class/hwmon/hwmon1/temp1_input", "-2500\n"),
            ("sys/class/thermal/thermal_zone0/temp", "55500\n"),
            ("sys/class/thermal/thermal_zone0/type", "acpitz\n"),
            ("sys/class/thermal/cooling_device0/type", "Processor\n"),
        ]);
        let reading = host.read(Duration::from_secs(1));
        let of = |name| value(&reading, "cpu.temperature", name);
        assert_eq!(of("coretemp/Package id 0"), Some(61.0));
        assert_eq!(of("nvme/temp1"), Some(-2.5));
        assert_eq!(of("thermal_zone0/acpitz"), Some(55.5));
        assert_eq!(of(""), Some(61.0));
        assert_eq!(reading.values.len(), 4);
    }

    #[test]
    fn pressure_is_read_with_and_without_a_full_line() {
        let some = "some avg10=2.50 avg60=0.12 avg300=0.00 total=391926\n";
        let full = format!("{some}full avg10=1.25 avg60=0.00 avg300=0.00 total=1\n");
        let (_root, mut host) =
            recorded(&[("proc/pressure/cpu", some), ("proc/pressure/io", &full)]);
        let reading = host.read(Duration::from_secs(1));
        assert_eq!(value(&reading, "pressure.cpu_some", ""), Some(2.5));
        assert_eq!(value(&reading, "pressure.io_full", ""), Some(1.25));
        assert_eq!(value(&reading, "pressure.memory_some", ""), None);
    }

    const DEV: &str = "Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed
    lo: 9 1 0 0 0 0 0 0 9 1 0 0 0 0 0 0
  eth0: RX 10 1 2 0 0 0 0 500 5 0 0 0 0 0 0
";

    #[test]
    fn interface_counters_become_rates_and_events() {
        let (root, mut host) = recorded(&[
            ("proc/net/dev", &DEV.replace("RX", "1000")),
            ("sys/class/net/eth0/flags", "0x1003\n"),
            ("sys/class/net/eth0/carrier", "0\n"),
        ]);
        let first = host.read(Duration::from_secs(1));
        assert_eq!(value(&first, "network.bytes_per_second", "eth0"), None);
        assert_eq!(value(&first, "network.link_down", "eth0"), Some(1.0));
        write(root.path(), &[("proc/net/dev", &DEV.replace("RX", "5000"))]);
        let second = host.read(Duration::from_secs(2));
        assert_eq!(
            value(&second, "network.bytes_per_second", "eth0"),
            Some(2000.0)
        );
        assert_eq!(value(&second, "network.errors", "eth0"), Some(0.0));
        assert_eq!(value(&second, "network.bytes_per_second", "lo"), None);
        assert_eq!(value(&second, "network.bytes_per_second", ""), Some(2000.0));
    }

    #[test]
    fn this_host_has_load_memory_and_a_root_that_is_not_empty() {
        let mut host = Host::new(PathBuf::from("/"), PathBuf::from("/no-cgroup"));
        host.read(Duration::ZERO);
        std::thread::sleep(Duration::from_millis(30));
        let reading = host.read(Duration::from_millis(30));
        assert!(reading.load1.is_some_and(|load| load >= 0.0));
        assert!(reading.memory_total > reading.memory_available);
        let used = value(&reading, "memory.used", "").expect("this host has memory");
        assert!((0.0..=100.0).contains(&used));
    }
}
