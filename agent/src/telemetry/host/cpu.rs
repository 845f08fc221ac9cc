//! Processors: load, use, steal, pressure, slowing down for heat.

use super::counters::Counters;
use super::files::{entries, field, name, number, why};
use super::{HostReading, Look, sum};
use crate::model::metric::Per;
use procfs::{FromRead, LoadAverage, PressureRecord, parse_pressure_record};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

const SHARES: [&str; 3] = ["cpu.used", "cpu.steal", "cpu.waiting_for_io"];

pub struct Cpu {
    scope: PathBuf,
    scope_us: Option<u64>,
    before: BTreeMap<String, Times>,
}

/// Time of a CPU since the start, in ticks.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Times {
    busy: u64,
    all: u64,
    steal: u64,
    waiting: u64,
}

/// What /proc/stat says (proc_stat(5)): times by `cpu`, `cpu0`, …, and numbers of tasks.
#[derive(Debug, Default)]
struct Stat {
    times: BTreeMap<String, Times>,
    runnable: Option<u64>,
    blocked: Option<u64>,
}

impl Stat {
    fn parse(text: &str) -> Self {
        let times = text
            .lines()
            .take_while(|line| line.starts_with("cpu"))
            .filter_map(|line| {
                let mut fields = line.split_ascii_whitespace();
                let cpu = fields.next()?.to_owned();
                let ticks: Vec<u64> = fields.map_while(|field| field.parse().ok()).collect();
                // Guest time, behind steal, is part of user time already.
                let at = |place: usize| ticks.get(place).copied().unwrap_or(0);
                let (idle, waiting, steal) = (at(3), at(4), at(7));
                let busy = at(0) + at(1) + at(2) + at(5) + at(6) + steal;
                let all = busy + idle + waiting;
                (ticks.len() >= 4).then_some((
                    cpu,
                    Times {
                        busy,
                        all,
                        steal,
                        waiting,
                    },
                ))
            })
            .collect();
        Self {
            times,
            runnable: field(text, "procs_running"),
            blocked: field(text, "procs_blocked"),
        }
    }
}

impl Cpu {
    pub fn new(scope: PathBuf) -> Self {
        Self {
            scope,
            scope_us: None,
            before: BTreeMap::new(),
        }
    }

    pub fn read(&mut self, look: Look, reading: &mut HostReading) {
        let path = look.path("proc/stat");
        let stat = fs::read_to_string(&path)
            .map(|text| Stat::parse(&text))
            .unwrap_or_default();
        let online = stat.times.len().saturating_sub(1) as u32;
        reading.cpus = (online > 0).then_some(online);
        if reading.cpus.is_none() {
            let why = why(&path, "procfs is not mounted below the root");
            reading.absent(&SHARES, &why);
            reading.absent(&["cpu.runnable", "cpu.blocked"], &why);
        }
        for (metric, tasks) in [
            ("cpu.runnable", stat.runnable),
            ("cpu.blocked", stat.blocked),
        ] {
            if let Some(tasks) = tasks {
                reading.device(metric, tasks as f64);
            }
        }
        load(look, reading);
        self.shares(look, reading, &stat.times);
        self.before = stat.times;
        pressures(
            &self.scope,
            Some(&look.path("proc/pressure")),
            &mut |metric, value| match value {
                Ok(value) => reading.device(metric, value),
                Err(why) => reading.absent(&[metric], &why),
            },
        );
    }

    fn shares(&mut self, look: Look, reading: &mut HostReading, now: &BTreeMap<String, Times>) {
        let of_scope = scope_us(&self.scope);
        let before = std::mem::replace(&mut self.scope_us, of_scope);
        if let (Some(now), Some(before), Some(cpus)) = (of_scope, before, reading.cpus)
            && !look.elapsed.is_zero()
        {
            let all = look.elapsed.as_micros() as f64 * f64::from(cpus);
            let used = 100.0 * now.saturating_sub(before) as f64 / all;
            reading.device("cpu.used", used.min(100.0));
        }
        for (cpu, now) in now {
            let Some(before) = self.before.get(cpu) else {
                continue;
            };
            let all = now.all.saturating_sub(before.all) as f64;
            if all <= 0.0 {
                continue;
            }
            // Counters of idle and waiting time may step back a little (proc_stat(5)).
            let share = |now: u64, before: u64| {
                (100.0 * now.saturating_sub(before) as f64 / all).min(100.0)
            };
            let used = share(now.busy, before.busy);
            if cpu != "cpu" {
                reading.of("cpu.used", Per::Cpu, cpu, used);
                continue;
            }
            if of_scope.is_none() {
                reading.device("cpu.used", used);
            }
            reading.device("cpu.steal", share(now.steal, before.steal));
            reading.device("cpu.waiting_for_io", share(now.waiting, before.waiting));
        }
    }
}

fn load(look: Look, reading: &mut HostReading) {
    let path = look.path("proc/loadavg");
    let Ok(load) = LoadAverage::from_file(&path) else {
        let why = why(&path, "procfs is not mounted below the root");
        reading.absent(&["cpu.load1", "cpu.load_per_core"], &why);
        return;
    };
    let load1 = f64::from(load.one);
    reading.load1 = Some(load1);
    reading.device("cpu.load1", load1);
    if let Some(cpus) = reading.cpus {
        reading.device("cpu.load_per_core", load1 / f64::from(cpus));
    }
}

/// CPU time that a cgroup has used, microseconds (cgroup-v2.rst, `cpu.stat`).
pub fn scope_us(cgroup: &Path) -> Option<u64> {
    let text = fs::read_to_string(cgroup.join("cpu.stat")).ok()?;
    field(&text, "usage_usec")
}

/// Pressure stall information of a cgroup, else of the host; the reason where there is none.
pub fn pressures(
    cgroup: &Path,
    host: Option<&Path>,
    found: &mut impl FnMut(&'static str, Result<f64, String>),
) {
    const OF: [(&str, &[(&str, &str)]); 3] = [
        ("cpu", &[("some", "pressure.cpu_some")]),
        (
            "memory",
            &[
                ("some", "pressure.memory_some"),
                ("full", "pressure.memory_full"),
            ],
        ),
        (
            "io",
            &[("some", "pressure.io_some"), ("full", "pressure.io_full")],
        ),
    ];
    for (resource, kinds) in OF {
        let of_cgroup = cgroup.join(format!("{resource}.pressure"));
        let of_host = host.map(|host| host.join(resource));
        let text = fs::read_to_string(&of_cgroup).ok();
        let text = text.or_else(|| fs::read_to_string(of_host.as_ref()?).ok());
        for (kind, metric) in kinds {
            let record = text.as_deref().and_then(|text| pressure(text, kind));
            let path = of_host.as_ref().unwrap_or(&of_cgroup);
            found(
                metric,
                record
                    .map(|record| f64::from(record.avg10))
                    .ok_or_else(|| why(path, "this kernel counts no pressure (CONFIG_PSI, psi=1)")),
            );
        }
    }
}

fn pressure(text: &str, kind: &str) -> Option<PressureRecord> {
    let line = text.lines().find(|line| line.starts_with(kind))?;
    parse_pressure_record(line).ok()
}

/// How often cores and packages were slowed down for their heat (x86: therm_throt).
#[derive(Default)]
pub struct Throttling(Counters);

impl Throttling {
    pub fn read(&mut self, look: Look, reading: &mut HostReading) {
        self.0.turn();
        let cpus = look.path("sys/devices/system/cpu");
        let mut packages = BTreeSet::new();
        let mut device: Option<f64> = None;
        let mut known = false;
        for directory in entries(&cpus) {
            let throttle = directory.join("thermal_throttle");
            let cpu = name(&directory);
            let Some(core) = number::<u64>(&throttle.join("core_throttle_count")) else {
                continue;
            };
            known = true;
            if let Some(more) = self.0.more("core", &cpu, core) {
                reading.of("cpu.throttle_events", Per::Cpu, &cpu, more as f64);
                device = Some(sum(device.unwrap_or(0.0), more as f64));
            }
            // Every CPU of a package shows the package's one counter.
            let package = number::<u64>(&directory.join("topology/physical_package_id"));
            let count = number::<u64>(&throttle.join("package_throttle_count"));
            if let (Some(package), Some(count)) = (package, count)
                && packages.insert(package)
                && let Some(more) = self.0.more("package", &package.to_string(), count)
            {
                device = Some(sum(device.unwrap_or(0.0), more as f64));
            }
        }
        if let Some(device) = device {
            reading.device("cpu.throttle_events", device);
        }
        if !known {
            let path = cpus.join("cpu0/thermal_throttle");
            let why = why(
                &path,
                "this processor, or its hypervisor, does not count throttling",
            );
            reading.absent(&["cpu.throttle_events"], &why);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{LATER, recorded, value, write};
    use std::time::Duration;

    #[test]
    fn pressure_is_read_with_and_without_a_full_line() {
        let some = "some avg10=2.50 avg60=0.12 avg300=0.00 total=391926\n";
        let full = format!("{some}full avg10=1.25 avg60=0.00 avg300=0.00 total=1\n");
        let (_root, mut host) =
            recorded(&[("proc/pressure/cpu", some), ("proc/pressure/io", &full)]);
        let reading = host.read(&[], Duration::from_secs(1));
        assert_eq!(value(&reading, "pressure.cpu_some", ""), Some(2.5));
        assert_eq!(value(&reading, "pressure.io_full", ""), Some(1.25));
        assert_eq!(value(&reading, "pressure.memory_some", ""), None);
        assert!(reading.absent["pressure.memory_some"].contains("psi=1"));
    }

    #[test]
    fn shares_are_of_the_interval_and_an_offline_cpu_does_not_shift_the_names() {
        let stat = |busy: u64, idle: u64, steal: u64| {
            format!(
                "cpu  {busy} 0 0 {idle} 100 0 0 {steal} 0 0\ncpu0 {busy} 0 0 {idle} 0 0 0 0 0 0\n\
                 cpu3 0 0 0 {idle} 0 0 0 0 0 0\nintr 1 2\nctxt 3\nprocs_running 5\nprocs_blocked 2\n"
            )
        };
        let (root, mut host) = recorded(&[("proc/stat", &stat(100, 1000, 0))]);
        let first = host.read(&[], Duration::from_secs(1));
        assert_eq!(value(&first, "cpu.used", ""), None);
        assert_eq!(first.cpus, Some(2));
        write(root.path(), &[("proc/stat", &stat(150, 1030, 20))]);
        let second = host.read(&[], Duration::from_secs(1));
        assert_eq!(value(&second, "cpu.used", ""), Some(70.0));
        assert_eq!(value(&second, "cpu.steal", ""), Some(20.0));
        assert_eq!(value(&second, "cpu.waiting_for_io", ""), Some(0.0));
        assert_eq!(value(&second, "cpu.used", "cpu0"), Some(62.5));
        assert_eq!(value(&second, "cpu.used", "cpu3"), Some(0.0));
        assert_eq!(value(&second, "cpu.runnable", ""), Some(5.0));
        assert_eq!(value(&second, "cpu.blocked", ""), Some(2.0));
    }

    #[test]
    fn throttling_counts_each_core_and_each_package_once() {
        let cpu = |n: u32, core: u32, package: u32| {
            let at = format!("sys/devices/system/cpu/cpu{n}");
            [
                (format!("{at}/thermal_throttle/core_throttle_count"), core),
                (
                    format!("{at}/thermal_throttle/package_throttle_count"),
                    package,
                ),
                (format!("{at}/topology/physical_package_id"), 0),
            ]
            .map(|(path, count)| (path, format!("{count}\n")))
        };
        let tree =
            |files: Vec<[(String, String); 3]>| files.into_iter().flatten().collect::<Vec<_>>();
        fn as_str(files: &[(String, String)]) -> Vec<(&str, &str)> {
            files
                .iter()
                .map(|(path, text)| (path.as_str(), text.as_str()))
                .collect()
        }
        let before = tree(vec![cpu(0, 40, 90), cpu(1, 7, 90)]);
        let (root, mut host) = recorded(&as_str(&before));
        host.read(&[], LATER);
        write(
            root.path(),
            &as_str(&tree(vec![cpu(0, 42, 93), cpu(1, 7, 93)])),
        );
        let reading = host.read(&[], LATER);
        assert_eq!(value(&reading, "cpu.throttle_events", "cpu0"), Some(2.0));
        assert_eq!(value(&reading, "cpu.throttle_events", "cpu1"), Some(0.0));
        assert_eq!(value(&reading, "cpu.throttle_events", ""), Some(5.0));
    }
}
